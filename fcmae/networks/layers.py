"""The layers of ConvNeXt V2 and V1, and their block, for features (..., C) in any layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import Layout
from fcmae.layouts.norms import at_least_float32, l2_norm, refuse_second_derivatives
from fcmae.networks.spec import MLP_RATIO

EPS = 1e-6


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

    Args:
        dim: channels C.

    Attributes:
        gamma, beta: (1, 1, 1, C), the released code's shape.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """Normalise features by the norms of their images.

        Args:
            x: (..., C) float.
            norm: the float32 G of its images, broadcastable to x.

        Returns:
            (..., C) in x's dtype.
        """
        scale = norm / (norm.mean(dim=-1, keepdim=True) + EPS)
        gamma, beta = self.gamma.flatten(), self.beta.flatten()  # (C,), which broadcasts to features of any rank
        # gamma * (x * scale) + beta + x in one pass over x.
        return torch.addcmul(beta, at_least_float32(x), 1 + gamma * scale).to(x.dtype)


def grn_linear(rows: Tensor, grn: GRN, linear: nn.Linear) -> Tensor:
    """linear(grn(rows)), with fewer passes over the features and fewer of them kept than by one layer after the other.

    Args:
        rows: (B, n, C), all the sites of each image, hidden ones zero.
        grn: of C channels.
        linear: from C channels.

    Returns:
        (B, n, linear's width).
    """
    gamma, beta = grn.gamma.flatten(), grn.beta.flatten()
    weight: Tensor = linear.weight
    bias: Tensor = linear.bias
    device = rows.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for F.linear
        dtype = torch.get_autocast_dtype(device)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    out: Tensor = _GRNLinear.apply(rows, gamma, beta, weight, bias)
    return out


class _GRNLinear(torch.autograd.Function):
    """(rows * scale + beta) @ weight^T + bias, scale = 1 + gamma * G / (mean of G + eps), G the norm of an image.

    An image with more sites than the Linear has outputs scales the weight instead, as

        (rows * scale + beta) @ weight^T + bias = rows @ (weight * scale)^T + (weight @ beta + bias).

    The gradient of that, P = grad^T @ rows for each image, gives those of scale and weight as sums of P * weight and
    P * scale. Other images scale the rows again in the backward pass: keeping scaled rows would double what a block
    keeps.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm = l2_norm(rows, (1,)).to(gamma.dtype)  # (B, 1, C)
        scale = 1 + gamma * norm / (norm.mean(dim=-1, keepdim=True) + EPS)
        ctx.save_for_backward(rows, gamma, beta, weight, norm, scale)
        if _scales_weight(rows, weight):
            shift = (weight @ beta.to(weight.dtype)) + bias
            return torch.baddbmm(shift, rows, (weight * scale).to(weight.dtype).transpose(1, 2))
        return F.linear(torch.addcmul(beta, rows, scale).to(rows.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        refuse_second_derivatives()
        rows, gamma, beta, weight, norm, scale = ctx.saved_tensors
        grad_bias = grad.sum((0, 1))
        grad_beta = grad_bias.to(gamma.dtype) @ weight.to(gamma.dtype)
        if _scales_weight(rows, weight):
            grad_rows = torch.bmm(grad, (weight * scale).to(weight.dtype))
            products = torch.bmm(grad.transpose(1, 2), rows).to(gamma.dtype)  # (B, width, C)
            grad_scale = (products * weight).sum(1, keepdim=True)  # (B, 1, C)
            grad_weight = (products * scale).sum(0) + grad_bias[:, None] * beta
        else:
            grad_rows = grad @ weight
            grad_scale = (grad_rows * rows.to(gamma.dtype)).sum(1, keepdim=True)  # fp16 may not hold a product
            scaled = torch.addcmul(beta, rows, scale).to(rows.dtype)
            grad_weight = grad.flatten(0, 1).t() @ scaled.flatten(0, 1)
            grad_rows *= scale
        # Back through scale = 1 + gamma * norm / mean.
        mean = norm.mean(dim=-1, keepdim=True) + EPS
        grad_gamma = (grad_scale * norm / mean).sum((0, 1))
        grad_ratio = grad_scale * gamma
        around = (grad_ratio * norm).sum(-1, keepdim=True) / (mean.square() * norm.shape[-1])
        # The gradient of a norm is rows / norm, and 0 where the norm is. For a channel that is nearly dead, 1 / norm is
        # more than 16 bits can hold.
        pull = torch.where(norm == 0, 0, (grad_ratio / mean - around) / norm)
        if rows.dtype == pull.dtype:
            grad_rows.addcmul_(rows, pull)
        else:
            grad_rows = torch.addcmul(grad_rows, rows, pull).to(rows.dtype)
        return grad_rows, grad_gamma, grad_beta, grad_weight.to(weight.dtype), grad_bias


def _scales_weight(rows: Tensor, weight: Tensor) -> bool:
    """Whether a scaled copy of the weight for each image, (B, width, C), is smaller than the rows, (B, n, C)."""
    return rows.shape[1] >= weight.shape[0]


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks on its call or its gradient."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def gelu_of(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU(linear(x)), which overwrites the product where no gradient needs it and no hook may hold it.

    The system allocates memory for a large image's expanded features page by page, which takes longer than GELU.

    Args:
        linear: from C to D channels.
        x: (..., C).

    Returns:
        (..., D).
    """
    product: Tensor = linear(x)
    if product.requires_grad or torch.compiler.is_compiling() or is_watched(linear):
        return F.gelu(product)
    out: Tensor = torch.ops.aten.gelu_(product)
    return out


def project(features: Tensor, grn: GRN, linear: nn.Linear, layout: Layout) -> Tensor:
    """linear(grn(features)), as one operation if the layout has the rows of each image together, else as two.

    Also as two if either has a hook, or another module has replaced the Linear.

    Args:
        features: (..., C) in `layout`, with arbitrary values at hidden sites.
        grn: of C channels.
        linear: from C to D channels.
        layout: that of the features.

    Returns:
        (..., D), in `layout`.
    """
    is_plain = type(linear) is nn.Linear and not (is_watched(grn) or is_watched(linear))
    rows = layout.image_rows(features) if is_plain else None
    if rows is not None:
        return grn_linear(rows, grn, linear).view(*features.shape[:-1], -1)
    out: Tensor = linear(grn(features, layout.image_norm(features)))
    return out


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of features in any layout.

    Args:
        dim: channels C.
        kernel_size: odd.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """Features (..., C) in `layout` to features of the same shape."""
        return layout.depthwise_conv(x, self.weight, self.bias)


class DropPath(nn.Module):
    """Stochastic depth: in training, a branch of an image is dropped, or divided by the chance that it is not.

    Args:
        rate: probability of dropping.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, layout: Layout) -> Tensor:
        """Features (..., C) in `layout` to features of the same shape."""
        return layout.drop_path(branch, self.rate) if self.training and self.rate > 0 else branch


class Block(nn.Module):
    """V2: x + pwconv2(GRN(GELU(pwconv1(LayerNorm(dwconv(x)))))). V1: x + gamma * pwconv2(GELU(...)), LayerScale.

    Drop path multiplies what is added to x.

    Args:
        dim: channels C.
        hidden: expanded channels; None is 4C.
        kernel_size: side of the depthwise kernel, odd.
        drop_path_rate: probability of dropping the branch for one image.
        use_grn: V2 if true, V1 if false.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        kernel_size: int = 7,
        drop_path_rate: float = 0.0,
        use_grn: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden or MLP_RATIO * dim
        self.dwconv = DepthwiseConv(dim, kernel_size)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.grn = GRN(hidden) if use_grn else None
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = None if use_grn else nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Features (..., C) in `layout` to features of the same shape."""
        h = self.expand(x, layout)  # (..., hidden)
        h = project(h, self.grn, self.pwconv2, layout) if self.grn is not None else self.pwconv2(h)  # (..., C)
        return self.add(x, h, layout)

    def trace(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The expanded features that pwconv2 sees (in V2 after GRN), and the output; see `encoder.StageBlock`."""
        h = self.expand(x, layout)  # (..., hidden)
        if self.grn is not None:
            h = self.grn(h, layout.image_norm(h))
        return h, self.add(x, self.pwconv2(h), layout)

    def expand(self, x: Tensor, layout: Layout) -> Tensor:
        """GELU(pwconv1(LayerNorm(dwconv(x)))): (..., C) to (..., hidden), in `layout`."""
        return gelu_of(self.pwconv1, self.norm(self.dwconv(x, layout)))  # (..., hidden)

    def add(self, x: Tensor, branch: Tensor, layout: Layout) -> Tensor:
        """x + DropPath(branch), or x + DropPath(gamma * branch) in V1.

        Args:
            x: (..., C), what the block was given.
            branch: (..., C), what it adds.
            layout: that of both.

        Returns:
            (..., C), in `layout`.
        """
        if self.gamma is not None:
            branch = self.gamma * branch
        out: Tensor = x + self.drop_path(branch, layout)
        return out
