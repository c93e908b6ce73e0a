"""Should I pretrain? Several starts against random weights, on the user's own labels: `fcmae worth`.

OUT/
    worth.json    scores so far, and what they say: see fcmae.evaluation.paired
    table.md      the same as a table
    plan.json     what is compared, and the estimated seconds
    settings/     of the runs, without labels and seed
    labels/       test.csv, train.csv, and AMOUNT-SEED.csv of each draw
    controls/     scores of baselines without a network
    runs/         pretrained, if that was asked for, and START-AMOUNT-SEED, whose models are not kept
Every run is an ordinary one. Finished runs are not repeated, and interrupted ones resume.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

import fcmae
from fcmae import choices, options, planning
from fcmae.atomic import write_text
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.config.commands import WorthConfig
from fcmae.data.find import find_images
from fcmae.data.index import Images, also_in, images_of_run
from fcmae.data.source import is_unicode, printable
from fcmae.data.split import draw
from fcmae.data.survey import Survey, survey
from fcmae.evaluation import paired
from fcmae.evaluation.evaluate import find_data, folder_names, score
from fcmae.evaluation.features import extract
from fcmae.evaluation.models import Backbone, Control, choose_device, is_control, load_backbone
from fcmae.evaluation.outputs import TEMPORARY, file_name, tell_unread
from fcmae.evaluation.probes import few_shot_counts, fit_linear
from fcmae.evaluation.records import SCORES
from fcmae.finetuning import finetune, fingerprint
from fcmae.networks.spec import NetworkSpec, describe
from fcmae.options.files import find_config, read_yaml
from fcmae.options.line import flags
from fcmae.pretraining import pretrain
from fcmae.starting import class_weights_of, images_that_chose, learnt_images
from fcmae.tables import table
from fcmae.training import checkpoint
from fcmae.training.own_files import check_outside, remove_models
from fcmae.training.records import last_state, of_model, read_metrics
from fcmae.training.run import Run
from fcmae.weights.files import Weights, read_init, reading_of
from fcmae.weights.tensors import digest

PRETRAINED = "pretrained"
FREE = ("seeds", "out")  # what a second start may change
PLANNING = {"planned": False}  # content of plan.json until there is a plan; it marks the directory as ours


class Start(NamedTuple):
    """Starting weights to fine-tune.

    Attributes:
        name: of the arm.
        init: where its weights are; None for the pretraining that is done first.
        license: licence of the weights, if they state one.
        spec: the network.
        reading: how its images are read, by the settings' keys.
        sha256: of its weights; None if init is None.
    """

    name: str
    init: str | None
    license: str | None
    spec: NetworkSpec
    reading: dict[str, Any]
    sha256: str | None = None


class PlannedArm(paired.Arm):
    """An arm of the comparison, and the SHA-256 of its weights if they were given."""

    sha256: NotRequired[str | None]


class Plan(TypedDict):
    """What plan.json holds.

    Attributes:
        settings: of the comparison, by dotted key.
        recipes: content of the files of settings, by the setting that names them.
        images: fingerprint of the images.
        arms: controls, then from scratch, then from weights.
        amounts: of labels.
        counts: of images and classes.
        notes: sentences on what was done.
        layer_decay: for runs that start from weights.
        seconds: estimated for a run, by PRETRAINED or by arm from scratch and labels.
    """

    settings: dict[str, Any]
    recipes: NotRequired[dict[str, Any]]
    images: str
    arms: list[PlannedArm]
    amounts: list[paired.Amount]
    counts: dict[str, int]
    notes: list[str]
    layer_decay: float
    seconds: dict[str, float]


PLAN = TypeAdapter(Plan)


class Job(NamedTuple):
    """A run of training.

    Attributes:
        name: of its directory.
        arm: which start.
        labels: the amount; None for the pretraining of PRETRAINED itself.
        seed: of the draw and the run.
        seconds: estimated.
    """

    name: str
    arm: str
    labels: str | None
    seed: int
    seconds: float


def worth(cfg: WorthConfig) -> int:
    """Compare, or resume the comparison of an earlier call, and print the table and the verdict.

    Args:
        cfg: what is compared, on which images.

    Returns:
        The exit status: that of the run that a signal stopped, else 0.

    Raises:
        ValueError: before anything is computed, for what cannot be read or used together; or if `cfg.out` holds
            something else.
        FloatingPointError: if the loss or a gradient of the pretraining stops being finite. A fine-tuning in which this
            happens has no score, and the others continue.
    """
    place = cfg.out or Path("runs") / f"{Path(cfg.data).absolute().stem or 'images'}-worth"
    check_outside(place, {"data": cfg.data, "unlabelled": cfg.unlabelled, "test": cfg.test})
    _recipes(cfg)  # before images are looked at
    train, test = find_data(cfg.data, cfg.test, cfg.test_share, cfg.seed)
    plan = _saved_plan(place, cfg, train, test)
    if plan is None:
        write_text(place / "plan.json", json.dumps(PLANNING) + "\n")
    for labels, seed in product(_amounts(cfg), _seeds(cfg)):
        write_labels(_labels_file(place, labels, seed), train.subset(drawn(train, labels, seed)))
    plan = plan or _make_plan(place, cfg, train, test)
    jobs = list(_jobs(plan, cfg))
    print(_estimate(plan, jobs, place), flush=True)
    scores = [found for name in cfg.controls for found in _probe(name, place, cfg, plan, train, test)]
    done = [job for job in jobs if last_state(place / "runs" / job.name) == "finished"]
    for job in done:  # of which one may have been cut off when it was done
        if job.labels is not None:
            remove_models(place / "runs" / job.name)
    waiting = [job for job in jobs if job not in done]
    _write(place, cfg, plan, scores, jobs)
    # Estimates count steps only, and the machine may have been more or less busy then: seconds that whole runs took.
    took, estimated = 0.0, 0.0
    while waiting:
        job, began = waiting.pop(0), time.monotonic()
        is_whole = _seconds_left(job, place) == job.seconds
        try:
            run = _run(job, place, plan, cfg)
        except FloatingPointError as error:
            if job.labels is None:
                raise
            print(f"{job.name} has no score: {error}", flush=True)
            continue
        if run.stopped_by is not None:  # perhaps at its last step, which is not the end of the comparison
            print(f"stopped by {run.stopped_by}: the same command goes on", flush=True)
            return replace(run, finished=False).status
        if is_whole:
            took, estimated = took + time.monotonic() - began, estimated + job.seconds
        found = _write(place, cfg, plan, scores, jobs)
        seconds = sum(_seconds_left(each, place) for each in waiting) * (took / estimated if estimated else 1)
        left = f", about {_hours(seconds)} left" if waiting else ""
        of_job = [each["scores"] for each in found["scores"] if (each["arm"], each["labels"], each["seed"]) == job[1:4]]
        last = f": {of_job[0][paired.METRIC]:.3f}" if of_job else ""
        print(f"{found['num_done']} of {len(jobs)} runs{left}; {job.name}{last}", flush=True)
    print(paired.summary(_write(place, cfg, plan, scores, jobs)))
    print(f"wrote {place}; fcmae report {shlex.quote(str(place))}")
    return 0


# What is compared


def _seeds(cfg: WorthConfig) -> range:
    return range(cfg.seed, cfg.seed + cfg.seeds)


def _amounts(cfg: WorthConfig) -> list[str]:
    return list(dict.fromkeys(cfg.labels))


def drawn(train: Images, labels: str, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of the training images whose labels are used, the same for every start.

    Args:
        train: all training images.
        labels: how many, see `few_shot_counts`.
        seed: of the draw.

    Raises:
        ValueError: if `labels` is not an amount.
    """
    assert train.labels is not None
    return draw(train.labels, few_shot_counts(labels, train.labels), seed)


