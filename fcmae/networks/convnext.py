"""The ConvNeXt encoder that sees only visible patches: V2 (GRN) and V1 (LayerScale), in any layout."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fcmae.layouts import Layout
from fcmae.networks.layers import GRN, Block, LayerNorm


class Variant(NamedTuple):
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    use_grn: bool


# arXiv 2301.00808, Appendix A.1, and arXiv 2201.03545, Sec. 3; `small` of V2, and V1 below `tiny`, are timm's.
VARIANTS = {
    "convnextv2_atto": Variant((2, 2, 6, 2), (40, 80, 160, 320), True),
    "convnextv2_femto": Variant((2, 2, 6, 2), (48, 96, 192, 384), True),
    "convnextv2_pico": Variant((2, 2, 6, 2), (64, 128, 256, 512), True),
    "convnextv2_nano": Variant((2, 2, 8, 2), (80, 160, 320, 640), True),
    "convnextv2_tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768), True),
    "convnextv2_small": Variant((3, 3, 27, 3), (96, 192, 384, 768), True),
    "convnextv2_base": Variant((3, 3, 27, 3), (128, 256, 512, 1024), True),
    "convnextv2_large": Variant((3, 3, 27, 3), (192, 384, 768, 1536), True),
    "convnextv2_huge": Variant((3, 3, 27, 3), (352, 704, 1408, 2816), True),
    "convnext_atto": Variant((2, 2, 6, 2), (40, 80, 160, 320), False),
    "convnext_femto": Variant((2, 2, 6, 2), (48, 96, 192, 384), False),
    "convnext_pico": Variant((2, 2, 6, 2), (64, 128, 256, 512), False),
    "convnext_nano": Variant((2, 2, 8, 2), (80, 160, 320, 640), False),
    "convnext_tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768), False),
    "convnext_small": Variant((3, 3, 27, 3), (96, 192, 384, 768), False),
    "convnext_base": Variant((3, 3, 27, 3), (128, 256, 512, 1024), False),
    "convnext_large": Variant((3, 3, 27, 3), (192, 384, 768, 1536), False),
    "convnext_xlarge": Variant((3, 3, 27, 3), (256, 512, 1024, 2048), False),
}


class Encoder(nn.Module):
    """Stem and four stages, with parameters under the released dense code's names.

    `downsample_layers.0` is the stem (convolution, LayerNorm); `downsample_layers.1..3` are LayerNorm and a 2x2
    stride-2 convolution; `stages.i.j` are blocks. There is no final norm: FCMAE does not train one.

    variant: a key of VARIANTS. in_chans: image channels. stem_stride: side and stride of the stem's convolution.
    drop_path_rate: stochastic depth, rising linearly over the blocks to this. grad_checkpointing: recompute each
    block in backward instead of keeping its activations.
    """

    def __init__(
        self,
        variant: str,
        in_chans: int = 3,
        stem_stride: int = 4,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        depths, dims, use_grn = VARIANTS[variant]
        self.variant = variant
        self.in_chans = in_chans
        self.stem_stride = stem_stride
        self.total_stride = 8 * stem_stride
        self.dim = dims[-1]
        self.grad_checkpointing = grad_checkpointing

        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride), LayerNorm(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in pairwise(dims):
            self.downsample_layers.append(nn.Sequential(LayerNorm(dim), nn.Conv2d(dim, next_dim, 2, 2)))

        rates = iter(drop_path_rate * i / (sum(depths) - 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, next(rates), use_grn) for _ in range(depth))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.apply(init_weights)

    def forward(self, images: Tensor, layout: Layout) -> Tensor:
        """Features of the visible sites at the total stride.

        images: (B, in_chans, H, W) float; H and W are multiples of the mask patch. layout: made from the mask; its
        grid times the mask patch is (H, W). Returns features in `layout` with `dim` channels.
        """
        f = self.stem(images, layout)
        for i, stage in enumerate(self.stages):
            if i > 0:
                norm, conv = cast("tuple[LayerNorm, nn.Conv2d]", self.downsample_layers[i])
                f = layout.downsample(norm(f), conv.weight, conv.bias)
            for block in cast(nn.ModuleList, stage):
                if self.grad_checkpointing and self.training:
                    f = checkpoint(block, f, layout, use_reentrant=False)
                else:
                    f = block(f, layout)
        return f

    def stem(self, images: Tensor, layout: Layout) -> Tensor:
        """The stem's convolution and norm at visible sites.

        Its patches do not overlap, so it is one Linear over each patch's pixels, and hiding pixels is the same as
        hiding its outputs. Only visible pixels are packed: hidden ones enter no computation.
        """
        conv, norm = cast("tuple[nn.Conv2d, LayerNorm]", self.downsample_layers[0])
        B, C, H, W = images.shape
        s = self.stem_stride
        x = images.view(B, C, H // s, s, W // s, s).permute(0, 2, 4, 1, 3, 5)
        x = layout.pack(x.reshape(B, H // s, W // s, C * s * s))
        f: Tensor = norm(F.linear(x, conv.weight.flatten(1), conv.bias))
        return f


def init_weights(module: nn.Module) -> None:
    """Set a layer's parameters to their starting distribution; apply it to a model with `Module.apply`.

    | layer | weight | bias |
    | --- | --- | --- |
    | Conv2d, Linear | normal, mean 0, std .02 | 0 |
    | LayerNorm | 1 | 0 |
    | GRN | gamma 0 | beta 0 |
    | LayerScale (Block.gamma, V1) | 1e-6 | - |

    The mask token, a bare parameter of FCMAE, is normal with std .02. The paper's recipe truncates at +-2, which is
    100 standard deviations and never reached; the released PyTorch code instead draws almost every weight with
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
