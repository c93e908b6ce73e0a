from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fcmae.data.augment import CenterCrop, CropAndFlip, FinetuneAugment, Reading
from fcmae.data.dataset import (
    Batch,
    FinetuneDataset,
    NoUsableImage,
    PretrainDataset,
    Sample,
    centre_crops,
    check_values,
    collate,
)
from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.data.sampler import EVAL_EPOCH
from fcmae.masking import random_mask

SIZE, GRID, VISIBLE = (16, 24), (2, 3), 2


@pytest.fixture
def index(tmp_path: Path) -> Images:
    """Six images; 1 and 4 are broken."""
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
        if i in (1, 4):
            path.write_bytes(path.read_bytes()[:200])
    return find_images([str(tmp_path / "images")])


def pretrain(
    index: Images, *, seed: int = 0, augment: bool = True, in_chans: int = 3, masks_per_image: int = 1
) -> PretrainDataset:
    return PretrainDataset(
        index,
        CropAndFlip(Reading(in_chans, SIZE), (0.2, 1.0), 0.5)
        if augment
        else CenterCrop(Reading(in_chans, SIZE, 0.875)),
        grid=GRID,
        visible=VISIBLE,
        seed=seed,
        masks_per_image=masks_per_image,
    )


def finetune(index: Images, *, train: bool) -> FinetuneDataset:
    reading = Reading(3, SIZE, 0.875, (0.5,) * 3, (0.2,) * 3)
    crop = CropAndFlip(reading, (0.08, 1.0), 0.5)
    augment = FinetuneAugment(crop, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    return FinetuneDataset(index, augment if train else CenterCrop(reading), seed=0)


def same(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks)


def test_a_sample_depends_on_seed_epoch_and_index_alone(index: Images) -> None:
    dataset = pretrain(index)
    sample = dataset[3, 2]
    dataset[0, 5]  # what was read before does not matter
    torch.manual_seed(7)
    assert same(dataset[3, 2], sample)
    assert same(pickle.loads(pickle.dumps(dataset))[3, 2], sample)
    assert not same(dataset[4, 2], sample)
    assert not same(dataset[3, 3], sample)
    assert not same(pretrain(index, seed=1)[3, 2], sample)
    assert sample.image.shape == (3, *SIZE) and sample.image.dtype == np.uint8
    assert sample.index == 2 and sample.valid and sample.bad == [] and sample.label is None


def test_masks_are_those_of_random_mask(index: Images) -> None:
    for key in ((0, 0), (3, 2), (EVAL_EPOCH, 5)):
        np.testing.assert_array_equal(pretrain(index)[key].masks, random_mask(GRID, VISIBLE, [(0, *key)]))


def test_an_image_under_several_masks_is_the_same_and_its_first_mask_too(index: Images) -> None:
    once, often = pretrain(index), pretrain(index, masks_per_image=5)
    seen = set()
    for key in ((0, 0), (0, 2), (1, 0), (1, 2)):
        sample = often[key]
        np.testing.assert_array_equal(sample.image, once[key].image)
        np.testing.assert_array_equal(sample.masks[:1], once[key].masks)
        np.testing.assert_array_equal(sample.masks, pretrain(index, masks_per_image=9)[key].masks[:5])
        assert sample.masks.shape == (5, *GRID) and (sample.masks.sum(axis=(1, 2)) == 6 - VISIBLE).all()
        seen |= {mask.tobytes() for mask in sample.masks}
    assert len(seen) >= 10  # of the 15 there are, by 20 independent draws


def test_masks_of_a_batch_follow_their_images(index: Images) -> None:
    samples = [pretrain(index, masks_per_image=3)[0, i] for i in (0, 2)]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, *SIZE) and batch.masks is not None
    np.testing.assert_array_equal(batch.masks, np.concatenate([sample.masks for sample in samples]))


def test_broken_training_files_are_replaced_deterministically_and_reported(index: Images) -> None:
    dataset, replacements = pretrain(index), set()
    for epoch in range(20):
        sample = dataset[epoch, 1]
        assert sample.valid and sample.index == 1
        assert sample.bad[0][0] == index.name(1) and "cannot be read" in sample.bad[0][1]
        assert {path for path, _ in sample.bad} <= {index.name(1), index.name(4)}
        again = dataset[epoch, 1]
        assert same(again, sample) and again.bad == sample.bad
        replacements.add(sample.image.tobytes())
    assert len(replacements) > 10


