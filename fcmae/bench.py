"""Which backend, precision and number of images at once is fastest for a run on this machine: `fcmae bench`.

Each candidate is timed in a process of its own, so that one that runs out of memory is a row of the table and each has
its own memory peak. Only those processes import torch, as a process on Linux starts with its parent's peak.
"""

from __future__ import annotations

import re
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fcmae.config import BenchConfig
from fcmae.config.base import Backend
from fcmae.networks.spec import describe
from fcmae.processes import OUT_OF_MEMORY, Failed, in_process

if TYPE_CHECKING:
    import torch

    from fcmae.data.dataset import Batch
    from fcmae.data.index import Images

GAIN = 1.02  # a smaller ratio counts as noise
CPU_IMAGES = 32  # at once, to start from on a CPU: more gain little there, and a step of thousands takes minutes
LOADER_IMAGES = 32  # in a batch of the loader when it is timed alone
ENDLESS = 10**9  # steps, more than are ever timed
HEADER = f"{'backend':10} {'precision':9} {'compiled':10} {'at once':>7}  {'images/s':>8}  {'slowest - fastest':>17}"
HEADER += f"  {'s/step':>7}  {'memory':>8}"


@dataclass(frozen=True)
class Candidate:
    """One way to compute a step.

    Attributes:
        backend: name of the backend.
        precision: name of the precision.
        images: images computed at once, a divisor of batch_size and counted like it.
        compile: as in the settings.
    """

    backend: str
    precision: str
    images: int
    compile: bool | Literal["cudagraphs"] = False

    def __str__(self) -> str:
        compiled = self.compile if isinstance(self.compile, str) else "yes" if self.compile else "no"
        return f"{self.backend:10} {self.precision:9} {compiled:10} {self.images:7}"


@dataclass(frozen=True)
class Result:
    """The result of timing a candidate.

    Attributes:
        candidate: what was timed.
        batch_size: images per step.
        step_s: seconds of each timed step, at least one unless it failed.
        first_s: seconds of the first step, with compilation.
        memory: peak in bytes, of the process on a CPU or of tensors on a GPU.
        failure: why it could not run, or empty.
    """

    candidate: Candidate
    batch_size: int
    step_s: tuple[float, ...] = ()
    first_s: float = 0.0
    memory: int = 0
    failure: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)

    @property
    def images_per_s(self) -> float:
        """By the median step; 0 if it failed."""
        return 0.0 if self.failure else self.batch_size / self.median_s

    @property
    def mean_images_per_s(self) -> float:
        """Mean over all timed steps, some of which are slow, e.g. if workers share the cores; 0 if it failed."""
        return 0.0 if self.failure else self.batch_size * len(self.step_s) / sum(self.step_s)

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        slowest, fastest = self.batch_size / max(self.step_s), self.batch_size / min(self.step_s)
        compiled = f"  compiled in {self.first_s - self.median_s:.0f} s" if self.candidate.compile else ""
        return (
            f"{self.images_per_s:8.1f}  {slowest:8.1f} -{fastest:7.1f}  {self.median_s:7.3f}"
            f"  {self.memory / 1e9:5.1f} GB{compiled}"
        )


@dataclass(frozen=True)
class Machine:
    """What is known before anything is timed.

    Attributes:
        device: type of the device.
        name: name of the device.
        precision: the configured one, with auto resolved.
        precisions: those for which the device has instructions.
        num_workers: workers that read the user's images; 0 without data.path.
        loader_images_per_s: of these images; None without data.path.
        steps_per_epoch: with these images; None without data.path.
    """

    device: str
    name: str
    precision: str
    precisions: tuple[str, ...]
    num_workers: int = 0
    loader_images_per_s: float | None = None
    steps_per_epoch: int | None = None


