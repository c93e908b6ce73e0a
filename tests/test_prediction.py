"""Prediction with a tiny classifier: what is printed and written, as it comes, and what is refused."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from runs import forget_accelerator, write_images

from fcmae import cli, prediction
from fcmae.classification import probabilities_of
from fcmae.config.commands import PredictConfig
from fcmae.heads import Classifier
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.prediction import predict
from fcmae.weights.convert import save_classifier
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

SPEC = ConvNeXtSpec(depths=(1, 1), dims=(4, 6))
WIDE = ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 6, 8))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Classifier(Encoder(SPEC), 2)
    randomize(model)
    dest = tmp_path_factory.mktemp("models") / "tuned"
    image = ImageRecord(input_size=(3, 16, 16))
    save_classifier(dest, model, Weights({}, Architecture(SPEC), image, class_names=("cat", "dog")))
    return dest


def words(model: Path, images: Path, *more: str) -> list[str]:
    return ["predict", str(model), str(images), "--num_workers", "0", "--device", "cpu", "--batch_size", "2", *more]


def test_lines_are_written_as_they_come(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, table, calls = write_images(tmp_path / "photos", 5), tmp_path / "new" / "labels.csv", list[int]()

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            assert len(table.read_text().splitlines()) == 1 + 4
            raise OSError("the disk is gone")
        return probabilities_of(*arguments)

    monkeypatch.setattr(prediction, "probabilities_of", failing)
    cfg = PredictConfig(
        model=classifier, images=[str(photos)], csv=table, num_workers=0, device="cpu", batch_size=2
    )  # fmt: skip
    with pytest.raises(OSError, match="the disk is gone"):
        predict(cfg)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["path"] for row in rows] == [str(path) for path in sorted(photos.iterdir())[:4]]
    assert {row["predicted"] for row in rows} <= {"cat", "dog"}


def test_the_environment_does_not_say_in_which_precision(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, tables = write_images(tmp_path / "photos", 3), [tmp_path / "a.csv", tmp_path / "b.csv"]
    for table in tables:
        forget_accelerator()
        assert cli.main(words(classifier, photos, "--csv", str(table))) == 0
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    forget_accelerator()
    assert tables[0].read_text() == tables[1].read_text()


def test_the_table_is_whole_when_nobody_reads_what_is_printed(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, table = write_images(tmp_path / "photos", 5), tmp_path / "labels.csv"

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    arguments = {"num_workers": 0, "device": "cpu", "batch_size": 2}
    predict(PredictConfig(model=classifier, images=[str(photos)], csv=table, **arguments))
    assert len(table.read_text().splitlines()) == 1 + 5
    with pytest.raises(BrokenPipeError):  # without a table, there is nothing left to do
        predict(PredictConfig(model=classifier, images=[str(photos)], **arguments))


def test_nothing_predicted_is_an_error(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(b"no picture")
    assert cli.main(words(classifier, tmp_path / "photos", "--csv", str(tmp_path / "a.csv"))) == 2
    assert not (tmp_path / "a.csv").exists()  # the same command works when the images are there
    err = capsys.readouterr().err
    assert "fcmae: error: none of 2 images could be classified: " in err
    assert err.count("b.png: ") == 1


def test_an_image_whose_probabilities_are_not_finite_is_named(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos", 3)

    def broken(*arguments: Any) -> Any:
        probabilities = probabilities_of(*arguments)
        probabilities[0] = np.nan
        return probabilities

    monkeypatch.setattr(prediction, "probabilities_of", broken)
    assert cli.main(words(classifier, photos, "--csv", str(tmp_path / "a.csv"))) == 1
    out, err = capsys.readouterr()
    assert err.endswith("1 of 3 images were classified; the others are named above, with the reason\n")
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(photos / "01.png")]
    assert [row["path"] for row in csv.DictReader((tmp_path / "a.csv").read_text().splitlines())] == [
        str(photos / "01.png")
    ]
    assert f"{photos / '02.png'}: its probabilities are not finite" in err


def test_images_below_the_total_stride_are_refused_before_anything_is_written(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, table = write_images(tmp_path / "photos", 1), tmp_path / "a.csv"
    wide = tmp_path / "wide"
    save_classifier(wide, Classifier(Encoder(WIDE), 2), Weights({}, Architecture(WIDE), ImageRecord(), ("cat", "dog")))
    assert cli.main(words(wide, photos, "--image_size", "8", "--csv", str(table))) == 2
    assert "image_size: [8, 8] is smaller than the total stride" in capsys.readouterr().err and not table.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Classifier(Encoder(SPEC), 2)
    state = model.state_dict() | {"head.bias": torch.tensor([0.0, torch.inf])}
    torch.save({"model": state}, tmp_path / "a.pth")
    assert cli.main(words(tmp_path / "a.pth", write_images(tmp_path / "photos", 1))) == 2
    assert "the weights are not finite, head.bias among them" in capsys.readouterr().err


def test_images_that_are_not_there_are_told_by_the_name_that_the_command_has(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(classifier, tmp_path / "none")) == 2
    assert capsys.readouterr().err.startswith("fcmae: error: images: ")


def test_maps_of_urls_are_named_without_what_is_asked_of_the_server() -> None:
    names = ["https://there/scenes/a.tif?key=x.y", "https://there/scenes/b.png?size=2", "https://there/c.TIFF"]
    found = prediction.places_of(names, Path("maps"))
    assert [place.relative_to("maps").as_posix() for place in found] == ["scenes/a.tif", "scenes/b.png", "c.tif"]
    names = [f"https://there/get.php?file={name}.tif" for name in "ab"]
    assert [place.name for place in prediction.places_of(names, Path("maps"))] == [
        "get.php?file=a.tif",
        "get.php?file=b.tif",
    ]


def test_a_key_names_the_weights_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_ema": Classifier(Encoder(SPEC), 2).state_dict()}, tmp_path / "a.pth")
    photos = write_images(tmp_path / "photos", 1)
    assert cli.main(words(tmp_path / "a.pth", photos)) == 2
    assert "has weights under 'model_ema': name one with --key" in capsys.readouterr().err
    assert cli.main(words(tmp_path / "a.pth", photos, "--key", "model_ema")) == 0


def test_names_that_are_no_unicode_are_shown_as_escapes_and_keep_their_bytes(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    name = os.fsdecode(b"caf\xe9\x1b[31m.png")
    Image.new("RGB", (20, 20)).save(photos / "a.png")
    (photos / "a.png").rename(photos / name)
    assert cli.main(words(classifier, photos, "--csv", str(tmp_path / "a.csv"))) == 0
    assert "caf\\udce9\\x1b[31m.png\t" in capsys.readouterr().out
    assert b"caf\xe9\x1b[31m.png" in (tmp_path / "a.csv").read_bytes()
