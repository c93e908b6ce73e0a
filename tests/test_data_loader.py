from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import PROCESSES
from torch.utils.data import Dataset

from fcmae.data.augment import CropAndFlip, Reading
from fcmae.data.cores import core_time, free_memory
from fcmae.data.dataset import Batch, NoUsableImage, PretrainDataset, Sample
from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.data.loader import STOP_SIGNALS, build_loader, choose_num_workers, end_workers, prefetched
from fcmae.data.sampler import StepSampler


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Ten images, one of them broken."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "9.png").write_bytes(b"broken")
    return find_images([str(folder)])


def batches(
    index: Images, num_workers: int, start: int = 0, end: int = 7, rank: int = 0, processes: int = 1, chans: int = 1
) -> list[Batch]:
    dataset = PretrainDataset(
        index,
        CropAndFlip(Reading(chans, (16, 16)), (0.2, 1.0), 0.5),
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


def test_batches_are_identical_for_any_number_of_workers(index: Images) -> None:
    alone = batches(index, 0)
    assert any(batch.bad for batch in alone)
    assert_same(alone, batches(index, 1))
    assert_same(alone, batches(index, 2))


def test_resuming_mid_epoch_with_other_workers_equals_an_uninterrupted_run(index: Images) -> None:
    # Two steps an epoch: step 3 is in the middle of the second.
    assert_same(batches(index, 1, end=3) + batches(index, 2, start=3), batches(index, 0))


def test_processes_together_have_the_batches_of_one(index: Images) -> None:
    parts = [batches(index, 0, rank=rank, processes=2) for rank in range(2)]
    for whole, first, second in zip(batches(index, 0), *parts, strict=True):
        torch.testing.assert_close(torch.cat([first.images, second.images]), whole.images, rtol=0, atol=0)


def test_loading_leaves_the_global_generators_alone(index: Images) -> None:
    before = torch.get_rng_state()
    batches(index, 1, end=1)
    batches(index, 0, end=1)
    torch.testing.assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_of_a_worker_is_one_sentence(index: Images, num_workers: int) -> None:
    with pytest.raises(NoUsableImage) as error:
        batches(index, num_workers, chans=5)
    assert str(error.value).startswith("data.path: 16 files drawn in a row cannot be used")
    assert "\n" not in str(error.value)


class _SignalsItself(Dataset[Sample]):
    def __getitem__(self, key: tuple[int, int]) -> Sample:
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        threads = torch.get_num_threads()
        return Sample(np.zeros((1, 1, 1), np.uint8), None, threads, key[1], True, [])


def test_workers_outlive_the_signals_that_stop_a_job_and_have_one_thread() -> None:
    batches = list(build_loader(_SignalsItself(), [[(0, 0)], [(0, 1)]], num_workers=1, device_type="cpu"))
    assert [batch.index.item() for batch in batches] == [0, 1]
    assert batches[0].labels is not None and batches[0].labels.item() == 1


class _FailsItself(Dataset[Sample]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("of the data"), ConnectionResetError("of the store")])
def test_an_error_of_the_data_is_not_taken_for_a_worker_that_was_killed(error: Exception, num_workers: int) -> None:
    loader = build_loader(_FailsItself(error), [[(0, 0)]], num_workers=num_workers, device_type="cpu")
    with pytest.raises(type(error), match="of the"):
        list(loader)


class _KillsItself(Dataset[Sample]):
    def __getitem__(self, key: tuple[int, int]) -> Sample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_is_told_of_where_a_batch_is_asked_for_and_nowhere_else() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(build_loader(_KillsItself(), [[(0, 0)]], num_workers=1, device_type="cpu"))
    with pytest.raises(ChildProcessError, match=r"killed, most often .* lower num_workers \(it is 1\)"):
        next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.parametrize("said", ["DataLoader worker (pid 7) is killed by", "Pin memory thread exited unexpectedly"])
def test_whatever_torch_says_of_a_worker_that_was_killed_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def failing() -> Iterator[Batch]:
        raise RuntimeError(said)
        yield

    loader = build_loader(_KillsItself(), [[(0, 0)]], num_workers=1, device_type="cpu")
    monkeypatch.setattr(loader, "_start", failing)
    with pytest.raises(ChildProcessError, match="a process that decodes images was killed"):
        next(iter(loader))


