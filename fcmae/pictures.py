"""Reconstructions and curves as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcmae.data.dataset import denormalize
from fcmae.loss import patch_statistics, patchify, unpatchify
from fcmae.sites import refine

GREY = 0.5  # what hidden patches are shown as, where 0 is black and 1 is white


def reconstruction_panels(
    pred: Tensor, images: Tensor, mask: Tensor, mean: Tensor, std: Tensor, *, normalize: bool = True
) -> list[Tensor]:
    """Original, masked, reconstruction, and reconstruction with the visible patches pasted.

    pred: (B, L, p * p * C), predictions of every site. images: (B, C, H, W), normalised with mean and std (C, 1, 1).
    mask: (B, H / p, W / p) bool, True = hidden. normalize: the model predicts standardised patches; they are given
    the mean and deviation of the target patch they stand for. Returns four (B, C, H, W) float32 tensors in the
    images' own range.
    """
    size = (images.shape[2], images.shape[3])
    patch = size[0] // mask.shape[1]
    pred = pred.float()
    if normalize:
        target_mean, target_std = patch_statistics(patchify(images, patch))
        pred = pred * target_std + target_mean
    original = denormalize(images, mean, std)
    reconstruction = denormalize(unpatchify(pred, patch, size), mean, std)
    hidden = refine(mask, patch)[:, None]
    masked = torch.where(hidden, float(original.min()) * (1 - GREY) + float(original.max()) * GREY, original)
    pasted = torch.where(hidden, reconstruction, original)
    return [original, masked, reconstruction, pasted]


def save_reconstructions(path: Path, panels: Sequence[Tensor], title: str) -> None:
    """Draw the panels of `reconstruction_panels`, one image a row. Multi-band images show their first three bands."""
    from matplotlib.figure import Figure

    names = ("original", "masked", "reconstruction", "with visible patches")
    rows = panels[0].shape[0]
    height, width = panels[0].shape[2:]
    figure = Figure(figsize=(4 * 2, rows * 2 * height / width + 0.6), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for row in range(rows):
        low, high = float(panels[0][row].min()), float(panels[0][row].max())
        for column, (panel, name) in enumerate(zip(panels, names, strict=True)):
            axis = axes[row, column]
            axis.imshow(_displayable(panel[row], low, high), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _displayable(image: Tensor, low: float, high: float) -> NDArray[np.float32]:
    """(C, H, W) to (H, W) or (H, W, 3) in 0..1; the original's range decides the scale where it leaves 0..1."""
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    channels = image[:3] if image.shape[0] >= 3 else image[:1]
    scaled = ((channels - low) / max(high - low, 1e-6)).clamp(0, 1)
    array: NDArray[np.float32] = scaled.permute(1, 2, 0).squeeze(-1).cpu().numpy()
    return array


def save_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> None:
    """Draw named curves, each (epochs, values), in one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, (epochs, values) in curves.items():
        axis.plot(epochs, values, label=name, marker="." if len(values) < 30 else None)
    axis.set_xlabel("epoch")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if curves:  # matplotlib warns of a legend without entries
        axis.legend()
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{path.name}")
    figure.savefig(aside, dpi=110, format="png")  # type: ignore[attr-defined]  # matplotlib is not typed here
    aside.replace(path)
