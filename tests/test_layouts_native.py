"""The loop in C computes what torch computes, and what cannot be compiled is left to torch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import require_native
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fcmae.layouts import Packed, native
from fcmae.masking import random_mask

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def gradients(layout: Packed, f: Tensor, weight: Tensor, bias: Tensor, pull: Tensor) -> list[Tensor]:
    """The convolution, and its gradients."""
    leaves = [x.detach().to(pull.dtype).requires_grad_() for x in (f, weight, bias)]
    out = layout.depthwise_conv(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("grid", "visible", "batch", "b", "channels"),
    [
        ((3, 2), 3, 2, 8, 16),
        ((2, 3), 2, 3, 4, 40),
        ((1, 5), 4, 2, 2, 33),
        ((5, 4), 7, 2, 1, 7),
        ((1, 1), 1, 1, 1, 1),
        ((1, 1), 1, 1, 3, 17),
        ((2, 2), 4, 1, 5, 24),
    ],
)
def test_the_loop_equals_torch(
    grid: tuple[int, int], visible: int, batch: int, b: int, channels: int, threads: int
) -> None:
    require_native()
    mask = torch.from_numpy(random_mask(grid, visible, [(3, i) for i in range(batch)]))
    layout = Packed(mask, visible)
    f = torch.randn(batch, visible, b, b, channels)
    weight, bias, pull = torch.randn(channels, 1, 7, 7), torch.randn(channels), torch.randn_like(f)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gradients(layout, f, weight, bias, pull)
    finally:
        torch.set_num_threads(before)
    # In float64 torch computes all three. float32 keeps 24 bits, of sums of up to a thousand terms.
    for ours, exact in zip(found, gradients(layout, f, weight, bias, pull.double()), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-6 * float(exact.abs().max()), rtol=0)


def test_it_is_registered_as_torch_asks() -> None:
    require_native()
    sample = (torch.randn(4, 2, 3), torch.randn(1, 4, 4, 3), torch.tensor([0, 2, 4, 6]))
    torch.library.opcheck(native.weight_gradient, sample)
    places = torch.tensor([0, 3]), torch.tensor([0, -1, -1, 1])  # of 2 x 2 patches
    for bias in (None, torch.randn(9)):
        opted = torch.randn(2, 3, 3, 9), torch.randn(9, 1, 7, 7).squeeze(1).permute(1, 2, 0), bias, *places, 2, 2
        torch.library.opcheck(native.visible_conv, opted)
    with FlopCounterMode(display=False) as counter:
        native.visible_conv(*opted)
    assert counter.get_total_flops() == 2 * 49 * 2 * 3 * 3 * 9


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(8, 1, 7, 7, dtype=torch.float64), None),
        (torch.zeros(4, 1, 7, 7), None),
        (torch.zeros(8, 1, 7, 7), torch.zeros(4)),
        (torch.zeros(8, 1, 7, 7), torch.zeros(8, dtype=torch.float16)),
    ],
)
def test_what_does_not_fit_is_left_to_torch(weight: Tensor, bias: Tensor | None) -> None:
    """Which refuses it: the loops look at bare memory."""
    layout = Packed(torch.tensor([[[False, True], [True, False]]]), 2)
    with pytest.raises(RuntimeError):
        layout.depthwise_conv(torch.zeros(1, 2, 2, 2, 8), weight, bias)
    with pytest.raises((RuntimeError, IndexError)):  # of a layout of more patches
        layout.depthwise_conv(torch.zeros(1, 1, 2, 2, 8), torch.zeros(8, 1, 7, 7), None)


def test_only_float32_on_a_cpu_takes_it() -> None:
    assert not native.available(CPU, torch.float64)
    assert not native.available(CPU, torch.bfloat16)
    assert not native.available(torch.device("meta"), torch.float32)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true"])
def test_where_it_cannot_be_compiled_torch_computes(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # "false" fails at once; "true" succeeds and makes no file.
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("FCMAE_CACHE", str(tmp_path))
    assert not native.available(CPU, torch.float32)
    layout = Packed(torch.zeros(1, 1, 2, dtype=torch.bool), 2)
    f, weight, bias = torch.randn(1, 2, 2, 2, 3), torch.randn(3, 1, 7, 7), torch.randn(3)
    pull = torch.randn_like(f)
    exact = gradients(layout, f, weight, bias, pull.double())
    for ours, expected in zip(gradients(layout, f, weight, bias, pull), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    assert not list(tmp_path.rglob("*.so"))


def test_a_file_that_is_no_library_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("cut off")
    monkeypatch.setattr(native, "_compiled", lambda *_: broken)
    assert native.library() is None


def test_a_damaged_file_in_the_cache_is_made_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FCMAE_CACHE", str(tmp_path))
    require_native()
    (made,) = tmp_path.rglob("*.so")
    damaged = tmp_path / "damaged"
    (damaged / "native").mkdir(parents=True)
    (damaged / "native" / made.name).touch()
    monkeypatch.setenv("FCMAE_CACHE", str(damaged))
    native.library.cache_clear()
    assert native.library() is not None
    assert not list(damaged.rglob("*.so"))  # the next process keeps a whole one


def test_with_an_open_quotation_for_the_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc '")
    assert native.library() is None


def test_without_a_home_directory_it_is_compiled_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FCMAE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    native.library.cache_clear()
    assert native.library() is not None


def test_it_is_compiled_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FCMAE_CACHE", str(tmp_path))
    require_native()
    (made,) = tmp_path.rglob("*.so")
    commands: list[list[str]] = []
    real = subprocess.run

    def spy(command: list[str], **options: object) -> object:
        commands.append(command)
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(native.subprocess, "run", spy)
    native.library.cache_clear()
    assert native.library() is not None
    assert [command[1:] for command in commands] == [["--version"]]
    assert list(tmp_path.rglob("*.so")) == [made]
