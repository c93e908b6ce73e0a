"""Shared by the tests of training runs: images, settings, a tiny model, and real processes that can be killed."""

from __future__ import annotations

import atexit
import ctypes
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fcmae.training.checkpoint
import fcmae.training.steps
import fcmae.weights.tensors
from fcmae import bench, planning, processes
from fcmae.config import PretrainConfig
from fcmae.data.index import Images
from fcmae.options import load

# An empty file, for commands that give epochs or batch_size: nothing is chosen then.
DEFAULTS = Path(__file__).parent / "data" / "defaults.yaml"
TINY = "{depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}"  # as a command line gives it

# A server that has imported everything once and forks at each call: a process in a tenth of a second instead of ten,
# and without the threads that this one has.
PROCESSES = multiprocessing.get_context("forkserver")
PORTS = count(20_000 + os.getpid() % 500 * 20)  # which no other program is given by the system
PRELOADED = ["fcmae.pretraining", "matplotlib.figure", "torch.utils.tensorboard"]
PROCESSES.set_forkserver_preload(PRELOADED)

TIMED = planning._pretraining_step, planning._dense_step


def untimed(cfg: Any, at_once: int, *rest: Any) -> bench.Result:
    """A step as if it had been timed, which takes up to ten seconds: the fixture `timed` is for the tests of that."""
    return bench.Result(bench.Candidate("packed", "fp32", at_once), at_once, (at_once / 10,), 0.0, 10**6)


planning._pretraining_step = planning._dense_step = untimed


def in_forked(function: Callable[..., Any], *args: Any) -> Any:
    """`fcmae.processes.in_process` by the server above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda kind: PROCESSES))
        return processes.in_process(function, *args)


def in_folder(folder: Path) -> None:
    """For `prepare` of `start`."""
    os.chdir(folder)


def write_images(folder: Path, num_images: int = 13, seed: int = 0) -> Path:
    """Noise of 24 x 20 pixels, every third file a JPEG; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{'png' if number % 3 else 'jpg'}")
    return folder


