"""Does pretraining pay on small images with few labels, how much of it, predicting what? Makes docs/small_images.md.

    python studies/small_images.py SHARDS --out runs/small_images                 # a GPU with 16 cores: half an hour
    python studies/small_images.py SHARDS --out runs/small_images --at-once 1     # 2 cores: days
    python studies/small_images.py SHARDS --out runs/small_images --at-once 1 --only hog-p scratch-10 hog-10
    python studies/small_images.py SHARDS --out runs/small_images --list          # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Pretraining is `pretrain_small_images` and what differs
from it in one thing; fine-tuning is `finetune_small_images` on the same labels, in the same order, with the same head,
from each of these and from scratch. The rates of both are compared on training images that are held out, and the test
images are evaluated once, at the last step: they choose nothing. What is finished is not done again, and what was cut
off resumes. What is found is in OUT/small_images.json, and with `--docs` there too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from study import FCMAE, STUDIES, Job, add_arguments, chosen, facts, last_scores, paired, prepare_tiny20, schedule

from fcmae.atomic import write_text
from fcmae.evaluation.paired import cells
from fcmae.tables import table


class Arm(NamedTuple):
    """A way to start.

    Attributes:
        title: as it stands in the table.
        epochs: of pretraining, each of 10,000 views; 0 for scratch.
        flags: of pretraining, or of fine-tuning from scratch.
        seeds: draws, by per cent of the labels.
        part: of studies/objectives.py.
    """

    title: str
    epochs: int
    flags: tuple[str, ...]
    seeds: dict[int, int]
    part: str | None = None


MANY, FEW = {10: 8, 100: 3, 5: 8, 1: 8}, {10: 4}
RATES = ("--optim.base_lr=8e-3", "--optim.layer_decay=1")  # of scratch
PIXELS = "--model.target=pixels"
# A sparse view costs half the multiply-adds of a dense one: 350 epochs on 1,000 images are 60 and 600,000 such views.
ARMS = {
    "scratch350": Arm("scratch, 350 epochs", 0, (*RATES, "--epochs=350", "--optim.warmup_epochs=20"), {10: 3}),
    "scratch": Arm("scratch", 0, RATES, MANY),
    "hog150": Arm("HOG, 1,500,000 views", 150, (), MANY),
    "hog": Arm("HOG, 600,000 views", 60, (), {10: 8}),
    "hog20": Arm("HOG, 200,000 views", 20, (), {10: 8, 5: 8}),
    "ratio75": Arm("pixels, 75 % hidden", 60, (PIXELS, "--model.mask_ratio=0.75"), FEW),
    "pixels": Arm("pixels, 60 % hidden", 60, (PIXELS,), FEW),
    "multiscale": Arm("pixels, 60 % hidden, all stages decoded", 60, (PIXELS,), FEW, "multiscale"),
    "hog75": Arm("HOG, 75 % hidden", 60, ("--model.mask_ratio=0.75",), FEW),
    "hog-rate": Arm("HOG, twice the rate", 60, ("--optim.base_lr=2e-3",), FEW),
    "hog-four": Arm(
        "HOG, four stages, grid of 4 x 4",
        60,
        ("--model.variant={depths: [2, 2, 6, 2], dims: [40, 80, 160, 320], stem_stride: 2}", "--model.mask_patch=16"),
        FEW,
    ),
    "hog-masks": Arm("HOG, two masks an image, 300,000 views", 30, ("--data.masks_per_image=2",), FEW),
}
# By per cent of the labels, where it is not as in `finetune_small_images`: 360, 470, 940 and 3,100 steps.
BUDGETS = {
    1: ("--batch_size=32", "--epochs=120", "--optim.warmup_epochs=15"),
    100: ("--epochs=20", "--optim.warmup_epochs=2.5"),
}
# What is tried on training images that are held out, of 1,000 labels: start, epochs, rate, layer decay.
TRIED = (
    ("scratch", 60, "4e-3", "1"),
    ("scratch", 60, "8e-3", "1"),
    ("scratch", 60, "16e-3", "1"),
    ("scratch", 120, "8e-3", "1"),
    ("hog", 60, "4e-3", "0.9"),
    ("hog", 60, "2e-3", "0.9"),
    ("hog", 60, "8e-3", "0.9"),
    ("hog", 60, "4e-3", "0.75"),
    ("hog", 120, "4e-3", "0.9"),
)
# What is compared with another start than scratch.
PAIRS = (
    ("hog", "hog20"),
    ("hog150", "hog20"),
    ("hog150", "hog"),
    ("hog", "scratch350"),
    ("hog150", "scratch350"),
    ("hog", "ratio75"),
    ("hog", "pixels"),
    ("multiscale", "pixels"),
    ("hog75", "hog"),
    ("hog-rate", "hog"),
    ("hog-four", "hog"),
    ("hog-masks", "hog"),
)
COLUMNS = ("labels", "start", "seeds", "top-1, %", "against scratch, of each seed", "")


def jobs(out: Path, arms: list[str], at_once: int) -> Iterator[Job]:
    """All commands, seed by seed of each amount of labels: what is cut off has pairs."""
    # Where the cores are shared.
    pretraining = () if at_once == 1 else ("--data.num_workers=3",)
    tuning = () if at_once == 1 else ("--data.num_workers=1",)

    def finetune(name: str, labels: str, test: str, seed: int, start: str, *words: str) -> Job:
        paths = (f"--data.path={out}/{labels}", f"--data.val_path={out}/{test}", f"--out={out}/runs/{name}")
        command = (*FCMAE, "finetune", "--config=finetune_small_images", *paths)
        if not ARMS[start].epochs:
            return Job(name, (*command, f"--seed={seed}", *words, *tuning))
        init = f"--init={out}/runs/{start}-p"
        return Job(name, (*command, f"--seed={seed}", init, *words, *tuning), (f"{start}-p",))

    for name in arms:
        arm = ARMS[name]
        if arm.epochs:
            program = FCMAE if arm.part is None else (sys.executable, str(STUDIES / "objectives.py"), arm.part)
            words = ("pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt")
            more = (f"--epochs={arm.epochs}", "--data.val_share=0", f"--out={out}/runs/{name}-p", *arm.flags)
            yield Job(f"{name}-p", (*program, *words, *more, *pretraining))
    for percent in dict.fromkeys(percent for name in arms for percent in ARMS[name].seeds):
        for seed in range(max(MANY.values())):
            for name in arms:
                arm = ARMS[name]
                if seed < arm.seeds.get(percent, 0):
                    flags = (*BUDGETS.get(percent, ()), *(() if arm.epochs else arm.flags))
                    labels = f"train-{percent}-{seed}.csv"
                    yield finetune(f"{name}-{percent}-{seed}", labels, "test.csv", seed, name, *flags)
    for start, epochs, rate, decay in TRIED:
        if start in arms:
            flags = (f"--epochs={epochs}", f"--optim.base_lr={rate}", f"--optim.layer_decay={decay}")
            yield finetune(f"tune-{start}-{epochs}-{rate}-{decay}", "tune.csv", "tune-test.csv", 0, start, *flags)


def collect(out: Path, wanted: list[Job]) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    found = {name: line["top1"] for name, line in last_scores(out, wanted, "top1").items()}
    return {
        **facts(out, wanted),
        "tried": [
            {"arm": start, "epochs": epochs, "rate": rate, "layer_decay": decay, "top1": value}
            for start, epochs, rate, decay in TRIED
            if (value := found.get(f"tune-{start}-{epochs}-{rate}-{decay}")) is not None
        ],
        "scores": [
            {"arm": name, "percent": percent, "seed": seed, "top1": value}
            for name, arm in ARMS.items()
            for percent, seeds in arm.seeds.items()
            for seed in range(seeds)
            if (value := found.get(f"{name}-{percent}-{seed}")) is not None
        ],
    }


def compared(found: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Rows of a table: each of the starts against the other, seed by seed."""
    rows = []
    for name, other in pairs:
        seen = {arm: {(s["percent"], s["seed"]) for s in found["scores"] if s["arm"] == arm} for arm in (name, other)}
        both = seen[name] & seen[other]
        scores = [
            (s["arm"], f"{s['percent']}%", s["seed"], s["top1"])
            for s in found["scores"]
            if s["arm"] in seen and (s["percent"], s["seed"]) in both
        ]
        rows += [
            row._replace(gain=None, told="") if name == other else row
            for row in paired(scores, {other: other, name: other})
            if row.arm == name and row.gain
        ]
    rows.sort(key=lambda row: int(row.labels[:-1]))
    return [cells(row._replace(arm=ARMS[row.arm].title)) for row in rows]


