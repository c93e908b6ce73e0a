"""TIFFs: what their tags say, what Pillow keeps of them, and their pages by tifffile, whole or in parts.

Tags and their values go by the names of Pillow and tifffile that the oldest versions allowed have too.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as Tag
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, PREDICTOR, SAMPLEFORMAT

from fcmae.data.arrays import ArrayImage, OpenImage, Pixels, check_channels, nodata_of
from fcmae.data.geometry import MAX_CHANNELS, MAX_PIXELS, Box
from fcmae.data.limits import READ_ERRORS, SMALL, check_size, reading
from fcmae.data.source import BadImage

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_PAGES = 10_000
GDAL_NODATA = 42113  # the number, as text, that stands for missing values
GREY = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
LAB = (PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB, PHOTOMETRIC.ITULAB)
ALPHA = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
JPEG_COMPRESSIONS = (COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.JPEG_LOSSY)
# GeoTIFF's: scale, tie points, matrix, keys and their values; and the coefficients of a satellite's camera (RPC).
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
# Of compressions that tifffile undoes by the standard library, to whatever they hold.
_UNPACKERS: dict[int, Callable[[], Any]] = {
    COMPRESSION.ADOBE_DEFLATE: zlib.decompressobj,
    COMPRESSION.DEFLATE: zlib.decompressobj,
    COMPRESSION.LZMA: lzma.LZMADecompressor,
}
# Faxes and the first kind of JPEG, which tifffile cannot decode with imagecodecs either; Pillow reads them.
_UNDECODED = (COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6, COMPRESSION.OJPEG)


def open_tiff(file: BinaryIO) -> Any:
    """A TIFF of tifffile; None of other files.

    Args:
        file: at its start.

    Raises:
        BadImage: if it has too many pages; what tifffile raises else.
    """
    if file.read(4) not in TIFF_STARTS:
        return None
    file.seek(0)
    tiff = tifffile.TiffFile(file)
    if len(tiff.pages) > MAX_PAGES:
        raise BadImage(f"it has {len(tiff.pages)} pages, more than {MAX_PAGES}")
    return tiff


def channel_pages(series: tifffile.TiffPageSeries) -> int:
    """How many channels a series stores as pages, as ImageJ and OME do; 0 if it does not.

    Args:
        series: of tifffile.
    """
    channels: int = series.sizes.get("channel", series.sizes.get("sample", 1))
    return channels if series.keyframe.samplesperpixel == 1 and channels > 1 else 0


def num_planes(series: tifffile.TiffPageSeries) -> int:
    """How many images of one page's size a series has; one header may stand for them all.

    Args:
        series: of tifffile.
    """
    planes: int = math.prod(series.shape) // math.prod(series.keyframe.shape)
    return planes


def _without_alpha(page: Any, in_chans: int) -> list[int]:
    """Which samples of a TIFF's page are read: of colours for 1 and 3 these, and no alpha where that leaves in_chans.

    Args:
        page: of tifffile.
        in_chans: see `read_crop`.
    """
    samples: int = page.samplesperpixel
    if in_chans in (1, 3) and page.photometric == PHOTOMETRIC.RGB:  # and whatever else
        return list(range(min(3, samples)))
    first = samples - len(page.extrasamples)
    others = [i for i in range(samples) if i < first or page.extrasamples[i - first] not in ALPHA]
    is_grey = in_chans in (1, 3) and page.photometric in GREY
    return others if is_grey or len(others) == in_chans else list(range(samples))


def _left_out_of(page: Any) -> float:
    """What strips or tiles hold that a sparse file leaves out, as GDAL reads them: tifffile parses fewer numbers."""
    return nodata_of(page.tags.valueof(GDAL_NODATA), page.dtype) or 0


def check_tiles(tile: int, image: int) -> None:
    """Refuse an image that is small beside its tiles, each of which is decoded whole.

    Args:
        tile: how large one is.
        image: likewise, in the same unit.

    Raises:
        BadImage: if it is.
    """
    if tile > max(4 * image, SMALL):
        raise BadImage("its tiles are far larger than the image: save it again")


def _bytes_of_tile(frame: Any) -> int:
    tile = math.prod(frame.tile) if frame.is_tiled else min(frame.rowsperstrip, frame.imagelength) * frame.imagewidth
    samples = frame.samplesperpixel if frame.planarconfig == PLANARCONFIG.CONTIG else 1
    return int(tile * frame.dtype.itemsize * samples)


def _check_segments(page: Any) -> None:
    """Refuse a page of tifffile's whose strips or tiles, decoded one by one, would take far more than the image."""
    frame = page.keyframe
    check_tiles(_bytes_of_tile(frame), frame.nbytes)
    if sum(page.databytecounts) > max(4 * frame.nbytes, SMALL):
        raise BadImage("its strips or tiles are far longer than the image: save it again")


