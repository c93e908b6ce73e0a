"""A report on runs on one page: an HTML file that needs neither a network connection nor any other file."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import TypeAdapter
from typing_extensions import TypedDict

import fcmae
from fcmae.atomic import read_bytes, write_text
from fcmae.data.source import printable
from fcmae.data.split import evenly
from fcmae.evaluation import paired
from fcmae.evaluation.charts import Chart, Table, heat_map, line_chart, shown
from fcmae.evaluation.records import COLUMNS, EvaluationRecord, score_rows
from fcmae.evaluation.runs import (
    MAX_JSON,
    OF_A_START,
    RunFiles,
    curve,
    finite,
    processes_of,
    program,
    read_json,
    read_run,
    took_s,
)
from fcmae.evaluation.status import state_of
from fcmae.evaluation.verdicts import guessed, is_collapsing, is_working, was_worth_it
from fcmae.options.line import flags
from fcmae.training.records import of_model

MARK = '<meta name="generator" content="fcmae report'
MOST_PICTURES = 12  # over time
MOST_CLASSES = 100  # of a classifier
MAX_PICTURE, MAX_PIXELS = 2**25, 2**26  # bytes and pixels of one
KINDS = {"pretrain": "pretraining", "finetune": "fine-tuning", "segment": "segmentation"}
ANALYZED = ("cosine_distance", "effective_rank", "dead_share", "saturated_share", "grn_gamma", "grn_beta")
SCORES = ("balanced_accuracy", "auroc", "top1", "top5")
CLASS_COLUMNS = ("class", "images", "recall", "precision", "most often taken for")
OF_MAPS = ("miou", "pixel_accuracy", "boundary_f1")
LAST_VALUES = ("epoch", "loss", "val_loss", *SCORES, *OF_MAPS, "knn_balanced_accuracy")
# Statistics of each layer, each with the least value that the last colour stands for.
LAYERED = {"cosine_distance": 0.5, "effective_rank": 1.0, "dead_share": 0.5, "saturated_share": 0.5}


class Analyzed(TypedDict):
    """What is read about a model from an analysis.json."""

    name: str
    layers: list[dict[str, Any]]


ANALYSIS = TypeAdapter(dict[Literal["models"], list[Analyzed]])


class Picture(NamedTuple):
    """A picture in the page.

    Attributes:
        label: what is written beside it.
        alt: text that is read out in its place.
        uri: a data URI.
        width: in pixels.
        height: in pixels.
    """

    label: str
    alt: str
    uri: str
    width: int
    height: int


@dataclass
class Section:
    """A part of a chapter, in the order in which it is shown.

    Attributes:
        title: above it; a section without anything else is false.
        notes: sentences.
        tables: always shown.
        more: tables that are shown when opened.
        charts: each with its table.
        series: pictures, shown one at a time.
        pictures: shown all at once.
        commands: to be copied.
    """

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    series: list[Picture] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(list(vars(self).values())[1:])


def report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page on one run or several; it also lists what could not be read of them.

    Args:
        paths: directories of runs, and of `fcmae worth`.
        out: the page, a new file or an earlier page; by default report.html in the run's directory.

    Returns:
        The path of the page.

    Raises:
        OSError: if it cannot be written.
        ValueError: if none of the paths is a run, `out` is missing for several runs, or exists and is not a report of
            ours, or plotly, which draws the charts, is not installed.
    """
    if out is None:
        if len(paths) > 1:
            raise ValueError(f"--out is missing for {len(paths)} runs: name the file to write, e.g. --out report.html")
        out = paths[0] / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: name the file to write, e.g. {out / 'report.html'}")
    if out.is_symlink() and not out.exists():
        raise ValueError(f"out = {out} is a link that leads nowhere: give another --out, or remove it")
    if out.exists() and not _is_report(out):
        raise ValueError(f"{out} is there and no report of fcmae: name another file with --out, or delete it")
    # Directories are named by their last part, or by the whole path if two have the same.
    short = [Path(os.path.realpath(path)).name for path in paths]
    names = short if len(set(short)) == len(paths) else map(str, paths)
    runs, compared, problems = list[RunFiles](), dict[str, paired.Comparison](), list[str]()
    for path, name in zip(paths, names, strict=True):
        try:
            if (path / paired.FILE).is_file():
                if (found := paired.read(path, problems)) is not None:
                    compared[name] = found
                if (pretrained := path / "runs" / "pretrained").is_dir():
                    runs.append(read_run(pretrained, f"{name}/pretrained"))
            else:
                runs.append(read_run(path, name))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if not (runs or compared):
        raise ValueError("\n".join(problems))
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    write_text(out, render(runs, problems, compared))
    return out


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)


