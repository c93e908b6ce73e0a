"""torch.compile as the settings ask for it, or where trying shows that it pays."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from fcmae.data.source import one_line
from fcmae.timing import in_turn, seconds

logger = logging.getLogger("fcmae")

Setting = bool | Literal["auto", "cudagraphs"]

# Compiling takes a minute or two and saves a fifth or so: a run that would be over in ten minutes cannot win.
LEAST_RUN_S = 600
TIMED = 3


def compile_model(net: nn.Module, setting: Setting, step: Callable[[], None], num_steps: int) -> None:
    """Compile `net` in place or leave it as it is.

    Of several processes the first decides.

    Args:
        net: what is compiled.
        setting: True and False are what they say; "cudagraphs" also records the kernels of a step and replays them,
            which saves the host's time a kernel; both are tried before training starts; "auto" times a few steps of
            both kinds if the run is long enough.
        step: forward and backward on a micro-batch as the run will see it; its gradients are dropped.
        num_steps: as many as the run has left.

    Raises:
        ValueError: for "cudagraphs" without a GPU, and for both where compiling fails.
    """
    if setting is False:
        return
    if setting == "cudagraphs" and not torch.cuda.is_available():
        raise ValueError("model.compile = cudagraphs needs a GPU, and torch finds none: use true or auto")
    # After a run of another image size in this process torch would compile for any size, for minutes on end.
    torch.compiler.reset()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}  # which a trial on noise changes
    if setting == "auto":
        if _pays(net, step, num_steps):
            net.compile()
    else:
        net.compile(mode="reduce-overhead" if setting == "cudagraphs" else None)
        try:
            step()
        except torch.OutOfMemoryError:
            pass  # the first step is taken again in smaller ones
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(
                f"model.compile = {str(setting).lower()} fails here ({_reason(error)}): install a C++ compiler "
                "(see fcmae doctor), or set model.compile to false or auto"
            ) from error
        net.zero_grad()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])


def _reason(error: Exception) -> str:
    return one_line(str(error).partition("\n\n")[0])


def _pays(net: nn.Module, step: Callable[[], None], num_steps: int) -> bool:
    """Whether a compiled step is shorter than an eager one. Leaves `net` eager."""

    device = next(net.parameters()).device

    def trial() -> None:
        step()
        net.zero_grad()

    eager = 0.0  # where a micro-batch does not fit, which the first step will find too and take smaller ones
    with suppress(torch.OutOfMemoryError):
        eager = statistics.median(in_turn({"eager": trial}, TIMED, device=device)["eager"])
    net.zero_grad()
    tries = [eager * num_steps >= LEAST_RUN_S]
    broadcast_object_list(tries)
    if not tries[0]:
        why = f"the run takes about {eager * num_steps:.0f} s and compiling a minute or two"
        logger.info("compile: no, %s", why if eager else "a micro-batch does not fit into memory")
        return False
    net.compile()
    compiled_call = net._compiled_call_impl

    def as_it_is() -> None:
        net._compiled_call_impl = None
        trial()
        net._compiled_call_impl = compiled_call

    first = compiled = math.inf
    try:
        first = seconds(trial, device)
        times = in_turn({"eager": as_it_is, "compiled": trial}, TIMED, warmup=0, device=device)
        eager, compiled = map(statistics.median, times.values())
    except Exception as error:  # whatever the compilers on this machine run into: it is no reason not to train
        logger.warning("compile: it fails here (%s), see fcmae doctor", _reason(error))
        net.zero_grad()
    net._compiled_call_impl = None  # the way back, which torch does not offer
    pays = [compiled < eager]
    broadcast_object_list(pays)
    message = "compile: %s, forward and backward take %.0f ms compiled (after %.0f s) and %.0f ms as it is"
    logger.info(message, "yes" if pays[0] else "no", 1000 * compiled, first, 1000 * eager)
    return pays[0]
