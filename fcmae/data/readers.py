"""What read_crop opens: an image whose header is read, by Pillow, tifffile or numpy, and whose pixels follow on demand.

What comes in is bytes or a file that can seek, wherever it is from. Files are told apart by their contents, not their
names. Pillow reads what it reads in full; TIFFs with other numbers of bands or depths go to tifffile, and .npy files
are mapped into memory. Where simplejpeg is installed it decodes the JPEGs whose headers Pillow has read: the same
pixels, sooner.
"""

from __future__ import annotations

import math
import mmap
import struct
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from typing import Any, BinaryIO, Protocol

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn import functional as F

from fcmae.data.geometry import Box, decode_scale, make_upright, stored_box
from fcmae.data.source import BadImage, OtherChannels

try:
    import simplejpeg
except ImportError:  # without the extra `jpeg`
    simplejpeg = None
decode_jpeg: Callable[..., NDArray[np.uint8]] | None = None if simplejpeg is None else simplejpeg.decode_jpeg

# No format that runs a program or a script (EPS, PDF), whatever the file is called.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's mode L

# What Pillow, tifffile and numpy raise on files that are broken or lie about their contents.
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    tokenize.TokenError,  # from numpy's reading of .npy headers
    Image.DecompressionBombError,
)


class OpenImage(Protocol):
    """An image whose header has been read: its upright size is known, its pixels are not.

    Attributes:
        height: upright, in pixels.
        width: likewise.
        channels: that the file has; 3 for colours of any kind where 1 or 3 are asked for.
        is_deep: whether its values are other than 8 bits.
    """

    height: int
    width: int
    channels: int
    is_deep: bool

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[Any]:
        """The box resized to size (height, width): (in_chans, height, width), uint8 or float32."""
        ...


def open_image(file: BinaryIO | bytes, in_chans: int) -> OpenImage:
    """Read an image's header.

    Args:
        file: the image, or a file of it that can seek, at its start, which stays open as long as the image is used.
        in_chans: see `read_crop`.

    Raises:
        BadImage: as `read_crop` does.
    """
    with reading():
        return _open(BytesIO(file) if isinstance(file, bytes) else file, in_chans)


def _open(file: BinaryIO, in_chans: int) -> OpenImage:
    start = file.read(6)
    file.seek(0)
    if start[:3] == b"\xff\xd8\xff":
        data = file.read()
        return _PillowImage(Image.open(BytesIO(data), formats=_PILLOW_FORMATS), in_chans, data)
    if start == b"\x93NUMPY":
        array = _map_npy(file)
        axis = _npy_channel_axis(array.shape, in_chans)
        return _ArrayImage(lambda: array, array.shape, array.dtype, axis, in_chans)
    if start[:4] in _TIFF_STARTS:
        return _open_tiff(file, in_chans)
    return _PillowImage(Image.open(file, formats=_PILLOW_FORMATS), in_chans)


