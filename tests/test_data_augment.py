from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.functional import center_crop, resize

from fcmae.data.augment import (
    CenterCrop,
    CropAndFlip,
    DeepImageError,
    FinetuneAugment,
    Reading,
    center_box,
    jittered,
    random_resized_box,
    seeded,
)

POLICY = "rand-m9-mstd0.5-inc1"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(path: Path, *shape: int, dtype: type = np.uint8) -> bytes:
    image = rng().integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    if path.suffix == ".npy":
        np.save(path, image)
    else:
        Image.fromarray(image).save(path)
    return path.read_bytes()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_random_boxes_lie_inside_the_image(height: int, width: int, seed: int) -> None:
    top, left, h, w = random_resized_box(height, width, (0.2, 1.0), rng=rng(seed))
    assert min(top, left) >= 0 and min(h, w) >= 1 and top + h <= height and left + w <= width


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    generator = rng()
    ours = np.array([random_resized_box(300, 400, (0.2, 1.0), rng=generator) for _ in range(4000)], dtype=float)
    image = torch.empty(1, 300, 400)
    crop = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    theirs = np.array(
        [[p["top"], p["left"], p["height"], p["width"]] for p in (crop.make_params([image]) for _ in range(4000))],
        dtype=float,
    )
    # Standard errors of the means are about 1 pixel, of the deviations .7; five of them.
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=7)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), atol=5)


def test_a_strip_that_no_box_fits_is_seen_from_end_to_end() -> None:
    drawn = [random_resized_box(10, 1000, (0.2, 1.0), rng=rng(seed)) for seed in range(200)]
    assert {(top, h, w) for top, _, h, w in drawn} == {(0, 10, 13)}
    lefts = sorted(left for _, left, *_ in drawn)
    assert 0 <= lefts[0] < 50 and 937 < lefts[-1] <= 987
    assert {box[1:] for box in (random_resized_box(1000, 10, (1, 1), rng=rng(i)) for i in range(9))} == {(0, 13, 10)}


@pytest.mark.parametrize("size", [(32, 32), (32, 128), (128, 32)])
def test_random_crops_have_the_form_of_the_images_size(size: tuple[int, int]) -> None:
    crop = CropAndFlip(Reading(3, size), (0.2, 0.4), 0.5)
    boxes = [crop.box(640, 640, rng(seed)) for seed in range(100)]
    forms = np.array([w / h for _, _, h, w in boxes]) / (size[1] / size[0])
    assert 0.7 < forms.min() < 0.85 and 1.2 < forms.max() < 1.42


