"""What kNN and a linear classifier make of the raw pixels: the least that features must beat.

    python studies/pixels.py TRAIN.csv TEST.csv OUT --side 32

Each image is resized to 32 x 32 pixels, whose values are the features; the probes are those of `fcmae evaluate`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcmae.atomic import write_text
from fcmae.classification import scores
from fcmae.data.augment import CenterCrop
from fcmae.data.dataset import FinetuneDataset
from fcmae.data.index import Images, find_labelled
from fcmae.data.sampler import EVAL_EPOCH
from fcmae.evaluation.probes import fit_linear, knn_probabilities

KS = (10, 20, 100, 200)


def pixels(index: Images, side: int, in_chans: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(N, C * side * side) in 0..1, and labels (N,)."""
    assert index.labels is not None
    images = FinetuneDataset(index, CenterCrop(in_chans, (side, side), 1.0), seed=0)
    found = np.stack([images[(EVAL_EPOCH, i)].image for i in range(len(index))])
    return found.reshape(len(index), -1).astype(np.float32) / np.float32(255), index.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="CSV file or folder of classes")
    parser.add_argument("test", help="the same, to test on")
    parser.add_argument("out", type=Path, help="folder for evaluation.json")
    parser.add_argument("--side", type=int, default=32, help="pixels that each image is resized to [32]")
    parser.add_argument("--in-chans", type=int, default=3, help="channels [3]")
    args = parser.parse_args()
    train_index = find_labelled(args.train)
    test_index = find_labelled(args.test, train_index.class_names)
    assert train_index.class_names is not None
    num_classes = len(train_index.class_names)
    train, train_labels = pixels(train_index, args.side, args.in_chans)
    test, test_labels = pixels(test_index, args.side, args.in_chans)
    results: list[dict[str, Any]] = []
    for k, found in knn_probabilities(train, train_labels, test, num_classes, ks=KS).items():
        results.append({"probe": "knn", "setting": {"k": k}, "scores": scores(test_labels, found)})
    probe = fit_linear(train, train_labels, num_classes)
    setting = {"lr": probe.setting.lr, "l2": probe.setting.l2}
    results.append({"probe": "linear", "setting": setting, "scores": scores(test_labels, probe.probabilities(test))})
    write_text(args.out / "evaluation.json", json.dumps({"results": results}, indent=1))
    for result in results:
        print(result)


if __name__ == "__main__":
    main()