def bench(cfg: BenchConfig) -> None:
    """Time candidates, printing a row for each, then the flags of the fastest and how long the run takes with them.

    Raises:
        ValueError: if the images cannot make a batch, or if no candidate can run.
    """
    cfg = cfg.model_copy(update={"log": cfg.log.model_copy(update={"trackers": []})})
    try:
        machine: Machine = in_process(survey, cfg)
    except Failed as error:
        raise ValueError(str(error)) from None
    why_not = {
        "triton": machine.device != "cuda" and "its kernels are for NVIDIA GPUs",
        "minkowski": find_spec("MinkowskiEngine") is None and "MinkowskiEngine is not installed",
    }
    others = [name for name in get_args(Backend) if "backend" in cfg.vary and name != cfg.model.backend]
    skipped = [f"{name}: {why}" for name in others if (why := why_not.get(name))]
    precisions = [name for name in machine.precisions if "precision" in cfg.vary and name != machine.precision]
    if "precision" in cfg.vary and "bf16" not in (machine.precision, *precisions):
        skipped.append(f"bf16: {machine.name} has no instructions for it")

    height, width = cfg.data.image_size
    print(f"{describe(cfg.model.spec)}, {height} x {width} pixels, steps of {cfg.batch_size} images, on {machine.name}")
    print(*(f"not timed: {sentence}" for sentence in skipped), HEADER, sep="\n", flush=True)

    def measure(candidate: Candidate, from_files: bool = False) -> Result:
        if sys.stdout.isatty():
            print(candidate, end="\r", flush=True)  # what is being timed; its row replaces this line
        try:
            result: Result = in_process(time_candidate, cfg, candidate, from_files)
        except Failed as error:
            result = Result(candidate, cfg.batch_size, failure=str(error))
        print(f"{candidate}  {result}{'  with your images' if from_files else ''}", flush=True)
        return result

    # GRN over the batch pools over the images at once, so their number changes what is computed.
    sizes = "images" in cfg.vary and cfg.model.grn_scope == "image"
    images, unit = cfg.batch_size // cfg.num_micro_batches, cfg.data.masks_per_image
    while sizes and machine.device == "cpu" and images > CPU_IMAGES and images % (2 * unit) == 0:
        images //= 2
    compiled = False if cfg.model.compile == "auto" else cfg.model.compile
    best = search(
        Candidate(cfg.model.backend, machine.precision, images, compiled),
        measure,
        backends=[cfg.model.backend, *(name for name in others if not why_not.get(name))],
        precisions=precisions,
        batch_size=cfg.batch_size,
        unit=unit if sizes else None,
        compiled=[] if "compile" not in cfg.vary else [True] if machine.device != "cuda" else [True, "cudagraphs"],
    )
    fed = measure(best.candidate, from_files=True) if machine.steps_per_epoch else None
    print(*report(cfg, machine, best, fed), sep="\n")


