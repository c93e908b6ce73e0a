from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import write_colors
from test_weights_convert import write_checkpoint

import fcmae.evaluation.evaluate as evaluation
import fcmae.evaluation.probes as probes
from fcmae import cli
from fcmae.config.commands import EvaluateConfig
from fcmae.data.find import find_labelled
from fcmae.evaluation.evaluate import _command, check_untaught, find_data, folder_names, save_confusion, score, summary
from fcmae.options import load

ATTO = "random:convnextv2_atto"
COLORS = {"blue": (60, 60, 180), "green": (60, 180, 60), "red": (180, 60, 60)}


@pytest.fixture(autouse=True, scope="module")
def _few_steps() -> Iterator[None]:
    """One thread, and a linear probe that stops early: a few dozen images need no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(probes, "MIN_STEPS", 100)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colors(tmp_path_factory.mktemp("labelled"), COLORS, (12, 10, 8))


def evaluate(*words: object) -> int:
    """`fcmae evaluate` in this process, on images of 32 pixels."""
    return cli.main(["evaluate", *map(str, words), "--image-size", "32", "--device", "cpu"])


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return record


@pytest.fixture(scope="module")
def evaluated(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    probes = ["--probes", "knn", "linear", "few-shot", "--labels", "2", "50%", "--draws", "2"]
    assert evaluate(ATTO, "--data", labelled, *probes, "--stages", "3", "last", "--out", out) == 0
    return out


def test_colours_are_told_apart_by_every_probe(evaluated: Path) -> None:
    record = read(evaluated)
    assert [(result["probe"], result["stage"]) for result in record["results"]] == [
        (probe, stage) for stage in (3, 4) for probe in ("knn", "knn", "linear", "few-shot", "few-shot")
    ]
    assert [result["setting"].get("k") for result in record["results"][:2]] == [10, 20]  # of 24 training images
    assert {result["setting"]["temperature"] for result in record["results"][:2]} == {0.07}
    for result in record["results"]:
        if result["probe"] != "knn" or result["setting"]["k"] == 10:
            assert result["scores"] == {"top1": 1.0, "balanced_accuracy": 1.0, "auroc": 1.0}
    few = record["results"][3]
    assert few["setting"] == {"labels": "2", "num_images": 6, "draws": 2}
    assert few["spread"] == {"top1": [1.0, 1.0], "balanced_accuracy": [1.0, 1.0], "auroc": [1.0, 1.0]}


def test_draws_of_few_labels_differ(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = []
    draw = evaluation.draw

    def spy(*args: Any) -> Any:
        positions.append(tuple(draw(*args)))
        return draw(*args)

    monkeypatch.setattr(evaluation, "draw", spy)
    words = ["--probes", "few-shot", "--labels", "2", "--draws", "3", "--stages", "last", "--out", tmp_path / "out"]
    assert evaluate(ATTO, "--data", labelled, *words) == 0
    assert len(positions) == len(set(positions)) == 3 and {len(one) for one in positions} == {6}


def test_the_file_says_what_was_measured(evaluated: Path, labelled: Path) -> None:
    record = read(evaluated)
    assert record["data"] == {
        "train": f"{labelled} without its test images",
        "test": f"0.2 of {labelled}, drawn with seed 0",
        "num_train": 24,
        "num_test": 6,
        "largest_class": pytest.approx(2 / 6),
        "class_names": ["blue", "green", "red"],
    }
    assert (record["model"], record["architecture"], record["step"]) == (ATTO, "convnextv2_atto", None)
    assert record["image_size"] == [32, 32]
    assert record["confusion"] == {"probe": "linear", "stage": 4, "matrix": [[2, 0, 0], [0, 2, 0], [0, 0, 2]]}
    assert sorted(path.name for path in evaluated.iterdir()) == ["confusion.png", "evaluation.json"]
    with Image.open(evaluated / "confusion.png") as image:
        assert image.format == "PNG"


def test_the_recorded_command_gives_the_same_results(evaluated: Path, tmp_path: Path) -> None:
    words = shlex.split(read(evaluated)["command"])
    assert words[:3] == ["fcmae", "evaluate", ATTO]
    words[-1] = str(tmp_path / "again")
    assert cli.main(words[1:]) == 0
    assert read(tmp_path / "again")["results"] == read(evaluated)["results"]


def test_what_is_printed_and_recorded_of_default_probes_is_taken_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "run", "--data", "labelled", "--print-config"])
    (tmp_path / "e.yaml").write_text(capsys.readouterr().out)
    cfg = load(EvaluateConfig, ["--config", str(tmp_path / "e.yaml")], prog="x")
    words = shlex.split(_command(cfg, ["run"], tmp_path))
    assert "--labels" not in words and load(EvaluateConfig, words[2:], prog="x").data == "labelled"


def test_models_that_could_use_other_images_are_told(evaluated: Path) -> None:
    record = read(evaluated)
    other = record | {"model": "other", "data": record["data"] | {"num_test": 3}}
    assert "other could use" in summary([record, other]) and "could use" not in summary([record, record])


def test_labels_of_test_images_cannot_influence_what_is_predicted(labelled: Path, tmp_path: Path) -> None:
    train, test = find_data(str(labelled), None, 0.2, seed=0)
    names = train.class_names
    assert names is not None and test.labels is not None and train.labels is not None
    matrices, settings = [], []
    for shift in range(2):
        for name, index, moved in (("train", train, 0), ("test", test, shift)):
            with (tmp_path / f"{name}.csv").open("w", newline="") as file:
                rows = [(p, names[(n + moved) % 3]) for p, n in zip(index.names(), index.labels, strict=True)]
                csv.writer(file).writerows([("path", "label"), *rows])
        out = tmp_path / str(shift)
        data = ["--data", tmp_path / "train.csv", "--test", tmp_path / "test.csv"]
        assert evaluate(ATTO, *data, "--probes", "linear", "few-shot", "--labels", "2", "--out", out) == 0
        record = read(out)
        settings.append(record["results"][0]["setting"])
        matrices.append(record["confusion"]["matrix"])
        assert record["results"][0]["scores"]["top1"] == 1 - shift
        assert record["results"][1]["scores"]["top1"] == 1 - shift  # few labels
    assert settings[0] == settings[1]
    # The rows, true classes, have moved; which images are taken for which class has not.
    assert matrices[1] == [matrices[0][(row - 1) % 3] for row in range(3)]


def test_a_models_name_is_not_taken_for_the_run_that_is_worked_in(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, held_out = find_data(str(labelled), None, 0.2, seed=0)
    train.save(tmp_path / "files.json")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "best").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("resnet18", "pixels:32", "random:best"):
        check_untaught(model, train)
    for model in (".", "best", str(tmp_path / "best")):
        check_untaught(model, held_out)
        with pytest.raises(ValueError, match="has learnt from"):
            check_untaught(model, train)


@pytest.mark.parametrize("folder", ["run", "run/best", "run/best/model.safetensors", "run/last"])
@pytest.mark.parametrize("parent", ["runs", "best"])
def test_images_that_chose_the_best_weights_are_warned_of(
    labelled: Path, tmp_path: Path, folder: str, parent: str, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path /= parent
    for name in ("best", "last"):
        (tmp_path / "run" / name).mkdir(parents=True)
        write_checkpoint(tmp_path / "run" / name, stem_stride=1)
        (tmp_path / "run" / name / "model.safetensors").touch()
    train, held_out = find_data(str(labelled), None, 0.2, seed=0)
    train.save(tmp_path / "run" / "files.json")
    held_out.save(tmp_path / "run" / "val_files.json")
    line = json.dumps({"step": 1, "epoch": 1.0, "balanced_accuracy": 0.5})
    (tmp_path / "run" / "metrics.jsonl").write_text(f"{line}\n")
    check_untaught(str(tmp_path / folder), held_out)  # the only evaluation chooses nothing
    assert not caplog.text
    (tmp_path / "run" / "metrics.jsonl").write_text(f"{line}\n{line}\n")
    check_untaught(str(tmp_path / folder), held_out)
    warned = (
        f"6 of the 6 test images chose the weights of {tmp_path / folder}, so that its scores are too" in caplog.text
    )
    assert warned == (folder != "run/last")


def test_a_run_is_not_probed_on_labels_that_it_has_learnt(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "run", stem_stride=1)
    train, _ = find_data(str(labelled), None, 0.2, seed=1)
    train.save(tmp_path / "run" / "files.json")
    (tmp_path / "run" / "config.yaml").write_text("# a run\n")
    given = ["--data", labelled, "--probes", "knn", "--out"]
    assert evaluate(checkpoint, f"random:{checkpoint}", *given, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"{checkpoint} has learnt from" in said and "of the 6 test images with their labels, such as" in said
    assert not (tmp_path / "out").exists()
    assert evaluate(checkpoint, *given, tmp_path / "out", "--seed", "1") == 0  # those that it held out
    replace(train, labels=None, class_names=None).save(tmp_path / "run" / "files.json")
    assert evaluate(checkpoint, *given, tmp_path / "pretrained") == 0  # of pretraining


def test_a_test_image_is_known_by_its_other_name(labelled: Path, tmp_path: Path) -> None:
    for folder in labelled.iterdir():
        (tmp_path / folder.name).mkdir()
        for path in sorted(folder.iterdir())[:2]:
            (tmp_path / folder.name / f"copy-{path.name}").symlink_to(path)
    with pytest.raises(ValueError, match=r"test: 6 of the \d+ images held out, such as .*, are in .* too"):
        find_data(str(labelled), str(tmp_path), 0.2, 0)


def test_models_stand_side_by_side(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "run", stem_stride=1)
    out = tmp_path / "compared"
    models = [checkpoint, f"random:{checkpoint}"]
    assert evaluate(*models, "--data", labelled, "--probes", "knn", "--out", out) == 0
    lines = (out / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert [(row[0], row[2]) for row in cells] == [(f"kNN, k = {k}", str(model)) for k in (10, 20) for model in models]
    assert "24 training and 6 test images of 3 classes" in lines[-1]
    assert capsys.readouterr().out.startswith("\n".join(lines))
    record = read(out / checkpoint.name)
    assert record["step"] == 3
    assert read(out / f"random-{checkpoint.name}")["step"] is None
    assert f"{record['results'][0]['scores']['top1']:.3f}" == cells[0][3]
    assert record["confusion"]["probe"] == "knn"
    assert not list(out.glob(".*"))
    assert evaluate(*models, "--data", labelled, "--probes", "knn", "--out", out) == 2
    command = ["--data", labelled, "--probes", "knn", "--out", out, "--overwrite"]
    assert evaluate(ATTO, "random:resnet18", *command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["random-convnextv2_atto", "random-resnet18", "table.md"]
    assert evaluate(ATTO, *command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "evaluation.json"]


def test_controls_stand_beside_the_networks(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["random:resnet18", "pixels:1", "histogram:4"]
    words = [*models, "--data", labelled, "--stages", "3", "4", "--probes", "linear"]
    assert evaluate(*words, "--out", tmp_path / "out") == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["linear", "3", "random:resnet18"],
        ["linear", "4", "random:resnet18"],
        ["linear", "-", "pixels:1"],
        ["linear", "-", "histogram:4"],
    ]
    for name in ("pixels-1", "histogram-4"):
        record = read(tmp_path / "out" / name)
        assert [result["stage"] for result in record["results"]] == [None]
        assert record["results"][0]["scores"]["top1"] == 1.0  # the classes are colours
        assert record["command"].startswith("fcmae evaluate random:resnet18 pixels:1 histogram:4 --")
        assert (tmp_path / "out" / name / "confusion.png").is_file()


def test_neighbours_of_plain_pixels_are_alike_in_brightness_too(tmp_path: Path) -> None:
    for name, shade in (("dark", 60), ("bright", 120)):  # of one direction from black
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 20), (shade + i, shade // 2 + i // 2, shade // 3)).save(
                tmp_path / "labelled" / name / f"{i}.png"
            )
    words = ["pixels:1", "--data", tmp_path / "labelled", "--probes", "knn", "--device", "cpu", "--num-workers", "0"]
    assert evaluate(*words, "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out")["results"][0]["scores"]["top1"] == 1.0


def test_a_control_that_cannot_be_used_is_a_sentence(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pixels:", "pixels:0", "histogram:x", "pixels:33"):
        assert evaluate(name, "--data", labelled, "--out", tmp_path / "out") == 2
        assert f"model = {name!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_evaluated_into_its_directory_and_nothing_of_the_users_is_overwritten(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, stem_stride=1)
    (tmp_path / "config.yaml").write_text("# fcmae pretrain\n")
    out = tmp_path / "evaluation"
    command = [tmp_path, "--data", labelled, "--probes", "knn"]
    assert evaluate(*command) == 0
    first = read(out)
    assert evaluate(*command) == 2
    assert "holds earlier results: give another --out, or --overwrite" in capsys.readouterr().err
    assert read(out) == first
    (out / ".features-1").mkdir()
    assert evaluate(*command, "--overwrite") == 2
    assert "of a command that is running or was killed" in capsys.readouterr().err
    (out / ".features-1").rmdir()
    assert evaluate(*command, "--stages", "5", "--overwrite") == 2
    assert "stages: 5 is none of the network's 4" in capsys.readouterr().err
    assert read(out) == first
    assert evaluate(*command, "--overwrite") == 0
    assert read(out)["created"] >= first["created"]
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "evaluation.json"]
    (out / "notes.txt").touch()
    assert evaluate(*command, "--overwrite") == 2
    assert "holds 'notes.txt', which is not of this command" in capsys.readouterr().err
    assert (out / "evaluation.json").exists()


def test_images_that_cannot_be_read_are_left_out(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    index = find_labelled(str(labelled))
    assert index.labels is not None
    rows = [(path, label) for path, label in zip(index.names(), index.labels, strict=True)]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows, (tmp_path / "bad.png", 2)])
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows[::4]])
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *(r for i, r in enumerate(rows) if i % 4), ("bad.png", 2)])
    data = ["--data", tmp_path / "train.csv", "--test", tmp_path / "test.csv", "--probes", "linear"]
    assert evaluate(ATTO, *data, "--out", tmp_path / "out") == 0
    assert "1 of the train images cannot be read and are left out" in capsys.readouterr().err
    record = read(tmp_path / "out")
    assert (record["data"]["num_train"], record["data"]["num_test"]) == (22, 8)
    assert record["results"][0]["scores"]["top1"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([ATTO], "out is missing"),
        ([ATTO, ATTO, "--out", "o"], "is given twice"),
        ([ATTO, "--test", "DATA", "--out", "o"], "test: 30 of the 30 images held out, such as"),
        ([ATTO, "--test", "missing", "--out", "o"], "test: 'missing' does not exist"),
        ([ATTO, "--test-share", "0.001", "--out", "o.txt"], "is a file: give a directory"),
        ([ATTO, "--out", "DATA/blue/o"], "lies in data = DATA, where images are searched"),
        ([ATTO, "--probes", "few-shot", "--labels", "0", "--out", "o"], "labels: '0' is neither a share"),
        ([ATTO, "--stages", "first", "--out", "o"], "'first' is neither a number nor last"),
        ([ATTO, "--stages", "5", "--out", "o"], "stages: 5 is none of the network's 4"),
        (["nothing", "--out", "o"], "model = 'nothing' is neither"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o.txt").touch()
    *words, message = (word.replace("DATA", str(labelled)) for word in (*words, message))
    assert evaluate(*words, "--data", labelled) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("fcmae: error:") == 1


def test_a_share_outside_0_and_1_is_a_usage_error(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(ATTO, "--data", labelled, "--test-share", "1", "--out", "o") == 2
    assert "test_share: received 1; allowed: > 0 and < 1" in capsys.readouterr().err


def test_scores_of_a_test_set_without_some_classes() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]], np.float32)
    assert score(np.array([0, 1, 1]), probabilities) == {
        "top1": pytest.approx(2 / 3),
        "balanced_accuracy": 0.75,
        "auroc": 1.0,
    }
    assert "auroc" not in score(np.array([1, 1, 1]), probabilities)


@pytest.mark.parametrize("num_classes", [2, 50, 120])
def test_confusion_matrices_of_any_size_are_drawn(tmp_path: Path, num_classes: int) -> None:
    matrix = np.diag(np.arange(num_classes) * 1000).tolist()  # a class without images among them
    names = [f"${number} a long name of a class \\" for number in range(num_classes)]
    record = {
        "model": "_$m",
        "data": {"class_names": names},
        "confusion": {"probe": "knn", "stage": 4, "matrix": matrix},
    }
    save_confusion(tmp_path / "c.png", record)
    with Image.open(tmp_path / "c.png") as image:
        assert 400 < max(image.size) < 2400


@pytest.mark.parametrize(
    "models",
    [
        ["runs/x", "../runs/x"],
        ["/a/run", "a/run"],
        ["runs/a b", "runs/a-b"],
        [".", "a"],
        ["x", "y/x", "z/x"],
        ["a/x", "a-x", "a-x-2"],
    ],
)
def test_each_model_has_a_folder_of_its_own(models: list[str]) -> None:
    names = folder_names(models)
    assert len(set(names)) == len(models) and all(names)
