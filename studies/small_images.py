"""Does pretraining pay on small images with few labels, and predicting what? Made into docs/small_images.md.

    python studies/small_images.py SHARDS --out runs/small_images                 # a GPU with many cores
    python studies/small_images.py SHARDS --out runs/small_images --at-once 1     # 2 cores
    python studies/small_images.py SHARDS --out runs/small_images --list          # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/datasets.py). Pretraining is `pretrain_small_images` and what differs
from it in one thing; fine-tuning is `finetune_small_images` on the same labels, in the same order, with the same head,
from each of these and from scratch. The rates of scratch and of its longer schedule are compared on training images
that are held out, and the test images are evaluated once, at the last step: they choose nothing. What is finished is
not done again, and what was cut off resumes. At 150 images a second, as 2 cores made, a pretraining takes over an hour,
and fine-tuning on 1,000 labels seven minutes; the whole was not run yet. What is found is in OUT/small_images.json, and
with `--docs` there too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import few, folder_rows, write_csv
from run_all import STUDIES, Job, schedule, shown

from fcmae.atomic import write_text
from fcmae.evaluation.paired import METRIC, Comparison, cells, compare
from fcmae.tables import table
from fcmae.training.run import read_metrics

# By name: what stands in the table, the part of studies/objectives.py, and flags.
ARMS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "hog": ("HOG", None, ()),
    "pixels": ("pixels", None, ("--model.target=pixels",)),
    "ratio75": ("pixels, 75 % hidden", None, ("--model.target=pixels", "--model.mask_ratio=0.75")),
    "multiscale": ("pixels, all stages decoded", "multiscale", ("--model.target=pixels",)),
}
SCRATCH = ("--optim.base_lr=8e-3", "--optim.layer_decay=1")
# What was tried of scratch on training images that are held out: epochs and rate.
TRIED = ((60, "4e-3"), (60, "8e-3"), (60, "16e-3"), (120, "8e-3"))
COLUMNS = ("labels", "predicted", "seeds", "top-1, %", "against scratch, of each seed", "")


def jobs(out: Path, epochs: float, percents: list[int], seeds: int) -> Iterator[Job]:
    """All commands, scratch first."""

    def finetune(name: str, labels: str, test: str, seed: int, needs: tuple[str, ...], *words: str) -> Job:
        paths = (f"--data.path={out}/{labels}", f"--data.val_path={out}/{test}", f"--out={out}/runs/{name}")
        command = (sys.executable, "-m", "fcmae.cli", "finetune", "--config=finetune_small_images", *paths)
        return Job(name, (*command, f"--seed={seed}", *words), needs)

    for arm, (_, part, flags) in ARMS.items():
        program = ("-m", "fcmae.cli") if part is None else (str(STUDIES / "objectives.py"), part)
        words = ("pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt")
        more = (f"--epochs={epochs:g}", "--data.val_share=0", f"--out={out}/runs/{arm}", *flags)
        yield Job(arm, (sys.executable, *program, *words, *more))
    for tried, rate in TRIED:
        flags = (*SCRATCH[1:], f"--optim.base_lr={rate}", f"--epochs={tried}")
        yield finetune(f"tune-{tried}-{rate}", "tune.csv", "tune-test.csv", 0, (), *flags)
    for percent in percents:
        for seed in range(seeds):
            labels = f"train-{percent}-{seed}.csv"
            yield finetune(f"scratch-{percent}-{seed}", labels, "test.csv", seed, (), *SCRATCH)
            for arm in ARMS:
                init = f"--init={out}/runs/{arm}"
                yield finetune(f"{arm}-{percent}-{seed}", labels, "test.csv", seed, (arm,), init)


def prepare(shards: Path, out: Path, percents: list[int], seeds: int) -> None:
    """The images, and which labels are used; those of the trials are of a draw of their own."""
    command = [sys.executable, str(STUDIES / "datasets.py"), "tiny20", str(shards), str(out / "tiny20")]
    subprocess.run(command, check=True)
    rows = folder_rows(out / "tiny20" / "train")
    write_csv(out / "test.csv", folder_rows(out / "tiny20" / "val"))
    for percent in percents:
        for seed in range(seeds):
            write_csv(out / f"train-{percent}-{seed}.csv", few(rows, percent / 100, seed))
    labelled = few(rows, 0.1, 100)
    write_csv(out / "tune.csv", labelled)
    write_csv(out / "tune-test.csv", few([row for row in rows if row not in set(labelled)], 0.1, 101))


def accuracy(run: Path) -> float | None:
    """Of the last evaluation of a finished run."""
    values = [line["top1"] for line in read_metrics(run / "metrics.jsonl") if "top1" in line]
    return values[-1] if values else None


def collect(out: Path, wanted: list[Job], epochs: float, percents: list[int], seeds: int) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    done = [job for job in wanted if (out / "jobs" / f"{job.name}.json").exists()]
    found = {job.name: accuracy(out / "runs" / job.name) for job in done}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "machine": {"gpu": gpu, "cores": os.cpu_count(), "cpu": platform.machine(), "torch": torch.__version__},
        "epochs": epochs,
        "commands": {job.name: shown(job, out) for job in done},
        "seconds": {job.name: json.loads((out / "jobs" / f"{job.name}.json").read_text())["seconds"] for job in done},
        "tried": {f"{n} epochs, rate {rate}": found.get(f"tune-{n}-{rate}") for n, rate in TRIED},
        "scores": [
            {"arm": arm, "labels": f"{percent}%", "seed": seed, "top1": value}
            for percent in percents
            for arm, name in [("scratch", "scratch"), *((title, name) for name, (title, *_) in ARMS.items())]
            for seed in range(seeds)
            if (value := found.get(f"{name}-{percent}-{seed}")) is not None
        ],
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of what was found."""
    comparison: Any = {
        "amounts": [{"labels": labels} for labels in dict.fromkeys(score["labels"] for score in found["scores"])],
        "arms": [
            {"name": "scratch", "against": None},
            *({"name": arm, "against": "scratch"} for arm, *_ in ARMS.values()),
        ],
        "scores": [{**score, "scores": {METRIC: score["top1"]}} for score in found["scores"]],
    }
    checked: Comparison = comparison
    return [cells(row) for row in compare(checked)]


