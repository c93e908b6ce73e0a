"""CONTAINER (arXiv 2106.01401): blocks that mix sites by a learnt kernel, by attention, or by a learnt sum of both.

Y = A V W, with A = alpha * dynamic(X) + beta * static: what is mixed does not depend on how. So alpha = 0 is a
depthwise ConvNet, beta = 0 a transformer, and a static affinity that is any matrix is an MLP-mixer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fcmae.layouts import Layout
from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder, drop_path_rates
from fcmae.networks.layers import DepthwiseConv, DropPath, LayerNorm, gelu_of
from fcmae.networks.spec import Affinity, ContainerSpec

KERNEL_SIZE, POSITION_SIZE = 5, 3  # of the static affinity and of what stands for a table of positions


class Aggregation(nn.Module):
    """output(A values(x)), A = alpha * dynamic + beta * static, or one of them alone.

    Dynamic is attention among the visible sites of an image, static any module that mixes sites by weights of its own.
    The paper's alpha and beta are free. The released code's are s and 1 - s, s a sigmoid of one parameter. Both mixes
    start as the mean.

    Args:
        dim: channels C.
        affinity: which affinities there are.
        static: maps (features, layout) to features; unused if the affinity is dynamic.
        num_heads: of the attention.
        mix: free or convex, see `ContainerSpec`.
    """

    def __init__(
        self,
        dim: int,
        affinity: Affinity = "mixed",
        static: nn.Module | None = None,
        num_heads: int = 16,
        mix: str = "free",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.values = nn.Linear(dim, dim if affinity == "static" else 3 * dim)  # and queries and keys
        self.static = None if affinity == "dynamic" else static or DepthwiseConv(dim, KERNEL_SIZE)
        self.output = nn.Linear(dim, dim)
        is_free, is_convex = affinity == "mixed" and mix == "free", affinity == "mixed" and mix == "convex"
        self.alpha = nn.Parameter(torch.tensor(0.5)) if is_free else None
        self.beta = nn.Parameter(torch.tensor(0.5)) if is_free else None
        self.share = nn.Parameter(torch.tensor(0.0)) if is_convex else None  # of the dynamic part, before its sigmoid

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Features (..., C) in `layout` to features of the same shape."""
        v, *query_and_key = self.values(x).split(x.shape[-1], dim=-1)
        if not query_and_key:
            assert self.static is not None
            return cast("Tensor", self.output(self.static(v, layout)))
        q, k = query_and_key
        mixed = layout.attention(q, k, v, self.num_heads)
        if self.static is not None:
            alpha, beta = self.weights()
            mixed = alpha * mixed + beta * self.static(v, layout)
        return cast("Tensor", self.output(mixed))

    def weights(self) -> tuple[Tensor, Tensor]:
        """alpha and beta of a mixed affinity."""
        if self.share is not None:
            share = self.share.sigmoid()
            return share, 1 - share
        assert self.alpha is not None and self.beta is not None
        return self.alpha, self.beta


class Block(nn.Module):
    """x + position(x), then two branches: x + aggregate(norm1(x)), and x + pwconv2(GELU(pwconv1(norm2(x)))).

    Drop path multiplies each branch. `position`, a 3x3 depthwise convolution, tells sites apart by their neighbours and
    by the border, so no table of positions is needed, and any image size works.

    Args:
        dim: channels C.
        hidden: expanded channels.
        aggregate: mixes sites, see `Aggregation`.
        drop_path_rate: probability of dropping a branch for one image.
    """

    def __init__(self, dim: int, hidden: int, aggregate: Aggregation, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.position = DepthwiseConv(dim, POSITION_SIZE)
        self.norm1 = LayerNorm(dim)
        self.aggregate = aggregate
        self.norm2 = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Features (..., C) in `layout` to features of the same shape."""
        return self.trace(x, layout)[1]

    def trace(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The expanded features that pwconv2 sees, and the block's output; see `encoder.StageBlock`."""
        x = x + self.position(x, layout)
        x = x + self.drop_path(self.aggregate(self.norm1(x), layout), layout)
        h = gelu_of(self.pwconv1, self.norm2(x))  # (..., hidden)
        return h, x + self.drop_path(self.pwconv2(h), layout)


class Encoder(StagedEncoder):
    """Stem and stages: `downsample_layers.i` is a convolution and a LayerNorm, 2x2 of stride 2 after the stem's.

    The released code has BatchNorm in its blocks; its statistics of visible sites would depend on the mask ratio, so
    there is LayerNorm here, which has as many parameters. As in `convnext.Encoder` there is no final norm.

    Args:
        spec: the numbers of the network.
        in_chans: image channels.
        drop_path_rate: stochastic depth, rising linearly over the blocks to this.
        grad_checkpointing: recompute each block in backward instead of keeping its activations.
    """

    def __init__(
        self,
        spec: ContainerSpec,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(spec, in_chans, grad_checkpointing)
        sides = [spec.stem_stride] + [2] * (spec.num_stages - 1)
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, next_dim, side, side), LayerNorm(next_dim))
            for side, (dim, next_dim) in zip(sides, pairwise((in_chans, *spec.dims)), strict=True)
        )
        rates = drop_path_rates(spec, drop_path_rate)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(dim, hidden, Aggregation(dim, affinity, num_heads=spec.num_heads, mix=spec.mix), next(rates))
                for hidden in widths
            )
            for dim, widths, affinity in zip(spec.dims, spec.hidden_widths, spec.affinity, strict=True)
        )
        self.apply(init_weights)

    def downsample(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
        conv, norm = cast("tuple[nn.Conv2d, LayerNorm]", self.downsample_layers[stage])
        return norm.forward(layout.downsample(f, conv.weight, conv.bias))
