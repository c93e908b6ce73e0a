"""Networks of the roadmap go through the commands of classifiers, from scratch to export, with their statistics."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import DEFAULTS

import fcmae
from fcmae import cli
from fcmae.config import FinetuneConfig
from fcmae.networks.roadmap import BatchNorm, Encoder
from fcmae.networks.spec import VARIANTS, RoadmapSpec, read_spec
from fcmae.training import checkpoint
from fcmae.training.micro_batches import settle_grad_accum, smaller_micro_batch
from fcmae.weights.convert import build_classifier
from fcmae.weights.files import read_weights

NUMBERS = {
    "resnet": "{network: roadmap, depths: [1, 1], dims: [16, 32]}",  # a stem that does not tell its stride
    "inverted": "{network: roadmap, depths: [1, 2], dims: [8, 16], patchify: true, depthwise: true, inverted: true}",
}
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reddish and bluish noise of 24 pixels, 12 images a class."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 128, (24, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 127
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_batch_norm_sees_the_whole_batch_unless_parts_are_asked_for(tmp_path: Path) -> None:
    """How many images are computed at once is chosen by device and memory, and would change the network's result."""

    def parts(step: str, **given: int) -> FinetuneConfig:
        model = {"variant": f"roadmap-small/{step}", "stem_stride": 2}
        data, out = {"path": "labelled", "image_size": 64}, str(tmp_path / "out")
        cfg = FinetuneConfig.model_validate({"model": model, "data": data, "out": out, "batch_size": 512} | given)
        return settle_grad_accum(cfg, 1, "cpu")

    found = parts("inverted")
    assert found.grad_accum == 1 and "BatchNorm" in found.chosen["grad_accum"]
    assert smaller_micro_batch(found, 1) is None  # where memory does not suffice
    assert parts("layer-norm").num_micro_batches > 1
    assert parts("inverted", grad_accum=4).num_micro_batches == 4


