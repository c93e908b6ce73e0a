"""Sources of features: our weights in any format, timm's models by name, both untrained, and plain pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.config import usual_statistics
from fcmae.config.base import near_runs
from fcmae.data.augment import Reading, seeded
from fcmae.data.geometry import MAX_PIXELS
from fcmae.data.index import Images
from fcmae.data.source import one_line
from fcmae.data.survey import survey
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import describe
from fcmae.weights.convert import build_encoder
from fcmae.weights.directories import check_timm
from fcmae.weights.files import read_weights
from fcmae.weights.formats import from_state
from fcmae.weights.record import Weights

logger = logging.getLogger("fcmae")

RANDOM = "random:"  # before a path or timm's name: the same network, untrained
PIXELS, HISTOGRAM = "pixels:", "histogram:"  # before a number: features that need no network
MAX_CELLS = 4096  # of a histogram that counts all channels together
SIZE = (224, 224)  # height and width of the images of a control alone, in pixels


@dataclass(frozen=True)
class Backbone:
    """A dense network that gives features, and how its images are read.

    Attributes:
        name: as the user gave it.
        model: an `Encoder`, which timm's ConvNeXts become too, another network of timm's without a head, or a
            `Control`; in evaluation mode, on the CPU, without gradients.
        reading: how its images are read.
        origin: what the weights were made from.
    """

    name: str
    model: nn.Module
    reading: Reading
    origin: dict[str, Any]

    @property
    def kind(self) -> str:
        """The kind of network."""
        return describe(self.model.spec) if isinstance(self.model, StagedEncoder) else self.name.removeprefix(RANDOM)


class Control(nn.Module):
    """A baseline without a network, which a network's features must beat: maps images (B, C, H, W) in 0..1 to (B, D).

    Args:
        name: "pixels:N" for the image averaged to N x N pixels (1 is the mean colour); "histogram:N" for the shares of
            the pixels in N equal bins of a range, jointly over all channels if this makes at most MAX_CELLS cells
            (N ** C), else for each channel.
        mean: of each channel, in units of a full range of 1, if known.
        std: of each channel, in the same units. A histogram's range is 0..1, or mean ± 2 std of each channel if one of
            these is less than a quarter of that or far outside, e.g. for 12 bits stored in 16, or Hounsfield units.

    Raises:
        ValueError: if it is neither, or the number is not at least 1.
    """

    low: Tensor
    high: Tensor

    def __init__(self, name: str, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        super().__init__()
        kind, _, number = name.partition(":")
        if not is_control(name) or not number.isdecimal() or not 1 <= int(number) <= 256:
            raise ValueError(f"model = {name!r}: give a number from 1 to 256, such as {PIXELS}32 or {HISTOGRAM}8")
        self.kind, self.num = kind, int(number)
        middle, reach = torch.tensor(mean), 2 * torch.tensor(std)
        low, high = middle - reach, middle + reach
        if all((2 * reach > 1 / 4) & (low >= -0.5) & (high <= 1.5)):
            low, high = torch.zeros(()), torch.ones(())
        self.register_buffer("low", low.view(-1, 1))
        self.register_buffer("high", high.view(-1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D).

        Raises:
            ValueError: if the images are too small, or their values far from 0..1.
        """
        if self.kind == "pixels":
            if self.num > min(images.shape[2:]):
                raise ValueError(f"they have fewer than {self.num} pixels a side")
            return F.adaptive_avg_pool2d(images, self.num).flatten(1)
        least, most = float(images.min()), float(images.max())
        if self.low.numel() == 1 and self.low == 0 and (least < -0.5 or most > 1.5):
            raise ValueError(
                f"model = {HISTOGRAM}{self.num} counts values from 0 to 1, and the images' reach from {least:.4g} to "
                f"{most:.4g}: give a network with their mean and std beside it, or take {PIXELS}32"
            )
        shares = (images.flatten(2) - self.low) / (self.high - self.low)
        cells = (shares * self.num).long().clamp(0, self.num - 1)  # (B, C, H * W)
        num_cells, num_channels = self.num, images.shape[1]
        if self.num**num_channels <= MAX_CELLS:
            places = self.num ** torch.arange(num_channels, device=images.device)
            cells, num_cells = (cells * places[:, None]).sum(1, keepdim=True), self.num**num_channels  # (B, 1, H * W)
        counts = images.new_zeros(*cells.shape[:2], num_cells)
        counts.scatter_add_(2, cells, images.new_ones(()).expand_as(cells))
        return counts.flatten(1) / cells.shape[2]


