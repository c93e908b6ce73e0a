"""TIFFs are read right: every dtype, byte order, number of bands, layout, compression, order of pages and depth."""

from __future__ import annotations

import io
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from chaos.images import tiff
from numpy.typing import NDArray
from PIL import Image

from fcmae.data.decode import read_crop
from fcmae.data.limits import READ_ERRORS
from fcmae.data.rasters import LabelMap, Raster
from fcmae.data.readers import open_image
from fcmae.data.source import BadImage
from fcmae.data.tiff import num_pages

SHAPE = (20, 28)  # no whole tiles
COMPRESSIONS = (None, "zlib", "lzma")


def read(path: Path, in_chans: int) -> NDArray[Any]:
    with path.open("rb") as file:
        return read_crop(file, in_chans, lambda height, width: (0, 0, height, width), None).values


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


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "float16", "float32", "float64"])
def test_every_kind_of_tiff_gives_its_own_values(tmp_path: Path, dtype: str, byteorder: str) -> None:
    path, made = tmp_path / "x.tif", 0
    kinds = product((1, 3, 4), ("contig", "separate", "pages"), (None, (16, 16)), COMPRESSIONS, (False, True), (4, 8))
    for bands, planar, tile, compression, predictor, version in kinds:
        if (bands == 1 and planar != "contig") or (predictor and (compression is None or dtype[0] == "f")):
            continue  # there is no such file, or tifffile writes it with another package only
        array = values(dtype, bands)
        tifffile.imwrite(
            path,
            array[0] if bands == 1 else array.transpose(1, 2, 0) if planar == "contig" else array,
            byteorder=byteorder,
            planarconfig=None if bands == 1 or planar == "pages" else planar,
            photometric="rgb" if bands == 3 and planar != "pages" else "minisblack",
            compression=compression,
            predictor=predictor,
            tile=tile,
            bigtiff=version == 8,
        )
        if bands == 3 and planar == "pages":
            continue  # pages of colours without a word on what they are: the first is the image
        kind = (bands, planar, tile, compression, predictor, version)
        np.testing.assert_allclose(read(path, bands), expected(array), rtol=1e-6, err_msg=str(kind))
        made += 1
    assert made >= 60


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 24])
@pytest.mark.parametrize("white", [0, 1])
def test_every_declared_depth_has_its_full_range_or_is_refused(tmp_path: Path, bits: int, white: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 16).round().astype(int)
    packed = "".join(f"{value:0{bits}b}" for value in ramp.tolist() * 2)
    data = int(packed, 2).to_bytes(len(packed) // 8, "big")
    if bits == 16:  # the only one of these whose bytes have the file's order
        data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
    tags = {256: 16, 257: 2, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: 2, 279: len(data)}
    (tmp_path / "x.tif").write_bytes(tiff({tag: ("I", (value,)) for tag, value in tags.items()}, data))
    right = ramp / (2**bits - 1) if white else 1 - ramp / (2**bits - 1)
    try:
        found = read(tmp_path / "x.tif", 1)
    except BadImage as error:
        assert bits in (6, 10, 14, 24) or (bits, white) == (12, 0)  # what needs another package
        assert "it cannot be read: " in str(error)
    else:
        found = found / 255 if found.dtype == np.uint8 else found
        np.testing.assert_allclose(found, [[right, right]], atol=1e-6)


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_a_predictor_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", values("float32", 1)[0], compression="zlib", byteorder=">")
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        place = file.pages[0].tags[305].offset  # Software becomes Predictor, of floating point
    content = bytearray((tmp_path / "x.tif").read_bytes())
    content[place : place + 12] = bytes.fromhex("013d 0003 00000001 0003 0000")
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(BadImage, match="imagecodecs"):
        read(tmp_path / "x.tif", 1)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_grey_float_is_the_same_for_one_channel_and_for_three(
    tmp_path: Path, byteorder: str, compression: str | None
) -> None:
    ramp = np.linspace(0, 1, SHAPE[0] * SHAPE[1], dtype=np.float32).reshape(SHAPE)
    tifffile.imwrite(tmp_path / "x.tif", ramp, byteorder=byteorder, compression=compression)
    for in_chans in (1, 3):
        np.testing.assert_array_equal(read(tmp_path / "x.tif", in_chans), np.broadcast_to(ramp, (in_chans, *SHAPE)))


@pytest.mark.parametrize("imagej", [True, False], ids=["imagej", "ome"])
def test_channels_that_are_stored_as_pages_are_channels(tmp_path: Path, imagej: bool) -> None:
    stack = np.stack([np.full(SHAPE, value, np.uint16) for value in (10000, 30000, 60000)])
    path = tmp_path / ("x.tif" if imagej else "x.ome.tif")
    tifffile.imwrite(path, stack, imagej=imagej, metadata={"axes": "CYX"}, photometric="minisblack")
    np.testing.assert_allclose(read(path, 3)[:, 0, 0], np.array([10000, 30000, 60000]) / 65535, rtol=1e-6)
    with pytest.raises(BadImage, match="3 channels as pages"):
        read(path, 1)


OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{own}"><Image ID="Image:0">
<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="9" SizeY="8" SizeC="2" SizeZ="1" SizeT="1">
<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="0.ome.tif">urn:uuid:0</UUID></TiffData>
<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="1.ome.tif">urn:uuid:1</UUID></TiffData>
</Pixels></Image></OME>"""


@pytest.mark.parametrize("num_files", [1, 2])
def test_one_of_several_files_of_an_image_is_no_image_of_several_channels(tmp_path: Path, num_files: int) -> None:
    for number in range(num_files):
        image = np.full((8, 9), 10 * number + 5, np.uint8)
        tifffile.imwrite(tmp_path / f"{number}.ome.tif", image, description=OME.format(own=number), metadata=None)
    assert (read(tmp_path / "0.ome.tif", 1) == 5).all()
    for file in ((tmp_path / "0.ome.tif").open("rb"), io.BytesIO((tmp_path / "0.ome.tif").read_bytes())):
        with file, pytest.raises(BadImage, match="it is one of several files that are an image together: save them"):
            open_image(file, 2)


@pytest.mark.parametrize("imagej", [True, False])
def test_a_stack_under_one_header_is_told_of_and_no_label_map(tmp_path: Path, imagej: bool) -> None:
    stack = values("uint8", 4)
    axes = {"metadata": {"axes": "ZYX"}} if imagej else {}
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=imagej, truncate=True, photometric="minisblack", **axes)
    with (tmp_path / "a.tif").open("rb") as file:
        assert num_pages(file) == (4, True)
        file.seek(0)
        with pytest.raises(BadImage, match="it has 4 pages, and a label map is one"):
            LabelMap(file)


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


@pytest.mark.parametrize("nodata", [None, 7])
@pytest.mark.parametrize("layout", ["strips", "tiles"])
@pytest.mark.parametrize("bands", [1, 3])
def test_blocks_that_a_sparse_tiff_leaves_out_are_missing_or_0(
    tmp_path: Path, layout: str, nodata: int | None, bands: int
) -> None:
    """GDAL leaves out what is empty: such blocks have an offset of 0 and no bytes."""
    image = np.random.default_rng(0).integers(100, 255, (32, 32, bands), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "x.tif",
        image if bands == 3 else image[..., 0],
        photometric="rgb" if bands == 3 else "minisblack",
        extratags=[] if nodata is None else [(42113, "s", 0, str(nodata), True)],
        **({"tile": (16, 16)} if layout == "tiles" else {"rowsperstrip": 8}),
    )
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        for code in (273, 279) if layout == "strips" else (324, 325):
            tag = file.pages[0].tags[code]
            tag.overwrite((tag.value[0], 0, *tag.value[2:]))
    left_out = np.s_[:, 8:16] if layout == "strips" else np.s_[:, :16, 16:]
    expected = image.transpose(2, 0, 1).copy()
    expected[left_out] = 0 if nodata is None else 51
    with (tmp_path / "x.tif").open("rb") as file:
        found = read_crop(file, bands, lambda height, width: (0, 0, height, width), None, fill=[0.2]).values
        file.seek(0)
        parts = Raster(file, bands, [0.2]).read((0, 0, 32, 32)).values
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(parts, expected)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("f4", "-3.4028234663852886e+38"), ("i2", "32767"), ("i2", "-9999.0"), ("f4", "nan")]
)
def test_blocks_that_are_left_out_hold_gdals_nodata(tmp_path: Path, dtype: str, nodata: str) -> None:
    image = np.arange(32 * 32, dtype=dtype).reshape(32, 32)
    tags = [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(tmp_path / "x.tif", image, photometric="minisblack", tile=(16, 16), extratags=tags)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        for code in (324, 325):
            tag = file.pages[0].tags[code]
            tag.overwrite((tag.value[0], 0, *tag.value[2:]))
    known = np.ones((1, 32, 32), bool)
    known[:, :16, 16:] = False
    with (tmp_path / "x.tif").open("rb") as file:
        found = read_crop(file, 1, lambda height, width: (0, 0, height, width), None, fill=[0.0]).known
        file.seek(0)
        seen = Raster(file, 1, [0.0]).read((0, 0, 32, 32)).is_seen
    np.testing.assert_array_equal(found, known)
    np.testing.assert_array_equal(seen, known[0])


@pytest.mark.parametrize("rows", [20, 10])
@pytest.mark.parametrize("kind", ["grey", "bands", "pages"])
def test_a_tiff_or_a_page_of_which_all_is_left_out_is_empty(tmp_path: Path, kind: str, rows: int) -> None:
    image = values("uint8", 1 if kind == "grey" else 5)
    stored = image[0] if kind == "grey" else image.transpose(1, 2, 0) if kind == "bands" else image
    settings = {"planarconfig": "contig"} if kind == "bands" else {}
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="minisblack", rowsperstrip=rows, metadata=None, **settings)
    empty = 2 if kind == "pages" else 0
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        for code in (273, 279):
            file.pages[empty].tags[code].overwrite((0, 0) if rows == 10 else 0)
    expected = image.copy()
    expected[empty if kind == "pages" else slice(None)] = 0
    np.testing.assert_array_equal(read(tmp_path / "x.tif", len(image)), expected)


def test_a_strip_whose_length_is_not_told_is_no_sparse_one(tmp_path: Path) -> None:
    image = values("uint8", 1)[0]
    tifffile.imwrite(tmp_path / "x.tif", image)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        file.pages[0].tags[279].overwrite(0)
    np.testing.assert_array_equal(read(tmp_path / "x.tif", 1)[0], image)


def test_a_sparse_tiff_with_a_palette_shows_its_colours(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint16)
    numbers = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    tifffile.imwrite(tmp_path / "x.tif", numbers, photometric="palette", colormap=colours * 256, rowsperstrip=16)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        for code in (273, 279):
            tag = file.pages[0].tags[code]
            tag.overwrite((tag.value[0], 0))
    numbers[16:] = 0
    np.testing.assert_array_equal(read(tmp_path / "x.tif", 3), colours[:, numbers])


def test_a_sparse_label_map_of_few_bits_is_refused_or_read(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).random((32, 32)) > 0.5
    tifffile.imwrite(tmp_path / "x.tif", labels, photometric="minisblack", rowsperstrip=16)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        for code in (273, 279):
            tag = file.pages[0].tags[code]
            tag.overwrite((tag.value[0], 0))
    labels[16:] = False
    with (tmp_path / "x.tif").open("rb") as file:
        try:
            found = LabelMap(file).read((0, 0, 32, 32))
        except BadImage as error:
            assert "leaves out strips or tiles" in str(error)
        else:  # with imagecodecs
            np.testing.assert_array_equal(found, labels)


def test_a_preview_is_not_taken_for_the_image_that_lies_elsewhere_in_the_file(tmp_path: Path) -> None:
    whole = np.zeros((64, 64, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(whole[::4, ::4], photometric="rgb", subfiletype=1, subifds=1)
        tiff.write(whole, photometric="rgb", subfiletype=0)
    with pytest.raises(BadImage, match="its page is a preview"):
        read(tmp_path / "a.tif", 3)


def test_colours_of_other_kinds_are_not_taken_for_red_green_and_blue(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint16), photometric="cielab")
    with pytest.raises(BadImage, match="save it as RGB"):
        read(tmp_path / "a.tif", 3)


def test_what_tifffile_cannot_read_is_a_bad_image_in_every_version() -> None:
    assert tifffile.TiffFileError in READ_ERRORS  # which older ones derive from Exception


def test_a_label_map_in_jpeg_compression_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.tif", compression="jpeg")
    with (
        (tmp_path / "a.tif").open("rb") as file,
        pytest.raises(BadImage, match="compressed as JPEG, which changes the numbers"),
    ):
        LabelMap(file)
