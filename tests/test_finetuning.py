"""Fine-tuning from every kind of start, its results on disk, and prediction with them."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import timm
import torch
from PIL import Image
from runs import assert_same, at_step, final_state, flags, kill_self, write_colors, write_images
from safetensors.torch import load_file

import fcmae
from fcmae import cli, finetuning, options
from fcmae.config import FinetuneConfig
from fcmae.data.augment import FinetuneAugment
from fcmae.data.find import find_images, find_labelled
from fcmae.data.index import Images
from fcmae.evaluation.evaluate import find_data
from fcmae.evaluation.models import load_backbone
from fcmae.finetuning import classification_loss
from fcmae.heads import Classifier
from fcmae.networks.convnext import Encoder
from fcmae.networks.encoder import num_layers
from fcmae.networks.layers import DropPath
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.starting import build_optimizer, class_weights_of
from fcmae.training import checkpoint
from fcmae.training.records import last_state
from fcmae.training.steps import schedule_of
from fcmae.weights.convert import convert, save_classifier
from fcmae.weights.files import read_weights, save_weights
from fcmae.weights.formats import Architecture, to_state
from fcmae.weights.record import ImageRecord, Weights

COLORS = {"blue": (40, 40, 200), "green": (40, 200, 40)}


pytestmark = pytest.mark.usefixtures("one_thread", "forgotten", "undrawn")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colors(tmp_path_factory.mktemp("labelled"), COLORS, (10, 10))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of pretraining of atto."""
    root = tmp_path_factory.mktemp("pretrained")
    model = {"model__variant": "convnextv2_atto", "model__stem_stride": 4, "model__mask_patch": 32}
    options = {"data__image_size": 64, "epochs": 1, "optim__warmup_epochs": 0, "optim__base_lr": 0.1}
    assert cli.main(["pretrain", *flags(write_images(root / "images", 9), root / "run", **model, **options)]) == 0
    runs.forget_accelerator()
    return root / "run"


