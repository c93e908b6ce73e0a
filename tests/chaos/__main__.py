"""The parts in turn, each for its share of the time; their counts go into a JSON file, and that into a page."""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chaos import corruptions, full_disk, hostile, kills, overwrites
from chaos.page import write
from chaos.samples import Samples

Trial = Callable[[Samples, random.Random, Path], tuple[str, str | None]]
PARTS: dict[str, Trial] = {
    "kills": kills.trial,
    "corruptions": corruptions.trial,
    "overwrites": overwrites.trial,
    "hostile": hostile.trial,
    "full_disk": full_disk.trial,
}
Counts = dict[str, dict[str, dict[str, int]]]


def run_one(part: str, seed: int, number: int, samples: Samples, failures: Path) -> tuple[str, str | None]:
    """One trial. Returns its kind, and what failed; its files then stay in a folder of `failures`."""
    folder = Path(tempfile.mkdtemp(prefix=f"{part}-{seed}-{number}-", dir=failures))
    kind, wrong = PARTS[part](samples, random.Random(f"{part}:{seed}:{number}"), folder)
    if wrong is None:
        shutil.rmtree(folder)
    else:
        print(f"{part}:{seed}:{number} {kind}: {ascii(wrong)[1:-1]}\n    its files: {folder}", flush=True)
    return kind, wrong


def run_for(seconds: float, parts: list[str], seed: int, samples: Samples, failures: Path) -> Counts:
    """Trials of all parts, each for the same time, until the time is up; at least one of each."""
    spent, numbers = dict.fromkeys(parts, 0.0), Counter[str]()
    counts: Counts = {part: {} for part in parts}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or min(numbers[part] for part in parts) == 0:
        part = min(parts, key=lambda name: (numbers[name] > 0, spent[name]))
        begun = time.monotonic()
        kind, wrong = run_one(part, seed, numbers[part], samples, failures)
        spent[part] += time.monotonic() - begun
        numbers[part] += 1
        found = counts[part].setdefault(kind, {"tried": 0, "failed": 0})
        found["tried"] += 1
        found["failed"] += wrong is not None
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long, default 10")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn, default 0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--only", help="do one trial again: PART:SEED:NUMBER, as it was printed")
    parser.add_argument("--docs", type=Path, help="add the counts to reliability.json there, and write its page")
    args = parser.parse_args()
    failures = Path(tempfile.mkdtemp(prefix="chaos-"))
    samples = Samples(failures / "samples", failures / "disk" if full_disk.mount(failures / "disk") else None)
    begun = time.monotonic()
    if args.only is not None:
        part, seed, number = args.only.split(":")
        kind, wrong = run_one(part, int(seed), int(number), samples, failures)
        counts: Counts = {part: {kind: {"tried": 1, "failed": int(wrong is not None)}}}
    else:
        counts = run_for(args.minutes * 60, args.parts, args.seed, samples, failures)
    found = [(part, kind, n["tried"], n["failed"]) for part, kinds in counts.items() for kind, n in kinds.items()]
    for part, kind, tried, failed in found:
        print(f"{part:12} {kind:24} {tried:6} tried {failed:6} failed")
    if args.docs is not None and args.only is None:
        print(write(args.docs, counts, args.seed, (time.monotonic() - begun) / 60))
    failed = any(failed for *_, failed in found)
    if samples.disk is not None:
        subprocess.run(["umount", str(samples.disk)], check=False)
    if not failed:  # else they are what its command lines name
        shutil.rmtree(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
