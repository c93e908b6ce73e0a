"""Reconstructions and curves as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fcmae.atomic import read_bytes, replacing
from fcmae.data.normalize import Normalize
from fcmae.data.source import printable
from fcmae.data.split import evenly
from fcmae.layouts.sites import upsample_mask
from fcmae.masked import patch_statistics, patchify, unpatchify
from fcmae.segmentation import colours, overlay

SHOWN = 3  # channels of a picture; the first alone of images that have fewer
LARGE = 256  # longest side of an image in a picture of reconstructions, in pixels
TILE = 128  # and in one over time
MOMENTS = 8  # in such a picture
LISTED = 12  # classes that are named below a picture
MAX_TILES = 2**25  # bytes of a file


def reconstruction_panels(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    normalize: Normalize,
    *,
    normalize_target: bool = True,
    known: Tensor | None = None,
) -> list[Tensor]:
    """Original, masked, reconstruction, and reconstruction with the visible patches pasted.

    Args:
        pred: (B, L, p * p * C), predictions of every site.
        images: (B, C, H, W), as `normalize` gives them.
        mask: (B, H / p, W / p) bool, True = hidden.
        normalize: the normalisation of the images.
        normalize_target: the model predicts standardised patches; each is given the mean and deviation of its target
            patch, and a patch of which nothing is known those of the images, 0 and hardly any.
        known: (B, C, H, W) bool, false for values that are missing; None if none is.

    Returns:
        Four (B, C, H, W) float32 tensors in the images' own range.
    """
    size = (images.shape[2], images.shape[3])
    patch = size[0] // mask.shape[1]
    pred = pred.float()
    if normalize_target:
        values = images if known is None else images.masked_fill(~known, torch.nan)
        target_mean, target_std = patch_statistics(patchify(values, patch), has_missing=known is not None)
        pred = pred * target_std + target_mean.nan_to_num()
    original = normalize.inverse(images)
    reconstruction = normalize.inverse(unpatchify(pred, patch, size))
    hidden = upsample_mask(mask, patch)[:, None]
    grey = original.new_tensor([sum(limits(image)) / 2 for image in original])
    masked = torch.where(hidden, grey[:, None, None, None], original)
    pasted = torch.where(hidden, reconstruction, original)
    return [original, masked, reconstruction, pasted]


def save_reconstructions(path: Path, panels: Sequence[Tensor], title: str) -> None:
    """Draw reconstructions, one image per row.

    Args:
        path: the file.
        panels: of `reconstruction_panels`.
        title: above the rows.
    """
    names = ("original", "masked", "reconstruction", "with visible patches")
    columns = [(name, _tiles(panel, panels[0], LARGE)) for name, panel in zip(names, panels, strict=True)]
    _save_columns(path, columns, len(panels[0]), 2.0, with_bands(title, panels[0].shape[1]))


def save_overlays(
    path: Path,
    panels: Sequence[tuple[NDArray[Any], NDArray[np.integer], NDArray[np.integer]]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """Draw images beside their true and predicted classes, one image per row.

    Args:
        path: the file.
        panels: for each image, (C, H, W) uint8 or float32, and two (H, W) of classes by number; may be empty.
        class_names: of the classes; the first LISTED are named.
        title: above the rows.
    """
    from matplotlib.patches import Patch

    figure = new_figure(7.5, 2.5 * len(panels) + 1)
    axes = figure.subplots(max(1, len(panels)), 3, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (image, *labels) in zip(axes, panels, strict=False):
        values = torch.from_numpy(image).float() / (255 if image.dtype == np.uint8 else 1)
        picture = displayable(values, *limits(values))
        for axis, shown in zip(row, (picture, *(overlay(picture, each) for each in labels)), strict=True):
            axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axis, name in zip(axes[0], ("image", "true", "predicted"), strict=True):
        axis.set_title(name, fontsize=10)
    patches = [
        Patch(color=colour / 255, label=shortened(name))
        for colour, name in zip(colours(len(class_names)), class_names[:LISTED], strict=False)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(4, len(patches)), fontsize=9)
    figure.suptitle(with_bands(title, len(panels[0][0])) if panels else title, fontsize=11)
    save_figure(figure, path)


def save_tiles(path: Path, panels: Sequence[Tensor]) -> None:
    """Save what `save_over_time` shows of one evaluation: reconstructions with visible patches, below one another.

    Images of more than TILE pixels are scaled down.

    Args:
        path: the file.
        panels: of `reconstruction_panels`.
    """
    with replacing(path) as aside:
        Image.fromarray(_tiles(panels[3], panels[0], TILE)).save(aside, format="png")


def _tiles(panel: Tensor, originals: Tensor, longest: int) -> NDArray[np.uint8]:
    """(B, C, H, W) to (B * h, w) or (B * h, w, 3) uint8, on the scale of the originals; no side above `longest`."""
    size = panel.shape[2:]
    shrink = max(1.0, max(size) / longest)
    small = F.interpolate(panel, [round(side / shrink) for side in size], mode="area") if shrink > 1 else panel
    rows = [displayable(image, *limits(original)) for image, original in zip(small, originals, strict=True)]
    strip: NDArray[np.uint8] = (np.concatenate(rows) * 255).round().astype(np.uint8)
    return strip


def _read_tiles(path: Path) -> NDArray[np.uint8] | None:
    try:
        with Image.open(BytesIO(read_bytes(path, MAX_TILES)), formats=("PNG",)) as image:
            return np.asarray(image)
    except Exception:  # for a broken file Pillow raises whatever its parts raise
        return None


def save_over_time(path: Path, panels: Sequence[Tensor], moments: Sequence[tuple[str, Path]], title: str) -> None:
    """Draw how reconstructions of the same images developed, one image per row.

    Args:
        path: the file.
        panels: the present ones of `reconstruction_panels`: originals and masked images come first.
        moments: titles and files of `save_tiles`, in order; at most MOMENTS are drawn, evenly spread from the first to
            the last, without those that are damaged or gone.
        title: above the rows.
    """
    moments = [moments[i] for i in evenly(len(moments), MOMENTS)]
    columns = [
        (name, _tiles(panel, panels[0], TILE)) for name, panel in zip(("original", "masked"), panels, strict=False)
    ]
    for name, file in moments:
        tiles = _read_tiles(file)
        if tiles is not None and tiles.shape == columns[0][1].shape:
            columns.append((name, tiles))
    _save_columns(path, columns, len(panels[0]), 1.3, with_bands(title, panels[0].shape[1]))


def _save_columns(
    path: Path, columns: Sequence[tuple[str, NDArray[np.uint8]]], num: int, inches: float, title: str
) -> None:
    """Draw named columns of `num` images below one another, as `_tiles` gives them; inches: the width of one."""
    # One image with white gaps: axes for each of the tiles would take long to lay out.
    height, width = columns[0][1].shape[:2]
    side, gap = height // num, max(1, width // 16)
    mosaic = np.full((num * (side + gap), len(columns) * (width + gap), *columns[0][1].shape[2:]), 255, np.uint8)
    for column, (_, strip) in enumerate(columns):
        for row, tile in enumerate(np.split(strip, num)):
            top, left = row * (side + gap), column * (width + gap)
            mosaic[top : top + side, left : left + width] = tile
    figure = new_figure(inches * len(columns), inches * num * side / width + 0.7)
    axis = figure.subplots()
    axis.imshow(mosaic[:-gap, :-gap], cmap="gray", vmin=0, vmax=255)
    middles = [column * (width + gap) + width / 2 for column in range(len(columns))]
    axis.set_xticks(middles, [name for name, _ in columns], fontsize=9)
    axis.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def save_heat_map(
    path: Path,
    layers: Sequence[str],
    epochs: Sequence[float],
    values: NDArray[np.float64],
    label: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a statistic of each layer over time, the first layer on top.

    Args:
        path: the file.
        layers: their names.
        epochs: rising.
        values: (layers, epochs); NaN is left blank.
        label: of the colours.
        limits: values of the first and the last colour; None spreads the colours over the logarithm of the values,
            which are positive.
    """
    from matplotlib import colors
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    # A cell reaches half-way to its neighbours.
    middles = (np.array(epochs[1:]) + np.array(epochs[:-1])) / 2
    first = middles[0] - epochs[0] if len(epochs) > 1 else 0.5
    last = epochs[-1] - middles[-1] if len(epochs) > 1 else 0.5
    edges = np.concatenate([[epochs[0] - first], middles, [epochs[-1] + last]])
    figure = new_figure(8, 1.6 + 0.22 * len(layers))
    axis = figure.subplots()
    low, high = np.nanmin(values), np.nanmax(values) * 1.001
    norm = colors.LogNorm(low, high) if limits is None else colors.Normalize(*limits)
    mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1), values, cmap="viridis", norm=norm)
    shown = range(0, len(layers), max(1, len(layers) // 24))
    axis.set_yticks([i + 0.5 for i in shown], [layers[i] for i in shown], fontsize=8)
    axis.invert_yaxis()
    axis.xaxis.set_major_locator(MaxNLocator(integer=epochs[-1] - epochs[0] > 2))
    axis.set_xlabel("epoch")
    bar = figure.colorbar(mesh, ax=axis)
    bar.set_label(label, fontsize=9)
    if limits is None:  # 20 rather than 2 x 10^1
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.yaxis.set_minor_formatter(ScalarFormatter())
    save_figure(figure, path)


def displayable(image: Tensor, low: float, high: float) -> NDArray[np.float32]:
    """The channels of an image that are shown, in the form that matplotlib shows.

    Args:
        image: (C, H, W).
        low: what is shown black, see `limits`.
        high: what is shown white.

    Returns:
        (H, W) or (H, W, 3), in 0..1.
    """
    scaled = ((_shown(image) - low) / max(high - low, 1e-6)).clamp(0, 1)
    array: NDArray[np.float32] = scaled.permute(1, 2, 0).squeeze(-1).cpu().numpy()
    return array


def limits(image: Tensor) -> tuple[float, float]:
    """The values of an image that are shown black and white.

    Args:
        image: (C, H, W).

    Returns:
        The least and the largest of the channels that are shown; 0 and 1 if they are in that range, unless all are
        below a fourth, as 12 bits in 16 or reflectances are.
    """
    low, high = map(float, _shown(image).aminmax())
    return (0.0, 1.0) if low >= 0 and high <= 1 and not low < high <= 0.25 else (low, high)


def _shown(image: Tensor) -> Tensor:
    return image[: SHOWN if len(image) >= SHOWN else 1]


def with_bands(title: str, num: int) -> str:
    """A picture's title, and of images of other than 1 or 3 bands which of them are shown.

    Args:
        title: of the picture.
        num: bands of the images.
    """
    if num in (1, SHOWN):
        return title
    return f"{title} (bands 1 to {SHOWN} of {num})" if num > SHOWN else f"{title} (band 1 of {num})"


def save_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> None:
    """Draw named curves in one plot.

    Args:
        path: the file.
        curves: (epochs, values) by name; may be empty.
        ylabel: label of the vertical axis.
    """
    figure = new_figure(7, 4)
    axis = figure.subplots()
    for name, (epochs, values) in curves.items():
        axis.plot(epochs, values, label=name, marker="." if len(values) < 30 else None)
    axis.set_xlabel("epoch")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if curves:  # matplotlib warns of a legend without entries
        axis.legend()
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """matplotlib's figure of a size in inches, which lays itself out."""
    from matplotlib.figure import Figure  # which commands without figures do not wait for

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write matplotlib's figure as PNG, whole or not at all."""
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def shortened(name: str, length: int = 24, *, keep_end: bool = False) -> str:
    """A name with at most `length` letters, written so that matplotlib shows it literally.

    Args:
        name: of a class, an image or a model.
        length: number of letters, at least one.
        keep_end: keep the end of a longer name, where paths differ, instead of its beginning.
    """
    name = printable(name)
    if len(name) > length:
        name = f"…{name[1 - length :]}" if keep_end else f"{name[: length - 1]}…"
    # Dollars would begin a formula, and a leading underscore hides an entry of a legend.
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
