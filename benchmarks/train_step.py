"""Time a whole pretraining step: encoder, decoder, loss, gradients and AdamW.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --sides packed masked minkowski engine timm
    python benchmarks/train_step.py --ratio 0.02 --sides packed timm-gradients
    python benchmarks/train_step.py --variant convnextv2_base --batch 64 --device cuda --precision bf16 --compile

| side | what it does |
| --- | --- |
| packed, masked, minkowski | the step, with this backend |
| engine | minkowski with MinkowskiEngine's own depthwise convolution, MinkowskiChannelwiseConvolution |
| timm | timm's dense model on whole images: forward, backward, AdamW; no decoder |
| timm-gradients | the same without AdamW |

Sides take turns within each repeat, and ratios are to the first. --ratio 0.02 hides one of 49 patches, the fewest that
leave something to reconstruct. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import cast

import timing
import torch
from torch import Tensor

from fcmae.layouts import Layout, MakeLayout, make_layout
from fcmae.masked import FCMAE, build_fcmae, masked_loss
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS

SIDES = ("packed", "triton", "masked", "minkowski", "engine", "timm", "timm-gradients")
TOLERANCE = 1e-4  # of the largest value, between the engine's convolution and ours, in float32


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.compile and {"minkowski", "engine"} & set(args.sides):
        raise SystemExit("--compile: MinkowskiEngine's operations cannot be compiled, leave minkowski and engine out")
    images, mask, visible, info = timing.begin(args, "whole step")
    if "engine" in args.sides:
        print(f"engine and minkowski differ by {engine_error(args.variant, images[:2], mask[:2]):.0e} at most")

    sides = {name: side(name, images, mask, visible, args) for name in args.sides}
    found = timing.compare(sides, args.repeats, images.device, args.batch)
    timing.write_json(__file__, argv, args, info, visible=visible, **found)


def side(name: str, images: Tensor, mask: Tensor, visible: int, args: argparse.Namespace) -> timing.Side:
    if name.startswith("timm"):
        model, images = timing.dense(args.variant, images)
        model.train()
        features = timing.compiled(args, model)
        learns = name != "timm-gradients"
        return timing.side(args, model, lambda: features(images).square().mean(), images, learns=learns)
    net = fcmae(name, args.variant).to(images.device).train()
    loss = partial(masked_loss, timing.compiled(args, net), images, mask, visible)
    return timing.side(args, net, loss, images, learns=True)


def fcmae(name: str, variant: str) -> FCMAE:
    layout: MakeLayout = engine_layout if name == "engine" else partial(make_layout, name)
    return build_fcmae(make_encoder(VARIANTS[variant]), make_layout=layout)


def engine_layout(mask: Tensor, num_visible: int | None) -> Layout:
    """The layout `minkowski` with what the engine offers for a depthwise convolution."""
    import MinkowskiEngine

    from fcmae.layouts.minkowski import Minkowski

    class Engine(Minkowski):
        def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            size = weight.shape[-1]
            conv = MinkowskiEngine.MinkowskiChannelwiseConvolution(f.shape[1], size, dimension=2)
            kernel = weight[:, 0].permute(2, 1, 0).flatten(0, 1)  # (size * size, C), along y first
            sparse = MinkowskiEngine.SparseTensor(
                f.to(weight.dtype), coordinate_map_key=self._level(f).key, coordinate_manager=self.manager
            )
            out = cast("Tensor", torch.func.functional_call(conv, {"kernel": kernel}, sparse).F)
            return out if bias is None else out + bias

    return Engine(mask)


def engine_error(variant: str, images: Tensor, mask: Tensor) -> float:
    """The largest difference between what engine and minkowski predict, as a share of the largest value.

    Raises SystemExit if it is too large for the two to compute the same.
    """
    model = fcmae("minkowski", variant).to(images.device)
    with torch.no_grad():
        expected, _ = model(images, mask)
        found, _ = FCMAE(model.encoder, model.decoder, engine_layout)(images, mask)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"engine and minkowski differ by {error:.1e}: they do not compute the same")
    return error


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=10)
    timing.add_sides(found, SIDES, ["packed", "masked", "timm"])
    return found


if __name__ == "__main__":
    main()
