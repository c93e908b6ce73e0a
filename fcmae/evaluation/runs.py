"""What the files of a run say, whatever state they are in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fcmae import options
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.data.index import Images
from fcmae.data.split import split
from fcmae.evaluation.charts import Curve
from fcmae.training.run import read_metrics

CONFIGS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    Attributes:
        path: its directory.
        name: unique in the report.
        kind: pretrain or finetune.
        version: of fcmae, when it last started.
        settings: by dotted key, as JSON values.
        changed: those that are not the default.
        lines: of metrics.jsonl.
        starts: of environment.json.
        counts: images by what they are for.
        held_out: fingerprint of the held-out images of a fine-tuning.
        class_counts: held-out ones of each class of a fine-tuning.
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
    starts: list[dict[str, Any]]
    counts: dict[str, int]
    held_out: str | None
    class_counts: list[int]
    evaluations: dict[Path, dict[str, Any]]
    problems: list[str]


def read_run(path: Path, name: str) -> Run:
    """All that a run's directory holds, but for pictures; what cannot be read becomes one of the run's problems.

    Raises:
        ValueError: if it is no run's.
    """
    config, header = path / "config.yaml", list[str]()
    if config.is_file():
        with config.open(encoding="utf-8", errors="replace") as text:
            header = text.readline().split()
    if header[:2] != ["#", "fcmae"] or len(header) != 4 or header[2] not in CONFIGS:
        raise ValueError(f"{path} holds no run of fcmae: give the directory that --out named")
    kind, version, problems = header[2], header[3], list[str]()
    values, changed = _settings(config, kind, problems)
    lines = [line for line in read_metrics(path / "metrics.jsonl") if isinstance(line, dict)]
    lines = [line for line in lines if finite(line, "step") is not None and finite(line, "epoch") is not None]
    starts = read_json(path / "environment.json", list, "the run's next start begins it anew", problems) or []
    starts = [start for start in starts if isinstance(start, dict)]
    files = sorted((path / "evaluation").glob("**/evaluation.json"), key=lambda file: (len(file.parts), file))
    read = {file.parent: read_json(file, dict, "run `fcmae evaluate` again", problems) for file in files}
    found = sorted(((k, v) for k, v in read.items() if v is not None), key=lambda item: is_untrained(item[1]))
    images = _count_images(path, kind, values, problems)
    return Run(path, name, kind, version, values, changed, lines, starts, *images, dict(found), problems)


def is_untrained(evaluation: Mapping[str, Any]) -> bool:
    """Whether it is of a network that was not trained."""
    return str(evaluation.get("model")).startswith("random:")


def read_json(path: Path, kind: type, remedy: str, problems: list[str]) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        kind: what it must hold, such as dict.
        remedy: what a problem ends with.
        problems: a sentence is added if the file is there and cannot be read or holds something else.

    Returns:
        The content, or None if there is none of that kind.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error}): {remedy}.")
        return None
    if not isinstance(found, kind):
        problems.append(f"{path} does not hold what it should: {remedy}.")
        return None
    return found


def _settings(config: Path, kind: str, problems: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings, and those that are not the default."""
    try:
        saved: PretrainConfig | FinetuneConfig = options.read(CONFIGS[kind], config)
        return options.flat(saved), options.changed(saved)
    except options.ConfigError as error:
        problems.append(f"The settings are not those of this version of fcmae: {'; '.join(str(error).splitlines())}.")
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            content = None
        values = flat(content) if isinstance(content, dict) else {}
    return values, values


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flat(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}.{name}".rstrip("."): item for name, item in inner.items()}
    return found


def _count_images(
    path: Path, kind: str, values: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, int], str | None, list[int]]:
    try:
        if kind == "pretrain" and (path / "files.json").is_file():
            parts = split(Images.load(path / "files.json"), values["data.val_share"], values["seed"])
            return {"to learn from": len(parts[0]), "held out": len(parts[1])}, None, []
        if kind == "finetune" and (path / "val_files.json").is_file():
            train, val = Images.load(path / "files.json"), Images.load(path / "val_files.json")
            counts = {"to learn from": len(train), "held out": len(val), "classes": len(val.class_names or ())}
            return counts, val.fingerprint(), [] if val.labels is None else np.bincount(val.labels).tolist()
    except (ValueError, OSError, KeyError) as error:
        problems.append(f"The images cannot be counted: {error}.")
    return {}, None, []


def finite(line: Mapping[str, Any], key: str) -> Any:
    """A number of a line; None if there is none that is finite."""
    value = line.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def curve(run: Run, key: str, name: str) -> Curve | None:
    """What metrics.jsonl has under a key, where it is finite; None if there is nothing.

    Args:
        run: whose it is.
        key: of the lines.
        name: of the curve.
    """
    points = [line for line in run.lines if finite(line, key) is not None]
    return Curve(name, *([line[k] for line in points] for k in ("step", "epoch", key))) if points else None
