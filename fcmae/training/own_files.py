"""Which files of a run directory the run wrote, and how they are removed: nothing else ever is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from fcmae.atomic import UNFINISHED
from fcmae.config import RunConfig
from fcmae.data.shards import SUFFIXES
from fcmae.data.source import few
from fcmae.data.storage import CACHE, INDEX
from fcmae.training.records import may_have_started

# What evaluate and analyze write, by the folder of a run that they do so in by default.
FOUND = {
    "evaluation": ("evaluation.json", "confusion.png", "table.md"),
    "analysis": (
        "analysis.json",
        "cosine_distance.png",
        "channels.png",
        "effective_rank.png",
        "grn.png",
        "selectivity.png",
        "activations.png",
    ),
}
LISTS = ("files.json", "val_files.json", "maps.json", "val_maps.json")  # of images
# What a start leaves that ended before its first line of numbers. A star is anything, # the number of a step.
STARTED = (
    ".lock",
    "config.yaml",
    "environment.json",
    *LISTS,
    "train.log",
    "bad_files.txt",
    "index/*.index",
    "cache/*/*.read",
    "tensorboard/events.*",
    "tensorboard/fcmae/events.*",
)
EXPORTED = ("config.json", "model.safetensors", "head.safetensors")  # of a model
# What it leaves after that.
RESULTS = (
    ".saved",
    "metrics.jsonl",
    "loss.png",
    "cosine_distance.png",
    "effective_rank.png",
    "predictions.csv",
    "confusion.csv",
    "overlays/step-#.png",
    "reconstructions/step-#.png",
    "reconstructions/over-time.png",
    "reconstructions/tiles/step-#.png",
    *(
        f"checkpoints/{folder}/{name}"
        for folder in ("step-#", f"{UNFINISHED}step-#")
        for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "checkpoint.json")
    ),
    *(f"{place}/{name}" for place in ("best", "last") for name in (*EXPORTED, "predictions.csv", "confusion.csv")),
)
OF_MODELS = {"best", "last", "checkpoints"}  # those of its folders that hold models
FOLDERS = ("index", "cache", "checkpoints", "tensorboard", "reconstructions", "overlays", "best", "last")
WRITTEN = (".png", ".tif", ".tiff")  # pictures and label maps
ASIDE = f"{UNFINISHED}checkpoints"
SAVED = ".saved"  # there once a checkpoint was: without one, the run is finished and tidied up, or somebody's loss


def check_outside(out: Path, images: Mapping[str, Iterable[str] | str | None]) -> None:
    """Refuse to write pictures where images are searched.

    Args:
        out: where a command writes.
        images: their sources by the setting that names them; only folders on this machine count.

    Raises:
        ValueError: if `out` lies in one of them.
    """
    place = out.resolve()
    for key, sources in images.items():
        for source in [sources] if isinstance(sources, str) else sources or ():
            folder, recursive, pattern = source.partition("**")
            path = Path(os.path.dirname(folder) if recursive else source)  # noqa: PTH120
            suffix = os.path.splitext(pattern)[1].lower()  # noqa: PTH122
            if recursive and suffix in SUFFIXES and suffix not in WRITTEN:
                continue
            if path.is_dir() and place.is_relative_to(path.resolve()):
                raise ValueError(f"out = {out} lies in {key} = {path}, where images are searched: give another out")


def overwrites(cfg: RunConfig) -> bool:
    """Whether what is in `out` is to go: at a start that was typed, not where a launcher starts a command again.

    Raises:
        ValueError: under torchrun on several nodes, which counts no start that it makes as one comes or goes.
    """
    by_slurm, by_torchrun = (os.environ.get(f"{by}_RESTART_COUNT", "0").strip("0") for by in ("SLURM", "TORCHELASTIC"))
    if not cfg.overwrite or by_torchrun:
        return False
    # SLURM counts starts of a job, in which this command may come for the first time.
    if by_slurm and (cfg.out is None or may_have_started(os.environ.get("SLURM_JOB_ID", ""), cfg.out)):
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "overwrite: a launcher of several nodes gives it again when one comes or goes, and what "
            f"{cfg.out} holds by then would go too: delete it before, or give another --out"
        )
    return True


def is_unused(place: Path) -> bool:
    """Whether a directory has nothing but what a run leaves that ended before it wrote its config.yaml."""
    return place.is_dir() and all(
        path.name in (INDEX, CACHE) or path.name.startswith((".lock", UNFINISHED)) for path in place.iterdir()
    )


def has_numbers(run: Path) -> bool:
    """Whether a run has written numbers: each start writes environment.json, without which they are somebody else's."""
    return all((run / name).exists() for name in ("environment.json", "metrics.jsonl"))


