"""The order of the samples: a function of (seed, epoch), whose position is one integer, the step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]  # (epoch, index): all that a sample depends on besides the run's seed

# Held-out images belong to no epoch: one that training never reaches keeps their masks apart from it.
EVAL_EPOCH = 2**32 - 1

# Random streams start from (seed, epoch, index, stream). numpy pads seeds with zeros, so stream 0 is (seed, epoch,
# index) itself, from which masks are drawn; the others must not be 0. Further masks of an image add their number, 1
# and so on.
SAMPLE_STREAM = 1
ORDER_STREAM = 2
MASK_STREAM = 3


def epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int32 | np.int64]:
    """The order of the images in an epoch, the same in every process.

    Args:
        num_images: of the training set.
        seed: of the run.
        epoch: from 0.

    Returns:
        A permutation of range(num_images), of 32 bits where they suffice.
    """
    order = np.arange(num_images, dtype=np.int32 if num_images < 2**31 else np.int64)
    np.random.default_rng([seed, epoch, 0, ORDER_STREAM]).shuffle(order)  # as its permutation(num_images) is drawn
    return order


def steps_per_epoch(num_images: int, batch_size: int, masks_per_image: int = 1) -> int:
    """Whole batches in an epoch, one pass over the images.

    Args:
        num_images: of the training set.
        batch_size: images of a step, each as often as it has masks.
        masks_per_image: how often that is.

    Raises:
        ValueError: if there are fewer than a batch takes.
    """
    if num_images * masks_per_image < batch_size:
        raise ValueError(
            f"batch_size: {batch_size} is more than the {num_images} training images"
            f"{f' under {masks_per_image} masks each' if masks_per_image > 1 else ''}: "
            f"use at most {num_images * masks_per_image}, or give more images"
        )
    return num_images * masks_per_image // batch_size


class StepSampler:
    """Keys of the training samples from step start_step up to end_step, for DataLoader(batch_sampler=...).

    A step takes n = batch_size / masks_per_image images. Step k of an epoch takes order[k * n : (k + 1) * n]; the
    images left over at the end of an epoch are dropped. Each process takes its contiguous part and yields it in
    grad_accum lists. So a step has the same images whatever the number of processes, workers and accumulated batches,
    and a run resumes anywhere by its step alone.

    Args:
        num_images: of the training set.
        batch_size: images of one optimizer step over all processes and accumulated batches, each as often as it has
            masks.
        seed: of the run.
        start_step: the first one, counted from 0.
        end_step: the one after the last.
        rank: of this process.
        num_processes: that share a step.
        grad_accum: lists into which a process divides its part of a step.
        masks_per_image: how often batch_size counts an image.

    Raises:
        ValueError: if batch_size is no multiple of num_processes * grad_accum * masks_per_image, or larger than
            num_images * masks_per_image.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        *,
        start_step: int = 0,
        end_step: int,
        rank: int = 0,
        num_processes: int = 1,
        grad_accum: int = 1,
        masks_per_image: int = 1,
    ) -> None:
        if batch_size % (num_processes * grad_accum * masks_per_image):
            names, numbers = "processes x grad_accum", f"{num_processes} x {grad_accum}"
            if masks_per_image > 1:
                names, numbers = f"{names} x masks_per_image", f"{numbers} x {masks_per_image}"
            raise ValueError(f"batch_size: {batch_size} is not a multiple of {names} = {numbers}: change one of them")
        assert 0 <= rank < num_processes
        self.steps_per_epoch = steps_per_epoch(num_images, batch_size, masks_per_image)
        self.num_images, self.images_per_step, self.seed = num_images, batch_size // masks_per_image, seed
        self.start_step, self.end_step = start_step, end_step
        self.rank, self.num_processes, self.grad_accum = rank, num_processes, grad_accum

    def __len__(self) -> int:
        return max(0, self.end_step - self.start_step) * self.grad_accum

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.images_per_step // self.num_processes
        part = share // self.grad_accum
        epoch = -1
        for step in range(self.start_step, self.end_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.num_images, self.seed, epoch)
            first = step % self.steps_per_epoch * self.images_per_step + self.rank * share
            for start in range(first, first + share, part):
                yield [(epoch, index) for index in order[start : start + part].tolist()]


def evaluation_batches(num_images: int, batch_size: int, rank: int = 0, num_processes: int = 1) -> list[list[Key]]:
    """A process's share of all images, in order, in batches.

    Every image is in exactly one batch of one process; a process may have none.

    Args:
        num_images: of all processes.
        batch_size: images of a batch; the last may be smaller.
        rank: of this process.
        num_processes: that share the images.

    Returns:
        The keys of each batch, all of EVAL_EPOCH.
    """
    keys = [(EVAL_EPOCH, index) for index in range(rank, num_images, num_processes)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
