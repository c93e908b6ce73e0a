"""Warnings come when lines show what they warn of, with the numbers, and not from noise, starts and short runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fcmae.training import health
from fcmae.training.health import collapsed_channels, collapsed_rank, stalled, starved, warnings

Line = dict[str, Any]


def evaluations(metric: str, *layers: list[float]) -> list[Line]:
    """A line each epoch; each list is a layer's values, layer stages.0.N."""
    return [
        {"step": 10 * epoch, "epoch": epoch, "val_loss": 0.9}
        | {f"{metric}/stages.0.{n}": value for n, value in enumerate(values)}
        for epoch, values in enumerate(zip(*layers, strict=True), start=1)
    ]


def training(losses: np.ndarray, *, warmup: int = 20, peak: float = 1e-3, cosine: bool = False) -> list[Line]:
    """A line each step, ten an epoch."""
    num = len(losses)
    lines = []
    for step, loss in enumerate(losses.tolist(), start=1):
        lr = peak * min(1, step / warmup)
        if cosine and step > warmup:
            lr *= 0.5 * (1 + np.cos(np.pi * (step - warmup) / (num - warmup)))
        lines.append({"step": step, "epoch": step / 10, "loss": loss, "lr": lr})
    return lines


def windows(*shares: float, seconds: float = 60) -> list[Line]:
    return [
        {"step": 10 * n, "epoch": n, "data_wait_share": share, "data_wait_s": share * seconds}
        for n, share in enumerate(shares, start=1)
    ]


# Collapse


def test_channels_that_become_alike_are_warned_of_with_layer_and_numbers() -> None:
    lines = evaluations("cosine_distance", [0.48] * 6, [0.45, 0.44, 0.4, 0.3, 0.15, 0.12])
    found = collapsed_channels(lines)
    assert found is not None
    assert (found.kind, found.step, found.epoch) == ("cosine_distance", 60, 6)
    assert "the channels of stages.0.1 is 0.12 at epoch 6 and was up to 0.45 before" in found.text
    assert "Usually" in found.text and "optim.base_lr" in found.text


def test_channels_that_were_alike_from_the_start_are_warned_of_too() -> None:
    lines = evaluations("cosine_distance", [0.09] * 5, [0.48] * 5, [0.08] * 5, [0.05] * 5)
    found = collapsed_channels(lines)
    assert found is not None and found.step == 40
    assert "the channels of stages.0.3 and 2 others is 0.05" in found.text


def test_two_layers_that_collapse_are_one_warning() -> None:
    falling = [0.4, 0.4, 0.4, 0.1, 0.1]
    found = collapsed_channels(evaluations("cosine_distance", falling, [0.45, 0.4, 0.4, 0.1, 0.05]))
    assert found is not None and "stages.0.1 and of another layer is 0.05" in found.text


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.49, 0.47, 0.49, 0.48],
        [0.5, 0.45, 0.4, 0.35, 0.3],  # lower, but not far
        [0.05, 0.05, 0.3, 0.4, 0.45],  # the beginning
        [0.5, 0.5, 0.5, 0.05, 0.5],  # once
        [0.05, 0.05, 0.05],  # too short to say
        [],
    ],
)
def test_healthy_channels_are_not_warned_of(values: list[float]) -> None:
    assert collapsed_channels(evaluations("cosine_distance", values)) is None


def test_a_rank_that_falls_far_is_warned_of() -> None:
    found = collapsed_rank(evaluations("effective_rank", [1.05] * 5, [90, 60, 40, 15, 12]))
    assert found is not None and (found.kind, found.step) == ("effective_rank", 50)
    assert "the effective rank of stages.0.1 is 12 at epoch 5 and was up to 90 before" in found.text


def test_a_last_layer_that_gives_the_same_for_all_images_is_warned_of() -> None:
    found = collapsed_rank(evaluations("effective_rank", [3.0] * 5, [1.05] * 5))
    assert found is not None and "stages.0.1 is 1.05" in found.text


@pytest.mark.parametrize(
    "layers",
    [
        ([1.02] * 6, [93, 56, 40, 30, 25, 22]),  # early layers of plain images have a rank of one; ranks halve
        ([3] * 6, [1.01, 1.05, 2, 4, 8, 16]),  # it has just begun
        ([3] * 3, [1.0, 1.0, 1.0]),
    ],
)
def test_healthy_ranks_are_not_warned_of(layers: tuple[list[float], list[float]]) -> None:
    assert collapsed_rank(evaluations("effective_rank", *layers)) is None


def test_layers_that_some_lines_lack_are_passed_over() -> None:
    lines = evaluations("cosine_distance", [0.4, 0.4, 0.4, 0.1, 0.1])
    lines[2].pop("cosine_distance/stages.0.0")
    lines[2]["cosine_distance/stages.9.9"] = 0.4
    assert collapsed_channels(lines) is not None


