"""The benchmarks at the smallest sizes: what they count, compute and write. How fast anything is, no test asks."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from conftest import requires_minkowski, requires_time
from PIL import Image

from fcmae import verify
from fcmae.anytime import build_segmenter
from fcmae.data.maps import Classes
from fcmae.layouts import MakeLayout, Packed, make_layout
from fcmae.masked import build_fcmae, masked_loss
from fcmae.masking import random_mask
from fcmae.networks.build import make_encoder
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.tables import table
from fcmae.training import checkpoint
from fcmae.weights.formats import Architecture, to_state
from fcmae.weights.record import ImageRecord, Weights
from fcmae.weights.segmenters import save_segmenter

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # where the scripts find timing.py
(
    anytime,
    depthwise,
    encoder,
    exported,
    finetune_step,
    first_hour,
    floor,
    gpu,
    input_pipeline,
    memory,
    pruned,
    report,
    scale,
    scaling,
    timing,
    train_step,
) = map(
    import_module,
    (
        "anytime",
        "depthwise",
        "encoder",
        "exported",
        "finetune_step",
        "first_hour",
        "floor",
        "gpu",
        "input_pipeline",
        "memory",
        "pruned",
        "report",
        "scale",
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


def test_compile_chooses_what_torch_makes_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: made.append((function, settings)))
    for words, settings in (
        (["--compile"], {"dynamic": False, "mode": None}),
        (["--compile", "cudagraphs"], {"dynamic": False, "mode": "reduce-overhead"}),
    ):
        timing.compiled(train_step.parser().parse_args(words), model)
        assert made.pop() == (model, settings)
    assert timing.compiled(train_step.parser().parse_args([]), model) is model
    assert not made


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


def test_whole_and_pruned_networks_are_counted_and_timed_by_torch_and_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without five exports, which tests of their own make."""

    def session_of(encoder: Encoder) -> Any:
        return SimpleNamespace(run=lambda _, given: encoder(torch.from_numpy(given["images"])))

    monkeypatch.setattr(exported, "session_of", session_of)
    monkeypatch.setitem(VARIANTS, "convnextv2_atto", ConvNeXtSpec(depths=(2, 2), dims=(8, 16)))
    path = tmp_path / "benchmarks" / "pruned.json"
    path.parent.mkdir()
    pruned.main([*TINY, "--keep", "0.5", "0.25", "--json", str(path)])
    found = written(path)
    names = ["whole", "hidden-0.5", "hidden-0.25", "blocks-0.5", "blocks-0.25"]
    by_onnx = [f"{name}, onnxruntime" for name in names]
    assert list(found["results"]) == list(found["ratios"]) == names + by_onnx
    for what, share in (("hidden", 0.25), ("blocks", 0.5)):  # a stage keeps a block
        for count in ("multiply_adds", "parameters"):
            counts = [found["results"][name][count] for name in ("whole", f"{what}-0.5", f"{what}-{share:g}")]
            assert counts == sorted(counts, reverse=True) and counts[1] < counts[0]
    for name, other in zip(names, by_onnx, strict=True):
        assert found["results"][name]["parameters"] == found["results"][other]["parameters"]
    assert all(len(side["seconds"]) == 2 for side in found["results"].values())
    times = {name: side["median_s"] for name, side in found["results"].items()}
    for name, whole in (("blocks-0.5", "whole"), ("blocks-0.5, onnxruntime", "whole, onnxruntime")):
        assert found["ratios"][name]["time"] == pytest.approx(times[name] / times[whole])
    report.main(["--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert "time / whole" in page and "multiply-adds, G" in page and "hidden-0.25, onnxruntime" in page
    with pytest.raises(SystemExit, match="leave it out with --sides torch"):
        pruned.main([*TINY, "--precision", "bf16"])


def test_a_segmentation_that_may_stop_is_timed_scored_and_drawn(tmp_path: Path) -> None:
    spec = ConvNeXtSpec(depths=(1, 1), dims=(4, 6))
    model = build_segmenter(make_encoder(spec), "anytime", 2, 8, tau=0.6)
    image = ImageRecord(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    classes = Classes(("a", "b"), (0, 1), 255)
    save_segmenter(tmp_path / "model", model, Weights({}, Architecture(spec), image), "anytime", classes)
    rows = ["image,mask"]
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 2, (32, 48), np.uint8)).save(tmp_path / f"{i}m.png")
        rows.append(f"{i}.png,{i}m.png")
    (tmp_path / "test.csv").write_text("\n".join(rows))
    path, picture, run = tmp_path / "anytime.json", tmp_path / "a.png", str(tmp_path / "model")
    own = ["--model", run, "--against", run, "--data", str(tmp_path / "test.csv"), "--picture", str(picture)]
    anytime.main([*own, "--repeats", "2", "--taus", "0.9", "1", "--budgets", "0.5", "--json", str(path)])
    found = written(path)
    names = ["dense", "full", "exit-1", "tau-0.9", "tau-1", "budget-0.5", "against", "against-exit-1"]
    assert list(found["results"]) == list(found["ratios"]) == names
    macs, miou = ({name: side[key] for name, side in found["results"].items()} for key in ("multiply_adds", "miou"))
    assert macs["exit-1"] < macs["budget-0.5"] < macs["dense"] <= macs["full"] == macs["tau-1"]
    assert miou["dense"] == pytest.approx(miou["full"]) == pytest.approx(miou["tau-1"])
    for name in ("dense", "exit-1"):  # the other model is the same one
        other = name.replace("dense", "against").replace("exit", "against-exit")
        assert (macs[name], miou[name]) == (macs[other], pytest.approx(miou[other]))
    assert found["same_accuracy"] == anytime.same_accuracy(found["results"])
    for each in found["calibration"]:
        assert sum(each["count"]) == 3 * 32 * 48 and 0 <= each["ece"] <= 1
        assert each["accuracy"] == pytest.approx(sum(each["right"]) / sum(each["count"]))
    for name in ("a.png", "a-curve.png", "a-reliability.png"):
        with Image.open(tmp_path / name) as drawn:
            assert drawn.size[0] > 100
    with pytest.raises(SystemExit, match=r"give a model that was trained with model\.head anytime"):
        other = build_segmenter(make_encoder(spec), "pyramid", 2, 8)
        save_segmenter(tmp_path / "other", other, Weights({}, Architecture(spec), image), "pyramid", classes)
        anytime.main(["--model", str(tmp_path / "other"), "--size", "32"])
    save_segmenter(
        tmp_path / "other", model, Weights({}, Architecture(spec), image), "anytime", Classes(("a", "c"), (0, 1), 255)
    )
    with pytest.raises(SystemExit, match="its classes or the mean of its images are not those of --model"):
        anytime.main([*own[:2], "--against", str(tmp_path / "other"), "--size", "32"])
    with pytest.raises(SystemExit, match="nothing to compare without --model"):
        anytime.main(["--against", run, "--size", "32"])


def stopping(miou: dict[str, float], seconds: dict[str, float], macs: dict[str, float]) -> dict[str, Any]:
    """A file as anytime.py writes it."""
    found = comparison(**seconds)
    found["results"] = {
        name: timing.summary([seconds[name]] * 2) | {"multiply_adds": 1e6 * macs[name], "miou": miou[name]}
        for name in seconds
    }
    return found | {"same_accuracy": anytime.same_accuracy(found["results"])}


def test_the_fastest_of_a_kind_is_as_good_as_the_better_of_the_whole_networks() -> None:
    sides = ("dense", "against", "exit-1", "tau-0.9", "tau-0.8", "budget-0.5", "against-exit-1")
    miou = dict(zip(sides, (0.800, 0.810, 0.809, 0.808, 0.806, 0.800, 0.810), strict=True))
    seconds = dict(zip(sides, (1.0, 0.9, 0.8, 0.5, 0.3, 0.2, 0.4), strict=True))
    found = stopping(miou, seconds, seconds)["same_accuracy"]
    assert found == {"stopped after a stage": "exit-1", "tau": "tau-0.9", "against, stopped": "against-exit-1"}


@pytest.mark.parametrize(
    ("tau", "targets"),
    [
        ((0.798, 0.5, 0.48), [["0.50x (0.50 - 0.50)", "met"], ["0.04x", "met"]]),  # 50 % and 52 % saved
        ((0.798, 0.7, 0.4), [["0.70x (0.70 - 0.70)", "**not met**"], ["1.00x", "**not met**"]]),  # 30 % and 60 %
        ((0.796, 0.5, 0.5), [["1.00x (1.00 - 1.00)", "**not met**"], ["infx", "**not met**"]]),  # none is as good
    ],
)
def test_report_compares_a_segmentation_that_may_stop_at_the_same_accuracy(
    tau: tuple[float, float, float], targets: list[list[str]], tmp_path: Path
) -> None:
    # That another network, trained without masks, is faster where it stops is not what is asked here.
    sides = {"dense": (0.8, 1, 1), "full": (0.8, 1.1, 1), "tau-0.5": tau, "against": (0.8, 1, 1)}
    sides["against-exit-1"] = (0.8, 0.1, 0.1)
    found = stopping(*({name: values[i] for name, values in sides.items()} for i in range(3)))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "anytime.json").write_text(json.dumps(found))
    report.main(["--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert row(page, "random weights, nothing hidden")[3:] == ["1.10x (1.10 - 1.10)", "**not met**"]
    assert row(page, "fastest side")[3:] == row(page, "time saved")[3:] == ["not measured", ""]
    (tmp_path / "benchmarks" / "anytime_landsea.json").write_text(json.dumps(found))
    report.main(["--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert [row(page, words)[3:] for words in ("fastest side", "time saved")] == targets
    words = " ".join(page.split())
    assert "| against, stopped | against-exit-1 |" in words
    assert ("| tau | none within 0.3 points |" in words) == (tau[0] < 0.797)
    assert not (tmp_path / "benchmarks.svg").exists()  # its curve is drawn beside its pictures


def test_the_page_is_what_its_json_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "benchmarks")
    report.main(["--docs", str(tmp_path)])
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_models_that_compute_something_else_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_step, "to_state", lambda state, spec, to: to_state(dict(state), spec, to) | ZEROED)
    with pytest.raises(SystemExit, match="fcmae and timm differ by"):
        finetune_step.main(TINY)


def test_an_exported_file_is_timed_against_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "convnextv2_atto", ConvNeXtSpec(depths=(1, 1), dims=(8, 8)))
    exported.main([*TINY, "--json", str(tmp_path / "exported.json")])
    found = written(tmp_path / "exported.json")
    assert list(found["ratios"]) == list(found["results"]) == ["torch", "onnxruntime"]
    assert found["ratios"]["torch"]["time"] == 1


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
    input_pipeline.main(["--sizes", "64x48", "--count", "4", "--repeats", "2", "--json", str(path)])
    found = written(path)["pipeline"]["64x48"]
    assert found["count"] == 4
    assert {"torchvision", "fcmae", "fcmae, and normalised"} <= set(found["loaders"])


def test_a_run_on_made_up_names_is_timed_and_weighed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(scale, "BATCH", 8)
    scale.write_names(tmp_path, 100)
    names = (tmp_path / "names.txt").read_text().split()
    assert len(set(names)) == 100 and len({Path(name).resolve() for name in names}) == 1
    for last in (2, 4):
        found = scale.watched_run(tmp_path, 0, 2, time.time())
        runs.forget_accelerator()
        assert found["first_batch_s"] > 0 and found["first_batch_cpu_s"] > 0
        assert found["peak_bytes"] > 1e6 and found["first"]["main_bytes"] > 1e6
        assert found["last"]["workers_own_bytes"] == []
        assert max(checkpoint.steps(tmp_path / "run")) == last


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


ON_CPU = ["--device", "cpu", "--variants", "convnextv2_atto", "--batch", "2", "--size", "64", "--repeats", "2"]


@pytest.fixture
def small_atto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both libraries."""
    small, create = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, timing.timm.create_model
    monkeypatch.setitem(VARIANTS, "convnextv2_atto", ConvNeXtSpec.model_validate(small))
    monkeypatch.setattr(timing.timm, "create_model", lambda name, **more: create(name, **small, **more))


@requires_time
def test_the_gpus_parts_run_on_a_cpu_and_write_what_they_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_atto: None, one_thread: None
) -> None:
    monkeypatch.setattr(verify, "CASES", verify.CASES[:1])
    monkeypatch.setattr(verify, "speeds", lambda *_: {})  # takes long, and nobody reads it here
    path = tmp_path / "benchmarks" / "gpu.json"
    flags = ["--out", str(path), *ON_CPU, "--batches", "1", "2", "--every-steps", "1", "--images", "8"]
    parts = ["verify", "kernels", "atto-eager", "pretrain", "depthwise", "tests", "atto-batches"]
    assert gpu.main([*flags, "--pretrain-s", "0", "--parts", *parts]) == 0
    content = written(path)
    assert list(content["parts"]) == parts
    assert {"cpu", "torch", "timm", "triton"} <= set(content["machine"])
    found = content["parts"]
    assert {row["backend"] for row in found["verify"]["rows"]} >= {"packed", "masked"}
    assert found["verify"]["ok"]
    for part, key in (
        ("verify", "no_triton"),
        ("kernels", "not_run"),
        ("depthwise", "no_triton"),
        ("tests", "not_run"),
    ):
        assert "triton" in found[part][key]  # on a CPU nothing of it runs, and the file says so
    assert list(found["depthwise"]["stages"]) == ["bf16", "fp32"]
    assert all(len(stages) == 4 for stages in found["depthwise"]["stages"].values())
    sides = found["atto-eager"]["results"]
    assert list(sides) == list(found["atto-eager"]["ratios"]) == ["packed", "timm", "masked"]
    for side in sides.values():
        assert side["images_per_s"] == 2 / side["median_s"]
        assert side["hours"] == pytest.approx(800 * 1_281_167 / side["images_per_s"] / 3600)
        assert side["peak_bytes"] > 0
    assert {name: list(sizes) for name, sizes in found["atto-batches"]["sizes"].items()} == {
        name: ["1", "2"] for name in sides
    }
    assert found["pretrain"]["steps"] >= 2
    assert 0 <= found["pretrain"]["data_wait_share"] <= 1
    report.main(["--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert "without Triton: backend = 'triton' computes on NVIDIA GPUs" in page
    assert "hours of 800 epochs of ImageNet-1k" in page
    assert "which was not run" not in page


def test_a_part_of_the_gpus_that_fails_or_has_no_time_says_so_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a kernel was killed")

    monkeypatch.setattr(verify, "verify", fails)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(path), *ON_CPU, "--parts", "verify", "kernels"]) == 1
    assert written(path)["parts"]["verify"]["failed"] == "RuntimeError: a kernel was killed"
    assert "triton" in written(path)["parts"]["kernels"]["not_run"]
    # Another call keeps what the first one found, and with what; the whole says what the last call was.
    path.write_text(json.dumps(written(path) | {"note": "by hand"}))
    assert gpu.main(["--out", str(path), *ON_CPU, "--parts", "pretrain", "--minutes", "0.5"]) == 0
    parts = written(path)["parts"]
    assert list(parts) == ["verify", "kernels", "pretrain"]
    assert parts["pretrain"]["skipped"].startswith("it takes about 90 s, and 30 s were left")
    assert parts["verify"]["command"].endswith("--parts verify kernels")
    whole = written(path)
    assert (whole["note"], whole["settings"]["minutes"]) == ("by hand", 0.5)
    assert whole["command"] == parts["pretrain"]["command"]
    # What an earlier call measured stays where there is no time for it now.
    path.write_text(json.dumps(written(path) | {"parts": parts | {"pretrain": {"images_per_s": 9}}}))
    assert gpu.main(["--out", str(path), *ON_CPU, "--parts", "pretrain", "--minutes", "0.5"]) == 0
    assert written(path)["parts"]["pretrain"] == {"images_per_s": 9}
    # Nor does another try that fails take it away.
    good = parts | {"verify": {"command": "gpu.py", "ok": True}}
    path.write_text(json.dumps(written(path) | {"parts": good}))
    assert gpu.main(["--out", str(path), *ON_CPU, "--parts", "verify"]) == 1
    again = written(path)["parts"]["verify"]
    assert again == {"command": "gpu.py", "ok": True, "failed_again": "RuntimeError: a kernel was killed"}
    assert "**Failed when it was tried again**: RuntimeError: a kernel was killed." in list(report.told(again))
    path.write_text(json.dumps(written(path) | {"parts": parts | {"pretrain": {"images_per_s": 9}}}))
    (tmp_path / "benchmarks").mkdir()
    path.rename(tmp_path / "benchmarks" / "gpu.json")
    report.main(["--docs", str(tmp_path)])
    assert (tmp_path / "benchmarks.md").read_text().count("--parts verify kernels\n```") == 2
    path.write_text(json.dumps({"machine": {"gpu": "another"}, "parts": {}}))
    with pytest.raises(SystemExit, match="is of gpu another"):
        gpu.main(["--out", str(path), *ON_CPU])


class Rounded(Packed):
    """In float64, and only then in the weight's precision: in bfloat16, some CPUs round each sum on the way."""

    def depthwise_conv(self, f: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = super().depthwise_conv(f.double(), weight.double(), None if bias is None else bias.double())
        return out.to(weight.dtype)


def test_wrong_kernels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Rounded):
        def depthwise_conv(self, f: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return super().depthwise_conv(f, weight * (1 + 1e-3), bias)

    monkeypatch.setattr(gpu, "why_no_triton", lambda device: None)
    monkeypatch.setattr(gpu, "run_warm_up", lambda session, wanted: None)
    for layout, ok in ((Rounded, True), (Wrong, False)):
        monkeypatch.setattr(gpu, "make_layout", lambda backend, mask, visible, layout=layout: layout(mask, visible))
        path = tmp_path / f"{ok}.json"
        assert gpu.main(["--out", str(path), *ON_CPU, "--parts", "kernels"]) == (0 if ok else 1)
        found = written(path)["parts"]["kernels"]
        assert [(row["stage"], row["precision"]) for row in found["rows"]] == [
            (stage, precision) for stage in range(1, 5) for precision in ("float64", "float32", "bfloat16")
        ]
        assert found["ok"] == ok


def test_what_is_compiled_beforehand_is_what_the_parts_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    class Noted(Packed):
        def depthwise_conv(self, f: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out = super().depthwise_conv(f.to(weight.dtype), weight, bias)
            names = (str(dtype).removeprefix("torch.") for dtype in (f.dtype, out.dtype))
            used.add(gpu.Kernels(f.shape[-2], f.shape[-1], *names))
            return out

    def noted(backend: str, mask: torch.Tensor, visible: int | None = None) -> Any:
        return Noted(mask, 1 if visible is None else visible) if backend == "triton" else make_layout(backend, mask)

    monkeypatch.setattr(gpu, "why_no_triton", lambda device: None)
    monkeypatch.setattr(gpu, "run_warm_up", lambda session, wanted: None)
    for module in (gpu, depthwise, train_step):
        monkeypatch.setattr(module, "make_layout", noted)
    monkeypatch.setattr(gpu, "SIDES", ("triton",))
    monkeypatch.setattr(gpu, "TOLERANCES", dict.fromkeys(gpu.TOLERANCES, 1.0))  # some CPUs sum in bfloat16
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 1)
    args = gpu.parser().parse_args(["--out", str(tmp_path / "gpu.json"), *ON_CPU])
    session = gpu.Session(args, [])
    for part in ("kernels", "depthwise", "atto-eager"):
        used.clear()
        assert gpu.main(["--out", str(args.out), *ON_CPU, "--parts", part]) == 0
        assert used
        assert used <= gpu.kernels_of(session, part)
        for kernels in list(used):
            used.clear()
            gpu.compile_kernels(kernels, "cpu")
            assert used == {kernels}
    both = {("float32", "bfloat16"), ("bfloat16", "bfloat16")}
    plain = {("float64", "float64"), ("float32", "float32")}
    assert {(kernels.features, kernels.weights) for kernels in gpu.kernels_of(session, "verify")} == both | plain


def test_what_does_not_fit_into_memory_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_atto: None
) -> None:
    step_of = train_step.side

    def side(name: str, images: torch.Tensor, *rest: Any) -> Any:
        if name == "timm" or len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return step_of(name, images, *rest)

    monkeypatch.setattr(train_step, "side", side)
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 1)
    path = tmp_path / "gpu.json"
    flags = [
        "--out",
        str(path),
        *ON_CPU,
        "--batch",
        "1",
        "--batches",
        "1",
        "2",
        "--parts",
        "atto-eager",
        "atto-batches",
    ]
    assert gpu.main(flags) == 0
    parts = written(path)["parts"]
    assert list(parts["atto-eager"]["results"]) == ["packed", "masked"]
    assert parts["atto-eager"]["left_out"] == {"timm": "out of memory: CUDA out of memory"}
    assert {name: list(sizes) for name, sizes in parts["atto-batches"]["sizes"].items()} == {
        "packed": ["1"],
        "masked": ["1"],
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "everything"], "--parts everything: there are verify, kernels"),
        (["--repeats", "1"], "--repeats 1"),
        (["--device", "cuda"], "torch finds no GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the messages is about a machine without a GPU")
