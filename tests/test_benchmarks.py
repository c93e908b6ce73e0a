"""The benchmarks at the smallest sizes: what they count, compute and write. How fast anything is, no test asks."""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import requires_minkowski

from fcmae.layouts import MakeLayout, make_layout
from fcmae.masked import masked_loss
from fcmae.masking import random_mask
from fcmae.weights.formats import to_state

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # where the scripts find timing.py
depthwise, encoder, finetune_step, floor, input_pipeline, report, scaling, timing, train_step = map(
    import_module,
    (
        "depthwise",
        "encoder",
        "finetune_step",
        "floor",
        "input_pipeline",
        "report",
        "scaling",
        "timing",
        "train_step",
    ),
)
TINY = ["--batch", "1", "--size", "64", "--repeats", "2"]
ZEROED = {"stem.0.weight": torch.zeros(40, 3, 4, 4)}


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_steps_take_turns_and_warm_up_uncounted() -> None:
    calls = ""

    def step(name: str) -> None:
        nonlocal calls
        calls += name

    seconds = timing.interleaved({"a": lambda: step("a"), "b": lambda: step("b")}, repeats=3, warmup=1)
    assert calls == "abababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_that_of_medians_and_its_quartiles_go_repeat_by_repeat() -> None:
    found = timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])  # repeat by repeat 2, 3, 1
    assert found == {"time": 4 / 3, "quartiles": [1.5, 2.5]}
    summary = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert summary == {"median_s": 3.0, "quartiles_s": [2.0, 4.0], "seconds": [4.0, 1.0, 3.0, 2.0, 5.0]}


def test_saved_bytes_count_each_storage_once_without_parameters_and_inputs() -> None:
    x = torch.randn(4, 8)
    first, second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward() -> torch.Tensor:
        hidden = first(x).relu()  # keeps its result: 4 * 16 floats
        return second(hidden[:2]).square().mean()  # a view of them, and what is squared: 2 * 3 floats

    given = [x, *first.parameters(), *second.parameters()]
    assert timing.saved_bytes(forward, given) == 4 * (4 * 16 + 2 * 3)
    with torch.no_grad():
        assert timing.saved_bytes(forward, given) == 0


def test_peak_bytes_are_the_most_that_is_held_at_once() -> None:
    held = torch.zeros(5000)

    def step() -> None:
        a = torch.zeros(1000)
        b = a + held[:1000]
        del a
        b.neg()  # this and b: as much as a and b

    assert timing.peak_bytes(step) == 2 * 4000


def test_a_table_is_markdown() -> None:
    assert timing.table(["", "n"], [["a", "10"], ["bc", "1"]]) == "|    |  n |\n| -- | -: |\n| a  | 10 |\n| bc |  1 |"


def check(found: dict[str, Any], sides: list[str]) -> None:
    """What every comparison writes."""
    assert list(found["results"]) == list(found["ratios"]) == sides
    assert {"cpu", "cores", "threads", "load", "python", "torch", "timm"} <= set(found["machine"])
    for name, side in found["results"].items():
        assert len(side["seconds"]) == 2
        assert side["median_s"] == statistics.median(side["seconds"])
        assert 0 < side["saved_bytes"] <= side["peak_bytes"]
        assert found["ratios"][name]["time"] == side["median_s"] / found["results"][sides[0]]["median_s"]


def test_encoder_times_the_sides_and_counts_their_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "encoder.json"
    encoder.main([*TINY, "--sides", "packed", "masked", "timm", "--json", str(path)])
    found = written(path)
    check(found, ["packed", "masked", "timm"])
    assert found["visible"] == 1
    assert found["command"] == f"python benchmarks/encoder.py {' '.join(TINY)} --sides packed masked timm --json {path}"
    assert found["settings"]["variant"] == "convnextv2_atto"
    assert "json" not in found["settings"]
    saved = {name: side["saved_bytes"] for name, side in found["results"].items()}
    assert saved["packed"] < saved["masked"] < saved["timm"]  # timm's GRN keeps more
    assert all(name in capsys.readouterr().out for name in ["1 of 4 patches visible"])


def test_precision_chooses_what_the_sides_compute_in() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with timing.autocast(encoder.parser().parse_args(["--precision", precision])):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_train_step_times_whole_steps(tmp_path: Path) -> None:
    train_step.main([*TINY, "--sides", "packed", "timm", "timm-gradients", "--json", str(tmp_path / "step.json")])
    check(written(tmp_path / "step.json"), ["packed", "timm", "timm-gradients"])


@pytest.mark.parametrize(("name", "moves"), [("packed", True), ("timm", True), ("timm-gradients", False)])
def test_a_step_moves_the_weights_where_it_has_an_optimizer_and_leaves_no_gradients(name: str, moves: bool) -> None:
    args = train_step.parser().parse_args(TINY)
    side = train_step.side(name, *timing.batch_of(args), args)
    weights = side.given[1:]
    before = [weight.clone() for weight in weights]
    side.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, weights, strict=True)) == moves
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("name", ["packed", "masked"])
def test_the_loss_of_a_step_is_the_objective_of_pretraining(name: str) -> None:
    args = train_step.parser().parse_args(TINY)
    images, mask, visible = timing.batch_of(args)
    torch.manual_seed(3)
    side = train_step.side(name, images, mask, visible, args)
    torch.manual_seed(3)
    assert torch.equal(side.forward(), masked_loss(train_step.fcmae(name, args.variant), images, mask, visible))


