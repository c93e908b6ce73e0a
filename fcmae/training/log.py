"""What a run says while it trains: numbers for metrics.jsonl and the trackers, lines, unreadable files, warnings."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from fcmae import threads
from fcmae.atomic import write_text
from fcmae.config import RunConfig
from fcmae.data.bad_files import BadFiles
from fcmae.data.dataset import Batch
from fcmae.training import health
from fcmae.training.optim import Schedule
from fcmae.training.records import split_metrics

logger = logging.getLogger("fcmae")

LATE = 1.2  # times the time that was planned
LEAST_WINDOWS = 3  # of whose speeds the median is taken, before a run is said to be late


class Log:
    """Writes a line of numbers every now and then, and all else that a run has to say, on the main process.

    Args:
        cfg: of the run, with `out`.
        accelerator: of its processes.
        schedule: of its steps.
        num_files: images of the run, of which a share may be unreadable.
    """

    def __init__(self, cfg: RunConfig, accelerator: Accelerator, schedule: Schedule, num_files: int) -> None:
        assert cfg.out is not None
        self.folder = cfg.out
        # What an evaluation alone said before was of other images perhaps, or of other weights.
        start = schedule.start if cfg.trains else -1
        self.metrics = Metrics(self.folder / "metrics.jsonl", accelerator, start)
        self.window = Window(cfg.batch_size, accelerator.device.type)
        self.unread_files: list[tuple[str, str]] = []
        self._accelerator, self._batch_size, self.schedule = accelerator, cfg.batch_size, schedule
        self._bad_files = BadFiles(self.folder / "bad_files.txt", num_files, cfg.data.max_bad_share)
        self._recent: deque[dict[str, float]] = deque(maxlen=2 * health.STARVED_WINDOWS)
        self._upkeep_s = 0.0  # since this start
        self._told = self._told_late = not accelerator.is_main_process
        self._begun, self._planned_s, self._others = time.monotonic(), math.inf, threads.Others()
        # Of one process: more take less, nobody has measured how much.
        planned_s = cfg.planned_s if accelerator.num_processes == 1 and start >= 0 else None
        if planned_s is not None and (steps := schedule.total - schedule.start) > 0:
            self._planned_s = planned_s * steps / schedule.total
            ends = datetime.now() + timedelta(seconds=self._planned_s)
            views, minutes = steps * cfg.batch_size, max(1, round(self._planned_s / 60))
            took = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
            logger.info("%s views, about %s, ends about %s", f"{views:,}", took, ends.strftime("%H:%M"))
        # None: where there is no terminal.
        hidden = None if accelerator.is_main_process and cfg.trains else True
        self._bar = tqdm(total=schedule.total, initial=schedule.start, unit="step", disable=hidden)

    def close(self) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One more step was started."""
        self._bar.update()

    def add_bad_files(self, found: list[tuple[str, str]]) -> None:
        """Take note of (path, reason) of files that could not be read, on every process at once.

        Raises:
            ValueError: on the main process, if too many files of the run are bad.
        """
        self.note_bad_files(gather_object(found) if self._accelerator.num_processes > 1 else found)

    def note_bad_files(self, found: list[tuple[str, str]]) -> None:
        """Likewise, of files that every process knows of."""
        if self._accelerator.is_main_process:
            self._bad_files.add(found)

    def write(self, step: int, lr: float, grad_norm: float) -> None:
        """One line on the steps since the last one.

        Args:
            step: the last of them; as many are done.
            lr: learning rate of that step.
            grad_norm: of that step, before clipping; left out if not finite.
        """
        self.add_bad_files(self.unread_files)
        self.unread_files.clear()
        line = self.window.summary() | {"lr": lr}
        if math.isfinite(grad_norm):  # under fp16 it may not be
            line["grad_norm"] = grad_norm
        epoch, total = self.schedule.epoch(step), self.schedule.total
        self.metrics.write(step, epoch, **line)
        self._recent.append({"step": step, "epoch": epoch, **line})
        if not self._told and (starved := health.starved(self._recent)) is not None:
            self._told = True
            logger.warning(starved.text)
        self._upkeep_s += line["upkeep_s"]
        left_s = self._left_s(step, line["images_per_s"])
        self._tell_late(step)
        text = f"loss {line['loss']:.4f}, {line['images_per_s']:.1f} images/s"
        self._bar.set_postfix_str(text)
        level = logging.INFO if self._bar.disable else logging.DEBUG  # the terminal has the bar, train.log has lines
        message = "step %d/%d, epoch %.2f, %s, lr %.3g, %s left"
        logger.log(level, message, step, total, epoch, text, lr, timedelta(seconds=round(left_s)))

    def _left_s(self, step: int, images_per_s: float) -> float:
        """Seconds that the steps after this one take, with as much upkeep a step as so far."""
        upkeep_s = self._upkeep_s / (step - self.schedule.start)
        return (self.schedule.total - step) * (self._batch_size / images_per_s + upkeep_s)

    def _tell_late(self, step: int) -> None:
        """Say once that the run falls behind its plan, and why. The median of windows passes over a hiccup."""
        if self._told_late or math.isinf(self._planned_s):
            return
        others, total = self._others.share(), self.schedule.total
        done = (step - self.schedule.start) / (total - self.schedule.start)
        if done < 1 / 20 or len(self._recent) < LEAST_WINDOWS:
            return
        speed = statistics.median(line["images_per_s"] for line in self._recent)
        elapsed = time.monotonic() - self._begun
        took = elapsed + self._left_s(step, speed)
        if took > LATE * self._planned_s:
            self._told_late = True
            logger.warning(
                "the run takes %s at this speed, and %s were planned: other programs use %.0f %% of the cores, it "
                "waits for images %.0f %% of its time, and evaluates and saves %.0f %%",
                *(timedelta(seconds=round(seconds)) for seconds in (took, self._planned_s)),
                100 * others,
                100 * self._recent[-1]["data_wait_share"],
                100 * self._upkeep_s / elapsed,
            )

    def show(self, name: str, path: Path, step: int) -> None:
        """Give a picture to TensorBoard.

        Args:
            name: under which it is shown.
            path: of the picture.
            step: after which it was made.
        """
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                tracker.log_images({name: pixels[None]}, step, dataformats="NHWC")