def is_control(source: str) -> bool:
    """Whether a name is that of a `Control`."""
    return source.startswith((PIXELS, HISTOGRAM))


def load_backbones(
    sources: Sequence[str],
    images: Images,
    image_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    key: str | None = None,
    prefix: str | None = None,
    nodata: float | None = None,
) -> list[Backbone]:
    """The networks and controls to compare; controls see images as the first network does.

    Args:
        sources: see `load_backbone`.
        images: that controls see; without a network, a sample of them has their channels, mean and std.
        image_size, max_pixels, key, prefix, nodata: see `load_backbone`.

    Raises:
        ValueError: see `load_backbone`; or if controls are alone and no image can be read.
    """
    load = partial(load_backbone, image_size=image_size, max_pixels=max_pixels, key=key, prefix=prefix, nodata=nodata)
    networks = {source: load(source) for source in sources if not is_control(source)}
    first = next((network.reading for network in networks.values()), None)
    if first is None:
        found = survey(images, max_pixels=max_pixels, nodata=nodata, key="data", trains=False)
        first = Reading(found.in_chans, image_size or SIZE, mean=found.mean, std=found.std)
    return [networks.get(source) or load(source, like=first) for source in sources]


def load_backbone(
    source: str,
    image_size: tuple[int, int] | None = None,
    in_chans: int | None = None,
    max_pixels: int = MAX_PIXELS,
    like: Reading | None = None,
    key: str | None = None,
    prefix: str | None = None,
    nodata: float | None = None,
) -> Backbone:
    """The network that `source` names.

    Args:
        source: a path (all that `read_weights` reads); or the name of a timm model, with its pretrained weights, which
            may be fetched from the network; or either after "random:", untrained, from seed 0; or that of a `Control`.
        image_size: height and width; None is that of the weights.
        in_chans: of a timm model or a control; None is 3.
        max_pixels: of an image, see `read_crop`.
        like: how images are read for a control, except that mean and std only fill missing values and give a histogram
            its range; None is SIZE, or `image_size`.
        key: of a file, see `read_weights`; other sources have none.
        prefix: of a file, see `read_weights`; other sources have none.
        nodata: of the images, see `read_crop`; None is that of the weights.

    Raises:
        ValueError: if there is no such model, its weights cannot be obtained or are not finite, or it cannot take
            images of that size.
    """
    is_random = source.startswith(RANDOM)
    name = source.removeprefix(RANDOM)
    path = Path(os.path.expanduser(name))  # noqa: PTH111  # Path's fails of an unknown user
    if is_control(source):
        read = like or Reading(in_chans or 3, image_size or SIZE, mean=(), std=())
        # What is missing is no feature of a control alone.
        plain = replace(read, mean=(0.0,) * read.in_chans, std=(1.0,) * read.in_chans, fill=read.mean or None)
        backbone = Backbone(source, Control(source, read.mean, read.std), plain, {"control": source})
    elif path.exists():
        if path.is_dir() and (key or prefix):  # when several models are compared, it is for the files
            logger.warning("%s is a directory: key and prefix are not for it", path)
            key = prefix = None
        weights = read_weights(path, key=key, prefix=prefix)
        backbone = _from_weights(source, weights, is_random, image_size, in_chans)
    elif timm.is_model(name):
        backbone = _from_timm(source, name, is_random, image_size, in_chans)
    else:
        raise ValueError(
            f"model = {source!r} is neither a path nor a model of timm's: give a run, a checkpoint, a directory or "
            f"file of weights, a name that timm.list_models() has, or one of these after {RANDOM}{near_runs(name)}"
        )
    backbone.model.eval().requires_grad_(False)
    _try(backbone)
    return replace(backbone, reading=backbone.reading.told(max_pixels, nodata))


