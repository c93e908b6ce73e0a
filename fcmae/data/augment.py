"""What happens to a training image: crops, flips, RandAugment, erasing. Every choice comes from the sample's seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment as timm_auto_augment
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from fcmae.data.arrays import GREY_WEIGHTS, Pixels, in_units
from fcmae.data.decode import ChooseBox, read_crop, to_pil
from fcmae.data.geometry import MAX_PIXELS, Box, align, decode_scale, readable_share, shrunk
from fcmae.data.maps import IGNORED, Classes
from fcmae.data.normalize import Normalize
from fcmae.data.rasters import LabelMap, Raster
from fcmae.data.source import BadImage, DataError

RATIO = (3 / 4, 4 / 3)  # smallest and largest width / height of a random crop


def random_resized_box(
    height: int, width: int, scale: tuple[float, float], aspect: float = 1.0, *, rng: np.random.Generator
) -> Box:
    """A random box of an image, as torchvision's RandomResizedCrop draws it; width / height is log-uniform in RATIO.

    But where none fits it is not the centre that is taken: of a strip that would be all that is ever seen.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: smallest and largest share of the area.
        aspect: width / height that the ratio is relative to.
        rng: what it is drawn from.

    Returns:
        (top, left, height, width) in pixels; after ten boxes that do not fit, the largest whose ratio is allowed.
    """
    narrowest, widest = (ratio * aspect for ratio in RATIO)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = min(width, max(1, round(height * widest)))
        h = min(height, max(1, round(width / narrowest)))
    return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def center_box(height: int, width: int, size: tuple[int, int], crop_pct: float = 1.0) -> Box:
    """The box that "resize until it covers size / crop_pct, then crop the centre" keeps of an image.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: height and width of the result, whose aspect the box has.
        crop_pct: share of the limiting side that stays.

    Returns:
        (top, left, height, width) in pixels.
    """
    unit = min(height / size[0], width / size[1]) * crop_pct
    h, w = max(1, round(size[0] * unit)), max(1, round(size[1] * unit))
    return (height - h) // 2, (width - w) // 2, h, w


@contextmanager
def seeded(seed: Sequence[int]) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) inside the block; restore their states after it.

    For timm's augmentations, which draw from all three.
    """
    python, old, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002
    # Not torch.manual_seed, which would seed the GPUs too, and they could not be restored.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(old)  # noqa: NPY002
        torch.set_rng_state(cpu)


@dataclass(frozen=True)
class Reading:
    """How image files become images of one shape: what a view of them, whichever, has in common with the others.

    Attributes:
        in_chans: channels.
        image_size: height and width.
        crop_pct: of an image that is not trained on, see `center_box`.
        mean: (in_chans,), in units of a full range of 1.
        std: (in_chans,), in these units.
        max_pixels: see `read_crop`.
        nodata: see `read_crop`.
        fill: what stands for missing values, where it is not the mean.
    """

    in_chans: int
    image_size: tuple[int, int]
    crop_pct: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    max_pixels: int = MAX_PIXELS
    nodata: float | None = None
    fill: tuple[float, ...] | None = None

    @property
    def normalize(self) -> Normalize:
        """A new module that does it to the images."""
        return Normalize(self.mean, self.std)

    @property
    def filling(self) -> tuple[float, ...]:
        """What stands for missing values."""
        return self.fill or self.mean

    def told(self, max_pixels: int, nodata: float | None) -> Reading:
        """A copy with another `max_pixels` and, unless it is None, another `nodata`."""
        return replace(self, max_pixels=max_pixels, nodata=self.nodata if nodata is None else nodata)

    def readable_share(self, height: int, width: int) -> float:
        """See `fcmae.data.geometry.readable_share`."""
        return readable_share(height, width, self.in_chans, self.max_pixels)

    def crop(self, file: BinaryIO | bytes, choose_box: ChooseBox) -> Pixels:
        """A box of an image at `image_size`, as `read_crop` gives it.

        Args:
            file: at its start.
            choose_box: see `read_crop`.

        Raises:
            BadImage: see `read_crop`.
        """
        options: dict[str, Any] = {"fill": self.filling, "max_pixels": self.max_pixels, "nodata": self.nodata}
        return read_crop(file, self.in_chans, choose_box, self.image_size, **options)

    def raster(self, file: BinaryIO) -> Raster:
        """An image to be read in parts.

        Args:
            file: at its start.

        Raises:
            BadImage: see `Raster`.
        """
        return Raster(file, self.in_chans, self.filling, self.max_pixels, self.nodata)


@dataclass(frozen=True)
class CenterCrop:
    """The centre of an image, for evaluation: see `center_box`.

    Attributes:
        reading: how it is read.
    """

    reading: Reading

    def __call__(self, file: BinaryIO | bytes, rng: np.random.Generator) -> Pixels:
        """(C, H, W), as `read_crop` gives it; draws nothing.

        Raises:
            BadImage: as `read_crop` does.
        """
        reading = self.reading

        def choose_box(height: int, width: int) -> Box:
            box = center_box(height, width, reading.image_size, reading.crop_pct)
            return shrunk(box, reading.readable_share(height, width) * height * width)

        return reading.crop(file, choose_box)


