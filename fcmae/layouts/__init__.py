"""The layouts in which the encoder sees visible patches only.

A layout is made for one batch of masks and offers the operations that depend on geometry: the five that make the
network, and two that know the images apart, for speed and for stochastic depth. Everything else in the encoder acts on
the last dimension and does not know which layout it runs in:

    pack(x)                          (B, H, W, C) dense map  -> features of the visible sites
    unpack(f)                        features                -> (B, H, W, C), zero at hidden sites
    depthwise_conv(f, weight, bias)  any odd kernel, hidden sites and the outside count as zero
    downsample(f, weight, bias)      2x2, stride 2
    image_norm(f)                    L2 norm of each channel over the visible sites of one image, broadcastable to f;
                                     of the whole batch if grn_scope is "batch", as in the released PyTorch code
    image_rows(f)                    f as (B, n, C), all sites of each image with hidden ones zero, where it can be
                                     seen so at no cost and GRN takes one image; else None
    drop_path(f, rate)               stochastic depth: zero at all sites of an image with probability rate, else
                                     divided by 1 - rate

Parameters stay in dense layout, (C, 1, k, k) and (Cout, Cin, 2, 2), whatever the layout of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from fcmae.layouts.dense import Dense
from fcmae.layouts.masked import Masked
from fcmae.layouts.packed import Packed
from fcmae.layouts.sites import count_visible

__all__ = ["DENSE", "PACKED", "Layout", "MakeLayout", "Masked", "Packed", "make_layout"]

DENSE = Dense()  # nothing hidden; it holds nothing of a batch


class Layout(Protocol):
    """What the encoder asks of a backend; see the module's docstring."""

    def pack(self, x: Tensor) -> Tensor: ...
    def unpack(self, f: Tensor) -> Tensor: ...
    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def downsample(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...
    def image_norm(self, f: Tensor) -> Tensor: ...
    def image_rows(self, f: Tensor) -> Tensor | None: ...
    def drop_path(self, f: Tensor, rate: float) -> Tensor: ...


# (mask, num_visible) -> the layout of one batch; see `make_layout`.
MakeLayout = Callable[[Tensor, int | None], Layout]


def make_layout(backend: str, mask: Tensor, num_visible: int | None = None, grn_scope: str = "image") -> Layout:
    """The layout named `backend` for one batch.

    Args:
        backend: packed, triton (packed with kernels for GPUs), masked or minkowski.
        mask: (B, gh, gw) bool, True = hidden.
        num_visible: visible patches of each image, which only packed and triton need; None counts them, which waits
            for the device.
        grn_scope: "image", or "batch" to continue a run of the released PyTorch code, whose GRN pools over the images
            that a process computes together.

    Raises:
        ValueError: for an unknown backend or scope, for minkowski where MinkowskiEngine is missing, for triton without
            Triton or a GPU that runs its kernels, and for packed and triton if the images differ in their number of
            visible patches.
    """
    if grn_scope not in ("image", "batch"):
        raise ValueError(f"grn_scope = {grn_scope!r}: use image or batch")
    if backend == "packed":
        return Packed(mask, count_visible(mask) if num_visible is None else num_visible, grn_scope)
    if backend == "triton":
        try:
            from fcmae.layouts.triton import PackedTriton
        except (ImportError, AttributeError) as error:  # an old one lacks what the kernels use
            raise ValueError(
                f"backend = 'triton' needs a recent Triton ({error}): pip install -U triton, or use packed"
            ) from error

        return PackedTriton(mask, count_visible(mask) if num_visible is None else num_visible, grn_scope)
    if backend == "masked":
        return Masked(mask, grn_scope)
    if backend == "minkowski":
        from fcmae.layouts.minkowski import Minkowski

        return Minkowski(mask, grn_scope)
    raise ValueError(f"backend = {backend!r}: use packed, triton, masked or minkowski")


PACKED: MakeLayout = partial(make_layout, "packed")
