"""How well a model's frozen features separate classes, by several probes: `fcmae evaluate`.

OUT/
    evaluation.json   settings, data, machine and scores
    confusion.png     which class is taken for which
With several models these are in OUT/MODEL/, and OUT/table.md has all models side by side.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fcmae
from fcmae import options
from fcmae.atomic import write_text
from fcmae.classification import macro_auroc, scores
from fcmae.config.commands import EvaluateConfig
from fcmae.data.dataset import check_values
from fcmae.data.find import find_labelled
from fcmae.data.index import Images, also_in, check_apart
from fcmae.data.source import printable
from fcmae.data.split import draw, split
from fcmae.evaluation.features import check_stages, extract
from fcmae.evaluation.models import PIXELS, RANDOM, Backbone, choose_device, is_control, load_backbones
from fcmae.evaluation.outputs import TEMPORARY, claim, default_out, file_name, free, tell_unread
from fcmae.evaluation.pictures import new_figure, save_figure, shortened
from fcmae.evaluation.probes import TEMPERATURE, few_shot_counts, fit_linear, knn_probabilities, mean_and_interval
from fcmae.evaluation.records import COLUMNS, score_rows
from fcmae.networks.encoder import StagedEncoder
from fcmae.options.line import flags
from fcmae.provenance import seen_by
from fcmae.tables import table
from fcmae.training.own_files import FOUND, check_outside
from fcmae.training.records import device_name

logger = logging.getLogger("fcmae")

KS = (10, 20, 100, 200)
TABLE = "table.md"
MAX_NAMED_CLASSES = 50  # more names are too small to read

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]  # features (N, D), class indices (N,)


def evaluate(cfg: EvaluateConfig) -> str:
    """Probe the models' features, write the results, and return a table of them.

    Raises:
        ValueError: before anything is computed, for what cannot be read or used together.
    """
    place = default_out(cfg.models, cfg.out, "evaluation")
    check_outside(place, {"data": cfg.data, "test": cfg.test})
    train_index, test_index = find_data(cfg.data, cfg.test, cfg.test_share, cfg.seed)
    if "few-shot" in cfg.probes:
        for label in cfg.labels:
            few_shot_counts(label, _labels(train_index))
    for model in cfg.models:
        check_untaught(model, test_index)
    backbones = load_backbones(cfg.models, train_index, cfg.image_size, cfg.max_pixels, cfg.key, cfg.prefix, cfg.nodata)
    for backbone in backbones:
        check_stages(backbone, _stages(backbone, cfg))
    several = len(cfg.models) > 1
    folders = [place / name for name in folder_names(cfg.models)] if several else [place]
    clear = claim(place, _is_ours, cfg.overwrite)
    if networks := [backbone for backbone in backbones if not is_control(backbone.name)]:
        check_values(networks[0].reading, train_index)
    records: list[dict[str, Any]] = []
    for backbone, folder in zip(backbones, folders, strict=True):
        with TemporaryDirectory(prefix=TEMPORARY[0], dir=place) as directory:
            record = evaluate_model(backbone, train_index, test_index, cfg, Path(directory))
        # What a control sees is stated by the network beside it.
        alone = not is_control(backbone.name)
        if not records:
            clear()
        record["command"] = _command(cfg, [backbone.name] if alone else cfg.models, folder if alone else place)
        folder.mkdir(exist_ok=True)
        if record["confusion"] is not None:
            save_confusion(folder / "confusion.png", record)
        write_text(folder / "evaluation.json", json.dumps(record, indent=1) + "\n")
        records.append(record)
        if several:
            write_text(place / TABLE, summary(records) + "\n")
    return f"{summary(records)}\nwrote {place}"


def evaluate_model(
    backbone: Backbone, train_index: Images, test_index: Images, cfg: EvaluateConfig, directory: Path
) -> dict[str, Any]:
    """The content of evaluation.json for one model, except the command.

    Args:
        backbone: the model.
        train_index: images to train on.
        test_index: images to test on.
        cfg: the probes and stages, and how features are computed.
        directory: an empty directory, for the features.
    """
    started = time.perf_counter()
    device = choose_device(cfg.device)
    features, labels = [], []
    for title, index in (("train", train_index), ("test", test_index)):
        (directory / title).mkdir()
        found = extract(
            backbone,
            index,
            _stages(backbone, cfg),
            device=device,
            batch_size=cfg.batch_size,
            num_workers=cfg.num_workers,
            directory=directory / title,
            title=f"{backbone.name}: features, {title}",
        )
        tell_unread(found.bad, f"{title} images")
        features.append(found.stages)
        labels.append(_labels(index)[found.positions])
    backbone.model.cpu()
    names = train_index.class_names or ()
    results, confusion = [], None
    for stage in features[0]:
        rows, confusion = probe_stage(
            backbone.name,
            None if is_control(backbone.name) else stage,
            (features[0][stage], labels[0]),
            (features[1][stage], labels[1]),
            len(names),
            cfg,
            device,
        )
        results += rows
    drawn = f"{cfg.test_share:g} of {cfg.data}, drawn with seed {cfg.seed}"
    return {
        "fcmae": fcmae.__version__,
        "model": backbone.name,
        "architecture": backbone.kind,
        "step": backbone.origin.get("step"),
        "origin": backbone.origin,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": device_name(device),
        "data": {
            "train": cfg.data if cfg.test else f"{cfg.data} without its test images",
            "test": cfg.test or drawn,
            "num_train": len(labels[0]),
            "num_test": len(labels[1]),
            "largest_class": np.bincount(labels[1]).max() / len(labels[1]),
            "class_names": list(names),
        },
        "image_size": list(backbone.reading.image_size),
        **({"num_stages": len(model.spec.depths)} if isinstance(model := backbone.model, StagedEncoder) else {}),
        "results": results,
        "confusion": confusion,
    }


def _stages(backbone: Backbone, cfg: EvaluateConfig) -> Sequence[int] | None:
    return None if is_control(backbone.name) else cfg.stages


def folder_names(models: Sequence[str]) -> list[str]:
    """A distinct name for each model that can be a folder: its last part, or all of it if last parts are the same, with
    a number if that is the same too.
    """
    last = [file_name(model.rstrip("/").rpartition("/")[2]) or "model" for model in models]
    if any(model.startswith(RANDOM) for model in models):
        last = [
            f"random-{name}" if model.startswith(RANDOM) and not name.startswith("random-") else name
            for name, model in zip(last, models, strict=True)
        ]
    names = last if len(set(last)) == len(last) else [file_name(model) or "model" for model in models]
    taken = list[Path]()
    for name in names:
        taken.append(free(Path(name), taken))
    return list(map(str, taken))


def find_data(data: str, test: str | None, test_share: float, seed: int) -> tuple[Images, Images]:
    """Training and test images.

    Args:
        data: labelled images, see `find_labelled`.
        test: images to test on; None draws a share of each class.
        test_share: that share.
        seed: of the draw.

    Raises:
        ValueError: if one of them has no images, or an image is in both.
    """
    found = find_labelled(data, key="data")
    found.tell_notes()
    if test is None:
        train_index, test_index = split(found, test_share, seed)
        if not len(test_index):
            raise ValueError(f"test_share = {test_share:g} leaves no image of {data} to test on: raise it")
        check_apart(train_index, test_index, "data")
        return train_index, test_index
    test_index = find_labelled(test, found.class_names, key="test")
    test_index.tell_notes()
    check_apart(found, test_index, "test", data)
    return found, test_index


def check_untaught(model: str, test_index: Images) -> None:
    """Refuse to probe a run on images whose labels it was trained on; warn if they chose its best weights.

    Args:
        model: what is probed; nothing is known of one that is no run, nor made of one.
        test_index: the images to test on.

    Raises:
        ValueError: if it was trained on some of them.
    """
    seen = seen_by(model)
    if learnt := seen.labels_of(test_index):
        raise ValueError(
            f"{model} has learnt from {len(learnt)} of the {len(test_index)} test images with their labels, such as "
            f"{printable(min(learnt))}: give others by test, or the seed and share by which its run held images out"
        )
    if chose := also_in(test_index, seen.chose):
        logger.warning(
            "%d of the %d test images chose the weights of %s, so that its scores are too high: give those of "
            "last/, or others by test",
            len(chose),
            len(test_index),
            model,
        )


def _labels(images: Images) -> NDArray[np.int64]:
    assert images.labels is not None
    return images.labels


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return all(file.name in FOUND["evaluation"] for file in path.iterdir())
    return path.name in FOUND["evaluation"]


def probe_stage(
    model: str,
    stage: int | None,
    train: Labelled,
    test: Labelled,
    num_classes: int,
    cfg: EvaluateConfig,
    device: torch.device,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """All probes of one stage's features, as evaluation.json has them, and a confusion matrix.

    Args:
        model: its name, for the progress bars.
        stage: its number, for the results; None if the model has no stages.
        train: features and labels to train on.
        test: features and labels to test on.
        num_classes: of the labels.
        cfg: which probes, and their settings.
        device: where they are computed.

    Returns:
        The results, and the matrix of the linear probe if there is one, else that of kNN with k = 20 or the next
        smaller; None if neither was asked for.
    """
    results: list[dict[str, Any]] = []
    title, predicted = model + ("" if stage is None else f", stage {stage}"), dict[str, NDArray[np.int64]]()

    def add(probe: str, setting: dict[str, Any], found: dict[str, float], **more: Any) -> None:
        results.append({"probe": probe, "stage": stage, "setting": setting, "scores": found} | more)

    if "knn" in cfg.probes:
        ks = [k for k in KS if k <= len(train[0])] or [len(train[0])]
        # Pixels are never below 0, so their plain cosine hardly distinguishes bright from dark.
        centre = train[0].mean(0, np.float64).astype(np.float32) if model.startswith(PIXELS) else None
        by_k = knn_probabilities(
            *train, test[0], num_classes, ks=ks, temperature=TEMPERATURE, centre=centre, device=device
        )
        predicted["knn"] = by_k[20 if 20 in by_k else ks[0]].argmax(1)
        for k in ks:
            add("knn", {"k": k, "temperature": TEMPERATURE}, score(test[1], by_k.pop(k)))
    if "linear" in cfg.probes:
        probe = fit_linear(*train, num_classes, seed=cfg.seed, device=device, title=f"{title}: linear")
        probabilities = probe.probabilities(test[0])
        predicted["linear"] = probabilities.argmax(1)
        add("linear", asdict(probe.setting), score(test[1], probabilities))
    for label in cfg.labels if "few-shot" in cfg.probes else ():
        num_images, found = _few_shot(f"{title}: {label} of the labels", label, train, test, num_classes, cfg, device)
        means = {name: mean_and_interval([one[name] for one in found]) for name in found[0]}
        spread = {name: list(interval) for name, (_, interval) in means.items() if interval is not None}
        setting = {"labels": label, "num_images": num_images, "draws": cfg.draws}
        add(
            "few-shot",
            setting,
            {name: mean for name, (mean, _) in means.items()},
            **({"spread": spread} if spread else {}),
        )
    if not predicted:
        return results, None
    from sklearn.metrics import confusion_matrix

    name, classes = list(predicted.items())[-1]
    matrix = confusion_matrix(test[1], classes, labels=range(num_classes)).tolist()
    return results, {"probe": name, "stage": stage, "matrix": matrix}


def _few_shot(
    title: str,
    label: str,
    train: Labelled,
    test: Labelled,
    num_classes: int,
    cfg: EvaluateConfig,
    device: torch.device,
) -> tuple[int, list[dict[str, float]]]:
    """How many labels a probe has, and its scores in each draw of them."""
    counts, found = few_shot_counts(label, train[1]), []
    for number in range(cfg.draws):
        seed = cfg.seed + number
        probe = fit_linear(
            *train,
            num_classes,
            positions=draw(train[1], counts, seed),
            seed=seed,
            device=device,
            title=f"{title}, draw {number + 1} of {cfg.draws}",
        )
        found.append(score(test[1], probe.probabilities(test[0])))
    return int(counts.sum()), found


def score(labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> dict[str, float]:
    """The scores of a probe: top1, top5 for more than five classes, balanced_accuracy, and auroc.

    Args:
        labels: (N,) class indices.
        probabilities: (N, classes).

    Returns:
        The scores by name; without auroc if only one class occurs.
    """
    found = scores(labels, probabilities)
    del found["val_loss"]  # with kNN's probabilities of 0 it depends on where they are clipped
    if "auroc" not in found and len(np.unique(labels)) > 1 and np.isfinite(probabilities).all():
        found["auroc"] = macro_auroc(labels, probabilities)
    return found


def _command(cfg: EvaluateConfig, models: list[str], out: Path) -> str:
    """The command that evaluates these models with the same result."""
    given = options.changed(cfg.model_copy(update={"models": models, "out": out, "overwrite": False}))
    del given["models"]
    return shlex.join(["fcmae", "evaluate", *models, *flags(given)])


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A table, and a line on the images that it was measured on, in Markdown.

    Args:
        records: of the same images.
    """
    data = records[0]["data"]
    lines = [
        table(COLUMNS, score_rows(records), left=len(COLUMNS)),
        "",
        f"{data['num_train']} training and {data['num_test']} test images of {len(data['class_names'])} classes. "
        f"To answer always with the largest class has a top-1 of {data['largest_class']:.3f}.",
    ]
    for record in records[1:]:
        other = record["data"]
        if (other["num_train"], other["num_test"]) != (data["num_train"], data["num_test"]):
            counts = f"{other['num_train']} training and {other['num_test']} test images"
            lines.append(f"{record['model']} could use {counts}, so that its scores do not compare with the first's.")
    if any("spread" in result for result in records[0]["results"]):
        lines.append("[low, high]: 95 % interval of the mean over the draws of labels.")
    return "\n".join(lines)