def render(
    runs: Sequence[RunFiles], problems: Sequence[str] = (), compared: Mapping[str, paired.Comparison] | None = None
) -> str:
    """The page. Everything in it that came from the user is escaped, and its policy lets only its own scripts run.

    Args:
        runs: the runs that it is about.
        problems: why others could not be read, in sentences.
        compared: results of `fcmae worth`, by name.

    Raises:
        ValueError: if plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError("report needs plotly to draw charts: pip install plotly") from error
    compared = compared or {}
    chapters = [(f"{name} (is pretraining worth it?)", [_comparison(found)]) for name, found in compared.items()]
    chapters += [(f"{run.name} ({KINDS[run.kind]})", describe(run)) for run in runs]
    chapters += [("Runs that cannot be read", [Section("What is wrong", list(problems))])] if problems else []
    if len(runs) > 1 and (sections := compare(runs)):
        chapters.append(("Comparison of the runs", sections))
    commands = [Section(name, commands=[_quoted(found["command"])]) for name, found in compared.items()]
    chapters.append(("Commands to reproduce this", commands + [reproduce(run) for run in runs]))
    verdicts = [*map(paired.verdict, compared.values()), is_working(runs), is_collapsing(runs)]
    verdicts.append(was_worth_it(runs, else_how=not compared))
    names = [*compared, *(run.name for run in runs)]
    loader = PackageLoader("fcmae.evaluation", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"source_hash": _source_hash, "code": _code}
    page = environment.get_template("report.html.j2").render(
        mark=Markup(MARK),
        version=fcmae.__version__,
        title=f"Report on {', '.join(names) if len(names) <= 3 else f'{len(names)} runs'}",
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        names=[*compared, *(str(run.path) for run in runs)],
        style=Markup(loader.get_source(environment, "report.css")[0]),
        scripts=[Markup(get_plotlyjs()), Markup(loader.get_source(environment, "report.js")[0])],
        verdicts=[verdict for verdict in verdicts if verdict.sentences],
        chapters=chapters,
    )
    # Names of files may hold bytes that are not Unicode.
    return page.lstrip().encode("utf-8", "replace").decode("utf-8")


def _code(text: str) -> Markup:
    """The text with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _source_hash(text: str) -> str:
    """The hash by which a Content-Security-Policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def read_picture(path: Path, label: str, alt: str, problems: list[str]) -> list[Picture]:
    """A picture, unchanged or as JPEG, whichever is smaller.

    Args:
        path: the file.
        label: see `Picture`.
        alt: see `Picture`.
        problems: a sentence is added if it cannot be read.

    Returns:
        A list of the picture; empty if it cannot be read.
    """
    try:
        content = read_bytes(path, MAX_PICTURE)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            size, kind, smaller = image.size, "png", io.BytesIO()
            if math.prod(size) > MAX_PIXELS:
                problems.append(f"{path} cannot be shown (it has more than {MAX_PIXELS:,} pixels).")
                return []
            image.convert("RGB").save(smaller, "JPEG", quality=90, subsampling=0)
    except UnidentifiedImageError:
        problems.append(f"{path} cannot be shown (it is no PNG).")
        return []
    except Exception as error:  # for a broken file Pillow raises whatever its parts raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        problems.append(f"{path} cannot be shown ({reason}).")
        return []
    if smaller.tell() < len(content):
        content, kind = smaller.getvalue(), "jpeg"
    return [Picture(label, alt, f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *size)]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _words(key: str) -> str:
    return re.sub("[_-]", " ", key).capitalize()


# Chapters


def describe(run: RunFiles) -> list[Section]:
    """The sections of a run's chapter, without empty ones."""
    waiting = {"Share of the time that was spent waiting for data": ["data_wait_share"]}
    if not any("data_wait_share" in line for line in run.lines):
        waiting = {"Seconds spent waiting for data since the line before": ["data_wait_s"]}
    sections = [
        _what_was_run(run),
        _loss(run),
        Section("Gradient norm", charts=_charts(run, {"Norm of the gradient, before clipping": ["grad_norm"]})),
        Section(
            "Throughput and waiting for data", charts=_charts(run, {"Images a second": ["images_per_s"]} | waiting)
        ),
        _scores(run),
        _classes(run),
        _overlays(run),
        _reconstructions(run),
        _monitors(run),
        *(_evaluation(folder, found) for folder, found in run.evaluations.items()),
        _analysis(run),
    ]
    return [section for section in sections if section]


