"""What does leaving cost? Networks whose patches may leave, each against itself whole, over several seeds.

    python studies/exits.py --out runs/exits-study --at-once 2        # 2 cores
    python studies/exits.py --out runs/exits-study --list             # the commands, without running them

Sea, land and lakes, from one pretraining, as studies/fills.py has it; a seed is another head and another order. Of each
seed one network learns with `model.tau` .9, so that patches leave while it does, and one with 1, which never sees a
mask. benchmarks/anytime.py then times and scores both on the squares of other longitudes, alone on the machine. These
choose nothing: the last model counts. What is finished is not done again, and what was cut off resumes. What is found
is in OUT/exits.json, of which docs/exits.json is ours: the mean IoU of each of that script's sides against the whole
network that learnt with masks, and what it takes of the time and multiply-adds of its own whole network, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fills import pretrained, segmented  # first: as the commands do, it settles how threads wait before torch is loaded
from study import FCMAE, STUDIES, Job, add_arguments, chosen, end, facts, is_done, paired, schedule, write_images

from fcmae.atomic import write_text
from fcmae.evaluation.paired import in_percent
from fcmae.evaluation.probes import mean_and_interval
from fcmae.tables import table

TAUS = {"masks": 0.9, "exits": 1.0}  # in training, by the name of the run
SCRIPT = STUDIES.parent / "benchmarks" / "anytime.py"
SIDES = {
    "masks": ("--taus", ".998", ".99", ".98", ".95", ".9", ".8", ".6", "--budgets", ".5", ".25", ".1", ".05"),
    "exits": ("--taus", ".95", ".8", ".6", "--budgets"),
}
COLUMNS = ("learnt with", "side", "mean IoU, %", "against dense, points", "time / dense, %", "multiply-adds / dense, %")


def jobs(out: Path, epochs: float, seeds: int) -> Iterator[Job]:
    """The commands that train."""
    yield pretrained(out)
    for seed in range(seeds):
        for name, tau in TAUS.items():
            words = segmented(out, f"{name}-{seed}", seed, tau, epochs)
            yield Job(f"{name}-{seed}", (*FCMAE, "segment", *words), ("pretrained",))


def timings(out: Path, seeds: int, repeats: int) -> Iterator[Job]:
    """The commands that time and score."""
    for seed in range(seeds):
        for name in TAUS:
            words = (
                *(str(SCRIPT), "--model", f"{out}/runs/{name}-{seed}", "--data", f"{out}/landsea/test-squares.csv"),
                *("--images", "6", "--repeats", str(repeats), *SIDES[name], "--json", str(timed(out, name, seed))),
            )
            yield Job(f"timed-{name}-{seed}", (sys.executable, *words), (f"{name}-{seed}",))


def timed(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"timed-{name}-{seed}.json"


def collect(out: Path, wanted: Sequence[Job], epochs: float) -> dict[str, Any]:
    """What the finished runs have found."""
    scores, calibration = list[dict[str, Any]](), list[dict[str, Any]]()
    for job in wanted:
        if not job.name.startswith("timed-") or not is_done(job, out):
            continue
        _, name, seed = job.name.split("-")
        found = json.loads(timed(out, name, int(seed)).read_text())
        whole = found["results"]["dense"]["multiply_adds"]
        for side, result in found["results"].items():
            values = {key: result[key] for key in ("miou", "pixel_accuracy", "boundary_f1")}
            values |= {"time": found["ratios"][side]["time"], "multiply_adds": result["multiply_adds"] / whole}
            scores.append({"trained": name, "side": side, "seed": int(seed), **values})
        calibration.append({"trained": name, "seed": int(seed), "ece": [one["ece"] for one in found["calibration"]]})
    return {**facts(out, wanted), "epochs": epochs, "scores": scores, "calibration": calibration}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of what was found: means over the seeds, and their 95 % intervals."""
    scores = [(f"{one['trained']} {one['side']}", "100%", one["seed"], one["miou"]) for one in found["scores"]]
    arms = dict.fromkeys(score[0] for score in scores)
    lines = []
    for row in paired(scores, {arm: None if arm == "masks dense" else "masks dense" for arm in arms}):
        name, _, side = row.arm.partition(" ")
        mine = [one for one in found["scores"] if (one["trained"], one["side"]) == (name, side)]
        costs = [mean_and_interval([one[key] for one in mine]) for key in ("time", "multiply_adds")]
        change = "" if row.gain is None else in_percent(row.gain, "+.2f")
        lines.append([name, side, in_percent(row.mean, ".2f"), change, *(in_percent(cost, ".0f") for cost in costs)])
    return lines


def errors(found: dict[str, Any]) -> list[list[str]]:
    """The exits' expected calibration errors, likewise."""
    lines = []
    for name in dict.fromkeys(one["trained"] for one in found["calibration"]):
        of_seeds = [one["ece"] for one in found["calibration"] if one["trained"] == name]
        for i, values in enumerate(zip(*of_seeds, strict=True), 1):
            lines.append([name, str(i), in_percent(mean_and_interval(values), ".1f")])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=30, help="of each run [30]")
    parser.add_argument("--seeds", type=int, default=3, help="of each network [3]")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing [5]")
    add_arguments(parser, "runs/exits-study", at_once=1)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = [*jobs(out, args.epochs, args.seeds), *timings(out, args.seeds, args.repeats)]
    wanted = chosen(args, every)
    write_images("landsea", out)
    alone = [job for job in wanted if job.name.startswith("timed")]
    failed = schedule([job for job in wanted if job not in alone], out, args.at_once, None if args.at_once == 1 else 1)
    failed += schedule(alone, out, 1, None)
    found = collect(out, every, args.epochs)
    write_text(out / "exits.json", json.dumps(found, indent=1) + "\n")
    print("\n" + table(COLUMNS, rows(found), left=2))
    print("\n" + table(("learnt with", "exit", "expected calibration error, %"), errors(found), left=2))
    end(failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
