"""What read_crop opens: an image whose header is read, by Pillow, tifffile or numpy, and whose pixels follow on demand.

What comes in is bytes or a file that can seek, wherever it is from. Files are told apart by their contents, not their
names. Pillow reads what it reads in full; TIFFs with other numbers of bands or depths go to tifffile, DICOM to pydicom,
and .npy files are mapped into memory. Where simplejpeg is installed it decodes the JPEGs whose headers Pillow has read:
the same pixels, sooner.
"""

from __future__ import annotations

import lzma
import math
import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from io import SEEK_END, BytesIO, FileIO
from typing import Any, BinaryIO

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch.nn import functional as F

from fcmae.data.arrays import ArrayImage, OpenImage, Pixels, check_channels, match_channels, nodata_of
from fcmae.data.dicom import open_dicom
from fcmae.data.geometry import MAX_PIXELS, Box, decode_scale, make_upright, stored_box
from fcmae.data.limits import READ_ERRORS, SMALL, check_size, reading
from fcmae.data.source import BadImage, is_dicom

try:
    import simplejpeg
except ImportError:  # without the extra `jpeg`
    simplejpeg = None
decode_jpeg: Callable[..., NDArray[np.uint8]] | None = None if simplejpeg is None else simplejpeg.decode_jpeg

# No format that runs a program or a script (EPS, PDF), whatever the file is called.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type, of those that have 16 bits
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
MAX_SCANS = 100  # of a JPEG; cameras and web sites make up to a dozen
MAX_PAGES = 10_000  # of a TIFF


def open_image(file: BinaryIO | bytes, in_chans: int, max_pixels: int = MAX_PIXELS) -> OpenImage:
    """Read an image's header.

    Args:
        file: the image, or a file of it that can seek, at its start, which stays open as long as the image is used.
        in_chans: see `read_crop`.
        max_pixels: see `read_crop`.

    Raises:
        BadImage: as `read_crop` does.
    """
    with reading(max_pixels):
        file = BytesIO(file) if isinstance(file, bytes) else file
        file_bytes = file.seek(0, SEEK_END)
        file.seek(0)
        check = partial(check_size, file_bytes=file_bytes, max_pixels=max_pixels)
        image = _open(file, in_chans, check)
        check(image.height, image.width, image.pixel_bytes)
    return image


def _open(file: BinaryIO, in_chans: int, check: Callable[[int, int, int], None]) -> OpenImage:
    start = file.read(132)
    file.seek(0)
    if start[:3] == b"\xff\xd8\xff":
        data = file.read()
        _check_scans(data)
        image = Image.open(BytesIO(data), formats=PILLOW_FORMATS)
        check(image.height, image.width, len(image.getbands()))
        return _PillowImage(image, in_chans, data)
    if start[:6] == b"\x93NUMPY":
        array = map_npy(file)
        axis = _npy_channel_axis(array.shape, in_chans)
        return ArrayImage(lambda: array, array.shape, array.dtype, axis, in_chans)
    if start[:4] in TIFF_STARTS:
        return _open_tiff(file, in_chans)
    if is_dicom(start):
        return open_dicom(file, in_chans)
    image = Image.open(file, formats=PILLOW_FORMATS)
    check(image.height, image.width, len(image.getbands()))  # before Pillow looks for EXIF behind a PNG's pixels
    if image.format == "PNG" and start[24] == 16 and start[25] in _PNG_CHANNELS:
        return _open_deep_png(image, file, _PNG_CHANNELS[start[25]], in_chans)
    return _PillowImage(image, in_chans)


