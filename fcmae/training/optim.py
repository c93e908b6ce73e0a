"""Parameter groups, the learning rate, and when what happens in a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# GRN's gamma and beta are 4-D in the released shape, so a rule on dimensions misses them.
NO_DECAY = re.compile(r"(^|\.)(mask_token|gamma|beta)$|\.grn\.")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_scale: Callable[[str], float] | None = None,
    first_step: Callable[[str], int] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW: no decay on biases, norms, LayerScale, GRN and the mask token.

    Args:
        model: whose parameters they are; those that need no gradient are left out.
        weight_decay: of the others.
        lr_scale: factor on the learning rate of the parameter of that name; None is 1 for all.
        first_step: the step from which it learns; None is 0 for all.

    Returns:
        The groups, each with "lr_scale" and "first_step", for `set_learning_rate`.
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


def layer_decay_scale(layer_of: Callable[[str], int], top: int, decay: float) -> Callable[[str], float]:
    """Learning-rate factor of each parameter, by name: decay ** (layers above it).

    Args:
        layer_of: the layer of a parameter, from 0 at the bottom, as its network defines layers.
        top: the layer of norm and head, whose factor is 1.
        decay: factor from each layer to the one below it.
    """
    return lambda name: decay ** (top - layer_of(name))


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `minimum`; a pure function of the step.

    Args:
        step: 0 at the first optimizer step.
        peak: the rate at the end of the warm-up.
        minimum: the rate at the end of the run.
        warmup_steps: at which the warm-up ends and the cosine starts.
        total_steps: of the run.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """When what happens in a run, in steps: pure functions of how many are done.

    Attributes:
        start: steps that were done before.
        per_epoch: steps of an epoch.
        total: steps of the run.
        peak_lr: learning rate at the end of the warm-up.
        min_lr: that the cosine ends at, one step after the last.
        warmup: steps of the warm-up.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations, which may be fractional.
        save_every: likewise between checkpoints.
        milestone_every: steps between checkpoints that stay, 0 for none.
    """

    start: int
    per_epoch: int
    total: int
    peak_lr: float
    min_lr: float
    warmup: int
    log_every: int
    eval_every: float
    save_every: float
    milestone_every: int

    def epoch(self, step: int) -> float:
        """After how many epochs so many steps are done; 0 in a run that only evaluates."""
        return step / self.per_epoch if self.per_epoch else 0.0

    def learning_rate(self, step: int) -> float:
        """Of the step after `step` steps."""
        return learning_rate(
            step, peak=self.peak_lr, minimum=self.min_lr, warmup_steps=self.warmup, total_steps=self.total
        )

    def logs(self, done: int) -> bool:
        """Whether a line is due after `done` steps."""
        return done % self.log_every == 0

    def evaluates(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps."""
        return due(done, self.eval_every, self.total)

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        at_milestone = self.milestone_every > 0 and done % self.milestone_every == 0
        return at_milestone or due(done, self.save_every, self.total)


def due(done: int, every: float, total: int) -> bool:
    """Whether what happens every so many steps is due now, or the end is reached.

    Args:
        done: steps that are done.
        every: steps between, which may be fractional; due where `done` has just reached a multiple of it.
        total: steps of the run.
    """
    # The small term keeps a multiple that is whole in decimals whole in binary: 23 / (.1 * 23) is just below 10.
    return done == total or math.floor(done / every + 1e-9) > math.floor((done - 1) / every + 1e-9)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Give every group its learning rate for one step.

    At a rate of 0 AdamW changes no weight, but its moments follow the gradients, so they are warm when learning starts.

    Args:
        optimizer: of `parameter_groups`.
        lr: what a group gets times its "lr_scale", or 0 before its "first_step".
        step: 0 at the first optimizer step.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if step >= group["first_step"] else 0.0
