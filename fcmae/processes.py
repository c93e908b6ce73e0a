"""Functions in a process of their own, which may crash, block or run out of memory alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fcmae.data.cores import end_with_parent

OUT_OF_MEMORY = "out of memory"
_ONE_AT_A_TIME = threading.Lock()


class Failed(Exception):  # noqa: N818
    """What happened in another process, in a sentence."""


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returns in a fresh process, which ends before or with this one.

    Args:
        function: of a module, so that the other process finds it.
        args: its arguments.

    Raises:
        Failed: if it raises or the process is killed.
    """
    (found,) = each_in_process(_returned, function, args)
    return found


def each_in_process(
    function: Callable[..., Iterable[Any]], *args: Any, timeout_s: float | None = None
) -> Iterator[Any]:
    """What function(*args) yields in a fresh process, as it is found: what came before a failure is not lost.

    Args:
        function: see `in_process`.
        args: likewise.
        timeout_s: after which the process is killed; None waits.

    Raises:
        Failed: see `in_process`, or if it takes longer.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, args))
    with _without_main():
        process.start()
    theirs.close()
    end = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while ours.poll(None if end is None else max(0.0, end - time.monotonic())):
            found, failure = ours.recv()
            if found is not None:
                yield found[0]
                continue
            process.join(10)  # its data workers end with it
            if failure:
                raise Failed(failure)
            return
        raise Failed(f"it was not done after {timeout_s:g} s")
    except EOFError:
        process.join()
        raise Failed(_end(process.exitcode or 0)) from None
    finally:  # after Ctrl-C too
        process.kill()
        process.join()
        ours.close()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the caller's script, which the new process would run first, as what is called is in modules."""
    main = sys.modules["__main__"]
    with _ONE_AT_A_TIME:
        hidden: tuple[str, ...] = ("__spec__", "__file__")
        kept = {name: vars(main).pop(name) for name in hidden if name in vars(main)}
        main.__spec__ = None
        try:
            yield
        finally:
            vars(main).update(kept)


def _returned(function: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[Any]:
    yield function(*args)


def _answer(told: Connection, function: Callable[..., Iterable[Any]], args: tuple[Any, ...]) -> None:
    """In the new process: leave Ctrl-C to the parent, end with it, and be the one that lack of memory ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        for found in function(*args):
            told.send(((found,), ""))
        told.send((None, ""))
    except Exception as error:  # told in words: not every exception survives the way to another process
        told.send((None, _reason(error)))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + (text[:200] or "no reason given")


def _end(status: int) -> str:
    if status == -signal.SIGKILL:
        return f"{OUT_OF_MEMORY}, or killed by somebody"
    return f"ended with status {status}" if status >= 0 else f"Python was killed by {signal.Signals(-status).name}"
