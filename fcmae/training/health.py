"""Warnings in plain words, from metrics.jsonl: features collapse, the loss stands still, data starve the device.

Pure functions: while a run trains they are asked of what there is so far, and a report asks them of all of it. A line
without what a warning needs, as earlier versions wrote them, is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

Lines = Sequence[Mapping[str, Any]]

# Untrained and healthy networks are between .4 and .5, and a V1 encoder that collapsed is near .1 (arXiv 2301.00808,
# Fig. 4). An effective rank goes up and down by a factor of two or three in healthy runs.
LEAST_DISTANCE, LEAST_DISTANCE_KEPT = 0.1, 0.5
LEAST_RANK, LEAST_RANK_KEPT = 1.1, 0.2
LEAST_EVALUATIONS = 4  # below that nothing is said: the first ones are of a network that has hardly begun

NOISY_LOSS = 1.02  # times the lowest

LEAST_PROGRESS = 0.001  # of the loss, from one half of a stretch to the other
LEAST_STRETCH = 80  # lines
NOISE = 3.0  # standard errors within which a difference may be chance
NEAR_ZERO_LR = 0.1  # of the peak

STARVED_SHARE = 0.3
STARVED_WINDOWS = 5
STARVED_S = 10.0  # waited in these windows: less is start-up, or a run too short to matter


class Finding(NamedTuple):
    """Something that is wrong with a run.

    Attributes:
        kind: cosine_distance, effective_rank, loss or data.
        step, epoch: of the line that first showed it.
        text: what was seen, what it usually means and what to do, in sentences.
    """

    kind: str
    step: int
    epoch: float
    text: str


def warnings(lines: Lines) -> list[Finding]:
    """What the lines of metrics.jsonl, in order, show to be wrong: each kind once, where it first showed."""
    found = (collapsed_channels(lines), collapsed_rank(lines), stalled(lines), starved(lines))
    return [finding for finding in found if finding is not None]


def collapsed_channels(lines: Lines) -> Finding | None:
    """Whether in two evaluations running a layer's cosine distance was below .1, or below half its highest before."""
    seen = _first_low(lines, "cosine_distance", LEAST_DISTANCE, LEAST_DISTANCE_KEPT, only_last_layer=False)
    if seen is None:
        return None
    layer, others, highest, line = seen
    text = (
        f"features collapse: the cosine distance between the channels of {layer}{others} is "
        f"{line[f'cosine_distance/{layer}']:.3g} at epoch {line['epoch']:.4g} and was up to {highest:.3g} before; 0 "
        "means that all channels show the same. Usually the encoder has no GRN (V1), or the learning rate is too high. "
        "Look at cosine_distance.png and the activations that `fcmae analyze` draws; take a V2 variant, a lower "
        "optim.base_lr or a longer optim.warmup_epochs."
    )
    return Finding("cosine_distance", line["step"], line["epoch"], text)


def collapsed_rank(lines: Lines) -> Finding | None:
    """Whether in two evaluations running a layer's effective rank was below a fifth of its highest before.

    Or that of the last layer below 1.1.
    """
    seen = _first_low(lines, "effective_rank", LEAST_RANK, LEAST_RANK_KEPT, only_last_layer=True)
    if seen is None:
        return None
    layer, others, highest, line = seen
    text = (
        f"features collapse: the effective rank of {layer}{others} is {line[f'effective_rank/{layer}']:.3g} at epoch "
        f"{line['epoch']:.4g} and was up to {highest:.3g} before; 1 means that all images give the same features but "
        "for their size. Usually the learning rate is too high, or the images are nearly all alike. Look at "
        "effective_rank.png and at what `fcmae evaluate` makes of the checkpoint; take a lower optim.base_lr or a "
        "longer optim.warmup_epochs."
    )
    return Finding("effective_rank", line["step"], line["epoch"], text)


def _first_low(
    lines: Lines, metric: str, least: float, kept: float, *, only_last_layer: bool
) -> tuple[str, str, float, Mapping[str, Any]] | None:
    """The lowest layer of the first evaluation at which layers were low twice, how many others, its highest, the line.

    least: low in itself, for any layer or for the last one only. kept: low as a share of the layer's highest value
    before.
    """
    evaluations = [line for line in lines if any(name.startswith(f"{metric}/") for name in line)]
    layers = list(dict.fromkeys(name for line in evaluations for name in line if name.startswith(f"{metric}/")))
    highest: dict[str, float] = {}
    low_before: set[str] = set()
    for number, line in enumerate(evaluations, start=1):
        low = set()
        for name in layers:
            if (value := line.get(name)) is None:
                continue
            bound = least if name == layers[-1] or not only_last_layer else 0.0
            if value < max(bound, kept * highest.get(name, 0.0)):
                low.add(name)
            highest[name] = max(value, highest.get(name, 0.0))
        if number >= LEAST_EVALUATIONS and (both := low & low_before):
            worst = min(both, key=lambda name: line[name] / max(highest[name], least))
            others = {1: "", 2: " and of another layer"}.get(len(both), f" and {len(both) - 1} others")
            return worst.partition("/")[2], others, highest[worst], line
        low_before = low
    return None