@pytest.mark.parametrize(("height", "width"), [(4000, 16000), (500, 8000), (4000, 4000)])
def test_the_centre_of_a_large_scene_is_as_large_as_may_be_read(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, reading = list[tuple[int, ...]](), Reading(3, (32, 32), max_pixels=10**6)
    monkeypatch.setattr(Reading, "crop", lambda own, file, choose_box: boxes.append(choose_box(height, width)))
    CenterCrop(reading)(b"", rng())
    most = min(height * width * reading.readable_share(height, width), min(height, width) ** 2)
    assert boxes[0][2] * boxes[0][3] == pytest.approx(most, rel=0.01)


def test_center_box_agrees_with_resize_and_centre_crop() -> None:
    image = torch.stack(torch.meshgrid(torch.arange(300.0), torch.arange(400.0), indexing="ij"))  # its coordinates
    rows, columns = center_crop(resize(image, 128), [112, 112])
    top, left, height, width = center_box(300, 400, (112, 112), 112 / 128)
    assert abs((top + height / 2) - 150) <= 1 and abs((left + width / 2) - 200) <= 1
    assert abs(float(rows[-1, 0] - rows[0, 0]) * 112 / 111 - height) < 3
    assert abs(float(columns[0, -1] - columns[0, 0]) * 112 / 111 - width) < 3


@given(st.integers(1, 500), st.integers(1, 500), st.integers(8, 64), st.integers(8, 64), st.floats(0.1, 1))
def test_center_box_is_inside_central_and_of_the_right_aspect(
    height: int, width: int, out_h: int, out_w: int, crop_pct: float
) -> None:
    top, left, h, w = center_box(height, width, (out_h, out_w), crop_pct)
    assert min(top, left) >= 0 and 1 <= h <= height and 1 <= w <= width
    assert abs(height - h - 2 * top) <= 1 and abs(width - w - 2 * left) <= 1
    if min(h, w) > 1:
        assert abs(h * out_w - w * out_h) <= max(out_w, out_h)  # less than a pixel off


def test_seeded_decides_all_generators_and_restores_them() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    def state() -> tuple[object, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    with seeded([1, 2]):
        first = draw()
    with seeded([1, 2]):
        again = draw()
    with seeded([1, 3]):
        other = draw()
    with pytest.raises(RuntimeError, match="inside"), seeded([1]):
        draw()
        raise RuntimeError("inside")
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    assert state() == before


def test_flips_have_their_probabilities(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 12, 16)
    image = np.asarray(Image.open(tmp_path / "a.png"))[None]
    seen = set()
    for seed in range(40):
        out = CropAndFlip(Reading(1, (12, 16)), (1.0, 1.0), hflip=1.0, vflip=0.0)(file, rng(seed)).values
        if out.tobytes() == image[..., ::-1].tobytes():
            seen.add("whole")  # the box drawn was the whole image
    assert seen == {"whole"}
    view = CropAndFlip(Reading(1, (12, 16)), (0.2, 1.0), hflip=0.5, vflip=0.5)
    plain = CropAndFlip(Reading(1, (12, 16)), (0.2, 1.0), hflip=0.0)
    kinds = []
    for seed in range(200):
        out, base = view(file, rng(seed)).values, plain(file, rng(seed)).values
        turned = [base, base[:, :, ::-1], base[:, ::-1], base[:, ::-1, ::-1]]
        kinds.append(next(i for i, item in enumerate(turned) if np.array_equal(item, out)))
    assert np.bincount(kinds, minlength=4).min() > 30  # of 50 expected


def test_a_crop_of_a_large_jpeg_is_the_box_that_was_drawn_to_half_a_pixel(tmp_path: Path) -> None:
    ramp = np.stack([np.indices((255, 253)).sum(0) % 256, *np.indices((255, 253))], axis=2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    for seed in range(20):
        crop = CropAndFlip(Reading(3, (32, 32)), (0.3, 1.0), hflip=0.0)
        out = crop((tmp_path / "a.jpg").read_bytes(), rng(seed)).values.astype(float)
        top, left, height, width = random_resized_box(255, 253, (0.3, 1.0), rng=rng(seed))
        # Rows and columns are written in the second and third channel: in the middle of the crop, those of the box.
        # One of scale 4 moves by 2 pixels at most, or 3 at the border.
        assert abs(out[1, 15:17].mean() - (top + (height - 1) / 2)) < 2.6
        assert abs(out[2, :, 15:17].mean() - (left + (width - 1) / 2)) < 2.6


def test_centre_crop_draws_nothing_and_reads_the_centre(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 20, 30, 3)
    generator = rng()
    out = CenterCrop(Reading(3, (10, 10), 0.5))(file, generator).values
    np.testing.assert_array_equal(out, np.asarray(Image.open(tmp_path / "a.png")).transpose(2, 0, 1)[:, 5:15, 10:20])
    assert generator.random() == rng().random()


def finetune(in_chans: int, policy: str | None = POLICY, erasing: float = 0.5) -> FinetuneAugment:
    reading = Reading(in_chans, (24, 20), mean=(0.4,) * in_chans, std=(0.2,) * in_chans)
    crop = CropAndFlip(reading, (0.08, 1.0), hflip=0.5, vflip=0.1)
    return FinetuneAugment(crop, auto_augment=policy, random_erasing=erasing)


@pytest.mark.parametrize(
    ("name", "shape", "in_chans", "policy", "dtype"),
    [
        ("a.png", (40, 50, 3), 3, POLICY, np.uint8),
        ("a.png", (40, 50), 1, POLICY, np.uint8),
        ("a.npy", (40, 50, 5), 5, None, np.uint8),
        ("a.npy", (40, 50), 1, None, np.uint16),
        ("a.npy", (40, 50, 5), 5, None, np.uint16),
        ("a.png", (40, 50, 3), 3, "augmix-m3-w3", np.uint8),
        ("a.png", (40, 50, 3), 3, "original", np.uint8),
    ],
)
def test_finetune_augment_depends_on_the_generator_alone(
    tmp_path: Path, name: str, shape: tuple[int, ...], in_chans: int, policy: str | None, dtype: type
) -> None:
    file = write(tmp_path / name, *shape, dtype=dtype)
    outs: list[NDArray] = []
    for seed in range(6):
        torch.manual_seed(seed)
        random.seed(seed)
        first = finetune(in_chans, policy)(file, rng(seed)).values
        random.seed(99)
        np.testing.assert_array_equal(finetune(in_chans, policy)(file, rng(seed)).values, first)
        outs.append(first)
        assert first.shape == (in_chans, 24, 20) and first.flags.c_contiguous
        assert first.dtype == (np.float32 if dtype == np.uint16 else np.uint8)
    assert len({out.tobytes() for out in outs}) == 6


def test_erasing_writes_normal_noise_in_normalised_units_and_leaves_the_rest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 24, 20, 3)
    values = []
    for seed in range(40):
        plain = finetune(3, None, 0.0)(file, rng(seed)).values
        erased = finetune(3, None, 1.0)(file, rng(seed)).values
        rows, columns = np.nonzero((plain != erased).any(axis=0))
        box = erased[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box[0].size <= 24 * 20 / 2
        values.append(box.ravel())
    pixels = np.concatenate(values) / 255
    assert abs(pixels.mean() - 0.4) < 0.01
    assert abs(pixels.std() - 0.2) < 0.01  # a little less: clipped at 0


def test_an_unknown_policy_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"data\.auto_augment: 'nonsense' is no policy of timm"):
        finetune(3, "nonsense")


@pytest.mark.parametrize("policy", ["rand-m10-n15-p1-inc1", "rand-m0-n15-p1", "v0", "augmix-m10-w3"])
def test_policies_at_full_strength_keep_at_least_one_bit(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterize = ImageOps.posterize

    def strict(image: Image.Image, bits: int) -> Image.Image:
        assert bits >= 1  # Pillow 13 refuses less
        return posterize(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", strict)
    file = write(tmp_path / "a.png", 24, 20, 3)
    augment = finetune(3, policy, 0.0)
    for seed in range(60):
        assert augment(file, rng(seed)).values.shape == (3, 24, 20)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_policies_that_work_on_8_bits_refuse_deeper_images(tmp_path: Path, dtype: str) -> None:
    """Computed tomography, from -1000 to 150, came out blank in training and right in evaluation."""
    tifffile.imwrite(tmp_path / "x.tif", np.linspace(0, 150, 40 * 40).reshape(40, 40).astype(dtype))
    crop = CropAndFlip(Reading(1, (32, 32), mean=(0.4,), std=(0.2,)), (0.5, 1), 0.5)
    augment = FinetuneAugment(crop, auto_augment="rand-m9", random_erasing=0)
    with pytest.raises(DeepImageError, match=r"^data\.auto_augment: .* set it to none$"):
        augment((tmp_path / "x.tif").read_bytes(), np.random.default_rng(0))
    plain = FinetuneAugment(crop, auto_augment=None, random_erasing=0)
    assert len(np.unique(plain((tmp_path / "x.tif").read_bytes(), np.random.default_rng(0)).values)) > 500


@pytest.mark.parametrize("in_chans", [1, 3])
def test_jitter_is_torchvisions_with_the_same_factors(in_chans: int) -> None:
    image = np.random.default_rng(0).random((in_chans, 8, 9), dtype=np.float32) * 0.2 + 0.4  # nothing is cut off
    brightness, contrast, saturation = np.random.default_rng(1).uniform(0.8, 1.2, 3)
    expected = v2.functional.adjust_brightness(torch.from_numpy(image), brightness)
    if in_chans == 3:
        expected = v2.functional.adjust_saturation(expected, saturation)
    expected = v2.functional.adjust_contrast(expected, contrast)
    found = jittered(image, 0.2, np.random.default_rng(1))
    # torchvision's weights of the colours have four digits
    np.testing.assert_allclose(found, expected, atol=1e-4)
    eight = jittered(np.rint(image * 255).astype(np.uint8), 0.2, np.random.default_rng(1))
    assert eight.dtype == np.uint8
    np.testing.assert_allclose(eight / 255, expected, atol=2 / 255)


def test_jitter_is_cut_off_at_white_and_black_of_eight_bits_alone() -> None:
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 3)
    seen = [jittered(image, 1.0, np.random.default_rng(seed)) for seed in range(20)]
    assert min(each.min() for each in seen) == 0 and max(each.max() for each in seen) == 255
    deep = [jittered(image / np.float32(255), 1.0, np.random.default_rng(seed)) for seed in range(20)]
    assert max(each.max() for each in deep) > 1


def test_contrast_of_bands_is_by_band_whatever_their_units() -> None:
    image = np.random.default_rng(0).normal(size=(5, 8, 9)).astype(np.float32) + 3
    units = np.float32([1, 1e-3, 1e4, 1, 50]).reshape(5, 1, 1)
    for seed in range(5):
        found = jittered(image, 0.5, np.random.default_rng(seed))
        scaled = jittered(image * units, 0.5, np.random.default_rng(seed))
        np.testing.assert_allclose(scaled, found * units, rtol=1e-4, atol=1e-6)
        brightness, contrast, _ = np.random.default_rng(seed).uniform(0.5, 1.5, 3)
        np.testing.assert_allclose(found.mean(axis=(1, 2)), image.mean(axis=(1, 2)) * brightness, rtol=1e-5)
        np.testing.assert_allclose(found.std(axis=(1, 2)), image.std(axis=(1, 2)) * brightness * contrast, rtol=1e-4)
