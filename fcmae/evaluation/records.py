"""The content of evaluation.json as rows of a table: for the terminal, table.md and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

SCORES = ("top1", "balanced_accuracy", "auroc")  # in tables; the file has top5 too
COLUMNS = ("probe", "stage", "model", "top-1", "balanced accuracy", "AUROC")


Count = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]


class Result(TypedDict):
    """The result of one probe on one stage, with the scores by name."""

    probe: Literal["knn", "linear", "few-shot"]
    stage: int | None
    setting: dict[str, Any]
    scores: dict[str, Share]
    spread: NotRequired[dict[str, tuple[float, float]]]


class Data(TypedDict):
    """The training and test images."""

    train: str
    test: str
    num_train: Count
    num_test: Count
    class_names: Annotated[list[str], Field(min_length=1)]


class Confusion(TypedDict):
    """How many test images of each class (row) were predicted as each class (column)."""

    matrix: list[list[Count]]


class EvaluationRecord(TypedDict):
    """What is read from an evaluation.json."""

    model: str
    data: Data
    results: list[Result]
    confusion: Confusion | None
    command: NotRequired[str]
    num_stages: NotRequired[Count]
    step: NotRequired[Count | None]


def score_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The scores of several evaluations on the same images, one row per model and probe, in the columns of COLUMNS.

    Rows to compare are adjacent: the same probe with the same setting on the same stage. Models without stages come
    after the stages.
    """
    rows: dict[str, dict[int | None, list[list[str]]]] = {}
    for record in records:
        for result in record["results"]:
            probe, stage, setting = result["probe"], result["stage"], result["setting"]
            if probe == "knn":
                probe = f"kNN, k = {setting.get('k')}"
            elif probe == "few-shot":
                amount = str(setting.get("labels"))
                amount += "" if amount.endswith("%") else " a class"
                probe = f"linear, {amount} ({setting.get('num_images')} labels)"
            cells = [_cell(result, name) for name in SCORES]
            row = [probe, "-" if stage is None else str(stage), record["model"], *cells]
            rows.setdefault(probe, {}).setdefault(stage, []).append(row)
    return [row for of_probe in rows.values() for stage in sorted(of_probe, key=_last) for row in of_probe[stage]]


def _last(stage: int | None) -> float:
    return math.inf if stage is None else stage


def _cell(result: Mapping[str, Any], name: str) -> str:
    if name not in result["scores"]:
        return "-"
    text = f"{result['scores'][name]:.3f}"
    if name in result.get("spread", {}):
        low, high = result["spread"][name]
        text += f" [{low:.3f}, {high:.3f}]"
    return text
