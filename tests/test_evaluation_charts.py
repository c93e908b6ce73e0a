"""Charts show the numbers that they were given, in pictures, words and tables."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fcmae.data.split import evenly
from fcmae.evaluation import charts
from fcmae.evaluation.charts import Chart, Curve, heat_map, line_chart, shown, thinned

HOSTILE = "<script>alert('x')</script>&\"`"


def curve(*values: float, name: str = "loss") -> Curve:
    return Curve(name, range(10, 10 * len(values) + 1, 10), [float(i) for i in range(len(values))], values)


def elements(chart: Chart, name: str) -> list[ElementTree.Element]:
    """Of a picture, which has to be well-formed for that."""
    return list(ElementTree.fromstring(str(chart.svg)).iter(name))


def points(chart: Chart, number: int = 0) -> list[tuple[float, float]]:
    text = elements(chart, "polyline")[number].attrib["points"]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def labels(chart: Chart) -> list[str]:
    return [element.text or "" for element in elements(chart, "text")]


def test_points_lie_where_they_should() -> None:
    # The axis goes from 0 to 10 and 5 % beyond on both sides: 10 is .5 of 11 below its upper end.
    chart = line_chart([curve(0, 10, 5)], "loss")
    assert chart.data["y"] == [-0.5, 10.5]
    assert points(chart) == [(0, 954.5), (500, 45.5), (1000, 500)]
    (dots,) = [[(e.attrib["cx"], e.attrib["cy"]) for e in elements(chart, "circle")]]
    assert dots[1] == ("50.00%", "4.55%")
    assert {"0", "5", "10", "1", "2", "epoch"} <= set(labels(chart))


def test_more_than_two_decades_are_logarithmic() -> None:
    chart = line_chart([curve(1, 10, 1000)], "loss")
    low, high = chart.data["y"]
    assert chart.data["log"] and (low, high) == pytest.approx((-0.15, 3.15))
    assert points(chart)[1][1] == pytest.approx(1000 * (1 - 1.15 / 3.3), abs=0.06)
    assert {"1", "10", "100", "1000"} <= set(labels(chart))
    for values in ((1, 99), (0, 1000), (-1, 1000)):
        assert not line_chart([curve(*values)], "loss").data["log"]
    assert not line_chart([curve(1, 1000)], "rate", may_be_log=False).data["log"]


@pytest.mark.parametrize("values", [(3.0,), (0.0,), (2.0, 2.0, 2.0), (1e-12, 1e-12), (1e9, 2e9)])
def test_a_single_point_and_a_constant_are_in_the_middle(values: tuple[float, ...]) -> None:
    chart = line_chart([curve(*values)], "loss")
    for x, y in points(chart):
        assert 0 <= x <= 1000 and 0 <= y <= 1000
    if len(set(values)) == 1:
        assert {y for _, y in points(chart)} == {500.0}


def test_the_data_are_exact_and_whole_whatever_is_drawn() -> None:
    values = np.random.default_rng(0).random(5000).tolist()
    found = curve(*values)
    chart = line_chart([found], "loss")
    assert chart.data["curves"] == [
        {"name": "loss", "steps": list(found.steps), "epochs": found.epochs, "values": values}
    ]
    assert len(points(chart)) <= 4 * charts.COLUMNS
    assert not elements(chart, "circle")


def test_a_thinned_line_keeps_what_each_pixel_column_spans() -> None:
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.random(20_000)), rng.standard_normal(20_000)
    kept = thinned(x, y, 100)
    assert kept == sorted(set(kept)) and {0, len(x) - 1} <= set(kept)
    for column in range(100):
        inside = np.flatnonzero((x * 100).astype(int) == column)
        drawn = [i for i in kept if i in set(inside.tolist())]
        assert (y[drawn].min(), y[drawn].max()) == (y[inside].min(), y[inside].max())
        assert {inside[0], inside[-1]} <= set(drawn) and len(drawn) <= 4


def test_few_points_are_all_drawn() -> None:
    assert thinned(np.linspace(0, 1, 200), np.zeros(200), 100) == list(range(200))


def test_the_table_has_the_values_of_its_steps_and_says_what_it_leaves_out() -> None:
    values = [float(i) for i in range(1000)]
    chart = line_chart([curve(*values), Curve("val_loss", [5000], [499.0], [7.25])], "loss")
    assert chart.columns == ["epoch", "step", "loss", "val_loss"]
    assert len(chart.rows) <= charts.MAX_ROWS
    assert ["499", "5000", "499", "7.25"] in chart.rows
    for epoch, step, loss, _ in chart.rows:
        assert float(epoch) == float(loss) and int(step) == 10 * int(epoch) + 10
    assert chart.note == f"{len(chart.rows)} of 1,000 rows, evenly spaced; metrics.jsonl has all"
    assert line_chart([curve(1, 2)], "loss").note == "all 2 rows"


def test_the_words_name_both_ends_and_both_extremes() -> None:
    assert line_chart([curve(3, 1, 4, 2)], "loss").summary == (
        "Line chart of loss by epoch. loss: from 3 at epoch 0 to 2 at epoch 3; lowest 1, highest 4."
    )
    assert "loss: 3 at epoch 0." in line_chart([curve(3)], "loss").summary


def test_each_curve_has_a_colour_and_a_pattern_of_the_style_sheet() -> None:
    chart = line_chart([curve(i, i + 1, name=f"run {i}") for i in range(9)], "loss")
    styles = [element.attrib["class"] for element in elements(chart, "polyline")]
    assert styles == [*(f"line s{i}" for i in range(8)), "line s0"]
    assert [re.sub("<svg.*</svg> ", "", item) for item in chart.legend] == [f"run {i}" for i in range(9)]
    sheet = (Path(charts.__file__).parent / "report.css").read_text()
    patterns = re.findall(r"\.s(\d) { stroke: var\(--c\1\);( stroke-dasharray: [\d ]+)?", sheet)
    assert [int(number) for number, _ in patterns] == list(range(charts.STYLES))
    assert len({dashes for _, dashes in patterns}) == charts.STYLES


def test_names_are_escaped_everywhere() -> None:
    lines = line_chart([curve(1, 2, name=HOSTILE)], HOSTILE)
    heat = heat_map({HOSTILE: [1.0]}, [1], [1.0], HOSTILE)
    for chart in (lines, heat):
        assert not elements(chart, "script")
        for markup in (chart.svg, *chart.legend):
            assert "<script" not in markup
    assert HOSTILE in labels(heat)
    assert elements(lines, "div")[0].attrib["aria-label"] == lines.summary


def layers() -> dict[str, list[float | None]]:
    return {"first": [0.0, 0.5, 1.0], "second": [0.25, None, 0.75]}


def test_a_heat_map_has_a_cell_for_each_value_in_the_colour_of_its_share_of_the_highest() -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    chart = heat_map(layers(), [10, 20, 30], [1.0, 2.0, 3.0], "rank")
    cells = [(int(e.attrib["x"]), int(e.attrib["y"]), e.attrib["fill"]) for e in elements(chart, "rect")[:-1]]
    viridis = colormaps["viridis"]
    expected = {(x, y): v for y, row in enumerate(layers().values()) for x, v in enumerate(row) if v is not None}
    assert cells == [(x, y, to_hex(viridis(value))) for (x, y), value in expected.items()]
    assert chart.data["values"] == list(layers().values())
    assert chart.rows == [["first", "0", "0.5", "1"], ["second", "0.25", "", "0.75"]]
    assert (chart.columns, chart.note) == (["layer", "epoch 1", "epoch 2", "epoch 3"], "all 3 evaluations")
    assert chart.summary == (
        "Heat map of rank: 2 layers, first at the top, by 3 evaluations up to epoch 3. "
        "At the last, lowest 0.75 in second, highest 1 in first."
    )


def test_small_values_look_small_where_a_scale_is_given() -> None:
    chart = heat_map({"layer": [0.01, 0.02]}, [1, 2], [1.0, 2.0], "share", 0.5)
    assert str(chart.legend[0]).endswith("</svg> 0.5")
    assert str(heat_map({"layer": [0.0]}, [1], [1.0], "share").legend[0]).endswith("</svg> 1")


def test_a_long_heat_map_is_thinned_in_the_picture_alone() -> None:
    steps = list(range(1, 1001))
    values = [float(step) for step in steps]
    chart = heat_map({"layer": values}, steps, values, "rank")
    assert len(elements(chart, "rect")) - 1 == charts.MAX_CELLS
    assert chart.data["columns"] == evenly(1000, charts.MAX_CELLS)
    assert chart.data["values"] == [values]
    assert len(chart.rows[0]) == len(chart.columns) == 1 + charts.MAX_LISTED
    assert (chart.columns[-1], chart.rows[0][-1]) == ("epoch 1000", "1000")
    assert chart.note == f"{charts.MAX_LISTED} of 1,000 evaluations, evenly spaced; metrics.jsonl has all"


@pytest.mark.parametrize(
    ("value", "text"), [(0.943592, "0.9436"), (119.83, "119.8"), (12345.6, "12,346"), (1e-5, "1e-05"), (0, "0")]
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert shown(value) == text
