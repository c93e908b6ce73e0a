"""Datasets to batches, with or without worker processes."""

from __future__ import annotations

import atexit
import logging
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from multiprocessing.process import BaseProcess
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae.data.augment import Reading
from fcmae.data.cores import (
    FEW_FILES,
    SHARED_MEMORY,
    allow_open_files,
    core_time,
    end_with_parent,
    local_processes,
    num_cores,
)
from fcmae.data.dataset import Batch, Sample, centre_crops, collate
from fcmae.data.index import Images
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import Key, evaluation_batches

logger = logging.getLogger("fcmae")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # Ctrl-C, and what ends a job

_WORKERS = WeakSet[BaseProcess]()  # those that loaders here have started
LOST = ("DataLoader worker", "Pin memory thread")  # begins what torch says where a worker was killed


class Loader(DataLoader[Batch]):
    """A DataLoader that says in a sentence that one of its workers was killed, where it is asked for a batch."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches.

        Raises:
            ChildProcessError: if a worker was killed.
        """
        batches = self._start()
        _WORKERS.update(getattr(batches, "_workers", ()))
        if self.num_workers == 0:
            yield from batches
            return
        try:
            for batch in batches:
                if batch.was_piped:
                    _tell_once(
                        "images come from the workers through pipes, which is slower, as %s has no room or too few "
                        "files may be open: docker run --shm-size 2g, ulimit -n 4096",
                        SHARED_MEMORY,
                    )
                yield batch.unpacked()
        except (RuntimeError, ConnectionError, EOFError) as error:
            # What DataLoader says of it, or the end of a connection over which a batch was on its way.
            raised_by_data = "in DataLoader worker process" in str(error)
            if raised_by_data or (isinstance(error, RuntimeError) and not str(error).startswith(LOST)):
                raise
            raise ChildProcessError(
                "a process that decodes images was killed, most often by the system for want of memory: lower "
                f"num_workers (it is {self.num_workers}), or store the images smaller"
            ) from error

    def _start(self) -> Iterator[Batch]:
        in_charge = threading.current_thread() is threading.main_thread()
        previous = signal.getsignal(signal.SIGCHLD)
        # A new worker must not take a signal in this process's stead, before it knows to ignore it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            # DataLoader's handler raises wherever the main thread is, in the middle of saving too.
            if in_charge:
                signal.signal(signal.SIGCHLD, previous)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def build_loader(
    dataset: Dataset[Sample], batch_sampler: Iterable[list[Key]], *, num_workers: int | None, device_type: str
) -> DataLoader[Batch]:
    """A loader of Batch objects, one for each list of keys. The global random generators are left alone.

    Args:
        dataset: samples by key.
        batch_sampler: lists of keys, in whose order the batches come.
        num_workers: processes that decode, see `choose_num_workers`; 0 decodes in this one. The batches are the same
            for any number.
        device_type: of what computes; "cuda" pins the batches.
    """
    num_workers = choose_num_workers(num_workers, device_type)
    if num_workers > 0:
        atexit.unregister(end_workers)
        atexit.register(end_workers)
        allow_open_files()
    return Loader(
        dataset,  # type: ignore[arg-type]  # collate makes a Batch of Samples
        batch_sampler=batch_sampler,
        collate_fn=_collate_and_send if num_workers > 0 else collate,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers > 0 else None,  # they share the index with this process
        pin_memory=device_type == "cuda",
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        worker_init_fn=_init_worker if num_workers > 0 else None,
        # Each iterator draws a seed for its workers. From torch's global generator, that would change what follows.
        generator=torch.Generator(),
    )


@cache
def _tell_once(message: str, *args: object) -> None:
    logger.info(message, *args)