class _Large(Dataset[Sample]):
    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return Sample(np.full((1, 1000, 1000), key[1], np.uint8), None, key[1], key[1], True, [])


def _read_with(num_bytes: int | None, num_files: int | None, can_raise: bool, answers: Any) -> None:
    """Say which batches of a megabyte arrive, in a process with little shared memory or few files."""
    if num_bytes is not None:
        commands = (
            ["mount", "--make-rprivate", "/"],
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "x", "/dev/shm"],
        )
        if os.geteuid() != 0 or ctypes.CDLL(None).unshare(0x20000) != 0:
            os._exit(77)
        for command in commands:
            if subprocess.run(command, capture_output=True, check=False).returncode:
                os._exit(77)
    if num_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, 4096 if can_raise else num_files))
    multiprocessing.set_start_method("fork", force=True)  # else the workers import everything anew
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fcmae").addHandler(handler)
    logging.getLogger("fcmae").setLevel(logging.INFO)
    keys = [[(0, number)] for number in range(40)]
    batches = list(build_loader(_Large(), keys, num_workers=2, device_type="cpu"))
    values = [(int(batch.images.min()), int(batch.images.max()), int(batch.index)) for batch in batches]
    answers.send((values, said))


@pytest.mark.parametrize(
    ("num_bytes", "num_files", "can_raise", "told"),
    [
        (300_000, None, False, 1),  # less than a batch
        (3_500_000, None, False, None),  # as much as some of those that are on their way: it depends on who is faster
        (None, 60, True, 0),
        (None, 60, False, 1),
        (None, None, False, 0),
    ],
)
def test_batches_arrive_whatever_shared_memory_and_files_there_are(
    num_bytes: int | None, num_files: int | None, can_raise: bool, told: int | None
) -> None:
    """A batch that fails on its way, in the thread that feeds a worker's queue, would be waited for for ever."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_read_with, args=(num_bytes, num_files, can_raise, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(60):
            pytest.fail("it waits for ever")
        values, said = ours.recv()
    except EOFError:
        process.join()
        if process.exitcode == 77:
            pytest.skip("no small /dev/shm can be mounted here")
        raise
    finally:
        process.kill()
        process.join()
    assert values == [(number, number, number) for number in range(40)]
    assert told is None or len(said) == told
    assert all("through pipes" in line and "--shm-size" in line for line in said)


class _Stream:
    """Writes what is done with it, in place of a CUDA stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> int:
        return len(self.log)

    def wait_event(self, event: int) -> None:
        self.log.append(f"{self.name} waits for {self.log[event - 1]}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *args: object) -> None:
        self.log.append(f"off {self.name}")


class _Copied:
    def __init__(self, number: int, log: list[str]) -> None:
        self.number, self.log = number, log

    def to(self, device: torch.device) -> _Copied:
        self.log.append(f"copy {self.number}")
        return self

    def record_stream(self, stream: _Stream) -> None:
        self.log.append(f"keep {self.number} for {stream.name}")


def test_on_cuda_the_next_batch_is_on_its_way_before_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    side, main = _Stream("side", log), _Stream("main", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    given = prefetched((_Copied(i, log) for i in range(3)), torch.device("cuda"))  # type: ignore[misc]
    for batch in given:
        log.append(f"compute {batch.number}")  # type: ignore[attr-defined]
    steps = [step for step in log if not step.startswith(("on", "off"))]
    arrivals = [[f"main waits for copy {i}", f"keep {i} for main", f"compute {i}"] for i in range(3)]
    assert steps == ["copy 0", "copy 1", *arrivals[0], "copy 2", *arrivals[1], *arrivals[2]]
    assert log[:3] == ["on side", "copy 0", "off side"]


def test_on_a_cpu_prefetching_gives_the_batches_as_they_come(index: Images) -> None:
    read: list[int] = []
    plain = batches(index, 0)

    def counted() -> Iterator[Batch]:
        for number, batch in enumerate(plain):
            read.append(number)
            yield batch

    given = prefetched(counted(), torch.device("cpu"))
    assert next(given).images is plain[0].images and read == [0]
    assert_same(list(given), plain[1:])


def test_a_containers_quota_counts_as_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(20)), raising=False)
    monkeypatch.setattr("fcmae.data.cores.CGROUP", tmp_path)
    for quota, workers in {"400000": 4, "50000": 1, "max": 8, "9900000": 8}.items():
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert choose_num_workers(None, "cuda") == workers


