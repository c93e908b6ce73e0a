"""Where the commands that examine models write, and the names of their files."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fcmae.atomic import UNFINISHED
from fcmae.config.base import near_runs
from fcmae.data.index import is_of_run
from fcmae.data.source import printable
from fcmae.evaluation.models import RANDOM, is_control

TEMPORARY = (".features-", UNFINISHED)  # prefixes of what a killed process leaves


def default_out(models: Sequence[str], out: Path | None, name: str) -> Path:
    """Where a command writes: `out`, or RUN/NAME if the models, apart from controls, are RUN, random:RUN or both.

    Args:
        models: as they were given.
        out: the given path, if any.
        name: of the directory in RUN.

    Raises:
        ValueError: if neither is known, or a model is given twice.
    """
    if doubled := [model for number, model in enumerate(models) if model in models[:number]]:
        raise ValueError(f"model = {doubled[0]!r} is given twice: give each once")
    if out is not None:
        return out
    networks = [model for model in models if not is_control(model)]
    runs = {Path(os.path.expanduser(model.removeprefix(RANDOM))) for model in networks}  # noqa: PTH111
    if len(runs) == 1 and is_of_run((run := runs.pop()) / "config.yaml"):
        return run / name
    near = near_runs(networks[0].removeprefix(RANDOM)) if len(networks) == 1 else ""
    raise ValueError(f"out is missing: it is RUN/{name} for RUN and random:RUN, anything else needs --out DIR{near}")


def claim(out: Path, is_ours: Callable[[Path], bool], overwrite: bool) -> Callable[[], None]:
    """Make a directory, or take one that is empty or holds what an earlier call of the same command wrote.

    Args:
        out: the directory.
        is_ours: whether a path in it was written by an earlier call of the same command.
        overwrite: what was may be deleted.

    Returns:
        What deletes it, to be called when the first new result is there.

    Raises:
        ValueError: if it holds anything else, or something of ours and overwrite is false.
    """
    if os.path.lexists(out) and not out.is_dir():
        what = "a link that leads nowhere" if out.is_symlink() and not out.exists() else "a file"
        raise ValueError(f"out = {out} is {what}: give a directory")
    entries = sorted(out.iterdir()) if out.is_dir() else []
    if unfinished := [path for path in entries if path.name.startswith(TEMPORARY)]:
        raise ValueError(
            f"out = {out} holds {unfinished[0].name!r}, of a command that is running or was killed: wait for it, or "
            "delete that"
        )
    if foreign := [path for path in entries if not is_ours(path)]:
        raise ValueError(f"out = {out} holds {foreign[0].name!r}, which is not of this command: give another --out")
    if entries and not overwrite:
        raise ValueError(f"out = {out} holds earlier results: give another --out, or --overwrite to replace them")
    out.mkdir(parents=True, exist_ok=True)

    def clear() -> None:
        for path in entries:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return clear


def tell_unread(bad: Sequence[tuple[str, str]], what: str) -> None:
    """Name images that are left out, and count them, on stderr.

    Args:
        bad: their names, and the reasons.
        what: what they are.
    """
    for name, reason in bad:
        print(f"{printable(name)}: {printable(reason)}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of the {what} cannot be read and are left out", file=sys.stderr)


def file_name(text: str) -> str:
    """The text as a name of a file or folder: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def free(path: Path, taken: Sequence[Path]) -> Path:
    """The path, with a number after its name if that is taken.

    Args:
        path: of a file or folder to create.
        taken: paths that will exist.
    """
    number, found = 1, path
    while found in taken:
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found
