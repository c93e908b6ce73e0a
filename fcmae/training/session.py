"""What every run does before it knows its images, and around all that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic

from accelerate import Accelerator

from fcmae.config import AnyRun, check_launch
from fcmae.training.launch import closing_trackers, ending_together, finish, make_accelerator, waiting_for_all
from fcmae.training.messages import showing
from fcmae.training.micro_batches import settle_grad_accum
from fcmae.training.run import Run, RunDirectory
from fcmae.training.signals import StopSignal, ending_at_once


@dataclass(frozen=True)
class Session(Generic[AnyRun]):
    """A run that has been called for, on all of its processes.

    Attributes:
        cfg: its settings, with a number for grad_accum.
        run: its directory, not yet open.
        accelerator: of this process.
        stop: the signals to it, once it is open.
    """

    cfg: AnyRun
    run: RunDirectory
    accelerator: Accelerator
    stop: StopSignal

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
        cfg = settle_grad_accum(cfg, accelerator.num_processes, accelerator.device.type, run.saved)
        yield Session(cfg, run, accelerator, StopSignal())
