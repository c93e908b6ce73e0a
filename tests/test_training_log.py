"""What a run says while it trains: lines of numbers, and what is counted between two of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from runs import config

from fcmae.training import health
from fcmae.training import log as log_module
from fcmae.training.log import Log, Metrics, Window, curves
from fcmae.training.records import read_metrics
from fcmae.training.steps import schedule_of

pytestmark = pytest.mark.usefixtures("forgotten")


def log_at(out: Path, **settings: object) -> Log:
    """The log of a run of 9 steps, at its beginning."""
    cfg = config(Path("photos"), out, **settings)
    return Log(cfg, Accelerator(cpu=True, project_dir=out), schedule_of(cfg, per_epoch=3, start=0), num_files=10)


def metrics_at(path: Path, step: int) -> Metrics:
    return Metrics(path, Accelerator(cpu=True, project_dir=path.parent), step)


# Lines


def test_a_resumed_run_drops_what_follows_its_step_and_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = metrics_at(path, 0)
    for step in (1, 2, 3):
        metrics.write(step, step / 3, loss=0.1 * step)
    with path.open("a") as file:
        file.write('{"step": 4, "ep')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    metrics = metrics_at(path, 2)
    metrics.write(3, 1, loss=7.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["epoch"], line["loss"]) for line in lines] == [
        (1, 0.3333, 0.1),
        (2, 0.6667, 0.2),
        (3, 1, 7.0),
    ]


def test_curves_are_the_epochs_and_values_of_each_name_that_was_written() -> None:
    lines = [{"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "loss": 2.0}, {"epoch": 1.0, "val_loss": 2.5}]
    assert curves(lines, "loss", "val_loss", "other") == {"loss": ([0.5, 1.0], [3.0, 2.0]), "val_loss": ([1.0], [2.5])}


def test_a_line_says_how_far_the_run_is_and_leaves_out_a_norm_that_is_not_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_at(tmp_path)
    with caplog.at_level(logging.DEBUG, "fcmae"):
        for step, norm in ((3, 2.0), (4, float("inf"))):
            log.window.add(0.5)
            log.write(step, lr=0.25, grad_norm=norm)
    log.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["epoch"], first["loss"], first["lr"], first["grad_norm"]) == (3, 1, 0.5, 0.25, 2)
    assert "grad_norm" not in second
    assert caplog.messages[0].startswith("step 3/9, epoch 1.00, loss 0.5000, ")
    assert ", lr 0.25, " in caplog.messages[0] and caplog.messages[0].endswith(" left")


def test_what_is_left_counts_evaluating_and_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Six of nine steps are left: of a second each, and half a second of upkeep for each, as those before had."""
    log = log_at(tmp_path)
    per_step = log.window._images_per_step
    line = {"loss": 1.0, "images_per_s": float(per_step), "data_wait_s": 0.0, "data_wait_share": 0.0, "upkeep_s": 1.5}
    monkeypatch.setattr(log.window, "summary", lambda: line)
    with caplog.at_level(logging.DEBUG, "fcmae"):
        log.write(3, lr=0.25, grad_norm=1.0)
    log.close()
    assert caplog.messages[0].endswith(", 0:00:09 left")


def test_files_that_cannot_be_read_are_listed_and_too_many_stop_the_run(tmp_path: Path) -> None:
    log = log_at(tmp_path, data__max_bad_share=0.1)
    log.unread_files.append(("a.png", "no image"))
    log.window.add(0.5)
    log.write(1, lr=0.1, grad_norm=1.0)
    assert (tmp_path / "bad_files.txt").read_text() == "a.png\tno image\n"
    assert not log.unread_files
    with pytest.raises(ValueError, match=r"data\.max_bad_share: 2 of 10 files cannot be used"):
        log.add_bad_files([("b.png", "no image")])
    log.close()


