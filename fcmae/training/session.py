"""What every run does before it knows its images, around all that it writes, and with its settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Generic, cast

from accelerate import Accelerator

from fcmae.config import AnyRun, check_launch
from fcmae.training.launch import (
    closing_trackers,
    ending_together,
    finish,
    make_accelerator,
    same_everywhere,
    waiting_for_all,
)
from fcmae.training.messages import showing
from fcmae.training.micro_batches import micro_batch_size, settle_grad_accum, with_micro_batch
from fcmae.training.records import images_that_fit
from fcmae.training.run import Run, RunDirectory
from fcmae.training.signals import StopSignal, ending_at_once

logger = logging.getLogger("fcmae")


@dataclass(frozen=True)
class Session(Generic[AnyRun]):
    """A run that has been called for, on all of its processes.

    Attributes:
        run: its directory, not yet open; it has the settings.
        accelerator: of this process.
        stop: the signals to it, once it is open.
    """

    run: RunDirectory
    accelerator: Accelerator
    stop: StopSignal

    @property
    def cfg(self) -> AnyRun:
        """The settings in force, with a number for grad_accum."""
        return cast("AnyRun", self.run.cfg)

    def settle_license(self, found: str | None) -> None:
        """Settle `model.license`: the given one, else that of the run when it began, else the weights'.

        Args:
            found: the licence that the weights name, where they were read.
        """
        cfg, saved = self.cfg, self.run.saved
        given = cfg.model.license or (None if saved is None else saved.model.license)
        model = cfg.model.model_copy(update={"license": given or found})
        self.run.cfg = cfg.model_copy(update={"model": model})

    def limit_to_known_memory(self) -> None:
        """Have micro-batches as small as this run was found to need on this device."""
        cfg, processes = self.cfg, self.accelerator.num_processes
        fits = same_everywhere(self.accelerator, partial(images_that_fit, self.run.path, self.accelerator.device))
        fitting = cfg if fits is None else with_micro_batch(cfg, processes, fits)
        if fitting is not cfg:
            message = "%d images at once, as more did not fit into the memory before: grad_accum = %d"
            logger.info(message, micro_batch_size(fitting, processes), fitting.grad_accum)
            self.run.cfg = fitting

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around all that is written: see `RunDirectory.open`. Signals stop it at a step, and all processes end it.

        An evaluation has nothing to save, and ends at once.
        """
        with ExitStack() as around:
            with waiting_for_all(self.accelerator):  # the first one may have a run to delete
                around.enter_context(self.run.open(self.accelerator.is_main_process))
            around.enter_context(closing_trackers(self.accelerator))
            around.enter_context(self.stop if self.cfg.trains else ending_at_once())
            yield
            finish(self.accelerator, self.stop)
        # A launcher that sees one end with a signal's status ends the rest, of which the first still writes.
        with waiting_for_all(self.accelerator):
            pass

    def result(self) -> Run:
        """The run, ended."""
        return Run(self.run.path, self.run.kind, self.run.finished, self.stop.received)


@contextmanager
def begin(cfg: AnyRun) -> Iterator[Session[AnyRun]]:
    """Join the processes of a run and look at its directory; nothing is written, and an error of one ends all.

    Args:
        cfg: its settings, with `out`.

    Raises:
        ValueError: see `make_accelerator`, `RunDirectory`, its `agree` and `check_launch`.
    """
    accelerator = make_accelerator(cfg)
    shown = showing() if accelerator.is_main_process else nullcontext()
    with ending_together(accelerator, cfg.out), shown:
        run = RunDirectory(cfg)
        run.agree(accelerator)
        check_launch(cfg, accelerator.num_processes)
        session = Session[AnyRun](run, accelerator, StopSignal())
        device_type = accelerator.device.type
        run.cfg = settle_grad_accum(cfg, accelerator.num_processes, device_type, run.saved)
        yield session
