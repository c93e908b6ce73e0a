"""Every format against an independent computation; hostile files against BadImage."""

from __future__ import annotations

import io
import logging
import resource
from contextlib import suppress
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import chaos.images
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from fcmae.data import readers
from fcmae.data.decode import ChooseBox, read_crop
from fcmae.data.geometry import Box, align, decode_scale, make_upright, stored_box
from fcmae.data.index import Images
from fcmae.data.rasters import Raster
from fcmae.data.source import BadImage

H, W = 24, 36  # not square


def whole(height: int, width: int) -> Box:
    return 0, 0, height, width


def read_box(path: Path, in_chans: int, choose_box: ChooseBox, size: tuple[int, int] | None) -> NDArray:
    """As datasets read files; from memory it must be the same."""
    with Images.of_files([str(path)]).open(0) as file:
        found = read_crop(file, in_chans, choose_box, size).values
    np.testing.assert_array_equal(read_crop(path.read_bytes(), in_chans, choose_box, size).values, found)
    return found


def read(path: Path, in_chans: int) -> NDArray:
    return read_box(path, in_chans, whole, None)


def noise(*shape: int, dtype: type = np.uint8) -> NDArray:
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating):
        return rng.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def photo(height: int = 512, width: int = 640) -> Image.Image:
    """Smooth with some edges, as photographs are."""
    y, x = np.mgrid[:height, :width] / 100.0
    image = np.stack([np.sin(3 * x + y), np.cos(2 * y - x), np.sin(x * y)], axis=2) + (np.sin(4 * x) > 0)[..., None]
    return Image.fromarray(np.uint8(np.clip(image * 60 + 90, 0, 255)))


@cache
def natural(height: int, width: int) -> Image.Image:
    """Noise with the spectrum of photographs: amplitudes fall as 1 / f."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(1 / width)
    noise = np.random.default_rng(0).normal(size=(3, height, width))
    waves = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
    waves /= waves.std()
    return Image.fromarray(np.uint8(np.clip(120 + 40 * waves[0] + 15 * waves, 0, 255)).transpose(1, 2, 0).copy())


def psnr(a: NDArray, b: NDArray) -> float:
    """Decibels, of values up to 255."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes JPEGs."""
    if request.param == "Pillow":
        monkeypatch.setattr(readers, "decode_jpeg", None)
    elif readers.decode_jpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


def grey(rgb: NDArray) -> NDArray:
    """(H, W, 3) to (1, H, W) float, ITU-R 601."""
    return (rgb @ np.array([0.299, 0.587, 0.114]))[None]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_8_bit_rgb_is_read_exactly_and_as_grey(tmp_path: Path, suffix: str) -> None:
    image = noise(H, W, 3)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(image).save(path, **({"lossless": True} if suffix == "webp" else {}))
    out = read(path, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, image.transpose(2, 0, 1))
    np.testing.assert_allclose(read(path, 1), grey(image), atol=1)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_8_bit_grey_is_read_exactly_and_copied_into_three_channels(tmp_path: Path, suffix: str) -> None:
    image = noise(H, W)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(image).save(path)
    np.testing.assert_array_equal(read(path, 1), image[None])
    np.testing.assert_array_equal(read(path, 3), np.stack([image] * 3))


@pytest.mark.usefixtures("decoder")
def test_jpeg_in_rgb_grey_and_cmyk(tmp_path: Path) -> None:
    image = photo(64, 96)
    image.save(tmp_path / "rgb.jpg", quality=95)
    image.convert("L").save(tmp_path / "grey.jpg", quality=95)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    full = np.asarray(Image.open(tmp_path / "rgb.jpg"))
    np.testing.assert_array_equal(read(tmp_path / "rgb.jpg", 3), full.transpose(2, 0, 1))
    # libjpeg hands out the luma that is stored, before it was rounded to RGB and back.
    np.testing.assert_allclose(read(tmp_path / "rgb.jpg", 1), grey(full), atol=2)
    luma = np.asarray(Image.open(tmp_path / "grey.jpg"))
    np.testing.assert_array_equal(read(tmp_path / "grey.jpg", 3), np.stack([luma] * 3))
    # Inks without black: RGB = 255 - CMY.
    error = read(tmp_path / "cmyk.jpg", 3).astype(int) - np.asarray(image).transpose(2, 0, 1)
    assert np.abs(error).mean() < 4  # what the compression costs


def test_alpha_is_dropped_and_kept_colours_are_those_stored(tmp_path: Path) -> None:
    image = noise(H, W, 4)
    Image.fromarray(image, "RGBA").save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read(tmp_path / "rgba.png", 3), image.transpose(2, 0, 1)[:3])
    np.testing.assert_allclose(read(tmp_path / "rgba.png", 1), grey(image[..., :3]), atol=1)
    np.testing.assert_array_equal(read(tmp_path / "rgba.png", 4), image.transpose(2, 0, 1))
    Image.fromarray(image[..., :2]).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read(tmp_path / "la.png", 1), image[None, ..., 0])
    np.testing.assert_array_equal(read(tmp_path / "la.png", 3), np.stack([image[..., 0]] * 3))


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, 255])])
def test_palette_gives_its_colours_whatever_its_transparency(tmp_path: Path, transparency: int | bytes | None) -> None:
    positions, palette = noise(H, W) % 16, noise(16, 3)
    image = Image.fromarray(positions, "L").convert("P")
    image.putpalette(palette.tobytes())
    image.putdata(positions.ravel().tolist())
    image.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    colours = palette[positions]
    np.testing.assert_array_equal(read(tmp_path / "p.png", 3), colours.transpose(2, 0, 1))
    np.testing.assert_allclose(read(tmp_path / "p.png", 1), grey(colours), atol=1)


