"""Files may be broken or hostile: what they take in memory is bounded, and what libraries raise becomes BadImage.

What a file takes is known before anything of it is decoded.
"""

from __future__ import annotations

import logging
import lzma
import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fcmae.data.geometry import PIXEL_BYTES
from fcmae.data.source import BadImage

_LOGGERS = ("tifffile", "PIL.TiffImagePlugin", "pydicom")  # one file can make them write a hundred thousand lines
MAX_RATIO = 2000  # of what is stored to the file; deflate gets to 1032
SMALL = 2**26  # bytes, which a file may take whatever it is

# What Pillow, tifffile and numpy raise on files that are broken or lie about their contents.
READ_ERRORS = (
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
    lzma.LZMAError,
    tokenize.TokenError,  # from numpy's reading of .npy headers
    tifffile.TiffFileError,  # a ValueError since 2025.9.20, which needs Python 3.11
    Image.DecompressionBombError,
)


class TooLarge(BadImage):
    """An image, or a part of one, has more pixels than may be read."""


@contextmanager
def reading(max_pixels: int) -> Iterator[None]:
    """Turn whatever a library raises on a bad file into BadImage; silence what it warns of and logs.

    Args:
        max_pixels: Pillow's own limit does not stop images of so many.
    """
    with _QUIET.raised_to(max_pixels):
        try:
            yield
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage("it is no JPEG, PNG, WebP, BMP, TIFF, DICOM or .npy file") from error
        except READ_ERRORS as error:
            raise BadImage.unread(error) from error


class _Quiet:
    """What the libraries have for the whole process, changed while any thread reads, and set back by the last."""

    def __init__(self) -> None:
        self._lock, self._readers, self._undo = Lock(), 0, ExitStack()

    @contextmanager
    def raised_to(self, max_pixels: int) -> Iterator[None]:
        with self._lock:
            if not self._readers:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # about metadata; a file that decodes is good. Bombs: check_size
                for log in map(logging.getLogger, _LOGGERS):
                    self._undo.callback(setattr, log, "disabled", log.disabled)
                    log.disabled = True
                self._undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            self._readers += 1
            if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if not self._readers:
                    self._undo.close()


_QUIET = _Quiet()


def check_size(height: int, width: int, depth: float, file_bytes: int, max_pixels: int) -> None:
    """Refuse what would take more memory than is allowed, or than its file can hold.

    Args:
        height: in pixels.
        width: likewise.
        depth: bytes that a pixel takes once it is read, or less where it may take less before it is compressed.
        file_bytes: of the file.
        max_pixels: see `read_crop`.

    Raises:
        TooLarge: if it is.
        BadImage: with another reason.
    """
    if height < 1 or width < 1:
        raise BadImage(f"it is empty: {height} x {width} pixels")
    if height * width * max(1, depth / PIXEL_BYTES) > max_pixels:
        size = f"{height} x {width} pixels" + (f" of {depth} bytes" if depth > PIXEL_BYTES else "")
        raise TooLarge(
            f"it has {size}, more than max_pixels = {max_pixels} allows (pixels of {PIXEL_BYTES} bytes): "
            "cut it into smaller images, or raise max_pixels"
        )
    if height * width * depth > max(SMALL, MAX_RATIO * file_bytes):
        raise BadImage(f"its {file_bytes} bytes cannot hold the {height} x {width} pixels that it claims")


def check_finite(values: NDArray[Any]) -> None:
    """Refuse values that are too large for float32.

    Args:
        values: of an image, where nothing missing is left.

    Raises:
        BadImage: if one is.
    """
    if values.dtype != np.uint8 and not np.isfinite(values).all():
        raise BadImage("it holds values that 32 bits cannot")