@contextmanager
def reading() -> Iterator[None]:
    """Turn whatever a library raises on a bad file into BadImage; silence what it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; a file that decodes is good. Bombs: _check_size
        try:
            yield
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage("it is no JPEG, PNG, WebP, BMP, TIFF or .npy file") from error
        except _READ_ERRORS as error:
            raise BadImage.unread(error) from error


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise BadImage(f"it is empty: {height} x {width} pixels")
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"it has {height} x {width} pixels, more than PIL.Image.MAX_IMAGE_PIXELS allows")


def _check_channels(channels: int, in_chans: int) -> None:
    if channels != in_chans and not (in_chans in (1, 3) and channels in (1, 3)):
        raise OtherChannels(channels, in_chans)


def _match_channels(pixels: NDArray[Any], in_chans: int) -> NDArray[Any]:
    """(C, H, W) with the C that _check_channels let through, to (in_chans, H, W)."""
    if len(pixels) == in_chans:
        return pixels
    if in_chans == 3:
        return np.repeat(pixels, 3, axis=0)
    grey = np.tensordot(_GREY_WEIGHTS, pixels, axes=1)[None]
    return np.rint(grey).astype(np.uint8) if pixels.dtype == np.uint8 else grey


class _PillowImage:
    def __init__(self, image: Image.Image, in_chans: int, jpeg: bytes | None = None) -> None:
        self._image, self._in_chans, self._jpeg = image, in_chans, jpeg
        _check_size(image.height, image.width)
        self.channels = _num_channels(image, in_chans)
        self.is_deep = image.mode == "F" or image.mode.startswith("I")
        _check_channels(self.channels, in_chans)
        # Pillow itself turns TIFFs upright, in their size at once and in their pixels when it decodes them.
        self._orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
        self._stored_size = image.height, image.width
        self._swapped = self._orientation in (5, 6, 7, 8)
        self.height, self.width = self._stored_size[::-1] if self._swapped else self._stored_size

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[Any]:
        stored_height, stored_width = self._stored_size
        planes, scale, full_range = self._decode(decode_scale(box[2], box[3], size))
        top, left, height, width = stored_box(box, self._orientation, stored_height, stored_width)
        # The last column of a scaled JPEG may stand for fewer than `scale` stored ones.
        corners = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        stored_size = size[::-1] if self._swapped else size
        resized = [_resize(plane, corners, stored_size) for plane in planes]
        pixels = resized[0] if len(resized) == 1 else np.concatenate(resized)  # (C, H, W)
        if full_range:
            pixels = (pixels / np.float32(full_range)).clip(0, 1)
        if self._orientation != 1:
            pixels = make_upright(pixels.transpose(1, 2, 0), self._orientation).transpose(2, 0, 1)
        return np.ascontiguousarray(_match_channels(pixels, self._in_chans))

    def _decode(self, scale: int) -> tuple[Sequence[Image.Image | NDArray[np.uint8]], int, int]:
        """Planes, how many times smaller than stored (1; JPEGs `scale`), and their full range, or 0 if it is 255."""
        image, grey = self._image, self._in_chans == 1
        if decode_jpeg is not None and self._jpeg is not None and image.mode in ("L", "RGB"):
            # It is libjpeg-turbo, as in Pillow, and gives the same pixels, but leaves them packed and in one array.
            # The smallest that is at least so large, and at least `scale` times smaller: exactly that scale.
            height, width = (-(-side // scale) for side in self._stored_size)
            colours = "GRAY" if grey or image.mode == "L" else "RGB"
            # It raises ValueError for all that libjpeg warns of; Pillow decides which of that is good enough.
            with suppress(ValueError):
                decoded = decode_jpeg(self._jpeg, colours, min_height=height, min_width=width, min_factor=scale)
                if decoded.shape[:2] == (height, width):
                    return [decoded], scale, 0
        height, width = self._stored_size
        draft = image.draft("L" if grey else "RGB", (width // scale, height // scale))
        planes, full_range = _planes(image, self._in_chans)
        return planes, 1 if draft is None else round(width / draft[1][2]), full_range


def _resize(
    plane: Image.Image | NDArray[np.uint8], corners: tuple[float, float, float, float], size: tuple[int, int]
) -> NDArray[Any]:
    """Part of a plane resized (bicubic, antialiased); pixels outside of it do not count, as if it had been cut out.

    plane: of mode L, RGB or F; or (H, W, C) uint8. corners: left, top, right, bottom, in pixels of the plane; fractions
    of a pixel are kept. size: height and width of the result.
    Returns (C, height, width), uint8 or float32.
    """
    left, top, right, bottom = (math.floor(corners[0]), math.floor(corners[1]), *map(math.ceil, corners[2:]))
    inner = (corners[0] - left, corners[1] - top, corners[2] - left, corners[3] - top)
    if isinstance(plane, Image.Image):
        part = np.array(plane.crop((left, top, right, bottom)))
        part = part.reshape(*part.shape[:2], -1)
    else:
        part = plane[top:bottom, left:right]  # (h, w, C)
    if part.dtype == np.uint8 and inner == (0, 0, right - left, bottom - top):
        # Vectorised, three to four times as fast as Pillow. They differ by 1 in a few of a thousand values.
        images = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None]  # (1, C, h, w), channels last
        return F.interpolate(images, size, mode="bicubic", antialias=True)[0].numpy()
    image = Image.fromarray(np.ascontiguousarray(part[..., 0] if part.shape[2] == 1 else part))
    out = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, inner))
    return out[None] if out.ndim == 2 else out.transpose(2, 0, 1)


def _num_channels(image: Image.Image, in_chans: int) -> int:
    """Channels of the planes that _planes makes."""
    if in_chans in (1, 3):
        return 1 if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") else 3
    if image.mode == "P":
        return 4 if "transparency" in image.info else 3
    return len(image.getbands())


def _planes(image: Image.Image, in_chans: int) -> tuple[list[Image.Image], int]:
    """Decode into images that Pillow resizes without loss (L, RGB, F), and their full range where it is not 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        full_range = 65535 if image.mode.startswith("I;16") else 0
        plane = image.convert("F")
        if full_range and image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            full_range = 2 ** max(tags.get(258, (16,))) - 1  # of 10, 12 or 14 bits in 16, too
            if tags.get(262) == 0:  # 0 = white; Pillow itself inverts 8 bits only
                plane = plane.point(lambda value: value * -1 + full_range)
        return [plane], full_range
    if image.mode == "P":
        # By way of RGBA where entries are transparent: their colours are kept, only the transparency is dropped.
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if in_chans in (1, 3):
        mode = "L" if in_chans == 1 or image.mode in ("1", "L", "LA") else "RGB"
        return [image if image.mode == mode else image.convert(mode)], 0
    # One by one: Pillow would weigh the colours of an RGBA image by its alpha.
    return list(image.split()), 0


