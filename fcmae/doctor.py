"""What this machine has for pretraining and what it lacks; what that costs and how to mend it.

What may crash or block an interpreter (compiled packages, compilers, process groups) is tried in another one, so that a
broken part becomes a row of the table. A check imports what it needs itself: torch may be what is broken.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fcmae import threads
from fcmae.data.cores import (
    FEW_FILES,
    OPEN_FILES,
    SHARED_MEMORY,
    allow_open_files,
    core_time,
    memory_limits,
    num_cores,
)

# FCMAE's parameters with the default decoder. A checkpoint holds each three times in float32: weights and two moments.
NUM_PARAMETERS = {"atto": 7_257_992, "base": 91_922_432}
# What pretrain_cpu (atto, 64 images of 128 pixels) and its worker took on Linux.
MIN_MEMORY = 1_500_000_000

NOTHING = "nothing can be pretrained"
PAIR = (
    "install torch and torchvision together, of one release and from one source (pytorch.org/get-started/locally): "
    "pip install --force-reinstall torch torchvision"
)
NETWORK = (
    "see that localhost and this host's name resolve (/etc/hosts) and that no firewall is between them, or name a "
    "network interface that works: GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo"
)
ENGINE = "make minkowski in a clone, or docker/install_minkowski.sh"


State = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        name: of what was looked at; a check may leave it, and what follows `found`, to its entry in `checks`.
        state: note = works, at a cost; missing = not there; broken = there, but does not work.
        found: versions, sizes or the error.
        cost: what it costs, where there is something to say.
        mend: how to mend it, likewise.
        needed: while this is missing or broken, nothing can be pretrained.
    """

    name: str
    state: State
    found: str
    cost: str = ""
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Check:
    """How one thing is looked at, and what is said where it is not as it should be.

    Attributes:
        name: of what is looked at.
        find: what is done; a function of this module where there is a timeout.
        cost: see `Finding`; for those that leave name and cost to this.
        mend: likewise.
        needed: likewise, unless they are notes.
        timeout_s: it is tried in another Python, for so long; 0 tries it in this one.
    """

    name: str
    find: Callable[[], Iterator[Finding]]
    cost: str = ""
    mend: str = ""
    needed: bool = False
    timeout_s: float = 0

    def row(self, found: Finding) -> Finding:
        """A finding with what it left open."""
        if found.name or found.state == "ok":
            return replace(found, name=found.name or self.name)
        needed = self.needed and found.state != "note"
        return Finding(self.name, found.state, found.found, found.cost or self.cost, found.mend or self.mend, needed)


def checks(out: Path = Path(), quick: bool = False) -> dict[str, Check]:
    """All that is looked at, by name and in order.

    Args:
        out: where runs are to be written; it need not exist yet.
        quick: leaves out what takes most of the time.
    """
    slow = ("torch.compile", "processes") if quick else ()
    return {check.name: check for check in _table(out, quick) if check.name not in slow}


def _table(out: Path, quick: bool) -> Iterator[Check]:
    yield Check("Python", _python)
    yield Check("packages", _packages, NOTHING, needed=True)
    # It is here that a driver may block, or a package kill Python; the rows that came before tell which.
    yield Check("torch", _torch, NOTHING, PAIR, needed=True, timeout_s=120)
    cost = "--model.compile cannot be used; everything else can"
    mend = "install g++ and Python's headers (on Debian and Ubuntu: apt install g++ python3-dev), or set CXX"
    yield Check("torch.compile", _compile, cost, mend, timeout_s=120)
    cost = "several processes cannot train together on this machine; one can"
    yield Check("processes", _processes, cost, NETWORK, timeout_s=30)
    yield Check("launcher", _launcher)
    cost = "nothing for the packed backend, which is the default; --model.backend minkowski cannot be used"
    find = _find_minkowski if quick else _minkowski
    yield Check(
        "MinkowskiEngine", find, cost, f"build it again, for this torch: {ENGINE}", timeout_s=0 if quick else 60
    )
    cost, mend = "a training step on a CPU takes about a fifth longer", "install gcc, or name a C compiler in CC"
    yield Check("C compiler", _native, cost, mend)
    cost = "without libjpeg_turbo JPEGs decode slowly; without the others these formats cannot be read"
    yield Check("Pillow", _pillow, cost, "pip install --force-reinstall --only-binary :all: pillow")
    cost = "multi-band and 16-bit colour TIFFs with LZW and other compressions cannot be read; the rest can"
    yield Check("imagecodecs", _imagecodecs, cost, "pip install imagecodecs")
    mend = "free some, or choose another place: --out DIR"
    yield Check("disk", partial(_disk, out), "runs cannot be saved there", mend, needed=True)
    cost = "loader workers pass their images through pipes, which is slower, when it is full"
    mend = "docker run --shm-size 2g, mount -o remount,size=2g /dev/shm, or --data.num_workers 0, which is slower"
    yield Check("/dev/shm", _shared_memory, cost, mend)
    cost = f"training is killed: atto takes {_gb(MIN_MEMORY)} for 64 images of 128 pixels"
    yield Check("memory", _memory, cost, "a larger machine, or docker run --memory 8g", needed=True)
    cost, cores = (
        "threads and loader workers, as many as there are cores, wait for each other",
        max(1, int(core_time())),
    )
    yield Check("CPU", _cpu, cost, f"set OMP_NUM_THREADS={cores} and --data.num_workers {cores}")
    cost = "training on a CPU takes several times as long, and threads that spin while they wait slow it further"
    yield Check("threads", _threads, cost, f"end other programs; set {'='.join(threads.BUSY_SETTING)} or nothing")
    cost = "loader workers pass their images through pipes, which is slower"
    yield Check("open files", _open_files, cost, "ulimit -n 4096")


