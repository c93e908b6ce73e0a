"""Whether a model is compiled, with a compiler that only sleeps."""

from __future__ import annotations

import time
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fcmae.training import compiling
from fcmae.training.compiling import Setting, compile_model


class Sleeper(nn.Module):
    """Takes 20 ms as it is and `compiled_s` seconds once "compiled"; counts both."""

    def __init__(self, compiled_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.compiled_s, self.modes = compiled_s, []
        self.calls = {"eager": 0, "compiled": 0}

    def _take(self, kind: str, seconds: float) -> Tensor:
        self.calls[kind] += 1
        time.sleep(seconds)
        return self.weight

    def forward(self) -> Tensor:
        return self._take("eager", 0.02)

    def compile(self, mode: str | None = None) -> None:  # type: ignore[override]  # as much of torch's as is used
        self.modes.append(mode)
        self._compiled_call_impl = lambda: self._take("compiled", self.compiled_s)


def compiled(net: Sleeper, setting: Setting, num_steps: int = 10**6) -> bool:
    compile_model(net, setting, lambda: net().backward(), num_steps)
    net.calls = {"eager": 0, "compiled": 0}
    net()
    return net.calls["compiled"] == 1


@pytest.mark.parametrize("setting", [True, False])
def test_true_and_false_are_done_however_long_it_takes(setting: bool) -> None:
    net = Sleeper(0.1)
    assert compiled(net, setting) is setting
    assert net.weight.grad is None


def test_true_without_a_compiler_is_refused_in_a_sentence_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    net = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    with pytest.raises(ValueError, match=r"^model.compile = true fails here \(.*: install a C\+\+ compiler .* auto$"):
        compile_model(net, True, lambda: net(torch.ones(2, 3)).sum().backward(), 10)


def test_an_error_of_the_step_itself_is_not_taken_for_one_of_the_compiler() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compile_model(Sleeper(0.1), True, fails, 10)


def test_auto_compiles_what_gets_faster() -> None:
    assert compiled(Sleeper(0.0), "auto")


def test_auto_goes_back_to_eager_where_compiling_does_not_help() -> None:
    net = Sleeper(0.06)
    assert not compiled(net, "auto")
    assert net.modes == [None]


def test_auto_does_not_try_in_a_run_that_is_over_before_it_pays() -> None:
    net = Sleeper(0.0)
    assert not compiled(net, "auto", num_steps=int(compiling.LEAST_RUN_S / 0.02 / 10))
    assert net.modes == []


def test_a_trial_leaves_no_gradient() -> None:
    net = Sleeper(0.0)
    compiled(net, "auto")
    assert net.weight.grad is None


def test_cuda_graphs_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^model.compile = cudagraphs needs a GPU"):
        compiled(Sleeper(0.0), "cudagraphs")


def test_cuda_graphs_are_torchs_mode_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    net = Sleeper(0.0)
    assert compiled(net, "cudagraphs")
    assert net.modes == ["reduce-overhead"]


def test_auto_goes_on_eager_where_compiling_fails() -> None:
    net = Sleeper(0.0)

    def broken(mode: str | None = None) -> None:
        def call() -> Tensor:
            raise RuntimeError("no C++ compiler")

        net._compiled_call_impl = call

    net.compile = broken  # type: ignore[method-assign]
    assert not compiled(net, "auto")


@pytest.mark.parametrize("setting", [True, "auto"])
def test_a_trial_leaves_the_statistics_of_batches_as_they_were(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: None)  # what is compiled computes the same
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert isinstance(net[1].running_mean, Tensor)
    net[1].running_mean.fill_(3.0)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    compile_model(net, setting, lambda: net(torch.randn(4, 3)).sum().backward(), 10**9)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("setting", [True, "auto"])
def test_a_trial_that_does_not_fit_into_memory_leaves_that_to_the_first_step(setting: Setting) -> None:
    net = Sleeper(0.001)

    def trial() -> None:
        net().backward()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    compile_model(net, setting, trial, 10**6)
    assert net.weight.grad is None and net.modes == ([None] if setting is True else [])


def test_a_second_image_size_in_one_process_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch compiles for any size, which takes minutes for an encoder."""
    sizes: list[object] = []

    def backend(graph: GraphModule, inputs: list[Tensor | torch.SymInt]) -> GraphModule:
        sizes.extend(value for value in inputs if not isinstance(value, Tensor))  # those that are left open
        return graph

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    for size in (8, 12):
        net, images = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(2, 1, size, size)
        compile_model(net, True, lambda net=net, images=images: net(images).sum().backward(), 1)
        assert not sizes
