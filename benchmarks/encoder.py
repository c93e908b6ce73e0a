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
from collections.abc import Callable
from functools import partial

import timing
import timm
import torch
from torch import Tensor, nn

from fcmae.layouts import make_layout
from fcmae.networks.convnext import Encoder

SIDES = ("packed", "triton", "masked", "minkowski", "timm")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.compile and "minkowski" in args.sides:
        raise SystemExit("--compile: MinkowskiEngine's operations cannot be compiled, leave minkowski out")
    torch.manual_seed(0)
    images, mask, visible = timing.batch_of(args)
    info = timing.machine(images.device)
    print(timing.headline(args, visible, "forward + backward"))
    print(", ".join(f"{key} {value}" for key, value in info.items()))

    encoder = Encoder(args.variant).to(images.device)
    sides = {}
    for name in args.sides:
        if name == "timm":
            model, given = dense(args.variant, images)
            forward: Callable[[], Tensor] = partial(model, given)
        else:
            model, given = encoder, images
            forward = partial(encode, encoder, name, images, mask, visible)
        sides[name] = side(forward, model, given, args)
    found = timing.compare(sides, args.repeats, images.device, args.batch)
    timing.write_json(args.json, __file__, argv, vars(args), info, visible=visible, **found)


def encode(encoder: Encoder, backend: str, images: Tensor, mask: Tensor, visible: int) -> Tensor:
    features: Tensor = encoder(images, make_layout(backend, mask, visible))
    return features


def dense(variant: str, images: Tensor) -> tuple[nn.Module, Tensor]:
    """timm's model without pooling and classifier, and the images, both in the memory format that suits it."""
    model: nn.Module = timm.create_model(variant, num_classes=0, global_pool="")
    channels_last = torch.channels_last
    return model.to(images.device, memory_format=channels_last), images.to(memory_format=channels_last)  # type: ignore[call-overload]


def side(features: Callable[[], Tensor], model: nn.Module, images: Tensor, args: argparse.Namespace) -> timing.Side:
    """Forward and backward pass from the features' mean square, which stands for a loss."""
    computed = torch.compile(features, dynamic=False) if args.compile else features

    def forward() -> Tensor:
        with timing.autocast(args):
            return computed().square().mean()

    def step() -> None:
        torch.autograd.backward(forward())
        model.zero_grad()

    return timing.Side(step, forward, [images, *model.parameters()])


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time the encoder's forward and backward pass, packed against the other backends and timm.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=["packed", "masked"],
        metavar="NAME",
        help=f"what to time, the reference first: {', '.join(SIDES)}",
    )
    timing.add_flags(found, repeats=30)
    return found


if __name__ == "__main__":
    main()
