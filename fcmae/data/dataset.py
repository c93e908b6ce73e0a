"""Samples by key (epoch, index), and batches of them. What a sample is depends on (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.augment import CenterCrop, CropAndFlip, FinetuneAugment
from fcmae.data.index import Images
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import MASK_STREAM, SAMPLE_STREAM, Key
from fcmae.data.source import BadImage, DataError
from fcmae.masking import random_mask

MAX_TRIES = 16  # files that a training sample tries before it gives up

View = Callable[[BinaryIO, np.random.Generator], NDArray[Any]]  # file -> (C, H, W), drawing from the generator


@dataclass(frozen=True)
class Reading:
    """How images are read for a network that is not being trained on them.

    Attributes:
        in_chans: channels.
        image_size: height and width.
        crop_pct: see `center_box`.
        normalize: what they go through then.
    """

    in_chans: int
    image_size: tuple[int, int]
    crop_pct: float
    normalize: Normalize

    def dataset(self, images: Images) -> FinetuneDataset:
        """Centre crops of the images."""
        return FinetuneDataset(
            images, in_chans=self.in_chans, image_size=self.image_size, seed=0, crop_pct=self.crop_pct
        )


@dataclass(frozen=True)
class Sample:
    """An image, and what is known of it.

    Attributes:
        image: (C, H, W) uint8 or float32.
        masks: (n, gh, gw) bool, True = hidden.
        label: its class by number.
        index: that of the key.
        valid: false if the image could not be read and was not replaced; it is then zero.
        bad: names of images that could not be read, with reasons.
    """

    image: NDArray[Any]
    masks: NDArray[np.bool_] | None
    label: int | None
    index: int
    valid: bool
    bad: list[tuple[str, str]]


@dataclass
class Batch:
    """Samples together.

    Attributes:
        images: (B, C, H, W) uint8, or float32 if any is.
        masks: (B * n, gh, gw) bool, True = hidden; the n masks of an image follow each other.
        labels: (B,) int64.
        index: (B,) int64.
        valid: (B,) bool, false for images that could not be read.
        bad: (name, reason) of images that could not be read.
    """

    images: Tensor
    masks: Tensor | None
    labels: Tensor | None
    index: Tensor
    valid: Tensor
    bad: list[tuple[str, str]]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        masks = None if self.masks is None else function(self.masks)
        labels = None if self.labels is None else function(self.labels)
        return Batch(function(self.images), masks, labels, function(self.index), function(self.valid), self.bad)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; the copy does not block if the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    @property
    def given_masks(self) -> Tensor:
        """The masks of a batch that has some."""
        assert self.masks is not None
        return self.masks

    @property
    def given_labels(self) -> Tensor:
        """The labels of a batch that has some."""
        assert self.labels is not None
        return self.labels

    def select(self, keep: Tensor) -> Batch:
        """Some of the images, each with one mask at most.

        Args:
            keep: (B,) bool, true for those.
        """
        assert self.masks is None or len(self.masks) == len(self.images)
        return self._map(lambda tensor: tensor[keep])

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory, which another stream filled, until what `stream` has queued by then has used it."""
        for tensor in (self.images, self.masks, self.labels, self.index, self.valid):
            if tensor is not None:
                tensor.record_stream(stream)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to a Batch. If images of 8 bits and deeper ones meet, those of 8 bits are divided by 255."""
    images = [sample.image for sample in samples]
    if any(image.dtype != np.uint8 for image in images):
        images = [image / np.float32(255) if image.dtype == np.uint8 else image for image in images]
    masks = [sample.masks for sample in samples if sample.masks is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        masks=torch.from_numpy(np.concatenate(masks)) if masks else None,
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        valid=torch.tensor([sample.valid for sample in samples], dtype=torch.bool),
        bad=[bad for sample in samples for bad in sample.bad],
    )


class NoUsableImage(DataError):  # noqa: N818
    """A training sample found MAX_TRIES bad files in a row."""


class ImageDataset(Dataset[Sample]):
    """Reads images through a view. Training replaces what it cannot read; evaluation marks it.

    Args:
        images: what to read.
        view: a file to (C, H, W) uint8 or float32, drawing from the sample's own generator.
        shape: (C, H, W) of an image that could not be read and is marked.
        seed: of what the view draws, and of replacements.
        replaces: whether images that cannot be read are replaced.
    """

    def __init__(self, images: Images, view: View, *, shape: tuple[int, int, int], seed: int, replaces: bool) -> None:
        self._images, self._view, self._shape, self._seed, self._replaces = images, view, shape, seed, replaces

    def __len__(self) -> int:
        return len(self._images)

    def _read(self, key: Key) -> Sample:
        """The sample of a key, without a mask.

        Raises NoUsableImage, a ValueError, if replacing is allowed and none of MAX_TRIES files can be read.
        """
        epoch, index = key
        rng = np.random.default_rng([self._seed, epoch, index, SAMPLE_STREAM])
        bad: list[tuple[str, str]] = []
        used = index
        while len(bad) < (MAX_TRIES if self._replaces else 1):
            try:
                with self._images.open(used) as file:
                    image = self._view(file, rng)
            except BadImage as error:
                bad.append((self._images.name(used), str(error)))
                used = int(rng.integers(len(self)))
            else:
                return Sample(image, None, self._images.label(used), index, True, bad)
        if self._replaces:
            raise NoUsableImage(
                f"data.path: {MAX_TRIES} files drawn in a row cannot be used, the first is {bad[0][0]}: {bad[0][1]}; "
                "give images that can be read, or the in_chans they have"
            )
        return Sample(np.zeros(self._shape, np.uint8), None, self._images.label(index), index, False, bad)


class PretrainDataset(ImageDataset):
    """Images and masks for pretraining, by key (epoch, index)."""

    def __init__(
        self,
        images: Images,
        *,
        in_chans: int,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float],
        hflip: float,
        grid: tuple[int, int],
        visible: int,
        seed: int,
        augment: bool = True,
        masks_per_image: int = 1,
    ) -> None:
        """Nothing is read yet.

        Args:
            images: what to read.
            in_chans: channels of the samples.
            image_size: height and width of the samples.
            crop_scale: see CropAndFlip.
            hflip: see CropAndFlip.
            grid: (gh, gw), see random_mask.
            visible: see random_mask.
            seed: of crops, flips, masks and replacements.
            augment: False takes the centre of each image (crop_pct .875) instead of a random crop, and marks images
                that cannot be read; True replaces them by others, drawn from the sample's own generator.
            masks_per_image: masks of each sample, drawn independently.
        """
        crop = CropAndFlip(in_chans, image_size, crop_scale, hflip)
        view = crop if augment else CenterCrop(in_chans, image_size, 0.875)
        super().__init__(images, view, shape=(in_chans, *image_size), seed=seed, replaces=augment)
        self._grid, self.visible, self._masks_per_image = grid, visible, masks_per_image

    def __getitem__(self, key: Key) -> Sample:
        first = (self._seed, *key)
        seeds = [first, *((*first, MASK_STREAM, number) for number in range(1, self._masks_per_image))]
        return replace(self._read(key), masks=random_mask(self._grid, self.visible, seeds))


class FinetuneDataset(ImageDataset):
    """Images and labels for fine-tuning, by key (epoch, index)."""

    def __init__(
        self,
        images: Images,
        *,
        in_chans: int,
        image_size: tuple[int, int],
        seed: int,
        augment: FinetuneAugment | None = None,
        crop_pct: float = 0.875,
    ) -> None:
        """Nothing is read yet.

        Args:
            images: what to read.
            in_chans: channels of the samples.
            image_size: height and width of the samples.
            seed: of augmentations and replacements.
            augment: what training images go through; images that cannot be read are replaced by others, drawn from the
                sample's own generator. None takes the centre of each image and marks such images.
            crop_pct: of that centre, see center_box.
        """
        view = augment or CenterCrop(in_chans, image_size, crop_pct)
        super().__init__(images, view, shape=(in_chans, *image_size), seed=seed, replaces=augment is not None)

    def __getitem__(self, key: Key) -> Sample:
        return self._read(key)
