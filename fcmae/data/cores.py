"""How many cores this process may use, and how much of their time. No torch: the doctor asks, whatever is broken."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cgroup(*names: str) -> list[str]:
    """The words of a container's limit, under version 2 (the first name) or 1 (the others); none if there is none."""
    files = [CGROUP / name for name in names]
    if files[0].is_file():
        return files[0].read_text().split()
    return [file.read_text().strip() for file in files[1:] if file.is_file()]


def num_cores() -> int:
    """Cores that this process may run on: not all that the machine has, under taskset or a cluster's scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_time() -> float:
    """Seconds of core time in a second: `num_cores`, or what a container's quota leaves of them (docker run --cpus)."""
    quota, period = cgroup("cpu.max", "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us") or ("max", "1")
    return min(num_cores(), int(quota) / int(period)) if quota.isdecimal() else num_cores()


def local_processes() -> int:
    """Training processes on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory() -> int:
    """Bytes that this process may still take: what the system can give, or what a container's limit leaves of it."""
    import psutil  # here, as the doctor may have to tell that it is missing

    free: int = psutil.virtual_memory().available
    limit = cgroup("memory.max", "memory/memory.limit_in_bytes")
    used = cgroup("memory.current", "memory/memory.usage_in_bytes")
    # Files that were read count as used until their place is needed.
    statistics = cgroup("memory.stat", "memory/memory.stat")
    cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("inactive_file", "0")
    if limit and used and limit[0].isdecimal():
        free = min(free, int(limit[0]) - int(used[0]) + int(cached))
    return max(free, 0)


def end_with_parent() -> None:
    """From now on this process, which another one started, ends when that one has, whatever it waits for."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
