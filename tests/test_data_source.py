"""Where bytes come from is a source's business alone: files, memory, or whatever else has names and bytes."""

from __future__ import annotations

import ast
import io
import mmap
import pickle
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import fcmae.data
from fcmae.data import readers
from fcmae.data.augment import CenterCrop, CropAndFlip, FinetuneAugment, Reading
from fcmae.data.dataset import FinetuneDataset, PretrainDataset, Sample
from fcmae.data.decode import read_crop
from fcmae.data.find import find_images
from fcmae.data.geometry import Box
from fcmae.data.index import Images
from fcmae.data.loader import build_loader
from fcmae.data.sampler import EVAL_EPOCH, StepSampler
from fcmae.data.source import BadImage, Files, Source
from fcmae.data.split import split
from fcmae.data.stats import channel_statistics
from fcmae.evaluation.features import batches_of

SIZE = (16, 24)


def whole(height: int, width: int) -> Box:
    return 0, 0, height, width


class Memory(Source):
    """Images in memory, by name."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self._names, self._contents = list(contents), contents

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return self._names[i]

    def read(self, i: int) -> bytes:
        return self._contents[self._names[i]]


class Flaky(Memory):
    """A place that fails for some images, as a network does."""

    def __init__(self, contents: dict[str, bytes], failing: set[int]) -> None:
        super().__init__(contents)
        self._failing = failing

    def read(self, i: int) -> bytes:
        if i in self._failing:
            raise ConnectionError(104, "Connection reset by peer")
        return super().read(i)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, and broken ones."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp", "bmp", "tif"):
        Image.fromarray(pixels).save(root / f"a.{suffix}")
    tifffile.imwrite(root / "deep.tif", pixels.astype(np.uint16) * 257, photometric="rgb")
    np.save(root / "rows.npy", pixels)
    np.save(root / "columns.npy", np.asfortranarray(pixels.astype(np.float32) / 255))
    for name in ("a.jpg", "rows.npy", "deep.tif", "a.png"):
        (root / f"broken-{name}").write_bytes((root / name).read_bytes()[:400])
    (root / "text.png").write_bytes(b"no image")
    return root


def in_memory(folder: Path) -> Images:
    return Images(Memory({str(path): path.read_bytes() for path in sorted(folder.iterdir())}))


def pretraining(images: Images, *, augment: bool = True) -> PretrainDataset:
    return PretrainDataset(
        images,
        CropAndFlip(Reading(3, SIZE), (0.2, 1.0), 0.5) if augment else CenterCrop(Reading(3, SIZE, 0.875)),
        grid=(2, 3),
        visible=2,
        seed=0,
    )


def finetuning(images: Images, *, train: bool = True) -> FinetuneDataset:
    reading = Reading(3, SIZE, 0.875, (0.5,) * 3, (0.2,) * 3)
    augment = FinetuneAugment(CropAndFlip(reading, (0.2, 1.0), 0.5), auto_augment=None, random_erasing=0.25)
    return FinetuneDataset(images, augment if train else CenterCrop(reading), seed=0)


def datasets(images: Images) -> list[PretrainDataset | FinetuneDataset]:
    """Of every kind that there is."""
    labelled = Images(images.source, images.positions, np.arange(len(images)) % 2, ("x", "y"))
    both = [True, False]
    return [*(pretraining(images, augment=a) for a in both), *(finetuning(labelled, train=a) for a in both)]


def assert_same(a: Sample, b: Sample) -> None:
    np.testing.assert_array_equal(a.image, b.image)
    assert (a.label, a.index, a.valid, a.bad) == (b.label, b.index, b.valid, b.bad)
    assert (a.masks is None) == (b.masks is None)
    if a.masks is not None:
        np.testing.assert_array_equal(a.masks, b.masks)


# Files


def test_files_have_the_names_and_bytes_of_their_paths(folder: Path) -> None:
    paths = sorted(map(str, folder.iterdir()))
    source = Files(paths)
    assert [source.name(i) for i in range(len(source))] == paths
    assert [source.read(i) for i in range(len(source))] == [Path(path).read_bytes() for path in paths]
    with source.open(0) as file:
        assert file.seekable() and file.fileno() > 0
    again = pickle.loads(pickle.dumps(source))
    assert [again.name(i) for i in range(len(again))] == paths
    assert len(Files([])) == 0


def test_names_of_any_length_and_of_any_bytes_are_kept() -> None:
    paths = ["/a", "", "/\udcff ü/" + 300 * "x" + ".png", "/日本.jpg"]
    source = Files(paths)
    assert [source.name(i) for i in range(4)] == paths


@pytest.mark.parametrize("i", [2, -1])
def test_an_image_that_is_none_of_the_files_has_no_name(i: int) -> None:
    with pytest.raises(IndexError, match=f"name {i} of 2"):
        Files(["/a", "/b"]).name(i)


# Reading


def test_what_cannot_be_opened_is_a_bad_image_whatever_holds_it(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing.png", "No such file"), (tmp_path, "directory"), ("a\0b", "null byte")):
        with pytest.raises(BadImage, match=f"it cannot be read: .*{reason}"):
            Images.of_files([str(path)]).open(0)
    flaky = Images(Flaky({"bucket/a.png": b""}, {0}))
    with pytest.raises(BadImage, match=r"^it cannot be read: Connection reset by peer$"):
        flaky.open(0)


@pytest.mark.parametrize("by_column", [False, True])
def test_arrays_on_disk_are_mapped_not_read(tmp_path: Path, by_column: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", np.asfortranarray(array) if by_column else array)
    mapped, read = [], []

    class Map(mmap.mmap):
        def __new__(cls, *args: object, **kwargs: object) -> Map:
            mapped.append(args)
            return super().__new__(cls, *args, **kwargs)

    class Counted(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            read.append(len(buffer))
            return super().readinto(buffer)

        def readall(self) -> bytes:
            raise AssertionError("the whole file was read")

    monkeypatch.setattr(readers.mmap, "mmap", Map)
    with io.BufferedReader(Counted(tmp_path / "a.npy")) as file:
        found = read_crop(file, 3, lambda height, width: (10, 20, 30, 40), None).values
    np.testing.assert_array_equal(found, array[10:40, 20:60].transpose(2, 0, 1))
    assert len(mapped) == 1 and sum(read) < array.nbytes / 4  # the header, through a buffer
    with BytesIO((tmp_path / "a.npy").read_bytes()) as memory:
        np.testing.assert_array_equal(read_crop(memory, 3, lambda height, width: (10, 20, 30, 40), None).values, found)
    assert len(mapped) == 1


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (4, 0)])
def test_every_version_of_the_array_format_is_read_and_others_are_refused(version: tuple[int, int]) -> None:
    array, file = np.arange(48, dtype=np.uint8).reshape(6, 8), BytesIO()
    np.lib.format.write_array(file, array, min(version, (3, 0)))
    content = bytearray(file.getvalue())
    content[6] = version[0]
    if version == (4, 0):
        with pytest.raises(BadImage, match=r"of version 4\.0 of the \.npy format"):
            read_crop(bytes(content), 1, whole, None)
    else:
        np.testing.assert_array_equal(read_crop(bytes(content), 1, whole, None).values[0], array)


# From any source


def test_samples_from_memory_are_those_from_files(folder: Path) -> None:
    files, memory = find_images([str(folder)]), in_memory(folder)
    assert files.names() == memory.names() and files.fingerprint() == memory.fingerprint()
    num_bad = 0
    for of_files, of_memory in zip(datasets(files), datasets(memory), strict=True):
        for epoch in (0, 1, EVAL_EPOCH):
            for i in range(len(files)):
                sample = of_memory[epoch, i]
                assert_same(sample, of_files[epoch, i])
                num_bad += len(sample.bad)
    assert num_bad > 20


def test_parts_of_a_source_are_split_measured_and_evaluated_without_files(folder: Path) -> None:
    files, memory = find_images([str(folder)]), in_memory(folder)
    assert [part.names() for part in split(memory, 0.4, 1)] == [part.names() for part in split(files, 0.4, 1)]
    assert channel_statistics(memory, 3, num_workers=1) == channel_statistics(files, 3)
    reading = Reading(3, SIZE, 0.9, (0.5,) * 3, (0.2,) * 3)
    train, _ = split(memory, 0.4, 1)
    found = [
        list(batches_of(reading, images, device=torch.device("cpu"), batch_size=4, num_workers=workers))
        for images, workers in ((split(files, 0.4, 1)[0], 0), (train, 1))
    ]
    for (pixels, batch), (from_memory, other) in zip(*found, strict=True):
        torch.testing.assert_close(pixels, from_memory, rtol=0, atol=0)
        assert batch.bad == other.bad and torch.equal(batch.index, other.index)


def test_an_image_that_its_source_cannot_give_is_replaced_in_training_and_marked_in_evaluation(folder: Path) -> None:
    contents = {name: (folder / name).read_bytes() for name in ("a.jpg", "a.png", "rows.npy")}
    images = Images(Flaky(contents, {1}))
    sample = pretraining(images)[0, 1]
    assert sample.valid and ("a.png", "it cannot be read: Connection reset by peer") in sample.bad
    sample = finetuning(images, train=False)[EVAL_EPOCH, 1]
    assert not sample.valid and sample.bad == [("a.png", "it cannot be read: Connection reset by peer")]
    with pytest.raises(ValueError, match=r"none of 1 files can be read; a\.png: .*Connection reset"):
        channel_statistics(images.subset([1]), 3)


def test_datasets_of_any_source_reach_the_workers(folder: Path) -> None:
    for images in (find_images([str(folder)]), in_memory(folder)):
        dataset = pretraining(images)
        assert_same(pickle.loads(pickle.dumps(dataset))[1, 2], dataset[1, 2])
        sampler = StepSampler(len(images), 4, 0, end_step=3)
        loaders = [build_loader(dataset, sampler, num_workers=n, device_type="cpu") for n in (0, 1)]
        for alone, batch in zip(*loaders, strict=True):
            torch.testing.assert_close(batch.images, alone.images, rtol=0, atol=0)
            assert batch.bad == alone.bad


# Who may know of files

# source.py and storage.py open them, shards.py and tables.py look into them, walk.py and find.py find them, index.py
# keeps their names, bad_files.py writes a list, cores.py reads limits.
KNOW_FILES = {"source", "storage", "shards", "index", "walk", "find", "bad_files", "cores"}
OTHERS = [path for path in Path(fcmae.data.__file__).parent.glob("*.py") if path.stem not in KNOW_FILES]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_nothing_else_in_data_knows_where_bytes_come_from(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {"os", "pathlib", "glob"} & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in {"os", "pathlib", "glob"}
            assert not {"Files"} & {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", f"{path.name}:{node.lineno} opens a file"


def test_whoever_has_the_methods_is_a_source_without_inheriting(folder: Path) -> None:
    class Duck:
        def __len__(self) -> int:
            return 1

        def name(self, i: int) -> str:
            return "duck"

        def read(self, i: int) -> bytes:
            return (folder / "a.png").read_bytes()

        def open(self, i: int) -> BinaryIO:
            return BytesIO(self.read(i))

        def fingerprint(self) -> str:
            return ""

    source: Source = Duck()
    assert pretraining(Images(source), augment=False)[0, 0].valid
