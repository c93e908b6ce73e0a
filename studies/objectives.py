"""`fcmae pretrain` with another target, another decoder, or an average of its encoder, for comparison.

    python studies/objectives.py multiscale pretrain --config ...
    python studies/objectives.py multiscale+hog+ema pretrain --config ...
    python studies/objectives.py teacher pretrain --teacher convnext_tiny.fb_in22k --config ...
    python studies/objectives.py teacher pretrain --teacher convnext_tiny.fb_in22k --kept features.sqlite \\
        --data.crop_scale=1,1 --data.hflip=0 --config ...
    python studies/objectives.py ema average RUN DEST.safetensors

multiscale   the decoder joins the features of all stages of the encoder, as SparK's does (arXiv 2301.03580)
hog          predicts histograms of oriented gradients (MaskFeat, arXiv 2112.09133)
lowres       predicts each patch at 4 x 4 pixels, standardised; lowres2 at 2 x 2
constant     predicts 1 everywhere: nothing can be learnt of it, and features have no reason to differ
frequency    predicts each standardised patch by its frequencies, the higher ones weighing more (after A2MIM,
             arXiv 2205.13943)
teacher      predicts the features of a frozen network: a timm model, a run, or a file of weights. With --kept FILE an
             image that comes again costs no features: whole images do, random crops never
ema          keeps a moving average of the encoder, which `average` writes to DEST.safetensors

At most one of them is a target. These are no settings of fcmae: what wins here becomes one. A model is built of other
parts and handed to the same loop, and config.yaml does not say so: name the run after it, and resume it with the same.
`fcmae finetune`, `evaluate` and `convert` read the encoder of such a run, and not its average.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sqlite3
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from fcmae import threads

threads.prepare()  # as the commands do, before torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fcmae import pretraining
from fcmae.config import PretrainConfig
from fcmae.data.normalize import Normalize
from fcmae.evaluation.models import load_backbone, stage_maps
from fcmae.layouts import Layout
from fcmae.layouts.norms import at_least_float32
from fcmae.masked import FCMAE, Decoder, Target, hog, normalized_pixels
from fcmae.networks.convnext import init_weights
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.layers import LayerNorm
from fcmae.options import load
from fcmae.training import checkpoint
from fcmae.weights.files import read_weights, save_weights
from fcmae.weights.record import Weights
from fcmae.weights.tensors import digest

# Decoder


class MultiScale(Decoder):
    """`Decoder` of the sum of all stages, each normalised and projected to the last one's grid by a convolution.

    Args:
        encoder: whose stages they are.
        num_values: see `Decoder`.
        dim: likewise.
        depth: likewise.
    """

    def __init__(self, encoder: StagedEncoder, num_values: int, dim: int = 512, depth: int = 1) -> None:
        super().__init__(encoder.dim, num_values, dim, depth)
        *below, _ = dims = encoder.spec.dims
        self.norms = nn.ModuleList(LayerNorm(width) for width in dims)
        strides = [2**i for i in range(len(below), 0, -1)]  # of the last stage's grid, in sites of the stage
        self.below = nn.ModuleList(nn.Conv2d(width, dim, s, s) for width, s in zip(below, strides, strict=True))
        self.below.apply(init_weights)

    def project(self, stages: Sequence[Tensor], layout: Layout) -> Tensor:
        normalized = [norm(f) for norm, f in zip(self.norms, stages, strict=True)]
        x = super().project(normalized, layout)  # (B, h, w, dim)
        for conv, f in zip(self.below, normalized[:-1], strict=True):
            # A site of the last stage is visible or hidden as a whole: no convolution mixes the two.
            dense = layout.unpack(f).permute(0, 3, 1, 2)  # (B, C_i, H_i, W_i), zero at hidden sites
            x = x + conv(dense).permute(0, 2, 3, 1)
        return x


# Targets


def low_resolution(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None, *, side: int) -> Tensor:
    """Each hidden patch averaged to side x side pixels, then standardised.

    Args:
        images: see `fcmae.masked.pixels`.
        hidden: likewise.
        patch: likewise.
        known: not looked at: what is missing counts as the mean.
        side: a divisor of patch.

    Returns:
        (N, side * side * C) float32, ordered (row, column, channel).

    Raises:
        ValueError: if side does not divide patch.
    """
    if patch % side:
        raise ValueError(f"a patch of {patch} pixels cannot be averaged to {side} x {side}: choose another network")
    return normalized_pixels(F.avg_pool2d(at_least_float32(images), patch // side), hidden, side)


def frequencies(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None) -> Tensor:
    """The weighted discrete cosine transform of each standardised patch (after A2MIM, arXiv 2205.13943, Sec. 4.2).

    The transform is orthonormal, so the squared error of all coefficients alike is that of the pixels. Each is weighted
    by sqrt((1 + w^2) / 2), w its frequency over the root mean square of all: half of the loss is of pixels, and half of
    frequencies that count as if images had as much of each, where their amplitude falls as 1 / frequency. A2MIM weights
    by the error of the moment and transforms whole images instead.

    Args:
        images: see `fcmae.masked.pixels`.
        hidden: likewise.
        patch: likewise.
        known: not looked at: what is missing counts as the mean.

    Returns:
        (N, patch * patch * C) float32, ordered (vertical frequency, horizontal frequency, channel).
    """
    values = normalized_pixels(images, hidden, patch).view(len(hidden), patch, patch, -1)
    cosines, weights = _transform(patch, values.device)
    with torch.autocast(values.device.type, enabled=False):
        found = torch.einsum("ki,lj,nijc->nklc", cosines, cosines, values)
    return (found * weights[..., None]).flatten(1)


def constant(images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None) -> Tensor:
    """(N, 1) ones, see `fcmae.masked.pixels` for the arguments."""
    return torch.ones(len(hidden), 1, device=images.device)


@cache
def _transform(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The orthonormal DCT-II, a row a frequency, and the weight of each pair of frequencies: (size, size) float32."""
    k = torch.arange(size, dtype=torch.float64)
    cosines = (torch.pi / size * k[:, None] * (k + 0.5)).cos() * (2 / size) ** 0.5
    cosines[0] /= 2**0.5
    squares = k[:, None].square() + k.square()
    weights = ((1 + squares / squares.mean().clamp(min=1)) / 2).sqrt()
    return cosines.float().to(device), weights.float().to(device)


