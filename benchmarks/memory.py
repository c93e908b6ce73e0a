"""What a GPU has to hold: weights, gradients and AdamW's moments, and what a forward pass keeps for backward.

    python benchmarks/memory.py --out docs/benchmarks/memory.json

Pretraining at 224 pixels, 60 % hidden, the published decoder, bfloat16. Nothing is computed: tensors without data go
through the model, and autograd's hooks count the storages that it keeps, at two batches, which tells what grows with
the images. With grad_checkpointing blocks are computed again in backward instead. 2 GiB
of the card are left for all else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fcmae.atomic import write_text
from fcmae.masked import FCMAE, build_fcmae, masked_loss
from fcmae.masking import num_visible
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table

NAMES = ("tiny", "base", "large", "huge")
SIZE, PATCH, RATIO = 224, 32, 0.6
RESERVED = 2 * 2**30  # of a card: its context, workspaces, what is not kept
BYTES = 4 + 4 + 8  # of a parameter: itself, its gradient, AdamW's two moments; all float32
GIB = 2**30


class Need(NamedTuple):
    """What pretraining holds.

    Attributes:
        parameters: of the model.
        fixed_bytes: whatever the batch: weights, gradients, moments, and weights in bfloat16.
        image_bytes: what a forward pass keeps for each image.
    """

    parameters: int
    fixed_bytes: int
    image_bytes: int


def need(name: str, grad_checkpointing: bool) -> Need:
    """Of a variant."""
    with FakeTensorMode():
        net = build_fcmae(make_encoder(VARIANTS[f"convnextv2_{name}"], grad_checkpointing=grad_checkpointing)).train()
        few, many = (kept_bytes(net, batch) for batch in (4, 8))
        parameters = sum(parameter.numel() for parameter in net.parameters())
        image = (many - few) // 4
        return Need(parameters, BYTES * parameters + few - 4 * image, image)


def kept_bytes(net: FCMAE, batch: int) -> int:
    """What a forward pass keeps for backward, without the parameters."""
    grid = SIZE // PATCH
    images, masks = torch.zeros(batch, 3, SIZE, SIZE), torch.zeros(batch, grid, grid, dtype=torch.bool)

    parameters = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # tensors without data have no addresses

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    visible = num_visible(grid * grid, RATIO)
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = masked_loss(net, images, masks, visible)
    del loss
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


def rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table."""
    made = []
    for one in found:
        cells = [one["variant"], f"{one['kept']['parameters'] / 1e6:.0f}"]
        for way in ("kept", "recomputed"):
            fixed, image = one[way]["fixed_bytes"], one[way]["image_bytes"]
            fits = [int((card * GIB - RESERVED - fixed) / image) for card in (24, 80)]
            cells += [f"{fixed / GIB:.1f}", f"{image / 2**20:.0f}", *(str(max(0, images)) for images in fits)]
        made.append(cells)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=NAMES, help=f"last words of their names [{' '.join(NAMES)}]")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    found = []
    for name in args.variants:
        ways = {"kept": need(name, False)._asdict(), "recomputed": need(name, True)._asdict()}
        found.append({"variant": name, **ways})
    print(table(COLUMNS, rows(found)))
    if args.out:
        content = timing.content(__file__, sys.argv[1:] if argv is None else argv, args, timing.machine())
        write_text(args.out, json.dumps(content | {"rows": found}, indent=1, default=str) + "\n")


COLUMNS = (
    "variant", "parameters, M", "fixed, GiB", "an image, MiB", "images in 24 GiB", "in 80 GiB",
    "recomputing: fixed, GiB", "an image, MiB", "images in 24 GiB", "in 80 GiB",
)  # fmt: skip

if __name__ == "__main__":
    main()
