"""Time ways to compute the depthwise convolution of packed rows, forward and backward, at the encoder's four stages.

    python benchmarks/depthwise.py
    python benchmarks/depthwise.py --variant convnextv2_tiny --batch 8 --stages 1 2
    python benchmarks/depthwise.py --variant convnextv2_base --batch 256 --device cuda --precision bf16
    python benchmarks/depthwise.py --assemble 80 90          # needs Triton, no GPU

| way | what it does |
| --- | --- |
| canvas | a zero canvas, conv2d, a gather, and what autograd makes of them |
| packed | what the packed layout does: on a CPU both loops in C, elsewhere the same as canvas |
| windows | each patch with its halo, (b + 6) x (b + 6), cut out of the canvas; conv2d without padding |
| table | no canvas: for each of 49 offsets a gather of all sites' neighbours and a multiply-add |
| matmul | canvas, but the weight gradient is a matrix product for each channel, over the windows' rows |
| shifts | canvas, but the weight gradient is 49 products of shifted canvases, summed |
| kernels | the Triton kernels, on a GPU |

Ways take turns within each repeat; ratios are to canvas. On a GPU a call is a replayed CUDA graph, so that the device's
time is measured and not the host's, over several inputs in turn, so that none is still in the cache; beside it stand
the bytes moved (forward f and out; backward the gradient, its result, f and the gradient again), as a share of what a
copy moves per second. `--assemble` compiles the
kernels for GPUs of these capabilities, with f in float32 and the rest in --precision as under autocast, and prints what
ptxas made of each: registers, bytes of stack (where spills go), instructions.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.layouts import Packed, make_layout
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table

WAYS = ("canvas", "packed", "windows", "table", "matmul", "shifts", "kernels")
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}  # of the largest value: two orders of summation, and one rounding
Conv = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.assemble:
        assemble(args)
        return
    images, mask, visible, info = timing.begin(args, "depthwise convolution, forward + backward")
    device = images.device
    speed = copy_speed(device) if device.type == "cuda" else None
    ways = [way for way in args.ways if way != "kernels" or device.type == "cuda"]
    stages = {}
    for stage in args.stages:
        b, channels = (args.patch // 4) >> (stage - 1), VARIANTS[args.variant].dims[stage - 1]
        stages[f"stage {stage}"] = found = compare(args, mask, visible, ways, b, channels, speed)
        print(f"\nstage {stage}: b = {b}, C = {channels}, {VARIANTS[args.variant].depths[stage - 1]} blocks")
        print(rows(found, speed))
    if len(stages) == 4:
        depths = VARIANTS[args.variant].depths
        print("\nall blocks of the encoder, sum of medians")
        for way in ways:
            total = sum(
                n * part[way][p]["median_s"]
                for n, part in zip(depths, stages.values(), strict=True)
                for p in ("forward", "backward")
            )
            print(f"{way:10} {1000 * total:8.1f} ms")
    timing.write_json(__file__, argv, args, info, visible=visible, copy_bytes_per_s=speed, stages=stages)


def compare(
    args: argparse.Namespace,
    mask: Tensor,
    visible: int,
    ways: list[str],
    b: int,
    channels: int,
    speed: float | None,
) -> dict[str, Any]:
    """Time the ways at one stage, after a check that they compute the same.

    speed: bytes per second of a copy, for the share of it that each has; None leaves that out.
    """
    device, shape = mask.device, (len(mask), visible, b, b, channels)
    inputs = [
        torch.randn(shape, device=device, requires_grad=True) for _ in range(num_inputs(device, math.prod(shape)))
    ]
    weight = torch.randn(channels, 1, 7, 7, device=device, requires_grad=True)
    bias = torch.randn(channels, device=device, requires_grad=True)
    convs = {way: conv_of(way, mask, visible, b) for way in ways}
    convs = {way: timing.compiled(args, conv) for way, conv in convs.items()}

    def forward(way: str) -> list[Tensor]:
        with timing.autocast(args):
            return [convs[way](f, weight, bias) for f in inputs]

    with timing.side_stream(device):  # autograd goes back in the stream of the forward pass, and this one is recorded
        outs = {way: forward(way) for way in ways}
    grads = [torch.randn_like(out) for out in outs[ways[0]]]

    def backward(way: str) -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad(out, (f, weight, bias), grad, retain_graph=True)
            for out, f, grad in zip(outs[way], inputs, grads, strict=True)
        ]

    expected = [outs[ways[0]][0], *backward(ways[0])[0]]
    for way in ways[1:]:
        for ours, theirs in zip([outs[way][0], *backward(way)[0]], expected, strict=True):
            error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
            if not error < TOLERANCES[args.precision]:
                raise SystemExit(f"{way} and {ways[0]} differ by {error:.1e}: they do not compute the same")
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for way in ways:
        steps[way, "forward"] = timing.recorded(partial(forward, way), device)
        steps[way, "backward"] = timing.recorded(partial(backward, way), device)
    taken = timing.interleaved(steps, args.repeats, device=device)
    seconds = {key: [value / len(inputs) for value in values] for key, values in taken.items()}
    wide, narrow = inputs[0].nbytes, grads[0].nbytes
    moved = {"forward": wide + narrow, "backward": 2 * wide + 2 * narrow}
    found: dict[str, Any] = {}
    for way in ways:
        found[way] = {part: timing.summary(seconds[way, part]) for part in moved}
        both = {w: [x + y for x, y in zip(seconds[w, "forward"], seconds[w, "backward"], strict=True)] for w in ways}
        found[way]["ratio"] = timing.ratio(both[way], both[ways[0]])
        if speed is not None:
            found[way]["share"] = {p: n / found[way][p]["median_s"] / speed for p, n in moved.items()}
    return found


def num_inputs(device: torch.device, num_values: int) -> int:
    """As many float32 inputs as fill a GPU's cache four times, at least two; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(4 * cache / (4 * num_values)))


