"""Does pretraining pay with 1, 5, 10 and 100 % of the labels, on two cores?

    python studies/labels.py SHARDS --out runs/labels           # 2 cores: 27 h
    python studies/labels.py SHARDS --out runs/labels --list    # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Pretraining is `pretrain_small_images`, at 48 pixels, once
for 200,000 views, once for 1,000,000 and once for all its 1,500,000; the first is the arm `again` of studies/recipe.py,
and OUT may be that study's folder, which has it. Fine-tuning is `finetune_small_images`, with the same labels, order
and head for all arms, and is tested on the test images once, at its last step. Scratch on few labels has the learning
rate that was the best with 10 % of them (docs/small_images.md), and TRIED compares it with others at 5 %, on training
images held out. What is finished is not done again, and what was cut off resumes. What is found is in OUT/labels.json,
and with --docs in labels.json there, which `studies/results.py` puts into docs/results.md, with what we read in it,
docs/results/labels.md.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import recipe
import small_images
from study import (
    CONTROLS,
    FCMAE,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    in_words,
    last_scores,
    prepare_tiny20,
    probe,
    schedule,
    write_found,
)

from fcmae.atomic import write_text
from fcmae.evaluation.paired import cells, in_percent
from fcmae.evaluation.probes import mean_and_interval
from fcmae.tables import table

FEW, ALL = {5: 8, 10: 8, 1: 8}, {100: 3}  # draws by per cent of the labels, in the order in which they are run
VIEWS = {"again-p": 20, "mid-p": 100, "long-p": 150}  # epochs of each pretraining, of 10,000 views


class Arm(NamedTuple):
    """A way to start, and to use the labels.

    Attributes:
        title: as it stands in the table.
        seeds: their number, by per cent of the labels.
        start: the job of pretraining; None for scratch.
        rate: of learning from scratch, for 256 images.
        epochs: of fine-tuning; None for those of `finetune_small_images`.
    """

    title: str
    seeds: Mapping[int, int]
    start: str | None = None
    rate: str | None = None
    epochs: int | None = None


# A sparse view costs some .57 of a dense one in seconds on two cores, and half in multiply-adds: with 10,000 labels
# 200,000 views and 8 epochs are 20 epochs from scratch; with 500 these views and 60 epochs are 290, and 1,000,000 views
# 1,060. The others look whether either side still rises.
ARMS = {
    "few": Arm("scratch", FEW, rate="2e-3"),
    "equal": Arm("scratch, 290 epochs", {5: 5}, rate="2e-3", epochs=290),
    "equalmid": Arm("scratch, 1,060 epochs", {5: 3}, rate="2e-3", epochs=1060),
    "short": Arm("pretrained, 200,000 views", {5: 8, 10: 4, 1: 8}, "again-p"),
    "mid": Arm("pretrained, 1,000,000 views", FEW, "mid-p"),
    "long": Arm("pretrained, 1,500,000 views", {5: 8, 10: 4}, "long-p"),
    "scratch": Arm("scratch, 20 epochs at 8e-3", ALL, rate="8e-3", epochs=20),
    "lower": Arm("scratch, 20 epochs at 4e-3", ALL, rate="4e-3", epochs=20),
    "lower40": Arm("scratch, 40 epochs at 4e-3", ALL, rate="4e-3", epochs=40),
    "tuned8": Arm("pretrained, 200,000 views, 8 epochs", ALL, "again-p", epochs=8),
    "mid8": Arm("pretrained, 1,000,000 views, 8 epochs", ALL, "mid-p", epochs=8),
    "mid20": Arm("pretrained, 1,000,000 views, 20 epochs", ALL, "mid-p", epochs=20),
}
PAIRS = (
    ("few", None),
    ("equal", "few"),
    ("equalmid", "few"),
    ("short", "few"),
    ("short", "equal"),
    ("mid", "few"),
    ("mid", "equal"),
    ("mid", "equalmid"),
    ("mid", "short"),
    ("long", "few"),
    ("long", "short"),
    ("long", "mid"),
    ("scratch", None),
    ("lower", "scratch"),
    ("lower40", "lower"),
    ("tuned8", "scratch"),
    ("tuned8", "lower"),
    ("mid8", "tuned8"),
    ("mid8", "lower"),
    ("mid8", "lower40"),
    ("mid20", "mid8"),
    ("mid20", "lower"),
    ("mid20", "lower40"),
)
COLUMNS = ("labels", "start", "compute", "seeds", "top-1, %", "against", "difference of each seed", "")
OVERVIEW = ("few", "short", "mid", "long")


class Trial(NamedTuple):
    """Settings of fine-tuning that are tried on training images that are held out."""

    start: str | None
    rate: str
    epochs: int

    @property
    def started(self) -> str:
        """What it starts from, in words."""
        return "scratch" if self.start is None else f"pretrained, {10_000 * VIEWS[self.start]:,} views"

    @property
    def title(self) -> str:
        """What is tried."""
        return f"{self.started}, {self.epochs} epochs at {self.rate}"

    def run(self, seed: int) -> str:
        """Its name."""
        return f"tune-{self.start or 'scratch'}-{self.rate}-{self.epochs}-{seed}"


TRIED_ON, TRIALS = 5, 3  # per cent of the labels; draws
TRIED = (
    *(Trial(None, rate, 60) for rate in ("1e-3", "2e-3", "4e-3")),
    # Until it no longer rises.
    Trial(None, "2e-3", 120),
    *(Trial("mid-p", "4e-3", epochs) for epochs in (60, 120)),
)


def run_name(arm: str, percent: int, seed: int) -> str:
    return f"{arm}-{seed}" if percent == 100 else f"{arm}-{percent}-{seed}"


def epochs_of(epochs: int) -> tuple[str, ...]:
    """Flags of fine-tuning for as long; the warm-up is an eighth, as in the config, and the evaluation at the end."""
    last = (f"--log.eval_epochs={epochs}",) if epochs > 60 else ()
    return (f"--epochs={epochs}", f"--optim.warmup_epochs={epochs / 8:g}", *last)


EPOCHS = {1: 120, 5: 60, 10: 60}  # of fine-tuning, by per cent of the labels: 60 in the config
BUDGETS = {1: ("--batch_size=32", *epochs_of(EPOCHS[1]))}  # where the config has too few steps
PROBED = (("pretrained", "again-p"), ("mid", "mid-p"))  # names of probes, and what they look at


def jobs(out: Path, size: int, at_once: int) -> Iterator[Job]:
    """All commands: pretraining, what is tried, arms seed by seed, and features without fine-tuning."""
    workers = () if at_once == 1 else ("--data.num_workers=1",)

    def finetune(
        name: str, draw: str, test: str, seed: int, start: str | None, rate: str | None, budget: tuple[str, ...]
    ) -> Job:
        words = (
            "finetune", "--config=finetune_small_images", f"--data.path={out}/{draw}.csv",
            f"--data.val_path={out}/{test}.csv", f"--data.image_size={size}", f"--seed={seed}", *budget,
            f"--out={out}/runs/{name}", *(() if rate is None else (f"--optim.base_lr={rate}",)),
        )  # fmt: skip
        if start is None:
            return Job(name, (*FCMAE, *words, "--optim.layer_decay=1", *workers))
        return Job(name, (*FCMAE, *words, *workers, f"--init={out}/runs/{start}"), (start,))

    for name, epochs in VIEWS.items():
        flags = recipe.ARMS["again"].flags if name == "again-p" else ()
        yield recipe.pretraining(out, name, epochs, size, at_once, flags, FCMAE)
    for one in TRIED:
        for seed in range(TRIALS):
            draws = (f"tune-{TRIED_ON}-{seed}", f"tune-test-{TRIED_ON}-{seed}")
            yield finetune(one.run(seed), *draws, seed, one.start, one.rate, epochs_of(one.epochs))
    for percent, seeds in (FEW | ALL).items():
        for seed in range(seeds):
            for name, arm in ARMS.items():
                if seed < arm.seeds.get(percent, 0):
                    budget = BUDGETS.get(percent, ()) if arm.epochs is None else epochs_of(arm.epochs)
                    run, draw = run_name(name, percent, seed), f"train-{percent}-{seed}"
                    yield finetune(run, draw, "test", seed, arm.start, arm.rate, budget)
    for name, start in PROBED:
        yield probe(f"probe-{name}", f"{out}/runs/{start}", out, out, (start,), *small_images.PROBES)
    yield probe("probe-random", f"random:{out}/runs/again-p", out, out, ("again-p",), *small_images.PROBES)
    for name, (model, _) in CONTROLS.items():
        yield probe(f"probe-{name}", model, out, out, (), *small_images.PROBES, "--image-size", str(size))


def collect(out: Path, every: list[Job]) -> dict[str, Any]:
    """What the runs that are done have found."""
    found = {name: line["top1"] for name, line in last_scores(out, every, "top1").items()}
    return {
        "tried": [
            {**one._asdict(), "seed": seed, "top1": found[run]}
            for one in TRIED
            for seed in range(TRIALS)
            if (run := one.run(seed)) in found
        ],
        "scores": [
            {"arm": name, "percent": percent, "seed": seed, "top1": found[run]}
            for name, arm in ARMS.items()
            for percent, seeds in arm.seeds.items()
            for seed in range(seeds)
            if (run := run_name(name, percent, seed)) in found
        ],
        "probes": small_images.probed(out, every),
    }


def compute(arm: Arm, percent: int) -> int:
    """The compute of pretraining and fine-tuning, in that of dense views of one image; a sparse one is half of one."""
    views = 0 if arm.start is None else 10_000 * VIEWS[arm.start]
    return views // 2 + 100 * percent * (arm.epochs or EPOCHS[percent])


def overview(found: Mapping[str, Any]) -> str:
    """A table of few labels: accuracy and gain over scratch, by pretraining and amount of labels."""
    lines = []
    for name in OVERVIEW:
        arm, line = ARMS[name], {}
        for row in small_images.differences(found["scores"], [(name, "few")]):
            _, _, num, top1, gain, _ = cells(row)
            few = "" if row.num == FEW[int(row.labels[:-1])] else f", {num} draws"
            line[row.labels] = f"{top1.partition(' ')[0]}{'' if name == 'few' else f', {gain}'}{few}"
        seconds = found["seconds"].get(arm.start)
        minutes = "" if seconds is None else f"{seconds / 60:.0f}"
        lines.append([arm.title, minutes, *(line.get(f"{percent}%", "not run") for percent in sorted(FEW))])
    columns = ("start", "minutes", *(f"{100 * percent:,} labels" for percent in sorted(FEW)))
    return f"Top-1 in %, and the gain over scratch, draw by draw:\n\n{table(columns, lines, left=1)}"


def result(found: Mapping[str, Any]) -> str:
    """The table: by amount of labels each arm against others, seed by seed where both have run."""
    rows: list[tuple[int, list[str]]] = []
    for name, other in PAIRS:
        for row in small_images.differences(found["scores"], [(name, other or name)]):
            percent = int(row.labels[:-1])
            labels, _, num, top1, *difference = cells(row)
            used = f"{compute(ARMS[name], percent) / 1000:,.0f}"
            against = "" if other is None else ARMS[other].title
            rows.append((percent, [labels, ARMS[name].title, used, num, top1, against, *difference]))
    return "Compute is that of pretraining and fine-tuning, in thousands of dense views.\n\n" + table(
        COLUMNS, [row for _, row in sorted(rows, key=lambda row: row[0])], left=2
    )


def trials(found: Mapping[str, Any]) -> str:
    """The table of what was tried; empty if nothing was."""
    rows = []
    for one in TRIED:
        values = [tried["top1"] for tried in found["tried"] if Trial(*(tried[key] for key in Trial._fields)) == one]
        if values:
            top1 = in_percent(mean_and_interval(values), ".1f")
            rows.append([one.started, one.rate, str(one.epochs), str(len(values)), top1])
    if not rows:
        return ""
    return (
        "### What was tried on training images that are held out\n\nEach seed is a draw of its own, of "
        f"{TRIED_ON} % of the labels and of 900 images to test on, which pretraining has seen.\n\n"
        + table(("start", "rate", "epochs", "seeds", "top-1, %"), rows, left=1)
    )


def section(docs: Path) -> str:
    """What docs/results.md has of it; empty if nothing was compared yet."""
    path, words = docs / "labels.json", docs / "results" / "labels.md"
    found = json.loads(path.read_text()) if path.exists() else {"scores": []}
    starts = {ARMS[one["arm"]].start for one in found["scores"]}
    if starts <= {None}:  # scratch alone, or nothing yet
        return ""
    took = ", ".join(
        f"{10_000 * VIEWS[name]:,} views in {found['seconds'][name] / 60:.0f} minutes"
        for name in VIEWS
        if name in found["seconds"]
    )
    missing = []
    for name, arm in ARMS.items():
        num = {
            percent: sum((s["arm"], s["percent"]) == (name, percent) for s in found["scores"]) for percent in arm.seeds
        }
        some = [
            f"{num[percent]} of {seeds} at {percent} %" for percent, seeds in arm.seeds.items() if num[percent] < seeds
        ]
        missing += [f"{arm.title} ({', '.join(some)})"] if some else []
    ran = Counter(Trial(*(tried[key] for key in Trial._fields)) for tried in found["tried"])
    missing += [f"tried: {one.title} ({ran[one]} of {TRIALS})" for one in TRIED if ran[one] < TRIALS]
    left = f"Seeds that were run, where not all were: {'; '.join(missing)}." if missing else ""
    probes = small_images.frozen(found, {name: f"pretrained, {10_000 * VIEWS[one]:,} views" for name, one in PROBED})
    filled = partial(textwrap.fill, width=120, break_on_hyphens=False)
    first, _, more = words.read_text().strip().partition("\n\n") if words.exists() else ("", "", "")
    parts = [
        first,
        overview(found),
        more,
        filled(
            f"Written by `studies/labels.py`: tiny20 at {found['size']} pixels, pretrained for {took}, and tested once "
            "on the 1,000 test images. No row has more than one encoder, so intervals are over draws of the labels, "
            f"order and head, and with 100 % over order and head. On {in_words(found['machine'])}, "
            f"{found['at_once']} at a time; {sum(found['seconds'].values()) / 3600:.1f} hours of commands."
        ),
        filled(left),
        _by_hand(found["commands"]),
        result(found),
        trials(found),
        probes,
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def _by_hand(commands: Mapping[str, str]) -> str:
    """The commands of the first row with most views, and those of its scratch."""
    shown = [commands[name] for name in ("long-p", "long-5-0", "few-5-0") if name in commands]
    return "\n".join(["By hand, the first draw of 500 labels:", "", "```bash", *shown, "```"] if shown else [])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--size", type=int, default=48, help="of the images, in pixels [48]")
    add_arguments(parser, "runs/labels", at_once=2, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.size, args.at_once))
    wanted = chosen(args, every, "labels.json")
    prepare_tiny20(args.shards, out, FEW | ALL, trials=TRIALS)
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = {**facts(out, every), "size": args.size, "at_once": args.at_once, **collect(out, every)}
    write_text(out / "labels.json", json.dumps(found, indent=1) + "\n")
    print("\n" + result(found))
    if args.docs:
        write_found(args.docs / "labels.json", found)
    end(failed)


if __name__ == "__main__":
    main()
