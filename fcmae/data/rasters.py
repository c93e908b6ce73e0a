"""Images of any size, read window by window; and label maps, whose values are names and never mixed.

Of a TIFF whose strips or tiles can be read by themselves, and of a .npy file, only those that a window touches are
read. All else is decoded whole, once, within max_pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcmae.data.arrays import Pixels, nodata_of
from fcmae.data.geometry import MAX_PIXELS, Box, make_upright
from fcmae.data.limits import check_finite, check_size, reading
from fcmae.data.readers import PILLOW_FORMATS, map_npy, open_image, orientation_of, spread_of, stored_values
from fcmae.data.source import BadImage, is_dicom
from fcmae.data.tiff import (
    GDAL_NODATA,
    JPEG_COMPRESSIONS,
    is_sparse,
    num_planes,
    open_tiff,
    open_tiles,
    plain_page,
    read_window,
)


class Raster:
    """An image whose parts can be read one after the other.

    Attributes:
        height: in pixels.
        width: likewise.

    Args:
        file: the image, which can seek, at its start; it stays open as long as the raster is used.
        in_chans: see `fcmae.data.decode.read_crop`.
        fill: likewise.
        max_pixels: of a part that is read, and of an image that can only be read whole.
        nodata: see `read_crop`.

    Raises:
        BadImage: as `read_crop` does.
    """

    def __init__(
        self,
        file: BinaryIO,
        in_chans: int,
        fill: Sequence[float],
        max_pixels: int = MAX_PIXELS,
        nodata: float | None = None,
    ) -> None:
        self._fill, self._max_pixels = fill, max_pixels
        self._whole: Pixels | None = None
        tiles = open_tiles(file, in_chans, max_pixels)
        file.seek(0)
        self._in_parts = tiles is not None or file.read(6) == b"\x93NUMPY"
        file.seek(0)
        image = tiles or open_image(file, in_chans, max_pixels)
        with reading(max_pixels):
            self._image = image if nodata is None else image.without(nodata)
        self.height, self.width = self._image.height, self._image.width

    def read(self, box: Box, size: tuple[int, int] | None = None) -> Pixels:
        """A part of it, as `read_crop` gives it.

        Args:
            box: which.
            size: height and width that it is resized to; None for its own, which may be followed by other parts.

        Raises:
            BadImage: if it cannot be read.
        """
        with reading(self._max_pixels):
            if size is not None or self._in_parts:
                return self._pixels(box, size or box[2:])
            if self._whole is None:
                self._whole = self._pixels((0, 0, self.height, self.width), (self.height, self.width))
            part = np.s_[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            values, known = self._whole
            return Pixels(values[part], None if known is None else known[part])

    def _pixels(self, box: Box, size: tuple[int, int]) -> Pixels:
        pixels = self._image.read(box, size, self._fill)
        check_finite(pixels.values)
        return pixels


class LabelMap:
    """A map of one channel of whole numbers, as they are stored: of a palette, the numbers of its colours.

    Attributes:
        height: in pixels.
        width: likewise.
        nodata: the number that GDAL_NODATA states for pixels without a class, if it does.

    Args:
        file: the map, which can seek, at its start; it stays open as long as it is used.
        max_pixels: see `Raster`.

    Raises:
        BadImage: if it cannot be read, or has several pages, several channels or other numbers.
    """

    def __init__(self, file: BinaryIO, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        with reading(max_pixels):
            tiff = open_tiff(file)
            if tiff is not None and (num := num_planes(tiff.series[0])) > 1:
                raise BadImage(f"it has {num} pages, and a label map is one: save the page that belongs to the image")
            if tiff is not None and tiff.pages[0].compression in JPEG_COMPRESSIONS:
                raise BadImage("it is compressed as JPEG, which changes the numbers that it stores: save it otherwise")
            self._page = None if tiff is None else plain_page(tiff)
            if self._page is not None:
                self._array, dtype = None, self._page.dtype
                self.height, self.width = self._page.imagelength, self._page.imagewidth
                channels = self._page.samplesperpixel
            else:
                file.seek(0)
                self._array = _stored_values(file, max_pixels)
                self.height, self.width = self._array.shape[:2]
                dtype, channels = self._array.dtype, math.prod(self._array.shape[2:])
        if channels != 1 or dtype.kind not in "bui":
            raise BadImage(
                f"it has {channels} channels of type {dtype}, and a label map one of whole numbers: store the number "
                "of each pixel's class"
            )
        stated = None if tiff is None else nodata_of(tiff.pages.first.tags.valueof(GDAL_NODATA), dtype)
        self.nodata = None if stated is None else int(stated)

    def read(self, box: Box, size: tuple[int, int] | None = None) -> NDArray[np.int64]:
        """A part of it, by the nearest pixel.

        Args:
            box: which.
            size: height and width that it is resized to; None for its own.

        Returns:
            (height, width).

        Raises:
            BadImage: if it cannot be read.
        """
        top, left, height, width = box
        with reading(self._max_pixels):
            if self._page is not None:
                part = read_window(self._page, box, self._max_pixels)[..., 0]
            else:
                assert self._array is not None
                part = self._array.reshape(self.height, self.width)[top : top + height, left : left + width]
        if size is not None and size != box[2:]:
            part = part[np.ix_(_nearest(height, size[0]), _nearest(width, size[1]))]
        return part.astype(np.int64)


def _nearest(side: int, size: int) -> NDArray[np.int64]:
    """The pixels of a side under the middles of as many as `size` that it becomes."""
    return ((np.arange(size) + 0.5) * side / size).astype(np.int64)


def _stored_values(file: BinaryIO, max_pixels: int) -> NDArray[Any]:
    """All values of a map that cannot be read in parts, or are mapped into memory."""
    if file.read(6) == b"\x93NUMPY":
        file.seek(0)
        array = map_npy(file)
        return array[0] if array.ndim == 3 and array.shape[0] == 1 < array.shape[2] else array  # (1, H, W)
    file.seek(0)
    content = file.read()
    if is_dicom(content[:132]):
        raise BadImage("it is DICOM, and label maps are PNG, TIFF or .npy files: save it as one")
    with Image.open(BytesIO(content), formats=PILLOW_FORMATS) as image:
        # Of classes that fill a map nothing is left when it is compressed, and 8 pixels may share a byte before.
        depth = {"I;16": 2, "I;16B": 2, "I": 4, "F": 4}.get(image.mode, 1 / 8)
        check_size(image.height, image.width, depth, len(content), max_pixels)
        if image.format == "JPEG":
            raise BadImage("it is a JPEG, which changes the numbers that it stores: give a PNG, TIFF or .npy file")
        if is_sparse(image):
            raise BadImage("it leaves out strips or tiles, and is of a kind that can only be read whole: save it again")
        return np.ascontiguousarray(make_upright(stored_values(image, spread_of(image)), orientation_of(image)))
