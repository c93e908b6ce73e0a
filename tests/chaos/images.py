"""Images to do harm with: small ones of every format, damaged at random, and some made to take memory or time."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import tifffile
from PIL import Image

SHAPE = (24, 20)


def mutated(seed: int) -> Iterator[tuple[str, bytes]]:
    """Suffixes and images, without end: some whole, most with bytes changed, cut or added."""
    rng = random.Random(seed)
    samples = list(whole().items())
    while True:
        name, content = rng.choice(samples)
        yield name[name.rindex(".") :], _damaged(rng, content, samples)


def _damaged(rng: random.Random, content: bytes, samples: list[tuple[str, bytes]]) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8, 30))):
        if not data:
            break
        # Headers are in front or, of some TIFFs, at the end.
        reach = min(len(data), rng.choice((16, 64, 400, 10**6)))
        at = rng.randrange(reach) if rng.random() < 0.7 else len(data) - 1 - rng.randrange(reach)
        match rng.randrange(8):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 3 | 4:  # a number
                size = rng.choice((2, 4, 8))
                value = rng.choice((0, 1, 2, 255, 256, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)))
                data[at : at + size] = (value % 256**size).to_bytes(size, rng.choice(("little", "big")))
            case 5:
                del data[at : at + rng.choice((1, 4, 100, 10**6))]
            case 6:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
            case 7:
                other = rng.choice(samples)[1]
                start = rng.randrange(len(other))
                data[at:at] = other[start : start + rng.choice((8, 64, 1000))]
    return _mended_png(bytes(data)) if rng.random() < 0.5 else bytes(data)


def _mended_png(data: bytes) -> bytes:
    """A PNG with right checksums, so that what was damaged is used."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    mended, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        mended[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(mended)


@cache
def whole() -> dict[str, bytes]:
    """Small images of every format, with and without what makes them special, by a name with the suffix."""
    rng = np.random.default_rng(0)
    found: dict[str, bytes] = {}

    def pixels(bands: int, dtype: str) -> Any:
        shape = (*SHAPE, bands) if bands > 1 else SHAPE
        return (rng.random(shape) * 250).astype(dtype)

    for form in ("jpeg", "png", "webp", "bmp", "tiff"):
        for mode in ("RGB", "L", "CMYK", "RGBA", "P", "1", "I;16"):
            image = (
                Image.fromarray(pixels(1, "u2")) if mode == "I;16" else Image.fromarray(pixels(3, "u1")).convert(mode)
            )
            for kind, options in _options(form).items():
                buffer = io.BytesIO()
                if (kind == "group4") > (mode == "1") or (form == "tiff" and kind == "jpeg") > (mode in ("RGB", "L")):
                    continue  # Pillow crashes
                try:
                    image.save(buffer, form, **options)
                except (OSError, ValueError, SystemError):  # not of this format
                    continue
                found[f"{mode}-{kind}.{form}"] = buffer.getvalue()
    for channels in (1, 2, 3, 4):
        found[f"16-bit-{channels}.png"] = png(rng.integers(0, 65536, (*SHAPE, channels)).astype(np.uint16))
    for dtype in ("u1", "u2", "i2", "u4", "f2", "f4", "f8", "c8"):
        for bands in (1, 3, 4):
            array = pixels(bands, dtype)
            buffer = io.BytesIO()
            np.save(buffer, array)
            found[f"{dtype}-{bands}.npy"] = buffer.getvalue()
            for byteorder, tile, compression in (("<", None, None), (">", (16, 16), "zlib"), ("<", (16, 16), "lzma")):
                buffer = io.BytesIO()
                extra = [(42113, "s", 0, "7", True)] if tile is None else []
                tifffile.imwrite(
                    buffer,
                    array,
                    byteorder=byteorder,
                    tile=tile,
                    compression=compression,
                    extratags=extra,
                    bigtiff=dtype == "u2",
                    photometric="rgb" if bands == 3 else "minisblack",
                    planarconfig="contig" if bands > 1 else None,
                )
                found[f"{dtype}-{bands}-{compression}.tif"] = buffer.getvalue()
    for name, options in {"pages": {}, "imagej": {"imagej": True}, "ome": {"ome": True}}.items():
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, rng.random((3, *SHAPE)).astype("f4"), photometric="minisblack", **options)
        found[f"{name}.tif"] = buffer.getvalue()
    return found