def save_confusion(path: Path, record: dict[str, Any]) -> None:
    """Draw the confusion matrix of an evaluation: colours are shares of the true class, numbers are images."""
    confusion, names = record["confusion"], record["data"]["class_names"]
    counts = np.array(confusion["matrix"])
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    num_classes = len(names)
    named = num_classes <= MAX_NAMED_CLASSES
    side = min(max(0.36 * num_classes, 2.4), 15) if named else 8
    figure = new_figure(side + 3.2, side + 2.2)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    if named:
        axis.set_xticks(range(num_classes), [shortened(name) for name in names], rotation=90, fontsize=8)
        rows = [f"{shortened(name)} ({total})" for name, total in zip(names, totals, strict=True)]
        axis.set_yticks(range(num_classes), rows, fontsize=8)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(counts[row, column])
            size = 8 if len(text) < 4 else 6
            axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class (images)" if named else "true class, in the order of the file")
    probe = {"knn": "kNN", "linear": "linear probe"}[confusion["probe"]]
    accuracy = counts.trace() / max(counts.sum(), 1)
    where = "" if confusion["stage"] is None else f" on stage {confusion['stage']}"
    axis.set_title(f"{shortened(record['model'], 60)}\n{probe}{where}: top-1 {accuracy:.3f}", fontsize=10)
    save_figure(figure, path)
