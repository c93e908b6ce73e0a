"""What runs did, on one page: an HTML file that needs neither a network nor anything beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

import fcmae
from fcmae import options
from fcmae.atomic import write_text
from fcmae.data.split import evenly
from fcmae.evaluation.charts import Chart, heat_map, line_chart, shown
from fcmae.evaluation.runs import Run, curve, read_json, read_run
from fcmae.evaluation.verdicts import is_collapsing, is_working, was_worth_it

MARK = '<meta name="generator" content="fcmae report'
MOST_PICTURES = 12  # over time
KINDS = {"pretrain": "pretraining", "finetune": "fine-tuning"}
ANALYZE_AGAIN = "run `fcmae analyze` again"
ANALYZED = ("cosine_distance", "effective_rank", "dead_share", "saturated_share", "grn_gamma", "grn_beta")
FIGURES = {
    "confusion": "Confusion matrix: which class is taken for which",
    "cosine_distance": "Cosine distance between channels, by layer",
    "channels": "Dead and saturated channels, by layer",
    "effective_rank": "Effective rank of the features, by layer",
    "grn": "GRN's gamma and beta, by layer",
    "selectivity": "Class selectivity of the channels",
    "activations": "What single channels show of an image",
}
SCORES = ("balanced_accuracy", "auroc", "top1", "top5")
# What is measured of each layer, and what the last colour stands for at least.
LAYERED = {
    "cosine_distance": ("Cosine distance between channels", 0.5),
    "effective_rank": ("Effective rank", 1.0),
    "dead_share": ("Share of dead channels", 0.5),
    "saturated_share": ("Share of saturated channels", 0.5),
}


@dataclass(frozen=True)
class Table:
    """caption, and texts; the first of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """uri: the picture itself, as a data URI. key: unique on the page."""

    label: str
    alt: str
    uri: str
    width: int
    height: int
    key: str
    step: int = 0


@dataclass
class Section:
    """A part of a chapter, in the order in which it is shown; more: tables that are opened."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    charts: list[tuple[str, Chart]] = field(default_factory=list)
    series: list[Picture] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.notes, self.tables, self.more, self.charts, self.series, self.pictures, self.commands))


@dataclass(frozen=True)
class Chapter:
    title: str
    sections: list[Section]


def report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page on one run or several and return where: by default report.html in the run's directory.

    Raises ValueError if a path is no run, `out` is missing for several runs, or is there and no report of ours.
    """
    if out is None:
        if len(paths) > 1:
            raise ValueError(f"--out is missing for {len(paths)} runs: name the file to write, e.g. --out report.html")
        out = paths[0] / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: name the file to write, e.g. {out / 'report.html'}")
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise ValueError(f"{out} is there and no report of fcmae: name another file with --out, or delete it")
    page = render([read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _names(paths: Sequence[Path]) -> list[str]:
    """What the runs are called: the names of their directories, or their paths where two have one name."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(paths) else [str(path) for path in paths]


def read_picture(path: Path, label: str, alt: str, problems: list[str], step: int = 0) -> Picture | None:
    """A picture, as PNG or JPEG, whichever is smaller; None and a problem if it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            size, kind = image.size, str(image.format).lower()
            smaller = io.BytesIO()
            image.convert("RGB").save(smaller, "JPEG", quality=90, subsampling=0)
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be shown ({error}).")
        return None
    if len(smaller.getvalue()) < len(content):
        content, kind = smaller.getvalue(), "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    key = hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:12]
    return Picture(label, alt, uri, *size, f"picture-{key}", step)


# Chapters


def render(runs: Sequence[Run]) -> str:
    """The page. Everything in it that came from the user is escaped, and its policy lets only its own script run."""
    chapters = [Chapter(f"{run.name} ({KINDS[run.kind]})", describe(run)) for run in runs]
    if len(runs) > 1 and (sections := compare(runs)):
        chapters.append(Chapter("Comparison of the runs", sections))
    chapters.append(Chapter("Commands to reproduce this", [reproduce(run) for run in runs]))
    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"source_hash": _source_hash, "code": _code}
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        mark=Markup(MARK),
        version=fcmae.__version__,
        title=f"Report on {', '.join(run.name for run in runs) if len(runs) <= 3 else f'{len(runs)} runs'}",
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        names=[str(run.path) for run in runs],
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
        verdicts=[
            verdict for verdict in (is_working(runs), is_collapsing(runs), was_worth_it(runs)) if verdict.sentences
        ],
        chapters=chapters,
    )
    # Names of files may hold bytes that are no Unicode.
    return page.lstrip().encode("utf-8", "replace").decode("utf-8")


