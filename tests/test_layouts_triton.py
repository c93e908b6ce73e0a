"""The Triton kernels compute what the plain path computes, and compile for the GPUs that they are meant for.

Without a GPU they run in Triton's interpreter, the one that TRITON_INTERPRET=1 selects, so the same arithmetic is
tested; with one they run on it. The interpreter takes half a millisecond for each operation: shapes are tiny.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fcmae.layouts import Packed, make_layout
from fcmae.masking import random_mask
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from fcmae.layouts import triton as kernels  # noqa: E402

KERNELS = ("_convolution_kernel", "_weight_kernel")
HELPERS = ("_neighbour", "_load_row", "_add_row", "_correlate_row")


def test_the_backend_is_refused_where_its_kernels_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"^backend = 'triton' computes on NVIDIA GPUs .* not on cpu: use packed$"):
        make_layout("triton", torch.zeros(1, 1, 1, dtype=torch.bool))


def test_kernels_that_cannot_be_compiled_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise RuntimeError("Failed to find\nC compiler")

    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "_check_compiler", kernels._check_compiler.__wrapped__)  # without its cache
    monkeypatch.setattr(kernels.triton.runtime.driver, "_active", SimpleNamespace(get_current_device=failing))
    with pytest.raises(ValueError, match=r"cannot compile its kernels \(Failed to find C compiler\): install a C comp"):
        make_layout("triton", torch.zeros(1, 1, 1, dtype=torch.bool))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run: on a GPU, or on the CPU in the interpreter.

    Triton reads TRITON_INTERPRET when a function is decorated, and by then torch or another test may have imported
    triton and the kernels. So the functions are exchanged for interpreted ones, which works in any order.
    """
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # so that even here a program computes several cells
    if torch.cuda.is_available() and kernels.available(torch.device("cuda")):
        return "cuda"
    monkeypatch.setattr(kernels, "_check_compiler", lambda: None)
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, InterpretedFunction(getattr(kernels, name).fn))
    for name in HELPERS:
        # The plain function inside: the interpreter would prepare its language anew, 5 ms, for each call of another.
        monkeypatch.setattr(kernels, name, InterpretedFunction(getattr(kernels, name).fn).rewrite())
    return "cpu"


def layout_of(grid: tuple[int, int], visible: int, batch: int) -> tuple[Packed, Tensor]:
    """A layout of different masks and its table, on the CPU."""
    mask = torch.from_numpy(random_mask(grid, visible, [(5, i) for i in range(batch)]))
    layout = Packed(mask, visible)
    return layout, kernels.neighbour_table(mask, layout.visible)


def inputs(layout: Packed, b: int, channels: int) -> list[Tensor]:
    """f, weight, bias and the gradient of the output, float64."""
    shape = (layout.batch, layout.num_visible, b, b, channels)
    sizes = [shape, (channels, 1, 7, 7), (channels,), shape]
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def results(conv, f: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Values, and the gradients of f, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in (f, weight, bias) if x is not None]
    out = conv(*leaves) if bias is not None else conv(*leaves, None)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within `tolerance` times the largest element of what is expected."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        off = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
        assert off < tolerance


# float32 and float64 keep 24 and 53 bits, of sums of up to some hundred terms in another order. With bfloat16 both
# sides see the same rounded inputs, and one conversion to 8 bits is left, in which the interpreter truncates.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.mark.parametrize(
    ("b", "grid", "visible", "batch", "channels", "dtype"),
    [
        (8, (1, 2), 1, 1, 3, torch.float32),
        (4, (2, 2), 2, 1, 3, torch.float32),
        (4, (1, 2), 1, 1, 3, torch.bfloat16),
        (3, (2, 2), 2, 2, 3, torch.float64),
        (2, (3, 2), 3, 2, 5, torch.float32),
        (2, (1, 3), 2, 1, 65, torch.bfloat16),
        (1, (5, 3), 4, 2, 7, torch.float32),
        (1, (1, 3), 3, 1, 3, torch.bfloat16),
        (1, (1, 9), 4, 1, 3, torch.float64),
    ],
)
def test_layouts_triton_equal_the_plain_path(
    device: str, b: int, grid: tuple[int, int], visible: int, batch: int, channels: int, dtype: torch.dtype
) -> None:
    layout, table = layout_of(grid, visible, batch)
    rounded = [x.to(dtype) for x in inputs(layout, b, channels)]
    f, weight, bias, grad = (x.to(device) for x in rounded)
    found = results(lambda *x: kernels.depthwise_conv(*x, table.to(device)), f, weight, bias, grad)
    assert [x.dtype for x in found] == [dtype] * 4
    expected = results(layout.depthwise_conv, *(x.double() for x in rounded))
    assert_near(found, expected, TOLERANCES[dtype])


