"""Whether the first command works on any folder: five kinds of images, nothing given but the path and the hours.

    python benchmarks/first_hour.py --json docs/benchmarks/first_hour.json           # about an hour, on a quiet machine
    python benchmarks/first_hour.py --group CGROUP ...                               # as a member of that control group

Each folder is pretrained on, fine-tuned where it is labelled, and reported, as a new user types it; its images are
drawn by docs/pictures.py. A run should take at most a quarter more than its hours, and all of its processes together
less than 4 GB: of a page that several share each counts its part. With `--group` the commands run in a control group
that root has made and limited, which kills what takes more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import tifffile
import timing
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import pictures

from fcmae import threads
from fcmae.tables import table


class Kind(NamedTuple):
    """A folder of images. is_labelled: whether they lie in a folder for each class."""

    title: str
    number: int
    suffix: str
    write: Callable[[Image.Image, Path, np.random.Generator], None]
    is_labelled: bool = False


def mixed(image: Image.Image, path: Path, rng: np.random.Generator) -> None:
    width, height = rng.integers(200, 500, 2).tolist()
    image.resize((width, height)).save(path)


def thumbnail(image: Image.Image, path: Path, rng: np.random.Generator) -> None:
    image.save(path)


def grey16(image: Image.Image, path: Path, rng: np.random.Generator) -> None:
    tifffile.imwrite(path, np.asarray(image.convert("L").resize((160, 120))).astype(np.uint16) * 40 + 500)


def four_bands(image: Image.Image, path: Path, rng: np.random.Generator) -> None:
    image = image.resize((192, 192))
    bands = np.concatenate([np.asarray(image), np.asarray(image.convert("L"))[..., None]], axis=-1)
    tifffile.imwrite(path, bands.astype(np.uint16) * 30, photometric="minisblack", planarconfig="contig")


def huge(image: Image.Image, path: Path, rng: np.random.Generator) -> None:
    image.resize((6000, 4000), Image.Resampling.BICUBIC).save(path, quality=85)


KINDS = {
    "photos": Kind("photographs of mixed sizes", 300, "jpg", mixed),
    "thumbs": Kind("thumbnails of 64 pixels", 10_000, "png", thumbnail, is_labelled=True),
    "grey16": Kind("16-bit grey TIFFs", 120, "tif", grey16, is_labelled=True),
    "bands4": Kind("four-band TIFFs", 100, "tif", four_bands),
    "huge": Kind("images of 6000 x 4000", 50, "jpg", huge),
}


def write_images(folder: Path, kind: Kind, number: int) -> None:
    """What is there already stays."""
    for i in range(number):
        shape = pictures.KINDS[i % len(pictures.KINDS)]
        path = folder / (shape if kind.is_labelled else "") / f"{i}.{kind.suffix}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(i)
            kind.write(pictures.draw(shape, rng, 64), path, rng)


def memory_of(pid: int) -> int:
    """Bytes of a process and all below it now; of a page that several share each counts its part."""
    used = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for one in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                used += one.memory_full_info().pss
    return used


def join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def command(out: Path, group: Path | None, hours: float, *words: str) -> dict[str, Any]:
    """Run one, and say what it took. hours: that it was given; 0 where it takes none."""
    words += ("--hours", f"{hours:g}") if hours else ()
    print("fcmae " + " ".join(words), flush=True)
    started, peak, ended = time.perf_counter(), 0, threading.Event()
    with (out / f"{words[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fcmae.cli", *words],
            cwd=out,
            stdout=log,
            stderr=log,
            env={
                key: value for key, value in os.environ.items() if key not in threads.SETTINGS
            },  # timing's are no user's
            preexec_fn=partial(join, group) if group else None,
        )
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            ended.wait(1)  # summing up costs time of the cores
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "command": list(words),
        "status": process.returncode,
        "seconds": seconds,
        "peak_bytes": peak,
    }
    if hours:
        found["of_hours"] = seconds / 3600 / hours
    return found


def rows(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A row a command."""
    return [
        [
            KINDS[name].title if i == 0 else "",
            one["command"][0],
            str(one["status"]),
            f"{one['seconds'] / 60:.1f}",
            f"{one['of_hours']:.2f}" if "of_hours" in one else "",
            f"{one['peak_bytes'] / 1e9:.2f}",
        ]
        for name, commands in found.items()
        for i, one in enumerate(commands)
    ]


COLUMNS = ("folder", "command", "status", "minutes", "of its hours", "memory, GB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/first_hour"), help="where all is written")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="folders")
    parser.add_argument("--hours", type=float, default=0.1, help="for each run [0.1]")
    parser.add_argument("--share", type=float, default=1, help="of the images that a folder has [1]")
    parser.add_argument("--group", type=Path, help="folder of a control group in which the commands run")
    parser.add_argument("--json", type=Path, help="file for the figures; of folders that are not run now its own stay")
    args = parser.parse_args(argv)
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = timing.machine()
    before = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"runs": {}}
    found, was = before["runs"], before.get("machine", facts)
    if {**was, "load": None} != {**facts, "load": None}:
        sys.exit(f"--json {args.json} is of another machine: give another file")
    for name in args.kinds:
        kind = KINDS[name]
        write_images(out / name, kind, max(8, round(args.share * kind.number)))
        run = partial(command, out, args.group)
        found[name] = [run(args.hours, "pretrain", name, "--out", f"runs/{name}", "--overwrite")]
        if kind.is_labelled:
            tuned = ("--out", f"runs/{name}-tuned", "--overwrite")
            found[name].append(run(args.hours, "finetune", name, "--init", f"runs/{name}", *tuned))
        found[name].append(run(0, "report", f"runs/{name}"))
        if args.json:
            runs = {key: found[key] for key in KINDS if key in found}
            timing.write_json(__file__, sys.argv[1:] if argv is None else argv, args, facts, runs=runs)
    print("\n" + table(COLUMNS, rows({key: found[key] for key in args.kinds}), left=2))


if __name__ == "__main__":
    main()
