"""The table of the roadmap: what is counted and published, and what the study's runs gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fcmae import roadmap
from fcmae.cli import main
from fcmae.networks.spec import VARIANTS, RoadmapSpec
from fcmae.roadmap import Cost, cost, listing


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs of some alone: test_networks_roadmap.py counts all."""
    some = [VARIANTS[f"roadmap/{step}"] for step in ("resnet", "width", "kernel-9", "downsampling")]
    monkeypatch.setattr(roadmap, "cost", lambda spec: cost(spec) if spec in some else Cost(0, 0))


def test_the_table_has_what_was_counted_and_published(counted: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roadmap"]) == 0
    rows = cells(capsys.readouterr().out)
    assert rows[0] == [
        "roadmap/resnet", "ResNet of depths 3-4-6-3, width 64, by a recipe of its own", "4.09", "25.56", "76.1"
    ]  # fmt: skip
    assert rows[1] == ["roadmap/resnet", "ResNet of depths 3-4-6-3, width 64", "4.09", "25.56", "78.8"]
    assert ["roadmap/width", "width 96, for 64", "5.27", "33.76", "80.5"] in rows
    assert ["roadmap/kernel-9", "depthwise 9x9, for 3x3", "4.21", "26.05", ""] in rows
    assert rows[-1][2:] == ["4.46", "28.58", "82.0"] and len(rows) == 17


def test_it_has_what_the_studys_runs_gave_beside(counted: None, tmp_path: Path) -> None:
    file = tmp_path / "roadmap.json"
    scores = [{"step": "gelu", "seed": seed, "top1": 0.3 + 0.1 * seed} for seed in range(3)]
    scores.append({"step": "resnet", "seed": 0, "top1": 0.25})
    file.write_text(json.dumps({"regime": "roadmap-small", "data": "tiny20, 64 px", "scores": scores, "machine": {}}))
    text = listing("roadmap-small", file)
    assert text.splitlines()[0].endswith("| roadmap-small, tiny20, 64 px: % |")
    rows = {row[0]: row for row in cells(text)}
    # The mean of 30, 40 and 50, +- 4.303 * 10 / sqrt(3).
    assert rows["roadmap-small/gelu"][-1] == "40.0 [15.2, 64.8]"
    assert rows["roadmap-small/resnet"][-2:] == ["", "25.0"]
    assert rows["roadmap-small/width"][-1] == ""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist: give the JSON file that studies/roadmap.py writes"),
        ("{", r"does not hold what it should .*: give the JSON file that studies/roadmap.py writes"),
        (
            '{"regime": "a", "data": "b", "scores": [{"step": "gelu", "seed": 0, "top1": 30}]}',
            "scores: 0: top1: .* less than or equal to 1",
        ),
        ('{"regime": "a", "data": "b", "scores": []}', "scores: .* at least 1"),
    ],
)
def test_a_file_that_is_none_of_the_studys_is_refused(content: str | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        listing("roadmap-small", file)


def test_the_cost_of_a_network_is_that_of_its_layers() -> None:
    spec = RoadmapSpec(depths=(1, 1), dims=(4, 8), patchify=True, inverted=True, depthwise=True, stem_stride=1)
    # 1x1 sites: stem, then 4 -> 16 -> 3x3 -> 4, then 4 -> 32 -> 3x3 -> 8 and the shortcut, then 2 classes.
    weights = 3 * 4 + (4 * 16 + 16 * 9 + 16 * 4) + (4 * 32 + 32 * 9 + 32 * 8 + 4 * 8) + 8 * 2
    norms = 2 * (4 + (16 + 16 + 4) + (32 + 32 + 8 + 8))
    assert cost(spec, 1, 2) == Cost(weights, weights + norms + 2)
