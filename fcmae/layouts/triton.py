"""The 7x7 depthwise convolution of packed rows on a GPU: Triton kernels that read halos where they lie.

The dense canvas of the plain path costs a zero fill, a scatter and a gather around a convolution over sites of which
most are hidden. Here one program computes a cell, a square of sites inside one visible patch, for a block of channels,
and reads the cells around it through a table that says which patch lies where. A hidden cell is one comparison: neither
its bytes nor its multiplications are spent.

Arithmetic, per site and channel and direction (not measured). Bytes: one element in, one out; halos come from the L2
cache. Multiply-adds: 49, less those that fall on hidden cells. An H100 moves 3.35e12 bytes/s and issues 33e12 float32
multiply-adds/s, so a bfloat16 site of 4 bytes leaves time for 40 instructions, whatever they do: a kernel that issued
all 49, let alone one that loaded and converted its input for each, could not keep up with memory. A float32 site of 8
bytes leaves 79. Hence what follows:

- A cell's sums, 16 of them for a cell of 4x4, and the 49 weights stay in registers. Each input is loaded once for all
  sums that it enters: 6.25 loads a site instead of 49.
- Whether a neighbour is visible is one number for the whole program, so hidden ones are jumped over. With 19 of
  7x7 patches visible, that leaves 36, 26, 17 and 11 of the 49 multiply-adds at b = 8, 4, 2 and 1.
- All sizes but the number of patches are compile-time constants: an address is a register and a number.

Sums are accumulated in float32, float64 for float64 features, in an order that depends on the shapes alone: results are
the same at every run.
"""

# ruff: noqa: N803, RUF005 - Triton: constants are written in capitals, and tuples joined in the way that it compiles
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fcmae.data.source import one_line
from fcmae.layouts.packed import Packed

SIZE = 7  # side of the window; the kernels below write 3 for SIZE // 2 and 49 for its square
REACH = 3  # in sites, so at most this many patches too
PROGRAMS = 4096  # as many as a big GPU runs at once, about: 132 multiprocessors with 16 to 32 warps each
SITES = 64  # sites per program, if there are enough of them: it loads the weights once for all of these


class PackedTriton(Packed):
    """`Packed` with these kernels for its 7x7 depthwise convolution.

    Args:
        mask: see `Packed`; on the device that computes.
        num_visible: see `Packed`.
        grn_scope: see `Packed`.

    Raises:
        ValueError: on a device that cannot run them, or where they cannot be compiled.
    """

    def __init__(self, mask: Tensor, num_visible: int, grn_scope: str = "image") -> None:
        if not available(mask.device):
            raise ValueError(
                "backend = 'triton' computes on NVIDIA GPUs of capability 8.0 or newer, "
                f"not on {mask.device}: use packed"
            )
        _check_compiler()
        super().__init__(mask, num_visible, grn_scope)
        self.neighbours = neighbour_table(mask, self.visible)

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.shape[-1] != SIZE:
            return super().depthwise_conv(f, weight, bias)
        return depthwise_conv(f, weight, bias, self.neighbours)


@torch.compiler.assume_constant_result
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device: CUDA of capability 8.0 (A100) or newer, which has bfloat16."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
@cache
def _check_compiler() -> None:
    """Have Triton build what it launches kernels by, as it does before the first one."""
    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # whatever its build runs into
        raise ValueError(
            f"backend = 'triton' cannot compile its kernels ({one_line(error)}): install a C compiler and Python's "
            "headers (see fcmae doctor), or use packed"
        ) from error


def neighbour_table(mask: Tensor, visible: Tensor) -> Tensor:
    """Where the neighbours of each visible patch lie in the packed features. Does not wait for the device.

    Args:
        mask: (B, gh, gw) bool, True = hidden, with K visible patches in each image.
        visible: (B * K,) int64, their indices into the B * gh * gw patches, in order (`true_rows`).

    Returns:
        (B * K, 7, 7) int32: the flat number image * K + k of the visible patch at each offset of -3 to 3 patches down
        and across, -1 where it is hidden or outside.
    """
    shown = mask.logical_not()
    number = shown.flatten().cumsum(0, dtype=torch.int32).sub_(1).view_as(mask)
    number = F.pad(torch.where(shown, number, -1), (REACH,) * 4, value=-1)  # (B, gh + 6, gw + 6)
    windows = number.unfold(1, SIZE, 1).unfold(2, SIZE, 1)  # (B, gh, gw, 7, 7)
    return windows.reshape(-1, SIZE, SIZE).index_select(0, visible)