def _what_was_run(run: RunFiles) -> Section:
    get, section = run.settings.get, Section("What was run", list(run.problems))
    rows = [["state", _status(run) + (f", {len(run.starts)} starts" if len(run.starts) > 1 else "")]]
    rows += [["model", str(get("model.variant") or f"that of {get('model.init')}")]]
    rows += [["starting weights", str(get("model.init") or "none: from scratch")]]
    rows += [["licence", f"{get('model.license')}, of the starting weights"]] if get("model.license") else []
    rows += [["images", ", ".join(f"{number:,} {use}" for use, number in run.counts.items())]] if run.counts else []
    rows += [["from", _text(value)] for key in ("data.path", "data.val_path") if (value := get(key))]
    if isinstance(size := get("data.image_size"), list):
        channels = f", {get('data.in_chans')} channels" if get("data.in_chans") else ""  # else those of the weights
        rows += [["size", f"{' × '.join(map(str, size))} pixels{channels}"]]
    if (bad := run.path / "bad_files.txt").is_file():
        with suppress(OSError):
            number = read_bytes(bad, MAX_JSON).count(b"\n")
            rows += [["unreadable", f"{number} files, listed in {bad}"]] if number else []
    if seconds := took_s(run):
        rows += [["time", f"{timedelta(seconds=round(seconds))} of training and evaluating"]]
    if run.starts:
        last, versions = run.starts[-1], run.starts[-1].get("versions", "")
        rows += [["started", _text(run.starts[0].get("time"))]]
        rows += [["device", f"{last.get('num_processes')} × {last.get('device')} ({last.get('device_name')})"]]
        rows += [["CPU", f"{last.get('cpu')}, {last.get('cores')} cores"]]
    else:
        versions = {"fcmae": run.version}
    rows += [["versions", ", ".join(map(" ".join, versions.items())) if isinstance(versions, dict) else versions]]
    section.tables.append(Table("The run", ["what", "value"], rows))
    settings = [
        Table(caption, ["setting", "value"], [[key, _text(value)] for key, value in values.items()])
        for caption, values in (("Settings that are not the default", run.changed), ("All settings", run.settings))
    ]
    section.tables += settings[:1] if run.changed else []
    section.more += settings[1:]
    if len(run.starts) > 1:
        keys = ("time", "num_processes", "device_name", "command")
        starts = [[_text(start.get(key)) for key in keys] for start in run.starts]
        section.more.append(Table("Every start", ["time", "processes", "device", "command"], starts))
    return section


def _status(run: RunFiles) -> str:
    state = state_of(run.path)
    if not run.lines:
        return f"{state}, nothing logged yet"
    epoch, step, epochs = run.lines[-1]["epoch"], run.lines[-1]["step"], run.settings.get("epochs")
    if run.settings.get("eval_only"):
        return "an evaluation"
    if state == "not begun":  # it has numbers, so that only its log is not there
        state = "finished" if isinstance(epochs, int | float) and epoch >= epochs else "stopped"
    if state == "finished":
        return f"finished after {epochs} epochs, {step:,} steps"
    return f"{state} at epoch {epoch:.4g} of {epochs}, step {step:,}"


