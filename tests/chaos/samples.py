"""What the trials damage: images and the runs, exports and command lines of the smallest network."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from runs import flags, write_images

from chaos.commands import Outcome, command

CUT_AT = 6  # steps of the runs that were cut, of 9 or 12
FORMATS = {"timm": "timm", "transformers": "transformers", "fcmae": "fcmae.safetensors", "minkowski": "minkowski.pth"}

NUMBERS = (None, True, -1, 0, 10**30, -0.0, 1.5, float("nan"), float("inf"))
WRONG: tuple[Any, ...] = (*NUMBERS, "", "x", "\x1b[31m", [], {}, [[1]], "9" * 9999)  # where another value belongs


class OnDemand(dict[str, Path]):
    """Runs by kind, or exports by format, each made when first asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        self.make = make

    def __missing__(self, name: str) -> Path:
        return self.setdefault(name, self.make(name))


@dataclass(frozen=True)
class Samples:
    """Made when first asked for, in `root`; trials work on copies. disk: a small one, where one could be mounted."""

    root: Path
    disk: Path | None = None

    @cached_property
    def images(self) -> Path:
        return write_images(self.root / "images")

    @cached_property
    def labelled(self) -> Path:
        for seed, name in enumerate(("cat", "dog")):
            write_images(self.root / "labelled" / name, 8, seed)
        return self.root / "labelled"

    def words(self, kind: str, out: Path, **changed: Any) -> list[str]:
        """The command line of a run of 3 epochs with a checkpoint a step. kind: "pretrain" or "finetune"."""
        # Parts are given: a run that is cut off before its first line would choose smaller ones, and round otherwise.
        settings = {"checkpoint__every_epochs": 0.1, "checkpoint__keep": 3, "grad_accum": 1} | changed
        if kind == "pretrain":
            return ["pretrain", *flags(self.images, out, **{"data__val_share": 0.1} | settings)]
        ours = dict.fromkeys(("model__mask_patch", "model__decoder_dim", "monitor__num_images"))
        settings = {"optim__base_lr": 0.03, "regularization__ema_decay": 0.9, "log__eval_epochs": 1} | settings
        words = flags(self.labelled, out, **ours, **settings)
        pairs = zip(words[::2], words[1::2], strict=True)
        return ["finetune", *(word for pair in pairs if pair[1] != "None" for word in pair)]

    @cached_property
    def finished(self) -> OnDemand:
        return OnDemand(lambda kind: self._run(kind, self.root / kind))

    @cached_property
    def watched(self) -> OnDemand:
        """Finished, with pictures and monitors."""
        return OnDemand(lambda kind: self._run(kind, self.root / f"watched-{kind}", **WATCHED[kind]))

    @cached_property
    def cut(self) -> OnDemand:
        """Stopped by a SIGTERM."""
        return OnDemand(lambda kind: self._run(kind, self.root / f"cut-{kind}", stop=True))

    @cached_property
    def exports(self) -> OnDemand:
        """The classifier, and the pretrained encoder in every format."""
        return OnDemand(self._export)

    def _export(self, name: str) -> Path:
        if name == "classifier":
            return self.finished["finetune"] / "best"
        place = self.root / "exports" / FORMATS[name]
        self._do(["convert", str(self.finished["pretrain"]), str(place), "--to", name])
        return place

    def copy(self, source: Path, folder: Path) -> Path:
        """A copy in the folder of a trial."""
        place = folder / source.name
        return Path(shutil.copytree(source, place) if source.is_dir() else shutil.copy2(source, place))

    def _run(self, kind: str, out: Path, stop: bool = False, **changed: Any) -> Path:
        self._do(self.words(kind, out, **changed), partial(_stop_at, CUT_AT) if stop else None, 143 if stop else 0)
        return out

    def _do(self, words: list[str], prepare: Any = None, status: int = 0) -> Outcome:
        (self.root / "home").mkdir(parents=True, exist_ok=True)
        outcome = command(words, self.root / "home", prepare)
        if outcome.status != status:
            raise RuntimeError(f"a sample cannot be made: {' '.join(words)}\n{outcome.text}")
        return outcome


WATCHED: dict[str, dict[str, Any]] = {
    "pretrain": {"log__trackers": "tensorboard", "log__eval_epochs": 1, "monitor__num_images": 4},
    "finetune": {"log__trackers": "tensorboard"},
}


def _stop_at(step: int) -> None:
    """Have this process stopped as soon as it has saved a step."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(args[1]).endswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(audit)
