"""What a pretraining and a fine-tuning run share: the run directory, its logs, devices, seeds and signals.

RUN/
    config.yaml       the resolved settings
    environment.json  versions, machine and command, an entry for each start
    files.json        the index of the images (val_files.json: of labelled ones held out)
    index/            what lies where in each tar file
    cache/            images from afar (data.cache_gb)
    train.log         what the terminal showed
    metrics.jsonl     one JSON object a line
    tensorboard/      the same for TensorBoard
    bad_files.txt     images that could not be read, and why
    checkpoints/      see fcmae.training.checkpoint
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import logging
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import metadata
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, parse_flag_from_env
from tqdm import tqdm

import fcmae
from fcmae import options
from fcmae.atomic import read_bytes, write_text
from fcmae.config import RunConfig
from fcmae.data.cores import num_cores
from fcmae.data.loader import STOP_SIGNALS, end_workers
from fcmae.data.source import printable
from fcmae.data.storage import CACHE, INDEX
from fcmae.tables import table
from fcmae.training import checkpoint, health, own_files

logger = logging.getLogger("fcmae")
MAX_METRICS = 2**30  # bytes of metrics.jsonl

LOG_END = 2**16  # bytes of train.log in which its last line is looked for
CUT_OFF = "cut off"
SMALLER = "--model.grad_checkpointing true, a smaller data.image_size or model.variant"
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "

Found = TypeVar("Found")
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


class RunDirectory:
    """A directory that holds one run. Making the object only looks; `open` writes.

    Args:
        cfg: settings of the run, with `out`.
        kind: "pretrain", "finetune" or "segment".

    Raises:
        ValueError: if `cfg.out` holds something other than this run: files that are no run's, a run of the other kind,
            one with other settings (named one by one), or results without a checkpoint to go on from; if
            `cfg.overwrite` would delete what the run starts from; or if `cfg.out` lies where images are searched.
    """

    def __init__(self, cfg: RunConfig, kind: str) -> None:
        assert cfg.out is not None  # its settings have seen to it
        self.cfg = cfg
        self.kind = kind
        self.path = cfg.out
        config = self.path / "config.yaml"
        header = ""
        if config.is_file():
            with config.open(encoding="utf-8", errors="replace") as file:
                header = file.readline().strip()
        holds_run = header.startswith("# fcmae ")
        if not holds_run and self.path.exists() and not self._is_unused():
            raise ValueError(f"out = {self.path} is not empty and holds no run of fcmae: give another directory")
        begun = (self.path / "metrics.jsonl").exists() or checkpoint.latest(self.path) is not None
        self.exists = holds_run and begun and not cfg.overwrite
        if not self.exists:
            _check_inputs(cfg.out, cfg.inputs(), cfg.overwrite)
        self.saved = self._read_same_run(config, header) if self.exists else None
        if self.exists:
            self._check_not_finished()
        elif not cfg.overwrite and (results := own_files.written(self.path, own_files.RESULTS)):
            # config.yaml may have been copied here to start the next experiment.
            raise ValueError(
                f"out = {self.path} has a config.yaml and {results[0].relative_to(self.path)}, but no run that can go "
                "on: give another --out, or --overwrite to delete what a run wrote there"
            )

    def _is_unused(self) -> bool:
        """Whether there is nothing but what a run leaves that was killed before it wrote its config.yaml."""
        return self.path.is_dir() and all(
            path.name in (INDEX, CACHE) or path.name.startswith((".lock", ".tmp-")) for path in self.path.iterdir()
        )

    def _read_same_run(self, config: Path, header: str) -> RunConfig:
        remedy = "give another --out, the same settings, or --overwrite to delete it"
        if not header.startswith(f"# fcmae {self.kind} "):
            raise ValueError(f"out = {self.path} holds another kind of run ({header.lstrip('# ')}): {remedy}")
        saved = options.read(type(self.cfg), config)
        if different := options.diff(saved, self.cfg):
            raise ValueError(
                f"out = {self.path} holds a run with other settings: {remedy}\n  " + "\n  ".join(different)
            )
        return saved

    def _check_not_finished(self) -> None:
        """Refuse to train over a run whose checkpoints are gone, as of one that is finished and tidied up."""
        if checkpoint.latest(self.path) is not None:
            return
        if how_it_ended(self.path / "train.log") == "finished" or (self.path / own_files.SAVED).exists():
            raise ValueError(
                f"out = {self.path} has the results of a run and no checkpoint to go on from: give another "
                "--out, or --overwrite to delete it"
            )

    def kept(self, *keys: str) -> bool:
        """Whether this run is resumed with the same values of these settings, so that what was made from them stands.

        Args:
            keys: dotted names of settings.
        """
        return self.saved is not None and attrgetter(*keys)(self.saved) == attrgetter(*keys)(self.cfg)

    def licensed(self, cfg: AnyConfig, found: str | None) -> AnyConfig:
        """The run's settings with the licence of the weights that it started from, as config.yaml will have them.

        Args:
            cfg: its settings, which go before what the weights say.
            found: what these say, where they were read.
        """
        kept = None if self.saved is None else self.saved.model.license
        model = cfg.model.model_copy(update={"license": cfg.model.license or kept or found})
        self.cfg = cfg = cfg.model_copy(update={"model": model})
        return cfg

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from."""
        return checkpoint.latest(self.path) if self.exists else None

    @property
    def resume_step(self) -> int:
        """The steps that were done there."""
        return 0 if self.resume_from is None else checkpoint.read_meta(self.resume_from).step

    def last_good(self) -> Path | None:
        """The newest checkpoint that is known to be good: the loss of steps after it was sound."""
        sound = health.last_sound_step(read_metrics(self.path / "metrics.jsonl"))
        return next((path for step, path in reversed(checkpoint.steps(self.path).items()) if step < sound), None)

    def _way_out(self) -> str:
        """What to do where the numbers of a run stop being finite."""
        if (good := self.last_good()) is not None:
            known = f"the last good checkpoint is {good}"
        else:
            any_ = checkpoint.latest(self.path) is not None
            known = "no checkpoint is known to be good" if any_ else "there is no checkpoint yet"
        init = f"--init {good}, " if good is not None and self.kind == "pretrain" else ""
        clip = "1" if self.cfg.optim.clip_grad is None else f"below {self.cfg.optim.clip_grad:g}"
        return f"{known}; start again with another --out, {init}a lower optim.base_lr, or optim.clip_grad {clip}"

    @contextmanager
    def open(self, is_main: bool) -> Iterator[None]:
        """Write the settings and keep the logs while the run lasts; one process at a time.

        Args:
            is_main: false in the other processes of a distributed run, which write nothing.

        Raises:
            ValueError: if another process uses the directory, or the memory of a GPU does not suffice.
            OSError: if a disk is full or a worker was killed; it says what the run goes on from.
            FloatingPointError: if its numbers stop being finite; it says what to start again from.
        """
        if not is_main:
            logger.setLevel(logging.WARNING)
            yield
            return
        try:
            with self._opened():
                yield
        except OSError as error:
            goes_on = f"the same command goes on from {checkpoint.latest(self.path) or 'the beginning'}"
            if isinstance(error, ChildProcessError):
                raise ChildProcessError(f"{error}; {goes_on}") from error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"no space is left for {error.filename or self.path} ({error.strerror}): free some, and {goes_on}"
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            in_use = f"out = {self.path} is in use by another process: wait for it or give another directory"
            try:
                # Not flock: the data workers would inherit it, and hold it for seconds after this process is killed.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(in_use) from None
            # Another process may have made, or deleted, a run here since this one looked.
            if RunDirectory(self.cfg, self.kind).exists != self.exists:
                raise ValueError(in_use)
            own_files.remove_aside(self.path)
            if not self.exists and self.cfg.overwrite:
                own_files.remove(self.path)
            text = f"# fcmae {self.kind} {fcmae.__version__}\n{options.dump(self.cfg)}"
            write_text(self.path / "config.yaml", text)
            record_start(self.path / "environment.json", _uses_cpu(self.cfg))
            ended = how_it_ended(self.path / "train.log")
            with _logging_to(self.path / "train.log"):
                if self.exists and ended == CUT_OFF:
                    logger.warning(
                        "the last start ended without a word, as when the system kills what takes too much memory, or "
                        "the machine went off; if it happens again, raise grad_accum or lower data.num_workers"
                    )
                _tell_choices(self.cfg)
                try:
                    yield
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {self._way_out()}") from None
                except torch.OutOfMemoryError as error:
                    told = str(error).partition("\n")[0]
                    raise ValueError(f"{told.rstrip('.')}: raise grad_accum, or try {SMALLER}") from error