def _options(form: str) -> dict[str, dict[str, Any]]:
    exif = Image.Exif()
    exif[274] = 6
    return {
        "jpeg": {"exif": {"exif": exif}, "progressive": {"progressive": True}},
        "png": {"exif": {"exif": exif}, "plain": {}},
        "webp": {"lossy": {"exif": exif}, "lossless": {"lossless": True}},
        "bmp": {"plain": {}},
        "tiff": {
            kind: {"compression": kind} for kind in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4")
        },
    }[form]


def png(array: Any, *, shape: tuple[int, int] | None = None, exif: int = 1) -> bytes:
    """(H, W, C) of 8 or 16 bits as PNG, by hand.

    shape: height and width that it claims to have.
    exif: its orientation.
    """
    height, width = shape or array.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 8 * array.dtype.itemsize, colour_type, 0, 0, 0)
    said = Image.Exif()
    said[274] = exif
    chunks = {b"IHDR": header, b"eXIf": said.tobytes()[6:], b"IDAT": zlib.compress(rows), b"IEND": b""}
    checked = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def tiff(tags: dict[int, tuple[str, tuple[int, ...]]], data: bytes = b"") -> bytes:
    """A little-endian TIFF of one page, by hand.

    tags: type (B, H or I) and values of each; offsets count from 8, where `data` is.
    """
    codes = {"B": 1, "H": 3, "I": 4}
    entries, outside = b"", b""
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", after + len(outside))
        outside += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, codes[kind], len(values)) + place
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + outside


@cache
def bombs() -> dict[str, bytes]:
    """Small files that take much memory or time if they are believed, by a name with the suffix."""
    line = {277: ("H", (1,)), 258: ("H", (16,)), 262: ("H", (1,))}
    eight = {256: ("I", (8,)), 257: ("I", (8,))} | line
    zeros = zlib.compress(b"\0" * 2**27, 9)
    big = {256: ("I", (9000,)), 257: ("I", (9000,)), 278: ("I", (9000,))} | line

    def strip(tags: dict[int, Any], data: bytes, compression: int) -> bytes:
        return tiff({259: ("H", (compression,)), 273: ("I", (8,)), 279: ("I", (len(data),))} | tags, data)

    def tiled(side: int, compression: int, data: bytes, bits: int) -> bytes:
        tile = {322: ("I", (side,)), 323: ("I", (side,)), 324: ("I", (8,)), 325: ("I", (len(data),))}
        return tiff(eight | tile | {258: ("H", (bits,)), 259: ("H", (compression,))}, data)

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (9000, 9000, 4)})
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((2000, 2000), np.uint8)).save(jpeg, "jpeg", progressive=True)
    start = jpeg.getvalue().rindex(b"\xff\xda")
    found = {
        "claims.tif": strip(big, b"\0" * 8, 1),
        "claims-deflate.tif": strip(big, zlib.compress(b"\0" * 8), 8),
        "deflate-strip.tif": strip(eight | {278: ("I", (8,)), 258: ("H", (32,))}, zeros, 8),
        "tiles-8.tif": tiled(30000, 8, zlib.compress(b"\0" * 128), 8),
        "tiles-16.tif": tiled(30000, 1, b"\0" * 128, 16),
        "tiles-32.tif": tiled(20000, 8, zlib.compress(b"\0" * 128), 32),
        "strips.tif": strip(eight | {278: ("I", (2**31,))}, b"\0" * 128, 1),
        "claims.png": png(np.zeros((8, 8, 4), np.uint8), shape=(9900, 9900)),
        "claims-16.png": png(np.zeros((8, 8, 4), np.uint16), shape=(9900, 9900)),
        "header.npy": header.getvalue(),
        "scans.jpg": jpeg.getvalue()[:-2] + jpeg.getvalue()[start:-2] * 900 + b"\xff\xd9",
    }
    webp = io.BytesIO()
    Image.new("RGB", (16383, 6000)).save(webp, "webp", lossless=True)
    found["black.webp"] = webp.getvalue()
    pages = strip(eight, b"\0" * 128, 1)
    directory = pages[8 + 128 :]
    chain = bytearray(pages)
    for _ in range(30_000):
        chain[-4:] = struct.pack("<I", len(chain))
        chain += directory
    found["pages.tif"] = bytes(chain)
    return found
