"""Seconds and memory that a run with millions of images takes to start, to go on, and to hold, with names made up.

    python benchmarks/scale.py
    python benchmarks/scale.py --counts 10000000 --workers 4 --steps 500

A list of N paths is written, and a run on it started, stopped after some steps and resumed, each in a process of its
own. Every path leads to the same small JPEG, and the network is tiny. So what is timed is what grows with the number of
names: the index, its file, its fingerprint, the split, and the order. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from timing import machine, write_json

from fcmae import pretraining
from fcmae.config import PretrainConfig
from fcmae.tables import table

BATCH = 64
MEBIBYTE = 2**20


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.run is not None:
        print(json.dumps(watched_run(args.run, args.workers, args.steps, args.since)))
        return
    info = machine()
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in args.counts:
            place = Path(folder) / str(count)
            place.mkdir()
            write_names(place, count)
            found[f"{count:,}, first"] = started(place, args)
            index_bytes = (place / "run" / "files.json").stat().st_size
            found[f"{count:,}, resumed"] = started(place, args) | {"index_bytes": index_bytes}
    print("\n" + table(HEADER, [[name, *row(figures)] for name, figures in found.items()]))
    write_json(__file__, argv, args, info, scale=found)


HEADER = [
    "images",
    "first batch",
    "of the processor",
    "peak",
    "main",
    "a worker's own",
    "after the last step",
    "a worker's own",
]


def row(figures: dict[str, Any]) -> list[str]:
    cells = [f"{figures['first_batch_s']:.1f} s", f"{figures['first_batch_cpu_s']:.1f} s"]
    cells += [f"{figures['peak_bytes'] / MEBIBYTE:.0f} MiB"]
    for memory in (figures["first"], figures["last"]):
        own = max(memory["workers_own_bytes"], default=0)
        cells += [f"{memory['main_bytes'] / MEBIBYTE:.0f} MiB", f"{own / MEBIBYTE:.0f} MiB"]
    return cells


def write_names(place: Path, count: int) -> None:
    """Paths of some 60 bytes, a thousand in a folder, in no order. Each leads to one file, by links to its folder."""
    folder = place / "photographs"
    folder.mkdir()
    Image.new("RGB", (32, 32), (120, 110, 90)).save(folder / "image.jpg")
    for i in range(1000):
        (folder / f"{i:03}").symlink_to(".")
    with (place / "names.txt").open("w") as file:
        for i in range(count):
            number = f"{i * 7919 % count if count % 7919 else i:09}"
            file.write(f"{folder}/{number[:3]}/{number[3:6]}/{number[6:]}/image.jpg\n")


def started(place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run in a process of its own, which goes on with the last one there."""
    command = [sys.executable, __file__, "--run", str(place), "--since", str(time.time())]
    command += ["--workers", str(args.workers), "--steps", str(args.steps)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def watched_run(place: Path, workers: int, steps: int, since: float) -> dict[str, Any]:
    """Train for some steps, and measure at the first and at the last."""
    figures, seen, others = dict[str, Any](), [0], set(multiprocessing.active_children())

    def look(*_: object) -> None:
        seen[0] += 1
        if seen[0] == 1:
            used = resource.getrusage(resource.RUSAGE_SELF)
            figures["first_batch_s"] = time.time() - since
            figures["first_batch_cpu_s"] = used.ru_utime + used.ru_stime
            figures["peak_bytes"] = used.ru_maxrss * 1024
            figures["first"] = memory(others)
        if seen[0] == steps:
            figures["last"] = memory(others)
            os.kill(os.getpid(), signal.SIGTERM)  # as a cluster's stop: it is saved, and the next goes on from there

    settings = {
        "out": str(place / "run"),
        "device": "cpu",
        "batch_size": BATCH,
        "epochs": 1,
        "optim": {"warmup_epochs": 0},
        "monitor": {"num_images": 0},
        "data": {"path": [str(place / "names.txt")], "image_size": 32, "num_workers": workers},
        "model": {"variant": {"depths": [1, 1, 1, 1], "dims": [8] * 4}, "mask_patch": 8, "stem_stride": 1}
        | {"decoder_dim": 8},
    }
    cfg = PretrainConfig.model_validate(settings)
    net = pretraining.build_model(cfg)
    net.register_forward_pre_hook(look)
    pretraining.pretrain(cfg, net)
    return figures


def memory(others: Collection[BaseProcess]) -> dict[str, Any]:
    """What this process holds, and what each worker that is none of the others holds and shares with no other."""
    children = [child for child in multiprocessing.active_children() if child not in others]
    workers = [child.pid for child in children if child.pid is not None]
    own = [psutil.Process(pid).memory_full_info().uss for pid in workers]
    return {"main_bytes": psutil.Process().memory_info().rss, "workers_own_bytes": own}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time and weigh the start of runs with millions of made-up names.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--counts", nargs="+", type=int, default=[1_000_000, 10_000_000], help="images of each run")
    found.add_argument("--workers", type=int, default=2, help="processes that decode")
    found.add_argument("--steps", type=int, default=200, help="steps of each start")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    found.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    found.add_argument("--since", type=float, help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    main()
