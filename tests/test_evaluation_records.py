"""The scores of evaluations stand side by side."""

from __future__ import annotations

from typing import Any

from fcmae.evaluation.records import score_rows


def test_rows_of_scores_show_intervals_and_gaps() -> None:
    few: dict[str, Any] = {"probe": "few-shot", "stage": 4, "setting": {"labels": "5", "num_images": 10, "draws": 3}}
    few |= {"scores": {"top1": 0.5, "balanced_accuracy": 0.25}, "spread": {"top1": [0.4, 0.6]}}
    assert score_rows([{"model": "m", "results": [few]}]) == [
        ["linear, 5 a class (10 labels)", "4", "m", "0.500 [0.400, 0.600]", "0.250", "-"]
    ]


def test_what_models_are_compared_by_stands_together() -> None:
    results = [
        {"probe": "knn", "stage": 4, "setting": {"k": k, "temperature": 0.07}, "scores": {"top1": k / 100}}
        for k in (10, 20)
    ]
    rows = score_rows([{"model": model, "results": results} for model in ("a", "b")])
    assert [row[:4] for row in rows] == [
        [f"kNN, k = {k}", "4", model, f"{k / 100:.3f}"] for k in (10, 20) for model in ("a", "b")
    ]
