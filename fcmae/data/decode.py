"""One image file to one array, whatever the file: any format, any depth, any number of channels, or BadImage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcmae.data.arrays import OpenImage, Pixels
from fcmae.data.geometry import MAX_PIXELS, PIXEL_BYTES, Box, shrunk
from fcmae.data.limits import TooLarge, check_finite, reading
from fcmae.data.readers import open_image
from fcmae.data.tiff import open_tiles

ChooseBox = Callable[[int, int], Box]  # (height, width) -> box


def read_crop(
    file: BinaryIO | bytes,
    in_chans: int,
    choose_box: ChooseBox,
    size: tuple[int, int] | None,
    *,
    fill: Sequence[float] | None = None,
    max_pixels: int = MAX_PIXELS,
    nodata: float | None = None,
) -> Pixels:
    """Read part of an image and resize it (bicubic, antialiased).

    Channels: grey is copied into 3; RGB becomes grey for 1; alpha is dropped for 1 and 3, and colours that it has
    multiplied stay so; CMYK and palettes become RGB for 1 and 3. For any other in_chans the file must have that many
    channels, with alpha or without. An array of three axes in a .npy file is (H, W, C) if its last axis fits in_chans,
    else (C, H, W). The pages of a TIFF are its bands when in_chans is neither 1 nor 3; else the first page is read.

    Missing values: those of floats that are not finite, and those that the tag GDAL_NODATA of a TIFF names; of bits and
    unsigned integers, where all bands of a pixel have it. The number that is stored counts: of a palette that of the
    colour, of grey and colours for 1 and 3 channels without their alpha, of inks of all. They are filled before the
    resize, which would mix them with others.

    Args:
        file: the image, or a file of it that can seek, at its start.
        in_chans: channels of the result.
        choose_box: called with the upright height and width before anything is decoded; returns
            (top, left, height, width).
        size: height and width of the result, or None for the box's own. JPEGs are decoded at the smallest of the
            scales 1, 1/2, 1/4, 1/8 that keeps the box at or above `size`.
        fill: (in_chans,) or (1,), what stands for missing values, in units of a full range of 1: the mean that images
            are normalised with, so that the network sees 0. None for NaN, in float32, which a resize spreads.
        max_pixels: of an image that is read, or of the box of a TIFF that can be read in parts; of pixels that take
            more than 12 bytes, fewer.
        nodata: a stored value that stands for missing ones, whatever the file says; in JPEG and WebP, also without
            loss, it is not looked for.

    Returns:
        Values (in_chans, height, width), and which of them nothing missing went into. uint8 images stay uint8 (bool
        becomes 0 and 255). 16-bit unsigned ones become float32 in 0..1, full range = 1, and so do those of a declared
        depth below 16 but 8. Floats are taken as they are and other integers unscaled, both as float32.

    Raises:
        BadImage: for a file that is broken, not an image, has other channels, has no value that is not missing, or has
            more than max_pixels pixels to be read.
    """
    image = open_any(file, in_chans, max_pixels, nodata)
    # What is known only now: how many bytes its pixels take.
    most = max_pixels * PIXEL_BYTES / max(PIXEL_BYTES, image.pixel_bytes)
    box = shrunk(choose_box(image.height, image.width), most)
    with reading(max_pixels):
        pixels = image.read(box, size or box[2:], fill)
    if fill is not None:
        check_finite(pixels.values)
    return pixels


def open_any(
    file: BinaryIO | bytes, in_chans: int, max_pixels: int = MAX_PIXELS, nodata: float | None = None
) -> OpenImage:
    """Read an image's header; of a TIFF with more than max_pixels parts can be read, if its tiles or strips can.

    Args:
        file: see `read_crop`.
        in_chans: likewise.
        max_pixels: likewise.
        nodata: likewise.

    Raises:
        BadImage: likewise.
    """
    file = BytesIO(file) if isinstance(file, bytes) else file
    image: OpenImage
    try:
        image = open_image(file, in_chans, max_pixels)
    except TooLarge:
        file.seek(0)
        if (tiles := open_tiles(file, in_chans, max_pixels)) is None:
            raise
        image = tiles
    with reading(max_pixels):
        return image if nodata is None else image.without(nodata)


def to_pil(pixels: NDArray[Any]) -> Image.Image:
    """(1 or 3, H, W), uint8 or float32 with full range 1, to a Pillow image of mode L or RGB."""
    if pixels.dtype != np.uint8:
        pixels = np.rint(np.nan_to_num(pixels).clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
