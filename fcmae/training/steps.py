"""The optimizer steps of a run, one by one: their micro-batches, seed, learning rate and end; the loop fills them.

for step in steps:
    for batch in step.micro_batches():
        with step.accumulate():
            step.backward(loss of the batch)
    step.update()
    step.save()
    if step.evaluates:
        ...
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fcmae import threads
from fcmae.config import RunConfig
from fcmae.data.dataset import Batch, ImageDataset
from fcmae.data.loader import build_loader, prefetched
from fcmae.data.sampler import StepSampler
from fcmae.training import checkpoint
from fcmae.training.launch import same_everywhere, waiting_for_all
from fcmae.training.log import Log
from fcmae.training.messages import same_command
from fcmae.training.micro_batches import micro_batch_size, smaller_micro_batch
from fcmae.training.optim import Schedule, set_learning_rate
from fcmae.training.records import read_metrics, record_images_that_fit
from fcmae.training.run import SMALLER
from fcmae.training.session import Session

logger = logging.getLogger("fcmae")


def schedule_of(cfg: RunConfig, per_epoch: int, start: int) -> Schedule:
    """When what happens in a run, as its settings say.

    Args:
        cfg: of pretraining or fine-tuning.
        per_epoch: steps of an epoch.
        start: steps that were done before.
    """
    return Schedule(
        start=start,
        per_epoch=per_epoch,
        total=max(1, round(cfg.epochs * per_epoch)),
        peak_lr=cfg.optim.base_lr * cfg.batch_size / 256,
        min_lr=cfg.optim.min_lr,
        warmup=round(cfg.optim.warmup_epochs * per_epoch),
        log_every=cfg.log.every_steps,
        eval_every=cfg.log.eval_epochs * per_epoch,
        save_every=cfg.checkpoint.every_epochs * per_epoch,
        milestone_every=cfg.checkpoint.milestone_epochs * per_epoch,
    )


def check_pooled(session: Session[Any], what: str) -> None:
    """Refuse to go on with micro-batches of another size than before, where something pools over them.

    Args:
        session: of the run.
        what: pools.

    Raises:
        ValueError: in one sentence.
    """
    resumed = session.run.resume_from
    if resumed is None:
        return
    now = micro_batch_size(session.cfg, session.accelerator.num_processes)
    if (before := checkpoint.read_meta(resumed).progress.get("images_at_once", now)) != now:
        raise ValueError(
            f"{what} pools over {now} images, and the run did over {before}: choose grad_accum and processes so that "
            f"batch_size / (grad_accum * processes) is {before} again"
        )


def evaluate_if_owed(session: Session[Any], log: Log, evaluate: Callable[[int], None]) -> None:
    """Evaluate after the step that a run goes on from, where that was cut off, or left for now by a signal.

    Args:
        session: of the run.
        log: of the run, which counts none of that as training.
        evaluate: called with the number of the step, on every process.
    """
    schedule = log.schedule

    def is_missing() -> bool:
        lines = read_metrics(session.run.path / "metrics.jsonl")
        return not any(line["step"] == schedule.start and "lr" not in line for line in lines)

    if schedule.start > 0 and schedule.evaluates(schedule.start) and same_everywhere(session.accelerator, is_missing):
        before = time.perf_counter()
        evaluate(schedule.start)
        log.window.skip_since(before)


class Steps:
    """The steps of a run from where it starts to its end, or until a signal asks to stop.

    Attributes:
        session, log, model, optimizer: as they were given.
        schedule, accelerator: of these.
        batches: the micro-batches that follow.
        finished: whether the end was reached.

    Args:
        session: of the run, whose settings get smaller micro-batches once its memory does not suffice.
        log: what the run says, and when what happens.
        model: as accelerate prepared it.
        optimizer: likewise; one of torch's fused ones.
        dataset: samples by (epoch, index).
        fingerprint: of the run's images, for its checkpoints, as are the next two.
        progress: what else the loop needs to go on, as JSON values.
        ema: the moving average of the model, or None.
        masks_per_image: how often batch_size counts an image.
    """

    def __init__(
        self,
        session: Session[Any],
        log: Log,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: ImageDataset,
        *,
        fingerprint: str,
        progress: Mapping[str, Any] | None = None,
        ema: nn.Module | None = None,
        masks_per_image: int = 1,
    ) -> None:
        self.session, self.log, self.model, self.optimizer = session, log, model, optimizer
        self.schedule, self.accelerator = log.schedule, session.accelerator
        self._dataset, self._masks_per_image = dataset, masks_per_image
        self._fingerprint, self._progress, self._ema = fingerprint, progress or {}, ema
        self.batches = self._read_from(self.schedule.start)
        self.finished = self.schedule.start >= self.schedule.total

    def __iter__(self) -> Iterator[Step]:
        """The steps, each with its seed and learning rate set.

        Raises:
            FloatingPointError: before anything is saved, if the loss or a gradient is not finite; that step changes no
                weight.
        """
        self._announce()
        before: Step | None = None
        for number in range(self.schedule.start, self.schedule.total):
            seed_step(self.session.cfg.seed, number, self.accelerator.process_index)
            lr = self.schedule.learning_rate(number)
            set_learning_rate(self.optimizer, lr, number)
            step = Step(self, number + 1, lr, before)
            yield step
            self.log.window.skip_since(step.logged_at)
            if step.stops:
                signal, command = self.session.stop.received or "a signal", same_command(self.session.cfg)
                logger.info("stopped by %s after step %d; %s resumes", signal, number + 1, command)
                return
            before = step
        self.finished = True
        logger.info("finished %d steps", self.schedule.total)

    def _read_from(self, start: int) -> Iterator[Batch]:
        """The micro-batches of the steps from one on."""
        cfg, device = self.session.cfg, self.accelerator.device
        order = StepSampler(
            len(self._dataset),
            cfg.batch_size,
            cfg.seed,
            start_step=start,
            end_step=self.schedule.total,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            grad_accum=cfg.num_micro_batches,
            masks_per_image=self._masks_per_image,
        )
        loader = build_loader(self._dataset, order, num_workers=cfg.data.num_workers, device_type=device.type)
        return self.log.window.timed(prefetched(loader, device))

    def shrink_micro_batches(self, number: int, exchanges: bool) -> None:
        """Have this step, of which nothing is kept, and those to come computed in smaller micro-batches.

        Args:
            number: of the step that found too little memory.
            exchanges: whether other processes wait for its gradients.

        Raises:
            ValueError: if it cannot be, or not before the run is started again.
        """
        cfg, processes, started = self.session.cfg, self.accelerator.num_processes, number - 1
        lack = f"step {number}: the memory of the GPU does not suffice for {micro_batch_size(cfg, processes)} images"
        pools = self.accelerator.unwrap_model(self.model).encoder.spec.has_batch_norm  # model.init may have brought it
        if pools or (smaller := smaller_micro_batch(cfg, processes)) is None:
            raise ValueError(f"{lack} at once, and the run cannot be computed in smaller micro-batches: try {SMALLER}")
        at_once = micro_batch_size(smaller, processes)
        record_images_that_fit(self.session.run.path, at_once)
        if exchanges:
            raise ValueError(
                f"{lack}, and other processes wait for it: {same_command(cfg)} goes on with {at_once} at once"
            )
        logger.warning("%s: it is taken again with %d at once, as are those to come", lack, at_once)
        self.session.run.cfg = smaller
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # what is kept there is in pieces of the former sizes
        seed_step(cfg.seed, started, self.accelerator.process_index)
        self.batches = self._read_from(started)

    def save(self, number: int) -> None:
        """Write a checkpoint, on the main process, while the others wait.

        Args:
            number: steps that are done.
        """
        run, cfg, accelerator = self.session.run, self.session.cfg, self.accelerator
        with waiting_for_all(accelerator):
            if not accelerator.is_main_process:
                return
            net = accelerator.unwrap_model(self.model)
            tensors = {"model": net.state_dict(), "optimizer": checkpoint.optimizer_state(self.optimizer, net)}
            if self._ema is not None:
                tensors["ema"] = self._ema.state_dict()
            progress = {
                **self._progress,
                "images_at_once": micro_batch_size(cfg, accelerator.num_processes),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            spec, config = net.encoder.spec.model_dump(), cfg.model_dump(mode="json")
            checkpoint.save(
                run.path, checkpoint.Meta(run.kind, number, config, self._fingerprint, progress, spec), tensors
            )
            keep, milestone_epochs = cfg.checkpoint.keep, cfg.checkpoint.milestone_epochs
            checkpoint.prune(run.path, keep, self.schedule.per_epoch, milestone_epochs, run.last_good())

    def _announce(self) -> None:
        cfg, processes, device = self.session.cfg, self.accelerator.num_processes, self.accelerator.device.type
        precision = self.accelerator.mixed_precision.replace("no", "fp32")
        message = "%d steps of %d images on %d x %s in %s"
        logger.info(message, self.schedule.total, cfg.batch_size, processes, device, precision)
        if self.schedule.start:
            logger.info("resuming after step %d", self.schedule.start)
        if processes == 1 and (share := threads.busy()) > threads.BUSY:
            message = "other processes use %.0f %% of the cores: steps take longer than on an idle machine (%s)"
            logger.info(message, 100 * share, threads.in_force() or "fcmae doctor says more")
        if self.schedule.min_lr > self.schedule.peak_lr and self.accelerator.is_main_process:
            logger.warning(
                "the learning rate rises from its peak of %.3g to optim.min_lr = %g, which no batch size scales",
                self.schedule.peak_lr,
                self.schedule.min_lr,
            )
        if self.schedule.warmup >= self.schedule.total and self.accelerator.is_main_process:
            logger.warning(
                "the learning rate never reaches its peak of %.3g: the warm-up takes %g epochs and the run has %g; "
                "lower optim.warmup_epochs or raise epochs",
                self.schedule.peak_lr,
                cfg.optim.warmup_epochs,
                cfg.epochs,
            )


class Step:
    """One optimizer step, in micro-batches that are computed one after the other.

    Attributes:
        number: steps that are done when this one is.
        evaluates: whether an evaluation is due after it; a run that is told to stop leaves it for when it goes on.
        stops: whether a process was told to, once it is saved.
        logged_at: when all of it was done but its checkpoint, by time.perf_counter.

    Args:
        steps: of which it is one.
        number: see above.
        lr: its learning rate.
        before: the step before, whose numbers may not be read yet; None for the first.
    """

    def __init__(self, steps: Steps, number: int, lr: float, before: Step | None = None) -> None:
        self._steps, self.number, self.lr, self._before = steps, number, lr, before
        self.evaluates = steps.schedule.evaluates(number)
        self.stops = False
        self.logged_at = 0.0
        self._lacks_memory = False
        self._result: StepResult | None = None
        self._loss, self._share = torch.zeros(2, device=steps.accelerator.device)
        self._is_whole = steps.accelerator.num_processes == 1  # others may have a share of theirs

    def micro_batches(self) -> Iterator[Batch]:
        """Those of the step, each to be computed within `accumulate`; only the last synchronises gradients.

        Raises:
            ValueError: if the memory does not suffice for the smallest.
        """
        steps, done = self._steps, 0
        while done < steps.session.cfg.num_micro_batches:
            is_last = done + 1 == steps.session.cfg.num_micro_batches
            with contextlib.nullcontext() if is_last else steps.accelerator.no_sync(steps.model):
                # CUDA graphs may use the memory of the micro-batch before again.
                if steps.session.cfg.model.compile == "cudagraphs":  # else it loads the compiler, 3 s of every start
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                batch = next(steps.batches)
                steps.log.unread_files.extend(batch.bad)
                yield batch
            done += 1
            if self._lacks_memory:
                steps.shrink_micro_batches(self.number, is_last and steps.accelerator.num_processes > 1)
                self._loss.zero_()
                self._share.zero_()
                self._lacks_memory, done = False, 0

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around the computing of a micro-batch: where the GPU lacks memory, the step is taken again in smaller ones.

        What is computed should have no name outside it, so that it is let go then.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            self._lacks_memory = True  # what was computed is let go before more is done

    def backward(self, loss: Tensor, share: Tensor | float = 1.0) -> None:
        """Add the gradients of a micro-batch's loss.

        Args:
            loss: (), a mean.
            share: of what the mean could be over that it is over; a micro-batch counts by it among all of the step.
        """
        loss = loss * share / self._steps.session.cfg.num_micro_batches
        self._steps.accelerator.backward(loss)
        self._loss += loss.detach()
        self._share += share
        self._is_whole = self._is_whole and not isinstance(share, Tensor)

    def update(self) -> None:
        """Change the weights, on every process at once; see `start_update`."""
        steps, cfg = self._steps, self._steps.session.cfg
        self._started = start_update(
            steps.accelerator,
            steps.model,
            steps.optimizer,
            self._loss,
            None if self._is_whole else self._share / cfg.num_micro_batches,
            clip_grad=cfg.optim.clip_grad,
            stop=steps.session.stop.received is not None,
        )
        steps.log.advance()

    def save(self) -> None:
        """Write the line and the checkpoint that are due: before the evaluation, which may be cut off.

        While the device computes the step, the numbers of the one before are read; where something is due, its own.
        They say whether it is the last one, which is saved and leaves its evaluation for when the run goes on.

        Raises:
            FloatingPointError: see `Steps`.
        """
        steps, number = self._steps, self.number
        before, self._before = self._before, None
        if before is not None:
            self.stops = before.result().stop
        if steps.accelerator.num_processes == 1 and steps.session.stop.received is not None:
            self.stops = True  # no other process has to hear of it first
        logs, saves = steps.schedule.logs(number), steps.schedule.saves(number)
        if saves or self.evaluates or self.stops or logs:
            result = self.result()
            self.stops = self.stops or result.stop
            saves = saves or self.stops
            self.evaluates = self.evaluates and not self.stops
            # A checkpoint ends the window, so that the lines of a resumed run are over the same steps.
            if logs or saves:
                steps.log.write(number, self.lr, result.grad_norm)
        self.logged_at = time.perf_counter()
        if saves:
            steps.save(number)

    def result(self) -> StepResult:
        """Its numbers; the first time, they are waited for and enter the log.

        Raises:
            FloatingPointError: see `Steps`.
        """
        if self._result is None:
            try:
                self._result = self._started.result()
            except FloatingPointError as error:
                raise FloatingPointError(f"step {self.number}: {error}") from None
            self._steps.log.window.add(self._result.loss)
        return self._result


class StepResult(NamedTuple):
    """The numbers of a step that is done.

    Attributes:
        loss: mean over processes and micro-batches.
        grad_norm: before clipping.
        stop: whether any process was told to stop.
    """

    loss: float
    grad_norm: float
    stop: bool


class StartedStep:
    """A step that the device has been given; its numbers are on their way to the host.

    Args:
        numbers: (3 + P,) float, on the device: loss, whether to stop (above 0), norm of the gradient, and the norm of
            the gradient of each of P parameters.
        names: of the P parameters.
        scaler: of fp16, or None.
    """

    def __init__(self, numbers: Tensor, names: list[str], scaler: torch.amp.GradScaler | None) -> None:
        # Into page-locked memory, behind the step's work: the host goes on meanwhile.
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._names, self._scaler = names, scaler
        self._copied: torch.cuda.Event | None = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def result(self) -> StepResult:
        """Wait for the step.

        Under fp16 a gradient may be not finite: the scaler then skips the step and scales the next loss down.

        Raises:
            FloatingPointError: if the step changed no weight as its loss or gradient is not finite.
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


