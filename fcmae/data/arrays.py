"""Images as arrays of values, of whatever type: their channels, what of them is missing, and crops of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcmae.data.geometry import Box, make_upright
from fcmae.data.source import BadImage, OtherChannels

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's mode L


class Pixels(NamedTuple):
    """A part of an image.

    Attributes:
        values: (in_chans, height, width), uint8 or float32.
        known: of the same shape, false for values that something missing went into; None if nothing is missing.
    """

    values: NDArray[Any]
    known: NDArray[np.bool_] | None = None

    @property
    def is_seen(self) -> NDArray[np.bool_] | None:
        """(H, W), False where all channels are missing; None where `known` is."""
        return None if self.known is None else np.asarray(self.known.any(axis=0))


class OpenImage(Protocol):
    """An image whose header has been read: its upright size is known, its pixels are not.

    Attributes:
        height: upright, in pixels.
        width: likewise.
        channels: that the file has; 3 for colours of any kind where 1 or 3 are asked for.
        is_deep: whether its values are other than 8 bits.
        is_share: whether its values are shares of a full range, 0..1; others are as stored, or in a modality's units.
        pixel_bytes: that a pixel takes once it is read.
    """

    height: int
    width: int
    channels: int
    is_deep: bool
    is_share: bool
    pixel_bytes: int

    def read(self, box: Box, size: tuple[int, int], fill: Sequence[float] | None) -> Pixels:
        """A part of it.

        Args:
            box: which.
            size: height and width that it is resized to.
            fill: see `read_crop`.
        """
        ...

    def without(self, nodata: float) -> OpenImage:
        """The image with this stored value missing too; of formats that change what they store, as it is."""
        ...


def check_channels(channels: int, in_chans: int) -> None:
    """Refuse an image whose channels cannot become in_chans.

    Args:
        channels: that it has.
        in_chans: see `read_crop`.

    Raises:
        OtherChannels: with both numbers.
    """
    if channels != in_chans and not (in_chans in (1, 3) and channels in (1, 3)):
        raise OtherChannels(channels, in_chans)


def match_channels(pixels: NDArray[Any], in_chans: int) -> NDArray[Any]:
    """The channels of an image as those that are asked for.

    Args:
        pixels: (C, H, W), with the C that `check_channels` let through.
        in_chans: see `read_crop`.

    Returns:
        (in_chans, H, W).
    """
    if len(pixels) == in_chans:
        return pixels
    if in_chans == 3:
        return np.repeat(pixels, 3, axis=0)
    grey = np.tensordot(GREY_WEIGHTS, pixels, axes=1)[None]
    return np.rint(grey).astype(np.uint8) if pixels.dtype == np.uint8 else grey


def nodata_of(text: Any, dtype: np.dtype[Any]) -> float | None:
    """The number that stands for missing values, if values of this type can be it."""
    try:
        value = float(str(text).strip(" \0"))
        return value if dtype.kind == "f" or (dtype.kind in "bui" and dtype.type(int(value)) == value) else None
    except (ValueError, OverflowError):  # no tag, no number, or one that is out of the type's range
        return None


class ArrayImage:
    """Values of any type that some library reads into an array.

    Args:
        load: reads them.
        shape: that they will have.
        dtype: likewise.
        channel_axis: which axis is that of the channels; None: there is none.
        in_chans: see `open_image`.
        orientation: EXIF's.
        bits: of a value, as the file declares them; 2 ** bits - 1 is the full range of unsigned ones of up to 16.
        inverted: 0 is white.
        nodata: the stored value that stands for a missing one, or the first and the last of several.
        may_be_empty: all values may be missing, as those of a part.
        show: makes of stored values (h, w, C), which are compared with `nodata`, those of the image, as many or with
            other channels; None leaves them. The arguments above are of the stored ones, but for `bits`.

    Raises:
        BadImage: for other channels, or values that are no numbers.
    """

    def __init__(
        self,
        load: Callable[[], NDArray[Any]],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        channel_axis: int | None,
        in_chans: int,
        *,
        orientation: int = 1,
        bits: int | None = None,
        inverted: bool = False,
        nodata: float | tuple[float, float] | None = None,
        may_be_empty: bool = False,
        show: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    ) -> None:
        self._load, self._axis, self._in_chans, self._orientation = load, channel_axis, in_chans, orientation
        self._bits, self._inverted, self._dtype = bits or 8 * dtype.itemsize, inverted, dtype
        several = nodata if isinstance(nodata, tuple) else (nodata, nodata)
        self._nodata = [] if nodata is None else [several]
        self._may_be_empty, self._show = may_be_empty, show
        channels = 1 if channel_axis is None else shape[channel_axis]
        if show is not None:
            shown = show(np.zeros((1, 1, channels), dtype))
            channels, dtype = shown.shape[2], shown.dtype
        self.channels = channels
        self.is_deep = dtype not in (np.uint8, np.bool_)
        self.is_share = not self.is_deep or self._full_range(dtype) > 0
        height, width = (side for i, side in enumerate(shape) if i != channel_axis)
        check_channels(channels, in_chans)
        if dtype.kind not in "buif":
            raise BadImage(f"it holds values of type {dtype}, not numbers")
        value_bytes = dtype.itemsize if dtype.itemsize == 1 and dtype.kind in "bu" else max(4, dtype.itemsize)
        self.pixel_bytes, self._shape = channels * value_bytes, shape
        self.height, self.width = (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def read(self, box: Box, size: tuple[int, int], fill: Sequence[float] | None) -> Pixels:
        top, left, height, width = box
        array = self._load()
        if array.shape != self._shape:
            raise BadImage(f"its pixels have the shape {array.shape}, its header says {self._shape}")
        array = array[..., None] if self._axis is None else np.moveaxis(array, self._axis, -1)  # (H, W, C)
        array = make_upright(array, self._orientation)
        part = array[top : top + height, left : left + width]  # (h, w, C)
        part, missing = self._shown(part)
        if not self._may_be_empty and missing.all() and self._shown(array)[1].all():
            raise BadImage("it holds no values: all are missing")
        planes: Sequence[NDArray[Any]] = [self._plane(part[..., i]) for i in range(part.shape[-1])]
        known = None
        if missing.any():
            lacking = missing.transpose(2, 0, 1)
            if len(lacking) != self._in_chans:  # each channel of the result is made of all
                lacking = np.broadcast_to(lacking.any(axis=0), (self._in_chans, height, width))
            planes = list(_filled(np.stack(planes), lacking, self._in_chans, fill))
            known = _resized(lacking.astype(np.float32), size) == 0
        pixels = _resized(planes, size)
        if self._full_range(part.dtype):
            pixels = pixels.clip(0, 1)  # bicubic weights overshoot
        return Pixels(match_channels(pixels, self._in_chans), known)

    def without(self, nodata: float) -> ArrayImage:
        if (value := nodata_of(nodata, self._dtype)) is not None:
            self._nodata.append((value, value))
        return self

    def _full_range(self, dtype: np.dtype[Any]) -> int:
        """By which values are divided: 0 where they are kept."""
        is_plain = dtype == np.uint8 and self._bits == 8
        return 2**self._bits - 1 if dtype.kind == "u" and self._bits <= 16 and not is_plain else 0

    def _plane(self, values: NDArray[Any]) -> NDArray[Any]:
        """(h, w) as stored, to uint8 or float32 in the units of `read_crop`."""
        full_range = self._full_range(values.dtype)
        if self._inverted and values.dtype.kind in "ub":
            values = full_range - values if full_range else ~values
        if values.dtype == np.bool_:
            values = np.where(values, np.uint8(255), np.uint8(0))
        is_plain = values.dtype == np.uint8 and not full_range
        plane: NDArray[Any] = values.astype(np.uint8 if is_plain else np.float32, order="C")
        if full_range:
            plane /= np.float32(full_range)
        return plane

    def _shown(self, stored: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(h, w, C) as stored to those of the image, and which of them are missing."""
        missing = self._missing(stored)
        if self._show is None:
            return stored, missing
        shown = self._show(stored)
        if shown.shape != missing.shape:
            missing = np.broadcast_to(missing.all(axis=-1, keepdims=True), shown.shape)
        return shown, missing if shown.dtype.kind != "f" else missing | ~np.isfinite(shown)

    def _missing(self, array: NDArray[Any]) -> NDArray[np.bool_]:
        """Of (h, w, C), which values are missing."""
        kind = array.dtype.kind
        missing: NDArray[np.bool_] = ~np.isfinite(array) if kind == "f" else np.zeros(array.shape, np.bool_)
        for first, last in self._nodata:
            low, high = array.dtype.type(first), array.dtype.type(last)
            is_nodata = array == low if low == high else (array >= low) & (array <= high)
            if kind in "bu":  # 0, say, is also a value that a band may have beside others
                is_nodata = np.broadcast_to(is_nodata.all(axis=-1, keepdims=True), array.shape)
            missing |= is_nodata
        return missing


def _resized(planes: Iterable[NDArray[Any]], size: tuple[int, int]) -> NDArray[Any]:
    """Planes (h, w) as (C, height, width)."""
    images = [Image.fromarray(plane).resize(size[::-1], Image.Resampling.BICUBIC) for plane in planes]
    return np.stack([np.asarray(image) for image in images])


def _filled(
    pixels: NDArray[Any], missing: NDArray[np.bool_], in_chans: int, fill: Sequence[float] | None
) -> NDArray[Any]:
    """Pixels (C, h, w) as in_chans channels with missing values filled, before a resize would spread them."""
    pixels = match_channels(pixels, in_chans)
    if fill is None and pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255)
    return np.where(missing, in_units([np.nan] if fill is None else fill, pixels.dtype), pixels)


def in_units(fill: Sequence[float], dtype: np.dtype[Any]) -> NDArray[Any]:
    """What stands for missing values, as images of a type have it.

    Args:
        fill: (C,), in units of a full range of 1.
        dtype: uint8, or a float.

    Returns:
        (C, 1, 1), of that type.
    """
    values = np.asarray(fill, np.float32).reshape(-1, 1, 1)
    return (np.rint(values * 255).clip(0, 255) if dtype == np.uint8 else values).astype(dtype)
