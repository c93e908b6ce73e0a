"""Segmentation that may stop at any moment: an exit after each stage, and later stages on uncertain patches alone.

A patch of total_stride pixels exits when the predictions for it are confident. The remaining patches are computed in a
new, smaller packed layout: fewer patches take less time, not only fewer counted operations.

Source: anytime dense prediction with confidence adaptivity, arXiv 2104.00749. Differences: there a site exits, here a
whole patch, so that the rest is dense algebra; a patch that has exited is zero to its neighbours, like hidden patches
in pretraining, where the paper fills it in; and an exit adds to the logits of the one before, as a ConvNeXt's later
stages are coarse (skips of scores, arXiv 1411.4038). The exits have LayerNorm and GELU for BatchNorm and ReLU, one
nearest expansion for steps of bilinear ones, and the last stage has one, too, where the paper has the network's head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fcmae.heads import Exits, Segmenter, add_nearest, build_head, resize
from fcmae.layouts import DENSE, PACKED, Masked, Packed
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import describe
from fcmae.timing import wait

# (stage, confidence, hidden) -> the patches that are hidden from the stage, and how many it sees of each image, which
# may be None where that number is not needed.
Choose = Callable[[int, Tensor, Tensor], tuple[Tensor, int | None]]
# (hidden, number of visible patches, layout, features in it) -> the stage's layout, and the features in it.
Narrow = Callable[[Tensor, int | None, Masked | Packed, Tensor], tuple[Masked | Packed, Tensor]]


def narrow_masked(
    hidden: Tensor, num_visible: int | None, layout: Masked | Packed, f: Tensor
) -> tuple[Masked | Packed, Tensor]:
    """Maps stay as they are: `Masked` zeroes hidden sites wherever they could be seen.

    Args:
        hidden: (B, gh, gw) bool, True = hidden.
        num_visible: not used.
        layout: that of f.
        f: a map.

    Returns:
        The next layout and the features.
    """
    return Masked(hidden), f


@dataclass(frozen=True)
class Answer:
    """What is known after an exit.

    Attributes:
        logits: (B, classes, h, w), at the first stage's sites. A patch that has exited keeps its logits.
        confidence: (B, gh, gw) float32 in 0..1, of each patch when it was last computed.
        computed: (B, gh, gw) bool, the patches that the stage computed.
        size: height and width of the images.
    """

    logits: Tensor
    confidence: Tensor
    computed: Tensor
    size: tuple[int, int]

    def pixels(self) -> Tensor:
        """Logits of every pixel, (B, classes, H, W)."""
        return resize(self.logits, self.size)


class Anytime(Segmenter):
    """An encoder with an exit on each stage.

    In training a stage computes the whole map, in which patches that have exited are zeroed as by `Masked`, and all
    answers are returned. Otherwise it computes the remaining patches alone.

    Parameters are encoder.*, head.*.

    Args:
        encoder: has the stages.
        head: its exits.
    """

    head: Exits
    narrow: Narrow = staticmethod(narrow_masked)  # in training; an ablation uses another

    def __init__(self, encoder: StagedEncoder, head: Exits) -> None:
        super().__init__(encoder, head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            images: (B, in_chans, H, W), normalised, H and W multiples of the total stride.

        Returns:
            In training (exits, B, num_classes, H, W); else the last answer, (B, num_classes, H, W).
        """
        if self.training:

            def choose(stage: int, confidence: Tensor, hidden: Tensor) -> tuple[Tensor, None]:
                return unsure(confidence, hidden, self.head.tau), None

            return torch.stack([answer.pixels() for answer in self.answers(images, choose, self.narrow)])
        return self.within(images)

    def within(
        self,
        images: Tensor,
        tau: float | None = None,
        budget: float | Sequence[float] | None = None,
        limit_s: float = math.inf,
    ) -> Tensor:
        """Logits of every pixel, (B, num_classes, H, W): the last answer, or the best within a time limit.

        Args:
            images: see `anytime`, any number of them.
            tau: see `anytime`.
            budget: see `anytime`.
            limit_s: time limit in seconds, shared by the images, after which no stage but the first begins.

        Raises:
            ValueError: see `anytime`.
        """
        parts = images[:, None] if budget is None else [images]  # with tau, different patches remain in each image

        def now() -> float:
            if limit_s < math.inf:
                wait(images.device)  # a GPU's work is queued long before it is done
            return time.perf_counter()

        begun, last = now(), []
        for i, part in enumerate(parts):
            for answer in self.anytime(part, tau, budget):
                best = answer
                if now() - begun >= limit_s * (i + 1) / len(parts):
                    break
            last.append(best.pixels())
        return torch.cat(last)

    @torch.no_grad()
    def anytime(
        self, images: Tensor, tau: float | None = None, budget: float | Sequence[float] | None = None
    ) -> Iterator[Answer]:
        """Successive answers, each better than the one before; nothing more is computed once you stop iterating.

        Args:
            images: (B, in_chans, H, W), normalised, H and W multiples of the total stride; one image unless there is a
                budget.
            tau: a patch exits when its confidence is above this; None is the head's.
            budget: instead of tau, the share of patches to keep, the least confident ones of each image: one number for
                all stages after the first, or one for each.

        Yields:
            The answer after each stage, up to the first stage for which no patch remains.

        Raises:
            ValueError: for another size, for several images without a budget, or for an invalid budget or tau.
        """
        later = len(self.head) - 1
        if budget is None and len(images) != 1:
            raise ValueError(f"images: received {len(images)} of them without a budget: give one at a time")
        shares = [float(budget)] * later if isinstance(budget, int | float) else budget
        if shares is not None and (len(shares) != later or not all(0 < share <= 1 for share in shares)):
            raise ValueError(f"budget = {budget}: give a share above 0 and up to 1, or {later} of them, one a stage")
        threshold = self.head.tau if tau is None else tau
        if not 0 <= threshold <= 1:
            raise ValueError(f"tau = {threshold}: give a probability, 0 to 1")
        num_visible: int | None = None

        def choose(stage: int, confidence: Tensor, hidden: Tensor) -> tuple[Tensor, int]:
            nonlocal num_visible
            if shares is None:
                hidden = unsure(confidence, hidden, threshold)
                return hidden, int(hidden.logical_not().sum())
            num_patches = hidden[0].numel()
            # A patch that has exited does not come back.
            # The small term keeps .55 of 100 at 55, as in `masking.num_visible`.
            share = max(1, math.ceil(num_patches * shares[stage - 1] - 1e-6))
            num_visible = min(num_visible or num_patches, share)
            return least_sure(confidence, hidden, num_visible), num_visible

        yield from self.answers(images, choose, narrow_packed)

    def answers(self, images: Tensor, choose: Choose, narrow: Narrow) -> Iterator[Answer]:
        """The stages one by one: compute, answer, choose what is hidden from the next.

        Args:
            images: see `anytime`.
            choose: which patches are hidden from the next stage.
            narrow: how that stage leaves them out.

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
        out: Tensor | None = None  # (B, h, w, classes)
        sure: Tensor | None = None  # (B, gh, gw, 1)
        for i, head in enumerate(self.head):
            if out is not None and sure is not None:
                hidden, num_visible = choose(i, sure.squeeze(-1), hidden)
                if num_visible == 0:
                    return
                layout, f = narrow(hidden, num_visible, layout, f)
                f = self.encoder.downsample(i, f, layout)
            f = self.encoder.stage(i, f, layout)
            new = head(f) if out is None else add_nearest(layout.pack(out), head(f))
            confidence = self.head.confidence(new.detach())
            out = new if out is None else layout.paste(out, new)
            sure = confidence if sure is None else layout.paste(sure, confidence)
            yield Answer(out.permute(0, 3, 1, 2), sure.squeeze(-1), ~hidden, (height, width))


def unsure(confidence: Tensor, hidden: Tensor, tau: float) -> Tensor:
    """Hide the patches whose confidence is above tau, in addition to those already hidden.

    Args:
        confidence: (B, gh, gw).
        hidden: (B, gh, gw) bool.
        tau: 0 to 1.

    Returns:
        (B, gh, gw) bool, True = hidden.
    """
    return hidden | (confidence > tau)


def least_sure(confidence: Tensor, hidden: Tensor, num_visible: int) -> Tensor:
    """Hide all patches of each image except the least confident of those that are not hidden yet.

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


