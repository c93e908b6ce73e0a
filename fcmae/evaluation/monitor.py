"""Monitoring of an encoder during pretraining: its features on the same images at each evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fcmae.classification import scores
from fcmae.data.augment import Reading
from fcmae.data.dataset import centre_crops
from fcmae.data.find import find_labelled
from fcmae.data.index import Images, check_apart
from fcmae.data.sampler import EVAL_EPOCH
from fcmae.data.source import printable
from fcmae.data.split import evenly, split
from fcmae.evaluation.analysis import measure
from fcmae.evaluation.features import batches_of
from fcmae.evaluation.pictures import save_heat_map
from fcmae.evaluation.probes import knn_probabilities
from fcmae.networks.encoder import StagedEncoder
from fcmae.training import health

logger = logging.getLogger("fcmae")

MAX_LABELLED = 2000
TEST_SHARE = 0.25
NEIGHBOURS = 20
STATISTICS = ("cosine_distance", "effective_rank", "dead_share", "saturated_share")
HEAT_MAPS = {
    "cosine_distance": ("mean cosine distance of channel pairs (0: collapsed)", (0.0, 0.5)),
    "effective_rank": ("effective rank of the pooled output", None),
}


def find_monitored_labels(source: str, reading: Reading, seed: int) -> tuple[Images, Images]:
    """The labelled images of `monitor.labelled`: a quarter of each class held out, at most MAX_LABELLED in all.

    Args:
        source: see `find_labelled`.
        reading: how images are read for the network.
        seed: of the draw.

    Returns:
        Those that vote as nearest neighbours, and those that are classified.

    Raises:
        ValueError: if there are none or too few to hold any out, if an image is among both under two names, or if the
            first cannot be read as the network needs it.
    """
    key = "monitor.labelled"
    train, test = split(find_labelled(source, key=key), TEST_SHARE, seed)
    num_test = round(MAX_LABELLED * TEST_SHARE)
    train, test = (
        part.subset(evenly(len(part), n)) for part, n in ((train, MAX_LABELLED - num_test), (test, num_test))
    )
    if not len(test):
        raise ValueError(f"{key}: {source!r} has no class of two images or more: give more of them")
    check_apart(train, test, key)
    sample = centre_crops(reading, train)[(EVAL_EPOCH, 0)]
    if not sample.valid:
        name, reason = sample.bad[0]
        raise ValueError(f"{key}: {printable(name)} cannot be used: {reason}")
    return train, test


def monitored_images(held_out: Images, training: Images, num: int) -> Images:
    """Images to measure on: held-out ones first, then training images; each evenly spread.

    Args:
        held_out: the held-out part of a source.
        training: its training part.
        num: how many; if there are fewer, all.
    """
    first = evenly(len(held_out), num)
    return held_out.subset(first).joined(training.subset(evenly(len(training), num - len(first))))


class Monitor:
    """Measures an encoder as `fcmae analyze` and `fcmae evaluate` measure its checkpoint: dense, nothing is masked.

    Args:
        images: for the statistics of every block; may be empty.
        labelled: those that vote as nearest neighbours and those that are classified, or None.
        reading: of the images as the encoder takes them.
        device: the encoder's.
        batch_size: images at a time.
        num_workers: see `fcmae.data.loader.evaluation_loader`.
    """

    def __init__(
        self,
        images: Images,
        labelled: tuple[Images, Images] | None,
        reading: Reading,
        *,
        device: torch.device,
        batch_size: int,
        num_workers: int | None,
    ) -> None:
        self._images, self._labelled, self._reading = images, labelled, reading
        self._device, self._batch_size, self._num_workers = device, batch_size, num_workers

    @torch.no_grad()
    def measure(self, encoder: StagedEncoder) -> dict[str, float]:
        """Finite numbers by name: STATISTICS/LAYER of each block, knn_top1, knn_balanced_accuracy, knn_auroc.

        Args:
            encoder: in evaluation mode, on the device.
        """
        values: dict[str, float] = {}
        if self._images:
            layers, _ = measure(
                encoder,
                self._reading,
                self._images,
                device=self._device,
                batch_size=self._batch_size,
                num_workers=self._num_workers,
            )
            for statistic in STATISTICS:
                values |= {f"{statistic}/{name}": getattr(layer, statistic) for name, layer in layers.items()}
        if self._labelled is not None:
            values |= self._neighbours(encoder, *self._labelled)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _neighbours(self, encoder: StagedEncoder, voting: Images, classified: Images) -> dict[str, float]:
        """Scores of the last stage's features, averaged over each image; none if too few files can be read."""
        assert voting.class_names is not None
        num_classes = len(voting.class_names)
        (train, train_labels), (test, test_labels) = (self._pooled(encoder, i) for i in (voting, classified))
        if not len(train) or not len(test):
            return {}
        k = min(NEIGHBOURS, len(train))
        found = knn_probabilities(train, train_labels, test, num_classes, ks=[k], device=self._device)[k]
        names = ("top1", "balanced_accuracy", "auroc")
        return {f"knn_{name}": value for name, value in scores(test_labels, found).items() if name in names}

    def _pooled(self, encoder: StagedEncoder, labelled: Images) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        features, labels = [np.empty((0, 0), np.float32)], [np.empty(0, np.int64)]
        batches = batches_of(
            self._reading, labelled, device=self._device, batch_size=self._batch_size, num_workers=self._num_workers
        )
        for images, batch in batches:
            if len(images):
                features.append(encoder(images).float().mean((1, 2)).cpu().numpy())
                labels.append(batch.given_labels.numpy())
        return np.concatenate(features[1:] or features), np.concatenate(labels)


def over_time(lines: Sequence[Mapping[str, Any]], statistic: str) -> tuple[list[str], list[float], NDArray[np.float64]]:
    """A statistic of each layer at each evaluation.

    Args:
        lines: of metrics.jsonl.
        statistic: its name.

    Returns:
        Layers, epochs, and values (layers, epochs), NaN where there is none.
    """
    prefix = f"{statistic}/"
    found = [line for line in lines if any(name.startswith(prefix) for name in line)]
    names = list(dict.fromkeys(name for line in found for name in line if name.startswith(prefix)))
    values = np.array([[line.get(name, math.nan) for line in found] for name in names], np.float64)
    return [name.removeprefix(prefix) for name in names], [line["epoch"] for line in found], values


def draw_over_time(run: Path, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw RUN/NAME.png, layer by time, for each statistic of HEAT_MAPS that the lines have; returns their names."""
    drawn = []
    for statistic, (label, limits) in HEAT_MAPS.items():
        layers, epochs, values = over_time(lines, statistic)
        if layers:
            save_heat_map(run / f"{statistic}.png", layers, epochs, values, label, limits)
            drawn.append(statistic)
    return drawn


class Watch:
    """Logs each kind of warning once.

    The training loop itself warns when it waits for data, as it looks more often.

    Args:
        lines: of metrics.jsonl before a resume: what they show has been reported.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        self._known = {"data", *(finding.kind for finding in health.warnings(lines))}

    def look(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Warn of what the lines so far show for the first time."""
        for finding in health.warnings(lines):
            if finding.kind not in self._known:
                self._known.add(finding.kind)
                logger.warning(finding.text)
