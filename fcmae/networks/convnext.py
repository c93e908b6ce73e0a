"""The ConvNeXt encoder, V2 (GRN) and V1 (LayerScale): sparse on the visible patches, or dense, by its layout alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fcmae.layouts import DENSE, Layout
from fcmae.networks.layers import GRN, Block, LayerNorm
from fcmae.networks.spec import ConvNeXtSpec


class Encoder(nn.Module):
    """Stem and stages, with parameters under the released dense code's names.

    `downsample_layers.0` is the stem (convolution, LayerNorm); `downsample_layers.1..3` are LayerNorm and a 2x2
    stride-2 convolution; `stages.i.j` are blocks. There is no final norm: FCMAE does not train one. A dense stem begins
    with `initial_conv` (convolution, LayerNorm).

    Args:
        spec: the numbers of the network.
        in_chans: image channels.
        drop_path_rate: stochastic depth, rising linearly over the blocks to this.
        grad_checkpointing: recompute each block in backward instead of keeping its activations.
    """

    def __init__(
        self,
        spec: ConvNeXtSpec,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_chans = in_chans
        self.total_stride = spec.total_stride
        self.dim = spec.dims[-1]
        self.grad_checkpointing = grad_checkpointing

        stride = spec.stem_stride
        stem_chans, groups = in_chans, 1
        if spec.dense_stem:
            self.initial_conv = nn.Sequential(nn.Conv2d(in_chans, spec.dims[0], 3, padding=1), LayerNorm(spec.dims[0]))
            stem_chans = groups = spec.dims[0]
        patches = nn.Conv2d(stem_chans, spec.dims[0], stride, stride, groups=groups)
        stem = nn.Sequential(patches, LayerNorm(spec.dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in pairwise(spec.dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm(dim), nn.Conv2d(dim, next_dim, 2, 2)))

        num_blocks = sum(spec.depths)
        rates = iter(drop_path_rate * i / max(1, num_blocks - 1) for i in range(num_blocks))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, width, spec.kernel_size, next(rates), spec.use_grn) for width in widths)
            for widths, dim in zip(spec.hidden_widths, spec.dims, strict=True)
        )
        self.apply(init_weights)

    def forward(self, images: Tensor, layout: Layout = DENSE) -> Tensor:
        """Features at the total stride.

        Args:
            images: (B, in_chans, H, W) float, normalised. Under a mask H and W are multiples of the mask patch;
                otherwise the last rows and columns that fill no site are left out, as a strided convolution does.
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
        for i, stage in enumerate(self.stages):
            if i > 0:
                f = self.downsample(i, f, layout)  # half the height and width, dims[i]
            for block in cast("Iterator[Block]", stage):
                if self.grad_checkpointing and self.training:
                    f = checkpoint(block, f, layout, use_reentrant=False)
                else:
                    f = block(f, layout)
            maps.append(f)
        return maps

    def stem(self, images: Tensor, layout: Layout) -> Tensor:
        """The stem's convolution and norm at visible sites.

        Its patches do not overlap, so it is one Linear over each patch's pixels, and hiding pixels is the same as
        hiding its outputs. Only visible pixels are packed: hidden ones enter no computation. The 3x3 convolution of a
        dense stem sees zeros in their place, as a sparse one does.

        Args:
            images: (B, in_chans, H, W) float, see `forward`.
            layout: made from the mask.

        Returns:
            Features of the visible sites in `layout`, dims[0] channels.
        """
        conv, norm = cast("tuple[nn.Conv2d, LayerNorm]", self.downsample_layers[0])
        x = layout.pack(self._patches(images))  # visible sites, C * s * s values each
        if self.spec.dense_stem:
            first, first_norm = cast("tuple[nn.Conv2d, LayerNorm]", self.initial_conv)
            s, hidden_zero = self.spec.stem_stride, layout.unpack(x)  # (B, h, w, C * s * s)
            pixels = hidden_zero.view(*hidden_zero.shape[:3], -1, s, s).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, s, w, s)
            x = first(pixels.flatten(4).flatten(2, 3)).permute(0, 2, 3, 1)  # (B, H, W, dims[0])
            x = layout.pack(self._patches(F.gelu(first_norm(x)).permute(0, 3, 1, 2)))
            x = (x.view(*x.shape[:-1], -1, s * s) * conv.weight.flatten(1)).sum(-1) + cast("Tensor", conv.bias)
        else:
            x = F.linear(x, conv.weight.flatten(1), conv.bias)
        f: Tensor = norm(x)
        return f

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the values of each patch of the stem, (B, h, w, C * s * s)."""
        s = self.spec.stem_stride
        B, C, H, W = x.shape
        h, w = H // s, W // s
        return x[:, :, : h * s, : w * s].reshape(B, C, h, s, w, s).permute(0, 2, 4, 1, 3, 5).reshape(B, h, w, C * s * s)

    def downsample(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
        """The LayerNorm and 2x2 stride-2 convolution before a stage.

        Args:
            stage: numbered from 0 and not the first.
            f: the stage before's output, in `layout`.
            layout: that of f.

        Returns:
            Features in `layout` at half the height and width, dims[stage] channels.
        """
        norm, conv = cast("tuple[LayerNorm, nn.Conv2d]", self.downsample_layers[stage])
        return layout.downsample(norm(f), conv.weight, conv.bias)


def init_weights(module: nn.Module) -> None:
    """Set a layer's parameters to their starting distribution; apply it to a model with `Module.apply`.

    | layer | weight | bias |
    | --- | --- | --- |
    | Conv2d, Linear | normal, mean 0, std .02 | 0 |
    | LayerNorm | 1 | 0 |
    | GRN | gamma 0 | beta 0 |
    | LayerScale (Block.gamma, V1) | 1e-6 | - |

    The mask token, a bare parameter of the decoder, is normal with std .02. The paper's recipe truncates at +-2, which
    is 100 standard deviations and never reached; the released PyTorch code instead draws almost every weight with
    std 1, because its second pass falls back on a default, and that is not followed here.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, GRN):
        nn.init.zeros_(module.gamma)
        nn.init.zeros_(module.beta)
    elif isinstance(module, Block) and module.gamma is not None:
        nn.init.constant_(module.gamma, 1e-6)


