"""What runs on labelled images start from: weights, how their images are read, the optimizer, weights of classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fcmae.config import DenseConfig
from fcmae.heads import Classifier, Segmenter
from fcmae.networks.encoder import layer_of, num_layers
from fcmae.networks.spec import describe, variant_of
from fcmae.training import optim
from fcmae.weights.convert import adapt_in_chans
from fcmae.weights.files import Weights, read_weights
from fcmae.weights.formats import Architecture

logger = logging.getLogger("fcmae")


def starting_weights(cfg: DenseConfig) -> Weights:
    """What `model.init` names; without tensors from scratch.

    Raises:
        ValueError: if it does not fit the settings.
    """
    if cfg.model.init is None:
        assert cfg.model.spec is not None  # the settings have seen to it
        return Weights({}, Architecture(cfg.model.spec, cfg.data.in_chans))
    path = Path(cfg.model.init)
    if not path.exists():
        raise ValueError(
            f"model.init = {path} does not exist: give a run, a checkpoint, a directory or a file of weights"
        )
    weights = read_weights(path, key=cfg.model.key, prefix=cfg.model.prefix)
    held = weights.architecture
    if cfg.model.stem_stride not in (None, held.spec.stem_stride):
        raise ValueError(
            f"model.stem_stride = {cfg.model.stem_stride}, but model.init = {path} has {held.spec.stem_stride}: "
            f"set it to {held.spec.stem_stride}"
        )
    asked = None if cfg.model.spec is None else cfg.model.spec.model_copy(update={"stem_stride": held.spec.stem_stride})
    if asked not in (None, held.spec):
        remedy = variant_of(held.spec) or "none, which takes that of model.init"
        found = describe(held.spec)
        raise ValueError(f"model.variant = {describe(asked)}, but model.init = {path} has {found}: set it to {remedy}")
    if cfg.data.in_chans != held.in_chans:
        if cfg.eval_only or held.in_chans != 3:
            raise ValueError(
                f"data.in_chans = {cfg.data.in_chans}, but model.init = {path} has {held.in_chans}: "
                f"set it to {held.in_chans}"
            )
        weights = adapt_in_chans(weights, cfg.data.in_chans)
        logger.info("the stem of %s, for 3 channels, was adapted to %d", path, cfg.data.in_chans)
    return weights


def image_settings(cfg: DenseConfig, weights: Weights) -> dict[str, Any]:
    """Mean, std and input size: the settings', else those that the weights were trained with.

    The size of the weights is taken only to evaluate them as they are.

    Raises:
        ValueError: if neither side has the mean and std of images that are not grey or RGB.
    """
    (mean, std), size = cfg.data.statistics(), [cfg.data.in_chans, *cfg.data.image_size]
    if cfg.data.mean is None and "mean" in weights.image:
        mean, std = weights.image["mean"], weights.image["std"]
    if len(mean) != cfg.data.in_chans:
        raise ValueError(
            f"data.mean is missing for in_chans = {cfg.data.in_chans}, and model.init does not hold it: "
            "compute it with `fcmae stats`"
        )
    if cfg.eval_only and "image_size" not in cfg.data.model_fields_set:
        size = list(weights.image.get("input_size", size))
    return {"input_size": size, "mean": list(mean), "std": list(std)}


def build_optimizer(cfg: DenseConfig, net: Classifier | Segmenter) -> torch.optim.AdamW:
    """AdamW on the model's parameters, each layer at its rate."""
    spec, mode = net.encoder.spec, cfg.optim.layer_decay_mode
    layer = partial(layer_of, spec=spec, mode=mode)
    scale = optim.layer_decay_scale(layer, num_layers(spec, mode), cfg.optim.layer_decay)
    groups = optim.parameter_groups(net, cfg.optim.weight_decay, scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.optim.betas, fused=True)


def class_weights(setting: str | list[float], counts: Sequence[int] | NDArray[np.int64]) -> list[float]:
    """Weights of the classes in the loss.

    Args:
        setting: one weight a class; or "balanced", inverse to their frequency, with a mean of 1 over what is counted.
        counts: (classes,), how often each is there: images or pixels.

    Raises:
        ValueError: if a list has not one weight a class.
    """
    if isinstance(setting, str):
        balanced: list[float] = (np.sum(counts) / (len(counts) * np.maximum(counts, 1))).tolist()
        return balanced
    if len(setting) != len(counts):
        raise ValueError(
            f"regularization.class_weights has {len(setting)} values for {len(counts)} classes: give one a class"
        )
    return setting
