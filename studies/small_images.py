"""Does pretraining pay on small images with few labels, how much of it, predicting what? Makes docs/small_images.md.

    python studies/small_images.py SHARDS --out runs/small_images                 # an H200, 16 cores: 1.5 h
    python studies/small_images.py SHARDS --out runs/small_images --at-once 1     # 2 cores: days
    python studies/small_images.py SHARDS --out runs/small_images --at-once 1 --only hog20-p scratch-5 hog20-5   # 3 h
    python studies/small_images.py SHARDS --out runs/small_images --list          # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Pretraining is `pretrain_small_images` and what differs
from it in one thing; fine-tuning is `finetune_small_images` on the same labels, in the same order, with the same head,
from each of these and from scratch. What is chosen is compared on training images that are held out, the rest of the
recipe by studies/recipe.py, and of the test images only the evaluation at the last step counts: they choose nothing but
the target and the mask ratio, which were chosen by them (docs/small_images.md). Pretrainings come first and alone, as
commands on few labels would take the cores from them. What is finished is not done again, and what was cut off resumes.
Hours are an estimate, by the seconds in docs/small_images_gpu.json and docs/small_images_cpu.json. The part `teacher`
of studies/objectives.py, which needs the weights of another network, is not compared. What is found is in
OUT/small_images.json, and with `--docs` there too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from collect import evaluation
from study import (
    CONTROLS,
    FCMAE,
    STUDIES,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    half_width,
    in_words,
    is_done,
    last_scores,
    of_probe,
    paired,
    percent_of,
    prepare_tiny20,
    probe,
    save,
    schedule,
    write_found,
)

from fcmae.atomic import write_text
from fcmae.evaluation.paired import Row, cells
from fcmae.evaluation.probes import mean_and_interval
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


class Trial(NamedTuple):
    """Settings of fine-tuning that are tried on training images that are held out.

    Attributes:
        start: the arm.
        percent: of the labels.
        epochs: of fine-tuning.
        rate: of learning.
        decay: of it, by layer.
    """

    start: str
    percent: int
    epochs: int
    rate: str
    decay: str

    def run(self, seed: int) -> str:
        """Its name."""
        return f"tune-{self.start}-{self.percent}-{self.epochs}-{self.rate}-{self.decay}-{seed}"


MANY, FEW, TRIALS = {10: 8, 100: 3, 5: 8, 1: 8}, {10: 4}, 5
RATES = ("--optim.base_lr=8e-3", "--optim.layer_decay=1")  # of scratch
LOWER = ("--optim.base_lr=4e-3", "--optim.layer_decay=1")
PIXELS = "--model.target=pixels"
BATCH = ("--batch_size=256", "--optim.base_lr=1e-3")  # of pretraining, four times what is shipped
# A sparse view costs half the multiply-adds of a dense one: 350 and 800 epochs on 1,000 images are 60 and 600,000 or
# 1,500,000 such views.
ARMS = {
    "scratch350": Arm("scratch at 8e-3, 350 epochs", 0, (*RATES, "--epochs=350", "--optim.warmup_epochs=20"), {10: 3}),
    "scratch800": Arm("scratch at 8e-3, 800 epochs", 0, (*RATES, "--epochs=800", "--optim.warmup_epochs=20"), {10: 3}),
    "scratch": Arm("scratch at 8e-3", 0, RATES, MANY),
    "scratch-4e-3": Arm("scratch at 4e-3", 0, LOWER, {10: 8, 5: 8}),
    "hog150": Arm("HOG, 1,500,000 views", 150, BATCH, MANY),
    "hog": Arm("HOG, 600,000 views", 60, BATCH, {10: 8}),
    "hog20": Arm("HOG, 200,000 views", 20, BATCH, {10: 8, 5: 8}),
    "shipped20": Arm("HOG, 200,000 views, batches of 64 as shipped", 20, (), {5: 5}),
    "ratio75": Arm("pixels, 75 % hidden", 60, (*BATCH, PIXELS, "--model.mask_ratio=0.75"), FEW),
    "pixels": Arm("pixels, 60 % hidden", 60, (*BATCH, PIXELS), FEW),
    "multiscale": Arm("pixels, 60 % hidden, all stages decoded", 60, (*BATCH, PIXELS), FEW, "multiscale"),
}
CURVE = ("hog20", "hog", "hog150")  # one target, more views
# By per cent of the labels, where it is not as in `finetune_small_images`: 360, 470, 940 and 3,100 steps.
BUDGETS = {
    1: ("--batch_size=32", "--epochs=120", "--optim.warmup_epochs=15"),
    100: ("--epochs=20", "--optim.warmup_epochs=2.5"),
}
SETTINGS = ("percent", "epochs", "rate", "layer_decay")
TRIED = (
    *(Trial("scratch", 10, 60, rate, "1") for rate in ("2e-3", "4e-3", "8e-3", "16e-3")),
    *(Trial("hog", 10, 60, rate, "0.9") for rate in ("2e-3", "4e-3", "8e-3")),
    Trial("hog", 10, 60, "4e-3", "0.75"),
    # Until it no longer rises.
    *(Trial("scratch", 10, 120, rate, "1") for rate in ("4e-3", "8e-3")),
    Trial("hog", 10, 120, "4e-3", "0.9"),
)
# What is compared with another start than scratch, on the test images.
PAIRS = (
    ("hog", "hog20"),
    ("hog150", "hog20"),
    ("hog150", "hog"),
    ("shipped20", "hog20"),
    ("scratch350", "scratch"),
    ("hog", "scratch350"),
    ("hog150", "scratch800"),
    ("hog", "ratio75"),
    ("hog", "pixels"),
    ("multiscale", "pixels"),
)
PROBES = ("--probes", "knn", "linear", "few-shot", "--labels", "1%", "10%")
COLUMNS = ("labels", "start", "seeds", "top-1, %", "against scratch, of each seed", "")


def jobs(out: Path, arms: list[str], at_once: int) -> Iterator[Job]:
    """All commands, seed by seed of each amount of labels: what is cut off has pairs."""
    # Where the cores are shared.
    pretraining = () if at_once == 1 else ("--data.num_workers=3",)
    tuning = () if at_once == 1 else ("--data.num_workers=1",)
    objectives = (sys.executable, str(STUDIES / "objectives.py"))

    def finetune(name: str, draw: str, seed: int, start: str, percent: int, own: tuple[str, ...], test: str) -> Job:
        paths = (f"--data.path={out}/{draw}.csv", f"--data.val_path={out}/{test}.csv", f"--out={out}/runs/{name}")
        given = {flag.partition("=")[0] for flag in own}
        budget = (flag for flag in BUDGETS.get(percent, ()) if flag.partition("=")[0] not in given)
        words = (*FCMAE, "finetune", "--config=finetune_small_images", *paths, f"--seed={seed}", *budget, *own, *tuning)
        if not ARMS[start].epochs:
            return Job(name, words)
        return Job(name, (*words, f"--init={out}/runs/{start}-p"), (f"{start}-p",))

    for name in arms:
        arm = ARMS[name]
        if arm.epochs:
            program = FCMAE if arm.part is None else (*objectives, arm.part)
            words = ("pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt")
            more = (f"--epochs={arm.epochs}", "--data.val_share=0", f"--out={out}/runs/{name}-p", *arm.flags)
            yield Job(f"{name}-p", (*program, *words, *more, *pretraining))
    for percent in dict.fromkeys(percent for name in arms for percent in ARMS[name].seeds):
        for seed in range(max(MANY.values())):
            for name in arms:
                arm = ARMS[name]
                if seed < arm.seeds.get(percent, 0):
                    flags, draw = () if arm.epochs else arm.flags, f"train-{percent}-{seed}"
                    yield finetune(f"{name}-{percent}-{seed}", draw, seed, name, percent, flags, "test")
    for name in CURVE:
        if name in arms:
            yield probe(f"probe-{name}", f"{out}/runs/{name}-p", out, out, (f"{name}-p",), *PROBES)
    if "hog20" in arms:
        yield probe("probe-random", f"random:{out}/runs/hog20-p", out, out, ("hog20-p",), *PROBES)
        for name, (model, _) in CONTROLS.items():
            yield probe(f"probe-{name}", model, out, out, (), *PROBES, "--image-size", "64")
    for seed in range(TRIALS):
        for one in TRIED:
            if one.start in arms:
                own = (f"--epochs={one.epochs}", f"--optim.base_lr={one.rate}", f"--optim.layer_decay={one.decay}")
                draws = (f"tune-{one.percent}-{seed}", f"tune-test-{one.percent}-{seed}")
                yield finetune(one.run(seed), draws[0], seed, one.start, one.percent, own, draws[1])


def collect(out: Path, wanted: list[Job]) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    found = {name: line["top1"] for name, line in last_scores(out, wanted, "top1").items()}
    return {
        **facts(out, wanted),
        "tried": [
            {
                "arm": one.start, "percent": one.percent, "seed": seed, "epochs": one.epochs, "rate": one.rate,
                "layer_decay": one.decay, "top1": value,
            }
            for one in TRIED
            for seed in range(TRIALS)
            if (value := found.get(one.run(seed))) is not None
        ],
        "scores": [
            {"arm": name, "percent": percent, "seed": seed, "top1": value}
            for name, arm in ARMS.items()
            for percent, seeds in arm.seeds.items()
            for seed in range(seeds)
            if (value := found.get(f"{name}-{percent}-{seed}")) is not None
        ],
        "probes": probed(out, wanted),
    }  # fmt: skip


def probed(out: Path, wanted: Iterable[Job]) -> dict[str, Any]:
    """What the probes that are done have found, by name."""
    return {
        job.name.removeprefix("probe-"): evaluation(out / "runs" / job.name / "evaluation.json")
        for job in wanted
        if job.name.startswith("probe-") and is_done(job, out)
    }


def differences(scores: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Each of the starts against the other, seed by seed, by the amount of labels."""
    rows = []
    for name, other in pairs:
        seen = {arm: {(s["percent"], s["seed"]) for s in scores if s["arm"] == arm} for arm in (name, other)}
        both = seen[name] & seen[other]
        values = [
            (s["arm"], f"{s['percent']}%", s["seed"], s["top1"])
            for s in scores
            if s["arm"] in seen and (s["percent"], s["seed"]) in both
        ]
        rows += [
            row._replace(gain=None, told="") if name == other else row
            for row in paired(values, {other: other, name: other})
            if row.arm == name and row.gain
        ]
    return sorted(rows, key=lambda row: int(row.labels[:-1]))