def result(found: dict[str, Any]) -> str:
    """The table of all starts, by the amount of labels."""
    arms = dict.fromkeys(["scratch", *(score["arm"] for score in found["scores"])])
    return table(COLUMNS, compared(found, [(name, "scratch") for name in arms]), left=2)


def section(found: dict[str, Any]) -> str:
    """What was found on one machine."""
    tried = [
        (ARMS[one["arm"]].title, str(one["epochs"]), one["rate"], one["layer_decay"], f"{100 * one['top1']:.1f}")
        for one in found["tried"]
    ]
    pairs = [
        (row[0], f"{row[1]} - {ARMS[other].title}", row[2], *row[4:])
        for name, other in PAIRS
        for row in compared(found, [(name, other)])
    ]
    tables = [f"### Against scratch\n\n{result(found)}"]
    if pairs:
        columns = ("labels", "", "seeds", "difference of each seed", "")
        tables.append(f"### Against each other\n\n{table(columns, pairs, left=2)}")
    if tried:
        columns = ("start", "epochs", "rate", "layer decay", "top-1, %")
        tables.append(
            "### What was tried on training images that are held out\n\nFine-tuning on 1,000 labels of a draw of its "
            f"own, one seed.\n\n{table(columns, tried)}"
        )
    return "\n\n".join(tables)


