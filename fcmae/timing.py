"""How long something takes: after a warm-up, with the device's work waited for, and several things in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key")
CPU = torch.device("cpu")


def wait(device: torch.device = CPU) -> None:
    """Until the device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device = CPU) -> float:
    """How long a call of `step` takes, with all that it gives the device to do."""
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def in_turn(
    sides: Mapping[Key, Callable[[], object]], repeats: int, warmup: int = 1, device: torch.device = CPU
) -> dict[Key, list[float]]:
    """Time several things turn by turn, so that what slows the machine slows all of them.

    Args:
        sides: what is timed, by name.
        repeats: turns that are counted.
        warmup: turns before these, for the allocation of memory, the choice of kernels, compilation.
        device: where they compute.

    Returns:
        Seconds in each counted turn, in the order of the turns, for each name.
    """
    times: dict[Key, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name, step in sides.items():
            taken = seconds(step, device)
            if turn >= warmup:
                times[name].append(taken)
    return times


def for_a_while(step: Callable[[], object], duration_s: float, at_least: int = 1) -> list[float]:
    """Time each call of `step`, for as long as asked and at least so many times.

    The device is not waited for, as in a loop that gives it the next step while it computes this one: a step that reads
    what the one before it has computed takes as long as the device takes.

    Args:
        step: what is timed.
        duration_s: seconds after which no further call begins.
        at_least: calls that are made however long they take.

    Returns:
        Seconds of each call, in order.
    """
    times: list[float] = []
    start = now = time.perf_counter()
    while now - start < duration_s or len(times) < at_least:
        step()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
