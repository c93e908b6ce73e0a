"""A model repository for the Hugging Face hub: timm's two files, and a card written from the run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import fcmae
from fcmae.config.commands import ExportConfig, PushConfig
from fcmae.data.index import Images
from fcmae.data.source import one_line, printable
from fcmae.data.split import evenly
from fcmae.evaluation.charts import shown
from fcmae.evaluation.records import COLUMNS, score_rows
from fcmae.evaluation.runs import RunFiles, is_untrained, needs_no_network, read_run
from fcmae.networks.spec import ConvNeXtSpec, describe
from fcmae.options.problems import text_of
from fcmae.provenance import run_of
from fcmae.tables import table
from fcmae.weights.convert import check_dest, read_sound, write
from fcmae.weights.directories import learnt_bytes, timm_holds
from fcmae.weights.files import FILE_SUFFIXES, segmenter_in
from fcmae.weights.record import Weights

# Errors of large files, of the system, and of the HTTP library that this huggingface_hub uses.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, OSError, HfHubHTTPError.__mro__[1])
# Not in the card: where the images and the run are, and settings that depend on the machine.
LEFT_OUT = (
    "out",
    "chosen",
    "planned_s",
    "data.path",
    "data.val_path",
    "data.maps",
    "data.val_maps",
    "monitor.labelled",
    "data.num_workers",
    "model.init",
    "device",
    "overwrite",
)
OF_FILES = ("run", "init", "file", "directory")  # of the origin of weights
CURVES = ("loss", "val_loss", "top1", "balanced_accuracy", "auroc")
MAX_ROWS = 12  # of the table of curves
# Some of the licences that the hub knows by name; others are given as "other" with a name of their own.
LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "cc0-1.0", "unlicense"),
    *(f"cc-by{kind}-4.0" for kind in ("", "-sa", "-nd", "-nc", "-nc-sa", "-nc-nd")),
)


def write_repository(cfg: ExportConfig) -> str:
    """Write the repository of a model into a new folder, and say what is in it.

    Args:
        cfg: the model, and the folder.

    Raises:
        ValueError: if the model cannot be read, or the folder exists.
    """
    if cfg.dest.suffix in FILE_SUFFIXES:
        raise ValueError(f"dest = {cfg.dest}: a repository is a folder: give it a name without {cfg.dest.suffix}")
    written = _write(cfg.model, cfg.dest, f"local-dir:{cfg.dest.name}", cfg.key, cfg.prefix)
    return f"{written}\nwrote its card, {cfg.dest / 'README.md'}: read it before you publish it"


def push(cfg: PushConfig) -> str:
    """Write the repository of a model and upload it; the hub checks the card first.

    Args:
        cfg: the model, the repository, and whether it may exist.

    Returns:
        The address of the repository.

    Raises:
        ValueError: if the model cannot be read, or the hub refuses the card, the token or the repository, or cannot be
            reached.
    """
    api = HfApi(library_name="fcmae", library_version=fcmae.__version__)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / cfg.repo.rpartition("/")[2]
        with _refusals(cfg.repo, api.endpoint):
            repo = cfg.repo if "/" in cfg.repo else f"{api.whoami()['name']}/{cfg.repo}"
        _write(cfg.model, place, f"hf-hub:{repo}", cfg.key, cfg.prefix)
        with _refusals(cfg.repo, api.endpoint):
            made = api.create_repo(repo, private=not cfg.public, exist_ok=cfg.overwrite)
            is_private = bool(api.repo_info(made.repo_id).private)  # an existing repository keeps its visibility
        if not (is_private or cfg.public):
            raise ValueError(f"repo = {made.repo_id} is public: give --public, or make it private there")
        with _refusals(cfg.repo, api.endpoint):
            message = f"Upload by fcmae {fcmae.__version__}"
            api.upload_folder(repo_id=made.repo_id, folder_path=place, commit_message=message)
    return f"pushed to {made}: {'private' if is_private else 'public'}"


@contextmanager
def _refusals(repo: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the hub into a sentence."""
    try:
        yield
    except FAILURES as error:
        status = 401 if isinstance(error, LocalTokenNotFoundError) else None
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else status
        remedy = {
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "use a token that may write there",
            409: "give another name, or --overwrite to add to it",
        }.get(status or 0, "try again")
        reason = one_line(f"{error} {error.__cause__ or ''}", 300)
        raise ValueError(f"repo = {repo}: the hub at {endpoint} refused ({reason}): {remedy}") from error


