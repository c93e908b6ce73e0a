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
from dataclasses import dataclass, replace
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
from fcmae.data.index import Images, also_in
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
from fcmae.provenance import learnt_without_labels, seen_by
from fcmae.starting import class_weights_of, reading_of
from fcmae.tables import table
from fcmae.training import checkpoint
from fcmae.training.own_files import check_outside, remove_models
from fcmae.training.records import last_state, of_model, read_metrics
from fcmae.training.run import Run
from fcmae.weights.files import read_init
from fcmae.weights.record import Weights
from fcmae.weights.tensors import digest

PRETRAINED = "pretrained"
PRETRAINING = f"settings/{PRETRAINED}.yaml"
TESTS = "labels/test.csv"
UNLABELLED = "labels/unlabelled.txt"
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

    @property
    def from_scratch(self) -> str:
        """What runs from scratch have of it, as JSON."""
        return json.dumps([self.spec.model_dump(), self.reading], sort_keys=True)


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
        path: its directory.
        arm: which start.
        labels: the amount; None for the pretraining of PRETRAINED itself.
        seed: of the draw and the run.
        seconds: estimated.
    """

    path: Path
    arm: str
    labels: str | None
    seed: int
    seconds: float

    @property
    def is_done(self) -> bool:
        """Whether it is finished, and its score has not been lost, as in a power failure."""
        if last_state(self.path) != "finished":
            return False
        return self.labels is None or any("top1" in line for line in read_metrics(self.path / "metrics.jsonl"))

    @property
    def seconds_left(self) -> float:
        """The estimate for what the run has not done yet."""
        lines, config = read_metrics(self.path / "metrics.jsonl"), self.path / "config.yaml"
        if not lines or not config.is_file():
            return self.seconds
        epochs = options.read(PretrainConfig if self.labels is None else FinetuneConfig, config).epochs
        epoch: float = lines[-1]["epoch"]
        return self.seconds * max(0.0, 1 - epoch / epochs)

    def has(self, score: paired.Score) -> bool:
        """Whether the score is of this run."""
        return (score["arm"], score["labels"], score["seed"]) == (self.arm, self.labels, self.seed)


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
    study = _Study(place, cfg, *find_data(cfg.data, cfg.test, cfg.test_share, cfg.seed))
    plan = study.saved_plan()
    if plan is None:
        write_text(place / "plan.json", json.dumps(PLANNING) + "\n")
    for labels, seed in study.draws:
        write_labels(study.labels_file(labels, seed), study.train.subset(drawn(study.train, labels, seed)))
    plan = plan or study.make_plan()
    jobs = list(study.jobs(plan))
    print(_estimate(plan, jobs, place), flush=True)
    controls = [score for name in cfg.controls for score in study.probe(name)]
    done = [job for job in jobs if job.is_done]
    for job in done:
        if job.labels is not None:  # it may have been cut off before
            remove_models(job.path)
    waiting = [job for job in jobs if job not in done]
    study.write(plan, controls, jobs)
    # Estimates count steps only, and the machine may have been more or less busy then: seconds that whole runs took.
    took, estimated = 0.0, 0.0
    while waiting:
        job, began = waiting.pop(0), time.monotonic()
        is_whole = job.seconds_left == job.seconds
        try:
            run = study.run(job, plan)
        except FloatingPointError as error:
            if job.labels is None:
                raise
            print(f"{job.path.name} has no score: {error}", flush=True)
            continue
        if run.stopped_by is not None:  # perhaps at its last step, which is not the end of the comparison
            print(f"stopped by {run.stopped_by}: the same command goes on", flush=True)
            return replace(run, finished=False).status
        if is_whole:
            took, estimated = took + time.monotonic() - began, estimated + job.seconds
        results = study.write(plan, controls, jobs)
        seconds = sum(each.seconds_left for each in waiting) * (took / estimated if estimated else 1)
        left = f", about {_hours(seconds)} left" if waiting else ""
        of_job = [score["scores"] for score in results["scores"] if job.has(score)]
        last = f": {of_job[0][paired.METRIC]:.3f}" if of_job else ""
        print(f"{results['num_done']} of {len(jobs)} runs{left}; {job.path.name}{last}", flush=True)
    print(paired.summary(study.write(plan, controls, jobs)))
    print(f"wrote {place}; fcmae report {shlex.quote(str(place))}")
    return 0


# What is compared


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

    Raises:
        ValueError: if a name has a line break, which `find_labelled` takes for an open quotation.
    """
    for name in (*images.names(), *(images.class_names or ())):
        if not is_unicode(name) or any(end in name for end in "\r\n"):
            raise ValueError(
                f"data: {printable(name)} has a name that is no UTF-8, or of several lines, as no list of images has: "
                "rename it"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _as_list(images))