class Teacher:
    """Target: the last features of a frozen network, on the grid of patches, each patch's standardised.

    It sees the same crop, at the size that the network was trained on. Its weights are in no checkpoint.

    Args:
        source: see `load_backbone`.
        normalize: what the images went through.
        kept: a SQLite file of features by what an image holds, which is made and added to. An image that comes again,
            in this run or in another, is not computed again. Features are kept, and then always predicted, in float16.
    """

    def __init__(self, source: str, normalize: Normalize, kept: Path | None = None) -> None:
        backbone = load_backbone(source, in_chans=len(normalize.mean))
        self.network, self.size = backbone.model, backbone.reading.image_size
        self.given, self.wanted = normalize, backbone.reading.normalize
        self.kept = None
        if kept is not None:
            self.kept = sqlite3.connect(kept, timeout=60)
            self.kept.execute(
                "CREATE TABLE IF NOT EXISTS features (image BLOB PRIMARY KEY, features BLOB) WITHOUT ROWID"
            )
            statistics = [*self.given.buffers(), *self.wanted.buffers()]  # in no state dict
            state = self.network.state_dict() | {str(number): value for number, value in enumerate(statistics)}
            self.name = digest(state, str(self.size))

    @torch.no_grad()
    def __call__(self, images: Tensor, hidden: Tensor, patch: int, known: Tensor | None = None) -> Tensor:
        """(N, D) float32, see `fcmae.masked.pixels` for the arguments."""
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        found = self._features(images, grid) if self.kept is None else self._remembered(self.kept, images, grid)
        return found.flatten(0, 1).index_select(0, hidden)

    def _features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, D) float32 of images (B, C, H, W) and a grid of (h, w) patches."""
        for part in (self.network, self.given, self.wanted):
            part.to(images.device)
        seen = F.interpolate(self.given.inverse(images), self.size, mode="bicubic", antialias=True)
        found = stage_maps(self.network, self.wanted(seen))[-1].float()  # (B, D, h, w)
        features = F.interpolate(found, grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        return F.layer_norm(features, features.shape[2:])

    def _remembered(self, kept: sqlite3.Connection, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """`_features` of those that are not kept yet, which then are, and the others as they were kept."""
        name = f"{self.name} {grid}".encode()
        keys = [hashlib.sha256(name + image.tobytes()).digest() for image in images.float().cpu().numpy()]
        select = "SELECT features FROM features WHERE image = ?"
        found = {key: row[0] for key in keys if (row := kept.execute(select, (key,)).fetchone())}
        if new := [number for number, key in enumerate(keys) if key not in found]:
            features = self._features(images[new], grid).half().cpu().numpy()
            rows = {keys[number]: value.tobytes() for number, value in zip(new, features, strict=True)}
            with kept:  # one transaction: the disk is waited for once a batch
                kept.executemany("INSERT OR IGNORE INTO features VALUES (?, ?)", rows.items())
            found |= rows
        values = np.stack([np.frombuffer(found[key], np.float16).reshape(grid[0] * grid[1], -1) for key in keys])
        return torch.from_numpy(values).to(images.device).float()


TARGETS: Mapping[str, Target] = {
    "hog": hog,
    "lowres": partial(low_resolution, side=4),
    "lowres2": partial(low_resolution, side=2),
    "frequency": frequencies,
    "constant": constant,
}
PARTS = ("multiscale", "ema", "teacher", *TARGETS)

# The average of the encoder

MOST_DECAY = 0.9998
Tensors = tuple[Tensor, ...] | list[Tensor]


def rising_average(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
    """Move averages towards weights by 9 / (10 + n) after n steps, and by 1 - MOST_DECAY at the least.

    So an average is over the last tenth or so of a run, however short. In place.

    Args:
        averaged: the averages.
        current: the weights.
        num_averaged: n.
    """
    decay = min(MOST_DECAY, 1 - 9 / (10 + int(num_averaged)))
    get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)  # type: ignore[no-untyped-call]


class Averaged(FCMAE):
    """A model that keeps an average of its encoder's weights, in its checkpoints too, so that a run resumes with it.

    Args:
        net: whose parts it takes.
    """

    def __init__(self, net: FCMAE) -> None:
        super().__init__(net.encoder, net.decoder, net.make_layout, net.target)
        self.averaged = AveragedModel(net.encoder, multi_avg_fn=rising_average).requires_grad_(False)


@contextmanager
def averaging(net: FCMAE) -> Iterator[None]:
    """Update the average of an `Averaged` after each step of an optimizer; for other models nothing."""
    if not isinstance(net, Averaged):
        yield
        return

    def update(*_: object) -> None:
        net.averaged.update_parameters(net.encoder)

    # Not in forward, which runs for each part of a batch, and in trials of torch.compile before the first step.
    handle = register_optimizer_step_post_hook(update)
    try:
        yield
    finally:
        handle.remove()


def averaged_weights(run: Path) -> Weights:
    """The averaged encoder of a run's or a checkpoint's.

    Raises:
        ValueError: if there is none.
    """
    weights = read_weights(run)
    place = run if (run / checkpoint.META).is_file() else checkpoint.latest(run)
    found = checkpoint.read_tensors(place, "model") if place is not None else {}
    prefix = "averaged.module."
    state = {f"encoder.{n.removeprefix(prefix)}": v for n, v in found.items() if n.startswith(prefix)}
    if not state:
        raise ValueError(f"{run} has no average of its encoder: give a run of `objectives.py ema pretrain`")
    architecture = replace(weights.architecture, decoder_depth=0, decoder_dim=0)
    origin = weights.origin | {"average": "of the weights over the last steps"}
    return replace(weights, state=state, architecture=architecture, origin=origin, names={})


# The command


def settings(parts: Collection[str], flags: Sequence[str]) -> PretrainConfig:
    """Of a run with some parts: a report must not compare its loss with that of mean colours."""
    cfg = load(
        PretrainConfig,
        flags,
        prog=f"objectives.py {'+'.join(parts)} pretrain",
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
    )
    if not set(parts) & {"teacher", *TARGETS}:
        return cfg
    model = cfg.model.model_copy(update={"normalize_target": False})
    return cfg.model_copy(update={"model": model})


def build_model(
    parts: Collection[str], cfg: PretrainConfig, teacher: str | None = None, kept: Path | None = None
) -> FCMAE:
    """The model of the settings, with what they start from, but for some parts.

    Args:
        parts: of PARTS, at most one of them a target.
        cfg: the run's settings.
        teacher: see `Teacher`.
        kept: likewise.
    """
    net = pretraining.build_model(cfg)
    encoder, decoder, target = net.encoder, net.decoder, net.target
    if "teacher" in parts:
        assert teacher is not None
        target = Teacher(teacher, Normalize(*cfg.data.statistics()), kept)
    for name in TARGETS.keys() & parts:
        target = TARGETS[name]
    blank, first = torch.zeros(1, encoder.in_chans, *cfg.data.image_size), torch.zeros(1, dtype=torch.int64)
    num_values = target(blank, first, encoder.total_stride, None).shape[1]
    if "multiscale" in parts:
        decoder = MultiScale(encoder, num_values, cfg.model.decoder_dim, cfg.model.decoder_depth)
    elif target is not net.target:
        decoder = Decoder(encoder.dim, num_values, cfg.model.decoder_dim, cfg.model.decoder_depth)
    net = FCMAE(encoder, decoder, net.make_layout, target)
    pretraining.start(cfg, net)
    return Averaged(net) if "ema" in parts else net


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", help=f"one or more of {', '.join(PARTS)}, with a + between")
    parser.add_argument("command", choices=("pretrain", "average"))
    parser.add_argument("--teacher", help="what fcmae evaluate takes for a model")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="its features by image, made and added to")
    args, flags = parser.parse_known_args(argv)
    parts = args.parts.split("+")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is no part: use one of {', '.join(PARTS)}")
    if len(targets := [part for part in parts if part in ("teacher", *TARGETS)]) > 1:
        parser.error(f"{' and '.join(targets)} are targets, and a run has one")
    if ("teacher" in parts) != (args.teacher is not None):
        parser.error("the part teacher and --teacher MODEL go together")
    if args.kept and not args.teacher:
        parser.error(f"--kept {args.kept} is for the features of a teacher: give --teacher MODEL too")
    try:
        if args.command == "average":
            if len(flags) != 2 or Path(flags[1]).suffix != ".safetensors" or Path(flags[1]).exists():
                parser.error("average takes a run and a new file, such as average.safetensors")
            save_weights(Path(flags[1]), averaged_weights(Path(flags[0])), "fcmae")
            return 0
        cfg = settings(parts, flags)
        net = build_model(parts, cfg, args.teacher, args.kept)
        with averaging(net):
            return pretraining.pretrain(cfg, net).status
    except sqlite3.Error as error:
        parser.error(f"--kept {args.kept} cannot be used ({error}): give another file")
    except (ValueError, OSError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
