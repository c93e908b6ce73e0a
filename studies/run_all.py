"""Run the studies of docs/results.md: those of pretraining, fine-tuning and probes that are here, and then the others.

    python studies/run_all.py --tiny20 SHARDS                 # 2 cores, 63 hours
    python studies/run_all.py --tiny20 SHARDS --scale gpu     # one GPU: hundreds of epochs, five seeds
    python studies/run_all.py --tiny20 SHARDS --list          # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Everything is written below --out; what is finished is
not done again, and what was cut off resumes. Then, unless --only leaves something out, studies/collect.py takes the
numbers, the other studies run, of which OTHERS has the flags, and studies/results.py writes results.md of it all in
OUT/docs, beside the pages and the JSON. --docs names another folder: one whose JSON has other runs is refused.
`make demo-long` is one of the others: it needs npm, and runs in the clone; segmentation.py's brain needs nilearn.

Hours are an estimate. On 2 cores the commands here took 2.5, two at a time, before controls with few labels were among
them, and by the seconds in the JSON of docs/ the others take 3 (what is run there of small_images.py), 11 (of
recipe.py), 27 (labels.py, of which a part was run), 1 (collapse.py), 2 (roadmap.py), 3 (pruning.py), 2
(segmentation.py) and .8 (`make demo-long`); container.py, of which a GPU did the half, may take 10. On a GPU
small_images.py takes 1.5 hours, and the rest was not run by us.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import collapse
import collect
import container
import labels
import pruning
import recipe
import results
import roadmap
import segmentation
import small_images
from study import (
    CONTROLS,
    FCMAE,
    STUDIES,
    Job,
    add_arguments,
    chosen,
    end,
    probe,
    refuse_others,
    schedule,
    shown,
    write_images,
)

from fcmae.atomic import write_text
from fcmae.evaluation import paired

LABELS = (1, 10, 100)  # percent of the training set


class Budget(NamedTuple):
    """Fine-tuning on a share of the labels: pretrained or not, the same."""

    batch_size: int
    epochs: int
    seeds: int


@dataclass(frozen=True)
class Scale:
    """How much of everything. epochs: of pretraining. short_epochs: of the runs that vary one thing of it."""

    epochs: int
    short_epochs: int
    solar_epochs: int
    batch_size: int
    base_lr: float
    warmup_epochs: int
    finetune_lr: float
    tiny20: dict[int, Budget]
    solar: dict[int, Budget]
    grn_seeds: int
    stem_stride: int
    decoder_dim: int
    curve_minutes: float | None
    num_workers: int | None


SCALES = {
    "cpu": Scale(
        epochs=10,
        short_epochs=1,
        solar_epochs=16,
        batch_size=32,
        base_lr=6e-3,
        warmup_epochs=1,
        finetune_lr=8e-3,
        tiny20={1: Budget(20, 20, 3), 10: Budget(32, 6, 3), 100: Budget(32, 1, 2)},
        solar={1: Budget(10, 20, 3), 10: Budget(16, 8, 3), 100: Budget(32, 2, 3)},
        grn_seeds=2,
        stem_stride=2,
        decoder_dim=128,
        curve_minutes=4,
        num_workers=0,
    ),
    "gpu": Scale(
        epochs=400,
        short_epochs=100,
        solar_epochs=800,
        batch_size=256,
        base_lr=6e-4,
        warmup_epochs=20,
        finetune_lr=8e-4,
        tiny20={1: Budget(50, 200, 5), 10: Budget(128, 100, 5), 100: Budget(256, 100, 5)},
        solar={1: Budget(10, 200, 5), 10: Budget(64, 100, 5), 100: Budget(128, 100, 5)},
        grn_seeds=5,
        stem_stride=1,
        decoder_dim=256,
        curve_minutes=None,
        num_workers=None,
    ),
}


# Of studies/recipe.py, whose other arms take half an hour each on two cores.
RECIPE = (
    *("hog", "again", "batch256", "batch32", "patch16", "four"),
    *("ratio75", "ratio50", "ratio50b", "crop50", "crop50b", "masks2", "rate2", "pixels"),
    *("ema", "width64", "warmup1", "multiscale", "lowres", "frequency"),
)
# Of studies/small_images.py, which takes days on two cores.
PROBES = tuple(f"probe-{name}" for name in ("hog20", "random", *CONTROLS))
SMALL = {"cpu": ("--at-once", "1", "--only", "hog20-p", "scratch-5", "hog20-5", *PROBES), "gpu": ()}
SMALLER = ("--side", "32", "--epochs", "30", "--pretraining", "20", "--seeds", "3", "--at-once", "2")  # of pruning.py


class Other(NamedTuple):
    """Another study.

    Attributes:
        run: its main.
        name: of its folder below --out.
        flags: by scale.
        first: its first words; tiny20's shards where there is None.
    """

    run: Callable[[list[str]], None]
    name: str
    flags: dict[str, tuple[str, ...]]
    first: tuple[str | None, ...] = (None,)

    def words(self, shards: Path, out: Path, docs: Path, scale: str) -> list[str]:
        """Its command line."""
        first = [str(shards) if word is None else word for word in self.first]
        return [*first, "--out", str(out / self.name), "--docs", str(docs), *self.flags[scale]]


OTHERS = (
    Other(small_images.main, "small_images", SMALL),
    Other(recipe.main, "recipe", {"cpu": ("--at-once", "2", "--size", "48", "--only", *RECIPE), "gpu": ()}),
    # From an encoder of recipe's.
    Other(labels.main, "recipe", {"cpu": (), "gpu": ("--at-once", "12", "--size", "64")}),
    Other(collapse.main, "collapse", {"cpu": ("--at-once", "2"), "gpu": ()}),
    Other(
        roadmap.main,
        "roadmap",
        {"cpu": ("--side", "48", "--epochs", "3", "--seeds", "3", "--at-once", "2", "--rate", "4e-3"), "gpu": ()},
    ),
    Other(
        container.main,
        "container",
        {"cpu": ("--full-epochs", "5", "--seeds", "3", "--at-once", "2"), "gpu": ("--full-epochs", "5")},
    ),
    Other(pruning.main, "pruning", {"cpu": SMALLER, "gpu": ()}, ("run", None)),
    Other(segmentation.main, "landsea", {"cpu": ("--at-once", "2"), "gpu": ()}, ("landsea", "--short", ".5")),
    Other(
        segmentation.main,
        "brain",
        {"cpu": ("--at-once", "2"), "gpu": ()},
        ("brain", "--epochs", "900", "--arms", "scratch", "pretrained"),
    ),
)


def jobs(out: Path, scale: Scale) -> list[Job]:
    """All of the studies, what matters most first."""
    found = [*pretraining(out, scale), *probes(out, scale), *finetuning(out, scale), *curves(out, scale)]
    order = (
        "main-tiny20-v2",
        "main-solar",
        "tune",
        "main",
        "grn",
        "probe-main",
        "probe-tiny20",
        "probe-solar",
        "few",
        "time",
        "short",
        "probe",
        "curve",
    )
    return sorted(found, key=lambda job: next(i for i, prefix in enumerate(order) if job.name.startswith(prefix)))


def pretrain(
    out: Path, scale: Scale, name: str, data: str, epochs: int, ablated: str | None = None, **more: str
) -> Job:
    """Pretraining of atto; more: settings by key, `__` for the dot."""
    flags = {
        "data.path": f"{out}/{data}/unlabeled.txt",
        "epochs": epochs,
        "batch_size": scale.batch_size,
        "optim.base_lr": scale.base_lr,
        "optim.warmup_epochs": min(scale.warmup_epochs, epochs / 2),
        "data.val_share": 0.02,
        "data.num_workers": scale.num_workers,
        "model.decoder_dim": scale.decoder_dim,
        "checkpoint.milestone_epochs": max(1, epochs // 10),
        "log.eval_epochs": max(0.5, epochs / 10),
        **(geometry(scale) if data == "tiny20" else {"data.image_size": 128, "data.in_chans": 1}),
    }
    flags |= {key.replace("__", "."): value for key, value in more.items()}
    return Job(name, command(out, name, "pretrain", flags, ablated))


def geometry(scale: Scale) -> dict[str, object]:
    """Of tiny20's 64 pixels: a grid of 4 x 4 patches of 16 on a CPU, of 8 x 8 patches of 8 on a GPU."""
    stride = scale.stem_stride
    return {"data.image_size": 64, "model.stem_stride": stride, "model.mask_patch": 8 * stride}


