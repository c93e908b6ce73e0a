"""The training loop that pretraining and fine-tuning share: steps, logs, evaluations, checkpoints, signals."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fcmae.config import Optim, RunConfig
from fcmae.data.bad_files import BadFiles
from fcmae.data.dataset import Batch, Sample
from fcmae.data.loader import build_loader, prefetched
from fcmae.data.sampler import StepSampler
from fcmae.training import checkpoint, health
from fcmae.training.optim import learning_rate, set_learning_rate
from fcmae.training.run import Metrics, RunDirectory, StopSignal, seed_step

logger = logging.getLogger("fcmae")


def fit(
    cfg: RunConfig,
    schedule: Optim,
    run: RunDirectory,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: Dataset[Sample],
    loss_of: Callable[[Batch], Tensor],
    *,
    start_step: int,
    steps_per_epoch: int,
    num_images: int,
    num_workers: int,
    metrics: Metrics,
    bad_files: BadFiles,
    stop: StopSignal,
    evaluate: Callable[[int], None],
    save: Callable[[int], None],
    after_step: Callable[[], None] = lambda: None,
    masks_per_image: int = 1,
) -> bool:
    """Train from start_step to the end of cfg.epochs, or until a signal asks to stop.

    model, optimizer: as accelerate prepared them. train_set: num_images samples by key, read by num_workers processes.
    loss_of: the mean loss of a batch, a scalar with gradients. evaluate, save: called on every process
    with the number of steps taken. after_step: called after each change of the weights. masks_per_image: how often
    batch_size counts an image.
    Returns whether the end was reached.
    Raises FloatingPointError, before anything is saved, if the loss or a gradient is not finite; that step changes no
    weight.
    """
    total = steps_per_epoch * cfg.epochs
    peak = schedule.base_lr * cfg.batch_size / 256
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    sampler = StepSampler(
        num_images,
        cfg.batch_size,
        cfg.seed,
        start_step=start_step,
        end_step=total,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        grad_accum=cfg.grad_accum,
        masks_per_image=masks_per_image,
    )
    device = accelerator.device
    window = Window(device.type)
    loader = build_loader(train_set, sampler, num_workers=num_workers, device_type=device.type)
    batches = window.timed(prefetched(loader, device))
    unread_files: list[tuple[str, str]] = []
    logger.info(
        "%d steps of %d of %d images on %d x %s in %s",
        total,
        cfg.batch_size,
        num_images,
        accelerator.num_processes,
        device.type,
        accelerator.mixed_precision.replace("no", "fp32"),
    )
    if start_step:
        logger.info("resuming after step %d", start_step)
    if warmup >= total and accelerator.is_main_process:
        logger.warning(
            "the learning rate never reaches its peak of %.3g: the warm-up takes %g epochs and the run has %d; "
            "lower optim.warmup_epochs or raise epochs",
            peak,
            schedule.warmup_epochs,
            cfg.epochs,
        )

    def losses() -> Iterator[Tensor]:
        for batch in islice(batches, cfg.grad_accum):
            # CUDA graphs may use the memory of the part before again.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            unread_files.extend(batch.bad)
            yield loss_of(batch)

    def read(started: StartedStep, number: int) -> StepResult:
        try:
            result = started.result()
        except FloatingPointError as error:
            good = checkpoint.latest(run.path)
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise FloatingPointError(f"step {number}: {error}; {kept}") from None
        window.add(result.loss, cfg.batch_size)
        return result

    recent: deque[dict[str, float]] = deque(maxlen=2 * health.STARVED_WINDOWS)
    told = not accelerator.is_main_process
    unread_step: StartedStep | None = None
    hidden = None if accelerator.is_main_process else True  # None: where there is no terminal
    with tqdm(total=total, initial=start_step, unit="step", disable=hidden) as bar:
        for step in range(start_step, total):
            seed_step(cfg.seed, step, accelerator.process_index)
            lr = learning_rate(step, peak=peak, minimum=schedule.min_lr, warmup_steps=warmup, total_steps=total)
            set_learning_rate(optimizer, lr, step)
            started = optimizer_step(
                accelerator,
                model,
                optimizer,
                losses(),
                num_parts=cfg.grad_accum,
                clip_grad=schedule.clip_grad,
                stop=stop.received is not None,
            )
            after_step()
            bar.update()
            done, epoch = step + 1, (step + 1) / steps_per_epoch
            milestone = cfg.checkpoint.milestone_epochs * steps_per_epoch
            evaluates = due(done, cfg.log.eval_epochs * steps_per_epoch, total)
            saves = due(done, cfg.checkpoint.every_epochs * steps_per_epoch, total) or (
                milestone > 0 and done % milestone == 0
            )
            # While the device computes this step the host reads the one before; where something is written, this one.
            stopping = False
            if unread_step is not None:
                stopping = read(unread_step, step).stop
            if accelerator.num_processes == 1 and stop.received is not None:
                stopping = True  # no other process has to hear of it first
            unread_step = started
            if not (saves or evaluates or stopping or done % cfg.log.every_steps == 0):
                continue
            result, unread_step = read(started, done), None
            stopping = stopping or result.stop
            saves = saves or stopping
            # A checkpoint ends the window, so that the lines of a resumed run are over the same steps.
            if done % cfg.log.every_steps == 0 or saves:
                found = gather_object(unread_files) if accelerator.num_processes > 1 else unread_files
                if accelerator.is_main_process:
                    bad_files.add(found)
                unread_files.clear()
                line = window.summary() | {"lr": lr}
                if math.isfinite(result.grad_norm):  # under fp16 it may not be
                    line["grad_norm"] = result.grad_norm
                metrics.write(done, epoch, **line)
                recent.append({"step": done, "epoch": epoch, **line})
                if not told and (starved := health.starved(recent)) is not None:
                    told = True
                    logger.warning(starved.text)
                text = f"loss {line['loss']:.4f}, {line['images_per_s']:.1f} images/s"
                bar.set_postfix_str(text)
                left = timedelta(seconds=round((total - done) * cfg.batch_size / line["images_per_s"]))
                level = logging.INFO if bar.disable else logging.DEBUG  # the terminal has the bar, train.log has lines
                message = "step %d/%d, epoch %.2f, %s, lr %.3g, %s left"
                logger.log(level, message, done, total, epoch, text, lr, left)
            if evaluates:
                with window.paused():
                    evaluate(done)
            if saves:
                with window.paused():
                    save(done)
            if stopping and done < total:
                logger.info("stopped by %s after step %d; the same command resumes", stop.received or "a signal", done)
                return False
    logger.info("finished %d steps", total)
    return True


class StepResult(NamedTuple):
    """loss: mean over processes and parts. grad_norm: before clipping. stop: whether any process was told to stop."""

    loss: float
    grad_norm: float
    stop: bool


class StartedStep:
    """A step that the device has been given; its numbers are on their way to the host."""

    def __init__(self, numbers: Tensor, names: list[str], scaler: torch.amp.GradScaler | None) -> None:
        # Into page-locked memory, behind the step's work: the host goes on meanwhile.
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._names, self._scaler = names, scaler
        self._copied: torch.cuda.Event | None = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def result(self) -> StepResult:
        """Wait for the step. Raises FloatingPointError if it changed no weight as its loss or gradient is not finite.

        Under fp16 a gradient may be: the scaler then skips the step and scales the next loss down.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, stop, norm, *norms = self._numbers.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        if not math.isfinite(norm):
            if self._scaler is None:
                bad = [name for name, value in zip(self._names, norms, strict=True) if not math.isfinite(value)]
                names = ", ".join(bad[:3]) or "its norm"
                raise FloatingPointError(f"the gradient is not finite in {names} ({len(bad)} parameters in all)")
            if self._scaler.get_scale() < 1:
                raise FloatingPointError("the gradient is not finite however far fp16's loss is scaled down")
        return StepResult(loss, norm, stop > 0)


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterator[Tensor],
    *,
    num_parts: int,
    clip_grad: float | None,
    stop: bool,
) -> StartedStep:
    """Backward through `num_parts` losses, then one step, on every process at once, without waiting for the device.

    optimizer: one of torch's fused ones, which can be told on the device to change nothing: so a loss or a gradient
    that is not finite leaves the weights as they are, and the host reads of it later. losses: computed as they are
    asked for, so that only the last part synchronises gradients. clip_grad: largest norm of the gradient. stop: this
    process was told to stop.
    """
    total = torch.zeros((), device=accelerator.device)
    for part in range(num_parts):
        last = part == num_parts - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = next(losses) / num_parts
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.unscale_gradients(optimizer)
    grads = {n: p.grad for n, p in accelerator.unwrap_model(model).named_parameters() if p.grad is not None}
    # Not clip_grad_norm_, which would spread a NaN to every gradient and give no norm of each.
    norms = torch.stack(torch._foreach_norm(list(grads.values())))
    norm = torch.linalg.vector_norm(norms)
    # One reduction a step. The norms are the same everywhere: gradients are averaged.
    shared = accelerator.reduce(torch.stack([total, torch.full_like(total, float(stop))]), reduction="mean")
    if accelerator.scaler is None:
        # What a GradScaler sets: the fused optimizers change nothing where it is 1.
        raw: Any = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
        raw.grad_scale, raw.found_inf = None, (~(shared[0] + norm).isfinite()).float()
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad, norm)
    started = StartedStep(torch.cat([shared, norm[None].float(), norms.float()]), list(grads), accelerator.scaler)
    optimizer.step()
    optimizer.zero_grad()
    return started