def written(run: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Paths of a run that match one of the patterns."""
    return [path for path in _below(run) if _matches(path.relative_to(run), patterns)]


def strangers(run: Path) -> list[Path]:
    """What is in the folders that a run writes, or in place of its files, and is not its own."""
    own = (*STARTED, *RESULTS)
    ours = {part for pattern in own for part in _parents(pattern)}
    found = []
    for path in _below(run):
        relative = path.relative_to(run)
        inside = relative.parts[0] in FOLDERS or _matches(relative, own)
        is_folder = path.is_dir() and not (path.is_symlink() and len(relative.parts) > 1)
        if inside and not (_matches(relative, tuple(ours)) if is_folder else _matches(relative, own)):
            found.append(path)
    return found


def remove(run: Path) -> None:
    """Remove all that a run wrote.

    The checkpoints go first and in one rename, so that the old run is left with all of them or none, wherever this is
    cut off; where `checkpoints` is a link, to a bigger disk say, the link stays and they go one by one, the oldest
    first. `.saved` and train.log go before the checkpoints; metrics.jsonl and environment.json, which mark a run, go
    last.

    Raises:
        ValueError: before anything is removed, if the folders hold something else.
    """
    if others := strangers(run):
        raise ValueError(
            f"out = {run} holds files that no run of fcmae wrote ({few(map(str, others))}): move them, or give another "
            "--out"
        )
    remove_aside(run)
    for name in (SAVED, "train.log"):
        (run / name).unlink(missing_ok=True)
    checkpoints = run / "checkpoints"
    if checkpoints.is_symlink():
        for step in sorted(checkpoints.iterdir()):
            aside = step.with_name(UNFINISHED + step.name.removeprefix(UNFINISHED))
            step.rename(aside)
            shutil.rmtree(aside)
    elif checkpoints.exists():
        checkpoints.rename(run / ASIDE)
        remove_aside(run)
    for path in written(run, (*RESULTS, *STARTED)):
        if path.name not in (".lock", "config.yaml", "environment.json", "metrics.jsonl"):
            path.unlink(missing_ok=True)
    for place, own in FOUND.items():
        for path in [*(run / place).glob("*/*"), *(run / place).glob("*")]:
            if path.name in own and path.is_file():
                path.unlink()
    folders = [run / name for name in (*FOLDERS, *FOUND)]
    for path in [*(inner for folder in folders for inner in folder.glob("*/")), *folders]:
        with suppress(OSError):  # not empty, or a link
            path.rmdir()
    for name in ("metrics.jsonl", "environment.json"):
        (run / name).unlink(missing_ok=True)


def remove_models(run: Path) -> None:
    """Remove the checkpoints and exported models of a finished run, which is then done and no longer goes on."""
    models = {f"{place}/{name}" for place in ("best", "last") for name in EXPORTED}
    patterns = tuple(name for name in RESULTS if name.startswith("checkpoints/") or name in models)
    for path in written(run, patterns):
        path.unlink(missing_ok=True)
    for folder in [*(run / "checkpoints").glob("*/"), run / "checkpoints"]:
        with suppress(OSError):  # not empty
            folder.rmdir()


def remove_aside(run: Path) -> None:
    """Remove what a removal that was cut off has left."""
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Remove the files that the run was writing when it was killed.

    Args:
        run: its directory, which no other process writes to.
    """
    for folder in (".", "best", "last", "overlays", "reconstructions", "reconstructions/tiles"):
        for path in (run / folder).glob(f"{UNFINISHED}*"):
            if path.is_file() and _matches(path.relative_to(run), (*STARTED, *RESULTS)):
                path.unlink(missing_ok=True)


def _below(run: Path) -> Iterator[Path]:
    """Everything in a directory; links to folders are followed at the top only, where `checkpoints` may be one."""
    if not run.is_dir():
        return
    for top in sorted(run.iterdir()):
        yield top
        if top.is_dir():
            for folder, folders, files in os.walk(top):
                yield from (Path(folder, name) for name in (*folders, *files))


def _matches(relative: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a path is of one of the patterns, or on the way to be."""
    spellings = {relative.parts, relative.with_name(relative.name.removeprefix(UNFINISHED) or relative.name).parts}
    return any(
        len(parts) == len(names) and all(map(re.fullmatch, map(_regex, names), parts))
        for names in (pattern.split("/") for pattern in patterns)
        for parts in spellings
    )


def _regex(name: str) -> str:
    return re.escape(name).replace(r"\*", ".*").replace(r"\#", r"\d{8,}")


def _parents(pattern: str) -> list[str]:
    names = pattern.split("/")
    return ["/".join(names[:end]) for end in range(1, len(names))]