def finetune(labelled: Path, out: Path, **settings: Any) -> int:
    """`fcmae finetune` in this process, the smallest run; keys write `__` for the dot. Returns its exit status."""
    values = {
        "data__path": labelled,
        "out": out,
        "device": "cpu",
        "data__image_size": 32,
        "data__num_workers": 0,
        "data__auto_augment": "none",
        "batch_size": 4,
        "epochs": 2,
        "optim__base_lr": 0.03,
        "log__every_steps": 1,
        "log__trackers": "none",
    } | settings
    words = [word for key, value in values.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    return cli.main(["finetune", "--config", str(runs.DEFAULTS), *words])


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run from scratch, of 16 training and 4 held-out images."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    assert finetune(labelled, out, model__variant="convnextv2_atto", epochs=4, data__auto_augment="rand-m9-inc1") == 0
    runs.forget_accelerator()
    return out


def test_it_learns_and_reports_what_it_learned(tuned: Path) -> None:
    last = metrics(tuned)[-1]
    assert last["step"] == 16
    assert last["top1"] == last["balanced_accuracy"] == last["auroc"] == 1.0
    assert "top5" not in last
    log = (tuned / "train.log").read_text()
    assert "best and last model" in log and last_state(tuned) == "finished"
    assert "far from the mean" not in log


def test_timm_loads_the_exports_with_their_class_names(tuned: Path) -> None:
    for name in ("best", "last"):
        model = timm.create_model(f"local-dir:{tuned / name}", pretrained=True)
        assert model.num_classes == 2
        assert list(model.pretrained_cfg["label_names"]) == ["blue", "green"]
    trained = {k.removeprefix("model:"): v for k, v in final_state(tuned).items() if k.startswith("model:")}
    exported = timm.create_model(f"local-dir:{tuned / 'last'}", pretrained=True).state_dict()
    assert_same(exported, to_state(trained, VARIANTS["convnextv2_atto"], "timm"))


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 0)],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_ends_an_evaluation_at_once(
    number: signal.Signals, status: int, tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    given = {"eval_only": True, "model__init": tuned / "last"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "scores", lambda *_: kill_self(number)())
        if number == signal.SIGINT:
            assert finetune(labelled, tmp_path / "out", **given) == status
        else:
            with pytest.raises(SystemExit) as end:
                finetune(labelled, tmp_path / "out", **given)
            assert end.value.code == status
    assert last_state(tmp_path / "out") == "failed" and signal.getsignal(number) == before


def test_a_file_that_has_two_names_is_not_scored_where_it_is_learnt_from(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = tmp_path / "twice"
    for file in labelled.glob("*/*"):
        (twice / file.parent.name).mkdir(parents=True, exist_ok=True)
        for name in (file.name, f"again-{file.name}"):
            (twice / file.parent.name / name).hardlink_to(file)
    assert finetune(twice, tmp_path / "run", model__variant="convnextv2_atto") == 2
    assert "images held out, such as " in (said := capsys.readouterr().err)
    assert "are training images too, under another name: take such links out" in said
    with pytest.raises(ValueError, match=r"images held out, such as .* are training images too, under another name"):
        find_data(str(twice), None, 0.2, 0)
    assert not (tmp_path / "run").exists()


def test_evaluating_only_and_predicting_repeat_the_last_evaluation(
    tuned: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tuned / "last" / "predictions.csv").open() as file:
        expected = {row["path"]: row for row in csv.DictReader(file)}
    assert len(expected) == 4
    for place in ("best", "last"):
        with (tuned / place / "predictions.csv").open() as file, (tuned / place / "confusion.csv").open() as table:
            pairs = Counter((row["label"], row["predicted"]) for row in csv.DictReader(file))
            for row in csv.DictReader(table):
                assert {name: int(row[name]) for name in ("blue", "green")} == {
                    name: pairs[row["true"], name] for name in ("blue", "green")
                }
    with (tmp_path / "held_out.csv").open("w") as file:
        file.writelines(["path,label\n", *(f"{row['path']},{row['label']}\n" for row in expected.values())])
    out = tmp_path / "evaluated"
    evaluating = [
        *("finetune", "--eval_only", "--model.init", str(tuned / "last"), "--out", str(out)),
        *("--data.val_path", str(tmp_path / "held_out.csv"), "--device", "cpu", "--log.trackers", "none"),
        *("--batch_size", "3", "--data.num_workers", "0"),  # the size is the model's own
    ]
    assert cli.main(evaluating) == 0
    assert metrics(out)[-1]["val_loss"] == pytest.approx(metrics(tuned)[-1]["val_loss"], rel=1e-5)
    assert (out / "predictions.csv").read_text().splitlines()[0] == "path,label,predicted,probability,p(blue),p(green)"
    assert not (out / "best").exists()

    # Given again with other labels, it scores them where it may.
    swapped = {"blue": "green", "green": "blue"}
    with (tmp_path / "held_out.csv").open("w") as file:
        file.writelines(["path,label\n", *(f"{path},{swapped[row['label']]}\n" for path, row in expected.items())])
    runs.forget_accelerator()
    scores = (out / "metrics.jsonl").read_bytes()
    assert cli.main(evaluating) == 2
    assert "has the scores of other images: give another --out" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == scores
    runs.forget_accelerator()
    assert cli.main([*evaluating, "--overwrite"]) == 0
    (line,) = metrics(out)
    assert line["top1"] == pytest.approx(1 - metrics(tuned)[-1]["top1"])
    assert "are too high" not in (out / "train.log").read_text()

    # What it has learnt from may be scored, with a warning.
    learnt = json.loads((tuned / "files.json").read_text())["paths"]
    with (tmp_path / "held_out.csv").open("a") as file:
        file.write(f"{learnt[0]},green\n")
    runs.forget_accelerator()
    assert cli.main([*evaluating, "--overwrite"]) == 0
    said = "learnt labels of 1 of the 5 images held out"
    assert said in capsys.readouterr().err

    # Drawn by another seed they would be among those that it learnt from.
    runs.forget_accelerator()
    capsys.readouterr()
    drawing = [*evaluating[:5], f"{out}-drawn", "--data.path", str(labelled), *evaluating[8:], "--seed"]
    assert cli.main([*drawing, "1"]) == 2
    assert "images that model.init =" in (said := capsys.readouterr().err) and "give the seed and" in said
    runs.forget_accelerator()
    assert cli.main([*drawing, "0"]) == 0
    # They chose the best one.
    runs.forget_accelerator()
    capsys.readouterr()
    best = [str(tuned / "best") if word == str(tuned / "last") else word for word in drawing]
    assert cli.main([*best, "0", "--overwrite"]) == 0
    assert "4 of the 4 images held out chose the weights of model.init" in capsys.readouterr().err
    # A file that was made of its weights says so.
    for name, source, suffix in (("last", tuned / "last", "safetensors"), ("best", tuned, "pth")):
        fcmae.export(source, tmp_path / f"{name}.{suffix}", to="fcmae")
        made = [str(tmp_path / f"{name}.{suffix}") if word == str(tuned / "last") else word for word in drawing]
        runs.forget_accelerator()
        assert cli.main([*made, "1", "--overwrite"]) == 2
        assert "learnt from, such as" in capsys.readouterr().err
        runs.forget_accelerator()
        assert cli.main([*made, "0", "--overwrite"]) == 0
        steps = [read_weights(tuned / each).origin["step"] for each in (name, "best")]
        assert ("4 of the 4 images held out chose the weights of model.init" in capsys.readouterr().err) == (
            steps[0] == steps[1]
        )
    # Training from it, too, they choose the best model.
    given = {"model__init": tuned / "last", "epochs": 1, "optim__warmup_epochs": 0}
    for seed in (0, 1):
        runs.forget_accelerator()
        assert finetune(labelled, tmp_path / f"again-{seed}", **given, seed=seed) == 0
        said = (tmp_path / f"again-{seed}" / "train.log").read_text()
        assert ("images held out, such as" in said and "scores on them are too high" in said) == bool(seed)
    runs.forget_accelerator()

    capsys.readouterr()
    (tmp_path / "broken.png").write_bytes(b"no image")
    words = ["predict", str(tuned / "last"), *expected, str(tmp_path / "broken.png"), "--csv", str(tmp_path / "p.csv")]
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert str(tmp_path / "broken.png") in captured.err
    assert sorted(line.split("\t")[:2] for line in captured.out.splitlines()) == sorted(
        [path, row["predicted"]] for path, row in expected.items()
    )
    with (tmp_path / "p.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["p(blue)"] == expected[row["path"]]["p(blue)"]
    assert cli.main(words) == 2
    assert "exists" in capsys.readouterr().err
    # At another size the network sees other pixels.
    assert cli.main([*words[:-2], "--image_size", "64,32", "--num_workers", "0", "--device", "cpu"]) == 1
    other = capsys.readouterr().out.splitlines()
    assert len(other) == len(expected) and other != captured.out.splitlines()


def test_it_starts_from_a_run_a_conversion_and_a_fair_file_alike(
    pretrained: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(pretrained, tmp_path / "timm", "timm")
    convert(pretrained, tmp_path / "fair.safetensors", "fair")
    trained = {k.removeprefix("model:"): v for k, v in final_state(pretrained).items()}
    encoder = {name: value for name, value in trained.items() if name.startswith("encoder.")}
    torch.save({"model": {k.removeprefix("encoder."): v for k, v in encoder.items()}}, tmp_path / "fair.pth")
    starts: list[dict[str, torch.Tensor]] = []

    def instead_of_train(session: object, net: torch.nn.Module, *rest: object) -> bool:
        starts.append(net.state_dict())
        return True

    monkeypatch.setattr(finetuning, "train", instead_of_train)
    (place,) = checkpoint.steps(pretrained).values()
    for init in (pretrained, place, tmp_path / "timm", tmp_path / "fair.safetensors"):
        assert finetune(labelled, tmp_path / f"out{len(starts)}", model__init=init) == 0
    named = {"model__init": tmp_path / "fair.pth", "model__variant": "convnextv2_atto"}
    assert finetune(labelled, tmp_path / "named", **named) == 0
    assert len(starts) == 5
    for state in starts[1:]:
        assert_same(state, starts[0])  # the new head too: it is drawn from the run's seed
    assert len(encoder) > 100
    for name, value in encoder.items():
        assert torch.equal(starts[0][name], value), name
    assert starts[0]["head.weight"].abs().max() < 0.001


def test_what_stands_for_missing_values_goes_with_the_weights(
    pretrained: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through pretraining, fine-tuning and exports, as mean and std do, which were measured without it."""
    images = write_images(tmp_path / "images", 9)
    model = {"model__variant": runs.TINY, "model__stem_stride": 1, "model__mask_patch": 8, "data__nodata": 7}
    assert cli.main(["pretrain", *flags(images, tmp_path / "run", **model, epochs=1, optim__warmup_epochs=0)]) == 0
    runs.forget_accelerator()
    assert read_weights(tmp_path / "run").reading("x").nodata == 7
    with caplog.at_level("INFO", "fcmae"):
        assert finetune(labelled, tmp_path / "tuned", model__init=tmp_path / "run", epochs=1) == 0
    assert "data.nodata = 7, as the weights were trained" in caplog.text
    cfg, weights = options.read(FinetuneConfig, tmp_path / "tuned/config.yaml"), read_weights(tmp_path / "tuned")
    assert cfg.data.nodata is None and weights.reading("x").nodata == 7
    train_set = finetuning.build_train_set(cfg, find_images([str(images)]), finetuning.build_reading(cfg, weights))
    assert isinstance(train_set._view, FinetuneAugment) and train_set._view.crop.reading.nodata == 7
    for to, dest in (("timm", "timm"), ("fcmae", "one.safetensors"), ("fair", "one.pth")):
        convert(tmp_path / "tuned", tmp_path / dest, to)
        assert load_backbone(str(tmp_path / dest)).reading.nodata == 7
    assert load_backbone(str(tmp_path / "timm"), nodata=8).reading.nodata == 8
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).num_classes == 2


def test_a_resumed_run_equals_an_uninterrupted_one(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "model__variant": runs.TINY,
        "model__stem_stride": 1,
        "model__drop_path_rate": 0.2,
        "regularization__mixup": 0.8,
        "regularization__cutmix": 1.0,
        "regularization__ema_decay": 0.9,
        "optim__layer_decay": 0.8,
        "data__auto_augment": "rand-m9-mstd0.5-inc1",
    }
    assert finetune(labelled, tmp_path / "whole", **settings) == 0
    runs.forget_accelerator()

    with monkeypatch.context() as patch:
        at_step(patch, 3, kill_self(signal.SIGTERM))  # within the first of two epochs of 4 steps
        assert finetune(labelled, tmp_path / "cut", **settings) == 143
    assert list(checkpoint.steps(tmp_path / "cut")) == [3]
    assert not (tmp_path / "cut" / "last").exists()
    runs.forget_accelerator()
    assert finetune(labelled, tmp_path / "cut", **settings, data__num_workers=1) == 0

    assert_same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
    for name in ("best", "last"):
        cut, whole = (tmp_path / run / name / "predictions.csv" for run in ("cut", "whole"))
        assert cut.read_text() == whole.read_text()
    assert any(name.startswith("ema:") for name in final_state(tmp_path / "cut"))
    assert "ema_auroc" in metrics(tmp_path / "cut")[-1]


@pytest.mark.parametrize("step", [4, 8])  # the end of an epoch, and of the run
def test_a_run_that_is_told_to_stop_saves_without_an_evaluation_and_begins_with_it(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = {"model__variant": runs.TINY, "model__stem_stride": 1, "regularization__ema_decay": 0.5}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert finetune(labelled, whole, **settings) == 0
    runs.forget_accelerator()
    with monkeypatch.context() as patch:
        at_step(patch, step, kill_self(signal.SIGTERM))
        assert finetune(labelled, out, **settings) == 143
    assert max(checkpoint.steps(out)) == step and not (out / "last").exists()
    runs.forget_accelerator()
    assert finetune(labelled, out, **settings) == 0
    expected, found = ([line for line in metrics(path) if "top1" in line] for path in (whole, out))
    assert found == expected
    for name in ("best", "last"):
        assert (out / name / "predictions.csv").read_text() == (whole / name / "predictions.csv").read_text()
        assert read_weights(out / name).origin["step"] == read_weights(whole / name).origin["step"]


def test_a_classifier_gives_features_and_the_classes_that_predict_writes(tuned: Path, labelled: Path) -> None:
    model = fcmae.load(tuned)
    assert isinstance(model, fcmae.api.Classified) and model.class_names == ("blue", "green")
    with (tuned / "best" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Square images, as large as the network's.
    pixels = np.stack([np.asarray(Image.open(row["path"]).convert("RGB").resize((32, 32))) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model.logits(images).softmax(1)
    assert [model.class_names[i] for i in found.argmax(1)] == [row["predicted"] for row in rows]
    assert model(images).shape == (len(rows), 1, 1, 320)
    encoder = fcmae.load(tuned / "best")
    assert_same(encoder.state_dict(), model.state_dict())


def test_classes_that_nothing_is_learnt_of_or_scored_are_told(caplog: pytest.LogCaptureFixture) -> None:
    names = tuple("abcdefgh")
    train, val = Images.of_files(["1", "2"], [0, 1], names), Images.of_files(["3", "4"], list(range(8))[:2], names)
    finetuning.tell_missing(train, val)
    assert [record.message for record in caplog.records] == [
        "6 of 8 classes have no image to learn from: c, d, e, f, g and 1 more",
        "6 of 8 classes have no image held out, and count in no score: c, d, e, f, g and 1 more",
    ]
    caplog.clear()
    finetuning.tell_missing(Images.of_files([], [], names), Images.of_files(list(names), range(8), names))
    assert not caplog.records


def test_evaluations_change_nothing_in_training(labelled: Path, tmp_path: Path) -> None:
    settings = {"model__variant": runs.TINY, "model__stem_stride": 1, "model__drop_path_rate": 0.5, "epochs": 3}
    states = []
    for every in (1, 99):
        assert finetune(labelled, tmp_path / str(every), **settings, log__eval_epochs=every) == 0
        runs.forget_accelerator()
        states.append({k: v for k, v in final_state(tmp_path / str(every)).items() if k.startswith("model:")})
    assert_same(*states)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_the_loss_has_the_weights_of_the_classes_and_smooths_labels_once(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixup: float
) -> None:
    found, loss = [], finetuning.classification_loss

    def spy(logits: torch.Tensor, target: torch.Tensor, balance: Any, smoothing: float) -> torch.Tensor:
        found.append((balance.tolist(), smoothing, target.ndim))
        return loss(logits, target, balance, smoothing)

    monkeypatch.setattr(finetuning, "classification_loss", spy)
    given = {"class_weights": "1,3", "label_smoothing": 0.2, "mixup": mixup}
    settings = {"model__variant": runs.TINY, "model__stem_stride": 1, "epochs": 1, "optim__warmup_epochs": 0}
    settings |= {f"regularization__{key}": value for key, value in given.items()}
    assert finetune(labelled, tmp_path / "run", **settings) == 0
    assert set(map(str, found)) == {str(([1.0, 3.0], 0.0, 2) if mixup else ([1.0, 3.0], 0.2, 1))}


def test_with_a_moving_average_it_is_what_is_chosen_and_kept(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights themselves score best after the first epoch, their average after the second."""
    scored, given = finetuning.scores, iter((0.9, 0.5, 0.1, 0.8))
    monkeypatch.setattr(finetuning, "scores", lambda *args: scored(*args) | {"balanced_accuracy": next(given)})
    settings = {"model__variant": runs.TINY, "model__stem_stride": 1, "regularization__ema_decay": 0.9}
    assert finetune(labelled, tmp_path / "run", **settings, log__eval_epochs=1) == 0
    assert [key for key in metrics(tmp_path / "run")[-1] if "balanced" in key] == [
        "balanced_accuracy",
        "ema_balanced_accuracy",
    ]
    best, last = (read_weights(tmp_path / "run" / name) for name in ("best", "last"))
    assert (best.origin["step"], best.origin["balanced_accuracy"]) == (8, 0.8)
    latest = checkpoint.latest(tmp_path / "run")
    assert latest is not None
    assert_same(dict(last.state), load_file(latest / "ema.safetensors"))


def test_only_evaluating_crops_as_the_weights_learnt_unless_told_otherwise() -> None:
    weights = Weights({}, Architecture(VARIANTS["convnextv2_atto"], 3), ImageRecord(crop_pct=1.0))
    given: dict[str, Any] = {"out": "o", "model": {"init": "x"}, "data": {"path": "x", "val_path": "y"}}
    found = []
    for more in ({"eval_only": True}, {}, {"eval_only": True, "data": given["data"] | {"crop_pct": 0.5}}):
        found.append(finetuning.build_reading(FinetuneConfig.model_validate(given | more), weights).crop_pct)
    assert found == [1.0, 0.875, 0.5]


def test_the_best_model_stays_where_later_ones_are_worse(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after each step and resumed: the best is that of the second epoch, however far it is undone."""
    given, scored = {4: 0.5, 8: 0.9, 12: 0.6, 16: 0.7}, finetuning.Evaluation.evaluate

    def evaluate(self: finetuning.Evaluation, step: int) -> None:
        with monkeypatch.context() as patch:
            found = finetuning.scores
            patch.setattr(finetuning, "scores", lambda *args: found(*args) | {"balanced_accuracy": given[step]})
            scored(self, step)

    monkeypatch.setattr(finetuning.Evaluation, "evaluate", evaluate)
    settings = {"model__variant": runs.TINY, "model__stem_stride": 1, "epochs": 4, "log__eval_epochs": 1}

    def best(out: Path) -> tuple[Any, ...]:
        origin = read_weights(out / "best").origin
        return origin["step"], origin["balanced_accuracy"]

    for cut in (7, 11, 15):
        out = tmp_path / str(cut)
        with monkeypatch.context() as patch:
            at_step(patch, cut, kill_self(signal.SIGTERM))
            assert finetune(labelled, out, **settings) == 143
        assert best(out) == ((4, 0.5) if cut == 7 else (8, 0.9))
        runs.forget_accelerator()
        assert finetune(labelled, out, **settings) == 0
        runs.forget_accelerator()
        assert best(out) == (8, 0.9) and read_weights(out / "last").origin["step"] == 16


def test_a_best_model_of_a_step_that_was_undone_is_not_held_for_the_one_before(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model__variant": runs.TINY, "model__stem_stride": 1, "epochs": 3, "checkpoint__every_epochs": 0.5}
    given = {4: 0.5, 8: 0.9, 12: 0.7}
    scored = finetuning.scores
    step = list[int]()
    monkeypatch.setattr(finetuning, "scores", lambda *args: scored(*args) | {"balanced_accuracy": given[step[-1]]})
    evaluate = finetuning.Evaluation.evaluate
    monkeypatch.setattr(
        finetuning.Evaluation,
        "evaluate",
        lambda self, number: (step.append(number), evaluate(self, number))[1],
    )
    assert finetune(labelled, tmp_path / "run", **settings, checkpoint__keep=99) == 0
    runs.forget_accelerator()
    for number, place in checkpoint.steps(tmp_path / "run").items():  # as if it had been killed after step 8
        if number > 6:
            shutil.rmtree(place)
    given |= {8: 0.6}  # as another GPU may round
    assert finetune(labelled, tmp_path / "run", **settings, checkpoint__keep=99) == 0
    origin = read_weights(tmp_path / "run" / "best").origin
    assert (origin["step"], origin["balanced_accuracy"]) == (12, 0.7)
    runs.forget_accelerator()

    for number, place in checkpoint.steps(tmp_path / "run").items():  # again, after step 12
        if number > 6:
            shutil.rmtree(place)
    given |= {8: 0.48, 12: 0.4}
    with monkeypatch.context() as patch:
        at_step(patch, 10, kill_self(signal.SIGTERM))
        assert finetune(labelled, tmp_path / "run", **settings, checkpoint__keep=99) == 143
    runs.forget_accelerator()
    assert finetune(labelled, tmp_path / "run", **settings, checkpoint__keep=99) == 0
    # That of step 4 had more, and was written over by one that was undone.
    assert read_weights(tmp_path / "run" / "best").origin["step"] == 8


def test_an_evaluation_that_was_cut_off_is_done_anew(
    tuned: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"eval_only": True, "model__init": tuned / "last"}
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "write_confusion", _break)
        with pytest.raises(MemoryError):
            finetune(labelled, tmp_path / "out", **given)
    assert (tmp_path / "out" / "predictions.csv").exists() and not metrics(tmp_path / "out")
    runs.forget_accelerator()
    assert finetune(labelled, tmp_path / "out", **given) == 0
    assert "top1" in metrics(tmp_path / "out")[-1]


def _break(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(("is_there", "has_lists"), [(False, True), (True, True), (False, False)])
def test_a_run_goes_on_as_it_began_whatever_its_first_weights_are_by_now(
    pretrained: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool, has_lists: bool
) -> None:
    first, init = read_weights(pretrained), tmp_path / "first.safetensors"
    means = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    images = [first.image.model_copy(update={"mean": mean}) for mean in means]
    save_weights(init, replace(first, image=images[0]), "fcmae")
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill_self(signal.SIGTERM))
        assert finetune(labelled, tmp_path / "run", model__init=init) == 143
    init.unlink()
    if is_there:
        save_weights(init, replace(first, image=images[1]), "fcmae")
    if not has_lists:  # as a start leaves them that ended before it wrote those of images that had moved
        for name in ("files.json", "val_files.json"):
            (tmp_path / "run" / name).unlink()
    runs.forget_accelerator()
    assert finetune(labelled, tmp_path / "run", model__init=init) == 0
    found = read_weights(tmp_path / "run" / "last")
    assert found.image.mean == means[0] and found.class_names == ("blue", "green")


def test_the_moving_average_of_a_short_run_has_left_its_first_weights(labelled: Path, tmp_path: Path) -> None:
    """After n steps of a decay of (n - 1) / (n + 8) at the most, whatever was asked for."""
    settings: dict[str, Any] = {"model__variant": runs.TINY, "model__stem_stride": 1, "log__every_steps": 1}
    assert finetune(labelled, tmp_path / "run", **settings, regularization__ema_decay=0.9999, checkpoint__keep=99,
                    checkpoint__every_epochs=0.25, epochs=1) == 0  # fmt: skip
    places = list(checkpoint.steps(tmp_path / "run").values())
    each = [load_file(place / "model.safetensors")["head.weight"] for place in places]
    assert len(each) == 4
    average = each[0]
    for num, weights in enumerate(each[1:], 1):
        average = torch.lerp(average, weights, 9 / (num + 9))
    found = load_file(places[-1] / "ema.safetensors")["head.weight"]
    torch.testing.assert_close(found, average)
    assert not torch.allclose(found, each[0])


@pytest.mark.parametrize("after_backward", [False, True])
def test_a_step_without_memory_is_taken_again_in_smaller_parts_that_mixup_can_pair(
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after_backward: bool,
) -> None:
    """To the bit as if the run had been stopped before that step and gone on in such parts."""
    settings: dict[str, Any] = {
        "model__variant": runs.TINY,
        "model__stem_stride": 1,
        "model__drop_path_rate": 0.2,
        "regularization__mixup": 0.8,
        "regularization__ema_decay": 0.9,
    }
    with monkeypatch.context() as patch:
        runs.run_out_of_memory(patch, [4], after_backward)
        assert finetune(labelled, tmp_path / "failed", **settings) == 0
    runs.forget_accelerator()
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill_self(signal.SIGTERM))
        assert finetune(labelled, tmp_path / "cut", **settings) == 143
    runs.forget_accelerator()
    assert finetune(labelled, tmp_path / "cut", **settings, grad_accum=2) == 0
    assert_same(final_state(tmp_path / "failed"), final_state(tmp_path / "cut"))
    runs.forget_accelerator()
    runs.run_out_of_memory(monkeypatch, [1, 2], after_backward)
    assert finetune(labelled, tmp_path / "none", **settings) == 2
    assert "does not suffice for 2 images at once, and the run cannot be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__variant": "convnextv2_femto"}, "model.variant = convnextv2_femto, but model.init"),
        ({"model__variant": "convnextv2_femto"}, "has convnextv2_atto: set it to convnextv2_atto"),
        ({"data__in_chans": 1, "eval_only": True}, "data.in_chans = 1, but model.init"),
        ({"model__stem_stride": 2}, "model.stem_stride = 2, but model.init"),
        ({"model__init": "nowhere"}, "model.init = nowhere does not exist"),
        ({"regularization__class_weights": "1,2,3"}, "class_weights has 3 values for 2 classes"),
        ({"data__auto_augment": "nonsense"}, "data.auto_augment: 'nonsense' is no policy"),
        ({"batch_size": 64}, "batch_size: 64 is more than the 16 training images"),
    ],
)
def test_what_does_not_fit_is_named(
    pretrained: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    message: str,
) -> None:
    assert finetune(labelled, tmp_path / "out", **({"model__init": pretrained} | settings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nor is a run deleted that --overwrite names


def test_a_pretraining_run_is_no_fine_tuning_run(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    for name in ("metrics.jsonl", "environment.json"):
        (tmp_path / "run" / name).touch()
    assert finetune(labelled, tmp_path / "run", model__variant="convnextv2_atto") == 2
    assert "holds another kind of run" in capsys.readouterr().err


def test_a_kept_head_goes_on_from_the_classifier_it_was_given(
    tuned: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still: dict[str, Any] = {"init": tuned, "optim__base_lr": 1e-12, "epochs": 1}
    given = load_file(tuned / "best" / "model.safetensors")["head.fc.weight"]
    for keep in (True, False):
        assert finetune(labelled, tmp_path / str(keep), model__keep_head=keep, **still) == 0
        runs.forget_accelerator()
        found = load_file(tmp_path / str(keep) / "last" / "model.safetensors")["head.fc.weight"]
        assert torch.allclose(found, given, atol=1e-5) == keep
    shutil.copytree(labelled / "blue", tmp_path / "others" / "red")
    shutil.copytree(labelled / "blue", tmp_path / "others" / "blue")
    assert finetune(tmp_path / "others", tmp_path / "out", model__keep_head=True, **still) == 2
    assert "data.path: label 'red' of" in capsys.readouterr().err


def test_a_head_that_is_not_there_is_not_kept(
    pretrained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(labelled, tmp_path / "out", init=pretrained, model__keep_head=True) == 2
    assert "has no classifier: give a fine-tuned model" in capsys.readouterr().err
    assert finetune(labelled, tmp_path / "out", model__variant="convnextv2_atto", model__keep_head=True) == 2
    assert "it takes the classifier that init has: give --init" in capsys.readouterr().err


def test_an_encoder_alone_cannot_predict(
    pretrained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(pretrained, tmp_path / "encoder", "timm")
    assert cli.main(["predict", str(tmp_path / "encoder"), str(labelled)]) == 2
    assert "has no classifier" in capsys.readouterr().err


def test_a_split_that_holds_out_nothing_is_refused_at_once(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = tmp_path / "single.csv"
    single.write_text("path,label\n" + "".join(f"{labelled / name / '0.png'},{name}\n" for name in COLORS))
    assert finetune(single, tmp_path / "out", model__variant="convnextv2_atto", batch_size=2) == 2
    assert "holds out none of 2 images" in capsys.readouterr().err


def test_labels_that_were_corrected_are_not_gone_on_without(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "labels.csv"
    rows = [f"{path},{path.parent.name}\n" for path in sorted(labelled.glob("*/*"))]
    table.write_text("".join(["path,label\n", *rows]))
    tiny = {"model__variant": runs.TINY, "model__stem_stride": 1}
    with monkeypatch.context() as patch:
        at_step(patch, 2, kill_self(signal.SIGTERM))
        assert finetune(table, tmp_path / "run", **tiny) == 143
    runs.forget_accelerator()
    table.write_text("".join(["path,label\n", *rows[:-1], rows[-1].replace(",green", ",blue")]))
    assert finetune(table, tmp_path / "run", **tiny) == 2
    assert "no longer gives the images" in capsys.readouterr().err


def test_other_held_out_images_are_refused_on_resume(
    labelled: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tuned, copy)
    settings: dict[str, Any] = {"model__variant": "convnextv2_atto", "epochs": 4, "data__auto_augment": "rand-m9-inc1"}
    assert finetune(labelled, copy, **settings) == 0  # it is finished, and says so
    runs.forget_accelerator()
    capsys.readouterr()
    shutil.copytree(labelled, tmp_path / "others")
    assert finetune(labelled, copy, **settings, data__val_path=tmp_path / "others") == 2
    assert "no longer gives the images" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_makes_no_best_model(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetuning, "scores", lambda *_: {"val_loss": float("nan"), "balanced_accuracy": 1.0})
    assert finetune(labelled, tmp_path / "out", model__variant="convnextv2_atto") == 2
    assert "step 4: the validation loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "best").exists()


def test_two_processes_train_and_score_like_one(labelled: Path, tmp_path: Path) -> None:
    flags = {
        "data.path": labelled,
        "device": "cpu",
        "data.image_size": 16,
        "data.num_workers": 0,
        "data.auto_augment": "none",
        "model.variant": runs.TINY,
        "model.stem_stride": 1,
        "batch_size": 4,
        "epochs": 1,
        "optim.base_lr": 0.03,
        "regularization.class_weights": "balanced",
        "regularization.ema_decay": 0.5,
        "log.every_steps": 1,
        "log.trackers": "none",
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    words += ["--config", str(runs.DEFAULTS)]
    assert cli.main(["finetune", *words, "--out", str(tmp_path / "one")]) == 0
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    started = runs.start_pair(["finetune", *words, "--out", str(tmp_path / "two")], logs)
    assert runs.ended(started) == [0, 0], logs[0].read_text()
    assert "2 x cpu" in logs[0].read_text()
    runs.assert_same_metrics(tmp_path / "two", tmp_path / "one", rel=1e-3, abs=1e-5)
    for place in ("best", "last"):
        rows = [(tmp_path / run / place / "predictions.csv").read_text().count("\n") for run in ("one", "two")]
        assert rows == [5, 5]


def test_settings_reach_what_they_are_for(labelled: Path, tmp_path: Path) -> None:
    """Those that no other test has at another value than the default."""
    given = {
        "out": tmp_path / "out",
        "data": {"path": str(labelled), "crop_scale": [1, 1], "hflip": 0.0, "vflip": 1.0, "auto_augment": None}
        | {"image_size": 16, "random_erasing": 0.0},
        "model": {"variant": {"depths": [3, 3], "dims": [4, 6]}, "stem_stride": 4}
        | {"drop_path_rate": 0.25, "grad_checkpointing": True},
        "optim": {"betas": [0.8, 0.7], "min_lr": 0.125, "layer_decay": 0.5, "layer_decay_mode": "group"}
        | {"weight_decay": 0.375},
        "regularization": {"mixup": 0.3, "cutmix": 0.6, "label_smoothing": 0.2},
    }
    cfg = FinetuneConfig.model_validate(given)
    images = find_labelled(str(labelled), key="data.path")
    weights = Weights({}, Architecture(cfg.model.spec, 3))
    reading = finetuning.build_reading(cfg, weights)
    plain = FinetuneConfig.model_validate(given | {"data": given["data"] | {"vflip": 0.0}})
    flipped, kept = (finetuning.build_train_set(each, images, reading)[(0, 0)].image for each in (cfg, plain))
    np.testing.assert_array_equal(flipped, kept[:, ::-1])
    view = finetuning.build_train_set(cfg, images, reading)._view  # type: ignore[attr-defined]
    crop = view.crop
    assert (crop.crop_scale, crop.hflip, crop.vflip) == ((1, 1), 0.0, 1.0)
    schedule = schedule_of(cfg, 1, 0)
    assert schedule.min_lr == schedule.learning_rate(schedule.total) == 0.125
    other = FinetuneConfig.model_validate(given | {"seed": 1, "data": given["data"] | {"crop_scale": [0.1, 1]}})
    drawn = [
        finetuning.build_train_set(each, images, reading)[(0, 0)].image
        for each in (other, other.model_copy(update={"seed": 0}))
    ]
    assert not np.array_equal(*drawn)
    heads = [
        finetuning.build_model(cfg.model_copy(update={"seed": seed}), weights, 2).encoder.state_dict()
        for seed in (0, 1)
    ]
    assert any(not torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    net = finetuning.build_model(cfg, weights, 2)
    rates = [module.rate for module in net.encoder.modules() if isinstance(module, DropPath)]
    assert net.encoder.grad_checkpointing and max(rates) == 0.25
    mixup = finetuning.build_mixup(cfg, 2)
    assert mixup is not None and (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.3, 0.6, 0.2)
    optimizer = build_optimizer(cfg, net)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.375}
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    single, group = (num_layers(cfg.model.spec, mode) for mode in ("single", "group"))
    assert min(each["lr_scale"] for each in optimizer.param_groups) == 0.5**group != 0.5**single


def test_a_model_of_bands_is_evaluated_without_saying_how_many(tmp_path: Path) -> None:
    spec = ConvNeXtSpec(depths=(1, 1), dims=(4, 6))
    image = ImageRecord(input_size=(5, 16, 16), mean=(0.5,) * 5, std=(0.25,) * 5)
    weights = Weights({}, Architecture(spec, 5), image, class_names=("a", "b"))
    save_classifier(tmp_path / "model", Classifier(Encoder(spec, 5), 2), weights)
    for name in "ab":
        (tmp_path / "tested" / name).mkdir(parents=True)
        np.save(tmp_path / "tested" / name / "0.npy", np.random.default_rng(0).random((16, 16, 5), np.float32))
    words = ["--data.val_path", tmp_path / "tested", "--init", tmp_path / "model", "--out", tmp_path / "out"]
    words += ["--device", "cpu", "--log.trackers", "none", "--data.num_workers", "0"]
    assert cli.main(["finetune", "--eval_only", *map(str, words)]) == 0
    assert metrics(tmp_path / "out")[-1]["top1"] == 0.5


@pytest.mark.parametrize(
    ("weights", "eval_only", "expected"),
    [
        (None, False, None),
        ([1.0, 3.0], True, None),
        ([1.0, 3.0], False, [1, 3]),
        ("balanced", False, [4 / 6, 2]),  # a mean of 1 over the images
    ],
)
def test_classes_weigh_as_the_settings_say_and_nothing_where_nothing_is_trained(
    weights: Any, eval_only: bool, expected: list[float] | None
) -> None:
    cfg = FinetuneConfig.model_validate(
        {
            "out": "out",
            "eval_only": eval_only,
            "data": {"path": "x"},
            "model": {"init": "run"},
            "regularization": {"class_weights": weights},
        }
    )
    found = class_weights_of(cfg, [3, 1], torch.device("cpu"))
    assert (found if found is None else found.tolist()) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_a_mean_over_images_whatever_parts_they_come_in(soft: bool) -> None:
    logits, target = torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 0, 0, 1])
    if soft:
        target = torch.nn.functional.one_hot(target, 3).double().mul(0.9).add(0.1 / 3)
    balance = torch.tensor([0.5, 1.0, 3.0])
    whole = classification_loss(logits, target, balance, 0.1)
    parts = [classification_loss(x, y, balance, 0.1) for x, y in zip(logits.chunk(3), target.chunk(3), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    plain = torch.nn.functional.cross_entropy(logits.float(), target.float() if soft else target, label_smoothing=0.1)
    torch.testing.assert_close(classification_loss(logits, target, None, 0.1).float(), plain)


def test_a_network_without_a_name_is_taken_by_naming_none(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shipped configuration names a variant, and the starting weights are of a network of one's own."""
    images = write_images(tmp_path / "images", 9)
    model = {"model__variant": "{depths: [1, 1], dims: [8, 16]}", "epochs": 1}
    assert cli.main(["pretrain", *flags(images, tmp_path / "run", **model)]) == 0
    runs.forget_accelerator()
    init = {"model__init": tmp_path / "run", "epochs": 1}
    assert finetune(labelled, tmp_path / "out", model__variant="convnextv2_atto", **init) == 2
    assert "set it to none, which takes that of model.init" in capsys.readouterr().err
    runs.forget_accelerator()
    assert finetune(labelled, tmp_path / "out", model__variant="none", **init) == 0


def test_predictions_are_not_written_over_a_link_that_leads_nowhere(
    tuned: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    table.symlink_to(tmp_path / "unplugged" / "table.csv")
    assert cli.main(["predict", str(tuned), str(labelled), "--csv", str(table)]) == 2
    assert "exists: give a new path" in capsys.readouterr().err
    assert table.is_symlink() and not table.exists()


def test_images_that_are_learnt_from_are_not_held_out(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(labelled, tmp_path / "run", model__variant="convnextv2_atto", data__val_path=labelled) == 2
    assert "are in data.path too: take them out of one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
