"""What a run keeps of itself beside its log: numbers (metrics.jsonl), and every start (environment.json)."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import fcmae
from fcmae.atomic import read_bytes, write_text
from fcmae.data.cores import all_processes, local_processes, num_cores
from fcmae.options.line import SWITCHED

MAX_METRICS = 2**30  # bytes of metrics.jsonl
NOT_FINITE = "FloatingPointError: "  # begins the failure of a run that breaks down, and would again
LOG_END = 2**16  # bytes of train.log in which its last line is looked for
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "

Ended = Literal["finished", "stopped", "failed"]  # by itself, by a signal, by an error
State = Literal["not begun", "running", "cut off"] | Ended  # cut off: it ended without a word


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that are damaged or cut off; none before the first was written."""
    return split_metrics(path)[0]


def split_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a metrics.jsonl, and those that are none: cut off, without a step, or with what is no number."""
    lines, damaged = list[dict[str, Any]](), list[str]()
    content = read_bytes(path, MAX_METRICS) if path.exists() else b""
    for text in content.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and {"step", "epoch"} <= line.keys() and all(map(_is_number, line.values())):
            lines.append(line)
        else:
            damaged.append(text)
    return lines, damaged


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def of_model(line: Mapping[str, Any], name: str) -> Any:
    """A number of a line, or None: of the moving average of the weights where there is one, as that is the model."""
    return line.get(f"ema_{name}", line.get(name))


def record_start(run: Path, cpu: bool, network: str = "") -> None:
    """Append to the list in environment.json what this process runs with: time, versions, machine, command.

    Args:
        run: the directory; a file there that holds no list is begun anew.
        cpu: whether it computes on the CPU whatever else is there.
        network: what it trains, in words.
    """
    device = torch.device("cpu") if cpu else torch.accelerator.current_accelerator() or torch.device("cpu")
    program = Path(sys.argv[0])
    record = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "fcmae": fcmae.__version__,
            "torch": torch.__version__,
            "timm": metadata.version("timm"),
            "accelerate": metadata.version("accelerate"),
            "python": platform.python_version(),
        },
        "device": device.type,
        "device_name": device_name(device),
        "num_processes": all_processes(),
        "num_nodes": _num_nodes(),
        "cpu": cpu_name(),
        "cores": num_cores(),
        **({"network": network} if network else {}),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "ended": "",  # see `record_end`
        "directory": str(Path.cwd()),
        # `python -m fcmae.cli` is another way to say fcmae.
        "command": shlex.join(["fcmae" if program.name == "cli.py" else program.name, *_lasting(sys.argv[1:])]),
    }
    write_text(run / "environment.json", json.dumps([*read_starts(run), record], indent=1) + "\n")


def _num_nodes() -> int:
    """Machines that the processes of the run are on, as torchrun says, or SLURM."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return all_processes() // local_processes()
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1"
    return min(all_processes(), int(nodes))


def may_have_started(job: str, run: Path) -> bool:
    """Whether a job of SLURM has started a run before, or that is not known.

    Args:
        job: its number.
        run: its directory, which need not be there.
    """
    starts = read_starts(run)
    return any(start.get("job", job) == job for start in starts) or (not starts and (run / "environment.json").exists())


def record_end(run: Path, ended: Ended) -> None:
    """Keep with the run's latest start how it ended, unless the disk is full.

    Args:
        run: its directory.
        ended: in which way.
    """
    if starts := read_starts(run):
        starts[-1] |= {"ended": ended, "end": datetime.now().astimezone().isoformat(timespec="seconds")}
        with suppress(OSError):
            write_text(run / "environment.json", json.dumps(starts, indent=1) + "\n")


def last_state(run: Path) -> State:
    """How a run's latest start ended; "cut off" too while it lasts, which its lock tells.

    Args:
        run: its directory.
    """
    log, starts = run / "train.log", read_starts(run)
    if not log.is_file():  # made after a start is kept, and removed before
        return "not begun"
    ended: str | None = starts[-1]["ended"] if starts and "ended" in starts[-1] else _logged_end(log)
    return next((known for known in get_args(Ended) if known == ended), "cut off")