def _open_tiff(file: BinaryIO, in_chans: int) -> OpenImage:
    try:
        image = Image.open(file, formats=["TIFF"])
    except UnidentifiedImageError:  # so Pillow calls bands and depths that it does not know
        image = None
    if image is not None and not _pillow_reads_all_of(image, in_chans):
        image = None
    if image is not None and getattr(image, "n_frames", 1) == 1:
        return _PillowImage(image, in_chans)
    file.seek(0)
    tiff = tifffile.TiffFile(file)
    if image is not None and not _channel_pages(tiff.series[0]):
        return _PillowImage(image, in_chans)
    return _open_tifffile(tiff, in_chans)


def _channel_pages(series: tifffile.TiffPageSeries) -> int:
    """How many channels a series stores as pages, as ImageJ and OME do; 0 if it does not."""
    channels: int = series.sizes.get("channel", series.sizes.get("sample", 1))
    return channels if series.keyframe.samplesperpixel == 1 and channels > 1 else 0


def _pillow_reads_all_of(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow keeps every band and bit of a TIFF that matters for in_chans."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(254, 0) & 1:
        return False  # the first page is a thumbnail
    if image.mode == "F" and tags.prefix == b"MM" and tags.get(259, 1) != 1:
        return False  # Pillow swaps the bytes of compressed floats twice
    bits, samples, is_rgb = tags.get(258, (1,)), tags.get(277, 1), tags.get(262) == 2
    if max(bits) > 8 and not (samples == 1 and image.mode in ("I;16", "I;16B", "F")):
        return False
    if in_chans in (1, 3):
        return bool(samples == len(image.getbands()) or is_rgb)
    return bool(samples == len(image.getbands()) == in_chans)


def _open_tifffile(tiff: tifffile.TiffFile, in_chans: int) -> OpenImage:
    colour = in_chans in (1, 3)
    page = next((page for page in tiff.pages if not page.is_reduced), tiff.pages[0])
    series = next((series for series in tiff.series if page in series.pages), tiff.series[0])
    if (channels := _channel_pages(series)) and in_chans == 1:
        raise BadImage(f"it has {channels} channels as pages, in_chans is 1")
    source = page if colour and not channels else series
    axes, shape = source.axes, source.shape
    band_axes = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if axes.count("Y") != 1 or axes.count("X") != 1 or axes.index("Y") > axes.index("X") or len(band_axes) > 1:
        raise BadImage(f"it has the axes {axes}, not rows, columns and at most one of bands")
    axis = band_axes[0] if band_axes else None
    extra = colour and page.photometric == 2 and axis is not None and shape[axis] > 3  # RGB and more, such as alpha
    inverted = page.photometric == 0  # 0 = white

    bits = page.bitspersample
    full_range = 2**bits - 1 if np.dtype(source.dtype).kind == "u" and bits in range(9, 17) else 0

    def load() -> NDArray[Any]:
        array = source.asarray(maxworkers=1)
        if inverted and array.dtype.kind in "ub":
            array = full_range - array if full_range else ~array
        return np.take(array, range(3), axis=axis) if extra else array

    if extra:
        shape = tuple(3 if i == axis else side for i, side in enumerate(shape))
    orientation = page.tags.valueof(274, 1)
    return _ArrayImage(load, shape, np.dtype(source.dtype), axis, in_chans, orientation, full_range)


def _map_npy(file: BinaryIO) -> NDArray[Any]:
    """The array of a .npy file, of which only the pages that are used are read where the file is on disk."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise BadImage(f"it is of version {version[0]}.{version[1]} of the .npy format, which is not known")
    # 3.0 differs from 2.0 in the names of fields, which arrays of numbers do not have.
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read_header(file)
    if dtype.hasobject:  # never unpickled
        raise BadImage(f"it holds values of type {dtype}, not numbers")
    start = file.tell()
    on_disk = isinstance(getattr(file, "raw", file), FileIO)
    file.seek(0)
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if on_disk else file.read()
    array: NDArray[Any] = np.ndarray(shape, dtype, content, start, order="F" if by_column else "C")
    return array


def _npy_channel_axis(shape: tuple[int, ...], in_chans: int) -> int | None:
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        raise BadImage(f"it has the shape {shape}, not (H, W), (H, W, C) or (C, H, W)")
    for channels in (in_chans, 1, 3) if in_chans in (1, 3) else (in_chans,):
        for axis in (2, 0):
            if shape[axis] == channels:
                return axis
    return 2 if shape[2] <= shape[0] else 0


class _ArrayImage:
    def __init__(
        self,
        load: Callable[[], NDArray[Any]],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        channel_axis: int | None,
        in_chans: int,
        orientation: int = 1,
        full_range: int = 65535,
    ) -> None:
        self._load, self._axis, self._in_chans, self._orientation = load, channel_axis, in_chans, orientation
        self._full_range = full_range  # of unsigned integers of 16 bits
        self.channels = 1 if channel_axis is None else shape[channel_axis]
        self.is_deep = dtype not in (np.uint8, np.bool_)
        height, width = (side for i, side in enumerate(shape) if i != channel_axis)
        _check_size(height, width)
        _check_channels(self.channels, in_chans)
        if dtype.kind not in "buif":
            raise BadImage(f"it holds values of type {dtype}, not numbers")
        self.height, self.width = (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[Any]:
        top, left, height, width = box
        array = self._load()
        array = array[..., None] if self._axis is None else np.moveaxis(array, self._axis, -1)  # (H, W, C)
        array = make_upright(array, self._orientation)[top : top + height, left : left + width]
        is_16_bit = array.dtype.kind == "u" and array.dtype.itemsize == 2
        if array.dtype == np.bool_:
            array = array.astype(np.uint8) * 255
        if array.dtype != np.uint8:
            array = array.astype(np.float32)
        if is_16_bit:
            array /= np.float32(self._full_range)
        planes = [Image.fromarray(np.ascontiguousarray(array[..., i])) for i in range(array.shape[-1])]
        pixels = np.stack([np.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC)) for plane in planes])
        if is_16_bit:
            pixels = pixels.clip(0, 1)  # bicubic weights overshoot
        return _match_channels(pixels, self._in_chans)
