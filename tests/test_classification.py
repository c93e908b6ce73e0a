from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fcmae.classification import macro_auroc, scores, write_predictions


def test_scores_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]], np.float32)
    found = scores([0, 0, 1, 1], probabilities)
    assert found["top1"] == 0.75
    assert found["balanced_accuracy"] == 0.75  # recalls 1 and 1/2
    # Pairs (functional, defective) in the right order: .1 < .7, .1 < .2, .4 < .7, but not .4 < .2.
    assert found["auroc"] == 0.75
    assert found["val_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.7, 0.2]).mean(), rel=1e-5)
    assert "top5" not in found


def test_balanced_accuracy_weighs_classes_alike() -> None:
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 0, 0, 0, 0]]
    found = scores([0, 0, 0, 0, 1, 1], probabilities)
    assert found["top1"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == 0.5  # the third class does not occur and does not count
    assert "auroc" not in found


def test_top5_counts_the_five_best() -> None:
    probabilities = np.array([[0.25, 0.2, 0.15, 0.14, 0.13, 0.13 / 2, 0.13 / 2]] * 2, np.float32)
    assert scores([4, 5], probabilities)["top5"] == 0.5


def test_one_class_alone_has_no_auroc() -> None:
    assert "auroc" not in scores([1, 1], np.full((2, 2), 0.5, np.float32))


def test_auroc_of_many_classes_is_the_mean_of_each_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=60)
    probabilities = rng.dirichlet(np.ones(4), size=60).astype(np.float32)
    expected = roc_auc_score(labels, probabilities.astype(np.float64), multi_class="ovr", average="macro")
    assert scores(labels, probabilities)["auroc"] == macro_auroc(labels, probabilities) == pytest.approx(expected)
    # One class fewer in the labels: of those that occur, and not among the scores of a run, whose classes may vary.
    some = labels != 3
    each = [roc_auc_score(labels[some] == label, probabilities[some, label]) for label in range(3)]
    assert macro_auroc(labels[some], probabilities[some]) == pytest.approx(np.mean(each))
    assert "auroc" not in scores(labels[some], probabilities[some])


def test_probabilities_that_are_not_finite_reach_the_loss() -> None:
    found = scores([0, 1], np.full((2, 2), np.nan, np.float32))
    assert np.isnan(found["val_loss"])
    assert "auroc" not in found


def test_predictions_name_classes(tmp_path: Path) -> None:
    probabilities = np.array([[0.25, 0.75], [1, 3.2e-7]], np.float32)
    write_predictions(tmp_path / "p.csv", ["a, b.png", "c.png"], probabilities, ["cat", "dog"], [0, 1])
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "predicted", "probability", "p(cat)", "p(dog)"],
        ["a, b.png", "cat", "dog", "0.75", "0.25", "0.75"],
        ["c.png", "dog", "cat", "1", "1", "3.2e-07"],
    ]
