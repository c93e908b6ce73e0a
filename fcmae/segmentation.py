"""Label maps of images of any size, their loss, and how good they are; shared by training and prediction."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter
from torch import Tensor

from fcmae.anytime import Anytime
from fcmae.data.arrays import in_units
from fcmae.data.maps import IGNORED
from fcmae.data.normalize import Normalize
from fcmae.data.rasters import Raster
from fcmae.heads import Segmenter

NEAR = 2  # pixels by which a boundary may be off and still count as found
HALO = NEAR + 1  # rows beside the counted ones, as whether a pixel is on a boundary depends on its neighbours
TINT = 0.5  # opacity of a class's colour over a picture

Result = TypeVar("Result")
Predict = Callable[[NDArray[np.float32] | NDArray[np.uint8], float], NDArray[np.float32]]


def segmentation_loss(logits: Tensor, target: Tensor, class_weights: Tensor | None = None, dice: float = 0.0) -> Tensor:
    """Cross-entropy of the pixels, plus the Dice loss of the images if it has a weight.

    Args:
        logits: (B, classes, H, W); or (exits, B, classes, H, W), whose losses are added up.
        target: (B, H, W) classes by number, IGNORED where they are unknown.
        class_weights: (classes,); None is 1 each.
        dice: weight of the Dice loss.

    Returns:
        A float32 scalar. The cross-entropy is divided by the number of all pixels, including unknown ones, so it does
        not depend on the micro-batches and processes into which a batch is divided.
    """
    if logits.ndim == 5:
        return torch.stack([segmentation_loss(each, target, class_weights, dice) for each in logits]).sum()
    target = target.long()
    total = F.cross_entropy(logits.float(), target, weight=class_weights, ignore_index=IGNORED, reduction="sum")
    loss = total / target.numel()
    return loss + dice * dice_loss(logits, target) if dice else loss


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|), averaged over the classes that are in an image, and then over the images.

    Source: V-Net, arXiv 1606.04797, Sec. 3, with sums in the denominator where it has squares.

    Args:
        logits: (B, classes, H, W).
        target: (B, H, W) classes by number, IGNORED where they are unknown.

    Returns:
        A float32 scalar in 0..1; an image without a known pixel adds 0.
    """
    known = (target != IGNORED)[:, None]
    probabilities = logits.float().softmax(1) * known  # (B, classes, H, W)
    truth = F.one_hot(target.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2) * known
    size = truth.sum((2, 3))  # (B, classes)
    lost = 1 - 2 * (probabilities * truth).sum((2, 3)) / (probabilities.sum((2, 3)) + size).clamp(min=1e-6)
    is_there = size > 0
    return ((lost * is_there).sum(1) / is_there.sum(1).clamp(min=1)).mean()


# Whole images, tile by tile


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along a side, so that they cover it and each overlaps the next by at least `overlap`.

    Args:
        length: length of the side.
        tile: length of a tile's side.
        overlap: share of a tile's side.
    """
    if length <= tile:
        return [0]
    step = max(1, tile - math.ceil(tile * overlap))
    return [*range(0, length - tile, step), length - tile]


def hann(size: int) -> NDArray[np.float32]:
    """Weights (size,) along a tile's side, largest in the middle and above 0 at its ends."""
    return (np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2).astype(np.float32)


class Strip(NamedTuple):
    """Class predictions for some rows of an image.

    Attributes:
        top: the first of them, from the top.
        probabilities: (classes, rows, width), which sum to 1 over the classes.
        is_seen: (rows, width), False where all bands of the image are missing.
    """

    top: int
    probabilities: NDArray[np.float32]
    is_seen: NDArray[np.bool_]