def _code(text: str) -> Markup:
    """What stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _source_hash(text: str) -> str:
    """What a Content-Security-Policy names an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def describe(run: Run) -> list[Section]:
    """The sections of a run's chapter, without those that there is nothing for."""
    return [
        section
        for section in (
            _what_was_run(run),
            _loss(run),
            _charts(run, "Gradient norm", {"Norm of the gradient, before clipping": ("grad_norm",)}),
            _throughput(run),
            _scores(run),
            _reconstructions(run),
            _monitors(run),
            *_evaluations(run),
            _analysis(run),
        )
        if section
    ]


def _what_was_run(run: Run) -> Section:
    get, section = run.settings.get, Section("What was run", list(run.problems))
    lengths = f"{_status(run)}, {len(run.starts)} starts" if len(run.starts) > 1 else _status(run)
    rows = [["state", lengths], ["model", str(get("model.variant") or f"that of {get('model.init')}")]]
    rows += [["starting weights", str(get("model.init") or "none: from scratch")]]
    rows += [["images", ", ".join(f"{number:,} {use}" for use, number in run.counts.items())]] if run.counts else []
    rows += [["from", _text(value)] for key in ("data.path", "data.val_path") if (value := get(key))]
    if isinstance(size := get("data.image_size"), list):
        rows += [["size", f"{' × '.join(map(str, size))} pixels, {get('data.in_chans')} channels"]]
    if (bad := run.path / "bad_files.txt").is_file():
        number = len(bad.read_text(encoding="utf-8", errors="replace").splitlines())
        rows += [["unreadable", f"{number} files, listed in {bad}"]] if number else []
    if (hours := _computing_time(run)) is not None:
        rows += [["time", f"{hours} of training, without evaluations"]]
    if run.starts:
        last = run.starts[-1]
        versions = last.get("versions", {})
        rows += [["started", _text(run.starts[0].get("time"))]]
        rows += [["device", f"{last.get('num_processes')} × {last.get('device')} ({last.get('device_name')})"]]
        rows += [["CPU", f"{last.get('cpu')}, {last.get('cores')} cores"]]
        rows += [["versions", ", ".join(f"{name} {version}" for name, version in versions.items())]]
    else:
        rows += [["versions", f"fcmae {run.version}"]]
    section.tables.append(Table("The run", ["what", "value"], rows))
    if run.changed:
        changed = [[key, _text(value)] for key, value in run.changed.items()]
        section.tables.append(Table("Settings that are not the default", ["setting", "value"], changed))
    everything = [[key, _text(value)] for key, value in run.settings.items()]
    section.more.append(Table("All settings", ["setting", "value"], everything))
    if len(run.starts) > 1:
        keys = ("time", "num_processes", "device_name", "command")
        starts = [[_text(start.get(key)) for key in keys] for start in run.starts]
        section.more.append(Table("Every start", ["time", "processes", "device", "command"], starts))
    return section


def _status(run: Run) -> str:
    if not run.lines:
        return "begun, nothing logged yet"
    epoch, epochs = run.lines[-1]["epoch"], run.settings.get("epochs")
    if run.settings.get("eval_only"):
        return "an evaluation"
    if isinstance(epochs, int) and epoch >= epochs:
        return f"finished after {epochs} epochs, {run.lines[-1]['step']:,} steps"
    return f"running or stopped at epoch {epoch:.4g} of {epochs}, step {run.lines[-1]['step']:,}"


def _computing_time(run: Run) -> str | None:
    """What the logged windows took: their images over their images a second."""
    seconds, before = 0.0, 0
    for line in run.lines:
        if line.get("images_per_s"):
            seconds += (line["step"] - before) * run.settings.get("batch_size", 0) / line["images_per_s"]
            before = line["step"]
    return str(timedelta(seconds=round(seconds))) if seconds else None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _charts(run: Run, title: str, charts: Mapping[str, Sequence[str]]) -> Section:
    """A section of charts of what metrics.jsonl has under some keys, by caption."""
    section = Section(title)
    for caption, keys in charts.items():
        if curves := [found for key in keys if (found := curve(run, key, key)) is not None]:
            section.charts.append((caption, line_chart(curves, caption)))
    return section


def _loss(run: Run) -> Section:
    section = _charts(run, "Loss and learning rate", {"Loss": ("loss", "val_loss", "ema_val_loss")})
    if (rate := curve(run, "lr", "lr")) is not None:
        # Not logarithmic: it ends near 0, and the last steps would fill the chart.
        section.charts.append(("Learning rate", line_chart([rate], "learning rate", may_be_log=False)))
    if not section:
        section.notes.append("Nothing is logged yet.")
    elif run.settings.get("model.normalize_target"):
        section.notes.append(
            "The loss is the mean squared error on hidden patches, each standardised: painting every patch in its own "
            "mean colour scores 1."
        )
    return section


