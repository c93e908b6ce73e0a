"""Where runs stand, whether they work, and what to type next: `fcmae status`."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

from fcmae.config.base import near_runs
from fcmae.data.source import open_file, printable
from fcmae.evaluation import paired
from fcmae.evaluation.runs import RunFiles, curve, finite, processes_of, program, read_run, took_s
from fcmae.evaluation.verdicts import is_collapsing, is_working
from fcmae.tables import table
from fcmae.training import checkpoint
from fcmae.training.records import NOT_FINITE, State, last_failure, last_state, typed_again

DEPTH = 3  # folders below the given one in which runs are looked for


def status(place: Path) -> str:
    """A summary of a run, or a table of the runs below a folder.

    Args:
        place: the directory of a run, or of runs.

    Raises:
        ValueError: if there is no run.
    """
    if (place / paired.FILE).is_file():
        return _text(_comparison(place))
    if (place / "config.yaml").is_file():
        return _text(_lines(read_run(place, printable(str(place)), counted=("finetune",))))  # of whose scores it tells
    runs = list(find_runs(place))
    compared = [file.parent for depth in range(DEPTH) for file in sorted(place.glob("*/" * depth + paired.FILE))]
    if not (runs or compared):
        raise ValueError(f"{place} holds no run: give the directory of one, or of runs{near_runs(place)}")
    rows = [_row(run) for run in sorted(runs, key=lambda run: str(run.path))]
    for path in compared:
        if (found := paired.read(path, [])) is not None:
            state = f"{found['num_done']} of {found['num_runs']} runs"
            rows.append((printable(str(path.relative_to(place))), "worth", state, "", "", ""))
    return _text([table(("run", "kind", "state", "epoch", "loss", "best score"), rows, left=3)])


def _text(parts: Iterable[str]) -> str:
    """Lines that any terminal can show, whatever is in the files."""
    return "\n".join(printable(line) for part in parts for line in part.split("\n"))


def find_runs(place: Path) -> Iterator[RunFiles]:
    """The runs in and below a folder, as far as they can be read, without those of comparisons."""
    found = [path.parent for depth in range(DEPTH + 1) for path in sorted(place.glob("*/" * depth + "config.yaml"))]
    yield from _readable((path for path in found if not (_above(path) / paired.FILE).is_file()), place)


def _above(path: Path) -> Path:
    """The folder of a run's folder; `Path.parent` takes .. for a name."""
    return Path(os.path.abspath(path)).parent.parent  # noqa: PTH100


def _readable(paths: Iterable[Path], place: Path) -> Iterator[RunFiles]:
    """Those of the directories that are runs, named relative to `place`."""
    for path in paths:
        try:
            yield read_run(path, printable(str(path.relative_to(place))), counted=())
        except (ValueError, OSError):
            continue  # not a run


def _comparison(place: Path) -> Iterator[str]:
    """The lines on a comparison by `fcmae worth`."""
    problems = list[str]()
    found = paired.read(place, problems)
    if found is None:
        raise ValueError("\n".join(problems))
    runs = _readable((path.parent for path in sorted(place.glob("runs/*/config.yaml"))), place / "runs")
    running = [run for run in runs if state_of(run.path) == "running"]
    yield f"{printable(str(place))}: {found['num_done']} of {found['num_runs']} runs are done"
    yield from (f"running: {_row(run)[0]}, epoch {_row(run)[3]}" for run in running)
    yield f"\n{paired.summary(found)}\n\nnext:"
    if found["num_done"] < found["num_runs"] and not running:
        words, folder = typed_again(found["command"]), found.get("directory")
        if words:
            command = _with_out(words, place.absolute() if _is_elsewhere(folder) else place)
            yield f"  {_from(folder, command)}  # goes on"
    yield f"  fcmae report {shlex.quote(str(place))}"


def state_of(path: Path) -> State:
    """running, finished, stopped, failed, or cut off, if it ended without a record.

    Args:
        path: of a run.
    """
    if _is_locked(path / ".lock"):
        return "running"
    return last_state(path)


def _is_locked(lock: Path) -> bool:
    """Whether another process holds the lock that a run has as long as it lasts."""
    try:
        file = open_file(str(lock))
    except OSError:  # there is none, or nobody may read it here: train.log tells
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def _row(run: RunFiles) -> tuple[str, ...]:
    epochs = run.settings.get("epochs")
    epoch = f"{run.lines[-1]['epoch']:.4g} of {epochs}" if run.lines else f"0 of {epochs}"
    loss = curve(run, "loss", "")
    score = _best_score(run)
    return (
        run.name,
        run.kind,
        state_of(run.path),
        epoch,
        f"{loss.values[-1]:.4f}" if loss else "",
        "" if score is None else f"{score[0]} {score[1]:.4f}",
    )


def _best_score(run: RunFiles) -> tuple[str, float] | None:
    # If there is a moving average, it is the model.
    for key in ("ema_balanced_accuracy", "balanced_accuracy", "ema_miou", "miou", "knn_top1"):
        values = [value for line in run.lines if (value := finite(line, key)) is not None]
        if values:
            return key, max(values)
    return None


