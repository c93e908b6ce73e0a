"""Shared by the tests: small modules with known weights, and double precision where exactness is the claim."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from fcmae import threads

if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
threads.prepare()  # as runs do, before torch is loaded
threads.busy.__defaults__ = (0.001,)  # hundreds of runs are short

# In the background, or under nohup, a shell has these ignored, by the processes that tests start too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from hypothesis import settings
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fcmae import planning
from fcmae.layouts import native
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec

savefig = Figure.savefig
# A process that is killed leaves what it wrote to the system: only a machine that stops could lose it.
os.fsync = lambda descriptor: None

settings.register_profile("fcmae", deadline=None)  # no test asserts a time
settings.load_profile("fcmae")

# MinkowskiEngine is a build from source. Where it must be there, as in the image that builds it, a skip would hide that
# the build is broken: FCMAE_REQUIRE_MINKOWSKI=1 lets the tests run and fail.
requires_minkowski = pytest.mark.skipif(
    find_spec("MinkowskiEngine") is None and not os.environ.get("FCMAE_REQUIRE_MINKOWSKI"),
    reason="MinkowskiEngine is not installed",
)


def require_native() -> None:
    """Skip without a C compiler; with one, the loop must compile and load."""
    if shutil.which((shlex.split(os.environ.get("CC", "")) or ["cc"])[0]) is None:
        pytest.skip("there is no C compiler")
    assert native.library() is not None


# Chromium is a program, not a package. Where it must be there: FCMAE_REQUIRE_CHROMIUM=1.
requires_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and find_spec("playwright")) and not os.environ.get("FCMAE_REQUIRE_CHROMIUM"),
    reason="Chromium or playwright is not installed",
)
# What takes long for what it tells from day to day: FCMAE_REQUIRE_SLOW=1, as in CI.
requires_time = pytest.mark.skipif(
    not os.environ.get("FCMAE_REQUIRE_SLOW"), reason="FCMAE_REQUIRE_SLOW=1 takes the time"
)
CONVNEXTS = [name for name, spec in VARIANTS.items() if isinstance(spec, ConvNeXtSpec)]
MINKOWSKI = pytest.param("minkowski", marks=requires_minkowski)


# The longest files first, so that no process is left alone with one at the end: `make test` keeps this order.
FIRST = ("test_nodes", "test_readme", "test_pretraining", "test_benchmarks", "test_segmenting", "test_worth")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


def randomize(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Draw every parameter at random, so that no zero or one at the start (GRN, biases) hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Files of this process grow to so many bytes and no further, as if the disk were full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Runs of this process leave no devices and precision for others, and no patience with a second interrupt."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from runs import forget_accelerator

    forget_accelerator()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are timed where settings are chosen, for a moment."""
    import runs

    for name, step in zip(("_pretraining_step", "_dense_step"), runs.TIMED, strict=True):
        monkeypatch.setattr(planning, name, step)
    monkeypatch.setattr(planning, "in_process", runs.in_forked)
    monkeypatch.setattr(planning, "_measured_s", lambda hours: 0.1)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Pictures are files without a picture: to draw them takes as long as the training of a tiny network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Image.new("RGB", (1, 1)).save(path, "PNG"))
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures all the same."""
    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: tiny networks are slower on several, and their sums differ. For what a module shares, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
