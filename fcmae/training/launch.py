"""The processes of a run: their devices and precision, what all of them know, and how they end together."""

from __future__ import annotations

import atexit
import os
import random
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import nn

from fcmae.config import RunConfig
from fcmae.data.cores import all_processes
from fcmae.data.loader import end_workers
from fcmae.training.messages import last_words
from fcmae.training.signals import StopSignal

FOREVER = timedelta(days=7)
PATIENCE = timedelta(hours=1)  # of a collective: others may wait for images of a storage that is down for a while
AT_A_TIME = 16  # items that a process sends
STORE_S = 60.0  # that an answer of the store may take on a busy machine
ENDED = "a process of the run has ended: see what it said"
_ALONE = threading.Lock()  # held by a run for a caller
# Attributes of a module that accelerate and `torch.nn.Module.compile` set.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared", "_compiled_call_impl")
# Where torch keeps whether float32 may be computed in TF32.
_PRECISIONS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
)

Found = TypeVar("Found")


def uses_cpu(cfg: RunConfig) -> bool:
    """Whether a run computes on the CPU."""
    return cfg.device == "cpu" or not torch.accelerator.is_available()


def make_accelerator(cfg: RunConfig) -> Accelerator:
    """accelerate's view of the devices, for cfg.device, cfg.precision and the trackers.

    It forgets those of a run before in this process, which may have computed elsewhere or in another precision, and
    what the environment says to accelerate: the settings hold.

    Raises:
        ValueError: for fp16 and tf32 on a CPU, for a tracker that is not there, where the environment asks for shards
            of the model, for more processes than GPUs, and where one of several processes finds no GPU: others that do
            would wait for it in vain.
    """
    cpu, num_processes = uses_cpu(cfg), all_processes()
    if cpu and cfg.device != "cpu" and num_processes > 1:
        raise ValueError(
            f"device = {cfg.device}: process {os.environ.get('RANK', '0')} of {num_processes} finds no GPU that torch "
            "can use: mend that there, or give all of them --device cpu"
        )
    # Not all launchers say how many there are; the last of them knows it by its own number.
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1 + int(os.environ.get("LOCAL_RANK", "0")))
    if not cpu and 1 < (there := torch.cuda.device_count()) < here:  # one is what may be shown to each process
        raise ValueError(f"{here} processes or more on this machine, and torch finds {there} GPUs: start {there}")
    precision = {"fp32": "no", "tf32": "no", "auto": "no"}.get(cfg.precision, cfg.precision)
    # GPUs without bf16 emulate it, slower than float32.
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.precision == "auto" and not cpu and has_bf16:
        precision = "bf16"
    if cpu and cfg.precision in ("fp16", "tf32"):
        raise ValueError(f"precision = {cfg.precision} needs a GPU: use fp32 or bf16 on a CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()  # a loop that was interrupted may have left it between the micro-batches of a step
    # Explicit, as torch's own default has TF32 in convolutions and not in matrix products.
    torch.set_float32_matmul_precision("high" if cfg.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = cfg.precision == "tf32"
    if num_processes > 1:
        # DDP remarks on the strides of depthwise weights' gradients, in their dimension of size 1: they cost nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    _check_trackers(cfg.log.trackers)
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"ACCELERATE_USE_{name} is set in the environment, as accelerate's launcher does, and fcmae has each "
                "process hold the whole model: unset it, or launch with --multi_gpu"
            )
    # Steps of accumulation, precision, device, compiler: accelerate reads them there now and while it trains.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=cfg.log.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(cfg.out), logging_dir=f"{cfg.out}/tensorboard"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


@contextmanager
def giving_back(model: nn.Module) -> Iterator[None]:
    """Around a run: precision and compilation of its model end with it, so that another run has its own.

    Args:
        model: that is trained, from here on in training mode and without gradients that it was given with.
    """
    model.train()
    model.zero_grad()
    own = vars(model)
    before = {name: own[name] for name in _PREPARED if name in own}
    try:
        yield
    finally:
        for name in _PREPARED:
            own.pop(name, None)
        own |= before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside the block.

    Args:
        model: that is trained, perhaps.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse those that accelerate would leave out without a word, which shows when the run has no curves."""
    if "all" in names:
        return
    there = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"log.trackers: {name} is none of accelerate's: {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in there:
            raise ValueError(f"log.trackers: {name} is not installed: `pip install {name}`, or leave it out")


def same_everywhere(accelerator: Accelerator, find: Callable[[], Found]) -> Found:
    """What the first process finds, sent to all.

    Args:
        accelerator: of the processes.
        find: called in the first one, for as long as it takes: the index of many images on slow storage.
    """
    with waiting_for_all(accelerator):
        found: list[Any] = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    result: Found = found[0]
    return result


def sent_to_first(accelerator: Accelerator, own: Sequence[Found]) -> list[Found]:
    """The items of all processes, in the first one; none in the others.

    Sent some at a time, as NCCL has all that is sent at once on each GPU.

    Args:
        accelerator: of the processes.
        own: items of this one.
    """
    if accelerator.num_processes == 1:
        return list(own)
    found: list[Found] = []
    for start in range(0, max(gather_object([len(own)])), AT_A_TIME):
        parts: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
        torch.distributed.gather_object(list(own[start : start + AT_A_TIME]), parts)
        found += chain.from_iterable(parts or ())
    return found


@contextmanager
def waiting_for_all(accelerator: Accelerator) -> Iterator[None]:
    """Around what takes one process longer than others: these wait at its end, where a collective gives up in minutes.

    Args:
        accelerator: of the processes.
    """
    key = _new_key(accelerator)
    yield
    if accelerator.num_processes > 1:
        store = _store()
        store.set(f"{key}/{accelerator.process_index}", "")
        store.wait([f"{key}/{process}" for process in range(accelerator.num_processes)], FOREVER)


def share_buffers(model: nn.Module) -> None:
    """Give a model the first process's buffers, those that are exported: BatchNorm's statistics are each process's own.

    Args:
        model: on every process, which all call this.
    """
    for buffer in model.buffers():
        broadcast(buffer)


def _new_key(accelerator: Accelerator) -> str:
    """A key of the store that no earlier start has used; each launcher counts its starts by itself."""
    return str(broadcast_object_list([f"fcmae/{secrets.token_hex(8)}"])[0]) if accelerator.num_processes > 1 else ""


def _store() -> Any:
    """What the processes of a run share beside their collectives."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]


@contextmanager
def for_a_caller() -> Iterator[None]:
    """Leave accelerate's state, what the environment says to it, torch's precision, and what is drawn as they were.

    For a run in a process that trains by itself too. Processes that a launcher joined stay as the run has them: they
    cannot be joined twice.

    Raises:
        ValueError: if another run is going on in this process, with which it would share all that.
    """
    if not _ALONE.acquire(blocking=False):
        raise ValueError("another run is going on in this process: wait for its end, or start a process for each")
    try:
        with _left_as_it_was():
            yield
    finally:
        _ALONE.release()


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """See `for_a_caller`."""
    if all_processes() > 1:
        yield
        return
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    environment = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    precision, precisions = None, [place.fp32_precision for place in _PRECISIONS]
    has_tf32 = True  # torch's default
    with suppress(RuntimeError):  # where the caller has set these, torch does not say them in one word
        precision = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        has_tf32 = torch.backends.cudnn.allow_tf32
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    has_drawn, seed = torch.cuda.is_initialized(), torch.initial_seed()  # type: ignore[no-untyped-call]
    drawn_there = torch.cuda.get_rng_state_all() if has_drawn else []
    # A notebook may have other ones for all that follows; what is drawn and read is on the CPU.
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        with on_cpu, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        torch.set_rng_state(drawn[2])
        if has_drawn:
            torch.cuda.set_rng_state_all(drawn_there)
        else:
            torch.cuda.manual_seed_all(seed)  # which waits until a GPU is used
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)
        os.environ |= environment
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        # A word that torch keeps beside those below: where they contradict it, an export raises.
        torch.backends.cudnn.allow_tf32 = has_tf32
        for place, kept in zip(_PRECISIONS, precisions, strict=True):
            place.fp32_precision = kept


