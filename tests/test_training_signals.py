"""A signal asks a run to stop, a second interrupt ends it, and what was there before returns."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fcmae.training.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_noted_and_the_old_handlers_return(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # again: nothing more
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_further_interrupts_are_the_same_impatience_until_a_while_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopSignal, "GRACE_S", 0.5)
    # Not that of an earlier test's run, which was interrupted and may still be waiting for its while to pass.
    signal.signal(signal.SIGINT, before := signal.default_int_handler)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), StopSignal():
        interrupt()
        try:
            interrupt()
        finally:
            interrupt()
    for _ in range(3):
        interrupt()
    time.sleep(0.6)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_nohup_has_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
