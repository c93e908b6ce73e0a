"""Count what the encoder's forward and backward pass has to do, and how long this machine needs for that at best.

    python benchmarks/floor.py
    python benchmarks/floor.py --variant convnextv2_base --batch 4

Each operation that reaches the device does some floating point operations and reads and writes its tensors once. At
best it takes the longer of the two, at the rates that this machine shows in a large matrix product and a large copy.
The sum over all operations is the floor of the code as it is: only other operations, or fewer, could be faster.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from statistics import median
from typing import Any

import timing
import torch
from encoder import side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fcmae.networks.build import make_encoder
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Floating point operations and bytes of each kind of operation inside the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[tuple[float, int]]] = defaultdict(list)  # name -> (operations, bytes) of each call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            func.is_view
            or func is torch.ops.aten._unsafe_view.default
            or not (written := [t for t in tree_leaves(out) if isinstance(t, Tensor)])
        ):
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        num_bytes = sum(t.numel() * t.element_size() for t in read + written)
        count = flop_registry.get(func.overloadpacket)
        # An operation without a formula counts one for each element that it writes.
        flops = count(*args, **(kwargs or {}), out_val=out) if count else sum(t.numel() for t in written)
        if func.overloadpacket is CONVOLUTION_BACKWARD:
            # torch's formula takes no account of groups. Both gradients cost what the forward pass does.
            flops = 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
        self.calls[str(func.overloadpacket).removeprefix("aten.")].append((flops, num_bytes))
        return out


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    images, mask, visible, info = timing.begin(args, "forward + backward")
    encoder = make_encoder(VARIANTS[args.variant]).to(images.device)
    step = side("packed", encoder, images, mask, visible, args).step

    size = 8192 if images.is_cuda else 2048
    square = torch.randn(size, size, device=images.device)
    large = torch.randn(2**26, device=images.device)
    there = torch.empty_like(large)
    runs = {"product": lambda: square @ square, "copy": lambda: there.copy_(large), "step": step}
    with timing.autocast(args):
        seconds = {
            name: median(all_) for name, all_ in timing.interleaved(runs, args.repeats, 2, images.device).items()
        }
    flops_per_s = 2 * size**3 / seconds["product"]
    bytes_per_s = 2 * large.nbytes / seconds["copy"]
    print(f"\nproduct of {size} x {size}: {flops_per_s / 1e9:.0f} GFLOP/s; copy: {bytes_per_s / 1e9:.1f} GB/s\n")

    with Counter() as counter:
        step()
    rows: list[list[str]] = []
    total = [0.0, 0.0, 0.0]
    found = {
        name: (
            sum(flops for flops, _ in calls),
            sum(num for _, num in calls),
            sum(max(flops / flops_per_s, num / bytes_per_s) for flops, num in calls),
        )
        for name, calls in counter.calls.items()
    }
    for name, (flops, num_bytes, floor) in sorted(found.items(), key=lambda item: -item[1][2]):
        total = [total[0] + flops, total[1] + num_bytes, total[2] + floor]
        if len(rows) < 14:
            columns = [f"{flops / 1e9:.2f}", f"{num_bytes / 1e6:.0f}", f"{1000 * floor:.1f}"]
            rows.append([name, str(len(counter.calls[name])), *columns])
    rows.append(["all", "", f"{total[0] / 1e9:.2f}", f"{total[1] / 1e6:.0f}", f"{1000 * total[2]:.1f}"])
    print(table(["operation", "calls", "GFLOP", "MB", "floor, ms"], rows))
    alone = 1000 * total[0] / flops_per_s
    print(f"\nmeasured: {1000 * seconds['step']:.1f} ms; the products' arithmetic alone: {alone:.1f} ms")
    operations = {name: {"flops": f, "bytes": b, "floor_s": s} for name, (f, b, s) in found.items()}
    timing.write_json(
        __file__,
        argv,
        args,
        info,
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
        step_s=seconds["step"],
        operations=operations,
    )


def parser() -> argparse.ArgumentParser:
    return timing.parser_of(__doc__, repeats=8)


if __name__ == "__main__":
    main()
