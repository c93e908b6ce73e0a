"""Which recipe pretrains small images best? One thing changed at a time, and chosen on held-out training images.

    python studies/recipe.py SHARDS --out runs/recipe                          # a GPU with many cores
    python studies/recipe.py SHARDS --out runs/recipe --at-once 2 --size 48    # 2 cores
    python studies/recipe.py SHARDS --out runs/recipe --list                   # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Each arm is `pretrain_small_images` with as many views, or
for as much compute, and what differs in one thing, then `finetune_small_images` on draws of few labels, the same for
all arms. It is tested on training images that are held out of the labels, which pretraining has seen, and not on the
test images. What is finished is not done again, and what was cut off resumes. What is found is in OUT/recipe.json, and
with --docs in recipe.json and results/recipe.md there, which `studies/results.py` puts into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    paired,
    prepare_tiny20,
    schedule,
    scores_by_seed,
    write_found,
)

from fcmae.atomic import write_text
from fcmae.evaluation.paired import Row, cells, certain
from fcmae.tables import table

PERCENT, DRAWS = 5, 5  # of the labels; of the labels and of the images to test on


class Arm(NamedTuple):
    """A way to pretrain.

    Attributes:
        title: as it stands in the table.
        against: the arm that it is compared with, from which it differs in one thing.
        flags: of pretraining.
        part: of studies/objectives.py.
        masks: of each image.
        cost: of a view in multiply-adds, forward and backward, by that of one as shipped; it has as many fewer views.
    """

    title: str
    against: str | None
    flags: tuple[str, ...] = ()
    part: str | None = None
    masks: int = 1
    cost: float = 1.0


OBJECTIVES = (sys.executable, str(STUDIES / "objectives.py"))
PIXELS = "--model.target=pixels"
FOUR = "--model.variant={depths: [2, 2, 6, 2], dims: [40, 80, 160, 320], stem_stride: 2}"
ARMS = {
    "hog": Arm("as shipped: HOG, 60 % hidden, batch of 64", None),
    "again": Arm("as shipped, another seed of pretraining", "hog", ("--seed=1",)),
    # The rate is of 256 images.
    "batch256": Arm("batch of 256, the same rate", "hog", ("--batch_size=256", "--optim.base_lr=1e-3")),
    "batch32": Arm("batch of 32, the same rate", "hog", ("--batch_size=32", "--optim.base_lr=8e-3")),
    "patch16": Arm("patches of 16", "hog", ("--model.mask_patch=16",)),
    "four": Arm("patches of 16, four stages", "patch16", (FOUR, "--model.mask_patch=16")),
    "ratio75": Arm("75 % hidden", "hog", ("--model.mask_ratio=0.75",)),
    "ratio50": Arm("50 % hidden", "hog", ("--model.mask_ratio=0.5",)),
    # At 48 pixels, as torch's FlopCounterMode has them.
    "ratio75c": Arm("75 % hidden, for as much compute", "hog", ("--model.mask_ratio=0.75",), cost=0.693),
    "ratio50c": Arm("50 % hidden, for as much compute", "hog", ("--model.mask_ratio=0.5",), cost=1.246),
    "ratio50b": Arm("50 % hidden, another seed", "again", ("--model.mask_ratio=0.5", "--seed=1")),
    "crop50": Arm("crops from 50 % of the area", "hog", ("--data.crop_scale=0.5,1",)),
    "crop50b": Arm("crops from 50 % of the area, another seed", "again", ("--data.crop_scale=0.5,1", "--seed=1")),
    "crop8": Arm("crops from 8 % of the area", "hog", ("--data.crop_scale=0.08,1",)),
    "masks2": Arm(
        # Of half the epochs as many steps are half the warm-up.
        "two masks an image",
        "hog",
        ("--data.masks_per_image=2", "--optim.warmup_epochs=2.5"),
        masks=2,
    ),
    "rate2": Arm("twice the rate", "hog", ("--optim.base_lr=8e-3",)),
    "pixels": Arm("pixels", "hog", (PIXELS,)),
    "multiscale": Arm("pixels, all stages decoded", "pixels", (PIXELS,), "multiscale"),
    "multiscale-hog": Arm("HOG, all stages decoded", "hog", (), "multiscale"),
    "lowres": Arm("patches at 4 x 4 pixels", "pixels", (PIXELS,), "lowres"),
    "frequency": Arm("frequencies", "pixels", (PIXELS,), "frequency"),
    "ema": Arm("moving average of the encoder", "hog", (), "ema"),
    "width64": Arm("decoder of 64 channels", "hog", ("--model.decoder_dim=64",)),
    "width256": Arm("decoder of 256 channels", "hog", ("--model.decoder_dim=256",)),
    "warmup1": Arm("one epoch of warm-up", "hog", ("--optim.warmup_epochs=1",)),
}
COLUMNS = ("pretraining", "draws", "top-1, %", "against", "difference of each draw", "")


def pretraining(
    out: Path, name: str, epochs: float, size: int, at_once: int, flags: tuple[str, ...], program: tuple[str, ...]
) -> Job:
    """`pretrain_small_images` and what differs from it.

    Args:
        out: the study's folder.
        name: of the job.
        epochs: of 10,000 images each.
        size: of the images, in pixels.
        at_once: commands at a time.
        flags: what differs.
        program: that pretrains.
    """
    words = (
        "pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt",
        f"--data.image_size={size}", "--data.val_share=0", f"--epochs={epochs:g}", f"--out={out}/runs/{name}", *flags,
    )  # fmt: skip
    return Job(name, (*program, *words, *(() if at_once == 1 else ("--data.num_workers=1",))))  # cores are shared


def jobs(out: Path, epochs: float, size: int, at_once: int) -> Iterator[Job]:
    """All commands, arm by arm: what is cut off has whole ones."""
    for name, arm in ARMS.items():
        program = FCMAE if arm.part is None else (*OBJECTIVES, arm.part)
        yield pretraining(out, f"{name}-p", epochs / (arm.masks * arm.cost), size, at_once, arm.flags, program)
        start, needs = f"{out}/runs/{name}-p", f"{name}-p"
        network = [flag for flag in arm.flags if flag.startswith("--model.variant=")]  # the config has the shipped one
        if arm.part == "ema":
            start, needs = f"{out}/runs/{name}-average.safetensors", f"{name}-average"
            yield Job(needs, (*OBJECTIVES, "ema", "average", f"{out}/runs/{name}-p", start), (f"{name}-p",))
        for seed in range(DRAWS):
            draw = (f"{out}/tune-{PERCENT}-{seed}.csv", f"{out}/tune-test-{PERCENT}-{seed}.csv")
            tuning = (
                "finetune", "--config=finetune_small_images", f"--init={start}", f"--data.path={draw[0]}",
                f"--data.val_path={draw[1]}", f"--data.image_size={size}", f"--seed={seed}",
                f"--out={out}/runs/{name}-{seed}", *network,
                *(() if at_once == 1 else ("--data.num_workers=1",)),
            )  # fmt: skip
            yield Job(f"{name}-{seed}", (*FCMAE, *tuning), (needs,))


def compared(found: Mapping[str, Any]) -> list[Row]:
    """Each arm that has run against the one it is compared with."""
    values = [(one["arm"], f"{PERCENT}%", one["seed"], one["top1"]) for one in found["scores"]]
    ran = {arm for arm, *_ in values}
    return paired(values, {name: arm.against for name, arm in ARMS.items() if name in ran})


def result(found: Mapping[str, Any]) -> str:
    """The table."""
    rows = []
    for row in compared(found):
        _, _, num, top1, *difference = cells(row)
        arm = ARMS[row.arm]
        rows.append([arm.title, num, top1, "" if arm.against is None else ARMS[arm.against].title, *difference])
    return table(COLUMNS, rows, left=1)


def text(found: Mapping[str, Any]) -> str:
    """What is read in docs/results.md."""
    ran = {one["arm"] for one in found["scores"]}
    unknown = "" if "again" in ran else ", and it was not run"
    missing = [arm.title for name, arm in ARMS.items() if name not in ran]
    views = f"{10_000 * found['epochs']:,.0f}"
    last = f"On {in_words(found['machine'])}; {sum(found['seconds'].values()) / 3600:.1f} hours of commands."
    last += f" Not run: {'; '.join(missing)}." if missing else ""
    rows = [row for row in compared(found) if row.gain is not None]
    sure = [ARMS[row.arm].title for row in certain(rows)]
    many = (
        f"The intervals are of one comparison each. Of all {len(rows)} together, at 5 % by Holm's method, "
        f"{'; '.join(sure) or 'none'} {'are' if len(sure) > 1 else 'is'} certain. Where it is not said, views are "
        "equal, and compute is not: with 50 % hidden a view costs a quarter more than as shipped, with 75 % a "
        "third less. Patches of 8 are a grid of 6 x 6 here, and of 16 one of 3 x 3; 8 x 8 and 4 x 4, at 64 pixels, "
        "were not compared."
    )
    return f"""## The recipe for small images