def doctor(out: Path = Path(), quick: bool = False, as_json: bool = False) -> bool:
    """Print what `diagnose` finds, as it finds it, or as one JSON object.

    Args:
        out: see `diagnose`.
        quick: likewise.
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
    wrap = partial(textwrap.wrap, width=room, break_on_hyphens=False, break_long_words=False)
    lines = wrap(finding.found)
    lines += wrap(f"costs: {finding.cost}") if finding.cost else []
    lines += wrap(f"mend: {finding.mend}") if finding.mend else []
    return head + f"\n{'':{len(head)}}".join(lines)


def diagnose(out: Path = Path(), quick: bool = False) -> Iterator[Finding]:
    """Look at everything, one thing after the other; a part that is broken is a finding, never an exception.

    Args:
        out: where runs are to be written; it need not exist yet.
        quick: try neither torch.compile nor a process group nor MinkowskiEngine, which take most of the time.
    """
    for check in checks(out, quick).values():
        yield from look(check)


def look(check: Check) -> Iterator[Finding]:
    """What one check finds; that it raises, dies or is not done in time is a finding too."""
    if check.timeout_s:
        yield from map(check.row, _in_child(check))
        return
    try:
        yield from map(check.row, check.find())
    except Exception as error:
        yield Finding(check.name, "broken", f"it could not be looked at: {_sentence(error)}")


def _in_child(check: Check) -> Iterator[Finding]:
    """The findings of a check that runs in another Python."""
    # The same sys.path: `-c` alone would put the current directory first, with whatever packages lie there.
    find = f"doctor.{check.find.__name__}"
    code = f"import sys; sys.path[:] = {sys.path!r}; from fcmae import doctor; doctor._answer({find})"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        # What was compiled once needs no compiler: only an empty cache shows whether there is one that works.
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": directory, "TRITON_CACHE_DIR": directory}
        answers, log = Path(directory, "answers"), Path(directory, "log")
        with answers.open("w") as stdout, log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=stdout, stderr=stderr, env=env, start_new_session=True
            )
            try:
                status = process.wait(check.timeout_s)
                reason = f"Python was killed by {signal.Signals(-status).name}" if status < 0 else ""
            except subprocess.TimeoutExpired:
                status, reason = 1, f"it was not done after {check.timeout_s:g} s"
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # its compilers and workers too
                process.wait()
        for line in answers.read_text(errors="replace").splitlines():
            if line.startswith('{"name": '):  # packages may print too
                yield Finding(**json.loads(line))
        if status:
            yield Finding("", "broken", reason or log.read_text(errors="replace").strip().rpartition("\n")[2])


def _answer(find: Callable[[], Iterator[Finding]]) -> None:
    status = 0
    try:
        for finding in find():
            print(json.dumps(asdict(finding)), flush=True)  # at once: what was found outlives a crash
    except Exception as error:
        print(_sentence(error), file=sys.stderr, flush=True)
        status = 1
    os._exit(status)  # some packages crash, or wait, while the interpreter is taken down


def _ok(found: str, name: str = "") -> Finding:
    return Finding(name, "ok", found)


def _judge(found: str, bad: bool, cost: str = "", mend: str = "", name: str = "") -> Finding:
    return Finding(name, "note", found, cost, mend) if bad else _ok(found, name)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 240)}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


# What is looked at


def _python() -> Iterator[Finding]:
    yield _ok(f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")


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
        yield Finding("", "missing", ", ".join(missing), mend="pip install " + " ".join(map(repr, missing)))
    if old or not missing:
        found = "; ".join(old) or f"all that fcmae {metadata.version('fcmae')} needs, none too old"
        yield _judge(found, bool(old), "fcmae is not tested with these", "pip install --upgrade fcmae")


def _torch() -> Iterator[Finding]:
    works = True
    for name in ("torch", "torchvision", "timm", "accelerate"):
        try:
            module = importlib.import_module(name)
        except Exception as error:
            state: State = "missing" if isinstance(error, ModuleNotFoundError) and error.name == name else "broken"
            mend = PAIR if "torch" in name else f"once torch and torchvision work: pip install --upgrade {name}"
            yield Finding(name, state, _sentence(error), NOTHING, mend, needed=True)
            works = False
        else:
            yield _ok(module.__version__, name)
            if name == "torch":
                yield from _gpus()  # before anything else can take the driver's warnings
    if works:
        import torch

        from fcmae.data.loader import choose_num_workers

        device = torch.accelerator.current_accelerator(check_available=True)
        workers = choose_num_workers(None, device.type if device else "cpu")
        yield _ok(f"{workers} for each training process, unless data.num_workers is set", "loader workers")


def _gpus() -> Iterator[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()  # ROCm too
        device = torch.accelerator.current_accelerator(check_available=True)
    if has_cuda:
        yield from (_gpu(index) for index in range(torch.cuda.device_count()))
        return
    if device is not None:
        yield _ok(device.type, "GPU")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    found = f"none that torch (built for {build or 'CPUs'}) can use"
    found += "".join(f"; {textwrap.shorten(str(remark.message), 240)}" for remark in remarks[-1:])
    mend = "if there is one: install its driver; in a container, docker run --gpus all"
    state: State = "note"
    if files := [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]:
        state, found = "broken", f"{found}; but there is {files[0]}"
        mend = "install a build of torch and torchvision for it (pytorch.org/get-started/locally)"
        if build:
            mend = f"see that nvidia-smi works and names this CUDA or a later one, and CUDA_VISIBLE_DEVICES; or {mend}"
    cost = "training runs on the CPU: enough to try atto on small images, too slow for the published recipes"
    yield Finding("GPU", state, found, cost, mend)
    cpuinfo = Path("/proc/cpuinfo")
    native = {"amx_bf16", "avx512_bf16", "bf16"} & set(cpuinfo.read_text().split() if cpuinfo.exists() else ())
    found = f"on the CPU: {', '.join(sorted(native)) or 'no instructions for it (AMX, AVX512-BF16)'}"
    cost = "--precision bf16 works, but slower; by default a CPU trains in fp32"
    yield _judge(found, not native, cost, name="bf16")


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
    return _judge(found + ("yes" if bf16 else "no"), not bf16, cost, "train with --precision fp32", name)


def _compile() -> Iterator[Finding]:
    # g++ for a CPU; for a GPU Triton is content with a C compiler.
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang"))):
        yield Finding("", "missing", "there is no C++ compiler (g++)")
        return
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gelu, x = torch.nn.functional.gelu, torch.linspace(-3, 3, 64, device=device)
    start = time.perf_counter()
    torch.testing.assert_close(torch.compile(gelu)(x), gelu(x))
    yield _ok(f"took {time.perf_counter() - start:.0f} s for a small function, on {device} with nothing cached")


def _processes() -> Iterator[Finding]:
    torch: Any = importlib.import_module("torch")
    mp: Any = importlib.import_module("torch.multiprocessing")
    store = torch.distributed.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    try:
        mp.start_processes(_join_group, (store.port,), nprocs=2, start_method="fork")
    except mp.ProcessRaisedException as error:  # its message is a traceback
        raise ConnectionError(str(error).strip().rpartition("\n")[2]) from error
    found, slow = "two form a gloo group on this machine", False
    if torch.cuda.is_available():
        slow = not torch.distributed.is_nccl_available()
        found += "; no NCCL" if slow else f"; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield _judge(found, slow, "several GPUs train slowly", PAIR)


def _join_group(rank: int, port: int) -> None:
    torch: Any = importlib.import_module("torch")
    store = torch.distributed.TCPStore("localhost", port, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total.item() == 2, total


def _launcher() -> Iterator[Finding]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    yield _ok(
        " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or "none around this command"
    )


def _find_minkowski() -> Iterator[Finding]:
    there = find_spec("MinkowskiEngine") is not None
    yield _ok("installed; not tried") if there else Finding("", "missing", "not installed", mend=ENGINE)


def _minkowski() -> Iterator[Finding]:
    if find_spec("MinkowskiEngine") is None:
        yield from _find_minkowski()
        return
    torch: Any = importlib.import_module("torch")
    engine = importlib.import_module("MinkowskiEngine")
    build = "CUDA" if engine.is_cuda_available() else "CPUs"
    device = "cuda" if build == "CUDA" and torch.cuda.is_available() else "cpu"
    coordinates = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.int32)
    x = engine.SparseTensor(torch.ones(3, 2), coordinates, device=device)
    engine.MinkowskiConvolution(2, 4, kernel_size=3, dimension=2).to(device)(x).F.sum().item()
    found = f"{engine.__version__}, built for {build}; a convolution runs on {device}"
    idle = device == "cpu" and torch.cuda.is_available()
    yield _judge(found, idle, "the minkowski backend cannot use the GPU", ENGINE)


def _native() -> Iterator[Finding]:
    loop = importlib.import_module("fcmae.layouts.native").library()
    found = "the loop for the depthwise weight's gradient " + ("is compiled" if loop else "cannot be compiled here")
    yield _judge(found, loop is None)


def _pillow() -> Iterator[Finding]:
    from PIL import features

    lacking = [name for name in ("jpg", "libjpeg_turbo", "webp", "libtiff") if not features.check(name)]
    found = f"{metadata.version('pillow')}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if lacking:
        found = f"{metadata.version('pillow')}, built without {', '.join(lacking)}"
    elif find_spec("simplejpeg"):
        found += f"; simplejpeg {metadata.version('simplejpeg')}"
    yield _judge(found, bool(lacking))


def _imagecodecs() -> Iterator[Finding]:
    there = find_spec("imagecodecs") is not None
    yield _ok(metadata.version("imagecodecs")) if there else Finding("", "missing", "not installed")


def _disk(out: Path) -> Iterator[Finding]:
    path = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(path).free
    # A run keeps two by default, and writes the third before it deletes one.
    atto, base = (3 * 3 * 4 * count for count in NUM_PARAMETERS.values())
    found = f"{_gb(free)} free at {path}; a run's checkpoints take {_gb(atto)} for atto, {_gb(base)} for base"
    if not (path.is_dir() and os.access(path, os.W_OK)):
        yield Finding("", "broken", f"{path} cannot be written to")
    elif free < atto:
        yield Finding("", "broken", found)
    else:
        yield _judge(found, free < base, "the checkpoints of larger models do not fit")


def _shared_memory() -> Iterator[Finding]:
    if SHARED_MEMORY.exists():  # on Linux
        usage = shutil.disk_usage(SHARED_MEMORY)
        yield _judge(f"{_gb(usage.free)} of {_gb(usage.total)} free", usage.free < 5e8)


def _memory() -> Iterator[Finding]:
    import psutil  # comes with accelerate

    memory = psutil.virtual_memory()
    total = min([memory.total, *(limit for limit, _ in memory_limits())])
    found = f"{_gb(min(memory.available, total))} of {_gb(total)} available"
    if total < memory.total:
        found += f" in this container; the machine has {_gb(memory.total)}"
    if total < MIN_MEMORY:
        yield Finding("", "broken", found)
    else:
        yield _judge(found, memory.available < MIN_MEMORY, mend="end other programs")


def _cpu() -> Iterator[Finding]:
    cores, share = num_cores(), core_time()
    found = f"{cores} of {os.cpu_count()} cores"
    if share < cores:
        found += f", of which this container gets the time of {share:g}"
    yield _judge(found, share < cores)


def _threads() -> Iterator[Finding]:
    share, given = threads.busy(), threads.in_force()
    setting = f"{given}, as set" if given else "=".join(threads.choose(share)) + " for a run that starts now"
    yield _judge(f"{setting}; other processes use {share:.0%} of the cores", share > threads.BUSY)


def _open_files() -> Iterator[Finding]:
    limit = allow_open_files()
    yield _judge(f"{'at most' if limit < OPEN_FILES else 'at least'} {limit}", limit < FEW_FILES)