def _write(model: Path, dest: Path, name: str, key: str | None, prefix: str | None) -> str:
    """Write the two files and the card into a new folder; returns what `write` says."""
    run = _read_run(model)
    if segmenter_in(model) is not None or (run is not None and run.kind == "segment"):
        raise ValueError(
            f"model = {model} makes label maps, and no format of the hub holds its head: `fcmae convert` writes its "
            "encoder alone"
        )
    check_dest(dest, "timm")
    weights = read_sound(model, key=key, prefix=prefix)
    weights = replace(weights, origin={name: value for name, value in weights.origin.items() if name not in OF_FILES})
    said = write(weights, dest, "timm")
    try:
        text = card(weights, run, name)
        ModelCard(text)  # reads its head as the hub does
        (dest / "README.md").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(dest)
        raise
    return said.rpartition("\nuse: ")[0]


def _read_run(model: Path) -> RunFiles | None:
    """The run that a model is of, if it is of one."""
    with suppress(ValueError):  # others have such files too
        return None if (run := run_of(model)) is None else read_run(run, run.name)
    return None


def card(weights: Weights, run: RunFiles | None, name: str) -> str:
    """The text of a model card: what the model is, how to load it, how it was trained, and what is known of it.

    Args:
        weights: of the model.
        run: the run that the model is of, if there is one.
        name: name by which timm loads it, hf-hub:USER/NAME or local-dir:FOLDER.
    """
    num_classes, license_ = weights.architecture.num_classes, weights.license
    known = license_ is None or license_.lower() in LICENSES
    data = ModelCardData(
        license=license_.lower() if license_ and known else None if known else "other",
        license_name=None if known else license_,
        library_name="timm" if timm_holds(weights.architecture.spec) else "fcmae",
        pipeline_tag="image-classification" if num_classes else "image-feature-extraction",
        tags=["fcmae", *(["convnext"] if isinstance(weights.architecture.spec, ConvNeXtSpec) else [])],
    )
    place = name.partition(":")[2]
    title = os.path.basename(place)  # noqa: PTH119  # of a repository's name too
    parts = [f"---\n{data.to_yaml()}\n---", f"# {_cell(title)}", *_what(weights), *_how_to_load(weights, name, place)]
    if pruned := weights.origin.get("pruned"):  # scores and curves of the run are those before pruning
        parts += [f"It was pruned ({_cell(pruned)}), and has not been trained since."]
    elif run is not None:
        step = weights.origin.get("step")
        parts += [*_training(run, step), *_results(run, step)]
    if license_ is None:
        parts += ["## Licence", "None was given. Whoever publishes this names one in the head of this file."]
    else:
        parts += [
            "## Licence",
            f"{_cell(license_)}: that of the weights that it was made from, or given by who trained it.",
        ]
    return "\n\n".join(parts) + "\n"


def _cell(value: object) -> str:
    """A value from a file, as text that Markdown and a terminal show literally."""
    return "".join(f"\\{sign}" if sign in "|`*_[]<>\\#" else sign for sign in printable(text_of(value)))


def _what(weights: Weights) -> Iterator[str]:
    architecture = weights.architecture
    network, num_classes = describe(architecture.spec), architecture.num_classes
    count = sum(value.numel() for name, value in weights.state.items() if not name.startswith("decoder."))
    what = f"A classifier of {num_classes} classes" if num_classes else "An encoder"
    yield (
        f"{what}: {_cell(network)}, {count / 1e6:.2f} million parameters, made with fcmae {fcmae.__version__}"
        f"{'' if architecture.spec.dense_only else ' (masked pretraining of ConvNets, arXiv 2301.00808)'}."
    )
    if known := weights.image.known():
        yield table(["images", "value"], [[key, _cell(value)] for key, value in known.items()], left=2)
    if num_classes:
        yield "Classes, in order: " + ", ".join(map(_cell, weights.class_names)) + "."