def _lines(run: RunFiles) -> Iterator[str]:
    state = state_of(run.path)
    step, epoch = (run.lines[-1][key] for key in ("step", "epoch")) if run.lines else (0, 0)
    yield f"{run.name}: {run.kind}, {state} at step {step}, epoch {epoch:.4g} of {run.settings.get('epochs')}"
    yield from _time(run, state)
    if (score := _best_score(run)) is not None:
        yield f"best {score[0]}: {score[1]:.4f}"
    for verdict in (is_working([run]), *([is_collapsing([run])] if run.kind == "pretrain" else [])):
        yield f"\n{verdict.question} {verdict.answer}"
        yield from (f"  {sentence}" for sentence in verdict.sentences)
    if state == "failed" and (why := last_failure(run.path)) and not why.startswith(NOT_FINITE):  # told above
        yield f"\nThe last start failed: {why}"
    if state == "cut off":
        yield "\nThe last start ended without a word, probably for want of memory, or as the machine went off."
    for problem in run.problems:
        yield f"\nproblem: {problem}"
    yield "\nnext:"
    yield from (f"  {command}" for command in [*next_commands(run, state), *_curves_commands(run.path)])


def _time(run: RunFiles, state: str) -> Iterator[str]:
    speeds = curve(run, "images_per_s", "")
    if speeds is None:
        return
    seconds = took_s(run)
    text = f"trained for {timedelta(seconds=round(seconds))}, {speeds.values[-1]:.1f} images/s"
    epoch, epochs = run.lines[-1]["epoch"], run.settings.get("epochs")
    if state == "running" and isinstance(epochs, int | float) and epoch:
        left = timedelta(seconds=round(seconds * (epochs - epoch) / epoch))
        text += f"; {left} left, to {(datetime.now() + left).strftime('%H:%M')}"
    yield text


def _resuming(run: RunFiles) -> str:
    """The command as it was given, for where the run is now; one of its settings where it cannot be given again."""
    words, num = typed_again(run.starts[-1].get("command")), processes_of(run)
    folder, nodes = run.starts[-1].get("directory"), str(run.starts[-1].get("num_nodes", 1))
    place = run.path.absolute() if _is_elsewhere(folder) else run.path
    on_nodes = bool(words) and nodes.isdecimal() and int(nodes) > 1
    if not words or (num != 1 and not on_nodes):
        words = [*program(run.kind, num), "--config", str(place / "config.yaml")]
    command = shlex.join(words) if words[1:2] == ["worth"] else _with_out(words, place)
    return _from(folder, f"{command}  # in {num} processes on {nodes} nodes, as before" if on_nodes else command)


def _with_out(words: Sequence[str], place: Path) -> str:
    """A command on the run that is in a place now: it may have been moved, or be numbered as its name was taken."""
    if "--out" in words[:-1]:
        number = words.index("--out") + 1
        words = [*words[:number], str(place), *words[number + 1 :]]
    else:
        words = [*(word for word in words if not word.startswith("--out=")), "--out", str(place)]
    return shlex.join(words)


def _from(folder: object, command: str) -> str:
    """The command as it is typed here, where it was typed in a folder."""
    return f"cd {shlex.quote(str(folder))} && {command}" if _is_elsewhere(folder) else command


def _is_elsewhere(folder: object) -> bool:
    """Whether it is a folder, and another than the current one."""
    return isinstance(folder, str) and Path(folder) != Path.cwd() and Path(folder).is_dir()


def next_commands(run: RunFiles, state: str) -> list[str]:
    """What to type next, ready to be copied.

    Args:
        run: the run.
        state: see `state_of`.
    """
    path, export = shlex.quote(str(run.path)), shlex.quote(f"{run.path.absolute().name}-timm")
    if state == "running":
        return [f"fcmae status {path}", f"fcmae report {path}"]
    if state in ("stopped", "cut off", "failed", "not begun") or checkpoint.latest(run.path) is None:
        broke_down = state == "failed" and (last_failure(run.path) or "").startswith(NOT_FINITE)
        if state != "finished" and not broke_down and run.starts and run.starts[-1].get("command"):
            return [f"{_resuming(run)}  # goes on", f"fcmae report {path}"]
        return [f"fcmae report {path}"]
    if run.kind == "segment":
        return [f"fcmae predict {path} IMAGES --out maps", f"fcmae report {path}"]
    if run.kind == "finetune":
        return [
            f"fcmae predict {path} IMAGES --csv predictions.csv",
            f"fcmae convert {path} {export}",
            f"fcmae report {path}",
        ]
    return [
        f"fcmae evaluate {path} random:{path} --data LABELLED",
        f"fcmae finetune LABELLED --init {path}",
        f"fcmae convert {path} {export}",
        f"fcmae report {path}",
    ]


def _curves_commands(run: Path) -> list[str]:
    """The command that shows the curves of a run in TensorBoard, where it is installed and they were written for it."""
    logs = run / "tensorboard"
    has_curves = find_spec("tensorboard") is not None and any(logs.glob("**/events.*"))
    return [f"tensorboard --logdir {shlex.quote(str(logs))}"] if has_curves else []
