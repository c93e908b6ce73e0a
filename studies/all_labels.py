"""Does pretraining pay where every image has its label, beside scratch that is given the compute of pretraining too?

    python studies/all_labels.py SHARDS --out runs/all_labels           # 2 cores: 4 h
    python studies/all_labels.py SHARDS --out runs/all_labels --list    # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Pretraining is that of the arm `again` of
studies/recipe.py, 200,000 views, and OUT may be that study's folder, which has it. Fine-tuning is
`finetune_small_images` on all 10,000 labels, in the same order and with the same head for all arms, and is tested on
the test images once, at its last step. What is finished is not done again, and what was cut off resumes. What is found
is in OUT/all_labels.json, and with --docs in all_labels.json there, which `studies/results.py` puts into
docs/results.md, with what we read in it, docs/results/all_labels.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
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
    facts,
    in_words,
    paired,
    prepare_tiny20,
    probe,
    schedule,
    scores_by_seed,
    write_found,
)

from fcmae.atomic import write_text
from fcmae.evaluation.paired import cells
from fcmae.tables import table

SEEDS = 3
PRETRAINED, PRETRAINING = "again-p", 20  # a job of studies/recipe.py, and its epochs


class Arm(NamedTuple):
    """A way to use all of the labels.

    Attributes:
        title: as it stands in the table.
        epochs: of fine-tuning.
        flags: of it, beside `finetune_small_images`.
    """

    title: str
    epochs: int
    flags: tuple[str, ...] = ()


SCRATCH = ("--optim.base_lr=8e-3", "--optim.layer_decay=1")
LOWER = ("--optim.base_lr=4e-3", "--optim.layer_decay=1")
# A sparse view costs some .57 of a dense one in seconds on two cores, and half in multiply-adds: 20 epochs of
# pretraining and 8 of fine-tuning are 20 epochs from scratch. The warm-up is an eighth, as in the config.
ARMS = {
    "scratch": Arm("scratch, 20 epochs at 8e-3", 20, SCRATCH),
    "tuned8": Arm("pretrained, 8 epochs: the compute of 20 from scratch", 8),
    "lower": Arm("scratch, 20 epochs at 4e-3", 20, LOWER),
    "tuned20": Arm("pretrained, 20 epochs", 20),
}
AGAINST = {"scratch": None, "tuned8": "scratch", "lower": "scratch", "tuned20": "scratch"}
ALSO = (("tuned8", "lower"), ("tuned20", "lower"), ("tuned20", "tuned8"))
COLUMNS = ("start", "seeds", "top-1, %", "against", "difference of each seed", "")


def jobs(out: Path, size: int, at_once: int) -> Iterator[Job]:
    """All commands: the first two arms seed by seed, then the next two, and features without fine-tuning."""
    yield next(job for job in recipe.jobs(out, PRETRAINING, size, at_once) if job.name == PRETRAINED)
    names = list(ARMS)
    for pair in (names[:2], names[2:]):
        for seed in range(SEEDS):
            for name in pair:
                arm = ARMS[name]
                words = (
                    "finetune", "--config=finetune_small_images", f"--data.path={out}/train-100-{seed}.csv",
                    f"--data.val_path={out}/test.csv", f"--data.image_size={size}", f"--seed={seed}",
                    f"--epochs={arm.epochs}", f"--optim.warmup_epochs={arm.epochs / 8:g}",
                    f"--out={out}/runs/{name}-{seed}", *arm.flags, *(() if at_once == 1 else ("--data.num_workers=1",)),
                )  # fmt: skip
                if arm.flags:
                    yield Job(f"{name}-{seed}", (*FCMAE, *words))
                else:
                    yield Job(f"{name}-{seed}", (*FCMAE, *words, f"--init={out}/runs/{PRETRAINED}"), (PRETRAINED,))
    encoder, needs = f"{out}/runs/{PRETRAINED}", (PRETRAINED,)
    yield probe("probe-pretrained", encoder, out, out, needs, *small_images.PROBES)
    yield probe("probe-random", f"random:{encoder}", out, out, needs, *small_images.PROBES)
    for name, (model, _) in CONTROLS.items():
        yield probe(f"probe-{name}", model, out, out, (), *small_images.PROBES, "--image-size", str(size))


def result(found: Mapping[str, Any]) -> str:
    """The table: each arm against scratch, and what has run against the others."""
    values = [(one["arm"], "100%", one["seed"], one["top1"]) for one in found["scores"]]
    ran = {arm for arm, *_ in values}
    rows = []
    for row in paired(values, {name: other for name, other in AGAINST.items() if name in ran}):
        _, _, num, top1, *difference = cells(row)
        other = AGAINST[row.arm]
        rows.append([ARMS[row.arm].title, num, top1, "" if other is None else ARMS[other].title, *difference])
    for name, other in ALSO:
        seeds = {seed for arm, _, seed, _ in values if arm == name}
        seeds &= {seed for arm, _, seed, _ in values if arm == other}
        if seeds:
            both = [value for value in values if value[0] in (name, other) and value[2] in seeds]
            row = next(row for row in paired(both, {other: None, name: other}) if row.arm == name)
            _, _, num, top1, *difference = cells(row)
            rows.append([ARMS[name].title, num, top1, ARMS[other].title, *difference])
    return table(COLUMNS, rows, left=1)


def section(docs: Path) -> str:
    """What docs/results.md has of it; empty if nothing was found yet."""
    path, words = docs / "all_labels.json", docs / "results" / "all_labels.md"
    found = json.loads(path.read_text()) if path.exists() else {"scores": []}
    if not any(ARMS[one["arm"]].flags == () for one in found["scores"]):  # scratch alone, or nothing yet
        return ""
    num = {name: sum(one["arm"] == name for one in found["scores"]) for name in ARMS}
    took = {
        name: sum(seconds for job, seconds in found["seconds"].items() if job.rpartition("-")[0] == name)
        for name in ARMS
    }
    minutes = "; ".join(f"{ARMS[name].title} {took[name] / num[name] / 60:.0f}" for name in ARMS if num[name])
    missing = [f"{ARMS[name].title}, {num[name]} of {SEEDS}" for name in ARMS if num[name] < SEEDS]
    return f"""{words.read_text().strip() if words.exists() else ""}

Written by `studies/all_labels.py`: tiny20 at {found["size"]} pixels, pretrained on {10_000 * PRETRAINING:,} views in
{found["seconds"][PRETRAINED] / 60:.0f} minutes, fine-tuned on all 10,000 labels, and tested once on the 1,000 test
images. There is one encoder, and intervals are over order and head of fine-tuning.
On {in_words(found["machine"])}, {found["at_once"]} at a time. Minutes of a run: {minutes}.
{f"Seeds that were run: {'; '.join(missing)}." if missing else ""}

{result(found)}

{small_images.frozen(found, {"pretrained": "pretrained"})}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--size", type=int, default=48, help="of the images, in pixels [48]")
    add_arguments(parser, "runs/all_labels", at_once=2, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.size, args.at_once))
    wanted = chosen(args, every)
    prepare_tiny20(args.shards, out, {100: SEEDS}, trials=0)
    schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = {
        **facts(out, every),
        "size": args.size,
        "at_once": args.at_once,
        "scores": scores_by_seed(out, every, ARMS, SEEDS),
        "probes": small_images.probed(out, every),
    }
    write_text(out / "all_labels.json", json.dumps(found, indent=1) + "\n")
    print("\n" + result(found))
    if args.docs:
        write_found(args.docs / "all_labels.json", found)


if __name__ == "__main__":
    main()