def test_a_replaced_image_brings_its_own_label(index: Images) -> None:
    labelled = Images.of_files(index.names(), (0, 5, 0, 0, 5, 0), "abcdef")  # only the broken ones have label 5
    assert finetune(labelled, train=True)[0, 1].label == 0
    assert finetune(labelled, train=False)[EVAL_EPOCH, 1].label == 5


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_broken_evaluation_files_are_marked_not_replaced(index: Images, kind: str) -> None:
    dataset = pretrain(index, augment=False) if kind == "pretrain" else finetune(index, train=False)
    sample = dataset[EVAL_EPOCH, 4]
    assert not sample.valid and not sample.image.any() and sample.image.shape == (3, *SIZE)
    assert [path for path, _ in sample.bad] == [index.name(4)]
    assert dataset[EVAL_EPOCH, 0].valid


def test_evaluation_does_not_crop_at_random(index: Images) -> None:
    for dataset in (pretrain(index, augment=False), finetune(index, train=False)):
        np.testing.assert_array_equal(dataset[0, 2].image, dataset[1, 2].image)


def test_training_gives_up_when_no_file_can_be_used(index: Images) -> None:
    with pytest.raises(
        NoUsableImage, match=r"^data\.path: 16 files drawn .* the first is .*0\.png: it has 3 channels, in"
    ):
        pretrain(index, in_chans=5)[0, 0]


def test_reading_writes_nothing_beside_the_images(index: Images) -> None:
    folder = Path(index.name(0)).parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for i in range(len(index)):
        pretrain(index)[0, i]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_paths_that_are_no_unicode_are_read(index: Images, tmp_path: Path) -> None:
    odd = str(tmp_path / "\udcff ü.png")
    try:
        Path(odd).write_bytes(Path(index.name(0)).read_bytes())
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    assert pretrain(Images.of_files([odd]))[0, 0].bad == []


def image_sample(image: np.ndarray, **values: object) -> Sample:
    return Sample(**{"image": image, "masks": None, "label": None, "index": 0, "valid": True, "bad": [], **values})


def test_collate_keeps_uint8_and_joins_depths() -> None:
    eight, deep = np.full((1, 2, 2), 51, np.uint8), np.full((1, 2, 2), 0.5, np.float32)
    assert collate([image_sample(eight)] * 2).images.dtype == torch.uint8
    joined = collate([image_sample(eight), image_sample(deep)]).images
    assert joined.dtype == torch.float32
    torch.testing.assert_close(joined[:, 0, 0, 0], torch.tensor([0.2, 0.5]))


def test_collate_makes_a_batch_of_tensors(index: Images) -> None:
    batch = collate([pretrain(index)[0, i] for i in range(3)])
    assert batch.images.shape == (3, 3, *SIZE)
    assert batch.masks is not None and batch.masks.shape == (3, *GRID) and batch.masks.dtype == torch.bool
    assert batch.labels is None and batch.index.tolist() == [0, 1, 2] and batch.valid.tolist() == [True] * 3
    assert index.name(1) in [path for path, _ in batch.bad]
    labels = collate([image_sample(np.zeros((1, 2, 2), np.uint8), label=i, valid=i > 0) for i in range(2)])
    assert labels.labels is not None and labels.labels.dtype == torch.int64 and labels.labels.tolist() == [0, 1]
    assert labels.masks is None and labels.valid.tolist() == [False, True]
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.images.is_meta and moved.bad == batch.bad


@pytest.mark.parametrize(("mean", "std", "far"), [(0.45, 0.23, True), (-830, 350, False), (-400, 50, True)])
def test_images_far_from_their_mean_are_warned_of_with_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mean: float, std: float, far: bool
) -> None:
    for i in range(3):
        tifffile.imwrite(tmp_path / f"{i}.tif", np.full((20, 20), -850 + 10 * i, np.int16))
    (tmp_path / "0.tif").write_bytes(b"broken")
    reading, found = Reading(1, (16, 16), 1.0, (mean,), (std,), nodata=7), find_images([str(tmp_path)])
    check_values(reading, found, trains=True)
    remedy = "fcmae stats IMAGES --in_chans 1 --nodata 7`"
    assert ("values from -840 to -830" in caplog.text and remedy in caplog.text) == far
    caplog.clear()
    check_values(reading, found)  # for weights that are there
    assert ("in the units that the model was trained on" in caplog.text) == far