@dataclass(frozen=True)
class CropAndFlip:
    """Random resized crop (bicubic) and random flips, on the scaled decode of a file.

    Attributes:
        reading: how it is read.
        crop_scale: smallest and largest share of the area; of an image with more than max_pixels, of so many.
        hflip: probability that columns are mirrored.
        vflip: probability that rows are.
    """

    reading: Reading
    crop_scale: tuple[float, float]
    hflip: float
    vflip: float = 0.0

    def __call__(self, file: BinaryIO | bytes, rng: np.random.Generator) -> Pixels:
        """(C, H, W), as `read_crop` gives it.

        Raises:
            BadImage: as `read_crop` does.
        """
        read = self.reading.crop(file, partial(self.box, rng=rng))
        flips = rng.random(2) < (self.hflip, self.vflip)
        return Pixels(_mirrored(read.values, flips), None if read.known is None else _mirrored(read.known, flips))

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """What is cut out of an image.

        Args:
            height: of the image, in pixels.
            width: of the image, in pixels.
            rng: what it is drawn from.
        """
        share, size = self.reading.readable_share(height, width), self.reading.image_size
        smallest, largest = self.crop_scale
        box = random_resized_box(height, width, (smallest * share, largest * share), size[1] / size[0], rng=rng)
        # Where it is decoded smaller, a box of whole pixels is resized several times as fast (see _resize).
        aligned = align(box, scale := decode_scale(*box[2:], size), height, width)
        return aligned if decode_scale(*aligned[2:], size) == scale else box


def _mirrored(image: NDArray[Any], flips: NDArray[np.bool_]) -> NDArray[Any]:
    """(..., H, W) with its columns mirrored if the first of the flips is true, its rows if the second."""
    axes = tuple(axis for axis, is_mirrored in zip((-1, -2), flips, strict=True) if is_mirrored)
    return np.ascontiguousarray(np.flip(image, axes))