def rows(found: dict[str, Any], speed: float | None) -> str:
    header = ["", "forward ms", "quartiles", "backward ms", "quartiles", "time / first", "quartiles"]
    header += [] if speed is None else ["forward / copy", "backward / copy"]
    lines = []
    for way, result in found.items():
        line = [way]
        for part in ("forward", "backward"):
            low, high = result[part]["quartiles_s"]
            line += [f"{1000 * result[part]['median_s']:.2f}", f"{1000 * low:.2f} - {1000 * high:.2f}"]
        line += [f"{result['ratio']['time']:.2f}", "{:.2f} - {:.2f}".format(*result["ratio"]["quartiles"])]
        line += [] if speed is None else [f"{100 * share:.0f} %" for share in result["share"].values()]
        lines.append(line)
    return table(header, lines)


def conv_of(way: str, mask: Tensor, visible: int, b: int) -> Conv:
    if way == "kernels":
        return make_layout("triton", mask, visible).depthwise_conv
    layout = Packed(mask, visible)
    if way == "canvas":
        return lambda f, weight, bias: layout.pack(dense(layout.unpack(f), weight, bias, 3))
    if way == "packed":
        return layout.depthwise_conv
    if way == "windows":
        return lambda f, weight, bias: dense(windows(layout, f), weight, bias, 0).reshape(f.shape)
    if way == "table":
        table = site_table(layout, b)
        return lambda f, weight, bias: _TableConv.apply(f, weight.flatten(1).t(), table) + bias
    assert way in ("matmul", "shifts")
    return lambda f, weight, bias: _OwnGradient.apply(f, weight, bias, layout, way)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """conv2d of (N, H, W, C)."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)


def windows(layout: Packed, f: Tensor) -> Tensor:
    """Each visible patch with three sites around it: (B * K, b + 6, b + 6, C)."""
    b = f.shape[-2]
    canvas = F.pad(layout.unpack(f), (0, 0, 3, 3, 3, 3))
    cut = canvas.unfold(1, b + 6, b).unfold(2, b + 6, b)  # (B, gh, gw, C, b + 6, b + 6), a view
    gh, gw = layout.grid
    image, patch = layout.visible // (gh * gw), layout.visible % (gh * gw)
    return cut.permute(0, 1, 2, 4, 5, 3)[image, patch // gw, patch % gw]


def site_table(layout: Packed, b: int) -> Tensor:
    """(49, N): the site that each site sees at each offset, N if hidden or outside."""
    num_sites = layout.visible.numel() * b * b
    number = torch.arange(1.0, num_sites + 1, dtype=torch.float64, device=layout.visible.device)
    canvas = layout.unpack(number.view(layout.batch, layout.num_visible, b, b, 1))  # 0 where hidden
    table = windows(layout, layout.pack(canvas))[..., 0].long() - 1  # (B * K, b + 6, b + 6)
    table = table.unfold(1, b, 1).unfold(2, b, 1).permute(1, 2, 0, 3, 4).reshape(49, num_sites)
    return torch.where(table < 0, num_sites, table)


class _TableConv(torch.autograd.Function):
    """As fcmae/layouts/minkowski.py has it. f: (B, K, b, b, C). kernel: (49, C). table: (49, N)."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, kernel: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(f, kernel, table)
        padded = F.pad(f.reshape(-1, f.shape[-1]), (0, 0, 0, 1))
        out = torch.zeros_like(padded[:-1])
        for weight, seen in zip(kernel, table, strict=True):
            out.addcmul_(padded.index_select(0, seen), weight)
        return out.view_as(f)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        f, kernel, table = ctx.saved_tensors
        rows, padded = f.reshape(-1, f.shape[-1]), F.pad(grad.reshape(-1, f.shape[-1]), (0, 0, 0, 1))
        grad_f, grad_kernel = torch.zeros_like(rows), torch.empty_like(kernel)
        for k, weight in enumerate(kernel):
            seeing = padded.index_select(0, table[-1 - k])
            grad_f.addcmul_(seeing, weight)
            grad_kernel[k] = seeing.mul_(rows).sum(0)
        return grad_f.view_as(f), grad_kernel, None


