from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from fcmae.data.dataset import Batch, NoUsableImage, PretrainDataset, Sample
from fcmae.data.index import FileIndex, find_images
from fcmae.data.loader import build_loader, default_num_workers
from fcmae.data.sampler import StepSampler


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FileIndex:
    """Ten images, one of them broken."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "9.png").write_bytes(b"broken")
    return find_images([str(folder)])


def batches(
    index: FileIndex, num_workers: int, start: int = 0, end: int = 7, rank: int = 0, processes: int = 1, chans: int = 1
) -> list[Batch]:
    dataset = PretrainDataset(
        index,
        in_chans=chans,
        image_size=(16, 16),
        crop_scale=(0.2, 1.0),
        hflip=0.5,
        grid=(2, 2),
        visible=2,
        seed=3,
    )
    sampler = StepSampler(len(index), 4, 3, start_step=start, end_step=end, rank=rank, num_processes=processes)
    return list(build_loader(dataset, sampler, num_workers=num_workers, device_type="cpu"))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.bad == y.bad
        for name in ("images", "masks", "index", "valid"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=0, atol=0)


def test_batches_are_identical_for_any_number_of_workers(index: FileIndex) -> None:
    alone = batches(index, 0)
    assert any(batch.bad for batch in alone)
    assert_same(alone, batches(index, 1))
    assert_same(alone, batches(index, 2))


def test_resuming_mid_epoch_with_other_workers_equals_an_uninterrupted_run(index: FileIndex) -> None:
    # Two steps an epoch: step 3 is in the middle of the second.
    assert_same(batches(index, 1, end=3) + batches(index, 2, start=3), batches(index, 0))


def test_processes_together_have_the_batches_of_one(index: FileIndex) -> None:
    parts = [batches(index, 0, rank=rank, processes=2) for rank in range(2)]
    for whole, first, second in zip(batches(index, 0), *parts, strict=True):
        torch.testing.assert_close(torch.cat([first.images, second.images]), whole.images, rtol=0, atol=0)


def test_loading_leaves_the_global_generators_alone(index: FileIndex) -> None:
    before = torch.get_rng_state()
    batches(index, 1, end=1)
    batches(index, 0, end=1)
    torch.testing.assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_of_a_worker_is_one_sentence(index: FileIndex, num_workers: int) -> None:
    with pytest.raises(NoUsableImage) as error:
        batches(index, num_workers, chans=5)
    assert str(error.value).startswith("data.path: 16 files drawn in a row cannot be used")
    assert "\n" not in str(error.value)


class _SignalsItself(Dataset[Sample]):
    def __getitem__(self, key: tuple[int, int]) -> Sample:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        threads = torch.get_num_threads()
        return Sample(np.zeros((1, 1, 1), np.uint8), None, threads, key[1], True, [])


def test_workers_outlive_the_signals_that_stop_a_job_and_have_one_thread() -> None:
    batches = list(build_loader(_SignalsItself(), [[(0, 0)], [(0, 1)]], num_workers=1, device_type="cpu"))
    assert [batch.index.item() for batch in batches] == [0, 1]
    assert batches[0].labels is not None and batches[0].labels.item() == 1


def test_default_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(20)), raising=False)
    assert default_num_workers("cpu", 1) == 1
    assert [default_num_workers("cuda", processes) for processes in (1, 4, 8, 40)] == [8, 5, 2, 1]


def test_only_cuda_pins(tmp_path: Path) -> None:
    dataset = _SignalsItself()
    assert build_loader(dataset, [], num_workers=0, device_type="cuda").pin_memory
    assert not build_loader(dataset, [], num_workers=0, device_type="cpu").pin_memory
