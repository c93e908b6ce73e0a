"""Probes of frozen features: nearest neighbours, a linear classifier, and one on few labels.

All read features row by row or in chunks, so features may be arrays on disk. None sees the labels of its test images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

from fcmae.data.sampler import epoch_order
from fcmae.data.split import draw, share_of_each

TEMPERATURE = 0.07  # of kNN's votes, as in DINO (arXiv 2104.14294)
TEST_ROWS = 2048  # rows of test features, and of training features, in one similarity matrix
TRAIN_ROWS = 16384


@torch.inference_mode()
def knn_probabilities(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    num_classes: int,
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    centre: NDArray[np.float32] | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, NDArray[np.float32]]:
    """Class probabilities by weighted votes of the k nearest training images, for each k.

    The vote of a neighbour at cosine similarity s has the weight exp(s / temperature), as in instance discrimination
    (arXiv 1805.01978, Sec. 3.4) and most papers since; DINO (arXiv 2104.14294) reports temperature .07 and k 20.

    Args:
        train: (N, D).
        train_labels: (N,) class indices.
        test: (M, D).
        num_classes: of the labels.
        ks: numbers of neighbours, each at most N.
        temperature: of the weights.
        centre: (D,), subtracted from features before cosines are taken; None is 0.
        device: where it is computed.

    Returns:
        (M, num_classes) by k, each row summing to 1.
    """
    assert max(ks) <= len(train)
    labels = torch.from_numpy(np.asarray(train_labels, np.int64)).to(device)
    middle = 0.0 if centre is None else torch.from_numpy(centre).to(device)
    found: dict[int, list[NDArray[np.float32]]] = {k: [] for k in ks}
    for query in _chunks(test, TEST_ROWS, device):
        query = F.normalize(query - middle)
        best = query.new_empty((len(query), 0))
        votes = labels.new_empty((len(query), 0))
        start = 0
        for rows in _chunks(train, TRAIN_ROWS, device):
            similarity = query @ F.normalize(rows - middle).T  # (M', N')
            nearest = similarity.topk(min(max(ks), len(rows)), dim=1)
            best = torch.cat([best, nearest.values], 1)
            votes = torch.cat([votes, labels[start + nearest.indices]], 1)
            best, order = best.topk(min(max(ks), best.shape[1]), dim=1)
            votes = votes.gather(1, order)
            start += len(rows)
        weights = ((best - best[:, :1]) / temperature).exp()  # the nearest has 1: no overflow at any temperature
        for k in ks:
            sums = query.new_zeros((len(query), num_classes)).scatter_add_(1, votes[:, :k], weights[:, :k])
            found[k].append((sums / sums.sum(1, keepdim=True)).cpu().numpy())
    return {k: np.concatenate(found.pop(k)) for k in list(found)}  # one at a time is there twice


def _chunks(features: NDArray[np.float32], rows: int, device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(features), rows):
        yield torch.tensor(features[start : start + rows], dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Setting:
    """Settings of the training of a linear probe.

    Attributes:
        lr: largest learning rate.
        l2: the penalty l2 / 2 * |weight|^2 is added to the mean cross-entropy.
    """

    lr: float
    l2: float


# Adding rates up to .1 and penalties down to 1e-6 changed the accuracy of five kinds of features of 10,000 photographs,
# of a trained, an untrained and no network, by at most .6 points (two seeds each).
GRID = tuple(Setting(lr, l2) for lr, l2 in product((1e-4, 1e-3, 1e-2), (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)))
DEFAULT = Setting(1e-3, 1e-1)  # if there is too little to choose by
HELD_OUT_SHARE = 0.2
BATCH_SIZE = 512
MIN_STEPS, MIN_EPOCHS = 1000, 20
MAX_WEIGHTS = 2**25  # of all settings that are trained at once: 128 MB, and several times that while training


@dataclass(frozen=True)
class LinearProbe:
    """Softmax regression on standardised features.

    Attributes:
        weight: (classes, D).
        bias: (classes,).
        mean: (D,), of the features.
        std: (D,), of the features.
        setting: what it was trained with.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    setting: Setting

    @torch.inference_mode()
    def probabilities(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(M, D) features to (M, classes), each row summing to 1."""
        device = self.weight.device
        parts = [
            F.linear((rows - self.mean) / self.std, self.weight, self.bias).softmax(1).cpu().numpy()
            for rows in _chunks(features, TEST_ROWS, device)
        ]
        return np.concatenate(parts)


def fit_linear(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    num_classes: int,
    *,
    positions: NDArray[np.int64] | None = None,
    class_weights: Tensor | None = None,
    grid: Sequence[Setting] = GRID,
    seed: int = 0,
    device: torch.device | str = "cpu",
    title: str | None = None,
) -> LinearProbe:
    """A linear classifier on the features, with learning rate and penalty chosen on a part of them.

    A stratified fifth is held out, all settings of the grid are trained on the rest, and the one with the least
    cross-entropy on the held-out fifth (a score that class imbalance does not distort) is trained again on everything.
    A class with one image keeps it for training; if all classes are such, nothing is chosen and DEFAULT is used.

    Args:
        features: (N, D), may lie on disk.
        labels: (N,) class indices.
        num_classes: of the labels.
        positions: the rows to use; None uses all.
        class_weights: (classes,), weight of each class in the cross-entropy, which chooses too; None is 1 for all.
        grid: the settings; a single one is used without a choice.
        seed: of the held-out part and the order.
        device: where it is trained, and where the probe is.
        title: of the progress bars; None shows none.
    """
    rows = np.arange(len(labels)) if positions is None else np.sort(positions)
    counts = np.bincount(labels[rows])
    held_counts = np.minimum(share_of_each(counts, HELD_OUT_SHARE), np.maximum(counts - 1, 0))
    if len(grid) == 1:
        setting = grid[0]
    elif not held_counts.any():
        setting = DEFAULT
    else:
        held = rows[draw(labels[rows], held_counts, seed)]
        kept = np.setdiff1d(rows, held)
        at_once = max(1, MAX_WEIGHTS // (num_classes * features.shape[1]))
        losses: list[float] = []
        for start in range(0, len(grid), at_once):
            part, progress = grid[start : start + at_once], title and f"{title}, choosing"
            trained = _train(features, labels, kept, num_classes, part, seed, device, progress, class_weights)
            losses += _losses(*trained, class_weights, features, labels, held).tolist()
        setting = grid[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]
    weight, bias, mean, std = _train(features, labels, rows, num_classes, [setting], seed, device, title, class_weights)
    return LinearProbe(weight[0], bias[0], mean, std, setting)


def _train(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    num_classes: int,
    settings: Sequence[Setting],
    seed: int,
    device: torch.device | str,
    title: str | None,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train a classifier for each setting, all on the same batches.

    Returns weight (G, classes, D), bias (G, classes), and mean and std (D,) of the features in `rows`.
    """
    mean, std = (values.to(device) for values in _statistics(features, rows))
    num_settings, dim = len(settings), features.shape[1]
    lr = torch.tensor([setting.lr for setting in settings], device=device).view(-1, 1, 1)
    l2 = torch.tensor([setting.l2 for setting in settings], device=device)
    # Adam's steps do not depend on the gradient's scale. So one optimizer with the rate 1 on weight / lr takes the
    # steps of rate lr on each weight.
    scaled = torch.zeros(num_settings, num_classes, dim + 1, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([scaled], lr=1.0, eps=1e-15, fused=True)
    batch_size = min(BATCH_SIZE, len(rows))
    per_epoch = len(rows) // batch_size
    num_steps = max(MIN_STEPS, MIN_EPOCHS * per_epoch)
    for step in trange(num_steps, desc=title, unit="step", disable=True if title is None else None, leave=False):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        if step == 0 or batch_size < len(rows):  # otherwise the batch is all rows, as in the step before
            if step % per_epoch == 0:
                order = epoch_order(len(rows), seed, step // per_epoch)
            first = step % per_epoch * batch_size
            batch = rows[np.sort(order[first : first + batch_size])]  # sorted: features on disk are read in order
            images = (torch.tensor(features[batch], dtype=torch.float32, device=device) - mean) / std  # (B, D)
            target = torch.from_numpy(labels[batch]).to(device).repeat_interleave(num_settings)
        unscaled = scaled * lr
        weight, bias = unscaled[..., :-1], unscaled[..., -1]
        logits = F.linear(images, weight.flatten(0, 1), bias.flatten()).view(len(batch), num_settings, num_classes)
        # The sum over the settings, whose gradients are independent.
        loss = F.cross_entropy(logits.flatten(0, 1), target, weight=class_weights, reduction="sum")
        loss = loss / len(batch) + (l2 * weight.square().sum((1, 2))).sum() / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found = scaled * lr
    return found[..., :-1], found[..., -1], mean, std


def _statistics(features: NDArray[np.float32], rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over the rows, (D,) float32; deviation 1 for one that does not vary."""
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for start in range(0, len(rows), TRAIN_ROWS):
        part = np.asarray(features[rows[start : start + TRAIN_ROWS]], np.float64)
        total += part.sum(0)
        squares += (part**2).sum(0)
    mean = total / len(rows)
    std = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))
    # Rounding in float32 is not variation.
    std[std <= 1e-6 * np.abs(mean)] = 1
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


@torch.inference_mode()
def _losses(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    std: Tensor,
    class_weights: Tensor | None,
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Mean cross-entropy of each setting's classifier on the rows, (G,), with the weights of the classes."""
    total = np.zeros(len(weight))
    for start in range(0, len(rows), TEST_ROWS):
        part = rows[start : start + TEST_ROWS]
        images = (torch.tensor(features[part], dtype=torch.float32, device=weight.device) - mean) / std
        target = torch.from_numpy(labels[part]).to(weight.device)
        for number in range(len(weight)):
            logits = F.linear(images, weight[number], bias[number])
            total[number] += float(F.cross_entropy(logits, target, weight=class_weights, reduction="sum"))
    return total / len(rows)


def few_shot_counts(label: str, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many images of each class an amount of labels stands for.

    Args:
        label: a share of each class ("1%"), at least one image of it, or a number of images per class ("5"), at most
            all of it.
        labels: (N,) class indices of all images.

    Returns:
        (classes,).

    Raises:
        ValueError: if `label` is neither.
    """
    counts = np.bincount(labels)
    number = label.removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if label.endswith("%") and 0 < value <= 100:
        return share_of_each(counts, value / 100)
    if number.isdecimal() and value >= 1 and not label.endswith("%"):
        return np.minimum(int(value), counts).astype(np.int64)
    raise ValueError(f"labels: {label!r} is neither a share such as 1% nor a number of images a class such as 5")


def mean_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % interval by Student's t, with one degree of freedom less than values; None for one value.

    The interval is symmetric about the mean; for few scores it may extend beyond 0..1.
    """
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, (mean - half, mean + half)