def _throughput(run: Run) -> Section:
    waiting = {"Share of the time that was spent waiting for data": ("data_wait_share",)}
    if not any("data_wait_share" in line for line in run.lines):
        waiting = {"Seconds spent waiting for data since the line before": ("data_wait_s",)}
    return _charts(run, "Throughput and waiting for data", {"Images a second": ("images_per_s",)} | waiting)


def _scores(run: Run) -> Section:
    keys = [prefix + key for prefix in ("", "ema_") for key in SCORES]
    section, scored = Section("Scores on the held-out images"), [line for line in run.lines if "top1" in line]
    if not scored:
        return section
    there = [key for key in keys if key in scored[-1]]
    named = {"scores": scored[-1]}
    if len(scored) > 1:
        by = "ema_balanced_accuracy" if "ema_balanced_accuracy" in there else "balanced_accuracy"
        named = {"last": scored[-1], f"best by {by}": max(scored, key=lambda line: line.get(by, 0))}
        section.notes.append("The best was chosen by these very images, so its scores are too high; the last was not.")
        section.charts += _charts(run, "", {"Scores": keys}).charts
    rows = [
        [name, f"{line['epoch']:.4g}", *(shown(line[key]) if key in line else "" for key in there)]
        for name, line in named.items()
    ]
    section.tables.append(Table("Scores", ["evaluation", "epoch", *there], rows))
    return section


def _reconstructions(run: Run) -> Section:
    section, folder = Section("Reconstructions"), run.path / "reconstructions"
    files = {int(path.stem[5:]): path for path in folder.glob("step-*.png") if path.stem[5:].isdigit()}
    steps = sorted(files)
    epochs = {line["step"]: line["epoch"] for line in run.lines}
    for step in (steps[i] for i in evenly(len(steps), MOST_PICTURES)):
        label = f"step {step:,}" + (f", epoch {epochs[step]:.4g}" if step in epochs else "")
        alt = (
            f"Reconstructions at {label}. A row an image; from left to right: original, masked, reconstruction, "
            "reconstruction with the visible patches."
        )
        if found := read_picture(files[step], label, alt, section.notes, step):
            section.series.append(found)
    if len(steps) > MOST_PICTURES:
        section.notes.append(f"{MOST_PICTURES} of {len(steps)} pictures, evenly spaced; {folder} has all.")
    if (over_time := folder / "over-time.png").is_file():
        alt = "Reconstructions of the same images over time. A row an image, a column an evaluation."
        found = read_picture(over_time, "The same images over time", alt, section.notes)
        section.pictures += [found] if found else []
    return section


def _monitors(run: Run) -> Section:
    section = Section("What was watched while training")
    for prefix, (caption, top) in LAYERED.items():
        watched = [line for line in run.lines if any(key.startswith(f"{prefix}/") for key in line)]
        keys = list(dict.fromkeys(key for line in watched for key in line if key.startswith(f"{prefix}/")))
        if watched:
            layers = {key.partition("/")[2]: [line.get(key) for line in watched] for key in keys}
            steps, epochs = [line["step"] for line in watched], [line["epoch"] for line in watched]
            section.charts.append((f"{caption}, by layer", heat_map(layers, steps, epochs, caption.lower(), top)))
    knn = ("knn_balanced_accuracy", "knn_auroc", "knn_top1")
    section.charts += _charts(run, "", {"Nearest neighbours on labelled images": knn}).charts
    return section


def _evaluations(run: Run) -> list[Section]:
    return [_evaluation(folder, found) for folder, found in run.evaluations.items()]


def _evaluation(folder: Path, found: Mapping[str, Any]) -> Section:
    """The tables of an evaluation.json; a sentence in their place if it does not hold what it should."""
    section = Section(f"Evaluation of {found.get('model', folder)}")
    try:
        data, results = found["data"], found["results"]
        section.notes.append(
            f"{data['num_train']:,} labelled images to learn from ({data['train']}), {data['num_test']:,} to test on "
            f"({data['test']}), {len(data['class_names'])} classes; a guess scores "
            f"{shown(1 / len(data['class_names']))} in balanced accuracy."
        )
        names = list(dict.fromkeys(name for result in results for name in result["scores"]))
        rows = []
        for result in results:
            setting = ", ".join(f"{key} {_text(value)}" for key, value in result["setting"].items())
            rows.append(
                [result["probe"], str(result["stage"]), setting, *(_with_spread(result, name) for name in names)]
            )
        caption = "Scores of each probe on the test images"
        if any(result.get("spread") for result in results):
            caption += "; in brackets, the 95 % interval over draws"
        section.tables.append(Table(caption, ["probe", "stage", "setting", *names], rows))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        problem = f"{folder / 'evaluation.json'} does not hold what it should ({type(error).__name__}: {error})"
        return Section(section.title, [f"{problem}: run `fcmae evaluate` again."])
    section.pictures = _pictures(folder, section.notes)
    return section


