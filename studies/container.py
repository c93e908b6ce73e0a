"""CONTAINER-LIGHT against ConvNeXt V2 at equal compute on small images: from scratch, and after masked pretraining.

    python studies/container.py SHARDS --out runs/container                 # a GPU with 16 cores
    python studies/container.py SHARDS --out runs/container --at-once 1     # 2 cores: days
    python studies/container.py SHARDS --out runs/container --list          # the commands, without running them

SHARDS: the folder of tiny20's shards (see studies/datasets.py). Both networks are scaled down to as many multiply-adds
on 64 x 64 pixels, to 2 %, and go through `pretrain_small_images` and `finetune_small_images`, which were made for the
ConvNeXt: so the rates of both are compared first, on training images that are held out. The test images are evaluated
once, at the last step. What is finished is not done again, and what was cut off resumes. What is found is in
OUT/container.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import few, folder_rows, write_csv
from run_all import STUDIES, Job, schedule, shown
from small_images import accuracy

from fcmae.atomic import write_text
from fcmae.evaluation.paired import METRIC, Comparison, cells, compare
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
CHOSEN = {"scratch": "8e-3", "pretrained": "4e-3"}  # --scratch-lr and --pretrained-lr give CONTAINER-LIGHT another
DECAY = {"scratch": "1", "pretrained": "0.9"}
EPOCHS = {10: (), 100: ("--epochs=20", "--optim.warmup_epochs=2.5")}  # by per cent of the labels
COLUMNS = ("labels", "network and start", "seeds", "top-1, %", "against ConvNeXt V2, of each seed", "")


def jobs(out: Path, epochs: float, seeds: int, rates: dict[str, str]) -> Iterator[Job]:
    """All commands.

    Args:
        out: where they write.
        epochs: of pretraining.
        seeds: draws of the labels, with each share of them.
        rates: of fine-tuning CONTAINER-LIGHT, from scratch and pretrained.
    """

    def variant(network: str) -> tuple[str, ...]:
        spec = NETWORKS[network][1]
        return f"--model.variant={json.dumps(spec.settings())}", f"--model.stem_stride={spec.stem_stride}"

    def finetune(name: str, network: str, start: str, rate: str, paths: tuple[str, ...], *words: str) -> Job:
        command = (sys.executable, "-m", "fcmae.cli", "finetune", "--config=finetune_small_images", *paths)
        more = (f"--out={out}/runs/{name}", f"--optim.base_lr={rate}", f"--optim.layer_decay={DECAY[start]}", *words)
        if start == "scratch":
            return Job(name, (*command, *variant(network), *more))
        return Job(name, (*command, *variant(network), f"--init={out}/runs/{network}", *more), (network,))

    for network in NETWORKS:
        words = ("pretrain", "--config=pretrain_small_images", f"--data.path={out}/tiny20/unlabeled.txt")
        more = (f"--epochs={epochs:g}", "--data.val_share=0", f"--out={out}/runs/{network}", *variant(network))
        yield Job(network, (sys.executable, "-m", "fcmae.cli", *words, *more))
    for network in NETWORKS:
        for start, tried in RATES.items():
            for rate in tried:
                paths = (f"--data.path={out}/tune.csv", f"--data.val_path={out}/tune-test.csv")
                yield finetune(f"tune-{network}-{start}-{rate}", network, start, rate, paths)
    for percent, flags in EPOCHS.items():
        for seed in range(seeds):
            paths = (f"--data.path={out}/train-{percent}-{seed}.csv", f"--data.val_path={out}/test.csv")
            for network in NETWORKS:
                for start in RATES:
                    rate = rates[start] if network == "container" else CHOSEN[start]
                    name = f"{network}-{start}-{percent}-{seed}"
                    yield finetune(name, network, start, rate, paths, f"--seed={seed}", *flags)


def prepare(shards: Path, out: Path, seeds: int) -> None:
    """The images, and which labels are used; those of the trials are of a draw of their own."""
    command = [sys.executable, str(STUDIES / "datasets.py"), "tiny20", str(shards), str(out / "tiny20")]
    subprocess.run(command, check=True)
    rows = folder_rows(out / "tiny20" / "train")
    write_csv(out / "test.csv", folder_rows(out / "tiny20" / "val"))
    for percent in EPOCHS:
        for seed in range(seeds):
            write_csv(out / f"train-{percent}-{seed}.csv", few(rows, percent / 100, seed))
    labelled = few(rows, 0.1, 100)
    write_csv(out / "tune.csv", labelled)
    write_csv(out / "tune-test.csv", few([row for row in rows if row not in set(labelled)], 0.1, 101))


def collect(out: Path, wanted: list[Job], epochs: float) -> dict[str, Any]:
    """What the finished runs have found, and where."""
    done = {job.name: job for job in wanted if (out / "jobs" / f"{job.name}.json").exists()}
    found = {name: value for name in done if (value := accuracy(out / "runs" / name)) is not None}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    parts = {name: name.split("-") for name in found if not name.startswith("tune-")}
    return {
        "machine": {"gpu": gpu, "cores": os.cpu_count(), "cpu": platform.machine(), "torch": torch.__version__},
        "epochs": epochs,
        "commands": {name: shown(job, out) for name, job in done.items()},
        "seconds": {name: json.loads((out / "jobs" / f"{name}.json").read_text())["seconds"] for name in done},
        "tried": {name.removeprefix("tune-"): value for name, value in found.items() if name.startswith("tune-")},
        "scores": [
            {"network": network, "start": start, "percent": int(percent), "seed": int(seed), "top1": found[name]}
            for name, (network, start, percent, seed) in parts.items()
        ],
    }


def result(found: dict[str, Any]) -> str:
    """Both networks, seed by seed, by labels and start."""
    titles = {(network, start): f"{title}, {start}" for start in RATES for network, (title, _) in NETWORKS.items()}
    comparison: Any = {
        "amounts": [{"labels": f"{percent}%"} for percent in EPOCHS],
        "arms": [
            {"name": title, "against": None if network == "convnextv2" else titles["convnextv2", start]}
            for (network, start), title in titles.items()
        ],
        "scores": [
            {
                "arm": titles[score["network"], score["start"]],
                "labels": f"{score['percent']}%",
                "seed": score["seed"],
                "scores": {METRIC: score["top1"]},
            }
            for score in found["scores"]
        ],
    }
    checked: Comparison = comparison
    return table(COLUMNS, [cells(row) for row in compare(checked)], left=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder of tiny20's shards")
    parser.add_argument("--out", type=Path, default=Path("runs/container"), help="where to write")
    parser.add_argument("--epochs", type=float, default=60, help="of pretraining, each of 10,000 views [60]")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the labels [5]")
    for start, rate in CHOSEN.items():
        parser.add_argument(f"--{start}-lr", default=rate, help=f"base_lr of CONTAINER-LIGHT, {start} [{rate}]")
    parser.add_argument("--at-once", type=int, default=12, help="commands at a time, each of one thread [12]")
    parser.add_argument("--only", nargs="*", default=[""], metavar="PREFIX", help="jobs whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    rates = {"scratch": args.scratch_lr, "pretrained": args.pretrained_lr}
    every = list(jobs(out, args.epochs, args.seeds, rates))
    wanted = [job for job in every if job.name.startswith(tuple(args.only))]
    if args.list:
        for job in wanted:
            print(f"# {job.name}\n{shown(job, out)}")
        return
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    prepare(args.shards, out, args.seeds)
    schedule(wanted, out, args.at_once, None if args.at_once == 1 else 1)
    found = collect(out, every, args.epochs)
    write_text(out / "container.json", json.dumps(found, indent=1) + "\n")
    print("\n" + result(found))


if __name__ == "__main__":
    main()
