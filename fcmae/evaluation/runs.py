"""Read the files of a run, whatever state they are in."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from fcmae import options
from fcmae.atomic import read_bytes
from fcmae.config import FinetuneConfig, PretrainConfig, SegmentConfig
from fcmae.config.base import near_runs
from fcmae.data.index import Images, header_of
from fcmae.data.split import split
from fcmae.evaluation.charts import Curve
from fcmae.evaluation.records import EvaluationRecord
from fcmae.options.files import read_yaml
from fcmae.options.problems import ConfigError
from fcmae.training import own_files
from fcmae.training.records import split_metrics

MOST_SECONDS = 1e9  # thirty years

CONFIGS: dict[str, type[PretrainConfig] | type[FinetuneConfig] | type[SegmentConfig]] = {
    cfg.kind: cfg for cfg in (PretrainConfig, FinetuneConfig, SegmentConfig)
}
OF_A_START = {"chosen", "planned_s", "overwrite"}  # not settings of what is computed
MAX_JSON = 2**26  # bytes of a file
HUGE = 1e100  # no measured number is so large, and its square is finite

Text = Annotated[str, Field(coerce_numbers_to_str=True)]
Start = dict[str, dict[str, Text] | Text]
STARTS, EVALUATION = TypeAdapter(list[Start]), TypeAdapter(EvaluationRecord)


@dataclass(frozen=True)
class RunFiles:
    """The content of the files of a run.

    Attributes:
        path: its directory.
        name: unique in the report.
        kind: pretrain, finetune or segment.
        version: of fcmae, when it last started.
        settings: by dotted key, as JSON values.
        changed: settings that differ from the default.
        lines: of metrics.jsonl, with their finite numbers.
        starts: of environment.json.
        counts: numbers of images by their use.
        held_out: fingerprint of the held-out images of a fine-tuning.
        class_counts: numbers of held-out images of each class of a fine-tuning.
        evaluations: contents of evaluation.json by its directory, those of untrained networks last.
        problems: what could not be read, in sentences.
    """

    path: Path
    name: str
    kind: str
    version: str
    settings: dict[str, Any]
    changed: dict[str, Any]
    lines: list[dict[str, Any]]
    starts: list[Start]
    counts: dict[str, int]
    held_out: str | None
    class_counts: list[int]
    evaluations: dict[Path, EvaluationRecord]
    problems: list[str]

    def is_own(self, folder: Path, evaluation: EvaluationRecord) -> bool:
        """Whether an evaluation in its directory is of its own trained network, and not of another or of none.

        Args:
            folder: the folder of the evaluation.
            evaluation: the content of evaluation.json there.
        """
        model = evaluation["model"]
        named = folder == self.path / "evaluation" or Path(model).name == self.path.resolve().name
        return named and not is_untrained(evaluation) and not needs_no_network(evaluation)


def processes_of(run: RunFiles) -> int:
    """Number of processes when it last started."""
    given = str(run.starts[-1].get("num_processes")) if run.starts else ""
    return int(given) if given.isdecimal() else 1


def program(kind: str, num_processes: int) -> list[str]:
    """The words of a command that start a run on a number of processes, before its settings.

    Args:
        kind: pretrain, finetune or segment.
        num_processes: of the run; more than one are launched by accelerate.
    """
    if num_processes == 1:
        return ["fcmae", kind]
    # Without --multi_gpu accelerate starts one on a CPU; pretrain.py is in a clone alone.
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(num_processes), "-m", "fcmae.cli", kind]


def read_run(path: Path, name: str, *, counted: Collection[str] = tuple(CONFIGS)) -> RunFiles:
    """All that a run's directory holds, except pictures; what cannot be read becomes one of the run's problems.

    Args:
        path: the directory.
        name: of the run, unique in the report.
        counted: the kinds of run whose lists of images are read, which takes seconds where they are long.

    Raises:
        OSError: if the directory cannot be read.
        ValueError: if it is not a run's.
    """
    problems = list[str]()
    kind, version = _kind(path, problems)
    values, changed = _settings(path / "config.yaml", kind, problems)
    lines = _lines(path / "metrics.jsonl", problems)
    starts = read_json(path / "environment.json", STARTS, "the run's next start begins it anew", problems) or []
    files = sorted((path / "evaluation").glob("**/evaluation.json"), key=lambda file: (len(file.parts), file))
    read = {file.parent: read_json(file, EVALUATION, "run `fcmae evaluate` again", problems) for file in files}
    found = sorted(((k, v) for k, v in read.items() if v is not None), key=lambda item: is_untrained(item[1]))
    images = _count_images(path, kind, values, problems) if kind in counted else ({}, None, [])
    return RunFiles(path, name, kind, version, values, changed, lines, starts, *images, dict(found), problems)


def _kind(path: Path, problems: list[str]) -> tuple[str, str]:
    """The kind of run, and the version of fcmae; from other files if config.yaml is lost."""
    config = path / "config.yaml"
    kind, version = header_of(config)
    if version and kind in CONFIGS:
        return kind, version
    if not own_files.written(path, own_files.RESULTS):
        raise ValueError(f"{path} holds no run of fcmae: give the directory that --out named{near_runs(path)}")
    problems.append(
        f"{config} cannot be read, or does not begin as a run's: the kind of run is guessed by its other files."
    )
    left = (("val_maps.json", "segment"), ("val_files.json", "finetune"))
    return next((kind for file, kind in left if (path / file).exists()), "pretrain"), "unknown"


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The numbers of each line of metrics.jsonl that has a step."""
    try:
        found, damaged = split_metrics(path)
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror}): its curves are left out.")
        return []
    if damaged:
        problems.append(f"{path} has {len(damaged)} lines that are damaged or unfinished: they are left out.")
    lines = [{key: value for key in line if (value := finite(line, key)) is not None} for line in found]
    return [line for line in lines if "step" in line and "epoch" in line]


