"""Parameter groups and the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# GRN's gamma and beta (weight and bias in timm) are 4-D in the released shape, so a rule on dimensions misses them.
NO_DECAY = re.compile(r"(^|\.)(mask_token|gamma|beta)$|\.grn\.")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_scale: Callable[[str], float] | None = None,
    first_step: Callable[[str], int] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW: no decay on biases, norms, LayerScale, GRN and the mask token.

    lr_scale: factor on the learning rate of the parameter of that name; None is 1 for all. first_step: the step from
    which it learns; None is 0 for all. Each group carries both under these names, for `set_learning_rate`. Parameters
    that need no gradient are left out.
    """
    groups: dict[tuple[float, float, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or NO_DECAY.search(name) else weight_decay
        scale = lr_scale(name) if lr_scale else 1.0
        first = first_step(name) if first_step else 0
        settings = {"weight_decay": decay, "lr_scale": scale, "first_step": first}
        groups.setdefault((decay, scale, first), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def layer_decay_scale(depths: tuple[int, ...], decay: float, mode: str) -> Callable[[str], float]:
    """Learning-rate factor of each parameter of a timm ConvNeXt: decay ** (layers above it).

    depths: blocks a stage. mode: "single" gives every block a layer of its own, a downsampling layer that of the block
    after it. "group" makes each of stages 0 and 1 a layer, then one of every three blocks of stage 2, then one of
    stage 3; the stem is below them all. With depths 3 3 27 3 these are the released recipes' 12 groups.
    The head is the top layer, with factor 1.
    """
    top = sum(depths) + 1 if mode == "single" else 4 + math.ceil(depths[2] / 3)

    def layer(name: str) -> int:
        if name.startswith("stem."):
            return 1 if mode == "single" else 0
        match = re.match(r"stages\.(\d)\.(?:(downsample)|blocks\.(\d+))\.", name)
        if match is None:
            return top
        stage, block = int(match[1]), int(match[3] or 0)
        if mode == "single":
            return sum(depths[:stage]) + block + 1
        return (1, 2, 3 + block // 3, top - 1)[stage]

    return lambda name: decay ** (top - layer(name))


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `minimum`; a pure function of the step.

    step: 0 at the first optimizer step. The warm-up ends, and the cosine starts, at step = warmup_steps.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Give every group `lr` times its "lr_scale", or 0 before its "first_step".

    At a rate of 0 AdamW changes no weight, but its moments follow the gradients, so they are warm when learning starts.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if step >= group["first_step"] else 0.0