@dataclass(frozen=True)
class CropBoth:
    """A random crop at a random scale and random flips, drawn once for an image and its label map.

    Where the image is too small for the crop, the rest is missing, and ignored in the map.

    Attributes:
        reading: how the image is read.
        scale: how many times larger than in the image it is, smallest and largest, drawn log-uniformly.
        hflip: probability that columns are mirrored.
        vflip: probability that rows are.
        classes: of the map.
        color_jitter: see `jittered`.
    """

    reading: Reading
    scale: tuple[float, float]
    hflip: float
    vflip: float
    classes: Classes
    color_jitter: float = 0.0

    def __call__(
        self, file: BinaryIO, map_file: BinaryIO, map_name: str, rng: np.random.Generator
    ) -> tuple[NDArray[Any], NDArray[np.int16]]:
        """An image and the classes of its pixels.

        Args:
            file: the image.
            map_file: its label map.
            map_name: of that, for errors.
            rng: what is drawn from.

        Returns:
            (C, H, W) uint8 or float32, units of `read_crop`; (H, W), IGNORED where the class is unknown or all bands of
            the image are missing.

        Raises:
            BadImage: if one cannot be read, or their sizes differ.
            UnknownClass: see `Classes.numbers`.
        """
        reading, raster = self.reading, self.reading.raster(file)
        labels = LabelMap(map_file, reading.max_pixels)
        check_same_size(raster, labels)
        scale = math.exp(rng.uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        sides = (raster.height, raster.width)
        spans = [_place(side, size, scale, rng) for side, size in zip(sides, reading.image_size, strict=True)]
        (top, height, above, rows), (left, width, before, columns) = spans
        flips = rng.random(2) < (self.hflip, self.vflip)
        box, size = (top, left, height, width), (rows, columns)
        pixels = raster.read(box, size)
        part, is_known = pixels
        classes = self.classes.numbers(labels.read(box, size), map_name, pixels.is_seen)
        if self.color_jitter:
            changed = jittered(part, self.color_jitter, rng)
            part = changed if is_known is None else np.where(is_known, changed, part)  # what is missing stays filled
        ys, xs = slice(above, above + rows), slice(before, before + columns)
        image = np.broadcast_to(in_units(reading.filling, part.dtype), (reading.in_chans, *reading.image_size)).copy()
        numbers = np.full(reading.image_size, IGNORED, np.int16)
        image[:, ys, xs], numbers[ys, xs] = part, classes
        return _mirrored(image, flips), _mirrored(numbers, flips)


def check_same_size(raster: Raster, labels: LabelMap) -> None:
    """Refuse a label map of another size than its image.

    Raises:
        BadImage: with both sizes.
    """
    sizes = [(each.height, each.width) for each in (raster, labels)]
    if sizes[0] != sizes[1]:
        raise BadImage("the image has {} x {} pixels and its label map {} x {}".format(*sizes[0], *sizes[1]))


def jittered(image: NDArray[Any], strength: float, rng: np.random.Generator) -> NDArray[Any]:
    """Brightness, contrast and, of three channels, saturation, each times a factor in 1 - strength to 1 + strength.

    Contrast is about the mean grey of one or three channels, and about each channel's own mean of others, whose units
    may differ.

    Args:
        image: (C, H, W) uint8 or float32; of 8 bits it is cut off at black and white, as in torchvision's ColorJitter,
            of others not.
        strength: 0 to 1.
        rng: what is drawn from.

    Returns:
        As it came.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    values: NDArray[np.float32] = image.astype(np.float32) * brightness
    middle = values.mean(axis=(1, 2), keepdims=True)
    if len(image) == 3:
        grey = np.tensordot(GREY_WEIGHTS, values, 1)  # (H, W)
        values, middle = grey + saturation * (values - grey), grey.mean()
    values = middle + contrast * (values - middle)
    return np.rint(values).clip(0, 255).astype(np.uint8) if image.dtype == np.uint8 else values


def _place(side: int, size: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Along one axis: where the crop starts in the image and how long it is there, where it goes and how long it is."""
    length = max(1, round(size / scale))
    if length <= side:
        return int(rng.integers(side - length + 1)), length, 0, size
    filled = max(1, min(size, round(side * size / length)))
    return 0, side, int(rng.integers(size - filled + 1)), filled


class DeepImageError(DataError):
    """An image of more than 8 bits met a policy that works on 8 bits: it would come out blank, or in a few levels."""


class FinetuneAugment:
    """Crop and flip, then timm's automatic augmentation, then random erasing: timm's recipe for fine-tuning."""

    def __init__(
        self,
        crop: CropAndFlip,
        *,
        auto_augment: str | None,
        random_erasing: float,
    ) -> None:
        """Set it up.

        Args:
            crop: what comes first.
            auto_augment: a policy in timm's notation such as rand-m9-mstd0.5-inc1, for 1 and 3 channels; it works on
                8-bit RGB, so grey images pass through RGB and back, and deeper ones are refused.
            random_erasing: probability that a rectangle becomes noise, normal in normalised units.

        Raises:
            ValueError: for a policy that timm does not know.
        """
        reading = crop.reading
        assert auto_augment is None or reading.in_chans in (1, 3)
        self.crop = crop
        self._policy = None if auto_augment is None else _policy(auto_augment, reading.image_size, reading.mean)
        self._random_erasing = random_erasing
        self._erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self._normalize = reading.normalize

    def __call__(self, file: BinaryIO | bytes, rng: np.random.Generator) -> Pixels:
        """(C, H, W), as `read_crop` gives it, but for what is known of it: a policy moves pixels.

        Raises:
            BadImage: as `read_crop` does.
            DeepImageError: for an image of more than 8 bits, if there is a policy.
        """
        image = self.crop(file, rng).values
        erases = rng.random() < self._random_erasing
        if self._policy is None and not erases:
            return Pixels(image)
        with seeded(rng.integers(2**32, size=4).tolist()):
            if self._policy is not None:
                if image.dtype != np.uint8:
                    raise DeepImageError(
                        "data.auto_augment: timm's policies work on 8-bit images and would clip and round deeper ones, "
                        "such as this: set it to none"
                    )
                image = self._augmented(image)
            return Pixels(self._erased(image) if erases else image)

    def _augmented(self, image: NDArray[Any]) -> NDArray[Any]:
        assert self._policy is not None
        augmented: Image.Image = self._policy(to_pil(image).convert("RGB"))
        array = np.array(augmented.convert("L" if len(image) == 1 else "RGB"))  # a copy: Pillow's is read-only
        return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))

    def _erased(self, image: NDArray[Any]) -> NDArray[Any]:
        erased = self._normalize.inverse(self._erase(self._normalize(torch.from_numpy(image)))).numpy()
        # Back to uint8, so that a batch stays a quarter of the size on its way to the device.
        return (erased * np.float32(255)).round().clip(0, 255).astype(np.uint8) if image.dtype == np.uint8 else erased


def _policy(auto_augment: str, image_size: tuple[int, int], mean: Sequence[float]) -> Any:
    """timm's transform for a policy, on RGB images of image_size. Raises ValueError for one that timm does not know."""
    try:
        # Of the three stages that timm makes (crop and flip, policy, normalise) only the second.
        transform = create_transform(
            image_size,
            is_training=True,
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=tuple(mean) * (3 // len(mean)),
            separate=True,
        )[1]
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"data.auto_augment: {auto_augment!r} is no policy of timm: use one like rand-m9-mstd0.5-inc1, or none"
        ) from error
    policy = transform.transforms[0]
    steps = policy.ops if hasattr(policy, "ops") else chain.from_iterable(policy.policy)
    for step in steps:
        if step.aug_fn is timm_auto_augment.posterize:
            step.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, but never 0 bits, which its policies draw at full strength: black in older Pillows, an error in 13."""
    posterized: Image.Image = timm_auto_augment.posterize(image, max(1, bits))
    return posterized
