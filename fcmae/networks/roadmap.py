"""The steps from ResNet to ConvNeXt (arXiv 2201.03545, Sec. 2): one network, whose spec says which it has taken.

The steps and their numbers are in `fcmae.networks.spec.road`. What the paper leaves open: the shortcut's convolution
keeps its norm at all steps, and the stem its activation until "fewer-activations". All weights are initialised as
ConvNeXt's, so that a step changes what its line says and nothing else.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import Layout, Masked
from fcmae.layouts.norms import at_least_float32
from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder, drop_path_rates
from fcmae.networks.layers import DropPath, LayerNorm
from fcmae.networks.spec import RoadmapSpec, describe


class BatchNorm(nn.Module):
    """BatchNorm over all dimensions but the last, eps 1e-5 and momentum .1, computed and returned in float32.

    nn.BatchNorm2d also counts its batches, as an integer, for which files of weights have no place. Each process and
    each micro-batch has its own statistics.

    Args:
        dim: channels C.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, H, W, C) to features of the same shape."""
        maps = at_least_float32(x).permute(0, 3, 1, 2)
        y = F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, training=self.training)
        return y.permute(0, 2, 3, 1)


class Conv(nn.Conv2d):
    """nn.Conv2d of features (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and self.groups == 1:
            # On CPUs without AVX-512, oneDNN's convolution with a stride writes past its buffers below 8 channels
            # (https://github.com/uxlfoundation/oneDNN/issues/6035).
            rows, columns = self.stride
            return F.linear(x[:, ::rows, ::columns], self.weight.flatten(1), self.bias)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + the branch of three convolutions: pwconv1, conv, pwconv2; or conv, pwconv1, pwconv2 where it has moved up.

    In ResNet: a norm after each, an activation after the first two and after the addition. With fewer of both: one norm
    after conv, one activation after pwconv1. Where the shape changes, a 1x1 convolution and its norm are applied to x.

    Args:
        spec: which steps the network has taken.
        in_dim: channels of the input.
        dim: channels of the output.
        hidden: channels between pwconv1 and pwconv2.
        stride: of conv.
        drop_path_rate: probability of dropping the branch for one image.
    """

    def __init__(
        self, spec: RoadmapSpec, in_dim: int, dim: int, hidden: int, stride: int = 1, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.spec = spec
        width, has_bias = in_dim if spec.moved_up else hidden, spec.layer_norm
        side, groups = spec.kernel_size, width if spec.depthwise else 1
        self.conv = Conv(width, width, side, stride, side // 2, groups=groups, bias=has_bias)
        self.pwconv1 = nn.Linear(in_dim, hidden, has_bias)
        self.pwconv2 = nn.Linear(hidden, dim, has_bias)
        self.norm = norm(spec, width)
        self.norm1 = nn.Identity() if spec.fewer_norms else norm(spec, hidden)
        self.norm2 = nn.Identity() if spec.fewer_norms else norm(spec, dim)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_dim != dim:
            one = Conv(in_dim, dim, 1, stride, bias=has_bias) if stride > 1 else nn.Linear(in_dim, dim, has_bias)
            self.shortcut.extend([one, norm(spec, dim)])
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Features (..., in_dim) in `layout` to features (..., dim), at half the height and width for a stride of 2."""
        return self.trace(x, layout)[1]

    def trace(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The features that pwconv2 sees, and the block's output; see `encoder.StageBlock`."""
        h = self._expand(self._look(x, layout)) if self.spec.moved_up else self._look(self._expand(x), layout)
        y = self.shortcut(x) + self.drop_path(self.norm2(self.pwconv2(h)), layout)
        return h, y if self.spec.fewer_activations else activate(self.spec, y)

    def _expand(self, x: Tensor) -> Tensor:
        return activate(self.spec, self.norm1(self.pwconv1(x)))

    def _look(self, x: Tensor, layout: Layout) -> Tensor:
        """Conv, its norm, and the activation that ResNet has after it."""
        if self.spec.depthwise and self.conv.stride == (1, 1):
            x = layout.depthwise_conv(x, self.conv.weight, self.conv.bias)
        else:
            x = self.conv(x)
        x = self.norm(x)
        return x if self.spec.fewer_activations else activate(self.spec, x)


class Encoder(StagedEncoder):
    """Stem and stages: `downsample_layers.0` is the stem's convolution and norm, the others empty until the last step.

    Args:
        spec: the numbers of the network, and which steps it has taken.
        in_chans: image channels.
        drop_path_rate: stochastic depth, rising linearly over the blocks to this.
        grad_checkpointing: recompute each block in backward instead of keeping its activations.

    Raises:
        ValueError: for grad_checkpointing with BatchNorm.
    """

    def __init__(
        self,
        spec: RoadmapSpec,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(spec, in_chans, grad_checkpointing)
        if grad_checkpointing and not spec.layer_norm:
            raise ValueError(
                f"model.grad_checkpointing would count each batch twice in the BatchNorm of {describe(spec)}: "
                "leave it out"
            )
        self.spec: RoadmapSpec = spec
        stride, dims, has_bias, apart = spec.stem_stride, spec.dims, spec.layer_norm, spec.separate_downsampling
        self.pool = 1 if spec.patchify or stride % 2 else 2  # an even stride is shared by the convolution and pooling
        dim = dims[0] if spec.inverted else spec.hidden_widths[0][0]
        side, padding = (stride, 0) if spec.patchify else (7, 3)
        stem = Conv(in_chans, dim, side, stride // self.pool, padding, bias=has_bias)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, norm(spec, dim))])
        for before, after in pairwise(dims):
            layers = [norm(spec, before), Conv(before, after, 2, 2, bias=has_bias)] if apart else []
            self.downsample_layers.append(nn.Sequential(*layers))
        rates = drop_path_rates(spec, drop_path_rate)
        self.stages = nn.ModuleList()
        for i, widths in enumerate(spec.hidden_widths):
            if i > 0 and apart:
                dim = dims[i]  # the layers before the stage have changed it
            stride = 1 if i == 0 or apart else 2
            blocks = nn.ModuleList()
            for hidden in widths:
                blocks.append(Block(spec, dim, dims[i], hidden, stride, next(rates)))
                dim, stride = dims[i], 1
            self.stages.append(blocks)
        self.apply(init_weights)

    def stem(self, images: Tensor, layout: Layout) -> Tensor:
        """The stem at visible sites; where its kernels overlap, of a whole image only.

        Args:
            images: see `StagedEncoder.stem`.
            layout: see `StagedEncoder.stem`.

        Returns:
            See `StagedEncoder.stem`.

        Raises:
            ValueError: if anything is hidden and the network cannot compute on visible patches alone.
        """
        is_whole = isinstance(layout, Masked) and layout.mask is None
        if self.spec.dense_only is not None and not is_whole:
            raise ValueError(f"{describe(self.spec)} {self.spec.dense_only}: mask another network")
        f = (
            super().stem(images, layout)
            if self.spec.patchify
            else self.downsample_layers[0](images.permute(0, 2, 3, 1))
        )
        f = f if self.spec.fewer_activations else activate(self.spec, f)
        if not self.spec.patchify:
            f = F.max_pool2d(f.permute(0, 3, 1, 2), 3, self.pool, padding=1).permute(0, 2, 3, 1)
        return f

    def downsample(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
        if not self.spec.separate_downsampling:
            return f
        before, conv = cast("tuple[nn.Module, nn.Conv2d]", self.downsample_layers[stage])
        return layout.downsample(before(f), conv.weight, conv.bias)


def norm(spec: RoadmapSpec, dim: int) -> nn.Module:
    """A norm of `dim` channels."""
    return LayerNorm(dim) if spec.layer_norm else BatchNorm(dim)


def activate(spec: RoadmapSpec, x: Tensor) -> Tensor:
    """GELU or ReLU."""
    return F.gelu(x) if spec.gelu else F.relu(x)
