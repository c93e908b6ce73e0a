"""All that a GPU must show, most important first, in nine minutes: it is right, it is fast, it is fed.

    python benchmarks/gpu.py --out docs/benchmarks/gpu.json
    python benchmarks/gpu.py --out docs/benchmarks/gpu.json --parts base-compiled tiny-compiled
    python benchmarks/gpu.py --out /tmp/toy.json --device cpu --batch 2 --size 64 --variants convnextv2_atto ...

| part | what it shows |
| --- | --- |
| warm-up | nothing: it compiles what the others need, Triton's kernels and whole steps, on all cores at once |
| verify | every layout computes what the definition says, in values and gradients: `fcmae verify` |
| kernels | the Triton kernels compute what the plain path does in float64, at the shapes of the four stages |
| VARIANT-eager, -compiled, -cudagraphs | a whole step of each layout and of timm's dense model: images/s, memory |
| pretrain | a minute of `fcmae pretrain` on JPEGs made here: images/s, and the share that the GPU waits for data |
| depthwise | bytes that the depthwise convolution moves, as a share of what a copy moves a second |
| tests | tests/test_layouts_triton.py on the GPU, where pytest is installed |
| VARIANT-batches | images/s and memory of the steps by batch size, eager |

VARIANT is without its family, as in base-eager. Beside images/s stand the hours of 800 epochs of ImageNet-1k. FILE is
written after each part and within long ones. A part that would outlast --minutes is left out and says so; one that
fails says why, and the others run. Another call adds to FILE, on the same GPU with the same versions.

Run it from a checkout. It needs torch with Triton, numpy, timm (with torchvision and safetensors), accelerate,
pydantic, PyYAML and tqdm; `pretrain` needs Pillow and tifffile too. Where nothing can be installed, carry the wheels of
what is lacking, such as pydantic, pydantic-core, annotated-types, typing-inspection, typing-extensions and tifffile. On
a CPU nothing of Triton runs here: tests/test_layouts_triton.py has its interpreter.
"""

# ruff: noqa: E402 - what is missing is said before it is imported

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))  # a checkout need not be installed
MODULES = ("torch", "numpy", "timm", "accelerate", "pydantic", "safetensors", "yaml", "tqdm")
if lacking := [name for name in MODULES if find_spec(name) is None]:
    raise SystemExit(f"gpu.py needs {', '.join(lacking)}: install or carry them, see the top of {__file__}")

import depthwise
import timing
import torch
import train_step
from torch import Tensor

from fcmae import verify
from fcmae.atomic import write_text
from fcmae.data.source import one_line
from fcmae.layouts import Packed, make_layout
from fcmae.networks.spec import VARIANTS
from fcmae.timing import wait
from fcmae.training.records import read_metrics

SIDES = ("packed", "triton", "timm", "masked")
MODES = {"eager": None, "compiled": "default", "cudagraphs": "cudagraphs"}
IMAGENET_IMAGES, EPOCHS = 1_281_167, 800
# float32 and float64 sum thousands of terms in another order; bfloat16 keeps 8 bits of the result.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}


class Part(NamedTuple):
    """A part of the whole. needs_s: about how long it takes on one card, below which it is not begun."""

    name: str
    needs_s: float
    run: Callable[[], None]