def test_what_the_gpus_script_cannot_do_is_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        gpu.main(["--out", str(tmp_path / "gpu.json"), *ON_CPU, *flags])


def on_gpu(**seconds: float) -> dict[str, Any]:
    """Steps as gpu.py writes them, of 4 images."""
    found = comparison(**seconds)
    results = {
        name: side | {"images_per_s": 4 / side["median_s"], "hours": 9.0} for name, side in found["results"].items()
    }
    return {"batch": 4, "variant": "convnextv2_base", "results": results, "ratios": found["ratios"]}


def test_report_takes_the_gpus_figures_where_they_are(tmp_path: Path) -> None:
    shares = {stage: {"kernels": {"share": {"forward": 0.7, "backward": 0.5 + stage / 10}}} for stage in range(1, 5)}
    for way in shares.values():
        way["kernels"] |= {name: {"median_s": 1e-3} for name in ("forward", "backward")}
    content = comparison(packed=1) | {
        "parts": {
            "verify": {"failed": "RuntimeError: no"},
            "depthwise": {"copy_bytes_per_s": 3e12, "stages": {"bf16": shares}},
            "base-compiled": on_gpu(packed=1, triton=0.8, timm=2, masked=2.4),
            "tiny-eager": {"skipped": "it takes about 40 s, and 3 s were left"},
        }
    }
    del content["results"], content["ratios"]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.json").write_text(json.dumps(content))
    report.main(["--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert row(page, "GPU", "compiled", "masked")[3:] == ["3.00x (3.00 - 3.00)", "met"]  # of triton, the faster
    assert row(page, "GPU", "compiled", "timm")[3:] == ["2.50x (2.50 - 2.50)", "**not met**"]
    assert row(page, "GPU", "CUDA graphs", "masked")[3:] == ["not measured", ""]
    assert row(page, "depthwise kernels", "bf16")[3:] == ["0.60x", "met"]
    assert row(page, "depthwise kernels", "fp32")[3:] == ["not measured", ""]
    assert "**verify**: failed: RuntimeError: no." in page
    assert "**tiny-eager**: left out: it takes about 40 s" in page


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
        "finetune": comparison(fcmae=1, timm=1.25),
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
    assert row(page, "GPU", "compiled", "masked")[3:] == ["not measured", ""]
    assert "gpu.json`, which was not run" in page
    assert row(page, "fine-tuning step")[3:] == ["0.80x (0.80 - 0.80)", "met"]
    assert page.count("one of them") == 1  # benchmarks of one machine name it once
    assert "load when it started: 0.10" in page
    figure = (tmp_path / "benchmarks.svg").read_bytes()
    report.main(["--docs", str(tmp_path)])
    assert (tmp_path / "benchmarks.md").read_text() == page
    assert (tmp_path / "benchmarks.svg").read_bytes() == figure


def test_what_a_card_holds_grows_with_the_images_and_less_where_blocks_are_computed_again() -> None:
    whole, again = memory.need("atto", False), memory.need("atto", True)
    parameters = sum(p.numel() for p in build_fcmae(make_encoder(VARIANTS["convnextv2_atto"])).parameters())
    assert whole.parameters == again.parameters == parameters
    assert whole.fixed_bytes > again.fixed_bytes >= 16 * parameters
    assert whole.image_bytes > again.image_bytes > 0


def test_the_page_on_scale_has_the_table_that_was_counted() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks" / "memory.json").read_text())["rows"]
    assert table(memory.COLUMNS, memory.rows(rows)) in (ROOT / "docs" / "scale.md").read_text()


class Forked:
    """`subprocess.Popen` of `python -m fcmae.cli`, by the server of the tests, which imports nothing anew."""

    def __init__(self, words: list[str], cwd: Path, stdout: Any, **_: object) -> None:
        assert words[:3] == [sys.executable, "-m", "fcmae.cli"]
        self.process = runs.start(words[3:], Path(stdout.name), prepare=partial(runs.in_folder, cwd))
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)


@requires_time
def test_the_first_hour_runs_each_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_hour, "subprocess", SimpleNamespace(Popen=Forked))
    path = tmp_path / "first_hour.json"
    words = ["--out", str(tmp_path), "--kinds", "grey16", "--hours", "0.001", "--share", "0.1", "--json", str(path)]
    first_hour.main(words)
    found = json.loads(path.read_text())["runs"]["grey16"]
    assert [one["command"][0] for one in found] == ["pretrain", "finetune", "report"]
    assert [one["status"] for one in found] == [0, 0, 0], (tmp_path / "pretrain.log").read_text()
    assert all(one["peak_bytes"] > 10**8 for one in found)
    assert found[0]["of_hours"] == pytest.approx(found[0]["seconds"] / 3600 / 0.001)
    with Image.open(tmp_path / "grey16" / "discs" / "0.tif") as image:
        assert image.mode == "I;16"
    (row, tuned, reported) = first_hour.rows({"grey16": found})
    assert (row[0], tuned[0], reported[4]) == ("16-bit grey TIFFs", "", "")


@pytest.mark.parametrize(("kind", "shape"), [("bands4", (192, 192, 4)), ("huge", (4000, 6000, 3))])
def test_the_folders_of_the_first_hour_are_what_they_say(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    first_hour.write_images(tmp_path, first_hour.KINDS[kind], 1)
    (path,) = tmp_path.iterdir()
    pixels = first_hour.tifffile.imread(path) if path.suffix == ".tif" else np.asarray(Image.open(path))
    assert pixels.shape == shape