def titled(rows: Iterable[Row]) -> list[list[str]]:
    """As rows of a table."""
    return [cells(row._replace(arm=ARMS[row.arm].title)) for row in rows]


def against_each_other(scores: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """A table of pairs, empty if there are none."""
    rows = [
        (row[0], f"{row[1]} - {ARMS[other].title}", row[2], *row[4:])
        for name, other in pairs
        for row in titled(differences(scores, [(name, other)]))
    ]
    return table(("labels", "", "seeds", "difference of each seed", ""), rows, left=2) if rows else ""


def result(found: dict[str, Any]) -> str:
    """The table of all starts, by the amount of labels."""
    return table(COLUMNS, titled(against_scratch(found["scores"], ARMS)), left=2)


def against_scratch(scores: Sequence[dict[str, Any]], arms: Iterable[str]) -> list[Row]:
    """These starts against scratch, seed by seed, by the amount of labels: at the lower rate where it was run."""
    rows = []
    for percent in sorted({score["percent"] for score in scores}):
        some = [score for score in scores if score["percent"] == percent]
        scratch = "scratch-4e-3" if any(score["arm"] == "scratch-4e-3" for score in some) else "scratch"
        rows += differences(some, [(name, scratch) for name in dict.fromkeys([scratch, *arms])])
    return rows


def trials(found: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: what was tried."""
    rows = []
    for one in sorted(TRIED, key=lambda one: (one.percent, one.start, one.epochs, float(one.rate))):
        values = [tried["top1"] for tried in found["tried"] if tuple(tried[key] for key in ("arm", *SETTINGS)) == one]
        if values:
            title = ARMS[one.start].title if ARMS[one.start].epochs else "scratch"
            row = Row(f"{one.percent}%", title, len(values), mean_and_interval(values), None, "")
            labels, start, num, top1, *_ = cells(row)
            rows.append([labels, start, str(one.epochs), one.rate, one.decay, num, top1])
    return rows


def frozen(found: dict[str, Any], encoders: Mapping[str, str]) -> str:
    """A table of encoders as pretraining left them, of random weights and of what needs no network; empty if none ran.

    encoders: titles of pretrained ones, by the names of their probes.
    """
    titles = {**encoders, "random": "random weights", **{name: title for name, (_, title) in CONTROLS.items()}}
    rows = []
    for name, title in titles.items():
        if results := found["probes"].get(name):
            stage = results[0].get("stage")
            scores = [percent_of(of_probe(results, kind, "top1", stage)) for kind in ("knn", "linear")]
            few = {one["setting"]["labels"]: one for one in results if one["probe"] == "few-shot"}
            rows.append([title, *scores, *(half_width(few[labels], "top1") for labels in ("1%", "10%"))])
    if not rows:
        return ""
    columns = ("features", "kNN, k = 20", "linear", "linear, 1 % of the labels", "linear, 10 % of the labels")
    return (
        "### Frozen features, and what needs no network\n\n`fcmae evaluate`, top-1 in %; with few labels the mean "
        f"of five draws and half its 95 % interval.\n\n{table(columns, rows)}"
    )


def section(found: dict[str, Any]) -> str:
    """What was found on one machine."""
    tables = [f"### Against scratch\n\n{result(found)}"]
    if pairs := against_each_other(found["scores"], PAIRS):
        tables.append(f"### Against each other\n\n{pairs}")
    if rows := frozen(found, {name: ARMS[name].title for name in CURVE}):
        tables.append(rows)
    if found["tried"]:
        columns = ("labels", "start", "epochs", "rate", "layer decay", "seeds", "top-1, %")
        tables.append(
            "### What was tried on training images that are held out\n\nEach seed is a draw of its own, of labels and "
            f"of 900 images to test on.\n\n{table(columns, trials(found), left=2)}"
        )
    return "\n\n".join(tables)


def missing(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of a table: starts of which no machine has made all draws, at which amounts of labels."""
    rows = []
    for name, arm in ARMS.items():
        made = {
            percent: max(
                sum((s["arm"], s["percent"]) == (name, percent) for s in one["scores"]) for one in found.values()
            )
            for percent in arm.seeds
        }
        left = [
            f"{percent} %: {made[percent]} of {num}"
            for percent, num in sorted(arm.seeds.items())
            if made[percent] < num
        ]
        if left:
            rows.append([arm.title, ", ".join(left)])
    return rows


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The gain over scratch by views of pretraining, with its 95 % interval, of each machine and amount of labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="grey", linewidth=0.8)
    for machine, one in found.items():
        rows = [row for row in against_scratch(one["scores"], CURVE) if row.arm in CURVE]
        for labels in dict.fromkeys(row.labels for row in rows):
            points = [
                (ARMS[row.arm].epochs / 100, row.gain) for row in rows if row.labels == labels and row.gain is not None
            ]
            views, gains = [point[0] for point in points], [100 * gain[0] for _, gain in points]
            ends = [0 if gain[1] is None else 50 * (gain[1][1] - gain[1][0]) for _, gain in points]
            label = f"{labels.replace('%', ' %')} of the labels, {machine.upper()}"
            axis.errorbar(views, gains, ends, fmt="o-", capsize=3, label=label)
            for view, gain in zip(views, gains, strict=True):
                axis.annotate(f"{gain:+.1f}", (view, gain), (6, 4), textcoords="offset points", fontsize="small")
    axis.set(
        xlabel="million views of pretraining on HOG",
        ylabel="gain over scratch, points of top-1",
        xlim=(0, None),
    )
    if axis.containers:
        axis.legend(loc="lower right", fontsize="small")
    save(figure, path)


def page(found: dict[str, dict[str, Any]], words: str) -> str:
    """The page.

    found: on each machine, by its name.
    words: what we read in the numbers.
    """
    commands: dict[str, str] = {}
    for one in found.values():
        commands = one["commands"] | commands
    names = ("hog150-p", "hog150-10-0", "hog20-5-0", "scratch-10-0", "scratch350-10-0")
    example = [commands.get(name) for name in names]
    sections = "\n\n".join(f"## On {in_words(one['machine'])}\n\n{section(one)}" for one in found.values())
    columns = ("start", "draws by per cent of the labels")
    return f"""# Small images, few labels

{words.strip()}

![Gain over scratch by views of pretraining](results/small_images.svg)

Made by `python studies/small_images.py SHARDS --out runs/small_images --docs docs`, where SHARDS is a folder of tar
shards as `studies/sets.py` describes them, and written from
{", ".join(f"`docs/small_images_{name}.json`" for name in found)}. tiny20: 20
classes of Tiny ImageNet, 10,000 photographs without labels to pretrain on, 1,000 others to test on, 64 pixels. Brackets
are 95 % intervals of the mean over seeds (Student's t); each seed draws other labels and another head, the same for all
starts but for its size, which from weights is a thousandth of that from scratch. There is one pretraining of each
kind, so the spread is that of fine-tuning. Differences from scratch are to the first row of the same labels: at 4e-3
where it was run, else at 8e-3.

{sections}

## What was not run

Of these starts no machine has made all the draws that the study asks for.

{table(columns, missing(found), left=2)}

## Commands

```text
{chr(10).join(text for text in example if text)}
```
"""


def headline(docs: Path) -> str:
    """What the page begins with and how long it took, for docs/results.md; empty if nothing was found yet."""
    took = [
        f"{sum(one['seconds'].values()) / 3600:.1f} hours on {one['machine']['cores']} cores "
        f"{'without a GPU' if one['machine']['gpu'] == 'none' else 'with an ' + one['machine']['gpu']} "
        f"({len(one['seconds'])} of {len(one['commands'])} were timed)"
        for one in read(docs).values()
    ]
    if not took:
        return ""
    first = words(docs).partition("\n\n")[0]
    more = "All of it, and what was not run: [small images](small_images.md)."
    return f"{first}\n\nThe commands add up to {', and '.join(took)}. {more}"


def words(docs: Path) -> str:
    """Our reading of the numbers."""
    path = docs / "results" / "small_images.md"
    return path.read_text() if path.exists() else ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add_arguments(parser, "runs/small_images", at_once=12, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, list(ARMS), args.at_once))
    docs_json = f"small_images_{'cpu' if facts(out, every)['machine']['gpu'] == 'none' else 'gpu'}.json"
    names = {job.name for job in jobs(out, args.arms, args.at_once)}
    wanted = [job for job in chosen(args, every, docs_json) if job.name in names]
    prepare_tiny20(args.shards, out, MANY, TRIALS)
    pretrainings = [job for job in wanted if job.name.endswith("-p")]
    failed = list[str]()
    for some in (pretrainings, [job for job in wanted if job not in pretrainings]):
        failed += schedule(some, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every)
    write_text(out / "small_images.json", json.dumps(found, indent=1) + "\n")
    print("\n" + result(found))
    if args.docs:
        write_found(args.docs / docs_json, found)
        write_page(args.docs)
    end(failed)


def write_page(docs: Path) -> None:
    """docs/small_images.md and its figure, of the JSON of each machine and of the words beside it."""
    found = read(docs)
    draw(found, docs / "results" / "small_images.svg")
    write_text(docs / "small_images.md", page(found, words(docs)))


def read(docs: Path) -> dict[str, dict[str, Any]]:
    """What was found, by machine."""
    paths = {name: docs / f"small_images_{name}.json" for name in ("gpu", "cpu")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    main()
