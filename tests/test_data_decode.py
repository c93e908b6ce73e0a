"""Every format against an independent computation; hostile files against BadImage."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from fcmae.data.decode import BadImage, read_crop
from fcmae.data.geometry import Box, decode_scale, make_upright, stored_box

H, W = 24, 36  # not square


def whole(height: int, width: int) -> Box:
    return 0, 0, height, width


def read(path: Path, in_chans: int) -> NDArray:
    return read_crop(str(path), in_chans, whole, None)


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
    ambiguous = noise(3, H, 3)  # both ends fit: the last axis is the channels
    np.save(tmp_path / "both.npy", ambiguous)
    np.testing.assert_array_equal(read(tmp_path / "both.npy", 3), ambiguous.transpose(2, 0, 1))
    np.save(tmp_path / "grey.npy", image[:1])
    np.testing.assert_array_equal(read(tmp_path / "grey.npy", 3), np.repeat(image[:1], 3, axis=0))


def test_the_contents_decide_not_the_suffix(tmp_path: Path) -> None:
    image = noise(H, W, 3)
    Image.fromarray(image).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg", 3), image.transpose(2, 0, 1))


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

    np.testing.assert_array_equal(read_crop(str(path), 3, choose_box, None), upright[:, 5:45, 7:37])
    assert sizes == [upright.shape[1:]]


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_box_holds_the_pixels_of_the_upright_box(orientation: int) -> None:
    image = noise(H, W)
    top, left, height, width = stored_box((3, 4, 10, 15), orientation, H, W)
    stored = make_upright(image[top : top + height, left : left + width], orientation)
    np.testing.assert_array_equal(stored, make_upright(image, orientation)[3:13, 4:19])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("box", [(0, 0, 500, 500), (10, 20, 470, 450), (101, 53, 250, 333), (3, 5, 64, 70)])
def test_scaled_jpeg_decode_agrees_with_full_decode_to_35_db(tmp_path: Path, orientation: int, box: Box) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo(509, 643).save(path, quality=95, exif=exif)  # sides that 8 does not divide
    out = read_crop(str(path), 3, lambda height, width: box, (60, 64)).astype(float)
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
    top, left, height, width = box
    reference = upright.resize((64, 60), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    mse = np.mean((out - np.asarray(reference, dtype=float).transpose(2, 0, 1)) ** 2)
    assert 10 * np.log10(255**2 / max(mse, 1e-9)) > 35


def test_jpegs_are_decoded_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    photo(512, 640).save(path)
    sizes = []
    resize = Image.Image.resize

    def spy(self: Image.Image, *args: object) -> Image.Image:
        sizes.append(self.size)
        return resize(self, *args)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for box, expected in {(0, 0, 512, 640): (80, 64), (0, 0, 300, 300): (160, 128), (0, 0, 90, 90): (640, 512)}.items():
        read_crop(str(path), 3, lambda height, width, box=box: box, (64, 64))
        assert sizes.pop() == expected


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
    out = read_crop(str(tmp_path / "a.npy"), 1, lambda height, width: (2, 3, 20, 30), (10, 12))
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
        out = read_crop(str(tmp_path / name), 1, whole, (3 * H, 3 * W))
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    image = noise(H, W, dtype=np.float32)
    image[4, 5] = value
    np.save(tmp_path / "a.npy", image)
    with pytest.raises(BadImage, match="not finite"):
        read(tmp_path / "a.npy", 1)


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
    for limit in (H * W - 1, H * W // 3):  # Pillow warns of the first and raises for the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for name in names:
            with pytest.raises(BadImage, match="pixels"):
                read_crop(str(tmp_path / name), 3, lambda height, width: pytest.fail("was opened"), None)


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
            image = read_crop(str(path), 3, whole, (8, 8))
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
