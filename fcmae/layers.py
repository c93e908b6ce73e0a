"""The layers of ConvNeXt V2 and V1, for features (..., C) in any layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.sparse import Layout

EPS = 1e-6


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is wider: norms of 16-bit features overflow or lose their small terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension with eps 1e-6, computed and returned in float32 under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least_float32(x))


class GRN(nn.Module):
    """Global response normalisation (arXiv 2301.00808, Sec. 4.1), over the visible sites of one image.

    G = L2 norm of each channel over the image's sites; N = G / (mean of G over channels + 1e-6);
    y = gamma * (x * N) + beta + x, with gamma = beta = 0 at the start. The paper prints a sum where this has a mean,
    as its code does; they differ by a factor that gamma absorbs. The released PyTorch code takes G over the whole
    batch in pretraining and over one image in fine-tuning; here it is one image in both, unless the layout's grn_scope
    is "batch".

    gamma, beta: (1, 1, 1, C), the released code's shape.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """Normalise x (..., C) by norm, the float32 G of its images, broadcastable to x. Returns x's dtype."""
        scale = norm / (norm.mean(dim=-1, keepdim=True) + EPS)
        gamma, beta = self.gamma.flatten(), self.beta.flatten()  # (C,), which broadcasts to features of any rank
        # gamma * (x * scale) + beta + x in one pass over x.
        return torch.addcmul(beta, at_least_float32(x), 1 + gamma * scale).to(x.dtype)


class Block(nn.Module):
    """x + DropPath(pwconv2(GRN(GELU(pwconv1(LayerNorm(dwconv(x))))))); V1 has LayerScale at the end instead of GRN.

    dim: channels C. drop_path: probability of dropping the branch for one image. use_grn: V2 if true, V1 if false.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, use_grn: bool = True) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim) if use_grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = None if use_grn else nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path_rate = drop_path

    def forward(self, x: Tensor, layout: Layout, select: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Features of all sites of x, or of those that `select` keeps.

        x: features in `layout`. select: picks sites of a feature tensor; what follows the last operation that needs
        every site (GRN's norm) is then computed for the picked ones only.
        """
        h = layout.depthwise_conv(x, self.dwconv.weight, self.dwconv.bias)
        h = F.gelu(self.pwconv1(self.norm(h)))
        if self.grn is not None:
            norm = layout.image_norm(at_least_float32(h))
        if select is not None:
            x, h = select(x), select(h)
        if self.grn is not None:
            h = self.grn(h, norm)
        h = self.pwconv2(h)
        if self.gamma is not None:
            h = self.gamma * h
        if self.training and self.drop_path_rate > 0:
            h = layout.drop_path(h, self.drop_path_rate)
        return x + h
