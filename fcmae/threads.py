"""How torch's threads wait for each other where other processes keep the cores busy.

OpenMP's threads spin at the end of each operation until the last of them is done. On cores of their own that is the
fastest way to wait; where one of them has to share its core, the others burn their time, and a training can lose nine
tenths of its speed (benchmarks/threads.py). A bounded spin loses little on a quiet machine, sleeping at once little on
a busy one. OpenMP reads its settings once, when it is loaded: so they are set before torch is imported.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

from fcmae.data.cores import local_processes, num_cores

BUSY = 0.25  # share of the cores in the hands of others from which on waiting threads sleep
QUIET_SETTING = ("GOMP_SPINCOUNT", "10000")
BUSY_SETTING = ("OMP_WAIT_POLICY", "PASSIVE")
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SAMPLE_S = 0.1  # ten ticks of the system's clock


def prepare() -> str:
    """Set how threads wait, for torch in this process and in those that it starts, unless the user has set it.

    To be called before torch is imported, by whatever starts a process of ours: the `fcmae` command, `import fcmae`
    where it loads what computes, the benchmarks, the tests.

    Returns:
        What was done, in words.
    """
    if given := in_force():
        return f"{given} is set"
    if "torch" in sys.modules:
        return "nothing, as torch is loaded already"
    # The other processes of a launcher are no strangers, and each has cores of its own.
    share = busy() if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1" else 0.0
    name, value = choose(share)
    os.environ[name] = value
    return f"{name}={value}, as other processes use {share:.0%} of the cores"


def in_force() -> str:
    """The settings in the environment, NAME=VALUE; empty without any."""
    return " ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)


def choose(share: float) -> tuple[str, str]:
    """The variable, and its value, for a machine of whose cores other processes use this share."""
    return BUSY_SETTING if share > BUSY else QUIET_SETTING


def busy(sample_s: float = SAMPLE_S) -> float:
    """The share of this process's cores that other processes use now, from 0 to 1. Takes as long as the sample."""
    others = Others()
    time.sleep(sample_s)
    return others.share()


class Others:
    """The use of this process's cores by others than itself, the processes of its run and those that they started."""

    def __init__(self) -> None:
        self._seen = _seconds()

    def share(self) -> float:
        """The share since it was asked last, or since this was made, from 0 to 1."""
        before, self._seen = self._seen, _seconds()
        passed, idle, own = (now - then for now, then in zip(self._seen, before, strict=True))
        return min(1.0, max(0.0, 1 - (idle + own) / max(passed, 1e-9)))


def _seconds() -> tuple[float, float, float]:
    """Of the cores so far: all, those with nothing to do, and those that this run used."""
    return num_cores() * time.perf_counter(), _idle_s(), _own_s()


def _own_s() -> float:
    import psutil

    own = psutil.Process()
    root = own if local_processes() == 1 else own.parent() or own  # a launcher has the other processes of the run too
    used = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):
            used += sum(process.cpu_times()[:4])  # user, system, and those of children that have ended
    return used


def _idle_s() -> float:
    """Seconds that the cores that this process may run on have had nothing to do."""
    import psutil  # here, as the doctor may have to tell that it is missing

    times = psutil.cpu_times(percpu=True)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    return float(sum(times[core].idle + getattr(times[core], "iowait", 0.0) for core in cores if core < len(times)))
