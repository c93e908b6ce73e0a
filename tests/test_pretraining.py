"""Whole runs: what they write, that they resume to the last bit, and how they end when something goes wrong."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import runs
import torch
from conftest import requires_minkowski
from PIL import Image
from runs import (
    TIMINGS,
    assert_same,
    at_step,
    config,
    final_state,
    flags,
    kill_self,
    losses,
    run_out_of_memory,
    start,
    tensors,
    write_images,
)
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import fcmae
from fcmae import cli, pretraining
from fcmae.config import PretrainConfig
from fcmae.data.augment import CropAndFlip
from fcmae.data.find import find_images
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import epoch_order
from fcmae.data.split import split
from fcmae.layouts import make_layout
from fcmae.masked import WeightedLoss, build_fcmae, pixels, weighted_loss
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import DropPath
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import read
from fcmae.training import checkpoint, health
from fcmae.training.micro_batches import settle_grad_accum
from fcmae.training.records import read_metrics
from fcmae.weights.files import read_weights
from fcmae.weights.formats import OLD, rename

STEPS = 9  # of runs.flags: 3 epochs of 3 steps


pytestmark = pytest.mark.usefixtures("one_thread", "forgotten", "undrawn")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, of `runs.flags`, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    prepare = partial(_tell_of_the_compiler, out.with_suffix(".compiler"))
    process = start(["pretrain", *flags(images, out)], out.with_suffix(".txt"), prepare=prepare)
    process.join()
    assert process.exitcode == 0, out.with_suffix(".txt").read_text()
    return out


def _tell_of_the_compiler(path: Path) -> None:
    """Write at the end of this process whether it has loaded what makes CUDA graphs, and the compiler with it."""
    atexit.register(lambda: path.write_text(str("torch._inductor.cudagraph_trees" in sys.modules)))


def test_a_run_that_compiles_nothing_does_not_load_the_compiler(uninterrupted: Path) -> None:
    assert uninterrupted.with_suffix(".compiler").read_text() == "False"


def run(images: Path, out: Path, **changed: Any) -> int:
    """`fcmae pretrain`, in this process; returns its exit status."""
    return cli.main(["pretrain", *flags(images, out, **changed)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_is_compiled_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What is tried before training has the autocast of training."""
    counter, compiled = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, mode=None: compiled(net, backend=counter))
    assert run(images, tmp_path / "out", model__compile="true", precision=precision, epochs=1) == 0
    assert counter.frame_count == 1


def assert_equal_runs(actual: Path, expected: Path) -> None:
    """The same weights, moments, step counts and losses, to the last bit; every step is in metrics.jsonl once."""
    assert_same(final_state(actual), final_state(expected))
    assert losses(actual) == losses(expected)


# Where a run starts


@pytest.mark.parametrize("in_chans", [3, 1])
def test_a_run_goes_on_from_anothers_weights(uninterrupted: Path, images: Path, tmp_path: Path, in_chans: int) -> None:
    """At a learning rate of nothing, its first checkpoint still holds what it started from."""
    options = {"init": uninterrupted, "optim__base_lr": 1e-30, "epochs": 1, "data__in_chans": in_chans, "seed": 5}
    assert run(images, tmp_path / "out", **options) == 0  # --init is short for --model.init
    found, given = final_state(tmp_path / "out"), final_state(uninterrupted)
    encoder = [name for name in given if name.startswith("model:encoder.")]
    stem = "model:encoder.downsample_layers.0.0.weight"
    assert len(encoder) > 40
    for name in encoder:
        if in_chans == 1 and name == stem:
            torch.testing.assert_close(found[name], given[name].sum(1, keepdim=True))
        else:
            assert torch.equal(found[name], given[name]), name
    assert torch.equal(found["model:decoder.mask_token"], given["model:decoder.mask_token"]) == (in_chans == 3)
    log = (tmp_path / "out" / "train.log").read_text()
    assert "start: encoder from ConvNeXt V2 of depths 1-1-1-1, dims 8-8-8-8, stem stride 1 in fcmae's layout" in log
    assert ("; decoder too" if in_chans == 3 else "; a fresh decoder") in log


def test_only_the_decoder_learns_at_first(uninterrupted: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"model__init": uninterrupted, "model__freeze_encoder_steps": 6}
    assert run(images, out, **options, checkpoint__keep=9) == 0
    given = tensors(uninterrupted / "checkpoints" / "step-00000009")
    moved = {}
    for step in (3, 6, 9):
        state = tensors(out / "checkpoints" / f"step-{step:08d}")
        changed = {name for name in given if name.startswith("model:") and not torch.equal(state[name], given[name])}
        moved[step] = {name.removeprefix("model:") for name in changed}
    assert all(name.startswith("decoder.") for name in moved[3] | moved[6])
    assert {"decoder.pred.weight", "decoder.proj.weight", "decoder.mask_token"} <= moved[3]
    assert any(name.startswith("encoder.") for name in moved[9])


def test_a_start_that_does_not_fit_writes_nothing(
    uninterrupted: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    other = {"model__stem_stride": 2, "model__mask_patch": 16, "data__image_size": 32}
    assert run(images, out, model__init=uninterrupted, **other) == 2
    assert "set model.variant and model.stem_stride to those of model.init" in capsys.readouterr().err
    assert run(images, out, model__init=tmp_path / "nowhere") == 2
    assert "nowhere does not exist: give a run" in capsys.readouterr().err
    assert run(images, out, model__init=uninterrupted, model__freeze_encoder_steps=9) == 2
    assert "but the run has 9 steps: its encoder would never learn" in capsys.readouterr().err
    assert run(images, out, model__freeze_encoder_steps=3) == 2
    assert "model.freeze_encoder_steps: 3 freezes an encoder that has learnt nothing" in capsys.readouterr().err
    assert not out.exists()


def test_a_resumed_run_no_longer_needs_what_it_started_from(
    uninterrupted: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "init")
    options = {"model__init": tmp_path / "init", "model__freeze_encoder_steps": 6}
    assert run(images, tmp_path / "whole", **options) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill_self(signal.SIGTERM))
        assert run(images, tmp_path / "cut", **options) == 143
    shutil.rmtree(tmp_path / "init")
    assert run(images, tmp_path / "cut", **options) == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


