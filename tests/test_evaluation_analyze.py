"""`fcmae analyze`: what it writes, that it equals the definitions, and that nothing else is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae import cli
from fcmae.config.commands import AnalyzeConfig
from fcmae.data.find import find_labelled
from fcmae.evaluation.analysis import Statistics
from fcmae.evaluation.analyze import analyze
from fcmae.evaluation.figures import last_of_stages, save_activations, save_by_layer, save_selectivity
from fcmae.heads import Classifier
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS
from fcmae.weights.convert import save_classifier
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

FIGURES = {"cosine_distance.png", "channels.png", "effective_rank.png", "activations.png"}
V2, V1 = "random:convnextv2_atto", "random:convnext_atto"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def run(*words: object) -> int:
    return cli.main(["analyze", *map(str, words), "--image-size", "32", "--device", "cpu"])


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "analysis.json").read_text())
    return found


@pytest.fixture(scope="module")
def compared(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on labelled images."""
    out = tmp_path_factory.mktemp("analysed") / "out"
    assert run(V2, V1, "--data", labelled, "--out", out, "--batch-size", 5) == 0
    return out


def test_two_models_are_compared_in_one_figure_of_each_kind(compared: Path) -> None:
    assert {path.name for path in compared.iterdir()} == FIGURES | {"grn.png", "selectivity.png", "analysis.json"}
    for path in compared.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("RGB")).std() > 10
    found = record(compared)
    assert found["data"]["num_images"] == 12
    assert found["data"]["class_names"] == ["a", "b", "c"]
    assert [model["name"] for model in found["models"]] == [V2, V1]
    assert [model["architecture"] for model in found["models"]] == ["convnextv2_atto", "convnext_atto"]
    names = [f"stages.{i}.{j}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)]
    for model in found["models"]:
        assert [layer["name"] for layer in model["layers"]] == names
        assert (model["image_size"], model["num_images"]) == ([32, 32], 12)
        assert all(("grn_gamma" in layer) == ("v2" in model["name"]) for layer in model["layers"])


def test_the_numbers_are_those_of_the_streamed_statistics(compared: Path, labelled: Path) -> None:
    index = find_labelled(str(labelled))
    assert index.labels is not None
    pixels = []
    for path in index.names():  # the whole 40 x 48 image covers 32 / .875 pixels; its centre is taken
        with Image.open(path) as image:
            box = ((48 - 35) / 2, (40 - 35) / 2)
            crop = image.crop((int(box[0]), int(box[1]), int(box[0]) + 35, int(box[1]) + 35))
            pixels.append(np.asarray(crop.resize((32, 32), Image.Resampling.BICUBIC)))
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    from fcmae.evaluation.models import load_backbone

    statistics = Statistics(load_backbone(V2).model, 3)
    statistics.add((images - mean) / std, torch.tensor(index.labels))
    for layer in record(compared)["models"][0]["layers"]:
        expected = statistics.layers()[layer["name"]]
        assert layer["cosine_distance"] == pytest.approx(expected.cosine_distance, rel=1e-3)
        assert layer["effective_rank"] == pytest.approx(expected.effective_rank, rel=1e-2)
        assert expected.selectivity is not None
        assert layer["selectivity"]["mean"] == pytest.approx(expected.selectivity.mean(), rel=1e-2)
        assert sum(layer["selectivity"]["counts"]) == layer["num_channels"] == len(expected.selectivity)


def test_the_command_that_is_recorded_gives_the_same_again(compared: Path) -> None:
    before = record(compared)
    words = before["command"].split()
    assert words[:2] == ["fcmae", "analyze"]
    assert cli.main([*words[1:], "--overwrite", "--batch-size", "5"]) == 0
    assert record(compared)["models"] == before["models"]


def test_a_table_is_printed_and_selectivity_needs_labels(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(V1, "--images", labelled, "--out", tmp_path / "out", "--max-images", 5) == 0
    header, _, row, last = capsys.readouterr().out.splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)), strict=True))
    assert (cells["model"], cells["GRN gamma"], cells["selectivity"]) == (V1, "-", "-")
    assert float(cells["effective rank"]) > 0
    assert last == f"wrote {tmp_path / 'out'}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FIGURES | {"analysis.json"}
    assert record(tmp_path / "out")["data"] == {"source": [str(labelled)], "num_images": 5, "class_names": []}


