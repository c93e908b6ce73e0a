"""Windows of rasters against the whole image; label maps as they are stored; what is refused."""

from __future__ import annotations

import io
import logging
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from fcmae.data.augment import CenterCrop, CropAndFlip, Reading
from fcmae.data.decode import read_crop
from fcmae.data.find import find_images
from fcmae.data.limits import reading
from fcmae.data.rasters import LabelMap, Raster
from fcmae.data.source import BadImage
from fcmae.data.stats import channel_statistics
from fcmae.data.survey import survey
from fcmae.data.tiff import geo_tags, open_tiles

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)
BANDS = RNG.integers(0, 2**16, (50, 70, 5), dtype=np.uint16)
BOX = (13, 22, 30, 41)


def tiff(array: NDArray[Any], **settings: Any) -> io.BytesIO:
    file = io.BytesIO()
    if array.ndim == 3:
        settings = {"photometric": "rgb" if array.shape[2] == 3 else "minisblack", "planarconfig": "contig"} | settings
    if settings.get("planarconfig") == "separate":
        array = array.transpose(2, 0, 1)
    tifffile.imwrite(file, array, **settings)
    file.seek(0)
    return file


def png(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


STORED = [
    {},
    {"tile": (16, 32)},
    {"rowsperstrip": 7},
    {"tile": (16, 16), "compression": "zlib"},
    {"tile": (32, 16), "planarconfig": "separate"},
    {"rowsperstrip": 9, "planarconfig": "separate", "compression": "zlib"},
]


@pytest.mark.parametrize("settings", STORED)
@pytest.mark.parametrize("array", [COLOURS, BANDS], ids=["8-bit RGB", "16-bit bands"])
def test_a_window_of_a_tiff_is_that_part_of_the_whole(array: NDArray[Any], settings: dict[str, Any]) -> None:
    in_chans = array.shape[2]
    raster = Raster(tiff(array, **settings), in_chans, [0.0])
    assert (raster.height, raster.width) == (50, 70)
    whole = read_crop(tiff(array, **settings), in_chans, lambda h, w: (0, 0, h, w), None, fill=[0.0]).values
    top, left, height, width = BOX
    found = raster.read(BOX).values
    np.testing.assert_array_equal(found, whole[:, top : top + height, left : left + width])
    assert found.dtype == whole.dtype


def test_a_window_reads_no_more_of_the_file_than_its_tiles() -> None:
    file = tiff(RNG.integers(0, 256, (512, 512), dtype=np.uint8), tile=(32, 32))
    raster, read = Raster(file, 1, [0.0]), []
    original = file.read
    file.read = lambda *n: (read.append(len(found := original(*n))), found)[1]  # type: ignore[method-assign]
    raster.read((40, 40, 20, 50))  # two tiles
    assert sum(read) == 2 * 32 * 32


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_other_formats_give_the_same_windows(kind: str) -> None:
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, COLOURS)
        file.seek(0)
    else:
        file = png(Image.fromarray(COLOURS))
    raster = Raster(file, 3, [0.0])
    top, left, height, width = BOX
    expected = COLOURS[top : top + height, left : left + width].transpose(2, 0, 1)
    for _ in range(2):
        np.testing.assert_array_equal(raster.read(BOX).values, expected)


def test_a_raster_larger_than_max_pixels_is_read_in_parts_and_refused_as_a_whole() -> None:
    raster = Raster(tiff(COLOURS, tile=(16, 16)), 3, [0.0], max_pixels=2000)
    assert raster.read(BOX).values.shape == (3, 30, 41)
    with pytest.raises(BadImage, match="more than max_pixels = 2000"):
        raster.read((0, 0, 50, 70))
    with pytest.raises(BadImage, match="more than max_pixels = 2000"):
        Raster(png(Image.fromarray(COLOURS)), 3, [0.0], max_pixels=2000)