def last_sound_step(lines: Lines) -> int:
    """The step of the last line whose loss is sound: far from the first one, or near the lowest.

    On a scale of ratios it lies no higher than halfway from the lowest loss to the first one, or within 2 % of the
    lowest, which is noise where it has hardly begun to fall. A run that diverges leaves that for good, long
    before its loss is not finite. 0 without any.
    """
    found = [(line["step"], line["loss"]) for line in lines if _is_positive(line.get("loss"))]
    if not found:
        return 0
    lowest = min(loss for _, loss in found)
    bound = max(math.sqrt(found[0][1] * lowest), NOISY_LOSS * lowest)
    return int(max(step for step, loss in found if loss <= bound))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def stalled(lines: Lines) -> Finding | None:
    """Whether the training loss stood still over the later half of the time since the warm-up.

    That half is halved again: the mean loss of its two parts must differ by less than .1 %, or have risen, by more than
    chance (three standard errors of lines around their means), with the learning rate above a tenth of its peak.
    """
    found = [line for line in lines if "loss" in line and "lr" in line]
    loss, lr = (np.array([line[name] for line in found], dtype=np.float64) for name in ("loss", "lr"))
    if len(found) < 2 * LEAST_STRETCH:
        return None
    peak = int(lr.argmax())
    end = np.arange(peak + 2 * LEAST_STRETCH, len(found) + 1)  # a line may be the last one of a stretch
    start = peak + (end - peak) // 2
    middle = (start + end) // 2
    # Sums around the mean: no digits are lost to squares.
    centre = loss.mean()
    sums, squares = (np.concatenate([[0.0], np.cumsum(values)]) for values in (loss - centre, (loss - centre) ** 2))

    def part(first: np.ndarray[Any, Any], last: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """Mean of the lines from first to last, less the centre, and its squared standard error."""
        num = last - first
        mean = (sums[last] - sums[first]) / num
        variance = np.maximum((squares[last] - squares[first]) / num - mean**2, 0)
        return mean, variance / num

    (before, error_before), (after, error_after) = part(start, middle), part(middle, end)
    most = before - after + NOISE * np.sqrt(error_before + error_after)
    still = (most < LEAST_PROGRESS * np.abs(centre + before)) & (lr[end - 1] > NEAR_ZERO_LR * lr.max())
    if not still.any():
        return None
    first = int(still.argmax())
    line, since = found[int(end[first]) - 1], found[int(start[first])]
    text = (
        f"the loss stands still: it was {centre + before[first]:.4f} on average from epoch {since['epoch']:.4g} on and "
        f"is {centre + after[first]:.4f} up to epoch {line['epoch']:.4g}, with the learning rate at "
        f"{line['lr'] / lr.max():.0%} of its peak. Usually the rate does not suit (try optim.base_lr three times lower "
        "and three times higher, for a few epochs each), or the images hold no more to learn. Pretraining with "
        "standardised targets starts at 1, which is to predict each patch's mean; look at reconstructions/."
    )
    return Finding("loss", line["step"], line["epoch"], text)


def starved(lines: Lines) -> Finding | None:
    """Whether the device stood still for want of data in more than 30 % of each of 5 lines' time running.

    They must have waited 10 seconds in all. The first line, which has the start of the workers in it, does not count.
    """
    found = list(islice((line for line in lines if "data_wait_share" in line), 1, None))
    run = 0
    for number, line in enumerate(found, start=1):
        run = run + 1 if line["data_wait_share"] > STARVED_SHARE else 0
        windows = found[number - STARVED_WINDOWS : number]
        if run >= STARVED_WINDOWS and sum(window.get("data_wait_s", 0.0) for window in windows) >= STARVED_S:
            share = sum(window["data_wait_share"] for window in windows) / STARVED_WINDOWS
            text = (
                f"data starves the device: it waited for images {share:.0%} of the time up to step {line['step']}. "
                "Usually they are decoded more slowly than the model trains. Raise data.num_workers up to the cores of "
                "this machine, store the images smaller (the shorter side a little above data.image_size) and on a "
                "local disk, or pretrain with data.masks_per_image 2; `fcmae bench` times it."
            )
            return Finding("data", line["step"], line["epoch"], text)
    return None