def command(out: Path, name: str, verb: str, flags: dict[str, object], ablated: str | None = None) -> tuple[str, ...]:
    program = FCMAE if ablated is None else (sys.executable, str(STUDIES / "ablated.py"), ablated)
    flags = {"config": f"{STUDIES}/defaults.yaml", "model.variant": "convnextv2_atto", "log.every_steps": 20} | flags
    words = [f"--{key}={value}" for key, value in flags.items() if value is not None]
    return (*program, verb, *words, f"--out={out}/runs/{name}")


def pretraining(out: Path, scale: Scale) -> Iterator[Job]:
    yield pretrain(out, scale, "main-tiny20-v2", "tiny20", scale.epochs)
    yield pretrain(out, scale, "main-solar-v2", "solar", scale.solar_epochs)
    yield pretrain(out, scale, "main-tiny20-v1", "tiny20", scale.epochs, model__variant="convnext_atto")
    yield pretrain(out, scale, "main-tiny20-no-grn", "tiny20", scale.epochs, "drop-grn")
    yield pretrain(out, scale, "short-dense", "tiny20", scale.short_epochs, "dense")
    for ratio in (0.3, 0.6, 0.75, 0.9):
        yield pretrain(
            out, scale, f"short-ratio-{ratio:g}", "tiny20", scale.short_epochs, model__mask_ratio=f"{ratio:g}"
        )
    yield pretrain(out, scale, "short-depth-2", "tiny20", scale.short_epochs, model__decoder_depth="2")


