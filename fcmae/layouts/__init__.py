"""The layouts in which the encoder sees visible patches only.

A layout is made for one batch of masks and offers the operations that depend on geometry (`Layout`): six of which the
networks are made, and two that distinguish the images, for speed and for stochastic depth. Everything else in an
encoder acts on the last dimension and is the same in every layout.

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

DENSE = Dense()  # nothing hidden; it holds nothing that depends on a batch


class Layout(Protocol):
    """The interface that the encoder needs of a backend. Features f have the channels C in their last dimension."""

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, W, C) dense map to features of the visible sites."""
        ...

    def unpack(self, f: Tensor) -> Tensor:
        """Features to (B, H, W, C), zero at hidden sites."""
        ...

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Depthwise convolution; hidden sites and the outside count as zero.

        Args:
            f: features.
            weight: (C, 1, k, k), k odd.
            bias: (C,), or None.

        Returns:
            Features at the same sites, C channels.
        """
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """Multi-head attention among the visible sites of each image; see `attention.attend`.

        Args:
            q: features, the queries.
            k: features, the keys.
            v: features, the values.
            num_heads: a divisor of C.

        Returns:
            Features at the same sites, C channels.
        """
        ...

    def downsample(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """2x2 convolution of stride 2.

        Args:
            f: features.
            weight: (Cout, Cin, 2, 2).
            bias: (Cout,), or None.

        Returns:
            Features at half the height and width, Cout channels.
        """
        ...

    def image_norm(self, f: Tensor) -> Tensor:
        """L2 norm of each channel over the visible sites of one image, broadcastable to f.

        Of the whole batch if grn_scope is "batch", as in the released PyTorch code.
        """
        ...

    def image_rows(self, f: Tensor) -> Tensor | None:
        """f as (B, n, C), the sites of each image with hidden ones zero.

        None where that would be a copy, or where GRN pools over the batch.
        """
        ...

    def drop_path(self, f: Tensor, rate: float) -> Tensor:
        """Stochastic depth: zero at all sites of an image with probability rate, else divided by 1 - rate."""
        ...


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
