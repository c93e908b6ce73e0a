"""Segmentation from every kind of start, its results on disk, resuming, and label maps made with it."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tifffile
import torch
from accelerate import Accelerator
from conftest import randomize, requires_time
from PIL import Image
from runs import assert_same, assert_same_metrics, at_step, final_state, flags, kill_self, write_images
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import fcmae
from fcmae import cli, prediction, segmenting
from fcmae.anytime import Anytime
from fcmae.config import SegmentConfig
from fcmae.config.commands import PredictConfig
from fcmae.data.maps import Classes
from fcmae.data.normalize import Normalize
from fcmae.data.rasters import Raster
from fcmae.data.tiff import GEO_TAGS
from fcmae.evaluation.report import report
from fcmae.evaluation.status import state_of
from fcmae.heads import Segmenter, build_head
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import DropPath
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import load
from fcmae.prediction import predict_maps
from fcmae.provenance import step_of
from fcmae.segmentation import colours, predictor, probabilities_by_rows
from fcmae.segmenting import Mapped
from fcmae.starting import class_weights_of, reading_for
from fcmae.training import checkpoint
from fcmae.weights import onnx, segmenters, tensors
from fcmae.weights.files import HEAD, read_weights, segmenter_in
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights
from fcmae.weights.segmenters import HeadRecord, read_segmenter, save_segmenter
from fcmae.weights.tensors import RECORD, digest

pytestmark = pytest.mark.usefixtures("one_thread", "forgotten")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen images of a bright half and a dark one, of sizes of their own, and maps with the values 0, 1 and 255."""
    root = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for name in ("images", "maps"):
        (root / name).mkdir()
    for number in range(12):
        height, width = 24 + number % 3 * 8, 40
        truth = (np.arange(width) > rng.integers(10, 30))[None].repeat(height, 0).astype(np.uint8)
        noisy = np.where(truth[..., None], (60, 160, 60), (40, 40, 160)) + rng.normal(0, 15, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number:02}.png")
        truth[:2] = 255
        Image.fromarray(truth).save(root / "maps" / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrained")
    assert cli.main(["pretrain", *flags(write_images(root / "images", 9), root / "run", epochs=1)]) == 0
    runs.forget_accelerator()
    return root / "run"


def words(tiles: Path, out: Path, **settings: Any) -> list[str]:
    """The smallest run: 2 epochs of 2 steps; keys write `__` for the dot."""
    values = {
        "data__path": tiles / "images",
        "data__maps": tiles / "maps",
        "out": out,
        "device": "cpu",
        "data__image_size": 16,
        "data__num_workers": 0,
        "data__scale": "0.8,1.25",
        "model__head_dim": 8,
        "batch_size": 4,
        "epochs": 2,
        "optim__base_lr": 0.5,
        "optim__warmup_epochs": 0,
        "log__every_steps": 1,
        "log__trackers": "none",
    } | settings
    if "model__init" not in values:
        values = {"model__variant": runs.TINY, "model__stem_stride": 1} | values
    return [
        "segment",
        "--config",
        str(runs.DEFAULTS),
        *(word for key, value in values.items() for word in (f"--{key.replace('__', '.')}", str(value))),
    ]


def segment(tiles: Path, out: Path, **settings: Any) -> int:
    return cli.main(words(tiles, out, **settings))


def test_maps_stay_with_their_images_where_a_member_of_their_tar_is_left_out(tiles: Path, tmp_path: Path) -> None:
    for name in ("images", "maps"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for path in sorted((tiles / name).iterdir()):
                archive.add(path, path.name)
            archive.add(tiles / name / "03.png", "03.png")  # the second is left out
    places = {"data__path": tmp_path / "images.tar", "data__maps": tmp_path / "maps.tar"}
    data = segmenting.find_data(load(SegmentConfig, words(tiles, tmp_path / "out", **places)[1:], prog="x"))
    for images, maps in ((data.images, data.maps), (data.val_images, data.val_maps)):
        assert [Path(name).name for name in images.names()] == [Path(name).name for name in maps.names()]
    assert (len(data.images), len(data.val_images)) == (10, 2)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_told_to_stop_at_its_last_step_is_evaluated_when_it_goes_on(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 4, kill_self(signal.SIGTERM))
        assert segment(tiles, tmp_path / "run") == 143
    assert max(checkpoint.steps(tmp_path / "run")) == 4 and not (tmp_path / "run" / "last").exists()
    runs.forget_accelerator()
    assert segment(tiles, tmp_path / "run") == 0
    assert "miou" in metrics(tmp_path / "run")[-1] and (tmp_path / "run" / "last").exists()


@pytest.fixture(scope="module")
def segmented(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "segmented"
    names = {"data__class_names": "dark,bright", "regularization__ema_decay": 0.5, "regularization__dice": 0.5}
    assert segment(tiles, out, epochs=12, log__eval_epochs=4, **names, regularization__class_weights="balanced") == 0
    runs.forget_accelerator()
    return out


def test_it_learns_and_leaves_scores_pictures_and_models(segmented: Path) -> None:
    last = metrics(segmented)[-1]
    assert last["ema_miou"] > 0.9 and last["ema_pixel_accuracy"] > 0.95 and 0 <= last["ema_boundary_f1"] <= 1
    assert {"iou/dark", "iou/bright", "ema_iou/dark", "val_loss"} <= set(last)
    pictures = sorted((segmented / "overlays").iterdir())
    assert len(pictures) == 3
    with Image.open(pictures[-1]) as picture:
        assert picture.size[0] > 100
    for place in ("best", "last"):
        rows = list(csv.reader((segmented / place / "confusion.csv").read_text().splitlines()))
        assert rows[0] == ["true", "dark", "bright"] and [row[0] for row in rows[1:]] == ["dark", "bright"]
    total = sum(int(n) for row in rows[1:] for n in row[1:])
    held = json.loads((segmented / "val_maps.json").read_text())["paths"]
    assert total == sum(int((np.asarray(Image.open(path)) != 255).sum()) for path in held)


def test_settings_reach_what_they_are_for(
    tiles: Path, segmented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that no other test has at another value than the default."""
    overlaps = set()

    def noted(*given: Any) -> Any:
        overlaps.add(given[4])
        return probabilities_by_rows(*given)

    for module in (segmenting, prediction):
        monkeypatch.setattr(module, "probabilities_by_rows", noted)
    assert segment(tiles, tmp_path / "run", model__init=segmented, eval_only="true", data__overlap=0.25) == 0
    assert predict(segmented, tiles / "images", tmp_path / "maps", "--overlap", "0.75") == 0
    assert overlaps == {0.25, 0.75}
    given = words(tiles, tmp_path, data__color_jitter=0.5, data__vflip=1.0, data__hflip=0.25)[1:]
    given += ["--model.drop_path_rate", "0.25", "--model.grad_checkpointing", "true"]
    cfg = load(SegmentConfig, given, prog="test")
    data = segmenting.find_data(cfg)
    weights = segmenting.starting_weights(cfg)
    crop = segmenting.build_train_set(cfg, data, reading_for(cfg, weights))._crop
    assert (crop.color_jitter, crop.vflip, crop.hflip, crop.scale) == (0.5, 1.0, 0.25, (0.8, 1.25))
    net = segmenting.build_model(cfg, segmenting.starting_weights(cfg), ("a", "b", "c"))
    rates = [module.rate for module in net.encoder.modules() if isinstance(module, DropPath)]
    assert net.encoder.grad_checkpointing and max(rates) == 0.25


def test_pixels_that_are_missing_are_not_scored(segmented: Path, tiles: Path, tmp_path: Path) -> None:
    held = [Path(path) for path in json.loads((segmented / "val_maps.json").read_text())["paths"]]
    known = 0
    for name in ("images", "maps"):
        (tmp_path / name).mkdir()
    for path in held:
        shutil.copy(path, tmp_path / "maps")
        with Image.open(tiles / "images" / path.name) as picture:
            image = np.asarray(picture).copy()
        image[:, :9] = 0
        image[:, 20, 0] = 0  # the pixel has other bands
        Image.fromarray(image).save(tmp_path / "images" / path.name)
        known += int(((np.asarray(Image.open(path)) != 255) & (image != 0).any(axis=2)).sum())
    given = {"data__val_path": tmp_path / "images", "data__val_maps": tmp_path / "maps", "data__nodata": 0}
    assert segment(tiles, tmp_path / "run", model__init=segmented, eval_only="true", **given) == 0
    rows = list(csv.reader((tmp_path / "run" / "confusion.csv").read_text().splitlines()))
    assert sum(int(n) for row in rows[1:] for n in row[1:]) == known


def test_the_exported_encoder_is_one_that_everything_reads(segmented: Path) -> None:
    weights = read_weights(segmented)
    assert weights.architecture.num_classes == 0 and weights.image.input_size == (3, 16, 16)
    model, _, record = read_segmenter(segmented)
    for name, value in weights.state.items():
        assert torch.equal(model.get_parameter(name), value)
    assert record.classes == Classes(("dark", "bright"), (0, 1), 255) and record.dim == 8
    assert fcmae.load(segmented)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 2, 2, 8)


def test_evaluating_the_best_model_gives_its_scores_again(segmented: Path, tiles: Path, tmp_path: Path) -> None:
    best = max(line["ema_miou"] for line in metrics(segmented) if "ema_miou" in line)
    assert segment(tiles, tmp_path / "run", model__init=segmented, eval_only="true") == 0
    (line,) = metrics(tmp_path / "run")
    assert line["miou"] == pytest.approx(best, abs=1e-6)
    assert state_of(tmp_path / "run") == "finished"
    assert segment(tiles, tmp_path / "run", model__init=segmented, eval_only="true") == 0  # and may be again
    assert (tmp_path / "run" / "confusion.csv").read_text() == (segmented / "best" / "confusion.csv").read_text()
    assert not (tmp_path / "run" / "best").exists()


def test_an_evaluation_states_none_of_what_its_weights_decide_and_its_own_settings_repeat_it(
    segmented: Path, tiles: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = words(tiles, out, model__init=segmented, eval_only="true")
    at = given.index("--data.image_size")
    assert cli.main(given[:at] + given[at + 2 :]) == 0
    text = (out / "config.yaml").read_text()
    assert not any(f"{key}:" in text for key in ("image_size", "in_chans", "crop_pct", "ignore_value"))
    (line,) = metrics(out)
    assert cli.main(["segment", "--config", str(out / "config.yaml")]) == 0
    assert metrics(out)[0]["miou"] == line["miou"]
    report([out], tmp_path / "report.html")
    assert "224 × 224" not in (tmp_path / "report.html").read_text()


def test_a_best_model_of_two_halves_is_none(segmented: Path, tmp_path: Path) -> None:
    best = shutil.copytree(segmented / "best", tmp_path / "best")
    assert step_of(best) == step_of(segmented / "best") > 0
    with safe_open(best / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) + 1 for name in file.keys()}  # noqa: SIM118
        save_file(state, best / "model.safetensors", file.metadata())
    assert step_of(best) == 0
    (best / HEAD).write_bytes(b"damaged")
    assert step_of(best) == 0


def test_maps_that_hold_other_numbers_score_the_same_classes(segmented: Path, tiles: Path, tmp_path: Path) -> None:
    """Black and white ones, where 7 is unknown."""
    (tmp_path / "maps").mkdir()
    for file in (tiles / "maps").iterdir():
        stored = np.asarray(Image.open(file))
        Image.fromarray(np.select([stored == 0, stored == 1], [100, 200], 7).astype(np.uint8)).save(
            tmp_path / "maps" / file.name
        )
    given = {"model__init": segmented, "eval_only": "true", "data__maps": tmp_path / "maps"}
    told = {"data__class_values": "100,200", "data__ignore_value": 7}
    assert segment(tiles, tmp_path / "run", **given, **told) == 0
    assert (tmp_path / "run" / "confusion.csv").read_text() == (segmented / "best" / "confusion.csv").read_text()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"data__class_names": "sea,land"}, "data.class_names = sea,land, but model.init = "),
        ({"data__class_values": "0,1,2"}, "data.class_values has 3 values, but model.init = "),
        ({"data__ignore_value": 1}, "data.ignore_value = 1 is what maps hold for a class: model.init = "),
    ],
)
def test_other_classes_than_those_of_the_model_are_refused(
    given: dict[str, Any],
    sentence: str,
    segmented: Path,
    tiles: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert segment(tiles, tmp_path / "run", model__init=segmented, eval_only="true", **given) == 2
    assert sentence in (said := capsys.readouterr().err) and "has dark, bright" in said


@pytest.mark.parametrize("kind", ["pyramid", "upernet"])
def test_it_starts_from_a_pretraining_run(kind: str, pretrained: Path, tiles: Path, tmp_path: Path) -> None:
    cfg = SegmentConfig.model_validate(
        {
            "out": tmp_path / "run", "data": {"path": str(tiles / "images"), "maps": str(tiles / "maps")},
            "model": {"init": str(pretrained), "head": kind},
        }
    )  # fmt: skip
    weights = segmenting.starting_weights(cfg)
    net = segmenting.build_model(cfg, weights, ("0", "1"))
    for name, value in weights.state.items():
        if name.startswith("encoder."):
            assert torch.equal(net.get_parameter(name), value)
    again = segmenting.build_model(cfg, weights, ("0", "1")).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())
    assert segment(tiles, tmp_path / "run", model__init=pretrained, model__head=kind, epochs=1) == 0


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_stopped_run_ends_as_one_that_was_not(
    ema: float, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"regularization__ema_decay": ema, "model__drop_path_rate": 0.3}
    assert segment(tiles, tmp_path / "whole", **settings) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, kill_self(signal.SIGTERM))
        assert segment(tiles, tmp_path / "stopped", **settings) == 143
    assert segment(tiles, tmp_path / "stopped", **settings) == 0
    assert_same(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
    whole, stopped = (
        [{k: v for k, v in line.items() if "_s" not in k and "wait" not in k} for line in metrics(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert whole == stopped


def test_parts_of_a_batch_give_the_same_steps(tiles: Path, tmp_path: Path) -> None:
    for parts in (1, 2):
        settings = {"grad_accum": parts, "regularization__dice": 1.0, "optim__base_lr": 0.01}
        assert segment(tiles, tmp_path / str(parts), **settings) == 0
    one, two = (final_state(tmp_path / str(parts)) for parts in (1, 2))
    for name, value in one.items():
        if name.startswith("model:"):
            # Sums are rounded in another order, and AdamW divides small gradients by their size.
            torch.testing.assert_close(two[name], value, atol=3e-4, rtol=1e-3)
    assert_same_metrics(tmp_path / "1", tmp_path / "2", rel=1e-3, abs=1e-5)  # losses and gradients


@pytest.mark.parametrize("head", ["pyramid", "anytime"])
@requires_time
def test_two_processes_train_and_score_like_one(head: str, tiles: Path, tmp_path: Path) -> None:
    settings = {"model__head": head, "optim__base_lr": 0.05, "epochs": 1, "regularization__ema_decay": 0.5}
    if head == "anytime":
        settings["model__tau"] = 0.6
    command = words(tiles, tmp_path / "one", **settings)
    assert cli.main(command) == 0
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    started = runs.start_pair(words(tiles, tmp_path / "two", **settings), logs)
    assert runs.ended(started) == [0, 0], logs[0].read_text()
    assert "2 x cpu" in logs[0].read_text()
    runs.assert_same_metrics(tmp_path / "two", tmp_path / "one", rel=1e-3, abs=1e-5)
    one, two = ((tmp_path / run / "last" / "confusion.csv").read_text().splitlines() for run in ("one", "two"))
    counts = [[int(n) for line in rows[1:] for n in line.split(",")[1:]] for rows in (one, two)]
    assert sum(counts[0]) == sum(counts[1])  # every pixel of every image once


@pytest.mark.parametrize("head", ["pyramid", "anytime"])
def test_images_of_one_channel_are_learnt_and_mapped(head: str, tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "grey").mkdir()
    for path in (tiles / "images").iterdir():
        with Image.open(path) as image:
            image.convert("L").save(tmp_path / "grey" / path.name)
    channels = {"data__path": tmp_path / "grey", "data__in_chans": 1, "data__mean": 0.4, "data__std": 0.2}
    assert segment(tiles, tmp_path / "run", **channels, model__head=head, epochs=1) == 0
    runs.forget_accelerator()
    model, weights, _ = read_segmenter(tmp_path / "run")
    assert model.encoder.in_chans == 1 and weights.image.input_size == (1, 16, 16)
    assert weights.image.mean == (0.4,)
    assert predict(tmp_path / "run", tmp_path / "grey", tmp_path / "maps") == 0
    assert len(list((tmp_path / "maps").iterdir())) == 12


def test_nodata_that_maps_state_is_told_where_it_is_a_class(
    tiles: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (tiles / "maps").iterdir():
        tag = [(42113, "s", 0, "0", True)]
        (tmp_path / "maps").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "maps" / f"{path.stem}.tif", np.asarray(Image.open(path)), extratags=tag)
    given = {"data__maps": tmp_path / "maps", "data__class_values": "0,1"}
    segmenting.find_data(load(SegmentConfig, words(tiles, tmp_path / "out", **given)[1:], prog="x"))
    assert "state GDAL_NODATA = 0, which is a class here: if it is none, give --data.ignore_value 0" in caplog.text
    caplog.clear()
    given = {"data__maps": tmp_path / "maps", "data__class_values": "1,255", "data__ignore_value": 0}
    segmenting.find_data(load(SegmentConfig, words(tiles, tmp_path / "out", **given)[1:], prog="x"))
    assert not caplog.text


def test_what_only_held_out_maps_hold_is_a_class_too_or_refused_before_the_run(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiles, tmp_path / "held_out")
    for name in ("00", "01"):
        with Image.open(place := tmp_path / "held_out" / "maps" / f"{name}.png") as picture:
            values = np.array(picture)
        values[-2:] = 2
        Image.fromarray(values).save(place)
    given = {"data__val_path": tmp_path / "held_out" / "images", "data__val_maps": tmp_path / "held_out" / "maps"}
    rename = {"data__class_names": "a,b"}
    assert segment(tiles, tmp_path / "refused", **given, **rename, epochs=1) == 2
    assert "data.val_maps holds the value 2, which is no class" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert segment(tiles, tmp_path / "run", **given, epochs=1) == 0
    assert read_segmenter(tmp_path / "run")[2].classes.values == (0, 1, 2)
    for place in (tmp_path / "held_out" / "maps").iterdir():  # now to learn from, and nothing to be learnt
        Image.fromarray(np.full_like(np.asarray(Image.open(place)), 255)).save(place)
    swapped = {"data__path": given["data__val_path"], "data__maps": given["data__val_maps"]}
    swapped |= {"data__val_path": tiles / "images", "data__val_maps": tiles / "maps"}
    assert segment(tiles, tmp_path / "nothing", **swapped, epochs=1) == 2
    assert "data.maps: the maps hold 255, and none of the classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data__class_names": "a,b,c", "data__class_values": "0,2,3"}, "data.maps holds the value 1, which is no"),
        ({"data__ignore_value": "none"}, "data.maps: the maps hold 0, 1, 255, values up to 255, which would be 256"),
        ({"data__ignore_value": "none", "data__class_values": "0,1,255"}, None),
        ({"data__image_size": 20}, "data.image_size: 20 is not a multiple of the total stride 8: use 16"),
        ({"regularization__class_weights": "1,2,3"}, "class_weights has 3 values for 2 classes"),
        ({"batch_size": 100}, "batch_size: 100 is more than the"),
        ({"data__path": "one.csv", "data__maps": "none", "batch_size": 1}, "val_share = 0.2 holds out none of 1"),
        ({"model__init": "nowhere"}, "model.init = .*nowhere does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(
    settings: dict[str, Any], sentence: str | None, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text(f"image,mask\n{tiles}/images/00.png,{tiles}/maps/00.png\n")
    status = segment(tiles, tmp_path / "run", **settings, epochs=1)
    error = capsys.readouterr().err
    assert status == (0 if sentence is None else 2)
    if sentence is not None:
        assert re.search(sentence, error), error
        assert not (tmp_path / "run").exists()  # nor is a run deleted that --overwrite names


def test_class_weights_are_inverse_to_the_share_of_the_pixels(tiles: Path) -> None:
    cfg = SegmentConfig.model_validate(
        {
            "out": "run", "data": {"path": str(tiles / "images"), "maps": str(tiles / "maps")},
            "model": {"variant": "atto"}, "regularization": {"class_weights": "balanced"},
        }
    )  # fmt: skip
    data = segmenting.run_images(cfg, segmenting.RunDirectory(cfg))
    assert isinstance(data, Mapped) and len(data.images) + len(data.val_images) == 12
    stored = np.concatenate([np.asarray(Image.open(path)).ravel() for path in data.maps.names()])
    assert data.counts.tolist() == [(stored == 0).sum(), (stored == 1).sum()]
    weights = class_weights_of(cfg, data.counts, torch.device("cpu"))
    assert weights is not None
    torch.testing.assert_close(
        (weights * torch.from_numpy(data.counts)).float(), torch.full((2,), data.counts.sum() / 2)
    )
    unseen = class_weights_of(cfg, [*data.counts, 0], torch.device("cpu"))
    assert unseen is not None and unseen.tolist() == [*weights.tolist(), weights.max().item()]
    pairs = zip(data.val_images.names(), data.val_maps.names(), strict=True)
    assert all(Path(image).name == Path(label).name for image, label in pairs)


def test_report_and_status_show_it(segmented: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    page = report([segmented], segmented.parent / "report.html").read_text()
    for text in (
        "(segmentation)",
        "IoU of each class",
        "Confusion: the share of each true",
        "Label maps",
        "boundary_f1",
    ):
        assert text in page
    assert page.count("Label maps at step") == 3
    assert cli.main(["status", str(segmented)]) == 0
    shown = capsys.readouterr().out
    assert "best ema_miou" in shown and f"fcmae predict {segmented} IMAGES --out maps" in shown


# Files of a segmenter


SPEC = ConvNeXtSpec(depths=(1, 1), dims=(4, 6))


def save(dest: Path, classes: Classes | None = None, in_chans: int = 3) -> Segmenter:
    classes = classes or Classes(("sea", "land"), (0, 7), 255)
    model = Segmenter(Encoder(SPEC, in_chans), build_head("pyramid", SPEC.dims, len(classes), 8))
    randomize(model)
    image = ImageRecord(input_size=(in_chans, 32, 32), mean=(0.5,) * in_chans, std=(0.25,) * in_chans)
    save_segmenter(dest, model, Weights({}, Architecture(SPEC, in_chans), image), "pyramid", classes)
    return model


def test_a_segmenter_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    found, weights, record = read_segmenter(tmp_path / "model")
    images = torch.randn(1, 3, 16, 24)
    assert torch.equal(found(images), model(images))
    assert record.classes == Classes(("sea", "land"), (0, 7), 255) and weights.image.mean == (0.5,) * 3


def test_a_segmenter_that_cannot_be_written_whole_leaves_the_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "model")
    write, calls = tensors.save_file, list[Path]()

    def fail(state: dict[str, torch.Tensor], path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, path, *rest)

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "model", Classes(("a", "b"), (0, 1), None))
    found, _, record = read_segmenter(tmp_path / "model")
    assert_same(found.state_dict(), model.state_dict())
    assert record.class_names == ("sea", "land")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", HEAD, "model.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "{model}", "{out}.safetensors", "--to", "fcmae"),
        ("prune", "{model}", "{out}.safetensors", "--data", "{images}", "--keep", "0.5"),
        ("export", "{model}", "{out}.onnx", "--to", "onnx"),
    ],
    ids=lambda words: words[0],
)
def test_a_head_that_is_left_out_is_told(
    words: tuple[str, ...],
    tiles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(onnx, "_write", lambda path, *_: path.touch())
    monkeypatch.setattr(onnx, "_difference", lambda *_: 0.0)
    save(tmp_path / "model")
    paths = {"model": tmp_path / "model", "out": tmp_path / "out", "images": tiles / "images"}
    assert cli.main([word.format(**paths) for word in words]) == 0
    assert "left out, as it makes label maps: head.safetensors; the encoder alone is taken" in caplog.text


@pytest.mark.parametrize("spoiled", ["model.safetensors", HEAD])
def test_a_head_beside_another_encoder_is_refused(spoiled: str, tmp_path: Path) -> None:
    save(tmp_path / "model")
    torch.manual_seed(1)
    other = Segmenter(Encoder(SPEC), build_head("pyramid", SPEC.dims, 2, 8))
    image = ImageRecord(input_size=(3, 32, 32))
    classes = Classes(("a", "b"), (0, 1), None)
    save_segmenter(tmp_path / "other", other, Weights({}, Architecture(SPEC), image), "pyramid", classes)
    shutil.copy(tmp_path / "other" / spoiled, tmp_path / "model" / spoiled)
    with pytest.raises(ValueError, match="it is of another encoder than the one beside it"):
        read_segmenter(tmp_path / "model")


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model")
    content = bytearray((tmp_path / "model" / HEAD).read_bytes())
    content[-3] ^= 1
    (tmp_path / "model" / HEAD).write_bytes(content)
    with pytest.raises(ValueError, match=r"head.safetensors cannot be used \(its SHA-256 is another\)"):
        read_segmenter(tmp_path / "model")
    assert segmenter_in(tmp_path) is None
    with pytest.raises(ValueError, match="holds no segmentation model"):
        read_segmenter(tmp_path)


# Prediction


def predict(model: Path, images: Path, out: Path, *more: str) -> int:
    return cli.main(["predict", str(model), str(images), "--device", "cpu", "--out", str(out), *more])


def expected_map(model: Segmenter, raster: Raster) -> tuple[Any, Any]:
    mean = [0.5] * model.encoder.in_chans
    normalize = Normalize(mean, [0.25] * len(mean))
    tile = predictor(model.eval(), normalize, Accelerator(cpu=True))
    whole = np.concatenate(
        [strip.probabilities for strip in probabilities_by_rows(raster, tile, (32, 32), 8, 0.5, mean, 64)], axis=1
    )
    return whole, np.array([0, 7])[whole.argmax(0)]


def test_label_maps_are_written_under_the_images_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 3)
    (photos / "bad.png").write_bytes(b"broken")
    assert predict(tmp_path / "model", photos, tmp_path / "maps") == 1
    shown = capsys.readouterr()
    assert "bad.png: it is no JPEG" in shown.err and shown.out.count("\t") == 6
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["00.png", "01.png", "02.png"]
    with (photos / "01.png").open("rb") as file:
        _, expected = expected_map(model, Raster(file, 3, [0.5] * 3))
    with Image.open(tmp_path / "maps" / "01.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), expected)
        palette = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
        np.testing.assert_array_equal(palette[[0, 7]], colours(2))


def test_an_image_whose_map_could_have_no_name_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 3)
    shutil.copy(photos / "01.png", photos / f"{'a' * 247}.png")
    assert predict(tmp_path / "model", photos, tmp_path / "maps") == 1
    assert "its map's name would be too long" in capsys.readouterr().err
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_all_maps_are_written_when_nobody_reads_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 3)
    monkeypatch.setattr("sys.stdout", Gone())
    assert predict_maps(PredictConfig(model=tmp_path / "model", images=[str(photos)], out=tmp_path / "maps")) == 0
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_a_geotiff_keeps_its_place_and_has_probabilities_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save(tmp_path / "model", Classes(("sea", "land"), (0, 7), None), in_chans=5)
    bands = np.random.default_rng(0).integers(0, 2**16, (300, 270, 5), dtype=np.uint16)
    geo = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 4.6e6, 0.0), True)]
    (tmp_path / "scenes" / "north").mkdir(parents=True)
    scene = tmp_path / "scenes" / "north" / "a.tif"
    tifffile.imwrite(scene, bands, photometric="minisblack", planarconfig="contig", tile=(64, 64), extratags=geo)
    shutil.copy(scene, tmp_path / "scenes" / "b.tif")
    # The image is larger than max_pixels, its parts are not.
    more = ("--probabilities", "true", "--max_pixels", "20000")
    assert predict(tmp_path / "model", tmp_path / "scenes", tmp_path / "maps", *more) == 0
    with scene.open("rb") as file:
        whole, expected = expected_map(model, Raster(file, 5, [0.5] * 5))
    expected_places = ["b.probabilities.tif", "b.tif", "north"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == expected_places
    for name, values in (("a.tif", expected), ("a.probabilities.tif", whole.transpose(1, 2, 0))):
        with tifffile.TiffFile(tmp_path / "maps" / "north" / name) as file:
            np.testing.assert_allclose(file.asarray(), values, atol=1e-6)
            tags = file.pages.first.tags
            assert {code: tags[code].value for code in GEO_TAGS if code in tags} == {t[0]: t[3] for t in geo}
    # A PNG has no place, as its name says.
    caplog.clear()
    scene.rename(tmp_path / "a.gtif")
    (tmp_path / "list.txt").write_text("a.gtif\n")
    assert predict(tmp_path / "model", tmp_path / "list.txt", tmp_path / "second") == 0
    assert "a.gtif has a place on earth, which a PNG does not keep" in caplog.text
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["a.png"]


@pytest.mark.parametrize("ignored", [255, 300, None])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_missing_pixels_have_no_class(
    suffix: str, ignored: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "model", Classes(("sea", "land"), (0, 7), ignored))
    image = np.random.default_rng(0).integers(1, 256, (60, 50, 3), dtype=np.uint8)
    image[:40, :20] = 0
    image[50, 30, 0] = 0  # of one band alone it is a value
    is_missing = (image == 0).all(axis=2)
    (tmp_path / "scenes").mkdir()
    scene = tmp_path / "scenes" / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(scene, image, photometric="rgb", tile=(16, 16))
    else:
        Image.fromarray(image).save(scene)
    more = ("--nodata", "0", "--probabilities", "true")
    assert predict(tmp_path / "model", tmp_path / "scenes", tmp_path / "maps", *more) == 0
    with scene.open("rb") as file:
        whole, expected = expected_map(model, Raster(file, 3, [0.5] * 3, nodata=0))
    shares = [f"{name} {(expected[~is_missing] == value).mean():.1%}" for name, value in (("sea", 0), ("land", 7))]
    told = capsys.readouterr().out.strip().split("\t")[2].split(", ")
    assert told == [share for share in shares if not share.endswith(" 0.0%")]
    expected[is_missing] = expected[is_missing] if ignored is None else ignored
    with Image.open(tmp_path / "maps" / f"a.{suffix}") as picture:
        np.testing.assert_array_equal(np.asarray(picture), expected)
    beside = tifffile.imread(tmp_path / "maps" / "a.probabilities.tif")
    np.testing.assert_allclose(beside, np.where(is_missing, np.nan, whole).transpose(1, 2, 0), atol=1e-6)
    if suffix == "tif":
        with tifffile.TiffFile(tmp_path / "maps" / "a.tif") as file:
            assert file.pages.first.tags.valueof(42113) == (None if ignored is None else str(ignored))


def test_a_full_disk_is_told_before_probabilities_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing to the map of a sparse file would end the process by a signal."""
    save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 1)

    with Image.open(photos / "00.jpg") as picture:
        num_pixels = math.prod(picture.size)

    def full(descriptor: int, start: int, size: int) -> None:
        assert size >= num_pixels * 2 * np.float32().nbytes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert predict(tmp_path / "model", photos, tmp_path / "maps", "--probabilities", "true") == 2
    assert "No space left on device; free some space there" in capsys.readouterr().err
    assert list((tmp_path / "maps").iterdir()) == []


def test_what_cannot_be_predicted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 1)
    for more, sentence in (
        ((), "makes label maps: give --out, a new folder"),
        (("--out", str(photos)), "exists: give a new path, or remove it"),
        (("--out", str(tmp_path / "new"), "--prefix", "student"), "name what is inside a file: leave them out"),
    ):
        assert cli.main(["predict", str(tmp_path / "model"), str(photos), "--device", "cpu", *more]) == 2
        assert sentence in capsys.readouterr().err
    (photos / "00.jpg").write_bytes(b"broken")
    assert predict(tmp_path / "model", photos, tmp_path / "maps") == 2
    assert "none of 1 images could be segmented" in capsys.readouterr().err
    tifffile.imwrite(photos / "01.tif", np.full((16, 16, 3), 1e38, np.float32), photometric="rgb")
    assert predict(tmp_path / "model", photos, tmp_path / "maps") == 2
    assert "are missing pixels a huge number? Give --nodata" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()  # so that the same command can do so


def test_images_here_and_elsewhere_are_mapped_together(tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 1)
    memory.pipe_file("/away/00.jpg", (photos / "00.jpg").read_bytes())
    assert predict(tmp_path / "model", photos, tmp_path / "maps", "memory://away") == 0
    here, away = sorted((tmp_path / "maps").rglob("*.png"), key=lambda path: "away" in path.parts)
    assert away == tmp_path / "maps" / "memory:" / "away" / "00.png" and here.is_relative_to(tmp_path / "maps")
    assert here.read_bytes() == away.read_bytes()


# Models that may stop


@pytest.fixture(scope="module")
def anytime(pretrained: Path, tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "anytime"
    words = {"model__head": "anytime", "model__tau": 0.9, "optim__base_lr": 0.3, "epochs": 12, "log__eval_epochs": 4}
    assert segment(tiles, out, model__init=pretrained, model__drop_path_rate=0.1, **words) == 0
    runs.forget_accelerator()
    return out


def test_a_pyramid_goes_on_where_it_is_kept(segmented: Path, tiles: Path, tmp_path: Path) -> None:
    given = {"model__init": segmented, "model__keep_head": True, "data__class_names": "dark,bright", "epochs": 1}
    assert segment(tiles, tmp_path / "more", **given, optim__base_lr=1e-30, optim__min_lr=0) == 0
    heads = [read_segmenter(place)[0].head.state_dict() for place in (segmented, tmp_path / "more" / "last")]
    assert_same(*heads)


def test_a_head_goes_on_where_it_is_kept(
    anytime: Path, tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"model__init": anytime, "model__keep_head": True, "epochs": 1, "optim__base_lr": 1e-30}
    given |= {"optim__min_lr": 0, "model__head": "anytime", "model__tau": 0.9}
    assert segment(tiles, tmp_path / "more", **given) == 0
    assert "the encoder alone is taken" not in capsys.readouterr().err
    heads = [read_segmenter(place)[0].head.state_dict() for place in (anytime, tmp_path / "more" / "last")]
    assert_same(*heads)
    assert (metrics(tmp_path / "more")[-1]["miou"]) > 0.8
    for setting, has in (
        ({"model__head": "pyramid", "model__tau": "none"}, "pyramid of 8"),
        ({"model__head_dim": 16}, "anytime of 16"),
    ):
        runs.forget_accelerator()
        assert segment(tiles, tmp_path / "other", **given | setting) == 2
        error = capsys.readouterr().err
        assert f"which has anytime of 8 channels for 0, 1, where the settings make {has} channels for 0, 1" in error
    runs.forget_accelerator()
    assert segment(tiles, tmp_path / "other", **{k: v for k, v in given.items() if k != "model__tau"}) == 2
    assert "model.keep_head: give model.tau = 0.9, which model.init =" in capsys.readouterr().err
    runs.forget_accelerator()
    del given["model__init"]
    assert segment(tiles, tmp_path / "other", **given, model__variant=runs.TINY) == 2
    assert "model.keep_head: it takes the head that init has: give --init" in capsys.readouterr().err


def test_an_anytime_model_learns_and_keeps_its_thresholds(anytime: Path, tiles: Path, tmp_path: Path) -> None:
    assert metrics(anytime)[-1]["miou"] > 0.8
    model, _, record = read_segmenter(anytime)
    assert isinstance(model, Anytime) and (model.head.tau, model.head.quantile, model.head.dim) == (0.9, 0.0, 8)
    assert (record.kind, record.tau, record.quantile) == ("anytime", 0.9, 0.0)
    best = max(line["miou"] for line in metrics(anytime) if "miou" in line)
    found = []
    for tau in ({}, {"model__tau": 0.0}):
        assert segment(tiles, tmp_path / str(len(found)), model__init=anytime, eval_only="true", **tau) == 0
        found.append(metrics(tmp_path / str(len(found)))[0]["miou"])
        runs.forget_accelerator()
    assert found[0] == pytest.approx(best, abs=1e-6) and found[1] != found[0]


def test_answers_come_one_by_one_from_python(anytime: Path, segmented: Path) -> None:
    model = fcmae.load(anytime)
    assert isinstance(model, fcmae.api.Segmented) and model.class_names == ("0", "1")
    images = torch.randint(256, (1, 3, 16, 24), dtype=torch.uint8)
    answers = list(model.anytime(images, tau=1.0))
    assert len(answers) == 4 and [answer.pixels().shape for answer in answers] == [(1, 2, 16, 24)] * 4
    model.model.head.tau = 1.0
    assert torch.equal(model.maps(images), answers[-1].pixels())
    plain = fcmae.load(segmented)
    assert isinstance(plain, fcmae.api.Segmented) and plain.maps(images).shape == (1, 2, 16, 24)
    with pytest.raises(ValueError, match=r"^images: 23 is not a multiple of the total stride"):
        plain.maps(images[..., :23])
    with pytest.raises(ValueError, match=r"train one with model\.head anytime"):
        next(plain.anytime(images))


@pytest.mark.parametrize("flag", ["--tau=1", "--budget=.5", "--limit_ms=.001"])
def test_prediction_may_stop_by_confidence_budget_or_time(
    flag: str, anytime: Path, tiles: Path, tmp_path: Path
) -> None:
    assert predict(anytime, tiles / "images", tmp_path / "maps", flag, "--probabilities", "true") == 0
    found = tifffile.imread(tmp_path / "maps" / "00.probabilities.tif")
    model, weights, _ = read_segmenter(anytime)
    arguments = {"--tau=1": {"tau": 1.0}, "--budget=.5": {"budget": 0.5}, "--limit_ms=.001": {"limit_s": 0.0}}[flag]
    normalize = weights.reading("").normalize
    tile = predictor(model.eval(), normalize, Accelerator(cpu=True), arguments.get("tau"), arguments.get("budget"))
    with (tiles / "images" / "00.png").open("rb") as file:
        raster = Raster(file, 3, [0.0] * 3, 10**6)
        mean = normalize.mean.flatten().tolist()
        rows = probabilities_by_rows(raster, tile, (16, 16), 8, 0.5, mean, 64, arguments.get("limit_s", np.inf))
        expected = np.concatenate([strip.probabilities for strip in rows], axis=1)
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=1e-6)


@pytest.mark.parametrize("flag", ["--tau=.9", "--budget=.5", "--limit_ms=5"])
def test_what_cannot_stop_is_told(
    flag: str, segmented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(segmented, write_images(tmp_path / "photos", 1), tmp_path / "maps", flag) == 2
    assert "tau, budget and limit_ms are for models with model.head anytime" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model__tau", "model__quantile"])
def test_a_threshold_is_for_what_has_exits(
    key: str, segmented: Path, tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(tiles, tmp_path / "run", model__init=segmented, eval_only="true", **{key: 0.5}) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "model.tau and model.quantile are for models with model.head anytime" in said


def test_settings_of_what_may_stop_are_checked(tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(tiles, tmp_path / "run", model__tau=0.9) == 2
    assert "model.tau: it is for anytime, and model.head is pyramid" in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert predict(tmp_path, tiles, tmp_path / "maps", "--tau=.9", "--budget=.5") == 2
    assert "a budget takes the place of tau" in capsys.readouterr().err


def test_from_python(pretrained: Path, tiles: Path, tmp_path: Path) -> None:
    settings = {"device": "cpu", "data.image_size": 16, "data.num_workers": 0, "batch_size": 4, "epochs": 1}
    run = fcmae.segment(
        tiles / "images", tiles / "maps", tmp_path / "run", init=pretrained,
        settings=settings | {"log.trackers": "none", "model.head_dim": 8},
    )  # fmt: skip
    assert run.finished and run.kind == "segment" and "miou" in run.metrics()[-1]
    assert checkpoint.latest(run.path) is not None


def test_tiles_that_the_stages_do_not_divide_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model")
    photos = write_images(tmp_path / "photos", 1)
    assert predict(tmp_path / "model", photos, tmp_path / "maps", "--image_size", "60") == 2
    assert "is not a multiple of the total stride 8: use" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


def test_an_image_whose_probabilities_are_not_finite_has_no_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model", in_chans=1)
    heights = np.random.default_rng(0).random((2, 48, 40)).astype(np.float32)
    heights[1, 5, 5] = -3.4e38  # missing, and no tag says so
    (tmp_path / "scenes").mkdir()
    for name, values in zip(("good", "holed"), heights, strict=True):
        tifffile.imwrite(tmp_path / "scenes" / f"{name}.tif", values)
    maps = tmp_path / "maps"
    assert predict(tmp_path / "model", tmp_path / "scenes", maps, "--probabilities", "true") == 1
    assert "holed.tif: its probabilities are not finite: " in capsys.readouterr().err
    assert sorted(path.name for path in maps.iterdir()) == ["good.probabilities.tif", "good.tif"]
    again = tmp_path / "again"
    assert predict(tmp_path / "model", tmp_path / "scenes", again, "--nodata", "-3.4e38") == 0
    assert sorted(path.name for path in again.iterdir()) == ["good.tif", "holed.tif"]


def test_no_file_is_written_for_two_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("00.png", "00.tif"):
        Image.new("RGB", (40, 48), "red").save(photos / name)
    maps = tmp_path / "maps"
    assert predict(tmp_path / "model", photos, maps, "--probabilities", "true") == 1
    assert "00.probabilities.tif is of another image" in capsys.readouterr().err
    assert sorted(path.name for path in maps.iterdir()) == ["00.png", "00.probabilities.tif"]
    assert predict(tmp_path / "model", photos, tmp_path / "both") == 0
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["00.png", "00.tif"]


def test_held_out_maps_without_a_known_pixel_are_no_score(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "maps").mkdir()
    for path in (tiles / "maps").iterdir():
        with Image.open(path) as known:
            Image.new("L", known.size, 255).save(tmp_path / "maps" / path.name)
    shutil.copytree(tiles / "images", tmp_path / "images")
    words = {"data__val_path": tmp_path / "images", "data__val_maps": tmp_path / "maps"}
    assert segment(tiles, tmp_path / "run", **words) == 2
    assert "no pixel of the 12 held-out label maps has a class: hold out others" in capsys.readouterr().err


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that is made on the CPU."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            self.most = max(self.most, found.numel())
        return found


def test_a_record_of_a_huge_head_makes_none(tmp_path: Path) -> None:
    save(tmp_path / "model")
    file = tmp_path / "model" / HEAD
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()[RECORD])
    huge = HeadRecord(**record | {"dim": 512, "kind": "upernet", "sha256": ""})
    huge = replace(huge, sha256=digest({}, segmenters._text(huge)))
    save_file({}, file, {RECORD: json.dumps(asdict(huge))})
    with Largest() as largest, pytest.raises(ValueError, match="cannot be used"):
        read_segmenter(tmp_path / "model")
    assert 0 < largest.most < 100_000


def test_images_that_are_learnt_from_are_not_held_out(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"data__val_path": tiles / "images", "data__val_maps": tiles / "maps"}
    assert segment(tiles, tmp_path / "run", **words) == 2
    assert "data.val_path: 12 of the 12 images held out, such as" in capsys.readouterr().err