def finetune(
    out: Path, scale: Scale, name: str, data: str, percent: int, seed: int, budget: Budget, init: str | None,
    ablated: str | None = None, variant: str = "convnextv2_atto",
) -> Job:  # fmt: skip
    """Fine-tuning on the training images with the labels of a draw, tested on all test images at the end."""
    # The data of 100 % are the same for every seed.
    labelled = f"{out}/{data}/train-{percent}-{0 if percent == 100 else seed}.csv"
    flags: dict[str, object] = {
        "data.path": labelled,
        "data.val_path": f"{out}/{data}/test.csv",
        "seed": seed,
        "model.init": None if init is None else f"{out}/runs/{init}",
        "epochs": budget.epochs,
        "batch_size": budget.batch_size,
        # The rate is for 256 images: the same for every size of batch.
        "optim.base_lr": scale.finetune_lr,
        "optim.warmup_epochs": budget.epochs / 8,
        # Layers that start from nothing have nothing that a lower learning rate would keep.
        "optim.layer_decay": 1 if init is None else 0.9,
        "model.variant": variant,
        "model.drop_path_rate": 0.1,
        "data.random_erasing": 0,
        "data.auto_augment": "none",
        "checkpoint.every_epochs": budget.epochs,
        "data.num_workers": scale.num_workers,
        "log.eval_epochs": budget.epochs,
        "log.every_steps": 10,
    }
    if data == "tiny20":
        flags |= {
            "data.image_size": 64,
            "model.stem_stride": scale.stem_stride,
            "data.crop_scale": "0.35,1",
            "data.crop_pct": 1,
        }
    else:
        flags |= {"data.image_size": 128, "data.in_chans": 1, "data.crop_scale": "0.6,1", "data.crop_pct": 1}
        flags |= {"data.vflip": 0.5, "regularization.class_weights": "balanced"}
    return Job(name, command(out, name, "finetune", flags, ablated), () if init is None else (init,))


def finetuning(out: Path, scale: Scale) -> Iterator[Job]:
    for percent in LABELS:
        for data, budgets in (("tiny20", scale.tiny20), ("solar", scale.solar)):
            for seed in range(budgets[percent].seeds):
                for start, init in (("pretrained", f"main-{data}-v2"), ("scratch", None)):
                    name = f"tune-{data}-{percent}-{start}-{seed}"
                    yield finetune(out, scale, name, data, percent, seed, budgets[percent], init)
    v2, v1, none = "main-tiny20-v2", "main-tiny20-v1", "main-tiny20-no-grn"
    # V2 with GRN in both is tune-tiny20-10-pretrained.
    for seed in range(scale.grn_seeds):
        for name, init, ablated, variant in (
            ("grn-v1", v1, None, "convnext_atto"),
            ("grn-none", none, "drop-grn", "convnextv2_atto"),
            ("grn-dropped", v2, "drop-grn", "convnextv2_atto"),
            ("grn-new", v2, "new-grn", "convnextv2_atto"),
        ):
            yield finetune(out, scale, f"{name}-{seed}", "tiny20", 10, seed, scale.tiny20[10], init, ablated, variant)


