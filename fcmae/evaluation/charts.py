"""Charts as static SVG: data in, markup out. They show, scale and print without JavaScript.

Positions inside a chart are percentages of its plotting area, so that it takes the width it is given and its letters
keep their size. `Chart.data` holds every value as it came, for the page's script and for whoever wants the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fcmae.data.split import evenly

COLUMNS = 700  # pixels that a line is drawn for: of more points, each column keeps its first, last, lowest and highest
MARKED = 30  # a line of fewer points has a dot at each
MAX_ROWS = 40  # of a chart's table: a page of paper
MAX_LISTED = 6  # evaluations in the table of a heat map
MAX_CELLS = 120  # columns of a heat map
STYLES = 8  # colours and dash patterns that the page's style sheet has


@dataclass(frozen=True)
class Curve:
    """One line of a chart: steps, epochs and values of equal length, in rising order of the steps; none is empty."""

    name: str
    steps: Sequence[int]
    epochs: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A picture and the same in words and numbers.

    kind: "lines" or "heat". summary: a sentence or two for those who cannot see it. legend: markup, one item a line, or
    the scale of colours. columns, rows: a table of texts, thinned out; note: how. data: the full series and the axes.
    """

    kind: str
    summary: str
    svg: Markup
    legend: list[Markup]
    columns: list[str]
    rows: list[list[str]]
    note: str
    data: dict[str, Any]


def shown(value: float) -> str:
    """A number with four digits, or with all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def line_chart(curves: Sequence[Curve], quantity: str, *, may_be_log: bool = True) -> Chart:
    """Curves over epochs.

    quantity: what the values are, for the summary. may_be_log: the vertical axis is logarithmic where positive values
    span more than two decades.
    """
    lines = [(np.asarray(curve.epochs, float), np.asarray(curve.values, float)) for curve in curves]
    values = np.concatenate([y for _, y in lines])
    x_axis = _span(np.concatenate([x for x, _ in lines]), 0)
    log = bool(may_be_log and values.min() > 0 and values.max() > 100 * values.min())
    y_axis = _span(np.log10(values) if log else values, 0.05)
    parts = []
    for value, label in _ticks(*y_axis, log=log):
        height = _percent(1 - _fraction(math.log10(value) if log else value, y_axis))
        parts.append(Markup('<line class="grid" x2="100%" y1="{0}" y2="{0}"/>').format(height))
        parts.append(Markup('<text class="tick end" x="-8" y="{}" dy=".32em">{}</text>').format(height, label))
    for value, label in _ticks(*x_axis):
        place = _percent(_fraction(value, x_axis))
        parts.append(Markup('<text class="tick" x="{}" y="100%" dy="1.5em">{}</text>').format(place, label))
    parts.append(Markup('<text class="tick end" x="100%" y="100%" dy="2.8em">epoch</text>'))
    drawn, dots = [], []
    for number, (x, y) in enumerate(lines):
        style = f"s{number % STYLES}"
        right, up = _fraction(x, x_axis), _fraction(np.log10(y) if log else y, y_axis)
        points = " ".join(f"{1000 * right[i]:.1f},{1000 * (1 - up[i]):.1f}" for i in thinned(right, up, COLUMNS))
        drawn.append(Markup('<polyline class="line {}" points="{}"/>').format(style, points))
        if len(x) < MARKED:
            dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.5"/>')
            dots += [dot.format(style, _percent(a), _percent(1 - b)) for a, b in zip(right, up, strict=True)]
    stretched = Markup('<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>')
    parts += [stretched.format(Markup("").join(drawn)), *dots]
    summary = f"Line chart of {quantity} by epoch. " + " ".join(map(_in_words, curves))
    columns, rows, note = _curve_table(curves)
    swatch = Markup('<svg class="swatch" width="28" height="10" aria-hidden="true">{}</svg> {}')
    line = Markup('<line class="line s{}" x2="28" y1="5" y2="5"/>')
    legend = [swatch.format(line.format(i % STYLES), curve.name) for i, curve in enumerate(curves)]
    data = {
        "x": list(x_axis),
        "y": list(y_axis),
        "log": log,
        "curves": [
            {"name": c.name, "steps": list(c.steps), "epochs": list(c.epochs), "values": list(c.values)} for c in curves
        ],
    }
    return Chart("lines", summary, _plot(summary, Markup("").join(parts), 210), legend, columns, rows, note, data)


def heat_map(
    layers: Mapping[str, Sequence[float | None]],
    steps: Sequence[int],
    epochs: Sequence[float],
    quantity: str,
    least_top: float = 0.0,
) -> Chart:
    """A row for each layer, a column for each evaluation, colours from 0 to the largest value.

    layers: values (>= 0; None where there is none) at each of the steps, by the layer's name. quantity: what they are.
    least_top: the value that the last colour stands for at least, so that small values look small.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = colormaps["viridis"]
    top = max(least_top, *(v for row in layers.values() for v in row if v is not None)) or 1.0
    kept = evenly(len(steps), MAX_CELLS)
    cells, parts = [], []
    cell = Markup('<rect x="{}" y="{}" width="1" height="1" fill="{}"/>')
    for y, (name, row) in enumerate(layers.items()):
        values = ((x, row[i]) for x, i in enumerate(kept))
        cells += [cell.format(x, y, to_hex(colours(value / top))) for x, value in values if value is not None]
        label = Markup('<text class="tick end" x="-8" y="{}" dy=".32em">{}</text>')
        parts.append(label.format(_percent((y + 0.5) / len(layers)), name))
    for x in evenly(len(kept), 6):
        place, epoch = _percent((x + 0.5) / len(kept)), f"{epochs[kept[x]]:.3g}"
        parts.append(Markup('<text class="tick" x="{}" y="100%" dy="1.5em">{}</text>').format(place, epoch))
    parts.append(Markup('<text class="tick end" x="100%" y="100%" dy="2.8em">epoch</text>'))
    stretched = Markup('<svg class="cells" viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>')
    parts.append(stretched.format(len(kept), len(layers), Markup("").join(cells)))
    last = {name: row[-1] for name, row in layers.items() if row[-1] is not None}
    summary = (
        f"Heat map of {quantity}: {len(layers)} layers, first at the top, by {len(steps)} evaluations up to epoch "
        f"{epochs[-1]:.4g}."
    )
    if last:
        low, high = min(last, key=lambda name: last[name] or 0), max(last, key=lambda name: last[name] or 0)
        summary += f" At the last, lowest {shown(last[low] or 0)} in {low}, highest {shown(last[high] or 0)} in {high}."
    bar = [cell.format(i, 0, to_hex(colours(i / 31))) for i in range(32)]
    scale = Markup(
        '0 <svg class="scale" width="160" height="10" viewBox="0 0 32 1" preserveAspectRatio="none" '
        'aria-hidden="true">{}</svg> {}'
    ).format(Markup("").join(bar), shown(top))
    listed = evenly(len(steps), MAX_LISTED)
    rows = [
        [name, *("" if (value := row[i]) is None else shown(value) for i in listed)] for name, row in layers.items()
    ]
    columns, note = ["layer", *(f"epoch {epochs[i]:.4g}" for i in listed)], f"all {len(steps)} evaluations"
    if len(listed) < len(steps):
        note = f"{len(listed)} of {len(steps):,} evaluations, evenly spaced; metrics.jsonl has all"
    data = {
        "layers": list(layers),
        "steps": list(steps),
        "epochs": list(epochs),
        "values": [list(row) for row in layers.values()],
        "columns": kept,
    }
    svg = _plot(summary, Markup("").join(parts), max(100, 18 * len(layers)))
    return Chart("heat", summary, svg, [scale], columns, rows, note, data)


