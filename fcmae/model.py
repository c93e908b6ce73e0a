"""FCMAE: a fully convolutional masked autoencoder (arXiv 2301.00808, Sec. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import Masked, make_layout
from fcmae.layouts.sites import refine, true_rows, visible_counts
from fcmae.networks.convnext import Encoder, init_weights
from fcmae.networks.layers import Block


class FCMAE(nn.Module):
    """Encoder of visible patches -> projection -> mask token -> dense decoder -> prediction of hidden patches.

    Parameters carry the released code's names: encoder.*, proj, mask_token, decoder.i.*, pred.

    encoder: sees visible sites only. decoder_depth, decoder_dim: number and width of the decoder's ConvNeXt V2
    blocks, which see the whole grid. backend: layout of the encoder's features, packed, triton, masked or minkowski.
    grn_scope: sites that the encoder's GRN takes together, of one image ("image") or of the whole batch ("batch"), as
    the released PyTorch code does; the decoder's takes one image's.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_depth: int = 1,
        decoder_dim: int = 512,
        backend: str = "packed",
        grn_scope: str = "image",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.grn_scope = grn_scope
        self.encoder = encoder
        self.proj = nn.Conv2d(encoder.dim, decoder_dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_dim, 1, 1))
        self.decoder = nn.ModuleList(Block(decoder_dim) for _ in range(decoder_depth))
        self.pred = nn.Conv2d(decoder_dim, encoder.total_stride**2 * encoder.in_chans, kernel_size=1)
        for part in (self.proj, self.decoder, self.pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, images: Tensor, mask: Tensor, num_visible: int | None = None, hidden_only: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Predict the pixels of hidden patches from the visible ones.

        images: (B, C, H, W) float, H and W multiples of the mask patch. mask: (B, gh, gw) bool, True = hidden, one
        element a mask patch. num_visible: visible patches of each image; None counts them, which waits for the
        device. If images differ in that number, which packed refuses, leave it None. hidden_only: predict hidden
        sites only, as the loss needs; False predicts every site, for pictures, as happens too if images differ.

        Returns (pred, site_mask). One site is a patch of p = total_stride pixels; a mask patch is one or more sites.
        pred: (B, M, p * p * C), the M hidden sites (or all) in row-major order, values ordered (row, column,
        channel). site_mask: (B, H / p, W / p) bool, the mask at the sites.
        """
        if num_visible is None and len(counts := visible_counts(mask)) == 1:
            num_visible = counts[0]
        layout = make_layout(self.backend, mask, num_visible, self.grn_scope)
        f = self.encoder(images, layout)
        x = layout.unpack(pointwise(f, self.proj))  # (B, h, w, decoder_dim), zero at hidden sites
        site_mask = refine(mask, x.shape[1] // mask.shape[1])
        x = torch.where(site_mask[..., None], self.mask_token.view(-1).to(x.dtype), x)

        B, h, w, _ = x.shape
        select = None
        if hidden_only and num_visible is not None:
            num_hidden = h * w - num_visible * (h * w // mask[0].numel())
            rows = true_rows(site_mask, num_hidden)

            def select(features: Tensor) -> Tensor:
                return features.flatten(0, 2).index_select(0, rows).view(B, num_hidden, 1, -1)

        dense = Masked(None)
        for block in self.decoder[:-1]:
            x = block(x, dense)
        # GRN needs the last block's expanded features everywhere; its second Linear, its residual and the
        # prediction are needed at hidden sites only.
        x = self.decoder[-1](x, dense, select)
        return pointwise(x, self.pred).reshape(B, -1, self.pred.out_channels), site_mask


def pointwise(f: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution on features (..., C)."""
    return F.linear(f, conv.weight.flatten(1), conv.bias)
