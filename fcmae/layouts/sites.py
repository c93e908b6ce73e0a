"""Indices of the visible or hidden sites of a batch of masks.

Where every image has the same number of each, shapes are static and `true_rows` does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def true_rows(mask: Tensor, count: int) -> Tensor:
    """Flat indices of the True sites, image by image in row-major order.

    Args:
        mask: (B, ...) bool with exactly `count` True sites in each image (not checked: that would wait for the device).
        count: True sites of each image.

    Returns:
        (B * count,) int64, indices into the B * L sites of the flattened mask.
    """
    flat = mask.flatten(1)
    # A stable sort puts the True sites first and keeps their order.
    sites = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    offsets = torch.arange(flat.shape[0], device=mask.device)[:, None] * flat.shape[1]
    return (sites + offsets).flatten()


def count_visible(mask: Tensor) -> int:
    """Number of visible (False) sites, which must be the same in every image. Waits for the device.

    Args:
        mask: (B, gh, gw) bool, True = hidden.

    Raises:
        ValueError: if the images differ or nothing is visible.
    """
    counts = visible_counts(mask)
    if len(counts) != 1:
        raise ValueError(
            f"mask leaves {counts} patches visible: every image needs the same number; "
            "the backends masked and minkowski take any"
        )
    return counts[0]


def visible_counts(mask: Tensor) -> list[int]:
    """The different numbers of visible (False) sites that images have, in rising order. Waits for the device.

    Args:
        mask: (B, ...) bool, True = hidden.

    Raises:
        ValueError: if nothing is visible in any image.
    """
    counts = sorted(set(mask.logical_not().flatten(1).sum(1).tolist()))
    if counts == [0]:
        raise ValueError("mask leaves no patch visible: leave at least 1")
    return counts


def sites_of_a_patch(x: Tensor, batch: int, grid: Sequence[int]) -> int:
    """Side of a patch in the sites of a map.

    Args:
        x: the map, (B, H, W, C).
        batch: number of masks.
        grid: their patches, (gh, gw).

    Raises:
        ValueError: if the masks do not lie on the map.
    """
    side = x.shape[1] // grid[0]
    if tuple(x.shape[:3]) != (batch, grid[0] * side, grid[1] * side):
        raise ValueError(
            f"mask: {batch} of {grid[0]} x {grid[1]} patches do not lie on {x.shape[0]} maps of {x.shape[1]} x "
            f"{x.shape[2]} sites: give each image a mask, of square patches"
        )
    return side


def upsample_mask(mask: Tensor, factor: int) -> Tensor:
    """Repeat every site along both axes.

    Args:
        mask: (B, gh, gw).
        factor: how many times.

    Returns:
        (B, gh * factor, gw * factor), of the mask's type.
    """
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