def _charts(run: RunFiles, charts: Mapping[str, Sequence[str]], *, may_be_log: bool = True) -> list[Chart]:
    """Charts of what metrics.jsonl has under some keys, by caption; without empty ones."""
    found = {caption: [c for key in keys if (c := curve(run, key, key))] for caption, keys in charts.items()}
    return [line_chart(curves, caption, may_be_log=may_be_log) for caption, curves in found.items() if curves]


def _loss(run: RunFiles) -> Section:
    section = Section("Loss and learning rate", charts=_charts(run, {"Loss": ["loss", "val_loss", "ema_val_loss"]}))
    # Not logarithmic: it ends near 0, and the last steps would fill the chart.
    section.charts += _charts(run, {"Learning rate": ["lr"]}, may_be_log=False)
    if not section:
        section.notes.append("Nothing is logged yet.")
    elif run.settings.get("model.normalize_target"):
        section.notes.append(
            "The loss is the mean squared error on hidden patches, each standardised: painting every patch in its own "
            "mean colour scores 1."
        )
    elif run.kind == "segment":
        section.notes.append(
            "The two losses are not on one scale: that of training has the weights of the classes, Dice and unknown "
            "pixels, and of the head anytime all answers; that of held-out images is the mean over known pixels."
        )
    return section


def _scores(run: RunFiles) -> Section:
    section, scored = Section("Scores on the held-out images"), [line for line in run.lines if "val_loss" in line]
    keys = OF_MAPS if run.kind == "segment" else SCORES
    scored = [line for line in scored if any(key in line for key in keys)]
    if not scored:
        return section
    there = [prefix + key for prefix in ("", "ema_") for key in keys if prefix + key in scored[-1]]
    named = {"scores": scored[-1]}
    if len(scored) > 1:
        by = f"ema_{keys[0]}" if f"ema_{keys[0]}" in there else keys[0]
        named = {"last": scored[-1], f"best by {by}": max(scored, key=lambda line: line.get(by, 0))}
        section.notes.append("The best was chosen by these very images, so its scores are too high; the last was not.")
        section.charts = _charts(run, {"Scores": there})
    rows = [[name, f"{line['epoch']:.4g}", *(shown(line.get(key)) for key in there)] for name, line in named.items()]
    section.tables.append(Table("Scores", ["evaluation", "epoch", *there], rows))
    return section


def _classes(run: RunFiles) -> Section:
    """Results by class: of a segmentation the curve of its IoU, and the confusion matrix; of a classifier recalls."""
    section = Section(f"Classes of the held-out {'pixels' if run.kind == 'segment' else 'images'}")
    keys = list(dict.fromkeys(key for line in run.lines for key in line if "iou/" in key))
    prefix = "ema_iou/" if any(key.startswith("ema_") for key in keys) else "iou/"
    curves = [c for key in keys if key.startswith(prefix) and (c := curve(run, key, key.removeprefix(prefix)))]
    section.charts = [line_chart(curves, "IoU of each class", may_be_log=False)] if curves else []
    places = (run.path / place / "confusion.csv" for place in ("last", "best", "."))
    if (file := next((place for place in places if place.is_file()), None)) is not None:
        try:
            columns, *rows = csv.reader(read_bytes(file, MAX_JSON).decode().splitlines())
            names, counts = [row[0] for row in rows], np.array([row[1:] for row in rows], np.int64)
            if counts.shape != (len(names), len(names)):
                raise ValueError("it is not square")
            place = "" if file.parent == run.path else f" ({file.parent.name})"
            if run.kind == "segment":
                shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
                caption = f"Confusion: the share of each true class's pixels that is predicted as each class{place}"
                lines = [[name, *(f"{share:.1%}" for share in row)] for name, row in zip(names, shares, strict=True)]
                section.tables = [Table(caption, columns, lines)]
            else:
                section.tables = [_recalls(names, counts, place)]
                if len(names) > MOST_CLASSES:
                    section.notes.append(f"The {MOST_CLASSES} of {len(names)} with the lowest recall; {file} has all.")
        except (OSError, ValueError, LookupError, ArithmeticError, csv.Error) as error:
            section.notes.append(f"{file} cannot be shown ({error}).")
    return section