def how_it_ended(log: Path) -> str:
    """How a run's last start ended, by its train.log: finished, stopped, failed, or CUT_OFF; without one, not begun."""
    if not log.is_file():
        return "not begun"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END))
        lines = file.read(LOG_END).decode(errors="replace").splitlines()
    advice = re.compile(STAMP + "(next: |best and last model: )")
    last = next((line for line in reversed(lines) if re.match(STAMP, line) and not advice.match(line)), "")
    if re.match(STAMP + r"finished \d+ steps$", last):
        return "finished"
    if re.match(STAMP + "stopped by ", last):
        return "stopped"
    if re.match(STAMP + r"\w+(Error|Exception): ", last):
        return "failed"
    return CUT_OFF if last else "not begun"


def tell_next(run: Path, *commands: str) -> None:
    """Say at the end of a run what can be typed next.

    Args:
        run: its directory.
        commands: what it was made for; {run} stands for it.
    """
    place = shlex.quote(str(run))
    curves = "".join(f"; {command}" for command in curves_commands(run))
    logger.info("next: %s; fcmae status %s%s", ", or ".join(commands).format(run=place), place, curves)


def curves_commands(run: Path) -> list[str]:
    """The command that shows the curves of a run in TensorBoard, where it is installed and they were written for it.

    Args:
        run: its directory.
    """
    logs = run / "tensorboard"
    has_curves = find_spec("tensorboard") is not None and any(logs.glob("**/events.*"))
    return [f"tensorboard --logdir {shlex.quote(str(logs))}"] if has_curves else []


