"""The reference: dense maps whose hidden sites are zeroed wherever something could see them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor

from fcmae.layouts.attention import attend
from fcmae.layouts.norms import l2_norm
from fcmae.layouts.sites import upsample_mask


class Masked:
    """Features are (B, H, W, C) maps; hidden sites hold anything between operations and zero inside them.

    A hidden site does not stay zero by itself: the biases of LayerNorm and Linear fill it. So each operation that
    looks at more than one site zeroes the hidden ones on entry, as the paper's JAX code does (arXiv 2301.00808,
    Sec. 3.1). This is the whole difference from a dense network, and the definition every other layout is tested
    against.

    Args:
        mask: (B, gh, gw) bool, True = hidden; None for a dense map, as in the decoder.
        grn_scope: sites that image_norm takes together, "image" or "batch".
    """

    def __init__(self, mask: Tensor | None, grn_scope: str = "image") -> None:
        self.mask = mask
        self.norm_dims = (0, 1, 2) if grn_scope == "batch" else (1, 2)

    def pack(self, x: Tensor) -> Tensor:
        return self._hide(x)

    def unpack(self, f: Tensor) -> Tensor:
        return self._hide(f)

    def paste(self, x: Tensor, f: Tensor) -> Tensor:
        """x, a map (B, H, W, C), with the features f at the visible sites."""
        return f if self.mask is None else torch.where(self._hidden(f)[..., None], x, f)

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As (B, C, H, W) in channels-last memory: the permutes are views and the convolution takes its fast path.
        x = self._hide(f).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]).permute(0, 2, 3, 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        # Hidden values may be infinite, which masking the products would not remove.
        queries, keys, values = (self._hide(x).flatten(1, 2) for x in (q, k, v))  # (B, H * W, C)
        seen = None if self.mask is None else self._hidden(v).logical_not().flatten(1)
        return attend(queries, keys, values, num_heads, seen).view_as(v)

    def downsample(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = self._hide(f).permute(0, 3, 1, 2)  # (B, C, H, W)
        return F.conv2d(x, weight, bias, stride=2).permute(0, 2, 3, 1)

    def image_norm(self, f: Tensor) -> Tensor:
        return l2_norm(self._hide(f), self.norm_dims)  # (B or 1, 1, 1, C)

    def image_rows(self, f: Tensor) -> Tensor | None:
        return self._hide(f).flatten(1, 2) if self.norm_dims[0] == 1 else None  # (B, H * W, C)

    def drop_path(self, f: Tensor, rate: float) -> Tensor:
        out: Tensor = drop_path(f, rate, training=True)
        return out

    def _hide(self, f: Tensor) -> Tensor:
        if self.mask is None:
            return f
        # where, not a product: zero times an infinite hidden value would be NaN.
        return torch.where(self._hidden(f)[..., None], 0, f)

    def _hidden(self, f: Tensor) -> Tensor:
        """The mask at the sites of f, (B, H, W)."""
        assert self.mask is not None
        return upsample_mask(self.mask, f.shape[1] // self.mask.shape[1])