def choose_device(setting: str) -> torch.device:
    """The accelerator, if there is one, for "auto"; the CPU for "cpu"."""
    if setting == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _from_weights(
    source: str, weights: Weights, is_random: bool, image_size: tuple[int, int] | None, in_chans: int | None
) -> Backbone:
    architecture = weights.architecture
    if in_chans not in (None, architecture.in_chans):
        raise ValueError(
            f"in_chans = {in_chans}, but model = {source!r} is of {architecture.in_chans} channels: leave it out"
        )
    with seeded([0]):
        untrained = make_encoder(architecture.spec, architecture.in_chans)
    return Backbone(
        name=source,
        model=untrained if is_random else build_encoder(weights),
        reading=weights.reading(f"model = {source!r}", image_size),
        origin=_random_origin(source) if is_random else {"format": weights.format, **weights.origin},
    )


def _random_origin(source: str) -> dict[str, Any]:
    return {"untrained": source.removeprefix(RANDOM), "seed": 0}


def _from_timm(
    source: str, name: str, is_random: bool, image_size: tuple[int, int] | None, in_chans: int | None
) -> Backbone:
    in_chans = in_chans or 3
    config = timm.get_pretrained_cfg(name)
    # Networks with position embeddings are built for one size; others take any size, and have no such argument.
    sized = {"img_size": image_size} if image_size and config is not None and config.fixed_input_size else {}
    try:
        with seeded([0]):
            model = timm.create_model(name, pretrained=not is_random, num_classes=0, in_chans=in_chans, **sized)
    except Exception as error:  # whatever timm, the hub's client and its network library raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        if is_random:
            raise ValueError(f"model = {source!r} cannot be built ({reason}): give another") from error
        raise ValueError(
            f"model = {source!r}: its pretrained weights cannot be had ({reason}): give a path, or {RANDOM}{name}"
        ) from error
    settings = model.pretrained_cfg
    mean, std = (settings["mean"], settings["std"]) if in_chans == 3 else usual_statistics(in_chans)
    if len(mean) != in_chans:
        raise ValueError(f"in_chans = {in_chans}: timm's models know the mean and std of 1 and 3 channels only")
    size = image_size or tuple(settings["input_size"][1:])
    return Backbone(
        name=source,
        model=_as_ours(model),
        reading=Reading(in_chans, size, settings["crop_pct"], tuple(mean), tuple(std)),
        origin=_random_origin(source) if is_random else {"timm": f"{settings['architecture']}.{settings['tag']}"},
    )


def _as_ours(model: nn.Module) -> Any:
    """timm's ConvNeXt as an `Encoder`, if it is one that we know; other networks as they are."""
    try:
        check_timm(model, "it")
        architecture, source, state, _ = from_state(model.state_dict())
    except ValueError:  # an overlapping stem, say
        return model
    return build_encoder(Weights(state, architecture, format=source))


def stage_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The output of each stage, first to last, before any final norm.

    Args:
        model: of a `Backbone`.
        images: (B, C, H, W), normalised.

    Returns:
        (B, C_i, H_i, W_i) each; for a control a single one of 1 x 1. Networks without stages give what timm has in
        their place: a ViT gives the output of each block.
    """
    if isinstance(model, Control):
        return [model(images)[:, :, None, None]]
    if isinstance(model, StagedEncoder):
        return [f.permute(0, 3, 1, 2) for f in model.pyramid(images)]
    maps: list[Tensor] = model.forward_intermediates(  # type: ignore[operator]  # timm is not typed
        images, norm=False, intermediates_only=True
    )
    return maps


def _try(backbone: Backbone) -> None:
    """Raise ValueError if the network gives no features of stages, or none for images of this size."""
    height, width = backbone.reading.image_size
    if not isinstance(backbone.model, StagedEncoder | Control) and not hasattr(backbone.model, "forward_intermediates"):
        raise ValueError(f"model = {backbone.name!r}: timm does not give the features of its stages: give another")
    image = torch.zeros(1, backbone.reading.in_chans, height, width)
    try:
        maps = stage_maps(backbone.model, image)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        remedy = "give another image size" + ", or a smaller number" * is_control(backbone.name)
        raise ValueError(
            f"model = {backbone.name!r} cannot take images of {height}x{width} pixels ({one_line(error)}): {remedy}"
        ) from error
    if any(0 in found.shape for found in maps):
        raise ValueError(
            f"model = {backbone.name!r} leaves nothing of images of {height}x{width} pixels: give a larger image size"
        )
