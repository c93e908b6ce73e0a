"""Does fcmae see features collapse? Collapses are provoked, and its warnings compared with those of sound runs.

    python studies/collapse.py SHARDS --out runs/collapse                # a GPU with many cores
    python studies/collapse.py SHARDS --out runs/collapse --at-once 2    # 2 cores: 1 hour
    python studies/collapse.py SHARDS --out runs/collapse --list         # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). All pretrain the network of `pretrain_small_images` on
images of 32 pixels, which is quick. How well their features tell the classes, by kNN, is evaluated apart from what the
warnings look at. What is finished is not done again. What is found is in OUT/collapse.json, and with
--docs in collapse.json and results/collapse.md there, which `studies/results.py` puts into docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from collect import evaluation
from study import (
    STUDIES,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    is_done,
    of_probe,
    percent_of,
    probe,
    schedule,
    write_found,
    write_images,
)

from fcmae.atomic import write_text
from fcmae.tables import table
from fcmae.training import health
from fcmae.training.records import last_state, read_metrics

# By name: what stands in the table, the script and part that makes it, and flags.
RUNS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "pixels": ("pixels", (), ("--model.target=pixels",)),
    "hog": ("HOG", (), ()),
    "v1": ("pixels, V1", (), ("--model.target=pixels", "V1")),
    "no-grn": ("pixels, GRN taken out", ("ablated.py", "drop-grn"), ("--model.target=pixels",)),
    "rate-30": ("pixels, 30 times the rate", (), ("--model.target=pixels", "--optim.base_lr=0.12")),
    "rate-300": ("pixels, 300 times the rate", (), ("--model.target=pixels", "--optim.base_lr=1.2")),
    "constant": ("a constant", ("objectives.py", "constant"), ("--model.target=pixels",)),
}
SOUND = ("pixels", "hog")
VIEWS = 9_500  # of an epoch
V1 = "--model.variant={depths: [2, 2, 6], dims: [40, 80, 160], stem_stride: 2, use_grn: false}"
COLUMNS = (
    "predicted",
    "seed",
    "warnings, and the epoch of each",
    "cosine distance",
    "effective rank",
    "loss",
    "kNN, %",
)


def jobs(out: Path, epochs: int, seeds: int) -> Iterator[Job]:
    """Sound runs with several seeds, provoked ones with one, and kNN on the features of each."""

    def nearest(name: str, model: str, run: str) -> Job:
        return probe(f"knn-{name}", model, out / "tiny20", out, (run,), "--probes", "knn")

    for name, (_, script, flags) in RUNS.items():
        for seed in range(seeds if name in SOUND else 1):
            program = (str(STUDIES / script[0]), script[1]) if script else ("-m", "fcmae.cli")
            words = (
                "pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt",
                "--data.image_size=32", "--data.val_share=0.05", f"--epochs={epochs}", f"--seed={seed}",
                "--log.eval_epochs=1", "--log.every_steps=10", f"--out={out}/runs/{name}-{seed}",
            )  # fmt: skip
            more = [V1 if flag == "V1" else flag for flag in flags]
            yield Job(run := f"{name}-{seed}", (sys.executable, *program, *words, *more))
            yield nearest(run, f"{out}/runs/{run}", run)
    yield nearest("random", f"random:{out}/runs/pixels-0", "pixels-0")


def finding(run: Path) -> dict[str, Any]:
    """What a run's metrics say of it."""
    lines = read_metrics(run / "metrics.jsonl")

    def last(metric: str) -> dict[str, float]:
        line: dict[str, float] = next(
            (one for one in reversed(lines) if any(key.startswith(metric) for key in one)), {}
        )
        return {key.partition("/")[2]: value for key, value in line.items() if key.startswith(metric)}

    distances, ranks = last("cosine_distance/"), last("effective_rank/")
    return {
        "warnings": [{"kind": each.kind, "epoch": each.epoch} for each in health.warnings(lines)],
        "least_cosine_distance": min(distances.values(), default=None),
        "effective_rank": next(reversed(ranks.values()), None),
        "epoch": lines[-1]["epoch"] if lines else 0,
        "loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
    }


def broke_down(run: Path) -> bool:
    """Whether a run ended as its loss or a gradient was not finite."""
    return last_state(run) == "failed" and "FloatingPointError: " in (run / "train.log").read_text()


def knn(name: str, out: Path) -> float | None:
    """Top-1 on the last stage of what has the name; None where it was not evaluated."""
    place = out / "runs" / f"knn-{name}" / "evaluation.json"
    if not place.exists():
        return None
    results = evaluation(place)
    return of_probe(results, "knn", "top1", results[0].get("stage"))


def rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    return [
        [
            RUNS[one["run"]][0],
            str(one["seed"]),
            ", ".join(f"{each['kind']} {each['epoch']:.3g}" for each in one["warnings"]) or "none",
            number(one["least_cosine_distance"]),
            number(one["effective_rank"]),
            number(one["loss"]) + ("" if one["finished"] else f", not finite after epoch {one['epoch']:.3g}"),
            percent_of(one["knn"]),
        ]
        for one in found
    ]


def text(found: Sequence[Mapping[str, Any]], random: float | None, views: float) -> str:
    """What is read in docs/results.md; random: kNN on random weights; views: of a whole run."""

    def told(some: Sequence[Mapping[str, Any]]) -> str:
        return f"{sum(bool(one['warnings']) for one in some)} of {len(some)}"

    sound = [one for one in found if one["run"] in SOUND]
    provoked = [one for one in found if one["run"] not in SOUND]
    collapsed = [one for one in provoked if None not in (one["knn"], random) and one["knn"] <= random]
    return f"""## Are collapses seen?

Written by `studies/collapse.py`: tiny20 at 32 pixels, {views:,} views each. Of the sound runs {told(sound)} have a
warning, of those in which a collapse was to be provoked {told(provoked)}. By kNN, which no warning looks at,
{len(collapsed)} of the latter tell the classes no better than random weights ({percent_of(random)} %), and of these
{told(collapsed)} have a warning. The cosine distance is the least of all layers, the effective rank that of the last,
both at the end. Of what was to be provoked there is one run each, and none is as long as those in which the paper saw
V1 collapse.

{table(COLUMNS, rows(found), left=3)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--epochs", type=int, default=20, help=f"of each, {VIEWS:,} views each [20]")
    parser.add_argument("--seeds", type=int, default=3, help="of the sound runs [3]")
    add_arguments(parser, "runs/collapse", at_once=9, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.epochs, args.seeds))
    wanted = chosen(args, every, "collapse.json")
    write_images("tiny20", out, str(args.shards))
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    runs = [
        {
            "run": job.name.rpartition("-")[0],
            "seed": int(job.name.rpartition("-")[2]),
            "finished": is_done(job, out),
            **finding(out / "runs" / job.name),
            "knn": knn(job.name, out),
        }
        for job in every
        if not job.name.startswith("knn-") and (is_done(job, out) or broke_down(out / "runs" / job.name))
    ]
    random = knn("random", out)
    print("\n" + table(COLUMNS, rows(runs), left=3))
    for folder in filter(None, (out, args.docs)):
        write_found(folder / "collapse.json", {**facts(out, every), "runs": runs, "random": random})
    if args.docs:
        write_text(args.docs / "results" / "collapse.md", text(runs, random, VIEWS * args.epochs))
    end(failed)


if __name__ == "__main__":
    main()
