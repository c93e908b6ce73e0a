"""Runs are killed at random moments and file operations, and resumed until they have finished."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from chaos.commands import HANGS_S, Outcome, begin, different, fault, left_over, new_log, numbers, results
from chaos.samples import WATCHED, Samples

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
WAYS = (*SIGNALS, "SIGINT twice", "SIGKILL to a worker")
KILLS = 5  # of a run, before it may finish
SECONDS = 1.5  # that a run takes, or a little less
OPERATIONS = 120  # that a run has on files at the least


def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
    """Cut a run up to KILLS times in one way; its results must then be those of a run that nothing disturbed.

    One that was over before the first cut is counted apart.
    """
    way, kind = rng.choice(WAYS), rng.choice(("pretrain", "finetune"))
    is_watched = rng.random() < 0.3
    expected = (samples.watched if is_watched else samples.finished)[kind]
    out, remaining, cuts = folder / "run", KILLS, 0
    while True:
        workers = rng.randint(1, 2) if way == "SIGKILL to a worker" else rng.randint(0, 2)
        changed = {"data__num_workers": workers} | (WATCHED[kind] if is_watched else {})
        words, log = samples.words(kind, out, **changed), new_log(folder)
        cut = _Cut(way, rng) if remaining else None
        outcome = _run(words, log, cut)
        wrong = _wrong(way, outcome, cut is not None) or left_over(log)
        if wrong is not None:
            return way, f"{wrong} (when cut for the {KILLS - remaining + 1}. time)"
        if outcome.status == 0 and cut is None:
            break
        cuts += outcome.status != 0
        remaining = 0 if outcome.status == 0 else remaining - 1
    way = way if cuts else "none, as it was over before"
    found = {**results(out), **numbers(out), **_files(out)}
    return way, different(found, {**results(expected), **numbers(expected), **_files(expected)})


class _Cut:
    """When a process is killed: after some seconds, or (operation) before one of its file operations."""

    def __init__(self, way: str, rng: random.Random) -> None:
        self.numbers = [signal.Signals[way.split()[0]]] * (2 if "twice" in way else 1)
        self.is_of_worker = "worker" in way
        self.seconds = rng.uniform(0, SECONDS)
        at_operation = not self.is_of_worker and rng.random() < 0.5
        self.operation = rng.randint(1, OPERATIONS) if at_operation else None

    def strike(self, process: BaseProcess) -> None:
        process.join(self.seconds)
        if self.is_of_worker:
            deadline = time.monotonic() + HANGS_S
            while process.is_alive() and time.monotonic() < deadline:
                try:
                    psutil.Process(process.pid).children()[0].kill()
                    return
                except (IndexError, psutil.NoSuchProcess):
                    time.sleep(0.01)
        for number in self.numbers:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)


def _run(words: list[str], log: Path, cut: _Cut | None) -> Outcome:
    at_operation = cut is not None and cut.operation is not None
    out = words[words.index("--out") + 1]
    prepare = partial(_kill_at, cut.operation, cut.numbers, out) if cut and cut.operation else None
    process = begin(words, log, prepare)
    if cut is not None and not at_operation:
        cut.strike(process)
    process.join(HANGS_S)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return Outcome(status, log.read_text(errors="replace"))


def _kill_at(operation: int, numbers: list[signal.Signals], out: str) -> None:
    """Have this process killed before a file operation in the run: opening, making, renaming, removing."""
    count, pid = 0, os.getpid()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"} and str(args[0]).startswith(out):
            count += 1
            if count == operation and os.getpid() == pid:
                for number in numbers:
                    os.kill(pid, number)

    sys.addaudithook(audit)


def _wrong(way: str, outcome: Outcome, was_cut: bool) -> str | None:
    if not was_cut:
        return fault(outcome, (0,))
    if "worker" in way:
        return fault(outcome)  # a sentence; or it was over before
    number = int(signal.Signals[way.split()[0]])
    if outcome.status == -number != -signal.SIGKILL and "images/s" in outcome.text and "finished" not in outcome.text:
        return "ends at once, without saving its step"
    # As a shell tells it of a process that has saved and ended, or has ended before it took signals.
    return fault(outcome, (0, 128 + number, -number))


def _files(run: Path) -> dict[str, str]:
    """Which files there are, but for TensorBoard's, of which each start writes one."""
    names = (str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name)
    return dict.fromkeys(names, "there")