class Metrics:
    """metrics.jsonl and the trackers.

    Args:
        path: of metrics.jsonl.
        accelerator: of the run's processes, with its trackers.
        step: steps that are done; lines after it, of a run that was cut off there, are removed.
    """

    def __init__(self, path: Path, accelerator: Accelerator, step: int) -> None:
        self.path = path
        self.accelerator = accelerator
        if accelerator.is_main_process and path.exists():
            # The last line may be half written; what follows the resumed step will be written again.
            lines, damaged = split_metrics(path)
            if len(damaged) > (not path.read_bytes().endswith(b"\n")):
                logger.warning("%s: %d damaged lines were left out", path, len(damaged))
            kept = [line for line in lines if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        # TensorBoard is told to forget what follows the resumed step.
        accelerator.init_trackers("fcmae", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Append one line.

        Args:
            step: steps that are done.
            epoch: likewise, in epochs.
            values: finite numbers by name.
        """
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
            self.accelerator.log(values, step=step)


def curves(lines: Sequence[Mapping[str, Any]], *names: str) -> dict[str, tuple[list[float], list[float]]]:
    """Epochs and values of each name that lines of metrics.jsonl have."""
    found = {name: [(line["epoch"], line[name]) for line in lines if name in line] for name in names}
    return {name: ([e for e, _ in points], [v for _, v in points]) for name, points in found.items() if points}


class Window:
    """Means over the steps since the last line of the log.

    Args:
        images_per_step: of all processes.
        device_type: of what computes the steps.
    """

    def __init__(self, images_per_step: int, device_type: str = "cpu") -> None:
        self._images_per_step, self._on_cuda = images_per_step, device_type == "cuda"
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._steps = 0
        self._loss = self._waited = self._upkeep = 0.0
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time counted that the loop, and the device, wait for them."""
        while True:
            before, idle_from = time.perf_counter(), self._mark()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            if idle_from is not None and (idle_to := self._mark()) is not None:
                self._gaps.append((idle_from, idle_to))
            yield batch

    def _mark(self) -> torch.cuda.Event | None:
        """On CUDA, the time at which the device has done all that it was given."""
        if not self._on_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def skip_since(self, before: float) -> None:
        """Leave the time since `before`, by time.perf_counter, out of images_per_s: evaluating, saving."""
        seconds = time.perf_counter() - before
        self._started += seconds
        self._upkeep += seconds

    def add(self, loss: float) -> None:
        """One more step has this loss."""
        self._loss += loss
        self._steps += 1

    def summary(self) -> dict[str, float]:
        """Numbers of the window, whose steps the device has done; starts the next.

        Returns:
            loss: mean. images_per_s. data_wait_s: seconds that the loop waited for data, in all. data_wait_share: of
            the window's time, in which the device stood still for want of data. On CUDA that is less: the loop may
            wait while the device computes the step before. upkeep_s: seconds of evaluating and saving beside the steps.
        """
        seconds = time.perf_counter() - self._started
        images_per_s = self._steps * self._images_per_step / seconds
        idle = sum(start.elapsed_time(end) for start, end in self._gaps) / 1000 if self._on_cuda else self._waited
        values = {
            "loss": self._loss / self._steps,
            "images_per_s": round(images_per_s, 2) or images_per_s,
            "data_wait_s": round(self._waited, 4),
            "data_wait_share": round(idle / seconds, 4),
            "upkeep_s": round(self._upkeep, 3),
        }
        self._reset()
        return values
