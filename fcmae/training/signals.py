"""Signals to a run: the loop finishes its step; a second interrupt ends it at once, whatever hangs.

An evaluation alone, which has nothing to save, ends at the first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fcmae.data.loader import STOP_SIGNALS, end_workers
from fcmae.training.messages import last_words


def _taken() -> list[int]:
    """The signals that stop a run and whose handlers are ours to set: `nohup` has SIGHUP ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class Stopped(SystemExit):
    """The end that a signal asks for."""

    def __init__(self, number: int) -> None:
        super().__init__(0 if number == signal.SIGUSR1 else 128 + number)
        self._name = signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped by {self._name}"


@contextmanager
def ending_at_once() -> Iterator[None]:
    """A signal that would stop a run ends what has nothing to save, with the exit status of `Run.status`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    previous = {number: signal.signal(number, end) for number in _taken() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the loop to finish its step; a second SIGINT interrupts at once.

    Where a read hangs, in a worker or here, the second SIGINT ends it too: the workers are killed, and so is this
    process if it has not come to its end soon after, unless it is a session at a prompt. Further ones are the same
    impatience. Outside the main thread, where Python lets nobody take signals, they stay as they are.

    Attributes:
        received: the name of the signal that came first, or None.
    """

    GRACE_S = 3.0

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupted = False
        self._left = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in _taken()}
        if not self._previous:
            return self
        # Python's handlers wait for the main thread, which a read may hold; what is written here does not.
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._previous:
            return
        previous = self._previous[signal.SIGINT]
        until = time.monotonic() + self.GRACE_S

        def late(number: int, frame: FrameType | None) -> None:
            if time.monotonic() > until:
                signal.signal(number, previous)
                os.kill(os.getpid(), number)

        for number, handler in self._previous.items():
            signal.signal(number, late if kind is KeyboardInterrupt and number == signal.SIGINT else handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)
        self._left.set()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
        elif number == signal.SIGINT and not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt

    def _watch(self, read_end: int) -> None:
        """In a thread of its own: see to it that a second SIGINT ends this process."""
        num_signals = 0
        with os.fdopen(read_end, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                num_signals += number[0] in STOP_SIGNALS
                if num_signals > 1 and number[0] == signal.SIGINT:
                    break
            else:
                return
            end_workers()
            if not self._left.wait(self.GRACE_S) and not hasattr(sys, "ps1"):
                last_words("KeyboardInterrupt", "\nfcmae: interrupted\n")
                os._exit(130)
