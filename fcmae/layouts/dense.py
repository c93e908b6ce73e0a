"""Nothing hidden: the dense network of fine-tuning and prediction, and of the decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.layouts import native
from fcmae.layouts.masked import Masked
from fcmae.layouts.norms import refuse_second_derivatives


class Dense(Masked):
    """`Masked` without a mask, on (B, H, W, C) maps; the loop in C, if available, computes the weight's gradient."""

    def __init__(self) -> None:
        super().__init__(None)

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        learns = torch.is_grad_enabled() and weight.requires_grad  # without, no compiler is called
        fits = learns and weight.shape[-1] == native.SIZE and f.dtype == weight.dtype
        if fits and native.available(f.device, f.dtype) and not torch.is_autocast_enabled(f.device.type):
            out: Tensor = _DepthwiseConv.apply(f, weight, bias)
            return out
        return super().depthwise_conv(f, weight, bias)


class _DepthwiseConv(torch.autograd.Function):
    """conv2d of a map (B, H, W, C), its weight's gradient by `native.weight_gradient`."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(f, weight)
        ctx.has_bias = bias is not None
        x = f.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]).permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        refuse_second_derivatives()
        f, weight = ctx.saved_tensors
        grad_f, _ = native.conv_gradients(grad.permute(0, 3, 1, 2), f.permute(0, 3, 1, 2), weight, with_weight=False)
        rows = torch.arange(f.shape[0] * f.shape[1], device=f.device)  # whole lines of the maps
        grad_weight = native.weight_gradient(grad.flatten(0, 1), f, rows)
        grad_bias = grad.sum((0, 1, 2)) if ctx.has_bias else None
        return grad_f.permute(0, 2, 3, 1), grad_weight, grad_bias
