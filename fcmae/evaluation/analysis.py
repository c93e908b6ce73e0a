"""Statistics of a ConvNeXt's channels, block by block: diversity, dead and saturated ones, rank, class selectivity.

A layer is a block of the encoder with nothing hidden, by the name stages.I.J; its features are the expanded ones as
its second Linear sees them, after GRN in V2. Images are streamed: memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fcmae.data.augment import Reading
from fcmae.data.index import Images
from fcmae.data.split import evenly
from fcmae.evaluation.features import BATCH_SIZE, batches_of
from fcmae.layouts import DENSE
from fcmae.layouts.norms import at_least_float32, l2_norm
from fcmae.networks.encoder import StageBlock, StagedEncoder
from fcmae.networks.layers import GRN

DEAD_RMS = 0.01  # of the median channel's
SATURATED_STD = 0.1  # of the channel's own absolute mean


class Passed(NamedTuple):
    """A block that images have passed through.

    Attributes:
        name: of the block, stages.I.J.
        block: the block itself.
        input: (B, h, w, C).
        expanded: (B, h, w, hidden), as the block's last Linear sees them.
        output: (B, h, w, C).
    """

    name: str
    block: StageBlock
    input: Tensor
    expanded: Tensor
    output: Tensor


def walk(encoder: StagedEncoder, images: Tensor) -> Iterator[Passed]:
    """Pass images through an encoder with nothing hidden, block by block.

    Args:
        encoder: in evaluation mode.
        images: (B, C, H, W), normalised, on its device.

    Yields:
        Each block, in order.
    """
    x = encoder.stem(images, DENSE)
    for i, stage in enumerate(encoder.stages):
        if i > 0:
            x = encoder.downsample(i, x, DENSE)
        for j, block in enumerate(cast("Iterable[StageBlock]", stage)):
            before, (h, x) = x, block.trace(x, DENSE)
            yield Passed(f"stages.{i}.{j}", block, before, h, x)


def layer_names(encoder: StagedEncoder) -> list[str]:
    """The names of the blocks, in the order of computation."""
    return [f"stages.{i}.{j}" for i, depth in enumerate(encoder.spec.depths) for j in range(depth)]


def as_encoder(model: nn.Module) -> StagedEncoder:
    """The model as one of our encoders, which `load_backbone` has made of timm's ConvNeXts too.

    Raises:
        ValueError: if it is another network.
    """
    if not isinstance(model, StagedEncoder):
        raise ValueError(
            f"{type(model).__name__} is no ConvNeXt, so it has no blocks with expanded features: "
            "give a ConvNeXt (V1 or V2) to analyse"
        )
    return model


def cosine_distance(features: Tensor) -> Tensor:
    """Mean over all C^2 pairs of channels of (1 - cos(X_i, X_j)) / 2, for each image (arXiv 2301.00808, Sec. 4).

    Computed without the C x C cosines, as they sum to |sum_i X_i / |X_i||^2. A channel that is zero everywhere is the
    same as others that are (cosine 1) and has nothing in common with the rest (cosine 0).

    Args:
        features: (B, n, C), the n sites of each image; X_i is a channel's values at all of them.

    Returns:
        (B,), in 0..1: 0 if all channels are multiples of one another, about 1/2 if they have nothing in common.
    """
    x = at_least_float32(features)
    return _distance(x, l2_norm(x, (1,)))


def _distance(x: Tensor, norms: Tensor) -> Tensor:
    """x: (B, n, C). norms: (B, 1, C), of its channels."""
    zero = norms == 0
    inverse = norms.masked_fill(zero, 1).reciprocal().masked_fill(zero, 0)
    units = (x @ inverse.mT).squeeze(-1)  # (B, n)
    cosines = units.square().sum(1) + zero.sum((1, 2)).square()
    return ((1 - cosines / x.shape[2] ** 2) / 2).clamp(min=0)


def dead_channels(rms: Tensor) -> Tensor:
    """Which channels carry next to nothing: an RMS below 1 % of the layer's median one, or of zero.

    Args:
        rms: (C,), each over all sites of all images.

    Returns:
        (C,) bool.
    """
    return (rms < DEAD_RMS * rms.median()) | (rms == 0)


def saturated_channels(mean: Tensor, rms: Tensor) -> Tensor:
    """Which channels are on everywhere: a standard deviation below 10 % of the absolute mean, and not dead.

    Args:
        mean: (C,), each over all sites of all images.
        rms: (C,), each over the same.

    Returns:
        (C,) bool.
    """
    variance = (rms.square() - mean.square()).clamp(min=0)
    return (variance.sqrt() < SATURATED_STD * mean.abs()) & ~dead_channels(rms)


def effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the singular values of Z, divided by their sum (RankMe, arXiv 2210.02885).

    The paper's epsilon inside the logarithm is left out: 0 log 0 = 0.

    Args:
        gram: (C, C) float64, Z^T Z for features Z (N, C), which are not centred; or Z Z^T, (N, N).

    Returns:
        1 to min(N, C), so compare only values from equally many images; NaN if the features are zero or not finite.
    """
    if not bool(gram.isfinite().all()):
        return math.nan
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum()
    return float(torch.special.entr(p).sum().exp())