def page(found: dict[str, Any], words: str) -> str:
    """The page.

    words: what we read in the numbers.
    """
    tried = [[name, "" if value is None else f"{100 * value:.1f}"] for name, value in found["tried"].items()]
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    example = [found["commands"].get(name) for name in ("hog", "hog-10-0", "scratch-10-0")]
    return f"""# Small images, few labels

{words.strip()}

Written by `studies/small_images.py` from `docs/small_images.json`. tiny20: 20 classes of Tiny ImageNet, 10,000
photographs without labels to pretrain on, 1,000 others to test on, 64 pixels. Brackets are 95 % intervals of the mean
over seeds (Student's t); each seed draws other labels and another head, the same for all starts. There is one
pretraining of each kind, so the spread is that of fine-tuning.

## By what is predicted

{machine}; {found["epochs"]:g} epochs of pretraining, {found["epochs"] * 10_000:,.0f} views.

{table(COLUMNS, rows(found), left=2)}

## What was tried of scratch

On 1,000 labels of a draw of its own, tested on training images that are held out, one seed:

{table(("", "top-1, %"), tried)}

## Commands

```text
{chr(10).join(text for text in example if text)}
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--out", type=Path, default=Path("runs/small_images"), help="where to write")
    parser.add_argument("--epochs", type=float, default=60, help="of pretraining [60]")
    parser.add_argument("--percents", type=int, nargs="+", default=[10, 5], help="shares of the labels [10 5]")
    parser.add_argument("--seeds", type=int, default=8, help="draws of the labels [8]")
    parser.add_argument("--at-once", type=int, default=8, help="commands at a time, each of one thread [8]")
    parser.add_argument("--only", nargs="*", default=[""], metavar="PREFIX", help="jobs whose names begin so")
    parser.add_argument("--docs", type=Path, help="the folder in which to write the page and its JSON")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.epochs, args.percents, args.seeds))
    wanted = [job for job in every if job.name.startswith(tuple(args.only))]
    if args.list:
        for job in wanted:
            print(f"# {job.name}\n{shown(job, out)}")
        return
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    prepare(args.shards, out, args.percents, args.seeds)
    schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, args.epochs, args.percents, args.seeds)
    write_text(out / "small_images.json", json.dumps(found, indent=1) + "\n")
    print("\n" + table(COLUMNS, rows(found), left=2))
    if args.docs:
        write_text(args.docs / "small_images.json", json.dumps(found, indent=1) + "\n")
        write_page(args.docs)


def write_page(docs: Path) -> None:
    """docs/small_images.md, of its JSON and of the words beside it."""
    found = json.loads((docs / "small_images.json").read_text())
    write_text(docs / "small_images.md", page(found, (docs / "results" / "small_images.md").read_text()))


if __name__ == "__main__":
    main()
