"""Time a whole fine-tuning step: our classifier and timm's of the same weights, with gradients and AdamW.

    python benchmarks/finetune_step.py
    python benchmarks/finetune_step.py --sides fcmae-gradients timm-gradients
    python benchmarks/finetune_step.py --variant convnextv2_base --size 224 --device cuda --precision bf16 --compile

| side | what it does |
| --- | --- |
| fcmae | our classifier: forward, cross-entropy, backward, AdamW |
| timm | the same of timm's model |
| fcmae-gradients, timm-gradients | the same without AdamW |

Both see the same whole images, and are compared first. Sides take turns within each repeat, and ratios are to the
first. Speed is reported, never asserted.
"""

from __future__ import annotations

import argparse
import sys

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.heads import Classifier
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS
from fcmae.weights.formats import to_state

SIDES = ("fcmae", "timm", "fcmae-gradients", "timm-gradients")
NUM_CLASSES = 1000
TOLERANCE = 1e-3  # of the largest logit, in float32 on the CPU or with TF32 off


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    images, _, _, info = timing.begin(args, "whole fine-tuning step")
    labels = torch.arange(args.batch, device=images.device) % NUM_CLASSES
    print(f"fcmae and timm differ by {difference(args.variant, images[:2]):.0e} at most")
    sides = {name: side(name, images, labels, args) for name in args.sides}
    found = timing.compare(sides, args.repeats, images.device, args.batch)
    timing.write_json(__file__, argv, args, info, **found)


def side(name: str, images: Tensor, labels: Tensor, args: argparse.Namespace) -> timing.Side:
    which, _, gradients = name.partition("-")
    model, images = classifier(which, args.variant, images)
    model.train()
    logits = timing.compiled(args, model)
    return timing.side(args, model, lambda: F.cross_entropy(logits(images), labels), images, learns=not gradients)


def classifier(which: str, variant: str, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Our classifier or timm's, of the same weights, on the images' device, and the images as it takes them."""
    torch.manual_seed(0)
    ours = Classifier(make_encoder(VARIANTS[variant]), NUM_CLASSES)
    if which == "fcmae":
        return ours.to(images.device), images
    theirs, images = timing.dense(variant, images, NUM_CLASSES, "avg")
    theirs.load_state_dict(to_state(ours.state_dict(), VARIANTS[variant], "timm"))
    return theirs, images


@torch.no_grad()
def difference(variant: str, images: Tensor) -> float:
    """The largest between the logits of our classifier and timm's, as a share of the largest logit.

    Raises SystemExit if it is too large for the two to compute the same.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, expected = (model(given) for model, given in (classifier(w, variant, images) for w in ("fcmae", "timm")))
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"fcmae and timm differ by {error:.1e}: they do not compute the same")
    return error


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=20)
    timing.add_sides(found, SIDES, ["fcmae", "timm"])
    found.set_defaults(batch=32, size=128, ratio=0)
    return found


if __name__ == "__main__":
    main()