def thinned(x: NDArray[np.float64], y: NDArray[np.float64], columns: int) -> list[int]:
    """Positions of the points to draw: the first, last, lowest and highest in each column of pixels.

    x: (N,) rising, in 0..1. y: (N,). All of them where there are few.
    """
    if len(x) <= 2 * columns:
        return list(range(len(x)))
    column = np.minimum((x * columns).astype(int), columns - 1)
    starts = [0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), len(x)]
    kept: set[int] = set()
    for start, end in pairwise(starts):
        part = y[start:end]
        kept |= {start, start + int(part.argmin()), start + int(part.argmax()), end - 1}
    return sorted(kept)


def _span(values: NDArray[np.float64], margin: float) -> tuple[float, float]:
    """The ends of an axis: of the values with a margin on both sides, or around the only one."""
    low, high = float(values.min()), float(values.max())
    room = margin * (high - low) if high > low else 0.5 * (abs(low) or 1.0)
    return low - room, high + room


def _fraction(value: Any, axis: tuple[float, float]) -> Any:
    return (value - axis[0]) / (axis[1] - axis[0])


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def _ticks(low: float, high: float, *, log: bool = False) -> list[tuple[float, str]]:
    """Round values within the axis and their labels; log: the ends are logarithms to base 10."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        # Ticks between the powers of ten where there are few of these.
        powers = LogLocator(subs=(1.0,) if high - low > 4 else (1.0, 2.0, 5.0), numticks=12)
        ticks = [float(v) for v in powers.tick_values(10**low, 10**high) if low <= math.log10(v) <= high]
    else:
        round_steps = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
        ticks = [float(v) for v in round_steps.tick_values(low, high) if low <= v <= high]
    return [(v, f"{v:,.0f}" if abs(v) >= 1e4 else f"{v:.6g}") for v in ticks]


def _plot(summary: str, content: Markup, height: int) -> Markup:
    return Markup(
        '<div class="plot" role="img" tabindex="0" aria-label="{}"><svg width="100%" height="{}" aria-hidden="true">'
        '{}<g class="marks"></g><rect class="pointer" width="100%" height="100%"/></svg></div>'
    ).format(summary, height, content)


def _in_words(curve: Curve) -> str:
    first, last = (f"{shown(curve.values[i])} at epoch {curve.epochs[i]:.4g}" for i in (0, -1))
    if len(curve.values) == 1:
        return f"{curve.name}: {last}."
    low, high = shown(min(curve.values)), shown(max(curve.values))
    return f"{curve.name}: from {first} to {last}; lowest {low}, highest {high}."


def _curve_table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]], str]:
    columns = [dict(zip(zip(c.epochs, c.steps, strict=True), c.values, strict=True)) for c in curves]
    each = max(2, MAX_ROWS // len(curves))
    kept = {(c.epochs[i], c.steps[i]) for c in curves for i in evenly(len(c.steps), each)}
    rows = [
        [f"{place[0]:.4g}", str(place[1]), *(shown(values[place]) if place in values else "" for values in columns)]
        for place in sorted(kept)
    ]
    number, note = len(set().union(*columns)), f"all {len(rows)} rows"
    if len(rows) < number:
        note = f"{len(rows)} of {number:,} rows, evenly spaced; metrics.jsonl has all"
    return ["epoch", "step", *(curve.name for curve in curves)], rows, note
