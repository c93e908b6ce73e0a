"""What read_crop opens: an image whose header is read, by Pillow, tifffile or numpy, and whose pixels follow on demand.

What comes in is bytes or a file that can seek, wherever it is from. Files are told apart by their contents, not their
names. Pillow reads what it reads in full; TIFFs with other numbers of bands or depths go to tifffile, DICOM to pydicom,
and .npy files are mapped into memory. Where simplejpeg is installed it decodes the JPEGs whose headers Pillow has read:
the same pixels, sooner.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import SEEK_END, BytesIO, FileIO
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from torch.nn import functional as F

from fcmae.data.arrays import ArrayImage, OpenImage, Pixels, check_channels, match_channels, nodata_of
from fcmae.data.dicom import open_dicom
from fcmae.data.geometry import MAX_PIXELS, Box, decode_scale, make_upright, stored_box
from fcmae.data.limits import check_size, reading
from fcmae.data.source import BadImage, is_dicom
from fcmae.data.tiff import (
    GDAL_NODATA,
    TIFF_STARTS,
    channel_pages,
    check_tiles,
    is_inverted,
    may_have_more_pages,
    open_tiff,
    open_whole,
    pillow_reads_all_of,
)

try:
    import simplejpeg
except ImportError:  # without the extra `jpeg`
    simplejpeg = None
decode_jpeg: Callable[..., NDArray[np.uint8]] | None = None if simplejpeg is None else simplejpeg.decode_jpeg

# No format that runs a program or a script (EPS, PDF), whatever the file is called.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type, of those that have 16 bits
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
MAX_SCANS = 100  # of a JPEG; cameras and web sites make up to a dozen


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
        return _tiff_image(file, in_chans)
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
        return int(image.getexif().get(Tag.Orientation, 1))
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
        return array[..., :num_read]

    num_read = channels - 1 if in_chans in (1, 3) and channels in (2, 4) else channels  # without alpha
    shape, orientation = (image.height, image.width, num_read), orientation_of(image)
    return ArrayImage(load, shape, np.dtype(np.uint16), 2, in_chans, orientation=orientation)


def _tiff_image(file: BinaryIO, in_chans: int) -> OpenImage:
    """A TIFF by Pillow where that keeps all of it that matters, else by tifffile."""
    try:
        image = Image.open(file, formats=["TIFF"])
    except (UnidentifiedImageError, Image.DecompressionBombError):  # bands and depths that it does not know; too many
        image = None
    if image is not None and not pillow_reads_all_of(image, in_chans):
        image = None
    if image is not None and not may_have_more_pages(image):
        return _pillow_tiff(image, in_chans)
    file.seek(0)
    tiff = open_tiff(file)
    if image is not None and not channel_pages(tiff.series[0]):
        return _pillow_tiff(image, in_chans)
    return open_whole(tiff, in_chans)


def _pillow_tiff(image: ImageFile.ImageFile, in_chans: int) -> OpenImage:
    """A TIFF that Pillow reads: through an array, if it is deep or says which values are missing."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    tile_pixels = tags.get(Tag.TileWidth, 0) * tags.get(Tag.TileLength, 0)
    check_tiles(tile_pixels * len(image.getbands()), image.height * image.width)
    # Pillow divides colours by an alpha that they were multiplied with, which nobody else does here.
    image.tile = [tile._replace(args=_undivided(tile.args)) for tile in image.tile]
    if image.mode == "F" or image.mode.startswith("I;16") or GDAL_NODATA in tags:
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
        bits=max(tags.get(Tag.BitsPerSample, (16,))) if is_deep else 8,
        inverted=is_inverted(image),
        nodata=nodata_of(tags.get(GDAL_NODATA), dtype),
        show=show if not is_plain else (lambda part: part * np.uint8(spread)) if spread > 1 else None,
    )


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
