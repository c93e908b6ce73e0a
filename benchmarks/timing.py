"""What the benchmarks share: timings taken in turn, their spread, memory, the machine, tables and JSON.

A script is run as `python benchmarks/NAME.py`, so `import timing` finds this file beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from fcmae import threads

threads.prepare()  # as runs do, before torch is loaded

import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from fcmae.atomic import write_text
from fcmae.masking import num_visible, random_mask
from fcmae.networks.spec import VARIANTS
from fcmae.tables import table
from fcmae.timing import CPU, Key, in_turn, wait
from fcmae.timing import quartiles as quartiles
from fcmae.training.optim import parameter_groups
from fcmae.training.records import cpu_name

Function = TypeVar("Function", bound=Callable[..., Any])
WARMUP = 2  # turns that are not counted: one more than else, for what is compiled


def interleaved(
    steps: Mapping[Key, Callable[[], object]], repeats: int, warmup: int = WARMUP, device: torch.device = CPU
) -> dict[Key, list[float]]:
    """`fcmae.timing.in_turn` with the warm-up of the benchmarks."""
    return in_turn(steps, repeats, warmup, device)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """What a JSON file holds of one step: every timing, their median and quartiles."""
    low, middle, high = quartiles(seconds)
    return {"median_s": middle, "quartiles_s": [low, high], "seconds": list(seconds)}


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU another stream than the default one, which must not wait for one that is recorded."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def recorded(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU the step as a CUDA graph, whose replay takes the device's time and hardly any of the host's."""
    if device.type != "cuda":
        return step
    step()  # what is compiled or chosen at a first call cannot be recorded
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return cast("Callable[[], object]", graph.replay)


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """How many times the reference's time a step takes: the ratio of medians, and quartiles repeat by repeat."""
    low, _, high = quartiles([a / b for a, b in zip(seconds, reference, strict=True)])
    return {"time": statistics.median(seconds) / statistics.median(reference), "quartiles": [low, high]}


class Side(NamedTuple):
    """One side of a comparison. A step leaves no gradients behind, so that memory is counted from the same start.

    forward: the part of the step that ends with the loss. given: parameters and inputs.
    """

    step: Callable[[], object]
    forward: Callable[[], object]
    given: list[Tensor]


def side(
    args: argparse.Namespace, model: nn.Module, loss: Callable[[], Tensor], images: Tensor, *, learns: bool
) -> Side:
    """Forward and backward pass in the precision of the flags and, if it learns, AdamW's update.

    loss: of the model on the images.
    """
    adamw = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True) if learns else None

    def forward() -> Tensor:
        with autocast(args):
            return loss()

    def step() -> None:
        torch.autograd.backward(forward())
        if adamw is not None:
            adamw.step()
        model.zero_grad()

    return Side(step, forward, [images, *model.parameters()])


def compiled(args: argparse.Namespace, function: Function) -> Function:
    """A model, or what calls one, as --compile has it."""
    if not args.compile:
        return function
    mode = "reduce-overhead" if args.compile == "cudagraphs" else None
    return cast("Function", torch.compile(function, dynamic=False, mode=mode))


def dense(variant: str, images: Tensor, num_classes: int = 0, global_pool: str = "") -> tuple[nn.Module, Tensor]:
    """timm's model, by default without pooling and classifier, and the images, both in the memory format it likes."""
    model: nn.Module = timm.create_model(variant, num_classes=num_classes, global_pool=global_pool)
    channels_last = torch.channels_last
    return model.to(images.device, memory_format=channels_last), images.to(memory_format=channels_last)  # type: ignore[call-overload]


def compare(sides: Mapping[str, Side], repeats: int, device: torch.device, batch: int) -> dict[str, Any]:
    """Time the sides in turn, count their memory, print both, and return them for `write_json`.

    Ratios are to the first side. batch: images of one step.
    """
    seconds = interleaved({name: side.step for name, side in sides.items()}, repeats, device=device)
    first = next(iter(sides))
    results, ratios, rows = {}, {}, []
    for name, side in sides.items():
        saved, peak = saved_bytes(side.forward, side.given), peak_bytes(side.step, device)
        results[name] = {**summary(seconds[name]), "saved_bytes": saved, "peak_bytes": peak}
        ratios[name] = ratio(seconds[name], seconds[first])
        (low, high), middle = results[name]["quartiles_s"], results[name]["median_s"]
        times = [f"{1000 * middle:.1f} ms", f"{1000 * low:.1f} - {1000 * high:.1f}", f"{batch / middle:.1f}"]
        spread = "{:.2f} - {:.2f}".format(*ratios[name]["quartiles"])
        memory = [f"{saved / 1e6:.1f} MB", f"{peak / 1e6:.1f} MB"]
        rows.append([name, *times, f"{ratios[name]['time']:.2f}", spread, *memory])
    header = [
        "",
        "median",
        "quartiles",
        "images/s",
        f"time / {first}",
        "quartiles",
        "saved for backward",
        "peak memory",
    ]
    print("\n" + table(header, rows))
    return {"results": results, "ratios": ratios}