def num_layers(spec: ConvNeXtSpec, mode: str) -> int:
    """How many layers `layer_of` tells apart below the norm and head, which are one more."""
    if mode == "single":
        return sum(spec.depths) + 1
    return 1 + sum(math.ceil(depth / 3) for depth in spec.depths)


def layer_of(name: str, spec: ConvNeXtSpec, mode: str) -> int:
    """The layer of a parameter for layer-wise learning-rate decay, from 0 at the bottom.

    Args:
        name: of a parameter, with "encoder." before the encoder's.
        spec: of the network.
        mode: "single" gives every block a layer of its own, with the downsampling before it; the stem is in the first
            block's. "group" makes every three consecutive blocks of a stage a layer, with the downsampling before
            them; the stem is below. With depths 3 3 27 3 these are the 12 groups of the released recipes.

    Returns:
        0 to num_layers(spec, mode) - 1 for the encoder's, num_layers(spec, mode) for the norm's and the head's.
    """
    name = name.replace("encoder.initial_conv.", "encoder.downsample_layers.0.")  # of the stem
    match = re.match(r"encoder\.(downsample_layers|stages)\.(\d)\.(\d+)", name)
    if match is None:
        return num_layers(spec, mode)
    stage, block = int(match[2]), int(match[3]) if match[1] == "stages" else 0
    if mode == "single":
        return sum(spec.depths[:stage]) + block + 1
    if match[1] == "downsample_layers" and stage == 0:
        return 0
    return 1 + sum(math.ceil(depth / 3) for depth in spec.depths[:stage]) + block // 3
