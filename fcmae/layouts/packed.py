"""Visible patches as a plain dense tensor: the default layout.

The mask patch is a whole multiple of the total stride and every image keeps the same number K of patches, so a stage's
features are (B, K, b, b, C) with b = mask_patch / stride of the stage. LayerNorm, Linear, GELU, GRN and the 2x2
stride-2 downsampling never cross a patch border: on this layout they are ordinary dense algebra over visible rows.
Only the depthwise convolution looks at neighbouring patches, and attention, where a network has it, at all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor

from fcmae.layouts import native
from fcmae.layouts.attention import attend
from fcmae.layouts.norms import l2_norm, refuse_second_derivatives
from fcmae.layouts.sites import sites_of_a_patch, true_rows


class Packed:
    """Features are (B, K, b, b, C): the K visible patches of each image in row-major order.

    Args:
        mask: (B, gh, gw) bool, True = hidden, with exactly num_visible False in each image.
        num_visible: K.
        grn_scope: sites that image_norm takes together, "image" or "batch".
    """

    def __init__(self, mask: Tensor, num_visible: int, grn_scope: str = "image") -> None:
        self.batch, *self.grid = mask.shape
        self.norm_dims = (0, 1, 2, 3) if grn_scope == "batch" else (1, 2, 3)
        self.num_visible = num_visible
        self.visible = true_rows(mask.logical_not(), num_visible)  # (B*K,) indices into the B*gh*gw patches
        self._rows: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> Tensor:
        b = sites_of_a_patch(x, self.batch, self.grid)
        rows = _gather(x.reshape(-1, b * x.shape[-1]), self._row_indices(b))  # (B*K*b, b*C)
        return rows.view(self.batch, self.num_visible, b, b, x.shape[-1])

    def unpack(self, f: Tensor) -> Tensor:
        b, channels = f.shape[-2:]
        gh, gw = self.grid
        canvas = _scatter(f.reshape(-1, b * channels), self._row_indices(b), self.batch * gh * b * gw)
        return canvas.view(self.batch, gh * b, gw * b, channels)  # (B, H, W, C)

    def paste(self, x: Tensor, f: Tensor) -> Tensor:
        """x, a map (B, H, W, C), with the features f at the visible sites."""
        b, channels = f.shape[-2:]
        table = x.reshape(-1, b * channels)
        return table.index_copy(0, self._row_indices(b), f.reshape(-1, b * channels)).view_as(x)

    def take(self, f: Tensor, wider: Packed) -> Tensor:
        """Features at this layout's patches, from a layout that shows these and more, by one gather.

        Args:
            f: (B, K', b, b, C), in the layout `wider`.
            wider: of the same grid.

        Returns:
            (B, K, b, b, C).
        """
        return (
            f.flatten(0, 1)
            .index_select(0, wider.slots()[self.visible])
            .view(self.batch, self.num_visible, *f.shape[2:])
        )

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = f.device.type
        if torch.is_autocast_enabled(device):  # as autocast does for conv2d
            dtype = torch.get_autocast_dtype(device)
            f, weight, bias = f.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        b = f.shape[-2]
        # The loops look at bare memory; what does not fit is left to torch, which refuses it.
        own = f.dtype, f.device, f.shape[-1]
        fits = weight.shape[1:] == (1, native.SIZE, native.SIZE) and f.shape[:2] == (self.batch, self.num_visible)
        fits = fits and all((x.dtype, x.device, x.shape[0]) == own for x in (weight, bias) if x is not None)
        has_loops = fits and native.available(f.device, f.dtype)
        places = self.visible, self.slots() if has_loops else None, self._row_indices(b)
        out: Tensor = _DepthwiseConv.apply(f, weight, bias, *places, (self.batch, *self.grid))
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        queries, keys, values = (x.flatten(1, 3) for x in (q, k, v))  # (B, K*b*b, C)
        return attend(queries, keys, values, num_heads).view_as(v)

    def downsample(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        B, K, b, _, C = f.shape
        self._row_indices(b // 2)  # for the next stage: a compiled block that is recomputed may not keep them
        x = f.view(B, K, b // 2, 2, b // 2, 2, C).transpose(3, 4)  # (B, K, b/2, b/2, 2, 2, C)
        return F.linear(x.reshape(B, K, b // 2, b // 2, 4 * C), weight.permute(0, 2, 3, 1).flatten(1), bias)

    def image_norm(self, f: Tensor) -> Tensor:
        return l2_norm(f, self.norm_dims)  # (B or 1, 1, 1, 1, C)

    def image_rows(self, f: Tensor) -> Tensor | None:
        return f.flatten(1, 3) if self.norm_dims[0] == 1 else None  # (B, K*b*b, C)

    def drop_path(self, f: Tensor, rate: float) -> Tensor:
        out: Tensor = drop_path(f, rate, training=True)
        return out

    def slots(self) -> Tensor:
        """Of each patch of all images which visible one it is, (B*gh*gw,) int64; -1 if it is hidden."""
        slots = self.visible.new_full((self.batch * self.grid[0] * self.grid[1],), -1)
        slots[self.visible] = torch.arange(len(self.visible), device=slots.device)
        return slots

    def _row_indices(self, b: int) -> Tensor:
        """Where the pixel rows of the visible patches lie in a dense map.

        A patch of side b is b rows of b sites; cut into such pieces, a dense map is a table of B*gh*b*gw rows, and
        packing is one gather from it. Returns (B*K*b,) int64.
        """
        if b not in self._rows:
            gw = self.grid[1]
            image_row, column = self.visible // gw, self.visible % gw  # (image, row of patches), column of patches
            rows = (image_row[:, None] * b + torch.arange(b, device=self.visible.device)) * gw + column[:, None]
            self._rows[b] = rows.flatten()
        return self._rows[b]


class _Gather(torch.autograd.Function):
    """table[rows] for distinct rows: the gradient is then copied to its place, where torch's would add it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = table.shape[0]
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad, ctx.saved_tensors[0], ctx.num_rows), None


