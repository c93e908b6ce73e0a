"""Is a pruned network worth more than the same shape trained otherwise (arXiv 1810.05270)? Of ConvNeXt V2, on tiny20.

    python studies/pruning.py run SHARDS --out runs/pruning                 # a GPU with many cores
    python studies/pruning.py run SHARDS --out runs/pruning --side 32 --epochs 30 --pretraining 20 --seeds 3 --at-once 2
    python studies/pruning.py run SHARDS --out runs/pruning --list          # the commands, without running them
    python studies/pruning.py ticket LARGE PRUNED DEST                      # what LARGE began with, cut as PRUNED is

SHARDS: the folder of tiny20's shards (see studies/sets.py). The large network, that of `finetune_small_images`, is
fine-tuned from scratch and after masked pretraining, on the same labels in the same order, and then pruned uniformly.
What stays is trained

| arm | starts from | epochs | rate |
| --- | --- | --- | --- |
| pruned, short | what was pruned, with its head | E / 4 | a tenth |
| pruned, full | the same | E | full |
| scratch, E | nothing | E | full |
| scratch, B | nothing | E x multiply-adds of the large / of the small | full |
| scratch, low | nothing | E | a tenth |
| small pretrained | its own masked pretraining, of as many multiply-adds as the large one's | E | full |
| pruned early | the large one's masked pretraining, pruned before any fine-tuning | E | full |
| ticket | what the large one began with, in the pruned shape | E | full |
| ticket, low | the same | E | a tenth |

The paper's short schedule is a quarter of the epochs at the rate that its steps end with; ours ends at nothing, so it
takes a tenth of the peak. After pretraining, the ticket is the pretrained encoder. What pruned costs before, the
training of the large one, is not counted against it in E and B, as in the paper. The test images are evaluated once, at
the last step: they choose nothing. What is finished is not done again, and what was cut off resumes. What is found is
in OUT/pruning.json, and with `--docs DIR` there too and at the end of DIR/pruning.md. The first line was not run yet.

The second line is an evening of 2 cores: on slow ones, while tests ran beside, an hour for the three pretrainings and
half an hour or more for each draw of the labels, 37 commands that train on as much as 15 x 30 x 1,000 images of the
large network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from study import (
    FCMAE,
    STUDIES,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    in_words,
    is_done,
    last_scores,
    paired,
    prepare_tiny20,
    schedule,
    write_found,
    write_section,
)

from fcmae import finetuning
from fcmae.config import FinetuneConfig
from fcmae.evaluation.paired import cells
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import load
from fcmae.pruning import Kept, What, cut, multiply_adds, uniformly
from fcmae.starting import starting_weights
from fcmae.tables import table
from fcmae.weights.files import read_weights, save_weights
from fcmae.weights.record import Weights

LARGE = ConvNeXtSpec(depths=(2, 2, 6), dims=(40, 80, 160), stem_stride=2)  # that of the two configurations
STARTS = ("scratch", "pretrained")
RATES = {
    "scratch": (8e-3, 1.0),
    "pretrained": (4e-3, 0.9),
}  # base_lr and layer_decay, as studies/small_images.py has them
LOW = 0.1  # of the rate
SHORT = 0.25  # of the epochs
# By name: the job of it, and what it is compared with, seed by seed.
ARMS: dict[str, tuple[str, str | None]] = {
    "large": ("{start}-large", None),
    "scratch, E": ("scratch-e", None),
    "scratch, B": ("scratch-b", "scratch, E"),
    "small pretrained": ("pretrained-small", "scratch, B"),
    "pruned early": ("pretrained-early", "small pretrained"),
    "pruned, short": ("{start}-short", "scratch, E"),
    "pruned, full": ("{start}-full", "scratch, B"),
    "ticket": ("{start}-lottery", "scratch, E"),
    "scratch, low": ("scratch-low", "scratch, E"),
    "ticket, low": ("{start}-lottery-low", "scratch, low"),
}
HEADING = "## Is it worth it?"
COLUMNS = ("large and what stays", "small", "seeds", "top-1, %", "difference of each seed", "", "to")


class Shape(NamedTuple):
    """What uniform pruning keeps."""

    what: What
    keep: float

    @property
    def name(self) -> str:
        return f"{self.what}-{self.keep:g}"

    @property
    def spec(self) -> ConvNeXtSpec:
        return uniformly(LARGE, self.keep, self.what)

    @property
    def factor(self) -> float:
        """How many times the multiply-adds of the small network the large one takes."""
        large, small = (multiply_adds(Encoder(spec).eval(), (32, 32)) for spec in (LARGE, self.spec))
        return large / small


class Budget(NamedTuple):
    """What is spent.

    epochs: E, of fine-tuning. pretraining: epochs of the large network's. percent: of the labels. side: in pixels.
    """

    epochs: float
    pretraining: float
    percent: int
    seeds: int
    side: int = 64


def jobs(out: Path, budget: Budget, shapes: Sequence[Shape]) -> Iterator[Job]:
    """All commands, in an order in which each finds what it needs."""
    yield pretrain(out, "large", LARGE, budget)
    for shape in shapes:
        yield pretrain(out, f"small-{shape.name}", shape.spec, budget, shape.factor)
        yield prune(out, shape, f"early-{shape.name}", "large", out / "runs" / "large")
    for seed in range(budget.seeds):
        for start in STARTS:
            init, needs = (None, ()) if start == "scratch" else (out / "runs" / "large", ("large",))
            yield finetune(out, budget, f"{start}-large-{seed}", seed, LARGE, RATES[start], init=init, needs=needs)
        for shape in shapes:
            yield from of_shape(out, budget, shape, seed)


def of_shape(out: Path, budget: Budget, shape: Shape, seed: int) -> Iterator[Job]:
    """What is done with one small network and one draw of the labels."""
    end = f"{shape.name}-{seed}"

    def tune(name: str, start: str, share: float = 1, rate: float = 1, **more: Any) -> Job:
        rates = (rate * RATES[start][0], RATES[start][1])
        shortened = budget._replace(epochs=share * budget.epochs)
        return finetune(out, shortened, f"{name}-{end}", seed, shape.spec, rates, **more)

    yield tune("scratch-e", "scratch")
    yield tune("scratch-b", "scratch", shape.factor)
    yield tune("scratch-low", "scratch", rate=LOW)
    small = f"small-{shape.name}"
    yield tune("pretrained-small", "pretrained", init=out / "runs" / small, needs=(small,))
    early = f"early-{shape.name}"
    yield tune("pretrained-early", "pretrained", init=out / weights(early), needs=(early,))
    for start in STARTS:
        large, pruned, ticket = f"{start}-large-{seed}", f"{start}-pruned-{end}", f"{start}-ticket-{end}"
        kept, began = out / weights(pruned), out / weights(ticket)
        yield prune(out, shape, pruned, large, out / "runs" / large / "last")
        words = [str(STUDIES / "pruning.py"), "ticket", *map(str, (out / "runs" / large, kept, began))]
        yield Job(ticket, (sys.executable, *words), (pruned,))
        yield tune(f"{start}-short", start, SHORT, LOW, init=kept, needs=(pruned,), keeps_head=True)
        yield tune(f"{start}-full", start, init=kept, needs=(pruned,), keeps_head=True)
        yield tune(f"{start}-lottery", start, init=began, needs=(ticket,), keeps_head=True)
        yield tune(f"{start}-lottery-low", start, rate=LOW, init=began, needs=(ticket,), keeps_head=True)


def weights(name: str) -> str:
    return f"weights/{name}.safetensors"


def prune(out: Path, shape: Shape, name: str, needs: str, whole: Path) -> Job:
    words = ["prune", str(whole), str(out / weights(name)), f"--data={out}/tiny20/unlabeled.txt"]
    flags = [f"--keep={shape.keep}", f"--what={shape.what}"]
    return Job(name, (*FCMAE, *words, *flags), (needs,))


def pretrain(out: Path, name: str, spec: ConvNeXtSpec, budget: Budget, factor: float = 1) -> Job:
    epochs = budget.pretraining * factor
    flags = {
        "data.image_size": budget.side,
        "data.path": out / "tiny20" / "unlabeled.txt",
        "data.val_share": 0,
        "model.variant": numbers(spec),
        "epochs": f"{epochs:.4g}",
        "optim.warmup_epochs": f"{epochs / 20:.4g}",
        "batch_size": 256,  # four times what is shipped
        "optim.base_lr": "1e-3",
    }
    return command(out, name, "pretrain", flags, ())


def finetune(
    out: Path, budget: Budget, name: str, seed: int, spec: ConvNeXtSpec, rates: tuple[float, float], *,
    init: Path | str | None = None, needs: tuple[str, ...] = (), keeps_head: bool = False,
) -> Job:  # fmt: skip
    flags = {
        "data.path": out / f"train-{budget.percent}-{seed}.csv",
        "data.val_path": out / "test.csv",
        "data.image_size": budget.side,
        "seed": seed,
        "model.variant": numbers(spec),
        "epochs": f"{budget.epochs:.4g}",
        "optim.warmup_epochs": f"{budget.epochs / 8:.4g}",
        "log.eval_epochs": f"{budget.epochs:.4g}",
        "checkpoint.every_epochs": f"{budget.epochs:.4g}",
        "optim.base_lr": f"{rates[0]:.4g}",
        "optim.layer_decay": rates[1],
        **({} if init is None else {"init": init}),
        **({"model.keep_head": "true"} if keeps_head else {}),
    }
    return command(out, name, "finetune", flags, needs)


def command(out: Path, name: str, verb: str, flags: Mapping[str, object], needs: tuple[str, ...]) -> Job:
    words = [f"--config={verb}_small_images", *(f"--{key}={value}" for key, value in flags.items())]
    return Job(name, (*FCMAE, verb, *words, f"--out={out}/runs/{name}"), needs)


def numbers(spec: ConvNeXtSpec) -> str:
    return spec.model_dump_json(exclude_defaults=True)


# The lottery ticket


def ticket(run: Path, pruned: Path, dest: Path) -> None:
    """Write what the fine-tuning of the large network began with, its head too, in the pruned shape."""
    cfg = load(FinetuneConfig, ["--config", str(run / "config.yaml")], prog="ticket")
    whole, small = read_weights(run / "last"), read_weights(pruned)
    net = finetuning.build_model(cfg, starting_weights(cfg), whole.architecture.num_classes)
    first = replace(whole, state=dict(net.state_dict()), expected_output=())
    save_weights(dest, cut(first, kept_of(whole, small)), "fcmae")


def kept_of(whole: Weights, small: Weights) -> Kept:
    """What of a network is in a pruned one, by the rows of pwconv1, which pruning leaves as they are."""
    kept = {}
    for i, depth in enumerate(small.architecture.spec.depths):
        for n in range(depth):
            there = small.state[f"encoder.stages.{i}.{n}.dwconv.weight"]
            names = [f"stages.{i}.{j}" for j in range(whole.architecture.spec.depths[i])]
            block = next(name for name in names if torch.equal(whole.state[f"encoder.{name}.dwconv.weight"], there))
            rows, stay = (
                w.state[f"encoder.{b}.pwconv1.weight"] for w, b in ((whole, block), (small, f"stages.{i}.{n}"))
            )
            kept[block] = (stay[:, None] == rows).all(-1).int().argmax(1)
    return kept


# What was found


def run_of(arm: str, start: str, shape: Shape, seed: int) -> str:
    """The name of the job that is an arm's for one large network."""
    name = ARMS[arm][0].format(start=start)
    return f"{name}-{seed}" if arm == "large" else f"{name}-{shape.name}-{seed}"