def _tell_choices(cfg: RunConfig) -> None:
    """What was chosen as nobody gave it, and when the run ends by that."""
    if not cfg.chosen:
        return
    values = options.flat(cfg)
    rows = [(key, options.text(values[key]), why) for key, why in cfg.chosen.items() if key in values]
    logger.info("not given, so chosen:\n%s", table(("setting", "value", "why"), rows, left=3))
    if cfg.hours and "epochs" in cfg.chosen:
        ends = datetime.now() + timedelta(hours=cfg.hours)
        logger.info("planned: %g hours, to %s", cfg.hours, ends.strftime("%H:%M"))


def _check_inputs(out: Path, inputs: Mapping[str, Sequence[str]], overwrite: bool) -> None:
    """Refuse to delete what the run starts from, and to write pictures where training images are searched.

    inputs: paths by the setting that names them.
    """
    place = out.resolve()
    for key, paths in inputs.items():
        for path in map(Path, paths):
            if overwrite and path.exists() and path.resolve().is_relative_to(place):
                raise ValueError(
                    f"overwrite would delete {key} = {path}, which lies in out = {out}: give another --out"
                )
            if path.is_dir() and place.is_relative_to(path.resolve()) and key.startswith("data."):
                raise ValueError(f"out = {out} lies in {key} = {path}, where images are searched: give another out")


def record_start(path: Path, cpu: bool) -> None:
    """Append to a JSON list what this process runs with: time, versions, machine, command.

    Args:
        path: of the list; a file that holds none is begun anew.
        cpu: whether it computes on the CPU whatever else is there.
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
        "device_name": _device_name(device),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "cpu": cpu_name(),
        "cores": num_cores(),
        "directory": str(Path.cwd()),
        # `python -m fcmae.cli` is another way to say fcmae.
        "command": shlex.join(["fcmae" if program.name == "cli.py" else program.name, *sys.argv[1:]]),
    }
    write_text(path, json.dumps([*_starts(path), record], indent=1) + "\n")


def _starts(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(start, dict) for start in found):
            return found
    return []


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()


def record_images_that_fit(run: Path, num: int) -> None:
    """Keep with the run's latest start how many images at once its memory suffices for, as it did not for more.

    Args:
        run: its directory.
        num: of a process, each counted as often as it has masks.
    """
    if starts := _starts(run / "environment.json"):
        starts[-1]["images_at_once"] = num
        write_text(run / "environment.json", json.dumps(starts, indent=1) + "\n")


def images_that_fit(run: Path, device: torch.device) -> int | None:
    """What `record_images_that_fit` kept last on such a device; None if nothing.

    Args:
        run: its directory.
        device: that is computed on now.
    """
    name, key = _device_name(device), "images_at_once"
    starts = [start for start in _starts(run / "environment.json") if key in start and start.get("device_name") == name]
    return starts[-1][key] if starts and isinstance(starts[-1][key], int) else None


def cpu_name() -> str:
    """The processor's name, as exactly as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _TerminalHandler(logging.Handler):
    """Log lines above the progress bar, where there is one. A terminal may be gone, as after SIGHUP."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """train.log. On a full disk a line is left out: the numbers and checkpoints beside it stop the run."""

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


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    terminal = _TerminalHandler(logging.INFO)
    handlers: list[logging.Handler] = [_FileHandler(path, encoding="utf-8"), terminal]
    for handler in handlers:
        handler.setFormatter(_Printable("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    previous, threading.excepthook = threading.excepthook, _thread_failed
    try:
        yield
    except Exception as error:
        logger.removeHandler(terminal)  # the command shows it there
        logger.error("%s: %s", type(error).__name__, error)
        raise
    finally:
        threading.excepthook = previous
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """No traceback of a tracker's thread that could not write: the main thread gets the same error."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


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


