"""The released sparse encoder, built of MinkowskiEngine's own modules under the released names, as a reference.

Written from the paper and the keys of the released checkpoints. It sees every site of an image, one image at a time: at
batch size 1 the released GRN, over the whole batch, and ours, over one image, are the same.
"""

from __future__ import annotations

import MinkowskiEngine as ME  # noqa: N817  # its users' name for it
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.networks.spec import ConvNeXtSpec


def on_features(x: ME.SparseTensor, features: Tensor) -> ME.SparseTensor:
    """The sites of x with other features."""
    return ME.SparseTensor(features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)


class SparseLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: ME.SparseTensor) -> ME.SparseTensor:
        return on_features(x, self.ln(x.F))


class SparseGRN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))

    def forward(self, x: ME.SparseTensor) -> ME.SparseTensor:
        norm = x.F.norm(dim=0, keepdim=True)
        scaled = x.F * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))
        return on_features(x, self.gamma * scaled + self.beta + x.F)


class SparseBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = ME.MinkowskiChannelwiseConvolution(dim, kernel_size=7, bias=True, dimension=2)
        self.norm = SparseLayerNorm(dim)
        self.pwconv1 = ME.MinkowskiLinear(dim, 4 * dim)
        self.pwconv2 = ME.MinkowskiLinear(4 * dim, dim)
        self.grn = SparseGRN(4 * dim)

    def forward(self, x: ME.SparseTensor) -> ME.SparseTensor:
        h = self.pwconv1(self.norm(self.dwconv(x)))
        h = self.pwconv2(self.grn(on_features(h, F.gelu(h.F))))
        return on_features(x, x.F + h.F)


class ReleasedEncoder(nn.Module):
    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        depths, dims = spec.depths, spec.dims
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), nn.LayerNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for i in range(3):
            convolution = ME.MinkowskiConvolution(dims[i], dims[i + 1], kernel_size=2, stride=2, bias=True, dimension=2)
            self.downsample_layers.append(nn.Sequential(SparseLayerNorm(dims[i]), convolution))
        self.stages = nn.ModuleList(
            nn.Sequential(*(SparseBlock(dim) for _ in range(depth))) for depth, dim in zip(depths, dims, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: (1, 3, H, W). Returns (1, C, H / 32, W / 32)."""
        convolution, norm = self.downsample_layers[0]
        x = norm(convolution(images).permute(0, 2, 3, 1))  # (1, h, w, C)
        height, width = x.shape[1:3]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        coordinates = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).int()
        sparse = ME.SparseTensor(x.reshape(-1, x.shape[-1]), coordinates)
        for i, stage in enumerate(self.stages):
            if i > 0:
                sparse = self.downsample_layers[i](sparse)
            sparse = stage(sparse)
        dense = torch.zeros(height // 8, width // 8, sparse.F.shape[1])
        _, rows, columns = (sparse.C.long() // torch.tensor([1, 8, 8])).unbind(1)
        dense[rows, columns] = sparse.F
        return dense.permute(2, 0, 1)[None]