class _OwnGradient(torch.autograd.Function):
    """The canvas path with another weight gradient."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, weight: Tensor, bias: Tensor, layout: Packed, way: str) -> Tensor:
        ctx.save_for_backward(f, weight)
        ctx.layout, ctx.way = layout, way
        return layout.pack(dense(layout.unpack(f), weight, bias, 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        f, weight = ctx.saved_tensors
        layout = ctx.layout
        canvas = layout.unpack(grad)
        grad_f = layout.pack(dense(canvas, weight.flip(2, 3), None, 3))
        gradient = by_matmul(layout, f, grad) if ctx.way == "matmul" else by_shifts(layout.unpack(f), canvas)
        return grad_f, gradient.view_as(weight), grad.flatten(0, -2).sum(0), None, None


def by_shifts(x: Tensor, grad: Tensor) -> Tensor:
    """(C, 49), of canvases (B, H, W, C)."""
    _, H, W, _ = x.shape
    x = F.pad(x, (0, 0, 3, 3, 3, 3))
    sums = [(x[:, ky : ky + H, kx : kx + W] * grad).sum((0, 1, 2)) for ky in range(7) for kx in range(7)]
    return torch.stack(sums, 1)


def by_matmul(layout: Packed, f: Tensor, grad: Tensor) -> Tensor:
    """(C, 49): for each channel the products of a patch's columns with those of seven shifted windows, of which the
    sums along diagonals are wanted; (b + 6) / 7 times the multiply-adds, but by the matrix library."""
    b, channels = f.shape[-2:]
    x = windows(layout, f).permute(3, 0, 1, 2).contiguous()  # (C, P, b + 6, b + 6)
    g = grad.reshape(-1, b, b, channels).permute(3, 0, 1, 2).reshape(channels, -1, b)  # (C, P * b, b)
    shifted = x.unfold(2, b, 1).permute(0, 1, 4, 2, 3).reshape(channels, g.shape[1], 7 * (b + 6))
    products = (g.transpose(1, 2) @ shifted).view(channels, b, 7, b + 6)  # column of grad, ky, column of the window
    return torch.stack([products[:, o, :, o : o + 7] for o in range(b)]).sum(0)  # (C, 7, 7)


def copy_speed(device: torch.device) -> float:
    """Bytes per second that a copy of 512 MB reads and writes, the best of 20."""
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timing.interleaved({"copy": lambda: target.copy_(source)}, 20, device=device)["copy"]
    return 2 * source.numel() / min(seconds)


def assemble(args: argparse.Namespace) -> None:
    """Compile the kernels for the stages of a variant and print what ptxas made of them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fcmae.layouts import triton as kernels

    wide, narrow = "*fp32", {"fp32": "*fp32", "bf16": "*bf16"}[args.precision]
    types = {"f": wide, "neighbours": "*i32", "partial": "*fp32", "num_cells": "i32", "per_program": "i32"}
    lines = []
    for capability in args.assemble:
        for stage in args.stages:
            side, channels = (args.patch // 4) >> (stage - 1), VARIANTS[args.variant].dims[stage - 1]
            cell, block = kernels._tile(side)
            constants = {"C": channels, "SIDE": side, "CELL": cell, "BLOCK": block, "ACC": triton.language.float32}
            for name in ("_convolution_kernel", "_weight_kernel"):
                function = getattr(kernels, name)
                known = types | dict.fromkeys(constants, "constexpr")
                signature = {argument: known.get(argument, narrow) for argument in function.arg_names}
                aligned = {
                    (i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n].startswith("*")
                }
                places = {(function.arg_names.index(n),): value for n, value in constants.items()}
                compiled = triton.compile(
                    ASTSource(function, signature, places, aligned),
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": 1, "enable_fp_fusion": True},
                )
                sizes = [f"sm_{capability}", name.strip("_"), f"{side}", f"{channels}", f"{cell}", f"{block}"]
                lines.append(sizes + usage(compiled.asm["cubin"]))
                print(" ".join(lines[-1]), file=sys.stderr)
    header = [
        "GPU",
        "kernel",
        "b",
        "C",
        "cell",
        "block",
        "registers",
        "stack",
        "instructions",
        "multiply-adds",
        "loads",
    ]
    print(table(header, lines, left=2))


def usage(cubin: bytes) -> list[str]:
    """Registers, bytes of stack, and numbers of instructions, multiply-adds and loads in the code."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia

        def output(*command: str) -> str:
            return subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout

        registers, stack = re.findall(r"(?:REG|STACK):(\d+)", output(tools.cuobjdump.path, "--dump-resource-usage"))[:2]
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", output(tools.nvdisasm.path))
    return [registers, stack, *(str(n) for n in (len(code), code.count("FFMA"), code.count("LDG")))]


def parser() -> argparse.ArgumentParser:
    found = timing.parser_of(__doc__, repeats=10)
    found.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    found.add_argument(
        "--stages", nargs="+", type=int, choices=range(1, 5), default=[1, 2, 3, 4], help="of the encoder"
    )
    found.add_argument(
        "--assemble", nargs="+", type=int, metavar="CC", help="compile for these capabilities, time nothing"
    )
    found.set_defaults(batch=8)
    return found


if __name__ == "__main__":
    main()
