"""What does each step from ResNet to ConvNeXt give on small images, and what did it give where it was published?

    python studies/roadmap.py SHARDS --out runs/roadmap                      # a GPU with many cores
    python studies/roadmap.py SHARDS --out runs/roadmap --side 48 --epochs 3 --seeds 3 --at-once 2 --rate 4e-3
    python studies/roadmap.py SHARDS --out runs/roadmap --list               # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). The steps are those of `fcmae roadmap roadmap-small`,
a third of the published depth and a quarter of the width, each trained from scratch by the published recipe
(`finetune_roadmap`) with a batch and a rate for fewer images. A seed has the same images, order and augmentation at
every step. The rates are compared on a tenth of the training images, for the first step and the last: the better one on
average is for --rate. The test images are evaluated once, at the last epoch. What is finished is not done again, and
what was cut off resumes. Before the runs forward and backward are timed, all networks in turn: let nothing else run
beside. What is found is in OUT/roadmap.json, and with `--docs DIR` there too and at the end of DIR/roadmap.md.

The second line took two hours on 2 cores: 54 runs of 3 x 10,000 images of 48 pixels, two at a time with some 160 images
a second each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fcmae import threads

threads.prepare()  # as the commands do, before torch is loaded

import torch
import torch.nn.functional as F
from study import (
    FCMAE,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    in_words,
    last_scores,
    prepare_tiny20,
    save,
    schedule,
    this_machine,
    write_found,
    write_section,
)

from fcmae.atomic import write_text
from fcmae.evaluation.paired import in_percent, tell
from fcmae.evaluation.probes import mean_and_interval
from fcmae.heads import Classifier
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import REGIMES, road
from fcmae.roadmap import cost, percent
from fcmae.tables import table
from fcmae.timing import in_turn, quartiles

REGIME, STRIDE, CLASSES = "roadmap-small", 2, 20
THERE = REGIMES["roadmap"].published
STEPS = road(REGIMES[REGIME])
RATES = ("1e-3", "2e-3", "4e-3")
BATCH, TIMED = 64, 32  # images
HEADING = "## What each step gave here and there"
COLUMNS = (
    "step", "what changes", "MMACs", "ms an image", "there, %", "gain", "seeds", "here, %", "gain, of each seed", "",
)  # fmt: skip


def jobs(
    out: Path, percent: int, epochs: float, seeds: int, rate: str, side: int = 64, at_once: int = 1
) -> Iterator[Job]:
    """All commands, the comparison of rates first."""
    workers = {} if at_once == 1 else {"data.num_workers": 1}  # where the cores are shared

    def train(name: str, step: str, rate: str, data: str, test: str, seed: int) -> Job:
        flags = {
            "data.path": f"{out}/{data}",
            "data.val_path": f"{out}/{test}",
            "data.image_size": side,
            "data.crop_pct": 1,
            "data.crop_scale": "0.35,1",
            "model.variant": f"{REGIME}/{step}",
            "model.stem_stride": STRIDE,
            "batch_size": BATCH,
            "grad_accum": 1,  # BatchNorm's statistics are of the whole batch; and nothing is measured at each start
            "epochs": f"{epochs:g}",
            "optim.base_lr": rate,
            "optim.warmup_epochs": f"{epochs / 15:g}",  # 20 of 300, as published
            "log.eval_epochs": f"{epochs:g}",
            "checkpoint.every_epochs": f"{max(1, epochs / 10):g}",
            "seed": seed,
            "out": f"{out}/runs/{name}",
            **workers,
        }
        words = ("finetune", "--config=finetune_roadmap", *(f"--{key}={value}" for key, value in flags.items()))
        return Job(name, (*FCMAE, *words))

    for step in (STEPS[0].name, STEPS[-1].name):
        for tried in RATES:
            yield train(f"tune-{step}-{tried}", step, tried, f"tune-{percent}-0.csv", f"tune-test-{percent}-0.csv", 0)
    for seed in range(seeds):
        for each in STEPS:
            yield train(f"{each.name}-{seed}", each.name, rate, f"train-{percent}-{seed}.csv", "test.csv", seed)


def measure(repeats: int, side: int = 64, batch: int = TIMED) -> dict[str, list[float]]:
    """Milliseconds an image of forward and backward, all networks in turn: first quartile, median and third."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    images, target = torch.randn(batch, 3, side, side, device=device), torch.arange(batch, device=device) % CLASSES

    def step(model: Classifier) -> None:
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), target))

    models = {
        each.name: Classifier(make_encoder(each.spec.model_copy(update={"stem_stride": STRIDE})), CLASSES).to(device)
        for each in STEPS
    }
    times = in_turn({name: partial(step, model) for name, model in models.items()}, repeats, 2, device)
    return {name: [1000 * value / batch for value in quartiles(values)] for name, values in times.items()}


def collect(out: Path, wanted: list[Job], percent: int, epochs: float, rate: str, side: int) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    found = {name: scores["top1"] for name, scores in last_scores(out, wanted, "top1").items()}
    runs = {name: name.rpartition("-") for name in found if not name.startswith("tune-")}
    return {
        **facts(out, wanted),
        "regime": REGIME,
        "data": f"tiny20, {side} px, {percent} % of the labels",
        "percent": percent,
        "epochs": epochs,
        "rate": rate,
        "side": side,
        "time": json.loads((out / "time.json").read_text()),
        "tried": {name.removeprefix("tune-"): value for name, value in found.items() if name.startswith("tune-")},
        "scores": [{"step": step, "seed": int(seed), "top1": found[name]} for name, (step, _, seed) in runs.items()],
    }


