"""Heads, which turn an encoder's output into that of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import DENSE, Layout
from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.layers import LayerNorm

POOLED = (1, 2, 3, 6)  # sites along a side of UPerNet's pooled maps


class Classifier(nn.Module):
    """Encoder -> mean over the image -> LayerNorm -> Linear: ConvNeXt's own classifier, GRN kept in place.

    Parameters are encoder.*, norm.*, head.*. Networks before ConvNeXt have no norm there, as their spec says.

    Args:
        encoder: dense, on whole images.
        num_classes: outputs.
        head_init_scale: factor on the Linear's initial weights; .001 for a trained encoder, 1 from scratch.
    """

    def __init__(self, encoder: StagedEncoder, num_classes: int, head_init_scale: float = 1.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = LayerNorm(encoder.dim) if encoder.spec.has_final_norm else nn.Identity()
        self.head = nn.Linear(encoder.dim, num_classes)
        self.head.apply(init_weights)
        self.head.weight.data.mul_(head_init_scale)

    def forward(self, images: Tensor, layout: Layout = DENSE) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, in_chans, H, W), in a layout without a mask."""
        pooled = self.encoder(images, layout).mean((1, 2))  # (B, dim)
        logits: Tensor = self.head(self.norm(pooled))
        return logits


class Segmenter(nn.Module):
    """Encoder -> the maps of its stages -> head -> logits of every pixel.

    Parameters are encoder.*, head.*.

    Args:
        encoder: dense, on whole images.
        head: maps the stages' outputs, first to last, (B, C_i, h_i, w_i), to logits at the first stage's sites.
    """

    def __init__(self, encoder: StagedEncoder, head: FeaturePyramid | UPerNet | Exits) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            images: (B, in_chans, H, W), normalised, H and W multiples of the total stride, with which the maps align.

        Returns:
            (B, num_classes, H, W).
        """
        maps = [f.permute(0, 3, 1, 2) for f in self.encoder.pyramid(images, DENSE)]
        return resize(self.head(maps), images.shape[2:])


class ConvNormAct(nn.Sequential):
    """Convolution of stride 1 -> LayerNorm over the channels -> GELU, on (B, C, h, w).

    The norm looks at one site, so a prediction does not depend on the rest of the batch or tile through it.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int = 1) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, kernel_size, padding=kernel_size // 2), _ChannelNorm(dim), nn.GELU())


class _ChannelNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """A light head: coarser maps are added to each stage's map; all are resized to the finest and summed.

    Source: feature pyramids, arXiv 1612.03144, with the summed levels of arXiv 1901.02446; norms as in `ConvNormAct`.

    Args:
        dims: channels of the stages.
        num_classes: outputs.
        dim: channels of the head.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, dim: int = 128) -> None:
        super().__init__()
        self.dim = dim
        self.laterals = nn.ModuleList(ConvNormAct(stage_dim, dim) for stage_dim in dims)
        self.smooth = nn.ModuleList(ConvNormAct(dim, dim, 3) for _ in dims)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        self.apply(init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h_0, w_0) of the stages' maps (B, C_i, h_i, w_i)."""
        levels = top_down(maps, self.laterals)
        finest = levels[0].shape[2:]
        smoothed = (resize(smooth(level), finest) for smooth, level in zip(self.smooth, levels, strict=True))
        # Not a sum of a stack: that would not be channels last, nor would the gradients of all before it.
        return cast(Tensor, self.classify(reduce(add, smoothed)))  # (B, num_classes, h_0, w_0)


class UPerNet(nn.Module):
    """Pyramid pooling on the last stage, a feature pyramid, and all levels fused.

    Source: arXiv 1807.10221, the semantic segmentation part; with the norms of `ConvNormAct` instead of BatchNorm.

    Args:
        dims: channels of the stages.
        num_classes: outputs.
        dim: channels of the head.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, dim: int = 512) -> None:
        super().__init__()
        self.dim = dim
        self.pooled = nn.ModuleList(ConvNormAct(dims[-1], dim) for _ in POOLED)
        self.bottleneck = ConvNormAct(dims[-1] + len(POOLED) * dim, dim, 3)
        self.laterals = nn.ModuleList([*(ConvNormAct(stage_dim, dim) for stage_dim in dims[:-1]), nn.Identity()])
        self.smooth = nn.ModuleList([*(ConvNormAct(dim, dim, 3) for _ in dims[:-1]), nn.Identity()])
        self.fuse = ConvNormAct(len(dims) * dim, dim, 3)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        self.apply(init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h_0, w_0) of the stages' maps (B, C_i, h_i, w_i)."""
        last = maps[-1]
        context = [
            resize(layer(F.adaptive_avg_pool2d(last, side)), last.shape[2:])
            for side, layer in zip(POOLED, self.pooled, strict=True)
        ]
        last = self.bottleneck(torch.cat([last, *context], 1))  # (B, dim, h_n, w_n)
        levels = top_down([*maps[:-1], last], self.laterals)
        finest = levels[0].shape[2:]
        smoothed = [resize(smooth(level), finest) for smooth, level in zip(self.smooth, levels, strict=True)]
        return cast(Tensor, self.classify(self.fuse(torch.cat(smoothed, 1))))