def _uses_cpu(cfg: RunConfig) -> bool:
    return cfg.device == "cpu" or not torch.accelerator.is_available()


def make_accelerator(cfg: RunConfig) -> Accelerator:
    """accelerate's view of the devices, for cfg.device, cfg.precision and the trackers.

    It forgets those of a run before in this process, which may have computed elsewhere or in another precision, and
    what the environment says to accelerate: the settings hold.

    Raises:
        ValueError: for fp16 and tf32 on a CPU, and where the environment asks for shards of the model.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = _uses_cpu(cfg)
    precision = {"fp32": "no", "tf32": "no", "auto": "no"}.get(cfg.precision, cfg.precision)
    # GPUs without bf16 emulate it, slower than float32.
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.precision == "auto" and not cpu and has_bf16:
        precision = "bf16"
    if cpu and cfg.precision in ("fp16", "tf32"):
        raise ValueError(f"precision = {cfg.precision} needs a GPU: use fp32 or bf16 on a CPU")
    # Explicit, as torch's own default has TF32 in convolutions and not in matrix products.
    torch.set_float32_matmul_precision("high" if cfg.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = cfg.precision == "tf32"
    # DDP remarks on the strides of the gradients of depthwise weights, in their dimension of size 1: they cost nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"ACCELERATE_USE_{name} is set in the environment, as accelerate's launcher does, and fcmae has each "
                "process hold the whole model: unset it, or launch with --multi_gpu"
            )
    # Steps of accumulation, precision, device, compiler: accelerate reads them there now and while it trains.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=cfg.log.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(cfg.out), logging_dir=f"{cfg.out}/tensorboard"),
    )


@contextmanager
def ending_together(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Have the error of one process end all of a run, each with its sentence.

    The others may wait for it in a collective, where no signal reaches them.

    Args:
        accelerator: of the processes.
        run: directory of the run.

    Raises:
        ChildProcessError: if another process failed.
    """
    if accelerator.num_processes == 1:
        yield
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    key, left = f"fcmae/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{run}", threading.Event()

    def told() -> str | None:
        with suppress(RuntimeError):  # the store went with the process that kept it
            return store.get(key).decode() if store.check([key]) else None
        return "a process of the run has ended: see what it said"

    def watch() -> None:
        while not left.wait(1):
            if (sentence := told()) and not left.wait(StopSignal.GRACE_S):
                os.write(2, f"fcmae: error: {sentence}\n".encode(errors="replace"))
                end_workers()
                os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        left.set()
        store.set(key, f"process {accelerator.process_index} failed: {error}")
        raise
    except RuntimeError as error:
        left.set()
        if (sentence := told()) is None and "by peer" in str(error):
            sentence = "a process of the run has ended: see what it said"
        if sentence is None:
            raise
        raise ChildProcessError(sentence) from error
    finally:
        left.set()


def finish(accelerator: Accelerator, stop: StopSignal) -> None:
    """End a run: close the trackers, tell all processes of a signal to one, and let none go before the others.

    A launcher that sees one end with a signal's status ends the rest, of which one may still save. The processes stay
    joined until they end, for another run of the same script: they cannot be joined twice.

    Args:
        accelerator: of the processes.
        stop: the signals of this one; of a signal to another alone, it has that one's then.
    """
    for tracker in accelerator.trackers:
        tracker.finish()
    if accelerator.num_processes > 1:
        received = gather_object([stop.received])
        stop.received = stop.received or next(filter(None, received), None)
        atexit.register(_part)


def _part() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            # `nohup` has SIGHUP ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
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
                os.write(2, b"\nfcmae: interrupted\n")
                os._exit(130)


@dataclass(frozen=True)
class Run:
    """A run that has ended: a path, which everything that starts from a run takes.

    Attributes:
        path: its directory.
        kind: "pretrain", "finetune" or "segment".
        finished: whether it came to its end.
        stopped_by: the name of the signal that stopped it before, or None.
    """

    path: Path
    kind: str
    finished: bool = True
    stopped_by: str | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl: step, epoch, and what was measured there, by name."""
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def status(self) -> int:
        """As a process's exit status: 0 at the end; 128 and its number after a signal, as shells have it.

        0 after SIGUSR1, by which schedulers warn that time is up: the job is queued again and does not count as failed.
        """
        stopped = not self.finished and self.stopped_by not in (None, "SIGUSR1")
        return 128 + signal.Signals[str(self.stopped_by)] if stopped else 0


def same_everywhere(accelerator: Accelerator, find: Callable[[], Found]) -> Found:
    """What the first process finds, sent to all."""
    found: list[Any] = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    result: Found = found[0]
    return result