@pytest.mark.parametrize("values", [COLOURS, COLOURS[..., 0], BANDS[..., 0], BANDS[..., 0].astype(np.float32)])
def test_what_pillow_would_not_open_for_its_size_is_read_in_parts(
    values: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chans = 3 if values.ndim == 3 else 1
    whole = read_crop(tiff(values, tile=(16, 16)), in_chans, lambda h, w: (0, 0, h, w), None).values
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    found = read_crop(tiff(values, tile=(16, 16)), in_chans, lambda h, w: (9, 5, 20, 30), None, max_pixels=900).values
    np.testing.assert_array_equal(found, whole[:, 9:29, 5:35])


def test_planes_that_share_one_header_are_not_read_as_one(tmp_path: Path) -> None:
    planes = np.random.default_rng(0).integers(0, 2**16, (3, 32, 48), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", planes, imagej=True, truncate=True, metadata={"axes": "CYX"})
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1
    content = (tmp_path / "a.tif").read_bytes()
    whole = read_crop(io.BytesIO(content), 3, lambda h, w: (0, 0, h, w), None).values
    found = Raster(io.BytesIO(content), 3, [0.0] * 3).read((0, 0, 32, 48)).values
    np.testing.assert_array_equal(found, whole)
    assert not np.array_equal(found[0], found[1])


def test_a_palette_of_16_bits_shows_its_colours() -> None:
    numbers, colours = RNG.integers(0, 2**16, (20, 30), dtype=np.uint16), RNG.integers(0, 256, (3, 2**16))
    file = tiff(numbers, photometric="palette", colormap=(colours * 257).astype(np.uint16))
    found = read_crop(file, 3, lambda h, w: (0, 0, h, w), None).values
    shown = found * 255 if found.dtype != np.uint8 else found
    np.testing.assert_allclose(shown, colours[:, numbers], atol=0.51)


def test_bands_that_only_their_bytes_make_too_large_are_read_in_parts() -> None:
    bands = np.random.default_rng(0).random((50, 70, 12), dtype=np.float32)
    found = read_crop(tiff(bands, tile=(16, 16)), 12, lambda h, w: (0, 0, h, w), None, max_pixels=3600).values
    rows, columns = found.shape[1:]
    assert 0.9 < rows * columns * 4 / 3600 <= 1  # of 48 bytes, four times those that max_pixels counts on
    top, left = (50 - rows) // 2, (70 - columns) // 2
    np.testing.assert_array_equal(found, bands.transpose(2, 0, 1)[:, top : top + rows, left : left + columns])


@pytest.mark.parametrize("settings", STORED[1:])
@pytest.mark.parametrize("array", [COLOURS, BANDS], ids=["8-bit RGB", "16-bit bands"])
def test_crops_of_a_tiff_larger_than_max_pixels_are_those_of_the_whole(
    array: NDArray[Any], settings: dict[str, Any]
) -> None:
    in_chans, boxes = array.shape[2], []
    crop = CropAndFlip(Reading(in_chans, (16, 24), max_pixels=2000), (0.2, 1.0), 0)
    whole = read_crop(tiff(array, **settings), in_chans, lambda h, w: (0, 0, h, w), None, fill=[0.0]).values

    def choose(height: int, width: int) -> tuple[int, int, int, int]:
        boxes.append(crop.box(height, width, rng))
        return boxes[-1]

    rng = np.random.default_rng(0)
    for _ in range(20):
        found = read_crop(tiff(array, **settings), in_chans, choose, None, fill=[0.0], max_pixels=2000).values
        top, left, height, width = boxes[-1]
        np.testing.assert_array_equal(found, whole[:, top : top + height, left : left + width])
        assert height * width * 8 * in_chans / 12 <= 2000
    corners = np.array(boxes)
    assert np.ptp(corners[:, 0]) > 10 and np.ptp(corners[:, 1]) > 20  # from everywhere, not from the middle


def test_a_raster_of_one_strip_larger_than_max_pixels_is_refused() -> None:
    with pytest.raises(BadImage, match="50 x 70 pixels, more than max_pixels = 2000"):
        read_crop(tiff(COLOURS), 3, lambda *_: BOX, None, max_pixels=2000)


def test_every_view_and_the_statistics_read_parts_of_a_raster_larger_than_max_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(COLOURS, tile=(16, 16)).getvalue())
    images, rng = find_images([str(tmp_path)]), np.random.default_rng(0)
    reading = Reading(3, (16, 24), max_pixels=2000)
    views = (CropAndFlip(reading, (0.2, 1.0), 0.5, 0.5), CenterCrop(reading))
    for view in views:
        with images.open(0) as file:
            assert view(file, rng).values.shape == (3, 16, 24)
    mean, _, num = channel_statistics(images, 3, max_pixels=2000)
    share = (2000 * 12 / 24 / 3500) ** 0.5
    rows, columns = int(50 * share), int(70 * share)
    top, left = (50 - rows) // 2, (70 - columns) // 2
    centre = COLOURS[top : top + rows, left : left + columns] / 255
    assert num == 1
    np.testing.assert_allclose(mean, centre.mean(axis=(0, 1)))
    found = survey(images, max_pixels=2000)
    assert (found.short_side, found.in_chans) == (50, 3)


def test_missing_values_of_a_window_are_filled_even_where_it_has_no_others() -> None:
    values = np.ones((64, 64), np.float32)
    values[:32] = np.nan
    raster = Raster(tiff(values, tile=(16, 16)), 1, [0.25])
    assert (raster.read((0, 0, 16, 16)).values == 0.25).all()
    assert set(np.unique(raster.read((16, 0, 32, 16)).values)) == {0.25, 1.0}


def test_label_maps_are_read_as_they_are_stored() -> None:
    labels = RNG.integers(0, 7, (50, 70), dtype=np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([3, 2, 1, *range(60)])
    deep = labels.astype(np.uint16) * 300
    array = io.BytesIO()
    np.save(array, labels.astype(np.int32))
    array.seek(0)
    files = [
        (png(Image.fromarray(labels)), labels),
        (png(palette), labels),
        (png(Image.fromarray(deep)), deep),
        (tiff(deep), deep),
        (tiff(labels, tile=(16, 16)), labels),
        (tiff(labels, photometric="palette", colormap=np.zeros((3, 256), np.uint16)), labels),
        (png(Image.fromarray(labels > 3)), labels > 3),
        (array, labels),
    ]
    top, left, height, width = BOX
    for file, expected in files:
        found = LabelMap(file).read(BOX)
        np.testing.assert_array_equal(found, expected[top : top + height, left : left + width])


@pytest.mark.parametrize("depth", [2, 4])
def test_a_png_of_few_bits_keeps_its_numbers(depth: int) -> None:
    values = np.arange(8, dtype=np.uint8)[None].repeat(3, 0) % 2**depth
    bits = np.unpackbits(values[..., None], axis=2)[..., -depth:].reshape(3, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 3, depth, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    found = LabelMap(io.BytesIO(b"\x89PNG\r\n\x1a\n" + content)).read((0, 0, 3, 8))
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
def test_a_label_map_is_turned_upright_as_its_image_is(orientation: int) -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))))
    found = LabelMap(io.BytesIO(file.getvalue()))
    assert (found.height, found.width) == upright.shape
    np.testing.assert_array_equal(found.read((0, 0, *upright.shape)), upright)