class Session:
    """What one call does: its flags, its clock, and the file that each part's findings are written to."""

    def __init__(self, args: argparse.Namespace, argv: list[str]) -> None:
        self.args, self.device = args, torch.device(args.device)
        self._ends = time.monotonic() + 60 * args.minutes
        self.content = timing.content(__file__, argv, args, timing.machine(self.device)) | {"parts": {}}
        self.content["machine"]["triton"] = triton_version()
        if args.out.exists():
            before = json.loads(args.out.read_text(encoding="utf-8"))
            for key in ("gpu", "cuda", "torch", "triton", "timm"):
                was, now = before["machine"].get(key), self.content["machine"].get(key)
                if was != now:
                    raise SystemExit(f"--out {args.out} is of {key} {was}, and here it is {now}: give another file")
            self.content = before | self.content | {"parts": before["parts"]}

    def left(self) -> float:
        """Seconds that are left."""
        left: float = self._ends - time.monotonic()
        return left

    def record(self, part: str, **found: Any) -> None:
        """Add to what a part has found, and write the file."""
        self.content["parts"].setdefault(part, {}).update(found)
        write_text(self.args.out, json.dumps(self.content, indent=1, default=str) + "\n")

    def do(self, part: Part) -> bool:
        """Run one part, if there is time; whether nothing failed."""
        print(f"\n## {part.name}, {self.left():.0f} s left", flush=True)
        if self.left() < part.needs_s:
            skipped = f"it takes about {part.needs_s:.0f} s, and {max(0, self.left()):.0f} s were left"
            print(skipped)
            if part.name not in self.content["parts"]:  # of an earlier call
                self.record(part.name, command=self.content["command"], skipped=skipped)
            return True
        # The command and settings of the whole are those of the last call, and parts may be of another.
        earlier = self.content["parts"].get(part.name, {})
        self.content["parts"][part.name] = {"command": self.content["command"]}
        start = time.monotonic()
        try:
            part.run()
        except (Exception, SystemExit) as error:  # whatever it is, the other parts are worth having
            traceback.print_exc()
            failed = f"{type(error).__name__}: {one_line(error, 500)}"
            if earlier and not {"failed", "skipped"} & earlier.keys():  # a good result is not lost to another try
                self.content["parts"][part.name] = earlier
                self.record(part.name, failed_again=failed)
                free()
                return False
            self.record(part.name, failed=failed)
        self.record(part.name, seconds=round(time.monotonic() - start, 1))
        free()
        found = self.content["parts"][part.name]
        return "failed" not in found and found.get("ok", True)


def free() -> None:
    """Let go of compiled code and of the memory of what is not used any more."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def triton_version() -> str:
    if find_spec("triton") is None:
        return "none"
    import triton

    return str(triton.__version__)


def short(variant: str) -> str:
    """A variant's name without its family."""
    return variant.partition("_")[2]


def why_no_triton(device: torch.device) -> str | None:
    """Why the kernels do not run on this device; None if they do."""
    try:
        make_layout("triton", torch.zeros(1, 1, 1, dtype=torch.bool, device=device))
    except ValueError as error:
        return f"{error}; tests/test_layouts_triton.py runs the kernels in Triton's interpreter"
    return None


def parts_of(session: Session) -> list[Part]:
    """Most important first."""
    found = [
        Part("verify", 60, partial(run_verify, session)),
        Part("kernels", 60, partial(run_kernels, session)),
    ]
    names = {variant: short(variant) for variant in session.args.variants}
    needs = {"eager": 20, "compiled": 40, "cudagraphs": 40}  # what is compiled was so in the warm-up
    steps = {
        (variant, mode): Part(
            f"{name}-{mode}", needs[mode], partial(run_steps, session, f"{name}-{mode}", variant, mode)
        )
        for variant, name in names.items()
        for mode in MODES
    }
    first, *others = names
    found += [steps[first, "eager"], steps[first, "compiled"]]
    found.append(Part("pretrain", session.args.pretrain_s + 30, partial(run_pretrain, session, first)))
    found += [steps[variant, mode] for variant in others for mode in ("eager", "compiled")]
    found += [steps[variant, "cudagraphs"] for variant in names]
    # A recording that fails ends all that this process does on the GPU.
    found.append(Part("depthwise", 20, partial(run_depthwise, session)))
    found.append(Part("tests", 90, partial(run_tests, session)))
    found += [
        Part(f"{name}-batches", 60, partial(run_batches, session, f"{name}-batches", variant))
        for variant, name in names.items()
    ]
    return found


class Kernels(NamedTuple):
    """What kernels are compiled for: side of a patch in sites, channels, and the dtypes of features and weights."""

    side: int
    channels: int
    features: str
    weights: str