Written by `studies/recipe.py`: tiny20 at {found["size"]} pixels, {views} views of pretraining each unless it is said,
fine-tuned on {PERCENT} % of the labels. Every draw is of labels and of 900 images to test on, training images all of
them, which pretraining has seen, and the same for every arm. There is one pretraining of each arm, so intervals are of
fine-tuning alone: what "another seed of pretraining" differs by is what a difference has to exceed{unknown}.
{textwrap.fill(many, 120, break_on_hyphens=False)}
{textwrap.fill(last, 120, break_on_hyphens=False)}

{result(found)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--epochs", type=float, default=20, help="of pretraining, 10,000 views each [20]")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels [64]")
    add_arguments(parser, "runs/recipe", at_once=12, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.epochs, args.size, args.at_once))
    wanted = chosen(args, every, "recipe.json")
    for job in wanted:  # what was written by a command whose end was not seen
        if job.name.endswith("-average") and not is_done(job, out):
            (out / "runs" / f"{job.name}.safetensors").unlink(missing_ok=True)
    prepare_tiny20(args.shards, out, {PERCENT: 0}, DRAWS)
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = {
        **facts(out, every),
        "epochs": args.epochs,
        "size": args.size,
        "scores": scores_by_seed(out, every, ARMS, DRAWS),
    }
    write_text(out / "recipe.json", json.dumps(found, indent=1) + "\n")
    print("\n" + result(found))
    if args.docs:
        write_found(args.docs / "recipe.json", found)
        write_text(args.docs / "results" / "recipe.md", text(found))
    end(failed)


if __name__ == "__main__":
    main()
