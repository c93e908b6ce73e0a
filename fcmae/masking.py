"""Which patches are hidden. numpy only: masks are drawn where images are decoded and counted before torch loads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible in every image: num_patches * (1 - mask_ratio), rounded down.

    The released code keeps int(49 * 0.4) = 19 of 49 patches. The small term keeps a product that is whole in
    decimals whole in binary: 10 * (1 - 0.9) is 0.9999999999999998.
    """
    return int(num_patches * (1 - mask_ratio) + 1e-6)


def random_mask(grid: tuple[int, int], visible: int, seeds: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Hide all but `visible` patches of each image, chosen uniformly.

    Args:
        grid: rows and columns of patches (gh, gw).
        visible: patches that stay visible in each image.
        seeds: one sequence of non-negative integers an image, such as (seed, epoch, index), that alone decides its
            mask: any number of processes and workers draws the same.

    Returns:
        (len(seeds), gh, gw) bool, True = hidden, with exactly `visible` False in each image.

    Raises:
        ValueError: unless 1 <= visible <= gh * gw.
    """
    num_patches = grid[0] * grid[1]
    if not 1 <= visible <= num_patches:
        raise ValueError(f"visible = {visible} of {num_patches} patches: keep at least 1 and at most {num_patches}")
    mask = np.ones((len(seeds), num_patches), dtype=np.bool_)
    for row, seed in zip(mask, seeds, strict=True):
        row[np.random.default_rng(seed).permutation(num_patches)[:visible]] = False
    return mask.reshape(-1, *grid)
