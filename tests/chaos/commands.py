"""Command lines in processes of their own, what every one of them must keep, and what runs found."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import resource
import shlex
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from runs import PROCESSES, start
from safetensors.torch import load_file
from torch import Tensor

from fcmae.training import checkpoint

HANGS_S = 120
PARTING_S = 15  # torch's data workers look every 5 seconds whether their parent is there
MEMORY = 12 << 30  # of addresses, of which torch takes 3 GB
PEAK_MB = 1500  # on small files, of which torch takes 600
MODULES = ("fcmae.cli", "fcmae.pretraining", "fcmae.finetuning", "fcmae.prediction", "fcmae.evaluation.evaluate")
MORE = ("fcmae.evaluation.analyze", "fcmae.evaluation.report", "fcmae.evaluation.embed")
# No module of tests/: the server looks in the current folder, where runs/ is the user's.
PRELOADED = [*MODULES, *MORE, "matplotlib.figure", "torch.utils.tensorboard"]
PROCESSES.set_forkserver_preload(PRELOADED)


class Outcome(NamedTuple):
    """How a command ended. status: of the process, negative after a signal, None if it hung. text: all it said.

    peak_mb: the most memory that it used, if it lived to tell.
    """

    status: int | None
    text: str
    peak_mb: int = 0

    @property
    def error(self) -> str:
        """What it printed as its error, or its last line."""
        lines = [line for line in self.text.splitlines() if line.startswith("fcmae: error: ")]
        return " ".join(lines)[:300] or self.text.rstrip().rpartition("\n")[2][:300]


def command(words: list[str], folder: Path, prepare: Callable[[], None] | None = None) -> Outcome:
    """Run `fcmae WORDS` to its end, with `folder` as its home. prepare: called in the process first."""
    log = new_log(folder)
    process = begin(words, log, prepare)
    process.join(HANGS_S)
    status = process.exitcode
    if status is None:
        for left in processes_of(log):
            left.kill()
        process.join()
    peak = log.with_suffix(".peak")
    return Outcome(status, log.read_text(errors="replace"), int(peak.read_text()) if peak.exists() else 0)


def begin(words: list[str], log: Path, prepare: Callable[[], None] | None = None) -> BaseProcess:
    log.with_suffix(".sh").write_text(shlex.join(["fcmae", *words]) + "\n", errors="surrogateescape")
    return start(words, log, prepare=partial(_at_home, log, prepare))


def new_log(folder: Path) -> Path:
    log = folder / f"output-{len(list(folder.glob('output-*.txt')))}.txt"
    log.touch()  # a process may be killed before it writes
    return log


def _at_home(log: Path, prepare: Callable[[], None] | None) -> None:
    def tell() -> None:
        log.with_suffix(".peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))

    atexit.register(tell)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HOME"] = str(log.parent)
    if prepare is not None:
        prepare()


def processes_of(log: Path) -> list[psutil.Process]:
    """The processes that write to a log: the command, and the workers that outlive it."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/fd/1").readlink() == log:
                found.append(process)
        except OSError:  # it has ended, or is another user's
            continue
    return found


def left_over(log: Path) -> str | None:
    """What is wrong if processes of a command that has ended stay."""
    deadline = time.monotonic() + PARTING_S
    while found := processes_of(log):
        if time.monotonic() > deadline:
            for process in found:
                process.kill()
            return f"{len(found)} processes stay after the command has ended"
        time.sleep(0.05)
    return None


def fault(outcome: Outcome, statuses: tuple[int, ...] = (0, 2)) -> str | None:
    """What a command did that none may do, whatever it is given; None if it was well-behaved."""
    if outcome.status is None:
        return f"hangs: {outcome.error}"
    if outcome.status < 0 and outcome.status not in statuses:
        return f"dies of signal {-outcome.status}: {outcome.error}"
    if "Traceback (most recent call last)" in outcome.text:
        return f"a traceback: {outcome.text.rstrip().rpartition(chr(10))[2][:300]}"
    if outcome.status not in statuses:
        return f"status {outcome.status}: {outcome.error}"
    if outcome.status == 2 and "fcmae: error: " not in outcome.text:
        return f"status 2 without a sentence: {outcome.error}"
    if outcome.status == 2 and len(outcome.error.removeprefix("fcmae: error: ").split()) < 3:
        return f"status 2 and no sentence: {outcome.error}"
    if "\x1b" in outcome.text:
        return "terminal escapes in what it prints"
    return None


def greedy(outcome: Outcome) -> str | None:
    """What is wrong with the memory that a command on small files has used."""
    return f"{outcome.peak_mb} MB of memory for small files" if outcome.peak_mb > PEAK_MB else None


def results(run: Path, without: Path | None = None) -> dict[str, str]:
    """What a run found: its tensors and predictions, as texts that differ if one bit of them does.

    without: a file that is left out, by its place in its run.
    """
    newest = checkpoint.latest(run)
    found = dict[str, str]()
    for path in sorted([*run.glob("best/*"), *run.glob("last/*"), *(newest.iterdir() if newest else ())]):
        if without is not None and path.parts[-2:] == without.parts[-2:]:
            continue
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": digest(value) for key, value in load_file(path).items()}
        elif path.suffix == ".csv":
            found[name] = path.read_text()
    return found


def numbers(run: Path) -> dict[str, str]:
    """The lines of its metrics.jsonl, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"metrics {number}": str({key: value for key, value in line.items() if not key.endswith(("_s", "_share"))})
        for number, line in enumerate(lines)
    }


def digest(tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}"


def different(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """Which results differ, if any."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return f"silently different: {', '.join(names[:3])} ({len(names)} of {len(expected)})" if names else None
