"""Two loops in C for CPUs: the depthwise convolution of visible sites alone, and the gradient of its weight.

oneDNN takes 2.5 to 5 times as long for the first, on a map with zeros at hidden sites, and four times for the
second. native.c is compiled for this machine at its first use, in a second, and kept in ~/.cache/fcmae (FCMAE_CACHE or
XDG_CACHE_HOME name another place). Where that is not possible, torch computes the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
SIZE = 7  # side of the window


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the loops can be used for tensors of this kind: float32 on a CPU, with a C compiler."""
    return device.type == "cpu" and dtype == torch.float32 and library() is not None


@torch.library.custom_op("fcmae::visible_depthwise_conv", mutates_args=())
def visible_conv(
    f: Tensor, taps: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, height: int, width: int
) -> Tensor:
    """A depthwise convolution of the visible patches of images, hidden ones being zero.

    All tensors are on a CPU for which `available` holds.

    Args:
        f: (N, b, b, C) float32, N visible patches of b x b sites.
        taps: (7, 7, C) float32.
        bias: (C,) float32, or None.
        visible: (N,) int64, the number of each among the patches of all images.
        slots: (B * height * width,) int64, of each of these patches which of the N it is; -1 if it is hidden.
        height: rows of patches.
        width: columns of patches.

    Returns:
        (N, b, b, C) float32.
    """
    loops = library()
    assert loops is not None
    out = f.new_empty(f.shape)
    num, side, _, channels = f.shape
    tensors = [None if x is None else x.contiguous() for x in (f, taps, bias, visible, slots)]  # held until it is done
    sizes = (num, side, height, width, channels, torch.get_num_threads())
    places = (ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (*tensors, out))
    loops.visible_conv(*places, *map(ctypes.c_int64, sizes))
    return out


@visible_conv.register_fake
def _(f: Tensor, taps: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, height: int, width: int) -> Tensor:
    return f.new_empty(f.shape)


@torch.library.custom_op("fcmae::depthwise_weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, canvas: Tensor, rows: Tensor) -> Tensor:
    """The gradient of the weight (C, 1, 7, 7) of a depthwise convolution of which only some pixel rows are wanted.

    All tensors are on a CPU for which `available` holds.

    Args:
        grad: (N, b, C) float32, the gradient of the output at N rows of b sites.
        canvas: (B, H, W, C) float32, its whole input, zero at hidden sites.
        rows: (N,) int64, where the rows lie in the canvas, cut into rows of b sites.

    Returns:
        (C, 1, 7, 7) float32.
    """
    loops = library()
    assert loops is not None
    num_rows, side, channels = grad.shape
    _, height, width, _ = canvas.shape
    parts = torch.get_num_threads()
    sums = grad.new_zeros(parts, SIZE * SIZE, channels)
    tensors = [x.contiguous() for x in (grad, canvas, rows)]  # held until the loop is done
    sizes = (num_rows, side, height, width, channels, parts)
    loops.weight_gradient(*(ctypes.c_void_p(x.data_ptr()) for x in (*tensors, sums)), *map(ctypes.c_int64, sizes))
    return sums.sum(0).t().contiguous().view(channels, 1, SIZE, SIZE)


@weight_gradient.register_fake
def _(grad: Tensor, canvas: Tensor, rows: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[-1], 1, SIZE, SIZE)


@register_flop_formula([torch.ops.fcmae.visible_depthwise_conv, torch.ops.fcmae.depthwise_weight_gradient])
def _(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """Of the first argument's shape: all taps of each site, whichever the loops skip."""
    return 2 * SIZE * SIZE * math.prod(shape)


def conv_gradients(grad: Tensor, x: Tensor, weight: Tensor, *, with_weight: bool) -> tuple[Tensor, Tensor | None]:
    """torch's gradients of a depthwise convolution that keeps its input's size.

    Args:
        grad: (B, C, H, W), of the output.
        x: (B, C, H, W), the input.
        weight: (C, 1, k, k), k odd.
        with_weight: whether to compute the weight's gradient too; `weight_gradient` is faster.

    Returns:
        The gradient of x, and of weight or None.
    """
    padding, wanted = weight.shape[-1] // 2, [True, with_weight, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], weight.shape[0], wanted
    )
    return grad_x, grad_weight


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None if there is no compiler or the compiled library does not load."""
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:  # an open quotation
        return None
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        return None
    with suppress(OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home directory
        kept = _compiled(compiler, _cache())
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # damaged
            kept.unlink()
    # Where nothing can be kept, or what was kept is damaged. A file that is loaded may be deleted.
    with suppress(OSError, subprocess.SubprocessError), tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(_compiled(compiler, Path(folder))))
    return None


def _cache() -> Path:
    named = os.environ.get("FCMAE_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fcmae"), "native")


def _compiled(compiler: list[str], root: Path) -> Path:
    """The library's file in a folder, made if it is not there. Raises OSError or SubprocessError if it cannot be."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    # The processor, for which -march=native compiles: machines of several kinds may share a home directory.
    processor = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
    ]
    key = repr((SOURCE.read_text(), FLAGS, compiler, version, platform.machine(), processor[:1]))
    place = root / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            objects, made = Path(folder, "native.o"), Path(folder, "native.so")
            # Not linked with OpenMP, so that it uses torch's, which is loaded already, and its threads.
            for command in (
                [*FLAGS, "-c", str(SOURCE), "-o", str(objects)],
                ["-shared", str(objects), "-o", str(made)],
            ):
                subprocess.run([*compiler, *command], capture_output=True, timeout=60, check=True)
            made.replace(place)  # whole or not at all
    return place
