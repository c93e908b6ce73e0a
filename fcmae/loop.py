"""The training loop that pretraining and fine-tuning share: steps, logs, evaluations, checkpoints, signals."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fcmae import checkpoint
from fcmae.config import Optim, RunConfig
from fcmae.data.bad_files import BadFiles
from fcmae.data.dataset import Batch, Sample
from fcmae.data.loader import build_loader
from fcmae.data.sampler import StepSampler
from fcmae.optim import learning_rate, set_learning_rate
from fcmae.run import Metrics, RunDirectory, StopSignal, seed_step

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
) -> bool:
    """Train from start_step to the end of cfg.epochs, or until a signal asks to stop.

    model, optimizer: as accelerate prepared them. train_set: num_images samples by key, read by num_workers processes.
    loss_of: the mean loss of a batch, a scalar with gradients. evaluate, save: called on every process
    with the number of steps taken. after_step: called after each change of the weights.
    Returns whether the end was reached.
    Raises FloatingPointError, before the weights change, if the loss or a gradient is not finite.
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
    )
    device = accelerator.device
    window = Window()
    batches = window.timed(iter(build_loader(train_set, sampler, num_workers=num_workers, device_type=device.type)))
    unread: list[tuple[str, str]] = []
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
            unread.extend(batch.bad)
            yield loss_of(batch.to(device))

    hidden = None if accelerator.is_main_process else True  # None: where there is no terminal
    with tqdm(total=total, initial=start_step, unit="step", disable=hidden) as bar:
        for step in range(start_step, total):
            seed_step(cfg.seed, step, accelerator.process_index)
            lr = learning_rate(step, peak=peak, minimum=schedule.min_lr, warmup_steps=warmup, total_steps=total)
            set_learning_rate(optimizer, lr, step)
            try:
                result = optimizer_step(
                    accelerator,
                    model,
                    optimizer,
                    losses(),
                    num_parts=cfg.grad_accum,
                    clip_grad=schedule.clip_grad,
                    stop=stop.received is not None,
                )
            except FloatingPointError as error:
                good = checkpoint.latest(run.path)
                kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
                raise FloatingPointError(f"step {step + 1}: {error}; {kept}") from None
            after_step()
            done, epoch = step + 1, (step + 1) / steps_per_epoch
            window.add(result.loss, cfg.batch_size)
            bar.update()

            milestone = cfg.checkpoint.milestone_epochs * steps_per_epoch
            saves = (
                due(done, cfg.checkpoint.every_epochs * steps_per_epoch, total)
                or (milestone > 0 and done % milestone == 0)
                or result.stop
            )
            # A checkpoint ends the window, so that the lines of a resumed run are over the same steps.
            if done % cfg.log.every_steps == 0 or saves:
                found = gather_object(unread) if accelerator.num_processes > 1 else unread
                if accelerator.is_main_process:
                    bad_files.add(found)
                unread.clear()
                line = window.summary() | {"lr": lr}
                if math.isfinite(result.grad_norm):  # under fp16 it may not be
                    line["grad_norm"] = result.grad_norm
                metrics.write(done, epoch, **line)
                text = f"loss {line['loss']:.4f}, {line['images_per_s']:.1f} images/s"
                bar.set_postfix_str(text)
                left = timedelta(seconds=round((total - done) * cfg.batch_size / line["images_per_s"]))
                level = logging.INFO if bar.disable else logging.DEBUG  # the terminal has the bar, train.log has lines
                message = "step %d/%d, epoch %.2f, %s, lr %.3g, %s left"
                logger.log(level, message, done, total, epoch, text, lr, left)
            if due(done, cfg.log.eval_epochs * steps_per_epoch, total):
                with window.paused():
                    evaluate(done)
            if saves:
                with window.paused():
                    save(done)
            if result.stop and done < total:
                logger.info("stopped by %s after step %d; the same command resumes", stop.received or "a signal", done)
                return False
    logger.info("finished %d steps", total)
    return True


class StepResult(NamedTuple):
    """loss: mean over processes and parts. grad_norm: before clipping. stop: whether any process was told to stop."""

    loss: float
    grad_norm: float
    stop: bool


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterator[Tensor],
    *,
    num_parts: int,
    clip_grad: float | None,
    stop: bool,
) -> StepResult:
    """Backward through `num_parts` losses, then one step, on every process at once.

    losses: computed as they are asked for, so that only the last part synchronises gradients. clip_grad: largest norm
    of the gradient. stop: this process was told to stop. Raises FloatingPointError, before any weight changes, if the
    loss or a gradient is not finite; under fp16 a gradient may be, and accelerate's scaler then skips the step.
    """
    total = torch.zeros((), device=accelerator.device)
    for part in range(num_parts):
        last = part == num_parts - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = next(losses) / num_parts
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.unscale_gradients(optimizer)
    # Not clip_grad_norm_, which would spread a NaN to every gradient before the check below names where it is.
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    # One reduction and one wait for the device a step. The norm is the same everywhere: gradients are averaged.
    told = torch.tensor(float(stop), device=total.device)
    reduced = accelerator.reduce(torch.stack([total, norm.float(), told]), reduction="mean")
    loss_value, norm_value, stopping = reduced.tolist()
    if not math.isfinite(loss_value):
        raise FloatingPointError(f"the loss is {loss_value}")
    if not math.isfinite(norm_value) and accelerator.scaler is None:
        net = accelerator.unwrap_model(model)  # without DDP's prefix to the names
        bad = [n for n, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        names = ", ".join(bad[:3]) or "its norm"
        raise FloatingPointError(f"the gradient is not finite in {names} ({len(bad)} parameters in all)")
    if not math.isfinite(norm_value) and accelerator.scaler is not None and accelerator.scaler.get_scale() < 1:
        raise FloatingPointError("the gradient is not finite however far fp16's loss is scaled down")
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad, norm)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss_value, norm_value, stopping > 0)


class Window:
    """Means over the steps since the last line of the log."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._images = self._steps = 0
        self._loss = self._waited = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that the loop waits for them counted."""
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

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
        """loss: mean. images_per_s. data_wait_s: seconds waiting for data, in all. Starts the next window."""
        seconds = time.perf_counter() - self._started
        values = {
            "loss": self._loss / self._steps,
            "images_per_s": round(self._images / seconds, 2),
            "data_wait_s": round(self._waited, 4),
        }
        self._reset()
        return values


def due(done: int, every: float, total: int) -> bool:
    """Whether `done` steps just reached a multiple of `every` steps, which may be fractional, or the end."""
    # The small term keeps a multiple that is whole in decimals whole in binary: 3 / (.1 * 30) is just below 1.
    return done == total or math.floor(done / every + 1e-9) > math.floor((done - 1) / every + 1e-9)
