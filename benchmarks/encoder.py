"""Time the encoder's forward and backward pass, packed against the other backends and timm's dense model.

    python benchmarks/encoder.py
    python benchmarks/encoder.py --sides packed masked minkowski
    python benchmarks/encoder.py --variant convnextv2_tiny --batch 8 --json tiny.json
    python benchmarks/encoder.py --ratio 0 --sides packed timm
    python benchmarks/encoder.py --variant convnextv2_base --batch 64 --device cuda --precision bf16 --compile

timm's model sees the whole image; with --ratio 0 it computes the same as the encoder and one norm more. Sides take
turns within each repeat, and ratios are to the first. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import timing
from torch import Tensor

from fcmae.layouts import make_layout
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import VARIANTS

SIDES = ("packed", "triton", "masked", "minkowski", "timm")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.compile and "minkowski" in args.sides:
        raise SystemExit("--compile: MinkowskiEngine's operations cannot be compiled, leave minkowski out")
    images, mask, visible, info = timing.begin(args, "forward + backward")
    encoder = make_encoder(VARIANTS[args.variant]).to(images.device)
    sides = {name: side(name, encoder, images, mask, visible, args) for name in args.sides}
    found = timing.compare(sides, args.repeats, images.device, args.batch)
    timing.write_json(__file__, argv, args, info, visible=visible, **found)


def encode(encoder: StagedEncoder, backend: str, images: Tensor, mask: Tensor, visible: int) -> Tensor:
    features: Tensor = encoder(images, make_layout(backend, mask, visible))
    return features


def side(
    name: str, encoder: StagedEncoder, images: Tensor, mask: Tensor, visible: int, args: argparse.Namespace
) -> timing.Side:
    """Forward and backward pass from the features' mean square, which stands for a loss."""
    if name == "timm":
        model, images = timing.dense(args.variant, images)
        features = timing.compiled(args, partial(model, images))
    else:
        model, features = encoder, timing.compiled(args, partial(encode, encoder, name, images, mask, visible))
    return timing.side(args, model, lambda: features().square().mean(), images, learns=False)


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=30)
    timing.add_sides(found, SIDES, ["packed", "masked"])
    return found


if __name__ == "__main__":
    main()
