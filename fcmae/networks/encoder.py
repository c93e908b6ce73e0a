"""What every encoder of stages is, whatever its blocks: the interface that masks, heads and evaluation use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fcmae.layouts import DENSE, Layout
from fcmae.networks.spec import NetworkSpec


class StageBlock(Protocol):
    """The interface that an encoder needs of a block."""

    def __call__(self, x: Tensor, layout: Layout) -> Tensor:
        """Features (..., C) in `layout` to features of the same shape."""
        ...

    def trace(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Like the call, but it also returns the features that are analysed.

        Args:
            x: features (..., C).
            layout: that of x.

        Returns:
            The expanded features, (..., hidden), as the block's last Linear sees them; and the block's output.
        """
        ...


class StagedEncoder(nn.Module):
    """A stem and stages of blocks, each stage after the first at half the resolution of the one before.

    A subclass makes `downsample_layers`, the stem (a convolution, then its norm) and the layers before each later
    stage, and `stages`, a list of `StageBlock`s each; and implements `downsample`. Parameters are named after these.

    Args:
        spec: the numbers of the network.
        in_chans: image channels.
        grad_checkpointing: recompute each block in backward instead of keeping its activations.
    """

    downsample_layers: nn.ModuleList
    stages: nn.ModuleList

    def __init__(self, spec: NetworkSpec, in_chans: int, grad_checkpointing: bool) -> None:
        super().__init__()
        self.spec = spec
        self.in_chans = in_chans
        self.total_stride = spec.total_stride
        self.dim = spec.dims[-1]
        self.grad_checkpointing = grad_checkpointing

    def forward(self, images: Tensor, layout: Layout = DENSE) -> Tensor:
        """Features at the total stride.

        Args:
            images: (B, in_chans, H, W) float, normalised. Under a mask H and W are multiples of the mask patch;
                otherwise the last rows and columns that fill no site are left out, as a strided convolution does, but
                for the 3x3 convolution of a dense stem.
            layout: made from the mask; the default sees the whole image.

        Returns:
            Features of the visible sites in `layout`, `dim` channels; (B, H / total_stride, W / total_stride, dim)
            where nothing is hidden.
        """
        return self.pyramid(images, layout)[-1]

    def pyramid(self, images: Tensor, layout: Layout = DENSE) -> list[Tensor]:
        """Each stage's output, first to last, in `layout`; (B, h_i, w_i, dims[i]) without a mask. See `forward`."""
        maps = []
        f = self.stem(images, layout)  # (B, h, w, dims[0]) where nothing is hidden
        for i in range(len(self.stages)):
            if i > 0:
                f = self.downsample(i, f, layout)  # half the height and width, dims[i]
            f = self.stage(i, f, layout)
            maps.append(f)
        return maps

    def stage(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
        """The blocks of a stage.

        Args:
            stage: numbered from 0.
            f: (..., dims[stage]), in `layout`.
            layout: that of f.

        Returns:
            Features of the same shape.
        """
        for block in cast("Iterator[StageBlock]", self.stages[stage]):
            if self.grad_checkpointing and self.training:
                f = checkpoint(block, f, layout, use_reentrant=False)
            else:
                f = block(f, layout)
        return f

    def stem(self, images: Tensor, layout: Layout) -> Tensor:
        """The stem's convolution and norm at visible sites.

        Its patches do not overlap, so it is one Linear over each patch's pixels, and hiding pixels is the same as
        hiding its outputs. Only visible pixels are packed: hidden ones enter no computation.

        Args:
            images: (B, in_chans, H, W) float, see `forward`.
            layout: made from the mask.

        Returns:
            Features of the visible sites in `layout`, dims[0] channels.
        """
        conv, norm = cast("tuple[nn.Conv2d, nn.Module]", self.downsample_layers[0])
        x = layout.pack(self.patches(images))  # visible sites, C * s * s values each
        f: Tensor = norm(F.linear(x, conv.weight.flatten(1), conv.bias))
        return f

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the values of each patch of the stem, (B, h, w, C * s * s)."""
        s = self.spec.stem_stride
        B, C, H, W = x.shape
        h, w = H // s, W // s
        return x[:, :, : h * s, : w * s].reshape(B, C, h, s, w, s).permute(0, 2, 4, 1, 3, 5).reshape(B, h, w, C * s * s)

    def downsample(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
        """Apply the layers before a stage.

        Args:
            stage: numbered from 0; not the first.
            f: output of the previous stage, in `layout`.
            layout: that of f.

        Returns:
            Features in `layout` at half the height and width, dims[stage] channels.
        """
        raise NotImplementedError


def drop_path_rates(spec: NetworkSpec, last: float) -> Iterator[float]:
    """Stochastic depth of each block, rising linearly from 0 to that of the last."""
    num_blocks = sum(spec.depths)
    return (last * i / max(1, num_blocks - 1) for i in range(num_blocks))


def num_layers(spec: NetworkSpec, mode: str) -> int:
    """Number of encoder layers for layer-wise decay. The norm and head form one further layer, of this index."""
    if mode == "single":
        return sum(spec.depths) + 1
    return 1 + sum(math.ceil(depth / 3) for depth in spec.depths)


def layer_of(name: str, spec: NetworkSpec, mode: str) -> int:
    """The layer of a parameter for layer-wise learning-rate decay, from 0 at the bottom.

    Args:
        name: of a parameter, with "encoder." before the encoder's.
        spec: of the network.
        mode: "single" gives every block a layer of its own, with the downsampling before it; the stem is in the first
            block's. "group" makes every three consecutive blocks of a stage a layer, with the downsampling before
            them; the stem is the layer below. With depths 3 3 27 3 these are the 12 groups of the released recipes.

    Returns:
        0 to num_layers(spec, mode) - 1 for the encoder's, num_layers(spec, mode) for the norm's and the head's.
    """
    name = name.replace("encoder.initial_conv.", "encoder.downsample_layers.0.")  # of the stem
    match = re.match(r"encoder\.(downsample_layers|stages)\.(\d)\.(\w+)", name)
    if match is None:
        return num_layers(spec, mode)
    stage, block = int(match[2]), int(match[3]) if match[1] == "stages" else 0
    if mode == "single":
        return sum(spec.depths[:stage]) + block + 1
    if match[1] == "downsample_layers" and stage == 0:
        return 0
    return 1 + sum(math.ceil(depth / 3) for depth in spec.depths[:stage]) + block // 3
