"""`fcmae pretrain` and `fcmae finetune` with a part of the method taken out, for comparison.

    python studies/ablated.py dense pretrain --config ...
    python studies/ablated.py drop-grn pretrain --config ...
    python studies/ablated.py new-grn finetune --config ...

dense      the encoder is a dense network on the image whose hidden pixels are zero: they do not stay hidden, as each
           convolution carries features into them and out again (arXiv 2301.00808, Table 1, without sparse convolution)
drop-grn   GRN stays the identity: V2 without it; when fine-tuning, what pretraining learnt of it is dropped (Table 3)
new-grn    fine-tuning starts with GRN as it is before pretraining (Table 3)

These are no settings of fcmae, as nobody would want them for a result. This file replaces a function of the package in
its own process, and config.yaml does not say so: name the run after it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

import fcmae.finetuning
import fcmae.model
import fcmae.pretraining
from fcmae import cli
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.layouts import Masked
from fcmae.model import FCMAE
from fcmae.networks.layers import GRN
from fcmae.weights.files import Weights


class MaskedInput(Masked):
    """A dense network that sees the image without its hidden pixels."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(None)
        self._input = Masked(mask)

    def pack(self, x: Tensor) -> Tensor:
        return self._input.pack(x)


def dense_layout(backend: str, mask: Tensor, num_visible: int | None = None, grn_scope: str = "image") -> MaskedInput:
    """In place of `fcmae.layouts.make_layout`."""
    return MaskedInput(mask)


def reset_grn(model: nn.Module, *, learns: bool) -> int:
    """Make every GRN of the encoder, ours or timm's, the identity again; the number of them."""
    found = [module for module in model.modules() if isinstance(module, GRN | GlobalResponseNorm)]
    for module in found:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(learns)
    return len(found)


def ablate(name: str) -> None:
    """Replace what `name` says in the modules of this process."""
    if name == "dense":
        fcmae.model.make_layout = dense_layout  # type: ignore[attr-defined]  # an import of that module
        return
    learns = name == "new-grn"
    pretraining, finetuning = fcmae.pretraining.build_model, fcmae.finetuning.build_model

    def build_pretraining(cfg: PretrainConfig) -> FCMAE:
        net = pretraining(cfg)
        assert reset_grn(net.encoder, learns=learns), f"{cfg.model.variant} has no GRN"
        return net

    def build_finetuning(cfg: FinetuneConfig, weights: Weights, num_classes: int) -> nn.Module:
        net = finetuning(cfg, weights, num_classes)
        assert reset_grn(net, learns=learns), f"{weights.architecture.variant} has no GRN"
        return net

    fcmae.pretraining.build_model, fcmae.finetuning.build_model = build_pretraining, build_finetuning


def main(run: Callable[[list[str]], int] = cli.main) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("dense", "drop-grn", "new-grn"))
    parser.add_argument("command", choices=("pretrain", "finetune"))
    args, flags = parser.parse_known_args()
    if args.command == "finetune" and args.part == "dense":
        parser.error("dense is about pretraining: fine-tuning is dense anyway")
    if args.command == "pretrain" and args.part == "new-grn":
        parser.error("new-grn is about fine-tuning: before pretraining GRN is new anyway")
    ablate(args.part)
    return run([args.command, *flags])


if __name__ == "__main__":
    sys.exit(main())
