"""Timings under a clock that only the steps move."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fcmae import timing

Takes = Callable[..., Callable[[], None]]


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Takes:
    """Makes a step that takes so many seconds, one number a call, the last one for ever."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def make(*durations: float) -> Callable[[], None]:
        left = list(durations)

        def step() -> None:
            clock.now += left.pop(0) if len(left) > 1 else left[0]

        return step

    return make


def test_sides_take_turns_and_the_warm_up_is_not_counted() -> None:
    calls = ""

    def step(name: str) -> None:
        nonlocal calls
        calls += name

    times = timing.in_turn({"a": lambda: step("a"), "b": lambda: step("b")}, repeats=3, warmup=1)
    assert calls == "abababab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_each_turn_is_told_in_its_order(takes: Takes) -> None:
    sides = {"a": takes(100, 1, 2, 3), "b": takes(200, 30, 20, 10)}
    assert timing.in_turn(sides, repeats=3) == {"a": [1, 2, 3], "b": [30, 20, 10]}


def test_a_step_is_repeated_for_as_long_as_asked_and_at_least_so_often(takes: Takes) -> None:
    assert timing.for_a_while(takes(2), 5) == [2, 2, 2]
    assert timing.for_a_while(takes(2), 5, at_least=4) == [2, 2, 2, 2]
    assert timing.for_a_while(takes(9, 1), 5) == [9]


def test_the_devices_work_is_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: order.append(device))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: order.append("clock") or len(order)))
    timing.seconds(lambda: order.append("step"), gpu)
    assert order == [gpu, "clock", "step", gpu, "clock"]
    order.clear()
    timing.seconds(lambda: order.append("step"))
    assert order == ["clock", "step", "clock"]  # a CPU is not waited for


def test_quartiles_are_numpys() -> None:
    values = [4.0, 1.0, 7.0, 2.0, 5.5, 3.0]
    assert timing.quartiles(values) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))