def search(
    first: Candidate,
    measure: Callable[[Candidate], Result],
    *,
    backends: Sequence[str],
    precisions: Sequence[str],
    batch_size: int,
    unit: int | None,
    compiled: Sequence[Literal[True, "cudagraphs"]],
) -> Result:
    """The fastest of the candidates, few of which are measured, as one property is varied at a time.

    First the backends, with the images halved as long as all of them run out of memory; then, each with the best so
    far, the precisions, the number of images at once (doubled while that is faster, else halved), and compilation.

    Args:
        first: where to start.
        measure: times a candidate.
        backends: all that are tried.
        precisions: those to try besides the first's.
        batch_size: of a whole step; the number of images at once divides it.
        unit: the number of images at once is a multiple of this; None leaves that number as it is.
        compiled: ways to compile.

    Raises:
        ValueError: if no candidate runs.
    """
    images = first.images

    def can_halve(number: int) -> bool:
        # A graph cannot add up the gradients of several micro-batches.
        return unit is not None and number % (2 * unit) == 0 and first.compile != "cudagraphs"

    while True:
        results = [measure(replace(first, backend=backend, images=images)) for backend in backends]
        best = max(results, key=lambda result: result.images_per_s)
        if best.images_per_s:
            break
        lacks_memory = any(result.failure.startswith(OUT_OF_MEMORY) for result in results)
        if not (lacks_memory and can_halve(images)):
            raise ValueError(
                f"no candidate runs, {first.backend} for this reason: {results[0].failure}; if memory is what lacks, "
                "try --model.grad_checkpointing true, a smaller batch_size, data.image_size or model.variant"
            )
        images //= 2

    def gains(other: Candidate) -> bool:
        """Whether another candidate is faster; if so, it becomes the best."""
        nonlocal best
        result = measure(other)
        is_faster = result.images_per_s > GAIN * best.images_per_s
        best = result if is_faster else best
        return is_faster

    for precision in precisions:
        gains(replace(best.candidate, precision=precision))
    while unit and batch_size % (2 * best.candidate.images) == 0:
        if not gains(replace(best.candidate, images=2 * best.candidate.images)):
            break
    while best.candidate.images <= images and can_halve(best.candidate.images):
        if not gains(replace(best.candidate, images=best.candidate.images // 2)):
            break
    for setting in compiled:
        whole = setting != "cudagraphs" or best.candidate.images == batch_size
        if whole and setting != best.candidate.compile:
            gains(replace(best.candidate, compile=setting))
    return best


def report(cfg: BenchConfig, machine: Machine, best: Result, fed: Result | None) -> Iterator[str]:
    """The flags of the fastest candidate and, if the user's images were read, what limits the run and its hours.

    Args:
        cfg: of the run.
        machine: what it runs on.
        best: the fastest candidate.
        fed: the same candidate, fed with the user's images.
    """
    found = best.candidate
    flags = f"--model.backend {found.backend} --precision {found.precision}"
    flags += f" --grad_accum {cfg.batch_size // found.images}"
    if found.compile != cfg.model.compile and "compile" in cfg.vary:
        flags += f" --model.compile {str(found.compile).lower()}"
    yield f"\nfastest: {flags}"
    yield f"{best.images_per_s:.1f} images/s, {best.median_s:.3g} s a step, {best.memory / 1e9:.1f} GB of memory"
    loader, steps = machine.loader_images_per_s, machine.steps_per_epoch
    if loader is None or steps is None or fed is None:
        yield "With --data.path this command also times the reading of your images, and tells the hours of the run."
        return
    if fed.failure:
        yield f"with your images it does not run: {fed.failure}"
        return
    speed = min(loader, fed.mean_images_per_s)
    yield f"loader alone (data.num_workers = {machine.num_workers}): {loader:.1f} images/s; with the model: {speed:.1f}"
    if loader < best.images_per_s:
        yield "the data are the limit: more workers, if there are cores, or smaller files help"
    else:
        yield "the model is the limit"
    hours = cfg.epochs * steps * cfg.batch_size / speed / 3600
    took = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    yield f"{cfg.epochs} epochs of {steps} steps: {took}, without evaluations and checkpoints"


# What runs in other processes


def survey(cfg: BenchConfig) -> Machine:
    """Look at the device and time the loader on the user's images, if there are any.

    Raises:
        ValueError: if there are images, but too few for a batch or none that can be read.
    """
    import torch

    from fcmae.data.loader import choose_num_workers
    from fcmae.data.sampler import steps_per_epoch
    from fcmae.timing import for_a_while
    from fcmae.training.launch import make_accelerator
    from fcmae.training.records import cpu_name

    accelerator = make_accelerator(cfg)
    device = accelerator.device
    name, precisions = cpu_name(), ["fp32"]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        precisions += ["tf32", "bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    elif device.type == "cpu":
        name = f"{name}, threads: {torch.get_num_threads()}"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            precisions.append("bf16")
    precision = cfg.precision
    if precision == "auto":
        precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    found = Machine(device.type, f"{device.type} ({name})", precision, tuple(precisions))
    if not cfg.data.path:
        return found

    images, masks = _train_images(cfg), cfg.data.masks_per_image
    steps = steps_per_epoch(len(images), cfg.batch_size, masks)
    workers, at_once = choose_num_workers(cfg.data.num_workers, device.type), min(LOADER_IMAGES, len(images))
    batches = _batches(cfg, images, device.type, at_once * masks)
    for _ in islice(batches, max(1, 2 * workers)):
        pass  # workers start, and open their first files
    times = for_a_while(lambda: next(batches), cfg.seconds)
    speed = len(times) * at_once * masks / sum(times)
    return replace(found, num_workers=workers, loader_images_per_s=speed, steps_per_epoch=steps)


def time_candidate(cfg: BenchConfig, candidate: Candidate, from_files: bool) -> Result:
    """Time optimizer steps as pretraining takes them, at a learning rate of 0.

    On a CPU a step has at most two micro-batches, whatever grad_accum is: those left out take as long as the first.

    Args:
        cfg: of the run.
        candidate: how a step is computed.
        from_files: on the user's images, or on made-up ones.
    """
    import torch

    from fcmae.data.loader import prefetched
    from fcmae.data.normalize import Normalize
    from fcmae.masked import masked_loss
    from fcmae.pretraining import build_model, build_optimizer, noise_batch, num_visible_patches
    from fcmae.timing import for_a_while, seconds
    from fcmae.training.compiling import compile_model
    from fcmae.training.launch import make_accelerator
    from fcmae.training.steps import StartedStep, start_update

    grad_accum = cfg.batch_size // candidate.images
    model_settings = cfg.model.model_copy(update={"backend": candidate.backend, "compile": candidate.compile})
    settings = {"precision": candidate.precision, "grad_accum": grad_accum, "model": model_settings}
    cfg = cfg.model_copy(update=settings)
    accelerator = make_accelerator(cfg)
    device = accelerator.device
    net = build_model(cfg).to(device)
    normalize = Normalize(*cfg.data.statistics()).to(device)
    visible = num_visible_patches(cfg)
    compile_model(net, candidate.compile, lambda: None, 0)
    model, optimizer = accelerator.prepare(net, build_optimizer(cfg, net), device_placement=[True, False])
    if from_files:
        given = _batches(cfg, _train_images(cfg), device.type, cfg.batch_size, grad_accum)
    else:
        noise = noise_batch(cfg, candidate.images)
        given = repeat(noise.pin_memory() if device.type == "cuda" else noise)
    batches = prefetched(given, device)
    num_micro_batches = min(grad_accum, 2) if device.type == "cpu" else grad_accum
    unread: StartedStep | None = None
    left_out_s: list[float] = []

    def part() -> None:
        if cfg.model.compile == "cudagraphs":  # else it would load the compiler, 3 s of every start
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        batch = next(batches)
        loss = masked_loss(
            model,
            normalize(batch.images),
            batch.given_masks,
            visible,
            target=net.target,
        )
        accelerator.backward(loss / grad_accum)
        sum_.add_(loss.detach() / grad_accum)

    def step() -> None:
        """As in training, the device computes a step while the host reads the result of the one before."""
        nonlocal unread
        sum_.zero_()
        left_out_s.append((grad_accum - num_micro_batches) * seconds(part))
        for _ in range(num_micro_batches - 1):
            part()
        started = start_update(accelerator, model, optimizer, sum_, clip_grad=cfg.optim.clip_grad)
        if unread is not None:
            unread.result()
        unread = started

    sum_ = torch.zeros((), device=device)
    warm_s = [seconds(step), seconds(step)]
    # At least three; one, if they are so slow that the warm-up took five times what was asked for.
    times = for_a_while(step, cfg.seconds, at_least=3 if sum(warm_s) < 5 * cfg.seconds else 1)
    whole_s = [sum(both) for both in zip([*warm_s, *times], left_out_s, strict=True)]
    return Result(candidate, cfg.batch_size, tuple(whole_s[2:]), whole_s[0], peak_memory(device))


def peak_memory(device: torch.device) -> int:
    """The peak so far in bytes, of this process on a CPU or of tensors on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts the peak of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    # In bytes on macOS, in units of 1024 elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _train_images(cfg: BenchConfig) -> Images:
    from fcmae.data.find import find_images
    from fcmae.data.split import split
    from fcmae.data.storage import Storage

    found = find_images(cfg.data.path, storage=Storage.of_run(cfg.out, cfg.data.index, cfg.data.cache_gb))
    return split(found, cfg.data.val_share, cfg.seed)[0]


def _batches(
    cfg: BenchConfig, images: Images, device_type: str, batch_size: int, grad_accum: int = 1
) -> Iterator[Batch]:
    """The user's images, as a run reads them, without end."""
    from fcmae.data.loader import build_loader
    from fcmae.data.sampler import StepSampler
    from fcmae.pretraining import build_dataset

    masks = cfg.data.masks_per_image
    order = StepSampler(
        len(images), batch_size, cfg.seed, end_step=ENDLESS, grad_accum=grad_accum, masks_per_image=masks
    )
    dataset = build_dataset(cfg, images, augment=True)
    return iter(build_loader(dataset, order, num_workers=cfg.data.num_workers, device_type=device_type))
