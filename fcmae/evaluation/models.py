"""Networks to look at: our weights of any format, timm's models by name, and the same networks untrained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import ConvNeXt
from torch import Tensor, nn

from fcmae.config import FinetuneData
from fcmae.data.augment import seeded
from fcmae.data.dataset import Reading
from fcmae.data.normalize import Normalize
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import describe
from fcmae.weights.convert import build_encoder
from fcmae.weights.files import Weights, read_weights
from fcmae.weights.formats import from_state

logger = logging.getLogger("fcmae")

RANDOM = "random:"  # before a path or timm's name: the same network, untrained


@dataclass(frozen=True)
class Backbone:
    """A dense network that gives features, and how its images are read.

    Attributes:
        name: as it was asked for.
        model: an `Encoder`, which timm's ConvNeXts become too, or another network of timm's without a head; in
            evaluation mode, on the CPU, without gradients.
        reading: how its images are read.
        origin: what the weights were made from.
    """

    name: str
    model: nn.Module
    reading: Reading
    origin: dict[str, Any]

    @property
    def kind(self) -> str:
        """What network it is."""
        return describe(self.model.spec) if isinstance(self.model, Encoder) else self.name.removeprefix(RANDOM)


def load_backbone(
    source: str,
    image_size: tuple[int, int] | None = None,
    in_chans: int | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> Backbone:
    """The network that `source` names.

    Args:
        source: a path (all that `read_weights` reads); or the name of a timm model, with its pretrained weights, which
            may be fetched from the network; or either after "random:", untrained, from seed 0.
        image_size: height and width, where it is not to be that of the weights.
        in_chans: of a timm model, where it is not to be 3.
        key: of a file, see `read_weights`; other sources have none.
        prefix: likewise.

    Raises:
        ValueError: if there is no such model, its weights cannot be had, or it cannot take images of that size.
    """
    is_random = source.startswith(RANDOM)
    name = source.removeprefix(RANDOM)
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir() and (key or prefix):  # of several models that are compared, it is for the files
            logger.warning("%s is a directory: key and prefix are not for it", path)
            key = prefix = None
        weights = read_weights(path, key=key, prefix=prefix)
        backbone = _from_weights(source, weights, is_random, image_size, in_chans)
    elif timm.is_model(name):
        backbone = _from_timm(source, name, is_random, image_size, in_chans)
    else:
        raise ValueError(
            f"model = {source!r} is neither a path nor a model of timm's: give a run, a checkpoint, a directory or "
            f"file of weights, a name that timm.list_models() has, or one of these after {RANDOM}"
        )
    backbone.model.eval().requires_grad_(False)
    _try(backbone)
    return backbone


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
        untrained = Encoder(architecture.spec, architecture.in_chans)
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
    # Networks with a table of positions are built for one size; the others take any, and have no such argument.
    sized = {"img_size": image_size} if image_size and config is not None and config.fixed_input_size else {}
    try:
        with seeded([0]):
            model = timm.create_model(name, pretrained=not is_random, num_classes=0, in_chans=in_chans, **sized)
    except Exception as error:  # whatever timm, the hub's client and its network library raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if is_random:
            raise ValueError(f"model = {source!r} cannot be built ({reason}): give another") from error
        raise ValueError(
            f"model = {source!r}: its pretrained weights cannot be had ({reason}): give a path, or {RANDOM}{name}"
        ) from error
    settings = model.pretrained_cfg
    statistics = FinetuneData(in_chans=in_chans).statistics()
    mean, std = (settings["mean"], settings["std"]) if in_chans == 3 else statistics
    if len(mean) != in_chans:
        raise ValueError(f"in_chans = {in_chans}: timm's models know the mean and std of 1 and 3 channels only")
    size = image_size or tuple(settings["input_size"][1:])
    return Backbone(
        name=source,
        model=_as_ours(model),
        reading=Reading(in_chans, size, settings["crop_pct"], Normalize(mean, std)),
        origin=_random_origin(source) if is_random else {"timm": f"{settings['architecture']}.{settings['tag']}"},
    )


def _as_ours(model: nn.Module) -> Any:
    """timm's ConvNeXt as an `Encoder`, where it is one that we know; others as they are."""
    if not isinstance(model, ConvNeXt):
        return model
    try:
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
        (B, C_i, H_i, W_i) each. Networks without stages give what timm has in their place: a ViT the output of each
        block.
    """
    if isinstance(model, Encoder):
        return [f.permute(0, 3, 1, 2) for f in model.pyramid(images)]
    maps: list[Tensor] = model.forward_intermediates(  # type: ignore[operator]  # timm is not typed
        images, norm=False, intermediates_only=True
    )
    return maps


def _try(backbone: Backbone) -> None:
    """Raise ValueError if the network has no features of stages, or none of images of this size."""
    height, width = backbone.reading.image_size
    if not isinstance(backbone.model, Encoder) and not hasattr(backbone.model, "forward_intermediates"):
        raise ValueError(f"model = {backbone.name!r}: timm does not give the features of its stages: give another")
    image = torch.zeros(1, backbone.reading.in_chans, height, width)
    try:
        maps = stage_maps(backbone.model, image)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ValueError(
            f"model = {backbone.name!r} cannot take images of {height}x{width} pixels "
            f"({' '.join(str(error).split())[:200]}): give another image size"
        ) from error
    if any(0 in found.shape for found in maps):
        raise ValueError(
            f"model = {backbone.name!r} leaves nothing of images of {height}x{width} pixels: give a larger image size"
        )
