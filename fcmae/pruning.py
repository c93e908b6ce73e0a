"""Structured pruning of a ConvNeXt: removing hidden channels of its blocks, for which the others compensate, or blocks.

A hidden channel is a row of pwconv1 and its bias, GRN's gamma and beta, and a column of pwconv2; nothing else depends
on it. Its mean is folded into pwconv2's bias; for a dead channel the mean is beta, exactly. GRN divides by the mean
over channels, so removing some changes all others: the gamma of those that stay is multiplied by
(mean of G over those that stay) / (mean of G over all), averaged over images. With both corrections, removing dead
channels leaves the function as it was.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fcmae.config.commands import PruneConfig
from fcmae.data.dataset import check_values
from fcmae.data.find import find_images
from fcmae.data.split import evenly
from fcmae.evaluation.analysis import layer_names, walk
from fcmae.evaluation.features import batches_of
from fcmae.evaluation.models import choose_device
from fcmae.evaluation.outputs import tell_unread
from fcmae.layouts import DENSE
from fcmae.layouts.norms import at_least_float32, l2_norm
from fcmae.networks.convnext import Encoder
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.layers import EPS, Block
from fcmae.networks.spec import ConvNeXtSpec, describe
from fcmae.weights.convert import build_encoder, check_dest
from fcmae.weights.directories import timm_holds, transformers_holds
from fcmae.weights.files import read_weights, save_weights, tell_encoder_alone
from fcmae.weights.record import Weights

What = Literal["hidden", "blocks"]
How = Literal["uniform", "global"]
By = Literal["norm", "activation"]
Kept = Mapping[str, Tensor]  # the blocks that stay, stages.I.J, and which of their hidden channels

_HIDDEN = {"pwconv1.weight": 0, "pwconv1.bias": 0, "pwconv2.weight": 1, "grn.gamma": -1, "grn.beta": -1}


@dataclass(frozen=True)
class Measured:
    """Statistics of a block over all sites of images with nothing hidden; every image has the same weight.

    Attributes:
        mean: (hidden,) float64, mean of each channel at pwconv2's input.
        std: (hidden,), standard deviation of each channel there.
        norms: (hidden,), G / (mean of G over channels), averaged over images; ones in V1.
        output_rms: RMS of the block's output.
        share: norm of the branch / norm of the block's output, averaged over images.
    """

    mean: Tensor
    std: Tensor
    norms: Tensor
    output_rms: float
    share: float


@torch.no_grad()
def measure(encoder: Encoder, batches: Iterable[Tensor]) -> dict[str, Measured]:
    """Statistics of the blocks on images.

    Args:
        encoder: in evaluation mode.
        batches: (B, C, H, W) each, normalised, on the encoder's device.

    Returns:
        By the block's name, stages.I.J.

    Raises:
        ValueError: if there are no images, or a block's output is not finite.
    """
    sums: dict[str, list[Tensor]] = {}
    num_images = 0
    for images in batches:
        num_images += len(images)
        for name, block, given, expanded, output in walk(encoder, images) if len(images) else ():
            assert isinstance(block, Block)
            expanded, output = at_least_float32(expanded), at_least_float32(output)
            variance, mean = (each.cpu().double() for each in torch.var_mean(expanded, (1, 2), correction=0))
            norms = torch.ones_like(mean)
            if block.grn is not None:
                all_norms = DENSE.image_norm(block.expand(given, DENSE))  # (B, 1, 1, hidden)
                norms = (all_norms / (all_norms.mean(-1, keepdim=True) + EPS)).flatten(1)
            power, branch = (x.square().mean((1, 2, 3)) for x in (output, output - given))  # (B,)
            found = (mean, variance + mean.square(), norms, power, (branch / power).nan_to_num().sqrt())
            before = sums.get(name, [torch.zeros(())] * len(found))
            sums[name] = [a + b.cpu().double().sum(0) for a, b in zip(before, found, strict=True)]
    if not num_images:
        raise ValueError("data: none of the images can be read: give others")
    measured = {}
    for name, totals in sums.items():
        if not all(total.isfinite().all() for total in totals):
            raise ValueError(
                f"data: what {name} makes of the images is not finite: if missing pixels are stored as a huge number, "
                "give --nodata"
            )
        mean, squares, norms, power, share = (total / num_images for total in totals)
        std = (squares - mean.square()).clamp(min=0).sqrt()
        measured[name] = Measured(mean, std, norms, float(power.sqrt()), float(share))
    return measured


def channel_scores(block: Block, measured: Measured, by: By) -> Tensor:
    """What each hidden channel adds to the block's output, comparable between blocks.

    Args:
        block: of the encoder.
        measured: its statistics.
        by: activation is the standard deviation of the channel (its mean is kept) times the norm of its column of
            pwconv2, as a share of the block's output, both over all its channels; norm is the norm of its row of
            pwconv1 times that of its column, divided by the mean of these products over the block. LayerScale is part
            of the column.

    Returns:
        (hidden,) float64, from 0.
    """
    rows, columns = block.pwconv1.weight.detach().double().cpu(), block.pwconv2.weight.detach().double().cpu()
    if block.gamma is not None:
        columns = columns * block.gamma.detach().double().cpu()[:, None]
    if by == "activation":
        return measured.std * l2_norm(columns, (0,))[0] / max(measured.output_rms * math.sqrt(len(columns)), EPS)
    scores = l2_norm(rows, (1,))[:, 0] * l2_norm(columns, (0,))[0]
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)


def num_kept(num: int, keep: float) -> int:
    """round(keep * num), at least 1."""
    return max(1, round(keep * num))


def uniformly(spec: ConvNeXtSpec, keep: float, what: What) -> ConvNeXtSpec:
    """The spec after uniform pruning of a network in which the blocks of a stage are alike.

    Args:
        spec: of the network.
        keep: see `keep_best`.
        what: see `choose`.
    """
    if what == "hidden":
        hidden = [[num_kept(width, keep) for width in stage] for stage in spec.hidden_widths]
    else:
        hidden = [list(stage[: num_kept(len(stage), keep)]) for stage in spec.hidden_widths]
    return ConvNeXtSpec.model_validate(spec.model_dump() | {"depths": list(map(len, hidden)), "hidden": hidden})


def keep_best(groups: Sequence[Tensor], keep: float, how: How) -> list[Tensor]:
    """Which members of each group to keep, at least one.

    Args:
        groups: scores, (n,) each.
        keep: share to keep, 0..1.
        how: uniform keeps that share of each group, global of all groups together: the highest scores.

    Returns:
        Positions of the kept members in each group, in rising order.
    """
    if how == "uniform":
        return [scores.topk(num_kept(len(scores), keep)).indices.sort().values for scores in groups]
    raised = [scores.index_fill(0, scores.argmax(), torch.inf) for scores in groups]  # the best of each stays
    everything = torch.cat(raised)
    stays = torch.zeros(len(everything), dtype=torch.bool)
    stays[everything.topk(max(len(groups), num_kept(len(everything), keep))).indices] = True
    return [part.nonzero()[:, 0] for part in torch.split(stays, [len(scores) for scores in groups])]


def _check_has_sizes(encoder: Encoder) -> None:
    if any(module.grn is not None for module in encoder.modules() if isinstance(module, Block)):
        raise ValueError("by = norm: a block of ConvNeXt V2 has no LayerScale that tells its size: use activation")


def choose(encoder: Encoder, measured: Mapping[str, Measured], keep: float, what: What, how: How, by: By) -> Kept:
    """Choose what to keep of an encoder.

    Args:
        encoder: to be pruned.
        measured: see `measure`.
        keep: see `keep_best`; a stage keeps at least one block, and a block at least one channel.
        what: hidden channels of the blocks, see `channel_scores`; or blocks, by the share of their branch in their
            output (activation) or the mean size of LayerScale (norm).
        how: see `keep_best`; a group is the channels of a block, or the blocks of a stage.
        by: see `what`.

    Raises:
        ValueError: for blocks of V2 by norm.
    """
    names = layer_names(encoder)
    blocks = dict(zip(names, (b for stage in encoder.stages for b in cast("Iterable[Block]", stage)), strict=True))
    if what == "hidden":
        scores = [channel_scores(blocks[name], measured[name], by) for name in names]
        return dict(zip(names, keep_best(scores, keep, how), strict=True))
    if by == "norm":
        _check_has_sizes(encoder)
    stages = [[f"stages.{i}.{j}" for j in range(depth)] for i, depth in enumerate(encoder.spec.depths)]

    def score(name: str) -> float:
        gamma = blocks[name].gamma
        return measured[name].share if by == "activation" or gamma is None else float(gamma.detach().abs().mean())

    kept = keep_best([torch.tensor([score(name) for name in stage]) for stage in stages], keep, how)
    stay = [stage[j] for stage, positions in zip(stages, kept, strict=True) for j in positions.tolist()]
    return {name: torch.arange(blocks[name].pwconv1.out_features) for name in stay}


def cut(weights: Weights, kept: Kept, measured: Mapping[str, Measured] | None = None) -> Weights:
    """The weights without what is pruned. Everything else is as it was, including a decoder, norm and head.

    Args:
        weights: with an encoder.
        kept: what stays, at least one block per stage.
        measured: see `measure`, of these weights; None cuts without compensating.
    """
    spec, old = weights.architecture.spec, weights.state
    stages = [[j for j in range(depth) if f"stages.{i}.{j}" in kept] for i, depth in enumerate(spec.depths)]
    places = {f"stages.{i}.{j}": f"stages.{i}.{n}" for i, stage in enumerate(stages) for n, j in enumerate(stage)}
    state = {}
    for name, value in old.items():
        match = re.fullmatch(r"encoder\.(stages\.\d\.\d+)\.(.+)", name)
        if match is None:
            state[name] = value
        elif match[1] in kept:
            dim = _HIDDEN.get(match[2])
            stays = value if dim is None else value.index_select(dim, kept[match[1]])
            state[f"encoder.{places[match[1]]}.{match[2]}"] = stays
    for block, found in measured.items() if measured else ():
        if (channels := kept.get(block)) is None:
            continue
        gamma, bias = (f"encoder.{places[block]}.{name}" for name in ("grn.gamma", "pwconv2.bias"))
        columns = old[f"encoder.{block}.pwconv2.weight"].double()
        gone = torch.ones(columns.shape[1], dtype=torch.bool).index_fill(0, channels, False)
        state[bias] = (state[bias].double() + columns[:, gone] @ found.mean[gone]).to(state[bias].dtype)
        if gamma in state and gone.any():
            state[gamma] = (state[gamma].double() * found.norms[channels].mean()).to(state[gamma].dtype)
    hidden = [[len(kept[f"stages.{i}.{j}"]) for j in stage] for i, stage in enumerate(stages)]
    smaller = ConvNeXtSpec.model_validate(spec.model_dump() | {"depths": list(map(len, stages)), "hidden": hidden})
    architecture = replace(weights.architecture, spec=smaller)
    return replace(weights, state=state, architecture=architecture, expected_output=(), names={})


@torch.no_grad()
def multiply_adds(encoder: StagedEncoder, image_size: tuple[int, int]) -> int:
    """Multiply-adds of the convolutions and Linears of an encoder, for one image with nothing hidden.

    Args:
        encoder: in evaluation mode, on the CPU.
        image_size: height and width.
    """
    with FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, encoder.in_chans, *image_size))
    flops: int = counter.get_total_flops()
    return flops // 2


def prune(cfg: PruneConfig) -> str:
    """Prune the weights that `cfg` names, write them, and describe what was done.

    Raises:
        ValueError: if `cfg.dest` exists or is not a name for a file of weights, the weights or images cannot be read,
            or there is nothing to choose by.
    """
    check_dest(cfg.dest, "fcmae")
    tell_encoder_alone(cfg.model)
    weights = read_weights(cfg.model, key=cfg.key, prefix=cfg.prefix)
    device = choose_device(cfg.device)
    encoder = build_encoder(weights).eval().to(device)
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"model = {cfg.model} is {describe(encoder.spec)}, and what is pruned is a ConvNeXt: give one of those"
        )
    if cfg.what == "blocks" and cfg.by == "norm":
        _check_has_sizes(encoder)
    reading = weights.reading(f"model = {cfg.model}", cfg.image_size).told(cfg.max_pixels, cfg.nodata)
    images = find_images(cfg.data, key="data")
    images.tell_notes()
    images = images.subset(evenly(len(images), cfg.max_images))
    check_values(reading, images)
    bad: list[tuple[str, str]] = []

    def pixels() -> Iterable[Tensor]:
        for normalized, batch in batches_of(
            reading, images, device=device, batch_size=cfg.batch_size, num_workers=cfg.num_workers
        ):
            bad.extend(batch.bad)
            yield normalized

    measured = measure(encoder, pixels())
    tell_unread(bad, "images")
    pruned = cut(weights, choose(encoder, measured, cfg.keep, cfg.what, cfg.how, cfg.by), measured)
    said = f"{cfg.keep:g} of {cfg.what} kept, {cfg.how} by {cfg.by}"
    # Scores are those of the whole network.
    origin = {key: value for key, value in weights.origin.items() if key == "epochs" or not isinstance(value, float)}
    save_weights(cfg.dest, replace(pruned, origin=origin | {"pruned": said}), "fcmae")
    return "\n".join([*_changes(weights, pruned, reading.image_size), f"wrote {cfg.dest}", *_next(cfg.dest, pruned)])


def _changes(weights: Weights, pruned: Weights, image_size: tuple[int, int]) -> list[str]:
    def counts(each: Weights) -> list[int]:
        encoder, spec = build_encoder(each).eval(), each.architecture.spec
        size = sum(parameter.numel() for parameter in encoder.parameters())
        return [sum(spec.depths), sum(map(sum, spec.hidden_widths)), size, multiply_adds(encoder, image_size)]

    whats = ["blocks", "hidden channels", "parameters of the encoder", "multiply-adds at {}x{}".format(*image_size)]
    numbers = zip(whats, counts(weights), counts(pruned), strict=True)
    return [f"{describe(weights.architecture.spec)}", *(f"{what}: {a:,} -> {b:,}" for what, a, b in numbers)]


def _next(dest: Path, pruned: Weights) -> list[str]:
    architecture = pruned.architecture
    head = " --model.keep_head" if architecture.num_classes else ""
    quoted = shlex.quote(str(dest))
    lines = [f"use: fcmae finetune LABELLED --init {quoted}{head}"]
    pretrain = f"fcmae pretrain IMAGES --init {quoted} --model.variant"
    pretrain += f" '{architecture.spec.model_dump_json(exclude_defaults=True)}'"
    if architecture.decoder_depth:
        decoder = f"--model.decoder_depth {architecture.decoder_depth} --model.decoder_dim {architecture.decoder_dim}"
        lines.append(f"the decoder is as it was: {pretrain} {decoder}")
    else:
        lines.append(f"with a new decoder: {pretrain}")
    if timm_holds(architecture.spec):
        lines.append(f"for timm: fcmae convert {quoted} DIRECTORY")
    elif transformers_holds(architecture.spec):
        lines.append(
            f"for transformers, as timm has no such network: fcmae convert {quoted} DIRECTORY --to transformers"
        )
    else:
        lines.append("neither timm nor transformers can build such a network")
    return lines
