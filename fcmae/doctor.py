"""What this machine has for pretraining and what it lacks; what that costs and how to fix it.

What may crash or block an interpreter (compiled packages, compilers, process groups) is tried in another one, so that a
broken part becomes a row of the table; torch is imported only there.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fcmae import threads
from fcmae.data.cores import (
    FEW_FILES,
    OPEN_FILES,
    SHARED_MEMORY,
    allow_open_files,
    core_time,
    free_memory,
    memory_limits,
    num_cores,
)
from fcmae.processes import Failed, each_in_process

# FCMAE's parameters with the default decoder. A checkpoint holds each three times in float32: weights and two moments.
NUM_PARAMETERS = {"atto": 7_257_992, "base": 91_922_432}
# What pretrain_cpu (atto, 64 images of 128 pixels) and its worker took on Linux.
MIN_MEMORY = 1_500_000_000

NOTHING = "nothing can be pretrained"
PAIR = (
    "install torch and torchvision together, of one release and from one source (pytorch.org/get-started/locally): "
    "pip install --force-reinstall torch torchvision"
)
ENGINE = "make minkowski in a clone, or docker/install_minkowski.sh"


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        name: of what was looked at.
        state: note = works, at a cost; missing = not there; broken = there, but does not work.
        found: versions, sizes or the error.
        cost: what it costs, if there is something to say.
        mend: how to fix it, if there is something to say.
        needed: while this is missing or broken, nothing can be pretrained.
    """

    name: str
    state: Literal["ok", "note", "missing", "broken"]
    found: str
    cost: str = ""
    mend: str = ""
    needed: bool = False


Find = Callable[[], Iterator[Finding]]

# Rows of checks that are run in another Python, if they fail there.
_lacking = partial(Finding, state="broken", found="")
NO_TORCH = _lacking("torch", cost=NOTHING, mend=PAIR, needed=True)
NO_COMPILE = _lacking(
    "torch.compile",
    cost="--model.compile cannot be used; everything else can",
    mend="install g++ and Python's headers (on Debian and Ubuntu: apt install g++ python3-dev), or set CXX",
)
NO_GROUP = _lacking(
    "processes",
    cost="several processes cannot train together on this machine; one can",
    mend="see that localhost and this host's name resolve (/etc/hosts) and that no firewall is between them, or name a "
    "network interface that works: GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo",
)
NO_ENGINE = _lacking(
    "MinkowskiEngine",
    cost="nothing for the packed backend, which is the default; --model.backend minkowski cannot be used",
    mend=f"build it again, for this torch: {ENGINE}",
)


def checks(out: Path = Path(), quick: bool = False) -> dict[str, Find]:
    """All checks, by name and in order.

    Args:
        out: see `diagnose`.
        quick: see `diagnose`.
    """
    engine = partial(_alone, partial(_minkowski, quick), NO_ENGINE, timeout_s=60)
    found: dict[str, Find] = {
        "Python": _python,
        "packages": _packages,
        # Here a driver may block, or a package kill Python; the rows before this one tell which.
        "torch": partial(_alone, _torch, NO_TORCH, timeout_s=120),
        "torch.compile": partial(_alone, _compile, NO_COMPILE, timeout_s=120),
        "processes": partial(_alone, _processes, NO_GROUP, timeout_s=30),
        "launcher": _launcher,
        "MinkowskiEngine": partial(_minkowski, quick) if quick else engine,
        "Pillow": _pillow,
        "imagecodecs": _imagecodecs,
        "disk": partial(_disk, out),
        "/dev/shm": _shared_memory,
        "memory": _memory,
        "CPU": _cpu,
        "threads": _threads,
        "open files": _open_files,
    }
    return {name: find for name, find in found.items() if not quick or name not in ("torch.compile", "processes")}


