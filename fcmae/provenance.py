"""Which run made a model, and which images the model has seen there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from fcmae.data.index import Images, also_in, header_of
from fcmae.options.files import read_yaml
from fcmae.training.own_files import OF_MODELS
from fcmae.training.records import read_metrics, read_starts
from fcmae.weights.segmenters import fits
from fcmae.weights.tensors import read_record

NONE = Images.of_files([])


class Seen(NamedTuple):
    """The images that a model has seen, as far as runs say.

    Attributes:
        labelled: whose labels, or label maps, were learnt by the run that made it, also as by `prune`, and by the runs
            whose weights that one began with.
        chose: labelled ones by whose scores its run chose it.
    """

    labelled: tuple[Images, ...] = ()
    chose: Images = NONE

    def labels_of(self, images: Images) -> list[str]:
        """The names of those of some images whose labels were learnt."""
        return list(dict.fromkeys(name for learnt in self.labelled for name in also_in(images, learnt)))


def seen_by(model: str | Path) -> Seen:
    """What images a model has seen.

    Args:
        model: path of weights, of which a run's are its best ones; one that is not there is the name of a published
            model, of which nothing is known.
    """
    path, labelled = Path(model), list[Images]()
    for run in _runs_before(path):
        images = None if header_of(run / "config.yaml")[0] == "pretrain" else images_of_run(run)
        if images is not None and _has_labels(run, images):
            labelled.append(images)
    return Seen(tuple(labelled), _images_that_chose(path, *_made_of(path)))


def learnt_without_labels(model: str | Path) -> Images:
    """The images that the run of a model learnt from without labels.

    Args:
        model: see `seen_by`.
    """
    run = run_of(Path(model))
    images = None if run is None else images_of_run(run)
    return NONE if run is None or images is None or _has_labels(run, images) else images


def _has_labels(run: Path, images: Images) -> bool:
    return images.labels is not None or (run / "maps.json").is_file()


def _runs_before(model: Path) -> Iterator[Path]:
    """The run that made a model, the run whose weights that one began with, and so on, as far as they can be read."""
    runs = set[Path]()
    with suppress(OSError):
        run = _maker_of(model)
        while run is not None and run.resolve() not in runs:
            runs.add(run.resolve())
            yield run
            start = _start_of(run)
            before = None if start is None else _maker_of(start)
            run = None if before is None or _is_younger(before, run) else before  # else its place was taken later


def _maker_of(model: Path) -> Path | None:
    """The run that a model lies in, or where that has no list of its images the run that its file names."""
    own, named = run_of(model), _made_of(model)[0]
    return next((run for run in (own, named) if run is not None and (run / "files.json").is_file()), own)


def _start_of(run: Path) -> Path | None:
    """What a run's weights began with, a path or a published model's name; None where it does not say."""
    with suppress(ValueError, LookupError, TypeError):
        start = Path(read_yaml(run / "config.yaml")["model"]["init"])
        places = [Path(one["directory"], start) for one in read_starts(run)]  # the first may have failed elsewhere
        return next((place for place in places if place.exists()), start if start.is_absolute() else None)
    return None


def _is_younger(run: Path, other: Path) -> bool:
    """Whether a run was first started after the latest start of another, as far as both say when."""
    with suppress(ValueError, LookupError, TypeError):
        first, latest = read_starts(run)[0]["time"], read_starts(other)[-1]["time"]
        return datetime.fromisoformat(first) > datetime.fromisoformat(latest)
    return False


def _images_that_chose(path: Path, made_of: Path | None, step: int) -> Images:
    """The labelled images by which a run chose the weights that are read from a path: its best ones, or of them."""
    folder = path.parent if path.is_file() else path
    run = folder.parent if folder.name == "best" else folder
    if run_of(path) is None and not (run / "metrics.jsonl").is_file():
        if made_of is None or step != step_of(made_of / "best"):
            return NONE
        run = made_of
    with suppress(ValueError, OSError):
        lines = read_metrics(run / "metrics.jsonl")
        num = sum("balanced_accuracy" in line or "miou" in line for line in lines)
        if (run / "best").is_dir() and num > 1:  # a run's only evaluation is its best and its last
            return Images.load(run / "val_files.json")
    return NONE


def images_of_run(path: Path) -> Images | None:
    """The images that a run learnt from, with labels if they had them; None where there is no run that says.

    Args:
        path: the run, or weights in its directory: best/, last/ or a checkpoint.
    """
    if (run := run_of(path)) is not None and (run / "files.json").is_file():
        with suppress(ValueError, OSError):
            return Images.load(run / "files.json")
    return None


def run_of(path: Path) -> Path | None:
    """The run that a path is, or in whose best/, last/ or checkpoints/ it lies; None of others.

    Args:
        path: of a model; one that is not there is the name of a published one.
    """
    if not path.exists():
        return None
    place = path.absolute()
    for run in (place, *place.parents[:3]):
        if (run / "config.yaml").is_file() and (run == place or place.relative_to(run).parts[0] in OF_MODELS):
            return run
    return None


def step_of(model: Path) -> int:
    """After how many steps a run exported a model; 0 if there is none, or one of two halves."""
    with suppress(OSError, SafetensorError, LookupError, TypeError, ValueError):
        return _made_of(model)[1] if fits(model) else 0
    return 0


def _made_of(weights: Path) -> tuple[Path | None, int]:
    """The run and the step that a file of ours, or a folder with one, was made from; None and 0 where it does not say.

    A relative path may be another run here.
    """
    file = weights / "model.safetensors" if weights.is_dir() else weights
    run, step = None, 0
    with suppress(OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        if file.is_file():
            origin = json.loads(read_record(file) or "{}")["origin"]
            step, run = int(origin["step"]), Path(origin["run"])
    return (run if run is not None and run.is_absolute() else None), step