def last_failure(run: Path) -> str | None:
    """The error that a run's latest failure left in its train.log, after its kind; None without one.

    Args:
        run: its directory.
    """
    with suppress(OSError), (run / "train.log").open("rb") as file:
        file.seek(max(0, (run / "train.log").stat().st_size - LOG_END))
        found = re.findall(f"(?m){STAMP}failed: (.*)", file.read(LOG_END).decode(errors="replace"))
        return found[-1] if found else None
    return None


def _logged_end(log: Path) -> Ended | None:
    """How a run ended that was begun before environment.json kept it, by the last line of its train.log."""
    lines = list[str]()
    with suppress(OSError), log.open("rb") as file:  # of another user's run
        file.seek(max(0, log.stat().st_size - LOG_END))
        lines = file.read(LOG_END).decode(errors="replace").splitlines()
    said = [match[1] for line in lines if (match := re.match(STAMP + "(?!next: |best and last model: )(.*)", line))]
    ends: dict[Ended, str] = {
        "finished": r"finished (\d+ steps|evaluating)$",
        "stopped": "stopped by ",
        "failed": r"(failed|\w+(Error|Exception)): ",
    }
    return next((ended for ended, pattern in ends.items() if said and re.match(pattern, said[-1])), None)


def typed_again(command: object) -> list[str]:
    """The words of a command of ours that makes a run go on, of one line; none of any other.

    Args:
        command: as a record has it, which may be a stranger's.
    """
    if not (isinstance(command, str) and command.isprintable()):
        return []
    try:
        program, *words = shlex.split(command)
    except ValueError:  # a quotation does not end, or there is no word
        return []
    return [program, *_lasting(words)] if program == "fcmae" else []


def _lasting(words: Sequence[str]) -> Iterator[str]:
    """The words of a command line without --overwrite, which would delete the run where it is to go on."""
    follows = False
    for word in words:
        if follows and word.lower() in SWITCHED:  # its value
            follows = False
            continue
        follows = re.fullmatch("-+overwrite", word) is not None
        if not (follows or re.match("--?overwrite=", word)):
            yield word


def read_starts(run: Path) -> list[dict[str, Any]]:
    """What environment.json holds of each start of a run, see `record_start`; nothing where it cannot be read.

    Args:
        run: its directory.
    """
    path = run / "environment.json"
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would wait for ever
        if isinstance(found, list) and all(isinstance(start, dict) for start in found):
            return found
    return []


def device_name(device: torch.device) -> str:
    """The name of a GPU, else of the processor."""
    return torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()


def record_images_that_fit(run: Path, num: int) -> None:
    """Keep with the run's latest start how many images at once its memory suffices for, as it did not for more.

    Args:
        run: its directory, of which all processes may find so at the same time.
        num: of a process, each counted as often as it has masks.
    """
    if starts := read_starts(run):
        starts[-1]["images_at_once"] = min(num, starts[-1].get("images_at_once", num))
        write_text(run / "environment.json", json.dumps(starts, indent=1) + "\n", is_shared=True)


def processes_before(run: Path) -> int | None:
    """How many processes the run's latest start had, if that is known."""
    found = [start.get("num_processes") for start in read_starts(run)]
    return found[-1] if found and isinstance(found[-1], int) else None


def images_that_fit(run: Path, device: torch.device) -> int | None:
    """What `record_images_that_fit` kept last on such a device; None if nothing.

    Args:
        run: its directory.
        device: that is computed on now.
    """
    name, key = device_name(device), "images_at_once"
    starts = [start for start in read_starts(run) if key in start and start.get("device_name") == name]
    return starts[-1][key] if starts and isinstance(starts[-1][key], int) else None


def cpu_name() -> str:
    """The processor's name, as exactly as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
