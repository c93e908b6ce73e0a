"""Does pretraining pay for label maps? Sea, land and lakes from 1, 10 and 100 % of the labels, against scratch.

    python studies/segmentation.py --out runs/segmentation              # 2 cores
    python studies/segmentation.py --out runs/segmentation --list       # the commands, without running them

Pretraining is `pretrain_cpu` on the 480 tiles of landsea (studies/datasets.py), without labels. Each pair of runs has
the same labels, order and head; from scratch layer_decay is 1, all else is the same. The 150 tiles that are tested on
lie in other longitudes and choose nothing: the last model counts. What is finished is not done again, and what was cut
off resumes. What is found is in OUT/segmentation.json. The whole was not run yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from run_all import STUDIES, Job, schedule, shown

from fcmae.atomic import write_text
from fcmae.evaluation.paired import METRIC, cells, compare
from fcmae.tables import table
from fcmae.training.run import read_metrics

ARMS = ("scratch", "pretrained")
# By per cent of the labels: tiles of a step, and epochs.
BUDGETS = {1: (4, 200), 10: (16, 200), 100: (16, 20)}
COLUMNS = ("labels", "start", "seeds", "mean IoU, %", "against scratch, of each seed", "")


def jobs(out: Path, epochs: float, percents: Sequence[int], seeds: int, short: float = 1.0) -> Iterator[Job]:
    """All commands, the pretraining first.

    short: times the epochs on labels.
    """
    program = (sys.executable, "-m", "fcmae.cli")
    data = f"{out}/landsea"
    images = (f"--data.path={data}/unlabeled.txt", "--data.val_share=0", f"--out={out}/runs/pretrained")
    yield Job("pretrained", (*program, "pretrain", "--config=pretrain_cpu", f"--epochs={epochs:g}", *images))
    starts = {"scratch": ("--optim.layer_decay=1",), "pretrained": (f"--init={out}/runs/pretrained",)}
    for percent in percents:
        batch_size, num_epochs = BUDGETS[percent]
        for seed in range(seeds):
            labels = f"train-{percent}-{seed if percent < 100 else 0}.csv"
            for arm in ARMS:
                name = f"{arm}-{percent}-{seed}"
                words = (
                    *("segment", "--config=segment_cpu", f"--data.path={data}/{labels}"),
                    *(f"--data.val_path={data}/test.csv", "--data.class_names=sea,land,lake"),
                    *(f"--batch_size={batch_size}", f"--epochs={num_epochs * short:g}", f"--seed={seed}"),
                    *(f"--log.eval_epochs={num_epochs * short:g}", f"--out={out}/runs/{name}", *starts[arm]),
                )
                needs = ("pretrained",) if arm == "pretrained" else ()
                yield Job(name, (*program, *words), needs)


def collect(out: Path, wanted: Sequence[Job], epochs: float, percents: Sequence[int], seeds: int) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    done = [job for job in wanted if (out / "jobs" / f"{job.name}.json").exists()]
    finished = {job.name for job in done}
    scores = []
    for percent in percents:
        for arm in ARMS:
            for seed in range(seeds):
                if (name := f"{arm}-{percent}-{seed}") in finished:
                    last = [line for line in read_metrics(out / "runs" / name / "metrics.jsonl") if "miou" in line][-1]
                    values = {key: value for key, value in last.items() if key not in ("step", "epoch")}
                    scores.append({"arm": arm, "labels": f"{percent}%", "seed": seed, "scores": values})
    commands = {job.name: shown(job, out) for job in done}
    return {"epochs": epochs, "commands": commands, "scores": scores}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of what was found: `fcmae worth`'s, of mean IoU."""
    comparison: Any = {
        "amounts": [{"labels": labels} for labels in dict.fromkeys(score["labels"] for score in found["scores"])],
        "arms": [{"name": arm, "against": None if arm == "scratch" else "scratch"} for arm in ARMS],
        "scores": [{**score, "scores": {METRIC: score["scores"]["miou"]}} for score in found["scores"]],
    }
    return [cells(row) for row in compare(comparison)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation"), help="where to write")
    parser.add_argument("--epochs", type=float, default=400, help="of pretraining [400]")
    parser.add_argument(
        "--percents", type=int, nargs="+", default=list(BUDGETS), help="per cent of the labels [1 10 100]"
    )
    parser.add_argument("--seeds", type=int, default=5, help="draws of the labels [5]")
    parser.add_argument("--short", type=float, default=1.0, help="times the epochs on labels [1]")
    parser.add_argument("--at-once", type=int, default=1, help="commands at a time [1]")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    wanted = list(jobs(out, args.epochs, args.percents, args.seeds, args.short))
    if args.list:
        for job in wanted:
            print(f"# {job.name}\n{shown(job, out)}")
        return
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    words = [str(STUDIES / "datasets.py"), "landsea", str(out / "landsea"), "--seeds", str(args.seeds)]
    subprocess.run([sys.executable, *words], check=True)
    schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, wanted, args.epochs, args.percents, args.seeds)
    write_text(out / "segmentation.json", json.dumps(found, indent=1) + "\n")
    print("\n" + table(COLUMNS, rows(found), left=2))


if __name__ == "__main__":
    main()