def test_a_run_and_the_same_untrained_go_into_the_run(labelled: Path, tmp_path: Path) -> None:
    """A fine-tuning run's best model; how its images are read is in the file."""
    spec = VARIANTS["convnextv2_atto"]
    image = ImageRecord(input_size=(1, 32, 48), mean=(0.4,), std=(0.3,))
    weights = Weights({}, Architecture(spec, in_chans=1), image, ("a", "b"))
    save_classifier(tmp_path / "run" / "best", Classifier(Encoder(spec, 1), 2), weights)
    (tmp_path / "run" / "config.yaml").write_text("# fcmae finetune 0\n")
    run_dir = str(tmp_path / "run")
    analyze(AnalyzeConfig(models=[run_dir, f"random:{run_dir}"], images=[str(labelled)], device="cpu"))
    models = record(tmp_path / "run" / "analysis")["models"]
    assert [model["image_size"] for model in models] == [[32, 48]] * 2
    assert models[0]["layers"] != models[1]["layers"]


def test_files_that_cannot_be_read_are_named_and_left_out(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(labelled, tmp_path / "labelled")
    (folder / "a" / "0.png").write_bytes(b"not an image")
    assert run(V1, "--data", folder, "--out", tmp_path / "out") == 0
    assert f"{folder / 'a' / '0.png'}: " in capsys.readouterr().err
    assert record(tmp_path / "out")["models"][0]["num_images"] == 11
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"not an image")
    assert run(V1, "--data", folder, "--out", tmp_path / "none") == 2
    assert "none of 12 images can be read" in capsys.readouterr().err


def test_what_cannot_be_analysed_is_said_in_a_sentence(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for words, message in (
        (["random:resnet10t", "--images", labelled, "--out", out], "'random:resnet10t': ResNet is no ConvNeXt"),
        ([V1, V2, V1, "--images", labelled, "--out", out], f"model = '{V1}' is given twice"),
        ([V1, "--images", labelled], "out is missing"),
        ([V1, "--images", tmp_path / "nowhere", "--out", out], "images: "),
        ([V1, "--data", tmp_path / "nowhere", "--out", out], "data: "),
    ):
        assert run(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fcmae: error: ") and message in line
    assert not out.exists()
    with pytest.raises(ValueError, match="give either images or data"):
        analyze(AnalyzeConfig(models=[V1], out=out))


def test_nothing_but_an_earlier_analysis_is_replaced_and_that_when_asked(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (V2, "--data", labelled, "--out", tmp_path, "--max-images", 3)
    (tmp_path / "notes.txt").write_text("mine")
    assert run(*words) == 2
    assert "holds 'notes.txt', which is not of this command" in capsys.readouterr().err
    (tmp_path / "notes.txt").unlink()
    assert run(*words) == 0
    assert run(*words) == 2
    assert "--overwrite to replace them" in capsys.readouterr().err
    assert run(V1, "--images", labelled, "--out", tmp_path, "--overwrite") == 0
    assert not (tmp_path / "grn.png").exists() and not (tmp_path / "selectivity.png").exists()


# The figures


def test_models_of_other_depths_and_many_of_them_are_drawn(tmp_path: Path) -> None:
    models = [f"model {number} {'long ' * 20}" for number in range(9)]
    depth = {model: 4 + number for number, model in enumerate(models)}
    values = {m: {f"stages.{min(i, 3)}.{max(0, i - 3)}": 0.0 for i in range(d)} for m, d in depth.items()}
    save_by_layer(tmp_path / "lines.png", models, {"one": values, "two": {models[3]: values[models[3]]}}, "title")
    rng = np.random.default_rng(0)
    drawn = {model: {layer: rng.random(8) for layer in layers} for model, layers in values.items()}
    save_selectivity(tmp_path / "selectivity.png", drawn, "title")
    three = {f"stages.{i}.0": rng.random(8) for i in range(3)}
    save_selectivity(tmp_path / "three.png", {"three stages": three, **drawn}, "title")
    maps = {f"stages.{i}.0": rng.random((i + 1, 2, 3)).astype(np.float32) * i for i in range(4)}
    save_activations(tmp_path / "maps.png", [(models[0], rng.random((5, 7, 3)), maps)], "title")
    for name in ("lines", "selectivity", "three", "maps"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image.convert("RGB")).std() > 10
            assert max(image.size) < 4000


@pytest.mark.parametrize("name", [r"runs/$\frac$", "_hidden", "caf\udce9"])
def test_a_model_may_have_any_name(tmp_path: Path, name: str) -> None:
    values = {f"stages.{i}.0": 0.5 for i in range(4)}
    save_by_layer(tmp_path / "lines.png", [name], {"one": {name: values}}, "title")
    maps = {layer: np.zeros((2, 2, 3), np.float32) for layer in values}
    save_activations(tmp_path / "maps.png", [(name, np.zeros((5, 7)), maps)], "title")
    drawn = {layer: np.full(8, value) for layer, value in values.items()}
    save_selectivity(tmp_path / "selectivity.png", {name: drawn}, "title")


def test_stages_keep_their_last_block() -> None:
    assert last_of_stages(["stages.0.0", "stages.0.1", "stages.1.0"]) == ["stages.0.1", "stages.1.0"]