def _how_to_load(weights: Weights, name: str, place: str) -> Iterator[str]:
    yield "## How to load it"
    if timm_holds(weights.architecture.spec):
        auto = "AutoModelForImageClassification" if weights.architecture.num_classes else "AutoModel"
        yield f"```python\nimport timm\n\nmodel = timm.create_model({name!r}, pretrained=True)\n```"
        # The processor, which divides by 255, is named only where images had 8 bits, as far as is known.
        processor = f"processor = transformers.AutoImageProcessor.from_pretrained({place!r})\n" * learnt_bytes(weights)
        yield (
            f"```python\nimport transformers\n\nmodel = transformers.{auto}.from_pretrained({place!r})\n{processor}```"
        )
    if name.startswith("hf-hub:"):
        fetched = f"from huggingface_hub import snapshot_download\n\nencoder = fcmae.load(snapshot_download({place!r}))"
    else:
        fetched = f"\nencoder = fcmae.load({place!r})"
    yield f"```python\nimport fcmae\n{fetched}\n```"


def _training(run: RunFiles, step: object) -> Iterator[str]:
    """How the run was trained up to a step; up to its end if the step is None, as it is not known."""
    told = [line for line in run.lines if not isinstance(step, int) or line["step"] <= step]
    yield "## How it was trained"
    rows = [["kind", {"pretrain": "masked pretraining", "finetune": "fine-tuning with labels"}[run.kind]]]
    if run.counts:
        rows += [["images", ", ".join(f"{number:,} {use}" for use, number in run.counts.items())]]
    if (files := run.path / "files.json").is_file():
        rows += [["fingerprint of the images", f"`{Images.load(files).fingerprint()}`"]]
    if told:
        rows += [["trained for", f"{told[-1]['epoch']:.4g} epochs, {told[-1]['step']:,} steps"]]
    rows += [["fcmae", _cell(run.version)]]
    yield table(["what", "value"], rows, left=2)
    settings = [[f"`{key}`", _cell(value)] for key, value in run.changed.items() if not key.startswith(LEFT_OUT)]
    if settings:
        yield "Settings that are not the default:"
        yield table(["setting", "value"], settings, left=2)
    by_step: dict[int, dict[str, float]] = {}
    for line in told:
        by_step.setdefault(int(line["step"]), {}).update(line)
    seen = {key for line in told for key in line}
    # If there is a moving average of the weights, it is the model.
    keys = [f"ema_{key}" if f"ema_{key}" in seen else key for key in CURVES if key in seen]
    lines = [line for line in by_step.values() if keys[-1] in line] if keys else []
    if lines:
        yield "Curves, evenly spaced:"
        chosen = [lines[i] for i in evenly(len(lines), MAX_ROWS)]
        yield table(["epoch", *keys], [[shown(line.get(key)) for key in ("epoch", *keys)] for line in chosen])
        if run.kind == "finetune":
            yield "The best checkpoint is chosen by these scores, so that its own is too high for other images."


def _results(run: RunFiles, published: object) -> Iterator[str]:
    """What probes found of the run's features and others beside them.

    published: the step of the model; None, as it is not known, is the last.
    """
    if published is None and run.lines:
        published = run.lines[-1]["step"]
    records = list[dict[str, Any]]()
    for folder, found in run.evaluations.items():
        name, step = found["model"], found.get("step")
        if run.is_own(folder, found):
            name = "this" if step in (None, published) else f"this run, at step {step:,}"
        elif is_untrained(found):
            name = "untrained"
        elif not needs_no_network(found):
            continue  # of another network
        records.append({**found, "model": name})
    if not records:
        return
    yield "## What its features tell"
    every = [record["data"] for record in records]
    for data in (data for number, data in enumerate(every) if data not in every[:number]):
        yield (
            f"Probes on frozen features (`fcmae evaluate`) learnt {len(data['class_names'])} classes from "
            f"{data['num_train']:,} images and told them apart on {data['num_test']:,} others."
        )
        rows = score_rows([record for record in records if record["data"] == data])
        yield table(COLUMNS, [[_cell(cell) for cell in row] for row in rows], left=3)