def _collate_and_send(samples: Sequence[Sample]) -> Batch:
    """A batch on its way, through shared memory where there is room.

    It is put there now: the thread that feeds a worker's queue would drop what fails, and be waited for for ever. Half
    of what is free is left to others, such as the locks of further workers.
    """
    batch = collate(samples)
    # Where there is no such folder, the system keeps it elsewhere.
    has_room = not SHARED_MEMORY.exists() or shutil.disk_usage(SHARED_MEMORY).free > 2 * batch.images.nbytes
    if has_room and allow_open_files() >= FEW_FILES:
        with suppress(RuntimeError):
            return batch.packed(share=True)
    return batch.packed(share=False)


def _init_worker(worker: int) -> None:
    # Ctrl-C and a cluster's stop reach every process of the job. The main process finishes its step, for which it needs
    # its workers; they end with it. DataLoader has set torch to one thread, and Pillow has no more.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # DataLoader's workers look for their parent between two batches only: one whose read hangs would stay for ever.
    end_with_parent()


def end_workers() -> None:
    """Kill the processes that decode.

    At exit, multiprocessing asks those that are left to end with SIGTERM, which they ignore, and waits for them: after
    an error, or where a read hangs, it would wait for ever. They hold nothing that could be lost.
    """
    for worker in list(_WORKERS):
        worker.kill()


def evaluation_loader(
    reading: Reading,
    images: Images,
    batch_size: int,
    *,
    num_workers: int | None,
    device_type: str,
    rank: int = 0,
    num_processes: int = 1,
) -> DataLoader[Batch]:
    """This process's share of all images, in order, as a network that is not being trained takes them.

    Args:
        reading: how they are read.
        images: all.
        batch_size: images at a time.
        num_workers: see `build_loader`; None is none for a single batch.
        device_type: of what computes.
        rank: of this process.
        num_processes: that share the images.
    """
    if num_workers is None and len(images) <= batch_size:
        num_workers = 0
    keys = evaluation_batches(len(images), batch_size, rank, num_processes)
    return build_loader(centre_crops(reading, images), keys, num_workers=num_workers, device_type=device_type)


def readable(batches: Iterable[Batch], normalize: Normalize) -> Iterator[tuple[Tensor, Batch]]:
    """Batches as a network that is not being trained takes them, without images that could not be read.

    Args:
        batches: see `evaluation_loader`.
        normalize: on the device where the images go.

    Yields:
        The images (B, C, H, W), normalised on the device, and the batch as it was read. Images that could not be read
        are left out of both, so that B may be 0; the batch lists them in `bad`.
    """
    for batch in batches:
        valid = batch.select(batch.valid)
        yield normalize(valid.images.to(normalize.mean.device, non_blocking=True)), valid


def choose_num_workers(setting: int | None, device_type: str) -> int:
    """Processes that decode for one training process.

    One worker crops some 600 photographs of 500 x 375 pixels a second (benchmarks/input_pipeline.py), about twenty
    times what atto trains on two cores.

    Args:
        setting: data.num_workers, of which not more than the process's share of the cores are of use; None is 1 on a
            CPU, which the model needs itself, else this process's share of the cores, up to 8.
        device_type: of what computes.
    """
    if setting is not None:
        most = max(1, num_cores() // local_processes())
        if setting > most:
            _tell_once("num_workers is %d for %d cores a process: %d are started", setting, most, most)
        return min(setting, most)
    if device_type == "cpu":
        return 1
    return max(1, min(8, int(core_time() / local_processes())))


def prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device. On CUDA the next one is copied, on a stream of its own, while the device computes.

    Args:
        batches: pinned for CUDA, as `build_loader` makes them; on CUDA one more is read than was asked for.
        device: where they go.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream, ready = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
    for batch in chain(batches, [None]):
        following = None
        if batch is not None:
            with torch.cuda.stream(stream):
                following = batch.to(device), stream.record_event()
        if ready is not None:
            moved, arrived = ready
            # Not wait_stream, which would wait for the copy of the following batch as well.
            torch.cuda.current_stream(device).wait_event(arrived)
            moved.record_stream(torch.cuda.current_stream(device))
            yield moved
        ready = following
