"""train.log: what a run says, there and on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from fcmae.config import RunConfig
from fcmae.data.source import printable

logger = logging.getLogger("fcmae")

FORM = "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"  # of a line


def same_command(cfg: RunConfig) -> str:
    """What resumes a run, in words."""
    return "the same command without --overwrite" if cfg.overwrite else "the same command"


@contextmanager
def showing() -> Iterator[None]:
    """Show what is said inside the block, and keep it for the train.log that is opened there."""
    if any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        yield
        return
    level, terminal = logger.level, _TerminalHandler(logging.INFO)
    terminal.setFormatter(_Printable(*FORM))
    handlers = (_Early(0), terminal)
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)


@contextmanager
def logging_to(path: Path, failed: Callable[[], object]) -> Iterator[None]:
    """Have what is said inside the block, and the error that ends it, added to a file, and shown.

    What was said before, inside `showing`, is added first.

    Args:
        path: the file.
        failed: called after that error was added, or what `log_failure` is given.
    """
    file = _FileHandler(path, failed)
    file.setFormatter(_Printable(*FORM))
    previous, threading.excepthook = threading.excepthook, _thread_failed
    with showing():
        logger.addHandler(file)
        for early in [handler for handler in logger.handlers if isinstance(handler, _Early)]:
            logger.removeHandler(early)
            early.setTarget(file)
            early.flush()
        try:
            yield
        except BaseException as error:
            log_failure(f"{type(error).__name__}: {error}")
            raise
        finally:
            threading.excepthook = previous
            logger.removeHandler(file)
            file.close()


def last_words(what: str, said: str) -> None:
    """Say on the terminal what ends this process, and log it if the disk answers within a second.

    Args:
        what: for the log.
        said: for the terminal, which no lock holds up.
    """
    with suppress(OSError):  # a terminal may be gone
        os.write(2, said.encode(errors="replace"))
    logging_it = threading.Thread(target=log_failure, args=(what,), daemon=True)
    logging_it.start()
    logging_it.join(1)


def log_failure(what: str) -> None:
    """Have it in train.log what ends the run, in the process that keeps one. The terminal is told by the command.

    Args:
        what: the error.
    """
    for handler in logger.handlers:
        if isinstance(handler, _FileHandler):
            handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, f"failed: {what}", (), None))
            handler.failed()


class _Early(MemoryHandler):
    """What is said before there is a train.log: kept, however much it is, until it has a target."""


class _TerminalHandler(logging.Handler):
    """Log lines above the progress bar, where there is one. A terminal may be gone, as after SIGHUP."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """train.log. On a full disk a line is left out: the numbers and checkpoints beside it stop the run."""

    def __init__(self, path: Path, failed: Callable[[], object]) -> None:
        super().__init__(path, encoding="utf-8")
        self.failed = failed

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Printable(logging.Formatter):
    """Lines that any terminal can show, whatever is in the name of a file."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """No traceback of a tracker's thread that could not write: the main thread gets the same error."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
