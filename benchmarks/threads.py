"""Time pretraining on a CPU under settings of how OpenMP's threads wait, on a quiet machine and on a busy one.

    python benchmarks/threads.py --json docs/benchmarks/threads.json
    OMP_NUM_THREADS=4 python benchmarks/threads.py --busy 4 --settings default prepare

Each timing is of a process of its own, as OpenMP reads its settings once, and the settings take turns in each repeat.
A busy machine is this one beside processes that do nothing but count. `prepare` is what fcmae.threads chooses itself;
the others are variables of the environment, NAME=VALUE, or `default`. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fcmae import threads
from fcmae.data.cores import num_cores

SPINS = (100, 1000, 10_000, 100_000)
SETTINGS = ("default", "OMP_WAIT_POLICY=PASSIVE", *(f"GOMP_SPINCOUNT={count}" for count in SPINS), "prepare")
COUNT = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    import timing  # with torch, which a process that measures must not load yet

    from fcmae.tables import table

    found: dict[str, dict[str, dict[str, Any]]] = {
        place: {name: {"images_per_s": [], "did": []} for name in args.settings} for place in ("quiet", "busy")
    }
    shares = dict[str, list[float]](quiet=[], busy=[])
    info = timing.machine()
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    for _ in range(args.repeats):
        for place, sides in found.items():
            with counting(args.busy if place == "busy" else 0):
                shares[place].append(threads.busy())
                for name, side in sides.items():
                    speed, did = in_process(name, argv)
                    side["images_per_s"].append(speed)
                    side["did"].append(did)
    rows = []
    for place, sides in found.items():
        for name, side in sides.items():
            speeds = side["images_per_s"]
            side["median"] = statistics.median(speeds)
            ratio = side["median"] / sides[args.settings[0]]["median"]
            spread = f"{min(speeds):.1f} - {max(speeds):.1f}"
            rows.append([place, name, f"{side['median']:.1f}", spread, f"{ratio:.2f} x"])
    print(f"\nconvnextv2_atto, {args.size} px, steps of {args.batch} images; others use, at the start of each repeat:")
    print("; ".join(f"{place} {', '.join(f'{share:.0%}' for share in each)}" for place, each in shares.items()) + "\n")
    print(table(["machine", "setting", "images/s", "range", f"/ {args.settings[0]}"], rows, left=2))
    timing.write_json(__file__, argv, args, info, results=found, others=shares)


@contextmanager
def counting(number: int) -> Iterator[None]:
    """Beside so many processes that keep a core busy each. They end with this one, however it ends."""
    started = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def in_process(setting: str, argv: Sequence[str]) -> tuple[float, str]:
    """Images/s under a setting, and what was set."""
    env = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    if "=" in setting:
        name, _, value = setting.partition("=")
        env[name] = value
    command = [sys.executable, __file__, *argv, "--measure", setting]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    speed, did = json.loads(done.stdout.splitlines()[-1])
    return speed, did


def measure(args: argparse.Namespace) -> tuple[float, str]:
    """Images/s of pretraining in this process, and what was set."""
    did = threads.prepare() if args.measure == "prepare" else args.measure

    from fcmae.bench import Candidate, time_candidate
    from fcmae.config import BenchConfig
    from fcmae.options import load

    words = f"--device cpu --log.trackers none --data.image_size {args.size} --batch_size {args.batch}"
    cfg = load(BenchConfig, [*words.split(), "--seconds", str(args.seconds)], prog="threads")
    return time_candidate(cfg, Candidate("packed", "fp32", args.batch), from_files=False).images_per_s, did


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time pretraining on a CPU under settings of how OpenMP's threads wait.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="NAME", help="the reference first")
    found.add_argument("--busy", type=int, default=num_cores(), help="processes that keep a busy machine busy")
    found.add_argument("--batch", type=int, default=32, help="images of a step")
    found.add_argument("--size", type=int, default=128, help="height and width of the images")
    found.add_argument("--seconds", type=float, default=5.0, help="of each timing, after its warm-up")
    found.add_argument("--repeats", type=int, default=5, help="timings of each")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    found.add_argument("--measure", help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    main()
