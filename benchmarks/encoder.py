"""Time the encoder's forward and backward, packed against the other backends.

    python benchmarks/encoder.py
    python benchmarks/encoder.py --backends packed masked minkowski
    python benchmarks/encoder.py --variant convnextv2_tiny --batch 8 --json tiny.json

The backends are timed in turn within each repeat, so that whatever else slows the machine slows all of them; ratios to
the first are taken repeat by repeat, and quartiles tell the spread. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fcmae.encoder import VARIANTS, Encoder
from fcmae.masking import num_visible, random_mask
from fcmae.sparse import make_layout

BACKENDS = ("packed", "masked", "minkowski")
WARMUP = 2  # repeats that are not counted: allocation and the choice of kernels


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.patch % 32 or args.size % args.patch:
        raise SystemExit(f"--size {args.size} --patch {args.patch}: give a multiple of --patch and of 32")
    if args.repeats < 2:
        raise SystemExit(f"--repeats {args.repeats}: quartiles need at least 2")
    device = torch.device(args.device)
    info = machine(device)
    grid = (args.size // args.patch, args.size // args.patch)
    visible = num_visible(grid[0] * grid[1], args.ratio)
    print(
        f"{args.variant}, batch {args.batch}, {args.size} px, {visible} of {grid[0] * grid[1]} patches visible, "
        f"float32, forward + backward, {args.repeats} repeats"
    )
    print(", ".join(f"{key} {value}" for key, value in info.items()))

    torch.manual_seed(0)
    encoder = Encoder(args.variant).to(device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    mask = torch.from_numpy(random_mask(grid, visible, [(0, i) for i in range(args.batch)])).to(device)

    def step(backend: str) -> Callable[[], None]:
        def run() -> None:
            encoder.zero_grad()
            encoder(images, make_layout(backend, mask, visible)).square().mean().backward()

        return run

    steps = {backend: step(backend) for backend in args.backends}
    times: dict[str, list[float]] = {backend: [] for backend in args.backends}
    for repeat in range(WARMUP + args.repeats):
        for backend in args.backends:
            elapsed = timed(steps[backend], device)
            if repeat >= WARMUP:
                times[backend].append(elapsed)
    first, *others = args.backends
    ratios = {other: [b / a for a, b in zip(times[first], times[other], strict=True)] for other in others}

    width = 5 + max(map(len, args.backends))
    print(f"\n{'':{width}}{'median':>12}{'quartiles':>22}{'images/s':>12}")
    for backend, seconds in times.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        spread, images_per_s = f"{low:.1f} - {high:.1f} ms", 1000 * args.batch / middle
        print(f"{backend:{width}}{f'{middle:.1f} ms':>12}{spread:>22}{images_per_s:12.1f}")
    for other, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{other:{width}}{f'{middle:.2f} x':>12}{f'{low:.2f} - {high:.2f} x':>22}  the time of {first}")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        result = {"settings": settings, "machine": info, "visible": visible, "seconds": times, "ratios": ratios}
        args.json.write_text(json.dumps(result, indent=2))


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that one call takes, its work on the device included."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, str]:
    """What a timing depends on besides the code."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": f"{load:.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's name, as exactly as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time the encoder's forward and backward, packed against the other backends.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--variant", choices=VARIANTS, default="convnextv2_atto", metavar="NAME", help="the encoder")
    found.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=["packed", "masked"],
        metavar="NAME",
        help=f"what to time, the reference first: {', '.join(BACKENDS)}",
    )
    found.add_argument("--batch", type=int, default=16, help="images at a time")
    found.add_argument("--size", type=int, default=224, help="height and width of the images")
    found.add_argument("--patch", type=int, default=32, help="side of a mask patch")
    found.add_argument("--ratio", type=float, default=0.6, help="share of the patches that is hidden")
    found.add_argument("--repeats", type=int, default=30, help="timings of each backend")
    found.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every timing here")
    return found


if __name__ == "__main__":
    main()
