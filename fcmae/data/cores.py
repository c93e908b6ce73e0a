"""The cores, memory and open files that this process may use. No torch: the doctor asks, whatever is broken."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SHARED_MEMORY = Path("/dev/shm")
OPEN_FILES = 4096  # as many as any number of workers needs
FEW_FILES = 256  # fewer may not suffice for images in shared memory, each batch a file


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all around it, whose limits hold too: version 2, then 1."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for root, number in ((CGROUP, ""), (CGROUP / controller, controller)):
        group = next((path for names, path in paths.items() if number in names.split(",")), "/")
        # In a container the path may be that outside, of which nothing is seen here.
        place = root / group.strip("/") if ".." not in group else root
        yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(root) and folder.is_dir())


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []


def memory_limits() -> Iterator[tuple[int, int]]:
    """For each limit on the memory of this process and others beside it: the limit and what is left of it, in bytes."""
    for group in _cgroups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        if limit and limit[0].isdecimal():
            used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes") or ["0"]
            statistics = _words(group / "memory.stat")
            # Files that were read count as used until their place is needed.
            counted = dict(zip(statistics[::2], statistics[1::2], strict=True))
            cached = counted.get("total_inactive_file") or counted.get("inactive_file", "0")
            yield int(limit[0]), max(0, int(limit[0]) - int(used[0]) + int(cached))


def num_cores() -> int:
    """Cores that this process may run on: not all that the machine has, under taskset or a cluster's scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_time() -> float:
    """Seconds of core time in a second: `num_cores`, or what a container's quota leaves of them (docker run --cpus)."""
    shares: list[float] = [num_cores()]
    for group in _cgroups("cpu"):
        quota = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdecimal():
            shares.append(int(quota[0]) / int(quota[1]))
    return min(shares)


def local_processes() -> int:
    """Training processes on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def all_processes() -> int:
    """Processes that a launcher has started in all; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def free_memory() -> int:
    """Bytes that this process may still take: what the system can give, or what a limit leaves of it."""
    import psutil  # here, as the doctor may have to tell that it is missing

    left = [int(psutil.virtual_memory().available), *(left for _, left in memory_limits())]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:  # ulimit -v counts addresses, used or not
        left.append(max(0, limit - psutil.Process().memory_info().vms))
    return min(left)


def allow_open_files() -> int:
    """Raise the limit on open files as far as it may be raised and is of use, for the processes started from here too.

    Returns:
        The limit.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    now, most = (min(limit, OPEN_FILES) if limit >= 0 else OPEN_FILES for limit in limits)  # below 0: no limit
    if now < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    return most


def end_with_parent() -> None:
    """From now on this process, which another one started, ends when that one has, whatever it waits for."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
