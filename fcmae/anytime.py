"""Segmentation that may stop at any moment: an exit after each stage, and later stages on unsure patches alone.

A patch of total_stride pixels leaves when the exits are sure of it. What is left is computed in a new, smaller packed
layout: fewer patches are less time, not only fewer counted operations.

Source: anytime dense prediction with confidence adaptivity, arXiv 2104.00749. What differs: there a site leaves, here a
whole patch, so that the rest is dense algebra; what has left is zero to its neighbours, as hidden patches are in
pretraining, where the paper fills it in; and the exits share a state of the finest sites, as a ConvNeXt has none at its
end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fcmae.heads import Segmenter, build_head, resized
from fcmae.layouts import DENSE, PACKED, MakeLayout, Masked, Packed
from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.layers import LayerNorm

TAU, QUANTILE, DIM = 0.998, 0.0, 64

# (stage, confidence, hidden) -> the patches that are hidden from the stage, and how many of an image it sees; the number
# may be None where nobody needs it.
Choose = Callable[[int, Tensor, Tensor], tuple[Tensor, int | None]]
# (hidden, how many are seen, layout, features in it) -> the stage's layout, and the same features in it.
Narrow = Callable[[Tensor, int | None, Masked | Packed, Sequence[Tensor]], tuple[Masked | Packed, Sequence[Tensor]]]


class Exit(nn.Module):
    """A stage's part in the answer. It looks at no other patch, so it runs on maps and on packed rows alike.

        level = lateral(f) + nearest(pooled(...pooled(lateral(f)))), pooled to one site a patch
        state = state + nearest(level), of the first stage's sites
        logits = classify(fuse(state))

    lateral, each pooled (after a 2x2 average) and fuse are Linear -> LayerNorm -> GELU on each site.

    Args:
        in_dim: channels of the stage.
        dim: of the state.
        num_poolings: log2 of the stage's sites along a side of a patch.
        num_classes: outputs.
    """

    def __init__(self, in_dim: int, dim: int, num_poolings: int, num_classes: int) -> None:
        super().__init__()
        self.lateral = _layer(in_dim, dim)
        self.pooled = nn.ModuleList(_layer(dim, dim) for _ in range(num_poolings))
        self.fuse = _layer(dim, dim)
        self.classify = nn.Linear(dim, num_classes)

    def forward(self, f: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next state and logits.

        Args:
            f: (..., h, w, C), the stage's output: maps, or sites of patches.
            state: (..., H, W, dim), of the exit before, H and W multiples of h and w; None at the first.

        Returns:
            (..., H, W, dim) and (..., H, W, num_classes).
        """
        level = context = self.lateral(f)
        for layer in self.pooled:
            context = layer(_quarters(context).mean((-4, -2)))
        level = _add(level, context)
        state = level if state is None else _add(state, level)
        return state, self.classify(self.fuse(state))


def _layer(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), LayerNorm(dim), nn.GELU())


def _quarters(x: Tensor, side: int = 2) -> Tensor:
    """(..., h, w, C) to (..., h / side, side, w / side, side, C)."""
    return x.unflatten(-3, (-1, side)).unflatten(-2, (-1, side))


def _add(fine: Tensor, coarse: Tensor) -> Tensor:
    """fine + coarse, whose sites are repeated: (..., h, w, C) and (..., h / s, w / s, C)."""
    side = fine.shape[-2] // coarse.shape[-2]
    if side == 1:
        return fine + coarse
    return (_quarters(fine, side) + coarse.unsqueeze(-2).unsqueeze(-4)).view_as(fine)


