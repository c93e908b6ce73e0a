"""A network that is no ConvNeXt goes through the same commands, from pretraining to prediction."""

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
from runs import DEFAULTS, flags

import fcmae
from fcmae import cli
from fcmae.evaluation import probes
from fcmae.networks.container import Encoder
from fcmae.networks.spec import VARIANTS, ContainerSpec
from fcmae.weights.files import read_weights

SPEC = ContainerSpec(
    depths=(1, 1), dims=(8, 16), affinity=("static", "mixed"), mlp_ratios=(2, 2), num_heads=4, stem_stride=4
)
NUMBERS = (
    "{network: container, depths: [1, 1], dims: [8, 16], affinity: [static, mixed], mlp_ratios: [2, 2], num_heads: 4}"
)
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reddish and bluish noise of 24 pixels, 10 images a class."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir()
        for number in range(10):
            pixels = rng.integers(0, 128, (24, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 127
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(labelled: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    model = {"model__variant": NUMBERS, "model__stem_stride": 4, "monitor__num_images": 4, "log__eval_epochs": 1}
    rates = {"optim__base_lr": 0.01, "data__val_share": 0.2, "epochs": 2}
    words = ["pretrain", *flags(labelled, out, **model, **rates)]
    with pytest.MonkeyPatch.context() as patch:
        runs.at_step(patch, 3, runs.kill_self(signal.SIGTERM))
        assert cli.main(words) == 143
    runs.forget_accelerator()
    assert cli.main(words) == 0
    runs.forget_accelerator()
    return out


@pytest.fixture(scope="module")
def tuned(labelled: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    words = ["--config", DEFAULTS, "--init", pretrained, "--out", out, "--device", "cpu", "--batch_size", 4]
    words += ["--data.image_size", 16, "--data.num_workers", 0, "--data.auto_augment", "none", "--epochs", 3]
    words += ["--optim.base_lr", 0.1, "--optim.layer_decay", 0.9, "--log.trackers", "none"]
    assert cli.main(["finetune", str(labelled), *map(str, words)]) == 0
    runs.forget_accelerator()
    return out


def test_pretraining_resumes_and_watches_its_blocks(labelled: Path, pretrained: Path) -> None:
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    watched = {key for line in lines for key in line if "stages." in key}
    assert {key.rpartition("/")[2] for key in watched} == {"stages.0.0", "stages.1.0"}
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, len(trained) + 1)) and len(trained) > 4
    assert all(np.isfinite(line["loss"]) for line in trained)
    saved = (pretrained / "config.yaml").read_text()
    assert "network: container" in saved
    assert read_weights(pretrained).architecture.spec == SPEC


def test_its_weights_are_written_read_and_begun_from(pretrained: Path, tmp_path: Path) -> None:
    for name, to in (("a.safetensors", "fcmae"), ("b.pth", "fcmae"), ("timm", "timm")):
        dest = tmp_path / name
        assert cli.main(["convert", str(pretrained), str(dest), "--to", to]) == 0
        read = read_weights(dest)
        assert (read.architecture.spec, read.format) == (SPEC, "fcmae")
        encoder = fcmae.load(dest).encoder
        assert isinstance(encoder, Encoder) and cli.main(["convert", str(dest), "--check"]) == 0
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, read_weights(pretrained).state[f"encoder.{key}"])


@pytest.mark.parametrize("to", ["transformers", "fair", "minkowski"])
def test_formats_of_convnexts_refuse_it(
    pretrained: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / ("a.pth" if to != "transformers" else "a")
    assert cli.main(["convert", str(pretrained), str(dest), "--to", to]) == 2
    assert f"{to} has ConvNeXts only, and this is CONTAINER of depths 1-1" in capsys.readouterr().err
    assert not dest.exists()


def test_weights_of_no_record_are_read_if_their_network_is_named(tmp_path: Path) -> None:
    state = {f"encoder.{k}": v for k, v in Encoder(VARIANTS["container_light"]).state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth", "container_light").architecture.spec == VARIANTS["container_light"]
    with pytest.raises(ValueError, match="are not those of container"):
        read_weights(tmp_path / "a.pth", "container")


def test_it_segments_from_its_pretraining_and_labels_images(pretrained: Path, tmp_path: Path) -> None:
    for part in ("images", "maps"):
        (tmp_path / "tiles" / part).mkdir(parents=True)
    for number in range(6):
        rng = np.random.default_rng(number)
        bright = np.zeros((24, 24), np.uint8)
        bright[:, : 8 + number] = 1
        pixels = (rng.integers(0, 80, (24, 24, 3)) + 160 * bright[..., None]).astype(np.uint8)
        for part, array in (("images", pixels), ("maps", bright)):
            Image.fromarray(array).save(tmp_path / "tiles" / part / f"{number}.png")
    out = tmp_path / "segmented"
    tiles = tmp_path / "tiles"
    words = [tiles / "images", "--maps", tiles / "maps", "--config", DEFAULTS, "--init", pretrained, "--out", out]
    words += ["--device", "cpu", "--batch_size", 2, "--optim.warmup_epochs", 0]
    words += ["--data.image_size", 16, "--data.num_workers", 0, "--data.val_share", 0.4, "--epochs", 8]
    words += ["--optim.base_lr", 0.3, "--log.trackers", "none", "--log.eval_epochs", 8, "--model.head_dim", 8]
    assert cli.main(["segment", *map(str, words)]) == 0
    runs.forget_accelerator()
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["miou"] > 0.8
    predicted = ["predict", out, tiles / "images", "--out", tmp_path / "found", "--device", "cpu"]
    assert cli.main(list(map(str, predicted))) == 0
    with Image.open(next((tmp_path / "found").rglob("*.png"))) as labels:
        assert labels.size == (24, 24) and set(np.unique(np.asarray(labels))) <= {0, 1}


def test_it_is_fine_tuned_evaluated_and_predicts(
    labelled: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 20)
    last = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["top1"] == 1.0
    assert cli.main(["predict", str(tuned), str(labelled), "--csv", str(tmp_path / "a.csv"), "--device", "cpu"]) == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert sum(Path(row["path"]).parent.name == row["predicted"] for row in rows) >= 18
    words = ["--data", str(labelled), "--out", str(tmp_path / "e"), "--device", "cpu", "--num_workers", "0"]
    assert cli.main(["evaluate", str(tuned), *words, "--stages", "all"]) == 0
    record = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert {each["probe"] for each in record["results"]} == {"knn", "linear"}
    assert (
        cli.main(["analyze", str(tuned), "--images", str(labelled), "--out", str(tmp_path / "an"), "--device", "cpu"])
        == 0
    )
