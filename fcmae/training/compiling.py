"""torch.compile as the settings ask for it, or where trying shows that it pays."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

logger = logging.getLogger("fcmae")

Setting = bool | Literal["auto", "cudagraphs"]

# Compiling takes a minute or two and saves a fifth or so: a run that would be over in ten minutes cannot win.
LEAST_RUN_S = 600
TIMED = 3


def compile_model(net: nn.Module, setting: Setting, step: Callable[[], None], num_steps: int) -> None:
    """Compile `net` in place or leave it as it is.

    setting: True and False are what they say; "cudagraphs" also records the kernels of a step and replays them, which
    saves the host's time a kernel; "auto" times a few steps of both kinds if the run is long enough. step: forward and
    backward on a part of a batch as the run will see them; its gradients are dropped. num_steps: as many as the run has
    left. Of
    several processes the first decides. Raises ValueError for "cudagraphs" without a GPU.
    """
    if setting == "cudagraphs":
        if not torch.cuda.is_available():
            raise ValueError("model.compile = cudagraphs needs a GPU, and torch finds none: use true or auto")
        net.compile(mode="reduce-overhead")
    elif setting is True or (setting == "auto" and _pays(net, step, num_steps)):
        net.compile()


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _pays(net: nn.Module, step: Callable[[], None], num_steps: int) -> bool:
    """Whether a compiled step is shorter than an eager one. Leaves `net` eager."""

    def seconds() -> float:
        wait()
        start = time.perf_counter()
        step()
        wait()
        elapsed = time.perf_counter() - start
        net.zero_grad()
        return elapsed

    seconds()  # memory is allocated and kernels are chosen
    eager = statistics.median(seconds() for _ in range(TIMED))
    tries = [eager * num_steps >= LEAST_RUN_S]
    broadcast_object_list(tries)
    if not tries[0]:
        logger.info("compile: no, the run takes about %.0f s and compiling a minute or two", eager * num_steps)
        return False
    net.compile()
    first = compiled = math.inf
    try:
        first = seconds()
        compiled = statistics.median(seconds() for _ in range(TIMED))
    except Exception as error:  # whatever the compilers on this machine run into: it is no reason not to train
        logger.warning("compile: it fails here (%s), see fcmae doctor", " ".join(str(error).split())[:200])
        net.zero_grad()
    net._compiled_call_impl = None  # the way back, which torch does not offer
    pays = [compiled < eager]
    broadcast_object_list(pays)
    message = "compile: %s, forward and backward take %.0f ms compiled (after %.0f s) and %.0f ms as it is"
    logger.info(message, "yes" if pays[0] else "no", 1000 * compiled, first, 1000 * eager)
    return pays[0]
