"""Attention among the sites of each image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C / num_heads)) v, for each head by itself.

    Args:
        q: (B, n, C).
        k: (B, n, C).
        v: (B, n, C).
        num_heads: a divisor of C; each head has C / num_heads consecutive channels.
        seen: (B, n) bool, the sites that are attended to; None is all.

    Returns:
        (B, n, C).
    """
    queries, keys, values = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, None if seen is None else seen[:, None, None])
    return out.transpose(1, 2).flatten(2)