def _as_list(images: Images) -> str:
    text = io.StringIO()
    rows = ((images.name(i), images.label_name(i)) for i in range(len(images)))
    csv.writer(text, lineterminator="\n").writerows([("path", "label"), *rows])
    return text.getvalue()


def _plain(labels: str) -> str:
    return labels.replace("%", "pct")


def _recipes(cfg: WorthConfig) -> dict[str, Any]:
    """The content of the files of settings."""
    named = {key: getattr(cfg, key) for key in ("pretraining", "finetuning")}
    return {key: read_yaml(find_config(name, f"--{key}")) for key, name in named.items() if name is not None}


def _recipe(cfg: WorthConfig) -> dict[str, Any]:
    """The settings of fine-tuning that are given, by dotted key, and what is chosen for runs from weights."""
    path = None if cfg.finetuning is None else find_config(cfg.finetuning)
    given = {} if path is None else options.flattened(FinetuneConfig, read_yaml(path))
    return given if options.is_recipe(given) else {"optim.layer_decay": choices.LAYER_DECAY} | given


def _machine(cfg: WorthConfig) -> dict[str, Any]:
    given = {"data.image_size": cfg.image_size, "data.num_workers": cfg.num_workers, "device": cfg.device}
    return {key: value for key, value in given.items() if value is not None}


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


def _pretrained(cfg: PretrainConfig) -> Start:
    """The start that the pretraining of these settings gives."""
    mean, std = cfg.data.statistics()
    reading = {"in_chans": cfg.data.in_chans, "image_size": list(cfg.data.image_size), "mean": mean, "std": std}
    reading |= {} if cfg.data.nodata is None else {"nodata": cfg.data.nodata}
    return Start(PRETRAINED, None, None, cfg.model.spec, reading)


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


