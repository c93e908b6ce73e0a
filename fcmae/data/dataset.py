"""Samples by key (epoch, index), and batches of them. What a sample is depends on (seed, epoch, index) alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.arrays import Pixels
from fcmae.data.augment import CenterCrop, CropAndFlip, CropBoth, DeepImageError, FinetuneAugment, Reading
from fcmae.data.index import Images
from fcmae.data.sampler import MASK_STREAM, SAMPLE_STREAM, Key
from fcmae.data.source import BadImage, DataError, printable
from fcmae.data.split import evenly
from fcmae.data.survey import warn_of_unread_bands
from fcmae.masking import random_mask

logger = logging.getLogger("fcmae")

FAR = 4  # standard deviations
NARROW = 8  # times less than the standard deviation, of several images together
MAX_TRIES = 16  # files that a training sample tries before it gives up

View = CenterCrop | CropAndFlip | FinetuneAugment  # file -> (C, H, W), drawing from the sample's own generator


def check_values(reading: Reading, images: Images, *, trains: bool = False) -> None:
    """Warn if some of the images hold values far from the mean or of no spread, as in other units, or what is not read.

    Args:
        reading: how they are read.
        images: which.
        trains: whether a network learns from them, for which other channels, mean and std can be given.
    """
    warn_of_unread_bands(images, reading.in_chans, trains=trains)
    dataset = centre_crops(reading, images)
    samples = [dataset[(0, i)] for i in evenly(len(images), 8)]
    if not (readable := [sample for sample in samples if sample.valid]):
        return
    seen = collate(readable).images
    values = seen.float() / (255 if seen.dtype == torch.uint8 else 1)
    spread, centre = torch.std_mean(values, dim=(0, 2, 3), correction=0)
    mean, std = torch.tensor(reading.mean), torch.tensor(reading.std)
    far = torch.maximum((centre - mean).abs(), spread) / std
    is_narrow = len(readable) > 3 and (spread / std).max() < 1 / NARROW
    if far.max() > FAR or is_narrow:
        i, remedy = int(far.argmax()), "give them in the units that the model was trained on"
        if trains:
            nodata = "" if reading.nodata is None else " --nodata " + repr(reading.nodata).removesuffix(".0")
            remedy = f"`fcmae stats IMAGES --in_chans {reading.in_chans}{nodata}` prints the right ones"
        logger.warning(
            "the images hold values from %.4g to %.4g, in channel %d of mean %.4g and std %.4g, %s the mean %.4g "
            "and std %.4g that they are normalised with: %s",
            *(values[:, i].min(), values[:, i].max(), i, centre[i], spread[i]),
            "too narrow for" if is_narrow else "far from",
            *(mean[i], std[i], remedy),
        )


@dataclass(frozen=True)
class Sample:
    """An image, and what is known of it.

    Attributes:
        image: (C, H, W) uint8 or float32.
        masks: (n, gh, gw) bool, True = hidden.
        label: its class by number; or (H, W) int16, the classes of its pixels.
        index: that of the key.
        valid: false if the image could not be read and was not replaced; it is then zero.
        bad: names of images that could not be read, with reasons.
        known: (C, H, W) bool, false where it is missing; None if nothing is, or nobody asks.
    """

    image: NDArray[Any]
    masks: NDArray[np.bool_] | None
    label: int | NDArray[np.int16] | None
    index: int
    valid: bool
    bad: list[tuple[str, str]]
    known: NDArray[np.bool_] | None = None


@dataclass
class Batch:
    """Samples together.

    Attributes:
        images: (B, C, H, W) uint8, or float32 if any is.
        masks: (B * n, gh, gw) bool, True = hidden; the n masks of an image follow each other.
        labels: (B,) int64; or (B, H, W) int16, see `fcmae.data.maps.Classes.numbers`.
        index: (B,) int64.
        valid: (B,) bool, false for images that could not be read.
        bad: (name, reason) of images that could not be read.
        was_piped: whether its images came from a worker without shared memory.
        known: (B, C, H, W) bool, false for values that are missing; None if none is, or nobody asks.
    """

    images: Tensor
    masks: Tensor | None
    labels: Tensor | None
    index: Tensor
    valid: Tensor
    bad: list[tuple[str, str]]
    was_piped: bool = False
    known: Tensor | None = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        masks, labels, known = (None if t is None else function(t) for t in (self.masks, self.labels, self.known))
        index, valid = function(self.index), function(self.valid)
        return Batch(function(self.images), masks, labels, index, valid, self.bad, self.was_piped, known)

    def packed(self, share: bool) -> Batch:
        """The batch to be sent to another process: arrays, which need neither shared memory nor an open file.

        Args:
            share: send the images by shared memory, in which they are put now.

        Raises:
            RuntimeError: if it has no room.
        """
        arrays = self._map(Tensor.numpy)  # type: ignore[arg-type]
        arrays.was_piped = not share
        if share:
            arrays.images = self.images.share_memory_()  # type: ignore[no-untyped-call]
            if self.known is not None:
                arrays.known = self.known.share_memory_()  # type: ignore[no-untyped-call]
        return arrays

    def unpacked(self) -> Batch:
        """A batch that was sent, as it was before."""
        return self._map(torch.as_tensor)

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
        if bool(keep.all()):
            return self  # still pinned
        return self._map(lambda tensor: tensor[keep])

    def pin_memory(self) -> Batch:
        """The batch, which may have been sent, in page-locked memory; DataLoader calls this."""
        return self.unpacked()._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory, which another stream filled, until what `stream` has queued by then has used it."""
        for tensor in (self.images, self.masks, self.labels, self.index, self.valid, self.known):
            if tensor is not None:
                tensor.record_stream(stream)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to a Batch. If images of 8 bits and deeper ones meet, those of 8 bits are divided by 255."""
    images = [sample.image for sample in samples]
    if any(image.dtype != np.uint8 for image in images):
        images = [image / np.float32(255) if image.dtype == np.uint8 else image for image in images]
    masks = [sample.masks for sample in samples if sample.masks is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    known = None
    if any(sample.known is not None for sample in samples):
        known = torch.from_numpy(np.stack([_known(sample) for sample in samples]))
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        masks=torch.from_numpy(np.concatenate(masks)) if masks else None,
        labels=torch.from_numpy(np.stack(labels)) if labels else None,
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        valid=torch.tensor([sample.valid for sample in samples], dtype=torch.bool),
        bad=[bad for sample in samples for bad in sample.bad],
        known=known,
    )


def _known(sample: Sample) -> NDArray[np.bool_]:
    return np.ones(sample.image.shape, np.bool_) if sample.known is None else sample.known


class NoUsableImage(DataError):  # noqa: N818
    """A training sample found MAX_TRIES bad files in a row."""


class ImageDataset(Dataset[Sample]):
    """Samples by key (epoch, index). Training replaces an image that it cannot read; evaluation marks it.

    Args:
        images: what to read.
        crop: whose size an image that could not be read has: centre crops are for evaluation, others for training.
        seed: of what is drawn for a sample, and of replacements.
    """

    def __init__(self, images: Images, crop: CropAndFlip | CenterCrop | CropBoth, *, seed: int) -> None:
        self._images, self._seed = images, seed
        self._replaces = not isinstance(crop, CenterCrop)
        self._shape = (crop.reading.in_chans, *crop.reading.image_size)

    def __len__(self) -> int:
        return len(self._images)

    def _load(self, i: int, rng: np.random.Generator) -> tuple[Pixels, int | NDArray[np.int16] | None]:
        """What image i gives, and its label."""
        raise NotImplementedError

    def __getitem__(self, key: Key) -> Sample:
        """The sample of a key, without a mask.

        Raises NoUsableImage, a ValueError, if replacing is allowed and none of MAX_TRIES files can be read.
        """
        epoch, index = key
        rng = np.random.default_rng([self._seed, epoch, index, SAMPLE_STREAM])
        bad: list[tuple[str, str]] = []
        used = index
        while len(bad) < (MAX_TRIES if self._replaces else 1):
            try:
                pixels, label = self._load(used, rng)
            except BadImage as error:
                bad.append((self._images.name(used), str(error)))
                used = int(rng.integers(len(self)))
            else:
                return Sample(pixels.values, None, label, index, True, bad, pixels.known)
        if self._replaces:
            raise NoUsableImage(
                f"data.path: {MAX_TRIES} files drawn in a row cannot be used, the first is {printable(bad[0][0])}: "
                f"{bad[0][1]}; "
                "give images that can be read, or the in_chans they have"
            )
        return Sample(np.zeros(self._shape, np.uint8), None, self._images.label(index), index, False, bad)


class PretrainDataset(ImageDataset):
    """Images and masks for pretraining, by key (epoch, index)."""

    def __init__(
        self,
        images: Images,
        view: CropAndFlip | CenterCrop,
        *,
        grid: tuple[int, int],
        visible: int,
        seed: int,
        masks_per_image: int = 1,
    ) -> None:
        """Nothing is read yet.

        Args:
            images: what to read.
            view: random crops replace images that cannot be read by others, drawn from the sample's own generator;
                centre crops mark them.
            grid: (gh, gw), see random_mask.
            visible: see random_mask.
            seed: of crops, flips, masks and replacements.
            masks_per_image: masks of each sample, drawn independently.
        """
        super().__init__(images, view, seed=seed)
        self._view = view
        self._grid, self.visible, self._masks_per_image = grid, visible, masks_per_image

    def _load(self, i: int, rng: np.random.Generator) -> tuple[Pixels, int | None]:
        with self._images.open(i) as file:
            return self._view(file, rng), self._images.label(i)

    def __getitem__(self, key: Key) -> Sample:
        first = (self._seed, *key)
        seeds = [first, *((*first, MASK_STREAM, number) for number in range(1, self._masks_per_image))]
        return replace(super().__getitem__(key), masks=random_mask(self._grid, self.visible, seeds))


class FinetuneDataset(ImageDataset):
    """Images and labels for fine-tuning, by key (epoch, index): augmented ones to train on, centre crops otherwise."""

    def __init__(self, images: Images, view: FinetuneAugment | CenterCrop, *, seed: int) -> None:
        """Nothing is read yet.

        Args:
            images: what to read.
            view: what makes a file an image; augmented ones that cannot be read are replaced.
            seed: of what the view draws, and of replacements.
        """
        super().__init__(images, view.crop if isinstance(view, FinetuneAugment) else view, seed=seed)
        self._view = view

    def _load(self, i: int, rng: np.random.Generator) -> tuple[Pixels, int | None]:
        with self._images.open(i) as file:
            try:
                pixels = self._view(file, rng)
            except DeepImageError as error:
                raise DeepImageError(f"{printable(self._images.name(i))}: {error}") from error
        return Pixels(pixels.values), self._images.label(i)


def centre_crops(reading: Reading, images: Images) -> FinetuneDataset:
    """Centre crops of images.

    Args:
        reading: how they are read.
        images: which.
    """
    return FinetuneDataset(images, CenterCrop(reading), seed=0)


class SegmentDataset(ImageDataset):
    """Crops of images, with the classes of their pixels, by key (epoch, index)."""

    def __init__(self, images: Images, maps: Images, crop: CropBoth, *, seed: int) -> None:
        """Nothing is read yet.

        Args:
            images: what to read.
            maps: their label maps, in the same order.
            crop: what makes two files a sample; images that cannot be read are replaced.
            seed: of crops, flips and replacements.
        """
        super().__init__(images, crop, seed=seed)
        self._maps, self._crop = maps, crop

    def _load(self, i: int, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.int16]]:
        with self._images.open(i) as file, self._maps.open(i) as map_file:
            image, numbers = self._crop(file, map_file, self._maps.name(i), rng)
            return Pixels(image), numbers