class _Scatter(torch.autograd.Function):
    """Zeros (num_rows, ...) with `values` in distinct given rows: the inverse of _Gather, and its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows)
        return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.saved_tensors[0]), None, None


class _DepthwiseConv(torch.autograd.Function):
    """conv2d on the map of which f, (B, K, b, b, C), are the visible patches and the rest is zero.

    With slots, the loops of native.c compute visible sites alone; without them the map is laid out. For the backward
    pass it keeps f, not the map, which is gh * gw / K times as large.
    """

    @staticmethod
    def forward(
        ctx: Any,
        f: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        visible: Tensor,
        slots: Tensor | None,
        rows: Tensor,
        size: tuple[int, int, int],
    ) -> Tensor:
        ctx.save_for_backward(f, weight, visible, slots, rows)
        ctx.has_bias, ctx.size = bias is not None, size
        if slots is not None:
            out: Tensor = native.visible_conv(f.flatten(0, 1), _taps(weight), bias, visible, slots, *size[1:])
            return out.view_as(f)
        y = F.conv2d(_canvas(f, rows, size), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return _rows_of(y, rows, f)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        f, weight, visible, slots, rows = ctx.saved_tensors
        x = _canvas(f, rows, ctx.size)
        if slots is not None:
            taps = _taps(weight).flip(0, 1)
            grad_f = native.visible_conv(grad.flatten(0, 1), taps, None, visible, slots, *ctx.size[1:]).view_as(f)
            grad_weight = native.weight_gradient(grad.flatten(0, 2), x.permute(0, 2, 3, 1), rows)
        else:
            grad_x, grad_weight = native.conv_gradients(_canvas(grad, rows, ctx.size), x, weight, with_weight=True)
            grad_f = _rows_of(grad_x, rows, f)
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        return grad_f, grad_weight, grad_bias, None, None, None, None


def _taps(weight: Tensor) -> Tensor:
    """A depthwise weight (C, 1, k, k) as (k, k, C)."""
    return weight.squeeze(1).permute(1, 2, 0)


def _canvas(f: Tensor, rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The map (B, C, H, W), channels last in memory, that has f's pixel rows in the given places and zero elsewhere.

    size: images, and rows and columns of patches.
    """
    b, channels = f.shape[-2:]
    batch, height, width = size
    canvas = f.new_zeros(batch * height * b * width, b * channels)
    canvas.index_copy_(0, rows, f.reshape(-1, b * channels))
    return canvas.view(batch, height * b, width * b, channels).permute(0, 3, 1, 2)


def _rows_of(x: Tensor, rows: Tensor, f: Tensor) -> Tensor:
    """The pixel rows of a map (B, C, H, W) that f's lie in, in f's shape."""
    b, channels = f.shape[-2:]
    return x.permute(0, 2, 3, 1).reshape(-1, b * channels).index_select(0, rows).view(f.shape)


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    out: Tensor = _Gather.apply(table, rows)
    return out


def _scatter(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    out: Tensor = _Scatter.apply(values, rows, num_rows)
    return out