def depthwise_conv(f: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """7x7 depthwise convolution of packed features; hidden sites and the outside count as zero.

    Differentiable once, in f, weight and bias. Differs from F.conv2d under autocast in that f is not rounded first: its
    float32 is read as it is, which saves writing and reading a copy. All tensors are on one device that is `available`.

    Args:
        f: (B, K, b, b, C) float.
        weight: (C, 1, 7, 7).
        bias: (C,) or None.
        neighbours: (B * K, 7, 7) int32, of `neighbour_table`.

    Returns:
        (B, K, b, b, C) in the dtype of weight, which under autocast is autocast's.

    Raises:
        ValueError: for another kernel size, or if neighbours is of another batch.
    """
    C = f.shape[-1]
    if weight.shape != (C, 1, SIZE, SIZE):
        raise ValueError(f"weight is {tuple(weight.shape)}: the kernels compute ({C}, 1, {SIZE}, {SIZE}) for this f")
    if neighbours.shape != (f.shape[0] * f.shape[1], SIZE, SIZE):
        raise ValueError(f"neighbours is {tuple(neighbours.shape)}: make the table of the mask that packed this f")
    if torch.is_autocast_enabled(f.device.type) and f.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(f.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    # As (49, C), the channels of one tap lie together. Torch's, so that autograd turns the gradient back.
    taps = weight.flatten(1).t().contiguous()
    out: Tensor = _convolution(f.contiguous(), taps, bias, neighbours)
    return out


@torch.library.custom_op("fcmae::depthwise_conv", mutates_args=())
def _convolution(f: Tensor, taps: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """f: (B, K, b, b, C) contiguous. taps: (49, C) contiguous. Returns f's shape in taps' dtype."""
    out = torch.empty_like(f, dtype=taps.dtype)
    _launch_convolution(f, taps, bias, neighbours, out)
    return out


@torch.library.custom_op("fcmae::depthwise_conv_input_gradient", mutates_args=())
def _input_gradient(grad: Tensor, taps: Tensor, neighbours: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of f: a convolution with the taps in reverse, as neighbours see a site at the opposite offset."""
    out = torch.empty_like(grad, dtype=dtype)
    _launch_convolution(grad, taps.flip(0), None, neighbours, out)
    return out


@torch.library.custom_op("fcmae::depthwise_conv_weight_gradient", mutates_args=())
def _weight_gradient(f: Tensor, grad: Tensor, neighbours: Tensor) -> Tensor:
    """The gradient of taps and, in the last row, of bias: (50, C) in the accumulator's dtype."""
    dtype = _accumulator(f)
    side, channels = f.shape[-2:]
    cell, block = _tile(side)
    num_cells, blocks = neighbours.shape[0] * (side // cell) ** 2, triton.cdiv(channels, block)
    # A program ends with 50 numbers a channel, which are written and read again. Fewer programs write less, more hide
    # the latency of memory better.
    per_program = triton.cdiv(num_cells * blocks, PROGRAMS // 2)
    parts = triton.cdiv(num_cells, per_program)
    partial = torch.empty(parts, SIZE * SIZE + 1, channels, dtype=dtype, device=f.device)
    with torch.cuda.device_of(f):
        _weight_kernel[(parts * blocks,)](
            f,
            grad,
            neighbours,
            partial,
            num_cells,
            per_program,
            C=channels,
            SIDE=side,
            CELL=cell,
            BLOCK=block,
            ACC=_TRITON_DTYPE[dtype],
            num_warps=1,
            enable_fp_fusion=True,
        )
    return partial.sum(0)


def _launch_convolution(f: Tensor, taps: Tensor, bias: Tensor | None, neighbours: Tensor, out: Tensor) -> None:
    side, channels = f.shape[-2:]
    cell, block = _tile(side)
    num_cells, blocks = neighbours.shape[0] * (side // cell) ** 2, triton.cdiv(channels, block)
    per_program = max(1, min(SITES // cell**2, num_cells * blocks // PROGRAMS))
    with torch.cuda.device_of(f):
        _convolution_kernel[(triton.cdiv(num_cells, per_program) * blocks,)](
            f,
            taps,
            bias,
            neighbours,
            out,
            num_cells,
            per_program,
            C=channels,
            SIDE=side,
            CELL=cell,
            BLOCK=block,
            ACC=_TRITON_DTYPE[_accumulator(f)],
            num_warps=1,
            enable_fp_fusion=True,
        )


@_convolution.register_fake
def _(f: Tensor, taps: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    return torch.empty_like(f, dtype=taps.dtype)


@_input_gradient.register_fake
def _(grad: Tensor, taps: Tensor, neighbours: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


@_weight_gradient.register_fake
def _(f: Tensor, grad: Tensor, neighbours: Tensor) -> Tensor:
    return f.new_empty(SIZE * SIZE + 1, f.shape[-1], dtype=_accumulator(f))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    f, taps, _, neighbours = inputs
    ctx.save_for_backward(f, taps, neighbours)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    f, taps, neighbours = ctx.saved_tensors
    grad = grad.contiguous()
    grad_f = grad_taps = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_f = _input_gradient(grad, taps, neighbours, f.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        sums = _weight_gradient(f, grad, neighbours).to(taps.dtype)
        grad_taps, grad_bias = sums[:-1], sums[-1] if ctx.needs_input_grad[2] else None
    return grad_f, grad_taps, grad_bias, None


_convolution.register_autograd(_backward, setup_context=_setup_context)


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _accumulator(f: Tensor) -> torch.dtype:
    return torch.promote_types(f.dtype, torch.float32)


def _tile(side: int) -> tuple[int, int]:
    """Side of a cell and channels of a block, for patches of this side.

    A cell divides its patch; one of 4 or more has 16 sums or more to keep and takes one channel a thread, 32 a warp.
    Smaller ones look at more neighbours, 25 or 49, and two channels a thread share the work of finding them.
    """
    cell = max(size for size in range(1, SIZE + 1) if side % size == 0)
    cell = 4 if side % 4 == 0 else cell
    return cell, 32 if cell > 2 else 64


# In the kernels what is written in capitals is known when they are compiled, and tuples hold registers: their indices
# must be too. A tuple is changed by making another, which costs nothing at run time.


@triton.constexpr_function
def _reach(cell):
    """How many cells away the window reaches."""
    return (2 + cell) // cell


@triton.constexpr_function
def _low(offset, cell):
    """First line of the cell at this offset that the window reaches, and..."""
    return max(-3 - offset * cell, 0)


@triton.constexpr_function
def _high(offset, cell):
    """... the line after its last."""
    return min(cell + 3 - offset * cell, cell)


@triton.constexpr_function
def _near(offset):
    return -3 <= offset <= 3


@triton.jit(do_not_specialize=["num_cells", "per_program"])
def _convolution_kernel(
    f,
    taps,
    bias,
    neighbours,
    out,
    num_cells,
    per_program,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = bias + convolution of f, `per_program` cells and BLOCK channels a program. f, out: (P, SIDE, SIDE, C)."""
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    REACH: tl.constexpr = _reach(CELL)
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C if C % BLOCK else None
    weights = ()
    for ky in tl.static_range(7):
        row = ()
        for kx in tl.static_range(7):
            row += (tl.load(taps + (ky * 7 + kx) * C + channel, inside).to(ACC),)
        weights += (row,)
    start = tl.full((BLOCK,), 0, ACC)
    if bias is not None:
        start = tl.load(bias + channel, inside).to(ACC)

    first = tl.program_id(0) // BLOCKS * per_program
    for cell in range(first, tl.minimum(first + per_program, num_cells)):
        total = ((start,) * CELL,) * CELL
        for dy in tl.static_range(-REACH, REACH + 1):
            for dx in tl.static_range(-REACH, REACH + 1):
                slot, corner = _neighbour(neighbours, cell, dy, dx, C, SIDE, CELL)
                if slot >= 0:
                    sites = f + slot * (SIDE * SIDE * C) + corner + channel
                    for iy in tl.static_range(_low(dy, CELL), _high(dy, CELL)):
                        x = _load_row(sites + iy * SIDE * C, inside, _low(dx, CELL), _high(dx, CELL), C, ACC)
                        for oy in tl.static_range(CELL):
                            if _near(dy * CELL + iy - oy):
                                total = (
                                    total[:oy]
                                    + (
                                        _add_row(
                                            total[oy],
                                            x,
                                            weights[dy * CELL + iy - oy + 3],
                                            dx * CELL + _low(dx, CELL),
                                        ),
                                    )
                                    + total[oy + 1 :]
                                )
        slot, corner = _neighbour(neighbours, cell, 0, 0, C, SIDE, CELL)
        home = out + slot * (SIDE * SIDE * C) + corner + channel
        for oy in tl.static_range(CELL):
            for ox in tl.static_range(CELL):
                tl.store(home + (oy * SIDE + ox) * C, total[oy][ox].to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_cells", "per_program"])
def _weight_kernel(
    f,
    grad,
    neighbours,
    partial,
    num_cells,
    per_program,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """partial[part] = the sums over `per_program` cells of grad times f at 49 offsets, and of grad: (parts, 50, C)."""
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    REACH: tl.constexpr = _reach(CELL)
    channel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C if C % BLOCK else None
    zero = tl.full((BLOCK,), 0, ACC)
    total = ((zero,) * 7,) * 7
    whole = zero
    part = tl.program_id(0) // BLOCKS
    first = part * per_program
    for cell in range(first, tl.minimum(first + per_program, num_cells)):
        slot, corner = _neighbour(neighbours, cell, 0, 0, C, SIDE, CELL)
        home = grad + slot * (SIDE * SIDE * C) + corner + channel
        own = ()
        for oy in tl.static_range(CELL):
            row = _load_row(home + oy * SIDE * C, inside, 0, CELL, C, ACC)
            own += (row,)
            for ox in tl.static_range(CELL):
                whole += row[ox]
        for dy in tl.static_range(-REACH, REACH + 1):
            for dx in tl.static_range(-REACH, REACH + 1):
                slot, corner = _neighbour(neighbours, cell, dy, dx, C, SIDE, CELL)
                if slot >= 0:
                    sites = f + slot * (SIDE * SIDE * C) + corner + channel
                    for iy in tl.static_range(_low(dy, CELL), _high(dy, CELL)):
                        x = _load_row(sites + iy * SIDE * C, inside, _low(dx, CELL), _high(dx, CELL), C, ACC)
                        for oy in tl.static_range(CELL):
                            if _near(dy * CELL + iy - oy):
                                total = (
                                    total[: dy * CELL + iy - oy + 3]
                                    + (
                                        _correlate_row(
                                            total[dy * CELL + iy - oy + 3],
                                            x,
                                            own[oy],
                                            dx * CELL + _low(dx, CELL),
                                        ),
                                    )
                                    + total[dy * CELL + iy - oy + 4 :]
                                )
    sums = partial + part.to(tl.int64) * (50 * C) + channel
    for ky in tl.static_range(7):
        for kx in tl.static_range(7):
            tl.store(sums + (ky * 7 + kx) * C, total[ky][kx], inside)
    tl.store(sums + 49 * C, whole, inside)


@triton.jit
def _neighbour(
    neighbours,
    cell,
    DY: tl.constexpr,
    DX: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    CELL: tl.constexpr,
):
    """The patch of the cell at an offset from this one, int64, -1 if hidden, and where in the patch it begins."""
    CELLS: tl.constexpr = SIDE // CELL
    if CELLS == 1:
        y, x = DY + 3, DX + 3
        corner = 0
    else:
        # Counted from three patches up and left, lest a division round towards zero from below.
        y = cell // CELLS % CELLS + (DY + 3 * CELLS)
        x = cell % CELLS + (DX + 3 * CELLS)
        corner = (y % CELLS * SIDE + x % CELLS) * (CELL * C)
        y, x = y // CELLS, x // CELLS
    slot = tl.load(neighbours + cell // (CELLS * CELLS) * 49 + y * 7 + x)
    return slot.to(tl.int64), corner


@triton.jit
def _load_row(sites, inside, LOW: tl.constexpr, HIGH: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    row = ()
    for column in tl.static_range(LOW, HIGH):
        row += (tl.load(sites + column * C, inside).to(ACC),)
    return row


@triton.jit
def _add_row(total, x, weights, COLUMN: tl.constexpr):
    """total[o] plus weights[k] * x at column o + k - 3; x begins at COLUMN."""
    for i in tl.static_range(len(x)):
        for o in tl.static_range(len(total)):
            if _near(COLUMN + i - o):
                total = total[:o] + (tl.fma(x[i], weights[COLUMN + i - o + 3], total[o]),) + total[o + 1 :]
    return total


@triton.jit
def _correlate_row(total, x, grad, COLUMN: tl.constexpr):
    """total[k] plus grad[o] * x at column o + k - 3; x begins at COLUMN."""
    for i in tl.static_range(len(x)):
        for o in tl.static_range(len(grad)):
            if _near(COLUMN + i - o):
                total = (
                    total[: COLUMN + i - o + 3]
                    + (tl.fma(x[i], grad[o], total[COLUMN + i - o + 3]),)
                    + total[COLUMN + i - o + 4 :]
                )
    return total
