"""Where nothing is hidden, the layout of the dense network is the reference without a mask, and no slower kernel."""

from __future__ import annotations

import pytest
import torch
from conftest import randomize, require_native
from torch import Tensor

from fcmae.layouts import DENSE, Layout, Masked, native
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import Block
from fcmae.networks.spec import ConvNeXtSpec

REFERENCE = Masked(None)


def convolved(layout: Layout, leaves: list[Tensor], pull: Tensor) -> list[Tensor]:
    """Values of the depthwise convolution and the gradients of f, weight and bias, where there is one."""
    f, weight, *bias = leaves
    out = layout.depthwise_conv(f, weight, bias[0] if bias else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("size", "channels", "kernel"),
    [((8, 8), 16, 7), ((5, 3), 7, 7), ((1, 9), 33, 7), ((2, 2), 1, 7), ((6, 4), 5, 3), ((6, 4), 5, 9)],
)
def test_the_depthwise_convolution_equals_the_reference(
    size: tuple[int, int], channels: int, kernel: int, has_bias: bool, dtype: torch.dtype
) -> None:
    shapes = [(2, *size, channels), (channels, 1, kernel, kernel), *([(channels,)] if has_bias else [])]
    leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    pull = torch.randn(2, *size, channels, dtype=torch.float64).to(dtype)
    found = convolved(DENSE, leaves, pull)
    exact = convolved(REFERENCE, [x.detach().double().requires_grad_() for x in leaves], pull.double())
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)


def test_maps_that_do_not_lie_together_in_memory_are_taken() -> None:
    f = torch.randn(2, 12, 4, 6)[:, ::2].transpose(1, 2)
    weight, pull = torch.randn(6, 1, 7, 7), torch.randn(2, 6, 4, 6).transpose(1, 2)
    assert not f.is_contiguous()
    leaves = [f.requires_grad_(), weight.requires_grad_()]
    for ours, theirs in zip(convolved(DENSE, leaves, pull), convolved(REFERENCE, leaves, pull), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_compiler", [True, False])
def test_the_loop_in_c_computes_the_weights_gradient_where_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch, has_compiler: bool
) -> None:
    if has_compiler:
        require_native()
    calls = []
    loop = native.weight_gradient
    monkeypatch.setattr(native, "weight_gradient", lambda *x: calls.append(len(x)) or loop(*x))
    if not has_compiler:
        monkeypatch.setattr(native, "available", lambda *_: False)
    leaves = [torch.randn(1, 4, 4, 3, requires_grad=True), torch.randn(3, 1, 7, 7, requires_grad=True)]
    convolved(DENSE, leaves, torch.randn(1, 4, 4, 3))
    assert bool(calls) == has_compiler
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    calls.clear()
    convolved(DENSE, doubles, torch.randn(1, 4, 4, 3).double())
    assert not calls


def test_under_autocast_it_computes_as_the_reference_does() -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 4, 3), (3, 1, 7, 7), (3,))]
    pull = torch.randn(2, 4, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (convolved(layout, leaves, pull) for layout in (DENSE, REFERENCE))
    assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_grn", [True, False])
def test_a_network_in_it_equals_the_reference_in_values_and_gradients(use_grn: bool) -> None:
    encoder = Encoder(ConvNeXtSpec(depths=(1, 2), dims=(6, 10), stem_stride=2, use_grn=use_grn))
    randomize(encoder, std=0.3)
    images = torch.randn(2, 3, 12, 20)
    results = []
    for layout in (DENSE, REFERENCE):
        out = encoder(images, layout)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(encoder.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_a_block_in_it_is_one_graph_and_computes_the_same_compiled() -> None:
    block = Block(5)
    randomize(block)
    x = torch.randn(2, 4, 6, 5)

    def run(x: Tensor) -> Tensor:
        out: Tensor = block(x, DENSE)
        return out

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
