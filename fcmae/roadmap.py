"""The steps from ResNet to ConvNeXt side by side: what each changes, its cost and its accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import TypedDict

from fcmae.evaluation.paired import in_percent
from fcmae.evaluation.probes import mean_and_interval
from fcmae.evaluation.records import Count, Share
from fcmae.evaluation.runs import read_json
from fcmae.heads import Classifier
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import REGIMES, NetworkSpec, road
from fcmae.tables import table


class Score(TypedDict):
    """The score of one run of the network after a step.

    Attributes:
        step: name of the step.
        seed: random seed of the run.
        top1: accuracy on the test images.
    """

    step: str
    seed: Count
    top1: Share


class Found(TypedDict):
    """What is read of the study's file.

    Attributes:
        regime: whose steps were trained.
        data: what they were trained on.
        scores: of its finished runs.
    """

    regime: str
    data: str
    scores: Annotated[list[Score], Field(min_length=1)]


FOUND = TypeAdapter(Found)


class Cost(NamedTuple):
    """Cost of a network.

    Attributes:
        multiply_adds: of the convolutions and Linears, for one image.
        params: number of parameters.
    """

    multiply_adds: int
    params: int


@cache
def cost(spec: NetworkSpec, image_size: int = 224, num_classes: int = 1000) -> Cost:
    """The cost of a classifier, counted without computing anything.

    Args:
        spec: of its encoder, which sees RGB.
        image_size: side of the image, in pixels.
        num_classes: outputs.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Classifier(make_encoder(spec), num_classes).eval()
        model(torch.empty(1, 3, image_size, image_size))
    return Cost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


def listing(regime: str, ours: Path | None = None) -> str:
    """The table of a regime's steps.

    Args:
        regime: one of REGIMES.
        ours: a file of `studies/roadmap.py`; None leaves out the results of its runs.

    Raises:
        ValueError: if there is no such file, or it is not one of the study's.
    """
    header = ["variant", "what changes", "GMACs", "params, M", "published, %"]
    if ours is None:
        return table(header, [row[:-1] for row in _rows(regime, {})], left=2)
    found = read_study(ours)
    return table([*header, f"{found['regime']}, {found['data']}: %"], _rows(regime, scores_of(found)), left=2)


def _rows(regime: str, found: dict[str, list[float]]) -> Iterator[list[str]]:
    numbers = REGIMES[regime]
    for step in road(numbers):
        counted = cost(step.spec)
        row = [f"{regime}/{step.name}", step.line, f"{counted.multiply_adds / 1e9:.2f}", f"{counted.params / 1e6:.2f}"]
        if step.of == "" and numbers.own_recipe is not None:
            yield [*row[:1], f"{step.line}, by a recipe of its own", *row[2:], f"{numbers.own_recipe:.1f}", ""]
        published = numbers.published.get(step.name)
        yield [*row, "" if published is None else f"{published:.1f}", percent(found.get(step.name, []))]


def percent(values: list[float]) -> str:
    """Mean of shares in %, and its 95 % interval in brackets; empty without any."""
    return in_percent(mean_and_interval(values), ".1f") if values else ""


def read_study(path: Path) -> Found:
    """Read the results of the study.

    Args:
        path: the file that `studies/roadmap.py` writes.

    Raises:
        ValueError: if there is no such file, or it is not one of the study's.
    """
    if not path.is_file():
        raise ValueError(f"ours = {path} does not exist: give the JSON file that studies/roadmap.py writes")
    problems: list[str] = []
    found: Found | None = read_json(path, FOUND, "give the JSON file that studies/roadmap.py writes", problems)
    if found is None:
        raise ValueError(f"ours: {problems[0]}")
    return found


def scores_of(found: Found) -> dict[str, list[float]]:
    """The accuracies of the study's runs, by step.

    Args:
        found: by the study.
    """
    scores: dict[str, list[float]] = {}
    for score in found["scores"]:
        scores.setdefault(score["step"], []).append(score["top1"])
    return scores
