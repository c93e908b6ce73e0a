"""What the decoder is asked to predict, and how its answer is judged."""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.layouts.norms import at_least_float32
from fcmae.layouts.sites import true_rows

EPS = 1e-6


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into non-overlapping patches.

    images: (B, C, H, W), H and W multiples of patch. Returns (B, L, patch * patch * C), patches in row-major order,
    the values of each ordered (row, column, channel): the released decoders' order.
    """
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(patches: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`. patches: (B, L, patch * patch * C). size: (H, W). Returns (B, C, H, W)."""
    B = patches.shape[0]
    H, W = size
    x = patches.reshape(B, H // patch, W // patch, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, H, W)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and root of the unbiased variance plus 1e-6, of each patch over all its values: each (..., 1) float32."""
    var, mean = torch.var_mean(at_least_float32(patches), dim=-1, keepdim=True)
    return mean, (var + EPS).sqrt()


def reconstruction_loss(pred: Tensor, images: Tensor, mask: Tensor, *, normalize: bool = True) -> Tensor:
    """Mean squared error over hidden patches only (arXiv 2301.00808, Sec. 3).

    pred: (B, M, p * p * C) float, the predictions for the M hidden patches of each image, or for every patch if images
    differ in their number of hidden ones, in row-major order. images: (B, C, H, W) float.
    mask: (B, H / p, W / p) bool, True = hidden.
    normalize: standardise each target patch by its own mean and unbiased variance (eps 1e-6).
    Returns a float32 scalar. Raises ValueError if no patch is hidden.
    """
    M, pred = pred.shape[1], pred.flatten(0, 1)
    if mask[0].numel() > M:
        hidden = true_rows(mask, M)
    else:  # every patch is predicted, and only the mask tells how many are hidden
        hidden = mask.flatten().nonzero()[:, 0]
        pred = pred.index_select(0, hidden)
    if len(hidden) == 0:
        raise ValueError("mask hides no patch: the loss is over hidden patches, so hide at least one")
    patch = images.shape[2] // mask.shape[1]
    # Only hidden patches are gathered, so no target is computed and thrown away.
    target = at_least_float32(patchify(images, patch).flatten(0, 1).index_select(0, hidden))  # (num_hidden, p * p * C)
    if normalize:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    return (at_least_float32(pred) - target).square().mean()