@contextmanager
def ending_together(accelerator: Accelerator, out: Path | None) -> Iterator[None]:
    """Have the error of one process end all of a run, each with its sentence.

    The others may wait for it in a collective, where no signal reaches them.

    Args:
        accelerator: of the processes.
        out: directory of the run, the same in all.

    Raises:
        ChildProcessError: if another process failed.
    """
    if accelerator.num_processes == 1:
        yield
        return
    store, left, key = _store(), threading.Event(), _new_key(accelerator)

    def told() -> str | None:
        with suppress(RuntimeError):  # the store went with the process that kept it
            return store.get(key).decode() if store.check([key]) else None
        return ENDED

    def watch() -> None:
        while not left.wait(1):
            if (sentence := told()) and not left.wait(StopSignal.GRACE_S):
                last_words(sentence, f"fcmae: error: {sentence}\n")
                end_workers()
                os._exit(2)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        left.set()
        # It may be what a collective says where another process has ended.
        if isinstance(error, RuntimeError) and (sentence := told() or (ENDED if "by peer" in str(error) else None)):
            raise ChildProcessError(sentence) from error
        with suppress(RuntimeError):  # as above
            store.set(key, f"process {accelerator.process_index} failed: {str(error) or type(error).__name__}")
        raise
    finally:
        left.set()
        # A thread that comes out of torch's C++ code when the interpreter is gone aborts the process.
        watching.join(STORE_S)


@contextmanager
def closing_trackers(accelerator: Accelerator) -> Iterator[None]:
    """Close the trackers of a run however it ends, so that the next one in this process has its own."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def finish(accelerator: Accelerator, stop: StopSignal) -> None:
    """End a run: tell all processes of a signal to one.

    The processes stay joined until they end, for another run of the same script: they cannot be joined twice.

    Args:
        accelerator: of the processes.
        stop: the signals of this one; of a signal to another alone, it has that one's then.
    """
    if accelerator.num_processes > 1:
        received = gather_object([stop.received])
        stop.received = stop.received or next(filter(None, received), None)
        atexit.register(_part)


def _part() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
