"""`fcmae pretrain` and `fcmae finetune` with a part of the method taken out, for comparison.

    python studies/ablated.py dense pretrain --config ...
    python studies/ablated.py drop-grn pretrain --config ...
    python studies/ablated.py new-grn finetune --config ...

dense      the encoder is a dense network on the image whose hidden pixels are zero: they do not stay hidden, as each
           convolution carries features into them and out again (arXiv 2301.00808, Table 1, without sparse convolution)
drop-grn   GRN stays the identity: V2 without it; when fine-tuning, what pretraining learnt of it is dropped (Table 3)
new-grn    fine-tuning starts with GRN as it is before pretraining (Table 3)

These are no settings of fcmae, as nobody would want them for a result. A model is built of other parts and handed to
the same loop, and config.yaml does not say so: name the run after it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fcmae import threads

threads.prepare()  # as the commands do, before torch is loaded

from torch import Tensor, nn

from fcmae import finetuning, pretraining, starting
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.data.find import find_labelled
from fcmae.heads import Classifier
from fcmae.layouts import Masked
from fcmae.masked import FCMAE
from fcmae.networks.layers import GRN
from fcmae.networks.spec import describe
from fcmae.options import load


class MaskedInput(Masked):
    """A dense network that sees the image without its hidden pixels."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(None)
        self._input = Masked(mask)

    def pack(self, x: Tensor) -> Tensor:
        return self._input.pack(x)


def masked_input(mask: Tensor, num_visible: int | None) -> MaskedInput:
    """What FCMAE makes its layout with."""
    return MaskedInput(mask)


def reset_grn(model: nn.Module, *, learns: bool) -> int:
    """Make every GRN of the model the identity again; the number of them."""
    found = [module for module in model.modules() if isinstance(module, GRN)]
    for module in found:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(learns)
    return len(found)


def pretraining_model(part: str, cfg: PretrainConfig) -> FCMAE:
    """The model of the settings, with what they start from, but for `part`: dense or drop-grn."""
    net = pretraining.build_model(cfg)
    pretraining.start(cfg, net)
    if part == "dense":
        return FCMAE(net.encoder, net.decoder, masked_input)
    if not reset_grn(net.encoder, learns=False):
        raise ValueError(f"model.variant = {describe(net.encoder.spec)} has no GRN: name a variant of V2")
    return net


def finetuning_model(part: str, cfg: FinetuneConfig) -> Classifier:
    """The classifier of the settings, with what it starts from, but for `part`: drop-grn or new-grn."""
    if cfg.data.path is None:
        raise ValueError("data.path is missing: give a folder of class folders or a CSV file")
    class_names = find_labelled(cfg.data.path).class_names
    assert class_names is not None
    net = finetuning.build_model(cfg, starting.starting_weights(cfg), len(class_names))
    if not reset_grn(net, learns=part == "new-grn"):
        raise ValueError(f"the network, {describe(net.encoder.spec)}, has no GRN: name a variant of V2")
    return net


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("dense", "drop-grn", "new-grn"))
    parser.add_argument("command", choices=("pretrain", "finetune"))
    args, flags = parser.parse_known_args(argv)
    if args.command == "finetune" and args.part == "dense":
        parser.error("dense is about pretraining: fine-tuning is dense anyway")
    if args.command == "pretrain" and args.part == "new-grn":
        parser.error("new-grn is about fine-tuning: before pretraining GRN is new anyway")
    prog, processes = f"ablated.py {args.part} {args.command}", int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if args.command == "pretrain":
            pretrain_cfg = load(PretrainConfig, flags, prog=prog, num_processes=processes)
            return pretraining.pretrain(pretrain_cfg, pretraining_model(args.part, pretrain_cfg)).status
        finetune_cfg = load(FinetuneConfig, flags, prog=prog, num_processes=processes)
        return finetuning.finetune(finetune_cfg, finetuning_model(args.part, finetune_cfg)).status
    except (ValueError, OSError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