def _recalls(names: Sequence[str], counts: NDArray[np.int64], place: str) -> Table:
    """What becomes of each class's images, the lowest recall first.

    counts: (classes, classes), images by true and predicted class. place: which model's, for the caption.
    """
    right, of, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    recall = np.where(of > 0, right / np.maximum(1, of), np.inf)
    rows = []
    for i in np.argsort(recall, kind="stable")[:MOST_CLASSES]:
        wrong = counts[i].copy()
        wrong[i] = 0
        confused = f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        shares = ["" if not num else f"{right[i] / num:.1%}" for num in (of[i], predicted[i])]
        rows.append([names[i], f"{of[i]:,}", *shares, confused])
    return Table(f"Recall and precision of each class{place}", CLASS_COLUMNS, rows)


def _overlays(run: RunFiles) -> Section:
    alt = "A row an image; from left to right: the image, its true classes, the predicted ones."
    return _over_time(run, "Label maps", "overlays", alt)


def _reconstructions(run: RunFiles) -> Section:
    alt = (
        "A row an image; from left to right: original, masked, reconstruction, reconstruction with the visible patches."
    )
    section = _over_time(run, "Reconstructions", "reconstructions", alt)
    if (over_time := run.path / "reconstructions" / "over-time.png").is_file():
        alt = "Reconstructions of the same images over time. A row an image, a column an evaluation."
        section.pictures = read_picture(over_time, "The same images over time", alt, section.notes)
    return section


def _over_time(run: RunFiles, title: str, place: str, content: str) -> Section:
    """Pictures of evaluations, one at a time, from a folder of the run."""
    section, folder = Section(title), run.path / place
    files = {int(path.stem[5:]): path for path in folder.glob("step-*.png") if path.stem[5:].isdecimal()}
    steps, epochs = sorted(files), {line["step"]: line["epoch"] for line in run.lines}
    for step in (steps[i] for i in evenly(len(steps), MOST_PICTURES)):
        label = f"step {step:,}" + (f", epoch {epochs[step]:.4g}" if step in epochs else "")
        section.series += read_picture(files[step], label, f"{title} at {label}. {content}", section.notes)
    if len(steps) > MOST_PICTURES:
        section.notes.append(f"{MOST_PICTURES} of {len(steps)} pictures, evenly spaced; {folder} has all.")
    return section


def _monitors(run: RunFiles) -> Section:
    section = Section("What was watched while training")
    for prefix, top in LAYERED.items():
        keys = dict.fromkeys(key for line in run.lines for key in line if key.startswith(f"{prefix}/"))
        if layers := [c for key in keys if (c := curve(run, key, key.partition("/")[2]))]:
            section.charts.append(heat_map(layers, f"{_words(prefix)}, by layer", top))
    knn = ["knn_balanced_accuracy", "knn_auroc", "knn_top1"]
    section.charts += _charts(run, {"Nearest neighbours on labelled images": knn})
    return section


def _evaluation(folder: Path, found: EvaluationRecord) -> Section:
    """The tables of an evaluation.json."""
    section, data, results = Section(f"Evaluation of {found['model']}"), found["data"], found["results"]
    matrix = (found["confusion"] or {"matrix": []})["matrix"]
    tested = [sum(row) for row in matrix] or [1] * len(data["class_names"])  # images of each class
    section.notes.append(
        f"{data['num_train']:,} labelled images to learn from ({data['train']}), {data['num_test']:,} to test on "
        f"({data['test']}), {len(data['class_names'])} classes; a guess scores {shown(guessed(tested))} in balanced "
        "accuracy."
    )
    spread = "; in brackets, the 95 % interval over draws" if any("spread" in r for r in results) else ""
    section.tables.append(Table(f"Scores of each probe on the test images{spread}", COLUMNS, score_rows([found])))
    section.pictures = _pictures(folder, section.notes)
    return section


def _comparison(found: paired.Comparison) -> Section:
    """Results of `fcmae worth`: means and intervals by amount of labels, and differences to scratch, seed by seed."""
    section = Section("Scores by start and number of labels", paired.notes(found))
    if rows := paired.compare(found):
        table = Table("Balanced accuracy in %", paired.COLUMNS, list(map(paired.cells, rows)))
        section.tables, section.charts = [table], [paired.chart(found)]
    return section