def probes(out: Path, scale: Scale) -> Iterator[Job]:
    """kNN and a linear classifier on the frozen features of every pretrained encoder, and of none."""
    for job in pretraining(out, scale):
        data = "solar" if "solar" in job.name else "tiny20"
        stages = "all" if job.name == f"main-{data}-v2" else "last"
        yield probe(f"probe-{job.name}", f"{out}/runs/{job.name}", out / data, out, (job.name,), "--stages", stages)
    for data in ("tiny20", "solar"):
        init = f"main-{data}-v2"
        model = f"random:{out}/runs/{init}"
        yield probe(f"probe-{data}-random", model, out / data, out, (init,), "--stages", "all")
    for data, image_size in (("tiny20", 64), ("solar", 128)):
        init = f"main-{data}-v2"
        few = ("--probes", "few-shot")
        for name, model in (("v2", f"{out}/runs/{init}"), ("random", f"random:{out}/runs/{init}")):
            yield probe(f"few-{data}-{name}", model, out / data, out, (init,), *few)
        for name, (model, _) in CONTROLS.items():
            size = ("--image-size", str(image_size))
            yield probe(f"probe-{data}-{name}", model, out / data, out, (), *size)
            yield probe(f"few-{data}-{name}", model, out / data, out, (), *size, *few)
    for name in ("v2", "v1", "no-grn"):
        init = f"main-tiny20-{name}"
        words = ["analyze", f"{out}/runs/{init}/checkpoints/step-*", "--data", f"{out}/tiny20/test.csv"]
        words += ["--overwrite", "--out", f"{out}/runs/time-{name}"]
        yield Job(f"time-{name}", (*FCMAE, *words), (init,))


def curves(out: Path, scale: Scale) -> Iterator[Job]:
    """The shipped configurations for small machines, or the beginning of their runs."""
    for name in ("pretrain_demo", "pretrain_cpu"):
        flags: dict[str, object] = {"config": name, "data.path": f"{out}/solar/unlabeled.txt", "device": "auto"}
        flags |= {"data.num_workers": scale.num_workers}
        job = f"curve-{name}"
        minutes = scale.curve_minutes if name == "pretrain_cpu" else None  # the demo's is short
        yield Job(job, command(out, job, "pretrain", flags), minutes=minutes)


@contextmanager
def listing() -> Iterator[None]:
    """Around a study that only lists its commands: nothing is shown but why it is refused."""
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except SystemExit as error:
        if error.code:
            raise


def photographs(docs: Path) -> None:
    """`make demo-long`, in the clone.

    Raises:
        SystemExit: if it fails, such as without npm, or there is another result.
    """
    status = subprocess.run(["make", "demo-long"], cwd=STUDIES.parent).returncode
    if status:
        sys.exit(f"make demo-long: status {status}, see above")
    found, place = STUDIES.parent / "runs" / "demo-long" / "worth" / paired.FILE, docs / "demo-long" / paired.FILE
    made, there = (json.loads(path.read_text()) if path.exists() else {} for path in (found, place))
    made.pop("directory", None)  # in which it was typed
    if there and there != made:
        sys.exit(f"{place} has other runs than {found}: give another --docs")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, json.dumps(made, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny20", type=Path, required=True, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="how much of everything [cpu]")
    parser.add_argument("--jobs", type=int, help="commands at a time, each with an equal share of the cores [2 or 1]")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="where pages and JSON are written [OUT/docs]")
    add_arguments(parser, "runs/studies")
    args = parser.parse_args(argv)
    out, scale = args.out.absolute(), SCALES[args.scale]
    every, docs = jobs(out, scale), args.docs or out / "docs"
    wanted = chosen(args, every)
    others = [(other.run, other.words(args.tiny20, out, docs, args.scale)) for other in OTHERS]
    if args.only == [""]:  # what would be refused after hours
        refuse_others(docs / "results" / f"{args.scale}.json", {job.name: shown(job, out) for job in every}, "jobs")
        for run, words in others:
            with listing():
                run([*words, "--list"])
    seeds = max(budget.seeds for budget in (*scale.tiny20.values(), *scale.solar.values()))
    write_images("tiny20", out, str(args.tiny20), seeds=seeds)
    write_images("solar", out, seeds=seeds)
    at_once = args.jobs or (2 if args.scale == "cpu" else 1)
    threads = max(1, (os.cpu_count() or 1) // at_once) if args.scale == "cpu" else None
    failed = schedule(wanted, out, at_once, threads)
    if args.only == [""]:
        collect.main([str(out), "--scale", args.scale, "--docs", str(docs)])
        refused = []
        for start in (*(partial(run, words) for run, words in others), partial(photographs, docs)):
            try:
                start()
            except SystemExit as error:  # such as for want of npm; the others can still run
                if not isinstance(error.code, str):  # a signal
                    raise
                refused.append(error.code)
            except (OSError, subprocess.SubprocessError) as error:  # such as for want of nilearn
                refused.append(str(error))
        results.main(["--docs", str(docs)])
        end(failed, refused)
    end(failed)


if __name__ == "__main__":
    main()
