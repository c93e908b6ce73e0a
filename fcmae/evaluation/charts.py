"""Charts as plotly.js takes them: plain figures of data and layout, each with a table of the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import escape

from fcmae.data.split import evenly

MARKED = 30  # a line of fewer points has a dot at each
MAX_ROWS = 40  # of a chart's table: a page of paper
MAX_LISTED = 6  # evaluations in the table of a heat map
# Each has a contrast of 3 with the light and with the dark page; dashes tell apart what eyes or printers do not.
COLOURS = ("#1f77c8", "#d9541e", "#2e8b4a", "#a55cc4", "#9a7a12", "#128a94", "#d6447a", "#7d838a")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "8px,3px", "3px,2px")
CLEAR = "rgba(0,0,0,0)"  # the page's style sheet sets the background, and the colours of text and grid
X_AXIS = {"title": {"text": "epoch"}, "unifiedhovertitle": {"text": "epoch %{x:.4~g}"}, "automargin": True}
LAYOUT = {"paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "margin": dict.fromkeys("trbl", 10), "xaxis": X_AXIS}


class Curve(NamedTuple):
    """A named line; its steps, epochs and values are of equal length, and none is empty.

    Attributes:
        name: what it is called.
        steps: rising.
        epochs: of the same moments.
        values: of the same moments.
    """

    name: str
    steps: Sequence[int]
    epochs: Sequence[float]
    values: Sequence[float]

    @property
    def by_place(self) -> dict[tuple[float, int], float]:
        """The values by epoch and step."""
        return dict(zip(zip(self.epochs, self.steps, strict=True), self.values, strict=True))


class Table(NamedTuple):
    """A caption, and texts.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: the first text of a row is its heading.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A figure and its numbers.

    Attributes:
        caption: what it shows.
        figure: data and layout, with every value unchanged.
        table: of the same numbers; it may be thinned out, and then states how.
    """

    caption: str
    figure: dict[str, Any]
    table: Table


def shown(value: float | None) -> str:
    """A number with four digits, or with all digits before the point; "" for None."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def line_chart(curves: Sequence[Curve], caption: str, *, may_be_log: bool = True) -> Chart:
    """Draw curves over epochs.

    Args:
        curves: what is drawn, at least one.
        caption: what it shows.
        may_be_log: use a logarithmic vertical axis if positive values span more than two decades.
    """
    values = [value for curve in curves for value in curve.values]
    log = may_be_log and min(values) > 0 and max(values) > 100 * min(values)
    traces = [
        {
            "type": "scatter",
            "name": str(escape(curve.name)),  # plotly reads some HTML in texts
            "x": curve.epochs,
            "y": curve.values,
            "customdata": curve.steps,
            "hovertemplate": "%{y:.4~g} (step %{customdata:,})",
            "mode": "lines+markers" if len(curve.values) < MARKED else "lines",
            "line": {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)], "width": 1.8},
        }
        for number, curve in enumerate(curves)
    ]
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    layout = {"hovermode": "x unified", "showlegend": True, "legend": legend, "height": 300}
    layout["yaxis"] = {"type": "log" if log else "linear", "automargin": True}
    header, rows, note = _thinned(curves, max(2, MAX_ROWS // len(curves)), "rows")
    return Chart(caption, {"data": traces, "layout": LAYOUT | layout}, Table(f"{caption}: {note}", header, rows))


def heat_map(layers: Sequence[Curve], caption: str, least_top: float) -> Chart:
    """Draw a row for each layer, first at the top, and a column for each evaluation, in colours from 0 up.

    Args:
        layers: the values are >= 0.
        caption: what it shows.
        least_top: the value that the last colour stands for at least, so that small values look small.
    """
    columns = [layer.by_place for layer in layers]
    places = sorted(set().union(*columns))
    trace = {
        "type": "heatmap",
        "x": [epoch for epoch, _ in places],
        "y": [str(escape(layer.name)) for layer in layers],
        "z": [[column.get(place) for place in places] for column in columns],
        "customdata": [[step for _, step in places]] * len(layers),
        "hovertemplate": "%{y}<br>epoch %{x:.4~g}, step %{customdata:,}<br>%{z:.4~g}<extra></extra>",
        "colorscale": "Viridis",
        "zmin": 0,
        "zmax": max([least_top, *(value for layer in layers for value in layer.values)]),
    }
    y_axis = {"type": "category", "autorange": "reversed", "automargin": True}
    layout = LAYOUT | {"yaxis": y_axis, "height": 90 + max(100, 18 * len(layers))}
    header, rows, note = _thinned(layers, MAX_LISTED, "evaluations")
    names, *values = zip(header, *rows, strict=True)
    return Chart(caption, {"data": [trace], "layout": layout}, Table(f"{caption}: {note}", names, values))


def _thinned(curves: Sequence[Curve], most: int, what: str) -> tuple[list[str], list[list[str]], str]:
    """Headings, rows for at most `most` evenly spaced values of each curve, and words on how many there are."""
    columns = [curve.by_place for curve in curves]
    kept = {place for column in columns for place in (list(column)[i] for i in evenly(len(column), most))}
    rows = [[f"{place[0]:.4g}", str(place[1]), *(shown(c.get(place)) for c in columns)] for place in sorted(kept)]
    number = len(set().union(*columns))
    few = f"{len(rows)} of {number:,} {what}, evenly spaced; metrics.jsonl has all"
    return ["epoch", "step", *(c.name for c in curves)], rows, few if len(rows) < number else f"all {number} {what}"
