"""What a set of images is like, from a sample of them: sizes, channels, depth, mean and std."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from fcmae.data.arrays import OpenImage
from fcmae.data.cores import num_cores
from fcmae.data.decode import open_any
from fcmae.data.find import find_images
from fcmae.data.geometry import MAX_PIXELS
from fcmae.data.index import Images
from fcmae.data.source import BadImage, OtherChannels, few, printable
from fcmae.data.split import evenly
from fcmae.data.stats import channel_statistics, rounded
from fcmae.data.tiff import num_bands, num_pages, samples_with_alpha

logger = logging.getLogger("fcmae")
MAX_OTHERS = 0.1  # share of images with other channels, from which they are no exceptions


@dataclass(frozen=True)
class Survey:
    """Facts about images, by those of a sample that could be read.

    Attributes:
        num: how many there are, read or not.
        short_side: the median, in pixels.
        in_chans: channels of most of them.
        is_deep: whether most have other than 8 bits per channel.
        has_deep: whether any has.
        mean: of each channel, with a format's full range scaled to 1.
        std: of each channel, in the same units.
        mean_pixels: of an image.
        class_counts: labelled images of each class; empty without labels.
    """

    num: int
    short_side: int
    in_chans: int
    is_deep: bool
    has_deep: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_pixels: float
    class_counts: tuple[int, ...] = ()


def survey(
    images: Images,
    in_chans: int | None = None,
    max_images: int = 200,
    max_pixels: int = MAX_PIXELS,
    nodata: float | None = None,
    key: str = "data.path",
    trains: bool = True,
) -> Survey:
    """Look at a sample, evenly spread.

    Args:
        images: all.
        in_chans: channels, where they are known; None finds out.
        max_images: of the sample.
        max_pixels, nodata: of an image, see `read_crop`.
        key: the setting that the error names.
        trains: whether channels can be given.

    Raises:
        ValueError: if none of the sample can be read, or, where nothing says how many channels to read, images of two
            kinds are in it.
    """
    sample = images.subset(evenly(len(images), max_images))
    sides, areas, channels, deep = list[int](), list[int](), dict[int, list[int]](), Counter[bool]()
    reason, of_units = "", dict[bool, list[str]]()  # names, by whether values are shares of a full range
    for i in tqdm(range(len(sample)), "looking at images", unit="image", delay=5, disable=None, leave=False):
        try:
            with sample.open(i) as file:
                image = _open(file, max_pixels)
                sides.append(min(image.height, image.width))
                areas.append(image.height * image.width)
                channels.setdefault(image.channels, []).append(i)
                deep[image.is_deep] += 1
                of_units.setdefault(image.is_share, []).append(sample.name(i))
        except BadImage as error:
            reason = reason or f"{sample.name(i)}: {error}"
    if not sides:
        raise ValueError(f"{key}: none of {len(sample)} images can be read; {reason}")
    if len(of_units) > 1:
        logger.warning(
            "images may be in two units: %d of %d, such as %s, hold values as stored or in a modality's units, others, "
            "such as %s, shares of their full range, 0 to 1: convert one kind, unless both are such shares",
            *(len(of_units[False]), len(sides), printable(of_units[False][0]), printable(of_units[True][0])),
        )
    if in_chans is None:
        in_chans = max(channels, key=lambda num: len(channels[num]))
        others = [num for num, positions in channels.items() if not _reads(sample, positions[0], in_chans, max_pixels)]
        if sum(len(channels[num]) for num in others) > MAX_OTHERS * len(sides):
            kinds = [
                f"{len(channels[num])} have {num} channels, as {sample.name(channels[num][0])}"
                for num in (in_chans, *others)
            ]
            raise ValueError(
                f"{key}: of {len(sides)} images {few(kinds, 4)}: list those of one kind in a .txt file (with labels, a "
                ".csv file), or convert the others"
            )
        warn_of_unread_bands(sample, in_chans, trains=trains)
    mean, std, _ = channel_statistics(
        sample, in_chans, max_images=max_images, max_pixels=max_pixels, nodata=nodata, key=key
    )
    counts: tuple[int, ...] = ()
    if images.labels is not None and images.class_names is not None:
        counts = tuple(np.bincount(images.labels, minlength=len(images.class_names)).tolist())
    side, is_deep, has_deep = round(statistics.median(sides)), deep.most_common(1)[0][0], deep[True] > 0
    area = statistics.fmean(areas)
    return Survey(len(images), side, in_chans, is_deep, has_deep, tuple(mean), tuple(std), area, counts)


def warn_of_unread_bands(images: Images, in_chans: int, *, trains: bool) -> None:
    """Warn if TIFFs among some of the images have pages, or a channel that they call alpha, which are not read.

    Args:
        images: which.
        in_chans: channels that are read.
        trains: whether others can be.
    """
    for i in evenly(len(images), 8):
        name = images.name(i)
        if in_chans not in (1, 3) or not name.lower().endswith((".tif", ".tiff")):
            continue
        with suppress(BadImage), images.open(i) as file:
            num, are_channels = num_pages(file)
            file.seek(0)
            if num > 1:
                remedy = f": in_chans = {num} reads them as channels" if are_channels and trains else ""
                logger.warning("%s has %d pages, and the first is read%s", printable(name), num, remedy)
                return
            if in_chans == 3 and (num := samples_with_alpha(file)):
                what = "has a channel behind its colours that it calls alpha, or nothing, and that is not read"
                remedy = f": if it is data, in_chans = {num} reads it" if trains else ""
                logger.warning("%s %s%s", printable(name), what, remedy)
                return


def _reads(images: Images, i: int, in_chans: int, max_pixels: int) -> bool:
    """Whether an image can be read with so many channels."""
    try:
        with images.open(i) as file:
            open_any(file, in_chans, max_pixels)
    except BadImage:
        return False
    return True


def _open(file: BinaryIO, max_pixels: int) -> OpenImage:
    """With as many channels as it has: 1, 3 for colours with or without alpha, or another number of bands.

    Bands behind colours count too, which are left out where 3 are asked for.
    """
    bands = num_bands(file)
    file.seek(0)
    try:
        return open_any(file, bands if bands == 2 or bands > 3 else 3, max_pixels)
    except OtherChannels as error:
        file.seek(0)
        return open_any(file, error.channels, max_pixels)


def statistics_lines(
    patterns: Sequence[str],
    in_chans: int | None,
    max_images: int,
    num_workers: int | None,
    max_pixels: int,
    nodata: float | None,
) -> str:
    """The mean and std of images as lines of a configuration file, which are what `fcmae stats` prints.

    Args:
        patterns: folders, lists or glob patterns.
        in_chans: channels to read; None is those that most images have.
        max_images: most images to read.
        num_workers: processes that decode; None is one per core, up to 8.
        max_pixels, nodata: see `read_crop`.

    Raises:
        ValueError: if no image can be read.
    """
    images = find_images(patterns, key="path")
    images.tell_notes()
    if in_chans is None:
        at_most = min(20, max_images)  # which are read once more for their statistics
        in_chans = survey(images, None, at_most, max_pixels, nodata, key="path").in_chans
    mean, std, num_images = channel_statistics(
        images,
        in_chans,
        max_images=max_images,
        num_workers=min(8, num_cores()) if num_workers is None else num_workers,
        max_pixels=max_pixels,
        nodata=nodata,
        key="path",
        tells=True,
    )
    lines = [f"# {num_images} image{'s' * (num_images != 1)}", "data:", f"  in_chans: {in_chans}"]
    lines += [] if nodata is None else [f"  nodata: {nodata!r}"]
    for name, values in zip(("mean", "std"), rounded(mean, std), strict=True):
        lines.append(f"  {name}: [{', '.join(f'{value:.12g}' for value in values)}]")
    return "\n".join(lines)
