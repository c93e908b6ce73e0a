"""Images of any size, read window by window; and label maps, whose values are names and never mixed.

Of a TIFF whose strips or tiles can be read by themselves, and of a .npy file, only those that a window touches are
read. All else is decoded whole, once, within max_pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fcmae.data.arrays import ArrayImage, Pixels, check_channels, nodata_of
from fcmae.data.geometry import MAX_CHANNELS, MAX_PIXELS, Box, make_upright
from fcmae.data.limits import check_finite, check_size, reading
from fcmae.data.readers import (
    MAX_PAGES,
    PILLOW_FORMATS,
    TIFF_STARTS,
    channel_pages,
    check_segments,
    check_unpacked,
    is_sparse,
    left_out_of,
    map_npy,
    num_planes,
    open_image,
    orientation_of,
    spread_of,
    stored_values,
    without_alpha,
)
from fcmae.data.source import BadImage, is_dicom

# GeoTIFF's: scale, tie points, matrix, keys and their values; and the coefficients of a satellite's camera (RPC).
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)


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


def open_tiles(file: BinaryIO, in_chans: int, max_pixels: int = MAX_PIXELS) -> Tiles | None:
    """A TIFF that can be read in parts, or None.

    Args:
        file: at its start.
        in_chans: see `fcmae.data.decode.read_crop`.
        max_pixels: of a part.

    Raises:
        BadImage: if it is damaged.
    """
    with reading(max_pixels):
        tiff = _open_tiff(file)
        page = None if tiff is None or num_planes(tiff.series[0]) > 1 else _plain_page(tiff)
    if page is None or page.photometric not in (0, 1, 2) or math.prod(_segments(page)[3:]) > max_pixels:
        return None
    return Tiles(page, in_chans, max_pixels)


class Tiles:
    """A TIFF of which only the strips or tiles that a part touches are read: an `OpenImage`.

    Args:
        page: of tifffile.
        in_chans: see `fcmae.data.decode.read_crop`.
        max_pixels: of a part.
    """

    def __init__(self, page: Any, in_chans: int, max_pixels: int) -> None:
        self._page, self._in_chans, self._max_pixels = page, in_chans, max_pixels
        self._nodata: float | None = None
        self.height, self.width = page.imagelength, page.imagewidth
        self._kept = without_alpha(page, in_chans)
        self.channels = len(self._kept)
        check_channels(self.channels, in_chans)
        self.is_deep = page.dtype not in (np.uint8, np.bool_)
        self.is_share = page.dtype.kind in "bu" and page.bitspersample <= 16
        self.pixel_bytes = page.samplesperpixel * (max(4, page.dtype.itemsize) if self.is_deep else 1)

    def read(self, box: Box, size: tuple[int, int], fill: Sequence[float] | None) -> Pixels:
        page, window = self._page, read_window(self._page, box, self._max_pixels)
        if self.channels < window.shape[2]:
            window = window[..., self._kept]
        image = ArrayImage(
            lambda: window,
            window.shape,
            window.dtype,
            2,
            self._in_chans,
            bits=page.bitspersample,
            inverted=page.photometric == 0,
            nodata=nodata_of(page.tags.valueof(42113), window.dtype),
            may_be_empty=True,
        )
        if self._nodata is not None:
            image = image.without(self._nodata)
        return image.read((0, 0, *box[2:]), size, fill)

    def without(self, nodata: float) -> Tiles:
        self._nodata = nodata
        return self


JPEG = (6, 7, 34892)  # compressions of TIFFs


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
            tiff = _open_tiff(file)
            if tiff is not None and (num := num_planes(tiff.series[0])) > 1:
                raise BadImage(f"it has {num} pages, and a label map is one: save the page that belongs to the image")
            if tiff is not None and tiff.pages[0].compression in JPEG:
                raise BadImage("it is compressed as JPEG, which changes the numbers that it stores: save it otherwise")
            self._page = None if tiff is None else _plain_page(tiff)
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
        stated = None if tiff is None else nodata_of(tiff.pages.first.tags.valueof(42113), dtype)
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


def num_bands(file: BinaryIO) -> int:
    """How many bands a TIFF of grey or RGB says it has, those behind it with it and without alpha; 0 of other files.

    Args:
        file: at its start.

    Raises:
        BadImage: if it is damaged.
    """
    if file.read(4) not in TIFF_STARTS:
        return 0
    file.seek(0)
    with reading(MAX_PIXELS):
        page = tifffile.TiffFile(file).pages.first
        grey_or_rgb = {0: 1, 1: 1, 2: 3}.get(page.photometric, 0)
        return grey_or_rgb and grey_or_rgb + page.extrasamples.count(0)  # 0: unspecified


def samples_with_alpha(file: BinaryIO) -> int:
    """Samples of a TIFF of more than 8 bits, some behind its colours, that it does not call data; 0 of others.

    Writers call any fourth channel alpha, also of what is no picture.

    Args:
        file: at its start.

    Raises:
        BadImage: if it is damaged.
    """
    with reading(MAX_PIXELS):
        if (tiff := _open_tiff(file)) is None:
            return 0
        page = tiff.pages.first
        is_deep_rgb = page.photometric == 2 and page.dtype is not None and page.dtype.itemsize > 1
        num: int = page.samplesperpixel
        return num if is_deep_rgb and num > 3 + page.extrasamples.count(0) else 0


def num_pages(file: BinaryIO) -> tuple[int, bool]:
    """How many pages a TIFF has that are no channels, of which only the first is read as grey or RGB; 1 of other files.

    Args:
        file: at its start.

    Returns:
        Their number, and whether so many channels read them all.

    Raises:
        BadImage: if it is damaged.
    """
    with reading(MAX_PIXELS):
        if (tiff := _open_tiff(file)) is None:
            return 1, False
        series = tiff.series[0]
        num = 1 if channel_pages(series) else num_planes(series)
        are_bands = sum(axis not in "YX" for axis in series.axes) == 1 and series.keyframe.samplesperpixel == 1
        return num, are_bands and num <= MAX_CHANNELS and num not in (1, 3)


def _open_tiff(file: BinaryIO) -> Any:
    """A TIFF of tifffile; None of other files. file: at its start."""
    if file.read(4) not in TIFF_STARTS:
        return None
    file.seek(0)
    tiff = tifffile.TiffFile(file)
    if len(tiff.pages) > MAX_PAGES:
        raise BadImage(f"it has {len(tiff.pages)} pages, more than {MAX_PAGES}")
    return tiff


def geo_tags(file: BinaryIO) -> list[tuple[int, int, int, Any, bool]]:
    """Where on earth a GeoTIFF lies, as tifffile writes tags; nothing of other files.

    Args:
        file: at its start.

    Raises:
        BadImage: if its rows are not stored from the top, each from the left, as they are read: the place of what is
            turned upright would be another.
    """
    if file.read(4) not in TIFF_STARTS:
        return []
    file.seek(0)
    with reading(MAX_PIXELS):
        tags = tifffile.TiffFile(file).pages.first.tags
        found = [tags[code] for code in GEO_TAGS if code in tags]
        if found and tags.valueof("Orientation", 1) in range(2, 9):
            raise BadImage(
                "it has a place on earth and an Orientation other than 1: store it with its rows from the top"
            )
        return [(tag.code, int(tag.dtype), tag.count, _stored(tag, file), True) for tag in found]


def _stored(tag: Any, file: BinaryIO) -> Any:
    """What a tag holds; text as its bytes, as it may not be ASCII, which is all that tifffile writes."""
    if tag.dtype != tifffile.DATATYPE.ASCII:
        return tag.value
    file.seek(tag.valueoffset)
    return file.read(tag.count)


def read_window(page: Any, box: Box, max_pixels: int) -> NDArray[Any]:
    """The stored values of a part of a TIFF, by the strips or tiles that it touches.

    Args:
        page: of tifffile, see `_plain_page`.
        box: which part.
        max_pixels: of it.

    Returns:
        (height, width, bands).

    Raises:
        BadImage: if the part is larger, or the file is cut off.
    """
    top, left, height, width = box
    check_size(height, width, page.samplesperpixel * page.dtype.itemsize, page.parent.filehandle.size, max_pixels)
    window = np.full((height, width, page.samplesperpixel), left_out_of(page), page.dtype)
    planes, across_rows, across_columns, rows, columns = _segments(page)
    if rows * columns > max_pixels:
        raise BadImage(f"its strips or tiles have {rows} x {columns} pixels, more than max_pixels = {max_pixels}")
    file = page.parent.filehandle
    for plane in range(planes):
        for row in range(top // rows, min(across_rows, -(-(top + height) // rows))):
            for column in range(left // columns, min(across_columns, -(-(left + width) // columns))):
                index = (plane * across_rows + row) * across_columns + column
                check_unpacked(page, [index])
                file.seek(page.dataoffsets[index])
                data = file.read(page.databytecounts[index]) or None  # a sparse file leaves out what is empty
                tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
                segment, (band, _, y, x, _), _ = page.decode(data, index, **tables)
                if segment is None:
                    continue
                part = segment[0]  # (rows, columns, bands)
                y0, y1 = max(top, y), min(top + height, y + part.shape[0])
                x0, x1 = max(left, x), min(left + width, x + part.shape[1])
                place = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left), slice(band, band + part.shape[2]))
                window[place] = part[y0 - y : y1 - y, x0 - x : x1 - x]
    return window


def _plain_page(tiff: Any) -> Any:
    """The page of a TIFF that holds one upright image whose strips or tiles can be decoded here; else None."""
    full = [page for page in tiff.pages if not (page.is_reduced or page.is_mask)]
    if len(full) != 1 or full[0] is not tiff.pages.first:
        return None
    page = full[0]
    if page.dtype is None or page.dtype.kind not in "buif" or page.tags.valueof(274, 1) != 1 or page.imagedepth != 1:
        return None
    if page.photometric == 6 or len(page.dataoffsets) != math.prod(_segments(page)[:3]) or not _decodes(page):
        return None
    check_segments(page)
    return page


def _segments(page: Any) -> tuple[int, int, int, int, int]:
    """Planes, strips or tiles down and across in each, and the rows and columns of one."""
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    columns = page.tilewidth if page.is_tiled else page.imagewidth
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    return planes, -(-page.imagelength // max(1, rows)), -(-page.imagewidth // max(1, columns)), rows, columns


def _decodes(page: Any) -> bool:
    """Whether tifffile can decode its compression, for which it may need imagecodecs."""
    if page.compression in (1, 8, 32946, 34925) and page.predictor == 1 and page.bitspersample % 8 == 0:
        return True
    # Faxes (2 to 4) and the first kind of JPEG (6) not even with it; Pillow reads those.
    return page.compression not in (2, 3, 4, 6) and find_spec("imagecodecs") is not None


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