def test_cells_of_a_patch_see_each_other_and_those_of_other_patches(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As at b = 8, where a patch is four cells of 4x4, but smaller.
    monkeypatch.setattr(kernels, "_tile", lambda side: (2, 32))
    layout, table = layout_of((1, 3), 2, 1)
    f, weight, bias, grad = inputs(layout, 4, 3)
    found = results(
        lambda *x: kernels.depthwise_conv(*x, table.to(device)), *(x.to(device) for x in (f, weight, bias, grad))
    )
    assert_near(found, results(layout.depthwise_conv, f, weight, bias, grad), TOLERANCES[torch.float64])


def test_without_bias_and_with_rows_that_are_not_contiguous(device: str) -> None:
    layout, table = layout_of((2, 2), 2, 1)
    f, weight, _, grad = inputs(layout, 1, 3)
    strided = f.repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    found = results(
        lambda f, weight, bias: kernels.depthwise_conv(f, weight, bias, table.to(device)),
        *(strided.to(device), weight.to(device), None, grad.to(device)),
    )
    assert_near(found, results(layout.depthwise_conv, f, weight, None, grad), TOLERANCES[torch.float64])


def test_an_image_reaches_only_itself(device: str) -> None:
    layout, table = layout_of((2, 2), 3, 3)
    f, weight, bias, _ = (x.to(device) for x in inputs(layout, 2, 2))
    before = kernels.depthwise_conv(f, weight, bias, table.to(device))
    f[1] = torch.nan
    after = kernels.depthwise_conv(f, weight, bias, table.to(device))
    assert torch.equal(before[::2], after[::2])
    assert after[1].isnan().all()


def test_autocast_reads_float32_and_returns_autocasts_dtype(device: str) -> None:
    layout, table = layout_of((2, 2), 2, 1)
    f, weight, bias, grad = (x.float().to(device) for x in inputs(layout, 2, 3))
    with torch.autocast(device, torch.bfloat16):
        found = results(lambda *x: kernels.depthwise_conv(*x, table.to(device)), f, weight, bias, grad)
    assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
    rounded = [f, *(x.bfloat16() for x in (weight, bias, grad))]
    expected = results(layout.depthwise_conv, *(x.cpu().double() for x in rounded))
    assert_near(found, expected, TOLERANCES[torch.bfloat16])
    assert_near([found[1]], [expected[1]], TOLERANCES[torch.float32])  # never rounded to bfloat16


def test_torch_compile_keeps_one_graph_and_computes_the_same(device: str) -> None:
    layout, table = layout_of((2, 2), 2, 1)
    f, weight, bias, grad = (x.float().to(device) for x in inputs(layout, 1, 3))

    def conv(f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.depthwise_conv(2 * f, weight, bias, table.to(device))

    compiled = torch.compile(conv, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    eager = results(conv, f, weight, bias, grad)
    # In the same order, hence equal to the bit: no sum depends on who comes first.
    for ours, theirs in zip(results(compiled, f, weight, bias, grad), eager, strict=True):
        assert torch.equal(ours, theirs)


def test_operators_are_registered_as_torch_expects(device: str) -> None:
    layout, table = layout_of((1, 2), 1, 1)
    f, weight, bias, grad = (x.float().to(device) for x in inputs(layout, 1, 3))
    taps = weight.flatten(1).t().contiguous().requires_grad_()
    table = table.to(device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        kernels._convolution, (f.requires_grad_(), taps, bias.requires_grad_(), table), test_utils=tests
    )
    torch.library.opcheck(kernels._input_gradient, (grad, taps.detach(), table, torch.float32), test_utils=tests)
    torch.library.opcheck(kernels._weight_gradient, (f.detach(), grad, table), test_utils=tests)


def test_neighbour_table_names_the_patch_at_each_offset() -> None:
    mask = torch.from_numpy(random_mask((3, 4), 5, [(5, i) for i in range(3)]))
    visible = mask.logical_not().nonzero().tolist()  # image, row, column
    table = kernels.neighbour_table(mask, Packed(mask, 5).visible)
    assert (table.shape, table.dtype) == ((15, 7, 7), torch.int32)
    for n, (image, y, x) in enumerate(visible):
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                there = [image, y + dy, x + dx]
                assert table[n, dy + 3, dx + 3] == (visible.index(there) if there in visible else -1)


def test_a_cell_divides_its_patch() -> None:
    cells = {side: kernels._tile(side)[0] for side in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 14, 16, 20, 24)}
    assert all(side % cell == 0 for side, cell in cells.items())
    assert [cells[side] for side in (1, 2, 4, 8, 16)] == [1, 2, 4, 4, 4]


def test_what_the_kernels_cannot_compute_is_refused() -> None:
    layout, table = layout_of((2, 2), 2, 1)
    f, weight, bias, _ = inputs(layout, 1, 3)
    with pytest.raises(ValueError, match=r"weight is \(3, 1, 5, 5\)"):
        kernels.depthwise_conv(f, weight[..., 1:-1, 1:-1], bias, table)
    with pytest.raises(ValueError, match="make the table of the mask that packed this f"):
        kernels.depthwise_conv(f, weight, bias, table[:1])
    assert not kernels.available(torch.device("cpu"))


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype"), [("_convolution_kernel", 80, "fp32"), ("_weight_kernel", 90, "bf16")]
)
def test_layouts_triton_compile_without_spills(
    kernel: str, capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By Triton's own ptxas, which needs no GPU. 80 is the A100, 90 the H100; f in float32, as under autocast. Only the
    # smallest cell, which takes seconds: `benchmarks/depthwise.py --assemble 80 90` compiles them all.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in HELPERS:  # even if the variable was set when the module was imported
        monkeypatch.setattr(kernels, name, triton.JITFunction(getattr(kernels, name).fn))
    function = triton.JITFunction(getattr(kernels, kernel).fn)
    constants = {"C": 108, "SIDE": 1, "CELL": 1, "BLOCK": 64, "ACC": triton.language.float32}
    types = {"f": "*fp32", "neighbours": "*i32", "partial": "*fp32", "num_cells": "i32", "per_program": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{dtype}") for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(function, signature, places),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 1, "enable_fp_fusion": True},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage)


def test_the_backend_trains_as_packed_does(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda _: True)
    spec = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(2, 3, 4, 5), stem_stride=1)
    encoder = Encoder(spec, in_chans=1).double().to(device)
    images = torch.randn(2, 1, 8, 16, dtype=torch.float64, device=device)
    mask = torch.tensor([[[True, False]], [[False, True]]], device=device)
    found = []
    for backend in ("packed", "triton"):
        out = encoder(images, make_layout(backend, mask, 1))
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(encoder.parameters()))])
    assert_near(found[1], [x.cpu() for x in found[0]], 1e-11)


def test_other_kernels_take_the_plain_path(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda _: True)
    layout, _ = layout_of((2, 2), 2, 1)
    f, weight, bias, grad = inputs(layout, 2, 3)
    small = weight[..., 1:-1, 1:-1]
    triton_layout = kernels.PackedTriton(torch.from_numpy(random_mask((2, 2), 2, [(5, 0)])), 2)
    found = results(triton_layout.depthwise_conv, f, small, bias, grad)
    assert_near(found, results(layout.depthwise_conv, f, small, bias, grad), TOLERANCES[torch.float64])