def _check_scans(jpeg: bytes) -> None:
    """Each scan of a progressive JPEG costs a pass over all of it, and takes a few bytes of the file."""
    if jpeg.count(b"\xff\xda") <= MAX_SCANS:
        return
    scans, position = 0, 2
    # Other bytes 255 are stuffed with 0, and 208 to 215 are restarts; outside of scans, segments say how long they are.
    while (marker := _JPEG_MARKER.search(jpeg, position)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    if scans > MAX_SCANS:
        raise BadImage(f"it has {scans} scans, more than {MAX_SCANS}: save it again")


class _PillowImage:
    """8 bits a value, by Pillow or simplejpeg."""

    def __init__(self, image: ImageFile.ImageFile, in_chans: int, jpeg: bytes | None = None) -> None:
        self._image, self._in_chans, self._jpeg = image, in_chans, jpeg
        self._spread = spread_of(image)
        self.pixel_bytes = len(image.getbands())
        self.channels = _num_channels(image, in_chans)
        self.is_deep = image.mode == "F" or image.mode.startswith("I")
        self.is_share = image.mode not in ("F", "I")
        check_channels(self.channels, in_chans)
        self._orientation = orientation_of(image)
        self._stored_size = image.height, image.width
        self._swapped = self._orientation in (5, 6, 7, 8)
        self.height, self.width = self._stored_size[::-1] if self._swapped else self._stored_size

    def read(self, box: Box, size: tuple[int, int], fill: Sequence[float] | None) -> Pixels:
        stored_height, stored_width = self._stored_size
        planes, scale = self._decode(decode_scale(box[2], box[3], size))
        top, left, height, width = stored_box(box, self._orientation, stored_height, stored_width)
        # The last column of a scaled JPEG may stand for fewer than `scale` stored ones.
        corners = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        stored_size = size[::-1] if self._swapped else size
        resized = [_resize(plane, corners, stored_size) for plane in planes]
        pixels = resized[0] if len(resized) == 1 else np.concatenate(resized)  # (C, H, W)
        if self._orientation != 1:
            pixels = make_upright(pixels.transpose(1, 2, 0), self._orientation).transpose(2, 0, 1)
        return Pixels(np.ascontiguousarray(match_channels(pixels, self._in_chans)))

    def without(self, nodata: float) -> OpenImage:
        if self._image.format not in ("PNG", "BMP", "TIFF"):
            return self
        return _stored_image(self._image, self._in_chans, self._spread).without(nodata)

    def _decode(self, scale: int) -> tuple[Sequence[Image.Image | NDArray[np.uint8]], int]:
        """Planes, and how many times smaller than stored (1; JPEGs `scale`)."""
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
                    return [decoded], scale
        height, width = self._stored_size
        draft = image.draft("L" if grey else "RGB", (width // scale, height // scale))
        return _planes(image, self._in_chans), 1 if draft is None else round(width / draft[1][2])


def orientation_of(image: Image.Image) -> int:
    """How it lies, as Exif counts, 1 to 8; where that cannot be read, 1.

    Args:
        image: of Pillow, in any format. TIFFs are turned by Pillow, in their size at once and in their pixels later.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and image.info.keys().isdisjoint({"exif", "Raw profile type exif"}):
        image.load()  # as getexif does: what is wrong with the pixels is no matter of Exif
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, struct.error, ValueError, TypeError, ArithmeticError):
        return 1


def _resize(
    plane: Image.Image | NDArray[np.uint8], corners: tuple[float, float, float, float], size: tuple[int, int]
) -> NDArray[Any]:
    """Part of a plane resized (bicubic, antialiased); pixels outside of it do not count, as if it had been cut out.

    plane: of mode L or RGB; or (H, W, C) uint8. corners: left, top, right, bottom, in pixels of the plane; fractions
    of a pixel are kept. size: height and width of the result.
    Returns (C, height, width) uint8.
    """
    left, top, right, bottom = (math.floor(corners[0]), math.floor(corners[1]), *map(math.ceil, corners[2:]))
    inner = (corners[0] - left, corners[1] - top, corners[2] - left, corners[3] - top)
    if isinstance(plane, Image.Image):
        part = np.array(plane.crop((left, top, right, bottom)))
        part = part.reshape(*part.shape[:2], -1)
    else:
        part = plane[top:bottom, left:right]  # (h, w, C)
    if inner == (0, 0, right - left, bottom - top):
        # Vectorised, three to four times as fast as Pillow. They differ by 1 in a few of a thousand values.
        images = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None]  # (1, C, h, w), channels last
        return F.interpolate(images, size, mode="bicubic", antialias=True)[0].numpy()
    image = Image.fromarray(np.ascontiguousarray(part[..., 0] if part.shape[2] == 1 else part))
    out = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, inner))
    return out[None] if out.ndim == 2 else out.transpose(2, 0, 1)


def _num_channels(image: Image.Image, in_chans: int) -> int:
    """Channels of the planes that _planes makes."""
    if in_chans in (1, 3):
        return 1 if image.mode in ("1", "L", "LA") else 3
    if image.mode == "P":
        return 4 if "transparency" in image.info else 3
    return len(image.getbands())


def _planes(image: Image.Image, in_chans: int) -> list[Image.Image]:
    """Decode into images that Pillow resizes without loss: L or RGB."""
    if image.mode == "P":
        # By way of RGBA where entries are transparent: their colours are kept, only the transparency is dropped.
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if in_chans in (1, 3):
        mode = "L" if in_chans == 1 or image.mode in ("1", "L", "LA") else "RGB"
        return [image if image.mode == mode else image.convert(mode)]
    # One by one: Pillow would weigh the colours of an RGBA image by its alpha.
    return list(image.split())


def _open_deep_png(image: Image.Image, file: BinaryIO, channels: int, in_chans: int) -> OpenImage:
    """A PNG of 16 bits, of which Pillow keeps 8 where there are colours or alpha, but takes the others if asked.

    It takes the byte in front of the two of a value where they are called big-endian, the one behind where they are
    called little-endian; and of two channels, all four bytes as those of a pixel.
    """

    def decoded(rawmode: str) -> NDArray[np.uint8]:
        file.seek(0)
        with Image.open(file, formats=["PNG"]) as again:
            again.tile = [tile._replace(args=rawmode) for tile in again.tile]
            return np.array(again)

    def load() -> NDArray[Any]:
        if channels == 1:
            array = np.asarray(image, np.uint16)[..., None]
        elif channels == 2:
            array = decoded("RGBA").view(">u2")
        else:
            array = decoded(f"{image.mode};16B") * np.uint16(256) + decoded(f"{image.mode};16L")
        return array[..., :kept]

    kept = channels - 1 if in_chans in (1, 3) and channels in (2, 4) else channels  # without alpha
    shape, orientation = (image.height, image.width, kept), orientation_of(image)
    return ArrayImage(load, shape, np.dtype(np.uint16), 2, in_chans, orientation=orientation)


def _open_tiff(file: BinaryIO, in_chans: int) -> OpenImage:
    try:
        image = Image.open(file, formats=["TIFF"])
    except (UnidentifiedImageError, Image.DecompressionBombError):  # bands and depths that it does not know; too many
        image = None
    if image is not None and not _pillow_reads_all_of(image, in_chans):
        image = None
    if image is not None and not _may_have_more_pages(image):
        return _pillow_tiff(image, in_chans)
    file.seek(0)
    tiff = tifffile.TiffFile(file)
    if len(tiff.pages) > MAX_PAGES:
        raise BadImage(f"it has {len(tiff.pages)} pages, more than {MAX_PAGES}")
    if image is not None and not channel_pages(tiff.series[0]):
        return _pillow_tiff(image, in_chans)
    return _open_tifffile(tiff, in_chans)


def _may_have_more_pages(image: Image.Image) -> bool:
    described = str(image.tag_v2.get(270, ""))  # type: ignore[attr-defined]
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


def _pillow_tiff(image: ImageFile.ImageFile, in_chans: int) -> OpenImage:
    """A TIFF that Pillow reads: through an array, if it is deep or says which values are missing."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    _check_tiles(tags.get(322, 0) * tags.get(323, 0) * len(image.getbands()), image.height * image.width)
    # Pillow divides colours by an alpha that they were multiplied with, which nobody else does here.
    image.tile = [tile._replace(args=_undivided(tile.args)) for tile in image.tile]
    if image.mode == "F" or image.mode.startswith("I;16") or _NODATA in tags:
        return _stored_image(image, in_chans, spread_of(image))
    return _PillowImage(image, in_chans)


def _undivided(args: Any) -> Any:
    """Of a tile, where the first says how its bytes become colours."""
    return (args[0].replace("RGBa", "RGBA"), *args[1:]) if isinstance(args, tuple) else args


def spread_of(image: ImageFile.ImageFile) -> int:
    """By what Pillow multiplies grey of 2 and 4 bits, which it spreads over 8.

    Args:
        image: of Pillow, whose pixels are not decoded yet: only then it says how they are packed.
    """
    args = image.tile[0].args if image.tile else None
    return {"L;2": 85, "L;4": 17}.get(str(args[0] if isinstance(args, tuple) else args)[:3], 1)


def stored_values(image: Image.Image, spread: int) -> NDArray[Any]:
    """(H, W) or (H, W, C), the numbers that a file holds: of a palette, those of its colours.

    Args:
        image: of Pillow.
        spread: see `spread_of`.
    """
    values: NDArray[Any] = np.asarray(image)
    if image.mode in ("1", "L") and is_inverted(image):
        values = ~values
    return values // spread if spread > 1 else values


def is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF, which Pillow inverts where it has up to 8 bits.

    Args:
        image: of Pillow, in any format.
    """
    return bool(getattr(image, "tag_v2", {}).get(262) == 0)


def _stored_image(image: Image.Image, in_chans: int, spread: int) -> ArrayImage:
    """An image of Pillow through an array of what it stores, which is compared with what stands for missing values.

    image: of a format that changes nothing of what it stores.
    spread: see `spread_of`.
    """
    tags, mode, is_colour = getattr(image, "tag_v2", {}), image.mode, in_chans in (1, 3)
    is_deep = mode == "F" or mode.startswith("I;16")
    dtype = np.dtype("f4" if mode == "F" else "u2" if is_deep else "?" if mode == "1" else "u1")
    if is_colour:  # alpha is compared with nothing
        mode = {"LA": "L", "PA": "P", "RGBA": "RGB"}.get(mode, mode)
    shape = (image.height, image.width, Image.getmodebands(mode))

    def load() -> NDArray[Any]:
        return stored_values(image, spread).reshape(image.height, image.width, -1)[..., : shape[2]]

    def show(part: NDArray[Any]) -> NDArray[Any]:
        picture = Image.frombytes(mode, part.shape[1::-1], part.tobytes())
        if image.palette is not None:
            picture.putpalette(image.palette)
        picture.info = image.info
        planes = [np.atleast_3d(np.asarray(plane)) for plane in _planes(picture, in_chans)]
        return np.concatenate(planes, axis=2)

    is_plain = is_deep or mode in ("1", "L", "RGB") or not (mode == "P" or is_colour)
    return ArrayImage(
        load,
        shape,
        dtype,
        2,
        in_chans,
        orientation=orientation_of(image),
        bits=max(tags.get(258, (16,))) if is_deep else 8,
        inverted=is_inverted(image),
        nodata=nodata_of(tags.get(_NODATA), dtype),
        show=show if not is_plain else (lambda part: part * np.uint8(spread)) if spread > 1 else None,
    )


def _check_tiles(tile: int, image: int) -> None:
    """tile, image: how large they are, in the same unit."""
    if tile > max(4 * image, SMALL):
        raise BadImage("its tiles are far larger than the image: save it again")


_NODATA = 42113  # GDAL_NODATA: the number, as text, that stands for missing values


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


def _pillow_reads_all_of(image: Image.Image, in_chans: int) -> bool:
    """Whether Pillow keeps every band and bit of a TIFF that matters for in_chans."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(254, 0) & 1:
        return False  # the first page is a thumbnail
    if is_sparse(image):
        return False
    if image.mode == "F" and tags.prefix == b"MM" and tags.get(259, 1) != 1:
        return False  # Pillow swaps the bytes of compressed floats twice
    if tags.get(284) == 2 and 1 in tags.get(338, ()):
        return False  # its decoder divides by alpha, see `_pillow_tiff`
    bits, samples, is_rgb = tags.get(258, (1,)), tags.get(277, 1), tags.get(262) == 2
    if max(bits) <= 8 and 2 in tags.get(339, ()):
        return False  # signed
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
    return 0 in tags.get(273, ()) or 0 in tags.get(324, ())  # where they would start


def without_alpha(page: Any, in_chans: int) -> list[int]:
    """Which samples of a TIFF's page are read: of colours for 1 and 3 these, and no alpha where that leaves in_chans.

    Args:
        page: of tifffile.
        in_chans: see `read_crop`.
    """
    samples: int = page.samplesperpixel
    if in_chans in (1, 3) and page.photometric == 2:  # RGB, and whatever else
        return list(range(min(3, samples)))
    first = samples - len(page.extrasamples)
    others = [i for i in range(samples) if i < first or page.extrasamples[i - first] not in (1, 2)]
    is_grey = in_chans in (1, 3) and page.photometric in (0, 1)
    return others if is_grey or len(others) == in_chans else list(range(samples))


LAB = (8, 9, 10)  # photometric interpretations


def _open_tifffile(tiff: tifffile.TiffFile, in_chans: int) -> OpenImage:
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
    kept = without_alpha(page, in_chans)
    palette = None
    if colour and source is page and axis is None and page.photometric == 3 and page.colormap is not None:
        palette = (page.colormap.T >> 8).astype(np.uint8)  # (numbers, 3)
    extra = axis is not None and shape[axis] == page.samplesperpixel > len(kept)

    def load() -> NDArray[Any]:
        parts = list(source.pages) if source is series else [page]
        for part in parts:
            if part is not None:
                check_segments(part)
                check_unpacked(part, range(len(part.dataoffsets)))
                part.keyframe.nodata = left_out_of(page)
        array: NDArray[Any] = source.asarray(maxworkers=1)
        # Where a page's only strip or tile is left out, tifffile too reads it from the file's start.
        if empty := [i for i, part in enumerate(parts) if part is not None and not any(part.dataoffsets)]:
            array.reshape(len(parts), -1)[empty] = left_out_of(page)
        return np.take(array, kept, axis=axis) if extra else array

    stored_bands = 1 if axis is None else shape[axis]
    if extra:
        shape = tuple(len(kept) if i == axis else side for i, side in enumerate(shape))
    image = ArrayImage(
        load,
        shape,
        dtype,
        axis,
        in_chans,
        orientation=page.tags.valueof(274, 1),
        bits=page.bitspersample if palette is None else 8,  # of what is shown
        inverted=page.photometric == 0,  # 0 = white
        nodata=nodata_of(page.tags.valueof(_NODATA), dtype),
        show=None if palette is None else lambda part: palette[part[..., 0]],
    )
    image.pixel_bytes = max(image.pixel_bytes, stored_bands * dtype.itemsize)
    return image


# Of compressions that tifffile unpacks to whatever they hold.
_UNPACKERS: dict[int, Callable[[], Any]] = {
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
}


def left_out_of(page: Any) -> float:
    """What strips or tiles hold that a sparse file leaves out, as GDAL reads them: tifffile parses fewer numbers."""
    return nodata_of(page.tags.valueof(_NODATA), page.dtype) or 0


def _bytes_of_tile(frame: Any) -> int:
    tile = math.prod(frame.tile) if frame.is_tiled else min(frame.rowsperstrip, frame.imagelength) * frame.imagewidth
    return int(tile * frame.dtype.itemsize * (frame.samplesperpixel if frame.planarconfig == 1 else 1))


def check_segments(page: Any) -> None:
    """Refuse a page of tifffile's whose strips or tiles, decoded one by one, would take far more than the image."""
    frame = page.keyframe
    _check_tiles(_bytes_of_tile(frame), frame.nbytes)
    if sum(page.databytecounts) > max(4 * frame.nbytes, SMALL):
        raise BadImage("its strips or tiles are far longer than the image: save it again")


def check_unpacked(page: Any, numbers: Iterable[int]) -> None:
    """Refuse some of these strips or tiles, of a page that `check_segments` passed, if they unpack to far more."""
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


def map_npy(file: BinaryIO) -> NDArray[Any]:
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
        if shape[0] == shape[2] == channels > 1:
            raise BadImage(f"it has the shape {shape}, whose first or last side may be its channels: save it as a TIFF")
        for axis in (2, 0):
            if shape[axis] == channels:
                return axis
    return 2 if shape[2] <= shape[0] else 0
