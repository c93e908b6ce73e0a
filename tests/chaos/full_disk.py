"""A run fills its disk: it says so and keeps its last checkpoint, and goes on once there is space."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

from chaos.commands import command, different, fault, numbers, results
from chaos.samples import WATCHED, Samples
from fcmae.training import checkpoint

SIZE = 3 << 20  # of the disk, in bytes; a run takes a third of it
CLONE_NEWNS = 0x20000


def mount(place: Path) -> bool:
    """Mount a small disk that is gone when this process is; false where that is not allowed.

    It is seen by this process and by those that it starts from here on.
    """
    place.mkdir(parents=True)
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    # Else the system's own mounts would get it too.
    alone = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    return alone.returncode == 0 and subprocess.run(words, capture_output=True, check=False).returncode == 0


def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
    """Leave a run little space, on the samples' disk or by a limit on the size of a file, and then enough."""
    kind = rng.choice(("pretrain", "finetune"))
    is_watched = rng.random() < 0.3
    expected = (samples.watched if is_watched else samples.finished)[kind]
    disk = samples.disk
    root = folder if disk is None else disk
    out, prepare = root / "run", None
    words = samples.words(kind, out, **(WATCHED[kind] if is_watched else {}))
    if disk is None:
        prepare = partial(_limit, rng.randrange(max(p.stat().st_size for p in expected.rglob("*") if p.is_file())))
    else:
        # More often nearly all that the run takes.
        needed = sum(path.stat().st_size + 4096 for path in expected.rglob("*"))
        (disk / "ballast").write_bytes(bytes(SIZE - 8192 - int(needed * rng.random() ** 0.5)))
    try:
        outcome = command(words, folder, prepare)
        wrong = fault(outcome)
        if (
            wrong is None
            and outcome.status == 2
            and not any(w in outcome.error for w in ("space", "large", "full", "do not fit"))
        ):
            wrong = f"it does not say that the disk is full: {outcome.error}"
        if wrong is None and outcome.status == 2:
            wrong = _left_behind(out)
        if wrong is None:
            (root / "ballast").unlink(missing_ok=True)
            wrong = fault(command(words, folder), (0,))
            wrong = wrong and f"with space again: {wrong}"
        wrong = wrong or different({**results(out), **numbers(out)}, {**results(expected), **numbers(expected)})
    finally:
        if disk is not None:
            shutil.rmtree(out, ignore_errors=True)
            (disk / "ballast").unlink(missing_ok=True)
    return "a limit on files" if disk is None else "a full disk", wrong and f"{kind}: {wrong}"


def _limit(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def _left_behind(run: Path) -> str | None:
    """What is wrong with what a run that had no space has left."""
    if asides := [str(path.relative_to(run)) for path in run.rglob(".tmp-*")]:
        return f"half-written files stay: {', '.join(asides[:3])}"
    newest = checkpoint.latest(run)
    try:
        if newest is not None:
            checkpoint.read_meta(newest)
            checkpoint.read_tensors(newest, "model")
            checkpoint.read_tensors(newest, "optimizer")
    except ValueError as error:
        return f"the last checkpoint is damaged: {error}"
    return None