class Exits(nn.Module):
    """An exit on each stage of an encoder, and when a patch may leave.

    Args:
        dims: channels of the stages.
        num_classes: outputs.
        dim: channels of the state.
        tau: a patch leaves when it is surer than this, 0 to 1; at 1 none does.
        quantile: a patch is as sure as the site below which this share of its sites is; 0 is the least sure one.
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, dim: int = DIM, tau: float = TAU, quantile: float = QUANTILE
    ) -> None:
        super().__init__()
        self.dim, self.tau, self.quantile = dim, tau, quantile
        self.exits = nn.ModuleList(
            Exit(stage_dim, dim, len(dims) - 1 - i, num_classes) for i, stage_dim in enumerate(dims)
        )
        self.apply(init_weights)

    def confidence(self, logits: Tensor) -> Tensor:
        """How sure patches are: the largest probability at their least sure site, or at the quantile's.

        Args:
            logits: (..., h, w, classes) of maps or of sites of patches.

        Returns:
            (..., h / b, w / b, 1) float32 in 0..1, b the sites along a side of a patch.
        """
        logits = logits.float()
        sites = (logits.amax(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()  # (..., h, w, 1)
        sites = _quarters(sites, 1 << (len(self.exits) - 1)).transpose(-4, -3).flatten(-3)  # (..., h / b, w / b, b * b)
        rank = int(self.quantile * (sites.shape[-1] - 1))
        return sites.kthvalue(rank + 1, -1, keepdim=True).values if rank else sites.amin(-1, keepdim=True)


@dataclass(frozen=True)
class Answer:
    """What is known after an exit.

    Attributes:
        logits: (B, classes, h, w), of the first stage's sites. Where a patch has left, those that it left with.
        confidence: (B, gh, gw) float32 in 0..1, of each patch when it was computed last.
        computed: (B, gh, gw) bool, the patches that the stage computed.
        size: height and width of the images.
    """

    logits: Tensor
    confidence: Tensor
    computed: Tensor
    size: tuple[int, int]

    def pixels(self) -> Tensor:
        """Logits of every pixel, (B, classes, H, W)."""
        return resized(self.logits, self.size)


class Anytime(nn.Module):
    """An encoder with an exit on each stage.

    In training a stage computes the whole map with the patches that have left zeroed, as `Masked` has it, and all
    answers are returned; else it computes the others alone.

    Parameters are encoder.*, head.*.

    Args:
        encoder: of the stages.
        head: its exits.
    """

    def __init__(self, encoder: StagedEncoder, head: Exits) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            images: (B, in_chans, H, W), normalised, H and W multiples of the total stride.

        Returns:
            In training (exits, B, num_classes, H, W); else the last answer, (B, num_classes, H, W).
        """
        if self.training:
            answers = self.answers(images, lambda _, *sure: (unsure(*sure, self.head.tau), None), narrow_masked)
            return torch.stack([answer.pixels() for answer in answers])
        last = []
        for image in images.split(1):  # of each other patches are left
            *_, answer = self.anytime(image)
            last.append(answer.logits)
        return resized(torch.cat(last), images.shape[2:])

    @torch.no_grad()
    def anytime(
        self,
        images: Tensor,
        tau: float | None = None,
        budget: float | Sequence[float] | None = None,
        make_layout: MakeLayout = PACKED,
    ) -> Iterator[Answer]:
        """Answers, each better and later than the one before; take no more of them and nothing more is computed.

        Args:
            images: (B, in_chans, H, W), normalised, H and W multiples of the total stride; one image unless there is a
                budget.
            tau: a patch leaves when it is surer; None is the head's.
            budget: in its place, the share of the patches that stays, those least sure of each image: one for all
                stages after the first, or one each.
            make_layout: of the patches that are left, packed or triton.

        Yields:
            The answer after each stage. There is none after a stage that would have no patch.

        Raises:
            ValueError: for another size, for several images without a budget, or a budget that is none.
        """
        later = len(self.head.exits) - 1
        if budget is None and len(images) != 1:
            raise ValueError(f"images: received {len(images)} of them without a budget: give one at a time")
        shares = [float(budget)] * later if isinstance(budget, int | float) else budget
        if shares is not None and (len(shares) != later or not all(0 < share <= 1 for share in shares)):
            raise ValueError(f"budget = {budget}: give a share above 0 and up to 1, or {later} of them, one a stage")
        threshold = self.head.tau if tau is None else tau
        num_visible: int | None = None

        def choose(stage: int, confidence: Tensor, hidden: Tensor) -> tuple[Tensor, int]:
            nonlocal num_visible
            if shares is None:
                hidden = unsure(confidence, hidden, threshold)
                return hidden, int(hidden.logical_not().sum())
            num_patches = hidden[0].numel()
            # A patch that has left does not come back.
            num_visible = min(num_visible or num_patches, math.ceil(num_patches * shares[stage - 1]))
            return least_sure(confidence, hidden, num_visible), num_visible

        yield from self.answers(images, choose, partial(narrow_packed, make_layout=make_layout))

    def answers(self, images: Tensor, choose: Choose, narrow: Narrow) -> Iterator[Answer]:
        """The stages one by one: compute, answer, choose what is hidden from the next.

        Args:
            images: see `anytime`.
            choose: which patches are hidden from the next stage.
            narrow: how it leaves them out.

        Yields:
            The answer after each stage.

        Raises:
            ValueError: for another size.
        """
        (height, width), stride = images.shape[2:], self.encoder.total_stride
        if height % stride or width % stride:
            raise ValueError(f"images: received {height}x{width}; give multiples of the total stride {stride}")
        hidden = torch.zeros(len(images), height // stride, width // stride, dtype=torch.bool, device=images.device)
        layout: Masked | Packed = DENSE
        f = self.encoder.stem(images, layout)
        state: Tensor | None = None
        out: Tensor | None = None  # (B, h, w, classes)
        sure: Tensor | None = None  # (B, gh, gw, 1)
        for i, head in enumerate(self.head.exits):
            if state is not None and out is not None and sure is not None:
                hidden, num_visible = choose(i, sure.squeeze(-1), hidden)
                if num_visible == 0:
                    return
                layout, (f, state) = narrow(hidden, num_visible, layout, (f, state))
                f = self.encoder.downsample(i, f, layout)
            f = self.encoder.stage(i, f, layout)
            state, new = head(f, state)
            confidence = self.head.confidence(new.detach())
            out = new if out is None else layout.paste(out, new)
            sure = confidence if sure is None else layout.paste(sure, confidence)
            yield Answer(out.permute(0, 3, 1, 2), sure.squeeze(-1), ~hidden, (height, width))


def unsure(confidence: Tensor, hidden: Tensor, tau: float) -> Tensor:
    """Hide the patches that are surer than tau, beside those that are hidden.

    Args:
        confidence: (B, gh, gw).
        hidden: (B, gh, gw) bool.
        tau: 0 to 1.

    Returns:
        (B, gh, gw) bool, True = hidden.
    """
    return hidden | (confidence > tau)


def least_sure(confidence: Tensor, hidden: Tensor, num_visible: int) -> Tensor:
    """Hide all but those patches of each image that are least sure among those that are not hidden yet.

    Args:
        confidence: (B, gh, gw).
        hidden: (B, gh, gw) bool, with at least num_visible False in each image.
        num_visible: how many stay.

    Returns:
        (B, gh, gw) bool, True = hidden.
    """
    order = confidence.masked_fill(hidden, torch.inf).flatten(1)
    kept = order.topk(num_visible, largest=False, sorted=False).indices
    return torch.ones_like(order, dtype=torch.bool).scatter_(1, kept, False).view_as(hidden)


def narrow_masked(
    hidden: Tensor, num_visible: int | None, layout: Masked | Packed, features: Sequence[Tensor]
) -> tuple[Masked | Packed, Sequence[Tensor]]:
    """Maps stay as they are: `Masked` zeroes what is hidden wherever it could be seen.

    Args:
        hidden: (B, gh, gw) bool, True = hidden.
        num_visible: is not needed.
        layout: that of the features.
        features: maps.

    Returns:
        The next layout and the features.
    """
    return Masked(hidden), features


def narrow_packed(
    hidden: Tensor,
    num_visible: int | None,
    layout: Masked | Packed,
    features: Sequence[Tensor],
    make_layout: MakeLayout,
) -> tuple[Masked | Packed, Sequence[Tensor]]:
    """Packed rows of the patches that are left, by one gather each; as they are while none has left.

    Args:
        hidden: (B, gh, gw) bool, True = hidden, the same number in each image.
        num_visible: how many of an image are not.
        layout: that of the features.
        features: maps, or packed rows.
        make_layout: packed or triton.

    Returns:
        The next layout and the features in it.
    """
    before = layout.num_visible if isinstance(layout, Packed) else hidden[0].numel()
    if num_visible == before:
        return layout, features
    packed = make_layout(hidden, num_visible)
    assert isinstance(packed, Packed)
    return packed, [packed.take(f, layout) if isinstance(layout, Packed) else packed.pack(f) for f in features]


def build_segmenter(
    encoder: StagedEncoder,
    kind: str,
    num_classes: int,
    dim: int | None = None,
    tau: float | None = None,
    quantile: float | None = None,
) -> Segmenter | Anytime:
    """A network that gives every pixel a class, by the name of its head.

    Args:
        encoder: of the stages.
        kind: pyramid, upernet or anytime.
        num_classes: outputs.
        dim: channels of the head; None is 128 for pyramid, 512 for upernet and 64 for anytime.
        tau: of `Exits`; None is .998.
        quantile: likewise; None is 0.

    Raises:
        ValueError: for another kind.
    """
    dims = encoder.spec.dims
    if kind == "anytime":
        stop = (TAU if tau is None else tau, QUANTILE if quantile is None else quantile)
        return Anytime(encoder, Exits(dims, num_classes, dim or DIM, *stop))
    return Segmenter(encoder, build_head(kind, dims, num_classes, dim))