@requires_minkowski
def test_a_run_may_switch_its_backend(
    uninterrupted: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for backend, stop_at in (("minkowski", 4), ("masked", 7), ("minkowski", None)):
        with monkeypatch.context() as patch:
            if stop_at is not None:
                at_step(patch, stop_at, kill_self(signal.SIGTERM))
            assert run(images, out, model__backend=backend) == (0 if stop_at is None else 143)
    # The same sums in another order, through nine steps at a learning rate that moves every weight.
    assert [step for step, _ in losses(out)] == [step for step, _ in losses(uninterrupted)]
    found, expected = (torch.tensor([loss for _, loss in losses(path)]) for path in (out, uninterrupted))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


# What a run writes


@pytest.mark.usefixtures("drawn")
def test_a_run_writes_settings_logs_pictures_and_checkpoints(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"log__eval_epochs": 1, "log__trackers": "tensorboard", "data__val_share": 0.3, "epochs": 4}
    cfg = config(images, out, checkpoint__keep=1, checkpoint__milestone_epochs=2, **options)
    pretraining.pretrain(cfg)
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", "environment.json", "files.json", "train.log", "metrics.jsonl", "loss.png", ".lock", ".saved"),
        *("checkpoints", "reconstructions", "tensorboard"),
    }
    assert read(PretrainConfig, out / "config.yaml") == settle_grad_accum(cfg, 1, "cpu")
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        *("step-00000004", "step-00000006", "step-00000008")
    ]
    pictures = [f"step-0000000{step}.png" for step in (2, 4, 6, 8)]
    assert [path.name for path in sorted((out / "reconstructions").iterdir())] == ["over-time.png", *pictures, "tiles"]
    assert [path.name for path in sorted((out / "reconstructions" / "tiles").iterdir())] == pictures
    with Image.open(out / "reconstructions" / "step-00000008.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 10

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert training[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", *TIMINGS}
    assert [line["epoch"] for line in training] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    # base_lr .5 for 256 images is 1/128 for 4; warm-up over 2 steps, then half a cosine over 6.
    assert [line["lr"] * 128 for line in training[:4]] == pytest.approx([0, 0.5, 1, (1 + np.sqrt(0.75)) / 2])
    validation = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validation] == [2, 4, 6, 8]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard" / "fcmae"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert events.Scalars("val_loss")[-1].value == pytest.approx(validation[-1]["val_loss"])
    assert [event.step for event in events.Images("reconstructions")] == [2, 4, 6, 8]

    log = (out / "train.log").read_text()
    assert "dims 8-8-8-8, stem stride 1: 9 training images, 4 held out" in log
    assert "8 steps of 4 images on 1 x cpu in fp32" in log
    assert re.search(r"4 images at once in each process: not measured, checkpoints take up to \d MB of [\d,.]+ GB", log)
    assert "step 8/8, epoch 4.00, loss" in log  # plain lines: there is no terminal here


def test_the_validation_loss_is_of_the_same_pixels_under_the_same_masks_each_time(images: Path, tmp_path: Path) -> None:
    # Weights that hardly move: what changes between evaluations could only be the images, the masks or what is dropped.
    settings = {"optim__base_lr": 1e-30, "log__eval_epochs": 1, "data__val_share": 0.3, "model__drop_path_rate": 0.5}
    assert run(images, tmp_path / "out", **settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len({line["loss"] for line in lines if "loss" in line}) > 3


def test_a_device_that_starves_is_warned_of_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(images, tmp_path / "toy") == 0  # its steps take milliseconds: nothing to speak of
    assert "data starves the device" not in (tmp_path / "toy" / "train.log").read_text()
    monkeypatch.setattr(health, "STARVED_S", 0)
    monkeypatch.setattr(health, "STARVED_SHARE", -1)
    assert run(images, tmp_path / "out") == 0
    assert (tmp_path / "out" / "train.log").read_text().count("data starves the device: it waited for images") == 1


def test_the_log_says_what_was_left_out_and_what_is_far_from_the_mean(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 13)
    (tmp_path / "images" / "1.gif").touch()
    far = {"data__mean": [0.4] * 3, "data__std": [0.01] * 3}
    assert run(tmp_path / "images", tmp_path / "out", epochs=1, optim__warmup_epochs=0, **far) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "data.path: files left out, as their names are not those of images: 1 .gif (" in log
    assert log.count("far from the mean 0.4 and std 0.01 that") == 1


def test_images_larger_than_max_pixels_are_not_used(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, tmp_path / "out", data__max_pixels=100) == 2
    assert "20 x 24 pixels, more than max_pixels = 100 allows" in capsys.readouterr().err
    assert run(images, tmp_path / "other", data__max_pixels=480, epochs=1, optim__warmup_epochs=0) == 0


def test_missing_values_are_in_the_loss_of_no_step_and_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network sees 0 there, and the objective is told."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        image = np.random.default_rng(number).random((24, 24, 2), np.float32)
        image[:, : 4 + number] = np.nan
        np.save(tmp_path / f"images/{number}.npy", image)
    seen = list[bool]()

    def loss(model: Any, images: torch.Tensor, *args: Any, known: torch.Tensor | None, **options: Any) -> WeightedLoss:
        assert known is not None and known.any() and not known.all()
        assert images[~known].abs().min() < 1e-6
        seen.append(torch.is_grad_enabled())
        return weighted_loss(model, images, *args, known=known, **options)

    monkeypatch.setattr(pretraining, "weighted_loss", loss)
    other = np.random.default_rng(9).random((24, 24, 2), np.float32)
    other[20:] = -7
    np.save(tmp_path / "images/9.npy", other)
    two = {
        "data__nodata": -7,
        "data__in_chans": 2,
        "data__mean": [0.5, 0.5],
        "data__std": [0.3, 0.3],
        "data__val_share": 0.3,
    }
    assert run(tmp_path / "images", tmp_path / "out", **two, epochs=2, optim__warmup_epochs=0) == 0
    assert any(seen) and not all(seen)


@pytest.mark.parametrize("target", ["pixels", "hog"])
def test_with_missing_values_the_step_is_that_of_the_whole_batch_however_it_is_divided(
    tmp_path: Path, target: str
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(8):
        image = np.random.default_rng(number).normal(number % 2, 1, (24, 24, 1)).astype(np.float32)
        image[:, : 20 * (number % 2)] = np.nan  # of every second one hardly anything is known
        np.save(tmp_path / f"images/{number}.npy", image)
    one = {"data__in_chans": 1, "data__mean": "0.5", "data__std": "1", "data__val_share": 0, "model__target": target}
    found = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        given = {"batch_size": 8, "epochs": 1, "grad_accum": parts, "optim__warmup_epochs": 0, "optim__weight_decay": 0}
        assert run(tmp_path / "images", out, **one, **given) == 0
        runs.forget_accelerator()
        (line,) = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        found.append((line["loss"], line["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def logs_in(folder: Path) -> list[Path]:
    """Of the two processes of a run."""
    return [folder / f"{rank}.log" for rank in range(2)]


def test_with_missing_values_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Of what the second process sees hardly anything is known."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        image = np.random.default_rng(number).normal(0, 1, (24, 24, 1)).astype(np.float32)
        np.save(tmp_path / f"images/{number}.npy", image)
    order = epoch_order(8, 0, 0)  # all in one step, of which the second process reads the last four
    for number in order[4:]:
        image = np.load(tmp_path / f"images/{number}.npy")
        image[:, :20] = np.nan
        np.save(tmp_path / f"images/{number}.npy", image)
    one = {"data__in_chans": 1, "data__mean": "0.5", "data__std": "1", "data__val_share": 0, "batch_size": 8}
    one |= {"epochs": 2, "optim__warmup_epochs": 0, "log__every_steps": 1}
    started = runs.start_pair(["pretrain", *flags(tmp_path / "images", tmp_path / "two", **one)], logs_in(tmp_path))
    assert runs.ended(started) == [0, 0], logs_in(tmp_path)[0].read_text()
    assert run(tmp_path / "images", tmp_path / "one", **one) == 0
    found = [
        [
            (line["loss"], line["grad_norm"])
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if "loss" in line
        ]
        for name in ("one", "two")
    ]
    assert len(found[0]) == 2
    for line, other in zip(*found, strict=True):
        assert other == pytest.approx(line, rel=1e-4)


def test_seeds_begin_with_other_weights_crops_and_masks(images: Path, tmp_path: Path) -> None:
    files = find_images([str(images)])
    nets, samples = [], []
    for seed in (0, 1):
        cfg = config(images, tmp_path / "out", seed=seed)
        nets.append(pretraining.build_model(cfg).encoder.state_dict())
        samples.append(pretraining.build_dataset(cfg, files, augment=True)[(0, 0)])
    name = next(name for name, value in nets[0].items() if value.ndim > 1)
    assert not torch.equal(nets[0][name], nets[1][name])
    assert not np.array_equal(samples[0].masks, samples[1].masks)
    assert not np.array_equal(samples[0].image, samples[1].image)


def test_the_gradient_is_that_of_the_mean_over_what_is_known(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = pretraining.weighted_loss
    monkeypatch.setattr(
        pretraining,
        "weighted_loss",
        lambda *args, **more: WeightedLoss(loss_of(*args, **more).mean, torch.tensor(0.25)),
    )
    assert run(images, tmp_path / "out", epochs=1, optim__warmup_epochs=0) == 0
    runs.forget_accelerator()
    monkeypatch.undo()
    assert run(images, tmp_path / "whole", epochs=1, optim__warmup_epochs=0) == 0
    first, whole = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("out", "whole"))
    assert (first["loss"], first["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-5)


def test_held_out_images_count_by_what_is_known_of_them_however_they_are_divided(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(8):
        image = np.random.default_rng(number).normal(number % 2, 1, (24, 24, 1)).astype(np.float32)
        image[:, : 20 * (number % 2)] = np.nan  # of every second one hardly anything is known
        np.save(tmp_path / f"images/{number}.npy", image)
    one = {"data__in_chans": 1, "data__mean": "0.5", "data__std": "1", "data__val_share": 0.5, "optim__base_lr": 1e-9}
    found = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        assert run(tmp_path / "images", out, **one, grad_accum=parts, epochs=1, optim__warmup_epochs=0) == 0
        last = (out / "metrics.jsonl").read_text().splitlines()[-1]
        found.append(json.loads(last)["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_evaluations_may_come_before_the_first_line_of_the_log(images: Path, tmp_path: Path) -> None:
    options = {"log__eval_epochs": 0.34, "log__every_steps": 99, "data__val_share": 0, "checkpoint__every_epochs": 9}
    assert run(images, tmp_path / "out", epochs=1, **options) == 0
    assert (tmp_path / "out" / "reconstructions" / "step-00000002.png").exists()


def test_a_run_that_ends_in_its_first_evaluation_begins_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"log__eval_epochs": 0.34, "log__every_steps": 99, "checkpoint__every_epochs": 9}
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "draw_over_time", _is_killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(images, tmp_path / "out", epochs=1, **options)
    assert (tmp_path / "out" / "loss.png").exists()
    assert run(images, tmp_path / "out", epochs=1, **options) == 0


def _is_killed(*_: object) -> None:
    raise RuntimeError("killed")


def test_a_warm_up_as_long_as_the_run_is_warned_of(images: Path, tmp_path: Path) -> None:
    assert run(images, tmp_path / "out", optim__warmup_epochs=3) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "the learning rate never reaches its peak of 0.00781: the warm-up takes 3 epochs and the run has 3" in log


def test_reduced_precision_trains(images: Path, tmp_path: Path) -> None:
    assert run(images, tmp_path / "out", precision="bf16", epochs=1) == 0
    assert "in bf16" in (tmp_path / "out" / "train.log").read_text()
    assert {value.dtype for value in final_state(tmp_path / "out").values()} == {torch.float32}
    assert run(images, tmp_path / "full", precision="fp32", epochs=1) == 0
    rounded, full = ([loss for _, loss in runs.losses(tmp_path / name)] for name in ("out", "full"))
    assert rounded == pytest.approx(full, rel=0.02)
    assert all(value != other for value, other in zip(rounded, full, strict=True))


def test_a_model_of_the_caller_s_own_is_read_by_its_own_numbers(images: Path, tmp_path: Path) -> None:
    own = ConvNeXtSpec(depths=(1, 2), dims=(8, 12), stem_stride=2)
    cfg = config(
        images, tmp_path / "run", epochs=1, model__variant="{depths: [1, 1], dims: [8, 8]}", model__stem_stride=2
    )
    assert cfg.model.spec.total_stride == own.total_stride
    pretraining.pretrain(cfg, build_fcmae(Encoder(own, 3), 8))
    weights = read_weights(tmp_path / "run")
    assert weights.architecture.spec == own and "encoder.stages.1.1.dwconv.weight" in weights.state
    with pytest.raises(ValueError, match=r"data\.in_chans is 3, and the model's encoder has 2"):
        pretraining.pretrain(cfg.model_copy(update={"out": tmp_path / "two"}), build_fcmae(Encoder(own, 2), 8))
    coarse = Encoder(ConvNeXtSpec(depths=(1, 2), dims=(8, 12), stem_stride=3), 3)
    with pytest.raises(ValueError, match=r"model\.mask_patch is 8, no multiple of 6, the stride of"):
        pretraining.pretrain(cfg.model_copy(update={"out": tmp_path / "two"}), build_fcmae(coarse, 8))
    pooled = build_fcmae(Encoder(own, 3), 8, make_layout=partial(make_layout, "packed", grn_scope="batch"))
    with pytest.raises(ValueError, match=r"model\.grn_scope is 'image', and the model's layout has 'batch': set it"):
        pretraining.pretrain(cfg.model_copy(update={"out": tmp_path / "two"}), pooled)
    assert not (tmp_path / "two").exists()


def test_a_model_that_is_trained_twice_has_the_precision_of_each_run(images: Path, tmp_path: Path) -> None:
    spec = ConvNeXtSpec(depths=(1, 2), dims=(8, 12), stem_stride=2)
    net = build_fcmae(Encoder(spec, 3), 8)
    seen = list[torch.dtype]()
    net.decoder.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    attributes = set(vars(net))
    options = {"epochs": 1, "model__variant": "{depths: [1, 1], dims: [8, 8]}", "model__stem_stride": 2}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        pretraining.pretrain(config(images, out, precision=precision, **options), net)
        runs.forget_accelerator()
        assert set(seen) == {dtype} and set(vars(net)) == attributes


def test_settings_reach_what_they_are_for(images: Path, tmp_path: Path) -> None:
    """Those that no other test has at another value than the default."""
    given = {"data__hflip": 0.25, "data__vflip": 0.75, "data__crop_scale": "0.3,0.6"}
    given |= {"model__mask_ratio": 0.25, "model__target": "pixels"}
    given |= {"model__normalize_target": "false", "model__drop_path_rate": 0.5, "model__decoder_depth": 2}
    given |= {"model__grad_checkpointing": "true", "optim__weight_decay": 0.125, "optim__betas": "0.7,0.8"}
    cfg = config(images, tmp_path, **given)
    data = pretraining.build_dataset(cfg, find_images([str(images)]), augment=True)
    crop = data._view
    assert isinstance(crop, CropAndFlip) and (crop.hflip, crop.vflip) == (0.25, 0.75)
    assert crop.crop_scale == (0.3, 0.6)
    assert data.visible == 3  # of 4 patches
    net = pretraining.build_model(cfg)
    assert net.target is pixels and len(net.decoder.blocks) == 2 and net.encoder.grad_checkpointing
    rates = [module.rate for module in net.encoder.modules() if isinstance(module, DropPath)]
    assert max(rates) == 0.5
    optimizer = pretraining.build_optimizer(cfg, net)
    assert optimizer.defaults["betas"] == (0.7, 0.8)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.125}


# The same training, however it is computed


def test_accumulated_parts_train_as_the_whole_batch(uninterrupted: Path, images: Path, tmp_path: Path) -> None:
    assert run(images, tmp_path / "out", grad_accum=2, epochs=3) == 0
    # Sums in another order: float32 rounding, amplified by Adam over 9 steps.
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(uninterrupted), rtol=1e-5)


def test_several_masks_an_image_take_more_steps_over_the_same_images_and_resume(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 images of which each step takes 2, under 2 masks each: 6 steps an epoch instead of 3."""
    options = {"data__masks_per_image": 2, "data__val_share": 0.1}
    assert run(images, tmp_path / "whole", **options) == 0
    log = (tmp_path / "whole" / "train.log").read_text()
    assert "18 steps of 4 images on" in log
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "loss" in line][5::6] == [1, 2, 3]
    with monkeypatch.context() as patch:
        at_step(patch, 8, kill_self(signal.SIGTERM))
        assert run(images, tmp_path / "cut", **options) == 143
    assert list(checkpoint.steps(tmp_path / "cut")) == [6, 8]
    assert run(images, tmp_path / "cut", **options, data__num_workers=1) == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")
    # In two parts of an image each: the same sums in another order.
    assert run(images, tmp_path / "parts", **options, grad_accum=2) == 0
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-5)
    # What is trained is another: it may not change on resuming.
    assert run(images, tmp_path / "whole", data__val_share=0.1) == 2


@pytest.mark.parametrize("after_backward", [False, True])
def test_a_step_without_memory_is_taken_again_in_smaller_parts_and_nothing_is_lost(
    uninterrupted: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_backward: bool
) -> None:
    """Its weights are the undisturbed run's up to rounding, and to the bit those of one that changes its parts."""
    whole, dropping = tmp_path / "whole", {"model__drop_path_rate": 0.5}
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, [6], after_backward)  # the only part of step 6
        assert run(images, whole, data__num_workers=1) == 0
    for name, value in final_state(uninterrupted).items():
        torch.testing.assert_close(final_state(whole)[name], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses(whole), losses(uninterrupted), rtol=1e-5)

    parts, changed = tmp_path / "parts", tmp_path / "changed"
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, [10], after_backward)  # the second of two parts of step 5
        assert run(images, parts, grad_accum=2, **dropping) == 0
    interrupted(images, changed, grad_accum=2, **dropping)
    assert run(images, changed, grad_accum=4, **dropping) == 0
    assert_equal_runs(parts, changed)
    said = (
        "step 5: the memory of the GPU does not suffice for 2 images: it is taken again with 1 at once, as are those to"
    )
    assert (parts / "train.log").read_text().count(said) == 1


def test_a_run_goes_on_in_the_smaller_parts_that_it_was_found_to_need(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, [2], after_backward=True)
        interrupted(images, out)
    assert checkpoint.read_meta(out / "checkpoints" / "step-00000004").config["grad_accum"] == 2
    assert run(images, out) == 0
    log = (out / "train.log").read_text()
    assert log.count("2 images at once, as more did not fit into the memory before: grad_accum = 2") == 1
    # On another device it starts with what it is given.
    monkeypatch.setattr("fcmae.training.records.cpu_name", lambda: "another")
    assert run(images, out, epochs=3) == 0
    assert (out / "train.log").read_text().count("images at once, as more did not fit") == 1


@pytest.mark.parametrize(
    ("settings", "calls", "at_once"),
    [({"grad_accum": 2}, [1, 2], 1), ({"model__grn_scope": "batch"}, [1], 4)],
)
def test_a_step_that_cannot_be_made_smaller_is_a_sentence_with_a_way_out(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    calls: list[int],
    at_once: int,
) -> None:
    run_out_of_memory(monkeypatch, calls, after_backward=False)
    assert run(images, tmp_path / "out", **settings) == 2
    error = capsys.readouterr().err
    assert (
        f"step 1: the memory of the GPU does not suffice for {at_once} images at once, and the run cannot be" in error
    )
    assert "try --model.grad_checkpointing true, a smaller data.image_size or model.variant" in error


def test_memory_that_lacks_elsewhere_is_a_sentence_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr("fcmae.training.steps.start_update", fail)
    assert run(images, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in error and "raise grad_accum" in error


def _lack_memory(rank: int) -> None:
    calls = [1, 9] if rank == 1 else []  # the first part of step 1, the last of step 2
    runs.run_out_of_memory(pytest.MonkeyPatch(), calls, after_backward=False)


def test_a_process_that_lacks_memory_while_gradients_are_exchanged_ends_all_and_the_run_goes_on_in_smaller_parts(
    tmp_path: Path,
) -> None:
    """A part before the exchange is taken again; within it the others wait."""
    images, out = write_images(tmp_path / "images", 16), tmp_path / "out"
    settings = {"batch_size": 16, "data__val_share": 0, "grad_accum": 2, "epochs": 3, "optim__warmup_epochs": 0}
    logs = logs_in(tmp_path)
    started = runs.start_pair(["pretrain", *flags(images, out, **settings)], logs, _lack_memory)
    assert 0 not in (statuses := runs.ended(started)) and None not in statuses
    sentence = "suffice for 2 images, and other processes wait for it: the same command goes on with 1 at once"
    for log in logs:
        assert any(line.startswith("fcmae: error") and line.endswith(sentence) for line in log.read_text().splitlines())
    (before,) = read_metrics(out / "metrics.jsonl")
    assert run(images, out, **settings) == 0
    assert (
        "1 images at once, as more did not fit into the memory before: grad_accum = 16"
        in (out / "train.log").read_text()
    )
    first = read_metrics(out / "metrics.jsonl")[0]
    assert (before["loss"], before["grad_norm"]) == pytest.approx((first["loss"], first["grad_norm"]), rel=1e-4)


def test_a_run_whose_grn_pools_over_the_batch_goes_on_with_as_many_images_at_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pooled = tmp_path / "out", {"model__grn_scope": "batch", "grad_accum": 2}
    interrupted(images, out, **pooled)
    assert run(images, out, model__grn_scope="batch", grad_accum=1) == 2
    error = capsys.readouterr().err
    assert "model.grn_scope = batch pools over 4 images, and the run did over 2: choose grad_accum and" in error
    assert run(images, out, model__grn_scope="batch") == 0  # auto is the run's own
    assert read(PretrainConfig, out / "config.yaml").grad_accum == 2
    interrupted(images, tmp_path / "image", grad_accum=2)
    assert run(images, tmp_path / "image") == 0


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """By the real launcher and script. Images that only the second process fails to read are reported too."""
    images = write_images(tmp_path / "images", 12)
    train, held_out = split(find_images([str(images)]), 0.3, seed=0)
    # Of each step's four images the second process reads the last two, and of those held out every second.
    bad = {train.name(epoch_order(len(train), 0, 0)[3]), held_out.name(1)}
    for path in bad:
        Path(path).write_bytes(b"not an image")
    options = {"epochs": 1, "optim__warmup_epochs": 0, "optim__clip_grad": 0.04, "optim__base_lr": 0.1}
    options |= {"data__max_bad_share": 1, "data__val_share": 0.3, "log__eval_epochs": 1}
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    script = str(Path(fcmae.__file__).parent.parent / "pretrain.py")
    result = subprocess.run(
        [sys.executable, *launcher, script, *flags(images, tmp_path / "two", **options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = result.stderr
    assert "2 steps of 4 images on 2 x cpu in fp32" in said
    assert "Warning" not in said
    assert run(images, tmp_path / "one", **options) == 0
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 3  # two steps and an evaluation
    for line, other in zip(one, two, strict=True):
        # Means of two halves instead of one mean: float32 rounding.
        assert {k: v for k, v in other.items() if k not in TIMINGS} == pytest.approx(
            {k: v for k, v in line.items() if k not in TIMINGS}, rel=1e-5
        )
    for name in ("one", "two"):
        assert listed_as_bad(tmp_path / name) == bad


def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on(tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images", 12), tmp_path / "out"
    options = {"epochs": 20, "data__val_share": 0, "checkpoint__every_epochs": 999}
    started = runs.start_pair(["pretrain", *flags(images, out, **options)], logs_in(tmp_path))
    wait_for(lambda: (out / "metrics.jsonl").exists(), started[0])
    started[1].terminate()
    assert runs.ended(started) == [143, 143]
    ((stopped_at, _),) = checkpoint.steps(out).items()
    assert stopped_at < 60
    assert_whole_checkpoints(out)
    text = (out / "train.log").read_text()
    assert f"stopped by a signal after step {stopped_at}; the same command resumes" in text
    # One process goes on where two stopped, in parts that are as large as theirs.
    assert run(images, out, **options, grad_accum=2) == 0
    assert [step for step, _ in losses(out)] == list(range(1, 61))


def test_the_error_of_one_process_ends_both_with_its_sentence(tmp_path: Path) -> None:
    """The first alone keeps the list of files that cannot be read."""
    images, out = write_images(tmp_path / "images", 12), tmp_path / "out"
    for path in sorted(images.iterdir())[:6]:
        path.write_bytes(b"not an image")
    logs = logs_in(tmp_path)
    started = runs.start_pair(["pretrain", *flags(images, out, epochs=999, data__val_share=0)], logs)
    assert 0 not in (statuses := runs.ended(started)) and None not in statuses
    # The first keeps what the two tell each other, and may be gone before the other hears why.
    sentence, ended = "data.max_bad_share: ", "a process of the run has ended: see what it said"
    for log, said in zip(logs, ((sentence,), (f"process 0 failed: {sentence}", ended)), strict=True):
        (line,) = [line for line in log.read_text().splitlines() if line.startswith("fcmae: error")]
        assert line.removeprefix("fcmae: error: ").startswith(said)
        assert "Traceback" not in log.read_text()


def listed_as_bad(out: Path) -> set[str]:
    return {line.partition("\t")[0] for line in (out / "bad_files.txt").read_text().splitlines()}


# Stopping and going on


STATUSES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 0)]


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_a_signal_finishes_the_step_and_saves_and_the_status_tells_and_the_run_goes_on_from_there(
    uninterrupted: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill_self(number))  # in the middle of the second epoch
        assert run(images, out) == status
    assert list(checkpoint.steps(out)) == [3, 5]
    log = (out / "train.log").read_text()
    assert f"stopped by {number.name} after step 5; the same command resumes" in log
    assert "next:" not in log
    assert run(images, out, data__num_workers=1 if number == signal.SIGTERM else 0) == 0
    assert "resuming after step 5" in (out / "train.log").read_text()
    assert_equal_runs(out, uninterrupted)


def evaluated(out: Path) -> list[dict[str, float]]:
    """The lines of evaluations."""
    return [line for line in read_metrics(out / "metrics.jsonl") if "lr" not in line]


@pytest.mark.parametrize("step", [3, 9])  # the end of an epoch, and of the run
def test_a_run_that_is_told_to_stop_saves_without_an_evaluation_and_begins_with_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(images, whole, log__eval_epochs=1) == 0
    assert [line["step"] for line in evaluated(whole)] == [3, 6, 9]
    with monkeypatch.context() as patch:
        at_step(patch, step, kill_self(signal.SIGTERM))
        assert run(images, out, log__eval_epochs=1) == 143
    assert max(checkpoint.steps(out)) == step
    assert evaluated(out) == [line for line in evaluated(whole) if line["step"] < step]
    for _ in ("it goes on", "there is nothing left to do"):
        assert run(images, out, log__eval_epochs=1) == 0
        assert evaluated(out) == evaluated(whole)
    assert_equal_runs(out, whole)


def _break(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("where", [(pretraining.Monitor, "measure"), (pretraining, "save_reconstructions")])
def test_what_is_trained_is_kept_where_an_evaluation_breaks_down(
    uninterrupted: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(*where, _break)
        with pytest.raises(MemoryError):
            run(images, out)
    assert max(checkpoint.steps(out)) == 9 and not evaluated(out)
    assert run(images, out) == 0
    assert evaluated(out) == evaluated(uninterrupted)
    assert (out / "reconstructions" / "step-00000009.png").exists()


def test_losses_logged_after_a_cut_are_over_the_same_steps(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(images, tmp_path / "whole", log__every_steps=2) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 6, kill_self(signal.SIGINT, signal.SIGINT))
        assert run(images, tmp_path / "cut", log__every_steps=2) == 130
    assert run(images, tmp_path / "cut", log__every_steps=2) == 0
    assert [step for step, _ in losses(tmp_path / "cut")] == [2, 3, 4, 6, 8, 9]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_second_interrupt_ends_at_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 5, kill_self(signal.SIGINT, signal.SIGINT))
    assert run(images, tmp_path / "out") == 130
    assert list(checkpoint.steps(tmp_path / "out")) == [3]


def _wait_in_step(number: int, path: Path) -> None:
    """Have this process not go beyond a step before a path is there."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)

    at_step(pytest.MonkeyPatch(), number, wait)


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_a_signal_from_outside_stops_a_process_with_workers(
    uninterrupted: Path, images: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    command = ["pretrain", *flags(images, out, data__num_workers=1)]
    signalled = tmp_path / "signalled"
    process = start(command, tmp_path / "log.txt", prepare=partial(_wait_in_step, 5, signalled))
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    os.kill(process.pid, number)
    signalled.touch()
    process.join(60)
    assert process.exitcode == status, (tmp_path / "log.txt").read_text()
    assert max(checkpoint.steps(out)) < STEPS, "it was over before the signal"
    process = start(command, tmp_path / "log.txt")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    assert_equal_runs(out, uninterrupted)


def hanging(images: Path, out: Path, num_workers: int, deaf: bool = False) -> Any:
    """A run whose next read never ends, in the main process or in a worker."""
    pipe = out.with_name("pipe")
    command = ["pretrain", *flags(images, out, data__num_workers=num_workers, epochs=999)]
    process = start(command, out.with_name("log.txt"), hang_at=pipe, deaf=deaf)
    wait_for(lambda: checkpoint.latest(out) is not None, process)
    os.mkfifo(pipe)
    return process


def stands_still(out: Path) -> bool:
    before = (out / "metrics.jsonl").stat().st_size
    time.sleep(0.5)
    return (out / "metrics.jsonl").stat().st_size == before


@pytest.mark.parametrize(("num_workers", "deaf"), [(0, False), (0, True), (1, True)])
def test_a_second_interrupt_ends_a_run_whose_read_hangs_and_a_third_changes_nothing(
    images: Path, tmp_path: Path, num_workers: int, deaf: bool
) -> None:
    out = tmp_path / "out"
    process = hanging(images, out, num_workers, deaf)
    wait_for(lambda: stands_still(out), process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == num_workers
    for _ in range(4):
        with suppress(ProcessLookupError):  # it may end at any of them
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
    process.join(20)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 130, log
    assert log.endswith("fcmae: interrupted\n") and "Traceback" not in log and "Exception" not in log
    assert not any(worker.is_running() for worker in workers)
    assert_whole_checkpoints(out)


def test_no_worker_outlives_a_run_that_is_killed(images: Path, tmp_path: Path) -> None:
    process = hanging(images, tmp_path / "out", num_workers=2, deaf=True)
    wait_for(lambda: stands_still(tmp_path / "out"), process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.join()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence_and_its_last_checkpoint(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(["pretrain", *flags(images, out, data__num_workers=1, epochs=999)], tmp_path / "log.txt")
    wait_for(lambda: checkpoint.latest(out) is not None, process)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    process.join(60)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 2, log
    assert "Traceback" not in log
    (line,) = [line for line in log.splitlines() if line.startswith("fcmae: error")]
    assert "a process that decodes images was killed, most often" in line and "lower num_workers (it is 1)" in line
    assert line.endswith(f"; the same command goes on from {checkpoint.latest(out)}")
    assert_whole_checkpoints(out)


def test_a_terminal_that_is_gone_saves_the_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fcmae.cli", "pretrain", *flags(images, out, epochs=999)]
    terminal, ours = os.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=ours, stdout=ours, stderr=ours, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(ours)
    reader = threading.Thread(target=lambda: iter(lambda: os.read(terminal, 999), b""), daemon=True)
    reader.start()
    wait_for(lambda: checkpoint.latest(out) is not None, process)
    newest = checkpoint.latest(out)
    os.close(terminal)
    assert process.wait(60) == 129
    assert checkpoint.latest(out) != newest
    assert "stopped by SIGHUP after step" in (out / "train.log").read_text()


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        assert alive, "the process has ended"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_killed_again_and_again_loses_at_most_the_steps_since_its_last_checkpoint(
    uninterrupted: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # A checkpoint a step. Workers outlive the killed process for a while and must not hinder the next.
    command = ["pretrain", *flags(images, out, data__num_workers=1, checkpoint__every_epochs=0.1)]
    newest = 0
    while newest < STEPS:
        process = start(command, tmp_path / "log.txt")
        wait_for(lambda seen=newest: max(checkpoint.steps(out), default=0) > seen, process)  # type: ignore[misc]
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        newest = max(checkpoint.steps(out))
        assert newest >= last_logged_step(out) - 1
        assert_whole_checkpoints(out)
    process = start(command, tmp_path / "log.txt")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    assert_equal_runs(out, uninterrupted)


def test_a_run_of_an_earlier_version_goes_on(uninterrupted: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(images, out)
    for place in checkpoint.steps(out).values():
        for file in place.glob("*.safetensors"):
            state = {rename(name, OLD): value for name, value in load_file(file).items()}
            assert "mask_token" in state or "mask_token/step" in state
            save_file(state, file)
        meta = json.loads((place / "checkpoint.json").read_text()) | {"format": 1}
        del meta["spec"], meta["checksums"]
        (place / "checkpoint.json").write_text(json.dumps(meta))
    assert run(images, out) == 0
    assert_equal_runs(out, uninterrupted)


def last_logged_step(out: Path) -> int:
    lines = read_metrics(out / "metrics.jsonl")
    return int(lines[-1]["step"])


def assert_whole_checkpoints(out: Path) -> None:
    for step, path in checkpoint.steps(out).items():
        assert checkpoint.read_meta(path).step == step
        assert {name.partition(":")[0] for name in tensors(path)} == {"model", "optimizer"}


def test_a_run_killed_at_each_file_operation_of_a_save_goes_on_from_whole_checkpoints(
    uninterrupted: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # A checkpoint a step, each of which deletes the one before.
    command = ["pretrain", *flags(images, out, checkpoint__every_epochs=0.1, checkpoint__keep=1)]
    newest = kills = 0
    while True:
        process = start(command, tmp_path / "log.txt", kill_at=kills + 1)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
        kills += 1
        assert_whole_checkpoints(out)
        assert max(checkpoint.steps(out), default=0) >= newest
        newest = max(checkpoint.steps(out), default=0)
    assert kills >= 20  # a save that deletes the checkpoint before has 16 operations
    assert not list((out / "checkpoints").glob(".tmp-*"))
    assert_equal_runs(out, uninterrupted)


def test_a_finished_run_says_so_and_stays_as_it_is(uninterrupted: Path, images: Path) -> None:
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    assert run(images, uninterrupted) == 0
    after = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"train.log", "environment.json"}
    assert "finished 9 steps" in (uninterrupted / "train.log").read_text().splitlines()[-1]


def test_other_settings_are_refused_by_name_and_overwrite_starts_anew(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(images, out, epochs=1) == 0
    before = final_state(out)
    assert run(images, out, epochs=1, model__mask_ratio=0.5) == 2
    error = capsys.readouterr().err
    assert "model.mask_ratio: the run has 0.6, this command 0.5" in error
    assert "Traceback" not in error
    assert_same(final_state(out), before)
    assert run(images, out, epochs=1, model__mask_ratio=0.5, overwrite="true") == 0
    assert [step for step, _ in losses(out)] == [1, 2, 3]


# Images that change or cannot be read


def interrupted(images: Path, out: Path, **changed: Any) -> None:
    """A run that was stopped after step 4 of 9."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, kill_self(signal.SIGTERM))
        assert run(images, out, **changed) == 143
    assert max(checkpoint.steps(out)) == 4


def test_a_resumed_run_keeps_the_images_it_began_with(uninterrupted: Path, images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    interrupted(folder, tmp_path / "out")
    shutil.copy(folder / "01.png", folder / "new.png")
    assert run(folder, tmp_path / "out") == 0
    assert_equal_runs(tmp_path / "out", uninterrupted)


def test_a_list_that_was_changed_is_not_gone_on_with(
    uninterrupted: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.txt"
    text = "".join(f"{path}\n" for path in sorted(images.iterdir()))
    listed.write_text(text)
    interrupted(listed, tmp_path / "out")
    listed.write_text(text.partition("\n")[2])
    assert run(listed, tmp_path / "out") == 2
    assert "data.path no longer gives the images of" in capsys.readouterr().err
    listed.write_text(text)
    assert run(listed, tmp_path / "out") == 0
    assert_equal_runs(tmp_path / "out", uninterrupted)


def test_a_folder_may_move_between_stop_and_resume(
    uninterrupted: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = shutil.copytree(images, tmp_path / "first"), tmp_path / "second"
    interrupted(first, tmp_path / "out")
    first.rename(second)
    (second / "extra.png").write_bytes((second / "01.png").read_bytes())
    assert run(second, tmp_path / "out") == 2
    assert "data.path no longer gives the images of" in capsys.readouterr().err
    (second / "extra.png").unlink()
    assert run(second, tmp_path / "out") == 0
    assert_equal_runs(tmp_path / "out", uninterrupted)


def test_broken_images_are_listed_wherever_they_are_used_and_the_run_goes_on(images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    out = tmp_path / "out"
    options = {"data__val_share": 0.3, "data__max_bad_share": 0.5, "log__every_steps": 99, "log__eval_epochs": 1}
    cfg = config(folder, out, **options)
    train, held_out = split(find_images(cfg.data.path), 0.3, cfg.seed)
    for path in (train.name(2), held_out.name(1)):
        Path(path).write_bytes(b"not an image")
    pretraining.pretrain(cfg)
    assert listed_as_bad(out) == {train.name(2), held_out.name(1)}
    assert "validation loss" in (out / "train.log").read_text()
    assert "on 3 images" in (out / "train.log").read_text()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_images_stop_the_run_with_one_sentence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    for path in sorted(folder.iterdir())[:6]:
        path.write_bytes(b"not an image")
    assert run(folder, tmp_path / "out", data__num_workers=num_workers) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fcmae: error")]
    assert "more than the share 0.01" in line
    for path in folder.iterdir():
        path.write_bytes(b"not an image")
    assert run(folder, tmp_path / "out", data__num_workers=num_workers, overwrite="true") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("fcmae: error")]
    assert "files drawn in a row cannot be used" in line
    assert "Traceback" not in error


# Disks that are full


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place",
    [
        "safetensors.torch.serialize_file",
        "fcmae.pretraining.save_reconstructions",
        "fcmae.pretraining.save_curves",
        "tensorboard.summary.writer.record_writer.RecordWriter.write",
    ],
)
def test_a_full_disk_ends_a_run_with_a_sentence_and_its_last_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    out = tmp_path / "out"
    options = {"log__trackers": "tensorboard", "log__eval_epochs": 1, "checkpoint__every_epochs": 0.1}
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: patch.setattr(place, full))
        assert run(images, out, **options) == 2
    error = capsys.readouterr().err
    newest = checkpoint.latest(out)
    assert newest is not None
    assert f"fcmae: error: no space is left for {out}" in error
    assert error.endswith(f": free some, and the same command goes on from {newest}\n")
    assert "Traceback" not in error
    assert not list(out.glob("checkpoints/.tmp-*"))
    assert_whole_checkpoints(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many kilobytes."""
    made = []

    def make(kilobytes: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting takes root")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disk_seems_empty() -> None:
    """As a disk does at the start that others fill later."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kilobytes", [28, 700])
def test_a_run_on_a_disk_that_fills_up_goes_on_once_there_is_space(
    images: Path, small_disk: Callable[[int], Path], tmp_path: Path, kilobytes: int
) -> None:
    disk = small_disk(kilobytes)
    options = {"log__trackers": "tensorboard", "log__eval_epochs": 1, "checkpoint__every_epochs": 0.1}
    command = ["pretrain", *flags(images, disk / "out", **options, checkpoint__keep=9)]
    process = start(command, tmp_path / "log.txt", prepare=disk_seems_empty)
    process.join(60)
    error = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 2, error
    assert "Traceback" not in error and "fcmae: error: no space is left for" in error
    newest = checkpoint.latest(disk / "out")
    assert error.endswith(f"goes on from {newest or 'the beginning'}\n")
    assert not list(disk.glob("out/checkpoints/.tmp-*"))
    assert_whole_checkpoints(disk / "out")
    subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
    process = start(command, tmp_path / "log.txt")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    assert len(losses(disk / "out")) == STEPS


# Numbers that are not finite


def test_an_exploding_run_stops_with_the_step_and_keeps_its_last_good_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # The rate of the first step is 0, so its checkpoint is sound; the second spoils the weights, which the third shows.
    assert run(images, out, optim__base_lr=1e25, checkpoint__every_epochs=0.1, checkpoint__keep=1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fcmae: error")]
    assert "not finite" in line or "loss is" in line
    good = out / "checkpoints" / "step-00000001"
    assert good.exists() and "step 1:" not in line
    assert line.endswith(
        f"; the last good checkpoint is {good}; start again with another --out, --init {good}, "
        "a lower optim.base_lr, or optim.clip_grad 1"
    )
    assert line.partition("error: ")[2] in (out / "train.log").read_text().splitlines()[-1]
    assert_whole_checkpoints(out)
    assert all(value.isfinite().all() for value in final_state(out).values())
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_the_last_good_checkpoint_is_from_before_the_loss_rose(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, factor, loss_of = tmp_path / "out", [1.0], weighted_loss

    def loss(*args: Any, **options: Any) -> WeightedLoss:
        found = loss_of(*args, **options)
        return found._replace(mean=found.mean * factor[0])

    monkeypatch.setattr(pretraining, "weighted_loss", loss)
    for number, value in ((4, 0.5), (6, 0.9), (9, math.nan)):  # step 5's weights already give a high loss
        at_step(monkeypatch, number, lambda value=value: factor.__setitem__(0, value))  # type: ignore[misc]
    every_step = {"checkpoint__every_epochs": 0.1, "checkpoint__keep": 2, "optim__clip_grad": 2}
    assert run(images, out, **every_step, log__eval_epochs=9) == 2
    assert list(checkpoint.steps(out)) == [4, 7, 8]
    error = capsys.readouterr().err
    assert f"step 9: the loss is nan; the last good checkpoint is {out / 'checkpoints' / 'step-00000004'};" in error
    assert error.endswith("optim.clip_grad below 2\n")
    runs.forget_accelerator()
    # What the message says can be typed.
    init = {"init": out / "checkpoints" / "step-00000004", "optim__base_lr": 0.01, "optim__clip_grad": 1}
    monkeypatch.undo()
    assert run(images, tmp_path / "again", **init, epochs=1) == 0


def test_a_step_read_one_later_is_named_and_neither_of_the_two_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, spoiled = tmp_path / "out", [False]

    def loss(*args: Any, **options: Any) -> WeightedLoss:
        found = weighted_loss(*args, **options)
        return found._replace(mean=found.mean * torch.nan) if spoiled[0] else found

    monkeypatch.setattr(pretraining, "weighted_loss", loss)
    at_step(monkeypatch, 2, lambda: spoiled.__setitem__(0, True))
    # Nothing is logged before step 99, so step 2 is read while step 3 computes.
    seen: list[int] = []
    at_step(monkeypatch, 3, lambda: (seen.append(3), spoiled.__setitem__(0, False))[0])
    assert run(images, out, log__every_steps=99, checkpoint__every_epochs=9, log__eval_epochs=9) == 2
    assert seen == [3]
    assert "step 2: the loss is nan; there is no checkpoint yet" in capsys.readouterr().err
    assert checkpoint.latest(out) is None


def test_a_signal_stops_at_the_end_of_its_step_though_nothing_is_logged(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 2, kill_self(signal.SIGTERM))
    assert run(images, tmp_path, log__every_steps=99, checkpoint__every_epochs=9, log__eval_epochs=9) == 143
    assert list(checkpoint.steps(tmp_path)) == [2]


def test_an_image_of_huge_numbers_stops_the_run_before_it_spoils_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        # Finite, so it is no broken file; but the variance of its patches is not.
        pixels = np.full((16, 16, 3), 1.0 if number else 1e30, np.float32)
        np.save(
            tmp_path / "images" / f"{number}.npy",
            pixels * np.random.default_rng(number).random((16, 16, 3), np.float32),
        )
    assert run(tmp_path / "images", tmp_path / "out", data__val_share=0) == 2
    error = capsys.readouterr().err
    assert "step 1: the loss is nan; there is no checkpoint yet" in error
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_a_validation_loss_that_is_not_finite_stops_the_run_whenever_it_is_given(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Spoiled(Normalize):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * (1 if torch.is_grad_enabled() else torch.nan)

    monkeypatch.setattr(pretraining, "Normalize", Spoiled)
    for _ in range(2):
        assert run(images, tmp_path / "out", log__eval_epochs=1) == 2
        assert "step 3: the validation loss is nan" in capsys.readouterr().err
        assert list(checkpoint.steps(tmp_path / "out")) == [3]


def test_a_start_after_one_that_ended_without_a_word_says_so(tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images"), tmp_path / "run"
    for is_told in (True, False):
        shutil.rmtree(out, ignore_errors=True)
        assert run(images, out) == 0
        starts = json.loads((out / "environment.json").read_text())
        assert starts[-1]["ended"] == "finished"
        if is_told:
            starts[-1]["ended"] = ""
        (out / "environment.json").write_text(json.dumps(starts))
        assert run(images, out) == 0
        assert ("the last start ended without a word" in (out / "train.log").read_text()) == is_told


def test_a_run_on_hog_is_read_without_its_decoder_and_draws_none_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images")
    run = tmp_path / "run"
    pretraining.pretrain(config(images, run, model__target="hog", epochs=1, log__eval_epochs=1))
    saved = final_state(run)
    assert saved["model:decoder.pred.weight"].shape[0] == 3 * 9  # of each channel, for a patch of one cell
    assert not list(run.glob("reconstructions/*.png")) and (run / "loss.png").exists()
    assert not config(images, run, model__target="hog").model.normalize_target  # by which a report compares the loss
    caplog.clear()
    weights = read_weights(run)
    assert not caplog.records  # that it is left out is as it should be
    assert {name.partition(".")[0] for name in weights.state} == {"encoder"}
    again = tmp_path / "again"
    pretraining.pretrain(config(images, again, model__target="hog", model__init=run, epochs=1, optim__base_lr=1e-30))
    for name, value in final_state(again).items():
        if name.startswith("model:encoder."):
            assert torch.allclose(value, saved[name])
