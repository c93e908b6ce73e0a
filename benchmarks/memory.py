"""What a GPU has to hold: weights, gradients and AdamW's moments, and what a forward pass keeps for backward.

    python benchmarks/memory.py --out docs/benchmarks/memory.json

Pretraining at 224 pixels, 60 % hidden, the published decoder, bfloat16: nothing is computed. Tensors without data go
through the model, and autograd's hooks count the storages that it keeps, with and without grad_checkpointing. Beside
these stand what one step of a GPU needs for a while: kernels' own workspace, and the largest of what is not kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fcmae.atomic import write_text
from fcmae.masked import build_fcmae, masked_loss
from fcmae.masking import num_visible
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table

NAMES = ("tiny", "base", "large", "huge")
SIZE, PATCH, RATIO, BATCH = 224, 32, 0.6, 4
BYTES = 4 + 4 + 8  # of a parameter: itself, its gradient, AdamW's two moments; all float32
GIB = 2**30


def saved_per_image(name: str, grad_checkpointing: bool) -> tuple[int, int]:
    """Parameters of the model, and bytes that a forward pass keeps for each image."""
    grid = SIZE // PATCH
    visible = num_visible(grid * grid, RATIO)
    with FakeTensorMode():
        spec = VARIANTS[f"convnextv2_{name}"]
        net = build_fcmae(Encoder(spec, grad_checkpointing=grad_checkpointing)).train()
        parameters = list(net.parameters())
        images = torch.zeros(BATCH, 3, SIZE, SIZE)
        masks = torch.zeros(BATCH, grid, grid, dtype=torch.bool)
        kept: dict[int, torch.UntypedStorage] = {p.untyped_storage()._cdata: p.untyped_storage() for p in parameters}
        given = set(kept)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                masked_loss(net, images, masks, visible)
        saved = sum(storage.nbytes() for key, storage in kept.items() if key not in given)
        return sum(p.numel() for p in parameters), saved // BATCH


def rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table."""
    made = []
    for one in found:
        fixed = BYTES * one["parameters"] / GIB
        cells = [one["variant"], f"{one['parameters'] / 1e6:.0f}", f"{fixed:.1f}"]
        for key in ("saved_bytes", "saved_bytes_checkpointed"):
            fits = [int((card - 2 - fixed) * GIB / one[key]) for card in (24, 80)]
            cells += [f"{one[key] / 2**20:.0f}", *(str(max(0, images)) for images in fits)]
        made.append(cells)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=NAMES, help=f"last words of their names [{' '.join(NAMES)}]")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    found = []
    for name in args.variants:
        parameters, saved = saved_per_image(name, False)
        _, fewer = saved_per_image(name, True)
        found.append(
            {"variant": name, "parameters": parameters, "saved_bytes": saved, "saved_bytes_checkpointed": fewer}
        )
    print(table(COLUMNS, rows(found)))
    if args.out:
        content = timing.content(__file__, sys.argv[1:] if argv is None else argv, args, timing.machine())
        write_text(args.out, json.dumps(content | {"rows": found}, indent=1, default=str) + "\n")


COLUMNS = (
    "variant", "parameters, M", "weights, gradients, moments, GiB",
    "kept an image, MiB", "images in 24 GiB", "in 80 GiB",
    "with grad_checkpointing, MiB", "images in 24 GiB", "in 80 GiB",
)  # fmt: skip

if __name__ == "__main__":
    main()
