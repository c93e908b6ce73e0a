"""Time a network's features, whole and pruned: multiply-adds, parameters and milliseconds of a forward pass.

    python benchmarks/pruned.py
    python benchmarks/pruned.py --keep .75 .5 .25 --batch 1
    python benchmarks/pruned.py --variant convnextv2_tiny --device cuda --precision bf16 --compile --sides torch

whole is the variant; hidden-K has the share K of each block's hidden channels, and blocks-K of each stage's blocks.
Those by onnxruntime are the files that `fcmae export` writes, on the CPU with as many threads as torch. Weights are
random: only the shape tells in time. All take turns within each repeat, and ratios are to the whole network of the same
side. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import get_args

import timing
import torch
from torch import Tensor

from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.pruning import What, multiply_adds, uniformly
from fcmae.tables import table

SIDES = ("torch", "onnxruntime")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if "onnxruntime" in args.sides and (args.device, args.precision) != ("cpu", "fp32"):
        raise SystemExit("--sides onnxruntime is float32 on the CPU: leave it out with --sides torch")
    images, _, _, info = timing.begin(args, "forward")
    whole = VARIANTS[args.variant]
    if not isinstance(whole, ConvNeXtSpec):
        raise SystemExit(f"--variant {args.variant} is no ConvNeXt, and what is pruned is one")
    specs = {f"{what}-{keep:g}": uniformly(whole, keep, what) for what in get_args(What) for keep in args.keep}
    encoders = {name: Encoder(spec) for name, spec in {"whole": whole, **specs}.items()}
    counts = {
        name: {
            "multiply_adds": multiply_adds(encoder, (args.size, args.size)),
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        }
        for name, encoder in encoders.items()
    }
    steps = {
        (side, name): forward(side, args, encoder.to(images.device), images)
        for side in args.sides
        for name, encoder in encoders.items()
    }
    seconds = timing.interleaved(steps, args.repeats, device=images.device)
    titles = {(side, name): name if side == "torch" else f"{name}, {side}" for side, name in steps}
    ratios = {titles[key]: timing.ratio(each, seconds[key[0], "whole"]) for key, each in seconds.items()}
    results = {titles[key]: {**timing.summary(each), **counts[key[1]]} for key, each in seconds.items()}
    rows = []
    for name, found in results.items():
        low, high = (f"{1000 * value:.1f}" for value in found["quartiles_s"])
        macs, time = found["multiply_adds"], ratios[name]
        rows.append(
            [
                name,
                f"{macs / 1e9:.3f} G",
                f"{macs / counts['whole']['multiply_adds']:.2f}",
                f"{found['parameters'] / 1e6:.2f} M",
                f"{1000 * found['median_s']:.1f} ms",
                f"{low} - {high}",
                f"{time['time']:.2f}",
                "{:.2f} - {:.2f}".format(*time["quartiles"]),
            ]
        )
    header = ["", "multiply-adds", "/ whole", "parameters", "median", "quartiles", "time / whole", "quartiles"]
    print("\n" + table(header, rows))
    timing.write_json(__file__, argv, args, info, results=results, ratios=ratios)


def forward(side: str, args: argparse.Namespace, encoder: Encoder, images: Tensor) -> Callable[[], object]:
    """The features of the images, in the precision of the flags and without gradients."""
    if side == "onnxruntime":
        from exported import session_of

        session = session_of(encoder)
        return lambda: session.run(None, {"images": images.numpy()})
    features = timing.compiled(args, encoder)

    def step() -> object:
        with torch.no_grad(), timing.autocast(args):
            return features(images)

    return step


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=20)
    timing.add_sides(found, SIDES, SIDES)
    found.add_argument("--keep", nargs="+", type=float, default=[0.5], metavar="SHARE", help="what stays")
    found.set_defaults(batch=16, ratio=0)
    return found


if __name__ == "__main__":
    main()