def saved_bytes(forward: Callable[[], object], leave_out: Iterable[Tensor]) -> int:
    """Bytes that one forward pass keeps for its backward pass.

    A storage counts once and whole, however many views of it are kept. leave_out: tensors that are there anyway,
    parameters and inputs. Casts and copies of them count.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in there)


def peak_bytes(step: Callable[[], object], device: torch.device = CPU) -> int:
    """The most memory that one step holds beyond what was held before it, as PyTorch's allocator counts it.

    Of a GPU, what torch.cuda.max_memory_allocated counts; of a CPU, the same from the profiler's allocations. What a
    library takes without asking PyTorch is not in it. The step should leave no gradients behind.
    """
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler reports each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    # An allocation has a positive number of bytes, and its release a negative one.
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What a timing depends on besides the code."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {
        **gpu,
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": f"{load:.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def parser_of(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that the benchmarks of the network share.

    doc: the script's docstring, whose first line says what it does. repeats: the default.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="convnextv2_atto", metavar="NAME", help="the encoder")
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--patch", type=int, default=32, help="side of a mask patch")
    parser.add_argument("--ratio", type=float, default=0.6, help="share of the patches that is hidden")
    parser.add_argument("--repeats", type=int, default=repeats, help="timings of each")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "cudagraphs"),
        help="each side through torch.compile; cudagraphs also records and replays its kernels",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    return parser


def add_sides(parser: argparse.ArgumentParser, sides: Sequence[str], default: Sequence[str]) -> None:
    """The flag that chooses what a comparison times."""
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=sides,
        default=list(default),
        metavar="NAME",
        help=f"what to time, the reference first: {', '.join(sides)}",
    )


def check_repeats(args: argparse.Namespace) -> None:
    if args.repeats < 2:
        raise SystemExit(f"--repeats {args.repeats}: quartiles need at least 2")


def begin(args: argparse.Namespace, what: str) -> tuple[Tensor, Tensor, int, dict[str, str]]:
    """Check the flags, seed, print what is timed where, and give `batch_of` and `machine`."""
    torch.manual_seed(0)
    images, mask, visible = batch_of(args)
    info = machine(images.device)
    print(headline(args, visible, what))
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    return images, mask, visible, info


def batch_of(args: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Random images, their mask and the number of visible patches, as the flags say."""
    if args.patch % 32 or args.size % args.patch:
        raise SystemExit(f"--size {args.size} --patch {args.patch}: give a multiple of --patch and of 32")
    check_repeats(args)
    grid = (args.size // args.patch, args.size // args.patch)
    visible = num_visible(grid[0] * grid[1], args.ratio)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    mask = torch.from_numpy(random_mask(grid, visible, [(0, i) for i in range(args.batch)])).to(args.device)
    return images, mask, visible


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


def headline(args: argparse.Namespace, visible: int, what: str) -> str:
    """What is timed, in one line."""
    mode = {None: "eager", "default": "compiled", "cudagraphs": "CUDA graphs"}[args.compile]
    return (
        f"{what}, {args.variant}, batch {args.batch}, {args.size} px, {visible} of {(args.size // args.patch) ** 2} "
        f"patches visible, {args.precision}, {mode}, {args.repeats} repeats"
    )


def content(script: str, argv: Sequence[str], args: argparse.Namespace, info: Mapping[str, str]) -> dict[str, Any]:
    """What a benchmark's JSON says besides its figures.

    script: its file. argv: the flags that it was given. args: all flags. info: of `machine`.
    """
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *argv])
    chosen = {key: value for key, value in vars(args).items() if key != "json"}
    return {"command": command, "settings": chosen, "machine": dict(info)}


def write_json(
    script: str, argv: Sequence[str], args: argparse.Namespace, info: Mapping[str, str], **results: Any
) -> None:
    """Write a benchmark's figures to --json, if that is given.

    results: what it found, under names that report.py knows. The others: see `content`.
    """
    if args.json is not None:
        figures = {**content(script, argv, args, info), **results}
        write_text(args.json, json.dumps(figures, indent=2, default=str) + "\n")