def test_a_device_that_starves_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "STARVED_S", 0)
    monkeypatch.setattr(health, "STARVED_SHARE", -1)
    log = log_at(tmp_path)
    for step in range(1, 10):
        log.window.add(0.5)
        log.write(step, lr=0.1, grad_norm=1.0)
        # The first line has the start of the workers in it; five more must show it.
        assert len([m for m in caplog.messages if "starves the device" in m]) == (step > health.STARVED_WINDOWS)
    log.close()


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize(("speeds", "told"), [([100] * 20, 0), ([100] * 5 + [9] + [100] * 14, 0), ([50] * 20, 1)])
def test_a_run_says_its_plan_and_once_that_it_falls_behind_but_not_for_a_hiccup(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    start: int,
    speeds: list[int],
    told: int,
) -> None:
    """Planned: 200 windows of 10 s at 100 images/s, of which the last 100 may be left. Others use a core in four."""
    clock = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log_module.threads, "Others", lambda: SimpleNamespace(share=lambda: 0.25))
    cfg = config(Path("photos"), tmp_path, batch_size=1000).model_copy(update={"planned_s": 2000.0})
    schedule = replace(schedule_of(cfg, per_epoch=1, start=start), total=200)
    with caplog.at_level(logging.INFO, "fcmae"):
        log = Log(cfg, Accelerator(cpu=True, project_dir=tmp_path), schedule, num_files=10)
        for number, speed in enumerate(speeds, start + 1):
            clock[0] += 1000 / speed
            line = {
                "loss": 1.0,
                "images_per_s": float(speed),
                "data_wait_s": 0.0,
                "data_wait_share": 0.5,
                "upkeep_s": 0.0,
            }
            monkeypatch.setattr(log.window, "summary", lambda line=line: line)
            log.write(number, 0.1, 1.0)
        log.close()
    took = "33 min" if start == 0 else "17 min"
    assert f"{(200 - start) * 1000:,} views, about {took}, ends about" in caplog.text
    assert caplog.text.count("other programs use 25 % of the cores, it waits for images 50 % of its time") == told


def test_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    cfg = config(Path("photos"), tmp_path)
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path)
    log = Log(cfg, accelerator, schedule_of(cfg, per_epoch=3, start=0), num_files=10)
    log.show("seen", tmp_path / "picture.png", 4)
    log.close()
    accelerator.end_training()
    (folder,) = {path.parent for path in tmp_path.rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Images("seen")
    assert (event.step, event.height, event.width) == (4, 5, 7)


# Windows


class Clock:
    """time.perf_counter that moves when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_counts_images_and_waiting_but_not_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(log_module.time, "perf_counter", clock)

    def slow() -> Iterator[int]:
        for number in range(2):
            clock.now += 0.5
            yield number

    window = Window(images_per_step=10)
    for number in window.timed(slow()):  # type: ignore[arg-type]  # the window does not look into batches
        clock.now += 1.5
        window.add(loss=number)
    before = clock.now
    clock.now += 60  # a pause
    window.skip_since(before)
    assert window.summary() == {
        "loss": 0.5,
        "images_per_s": 5.0,
        "data_wait_s": 1.0,
        "data_wait_share": 0.25,
        "upkeep_s": 60.0,
    }
    clock.now += 2
    window.add(loss=4.0)
    assert window.summary() == {
        "loss": 4.0,
        "images_per_s": 5.0,
        "data_wait_s": 0.0,
        "data_wait_share": 0.0,
        "upkeep_s": 0.0,
    }


def test_on_cuda_the_device_is_not_said_to_wait_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is a step ahead: a device that computes for 1.5 s waits for the last half second of the next 2."""
    clock, busy_until = Clock(), 0.0
    monkeypatch.setattr(log_module.time, "perf_counter", clock)

    class Event:
        """Stands in for CUDA's: a mark that the device passes when it has done what it was given before."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.passed = max(clock.now, busy_until)

        def elapsed_time(self, later: Event) -> float:
            return (later.passed - self.passed) * 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def slow() -> Iterator[int]:
        for _ in range(3):
            clock.now += 2.0
            yield 0

    window = Window(10, "cuda")
    for _ in window.timed(slow()):  # type: ignore[arg-type]
        busy_until = clock.now + 1.5
        window.add(loss=1.0)
    # The first batch is waited for by an idle device, for 2 s.
    assert window.summary() == {
        "loss": 1.0,
        "images_per_s": 5.0,
        "data_wait_s": 6.0,
        "data_wait_share": 0.5,
        "upkeep_s": 0.0,
    }


def test_a_damaged_line_costs_itself_and_not_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "epoch": 0.5}', '{"step": 2, "ep', "[1]", '{"step": "3", "epoch": 1}', "null", "[" * 9999]
    lines += ['{"step": 2, "epoch": 1, "loss": "low"}', '{"step": 3, "epoch": 1, "loss": null}', "\0\1"]
    path.write_text("\n".join([*lines, '{"step": 4, "epoch": 2}']) + "\n")
    assert [line["step"] for line in read_metrics(path)] == [1, 4]


def test_a_window_that_took_an_hour_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(log_module.time, "perf_counter", clock)
    window = Window(images_per_step=8)
    clock.now += 3600
    window.add(loss=1.0)
    assert window.summary()["images_per_s"] == 8 / 3600
