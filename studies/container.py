"""CONTAINER-LIGHT against ConvNeXt V2 at equal compute on small images: from scratch, and after masked pretraining.

    python studies/container.py SHARDS --out runs/container                 # a GPU with 16 cores
    python studies/container.py SHARDS --out runs/container --side 32 --epochs 30 --full-epochs 10 --seeds 3 --at-once 2
    python studies/container.py SHARDS --out runs/container --list          # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/sets.py). Both networks are scaled down to as many multiply-adds
on 64 x 64 pixels, to 2 %, and go through `pretrain_small_images` and `finetune_small_images`, which were made for the
ConvNeXt: so the rates of both are compared first, on training images that are held out. The test images are evaluated
once, at the last step. What is finished is not done again, and what was cut off resumes. What is found is in
OUT/container.json, and with `--docs DIR` there too and at the end of DIR/container.md.

The page has `--full-epochs 5`. An H200 with 16 cores, beside other work, made both encoders and all of 10 % of the
labels but three runs in twelve minutes; from these encoders 2 cores of an AMD EPYC made all labels, with `--seeds 3
--at-once 2`, in two hours and a half. The second line, which makes all of it on 2 cores, was not run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study import (
    FCMAE,
    Job,
    add_arguments,
    chosen,
    end,
    facts,
    last_scores,
    paired,
    prepare_tiny20,
    record_of,
    schedule,
    write_found,
    write_section,
)

from fcmae.evaluation.paired import cells
from fcmae.networks.spec import ContainerSpec, ConvNeXtSpec, NetworkSpec
from fcmae.tables import table

# CONTAINER-LIGHT keeps its MLP ratios, and attention in its last stage alone; three stages, as 8-pixel patches allow.
NETWORKS: dict[str, tuple[str, NetworkSpec]] = {
    "convnextv2": ("ConvNeXt V2", ConvNeXtSpec(depths=(2, 2, 6), dims=(40, 80, 160), stem_stride=2)),
    "container": (
        "CONTAINER-LIGHT",
        ContainerSpec(
            depths=(2, 3, 3),
            dims=(32, 64, 128),
            affinity=("static", "static", "mixed"),
            mlp_ratios=(8, 8, 4),
            num_heads=8,
            stem_stride=2,
        ),
    ),
}
RATES = {"scratch": ("4e-3", "8e-3"), "pretrained": ("2e-3", "4e-3")}  # that are tried of each network
CHOSEN = {"scratch": "4e-3", "pretrained": "4e-3"}  # the better one of both networks
DECAY = {"scratch": "1", "pretrained": "0.9"}
HEADING = "## Compared"
BATCH = ("--batch_size=256", "--optim.base_lr=1e-3")  # of pretraining, four times what is shipped
COLUMNS = ("labels", "network and start", "seeds", "top-1, %", "against ConvNeXt V2, of each seed", "")


def jobs(out: Path, epochs: float, seeds: int, full_epochs: float, side: int, at_once: int) -> Iterator[Job]:
    """All commands.

    Args:
        out: where they write.
        epochs: of pretraining.
        seeds: draws of the labels, with each share of them.
        full_epochs: of fine-tuning with all labels.
        side: of the images, in pixels.
        at_once: commands that share the cores.
    """

    def variant(network: str) -> tuple[str, ...]:
        spec = NETWORKS[network][1]
        return f"--model.variant={json.dumps(spec.settings())}", f"--model.stem_stride={spec.stem_stride}"

    def finetune(name: str, network: str, start: str, rate: str, paths: tuple[str, ...], *words: str) -> Job:
        command = (*FCMAE, "finetune", "--config=finetune_small_images", *paths)
        more = (f"--out={out}/runs/{name}", f"--optim.base_lr={rate}", f"--optim.layer_decay={DECAY[start]}", *tuning)
        if start == "scratch":
            return Job(name, (*command, *variant(network), *more, *words))
        needed = f"{network}-p"
        return Job(name, (*command, *variant(network), f"--init={out}/runs/{needed}", *more, *words), (needed,))

    size = f"--data.image_size={side}"
    pretraining = (size,) if at_once == 1 else (size, "--data.num_workers=3")
    tuning = (size,) if at_once == 1 else (size, "--data.num_workers=1")
    for network in NETWORKS:
        words = ("pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt")
        more = (f"--epochs={epochs:g}", "--data.val_share=0", f"--out={out}/runs/{network}-p", *BATCH, *pretraining)
        yield Job(f"{network}-p", (*FCMAE, *words, *more, *variant(network)))
    for network in NETWORKS:
        for start, tried in RATES.items():
            for rate in tried:
                paths = (f"--data.path={out}/tune-10-0.csv", f"--data.val_path={out}/tune-test-10-0.csv")
                yield finetune(f"tune-{network}-{start}-{rate}", network, start, rate, paths)
    whole = (f"--epochs={full_epochs:g}", f"--optim.warmup_epochs={full_epochs / 8:g}")
    for percent, flags in ((10, ()), (100, whole)):
        for seed in range(seeds):
            paths = (f"--data.path={out}/train-{percent}-{seed}.csv", f"--data.val_path={out}/test.csv")
            for network in NETWORKS:
                for start in RATES:
                    name = f"{network}-{start}-{percent}-{seed}"
                    yield finetune(name, network, start, CHOSEN[start], paths, f"--seed={seed}", *flags)


def collect(out: Path, wanted: list[Job], epochs: float, full_epochs: float, side: int) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    found = {name: line["top1"] for name, line in last_scores(out, wanted, "top1").items()}
    parts = {job: job.name.split("-") for job in wanted if job.name in found and not job.name.startswith("tune-")}
    told = facts(out, wanted)
    return {
        "commands": told["commands"],
        "seconds": told["seconds"],
        "epochs": epochs,
        "full_epochs": full_epochs,
        "side": side,
        "tried": {name.removeprefix("tune-"): value for name, value in found.items() if name.startswith("tune-")},
        "scores": [
            {
                "network": network,
                "start": start,
                "percent": int(percent),
                "seed": int(seed),
                "top1": found[job.name],
                "machine": record_of(job, out)["machine"],
            }
            for job, (network, start, percent, seed) in parts.items()
        ],
    }


def result(found: dict[str, Any]) -> str:
    """Tables by machine: both networks, seed by seed, by labels and start."""
    machines = dict.fromkeys(score["machine"] for score in found["scores"])
    return "\n\n".join(f"On {each}:\n\n{_on(each, found['scores'])}" for each in machines)


def _on(machine: str, found: list[dict[str, Any]]) -> str:
    """The table of one machine."""
    titles = {(network, start): f"{title}, {start}" for start in RATES for network, (title, _) in NETWORKS.items()}
    against = {
        title: None if network == "convnextv2" else titles["convnextv2", start]
        for (network, start), title in titles.items()
    }
    scores = (
        (titles[score["network"], score["start"]], f"{score['percent']}%", score["seed"], score["top1"])
        for score in found
        if score["machine"] == machine
    )
    return table(COLUMNS, map(cells, paired(scores, against)), left=2)


def section(found: dict[str, Any]) -> str:
    """The study's part of the page."""
    tried = [[name, f"{100 * value:.1f}"] for name, value in found["tried"].items()]
    return f"""{result(found)}

A scaled-down CONTAINER-LIGHT and a ConvNeXt V2 of as many multiply-adds, to 2 %, on tiny20 at {found["side"]} pixels,
1,000 photographs to test on. Fine-tuned by `finetune_small_images`, with all labels for {found["full_epochs"]:g}
epochs; pretrained by `pretrain_small_images` for {found["epochs"]:g}, once. A seed draws the same labels for both
networks; brackets are 95 % intervals of the mean over seeds (Student's t). Written by `studies/container.py` from
`docs/container.json`, which has the commands.

Rates that were compared, on training images that were held out, one run each:

{table(("", "top-1, %"), tried)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--epochs", type=float, default=60, help="of pretraining, each of 10,000 views [60]")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the labels [5]")
    parser.add_argument("--full-epochs", type=float, default=20, help="of fine-tuning with all labels [20]")
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels, a multiple of 8 [64]")
    add_arguments(parser, "runs/container", at_once=12, has_page=True)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    every = list(jobs(out, args.epochs, args.seeds, args.full_epochs, args.side, args.at_once))
    wanted = chosen(args, every, "container.json", tells_machines=True)
    prepare_tiny20(args.shards, out, dict.fromkeys((10, 100), args.seeds))
    failed = schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, args.epochs, args.full_epochs, args.side)
    print("\n" + result(found))
    for folder in filter(None, (out, args.docs)):
        write_found(folder / "container.json", found)
    if args.docs:
        write_section(args.docs, "container", HEADING, section)
    end(failed)


if __name__ == "__main__":
    main()