def _analysis(run: RunFiles) -> Section:
    section, file = Section("Analysis of the features"), run.path / "analysis" / "analysis.json"
    found = read_json(file, ANALYSIS, "run `fcmae analyze` again", section.notes) or {"models": ()}
    rows = [
        [str(layer.get("name")), model["name"], *(shown(finite(layer, key)) for key in ANALYZED)]
        for model in found["models"]
        for layer in model["layers"]
    ]
    columns = ["layer", "model", *map(_words, ANALYZED)]
    section.more += [Table("Numbers of every layer", columns, rows)] if rows else []
    section.pictures = _pictures(file.parent, section.notes)
    return section


def _pictures(folder: Path, problems: list[str]) -> list[Picture]:
    found = []
    for path in sorted(folder.glob("*.png")):
        found += read_picture(path, _words(path.stem), f"Picture: {_words(path.stem)}.", problems)
    return found


# Comparison and commands


def compare(runs: Sequence[RunFiles]) -> list[Section]:
    """Curves of runs of one kind in one chart, their scores in one table, and the settings that differ."""
    sections = []
    pretraining, tuning = ("loss", "val_loss", "knn_balanced_accuracy"), ("val_loss", "balanced_accuracy", "auroc")
    segmenting = ("val_loss", "miou", "boundary_f1")
    for kind, keys in (("pretrain", pretraining), ("finetune", tuning), ("segment", segmenting)):
        same = [run for run in runs if run.kind == kind]
        if len(same) < 2:
            continue
        section = Section(f"{KINDS[kind].capitalize()} runs")
        for key in keys:
            of_models = [curve(run, f"ema_{key}", run.name) or curve(run, key, run.name) for run in same]
            if len(curves := [found for found in of_models if found]) > 1:
                section.charts.append(line_chart(curves, f"{key} of each run"))
        last = [{key: value for line in run.lines for key, value in line.items()} for run in same]
        last = [values | {key: of_model(values, key) for key in LAST_VALUES if key in values} for values in last]
        there = [key for key in LAST_VALUES if any(key in values for values in last)]
        rows = [[run.name, *(shown(values.get(key)) for key in there)] for run, values in zip(same, last, strict=True)]
        section.tables.append(Table("Last values", ["run", *there], rows))
        apart = OF_A_START | {"out"}
        values = {
            key: [run.settings.get(key) for run in same] for run in same for key in run.settings if key not in apart
        }
        differ = [[key, *map(_text, found)] for key, found in values.items() if len(set(map(_text, found))) > 1]
        if differ:
            section.tables.append(Table("Settings that differ", ["setting", *(run.name for run in same)], differ))
        else:
            section.notes.append("All settings are the same but the directory.")
        sections.append(section)
    return sections


def reproduce(run: RunFiles) -> Section:
    """The commands that reproduce this run: as typed, and from its settings alone; then those of its evaluations."""
    section, last = Section(run.name), run.starts[-1] if run.starts else {}
    if "command" in last:
        section.commands.append(_quoted(_text(last["command"])))
        section.notes.append(
            f"As typed in {last.get('directory', 'its directory')}; and the same with all settings as flags."
        )
    settings = {key: value for key, value in run.settings.items() if key not in OF_A_START}
    section.commands.append(command(run.kind, settings, processes_of(run)))
    section.commands += [_quoted(found["command"]) for found in run.evaluations.values() if "command" in found]
    return section


def _quoted(command: str) -> str:
    """A command of a file, which may be a stranger's, with no word that the shell takes for more than a word."""
    try:
        return shlex.join(shlex.split(command))
    except ValueError:  # a quotation that does not end
        return shlex.quote(command)


def command(kind: str, settings: Mapping[str, Any], num_processes: int = 1) -> str:
    """The command for a run with these settings; other settings are chosen.

    Args:
        kind: pretrain, finetune or segment.
        settings: by dotted key.
        num_processes: of the run.
    """
    return shlex.join([*program(kind, num_processes), *flags(settings)])