class Exit(nn.Module):
    """A stage's part in the answer. It looks at each patch alone, so it runs on maps and on packed rows alike.

        level = lateral(f) + nearest(pooled(...pooled(lateral(f)))), pooled to one site a patch
        logits = classify(fuse(level))

    lateral, each pooled (after a 2x2 average) and fuse are Linear -> LayerNorm -> GELU on each site.

    Args:
        in_dim: channels of the stage.
        dim: channels of its levels.
        num_poolings: log2 of the stage's sites along a side of a patch.
        num_classes: outputs.
    """

    def __init__(self, in_dim: int, dim: int, num_poolings: int, num_classes: int) -> None:
        super().__init__()
        self.lateral = _linear_norm_act(in_dim, dim)
        self.pooled = nn.ModuleList(_linear_norm_act(dim, dim) for _ in range(num_poolings))
        self.fuse = _linear_norm_act(dim, dim)
        self.classify = nn.Linear(dim, num_classes)

    def forward(self, f: Tensor) -> Tensor:
        """What the stage adds to the logits, (..., h, w, num_classes), from its output (..., h, w, C)."""
        level = context = self.lateral(f)
        for layer in self.pooled:
            context = layer(_halved(context))
        logits: Tensor = self.classify(self.fuse(add_nearest(level, context)))
        return logits


def _linear_norm_act(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), LayerNorm(dim), nn.GELU())


def _windows(x: Tensor, side: int = 2) -> Tensor:
    """(..., h, w, C) to (..., h / side, side, w / side, side, C)."""
    *lead, h, w, channels = x.shape
    return x.reshape(*lead, h // side, side, w // side, side, channels)


def _halved(x: Tensor) -> Tensor:
    """(..., h, w, C) to (..., h / 2, w / 2, C), means of four. On a CPU `mean` over these takes eight times as long."""
    x = _windows(x)
    return (x[..., 0, :, 0, :] + x[..., 0, :, 1, :] + x[..., 1, :, 0, :] + x[..., 1, :, 1, :]) / 4


def add_nearest(fine: Tensor, coarse: Tensor) -> Tensor:
    """Add coarser maps to maps, or to sites of patches, repeating the coarse sites.

    Args:
        fine: (..., h, w, C).
        coarse: (..., h / s, w / s, C).

    Returns:
        (..., h, w, C).
    """
    side = fine.shape[-2] // coarse.shape[-2]
    if side == 1:
        return fine + coarse
    return (_windows(fine, side) + coarse.unsqueeze(-2).unsqueeze(-4)).view_as(fine)


class Exits(nn.Module):
    """An exit on each stage of an encoder, whose logits add up, and the rule by which a patch exits.

    Args:
        dims: channels of the stages.
        num_classes: outputs.
        dim: channels of the exits' levels.
        tau: a patch exits when its confidence is above this, 0 to 1; at 1 none does.
        quantile: a patch's confidence is this quantile of its sites' confidences; 0 is the minimum.
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, dim: int = 32, tau: float = 0.998, quantile: float = 0.0
    ) -> None:
        super().__init__()
        self.dim, self.tau, self.quantile = dim, tau, quantile
        self.exits = nn.ModuleList(
            Exit(stage_dim, dim, len(dims) - 1 - i, num_classes) for i, stage_dim in enumerate(dims)
        )
        self.apply(init_weights)

    def __len__(self) -> int:
        return len(self.exits)

    def __iter__(self) -> Iterator[Exit]:
        return cast("Iterator[Exit]", iter(self.exits))

    def confidence(self, logits: Tensor) -> Tensor:
        """Confidence of patches: the quantile (or minimum) over their sites of the largest class probability.

        Args:
            logits: (..., h, w, classes) of maps or of sites of patches.

        Returns:
            (..., h / b, w / b, 1) float32 in 0..1, b the sites along a side of a patch.
        """
        logits = logits.float()
        sites = (logits.amax(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()  # (..., h, w, 1)
        sites = _windows(sites, 1 << (len(self) - 1)).transpose(-4, -3).flatten(-3)  # (..., h / b, w / b, b * b)
        rank = int(self.quantile * (sites.shape[-1] - 1))
        return sites.kthvalue(rank + 1, -1, keepdim=True).values if rank else sites.amin(-1, keepdim=True)


def top_down(maps: Sequence[Tensor], laterals: nn.ModuleList) -> list[Tensor]:
    """Each stage's map through its layer, with those of the coarser stages added.

    Args:
        maps: (B, C_i, h_i, w_i), finest first.
        laterals: a layer each, from C_i to the same number of channels.

    Returns:
        (B, dim, h_i, w_i) each.
    """
    levels: list[Tensor] = []
    for f, lateral in zip(reversed(maps), reversed(laterals), strict=True):
        level = lateral(f)
        levels.insert(0, level + resize(levels[0], f.shape[2:]) if levels else level)
    return levels


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) at another height and width, bilinear."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear")


def build_head(
    kind: str, dims: Sequence[int], num_classes: int, dim: int | None = None
) -> FeaturePyramid | UPerNet | Exits:
    """The head of a `Segmenter` by its name.

    Args:
        kind: pyramid, upernet or anytime.
        dims: channels of the stages.
        num_classes: outputs.
        dim: channels of the head; None is 128 for pyramid, 512 for upernet and 32 for anytime.

    Raises:
        ValueError: for another kind.
    """
    if kind == "pyramid":
        return FeaturePyramid(dims, num_classes, dim or 128)
    if kind == "upernet":
        return UPerNet(dims, num_classes, dim or 512)
    if kind == "anytime":
        return Exits(dims, num_classes, dim or 32)
    raise ValueError(f"head = {kind!r}: use pyramid, upernet or anytime")