def write_colors(folder: Path, colors: Mapping[str, tuple[int, int, int]], nums: Sequence[int]) -> Path:
    """Class folders of noisy colours, so many images each, which a network tells apart in a few steps; the folder."""
    rng = np.random.default_rng(0)
    for (name, color), num in zip(colors.items(), nums, strict=True):
        (folder / name).mkdir()
        for number in range(num):
            pixels = np.clip(np.array(color) + rng.normal(0, 30, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def flags(images: Path, out: Path, **settings: Any) -> list[str]:
    """The smallest run: 3 epochs of 3 steps on 4 images of 16 pixels. Keys write `__` for the dot."""
    values = {
        "data__path": images,
        "out": out,
        "device": "cpu",
        "data__image_size": 16,
        "data__num_workers": 0,
        "model__variant": TINY,
        "model__stem_stride": 1,
        "model__mask_patch": 8,
        "model__decoder_dim": 8,
        "batch_size": 4,
        "epochs": 3,
        "optim__base_lr": 0.5,
        "optim__warmup_epochs": 1,
        "log__every_steps": 1,
        "log__eval_epochs": 99,
        "log__trackers": "none",
        "monitor__num_images": 0,
    } | settings
    words = [word for key, value in values.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    return ["--config", str(DEFAULTS), *words]


def config(images: Path, out: Path, **settings: Any) -> PretrainConfig:
    """The settings that `flags` gives."""
    return load(PretrainConfig, flags(images, out, **settings), prog="test")


def forget_accelerator() -> None:
    """accelerate keeps the devices and precision of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)


def start(
    command: list[str],
    log: Path,
    kill_at: int | None = None,
    hang_at: Path | None = None,
    deaf: bool = False,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start `fcmae COMMAND` in a process of its own.

    log: its output. kill_at: see `_kill_in_save`. hang_at, deaf: see `_hang_at`. prepare: called there first.
    """
    process = PROCESSES.Process(target=_child, args=(command, str(log), kill_at, hang_at, deaf, prepare))
    process.start()
    return process


def start_pair(
    command: list[str], logs: Sequence[Path], prepare: Callable[[int], None] | None = None
) -> list[BaseProcess]:
    """Start `fcmae COMMAND` on two processes that train together, without a launcher, which takes longer than they do.

    logs: of each. prepare: called first in each, with its rank.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(PORTS)), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [start(command, log, prepare=partial(_as_one_of, shared, rank, prepare)) for rank, log in enumerate(logs)]


def _as_one_of(shared: Mapping[str, str], rank: int, prepare: Callable[[int], None] | None) -> None:
    os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if prepare is not None:
        prepare(rank)


def ended(processes: Sequence[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Their exit statuses; those that go on until then are killed, and have None."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def _child(
    command: list[str],
    log: str,
    kill_at: int | None,
    hang_at: Path | None,
    deaf: bool,
    prepare: Callable[[], None] | None,
) -> None:
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
    multiprocessing.set_start_method("fork", force=True)  # for data workers; else they import everything anew
    from fcmae.cli import main

    torch.set_num_threads(1)
    if kill_at is not None:
        _kill_in_save(kill_at)
    if hang_at is not None:
        _hang_at(hang_at, deaf)
    if prepare is not None:
        prepare()
    try:
        sys.exit(main(command))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing's processes leave out


def _hang_at(pipe: Path, deaf: bool) -> None:
    """Have images read from a pipe that nobody writes to, once there is one, in place of their files.

    deaf: no signal reaches the thread that reads, as on a mount whose server is gone.
    """
    open_image = Images.open

    def opened(self: Images, i: int) -> BinaryIO:
        if pipe.exists():
            if deaf:
                sleeper = threading.Thread(target=threading.Event().wait, daemon=True)
                sleeper.start()
                assert sleeper.ident is not None
                ctypes.CDLL(None).pthread_join(ctypes.c_ulong(sleeper.ident), None)
            pipe.open("rb")
        return open_image(self, i)

    Images.open = opened  # type: ignore[method-assign]


def _kill_in_save(number: int) -> None:
    """Have this process killed, as by kill -9, just before its `number`-th file operation while it saves checkpoints.

    Operations are what Python audits (opening, making, renaming, removing) and each writing of tensors, which leaves
    half of the file.
    """
    saving, count = False, 0

    def step() -> None:
        nonlocal count
        count += saving
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if saving and event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            step()

    save_file, save, prune = (
        fcmae.weights.tensors.save_file,
        fcmae.training.checkpoint.save,
        fcmae.training.checkpoint.prune,
    )

    def save_half_first(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        step()
        save_file(tensors, path, metadata)

    def marked(function: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal saving
            saving = True
            result = function(*args)
            saving = False
            return result

        return run

    sys.addaudithook(audit)
    fcmae.weights.tensors.save_file = save_half_first
    fcmae.training.checkpoint.save = marked(save)
    fcmae.training.checkpoint.prune = marked(prune)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Have `action` called at the beginning of a step (1 is the first)."""
    seed_step = fcmae.training.steps.seed_step

    def wrapped(seed: int, step: int, rank: int) -> None:
        seed_step(seed, step, rank)
        if step + 1 == number:
            action()

    monkeypatch.setattr(fcmae.training.steps, "seed_step", wrapped)


def kill_self(*signals: signal.Signals) -> Callable[[], None]:
    def action() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    return action


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as FILE:NAME."""
    return {f"{f.stem}:{k}": v for f in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(f).items()}


def final_state(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    latest = fcmae.training.checkpoint.latest(run)
    assert latest is not None
    return tensors(latest)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of each line of metrics.jsonl that has a loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, calls: Sequence[int], after_backward: bool) -> None:
    """Have parts of training fail as for want of GPU memory, whose loss must be gone before the step is taken again.

    calls: their numbers, counted from 1 over all parts that are tried. after_backward: their gradients are there.
    """
    backward, tried, losses = fcmae.training.steps.Step.backward, 0, list[weakref.ref[Tensor]]()
    shrink_micro_batches = fcmae.training.steps.Steps.shrink_micro_batches

    def failing(self: fcmae.training.steps.Step, loss: Tensor, share: Tensor | float = 1.0) -> None:
        nonlocal tried
        tried += 1
        if after_backward or tried not in calls:
            backward(self, loss, share)
        if tried in calls:
            losses.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def looking(self: fcmae.training.steps.Steps, *given: Any) -> None:
        assert not any(loss() is not None for loss in losses)
        shrink_micro_batches(self, *given)

    monkeypatch.setattr(fcmae.training.steps.Step, "backward", failing)
    monkeypatch.setattr(fcmae.training.steps.Steps, "shrink_micro_batches", looking)


TIMINGS = {"images_per_s", "data_wait_s", "data_wait_share", "upkeep_s"}


def assert_same_metrics(run: Path, other: Path, rel: float, abs: float | None = None) -> None:
    """Line by line but for times: sums in another order, whose rounding the steps of a run amplify."""
    lines = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (run, other)
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMINGS} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in TIMINGS}, rel=rel, abs=abs
        )
