"""Monitors measure what `fcmae analyze` does, change nothing in training, and go on where a run stopped."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from conftest import randomize
from PIL import Image
from runs import assert_same, at_step, final_state, flags, kill_self, write_images

from fcmae import cli
from fcmae.data.augment import Reading
from fcmae.data.dataset import centre_crops
from fcmae.data.find import find_images, find_labelled
from fcmae.data.index import Images
from fcmae.data.sampler import EVAL_EPOCH
from fcmae.data.split import split
from fcmae.evaluation import monitor
from fcmae.evaluation.monitor import Monitor, Watch, find_monitored_labels, monitored_images, over_time
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.training import checkpoint, health
from fcmae.training.health import Finding
from fcmae.training.records import read_metrics
from fcmae.weights.convert import build_encoder
from fcmae.weights.files import read_weights

READING = Reading(3, (16, 16), 1.0, (0.5,) * 3, (0.25,) * 3)
SPEC = "{depths: [1, 1, 2, 2], dims: [8, 16, 16, 32]}"
LAYERS = [f"stages.{i}.{j}" for i, depth in enumerate((1, 1, 2, 2)) for j in range(depth)]


pytestmark = pytest.mark.usefixtures("one_thread", "forgotten")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 8 images that differ in their brightness, but for noise."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 110)):
        (folder / name).mkdir()
        for number in range(8):
            pixels = rng.normal(level, 60, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def run(images: Path, out: Path, **changed: Any) -> int:
    """`fcmae pretrain` of a small network, with an evaluation of 8 images each epoch."""
    options = {
        "model__variant": SPEC,
        "log__eval_epochs": 1,
        "data__val_share": 0.3,
        "monitor__num_images": 8,
        "checkpoint__keep": 9,
    }
    return cli.main(["pretrain", *flags(images, out, **{"optim__base_lr": 0.05} | options | changed)])


@pytest.fixture(scope="module")
def monitored(images: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every monitor."""
    out = tmp_path_factory.mktemp("runs") / "monitored"
    torch.set_num_threads(1)
    assert run(images, out, monitor__labelled=labelled, log__trackers="tensorboard", seed=3) == 0
    return out


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if "val_loss" in line]


# What is measured