@pytest.mark.parametrize(("num", "warned"), [(3, False), (4, True)])
def test_twelve_bits_in_sixteen_are_warned_of_under_the_usual_mean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num: int, warned: bool
) -> None:
    rng = np.random.default_rng(0)
    for i in range(num):
        Image.fromarray(rng.integers(0, 4096, (20, 20), dtype=np.uint16)).save(tmp_path / f"{i}.png")
    check_values(Reading(1, (16, 16), 1.0, (0.449,), (0.226,)), find_images([str(tmp_path)]))
    assert ("too narrow for the mean 0.449 and std 0.226" in caplog.text) == warned


def test_photographs_are_not_warned_of(index: Images, caplog: pytest.LogCaptureFixture) -> None:
    check_values(Reading(3, SIZE, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), index)
    check_values(Reading(3, SIZE, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), index.subset([1]))
    assert not caplog.records


def test_pages_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "z.tif", values, photometric="minisblack")
    images = find_images([str(tmp_path)])
    check_values(Reading(1, (16, 16), 1.0, (0.5,), (0.3,)), images, trains=True)
    assert "z.tif has 5 pages, and the first is read: in_chans = 5 reads them as channels" in caplog.text
    caplog.clear()
    five = Reading(5, (32, 32), 1.0, (0.5,) * 5, (0.3,) * 5)
    check_values(five, images)
    assert not caplog.records
    np.testing.assert_array_equal(centre_crops(five, images)[(0, 0)].image, values)
    tifffile.imwrite(tmp_path / "z.tif", values[:3], photometric="minisblack")
    check_values(Reading(3, (16, 16), 1.0, (0.5,) * 3, (0.3,) * 3), images)
    assert caplog.text.endswith("z.tif has 3 pages, and the first is read\n")
    caplog.clear()
    times = np.stack([values, values])  # (T, Z, Y, X), which are not read as channels
    tifffile.imwrite(tmp_path / "z.tif", times, imagej=True, metadata={"axes": "TZYX"})
    check_values(Reading(1, (16, 16), 1.0, (0.5,), (0.3,)), images)
    assert caplog.text.endswith("z.tif has 10 pages, and the first is read\n")
    caplog.clear()
    tifffile.imwrite(tmp_path / "z.tif", values[0], photometric="minisblack")
    check_values(Reading(1, (16, 16), 1.0, (0.5,), (0.3,)), images)
    assert not caplog.records


def test_the_network_sees_zero_where_values_are_missing(tmp_path: Path) -> None:
    image = np.full((32, 32, 4), 0.3, np.float32)
    image[:, :8] = -9999
    tags = [(42113, "s", 0, "-9999", True)]
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", extratags=tags)
    reading = Reading(4, (16, 16), 1.0, (0.1, 0.2, 0.3, 0.4), (0.1,) * 4)
    seen = reading.normalize(torch.from_numpy(centre_crops(reading, find_images([str(tmp_path)]))[(0, 0)].image))
    torch.testing.assert_close(seen[:, :, :2], torch.zeros(4, 16, 2), atol=1e-6, rtol=0)


def test_samples_say_what_is_known_of_them_turned_as_they_are(tmp_path: Path) -> None:
    """A missing value is 0.9 here and all others are small, so that the image itself tells where it is."""
    image = np.full((32, 48, 2), 0.25, np.float32)
    image[:, :16], image[:9, 16:] = np.nan, 0.3
    np.save(tmp_path / "a.npy", image)
    np.save(tmp_path / "b.npy", np.nan_to_num(image))
    images = find_images([str(tmp_path)])
    reading = Reading(2, SIZE, fill=(0.9,))
    crop = CropAndFlip(reading, (0.5, 1.0), 0.5, 0.5)
    for view in (crop, CenterCrop(reading)):
        dataset = PretrainDataset(images, view, grid=GRID, visible=VISIBLE, seed=0)
        samples = [dataset[(epoch, 0)] for epoch in range(8)]
        for sample in samples:
            assert sample.known is not None
            np.testing.assert_array_equal(sample.known[0], sample.known[1])
            assert sample.known.any() and not sample.known[sample.image > 0.35].any()
        assert len({sample.known.tobytes() for sample in samples if sample.known is not None}) > 1 or view is not crop
        whole, mixed = dataset[(0, 1)], collate([samples[0], dataset[(0, 1)]])
        assert whole.known is None and collate([whole, whole]).known is None
        assert mixed.known is not None and mixed.known.dtype == torch.bool
        assert np.array_equal(mixed.known[0], samples[0].known) and mixed.known[1].all()
        for share in (False, True):
            sent = mixed.packed(share).unpacked()
            assert sent.known is not None and torch.equal(sent.known, mixed.known)
        assert torch.equal(mixed.select(torch.tensor([False, True])).known, mixed.known[1:])