def narrow_packed(
    hidden: Tensor, num_visible: int | None, layout: Masked | Packed, f: Tensor
) -> tuple[Masked | Packed, Tensor]:
    """Packed rows of the remaining patches, by one gather; f as it is while none has exited.

    Args:
        hidden: (B, gh, gw) bool, True = hidden, the same number in each image.
        num_visible: how many patches of each image are not hidden.
        layout: that of f.
        f: a map, or packed rows.

    Returns:
        The next layout and the features in it.
    """
    before = layout.num_visible if isinstance(layout, Packed) else hidden[0].numel()
    if num_visible == before:
        return layout, f
    packed = PACKED(hidden, num_visible)
    assert isinstance(packed, Packed)
    return packed, packed.take(f, layout) if isinstance(layout, Packed) else packed.pack(f)


def build_segmenter(
    encoder: StagedEncoder,
    kind: str,
    num_classes: int,
    dim: int | None = None,
    tau: float | None = None,
    quantile: float | None = None,
) -> Segmenter:
    """A network that gives every pixel a class, with the named head.

    Args:
        encoder: has the stages.
        kind: see `build_head`.
        num_classes: outputs.
        dim: see `build_head`.
        tau: see `Exits`; None is .998.
        quantile: see `Exits`; None is 0.

    Raises:
        ValueError: for another kind, or for exits on a network that cannot compute on some patches alone.
    """
    head = build_head(kind, encoder.spec.dims, num_classes, dim)
    if not isinstance(head, Exits):
        return Segmenter(encoder, head)
    if encoder.spec.dense_only:
        raise ValueError(
            f"model.head = {kind} is not for {describe(encoder.spec)}, which {encoder.spec.dense_only}: choose another "
            "head or network"
        )
    head.tau = head.tau if tau is None else tau
    head.quantile = head.quantile if quantile is None else quantile
    return Anytime(encoder, head)