def test_fine_tuning_steps_of_ours_and_timms_start_from_the_same_weights(tmp_path: Path) -> None:
    sides = ["fcmae", "timm", "timm-gradients"]
    finetune_step.main([*TINY, "--sides", *sides, "--json", str(tmp_path / "finetune.json")])
    check(written(tmp_path / "finetune.json"), sides)
    args = finetune_step.parser().parse_args(TINY)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 999])
    ours, theirs = (finetune_step.side(name, images, labels, args) for name in sides[:2])
    torch.testing.assert_close(ours.forward(), theirs.forward(), rtol=1e-5, atol=1e-5)
    before = [[weight.clone() for weight in side.given[1:]] for side in (ours, theirs)]
    for side, kept in zip((ours, theirs), before, strict=True):
        side.step()
        assert any(not torch.equal(old, new) for old, new in zip(kept, side.given[1:], strict=True))
        assert all(weight.grad is None for weight in side.given[1:])


def test_models_that_compute_something_else_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_step, "to_state", lambda state, spec, to: to_state(dict(state), spec, to) | ZEROED)
    with pytest.raises(SystemExit, match="fcmae and timm differ by"):
        finetune_step.main(TINY)


def test_depthwise_times_ways_that_compute_the_same(tmp_path: Path) -> None:
    flags = ["--stages", "3", "4", "--repeats", "2", "--batch", "2", "--size", "64", "--json", str(tmp_path / "d.json")]
    ways = ["canvas", "packed", "windows", "table", "matmul", "shifts"]
    depthwise.main([*flags, "--ways", *ways])
    stages = written(tmp_path / "d.json")["stages"]
    assert list(stages) == ["stage 3", "stage 4"]
    assert all(list(found) == ways for found in stages.values())


def test_floor_counts_operations_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with floor.Counter() as counter:
        torch.randn(2, 3) @ torch.randn(3, 5)
    assert counter.calls["mm"] == [(2 * 2 * 3 * 5, 4 * (2 * 3 + 3 * 5 + 2 * 5))]
    monkeypatch.setattr(timing, "interleaved", lambda steps, *_: {name: [1.0, 1.0] for name in steps})
    floor.main([*TINY, "--json", str(tmp_path / "floor.json")])
    found = written(tmp_path / "floor.json")
    assert found["step_s"] == 1.0
    assert found["operations"]["mm"]["flops"] > 0