def _check_unpacked(page: Any, numbers: Iterable[int]) -> None:
    """Refuse some of these strips or tiles, of a page that `_check_segments` passed, if they unpack to far more."""
    frame = page.keyframe
    if frame.compression not in _UNPACKERS:
        return
    limit = max(4 * _bytes_of_tile(frame), SMALL)
    # A file may claim more of the one than of the other; what has no pair is not read.
    num = min(len(page.dataoffsets), len(page.databytecounts))
    for offset, size in ((page.dataoffsets[i], page.databytecounts[i]) for i in numbers if i < num):
        if size * 8000 > limit:  # more than either can have packed
            page.parent.filehandle.seek(offset)
            decoder, rest, total = _UNPACKERS[frame.compression](), page.parent.filehandle.read(size), 0
            while rest and total <= limit and not decoder.eof:
                total += len(decoder.decompress(rest, 2**20))
                rest = decoder.unconsumed_tail if hasattr(decoder, "unconsumed_tail") else b""
            if total > limit:
                raise BadImage("its strips or tiles unpack to far more than the image: save it again")


def pillow_reads_all_of(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow keeps every band and bit of a TIFF that matters for in_chans.

    Args:
        image: of Pillow, a TIFF.
        in_chans: see `read_crop`.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(Tag.NewSubfileType, 0) & tifffile.FILETYPE.REDUCEDIMAGE:
        return False  # the first page is a thumbnail
    if is_sparse(image):
        return False
    if image.mode == "F" and tags.prefix == b"MM" and tags.get(Tag.Compression, COMPRESSION.NONE) != COMPRESSION.NONE:
        return False  # Pillow swaps the bytes of compressed floats twice
    is_planar = tags.get(Tag.PlanarConfiguration) == PLANARCONFIG.SEPARATE
    if is_planar and EXTRASAMPLE.ASSOCALPHA in tags.get(Tag.ExtraSamples, ()):
        return False  # its decoder divides by alpha, see `_pillow_tiff` in readers.py
    bits, samples = tags.get(Tag.BitsPerSample, (1,)), tags.get(Tag.SamplesPerPixel, 1)
    is_rgb = tags.get(Tag.PhotometricInterpretation) == PHOTOMETRIC.RGB
    if max(bits) <= 8 and SAMPLEFORMAT.INT in tags.get(Tag.SampleFormat, ()):
        return False
    if max(bits) > 8 and not (samples == 1 and image.mode in ("I;16", "I;16B", "F")):
        return False
    if in_chans in (1, 3):
        return bool(samples == len(image.getbands()) or is_rgb)
    return bool(samples == len(image.getbands()) == in_chans)


def is_sparse(image: Image.Image) -> bool:
    """Whether a TIFF leaves out strips or tiles, in whose place Pillow shows bytes from the file's start.

    Args:
        image: of Pillow, in any format.
    """
    tags = getattr(image, "tag_v2", {})
    return 0 in tags.get(Tag.StripOffsets, ()) or 0 in tags.get(Tag.TileOffsets, ())  # where they would start


def is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF, which Pillow inverts where it has up to 8 bits.

    Args:
        image: of Pillow, in any format.
    """
    return bool(getattr(image, "tag_v2", {}).get(Tag.PhotometricInterpretation) == PHOTOMETRIC.MINISWHITE)


def may_have_more_pages(image: Image.Image) -> bool:
    """Whether a TIFF may have pages behind the first, at which Pillow stays.

    Args:
        image: of Pillow, a TIFF.
    """
    described = str(image.tag_v2.get(Tag.ImageDescription, ""))  # type: ignore[attr-defined]
    if described.startswith("ImageJ=") and "\nchannels=" in described:  # one header may stand for all
        return True
    try:
        image.seek(1)
    except EOFError:
        return False
    except READ_ERRORS:  # such as a mask, whose mode Pillow does not know
        pass
    image.seek(0)
    return True


def open_whole(tiff: tifffile.TiffFile, in_chans: int) -> OpenImage:
    """An image that tifffile reads whole: a page, or pages that are channels.

    Args:
        tiff: of tifffile, see `open_tiff`.
        in_chans: see `read_crop`.

    Raises:
        BadImage: if it is of a kind that is not read.
    """
    colour = in_chans in (1, 3)
    page = next((page for page in tiff.pages if not page.is_reduced), None)
    if page is None and tiff.pages[0].subifds:
        raise BadImage("its page is a preview, and the image elsewhere in it, as of camera raw: develop it")
    page = page or tiff.pages[0]
    if colour and page.photometric in LAB:
        raise BadImage("its colours are L*a*b*: save it as RGB")
    series = next((series for series in tiff.series if page in series.pages), tiff.series[0])
    if (channels := channel_pages(series)) and in_chans == 1:
        raise BadImage(f"it has {channels} channels as pages, in_chans is 1")
    source = page if colour and not channels else series
    if source is series and (series.is_multifile or None in series.pages):
        raise BadImage("it is one of several files that are an image together: save them as one")
    axes, shape, dtype = source.axes, source.shape, np.dtype(source.dtype)
    band_axes = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if axes.count("Y") != 1 or axes.count("X") != 1 or axes.index("Y") > axes.index("X") or len(band_axes) > 1:
        raise BadImage(
            f"it has the axes {axes}, not rows, columns and at most one of bands: save an image of each time and depth"
        )
    axis = band_axes[0] if band_axes else None
    samples = _without_alpha(page, in_chans)
    palette = None
    is_palette = page.photometric == PHOTOMETRIC.PALETTE
    if colour and source is page and axis is None and is_palette and page.colormap is not None:
        palette = (page.colormap.T >> 8).astype(np.uint8)  # (numbers, 3)
    extra = axis is not None and shape[axis] == page.samplesperpixel > len(samples)

    def load() -> NDArray[Any]:
        parts = list(source.pages) if source is series else [page]
        for part in parts:
            if part is not None:
                _check_segments(part)
                _check_unpacked(part, range(len(part.dataoffsets)))
                part.keyframe.nodata = _left_out_of(page)
        array: NDArray[Any] = source.asarray(maxworkers=1)
        # Where a page's only strip or tile is left out, tifffile too reads it from the file's start.
        if empty := [i for i, part in enumerate(parts) if part is not None and not any(part.dataoffsets)]:
            array.reshape(len(parts), -1)[empty] = _left_out_of(page)
        return np.take(array, samples, axis=axis) if extra else array

    stored_bands = 1 if axis is None else shape[axis]
    if extra:
        shape = tuple(len(samples) if i == axis else side for i, side in enumerate(shape))
    image = ArrayImage(
        load,
        shape,
        dtype,
        axis,
        in_chans,
        orientation=page.tags.valueof(Tag.Orientation, 1),
        bits=page.bitspersample if palette is None else 8,  # of what is shown
        inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
        nodata=nodata_of(page.tags.valueof(GDAL_NODATA), dtype),
        show=None if palette is None else lambda part: palette[part[..., 0]],
    )
    image.pixel_bytes = max(image.pixel_bytes, stored_bands * dtype.itemsize)
    return image


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
        tiff = open_tiff(file)
        page = None if tiff is None or num_planes(tiff.series[0]) > 1 else plain_page(tiff)
    if page is None or page.photometric not in (*GREY, PHOTOMETRIC.RGB) or math.prod(_segments(page)[3:]) > max_pixels:
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
        self._samples = _without_alpha(page, in_chans)
        self.channels = len(self._samples)
        check_channels(self.channels, in_chans)
        self.is_deep = page.dtype not in (np.uint8, np.bool_)
        self.is_share = page.dtype.kind in "bu" and page.bitspersample <= 16
        self.pixel_bytes = page.samplesperpixel * (max(4, page.dtype.itemsize) if self.is_deep else 1)

    def read(self, box: Box, size: tuple[int, int], fill: Sequence[float] | None) -> Pixels:
        page, window = self._page, read_window(self._page, box, self._max_pixels)
        if self.channels < window.shape[2]:
            window = window[..., self._samples]
        image = ArrayImage(
            lambda: window,
            window.shape,
            window.dtype,
            2,
            self._in_chans,
            bits=page.bitspersample,
            inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
            nodata=nodata_of(page.tags.valueof(GDAL_NODATA), window.dtype),
            may_be_empty=True,
        )
        if self._nodata is not None:
            image = image.without(self._nodata)
        return image.read((0, 0, *box[2:]), size, fill)

    def without(self, nodata: float) -> Tiles:
        self._nodata = nodata
        return self


def read_window(page: Any, box: Box, max_pixels: int) -> NDArray[Any]:
    """The stored values of a part of a TIFF, by the strips or tiles that it touches.

    Args:
        page: of tifffile, see `plain_page`.
        box: which part.
        max_pixels: of it.

    Returns:
        (height, width, bands).

    Raises:
        BadImage: if the part is larger, or the file is cut off.
    """
    top, left, height, width = box
    check_size(height, width, page.samplesperpixel * page.dtype.itemsize, page.parent.filehandle.size, max_pixels)
    window = np.full((height, width, page.samplesperpixel), _left_out_of(page), page.dtype)
    planes, across_rows, across_columns, rows, columns = _segments(page)
    if rows * columns > max_pixels:
        raise BadImage(f"its strips or tiles have {rows} x {columns} pixels, more than max_pixels = {max_pixels}")
    file = page.parent.filehandle
    for plane in range(planes):
        for row in range(top // rows, min(across_rows, -(-(top + height) // rows))):
            for column in range(left // columns, min(across_columns, -(-(left + width) // columns))):
                index = (plane * across_rows + row) * across_columns + column
                _check_unpacked(page, [index])
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


def plain_page(tiff: Any) -> Any:
    """The page of a TIFF that holds one upright image whose strips or tiles can be decoded here; else None.

    Args:
        tiff: of tifffile, see `open_tiff`.

    Raises:
        BadImage: if its strips or tiles would take far more than the image.
    """
    full = [page for page in tiff.pages if not (page.is_reduced or page.is_mask)]
    if len(full) != 1 or full[0] is not tiff.pages.first:
        return None
    page = full[0]
    if page.dtype is None or page.dtype.kind not in "buif" or page.imagedepth != 1:
        return None
    if page.tags.valueof(Tag.Orientation, 1) != 1 or page.photometric == PHOTOMETRIC.YCBCR:
        return None
    if len(page.dataoffsets) != math.prod(_segments(page)[:3]) or not _decodes(page):
        return None
    _check_segments(page)
    return page


def _segments(page: Any) -> tuple[int, int, int, int, int]:
    """Planes, strips or tiles down and across in each, and the rows and columns of one."""
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    columns = page.tilewidth if page.is_tiled else page.imagewidth
    planes = page.samplesperpixel if page.planarconfig == PLANARCONFIG.SEPARATE else 1
    return planes, -(-page.imagelength // max(1, rows)), -(-page.imagewidth // max(1, columns)), rows, columns


def _decodes(page: Any) -> bool:
    """Whether tifffile can decode its compression, for which it may need imagecodecs."""
    needs_nothing = page.compression in (COMPRESSION.NONE, *_UNPACKERS) and page.predictor == PREDICTOR.NONE
    if needs_nothing and page.bitspersample % 8 == 0:
        return True
    return page.compression not in _UNDECODED and find_spec("imagecodecs") is not None


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
        bands = 3 if page.photometric == PHOTOMETRIC.RGB else int(page.photometric in GREY)
        return bands and bands + page.extrasamples.count(EXTRASAMPLE.UNSPECIFIED)


def samples_with_alpha(file: BinaryIO) -> int:
    """Samples of a TIFF of more than 8 bits, some behind its colours, that it does not call data; 0 of others.

    Writers call any fourth channel alpha, also of what is no picture.

    Args:
        file: at its start.

    Raises:
        BadImage: if it is damaged.
    """
    with reading(MAX_PIXELS):
        if (tiff := open_tiff(file)) is None:
            return 0
        page = tiff.pages.first
        is_deep_rgb = page.photometric == PHOTOMETRIC.RGB and page.dtype is not None and page.dtype.itemsize > 1
        num: int = page.samplesperpixel
        return num if is_deep_rgb and num > 3 + page.extrasamples.count(EXTRASAMPLE.UNSPECIFIED) else 0


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
        if (tiff := open_tiff(file)) is None:
            return 1, False
        series = tiff.series[0]
        num = 1 if channel_pages(series) else num_planes(series)
        are_bands = sum(axis not in "YX" for axis in series.axes) == 1 and series.keyframe.samplesperpixel == 1
        return num, are_bands and num <= MAX_CHANNELS and num not in (1, 3)


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
        geo = [tags[code] for code in GEO_TAGS if code in tags]
        if geo and tags.valueof(Tag.Orientation, 1) in range(2, 9):
            raise BadImage(
                "it has a place on earth and an Orientation other than 1: store it with its rows from the top"
            )
        return [(tag.code, int(tag.dtype), tag.count, _stored(tag, file), True) for tag in geo]


def _stored(tag: Any, file: BinaryIO) -> Any:
    """What a tag holds; text as its bytes, as it may not be ASCII, which is all that tifffile writes."""
    if tag.dtype != tifffile.DATATYPE.ASCII:
        return tag.value
    file.seek(tag.valueoffset)
    return file.read(tag.count)