def class_selectivity(class_means: Tensor) -> Tensor:
    """(mu_max - mu_rest) / (mu_max + mu_rest) for each channel (Morcos et al. 2018, arXiv 1803.06959).

    mu_max is the largest of a channel's means, mu_rest the mean of the other K - 1.

    Args:
        class_means: (K, C), at least 0, each channel's mean over the images of each class.

    Returns:
        (C,), in 0..1; 0 for a channel that is never on.
    """
    largest = class_means.amax(0)
    rest = (class_means.sum(0) - largest) / (len(class_means) - 1)
    total = largest + rest
    return (largest - rest).clamp(min=0) / total.masked_fill(total == 0, 1)


def grn_norms(encoder: StagedEncoder) -> dict[str, tuple[float, float]]:
    """Root mean squares of GRN's gamma and beta in each block; empty where there is none.

    The L2 norm over the root of the number of channels, so that blocks of different widths compare.
    """
    found = {}
    for name, grn in encoder.named_modules():
        if isinstance(grn, GRN):
            gamma, beta = (float(p.detach().double().square().mean().sqrt()) for p in (grn.gamma, grn.beta))
            found[name.removesuffix(".grn")] = (gamma, beta)
    return found


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one block over all images, NaN where its features are not finite.

    Attributes:
        num_channels: of the expanded features; 4C but in a pruned network.
        cosine_distance: see `cosine_distance`; the mean over images.
        dead_share: of the channels.
        saturated_share: of the channels.
        effective_rank: of the block's output (C channels), averaged over each image's sites.
        selectivity: (num_channels,), see `class_selectivity`; None without labels, or if only one class occurred.
    """

    num_channels: int
    cosine_distance: float
    dead_share: float
    saturated_share: float
    effective_rank: float
    selectivity: NDArray[np.float64] | None


class _Sums:
    """What is kept of a block: sums over images in float64, on the CPU."""

    def __init__(self, num_channels: int, num_outputs: int, num_classes: int) -> None:
        self.num_images = self.num_sites = 0
        self.distance = 0.0
        self.mean, self.square = torch.zeros(2, num_channels, dtype=torch.float64)
        # Pooled outputs while there are fewer of them than channels, then their Gram matrix.
        self.rows, self.gram = torch.zeros(0, num_outputs, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self.class_sums = torch.zeros(num_classes, num_channels, dtype=torch.float64)
        self.class_counts = torch.zeros(num_classes, dtype=torch.float64)

    def add_expanded(self, features: Tensor, labels: Tensor | None) -> None:
        """features: (B, h, w, num_channels). Sums over the sites of an image are computed on their device."""
        x = at_least_float32(features).flatten(1, 2)
        norms = l2_norm(x, (1,))
        self.num_images += x.shape[0]
        self.num_sites += x.shape[0] * x.shape[1]
        self.distance += float(_distance(x, norms).cpu().double().sum())
        self.mean += x.sum(1).cpu().double().sum(0)
        self.square += norms.squeeze(1).cpu().double().square().sum(0)
        if labels is not None:
            # GELU is slightly negative where a unit is off: that is no response, so it counts as zero.
            responses = x.clamp(min=0).mean(1).cpu().double()
            self.class_sums.index_add_(0, labels.cpu(), responses)
            self.class_counts += torch.bincount(labels.cpu(), minlength=len(self.class_counts))

    def add_output(self, pooled: Tensor) -> None:
        """pooled: (B, C), a block's output averaged over each image's sites."""
        self.rows = torch.cat([self.rows, pooled.cpu().double()])
        if len(self.gram) or len(self.rows) >= self.rows.shape[1]:
            gram = self.rows.T @ self.rows
            self.gram = self.gram + gram if len(self.gram) else gram
            self.rows = self.rows[:0]

    def summary(self) -> LayerStatistics:
        mean, rms = self.mean / self.num_sites, (self.square / self.num_sites).sqrt()
        finite = bool(rms.isfinite().all())
        present = self.class_counts > 0
        selectivity = None
        if int(present.sum()) > 1:
            selectivity = class_selectivity(self.class_sums[present] / self.class_counts[present, None]).numpy()
        return LayerStatistics(
            num_channels=len(mean),
            cosine_distance=self.distance / self.num_images,
            dead_share=float(dead_channels(rms).double().mean()) if finite else math.nan,
            saturated_share=float(saturated_channels(mean, rms).double().mean()) if finite else math.nan,
            # Z Z^T has the eigenvalues of Z^T Z, but for zeros, which add nothing.
            effective_rank=effective_rank(self.gram if len(self.gram) else self.rows @ self.rows.T),
            selectivity=selectivity,
        )


class Statistics:
    """Statistics of every block of an encoder, over as many images as are added.

    Args:
        encoder: in evaluation mode.
        num_classes: of the labels that come with the images; 0 without labels.
    """

    def __init__(self, encoder: StagedEncoder, num_classes: int = 0) -> None:
        self._encoder, self._num_classes = encoder, num_classes
        self._sums: dict[str, _Sums] = {}  # of blocks as they are, which need not be as wide as the spec says

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Pass images through the encoder and add the outputs of its blocks.

        Args:
            images: (B, C, H, W), normalised, on the encoder's device.
            labels: (B,) int64.
        """
        for block in walk(self._encoder, images):
            if (sums := self._sums.get(block.name)) is None:
                widths = block.expanded.shape[-1], block.output.shape[-1]
                sums = self._sums[block.name] = _Sums(*widths, self._num_classes)
            sums.add_expanded(block.expanded, labels)
            sums.add_output(at_least_float32(block.output).mean((1, 2)))

    def layers(self) -> dict[str, LayerStatistics]:
        """The statistics of each block by name; empty before the first image."""
        return {name: sums.summary() for name, sums in self._sums.items() if sums.num_images}