# A loss that stands still


def noise(num: int, scale: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, num)


@pytest.mark.parametrize("drift", [0.0, 1e-5])
def test_a_loss_that_stands_still_or_rises_is_warned_of(drift: float) -> None:
    lines = training(0.9876 + drift * np.arange(600) + noise(600, 0.002))
    found = stalled(lines)
    assert found is not None and found.kind == "loss"
    assert 20 + 2 * health.LEAST_STRETCH <= found.step < 400
    assert "the loss stands still: it was 0.98" in found.text or "it was 0.99" in found.text
    assert "with the learning rate at 100% of its peak" in found.text
    assert "optim.base_lr" in found.text


@pytest.mark.parametrize(
    ("losses", "sound"),
    [
        ([], 0),
        ([1.0], 1),
        ([1.0, 0.99, 0.98, 1.01, 0.97], 5),  # noise
        ([1.0, 0.7, 0.5, 0.52], 4),
        ([1.0, 0.7, 0.5, 0.9, 1.0, 1.0], 3),  # nothing but the mean is predicted
        ([1.0, 0.7, 0.5, 40.0, 1e9], 3),
        ([1.0, 0.7, 0.5, 40.0, 0.6], 5),  # a spike that was overcome
        ([6.9, 0.02, 0.05, 3.0], 3),
        ([0.5, 0.49, 0.498], 3),  # goes on from other weights
        ([1.0, math.nan, "low", None, True, -1], 5),
    ],
)
def test_a_loss_is_sound_nearer_to_the_lowest_than_to_the_first(losses: list[Any], sound: int) -> None:
    lines = [{"step": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    assert health.last_sound_step(lines) == sound
    assert health.last_sound_step([*lines, {"step": 99, "val_loss": 0.1}]) == sound


@pytest.mark.parametrize("seed", range(10))
def test_a_loss_that_falls_slowly_in_noise_is_progress(seed: int) -> None:
    steps = np.arange(4000)
    # As masked pretraining looks: quick at first, then for ever slower; with noise far above the slope.
    losses = 0.6 + 0.4 * (1 + steps / 50) ** -0.3 + noise(4000, 0.01, seed)
    assert stalled(training(losses, cosine=True)) is None


def test_a_loss_that_stands_still_as_the_rate_runs_out_is_done() -> None:
    falling = np.linspace(1, 0.7, 900)
    losses = np.concatenate([falling, np.full(100, falling[-1])]) + noise(1000, 0.002)
    assert stalled(training(losses, cosine=True)) is None


@pytest.mark.parametrize("num", [0, 1, 50, 150])
def test_a_run_too_short_to_tell_and_the_warm_up_are_not_warned_of(num: int) -> None:
    assert stalled(training(np.full(num, 0.99))) is None
    assert stalled(training(np.full(2000, 0.99), warmup=2000)) is None


def test_noise_that_hides_what_happens_is_not_called_a_standstill() -> None:
    assert stalled(training(0.9 + noise(300, 0.2))) is None


# Starving for data


def test_a_device_that_waits_for_data_is_warned_of() -> None:
    found = starved(windows(0.9, 0.1, 0.5, 0.6, 0.7, 0.6, 0.6, 0.0))
    assert found is not None and (found.kind, found.step) == ("data", 70)
    assert "it waited for images 60% of the time up to step 70" in found.text
    assert "data.num_workers" in found.text


@pytest.mark.parametrize(
    "lines",
    [
        windows(*[0.29] * 50),
        windows(0.9, *[0.02] * 50),
        windows(*[0.9, 0.9, 0.9, 0.9, 0.1] * 5),  # an epoch that begins, or a stop and go, now and then
        windows(*[0.9] * 5),  # the first line is the start of the workers
        windows(*[0.9] * 50, seconds=0.1),  # a toy
        [{"step": 1, "epoch": 1, "loss": 1.0, "data_wait_s": 100.0}] * 20,  # of earlier versions
        [],
    ],
)
def test_a_device_that_is_fed_is_not_warned_of(lines: list[Line]) -> None:
    assert starved(lines) is None


# Together


def test_all_kinds_are_told_once_each_and_never_taken_back() -> None:
    lines = [
        a | b | c | d
        for a, b, c, d in zip(
            training(np.full(400, 0.99)),
            evaluations("cosine_distance", [0.5] * 200 + [0.1] * 100 + [0.5] * 100),
            evaluations("effective_rank", [50.0] * 300 + [2.0] * 100),
            windows(*[0.5] * 400),
            strict=True,
        )
    ]
    found = warnings(lines)
    assert [finding.kind for finding in found] == ["cosine_distance", "effective_rank", "loss", "data"]
    assert warnings(lines[:-50]) == found
    assert warnings([]) == []
