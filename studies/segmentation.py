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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from study import FCMAE, Job, add_arguments, chosen, facts, last_scores, paired, schedule, write_images

from fcmae.atomic import write_text
from fcmae.evaluation.paired import cells
from fcmae.tables import table

ARMS = ("scratch", "pretrained")
# By per cent of the labels: tiles of a step, and epochs.
BUDGETS = {1: (4, 200), 10: (16, 200), 100: (16, 20)}
COLUMNS = ("labels", "start", "seeds", "mean IoU, %", "against scratch, of each seed", "")


def jobs(out: Path, epochs: float, percents: Sequence[int], seeds: int, short: float = 1.0) -> Iterator[Job]:
    """All commands, the pretraining first.

    short: times the epochs on labels.
    """
    data = f"{out}/landsea"
    images = (f"--data.path={data}/unlabeled.txt", "--data.val_share=0", f"--out={out}/runs/pretrained")
    yield Job("pretrained", (*FCMAE, "pretrain", "--config=pretrain_cpu", f"--epochs={epochs:g}", *images))
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
                yield Job(name, (*FCMAE, *words), needs)


def collect(out: Path, wanted: Sequence[Job], epochs: float, percents: Sequence[int], seeds: int) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    runs = last_scores(out, wanted, "miou")
    scores = [
        {"arm": arm, "labels": f"{percent}%", "seed": seed, "scores": found}
        for percent in percents
        for arm in ARMS
        for seed in range(seeds)
        if (found := runs.get(f"{arm}-{percent}-{seed}"))
    ]
    return {"epochs": epochs, **facts(out, wanted), "scores": scores}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of what was found: `fcmae worth`'s, of mean IoU."""
    scores = ((score["arm"], score["labels"], score["seed"], score["scores"]["miou"]) for score in found["scores"])
    return [cells(row) for row in paired(scores, {"scratch": None, "pretrained": "scratch"})]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=400, help="of pretraining [400]")
    parser.add_argument(
        "--percents", type=int, nargs="+", default=list(BUDGETS), help="per cent of the labels [1 10 100]"
    )
    parser.add_argument("--seeds", type=int, default=5, help="draws of the labels [5]")
    parser.add_argument("--short", type=float, default=1.0, help="times the epochs on labels [1]")
    add_arguments(parser, "runs/segmentation", at_once=1)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.epochs, args.percents, args.seeds, args.short))
    wanted = chosen(args, every)
    write_images("landsea", out, seeds=args.seeds)
    schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, args.epochs, args.percents, args.seeds)
    write_text(out / "segmentation.json", json.dumps(found, indent=1) + "\n")
    print("\n" + table(COLUMNS, rows(found), left=2))


if __name__ == "__main__":
    main()