def gains(found: dict[str, Any]) -> dict[str, list[float]]:
    """What each step gave over the one that it changes, of each seed that both have."""
    scores = {(score["step"], score["seed"]): score["top1"] for score in found["scores"]}
    return {
        step.name: [value - scores[step.of, seed] for (name, seed), value in scores.items()
                    if name == step.name and (step.of, seed) in scores]
        for step in STEPS
    }  # fmt: skip


def gain_there(step: str, of: str) -> float | None:
    """In points of top-1, where both are published."""
    return round(THERE[step] - THERE[of], 1) if step in THERE and of in THERE else None


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """The table, a line a step."""
    given = gains(found)
    for step in STEPS:
        values = [score["top1"] for score in found["scores"] if score["step"] == step.name]
        macs = cost(step.spec.model_copy(update={"stem_stride": STRIDE}), found["side"], CLASSES).multiply_adds
        there, differences = gain_there(step.name, step.of), given[step.name]
        yield [
            step.name,
            step.line,
            f"{macs / 1e6:.1f}",
            f"{found['time']['ms_per_image'][step.name][1]:.2f}",
            f"{THERE[step.name]:.1f}" if step.name in THERE else "",
            "" if there is None else f"{there:+.1f}",
            str(len(values)),
            percent(values),
            points(differences),
            tell(differences) if differences else "",
        ]


def points(differences: list[float]) -> str:
    """Mean in points, with its sign, and its 95 % interval."""
    return in_percent(mean_and_interval(differences), "+.1f") if differences else ""


def draw(found: dict[str, Any], path: Path) -> None:
    """What each step gave here, with its 95 % interval, and there."""
    from matplotlib.figure import Figure

    given, steps = gains(found), STEPS[1:]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="grey", linewidth=0.8)
    there = [(i, gain) for i, step in enumerate(steps) if (gain := gain_there(step.name, step.of)) is not None]
    axis.plot([i - 0.12 for i, _ in there], [gain for _, gain in there], "D", label="there: ImageNet-1k, published")
    here = [(i, *mean_and_interval(given[step.name])) for i, step in enumerate(steps) if given[step.name]]
    axis.errorbar(
        [i + 0.12 for i, *_ in here],
        [100 * mean for _, mean, _ in here],
        [50 * (interval[1] - interval[0]) if interval else 0 for *_, interval in here],
        fmt="o",
        capsize=3,
        label="here: tiny20, mean and 95 % interval",
    )
    axis.set_xticks(range(len(steps)), [step.name for step in steps], rotation=40, ha="right")
    axis.set(ylabel="gain over the step that it changes,\npoints of top-1")
    figure.legend(loc="outside upper center", ncols=2)
    save(figure, path)


def section(found: dict[str, Any]) -> str:
    """The study's part of the page."""
    tried = [[name, f"{100 * value:.1f}"] for name, value in found["tried"].items()]
    example = [found["commands"][name] for name in ("resnet-0", "downsampling-0") if name in found["commands"]]
    return f"""![Gains of the steps](roadmap.svg)

{table(COLUMNS, rows(found), left=2)}

There: ImageNet-1k at 224 pixels, as published. Here: `{REGIME}` on tiny20, 20 classes of Tiny ImageNet at
{found["side"]} pixels, {found["percent"]} % of 10,000 labelled photographs, 1,000 others to test on,
{found["epochs"]:g} epochs by the published recipe but for crops, of 35 % of the area and more, a batch of {BATCH} and a
base_lr of {found["rate"]}; {in_words(found["machine"])}. A gain is over the step that it changes, of each seed
with the same images, order and augmentation; brackets are 95 % intervals of the mean (Student's t), all tested on the
same images. There are {len(STEPS) - 1} of them: one in twenty misses by chance. Multiply-adds are of one image; times
of forward and backward of {TIMED} images, all networks in turn, the median; {in_words(found["time"]["machine"])}.
Written by `studies/roadmap.py` from `docs/roadmap.json`.

Rates that were compared, tested on 900 training images that were held out, one run each:

{table(("", "top-1, %"), tried)}

```text
{chr(10).join(example)}
```
"""


def write_page(docs: Path) -> None:
    """The end of docs/roadmap.md and its figure, of docs/roadmap.json and the words in docs/results/roadmap.md."""
    write_section(docs, "roadmap", HEADING, section)
    draw(json.loads((docs / "roadmap.json").read_text()), docs / "roadmap.svg")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels, a multiple of 16 [64]")
    parser.add_argument("--percent", type=int, default=100, help="of the labels [100]")
    parser.add_argument("--epochs", type=float, default=100, help="of training [100]")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each step [5]")
    parser.add_argument("--rate", default=RATES[1], help=f"base_lr of all steps, for 256 images [{RATES[1]}]")
    parser.add_argument("--repeats", type=int, default=20, help="turns that are timed [20]")
    add_arguments(parser, "runs/roadmap", at_once=8, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.percent, args.epochs, args.seeds, args.rate, args.side, args.at_once))
    wanted = chosen(args, every, "roadmap.json")
    prepare_tiny20(args.shards, out, {args.percent: args.seeds})
    place, of = out / "time.json", {"side": args.side, "repeats": args.repeats}
    there = json.loads(place.read_text()) if place.exists() else {}
    if any(there.get(key) != value for key, value in of.items()):
        times = {"machine": this_machine(), "ms_per_image": measure(args.repeats, args.side), **of}
        write_text(place, json.dumps(times))
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, args.percent, args.epochs, args.rate, args.side)
    print("\n" + table(COLUMNS, rows(found), left=2))
    for folder in filter(None, (out, args.docs)):
        write_found(folder / "roadmap.json", found)
    if args.docs:
        write_page(args.docs)
    end(failed)


if __name__ == "__main__":
    main()