def test_one_bit_becomes_0_and_255(tmp_path: Path) -> None:
    image = noise(H, W) > 127
    Image.fromarray(image).save(tmp_path / "bit.png")
    np.save(tmp_path / "bit.npy", image)
    for name in ("bit.png", "bit.npy"):
        np.testing.assert_array_equal(read(tmp_path / name, 1), np.uint8(image)[None] * 255)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "compressed.tif", "a.npy"])
def test_16_bit_grey_keeps_its_depth_with_full_range_1(tmp_path: Path, name: str) -> None:
    image = noise(H, W, dtype=np.uint16)
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, image)
    elif name == "a.png":
        Image.fromarray(image).save(path)
    else:
        options = {"big_endian.tif": {"byteorder": ">"}, "compressed.tif": {"compression": "zlib"}}
        tifffile.imwrite(path, image, **options.get(name, {}))
    out = read(path, 1)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, image[None] / 65535, atol=1e-7)
    np.testing.assert_allclose(read(path, 3), np.stack([image / 65535] * 3), atol=1e-7)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_16_bit_rgb_tiff_keeps_its_depth(tmp_path: Path, planar: str) -> None:
    image = noise(3, H, W, dtype=np.uint16)
    stored = image if planar == "separate" else image.transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar)
    np.testing.assert_allclose(read(tmp_path / "a.tif", 3), image / 65535, atol=1e-7)
    np.testing.assert_allclose(read(tmp_path / "a.tif", 1), grey(image.transpose(1, 2, 0) / 65535), atol=1e-6)


