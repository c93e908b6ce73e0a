"""Boxes of an image, how it is turned, and how small it may be decoded. Plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

MAX_PIXELS = 100_000_000  # of an image that is read, where nothing else is said; a little more than Pillow's own limit
MAX_CHANNELS = 4096
MAX_SIDE = 8192  # of what a network is given, in pixels
PIXEL_BYTES = 12  # that it counts on: three channels of 32 bits

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels of the upright image


def readable_share(height: int, width: int, in_chans: int, max_pixels: int) -> float:
    """The share of an image's area that may be read at once: all, but of one with more than max_pixels.

    Args:
        height: of the image, in pixels.
        width: likewise.
        in_chans: its channels, each of which may take 8 bytes.
        max_pixels: see `read_crop`.
    """
    if height * width <= max_pixels:
        return 1.0
    return max_pixels * PIXEL_BYTES / max(PIXEL_BYTES, 8 * in_chans) / (height * width)


def shrunk(box: Box, most: float) -> Box:
    """The box, or the part about its centre, of its form, that has no more pixels.

    Args:
        box: of an image.
        most: pixels.
    """
    top, left, height, width = box
    if height * width <= most:
        return box
    share = math.sqrt(most / (height * width))
    rows, columns = (max(1, int(side * share)) for side in (height, width))
    return top + (height - rows) // 2, left + (width - columns) // 2, rows, columns


# EXIF orientation: a stored image becomes upright by mirroring its columns (2, 3, 7, 8) and its rows (3, 4, 6, 7), and
# then exchanging rows and columns (5 to 8).


def make_upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn a stored image by its EXIF orientation.

    Args:
        image: (H, W, ...).
        orientation: anything but 2 to 8 leaves it.

    Returns:
        A view of the image.
    """
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    return image.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else image


def stored_box(box: Box, orientation: int, stored_height: int, stored_width: int) -> Box:
    """Where a box of the upright image lies in the image as stored.

    Args:
        box: of the upright image.
        orientation: EXIF's, see `make_upright`.
        stored_height: of the image as stored, in pixels.
        stored_width: likewise.
    """
    top, left, height, width = box
    if orientation in (5, 6, 7, 8):
        top, left, height, width = left, top, width, height
    if orientation in (2, 3, 7, 8):
        left = stored_width - left - width
    if orientation in (3, 4, 6, 7):
        top = stored_height - top - height
    return top, left, height, width


def align(box: Box, scale: int, height: int, width: int) -> Box:
    """The nearest box with whole pixels at its ends when the image is decoded smaller.

    Each side moves by at most half such a pixel, but for one at the border whose last pixel is not whole.

    Args:
        box: of the image.
        scale: how many times smaller.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    top, left = round(box[0] / scale), round(box[1] / scale)
    bottom = min(round((box[0] + box[2]) / scale), height // scale)
    right = min(round((box[1] + box[3]) / scale), width // scale)
    return top * scale, left * scale, (bottom - top) * scale, (right - left) * scale


def decode_scale(height: float, width: float, size: tuple[int, int]) -> int:
    """How many times smaller an image may be decoded so that a part of it still fills a size.

    Args:
        height: of the part, in pixels.
        width: of the part, in pixels.
        size: height and width that it fills.

    Returns:
        8, 4, 2 or 1.
    """
    return next((scale for scale in (8, 4, 2) if height / scale >= size[0] and width / scale >= size[1]), 1)
