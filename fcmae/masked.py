"""The method (FCMAE, arXiv 2301.00808, Sec. 3), in reading order: target, decoder, masked autoencoder, loss, objective.

`fcmae.masking` draws which patches are hidden. The encoder is any of `fcmae.networks`; the layout that is made from the
mask (`fcmae.layouts`) shows it visible patches only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import DENSE, PACKED, Layout, MakeLayout
from fcmae.layouts.norms import at_least_float32
from fcmae.layouts.sites import true_rows, upsample_mask, visible_counts
from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.layers import Block

EPS = 1e-6  # added to a target patch's variance
NUM_BINS = 9  # of HOG in 180 degrees
CELL = 8  # of HOG, side in pixels


# What is to be predicted

# (images, hidden, patch, known) -> the values to predict for each hidden patch, (N, num_values); see `pixels`. No
# gradient goes through it. NaN, where `known` is given, is what is not to be predicted.
Target = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into non-overlapping patches.

    Args:
        images: (B, C, H, W), H and W multiples of patch.
        patch: side in pixels.

    Returns:
        (B, L, patch * patch * C), patches in row-major order, the values of each ordered (row, column, channel): the
        released decoders' order.
    """
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(patches: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`.

    Args:
        patches: (B, L, patch * patch * C), in the order of `patchify`.
        patch: side in pixels.
        size: (H, W) of the images.

    Returns:
        (B, C, H, W).
    """
    B = patches.shape[0]
    H, W = size
    x = patches.reshape(B, H // patch, W // patch, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, H, W)


def patch_statistics(patches: Tensor, *, has_missing: bool = False) -> tuple[Tensor, Tensor]:
    """Mean, and root of the unbiased variance plus 1e-6, of the values of each patch.

    Args:
        patches: (..., N).
        has_missing: NaN are missing values, which do not count; the mean of none is NaN.

    Returns:
        Each (..., 1), at least float32.
    """
    values = at_least_float32(patches)
    if has_missing:
        mean = values.nanmean(dim=-1, keepdim=True)
        num_others = (~values.isnan()).sum(dim=-1, keepdim=True) - 1
        var = (values - mean).square().nansum(dim=-1, keepdim=True) / num_others.clamp(min=1)
    else:
        var, mean = torch.var_mean(values, dim=-1, keepdim=True)
    return mean, (var + EPS).sqrt()


def pixels(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None) -> Tensor:
    """The values of hidden patches.

    Only hidden patches are gathered, so no target is computed and thrown away.

    Args:
        images: (B, C, H, W) float, normalised.
        hidden: (N,) int64, indices of the hidden patches among all B * L, in row-major order.
        patch: side in pixels.
        known: (B, C, H, W) bool, false for values that are missing; None if none is.

    Returns:
        (N, patch * patch * C), at least float32, in the order of `patchify`; NaN for missing values, which are not to
        be predicted.
    """
    if known is not None:
        images = images.masked_fill(~known, torch.nan)
    return at_least_float32(patchify(images, patch).flatten(0, 1).index_select(0, hidden))


def normalized_pixels(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None) -> Tensor:
    """The values of hidden patches, each standardised by its own mean and unbiased variance, as in the paper.

    Args:
        images: see `pixels`.
        hidden: see `pixels`.
        patch: see `pixels`.
        known: see `pixels`; mean and variance are those of the known values of a patch.

    Returns:
        See `pixels`.
    """
    values = pixels(images, hidden, patch, known)
    mean, std = patch_statistics(values, has_missing=known is not None)
    return (values - mean) / std


def hog(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None) -> Tensor:
    """Histograms of oriented gradients of each cell and channel, scaled to L2 norm 1 (MaskFeat, arXiv 2112.09133).

    Gradients are differences of neighbouring pixels of the whole image, so they look across the borders of patches; at
    the image's border they are 0. A pixel counts in one bin, that of its gradient's direction within 180 degrees.
    A patch smaller than a cell is one cell.

    Args:
        images: see `pixels`.
        hidden: see `pixels`.
        patch: see `pixels`.
        known: see `pixels`; a cell that has a missing value or borders on one is not to be predicted.

    Returns:
        (N, (patch / cell)^2 * C * NUM_BINS) float32, ordered (row, column, channel, bin); NaN for what is not to be
        predicted.

    Raises:
        ValueError: if cells do not fill a patch.
    """
    cell = min(CELL, patch)
    if patch % cell:
        raise ValueError(
            f"a patch of {patch} pixels, the total stride of the network, is no multiple of HOG's cells of {cell}: "
            "give --model.target pixels or another network"
        )
    B, C, H, W = images.shape
    padded = F.pad(at_least_float32(images), (1, 1, 1, 1), mode="reflect")
    along_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    along_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    turn = torch.atan2(along_y, along_x).remainder(torch.pi) / torch.pi  # (B, C, H, W), 0 to 1 for 180 degrees
    bins = (turn * NUM_BINS).long().clamp_(max=NUM_BINS - 1)
    votes = padded.new_zeros(B, NUM_BINS, C, H, W)
    votes.scatter_(1, bins[:, None], torch.hypot(along_x, along_y)[:, None])
    cells = F.avg_pool2d(votes.flatten(0, 1), cell).view(B, NUM_BINS, C, H // cell, W // cell)
    cells = F.normalize(cells, dim=1)
    if known is not None:
        missing = F.max_pool2d((~known).to(cells.dtype), 3, stride=1, padding=1)  # and their neighbours
        cells = cells.masked_fill(F.max_pool2d(missing, cell)[:, None] > 0, torch.nan)
    n = patch // cell
    patches = cells.view(B, NUM_BINS, C, H // patch, n, W // patch, n).permute(0, 3, 5, 4, 6, 2, 1)
    return patches.reshape(-1, n * n * C * NUM_BINS).index_select(0, hidden)


# How it is predicted


class Decoder(nn.Module):
    """Projection -> mask token at hidden sites -> dense ConvNeXt V2 blocks on the whole grid -> prediction.

    Args:
        encoder_dim: channels of the encoder's output.
        num_values: predicted values per site, as many as the target has: p * p * C for pixels.
        dim: width.
        depth: number of blocks.
    """

    def __init__(self, encoder_dim: int, num_values: int, dim: int = 512, depth: int = 1) -> None:
        super().__init__()
        self.proj = nn.Conv2d(encoder_dim, dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.pred = nn.Conv2d(dim, num_values, kernel_size=1)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, stages: Sequence[Tensor], layout: Layout, site_mask: Tensor, num_hidden: int | None) -> Tensor:
        """Predict hidden sites from the visible ones.

        Args:
            stages: the output of each of the encoder's stages, first to last, in `layout`.
            layout: that of the features.
            site_mask: (B, h, w) bool, True = hidden.
            num_hidden: number of hidden sites of each image; only these are then predicted. None predicts all sites.

        Returns:
            (B, M, num_values), the M = num_hidden hidden sites, or all h * w, in row-major order.
        """
        x = self.project(stages, layout)  # (B, h, w, dim)
        x = torch.where(site_mask[..., None], self.mask_token.view(-1).to(x.dtype), x)
        *blocks, last = cast("list[Block]", list(self.blocks))
        for block in blocks:
            x = block(x, DENSE)
        x = last(x, DENSE) if num_hidden is None else _at_sites(last, x, true_rows(site_mask, num_hidden))
        return _pointwise(x, self.pred).reshape(len(site_mask), -1, self.pred.out_channels)

    def project(self, stages: Sequence[Tensor], layout: Layout) -> Tensor:
        """The input of the blocks: the output of the last stage alone, projected.

        Args:
            stages: see `forward`.
            layout: see `forward`.

        Returns:
            (B, h, w, dim) on the last stage's grid, with arbitrary values at hidden sites.
        """
        return layout.unpack(_pointwise(stages[-1], self.proj))


def _at_sites(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """A V2 block's output at some sites of a dense map; only its GRN needs the expanded features of all sites.

    x: (B, h, w, C). rows: (N,) int64, indices into its B * h * w sites, the same number for each image. Returns (N, C)
    as (B, N / B, 1, C).
    """

    def pick(features: Tensor) -> Tensor:
        return features.flatten(0, 2).index_select(0, rows).view(len(x), -1, 1, features.shape[-1])

    h = block.expand(x, DENSE)  # (B, h, w, hidden)
    assert block.grn is not None
    branch = block.pwconv2(block.grn(pick(h), DENSE.image_norm(h)))  # (B, N / B, 1, C)
    return block.add(pick(x), branch, DENSE)


def _pointwise(f: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution on features (..., C)."""
    return F.linear(f, conv.weight.flatten(1), conv.bias)


class FCMAE(nn.Module):
    """A fully convolutional masked autoencoder, made of the given parts.

    Args:
        encoder: sees visible sites only.
        decoder: predicts hidden sites, at the encoder's total stride, from the output of its stages; called like
            `Decoder.forward`.
        make_layout: maps (mask, num_visible) to the layout of the encoder's features; by default packed.
        target: what the decoder predicts for each site, for `masked_loss`. A network, such as a teacher, belongs inside
            a function: as a module it would be learnt and stored with this one.

    Raises:
        ValueError: for a target that is a module.
    """

    def __init__(
        self,
        encoder: StagedEncoder,
        decoder: nn.Module,
        make_layout: MakeLayout = PACKED,
        target: Target = normalized_pixels,
    ) -> None:
        super().__init__()
        if isinstance(target, nn.Module):
            raise ValueError(
                f"target: a module ({type(target).__name__}) would be learnt and stored with the model: give a "
                "function that calls it"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.make_layout = make_layout
        self.target = target

    def forward(
        self, images: Tensor, mask: Tensor, num_visible: int | None = None, hidden_only: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Predict the target of hidden patches from the visible ones.

        One site is a patch of p = total_stride pixels; a mask patch is one or more sites.

        Args:
            images: (B, C, H, W) float, normalised; H and W are multiples of the mask patch.
            mask: (B, gh, gw) bool, True = hidden, one element per mask patch.
            num_visible: visible patches of each image, exactly: it is not checked. None counts them, which waits for
                the device. Leave it None if images differ in that number, which packed refuses.
            hidden_only: predict hidden sites only, as the loss needs; False predicts every site, for pictures. Every
                site is also predicted if images differ in their number of visible patches.

        Returns:
            pred: (B, M, num_values), the M hidden sites (or all) in row-major order; for pixels p * p * C values,
            ordered (row, column, channel). site_mask: (B, H / p, W / p) bool, the mask at the sites.

        Raises:
            ValueError: if the masks do not match the images in number or size.
        """
        (B, _, H, W), stride, (num_masks, gh, gw) = images.shape, self.encoder.total_stride, mask.shape
        factor = H // stride // max(1, gh)  # sites along a side of a mask patch
        if num_masks != B or factor == 0 or (gh * factor * stride, gw * factor * stride) != (H, W):
            raise ValueError(
                f"mask: received {tuple(mask.shape)} for images {tuple(images.shape)}; give one of each image, of "
                f"square patches whose side is a multiple of the total stride {stride}"
            )
        if num_visible is None and len(counts := visible_counts(mask)) == 1:
            num_visible = counts[0]
        site_mask = upsample_mask(mask, factor)  # (B, h, w)
        num_hidden = None
        if hidden_only and num_visible is not None:
            num_hidden = site_mask[0].numel() - num_visible * factor**2
        layout = self.make_layout(mask, num_visible)
        return self.decoder(self.encoder.pyramid(images, layout), layout, site_mask, num_hidden), site_mask


def build_fcmae(
    encoder: StagedEncoder,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
    make_layout: MakeLayout = PACKED,
    target: Target = normalized_pixels,
    num_values: int | None = None,
) -> FCMAE:
    """The paper's model around an encoder: its plain decoder predicts the target of each site at the total stride.

    Args:
        encoder: sees visible sites only.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        make_layout: maps (mask, num_visible) to the layout of the encoder's features; by default packed.
        target: what is predicted for a site.
        num_values: of it; None calls it on one site of zeros, on the CPU.
    """
    if num_values is None:
        patch = torch.zeros(1, encoder.in_chans, encoder.total_stride, encoder.total_stride)
        num_values = target(patch, torch.zeros(1, dtype=torch.int64), encoder.total_stride, None).shape[1]
    decoder = Decoder(encoder.dim, num_values, decoder_dim, decoder_depth)
    return FCMAE(encoder, decoder, make_layout, target)


# How the answer is judged


class WeightedLoss(NamedTuple):
    """A loss, and what it counts by beside those of other images.

    Attributes:
        mean: over the known values of hidden patches, float32.
        share: of the values of hidden patches that are known, 0 to 1; 1.0 if none is missing.
    """

    mean: Tensor
    share: Tensor | float


def reconstruction_loss(
    pred: Tensor, images: Tensor, mask: Tensor, *, target: Target = normalized_pixels, known: Tensor | None = None
) -> WeightedLoss:
    """Mean squared error over the known values of hidden patches only (arXiv 2301.00808, Sec. 3).

    Every known value has the same weight: a patch counts by its share of known values, and one that is missing entirely
    does not count.

    Args:
        pred: (B, M, num_values) float, the predictions for the M hidden patches of each image, or for every patch if
            images differ in their number of hidden ones, in row-major order.
        images: (B, C, H, W) float.
        mask: (B, H / p, W / p) bool, True = hidden.
        target: what is to be predicted.
        known: (B, C, H, W) bool, false for values that are missing; None if none is.

    Returns:
        The mean, 0 if no hidden value is known, and the share that is.

    Raises:
        ValueError: if no patch is hidden, or the target has other values than are predicted.
    """
    M, pred = pred.shape[1], pred.flatten(0, 1)
    if mask[0].numel() > M:
        hidden = true_rows(mask, M)
    else:  # every patch is predicted, and only the mask tells how many are hidden
        hidden = mask.flatten().nonzero()[:, 0]
        pred = pred.index_select(0, hidden)
    if len(hidden) == 0:
        raise ValueError("mask hides no patch: the loss is over hidden patches, so hide at least one")
    with torch.no_grad():
        wanted = target(images, hidden, images.shape[2] // mask.shape[1], known)  # (num_hidden, num_values)
    if pred.shape != wanted.shape:
        raise ValueError(f"target: it has the shape {tuple(wanted.shape)}, the predictions have {tuple(pred.shape)}")
    error = at_least_float32(pred) - wanted
    if known is None:
        return WeightedLoss(error.square().mean(), 1.0)
    counts = ~wanted.isnan()
    num = counts.sum()
    # Masked before the square: its gradient at NaN would be NaN even where it does not count.
    return WeightedLoss(error.where(counts, 0).square().sum() / num.clamp(min=1), num / counts.numel())


def weighted_loss(
    model: Callable[[Tensor, Tensor, int | None], tuple[Tensor, Tensor]],
    images: Tensor,
    masks: Tensor,
    num_visible: int | None = None,
    *,
    target: Target | None = None,
    known: Tensor | None = None,
) -> WeightedLoss:
    """The objective of pretraining: how well `model` predicts what the masks hide, of a batch or a part of one.

    Args:
        model: an FCMAE, as it is, compiled, or wrapped for several processes.
        images: (B, C, H, W) float, normalised.
        masks: (B * n, gh, gw) bool, True = hidden; the n masks of an image follow each other.
        num_visible: visible patches under each mask, exactly: it is not checked. None counts them, which waits for the
            device.
        target: what the model is to predict; None takes the model's own, see `FCMAE`.
        known: (B, C, H, W) bool, false for missing values, which do not enter the loss; None if none is missing. The
            model sees what `images` holds in their place, ideally 0, the mean.

    Returns:
        The mean over all hidden patches, a float32 scalar with gradients, and what it counts by: the mean of a whole
        batch is that of its parts, weighted by their shares. See `reconstruction_loss`.

    Raises:
        ValueError: if the masks hide nothing at all, or everything, images differ in the number of their masks, or no
            target is given and the model has none.
    """
    if len(masks) % len(images):
        raise ValueError(f"masks: received {len(masks)} for {len(images)} images; give as many of each")
    if (num_masks := len(masks) // len(images)) > 1:
        images = images.repeat_interleave(num_masks, dim=0)  # (B * n, C, H, W)
        known = None if known is None else known.repeat_interleave(num_masks, dim=0)
    if target is None:  # of a model wrapped for several processes, that of the model inside
        target = getattr(getattr(model, "module", model), "target", None)
    if target is None:
        raise ValueError("target: the model has none of its own: give one, such as fcmae.masked.normalized_pixels")
    pred, site_mask = model(images, masks, num_visible)
    return reconstruction_loss(pred, images, site_mask, target=target, known=known)


def masked_loss(
    model: Callable[[Tensor, Tensor, int | None], tuple[Tensor, Tensor]],
    images: Tensor,
    masks: Tensor,
    num_visible: int | None = None,
    *,
    target: Target | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """The objective of pretraining on a whole batch: the mean that `weighted_loss` gives, a float32 scalar.

    Args:
        model: see `fcmae.masked.weighted_loss`, as for the rest, and for errors.
        images: (B, C, H, W) float, normalised.
        masks: (B * n, gh, gw) bool, True = hidden; the n masks of an image follow each other.
        num_visible: visible patches under each mask, exactly; None counts them.
        target: what the model is to predict; None takes the model's own.
        known: (B, C, H, W) bool, false for missing values; None if none is missing.
    """
    return weighted_loss(model, images, masks, num_visible, target=target, known=known).mean