def write_labels(path: Path, images: Images) -> None:
    """Write labelled images as the CSV file that `find_labelled` reads.

    Args:
        path: of the file; its folder is created.
        images: with labels.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _as_list(images))


def _as_list(images: Images) -> str:
    text = io.StringIO()
    rows = ((images.name(i), images.label_name(i)) for i in range(len(images)))
    csv.writer(text, lineterminator="\n").writerows([("path", "label"), *rows])
    return text.getvalue()


def _labels_file(place: Path, labels: str, seed: int) -> Path:
    return place / "labels" / f"{_plain(labels)}-{seed}.csv"


def _tests_file(place: Path) -> Path:
    return place / "labels" / "test.csv"


def _unlabelled(place: Path) -> Path:
    return place / "labels" / "unlabelled.txt"


def _plain(labels: str) -> str:
    return labels.replace("%", "pct")


def _saved_plan(place: Path, cfg: WorthConfig, train: Images, test: Images) -> Plan | None:
    if not (place / "plan.json").is_file():
        if place.exists() and any(place.iterdir()):
            raise ValueError(f"out = {place} is not empty and holds no comparison: give another --out")
        return None
    try:
        found = json.loads((place / "plan.json").read_text(encoding="utf-8"))
        if found == PLANNING:
            return None
        plan = PLAN.validate_python(found)
    except ValueError:  # pydantic's is one
        raise ValueError(f"{place / 'plan.json'} is damaged, or of another version: give another --out") from None
    wanted = options.flat(cfg)
    if different := [key for key in wanted if key not in FREE and plan["settings"].get(key) != wanted[key]]:
        raise ValueError(
            f"out = {place} holds a comparison with other settings ({', '.join(different)}): give another --out, or "
            "the same settings"
        )
    if plan["images"] != fingerprint(train, test):
        raise ValueError(
            f"out = {place} holds a comparison on other images than {cfg.data} has now: give another --out"
        )
    listed = _tests_file(place)
    if not listed.is_file() or listed.read_text(encoding="utf-8") != _as_list(test):
        raise ValueError(
            f"out = {place} holds a comparison on images that lay elsewhere: move them back, or give another --out"
        )
    recipes = _recipes(cfg)
    if changed := [key for key, settings in plan.get("recipes", recipes).items() if settings != recipes[key]]:
        raise ValueError(
            f"{changed[0]} = {getattr(cfg, changed[0])} has other settings than when the comparison in {place} began: "
            "give another --out"
        )
    for arm in plan["arms"]:
        _check_same(arm, place, cfg)
    return plan


def _check_same(arm: PlannedArm, place: Path, cfg: WorthConfig) -> None:
    """Refuse given weights that have changed."""
    sha256, init = arm.get("sha256"), arm["init"]
    if sha256 and init and sha256 != digest(_weights(cfg, init).state, ""):
        raise ValueError(
            f"init = {arm['init']} has other weights than when the comparison in {place} began: give another --out, "
            "and of a run that goes on a checkpoint"
        )


def _recipes(cfg: WorthConfig) -> dict[str, Any]:
    """The content of the files of settings."""
    named = {key: getattr(cfg, key) for key in ("pretraining", "finetuning")}
    return {key: read_yaml(find_config(name, f"--{key}")) for key, name in named.items() if name is not None}


def _make_plan(place: Path, cfg: WorthConfig, train: Images, test: Images) -> Plan:
    """Choose the settings of all runs, and write them down with what is compared and how long it will take."""
    amounts = {labels: len(drawn(train, labels, cfg.seed)) for labels in _amounts(cfg)}
    for name in cfg.controls:
        Control(name)
    if odd := [name for name in (*train.names(), *test.names()) if not is_unicode(name)]:
        raise ValueError(f"data: {printable(odd[0])} has a name that is no UTF-8, as lists of images need: rename it")
    write_labels(place / "labels" / "train.csv", train)
    write_labels(_tests_file(place), test)
    write_text(_unlabelled(place), "".join(f"{name}\n" for name in train.names()))
    assert test.labels is not None
    tested = np.bincount(test.labels)
    tested = tested[tested > 0]  # images of each class that has any
    one = 100 / len(tested) / min(tested)
    notes = [f"The class with the fewest test images has {min(tested)}: one of them is {one:.1f} points."]
    seconds, epochs = dict[str, float](), dict[str, float]()
    if cfg.test is None:
        notes.append("The test images were drawn one by one: neighbours of one patient or scene may be on both sides.")
    starts = _given_starts(cfg, train)
    notes += [note for start in starts for note in _known(start, train, test)]
    if starts or cfg.hours or cfg.pretraining:
        notes.append("Each start is of one pretraining: intervals are over draws of labels and fine-tuning.")
    print("timing steps of each network and amount of labels", file=sys.stderr, flush=True)
    if cfg.hours or cfg.pretraining:
        made, seconds[PRETRAINED] = _choose_pretraining(place, cfg)
        seen = len(also_in(test, find_images(made.data.path)))
        notes += [f"{seen} of the test images are among those of the pretraining, without labels."] if seen else []
        mean, std = made.data.statistics()
        reading = {"in_chans": made.data.in_chans, "image_size": list(made.data.image_size), "mean": mean, "std": std}
        reading |= {} if made.data.nodata is None else {"nodata": made.data.nodata}
        starts.insert(0, Start(PRETRAINED, None, None, made.model.spec, reading))
    arms, scratch = list[PlannedArm](), dict[str, str]()
    for start in starts:
        network = describe(start.spec)
        key = json.dumps([start.spec.model_dump(), start.reading], sort_keys=True)
        if key not in scratch:
            scratch[key] = against = "scratch" if not scratch else f"scratch-{len(scratch) + 1}"
            arms.append(_arm(against, "scratch", None, network))
            for labels, num in amounts.items():
                share = (num + len(test)) / (len(train) + len(test))
                chosen = _choose_finetuning(place, cfg, _labels_file(place, labels, cfg.seed), num, start, share)
                write_text(place / "settings" / f"{against}-{_plain(labels)}.yaml", options.dump(chosen))
                epochs[labels] = chosen.epochs
                seconds[f"{against} {labels}"] = (chosen.epochs * num + len(test)) / planning.images_per_s(chosen)
        arms.append(_arm(start.name, "start", scratch[key], network, start))
    for name in cfg.controls:
        _control(name, place, cfg)
    arms.sort(key=lambda arm: arm["kind"] != "scratch")
    plan: Plan = {
        "settings": options.flat(cfg),
        "recipes": _recipes(cfg),
        "images": fingerprint(train, test),
        "arms": [_arm(name, "control", "scratch", None) for name in cfg.controls] + arms,
        "amounts": [{"labels": labels, "num_labels": amounts[labels], "epochs": epochs[labels]} for labels in amounts],
        "counts": {
            "num_train": len(train),
            "num_test": len(test),
            "num_classes": len(train.class_names or ()),
            "num_tested": len(tested),
        },
        "notes": notes,
        "layer_decay": float(_recipe(cfg).get("optim.layer_decay", 1.0)),
        "seconds": seconds,
    }
    write_text(place / "plan.json", json.dumps(plan, indent=1) + "\n")
    return plan


def _known(start: Start, train: Images, test: Images) -> Iterator[str]:
    """Sentences on which of these images given weights have seen, as far as their run tells.

    Raises:
        ValueError: if they were trained on labels of test images.
    """
    labelled = learnt_images(str(start.init))
    if (learnt := images_of_run(Path(str(start.init))) if labelled is None else labelled) is None:
        return
    tested, drawn_from = (len(also_in(images, learnt)) for images in (test, train))
    if labelled is None:
        if tested:
            yield f"{tested} of the test images are among those of the pretraining of {start.name}, without labels."
    elif tested:
        raise ValueError(
            f"init = {start.init} has learnt from {tested} of the {len(test)} test images with their labels: give "
            "weights that have not, or other images by --test"
        )
    chose = images_that_chose(Path(str(start.init)))
    if chose is not None and (num := len(also_in(test, chose))):
        yield f"{num} of the test images chose the weights of {start.name}: its scores are too high; give last/."
    if drawn_from and labelled is not None:
        yield f"{start.name} has learnt from {drawn_from} of the labels already, however few a row of the table says."


def _arm(
    name: str,
    kind: Literal["control", "scratch", "start"],
    against: str | None,
    network: str | None,
    start: Start | None = None,
) -> PlannedArm:
    arm: PlannedArm = {
        "name": name, "kind": kind, "against": against, "network": network, "init": None, "license": None
    }  # fmt: skip
    if start is not None:
        arm |= {"init": start.init, "license": start.license, "sha256": start.sha256}
    return arm


def _weights(cfg: WorthConfig, init: str) -> Weights:
    key, prefix = (cfg.key, cfg.prefix) if Path(init).is_file() else (None, None)
    return read_init(init, key, prefix, "init")


def _given_starts(cfg: WorthConfig, train: Images) -> list[Start]:
    if (cfg.key or cfg.prefix) and not any(Path(path).is_file() for path in cfg.init):
        raise ValueError("key, prefix: they name what is inside a file, and init names none: leave them out")
    if twice := [path for number, path in enumerate(cfg.init) if path in cfg.init[:number]]:
        raise ValueError(f"init = {twice[0]} is given twice: give each once")
    starts = list[Start]()
    seen: Survey | None = None
    for name, path in zip(folder_names(cfg.init), cfg.init, strict=True):
        weights = _weights(cfg, path)
        image = weights.image
        size = {} if image.size is None else {"image_size": list(image.size)}
        channels = {"mean": image.mean, "std": image.std, "nodata": image.nodata, "in_chans": image.in_chans}
        channels = {key: value for key, value in channels.items() if value is not None}
        if weights.are_published and not options.is_recipe(_recipe(cfg)):
            seen = seen or survey(train, key="data")
            if choices.are_no_photographs(seen, image.in_chans, image.mean):
                channels = {}
        # A name that another arm has, or may have.
        name = f"init-{name}" if name == PRETRAINED or name.startswith("scratch") or is_control(path) else name
        spec, sha256 = weights.architecture.spec, digest(weights.state, "")
        starts.append(Start(name, path, weights.license, spec, size | channels, sha256))
    return starts


def _choose_pretraining(place: Path, cfg: WorthConfig) -> tuple[PretrainConfig, float]:
    """The settings of the pretraining, which are written down, and how long it will take in seconds."""
    given = {
        "data.path": cfg.unlabelled or [str(_unlabelled(place))],
        "out": place / "runs" / PRETRAINED,
        "hours": cfg.hours,
        "seed": cfg.seed,
    } | _machine(cfg)
    given = {key: value for key, value in given.items() if value is not None}
    made = options.make(PretrainConfig, given, cfg.pretraining, complete=planning.complete)
    write_text(place / "settings" / f"{PRETRAINED}.yaml", options.dump(made))
    if cfg.hours:
        return made, 3600 * cfg.hours
    views = made.epochs * len(find_images(made.data.path)) * made.data.masks_per_image
    return made, views / planning.images_per_s(made)


def _recipe(cfg: WorthConfig) -> dict[str, Any]:
    """The settings of fine-tuning that are given, by dotted key, and what is chosen for runs from weights."""
    path = None if cfg.finetuning is None else find_config(cfg.finetuning)
    given = {} if path is None else options.flattened(FinetuneConfig, read_yaml(path))
    return given if options.is_recipe(given) else {"optim.layer_decay": choices.LAYER_DECAY} | given


def _choose_finetuning(
    place: Path, cfg: WorthConfig, labels: Path, num: int, start: Start, share: float
) -> FinetuneConfig:
    """Settings to train the network of a start from scratch, with the labels of `num` images.

    share: of all images that a run has, each of which may be among those that cannot be read.
    """
    recipe = _recipe(cfg)
    is_whole = options.is_recipe(recipe)
    given = {f"data.{key}": value for key, value in start.reading.items()}
    given |= recipe if is_whole else {"epochs": choices.finetuning_epochs(num)} | recipe
    given |= _machine(cfg) | ({} if cfg.epochs is None else {"epochs": cfg.epochs})
    given |= {
        "data.path": str(labels),
        "data.val_path": str(_tests_file(place)),
        "out": place / "runs" / "scratch",
        "model.variant": start.spec.model_dump(mode="json", exclude={"stem_stride"}),
        "model.stem_stride": start.spec.stem_stride,
        "model.init": None,
        "optim.layer_decay": 1.0,
        "log.trackers": [],
        "checkpoint.keep": 1,
    }
    complete = None if is_whole else planning.complete
    made = options.make(FinetuneConfig, given, complete=complete)
    if made.batch_size > num:
        # A power of two divides into micro-batches, and into pairs to mix.
        fewer = {"batch_size": 1 << (num.bit_length() - 1), "grad_accum": "auto"}
        made = options.make(FinetuneConfig, given | fewer, complete=complete)
    # The only evaluation is the last: the test images choose nothing.
    log = made.log.model_copy(update={"eval_epochs": made.epochs})
    data = made.data.model_copy(update={"max_bad_share": min(1.0, made.data.max_bad_share / share)})
    return made.model_copy(update={"log": log, "data": data})


def _machine(cfg: WorthConfig) -> dict[str, Any]:
    given = {"data.image_size": cfg.image_size, "data.num_workers": cfg.num_workers, "device": cfg.device}
    return {key: value for key, value in given.items() if value is not None}


# What is done


def _jobs(plan: Plan, cfg: WorthConfig) -> Iterator[Job]:
    seconds = plan["seconds"]
    if PRETRAINED in seconds:
        yield Job(PRETRAINED, PRETRAINED, None, cfg.seed, seconds[PRETRAINED])
    for seed, labels in product(_seeds(cfg), _amounts(cfg)):
        for arm in plan["arms"]:
            if arm["kind"] != "control":
                name = f"{arm['name']}-{_plain(labels)}-{seed}"
                yield Job(name, arm["name"], labels, seed, seconds[f"{arm['against'] or arm['name']} {labels}"])


def _run(job: Job, place: Path, plan: Plan, cfg: WorthConfig) -> Run:
    """Start or resume a run; the models of a finished fine-tuning are removed."""
    out = place / "runs" / job.name
    if job.labels is None:
        made = options.read(PretrainConfig, place / "settings" / f"{PRETRAINED}.yaml")
        data = made.data if cfg.unlabelled else made.data.model_copy(update={"path": [str(_unlabelled(place))]})
        return pretrain(made.model_copy(update={"out": out, "data": data}))
    arm = next(arm for arm in plan["arms"] if arm["name"] == job.arm)
    base = options.read(
        FinetuneConfig, place / "settings" / f"{arm['against'] or arm['name']}-{_plain(job.labels)}.yaml"
    )
    given = options.flat(base) | {
        "data.path": str(_labels_file(place, job.labels, job.seed)),
        "data.val_path": str(_tests_file(place)),
        "out": str(out),
        "seed": job.seed,
    }
    if arm["kind"] == "start":
        _check_same(arm, place, cfg)  # a resumed run's own weights have changed by now
        init = arm["init"] or str(place / "runs" / PRETRAINED)
        if arm["init"] is None and (out / "config.yaml").is_file():
            begun = str(options.read(FinetuneConfig, out / "config.yaml").model.init)
            if begun != init:  # the comparison lay elsewhere
                if checkpoint.latest(out) is None:
                    given["overwrite"] = True
                else:
                    init = begun  # which is not read again
        said = plan["settings"] if Path(init).is_file() else {}
        given |= {
            "model.init": init,
            "model.key": said.get("key"),
            "model.prefix": said.get("prefix"),
            "optim.layer_decay": plan["layer_decay"],
        }
    run = finetune(options.make(FinetuneConfig, given))
    if run.finished:
        remove_models(out)
    return run


def _scratch(place: Path, labels: str) -> FinetuneConfig:
    return options.read(FinetuneConfig, place / "settings" / f"scratch-{_plain(labels)}.yaml")


def _control(name: str, place: Path, cfg: WorthConfig) -> Backbone:
    """A baseline without a network, on images as the runs from scratch see them."""
    seen = _scratch(place, cfg.labels[0]).data
    like = reading_of(seen, seen.crop_pct)
    return load_backbone(name, max_pixels=seen.max_pixels, like=like, nodata=seen.nodata)


def _probe(name: str, place: Path, cfg: WorthConfig, plan: Plan, train: Images, test: Images) -> list[paired.Score]:
    """Scores of linear classifiers on a baseline without a network, for each draw of labels; existing ones are kept.

    The loss weighs the classes as that of the networks does.
    """
    file = place / "controls" / f"{file_name(name)}.json"
    found: list[paired.Score] = json.loads(file.read_text()) if file.is_file() else []
    there = {(score["labels"], score["seed"]) for score in found}
    wanted = [pair for pair in product(_amounts(cfg), _seeds(cfg)) if pair not in there]
    if not wanted:
        return found
    backbone = _control(name, place, cfg)
    device = choose_device(cfg.device)
    learnt = np.unique(np.concatenate([drawn(train, *pair) for pair in wanted]))
    with TemporaryDirectory(prefix=TEMPORARY[0], dir=place) as directory:
        parts = []
        for title, images in (("train", train.subset(learnt)), ("test", test)):
            folder = Path(directory) / title
            folder.mkdir()
            part = extract(
                backbone, images, None, device=device, num_workers=cfg.num_workers, directory=folder,
                title=f"{name}, {title}",
            )  # fmt: skip
            tell_unread(part.bad, f"{title} images")
            assert images.labels is not None
            parts.append((part.stages[1], images.labels[part.positions], part.positions))
        (features, known, positions), (tested, truth, _) = parts
        for labels, seed in wanted:
            rows = np.flatnonzero(np.isin(learnt[positions], drawn(train, labels, seed)))
            num_classes = len(train.class_names or ())
            class_weights = class_weights_of(
                _scratch(place, labels), np.bincount(known[rows], minlength=num_classes), device
            )
            probe = fit_linear(
                features, known, num_classes, positions=rows, class_weights=class_weights, seed=seed, device=device,
                title=f"{name}: {labels}, seed {seed}",
            )  # fmt: skip
            scores = score(truth, probe.probabilities(tested))
            found.append({"arm": name, "labels": labels, "seed": seed, "scores": scores})
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def _write(
    place: Path, cfg: WorthConfig, plan: Plan, controls: Sequence[paired.Score], jobs: Sequence[Job]
) -> paired.Comparison:
    """Write worth.json and table.md of what there is so far."""
    scores, num_done = [score for score in controls if score["seed"] in _seeds(cfg)], 0
    notes = list[str](plan["notes"])
    for job in jobs:
        run = place / "runs" / job.name
        if (ended := last_state(run)) != "finished":
            notes += [f"{job.name} failed and has no score: see {run / 'train.log'}."] if ended == "failed" else []
            continue
        num_done += 1
        if job.labels is not None:
            line = [line for line in read_metrics(run / "metrics.jsonl") if "top1" in line][-1]
            named = {name: of_model(line, name) for name in SCORES if name in line}
            scores.append({"arm": job.arm, "labels": job.labels, "seed": job.seed, "scores": named})
    given = {key: value for key, value in options.changed(cfg).items() if key not in ("data", "unlabelled")}
    given["out"] = str(place)
    found: paired.Comparison = paired.COMPARISON.validate_python(
        plan["counts"]
        | {key: plan[key] for key in ("arms", "amounts")}
        | {
            "notes": notes,
            "scores": scores,
            "num_runs": len(jobs),
            "num_done": num_done,
            "command": shlex.join(["fcmae", "worth", cfg.data, *cfg.unlabelled, *flags(given)]),
            "directory": str(Path.cwd()),
        }
    )
    rows = [row._asdict() for row in paired.compare(found)]
    text = {"fcmae": fcmae.__version__, **found, "table": rows, "verdict": paired.verdict(found)._asdict()}
    write_text(place / paired.FILE, json.dumps(text, indent=1) + "\n")
    write_text(place / "table.md", paired.summary(found) + "\n")
    return found


def _estimate(plan: Plan, jobs: Sequence[Job], place: Path) -> str:
    """A table of the jobs with how long they take, and how much of that is left."""
    by_kind = dict[tuple[str, str], list[Job]]()
    for job in jobs:
        by_kind.setdefault((job.arm, job.labels or ""), []).append(job)
    epochs = {amount["labels"]: f"{amount['epochs']:g}" for amount in plan["amounts"]}
    rows = [
        (arm, labels or "pretraining", str(len(same)), epochs.get(labels, ""), _hours(sum(job.seconds for job in same)))
        for (arm, labels), same in by_kind.items()
    ]
    left = [job for job in jobs if last_state(place / "runs" / job.name) != "finished"]
    return (
        f"{table(('start', 'labels', 'runs', 'epochs', 'time'), rows, left=2)}\n{len(left)} of {len(jobs)} runs are to "
        f"be done, about {_hours(sum(_seconds_left(job, place) for job in left))}, and the controls; the same command "
        f"goes on with what was stopped: {place}"
    )


def _seconds_left(job: Job, place: Path) -> float:
    """The estimate for what a run has not done yet."""
    run = place / "runs" / job.name
    lines, config = read_metrics(run / "metrics.jsonl"), run / "config.yaml"
    if not lines or not config.is_file():
        return job.seconds
    epochs = options.read(PretrainConfig if job.labels is None else FinetuneConfig, config).epochs
    epoch: float = lines[-1]["epoch"]
    return job.seconds * max(0.0, 1 - epoch / epochs)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"
