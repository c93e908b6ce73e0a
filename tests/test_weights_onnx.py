from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import randomize
from runs import write_images
from torch import Tensor

import fcmae
from fcmae.cli import main
from fcmae.config.commands import ExportConfig
from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.data.shards import Parts
from fcmae.data.storage import Storage
from fcmae.heads import Classifier
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import ContainerSpec, ConvNeXtSpec, NetworkSpec
from fcmae.weights import onnx as ours
from fcmae.weights.convert import build_classifier
from fcmae.weights.files import read_weights, save_weights
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

V2 = ConvNeXtSpec(depths=(1, 2), dims=(8, 12), stem_stride=2)
UNEVEN = ConvNeXtSpec(depths=(1, 2), dims=(8, 12), stem_stride=2, hidden=((5,), (7, 30)))
CONTAINER = ContainerSpec(depths=(1, 1), dims=(8, 16), affinity=("static", "mixed"), mlp_ratios=(2, 2), num_heads=2)
V1 = ConvNeXtSpec(depths=(1, 1), dims=(8, 12), kernel_size=3, use_grn=False)
IMAGE = ImageRecord(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), input_size=(3, 24, 32), crop_pct=1.0)
NAMES = ("cat", "dog", "ünïcode")


def write_weights(path: Path, spec: NetworkSpec, num_classes: int = 0) -> Path:
    """A file of random weights, a classifier or an encoder, that says where it is from."""
    net = Classifier(make_encoder(spec), num_classes or 1)
    randomize(net, seed=len(path.name))
    kept = {name: value for name, value in net.state_dict().items() if num_classes or name.startswith("encoder.")}
    architecture = Architecture(spec, final_norm=num_classes > 0, num_classes=num_classes)
    origin = {"run": "runs/a", "license": "cc-by-nc-4.0"}
    save_weights(path, Weights(kept, architecture, IMAGE, NAMES[:num_classes], origin), "fcmae")
    return path


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def export(folder: Path, model: Path, **settings: Any) -> tuple[onnxruntime.InferenceSession, str]:
    dest = folder / "model.onnx"
    said = ours.export_onnx(ExportConfig(model=model, dest=dest, **settings))
    return session_of(dest), said