class Window:
    """Means over the steps since the last line of the log.

    device_type: of what computes the steps.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._on_cuda = device_type == "cuda"
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._images = self._steps = 0
        self._loss = self._waited = 0.0
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of images_per_s."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def add(self, loss: float, images: int) -> None:
        self._loss += loss
        self._steps += 1
        self._images += images

    def summary(self) -> dict[str, float]:
        """Numbers of the window, whose steps the device has done; starts the next.

        loss: mean. images_per_s. data_wait_s: seconds that the loop waited for data, in all. data_wait_share: of the
        window's time, in which the device stood still for want of data. On CUDA that is less: the loop may wait while
        the device computes the step before.
        """
        seconds = time.perf_counter() - self._started
        idle = sum(start.elapsed_time(end) for start, end in self._gaps) / 1000 if self._on_cuda else self._waited
        values = {
            "loss": self._loss / self._steps,
            "images_per_s": round(self._images / seconds, 2),
            "data_wait_s": round(self._waited, 4),
            "data_wait_share": round(idle / seconds, 4),
        }
        self._reset()
        return values


def due(done: int, every: float, total: int) -> bool:
    """Whether `done` steps just reached a multiple of `every` steps, which may be fractional, or the end."""
    # The small term keeps a multiple that is whole in decimals whole in binary: 3 / (.1 * 30) is just below 1.
    return done == total or math.floor(done / every + 1e-9) > math.floor((done - 1) / every + 1e-9)