def page(found: dict[str, dict[str, Any]], words: str) -> str:
    """The page.

    found: on each machine, by its name.
    words: what we read in the numbers.
    """
    commands: dict[str, str] = {}
    for one in found.values():
        commands = one["commands"] | commands
    example = [commands.get(name) for name in ("hog-p", "hog-10-0", "hog20-5-0", "scratch-10-0", "scratch350-10-0")]
    sections = "\n\n".join(
        f"## On {', '.join(f'{key} {value}' for key, value in one['machine'].items())}\n\n{section(one)}"
        for one in found.values()
    )
    return f"""# Small images, few labels

{words.strip()}

Written by `studies/small_images.py` from {", ".join(f"`docs/small_images_{name}.json`" for name in found)}. tiny20: 20
classes of Tiny ImageNet, 10,000 photographs without labels to pretrain on, 1,000 others to test on, 64 pixels. Brackets
are 95 % intervals of the mean over seeds (Student's t); each seed draws other labels and another head, the same for all
starts. There is one pretraining of each kind, so the spread is that of fine-tuning.

{sections}

## Commands

```text
{chr(10).join(text for text in example if text)}
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add_arguments(parser, "runs/small_images", at_once=12, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.arms, args.at_once))
    wanted = chosen(args, every)
    prepare_tiny20(args.shards, out, MANY)
    schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every)
    write_text(out / "small_images.json", json.dumps(found, indent=1) + "\n")
    print("\n" + result(found))
    if args.docs:
        name = "cpu" if found["machine"]["gpu"] == "none" else "gpu"
        write_text(args.docs / f"small_images_{name}.json", json.dumps(found, indent=1) + "\n")
        write_page(args.docs)


def write_page(docs: Path) -> None:
    """docs/small_images.md, of the JSON of each machine and of the words beside it."""
    write_text(docs / "small_images.md", page(read(docs), (docs / "results" / "small_images.md").read_text()))


def read(docs: Path) -> dict[str, dict[str, Any]]:
    """What was found, by machine."""
    paths = {name: docs / f"small_images_{name}.json" for name in ("gpu", "cpu")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    main()