def arms_of(start: str) -> list[str]:
    """Without masked pretraining of the large one, there is none of the small one."""
    return [arm for arm, (job, _) in ARMS.items() if start == "pretrained" or not job.startswith("pretrained")]


def against(arm: str, group: str) -> str | None:
    """What an arm is compared with: after pretraining, a pruned network with the small one that was pretrained too."""
    return "small pretrained" if arm == "pruned, full" and group.startswith("pretrained") else ARMS[arm][1]


def collect(out: Path, wanted: list[Job], budget: Budget, shapes: Sequence[Shape]) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    lines = last_scores(out, wanted, "top1")
    return {
        **facts(out, wanted),
        "budget": budget._asdict(),
        "factors": {shape.name: shape.factor for shape in shapes},
        "scores": [
            {"group": f"{start}, {shape.name}", "arm": arm, "seed": seed, "top1": line["top1"]}
            for start in STARTS
            for shape in shapes
            for arm in arms_of(start)
            for seed in range(budget.seeds)
            if (line := lines.get(run_of(arm, start, shape, seed)))
        ],
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of what was found."""
    lines = []
    for group in dict.fromkeys(score["group"] for score in found["scores"]):
        scores = [(s["arm"], group, s["seed"], s["top1"]) for s in found["scores"] if s["group"] == group]
        for row in paired(scores, {arm: against(arm, group) for arm in ARMS}):
            lines.append([group, *cells(row)[1:], (against(row.arm, group) or "") if row.gain else ""])
    return lines


def section(found: dict[str, Any]) -> str:
    """The study's part of the page."""
    budget = found["budget"]
    factors = ", ".join(f"{name} {1 / factor:.2f}" for name, factor in found["factors"].items())
    return f"""{table(COLUMNS, rows(found), left=2)}

Written by `studies/pruning.py` from `docs/pruning.json`. scratch, E and B: the small network, for E epochs, and for the
multiply-adds of E epochs of the large one. pruned: the fine-tuned large network, pruned, and trained for E (full), or
for E / 4 at a tenth of the rate (short). pruned early: pruned before any fine-tuning. ticket: what the large one began
with (after pretraining, the pretrained encoder), in the pruned shape. low: at a tenth of the rate.

tiny20 at {budget["side"]} pixels, {budget["percent"]} % of the labels; brackets are 95 % intervals of the mean over
seeds (Student's t); a seed
draws the same labels for every arm. E is {budget["epochs"]:g} epochs; the large network was pretrained for
{budget["pretraining"]:g}, once. Multiply-adds of what stays, of the large one's: {factors}.
{in_words(found["machine"])}.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="the study")
    run.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    add_arguments(run, "runs/pruning", at_once=8, has_page=True)
    run.add_argument("--epochs", type=float, default=60, help="of fine-tuning, E [60]")
    run.add_argument("--pretraining", type=float, default=60, help="epochs of the large network's [60]")
    run.add_argument("--percent", type=int, default=10, help="share of the labels [10]")
    run.add_argument("--seeds", type=int, default=5, help="draws of the labels [5]")
    run.add_argument("--side", type=int, default=64, help="of the images, in pixels, a multiple of 8 [64]")
    run.add_argument("--what", nargs="+", choices=get_args(What), default=list(get_args(What)), help="[both]")
    run.add_argument("--keep", nargs="+", type=float, default=[0.5], help="shares that stay [0.5]")
    one = verbs.add_parser("ticket", help="what a fine-tuning began with, in the shape of a pruned network")
    for name in ("run", "pruned", "dest"):
        one.add_argument(name, type=Path, metavar=name.upper())
    args = parser.parse_args(argv)
    if args.verb == "ticket":
        ticket(args.run, args.pruned, args.dest)
        return
    out, budget = args.out.absolute(), Budget(args.epochs, args.pretraining, args.percent, args.seeds, args.side)
    shapes = [Shape(what, keep) for what in args.what for keep in args.keep]
    every = list(jobs(out, budget, shapes))
    wanted = chosen(args, every, "pruning.json")
    for job in wanted:  # what was written by a command whose end was not seen
        if not is_done(job, out):
            (out / weights(job.name)).unlink(missing_ok=True)
    prepare_tiny20(args.shards, out, {budget.percent: budget.seeds})
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, budget, shapes)
    print("\n" + table(COLUMNS, rows(found), left=2))
    for folder in filter(None, (out, args.docs)):
        write_found(folder / "pruning.json", found)
    if args.docs:
        write_section(args.docs, "pruning", HEADING, section)
    end(failed)


if __name__ == "__main__":
    main()