def kernels_of(session: Session, part: str) -> set[Kernels]:
    """Those that a part of this name uses; under autocast features are float32 or bfloat16."""
    plain, mixed = [("float32", "float32")], [("float32", "bfloat16"), ("bfloat16", "bfloat16")]
    double = [("float64", "float64")]
    steps = [VARIANTS[name] for name in session.args.variants if part.startswith(f"{short(name)}-")]
    first = [VARIANTS[session.args.variants[0]]]
    specs, dtypes = {
        "verify": ([case.spec for case in verify.CASES], double + plain + mixed),
        "kernels": (first, double + plain + mixed[1:]),
        "depthwise": (first, plain + mixed[:1]),
        "pretrain": (first, mixed),
    }.get(part, (steps, mixed))
    return {
        Kernels((verify.PATCH // spec.stem_stride) >> stage, channels, *pair)
        for spec in specs
        for stage, channels in enumerate(spec.dims)
        for pair in dtypes
    }


def run_warm_up(session: Session, parts: list[str]) -> None:
    """Fill the caches of Triton and of torch.compile: one process takes seconds for a kernel and minutes for a step."""
    kernels = sorted({wanted for part in parts for wanted in kernels_of(session, part)})
    steps = [
        (name, step_flags(session, variant, mode))
        for variant in session.args.variants
        for mode in MODES
        if MODES[mode] and f"{short(variant)}-{mode}" in parts
        for name in usable(session)
    ]
    failed: dict[str, str] = {}
    workers = max(1, min(12, len(kernels) + len(steps), (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {
            pool.submit(compile_step, name, args): f"{name}, {args.variant}, {args.compile}" for name, args in steps
        }
        futures |= {pool.submit(compile_kernels, one, session.args.device): str(one) for one in reversed(kernels)}
        for future, what in futures.items():
            if (error := future.exception()) is not None:
                failed[what] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    session.record("warm-up", kernels=len(kernels), steps=len(steps), workers=workers, left_out=failed)


def compile_step(name: str, args: argparse.Namespace) -> None:
    """By doing it once."""
    train_step.side(name, *timing.batch_of(args), args).step()
    free()


def compile_kernels(kernels: Kernels, device: str) -> None:
    """By using them once, forward and backward."""
    mask = torch.zeros(1, 1, 2, dtype=torch.bool, device=device)
    shapes = [(1, 2, kernels.side, kernels.side, kernels.channels), (kernels.channels, 1, 7, 7), (kernels.channels,)]
    dtypes = [getattr(torch, name) for name in (kernels.features, kernels.weights, kernels.weights)]
    leaves = [torch.randn(s, dtype=d, device=device).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]
    out = make_layout("triton", mask, 2).depthwise_conv(*leaves)
    torch.autograd.backward(out, torch.ones_like(out))


def run_verify(session: Session) -> None:
    results = verify.verify(None, session.device.type)
    rows = [
        {name: getattr(r, name) for name in ("backend", "precision", "values", "gradients", "tolerance", "ok", "worst")}
        for r in results
    ]
    session.record("verify", rows=rows, ok=all(r.ok for r in results), no_triton=why_no_triton(session.device))


def stages_of(session: Session) -> Iterator[tuple[int, int, int]]:
    """Number from 1, side of a patch in sites and channels of the stages of the first variant."""
    for stage, channels in enumerate(VARIANTS[session.args.variants[0]].dims, 1):
        yield stage, 8 >> (stage - 1), channels


def flags(session: Session, parser: argparse.ArgumentParser, variant: str, *words: str) -> argparse.Namespace:
    """Those of another benchmark, here."""
    args = session.args
    given = {"variant": variant, "batch": args.batch, "size": args.size, "repeats": args.repeats, "device": args.device}
    return parser.parse_args([*(f"--{key}={value}" for key, value in given.items()), *words])


def run_kernels(session: Session) -> None:
    """Values and gradients of the kernels against the plain path in float64 on the CPU."""
    reason = why_no_triton(session.device)
    if reason is not None:
        session.record("kernels", not_run=reason)
        return
    args = flags(session, train_step.parser(), session.args.variants[0], "--batch=2")
    _, mask, visible = timing.batch_of(args)
    rows: list[dict[str, Any]] = []
    for stage, b, channels in stages_of(session):
        shape = (len(mask), visible, b, b, channels)
        exact = [torch.randn(size, dtype=torch.float64) for size in (shape, (channels, 1, 7, 7), (channels,), shape)]
        for dtype, tolerance in TOLERANCES.items():
            rounded = [x.to(dtype) for x in exact]
            plain = Packed(mask.cpu(), visible).depthwise_conv
            expected = values_and_gradients(plain, [x.double() for x in rounded])
            kernels = make_layout("triton", mask, visible).depthwise_conv
            found = values_and_gradients(kernels, [x.to(session.device) for x in rounded])
            errors = {
                name: float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
                for name, ours, theirs in zip(("values", "f", "weight", "bias"), found, expected, strict=True)
            }
            rows.append({"stage": stage, "precision": str(dtype).removeprefix("torch."), **errors})
            rows[-1] |= {"tolerance": tolerance, "ok": all(error < tolerance for error in errors.values())}
            print(rows[-1], flush=True)
            session.record("kernels", rows=rows, ok=all(row["ok"] for row in rows))


def values_and_gradients(conv: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """inputs: f, weight, bias, and the gradient of the output."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = conv(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def run_depthwise(session: Session) -> None:
    cuda = session.device.type == "cuda"
    speed = depthwise.copy_speed(session.device) if cuda else None
    ways = ["packed", *(["kernels"] if why_no_triton(session.device) is None else [])]
    session.record("depthwise", copy_bytes_per_s=speed, no_triton=why_no_triton(session.device), stages={})
    for precision in ("bf16", "fp32"):
        args = flags(session, depthwise.parser(), session.args.variants[0], f"--precision={precision}")
        _, mask, visible = timing.batch_of(args)
        stages: dict[str, Any] = session.content["parts"]["depthwise"]["stages"]
        stages[precision] = {}
        for stage, b, channels in stages_of(session):
            found = depthwise.compare(args, mask, visible, ways, b, channels, speed)
            stages[precision][f"stage {stage}"] = found
            print(f"{precision}, stage {stage}\n{depthwise.rows(found, speed)}", flush=True)
            session.record("depthwise", stages=stages)


def usable(session: Session) -> list[str]:
    """Names of the sides that run here."""
    return [name for name in SIDES if name != "triton" or why_no_triton(session.device) is None]


def per_second(batch: int, seconds: list[float]) -> dict[str, Any]:
    """What is told of a side: timings, images a second, and how long ImageNet-1k takes at that rate."""
    found = timing.summary(seconds)
    images_per_s = batch / found["median_s"]
    return {**found, "images_per_s": images_per_s, "hours": EPOCHS * IMAGENET_IMAGES / images_per_s / 3600}


@contextmanager
def memory_may_end(failed: dict[str, str], name: str) -> Iterator[None]:
    """A side that does not fit is noted and left out."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        failed[name] = f"out of memory: {str(error).partition('.')[0]}"
    # Only now nothing holds what the error's traceback did.
    print(f"{name}: {failed[name]}", flush=True)
    gc.collect()
    torch.cuda.empty_cache()


def step_flags(session: Session, variant: str, mode: str) -> argparse.Namespace:
    words = ["--precision=bf16"] + ([] if MODES[mode] is None else [f"--compile={MODES[mode]}"])
    return flags(session, train_step.parser(), variant, *words)


def run_steps(session: Session, part: str, variant: str, mode: str) -> None:
    """Whole steps of all sides, timed in turn. A side that there is no time to compile is left out."""
    args = step_flags(session, variant, mode)
    images, mask, visible = timing.batch_of(args)
    sides: dict[str, timing.Side] = {}
    first_s: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in usable(session):
        slowest = max(first_s.values(), default=0)
        if session.left() < 1.5 * slowest + 10:
            failed[name] = f"its first step may take {slowest:.0f} s, and {max(0, session.left()):.0f} s were left"
            continue
        start = time.monotonic()
        with memory_may_end(failed, name):
            side = train_step.side(name, images, mask, visible, args)
            side.step()
            wait(session.device)
            sides[name] = side
        first_s[name] = time.monotonic() - start
        print(f"{name}: first step after {first_s[name]:.1f} s", flush=True)
        session.record(part, first_step_s=first_s, batch=args.batch, variant=variant, mode=mode, left_out=failed)
    seconds = timing.interleaved({name: side.step for name, side in sides.items()}, args.repeats, device=session.device)
    results = {name: per_second(args.batch, values) for name, values in seconds.items()}
    reference = next(iter(results))
    ratios = {name: timing.ratio(values, seconds[reference]) for name, values in seconds.items()}
    session.record(part, results=results, ratios=ratios)
    for name, side in sides.items():
        # What a CUDA graph holds lies in a pool of its own, which this count does not see.
        results[name]["peak_bytes"] = None if mode == "cudagraphs" else timing.peak_bytes(side.step, session.device)
        print(f"{name}: {results[name]['images_per_s']:.0f} images/s, {ratios[name]['time']:.2f} x {reference}")
    session.record(part, results=results)


def run_batches(session: Session, part: str, variant: str) -> None:
    """Steps by batch size, one after the other, until one does not fit."""
    sizes: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in usable(session):
        for batch in session.args.batches:
            if session.left() < 10:
                left_out[f"{name}, {batch}"] = "no time was left"
                continue
            args = flags(session, train_step.parser(), variant, "--precision=bf16", f"--batch={batch}")
            with memory_may_end(left_out, f"{name}, {batch}"):
                side = train_step.side(name, *timing.batch_of(args), args)
                seconds = timing.interleaved({name: side.step}, args.repeats, device=session.device)[name]
                found = per_second(batch, seconds) | {"peak_bytes": timing.peak_bytes(side.step, session.device)}
                sizes.setdefault(name, {})[str(batch)] = found
                print(f"{name}, {batch}: {found['images_per_s']:.0f} images/s", flush=True)
            session.record(part, sizes=sizes, variant=variant, left_out=left_out)
            free()


def run_pretrain(session: Session, variant: str) -> None:
    """`fcmae pretrain` for a while, ended by a signal as a cluster would."""
    if missing := [name for name in ("PIL", "tifffile") if find_spec(name) is None]:
        session.record("pretrain", not_run=f"it needs {', '.join(missing)}")
        return
    from fcmae.config import PretrainConfig
    from fcmae.options import load
    from fcmae.pretraining import pretrain

    backend = "triton" if why_no_triton(session.device) is None else "packed"
    settings = {
        "device": "cpu" if session.device.type == "cpu" else "auto",
        "model.variant": variant,
        "model.backend": backend,
        "data.image_size": session.args.size,
        "batch_size": session.args.batch,
        "epochs": 100_000,
        "optim.warmup_epochs": 1,
        "log.every_steps": session.args.every_steps,
        "log.eval_epochs": 100_000,
        "checkpoint.every_epochs": 100_000,
        "log.trackers": "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder) / "images", Path(folder) / "run"
        num_bytes = write_jpegs(images, session.args.images)
        words = [str(images), f"--out={out}", *(f"--{key}={value}" for key, value in settings.items())]
        cfg = load(PretrainConfig, words, prog="fcmae pretrain", num_processes=1)
        with stopping_after(session.args.pretrain_s, out / "metrics.jsonl"):
            lines = [line for line in pretrain(cfg).metrics() if "images_per_s" in line]
    counted = lines[1:]  # the first has the start in it
    images_per_s = statistics.median(line["images_per_s"] for line in counted)
    data_wait = statistics.fmean(line["data_wait_share"] for line in counted)
    losses = [lines[0]["loss"], lines[-1]["loss"]]
    print(f"{images_per_s:.0f} images/s, waiting {100 * data_wait:.1f} %, loss {losses}", flush=True)
    session.record(
        "pretrain", images_per_s=images_per_s, data_wait_share=data_wait, losses=losses, steps=lines[-1]["step"],
        variant=variant, backend=backend, batch=session.args.batch, kb_per_file=num_bytes / session.args.images / 1e3,
    )  # fmt: skip


@contextmanager
def stopping_after(seconds: float, metrics: Path) -> Iterator[None]:
    """Ask the run inside to end, that long after it has logged its first step, and not before it has three lines."""
    ended = threading.Event()

    def ask() -> None:
        first = None
        while not ended.wait(0.2):
            num_lines = len(read_metrics(metrics))
            if first is None and num_lines:
                first = time.monotonic()
            if first is not None and num_lines >= 3 and time.monotonic() > first + seconds:
                os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGUSR1, previous)


def write_jpegs(folder: Path, count: int) -> int:
    """Write `count` files of 500 x 375 pixels, up to 64 different ones, about as large as photographs; their bytes."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kept: list[bytes] = []
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if number >= 64:
            path.write_bytes(kept[number % 64])
            continue
        # Shapes of all sizes, each half as strong as the next larger, and a camera's noise.
        pixels = rng.normal(0, 14, (375, 500, 3))
        for octave in range(1, 8):
            coarse = Image.fromarray(rng.integers(0, 256, (3 * 2**octave // 2, 2 * 2**octave, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) / 2**octave
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90, subsampling="4:2:0")
        kept.append(path.read_bytes())
    return sum(path.stat().st_size for path in folder.iterdir())


def run_tests(session: Session) -> None:
    if find_spec("pytest") is None or why_no_triton(session.device) is not None:
        session.record("tests", not_run=why_no_triton(session.device) or "pytest is not installed")
        return
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Before what is there: carried wheels may lie on it.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_layouts_triton.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1, session.left()), check=False
    )
    print(done.stdout[-3000:])
    session.record("tests", ok=done.returncode == 0, output=done.stdout.splitlines()[-20:])


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, written after each part")
    found.add_argument("--minutes", type=float, default=9, help="in which no part is begun that would outlast them")
    found.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try this script")
    found.add_argument("--parts", nargs="+", metavar="NAME", help="which; all by default")
    found.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["convnextv2_base", "convnextv2_tiny"], metavar="NAME",
        help="encoders of the steps; the first is that of all else",
    )  # fmt: skip
    found.add_argument("--batch", type=int, default=128, help="images at a time")
    found.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512], help="of the parts -batches")
    found.add_argument("--size", type=int, default=224, help="height and width of the images")
    found.add_argument("--repeats", type=int, default=10, help="timings of each")
    found.add_argument("--pretrain-s", type=float, default=60, help="seconds of pretraining")
    found.add_argument("--images", type=int, default=4096, help="JPEGs of pretraining")
    found.add_argument("--every-steps", type=int, default=10, help="steps between lines of pretraining's log")
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    timing.check_repeats(args)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch finds no GPU here: use cpu to try the script")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 would run the kernels on the CPU: unset it")
    torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions would be compared and timed in 10 bits
    session = Session(args, argv)
    parts = parts_of(session)
    names = [part.name for part in parts]
    if unknown := set(args.parts or names) - set(names):
        raise SystemExit(f"--parts {' '.join(sorted(unknown))}: there are {', '.join(names)}")
    print(", ".join(f"{key} {value}" for key, value in session.content["machine"].items()))
    chosen = [part for part in parts if part.name in (args.parts or names)]
    if session.device.type == "cuda":
        chosen.insert(0, Part("warm-up", 30, partial(run_warm_up, session, [part.name for part in chosen])))
    ok = [session.do(part) for part in chosen]
    print(f"\n{args.out}: {len(ok)} parts, {ok.count(False)} of them failed or wrong")
    return 0 if all(ok) else 1


if __name__ == "__main__":
    sys.exit(main())