def test_the_input_pipeline_is_timed_beside_torchvisions(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "pipeline.json"
    input_pipeline.main(["--sizes", "64x48", "--count", "4", "--repeats", "2", "--stages", "--json", str(path)])
    found = written(path)["pipeline"]["64x48"]
    assert found["count"] == 4
    assert {"torchvision", "fcmae", "fcmae, and normalised"} <= set(found["loaders"])
    assert found["stages_ms"]["all"] > 0


@requires_minkowski
def test_the_engines_own_convolution_computes_the_same_in_values_and_gradients() -> None:
    mask = torch.from_numpy(random_mask((2, 3), 4, [(0, i) for i in range(2)]))
    images = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, 1, 7, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def run(make: MakeLayout) -> list[torch.Tensor]:
        x, w = images.clone().requires_grad_(), weight.clone().requires_grad_()
        layout = make(mask, None)
        y = layout.unpack(layout.depthwise_conv(layout.pack(x), w, bias))
        y.square().sum().backward()
        assert x.grad is not None
        assert w.grad is not None
        return [y.detach(), x.grad, w.grad]

    torch.testing.assert_close(run(train_step.engine_layout), run(partial(make_layout, "masked")))


@requires_minkowski
def test_train_step_times_the_engine_after_comparing_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_step.main([*TINY, "--sides", "packed", "minkowski", "engine", "--json", str(tmp_path / "step.json")])
    check(written(tmp_path / "step.json"), ["packed", "minkowski", "engine"])
    assert "engine and minkowski differ by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "100"], "--size 100"),
        (["--repeats", "1"], "--repeats 1"),
        (["--compile", "--sides", "minkowski"], "--compile"),
    ],
)
@pytest.mark.parametrize("script", [encoder, train_step])
def test_what_cannot_be_timed_is_refused(script: Any, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        script.main(flags)


def test_a_line_is_fitted_to_the_medians() -> None:
    assert scaling.line([0, 1, 2], [1, 3, 5]) == pytest.approx(
        {"slope": 2, "intercept": 1, "r2": 1, "deviation": 0}, abs=1e-12
    )
    # 0.5 + 3.5 x: off by 0.5, -1 and 0.5, of 0.5, 4 and 7.5.
    assert scaling.line([0, 1, 2], [1, 3, 8]) == pytest.approx(
        {"slope": 3.5, "intercept": 0.5, "r2": 1 - 1.5 / 26, "deviation": 1}
    )


def test_scaling_writes_three_sweeps_and_report_draws_them(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    flags = ["--batches", "1", "2", "--sizes", "64", "96", *TINY]
    scaling.main([*flags, "--json", str(tmp_path / "benchmarks" / "scaling.json")])
    sweeps = written(tmp_path / "benchmarks" / "scaling.json")["sweeps"]
    assert list(sweeps) == ["images", "resolution", "visible share"]
    assert sweeps["images"]["packed"]["x"] == [1, 2]
    assert sweeps["resolution"]["whole model"]["x"] == [1, 3]  # of 4 and of 9 patches
    assert sweeps["visible share"]["masked"]["x"] == [1 / 4, 2 / 4, 3 / 4]
    for curves in sweeps.values():
        for found in curves.values():
            assert len(found["points"]) == len(found["x"])
            fitted = found["slope"] * np.array(found["x"]) + found["intercept"]
            off = np.array([point["median_s"] for point in found["points"]]) / fitted - 1
            assert found["deviation"] == pytest.approx(np.abs(off).max())
    report.main(["--docs", str(tmp_path)])
    assert "scaling.svg" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "scaling.svg").read_text().count("whole model, R²") == 3


def comparison(repeats: int = 2, **seconds: float) -> dict[str, Any]:
    """A file as the scripts write it, from a median for each side; what is saved is a byte a second."""
    first = next(iter(seconds.values()))
    results = {
        name: {**timing.summary([value] * repeats), "saved_bytes": 1e6 * value, "peak_bytes": 2e6 * value}
        for name, value in seconds.items()
    }
    ratios = {name: timing.ratio([value] * repeats, [first] * repeats) for name, value in seconds.items()}
    machine = {"cpu": "one of them", "load": "0.10"}
    settings = {"repeats": repeats, "batch": 4}
    return {"command": "python x.py", "settings": settings, "machine": machine, "results": results, "ratios": ratios}


def row(page: str, *words: str) -> list[str]:
    """The cells of the only row of targets with these words."""
    lines = [line for line in page.split("## What the columns are")[0].splitlines() if line.startswith("| ")]
    (found,) = (line for line in lines if all(word in line for word in words))
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_report_says_what_is_met_what_is_not_and_what_was_not_measured(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    loaders = {"torchvision": 1.0, "fcmae": 0.2, "fcmae, and normalised": 0.25}
    files = {
        "encoder-atto": comparison(packed=1, masked=2.5),
        "encoder-tiny": comparison(packed=1, masked=2.0),
        "step": comparison(packed=1, engine=7),
        "step-dense": comparison(**{"packed": 1.2, "timm-gradients": 1.0}),
        "input_pipeline": {
            **comparison(torchvision=1),
            "pipeline": {
                "500x375": {
                    "count": 8,
                    "loaders": {
                        name: timing.summary([value] * 2)
                        | {"images_per_s": 8 / value, "speedup": timing.ratio([1.0, 1.0], [value] * 2)}
                        for name, value in loaders.items()
                    },
                }
            },
        },
        "of-another-script": {},
    }
    del files["input_pipeline"]["results"]
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    report.main(["--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert row(page, "encoder forward", "atto")[2:] == ["at least 2.3x", "2.50x (2.50 - 2.50)", "met"]
    assert row(page, "encoder forward", "tiny")[2:] == ["at least 2.55x", "2.00x (2.00 - 2.00)", "**not met**"]
    assert row(page, "encoder forward", "base")[2:] == ["at least 2.55x", "not measured", ""]
    assert row(page, "activations", "atto")[2:] == ["at most 0.42x", "0.40x", "met"]
    assert row(page, "activations", "tiny")[2:] == ["at most 0.42x", "0.50x", "**not met**"]
    assert row(page, "whole step, atto, batch 16", "own depthwise")[3:] == ["7.00x (7.00 - 7.00)", "met"]
    assert row(page, "whole step, atto, batch 16", "our backend")[3:] == ["not measured", ""]
    assert row(page, "48 of 49")[3:] == ["1.20x (1.20 - 1.20)", "**not met**"]
    assert row(page, "500x375", "same core")[3:] == ["4.00x (4.00 - 4.00)", "met"]
    assert row(page, "2000x1500", "same core")[3:] == ["not measured", ""]
    assert row(page, "GPU", "masked")[3:] == ["not measured", ""]
    assert page.count("one of them") == 1  # benchmarks of one machine name it once
    assert "load when it started: 0.10" in page
    figure = (tmp_path / "benchmarks.svg").read_bytes()
    report.main(["--docs", str(tmp_path)])
    assert (tmp_path / "benchmarks.md").read_text() == page
    assert (tmp_path / "benchmarks.svg").read_bytes() == figure