def start_update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    share: Tensor | None = None,
    *,
    clip_grad: float | None = None,
    stop: bool = False,
) -> StartedStep:
    """Change the weights by their gradients, and clear these, without waiting for the device.

    Args:
        accelerator: of the processes.
        model: as accelerate prepared it; its gradients are those of all micro-batches.
        optimizer: one of torch's fused ones, which can be told on the device to change nothing: so a loss or a gradient
            that is not finite leaves the weights as they are, and the host reads of it later.
        loss: () of this process, to be reported.
        share: () by which it was multiplied, as the gradients were, which is undone for all processes together; None
            for 1 in all.
        clip_grad: largest norm of the gradient.
        stop: this process was told to stop.
    """
    accelerator.unscale_gradients(optimizer)
    grads = {n: p.grad for n, p in accelerator.unwrap_model(model).named_parameters() if p.grad is not None}
    # One reduction a step.
    counts = torch.ones_like(loss) if share is None else share
    shared = accelerator.reduce(torch.stack([loss, torch.full_like(loss, float(stop)), counts]), reduction="mean")
    counts = shared[2].clamp(min=torch.finfo(shared.dtype).tiny)
    if share is not None:
        torch._foreach_div_(list(grads.values()), counts)
    shared = torch.stack([shared[0] / counts, shared[1]])
    # Not clip_grad_norm_, which would spread a NaN to every gradient and give no norm of each. The norms are the same
    # everywhere: gradients are averaged.
    norms = torch.stack(torch._foreach_norm(list(grads.values())))
    norm = torch.linalg.vector_norm(norms)
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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator for one step.

    Drop path, mixup and the like then depend on (seed, step, rank) alone, so a resumed run draws what an
    uninterrupted one does, and no random state needs to be stored.

    Args:
        seed: of the run.
        step: 0 at the first optimizer step.
        rank: of this process.
    """
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  # timm's mixup draws from numpy's global generator
    torch.manual_seed(number)
