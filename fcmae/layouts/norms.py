"""Norms that keep sums of 16-bit features, and gradients at zero, finite; and a guard against wrong gradients."""

from __future__ import annotations

import torch
from torch import Tensor

CACHED = 1 << 17  # features that a core's cache holds
LARGE = 8 * CACHED  # features of an image: fewer pass through memory as fast


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is wider: norms of 16-bit features overflow or lose their small terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def root(squares: Tensor) -> Tensor:
    """Square root of sums of squares, whose gradient at zero is zero, as a norm's is, and not infinite."""
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def l2_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L2 norm over dims, which are kept with size 1, in float32 at least.

    On a CPU torch.linalg.vector_norm takes 2 to 10 times as long over any dimension but the last.
    """
    x = at_least_float32(x)
    is_large = dims == (1,) and x.is_cpu and x.numel() > LARGE * len(x)
    if is_large and not x.requires_grad and not torch.compiler.is_compiling():
        # By parts: the squares of all would pass through memory, twice.
        parts = torch.split(x, max(1, CACHED // x[:, 0].numel()), 1)
        return root(torch.stack([part.square().sum(dims, keepdim=True) for part in parts]).sum(0))
    return root(x.square().sum(dims, keepdim=True))


def refuse_second_derivatives() -> None:
    """Call in a hand-written backward: raises if a second derivative is asked for, which it cannot give.

    torch's once_differentiable would raise only if the incoming gradient requires one itself, and omit terms otherwise.

    Raises:
        RuntimeError: under create_graph.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("second derivatives are not computed: the layers of fcmae have first ones only")