def test_a_run_with_batch_norm_goes_on_with_as_many_images_at_once(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(labelled, tmp_path / "out", NUMBERS["inverted"], epochs=2)
    with monkeypatch.context() as patch:
        runs.at_step(patch, 2, runs.kill_self(signal.SIGTERM))
        assert cli.main(given) == 143
    runs.forget_accelerator()
    assert cli.main([*given, "--grad_accum", "2"]) == 2
    assert "BatchNorm pools over 4 images, and the run did over 8: choose grad_accum" in capsys.readouterr().err
    runs.forget_accelerator()
    assert cli.main(given) == 0
    runs.forget_accelerator()


def words(labelled: Path, out: Path, numbers: str, epochs: int = 24) -> list[str]:
    given = ["--config", DEFAULTS, "--out", out, "--device", "cpu", "--batch_size", 8, "--epochs", epochs]
    given += ["--model.variant", numbers, "--model.stem_stride", 2, "--data.image_size", 16, "--data.num_workers", 0]
    given += ["--data.auto_augment", "none", "--optim.base_lr", 0.3, "--log.trackers", "none"]
    given += [
        "--regularization.ema_decay",
        0.5,
        "--optim.warmup_epochs",
        0,
        "--checkpoint.every_epochs",
        3,
        "--log.eval_epochs",
        12,
    ]
    return ["finetune", str(labelled), *map(str, given)]


@pytest.fixture(scope="module", params=NUMBERS)
def tuned(labelled: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("runs") / request.param
    assert cli.main(words(labelled, out, NUMBERS[request.param])) == 0
    runs.forget_accelerator()
    return out


def test_what_pools_is_not_taken_again_in_parts_though_init_alone_tells_the_network(
    labelled: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(labelled, tmp_path / "out", "none", epochs=1)
    at = given.index("--model.variant")
    given[at : at + 4] = ["--init", str(tuned)]
    runs.run_out_of_memory(monkeypatch, [2], after_backward=False)
    assert cli.main(given) == 2
    assert "the run cannot be computed in smaller micro-batches" in capsys.readouterr().err
    runs.forget_accelerator()


def test_a_step_is_trained_predicts_and_is_evaluated(labelled: Path, tuned: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert max(line["top1"] for line in lines if "top1" in line) == 1
    assert cli.main(["predict", str(tuned), str(labelled), "--csv", str(tmp_path / "a.csv"), "--device", "cpu"]) == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert sum(Path(row["path"]).parent.name == row["predicted"] for row in rows) >= 18
    common = ["--device", "cpu", "--num_workers", "0"]
    if tuned.name == "inverted":
        return  # the rest looks at stages and blocks, which all have
    place = str(tmp_path / "e")
    models = [str(tuned), f"random:{tuned}"]
    given = ["--data", str(labelled), "--out", place, "--probes", "knn", "--stages", "all"]
    assert cli.main(["evaluate", *models, *given, *common]) == 0
    given = ["--images", str(labelled), "--out", str(tmp_path / "an"), "--max_images", "4"]
    assert cli.main(["analyze", str(tuned), *given, *common]) == 0


def test_exports_hold_the_statistics_and_the_stride(tuned: Path, tmp_path: Path) -> None:
    weights = read_weights(tuned)
    spec = read_spec(weights.architecture.spec)
    assert isinstance(spec, RoadmapSpec) and spec.stem_stride == 2
    assert (weights.architecture.final_norm, weights.architecture.num_classes) == (False, 2)
    moved = [value for name, value in weights.state.items() if name.endswith("running_mean")]
    assert moved and all(value.abs().sum() > 0 for value in moved)
    images = torch.randn(2, 3, 16, 16)
    model = build_classifier(weights).eval()
    for name, to in (("a.safetensors", "fcmae"), ("b.pth", "fcmae"), ("timm", "timm")):
        assert cli.main(["convert", str(tuned), str(tmp_path / name), "--to", to]) == 0
        again = read_weights(tmp_path / name)
        assert again.architecture == weights.architecture
        assert torch.equal(build_classifier(again).eval()(images), model(images))
        assert cli.main(["convert", str(tmp_path / name), "--check"]) == 0
    assert isinstance(fcmae.load(tmp_path / "timm").encoder, Encoder)


def test_formats_of_convnexts_refuse_it(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to, name in (("transformers", "a"), ("fair", "a.pth"), ("minkowski", "a.pth")):
        assert cli.main(["convert", str(tuned), str(tmp_path / name), "--to", to]) == 2
        assert f"{to} has ConvNeXts only, and this is network of the roadmap" in capsys.readouterr().err
    assert cli.main(["convert", str(tuned), str(tmp_path / "a.pth"), "--to", "fcmae"]) == 0
    assert cli.main(["pretrain", "--config", str(DEFAULTS), "--data.path", "x", "--out", "y", "--epochs", "1",
                     "--model.variant", NUMBERS["inverted"]]) == 2  # fmt: skip
    assert "has BatchNorm, whose statistics would be of visible sites" in capsys.readouterr().err


def test_what_stopped_goes_on_with_the_statistics_that_it_had(labelled: Path, tmp_path: Path) -> None:
    half, whole = tmp_path / "half", tmp_path / "whole"
    for out, epochs in ((whole, [6]), (half, [6, 6])):
        for attempt, count in enumerate(epochs):
            if attempt:  # as if it had been killed after its first checkpoint
                last = checkpoint.latest(half)
                assert last is not None
                for path in sorted(last.parent.iterdir())[1:]:
                    for file in path.iterdir():
                        file.unlink()
                    path.rmdir()
            assert cli.main(words(labelled, out, NUMBERS["inverted"], count)) == 0
            runs.forget_accelerator()
    states = []
    for out in (whole, half):
        latest = checkpoint.latest(out)
        assert latest is not None
        states.append(checkpoint.read_tensors(latest, "model"))
    assert any(name.endswith("running_var") for name in states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_its_weights_are_begun_from(labelled: Path, tuned: Path, tmp_path: Path) -> None:
    given = words(labelled, tmp_path / "again", NUMBERS[tuned.name], 1)
    place = given.index("--model.variant")
    given = given[:place] + given[place + 4 :]  # the network and its stride are those of the weights
    assert cli.main([*given, "--init", str(tuned), "--optim.base_lr", "1e-9"]) == 0
    runs.forget_accelerator()
    again, before = read_weights(tmp_path / "again" / "last"), read_weights(tuned)
    assert again.architecture.spec == before.architecture.spec
    name = "encoder.stages.0.0.conv.weight"
    torch.testing.assert_close(again.state[name], before.state[name], rtol=0, atol=1e-6)


def test_statistics_are_float32_and_have_no_counter() -> None:
    state = BatchNorm(3).state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var"]
    y = BatchNorm(3)(torch.randn(2, 4, 4, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean((0, 1, 2)), torch.zeros(3), rtol=0, atol=1e-5)
    assert VARIANTS["roadmap/resnet"].dense_only