def test_a_label_map_is_resized_by_the_nearest_pixel() -> None:
    labels = np.array([[0, 9], [200, 3]], dtype=np.uint8)
    found = LabelMap(png(Image.fromarray(labels))).read((0, 0, 2, 2), (4, 6))
    np.testing.assert_array_equal(found, labels.repeat(2, 0).repeat(3, 1))
    large = LabelMap(png(Image.fromarray(np.arange(9, dtype=np.uint8)[None].repeat(9, 0)))).read((0, 0, 9, 9), (3, 3))
    assert large[0].tolist() == [1, 4, 7]  # the middles


@pytest.mark.parametrize("array", [COLOURS, COLOURS[..., 0].astype(np.float32)], ids=["RGB", "float"])
def test_what_is_no_label_map_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(BadImage, match="a label map one of whole numbers"):
        LabelMap(tiff(array))


def test_a_jpeg_is_no_label_map() -> None:
    file = io.BytesIO()
    Image.fromarray(COLOURS[..., 0]).save(file, "JPEG")
    file.seek(0)
    with pytest.raises(BadImage, match="JPEG, which changes the numbers"):
        LabelMap(file)


def test_a_cut_off_tiff_is_refused_where_it_is_read(tmp_path: Path) -> None:
    whole = tiff(BANDS, tile=(16, 16)).getvalue()
    with pytest.raises(BadImage):
        Raster(io.BytesIO(whole[: len(whole) // 2]), 5, [0.0]).read((30, 40, 20, 30))


def test_georeferencing_is_found_and_survives_writing() -> None:
    scale, tie = (10.0, 10.0, 0.0), (0.0, 0.0, 0.0, 500000.0, 4600000.0, 0.0)
    coefficients = tuple(np.linspace(-1, 1, 92).tolist())
    tags = [(33550, 12, 3, scale, True), (33922, 12, 6, tie, True), (50844, 12, 92, coefficients, True)]
    found = geo_tags(tiff(COLOURS, extratags=tags))
    assert found == tags
    assert geo_tags(tiff(COLOURS, extratags=found)) == tags
    assert geo_tags(png(Image.fromarray(COLOURS))) == []
    turned = (274, 3, 1, 3, True)
    assert geo_tags(tiff(COLOURS, extratags=[*tags, (274, 3, 1, 0, True)])) == tags
    assert geo_tags(tiff(COLOURS, extratags=[turned])) == []
    with pytest.raises(BadImage, match="a place on earth and an Orientation other than 1: store it"):
        geo_tags(tiff(COLOURS, extratags=[*tags, turned]))


def test_without_a_decoder_for_its_compression_a_tiff_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcmae.data.tiff._decodes", lambda page: False)
    raster = Raster(tiff(COLOURS), 3, [0.0])
    top, left, height, width = BOX
    expected = COLOURS[top : top + height, left : left + width].transpose(2, 0, 1)
    np.testing.assert_array_equal(raster.read(BOX).values, expected)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_tiff_of_few_bits_keeps_its_numbers_without_a_decoder_of_them(
    bits: int, white_is_zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcmae.data.tiff._decodes", lambda page: False)
    values = np.arange(8 * 24, dtype=np.uint8).reshape(8, 24) % min(2**bits, 11)
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., -bits:].reshape(8, -1), axis=1)
    file = tiff(packed)
    with tifffile.TiffFile(file, mode="r+b") as again:
        tags = again.pages.first.tags
        tags["BitsPerSample"].overwrite(bits)
        tags["ImageWidth"].overwrite(24)
        tags["PhotometricInterpretation"].overwrite(0 if white_is_zero else 1)
        content = file.getvalue()
    np.testing.assert_array_equal(LabelMap(io.BytesIO(content)).read((0, 0, 8, 24)), values)


@pytest.mark.parametrize("image", [COLOURS, COLOURS[..., 0], BANDS[..., 0].astype(np.float32)], ids=["RGB", "L", "F"])
def test_a_mask_of_missing_pixels_behind_an_image_is_no_second_image(image: NDArray[Any]) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(image, photometric="rgb" if image.ndim == 3 else "minisblack", tile=(16, 16), metadata=None)
        mask = np.ones(image.shape[:2], np.bool_)
        writer.write(mask, photometric="mask", subfiletype=4, tile=(16, 16), metadata=None)
    channels = 3 if image.ndim == 3 else 1
    expected = np.atleast_3d(image).transpose(2, 0, 1)
    file.seek(0)
    found = read_crop(file, channels, lambda height, width: (0, 0, height, width), None).values
    np.testing.assert_array_equal(found, expected)
    file.seek(0)
    assert open_tiles(file, channels) is not None
    file.seek(0)
    top, left, height, width = BOX
    part = Raster(file, channels, [0.0]).read(BOX).values
    np.testing.assert_array_equal(part, expected[:, top : top + height, left : left + width])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_alpha_behind_grey_is_left_out_of_crops_and_of_rasters_alike(dtype: type, in_chans: int) -> None:
    file = tiff(np.stack([COLOURS[..., 0], COLOURS[..., 1]], -1).astype(dtype), extrasamples=["unassalpha"])
    whole = read_crop(file, in_chans, lambda height, width: (0, 0, height, width), None).values
    full = 1 if dtype is np.uint8 else np.float32(2**16 - 1)
    np.testing.assert_allclose(whole, np.broadcast_to(COLOURS[..., 0] / full, whole.shape), rtol=1e-6)
    file.seek(0)
    np.testing.assert_array_equal(Raster(file, in_chans, [0.0] * in_chans).read((0, 0, 50, 70)).values, whole)


def test_a_place_whose_words_are_not_ascii_survives_writing() -> None:
    words = "Gauß-Krüger|".encode()
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (34737, 2, len(words) + 1, words + b"\0", True)]
    again = geo_tags(tiff(COLOURS, extratags=geo_tags(tiff(COLOURS, extratags=tags))))
    assert again == tags


def test_threads_that_read_at_once_leave_the_libraries_as_they_were() -> None:
    before, entered, done = (Image.MAX_IMAGE_PIXELS, list(warnings.filters)), threading.Event(), threading.Event()

    def long_one() -> None:
        with reading(10**9):
            entered.set()
            done.wait(10)

    thread = threading.Thread(target=long_one)
    with reading(10**8):
        thread.start()
        assert entered.wait(10)
    assert Image.MAX_IMAGE_PIXELS == 10**9  # one still reads
    done.set()
    thread.join()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
    assert not logging.getLogger("tifffile").disabled
