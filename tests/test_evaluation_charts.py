"""Charts hold the numbers that they were given, in figures and in tables."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from fcmae.evaluation import charts
from fcmae.evaluation.charts import Curve, heat_map, line_chart, shown

HOSTILE = "<script>alert('x')</script><b>&\"`"


def curve(*values: float, name: str = "loss") -> Curve:
    return Curve(name, range(10, 10 * len(values) + 1, 10), [float(i) for i in range(len(values))], values)


def layers() -> list[Curve]:
    return [curve(0.0, 0.5, 1.0, name="first"), Curve("second", [10, 30], [0.0, 2.0], [0.25, 0.75])]


def test_plotly_takes_the_figures() -> None:
    """Its own checks know every property that is set."""
    for chart in (line_chart([curve(1, 2), curve(3, 1)], "Loss"), heat_map(layers(), "Rank", 0.5)):
        go.Figure(json.loads(json.dumps(chart.figure, default=list)))


@pytest.mark.parametrize("values", [(1, 10, 1000), (1e-5, 1)])
def test_more_than_two_decades_are_logarithmic(values: tuple[float, ...]) -> None:
    assert line_chart([curve(*values)], "Loss").figure["layout"]["yaxis"]["type"] == "log"
    assert line_chart([curve(*values)], "Rate", may_be_log=False).figure["layout"]["yaxis"]["type"] == "linear"


@pytest.mark.parametrize("values", [(1, 99), (0, 1000), (-1, 1000), (3,), (2, 2)])
def test_others_are_linear(values: tuple[float, ...]) -> None:
    assert line_chart([curve(*values)], "Loss").figure["layout"]["yaxis"]["type"] == "linear"


def test_the_data_are_exact_and_whole() -> None:
    found = curve(*np.random.default_rng(0).random(5000).tolist())
    (trace,) = line_chart([found], "Loss").figure["data"]
    assert (trace["name"], trace["customdata"], trace["x"], trace["y"]) == tuple(found)
    assert trace["mode"] == "lines"
    assert line_chart([curve(1)], "Loss").figure["data"][0]["mode"] == "lines+markers"  # or it would not be seen


def test_the_table_has_the_values_of_its_steps_and_says_what_it_leaves_out() -> None:
    values = [float(i) for i in range(1000)]
    table = line_chart([curve(*values), Curve("val_loss", [5000], [499.0], [7.25])], "Loss").table
    assert table.columns == ["epoch", "step", "loss", "val_loss"]
    assert len(table.rows) <= charts.MAX_ROWS
    assert ["499", "5000", "499", "7.25"] in table.rows
    for epoch, step, loss, _ in table.rows:
        assert float(epoch) == float(loss) and int(step) == 10 * int(epoch) + 10
    assert table.caption == f"Loss: {len(table.rows)} of 1,000 rows, evenly spaced; metrics.jsonl has all"
    assert line_chart([curve(1, 2)], "Loss").table.caption == "Loss: all 2 rows"


def test_each_curve_has_a_colour_and_a_pattern() -> None:
    lines = [trace["line"] for trace in line_chart([curve(1, 2)] * 9, "Loss").figure["data"]]
    assert len({(line["color"], line["dash"]) for line in lines[:8]}) == len({line["dash"] for line in lines[:8]}) == 8
    assert lines[8] == lines[0]


def test_names_are_text_where_plotly_would_read_markup() -> None:
    escaped = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&lt;b&gt;&amp;&#34;`"
    assert line_chart([curve(1, name=HOSTILE)], "Loss").figure["data"][0]["name"] == escaped
    chart = heat_map([curve(1, name=HOSTILE)], "Rank", 0)
    assert chart.figure["data"][0]["y"] == [escaped]
    assert chart.table.rows[-1][0] == HOSTILE  # the page escapes it


def test_a_heat_map_has_a_cell_for_each_value_and_none_where_there_is_none() -> None:
    chart = heat_map(layers(), "Rank", 0.0)
    (trace,) = chart.figure["data"]
    assert (trace["x"], trace["y"]) == ([0.0, 1.0, 2.0], ["first", "second"])
    assert trace["z"] == [[0.0, 0.5, 1.0], [0.25, None, 0.75]]
    assert trace["customdata"] == [[10, 20, 30]] * 2
    assert (trace["zmin"], trace["zmax"]) == (0, 1.0)
    assert chart.figure["layout"]["yaxis"]["autorange"] == "reversed"  # first at the top
    assert [list(row) for row in (chart.table.columns, *chart.table.rows)] == [
        ["epoch", "0", "1", "2"],
        ["step", "10", "20", "30"],
        ["first", "0", "0.5", "1"],
        ["second", "0.25", "", "0.75"],
    ]
    assert chart.table.caption == "Rank: all 3 evaluations"


def test_small_values_look_small_where_a_scale_is_given() -> None:
    assert heat_map([curve(0.01, 0.02)], "Share", 0.5).figure["data"][0]["zmax"] == 0.5
    assert heat_map([curve(0.0)], "Share", 0.5).figure["data"][0]["zmax"] == 0.5


def test_a_long_heat_map_is_thinned_in_its_table_alone() -> None:
    chart = heat_map([curve(*range(1000))], "Rank", 1.0)
    assert chart.figure["data"][0]["z"] == [list(range(1000))]
    assert len(chart.table.columns) == 1 + charts.MAX_LISTED
    assert (chart.table.columns[-1], chart.table.rows[-1][-1]) == ("999", "999")
    assert (
        chart.table.caption == f"Rank: {charts.MAX_LISTED} of 1,000 evaluations, evenly spaced; metrics.jsonl has all"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.943592, "0.9436"), (119.83, "119.8"), (12345.6, "12,346"), (1e-5, "1e-05"), (0, "0"), (None, "")],
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert shown(value) == text
