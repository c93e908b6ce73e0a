from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import MINKOWSKI
from torch import Tensor

from fcmae import verify
from fcmae.cli import main
from fcmae.layouts import Masked, Packed
from fcmae.networks.spec import VARIANTS

FEW = (
    verify.Case(verify.ATTO, (1, 3), 0.6, 2, whole=True),
    verify.Case(verify.ATTO, (1, 2), 0, 1, whole=False),
)


OWN = [case for case in verify.CASES if case.spec not in VARIANTS.values()]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small cases in place of all, and no timings."""
    monkeypatch.setattr(verify, "CASES", FEW)
    monkeypatch.setattr(verify, "speeds", lambda backends, device: dict.fromkeys(backends, 1.5))


@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_a_backend_that_computes_right_is_ok(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", backend]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[:1] == [backend]]
    assert [(row[1], row[-1]) for row in rows] == [("float64", "ok"), ("float32", "ok"), ("1.5", "1.5")]


@pytest.mark.parametrize("backend", ["packed", MINKOWSKI])
def test_networks_of_other_depth_and_stride_are_compared_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {(case.spec.num_stages, case.spec.stem_stride) for case in OWN} == {(3, 2)}
    monkeypatch.setattr(verify, "CASES", OWN)
    references = [verify.reference(case) for case in OWN]
    result = verify.compare(backend, "cpu", "float64", references)
    assert result.ok
    for tensors in references:
        tensors["values"] *= 1 + 1e-9
    found = verify.compare(backend, "cpu", "float64", references)
    assert not found.ok and "stem stride 2" in found.worst and found.worst.endswith("values")


def transposed(self: Packed, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return downsample(self, f, weight.transpose(2, 3), bias)


def without_gradient(self: Packed, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return depthwise_conv(self, f, weight.detach(), bias)


def over_the_batch(self: Packed, f: Tensor) -> Tensor:
    return f.flatten(0, 3)[None]


def failing(self: Packed, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    raise RuntimeError("CUDA error: no kernel image is available")


def without_headers(self: Packed, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    raise subprocess.CalledProcessError(1, ["gcc"])  # of a compiler of kernels


def not_a_number(self: Packed, f: Tensor) -> Tensor:
    return image_rows(self, f) * torch.nan


depthwise_conv, downsample, image_rows = Packed.depthwise_conv, Packed.downsample, Packed.image_rows


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("downsample", transposed),
        ("depthwise_conv", without_gradient),
        ("image_rows", over_the_batch),
        ("image_rows", not_a_number),
        ("downsample", failing),
        ("downsample", without_headers),
    ],
)
def test_a_backend_that_computes_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, broken: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(Packed, name, broken)
    assert main(["verify", "--backend", "packed", "masked"]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if " float" in line]
    assert ["WRONG" in row for row in rows] == [row.startswith("packed") for row in rows]


def test_the_reference_itself_is_held_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = Masked.depthwise_conv
    monkeypatch.setattr(
        Masked, "depthwise_conv", lambda self, f, weight, bias: convolution(self, f, weight.transpose(2, 3), bias)
    )
    results = verify.verify(["masked"])
    assert not any(result.ok for result in results)
    assert all("0 % hidden" in result.worst for result in results)


def test_a_missing_engine_is_left_out_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "fcmae.layouts.minkowski", raising=False)
    assert {result.backend for result in verify.verify()} == {"packed", "masked"}
    assert "minkowski: not checked" in capsys.readouterr().out
    assert main(["verify", "--backend", "minkowski"]) == 2
    error = capsys.readouterr().err
    assert "not installed" in error
    assert "make minkowski" in error


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", "--device", "cuda"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
