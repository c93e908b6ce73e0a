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
from contextlib import nullcontext
from unittest import mock

import timing
import torch
from encoder import dense
from torch import Tensor, nn

from fcmae.loss import reconstruction_loss
from fcmae.model import FCMAE
from fcmae.networks.convnext import Encoder
from fcmae.training.optim import parameter_groups

SIDES = ("packed", "triton", "masked", "minkowski", "engine", "timm", "timm-gradients")
TOLERANCE = 1e-4  # of the largest value, between the engine's convolution and ours, in float32


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.compile and {"minkowski", "engine"} & set(args.sides):
        raise SystemExit("--compile: MinkowskiEngine's operations cannot be compiled, leave minkowski and engine out")
    torch.manual_seed(0)
    images, mask, visible = timing.batch_of(args)
    info = timing.machine(images.device)
    print(timing.headline(args, visible, "whole step"))
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    if "engine" in args.sides:
        print(f"engine and minkowski differ by {engine_error(args.variant, images[:2], mask[:2]):.0e} at most")

    sides = {name: side(name, images, mask, visible, args) for name in args.sides}
    found = timing.compare(sides, args.repeats, images.device, args.batch)
    timing.write_json(args.json, __file__, argv, vars(args), info, visible=visible, **found)


def side(name: str, images: Tensor, mask: Tensor, visible: int, args: argparse.Namespace) -> timing.Side:
    if name.startswith("timm"):
        model, images = dense(args.variant, images)
    else:
        model = fcmae(name, args.variant).to(images.device)
    model.train()
    adamw = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95))
    computed: nn.Module = torch.compile(model, dynamic=False) if args.compile else model  # type: ignore[assignment]

    def forward() -> Tensor:
        with timing.autocast(args):
            if name.startswith("timm"):
                features: Tensor = computed(images)
                return features.square().mean()
            with engine() if name == "engine" else nullcontext():
                pred, site_mask = computed(images, mask, visible)
            return reconstruction_loss(pred, images, site_mask)

    def step() -> None:
        torch.autograd.backward(forward())
        if name != "timm-gradients":
            adamw.step()
        model.zero_grad()

    return timing.Side(step, forward, [images, *model.parameters()])


def fcmae(name: str, variant: str) -> FCMAE:
    return FCMAE(Encoder(variant), backend="minkowski" if name == "engine" else name)


def engine() -> mock._patch[type]:
    """Within it, the backend `minkowski` convolves with what the engine offers, MinkowskiChannelwiseConvolution."""
    import MinkowskiEngine

    from fcmae.layouts.minkowski import KERNEL_SIZE, Minkowski

    class Engine(Minkowski):
        def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            conv = MinkowskiEngine.MinkowskiChannelwiseConvolution(f.shape[1], KERNEL_SIZE, dimension=2)
            kernel = weight[:, 0].permute(2, 1, 0).flatten(0, 1)  # (49, C), along y first
            sparse = MinkowskiEngine.SparseTensor(
                f.to(weight.dtype), coordinate_map_key=self._level(f).key, coordinate_manager=self.manager
            )
            out: Tensor = torch.func.functional_call(conv, {"kernel": kernel}, sparse).F
            return out if bias is None else out + bias

    return mock.patch("fcmae.layouts.minkowski.Minkowski", Engine)


def engine_error(variant: str, images: Tensor, mask: Tensor) -> float:
    """The largest difference between what engine and minkowski predict, as a share of the largest value.

    Raises SystemExit if it is too large for the two to compute the same.
    """
    model = fcmae("minkowski", variant).to(images.device)
    with torch.no_grad():
        expected, _ = model(images, mask)
        with engine():
            found, _ = model(images, mask)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"engine and minkowski differ by {error:.1e}: they do not compute the same")
    return error


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Time a whole pretraining step: encoder, decoder, loss, gradients and AdamW.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=["packed", "masked", "timm"],
        metavar="NAME",
        help=f"what to time, the reference first: {', '.join(SIDES)}",
    )
    timing.add_flags(found, repeats=10)
    return found


if __name__ == "__main__":
    main()