def is_untrained(evaluation: EvaluationRecord) -> bool:
    """Whether the evaluation is of an untrained network."""
    return evaluation["model"].startswith("random:")


def needs_no_network(evaluation: EvaluationRecord) -> bool:
    """Whether the evaluation is of pixels or colours, which have no stages."""
    return all(result["stage"] is None for result in evaluation["results"])


def read_json(path: Path, shape: TypeAdapter[Any], remedy: str, problems: list[str]) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        shape: what it must hold.
        remedy: what a problem ends with.
        problems: a sentence is added if the file is there and cannot be read or holds something else.

    Returns:
        The content, without what the shape does not name; None if there is none.
    """
    try:
        if path.exists():
            # pydantic's own parser refuses what json writes of paths that are no UTF-8.
            return shape.validate_python(json.loads(read_bytes(path, MAX_JSON)))
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror}): {remedy}.")
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        problems.append(f"{path} does not hold what it should ({where}{first['msg']}): {remedy}.")
    except (ValueError, RecursionError) as error:
        problems.append(f"{path} does not hold what it should ({error}): {remedy}.")
    return None


def _settings(config: Path, kind: str, problems: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings, and those that differ from the default."""
    try:
        saved: PretrainConfig | FinetuneConfig | SegmentConfig = options.read(CONFIGS[kind], config)
        return options.flat(saved), options.changed(saved)
    except ConfigError as error:
        problems.append(f"The settings are not those of this version of fcmae: {'; '.join(str(error).splitlines())}.")
    with suppress(ConfigError):
        found = options.flattened(CONFIGS[kind], read_yaml(config))
        values = {key: _plain(value) for key, value in found.items()}
        return values, values
    return {}, {}


def _plain(value: Any) -> Any:
    """A value in which texts that stand for numbers are that."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    with suppress(ValueError):
        return json.loads(value) if isinstance(value, str) and value.lstrip()[:1] not in "[{" else value
    return value


def _count_images(
    path: Path, kind: str, values: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, int], str | None, list[int]]:
    try:
        if kind == "pretrain" and (path / "files.json").exists():
            parts = split(Images.load(path / "files.json"), values["data.val_share"], values["seed"])
            return {"to learn from": len(parts[0]), "held out": len(parts[1])}, None, []
        if kind != "pretrain" and (path / "val_files.json").exists():
            train, val = Images.load(path / "files.json"), Images.load(path / "val_files.json")
            if kind == "segment":
                return {"to learn from": len(train), "held out": len(val)}, val.fingerprint(), []
            counts = {"to learn from": len(train), "held out": len(val), "classes": len(val.class_names or ())}
            held_out = [] if val.labels is None else np.unique(val.labels, return_counts=True)[1].tolist()
            return counts, val.fingerprint(), held_out
    except (ValueError, OSError, LookupError, TypeError) as error:
        problems.append(f"The images cannot be counted: {error}.")
    return {}, None, []


def finite(line: Mapping[str, Any], key: str) -> Any:
    """A number of a line; None if it is missing or not a measured value."""
    value: Any = line.get(key)
    return value if type(value) in (int, float) and -HUGE < value < HUGE else None


def curve(run: RunFiles, key: str, name: str) -> Curve | None:
    """What metrics.jsonl has under a key, where it is finite; None if there is nothing.

    Args:
        run: the run.
        key: of the lines.
        name: of the curve.
    """
    points = [line for line in run.lines if finite(line, key) is not None]
    return Curve(name, *([line[k] for line in points] for k in ("step", "epoch", key))) if points else None


def took_s(run: RunFiles) -> float:
    """Seconds of the logged windows (images / images per second), plus those of evaluating and saving."""
    seconds, before, batch_size = 0.0, 0.0, run.settings.get("batch_size")
    for line in run.lines:
        if isinstance(batch_size, int) and (speed := line.get("images_per_s")):
            seconds += (line["step"] - before) * batch_size / speed + line.get("upkeep_s", 0)
            before = line["step"]
    return seconds if 0 < seconds < MOST_SECONDS else 0