def test_16_bit_rgba_tiff_drops_alpha(tmp_path: Path) -> None:
    image = noise(H, W, 4, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_allclose(read(tmp_path / "a.tif", 3), image.transpose(2, 0, 1)[:3] / 65535, atol=1e-7)
    np.testing.assert_allclose(read(tmp_path / "a.tif", 4), image.transpose(2, 0, 1) / 65535, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs_that_store_0_for_white_are_inverted(tmp_path: Path, dtype: type) -> None:
    image = noise(H, W, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="miniswhite")
    out = read(tmp_path / "a.tif", 1)
    expected = np.iinfo(dtype).max - image
    np.testing.assert_allclose(out[0], expected if dtype == np.uint8 else expected / 65535, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_floats_and_other_integers_are_taken_as_they_are(tmp_path: Path, dtype: type, suffix: str) -> None:
    image = noise(H, W, dtype=dtype)
    path = tmp_path / f"a.{suffix}"
    np.save(path, image) if suffix == "npy" else tifffile.imwrite(path, image)
    out = read(path, 1)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[0], image.astype(np.float32))


@pytest.mark.parametrize("bands", [2, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_multi_band_tiff(tmp_path: Path, bands: int, dtype: type, layout: str) -> None:
    image = noise(bands, H, W, dtype=dtype)
    if layout == "pages":
        tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    else:
        stored = image if layout == "separate" else image.transpose(1, 2, 0)
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=layout)
    out = read(tmp_path / "a.tif", bands)
    assert out.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    np.testing.assert_allclose(out, image / 65535 if dtype == np.uint16 else image, atol=1e-7)


def test_npy_layouts(tmp_path: Path) -> None:
    image = noise(5, H, W)
    for layout, array in {"chw": image, "hwc": image.transpose(1, 2, 0)}.items():
        np.save(tmp_path / f"{layout}.npy", array)
        np.testing.assert_array_equal(read(tmp_path / f"{layout}.npy", 5), image)
    np.save(tmp_path / "both.npy", noise(3, H, 3))  # both ends fit
    with pytest.raises(BadImage, match=r"whose first or last side may be its channels: save it as a TIFF"):
        read(tmp_path / "both.npy", 3)
    np.save(tmp_path / "grey.npy", image[:1])
    np.testing.assert_array_equal(read(tmp_path / "grey.npy", 3), np.repeat(image[:1], 3, axis=0))


def test_the_contents_decide_not_the_suffix(tmp_path: Path) -> None:
    image = noise(H, W, 3)
    Image.fromarray(image).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg", 3), image.transpose(2, 0, 1))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied_to_pixels_and_to_the_box(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    image = photo(64, 96)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored)).transpose(2, 0, 1)
    sizes = []

    def choose_box(height: int, width: int) -> Box:
        sizes.append((height, width))
        return 5, 7, 40, 30

    np.testing.assert_array_equal(read_box(path, 3, choose_box, None), upright[:, 5:45, 7:37])
    assert set(sizes) == {upright.shape[1:]}


def test_a_photograph_turned_right_is_rotated_back(tmp_path: Path) -> None:
    image = noise(H, W)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1)[0], np.rot90(image, -1))
    tifffile.imwrite(
        tmp_path / "a.tif",
        noise(H, W, 5),
        photometric="minisblack",
        planarconfig="contig",
        extratags=[(274, 3, 1, 6, True)],
    )
    np.testing.assert_array_equal(read(tmp_path / "a.tif", 5).transpose(1, 2, 0), np.rot90(noise(H, W, 5), -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_whose_exif_is_broken_is_read_as_it_lies(tmp_path: Path, suffix: str) -> None:
    image = noise(H, W, 3)
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {"dpi": (72, 72)}
    Image.fromarray(image).save(path, exif=b"Exif\0\0" + b"no header of a TIFF", **options)
    found = read(path, 3)
    assert found.shape == (3, H, W)
    if suffix != "jpg":
        np.testing.assert_array_equal(found.transpose(1, 2, 0), image)


@pytest.mark.parametrize("value", [(6, 6), float("inf")])
def test_an_orientation_that_is_none_is_upright(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.new("RGB", (8, 8)) as image:
        image.format = "JPEG"
        monkeypatch.setattr(image, "getexif", lambda: {ExifTags.Base.Orientation: value})
        assert readers.orientation_of(image) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_box_holds_the_pixels_of_the_upright_box(orientation: int) -> None:
    image = noise(H, W)
    top, left, height, width = stored_box((3, 4, 10, 15), orientation, H, W)
    stored = make_upright(image[top : top + height, left : left + width], orientation)
    np.testing.assert_array_equal(stored, make_upright(image, orientation)[3:13, 4:19])


# On 20 photographs at quality 90, crops of 64 pixels from scales 1/2 and 1/4 agreed with crops of a full decode to at
# least 31.9 dB, 40 dB in the median, and their lines at the border of the image no less. Noise of that spectrum, scaled
# no further than it must be, gives 32.1 and 29.2 dB; crops shifted by half a pixel at the border give less.
@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("mode", ["4:2:0", "4:4:4", "grey"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_jpeg_decode_agrees_with_full_decode_to_31_db(
    tmp_path: Path, mode: str, orientation: int, scale: int
) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # Neither 8 nor 16 divides the sides: the last row and column of the scaled image stand for fewer stored ones.
    stored = natural(509, 643).convert("L" if mode == "grey" else "RGB")
    stored.save(path, quality=90, subsampling=0 if mode == "4:4:4" else 2, exif=exif)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    size = (440 // scale, 451 // scale)
    rows, columns = size[0] * scale + 3, size[1] * scale + 7
    # Inside, off the grid of the scaled pixels; and up to each of the four borders.
    for top, left in ((13, 21), (upright.height - rows, upright.width - columns), (0, 0)):
        out = read_box(path, 1 if mode == "grey" else 3, lambda *_, box=(top, left, rows, columns): box, size)
        part = upright.crop((left, top, left + columns, top + rows))
        reference = np.asarray(part.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, -1).transpose(2, 0, 1)
        assert psnr(out, reference) > 31
        for line in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
            assert psnr(out[line], reference[line]) > 28


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("box", [(5, 7, 301, 299), (0, 0, 40, 33), (309, 480, 200, 163), (5, 9, 1, 1)])
def test_an_unscaled_crop_is_what_pillow_makes_of_the_pixels_inside(
    tmp_path: Path, suffix: str, in_chans: int, box: Box
) -> None:
    path = tmp_path / f"a.{suffix}"
    natural(509, 643).convert("L" if in_chans == 1 else "RGB").save(path)
    out = read_box(path, in_chans, lambda height, width: box, (160, 168))
    top, left, height, width = box
    with Image.open(path) as image:
        crop = image.crop((left, top, left + width, top + height)).resize((168, 160), Image.Resampling.BICUBIC)
    reference = np.asarray(crop).reshape(160, 168, -1).transpose(2, 0, 1)
    # Both compute with weights of 16 bits or so and round twice, after the rows and after the columns.
    assert np.abs(out.astype(int) - reference).max() <= 2 and np.mean(out != reference) < 0.02


def outcome(path: Path, in_chans: int, box: Box | None, size: tuple[int, int]) -> bytes | str:
    try:
        return read_box(path, in_chans, lambda height, width: box or (0, 0, height, width), size).tobytes()
    except BadImage as error:
        return str(error)


def both(path: Path, in_chans: int, box: Box | None, size: tuple[int, int]) -> tuple[bytes | str, bytes | str]:
    """What simplejpeg and Pillow make of a file."""
    with pytest.MonkeyPatch.context() as patch:
        first = outcome(path, in_chans, box, size)
        patch.setattr(readers, "decode_jpeg", None)
        return first, outcome(path, in_chans, box, size)


@pytest.mark.skipif(readers.decode_jpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("shape", [(64, 96), (67, 101), (1, 1), (9, 300), (129, 17)])
@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"keep_rgb": True}, {"mode": "L"}],
    ids=str,
)
def test_both_decoders_give_the_same_pixels(tmp_path: Path, shape: tuple[int, int], options: dict) -> None:
    path, options = tmp_path / "a.jpg", dict(options)
    photo(*shape).convert(options.pop("mode", "RGB")).save(path, quality=85, **options)
    for in_chans in (1, 3):
        for size in ((8, 8), (16, 9), shape):
            first, second = both(path, in_chans, None, size)
            assert isinstance(first, bytes) and first == second


@pytest.mark.skipif(readers.decode_jpeg is None, reason="simplejpeg is not installed")
def test_both_decoders_judge_damaged_files_alike_and_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, rng, kinds = tmp_path / "a.jpg", np.random.default_rng(0), []
    photo(67, 101).save(path, quality=85)
    whole_file = path.read_bytes()
    damaged = [whole_file[:n] for n in (3, 200, 700, len(whole_file) - 40, len(whole_file) - 2)]
    damaged += [whole_file + b"more" * 99, whole_file[:-2] + b"junk\xff\xd9", b"\xff\xd8\xff" + whole_file]
    for _ in range(150):
        flipped = bytearray(whole_file)
        for position in rng.integers(len(flipped), size=2):
            flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        first, second = both(path, 3, None, (16, 16))
        assert first == second
        kinds.append(type(first))
    assert kinds.count(bytes) > 20 and kinds.count(str) > 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("decoder")
def test_a_jpeg_that_holds_more_pictures_gives_its_first(tmp_path: Path) -> None:
    """Cameras write previews behind the picture, and call it JPEG."""
    first = photo(64, 96)
    first.save(tmp_path / "one.jpg", quality=90)
    first.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[natural(32, 48)], quality=90)
    np.testing.assert_array_equal(read(tmp_path / "two.jpg", 3), read(tmp_path / "one.jpg", 3))


@pytest.mark.usefixtures("decoder")
def test_jpegs_are_decoded_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    photo(512, 640).save(path)
    sizes = []
    resize = readers._resize

    def spy(plane: Image.Image | NDArray, *args: object) -> NDArray:
        sizes.append(plane.size if isinstance(plane, Image.Image) else plane.shape[1::-1])
        return resize(plane, *args)

    monkeypatch.setattr(readers, "_resize", spy)
    for box, expected in {(0, 0, 512, 640): (80, 64), (0, 0, 300, 300): (160, 128), (0, 0, 90, 90): (640, 512)}.items():
        read_box(path, 3, lambda height, width, box=box: box, (64, 64))
        assert sizes.pop() == expected


@given(st.data(), st.integers(16, 300), st.integers(16, 300), st.sampled_from([1, 2, 4, 8]))
def test_an_aligned_box_has_whole_pixels_and_has_hardly_moved(
    data: st.DataObject, height: int, width: int, scale: int
) -> None:
    box_height, box_width = data.draw(st.integers(16, height)), data.draw(st.integers(16, width))
    box = data.draw(st.integers(0, height - box_height)), data.draw(st.integers(0, width - box_width))
    top, left, rows, columns = align((*box, box_height, box_width), scale, height, width)
    assert not any(side % scale for side in (top, left, rows, columns))
    assert min(top, left) >= 0 and min(rows, columns) > 0 and top + rows <= height and left + columns <= width
    assert abs(top - box[0]) <= scale / 2 and abs(left - box[1]) <= scale / 2
    for end, old, limit in ((top + rows, box[0] + box_height, height), (left + columns, box[1] + box_width, width)):
        assert abs(end - old) <= scale / 2 or end == limit // scale * scale


def test_decode_scale_never_falls_below_the_size() -> None:
    assert [decode_scale(h, 999, (64, 64)) for h in (63, 127, 128, 255, 256, 511, 512, 5000)] == [
        1,
        1,
        2,
        2,
        4,
        4,
        8,
        8,
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_are_cropped_and_resized_as_pillow_does(tmp_path: Path, dtype: type) -> None:
    image = noise(H, W, dtype=dtype)
    np.save(tmp_path / "a.npy", image)
    out = read_box(tmp_path / "a.npy", 1, lambda height, width: (2, 3, 20, 30), (10, 12))
    crop = image[2:22, 3:33]
    crop = crop if dtype == np.uint8 else crop.astype(np.float32)
    expected = np.asarray(Image.fromarray(crop).resize((12, 10), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(out[0], expected / 65535 if dtype == np.uint16 else expected, atol=1e-6)


def test_16_bit_values_stay_in_range_when_enlarged(tmp_path: Path) -> None:
    image = np.zeros((H, W), dtype=np.uint16)
    image[::2] = 65535
    np.save(tmp_path / "a.npy", image)
    Image.fromarray(image).save(tmp_path / "a.png")
    for name in ("a.npy", "a.png"):
        out = read_box(tmp_path / name, 1, whole, (3 * H, 3 * W))
        assert out.min() == 0 and out.max() == 1


def test_channels_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(noise(H, W, 3)).save(tmp_path / "rgb.png")
    np.save(tmp_path / "five.npy", noise(H, W, 5))
    tifffile.imwrite(tmp_path / "five.tif", noise(H, W, 5), photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImage, match="has 3 channels, in_chans is 5"):
        read(tmp_path / "rgb.png", 5)
    with pytest.raises(BadImage, match="has 3 channels, in_chans is 4"):
        read(tmp_path / "rgb.png", 4)
    for name in ("five.npy", "five.tif"):
        with pytest.raises(BadImage, match="has 5 channels, in_chans is 3"):
            read(tmp_path / name, 3)


def test_arrays_that_are_no_images_are_refused(tmp_path: Path) -> None:
    arrays = {
        "complex": np.zeros((H, W), complex),
        "flat": np.zeros(5),
        "deep": np.zeros((2, 2, 2, 2)),
        "empty": np.zeros((0, 4)),
        "objects": np.array([[{}]], dtype=object),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(BadImage):
            read(tmp_path / f"{name}.npy", 1)


def test_files_that_are_missing_or_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="No such file"):
        read(tmp_path / "missing.png", 3)
    with pytest.raises(BadImage, match="directory"):
        read(tmp_path, 3)
    for content in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(BadImage, match="no JPEG, PNG"):
            read(tmp_path / "a.jpg", 3)


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(H, W, 3)
    names = ("a.png", "a.jpg", "a.tif", "a.npy", "deep.tif", "bands.tif")
    for name in names[:3]:
        Image.fromarray(image).save(tmp_path / name)
    np.save(tmp_path / "a.npy", image)
    tifffile.imwrite(tmp_path / "deep.tif", image.astype(np.uint16), photometric="rgb")
    tifffile.imwrite(tmp_path / "bands.tif", image.astype(np.float32), photometric="minisblack", planarconfig="contig")
    for name in names:
        content = (tmp_path / name).read_bytes()
        with pytest.raises(BadImage, match=r"24 x 36 pixels, more than max_pixels = 863 allows .*: cut .* or raise"):
            read_crop(content, 3, lambda height, width: pytest.fail("was opened"), None, max_pixels=H * W - 1)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 3)  # Pillow's own, from which it raises
        assert read_crop(content, 3, whole, None, max_pixels=H * W).values.shape == (3, H, W)
        assert H * W // 3 == Image.MAX_IMAGE_PIXELS


def _samples() -> dict[str, bytes]:
    rgb, out = Image.fromarray(noise(H, W, 3)), {}
    for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        rgb.save(buffer, format=form, **({} if form == "BMP" else {"exif": exif}))
        out[form] = buffer.getvalue()
    for name, options in {"LZW": {"compression": "tiff_lzw"}, "DEFLATE": {"compression": "tiff_deflate"}}.items():
        buffer = io.BytesIO()
        rgb.save(buffer, format="TIFF", **options)
        out[name] = buffer.getvalue()
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(H, W, 3, dtype=np.uint16), photometric="rgb", compression="zlib")
    out["TIFF16"] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, noise(H, W, 3))
    out["NPY"] = buffer.getvalue()
    return out


SAMPLES = _samples()


@pytest.mark.parametrize("form", SAMPLES)
def test_truncated_and_damaged_files_raise_bad_image_and_nothing_else(tmp_path: Path, form: str) -> None:
    data, rng = SAMPLES[form], np.random.default_rng(0)
    path = tmp_path / "a"
    path.write_bytes(data)
    assert read(path, 3).shape[0] == 3
    damaged = [data[: len(data) // 2], data[: len(data) * 9 // 10], data[:20]]
    for _ in range(60):
        flipped = bytearray(data)
        for position in rng.integers(min(len(data), 400), size=3):  # headers are in front, or at the end
            flipped[position if rng.random() < 0.6 else -position - 1] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            image = read_box(path, 3, whole, (8, 8))
        except BadImage as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert image.shape == (3, 8, 8)
    assert refused >= 2  # both halves and the header at least, but for formats that are read to the end only


def test_a_tiff_whose_codec_is_missing_says_which_package_helps(tmp_path: Path) -> None:
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("imagecodecs is installed")
    # An uncompressed file whose Compression tag (259) claims LZW (5); in 16-bit RGB, which Pillow would cut to 8 bits.
    tifffile.imwrite(tmp_path / "a.tif", noise(H, W, 3, dtype=np.uint16), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tiff.pages[0].tags[259].overwrite(5)
    with pytest.raises(BadImage, match="imagecodecs"):
        read(tmp_path / "a.tif", 3)


# Missing values


def contig(bands: int) -> dict[str, object]:
    return {"planarconfig": "contig"} if bands > 1 else {}


def gdal(path: Path, image: NDArray, nodata: str, **options: object) -> bytes:
    """(H, W, C) as a TIFF whose tag GDAL_NODATA says which value stands for missing ones."""
    tifffile.imwrite(path, image, photometric="minisblack", extratags=[(42113, "s", 0, nodata, True)], **options)
    return path.read_bytes()


@pytest.mark.parametrize("nodata", ["-9999", "nan", "inf", "-3.4028234663852886e+38"])
@pytest.mark.parametrize("bands", [1, 4])
def test_missing_floats_are_filled_and_do_not_spread_into_others(tmp_path: Path, nodata: str, bands: int) -> None:
    image = np.full((H, W, bands), 0.25, np.float32)
    image[:, : W // 2, 0] = float(nodata)
    content = gdal(tmp_path / "a.tif", image if bands > 1 else image[..., 0], nodata, **contig(bands))
    fill = [0.25, 0.5, 0.5, 0.5][:bands]
    for size in ((H, W), (H // 2, W // 2), (2 * H, 2 * W)):
        np.testing.assert_allclose(read_crop(content, bands, whole, size, fill=fill).values, 0.25, atol=1e-6)
    missing = np.isnan(read_crop(content, bands, whole, None).values)
    np.testing.assert_array_equal(missing.transpose(1, 2, 0), ~np.isfinite(image) | (image == np.float32(nodata)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_missing_integers_are_filled_and_8_bits_stay_8_bits(tmp_path: Path, dtype: type) -> None:
    image = noise(H, W, 3, dtype=dtype) | 1
    image[:5] = 0
    image[7, 7, 0] = 0
    content = gdal(tmp_path / "a.tif", image, "0", planarconfig="contig")
    out = read_crop(content, 3, whole, None, fill=[0.2, 0.4, 0.6]).values
    scale = {np.uint8: 255, np.uint16: 1, np.int16: 1}[dtype]
    assert out.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    np.testing.assert_allclose(
        out[:, :5], np.reshape([0.2, 0.4, 0.6], (3, 1, 1)) * np.full((3, 5, W), scale), rtol=1e-6
    )
    right = image.transpose(2, 0, 1)[:, 5:] / (65535 if dtype == np.uint16 else 1)
    if dtype == np.int16:  # below 0 it can hardly be a value of one band alone
        right[0, 2, 7] = 0.2
    np.testing.assert_allclose(out[:, 5:], right, rtol=1e-6)


def test_grey_with_missing_values_becomes_rgb_filled_channel_by_channel(tmp_path: Path) -> None:
    image = np.full((H, W), 100, np.uint8)
    image[3:] = 7
    content = gdal(tmp_path / "a.tif", image, "7")
    out = read_crop(content, 3, whole, None, fill=[51 / 255, 102 / 255, 1]).values
    assert out.dtype == np.uint8 and out[:, 0, 0].tolist() == [100] * 3 and out[:, 5, 0].tolist() == [51, 102, 255]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [(H, W), (H // 2, W // 3), (2 * H, 2 * W)])
def test_what_is_known_is_what_no_filling_reaches(tmp_path: Path, in_chans: int, size: tuple[int, int]) -> None:
    """Whatever missing values are filled with: where two fillings agree, nothing missing went into it."""
    image = noise(H, W, 3).astype(np.float32)
    image[:5, :9, 0] = image[H - 4 :, :, 2] = -9999
    content = gdal(tmp_path / "a.tif", image, "-9999", planarconfig="contig")
    found = [read_crop(content, in_chans, whole, size, fill=[fill]) for fill in (0.0, 1000.0)]
    known = found[0].known
    assert known is not None and known.shape == (in_chans, *size) and known.any() and not known.all()
    assert np.array_equal(known, found[1].known)
    agree = found[0].values == found[1].values
    np.testing.assert_array_equal(agree, known)
    if in_chans == 3:
        assert known[1].all()  # a channel of which nothing is missing
    right = read_crop(content, in_chans, lambda *_: (8, 12, 4, 4), None, fill=[0.0])
    assert right.known is None


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "white.tif", "tiles.tif", "deep.tif", "deep.png", "a.npy"])
def test_a_given_value_is_missing_whatever_the_file_says(tmp_path: Path, name: str) -> None:
    image = (noise(H, W, 3) | 1).astype(np.uint16 if "deep" in name else np.uint8)
    image[:5] = 0
    image[7, 7, 0] = 0  # of one band alone it is a value
    if name in ("white.tif", "deep.png"):
        image = image[..., 1]
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, image)
    elif name.endswith(".tif"):
        settings = {"tile": (16, 16)} if name == "tiles.tif" else {}
        photometric = "rgb" if image.ndim == 3 else "miniswhite"
        tifffile.imwrite(path, image, photometric=photometric, **settings)
    else:
        Image.fromarray(image).save(path)
    in_chans = 3 if image.ndim == 3 else 1
    plain = read_crop(path.read_bytes(), in_chans, whole, None, fill=[0.4])
    assert plain.known is None
    content = path.read_bytes()
    for max_pixels in (10**6, 800) if name == "tiles.tif" else (10**6,):
        boxes = [(0, 0, H, W)] if max_pixels > 800 else [(0, 0, 12, 24), (12, 3, 10, 24)]
        for box in boxes:
            found = read_crop(content, in_chans, lambda *_: box, None, fill=[0.4], nodata=0, max_pixels=max_pixels)  # noqa: B023
            top, left, height, width = box
            part = plain.values[:, top : top + height, left : left + width]
            missing = np.zeros(part.shape, np.bool_)
            missing[:, : max(0, 5 - top)] = True
            assert found.values.dtype == plain.values.dtype
            expected = np.where(missing, 102 if part.dtype == np.uint8 else 0.4, part)
            np.testing.assert_allclose(found.values, expected, rtol=1e-6)
            assert (found.known is None) == (not missing.any())
            if found.known is not None:
                np.testing.assert_array_equal(found.known, ~missing)


def few_bits(path: Path, numbers: NDArray, bits: int, white: bool) -> None:
    """(H, W) as grey of 1, 2 or 4 bits."""
    if path.suffix == ".png":
        image = Image.fromarray(numbers).convert("L")
        image.putpalette(bytes(768))
        image.save(path, bits=bits)
        content = bytearray(path.read_bytes())
        content[25] = 0  # grey in place of a palette
        path.write_bytes(chaos.images._mended_png(bytes(content)))
        return
    tifffile.imwrite(path, np.packbits(np.unpackbits(numbers[..., None], axis=2)[..., -bits:].reshape(H, -1), axis=1))
    with tifffile.TiffFile(path, mode="r+b") as file:
        tags = file.pages.first.tags
        tags["BitsPerSample"].overwrite(bits)
        tags["ImageWidth"].overwrite(W)
        tags["PhotometricInterpretation"].overwrite(0 if white else 1)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "white.tif"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_missing_value_of_few_bits_is_the_number_that_is_stored(
    tmp_path: Path, bits: int, name: str, in_chans: int
) -> None:
    numbers = noise(H, W) % 2**bits
    few_bits(tmp_path / name, numbers, bits, "white" in name)
    content = (tmp_path / name).read_bytes()
    plain = read_crop(content, in_chans, whole, None, fill=[0.4])
    assert plain.known is None and plain.values.dtype == np.uint8
    white = 255 - numbers * (255 // (2**bits - 1)) if "white" in name else numbers * (255 // (2**bits - 1))
    np.testing.assert_array_equal(plain.values[0], white)
    for nodata in {0, 1, 2**bits - 1}:
        found = read_crop(content, in_chans, whole, None, fill=[0.4], nodata=nodata)
        assert found.known is not None and found.values.dtype == np.uint8
        np.testing.assert_array_equal(found.known, np.broadcast_to(numbers != nodata, plain.values.shape))
        np.testing.assert_array_equal(found.values, np.where(numbers == nodata, 102, plain.values))
    assert read_crop(content, in_chans, whole, None, fill=[0.4], nodata=2**bits).known is None


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
@pytest.mark.parametrize("mode", ["1", "P", "LA", "PA", "CMYK", "RGBA"])
def test_a_missing_value_is_what_is_stored_in_every_mode(tmp_path: Path, mode: str, suffix: str) -> None:
    """Of a palette the number of a colour, of one bit 0 or 1, of colours with alpha these alone, of inks all."""
    if (suffix, mode) in {("png", "PA"), ("png", "CMYK"), *(("bmp", mode) for mode in ("LA", "PA", "CMYK", "RGBA"))}:
        return  # there is no such file
    stored = noise(H, W, len(Image.new(mode, (1, 1)).getbands())) % (2 if mode == "1" else 3)
    stored[noise(H, W) > 200] = 1
    bits = Image.fromarray(stored[..., 0] > 0)
    image = bits if mode == "1" else Image.frombytes(mode, (W, H), stored.tobytes())
    if mode[0] == "P":
        image.putpalette(b"\1\2\3" * 2 + noise(254, 3).tobytes())  # two numbers have one colour
    paths = [tmp_path / f"plain.{suffix}", tmp_path / "told.tif"]
    image.save(paths[0])
    image.save(paths[1], tiffinfo={42113: "1"})
    num_alpha = int(mode in ("LA", "PA", "RGBA"))
    for in_chans in {1, 3, stored.shape[2] - (mode == "P")} - {0}:
        compared = stored[..., : stored.shape[2] - num_alpha if in_chans in (1, 3) else None]
        is_known = ~(compared == 1).all(axis=2)
        plain = read_crop(paths[0].read_bytes(), in_chans, whole, None, fill=[0.4])
        assert plain.known is None and 0 < is_known.mean() < 1
        for path, nodata in zip(paths, (1, None), strict=True):
            found = read_crop(path.read_bytes(), in_chans, whole, None, fill=[0.4], nodata=nodata)
            assert found.known is not None and found.values.dtype == np.uint8
            np.testing.assert_array_equal(found.known, np.broadcast_to(is_known, found.known.shape))
            # numpy and Pillow round grey otherwise
            np.testing.assert_allclose(found.values, np.where(is_known, plain.values, 102), atol=int(in_chans == 1))


def test_lightness_and_two_colours_are_shown_as_they_are_where_a_value_may_be_missing(tmp_path: Path) -> None:
    Image.frombytes("LAB", (W, H), (noise(H, W, 3) | 1).tobytes()).save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    found = read_crop(content, 3, whole, None, nodata=0).values
    np.testing.assert_array_equal(found, read_crop(content, 3, whole, None).values)
    for nodata in (None, 0):
        with pytest.raises(BadImage, match="LAB to RGB not supported"):
            read_crop(content, 1, whole, None, nodata=nodata)


def test_a_missing_bit_of_an_array_is_0_or_1(tmp_path: Path) -> None:
    bits = noise(H, W) > 127
    np.save(tmp_path / "a.npy", bits)
    found = read_crop((tmp_path / "a.npy").read_bytes(), 1, whole, None, fill=[0.4], nodata=0)
    assert found.known is not None
    np.testing.assert_array_equal(found.known[0], bits)
    np.testing.assert_array_equal(found.values[0], np.where(bits, 255, 102))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colours_are_as_stored_where_alpha_has_multiplied_them(
    tmp_path: Path, planar: str, compression: str | None
) -> None:
    image = noise(H, W, 4)
    stored = image if planar == "contig" else image.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="rgb",
        extrasamples=["assocalpha"],
        planarconfig=planar,
        compression=compression,
    )
    content = (tmp_path / "a.tif").read_bytes()
    np.testing.assert_array_equal(read_crop(content, 3, whole, None).values, image.transpose(2, 0, 1)[:3])
    np.testing.assert_array_equal(read_crop(content, 4, whole, None).values, image.transpose(2, 0, 1))
    np.testing.assert_array_equal(
        Raster(io.BytesIO(content), 3, [0.0]).read((0, 0, H, W)).values, image.transpose(2, 0, 1)[:3]
    )


def test_a_jpeg_stores_no_value_exactly_and_misses_none(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "a.jpg")
    found = read_crop((tmp_path / "a.jpg").read_bytes(), 3, whole, None, fill=[0.4], nodata=0)
    assert found.known is None and not found.values.any()


@pytest.mark.parametrize("nodata", ["", "none", "300", "-1", "0.5"])
def test_a_nodata_that_no_value_can_be_changes_nothing(tmp_path: Path, nodata: str) -> None:
    image = noise(H, W)
    np.testing.assert_array_equal(read_crop(gdal(tmp_path / "a.tif", image, nodata), 1, whole, None).values[0], image)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_missing_and_an_image_of_nothing_else_is_refused(
    tmp_path: Path, value: float
) -> None:
    image = np.ones((H, W), np.float32)
    image[:5] = value
    np.save(tmp_path / "a.npy", image)
    out = read_crop((tmp_path / "a.npy").read_bytes(), 1, whole, None, fill=(3.0,)).values[0]
    np.testing.assert_array_equal(out, np.where(np.isfinite(image), image, 3))
    corner = read_crop((tmp_path / "a.npy").read_bytes(), 1, lambda *_: (0, 0, 4, 4), None, fill=(3.0,)).values
    assert (corner == 3).all()  # a crop may hold none
    np.save(tmp_path / "a.npy", np.full((H, W), value, np.float32))
    with pytest.raises(BadImage, match="all are missing"):
        read_crop((tmp_path / "a.npy").read_bytes(), 1, whole, None, fill=(3.0,))


# Depth


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_png_keeps_its_depth(channels: int, orientation: int) -> None:
    image = noise(H, W, channels, dtype=np.uint16)
    content = chaos.images.png(image, exif=orientation)
    upright = make_upright(image, orientation).transpose(2, 0, 1) / 65535
    colours = upright[: 3 if channels > 2 else 1]
    np.testing.assert_allclose(
        read_crop(content, 3, whole, None).values, np.broadcast_to(colours, (3, *upright.shape[1:])), atol=1e-7
    )
    if channels in (2, 4):
        np.testing.assert_allclose(read_crop(content, channels, whole, None).values, upright, atol=1e-7)
    with pytest.raises(BadImage, match="in_chans is 5"):
        read_crop(content, 5, whole, None)


# Files made to do harm


def refusal(content: bytes, in_chans: int, **options: int) -> str:
    with pytest.raises(BadImage) as caught:
        read_crop(content, in_chans, whole, (16, 16), fill=(0.0,), **options)
    return str(caught.value)


def test_small_files_that_would_take_much_are_refused_by_their_headers() -> None:
    bombs = chaos.images.bombs()
    read_crop(bombs.pop("strips.tif"), 1, whole, None)  # its strip is cut to the image
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content in bombs.items():
        text = refusal(content, 4 if name == "header.npy" else 3 if name.endswith("webp") else 1)
        assert len(text) < 200 and "\n" not in text
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, name


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "f2", "f4", "f8"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_kind_of_npy_gives_its_own_values(tmp_path: Path, dtype: str, byteorder: str, order: str) -> None:
    image = (np.random.default_rng(0).random((H, W, 4)) * 100).astype(byteorder + dtype, order=order)
    np.save(tmp_path / "a.npy", image)
    out = read(tmp_path / "a.npy", 4).transpose(1, 2, 0)
    assert out.dtype == ("u1" if dtype == "u1" else "f4")
    np.testing.assert_allclose(out, image.astype("f4") / (65535 if dtype == "u2" else 1), rtol=1e-6)


def test_deep_pixels_count_for_more_of_max_pixels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((10, 10, 6), np.float64))  # 48 bytes
    content = (tmp_path / "a.npy").read_bytes()
    assert read_crop(content, 6, whole, None, max_pixels=400).values.shape == (6, 10, 10)
    assert "10 x 10 pixels of 48 bytes, more than max_pixels = 399" in refusal(content, 6, max_pixels=399)


def test_reasons_are_one_line_that_a_terminal_can_show() -> None:
    text = str(BadImage("a\nb\t\x1b[31m" + "x" * 1000))
    assert text.startswith("a b \\x1b[31mxxx") and text.endswith("x...") and len(text) < 310


def test_libraries_log_nothing_and_are_as_they_were(caplog: pytest.LogCaptureFixture, capfd) -> None:
    for name, content in chaos.images.whole().items():
        if name.endswith("tif"):
            with suppress(BadImage):
                read_crop(content[:40] + b"\xff" * 20 + content[60:], 3, whole, None)
    assert not caplog.records and capfd.readouterr().out == ""
    assert not logging.getLogger("tifffile").disabled


def test_damaged_images_of_every_format_are_read_or_refused() -> None:
    for (_, content), in_chans in zip(islice(chaos.images.mutated(0), 500), cycle((1, 3, 4)), strict=False):
        try:
            assert read_crop(content, in_chans, whole, (8, 8), fill=(0.0,)).values.shape == (in_chans, 8, 8)
        except BadImage as error:
            assert "\n" not in str(error) and len(str(error)) < 310


def test_a_jpeg_of_fill_bytes_is_looked_through_once(tmp_path: Path) -> None:
    """Each of them may begin a marker: to look for its end at each start takes hours."""
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + b"\xff" * 10**6 + b"\x00" + b"\xff\xda" * 101)
    with pytest.raises(BadImage):
        read(tmp_path / "a.jpg", 3)
