"""MinkowskiEngine's sparse tensors: the paper's engine, for parity with it and for any mask.

MinkowskiEngine is a build from source (`make minkowski`), so this module is imported only when its backend is named.
The engine's coordinate manager owns the order of the rows, on a GPU an arbitrary one: where a row lies is always read
from the manager's coordinates (image, y, x), never assumed.
"""

from __future__ import annotations

import warnings
from math import isqrt
from typing import Any

import torch
from timm.layers import drop_path
from torch import Tensor

from fcmae.layouts.masked import Masked
from fcmae.layouts.norms import at_least_float32, l2_norm, refuse_second_derivatives, root
from fcmae.layouts.sites import sites_of_a_patch

try:
    with warnings.catch_warnings():
        # A build for the CPU warns of it at every import.
        warnings.simplefilter("ignore")
        import MinkowskiEngine
        from MinkowskiEngineBackend._C import ConvolutionMode
except ImportError as error:
    raise ValueError(
        f"backend = 'minkowski' needs MinkowskiEngine, which is not installed here ({error}): "
        "build it with `make minkowski` (docker/install_minkowski.sh) or use packed"
    ) from error


class Minkowski:
    """Features are (N, C): the visible sites of all images, in the engine's order.

    Args:
        mask: (B, gh, gw) bool, True = hidden; images may differ in their number of visible patches, and some may have
            none.
        grn_scope: sites that image_norm takes together, "image" or "batch".

    Raises:
        ValueError: if all is hidden, or for a mask on a GPU if the engine is built for the CPU only.
    """

    def __init__(self, mask: Tensor, grn_scope: str = "image") -> None:
        self.batch, *self.grid = mask.shape
        self.grn_scope = grn_scope
        self.dense = Masked(mask)
        self.patches = mask.logical_not().nonzero()  # (V, 3): image, row, column
        if not len(self.patches):
            raise ValueError("mask leaves no patch visible: at least one image of a batch needs one")
        if mask.is_cuda and not MinkowskiEngine.is_cuda_available():
            raise ValueError("backend = 'minkowski' is built for the CPU only: set device to cpu, or build it for CUDA")
        place = MinkowskiEngine.CoordinateMapType.CUDA if mask.is_cuda else MinkowskiEngine.CoordinateMapType.CPU
        # By default it would set the number of threads of the whole process.
        self.manager = MinkowskiEngine.CoordinateManager(D=2, num_threads=0, coordinate_map_type=place)
        self._levels: dict[int, _Level] = {}

    def pack(self, x: Tensor) -> Tensor:
        b = sites_of_a_patch(x, self.batch, self.grid)
        if b not in self._levels:
            assert not self._levels, "a layout packs at one resolution; the others follow from it"
            steps = torch.arange(b, device=x.device)
            inside = torch.cartesian_prod(steps.new_zeros(1), steps, steps)  # (b * b, 3)
            sites = (self.patches * steps.new_tensor([1, b, b]))[:, None] + inside  # (V, b * b, 3)
            key, _ = self.manager.insert_and_map(sites.reshape(-1, 3).int().contiguous(), 1)
            self._levels[b] = _Level(self.manager, key, (self.grid[0] * b, self.grid[1] * b))
        return x.reshape(-1, x.shape[-1]).index_select(0, self._levels[b].site)

    def unpack(self, f: Tensor) -> Tensor:
        level = self._level(f)
        height, width = level.size
        canvas = f.new_zeros(self.batch * height * width, f.shape[-1])
        return canvas.index_copy(0, level.site, f).view(self.batch, height, width, f.shape[-1])

    def depthwise_conv(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel = weight[:, 0].permute(2, 1, 0).flatten(0, 1)  # (k * k, C); the engine's offsets run along y first
        # The parameters' precision: under autocast the engine has no 16-bit arithmetic on a CPU.
        out: Tensor = _DepthwiseConv.apply(f.to(weight.dtype), kernel, self._level(f).neighbours(weight.shape[-1]))
        return out if bias is None else out + bias

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        # Images may differ in their visible sites, so attention is by the definition, on dense maps.
        return self.pack(self.dense.attention(self.unpack(q), self.unpack(k), self.unpack(v), num_heads))

    def downsample(self, f: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        level = self._level(f)
        height, width = level.size[0] // 2, level.size[1] // 2
        b = height // self.grid[0]
        if b not in self._levels:
            self._levels[b] = _Level(self.manager, self.manager.stride(level.key, 2), (height, width))
        kernel = weight.permute(3, 2, 1, 0).flatten(0, 1).contiguous()  # (4, Cin, Cout), along y first
        out: Tensor = MinkowskiEngine.MinkowskiConvolutionFunction.apply(
            f.to(weight.dtype),
            kernel,
            MinkowskiEngine.KernelGenerator(kernel_size=2, stride=2, dimension=2),
            ConvolutionMode.DEFAULT,
            level.key,
            self._levels[b].key,
            self.manager,
        )
        return out if bias is None else out + bias

    def image_norm(self, f: Tensor) -> Tensor:
        if self.grn_scope == "batch":
            return l2_norm(f, (0,))  # (1, C)
        image, f = self._level(f).image, at_least_float32(f)
        squares = f.new_zeros(self.batch, f.shape[-1]).index_add(0, image, f.square())
        return root(squares).index_select(0, image)  # (N, C)

    def image_rows(self, f: Tensor) -> Tensor | None:
        return None  # the rows of one image need not lie together

    def drop_path(self, f: Tensor, rate: float) -> Tensor:
        keep: Tensor = drop_path(f.new_ones(self.batch, 1), rate, training=True)
        return f * keep.index_select(0, self._level(f).image)

    def _level(self, f: Tensor) -> _Level:
        """The resolution of f: each visible patch has b x b rows, so their number tells it."""
        return self._levels[isqrt(f.shape[0] // self.patches.shape[0])]


class _Level:
    """One resolution: the key of its coordinates, (height, width) of its dense map, and where each row lies."""

    def __init__(self, manager: Any, key: Any, size: tuple[int, int]) -> None:
        self.manager, self.key, self.size = manager, key, size
        coordinates: Tensor = manager.get_coordinates(key).long()  # (N, 3), in sites of the finest resolution
        self.image, y, x = coordinates.unbind(1)
        stride = key.get_tensor_stride()[0]
        self.site = (self.image * size[0] + y // stride) * size[1] + x // stride  # index into B * height * width
        self._neighbours: dict[int, Tensor] = {}

    def neighbours(self, kernel_size: int) -> Tensor:
        """The engine's kernel map as a table (k * k, N): the row that each row sees at each offset, N if it is hidden.

        The engine lists pairs of rows for each offset. As a table they need no scatter, and every block of a stage
        uses the same one, forward and backward.
        """
        if kernel_size not in self._neighbours:
            num_rows = self.site.shape[0]
            table: Tensor = self.site.new_full((kernel_size**2, num_rows), num_rows)
            for offset, pairs in self.manager.kernel_map(self.key, self.key, kernel_size=kernel_size).items():
                seen, seeing = pairs.long()
                table[offset, seeing] = seen
            self._neighbours[kernel_size] = table
        return self._neighbours[kernel_size]


class _DepthwiseConv(torch.autograd.Function):
    """out[n] = sum over offsets k of kernel[k] * f[neighbours[k, n]], a missing neighbour counting as zero.

    f: (N, C). kernel: (K, C). neighbours: (K, N), where row K - 1 - k is the opposite offset of row k.

    The engine's own MinkowskiChannelwiseConvolution gathers, multiplies and scatters at each offset and leaves the
    backward pass to autograd: at the shapes of atto's four stages, 3 to 12 times as slow on one core. Gathering all
    offsets of a few hundred rows at once is 1.4 times as fast as this at the first stage and 1.3 to 2.4 times as slow
    at the others.
    """

    @staticmethod
    def forward(ctx: Any, f: Tensor, kernel: Tensor, neighbours: Tensor) -> Tensor:
        ctx.save_for_backward(f, kernel, neighbours)
        padded = _with_zero_row(f)
        out = torch.zeros_like(f)
        for weight, seen in zip(kernel, neighbours, strict=True):
            out.addcmul_(padded.index_select(0, seen), weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivatives()
        f, kernel, neighbours = ctx.saved_tensors
        padded = _with_zero_row(grad)
        grad_f, grad_kernel = torch.zeros_like(f), torch.empty_like(kernel)
        for k, weight in enumerate(kernel):
            # What row n adds to its neighbour at offset k, that neighbour sees at the opposite offset.
            seeing = padded.index_select(0, neighbours[-1 - k])
            grad_f.addcmul_(seeing, weight)
            grad_kernel[k] = seeing.mul_(f).sum(0)
        return grad_f, grad_kernel, None


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])