def probabilities_by_rows(
    raster: Raster,
    predict: Predict,
    tile: tuple[int, int],
    unit: int,
    overlap: float,
    fill: Sequence[float],
    at_once: int,
    limit_s: float = math.inf,
) -> Iterator[Strip]:
    """Class probabilities of an image, from overlapping tiles with Hann weights, some rows at a time.

    Memory holds the rows of one line of tiles, classes * tile height * image width * 4 bytes, and the image's own.

    Args:
        raster: the image.
        predict: maps tiles (n, C, h, w), as the raster gives them, and a time limit in seconds to (n, classes, h, w).
        tile: height and width of a tile; along a smaller image, the next multiple of `unit`.
        unit: total stride of the network.
        overlap: see `starts`.
        fill: (C,), padding around an image that is smaller than a tile.
        at_once: tiles that are predicted together.
        limit_s: time limit in seconds, shared by the tiles, see `predictor`.

    Yields:
        Strip after strip from the top.
    """
    sides = (raster.height, raster.width)
    th, tw = (min(side, -(-length // unit) * unit) for side, length in zip(tile, sides, strict=True))
    ys, xs = (starts(length, side, overlap) for length, side in zip(sides, (th, tw), strict=True))
    within_s = limit_s / (len(ys) * len(xs))
    weight = hann(th)[:, None] * hann(tw)  # (th, tw)
    sums: NDArray[np.float32] | None = None
    weights = np.zeros((th, raster.width), np.float32)
    for y, following in zip(ys, [*ys[1:], raster.height], strict=True):
        rows = min(th, raster.height - y)
        pixels = raster.read((y, 0, rows, raster.width))
        band, is_seen = pixels.values, pixels.is_seen  # (C, rows, width); (rows, width) or None
        for first in range(0, len(xs), at_once):
            places = xs[first : first + at_once]
            tiles = np.stack([padded(band[:, :, x : x + tw], (th, tw), fill) for x in places])
            found = predict(tiles, within_s * len(places))
            if sums is None:
                sums = np.zeros((found.shape[1], th, raster.width), np.float32)
            for x, tile_found in zip(places, found, strict=True):
                columns = min(tw, raster.width - x)
                sums[:, :rows, x : x + columns] += (tile_found * weight)[:, :rows, :columns]
                weights[:rows, x : x + columns] += weight[:rows, :columns]
        assert sums is not None
        done = following - y
        found = np.divide(sums[:, :done], weights[:done], dtype=np.float32)
        yield Strip(y, found, np.ones((done, raster.width), np.bool_) if is_seen is None else is_seen[:done])
        for buffer in (sums, weights):
            buffer[..., : th - done, :] = buffer[..., done:, :].copy()
            buffer[..., th - done :, :] = 0


def check_sides(key: str, sides: Iterable[int], unit: int) -> None:
    """Refuse a size that is not a multiple of the total stride: the maps of the network's stages would not align.

    Args:
        key: the setting.
        sides: of crops or tiles, in pixels.
        unit: total stride of the network.

    Raises:
        ValueError: if a side is not a multiple of it.
    """
    for side in sides:
        if side % unit:
            nearest = max(1, round(side / unit)) * unit
            raise ValueError(f"{key}: {side} is not a multiple of the total stride {unit}: use {nearest}")


def each_image(function: Callable[[int], Result], which: Iterable[int], num_threads: int) -> Iterator[Result]:
    """The results of a function for images, in order: one is decoded and counted while another is predicted.

    Args:
        function: takes the number of an image; an error is raised here in place of its result.
        which: numbers of the images.
        num_threads: images at a time; below 2 no thread is started.
    """
    if num_threads < 2:
        yield from map(function, which)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        yield from pool.map(function, which)


def padded(tile: NDArray[np.float32], size: tuple[int, int], fill: Sequence[float]) -> NDArray[np.float32]:
    """A tile padded below and to the right with the values that stand for missing ones.

    Args:
        tile: (C, h, w), uint8 or float32.
        size: height and width of the result.
        fill: (C,), what stands for missing values, in units of a full range of 1.
    """
    if tile.shape[1:] == size:
        return tile
    whole: NDArray[Any] = np.broadcast_to(in_units(fill, tile.dtype), (len(tile), *size)).copy()
    whole[:, : tile.shape[1], : tile.shape[2]] = tile
    return whole


def predictor(
    model: Segmenter,
    normalize: Normalize,
    accelerator: Accelerator,
    tau: float | None = None,
    budget: float | None = None,
) -> Predict:
    """Make the function that gives a model's softmax outputs for tiles, within a time limit if the model can stop.

    Threads that call it at the same time take turns.

    Args:
        model: in evaluation mode, on the accelerator's device.
        normalize: on that device.
        accelerator: of this process.
        tau: for a model that can stop, see `Anytime.anytime`.
        budget: for a model that can stop, see `Anytime.anytime`.
    """
    turn = Lock()  # the device's memory is for one batch

    @torch.no_grad()
    def predict(tiles: NDArray[np.float32] | NDArray[np.uint8], limit_s: float = math.inf) -> NDArray[np.float32]:
        with turn, accelerator.autocast():
            images = normalize(torch.from_numpy(tiles).to(accelerator.device))
            # forward, as calling a compiled model would compile it again for another size
            logits = model.within(images, tau, budget, limit_s) if isinstance(model, Anytime) else model.forward(images)
            found: NDArray[np.float32] = logits.float().softmax(1).cpu().numpy()
        return found

    return predict


# How good they are


class Scores:
    """Agreement of label maps with the true ones, by pixels and by boundaries.

    Attributes:
        confusion: (classes, classes) int64, numbers of pixels by true and predicted class.
        boundaries: (classes, 4) int64. Counts per class: predicted boundary pixels; those within NEAR of a true one;
            true boundary pixels; those within NEAR of a predicted one.
        loss: sum of the pixels' cross-entropy, in nats.

    Args:
        num_classes: of the maps.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.boundaries = np.zeros((num_classes, 4), np.int64)
        self.loss = 0.0

    def merge(self, other: Scores) -> None:
        """Add the counts of another."""
        self.confusion += other.confusion
        self.boundaries += other.boundaries
        self.loss += other.loss

    def add(self, strips: Iterable[tuple[NDArray[np.float32], NDArray[np.int16]]]) -> None:
        """Count an image.

        Args:
            strips: from the top, probabilities (classes, rows, width) and classes (rows, width), IGNORED where they are
                unknown.
        """
        kept: NDArray[np.int16] | None = None  # (2, rows, width): predicted and true classes
        counted = 0  # rows of it whose boundaries are counted
        for probabilities, truth in strips:
            predicted = probabilities.argmax(0).astype(np.int16)
            known = truth != IGNORED
            num = len(self.confusion)
            pairs = truth[known].astype(np.int64) * num + predicted[known]
            self.confusion += np.bincount(pairs, minlength=num * num).reshape(num, num)
            chosen = np.take_along_axis(probabilities, np.maximum(truth, 0)[None].astype(np.int64), 0)[0]
            self.loss -= float(np.log(np.maximum(chosen[known], 1e-12), dtype=np.float64).sum())
            both = np.stack([predicted, truth])
            kept = both if kept is None else np.concatenate([kept, both], axis=1)
            end = max(counted, kept.shape[1] - HALO)
            self._count_boundaries(kept, counted, end)
            drop = max(0, end - HALO)
            kept, counted = kept[:, drop:], end - drop
        if kept is not None:
            self._count_boundaries(kept, counted, kept.shape[1])

    def _count_boundaries(self, both: NDArray[np.int16], first: int, end: int) -> None:
        if first == end:
            return
        (predicted, truth), known = both, both[1] != IGNORED
        edges = [boundary(labels, known) for labels in both]
        for label in np.unique(both[:, first:end]):
            if label == IGNORED:
                continue
            found, there = (edge & (labels == label) for edge, labels in zip(edges, (predicted, truth), strict=True))
            near = [maximum_filter(edge, 2 * NEAR + 1) for edge in (there, found)]
            parts = (found, found & near[0], there, there & near[1])
            self.boundaries[label] += [int(part[first:end].sum()) for part in parts]

    def values(self, class_names: Sequence[str]) -> dict[str, float]:
        """The usual scores, each in 0..1 except the loss.

        Args:
            class_names: of the classes.

        Returns:
            By name: val_loss, the mean cross-entropy in nats; miou, the mean over the classes that are true or
            predicted somewhere, and iou/NAME for each class; largest_class_miou, of the largest class everywhere;
            pixel_accuracy; boundary_f1, the mean over the classes that have a boundary.
        """
        right = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        num, there = max(1, int(self.confusion.sum())), union > 0
        iou = right[there] / union[there]
        found = {"val_loss": self.loss / num, "miou": float(iou.mean()) if len(iou) else 0.0}
        true = self.confusion.sum(1)
        found["largest_class_miou"] = float(true.max() / num / max(1, np.count_nonzero(true)))
        found["pixel_accuracy"] = float(right.sum() / num)
        num_found, close, num_true, met = self.boundaries[self.boundaries[:, [0, 2]].sum(1) > 0].T
        precision, recall = close / np.maximum(num_found, 1), met / np.maximum(num_true, 1)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        found["boundary_f1"] = float(f1.mean()) if len(f1) else 1.0
        names = [name for name, is_there in zip(class_names, there, strict=True) if is_there]
        return found | {f"iou/{name}": float(value) for name, value in zip(names, iou, strict=True)}


def boundary(labels: NDArray[np.int16], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels with a pixel of another class above, below, left or right of them, both known.

    Args:
        labels: (H, W).
        known: (H, W).
    """
    edge = np.zeros(labels.shape, np.bool_)
    for one, other in (((slice(1, None), ...), (slice(-1), ...)), ((..., slice(1, None)), (..., slice(-1)))):
        differ = (labels[one] != labels[other]) & known[one] & known[other]
        edge[one] |= differ
        edge[other] |= differ
    return edge


# What they look like


def colours(num_classes: int) -> NDArray[np.uint8]:
    """(num_classes, 3), far apart in hue for neighbours in number."""
    hues = [(0.6 + i * 0.618034) % 1 for i in range(num_classes)]
    found = np.array([colorsys.hsv_to_rgb(hue, 0.85, 1 - 0.15 * (i % 3)) for i, hue in enumerate(hues)])
    palette: NDArray[np.uint8] = np.rint(found * 255).astype(np.uint8)
    return palette


def overlay(picture: NDArray[np.float32], labels: NDArray[np.integer]) -> NDArray[np.float32]:
    """A picture tinted by its classes, black where they are unknown.

    Args:
        picture: (H, W) or (H, W, 3) in 0..1.
        labels: (H, W) classes by number.

    Returns:
        (H, W, 3) in 0..1.
    """
    rgb = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    palette = colours(int(max(labels.max(), 0)) + 1).astype(np.float32) / 255
    tinted = (1 - TINT) * rgb.mean(2, keepdims=True) + TINT * palette[np.maximum(labels, 0)]
    return np.where((labels == IGNORED)[..., None], 0, tinted).astype(np.float32)