@pytest.mark.parametrize(
    ("membership", "names"),
    [
        ("0::/a/b", ("memory.max", "memory.current", "cpu.max")),
        ("5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/", ("memory.limit_in_bytes", "memory.usage_in_bytes", "")),
    ],
)
def test_the_tightest_limit_of_the_groups_around_a_process_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, membership: str, names: tuple[str, str, str]
) -> None:
    """As of a service, or `systemd-run --scope -p MemoryMax=4G`, whose group is not the outermost that is seen."""
    (tmp_path / "membership").write_text(f"{membership}\n")
    monkeypatch.setattr("fcmae.data.cores.MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr("fcmae.data.cores.CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=20 * 10**9))
    limit, used, quota = names
    memory, cpu = (tmp_path, tmp_path) if quota else (tmp_path / "memory", tmp_path / "cpu")
    for root in (memory, cpu):
        (root / "a" / "b").mkdir(parents=True, exist_ok=True)
    assert free_memory() == 20 * 10**9
    for group, bytes_allowed, bytes_used in (("a", 4 * 10**9, 10**9), ("a/b", 8 * 10**9, 5 * 10**8)):
        (memory / group / limit).write_text(f"{bytes_allowed}\n")
        (memory / group / used).write_text(f"{bytes_used}\n")
    assert free_memory() == 3 * 10**9
    (memory / "a" / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert free_memory() == 35 * 10**8
    # By ulimit -v, 3 GB of addresses are left.
    monkeypatch.setattr("fcmae.data.cores.resource.getrlimit", lambda which: (4 * 10**9, -1))
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(vms=10**9)))
    assert free_memory() == 3 * 10**9
    if quota:
        (cpu / "a" / quota).write_text("50000 100000\n")
    else:
        (cpu / "a" / "cpu.cfs_quota_us").write_text("50000\n")
        (cpu / "a" / "cpu.cfs_period_us").write_text("100000\n")
    assert core_time() == 0.5


def test_more_workers_than_cores_are_not_started_and_this_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with caplog.at_level(logging.INFO, "fcmae"):
        assert [choose_num_workers(number, "cpu") for number in (0, 3, 64, 64)] == [0, 3, 3, 3]
    assert caplog.messages == ["num_workers is 64 for 3 cores a process: 3 are started"]


def test_default_number_of_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fcmae.data.cores.CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(20)), raising=False)
    assert choose_num_workers(None, "cpu") == 1
    assert choose_num_workers(0, "cuda") == 0
    for processes, workers in {1: 8, 4: 5, 8: 2, 40: 1}.items():
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert choose_num_workers(None, "cuda") == workers


def test_only_cuda_pins(tmp_path: Path) -> None:
    dataset = _SignalsItself()
    assert build_loader(dataset, [], num_workers=0, device_type="cuda").pin_memory
    assert not build_loader(dataset, [], num_workers=0, device_type="cpu").pin_memory


def test_a_loader_chooses_its_workers() -> None:
    assert build_loader(_SignalsItself(), [], num_workers=None, device_type="cpu").num_workers == 1


def test_processes_that_are_not_ours_outlive_our_workers() -> None:
    theirs = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    theirs.start()
    try:
        loader = build_loader(_SignalsItself(), [[(0, 0)], [(0, 1)]], num_workers=1, device_type="cpu")
        iterator = iter(loader)
        next(iterator)
        (worker,) = loader._iterator._workers  # type: ignore[union-attr]
        end_workers()
        worker.join(10)
        assert not worker.is_alive() and theirs.is_alive()
    finally:
        theirs.kill()
        theirs.join()