@torch.no_grad()
def close(found: Any, expected: Tensor) -> bool:
    # float32 summed in another order.
    return found.shape == expected.shape and bool(np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier's weights and of its ONNX file, which normalises."""
    folder = tmp_path_factory.mktemp("classifier")
    export(folder, write_weights(folder / "model.safetensors", V2, 3), normalize=True)
    return folder


@torch.no_grad()
def test_a_classifier_gives_torchs_logits_for_any_batch_and_size(classifier: Path) -> None:
    session = session_of(classifier / "model.onnx")
    weights = read_weights(classifier / "model.safetensors")
    model, normalize = build_classifier(weights).eval(), weights.reading("it").normalize
    for shape in ((1, 3, 4, 4), (3, 3, 41, 23), (2, 3, 16, 64)):
        images = torch.rand(shape)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert close(found, model(normalize(images)))
    assert sorted(path.name for path in classifier.iterdir()) == ["model.onnx", "model.safetensors"]


def test_the_file_says_what_it_is_and_nothing_of_this_machine(classifier: Path) -> None:
    said = session_of(classifier / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(said["class_names"]) == list(NAMES)
    assert said["license"] == "cc-by-nc-4.0"
    assert {key: json.loads(said[key]) for key in IMAGE.known()} == IMAGE.known()
    assert json.loads(said["normalizes"]) is True
    onnx.checker.check_model(str(classifier / "model.onnx"), full_check=True)
    content = (classifier / "model.onnx").read_bytes()
    assert str(Path(ours.__file__).parent).encode() not in content
    assert b"stack_trace" not in content


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of weights and their export, and what that said."""
    folder = tmp_path_factory.mktemp("pyramid")
    _, said = export(folder, write_weights(folder / "model.safetensors", V1), output="pyramid")
    return folder, said


@torch.no_grad()
def test_a_pyramid_has_the_map_of_every_stage(pyramid: tuple[Path, str]) -> None:
    folder, said = pyramid
    model, session = folder / "model.safetensors", session_of(folder / "model.onnx")
    assert "stage1, stage2 of" in said
    assert json.loads(session.get_modelmeta().custom_metadata_map["normalizes"]) is False
    assert "made-up images" in said
    images, loaded = torch.rand(2, 3, 24, 40), fcmae.load(model)
    found = session.run(["stage1", "stage2"], {"images": loaded.normalize(images).numpy()})
    assert all(map(close, found, loaded.pyramid(images)))


def check_features(session: Any, model: Path) -> None:
    """For any batch and size."""
    loaded = fcmae.load(model)
    for shape in ((1, 3, 16, 16), (3, 3, 24, 40)):
        images = torch.rand(shape)
        (found,) = session.run(["pooled"], {"images": loaded.normalize(images).numpy()})
        assert close(found, loaded(images).mean((1, 2)))


@torch.no_grad()
def test_a_container_gives_torchs_features_for_any_batch_and_size(tmp_path: Path) -> None:
    model = write_weights(tmp_path / "model.safetensors", CONTAINER)
    session, _ = export(tmp_path, model)
    check_features(session, model)


@torch.no_grad()
def test_features_of_a_pruned_run_are_compared_on_its_images_and_large_numbers_have_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: whole(self, path, external_data=True))
    (tmp_path / "best").mkdir()
    model = write_weights(tmp_path / "best" / "model.safetensors", UNEVEN)
    find_images([str(write_images(tmp_path / "photos", 5))]).save(tmp_path / "files.json")
    (tmp_path / "config.yaml").write_text("# fcmae pretrain\n")
    session, said = export(tmp_path, model)
    assert "4 images such as" in said
    assert "photos/00.jpg" in said
    check_features(session, model)
    assert (tmp_path / "model.onnx.data").is_file()
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"model\.onnx\.data exists: give a new path"):
        export(tmp_path, model)


def test_no_request_goes_to_places_that_a_run_of_somebodys_names(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "best").mkdir()
    shutil.copy(classifier / "model.safetensors", tmp_path / "best")
    images = Images(Parts(["http://10.0.0.1/a.png"], [], np.array([[-1], [0], [-1]]), Storage()))
    images.save(tmp_path / "files.json")
    (tmp_path / "config.yaml").write_text("# fcmae finetune\n")
    monkeypatch.setattr(ours, "_write", lambda path, *_: shutil.copy(classifier / "model.onnx", path))
    monkeypatch.setattr(Parts, "read", lambda *_: pytest.fail("it was asked for"))
    _, said = export(tmp_path, tmp_path / "best" / "model.safetensors", normalize=True)
    assert "made-up images" in said


def test_what_computes_something_else_is_refused_and_not_written(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_weights(tmp_path / "another.safetensors", V2, 3)
    monkeypatch.setattr(ours, "_write", lambda path, *_: shutil.copy(classifier / "model.onnx", path))
    with pytest.raises(ValueError, match=r"differ by \S+ of the largest output on made-up images.+nothing was written"):
        export(tmp_path, other, normalize=True)
    # The same weights are the proof that it is they that differ.
    export(tmp_path, classifier / "model.safetensors", normalize=True)


def test_an_output_that_is_not_finite_is_refused(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_write", lambda path, *_: shutil.copy(classifier / "model.onnx", path))
    run = onnxruntime.InferenceSession.run
    broken = lambda self, *given: [values * np.float32("nan") for values in run(self, *given)]  # noqa: E731
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", broken)
    with pytest.raises(ValueError, match="differ by nan of the largest output"):
        export(tmp_path, classifier / "model.safetensors", normalize=True)
    assert list(tmp_path.iterdir()) == []


def test_one_output_of_several_that_differs_is_enough(
    pyramid: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = pyramid
    monkeypatch.setattr(ours, "_write", lambda path, *_: shutil.copy(folder / "model.onnx", path))
    run = onnxruntime.InferenceSession.run

    def spoil_the_last(self: Any, *given: Any) -> list[Any]:
        *others, last = run(self, *given)
        return [*others, last * np.float32(1.5)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", spoil_the_last)
    with pytest.raises(ValueError, match=r"differ by \S+ of the largest output .*nothing was written"):
        export(tmp_path, folder / "model.safetensors", output="pyramid")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dest": "model.pt"}, r"dest = \S+model\.pt: give it a name in \.onnx"),
        ({"dest": "taken.onnx"}, r"taken\.onnx exists: give a new path, or remove it"),
        ({"output": "logits"}, r"output = logits, but \S+ has no classifier: use pooled or pyramid"),
        ({"images": ["bad"]}, r"bad/0\.png cannot be read \(.+\): name images to compare with by --images"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    model = write_weights(tmp_path / "model.safetensors", V2)
    (tmp_path / "taken.onnx").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_text("no image")
    images = [str(tmp_path / name) for name in settings.pop("images", [])]
    dest = tmp_path / settings.pop("dest", "model.onnx")
    with pytest.raises(ValueError, match=sentence):
        ours.export_onnx(ExportConfig(model=model, dest=dest, images=images, **settings))


def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(tmp_path), str(tmp_path / "model.onnx")]) == 2
    assert "ONNX needs onnxscript: pip install 'fcmae[onnx]'" in capsys.readouterr().err
