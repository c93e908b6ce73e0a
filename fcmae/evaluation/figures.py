"""The figures of `fcmae analyze`: every model in one figure of each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.utils import make_grid

from fcmae.evaluation.pictures import new_figure, save_figure, shortened

LineOf = Mapping[str, Mapping[str, float]]  # the value of each layer, by model

# Okabe and Ito's colours, which people with any kind of colour vision tell apart, and a shape for each.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dv<>"
NAME_LENGTH = 44


def save_by_layer(
    path: Path, models: Sequence[str], panels: Mapping[str, LineOf], title: str, *, shares: bool = False
) -> None:
    """Draw values over the layers: a panel for each quantity, a line for each model.

    Args:
        path: the file.
        models: all that are compared, so that each has one colour in all figures.
        panels: by the label of the vertical axis; models may be missing. Models that differ in their layers are drawn
            over the depth from 0 to 1.
        title: above the panels.
        shares: values are in 0..1 and shown in per cent.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(1.5 + 5.5 * len(panels), 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    layouts = {tuple(layers) for lines in panels.values() for layers in lines.values()}
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for model, layers in lines.items():
            number = models.index(model)
            x = np.arange(len(layers)) if len(layouts) == 1 else np.linspace(0, 1, len(layers))
            axis.plot(x, list(layers.values()), markersize=4.5, linewidth=1.5, **_style(number))
        _layer_axis(axis, next(iter(layouts)) if len(layouts) == 1 else None)
        values = [value for layers in lines.values() for value in layers.values() if math.isfinite(value)]
        top = max(values, default=0)
        axis.set_ylim(-0.03 * (top or 0.01), 1.1 * (top or 0.01))
        if shares:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    shown = [number for number, model in enumerate(models) if any(model in lines for lines in panels.values())]
    _legend(figure, [Line2D([], [], **_style(number)) for number in shown], [models[number] for number in shown])
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    names = [shortened(name, NAME_LENGTH, keep_end=True) for name in names]
    columns = max(1, int(figure.get_figwidth() / (0.9 + 0.085 * max(map(len, names)))))
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=columns)


def _style(number: int) -> dict[str, Any]:
    """How the line of a model is drawn."""
    return {
        "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _layer_axis(axis: Any, layers: Sequence[str] | None) -> None:
    """Name the layers along the horizontal axis, with a line between stages; None shows the depth of networks."""
    if layers is None:
        axis.set_xlabel("depth, from the first block (0) to the last (1)")
        return
    stages = [layer.split(".")[1] for layer in layers]
    for position in range(1, len(layers)):
        if stages[position] != stages[position - 1]:
            axis.axvline(position - 0.5, color="0.8", linewidth=1, zorder=0)
    shown = range(0, len(layers), max(1, len(layers) // 18))
    axis.set_xticks(list(shown), [layers[i].removeprefix("stages.") for i in shown], fontsize=8)
    axis.set_xlabel("block (stage.number)")


def save_selectivity(path: Path, values: Mapping[str, Mapping[str, NDArray[np.float64]]], title: str) -> None:
    """Draw the distribution of the channels' selectivity: a panel for each layer, an outline for each model.

    Args:
        path: the file.
        values: by model and layer, (C,), in 0..1. Models that differ in their layers share panels for the last layer of
            each stage, counted from the last stage if their numbers of stages differ.
        title: above the panels.
    """
    from matplotlib.patches import Patch

    layers_of = {model: list(layers) for model, layers in values.items()}
    names = [layer.removeprefix("stages.") for layer in next(iter(layers_of.values()))]
    if len(set(map(tuple, layers_of.values()))) > 1:
        layers_of = {model: last_of_stages(layers) for model, layers in layers_of.items()}
        counts = {len(layers) for layers in layers_of.values()}
        layers_of = {model: layers[-min(counts) :] for model, layers in layers_of.items()}
        names = [f"last of stage {stage - min(counts) * (len(counts) > 1)}" for stage in range(min(counts))]
    panels = [{model: values[model][layers_of[model][i]] for model in values} for i in range(len(names))]
    columns = min(6, max(4, math.ceil(math.sqrt(len(panels)))), len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(1 + 2.1 * columns, 1.6 + 1.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    edges = np.linspace(0, 1, 26)
    for axis, name, panel in zip(axes, names, panels, strict=False):
        for number, found in enumerate(panel.values()):
            colour = COLOURS[number % len(COLOURS)]
            weights = np.full(len(found), 1 / len(found))
            axis.hist(found, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.2)
            axis.hist(found, edges, weights=weights, histtype="step", color=colour, linewidth=1.3)
            axis.axvline(float(found.mean()), color=colour, linewidth=1, linestyle="--")
        axis.set_title(name, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    figure.supylabel("share of channels", fontsize=9)
    _legend(figure, [Patch(facecolor=COLOURS[number % len(COLOURS)]) for number in range(len(values))], list(values))
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def save_activations(
    path: Path, rows: Sequence[tuple[str, NDArray[Any], Mapping[str, NDArray[np.float32]]]], title: str
) -> None:
    """Draw channels' activation maps for one image: a row for each model, its image, a panel for each layer.

    All channels of a panel have one scale, so that a dead one is dark and a saturated one bright all over.

    Args:
        path: the file.
        rows: for each model its name, the image to show as (H, W) or (H, W, 3), and its maps (channels, h, w) by layer.
        title: above the rows.
    """
    columns = 1 + max(len(maps) for _, _, maps in rows)
    figure = new_figure(0.4 + 2.5 * columns, 0.7 + 2.75 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (model, image, maps) in zip(axes, rows, strict=True):
        line[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        line[0].set_title(shortened(model, 30, keep_end=True), fontsize=9)
        for axis, (layer, found) in zip(line[1:], maps.items(), strict=False):
            low, high = np.quantile(found, [0.005, 0.995])
            axis.imshow(_mosaic(found), cmap="viridis", vmin=low, vmax=max(high, low + 1e-12), interpolation="nearest")
            axis.set_title(f"{layer}, {len(found)} channels", fontsize=9)
        for axis in line:
            axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _mosaic(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """(channels, h, w) side by side, row by row, with empty gaps."""
    scale = math.ceil(24 / min(maps.shape[1:]))  # small maps are enlarged, so that gaps are narrow beside them
    maps = maps.repeat(scale, 1).repeat(scale, 2)
    gap = max(1, min(maps.shape[1:]) // 12)
    columns = math.ceil(math.sqrt(len(maps)))
    grid = make_grid(torch.from_numpy(maps)[:, None], columns, gap, pad_value=math.nan)  # three channels of one
    mosaic: NDArray[np.float32] = grid[0].numpy()
    return mosaic


def last_of_stages(layers: Sequence[str]) -> list[str]:
    """The last block of each stage, by name."""
    return list({layer.split(".")[1]: layer for layer in layers}.values())