def doctor(out: Path = Path(), quick: bool = False, as_json: bool = False) -> bool:
    """Print what `diagnose` finds, as it finds it, or as one JSON object.

    Args:
        out: see `diagnose`.
        quick: see `diagnose`.
        as_json: one object, at the end.

    Returns:
        Whether this machine can pretrain.
    """
    findings = []
    for finding in diagnose(out, quick):
        findings.append(finding)
        if not as_json:
            print(_line(finding), flush=True)
    lacking = [f.name for f in findings if f.needed and f.state in ("missing", "broken")]
    if as_json:
        print(json.dumps({"can_pretrain": not lacking, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        verdict = f"cannot pretrain: mend {', '.join(lacking)}" if lacking else "can pretrain"
        print(f"\nThis machine {verdict}.")
    return not lacking


def _line(finding: Finding) -> str:
    head = f"{finding.name:15}  {finding.state:7}  "
    room = max(60, min(shutil.get_terminal_size().columns, 120)) - len(head)
    texts = [finding.found, finding.cost and f"costs: {finding.cost}", finding.mend and f"mend: {finding.mend}"]
    wrap = partial(textwrap.wrap, width=room, break_on_hyphens=False, break_long_words=False)
    return head + f"\n{'':{len(head)}}".join(line for text in texts for line in wrap(text))


def diagnose(out: Path = Path(), quick: bool = False) -> Iterator[Finding]:
    """Run all checks, one after the other; a broken part is a finding, never an exception.

    Args:
        out: where runs will be written; it need not exist yet.
        quick: skip torch.compile, process groups and MinkowskiEngine, which take most of the time.
    """
    for name, find in checks(out, quick).items():
        try:
            yield from find()
        except Exception as error:
            yield Finding(name, "broken", f"it could not be looked at: {_sentence(error)}")


def _alone(find: Find, lacking: Finding, timeout_s: float) -> Iterator[Finding]:
    """The findings of a check that may kill or block Python, or fail, of which `lacking` is then the finding."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            yield from each_in_process(_quietly, find, directory, timeout_s=timeout_s)
        except Failed as failure:
            yield replace(lacking, found=str(failure))


def _quietly(find: Find, cache: str) -> Iterator[Finding]:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # Cached code needs no compiler: only an empty cache shows whether there is one that works.
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
    yield from find()


def _judge(name: str, found: str, is_bad: bool, cost: str = "", mend: str = "") -> Finding:
    return Finding(name, "note", found, cost, mend) if is_bad else Finding(name, "ok", found)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 240)}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


# What is looked at


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    missing, old = [], []
    for requirement in map(Requirement, metadata.requires("fcmae") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                missing.append(str(requirement))
            else:
                if not requirement.specifier.contains(version, prereleases=True):
                    old.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if missing:
        mend = "pip install " + " ".join(map(repr, missing))
        yield Finding("packages", "missing", ", ".join(missing), NOTHING, mend, needed=True)
    if old or not missing:
        found = "; ".join(old) or f"all that fcmae {metadata.version('fcmae')} needs, none too old"
        yield _judge("packages", found, bool(old), "fcmae is not tested with these", "pip install --upgrade fcmae")


def _torch() -> Iterator[Finding]:
    works = True
    for name in ("torch", "torchvision", "timm", "accelerate"):
        try:
            module = importlib.import_module(name)
        except Exception as error:
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
            mend = PAIR if "torch" in name else f"once torch and torchvision work: pip install --upgrade {name}"
            yield Finding(name, "missing" if is_missing else "broken", _sentence(error), NOTHING, mend, needed=True)
            works = False
        else:
            yield Finding(name, "ok", module.__version__)
            if name == "torch":
                yield from _gpus()  # before anything else can consume the driver's warnings
    if works:
        import torch

        from fcmae.data.loader import choose_num_workers
        from fcmae.layouts.native import library

        device = torch.accelerator.current_accelerator(check_available=True)
        workers = choose_num_workers(None, device.type if device else "cpu")
        yield Finding("loader workers", "ok", f"{workers} for each training process, unless data.num_workers is set")
        found = f"the loops for the depthwise convolution {'are' if library() else 'cannot be'} compiled"
        cost = "pretraining on a CPU takes up to three quarters longer"
        mend = "install gcc, or name a compiler in CC; TMPDIR must allow programs"
        yield _judge("C compiler", found, library() is None, cost, mend)


def _gpus() -> Iterator[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type == "cuda":  # ROCm too
        yield from map(_gpu, range(torch.cuda.device_count()))
        return
    if device is not None:
        yield Finding("GPU", "ok", device.type)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    found = f"none that torch (built for {build or 'CPUs'}) can use"
    found += "".join(f"; {textwrap.shorten(str(remark.message), 240)}" for remark in remarks[-1:])
    mend = "if there is one: install its driver; in a container, docker run --gpus all"
    files = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
    if files:
        found += f"; but there is {files[0]}"
        mend = "install a build of torch and torchvision for it (pytorch.org/get-started/locally)"
        if build:
            mend = f"see that nvidia-smi works and names this CUDA or a later one, and CUDA_VISIBLE_DEVICES; or {mend}"
    cost = "training runs on the CPU: enough to try atto on small images, too slow for the published recipes"
    yield Finding("GPU", "broken" if files else "note", found, cost, mend)
    cpuinfo = Path("/proc/cpuinfo")
    native = {"amx_bf16", "avx512_bf16", "bf16"} & set(cpuinfo.read_text().split() if cpuinfo.exists() else ())
    found = f"on the CPU: {', '.join(sorted(native)) or 'no instructions for it (AMX, AVX512-BF16)'}"
    yield _judge("bf16", found, not native, "--precision bf16 works, but slower; by default a CPU trains in fp32")


def _gpu(index: int) -> Finding:
    import torch

    name = f"GPU {index}"
    try:
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        x = torch.ones(1, 8, 8, 8, device=f"cuda:{index}")
        torch.nn.functional.conv2d(x, x).sum().item()  # fails where torch has no kernels for the GPU
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception as error:
        mend = "see that no one else fills it; install a build of torch for it (pytorch.org/get-started/locally)"
        return Finding(name, "broken", _sentence(error), "training cannot use it", mend)
    found = f"{gpu.name}, {_gb(free)} of {_gb(total)} free, compute capability {gpu.major}.{gpu.minor}, bf16: "
    cost = "bf16 is emulated, and slower than fp32; fp16 can overflow in GRN"
    return _judge(name, found + ("yes" if bf16 else "no"), not bf16, cost, "train with --precision fp32")


def _compile() -> Iterator[Finding]:
    # g++ for a CPU; for a GPU Triton is content with a C compiler.
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang"))):
        yield replace(NO_COMPILE, state="missing", found="there is no C++ compiler (g++)")
        return
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gelu, x = torch.nn.functional.gelu, torch.linspace(-3, 3, 64, device=device)
    start = time.perf_counter()
    torch.testing.assert_close(torch.compile(gelu)(x), gelu(x))
    took = f"took {time.perf_counter() - start:.0f} s for a small function, on {device} with nothing cached"
    yield Finding("torch.compile", "ok", took)


def _processes() -> Iterator[Finding]:
    torch: Any = importlib.import_module("torch")
    mp: Any = importlib.import_module("torch.multiprocessing")
    store = torch.distributed.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    try:
        mp.start_processes(_join_group, (store.port,), nprocs=2, start_method="fork")
    except mp.ProcessRaisedException as error:  # its message is a traceback
        raise ConnectionError(str(error).strip().rpartition("\n")[2]) from error
    found, is_slow = "two form a gloo group on this machine", False
    if torch.cuda.is_available():
        is_slow = not torch.distributed.is_nccl_available()
        found += "; no NCCL" if is_slow else f"; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield _judge("processes", found, is_slow, "several GPUs train slowly", PAIR)


def _join_group(rank: int, port: int) -> None:
    torch: Any = importlib.import_module("torch")
    store = torch.distributed.TCPStore("localhost", port, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total.item() == 2, total


def _launcher() -> Iterator[Finding]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    set_ = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    yield Finding("launcher", "ok", " ".join(set_) or "none around this command")


def _minkowski(quick: bool) -> Iterator[Finding]:
    if find_spec(NO_ENGINE.name) is None:
        yield replace(NO_ENGINE, state="missing", found="not installed", mend=ENGINE)
        return
    if quick:
        yield Finding(NO_ENGINE.name, "ok", "installed; not tried")
        return
    torch: Any = importlib.import_module("torch")
    engine = importlib.import_module("MinkowskiEngine")
    build = "CUDA" if engine.is_cuda_available() else "CPUs"
    device = "cuda" if build == "CUDA" and torch.cuda.is_available() else "cpu"
    coordinates = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.int32)
    x = engine.SparseTensor(torch.ones(3, 2), coordinates, device=device)
    engine.MinkowskiConvolution(2, 4, kernel_size=3, dimension=2).to(device)(x).F.sum().item()
    found = f"{engine.__version__}, built for {build}; a convolution runs on {device}"
    is_idle = device == "cpu" and torch.cuda.is_available()
    yield _judge(NO_ENGINE.name, found, is_idle, "the minkowski backend cannot use the GPU", ENGINE)


def _pillow() -> Iterator[Finding]:
    from PIL import features

    lacking = [name for name in ("jpg", "libjpeg_turbo", "webp", "libtiff") if not features.check(name)]
    built = f"built without {', '.join(lacking)}" if lacking else f"libjpeg-turbo {features.version('libjpeg_turbo')}"
    other = f"; simplejpeg {metadata.version('simplejpeg')}" if find_spec("simplejpeg") else ""
    found = f"{metadata.version('pillow')}, {built}{other}"
    cost = "without libjpeg_turbo JPEGs decode slowly; without the others these formats cannot be read"
    yield _judge("Pillow", found, bool(lacking), cost, "pip install --force-reinstall --only-binary :all: pillow")


def _imagecodecs() -> Iterator[Finding]:
    if find_spec("imagecodecs"):
        yield Finding("imagecodecs", "ok", metadata.version("imagecodecs"))
    else:
        cost = "multi-band and 16-bit colour TIFFs with LZW and other compressions cannot be read; the rest can"
        yield Finding("imagecodecs", "missing", "not installed", cost, "pip install imagecodecs")


def _disk(out: Path) -> Iterator[Finding]:
    # os.path's says of what may not be looked at that it is not there.
    path = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))  # noqa: PTH110
    free = shutil.disk_usage(path).free
    # A run keeps two by default and the last good one, and writes the fourth before it deletes one.
    atto, base = (4 * 3 * 4 * count for count in NUM_PARAMETERS.values())
    found = f"{_gb(free)} free at {path}; a run's checkpoints take {_gb(atto)} for atto, {_gb(base)} for base"
    is_writable, mend = path.is_dir() and os.access(path, os.W_OK), "free some, or choose another place: --out DIR"
    if not is_writable or free < atto:
        found = found if is_writable else f"{path} cannot be written to"
        yield Finding("disk", "broken", found, "runs cannot be saved there", mend, needed=True)
    else:
        yield _judge("disk", found, free < base, "the checkpoints of larger models do not fit", mend)


def _shared_memory() -> Iterator[Finding]:
    if SHARED_MEMORY.exists():  # on Linux
        usage = shutil.disk_usage(SHARED_MEMORY)
        cost = "loader workers pass their images through pipes, which is slower, when it is full"
        mend = "docker run --shm-size 2g, mount -o remount,size=2g /dev/shm, or --data.num_workers 0, which is slower"
        yield _judge("/dev/shm", f"{_gb(usage.free)} of {_gb(usage.total)} free", usage.free < 5e8, cost, mend)


def _memory() -> Iterator[Finding]:
    import psutil  # comes with accelerate

    machine, free = psutil.virtual_memory().total, free_memory()
    total = min([machine, *(limit for limit, _ in memory_limits())])
    found = f"{_gb(min(free, total))} of {_gb(total)} available"
    if total < machine:
        found += f" in this container; the machine has {_gb(machine)}"
    cost = f"training is killed: atto takes {_gb(MIN_MEMORY)} for 64 images of 128 pixels"
    if total < MIN_MEMORY:
        yield Finding("memory", "broken", found, cost, "a larger machine, or docker run --memory 8g", needed=True)
    else:
        yield _judge("memory", found, free < MIN_MEMORY, cost, "end other programs")


def _cpu() -> Iterator[Finding]:
    cores, share = num_cores(), core_time()
    found = f"{cores} of {os.cpu_count()} cores"
    if share < cores:
        found += f", of which this container gets the time of {share:g}"
    cost = "torch's threads, as many as there are cores, wait for each other"
    yield _judge("CPU", found, share < cores, cost, f"set OMP_NUM_THREADS={max(1, int(share))}")


def _threads() -> Iterator[Finding]:
    share, given = threads.busy(), threads.in_force()
    setting = f"{given}, as set" if given else "=".join(threads.choose(share)) + " for a run that starts now"
    found = f"{setting}; other processes use {share:.0%} of the cores"
    cost = "training on a CPU takes several times as long, and threads that spin while they wait slow it further"
    mend = f"end other programs; set {'='.join(threads.BUSY_SETTING)} or nothing"
    yield _judge("threads", found, share > threads.BUSY, cost, mend)


def _open_files() -> Iterator[Finding]:
    limit = allow_open_files()
    found = f"{'at most' if limit < OPEN_FILES else 'at least'} {limit}"
    cost = "loader workers pass their images through pipes, which is slower"
    yield _judge("open files", found, limit < FEW_FILES, cost, "ulimit -n 4096")
