"""What evaluation.json says, as rows of a table: for the terminal, table.md and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SCORES = ("top1", "balanced_accuracy", "auroc")  # in tables; the file has top5 too
COLUMNS = ("probe", "stage", "model", "top-1", "balanced accuracy", "AUROC")


def score_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The scores of several evaluations on the same images, a row a model and probe, in the columns of COLUMNS.

    What the models are compared by stands together: the same probe with the same setting on the same stage.
    """
    rows: dict[tuple[str, int], list[list[str]]] = {}
    for record in records:
        for result in record["results"]:
            probe, stage, setting = result["probe"], result["stage"], result["setting"]
            if probe == "knn":
                probe = f"kNN, k = {setting['k']}"
            elif probe == "few-shot":
                amount = setting["labels"] if setting["labels"].endswith("%") else f"{setting['labels']} a class"
                probe = f"linear, {amount} ({setting['num_images']} labels)"
            cells = [_cell(result, name) for name in SCORES]
            rows.setdefault((probe, stage), []).append([probe, str(stage), record["model"], *cells])
    return [row for group in rows.values() for row in group]


def _cell(result: dict[str, Any], name: str) -> str:
    if name not in result["scores"]:
        return "-"
    text = f"{result['scores'][name]:.3f}"
    if name in result.get("spread", {}):
        low, high = result["spread"][name]
        text += f" [{low:.3f}, {high:.3f}]"
    return text