@dataclass(frozen=True)
class _Study:
    """What is compared, on which images, and where.

    Attributes:
        place: the directory.
        cfg: what is compared.
        train: images whose labels are learnt from.
        test: images that all are tested on.
    """

    place: Path
    cfg: WorthConfig
    train: Images
    test: Images

    @property
    def seeds(self) -> range:
        return range(self.cfg.seed, self.cfg.seed + self.cfg.seeds)

    @property
    def amounts(self) -> list[str]:
        return list(dict.fromkeys(self.cfg.labels))

    @property
    def draws(self) -> list[tuple[str, int]]:
        """Amounts of labels and seeds."""
        return list(product(self.amounts, self.seeds))

    def num_labels(self, labels: str) -> int:
        return len(drawn(self.train, labels, self.cfg.seed))

    # Its files

    def labels_file(self, labels: str, seed: int) -> Path:
        return self.place / "labels" / f"{_plain(labels)}-{seed}.csv"

    def settings_file(self, scratch: str, labels: str) -> Path:
        """Of the runs from scratch with an amount of labels, and of those that are compared with them."""
        return self.place / "settings" / f"{scratch}-{_plain(labels)}.yaml"

    # The plan

    def saved_plan(self) -> Plan | None:
        """The plan of an earlier call, if it made one.

        Raises:
            ValueError: if that was of another comparison, or the directory holds something else.
        """
        place, cfg, plan = self.place, self.cfg, self._read_plan()
        if plan is None:
            return None
        wanted, recipes, holds = options.flat(cfg), _recipes(cfg), f"out = {place} holds a comparison"
        if different := [key for key in wanted if key not in FREE and plan["settings"].get(key) != wanted[key]]:
            raise ValueError(
                f"{holds} with other settings ({', '.join(different)}): give another --out, or the same settings"
            )
        if plan["images"] != fingerprint(self.train, self.test):
            raise ValueError(f"{holds} on other images than {cfg.data} has now: give another --out")
        listed = place / TESTS
        if not listed.is_file() or listed.read_text(encoding="utf-8") != _as_list(self.test):
            raise ValueError(f"{holds} on images that lay elsewhere: move them back, or give another --out")
        if changed := [key for key, settings in plan.get("recipes", recipes).items() if settings != recipes[key]]:
            raise ValueError(
                f"{changed[0]} = {getattr(cfg, changed[0])} has other settings than when the comparison in {place} "
                "began: give another --out"
            )
        for arm in plan["arms"]:
            self._check_same(arm)
        return plan

    def _read_plan(self) -> Plan | None:
        file = self.place / "plan.json"
        if not file.is_file():
            if self.place.exists() and any(self.place.iterdir()):
                raise ValueError(f"out = {self.place} is not empty and holds no comparison: give another --out")
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return None if content == PLANNING else PLAN.validate_python(content)
        except ValueError:  # pydantic's is one
            raise ValueError(f"{file} is damaged, or of another version: give another --out") from None

    def _check_same(self, arm: PlannedArm) -> None:
        """Refuse given weights that have changed."""
        sha256, init = arm.get("sha256"), arm["init"]
        if sha256 and init and sha256 != digest(_weights(self.cfg, init).state, ""):
            raise ValueError(
                f"init = {init} has other weights than when the comparison in {self.place} began: give another --out, "
                "and of a run that goes on a checkpoint"
            )

    def make_plan(self) -> Plan:
        """Choose the settings of all runs, and write them down with what is compared and how long it will take."""
        cfg, train, test = self.cfg, self.train, self.test
        for name in cfg.controls:
            Control(name)
        self._write_lists()
        starts = _given_starts(cfg, train)
        notes = [*self._notes_on_tests(), *(note for start in starts for note in self._notes_on(start))]
        notes.append("Each start is of one pretraining: intervals are over draws of labels and fine-tuning.")
        print("timing steps of each network and amount of labels", file=sys.stderr, flush=True)
        seconds = dict[str, float]()
        if cfg.hours or cfg.pretraining:
            pretraining, seconds[PRETRAINED] = self._choose_pretraining()
            if num := len(also_in(test, find_images(pretraining.data.path))):
                notes.append(f"{num} of the test images are among those of the pretraining, without labels.")
            starts.insert(0, _pretrained(pretraining))
        arms, settings = self._choose_arms(starts)
        for name in cfg.controls:  # one that the images are too small for is told before the rest is timed
            self.control(name)
        for (scratch, labels), chosen in settings.items():
            num_seen = chosen.epochs * self.num_labels(labels) + len(test)
            seconds[f"{scratch} {labels}"] = num_seen / planning.images_per_s(chosen)
        epochs = {labels: chosen.epochs for (_, labels), chosen in settings.items()}
        plan: Plan = {
            "settings": options.flat(cfg),
            "recipes": _recipes(cfg),
            "images": fingerprint(train, test),
            "arms": [_arm(name, "control", "scratch", None) for name in cfg.controls] + arms,
            "amounts": [
                {"labels": labels, "num_labels": self.num_labels(labels), "epochs": epochs[labels]}
                for labels in self.amounts
            ],
            "counts": {
                "num_train": len(train),
                "num_test": len(test),
                "num_classes": len(train.class_names or ()),
                "num_tested": len(self._tests_of_classes()),
            },
            "notes": notes,
            "layer_decay": float(_recipe(cfg).get("optim.layer_decay", 1.0)),
            "seconds": seconds,
        }
        write_text(self.place / "plan.json", json.dumps(plan, indent=1) + "\n")
        return plan

    def _write_lists(self) -> None:
        write_labels(self.place / "labels/train.csv", self.train)
        write_labels(self.place / TESTS, self.test)
        write_text(self.place / UNLABELLED, "".join(f"{name}\n" for name in self.train.names()))

    def _tests_of_classes(self) -> list[int]:
        """How many test images each class has that has any."""
        assert self.test.labels is not None
        counts: list[int] = np.unique(self.test.labels, return_counts=True)[1].tolist()
        return counts

    def _notes_on_tests(self) -> Iterator[str]:
        counts = self._tests_of_classes()
        one = 100 / len(counts) / min(counts)
        yield f"The class with the fewest test images has {min(counts)}: one of them is {one:.1f} points."
        if self.cfg.test is None:
            yield "The test images were drawn one by one: neighbours of one patient or scene may be on both sides."

    def _notes_on(self, start: Start) -> Iterator[str]:
        """Sentences on which of these images given weights have seen, as far as their run tells.

        Raises:
            ValueError: if they were trained on labels of test images.
        """
        seen = seen_by(str(start.init))
        if tested := len(also_in(self.test, learnt_without_labels(str(start.init)))):
            yield f"{tested} of the test images are among those of the pretraining of {start.name}, without labels."
        if tested := len(seen.labels_of(self.test)):
            raise ValueError(
                f"init = {start.init} has learnt from {tested} of the {len(self.test)} test images with their labels: "
                "give weights that have not, or other images by --test"
            )
        if num := len(also_in(self.test, seen.chose)):
            yield f"{num} of the test images chose the weights of {start.name}: its scores are too high; give last/."
        if trained := len(seen.labels_of(self.train)):
            yield f"{start.name} has learnt from {trained} of the labels already, however few a row of the table says."

    def _choose_pretraining(self) -> tuple[PretrainConfig, float]:
        """The settings of the pretraining, which are written down, and how long it will take in seconds."""
        given = {
            "data.path": self.cfg.unlabelled or [str(self.place / UNLABELLED)],
            "out": self.place / "runs" / PRETRAINED,
            "hours": self.cfg.hours,
            "seed": self.cfg.seed,
        } | _machine(self.cfg)
        given = {key: value for key, value in given.items() if value is not None}
        chosen = options.make(PretrainConfig, given, self.cfg.pretraining, complete=planning.complete)
        write_text(self.place / PRETRAINING, options.dump(chosen))
        if self.cfg.hours:
            return chosen, 3600 * self.cfg.hours
        views = chosen.epochs * len(find_images(chosen.data.path)) * chosen.data.masks_per_image
        return chosen, views / planning.images_per_s(chosen)

    def _choose_arms(self, starts: Sequence[Start]) -> tuple[list[PlannedArm], dict[tuple[str, str], FinetuneConfig]]:
        """Each start, after an arm from scratch for each network and reading that they have.

        Returns:
            These arms; and the settings of those from scratch, by arm and labels, which are written down.
        """
        names, arms, settings = dict[str, str](), list[PlannedArm](), dict[tuple[str, str], FinetuneConfig]()
        for start in starts:
            network = describe(start.spec)
            if start.from_scratch not in names:
                names[start.from_scratch] = scratch = f"scratch-{len(names) + 1}" if names else "scratch"
                arms.append(_arm(scratch, "scratch", None, network))
                for labels in self.amounts:
                    settings[scratch, labels] = self._choose_finetuning(labels, start)
                    write_text(self.settings_file(scratch, labels), options.dump(settings[scratch, labels]))
            arms.append(_arm(start.name, "start", names[start.from_scratch], network, start))
        return sorted(arms, key=lambda arm: arm["kind"] != "scratch"), settings

    def _choose_finetuning(self, labels: str, start: Start) -> FinetuneConfig:
        """Settings to train the network of a start from scratch, with an amount of labels."""
        num, recipe = self.num_labels(labels), _recipe(self.cfg)
        is_whole = options.is_recipe(recipe)
        given = {f"data.{key}": value for key, value in start.reading.items()}
        given |= recipe if is_whole else {"epochs": choices.finetuning_epochs(num)} | recipe
        given |= _machine(self.cfg) | ({} if self.cfg.epochs is None else {"epochs": self.cfg.epochs})
        given |= {
            "data.path": str(self.labels_file(labels, self.cfg.seed)),
            "data.val_path": str(self.place / TESTS),
            "out": self.place / "runs" / "scratch",
            "model.variant": start.spec.model_dump(mode="json", exclude={"stem_stride"}),
            "model.stem_stride": start.spec.stem_stride,
            "model.init": None,
            "optim.layer_decay": 1.0,
            "log.trackers": [],
            "checkpoint.keep": 1,
        }
        complete = None if is_whole else planning.complete
        chosen = options.make(FinetuneConfig, given, complete=complete)
        if chosen.batch_size > num:
            # A power of two divides into micro-batches, and into pairs to mix.
            fewer = {"batch_size": 1 << (num.bit_length() - 1), "grad_accum": "auto"}
            chosen = options.make(FinetuneConfig, given | fewer, complete=complete)
        # The only evaluation is the last: the test images choose nothing.
        log = chosen.log.model_copy(update={"eval_epochs": chosen.epochs})
        # As many files may be bad as of all images.
        share = (num + len(self.test)) / (len(self.train) + len(self.test))
        data = chosen.data.model_copy(update={"max_bad_share": min(1.0, chosen.data.max_bad_share / share)})
        return chosen.model_copy(update={"log": log, "data": data})

    # The runs

    def jobs(self, plan: Plan) -> Iterator[Job]:
        seconds = plan["seconds"]
        if PRETRAINED in seconds:
            yield Job(self.place / "runs" / PRETRAINED, PRETRAINED, None, self.cfg.seed, seconds[PRETRAINED])
        for seed, labels in product(self.seeds, self.amounts):
            for arm in plan["arms"]:
                if arm["kind"] != "control":
                    path = self.place / "runs" / f"{arm['name']}-{_plain(labels)}-{seed}"
                    yield Job(path, arm["name"], labels, seed, seconds[f"{arm['against'] or arm['name']} {labels}"])

    def run(self, job: Job, plan: Plan) -> Run:
        """Start or resume a run; the models of a finished fine-tuning are removed."""
        if job.labels is None:
            cfg = options.read(PretrainConfig, self.place / PRETRAINING)
            path = cfg.data.path if self.cfg.unlabelled else [str(self.place / UNLABELLED)]
            return pretrain(
                cfg.model_copy(update={"out": job.path, "data": cfg.data.model_copy(update={"path": path})})
            )
        arm = next(arm for arm in plan["arms"] if arm["name"] == job.arm)
        scratch = options.read(FinetuneConfig, self.settings_file(arm["against"] or arm["name"], job.labels))
        settings = options.flat(scratch) | {
            "data.path": str(self.labels_file(job.labels, job.seed)),
            "data.val_path": str(self.place / TESTS),
            "out": str(job.path),
            "seed": job.seed,
        }
        if last_state(job.path) == "finished" and checkpoint.latest(job.path) is None:  # and its score was lost
            settings["overwrite"] = True
        if arm["kind"] == "start":
            settings |= self._settings_of_start(arm, job.path, plan)
        run = finetune(options.make(FinetuneConfig, settings))
        if run.finished:
            remove_models(job.path)
        return run

    def _settings_of_start(self, arm: PlannedArm, out: Path, plan: Plan) -> dict[str, Any]:
        """What a run from weights has other than one from scratch."""
        self._check_same(arm)  # a resumed run's own weights have changed by now
        init, settings = arm["init"] or str(self.place / "runs" / PRETRAINED), dict[str, Any]()
        if arm["init"] is None and (out / "config.yaml").is_file():
            begun = str(options.read(FinetuneConfig, out / "config.yaml").model.init)
            if begun != init and checkpoint.latest(out) is None:  # the comparison lay elsewhere
                settings["overwrite"] = True
            else:
                init = begun  # which is not read again
        inside = plan["settings"] if Path(init).is_file() else {}
        return settings | {
            "model.init": init,
            "model.key": inside.get("key"),
            "model.prefix": inside.get("prefix"),
            "optim.layer_decay": plan["layer_decay"],
        }

    # The controls

    def control(self, name: str) -> Backbone:
        """A baseline without a network, on images as the runs from scratch see them."""
        data = self._scratch(self.amounts[0]).data
        like = reading_of(data, data.crop_pct)
        return load_backbone(name, max_pixels=data.max_pixels, like=like, nodata=data.nodata)

    def _scratch(self, labels: str) -> FinetuneConfig:
        return options.read(FinetuneConfig, self.settings_file("scratch", labels))

    def probe(self, name: str) -> list[paired.Score]:
        """Scores of linear classifiers on a baseline without a network, for each draw of labels; existing ones stay.

        The loss weighs the classes as that of the networks does.
        """
        file = self.place / "controls" / f"{file_name(name)}.json"
        scores: list[paired.Score] = json.loads(file.read_text()) if file.is_file() else []
        scored = {(score["labels"], score["seed"]) for score in scores}
        wanted = [draw for draw in self.draws if draw not in scored]
        if not wanted:
            return scores
        backbone, device = self.control(name), choose_device(self.cfg.device)
        learnt = np.unique(np.concatenate([drawn(self.train, *draw) for draw in wanted]))
        num_classes = len(self.train.class_names or ())
        with TemporaryDirectory(prefix=TEMPORARY[0], dir=self.place) as directory:
            parts = []
            for title, images in (("train", self.train.subset(learnt)), ("test", self.test)):
                folder = Path(directory) / title
                folder.mkdir()
                part = extract(
                    backbone, images, None, device=device, num_workers=self.cfg.num_workers, directory=folder,
                    title=f"{name}, {title}",
                )  # fmt: skip
                tell_unread(part.bad, f"{title} images")
                assert images.labels is not None
                parts.append((part.stages[1], images.labels[part.positions], part.positions))
            (features, known, positions), (tested, truth, _) = parts
            for labels, seed in wanted:
                rows = np.flatnonzero(np.isin(learnt[positions], drawn(self.train, labels, seed)))
                counts = np.bincount(known[rows], minlength=num_classes)
                class_weights = class_weights_of(self._scratch(labels), counts, device)
                probe = fit_linear(
                    features, known, num_classes, positions=rows, class_weights=class_weights, seed=seed, device=device,
                    title=f"{name}: {labels}, seed {seed}",
                )  # fmt: skip
                of_draw = score(truth, probe.probabilities(tested))
                scores.append({"arm": name, "labels": labels, "seed": seed, "scores": of_draw})
        write_text(file, json.dumps(scores, indent=1) + "\n")
        return scores

    # The results

    def write(self, plan: Plan, controls: Sequence[paired.Score], jobs: Sequence[Job]) -> paired.Comparison:
        """Write worth.json and table.md of what there is so far."""
        scores, notes = [score for score in controls if score["seed"] in self.seeds], list[str](plan["notes"])
        done = [job for job in jobs if job.is_done]
        for job in jobs:
            if last_state(job.path) == "failed":
                notes.append(f"{job.path.name} failed and has no score: see {job.path / 'train.log'}.")
            if job in done and job.labels is not None:
                line = [line for line in read_metrics(job.path / "metrics.jsonl") if "top1" in line][-1]
                named = {name: of_model(line, name) for name in SCORES if name in line}
                scores.append({"arm": job.arm, "labels": job.labels, "seed": job.seed, "scores": named})
        given = {key: value for key, value in options.changed(self.cfg).items() if key not in ("data", "unlabelled")}
        given["out"] = str(self.place)
        command = ["fcmae", "worth", self.cfg.data, *self.cfg.unlabelled, *flags(given)]
        results: paired.Comparison = paired.COMPARISON.validate_python(
            plan["counts"]
            | {key: plan[key] for key in ("arms", "amounts")}
            | {
                "notes": notes,
                "scores": scores,
                "num_runs": len(jobs),
                "num_done": len(done),
                "command": shlex.join(command),
                "directory": str(Path.cwd()),
            }
        )
        rows = [row._asdict() for row in paired.compare(results)]
        text = {"fcmae": fcmae.__version__, **results, "table": rows, "verdict": paired.verdict(results)._asdict()}
        write_text(self.place / paired.FILE, json.dumps(text, indent=1) + "\n")
        write_text(self.place / "table.md", paired.summary(results) + "\n")
        return results


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
    left = [job for job in jobs if not job.is_done]
    return (
        f"{table(('start', 'labels', 'runs', 'epochs', 'time'), rows, left=2)}\n{len(left)} of {len(jobs)} runs are to "
        f"be done, about {_hours(sum(job.seconds_left for job in left))}, and the controls; the same command "
        f"goes on with what was stopped: {place}"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"