def _with_spread(result: Mapping[str, Any], name: str) -> str:
    if name not in result["scores"]:
        return ""
    text = f"{result['scores'][name]:.3f}"
    low_high = (result.get("spread") or {}).get(name)
    return f"{text} [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else text


def _analysis(run: Run) -> Section:
    section, file = Section("Analysis of the features"), run.path / "analysis" / "analysis.json"
    problems: list[str] = []
    if (found := read_json(file, dict, ANALYZE_AGAIN, problems)) is not None:
        try:
            rows = [
                [layer["name"], model["name"], *(_optional(layer.get(key)) for key in ANALYZED)]
                for model in found["models"]
                for layer in model["layers"]
            ]
            columns = ["layer", "model", *(key.replace("_", " ") for key in ANALYZED)]
            section.more.append(Table("Numbers of every layer", columns, rows))
        except (KeyError, TypeError) as error:
            problems.append(f"{file} does not hold what it should ({type(error).__name__}: {error}): {ANALYZE_AGAIN}.")
    section.pictures = _pictures(file.parent, problems)
    section.notes += problems
    return section


def _optional(value: float | None) -> str:
    return "" if value is None else shown(value)


def _pictures(folder: Path, problems: list[str]) -> list[Picture]:
    found = []
    for path in sorted(folder.glob("*.png")):
        label = FIGURES.get(path.stem, path.stem.replace("_", " ").replace("-", " ").capitalize())
        if picture := read_picture(path, label, f"Picture: {label}.", problems):
            found.append(picture)
    return found


# Comparison


def compare(runs: Sequence[Run]) -> list[Section]:
    """Curves of runs of one kind in one chart, their scores in one table, and the settings that differ."""
    sections = []
    for kind, keys in (("pretrain", ("loss", "val_loss")), ("finetune", ("val_loss", "balanced_accuracy", "auroc"))):
        same = [run for run in runs if run.kind == kind]
        if len(same) < 2:
            continue
        section = Section(f"{KINDS[kind].capitalize()} runs")
        for key in (*keys, *("knn_balanced_accuracy",) * (kind == "pretrain")):
            if len(curves := [c for run in same if (c := curve(run, key, run.name)) is not None]) > 1:
                section.charts.append((f"{key} of each run", line_chart(curves, key)))
        names = [run.name for run in same]
        last = [_last_values(run) for run in same]
        there = [key for key in LAST_VALUES if any(key in values for values in last)]
        rows = [
            [run.name, *(shown(values[key]) if key in values else "" for key in there)]
            for run, values in zip(same, last, strict=True)
        ]
        section.tables.append(Table("Last values", ["run", *there], rows))
        every = dict.fromkeys(key for run in same for key in run.settings if key != "out")
        different = [
            [key, *(_text(run.settings.get(key)) for run in same)]
            for key in every
            if len({json.dumps(run.settings.get(key)) for run in same}) > 1
        ]
        if different:
            section.tables.append(Table("Settings that differ", ["setting", *names], different))
        else:
            section.notes.append("All settings are the same but the directory.")
        sections.append(section)
    return sections


LAST_VALUES = ("epoch", "loss", "val_loss", *SCORES, "knn_balanced_accuracy")


def _last_values(run: Run) -> dict[str, float]:
    last: dict[str, float] = {}
    for line in run.lines:
        last |= line
    return last


# Commands


def reproduce(run: Run) -> Section:
    """The commands that give this run again: as typed, and from its settings alone."""
    section = Section(run.name)
    typed = list(dict.fromkeys(str(start["command"]) for start in run.starts if "command" in start))
    if typed:
        section.notes.append(
            f"As typed in {run.starts[-1].get('directory', 'its directory')}; and the same with all settings as flags."
        )
    num_processes = run.starts[-1].get("num_processes", 1) if run.starts else 1
    commands = [*typed[-1:], command(run.kind, run.changed, num_processes)]
    commands += [found["command"] for found in run.evaluations.values() if isinstance(found.get("command"), str)]
    section.commands += map(wrapped, commands)
    return section


def command(kind: str, changed: Mapping[str, Any], num_processes: int = 1) -> str:
    """The command that gives a run with these settings, and the default of all others."""
    words = ["fcmae", kind]
    if num_processes > 1:
        words = ["accelerate", "launch", "--num_processes", str(num_processes), f"{kind}.py"]
    return shlex.join([*words, *options.flags(changed)])


def wrapped(command: str) -> str:
    """The same command in lines of about 100 characters, which break before flags; as it is if it is no command."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation without its end
        return command
    lines = [""]
    for word in words:
        quoted = shlex.quote(word)
        if word.startswith("--") and len(lines[-1]) > 80:
            lines.append("   ")
        lines[-1] += f" {quoted}" if lines[-1] else quoted
    return " \\\n".join(lines)