def measure(
    encoder: StagedEncoder,
    reading: Reading,
    images: Images,
    *,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
    title: str | None = None,
) -> tuple[dict[str, LayerStatistics], list[tuple[str, str]]]:
    """Statistics of each block on images; with selectivity, if they have labels.

    Args:
        encoder: in evaluation mode, on the device.
        reading: how the images are read.
        images: what it is measured on.
        device: the encoder's.
        batch_size: images at a time.
        num_workers: processes that decode; None chooses.
        title: of a progress bar; None shows none.

    Returns:
        The statistics by layer, empty if no image could be read, and the files that could not be, with reasons.
    """
    statistics = Statistics(encoder, len(images.class_names or ()))
    bad: list[tuple[str, str]] = []
    batches = batches_of(reading, images, device=device, batch_size=batch_size, num_workers=num_workers)
    hidden = None if title is not None else True
    for pixels, batch in tqdm(
        batches, total=math.ceil(len(images) / batch_size), desc=title, unit="batch", disable=hidden
    ):
        bad += batch.bad
        if len(pixels):
            statistics.add(pixels, batch.labels)
    return statistics.layers(), bad


@torch.no_grad()
def activation_maps(encoder: StagedEncoder, image: Tensor, layers: list[str], num_maps: int = 64) -> list[NDArray[Any]]:
    """Maps of up to num_maps channels of some layers' features, evenly spread over their channels (the paper's Fig. 3).

    Args:
        encoder: in evaluation mode.
        image: (C, H, W), normalised, on the encoder's device.
        layers: names of blocks.
        num_maps: of each.

    Returns:
        (maps, h, w) float32 for each layer.
    """
    found: dict[str, NDArray[Any]] = {}
    for block in walk(encoder, image[None]):
        if block.name in layers:
            maps = at_least_float32(block.expanded)[0].permute(2, 0, 1)  # (hidden, h, w)
            found[block.name] = maps[evenly(len(maps), num_maps)].cpu().numpy()
    return [found[name] for name in layers]
