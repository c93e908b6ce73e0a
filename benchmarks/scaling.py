"""Time how cost grows with the work: images, resolution, share of visible patches.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --repeats 9 --json scaling.json

Three sweeps of the forward and backward pass of the packed encoder and of the whole model with its loss; of the masked
encoder where the share of visible patches grows. A line is fitted to the medians of each: R^2 and the largest
deviation from it tell how straight it is. All points are timed in turn within each repeat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch

from fcmae.layouts import make_layout
from fcmae.masked import FCMAE, build_fcmae, masked_loss
from fcmae.masking import num_visible, random_mask
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table

PATCH = 32
RATIO = 0.6
BATCHES = (4, 8, 16, 32)
SIZES = (96, 128, 160, 192, 224, 256, 288, 320)
SHARES = tuple(tenth / 10 for tenth in range(1, 11))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    timing.check_repeats(args)
    device = torch.device(args.device)
    info = timing.machine(device)
    print(f"forward + backward, {args.variant}, fp32, {args.repeats} repeats")
    print(", ".join(f"{key} {value}" for key, value in info.items()))

    torch.manual_seed(0)
    model = build_fcmae(make_encoder(VARIANTS[args.variant])).to(device)
    sizes = [(args.batch, size, num_visible((size // PATCH) ** 2, RATIO)) for size in args.sizes]
    patches = (args.size // PATCH) ** 2
    # Where nothing is hidden there is nothing to reconstruct, so the last point of all curves hides one patch.
    visible = sorted({min(max(1, round(share * patches)), patches - 1) for share in SHARES})
    shares = [(args.batch, args.size, count) for count in visible]
    sweeps = {
        "images": ([(batch, args.size, num_visible(patches, RATIO)) for batch in args.batches], args.batches),
        "resolution": (sizes, [count for _, _, count in sizes]),
        "visible share": (shares, [count / patches for count in visible]),
    }
    steps = {}
    for sweep, (points, _) in sweeps.items():
        for curve in ("packed", "whole model", *(["masked"] if sweep == "visible share" else [])):
            for i, point in enumerate(points):
                steps[sweep, curve, i] = partial(run, model, curve, *inputs(*point, device), point[2])
    seconds = timing.interleaved(steps, args.repeats, warmup=1, device=device)

    found: dict[str, Any] = {}
    rows = []
    for sweep, (points, x) in sweeps.items():
        for curve in dict.fromkeys(curve for name, curve, _ in steps if name == sweep):
            timings = [timing.summary(seconds[sweep, curve, i]) for i in range(len(points))]
            fit = line(x, [point["median_s"] for point in timings])
            found.setdefault(sweep, {})[curve] = {"x": list(x), "points": timings, **fit}
            ends = f"{1000 * timings[0]['median_s']:.1f} - {1000 * timings[-1]['median_s']:.1f} ms"
            rows.append([f"{sweep}, {curve}", ends, f"{fit['r2']:.4f}", f"{100 * fit['deviation']:.1f} %"])
    print("\n" + table(["sweep", "first - last point", "R^2", "largest deviation"], rows))
    timing.write_json(__file__, argv, args, info, sweeps=found)


def inputs(batch: int, size: int, visible: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mask = random_mask((size // PATCH, size // PATCH), visible, [(0, i) for i in range(batch)])
    return torch.randn(batch, 3, size, size, device=device), torch.from_numpy(mask).to(device)


def run(model: FCMAE, curve: str, images: torch.Tensor, mask: torch.Tensor, visible: int) -> None:
    if curve == "whole model":
        loss = masked_loss(model, images, mask, visible)
    else:
        loss = model.encoder(images, make_layout(curve, mask, visible)).square().mean()
    torch.autograd.backward(loss)
    model.zero_grad()


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line, R^2, and the largest distance from the line as a share of the line's value."""
    slope, intercept = np.polyfit(x, y, 1)
    fitted = slope * np.asarray(x) + intercept
    off = np.asarray(y) - fitted
    r2 = 1 - np.square(off).sum() / np.square(np.asarray(y) - np.mean(y)).sum()
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": float(r2),
        "deviation": float(np.abs(off / fitted).max()),
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time how cost grows with the work: images, resolution, share of visible patches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--variant", choices=VARIANTS, default="convnextv2_atto", metavar="NAME", help="the encoder")
    found.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images at a time, in the first sweep")
    found.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="height and width, in the second sweep")
    found.add_argument("--batch", type=int, default=4, help="images at a time, in the other sweeps")
    found.add_argument("--size", type=int, default=224, help="height and width, in the other sweeps")
    found.add_argument("--repeats", type=int, default=5, help="timings of each point")
    found.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    return found


if __name__ == "__main__":
    main()