def test_a_run_writes_every_monitor_at_each_evaluation_to_files_and_tensorboard(monitored: Path) -> None:
    lines = evaluations(monitored)
    assert [line["step"] for line in lines] == [2, 4, 6]
    statistics = ("cosine_distance", "effective_rank", "dead_share", "saturated_share")
    names = {f"{statistic}/{layer}" for statistic in statistics for layer in LAYERS}
    knn = {"knn_top1", "knn_balanced_accuracy", "knn_auroc"}
    assert all(line.keys() == {"step", "epoch", "val_loss", *names, *knn} for line in lines)
    assert len({line["cosine_distance/stages.3.1"] for line in lines}) == 3
    for name in ("cosine_distance.png", "effective_rank.png", "reconstructions/over-time.png"):
        with Image.open(monitored / name) as image:
            assert np.asarray(image.convert("RGB")).std() > 10
    assert "step 6: nearest neighbours' accuracy" in (monitored / "train.log").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(monitored / "tensorboard" / "fcmae"))
    events.Reload()
    for name in ("effective_rank/stages.2.1", "knn_top1"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([line[name] for line in lines])
    assert [event.step for event in events.Images("reconstructions")] == [2, 4, 6]


def test_monitors_give_the_numbers_that_analyze_gives_of_the_checkpoint_of_that_step(
    monitored: Path, images: Path, tmp_path: Path
) -> None:
    train, held_out = split(find_images([str(images)]), 0.3, seed=3)
    (tmp_path / "list.txt").write_text("\n".join(monitored_images(held_out, train, 8).names()))
    for line in evaluations(monitored)[1:]:
        place = checkpoint.steps(monitored)[line["step"]]
        out = str(tmp_path / place.name)
        assert cli.main(["analyze", str(place), "--images", str(tmp_path / "list.txt"), "--out", out]) == 0
        (model,) = json.loads((tmp_path / place.name / "analysis.json").read_text())["models"]
        assert model["num_images"] == 8
        for layer in model["layers"]:
            for statistic in ("cosine_distance", "effective_rank", "dead_share", "saturated_share"):
                # The same images, sorted otherwise in their batch.
                assert line[f"{statistic}/{layer['name']}"] == pytest.approx(layer[statistic], rel=1e-6), statistic


def test_neighbours_that_vote_are_as_many_as_evaluate_has(
    images: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    probe = monitor.knn_probabilities

    def spy(*args: Any, ks: list[int], **more: Any) -> Any:
        asked.append(ks)
        return probe(*args, ks=ks, **more)

    monkeypatch.setattr(monitor, "knn_probabilities", spy)
    monkeypatch.setattr(monitor, "NEIGHBOURS", 3)
    assert run(images, tmp_path / "out", monitor__labelled=labelled, epochs=1, optim__warmup_epochs=0) == 0
    assert asked and all(ks == [3] for ks in asked)


def test_neighbours_are_those_of_the_checkpoints_features(monitored: Path, labelled: Path) -> None:
    line = evaluations(monitored)[-1]
    train, test = split(find_labelled(str(labelled)), 0.25, seed=3)
    weights = read_weights(checkpoint.steps(monitored)[line["step"]])
    encoder, reading = build_encoder(weights).eval(), weights.reading("the checkpoint")
    found = []
    for index in (train, test):
        dataset = centre_crops(reading, index)
        batch = torch.stack([torch.as_tensor(dataset[(EVAL_EPOCH, i)].image) for i in range(len(index))])
        with torch.no_grad():
            found.append(encoder(reading.normalize(batch)).mean((1, 2)).numpy())
    known, asked = found
    known, asked = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (known, asked))
    # 12 images vote, fewer than 20: all of them.
    weights = np.exp(asked @ known.T / 0.07)
    votes = np.stack([weights[:, train.labels == label].sum(1) for label in (0, 1)], 1)
    assert line["knn_top1"] == (votes.argmax(1) == test.labels).mean()


def test_an_image_of_two_names_is_not_classified_where_it_votes(labelled: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(labelled, tmp_path / "labelled"))
    for path in list(copied.glob("*/*")):
        (path.parent / f"again-{path.name}").hardlink_to(path)
    with pytest.raises(ValueError, match=r"monitor\.labelled: .* are training images too, under another name"):
        find_monitored_labels(str(copied), READING, seed=0)


def test_watching_leaves_the_encoder_and_the_draws_as_they_are(images: Path, labelled: Path) -> None:
    encoder = Encoder(ConvNeXtSpec(depths=(1, 1), dims=(8, 8), stem_stride=2)).eval()
    randomize(encoder, std=0.1)
    before, state = copy.deepcopy(encoder), torch.get_rng_state()
    monitor = Monitor(
        find_images([str(images)]),
        find_monitored_labels(str(labelled), READING, seed=0),
        READING,
        device=torch.device("cpu"),
        batch_size=5,
        num_workers=0,
    )
    values = monitor.measure(encoder)
    assert {"cosine_distance/stages.1.0", "knn_top1"} <= values.keys()
    assert torch.equal(torch.get_rng_state(), state)
    assert not encoder.training and all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert_same(encoder.state_dict(), before.state_dict())
    assert not [m for m in encoder.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_network_without_grn_is_watched_too(images: Path, tmp_path: Path) -> None:
    v1 = "{depths: [1, 1, 1, 1], dims: [8, 8, 8, 8], use_grn: false}"
    assert run(images, tmp_path / "out", epochs=1, model__variant=v1) == 0
    (line,) = evaluations(tmp_path / "out")
    assert 0 < line["cosine_distance/stages.3.0"] <= 1


def test_held_out_images_are_watched_first_and_training_ones_fill_up() -> None:
    images = Images.of_files("aubvcwdxyz")
    held_out, training = images.subset([0, 2, 4, 6]), images.subset([1, 3, 5, 7, 8, 9])
    assert monitored_images(held_out, training, 2).names() == ["a", "d"]
    assert monitored_images(held_out, training, 6).names() == ["a", "b", "c", "d", "u", "z"]
    assert monitored_images(held_out, training, 99).names() == [*"abcduvwxyz"]
    assert len(monitored_images(held_out, training, 0)) == 0


def test_images_that_cannot_be_read_are_left_out_of_what_is_watched(
    images: Path, labelled: Path, tmp_path: Path
) -> None:
    folder, classes = shutil.copytree(images, tmp_path / "images"), shutil.copytree(labelled, tmp_path / "labelled")
    index = find_images([str(folder)])
    Path(index.name(5)).write_bytes(b"not an image")
    for path in (*(classes / "dark").glob("[1-7].png"), *(classes / "light").glob("[1-7].png")):
        path.write_bytes(b"not an image")
    # Which of the two that are left votes, and which is classified, the seed decides.
    options = {"monitor__num_images": 12, "data__max_bad_share": 0.5, "monitor__labelled": classes, "epochs": 1}
    assert run(folder, tmp_path / "out", **options) == 0
    (line,) = evaluations(tmp_path / "out")
    assert 0 < line["cosine_distance/stages.0.0"] < 1


# Errors before training starts


@pytest.mark.parametrize("what", ["missing", "one image a class", "unreadable"])
def test_labelled_images_that_cannot_be_used_are_reported_before_anything_is_written(
    what: str, images: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "labelled"
    if what != "missing":
        shutil.copytree(labelled, folder)
    if what == "one image a class":
        for path in folder.glob("*/[1-9].png"):
            path.unlink()
    if what == "unreadable":
        for path in folder.glob("*/*.png"):
            path.write_bytes(b"not an image")
    assert run(images, tmp_path / "out", monitor__labelled=folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fcmae: error: monitor.labelled: ")
    assert {"missing": "does not exist", "one image a class": "no class of two images"}.get(
        what, "cannot be used"
    ) in line
    assert not (tmp_path / "out").exists()


def test_of_many_labelled_images_some_of_each_class_are_drawn(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcmae.evaluation.monitor.MAX_LABELLED", 8)
    found = find_monitored_labels(str(labelled), READING, seed=0)
    assert found[0].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found[1].labels.tolist() == [0, 1]
    assert found[0].names() != find_monitored_labels(str(labelled), READING, seed=1)[0].names()


# Training is as without


def test_monitors_change_nothing_in_training(monitored: Path, images: Path, tmp_path: Path) -> None:
    assert run(images, tmp_path / "out", seed=3, monitor__num_images=0, log__eval_epochs=99) == 0
    assert_same(final_state(tmp_path / "out"), final_state(monitored))
    assert runs.losses(tmp_path / "out") == runs.losses(monitored)
    assert not (tmp_path / "out" / "cosine_distance.png").exists()


def test_monitors_leave_the_draws_of_drop_path_alone(images: Path, tmp_path: Path) -> None:
    for name, num, every in (("with", 8, 1), ("without", 0, 99)):
        settings = {"monitor__num_images": num, "log__eval_epochs": every, "model__drop_path_rate": 0.5}
        assert run(images, tmp_path / name, **settings) == 0
    assert_same(final_state(tmp_path / "with"), final_state(tmp_path / "without"))


def test_a_resumed_run_watches_as_an_uninterrupted_one(
    monitored: Path, images: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", {"monitor__labelled": labelled, "log__trackers": "tensorboard", "seed": 3}
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill_self(signal.SIGTERM))
        assert run(images, out, **options) == 143
    assert [line["step"] for line in evaluations(out)] == [2]
    # One that was cut off further on has left a picture of a step that has not been taken yet.
    tiles = out / "reconstructions" / "tiles"
    (tiles / "step-00000099.png").write_bytes(b"not a picture")
    assert run(images, out, **options) == 0
    assert evaluations(out) == evaluations(monitored)
    assert_same(final_state(out), final_state(monitored))
    assert {path.name for path in tiles.iterdir()} == {f"step-{step:08}.png" for step in (2, 4, 6, 99)}
    for name in ("cosine_distance.png", "reconstructions/over-time.png"):
        assert (out / name).read_bytes() == (monitored / name).read_bytes()


def test_overwrite_deletes_the_pictures_and_another_number_of_images_is_another_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(images, out, epochs=1) == 0
    assert (out / "effective_rank.png").exists()
    # An effective rank is at most the number of images, so a jump in it would look like a collapse.
    assert run(images, out, epochs=1, monitor__num_images=3) == 2
    assert "monitor.num_images: the run has" in capsys.readouterr().err
    assert run(images, out, epochs=1, monitor__num_images=0, overwrite="true") == 0
    assert not (out / "effective_rank.png").exists()
    assert [set(line) for line in evaluations(out)] == [{"step", "epoch", "val_loss"}]


# Over time


def test_a_statistic_over_time_has_a_row_for_each_layer_and_gaps() -> None:
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 1.0},
        {"step": 2, "epoch": 1, "a/x": 1.0, "b/x": 9.0},
        {"step": 4, "epoch": 2, "a/x": 2.0, "a/y": 3.0},
    ]
    layers, epochs, values = over_time(lines, "a")
    assert (layers, epochs) == (["x", "y"], [1, 2])
    np.testing.assert_array_equal(values, [[1, 2], [np.nan, 3]])
    assert over_time(lines, "c")[:2] == ([], [])


def test_each_kind_of_warning_is_logged_once_and_a_resumed_run_knows_what_was_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(lines: list[dict[str, Any]]) -> list[Finding]:
        kinds = ["loss", "data", "effective_rank"]
        return [Finding(kind, n, float(n), f"{kind} at {n}") for n, kind in enumerate(kinds[: len(lines)])]

    monkeypatch.setattr(health, "warnings", warnings)
    with caplog.at_level(logging.WARNING, "fcmae"):
        watch = Watch([])
        for num in range(4):
            watch.look([{}] * num)
        Watch([{}] * 3).look([{}] * 3)
    # The loop tells of data.
    assert [record.message for record in caplog.records] == ["loss at 0", "effective_rank at 2"]
