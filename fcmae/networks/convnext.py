"""The ConvNeXt encoder, V2 (GRN) and V1 (LayerScale): sparse on the visible patches, or dense, by its layout alone."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import Layout, Masked
from fcmae.networks.encoder import StagedEncoder, drop_path_rates
from fcmae.networks.layers import GRN, Block, LayerNorm
from fcmae.networks.spec import ConvNeXtSpec


class Encoder(StagedEncoder):
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
        super().__init__(spec, in_chans, grad_checkpointing)
        stride = spec.stem_stride
        stem_chans, groups, self.dense_stem = in_chans, 1, spec.dense_stem
        if spec.dense_stem:
            self.initial_conv = nn.Sequential(nn.Conv2d(in_chans, spec.dims[0], 3, padding=1), LayerNorm(spec.dims[0]))
            stem_chans = groups = spec.dims[0]
        patches = nn.Conv2d(stem_chans, spec.dims[0], stride, stride, groups=groups)
        stem = nn.Sequential(patches, LayerNorm(spec.dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in pairwise(spec.dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm(dim), nn.Conv2d(dim, next_dim, 2, 2)))

        rates = drop_path_rates(spec, drop_path_rate)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, width, spec.kernel_size, next(rates), spec.use_grn) for width in widths)
            for widths, dim in zip(spec.hidden_widths, spec.dims, strict=True)
        )
        self.apply(init_weights)

    def stem(self, images: Tensor, layout: Layout) -> Tensor:
        if not self.dense_stem:
            return super().stem(images, layout)
        s = self.spec.stem_stride
        if not (isinstance(layout, Masked) and layout.mask is None):
            # The 3x3 convolution sees zeros in the place of hidden pixels, as a sparse one does.
            hidden_zero = layout.unpack(layout.pack(self.patches(images)))  # (B, h, w, C * s * s)
            images = F.pixel_shuffle(hidden_zero.permute(0, 3, 1, 2), s)  # (B, C, H, W)
        first, first_norm = cast("tuple[nn.Conv2d, LayerNorm]", self.initial_conv)
        x = first(images).permute(0, 2, 3, 1)  # (B, H, W, dims[0])
        x = layout.pack(self.patches(F.gelu(first_norm(x)).permute(0, 3, 1, 2)))
        conv, norm = cast("tuple[nn.Conv2d, LayerNorm]", self.downsample_layers[0])
        x = (x.view(*x.shape[:-1], -1, s * s) * conv.weight.flatten(1)).sum(-1) + cast("Tensor", conv.bias)
        f: Tensor = norm(x)
        return f

    def downsample(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
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
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, GRN):
        nn.init.zeros_(module.gamma)
        nn.init.zeros_(module.beta)
    elif isinstance(module, Block) and module.gamma is not None:
        nn.init.constant_(module.gamma, 1e-6)
