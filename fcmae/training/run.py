"""The directory of a run: which run it holds, what may be written there, and what became of it.

RUN/
    config.yaml       the resolved settings, but for what an evaluation takes from its weights
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

import errno
import fcntl
import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import fcmae
from fcmae import options
from fcmae.atomic import write_text
from fcmae.config import RunConfig
from fcmae.options.files import MAX_YAML
from fcmae.options.problems import text_of
from fcmae.tables import table
from fcmae.training import checkpoint, health, own_files
from fcmae.training.launch import uses_cpu
from fcmae.training.messages import logging_to, same_command
from fcmae.training.records import last_state, read_metrics, record_end, record_start

logger = logging.getLogger("fcmae")

SMALLER = "--model.grad_checkpointing true, a smaller data.image_size or model.variant"

PATIENCE_S = 2.0  # with what looks whether a directory is locked
OF_EACH_PROCESS = frozenset({"chosen", "device", "data.num_workers"})  # settings that may differ between them


class RunDirectory:
    """A directory that holds one run. Making the object only looks; `open` writes.

    Attributes:
        cfg: settings of the run, those in force: what becomes known of them later is put here by `Session`.
        needs: what its checkpoints take of the disk, in words, once that is known; told when it is opened.
        network: what it trains, in words, once that is known; kept when it is opened.
        finished: whether it came to its end; kept when it is closed.
        resume_from: the checkpoint that it goes on from; None for a run that begins.

    Args:
        cfg: settings of the run, with `out`.

    Raises:
        ValueError: if the settings are too long to be read again; if `cfg.out` holds something other than this run:
            files that are no run's, a run of the other kind, one with other settings (named one by one), or results
            without a checkpoint to go on from; if `cfg.overwrite` would delete what the run starts from; or if
            `cfg.out` lies where images are searched.
    """

    def __init__(self, cfg: RunConfig) -> None:
        assert cfg.out is not None  # its settings have seen to it
        self.cfg = cfg
        self.kind = cfg.kind
        self.path = cfg.out
        self.needs = self.network = ""
        self.finished = False
        if len(options.dump(cfg).encode(errors="surrogateescape")) > MAX_YAML - 1000:  # a header and choices
            raise ValueError(
                "data.path has too many places to be kept in config.yaml: put quotes round the pattern, so that the "
                "shell does not expand it, or give a .txt file that lists them"
            )
        for name in (".lock", "train.log", "metrics.jsonl", "bad_files.txt"):
            if (path := self.path / name).is_symlink() and path.is_file():  # written to, and not as a whole
                raise ValueError(f"{path} is a link to a file, {path.resolve()}, which the run would change: remove it")
        config = self.path / "config.yaml"
        header = ""
        if config.is_file():
            with config.open(encoding="utf-8", errors="replace") as file:
                header = file.readline().strip()
        holds_run = header.startswith("# fcmae ")
        if not holds_run and self.path.exists() and not own_files.is_unused(self.path):
            raise ValueError(f"out = {self.path} is not empty and holds no run of fcmae: give another directory")
        latest = checkpoint.latest(self.path)
        begun = own_files.has_numbers(self.path) or latest is not None
        self.overwrites = own_files.overwrites(cfg)
        self.exists = holds_run and begun and not self.overwrites
        if not self.exists:
            _check_inputs(cfg.out, cfg.inputs(), self.overwrites)
        self.saved = self._read_same_run(config, header) if self.exists else None
        self.resume_from = latest if self.exists else None
        if self.exists:
            if cfg.trains:
                self._check_not_finished()
        elif not self.overwrites and (results := own_files.written(self.path, own_files.RESULTS)):
            # config.yaml may have been copied here to start the next experiment.
            raise ValueError(
                f"out = {self.path} has a config.yaml and {results[0].relative_to(self.path)}, but no run that can go "
                "on: give another --out, or --overwrite to delete what a run wrote there"
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
        if self.resume_from is not None:
            return
        if last_state(self.path) == "finished" or (self.path / own_files.SAVED).exists():
            raise ValueError(
                f"out = {self.path} has the results of a run and no checkpoint to go on from: give another "
                "--out, or --overwrite to delete it"
            )

    def agree(self, accelerator: Accelerator) -> None:
        """Refuse to go on where the processes of a run have other settings, or other runs in `out`.

        Args:
            accelerator: of the processes.

        Raises:
            ValueError: in all of them, with what differs.
        """
        own = options.flat(self.cfg) | {"command": self.kind, "precision": accelerator.mixed_precision}
        (settings, step), *others = gather_object([(own, self.resume_step)])
        for process, (their_settings, their_step) in enumerate(others, start=1):
            for key in sorted({*settings, *their_settings} - OF_EACH_PROCESS):
                if settings.get(key) != their_settings.get(key):
                    raise ValueError(
                        f"{key}: process {process} has {their_settings.get(key)} and process 0 {settings.get(key)}: "
                        "start all with the same settings"
                    )
            if their_step != step:
                raise ValueError(
                    f"out = {self.path}: process {process} finds step {their_step} there and process 0 step {step}: "
                    "put it on storage that all share"
                )

    def kept(self, *keys: str) -> bool:
        """Whether this run is resumed with the same values of these settings, so that what was made from them stands.

        Args:
            keys: dotted names of settings.
        """
        return self.saved is not None and attrgetter(*keys)(self.saved) == attrgetter(*keys)(self.cfg)

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
            level = logger.level
            logger.setLevel(logging.WARNING)
            try:
                with _telling_of_memory():
                    yield
            finally:
                logger.setLevel(level)
            return
        try:
            with self._opened():
                yield
        except OSError as error:
            goes_on = f"{same_command(self.cfg)} goes on from {checkpoint.latest(self.path) or 'the beginning'}"
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
        with (self.path / ".lock").open("a") as lock:
            in_use = f"out = {self.path} is in use by another process: wait for it or give another directory"
            try:
                # Not flock: the data workers would inherit it, and hold it for seconds after this process is killed.
                _lock(lock)
            except (BlockingIOError, PermissionError):
                raise ValueError(in_use) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                # Two processes in it would spoil each other's files.
                raise OSError(
                    f"out = {self.path} lies where files cannot be locked ({error.strerror}): mount it with locks "
                    "(flock of Lustre, lockd of NFS 3), or give another --out"
                ) from error
            # Another process may have made, deleted, or gone on with a run here since this one looked.
            now = RunDirectory(self.cfg)
            if (now.exists, now.resume_from) != (self.exists, self.resume_from):
                raise ValueError(in_use)
            own_files.remove_aside(self.path)
            own_files.remove_unfinished(self.path)
            if not self.exists and self.overwrites:
                own_files.remove(self.path)
            if self.saved is not None and _places(self.saved) != _places(self.cfg):
                for name in own_files.LISTS:  # before config.yaml says where the images are now
                    (self.path / name).unlink(missing_ok=True)
            # The settings of the run, which goes on; what is to be deleted is told once.
            kept = self.cfg.model_copy(update={"overwrite": False})
            text = f"# fcmae {self.kind} {fcmae.__version__}\n{options.dump(kept)}"
            write_text(self.path / "config.yaml", text)
            before = last_state(self.path)
            record_start(self.path, uses_cpu(self.cfg), self.network)
            with logging_to(self.path / "train.log", partial(record_end, self.path, "failed")):
                if before == "cut off":
                    logger.warning(
                        "the last start ended without a word, as when the system kills what takes too much memory, or "
                        "the machine went off; if it happens again, raise grad_accum or lower data.num_workers"
                    )
                _tell_choices(self.cfg)
                if self.saved is not None and self.cfg.hours not in (None, self.saved.hours):
                    logger.warning(
                        "hours = %g changes nothing: the run goes on to its %g epochs", self.cfg.hours, self.cfg.epochs
                    )
                if self.needs:
                    memory = self.cfg.chosen.get("grad_accum", "")
                    logger.info("%s", f"{memory}, {self.needs}" if memory else self.needs)
                try:
                    with _telling_of_memory():
                        yield
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {self._way_out()}") from None
                record_end(self.path, "finished" if self.finished else "stopped")


def _lock(file: IO[str]) -> None:
    """Lock a file, which `fcmae status` may hold for a moment.

    Raises:
        OSError: if it cannot be locked.
    """
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() > ends:
                raise
        time.sleep(PATIENCE_S / 20)


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).partition("\n")[0]
        raise ValueError(f"{told.rstrip('.')}: raise grad_accum, or try {SMALLER}") from error


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
    own_files.check_outside(out, {key: paths for key, paths in inputs.items() if key != "model.init"})


def _places(cfg: RunConfig) -> dict[str, Sequence[str]]:
    """Where a run looks for its images, by setting."""
    return {key: paths for key, paths in cfg.inputs().items() if key.startswith("data.")}


def _tell_choices(cfg: RunConfig) -> None:
    """What was chosen as nobody gave it."""
    if not cfg.chosen:
        return
    values = options.flat(cfg)
    rows = [(key, text_of(values[key]), why) for key, why in cfg.chosen.items() if key in values]
    logger.info("not given, so chosen:\n%s", table(("setting", "value", "why"), rows, left=3))


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
