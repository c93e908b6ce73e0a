"""TIFFs are read right: every dtype, byte order, number of bands, layout, compression, order of pages and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fcmae.data.decode import read_crop
from fcmae.data.source import BadImage

SHAPE = (32, 48)


def read(path: Path, in_chans: int) -> NDArray[Any]:
    with path.open("rb") as file:
        return read_crop(file, in_chans, lambda height, width: (0, 0, height, width), None)


def values(dtype: str, bands: int) -> NDArray[Any]:
    """(bands, H, W): a ramp over the range of unsigned integers, over -1000 to 1000 of signed ones and floats."""
    low, high = (0, np.iinfo(dtype).max) if dtype.startswith("u") else (-1000, 1000)
    ramp = np.linspace(low, high, bands * SHAPE[0] * SHAPE[1]).reshape(bands, *SHAPE)
    return ramp.astype(dtype)


def expected(array: NDArray[Any]) -> NDArray[Any]:
    """As `read_crop` documents it: 8 bits stay, 16 unsigned ones have the full range 1, others are as they are."""
    if array.dtype == np.uint8:
        return array
    return array.astype(np.float32) / (65535 if array.dtype == np.uint16 else 1)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", ["strips", "tiles"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_every_kind_of_tiff_gives_its_own_values(
    tmp_path: Path, dtype: str, byteorder: str, bands: int, planar: str, layout: str, compression: str | None
) -> None:
    array = values(dtype, bands)
    stored = array if planar == "separate" or bands == 1 else array.transpose(1, 2, 0)
    options: dict[str, Any] = {"tile": (16, 16)} if layout == "tiles" else {}
    tifffile.imwrite(
        tmp_path / "x.tif",
        stored[0] if bands == 1 else stored,
        byteorder=byteorder,
        planarconfig=None if bands == 1 else planar,
        photometric="minisblack",
        compression=compression,
        **options,
    )
    np.testing.assert_allclose(read(tmp_path / "x.tif", bands), expected(array), rtol=1e-6)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_grey_float_is_the_same_for_one_channel_and_for_three(
    tmp_path: Path, byteorder: str, compression: str | None
) -> None:
    ramp = np.linspace(0, 1, SHAPE[0] * SHAPE[1], dtype=np.float32).reshape(SHAPE)
    tifffile.imwrite(tmp_path / "x.tif", ramp, byteorder=byteorder, compression=compression)
    for in_chans in (1, 3):
        np.testing.assert_array_equal(read(tmp_path / "x.tif", in_chans), np.broadcast_to(ramp, (in_chans, *SHAPE)))


def pack_12_bits(array: NDArray[np.uint16]) -> bytes:
    pairs = array.reshape(-1, 2).astype(np.uint32)
    joined = pairs[:, 0] << 12 | pairs[:, 1]
    return np.stack([joined >> 16 & 255, joined >> 8 & 255, joined & 255], 1).astype(np.uint8).tobytes()


def test_the_full_range_is_that_of_the_declared_depth(tmp_path: Path) -> None:
    """A baseline TIFF by hand, as tifffile writes packed bits with another package only."""
    ramp = np.linspace(0, 4095, SHAPE[0] * SHAPE[1]).round().astype(np.uint16).reshape(SHAPE)
    data = pack_12_bits(ramp)
    tags = {256: SHAPE[1], 257: SHAPE[0], 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: SHAPE[0], 279: len(data)}
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    header = b"II*\0" + (8 + len(data)).to_bytes(4, "little")
    (tmp_path / "x.tif").write_bytes(header + data + len(tags).to_bytes(2, "little") + entries + b"\0" * 4)
    np.testing.assert_allclose(read(tmp_path / "x.tif", 1)[0], ramp / 4095, atol=1e-6)


@pytest.mark.parametrize("imagej", [True, False], ids=["imagej", "ome"])
def test_channels_that_are_stored_as_pages_are_channels(tmp_path: Path, imagej: bool) -> None:
    stack = np.stack([np.full(SHAPE, value, np.uint16) for value in (10000, 30000, 60000)])
    path = tmp_path / ("x.tif" if imagej else "x.ome.tif")
    tifffile.imwrite(path, stack, imagej=imagej, metadata={"axes": "CYX"}, photometric="minisblack")
    np.testing.assert_allclose(read(path, 3)[:, 0, 0], np.array([10000, 30000, 60000]) / 65535, rtol=1e-6)
    with pytest.raises(BadImage, match="3 channels as pages"):
        read(path, 1)


def test_a_first_page_that_is_a_thumbnail_is_not_the_image(tmp_path: Path) -> None:
    image = np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint16).reshape(SHAPE)
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        tiff.write(image[::4, ::4], subfiletype=1)
        tiff.write(image)
    np.testing.assert_allclose(read(tmp_path / "x.tif", 1)[0], image / 65535, rtol=1e-6)


def test_a_slide_in_several_sizes_is_read_at_its_largest_by_pillow(tmp_path: Path) -> None:
    """Compressions that need another package in tifffile do not in Pillow: a second page must not cost them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), dtype=np.uint8))
    image.save(tmp_path / "x.tif", compression="tiff_lzw", save_all=True, append_images=[image.reduce(2)])
    np.testing.assert_array_equal(read(tmp_path / "x.tif", 3), np.asarray(image).transpose(2, 0, 1))
