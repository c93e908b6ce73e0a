"""The demo's split and its choice of labels; the demo itself is run by `make demo`."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("elpv_dataset")
spec = importlib.util.spec_from_file_location("demo_run", Path(__file__).parents[1] / "demo" / "run.py")
assert spec is not None
assert spec.loader is not None
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def test_training_and_test_cells_are_whole_blocks_of_the_list() -> None:
    training, test = demo.split_blocks(2624)
    assert sorted(training + test) == list(range(2624))
    chosen = set(test)
    changes = sum((i in chosen) != (i + 1 in chosen) for i in range(2623))
    assert changes <= 2 * demo.TEST_BLOCKS
    assert len(test) == pytest.approx(2624 * demo.TEST_BLOCKS / demo.NUM_BLOCKS, abs=demo.TEST_BLOCKS)


def test_few_labels_keep_the_proportions_and_stay_in_training() -> None:
    paths, labels = demo.read_dataset()
    assert len(paths) == 2624
    assert all(path.is_file() for path in paths)
    training, _ = demo.split_blocks(len(paths))
    few = demo.few_labels(training, labels, 100, seed=0)
    assert len(few) == 100
    assert set(few) <= set(training)
    share = Counter(labels[i] for i in training)["defective"] / len(training)
    assert Counter(labels[i] for i in few)["defective"] == round(100 * share)
    assert few == demo.few_labels(training, labels, 100, seed=0) != demo.few_labels(training, labels, 100, seed=1)
