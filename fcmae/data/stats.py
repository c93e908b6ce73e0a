"""Mean and standard deviation of a set of images, for data.mean and data.std."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fcmae.data.decode import read_crop
from fcmae.data.geometry import MAX_PIXELS, Box, readable_share
from fcmae.data.index import Images
from fcmae.data.source import BadImage, printable

logger = logging.getLogger("fcmae")

AT_ONCE = 1 << 15  # pixels


def channel_statistics(
    images: Images,
    in_chans: int,
    *,
    max_images: int = 10_000,
    num_workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    nodata: float | None = None,
    key: str = "data.path",
    tells: bool = False,
) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation of each channel, in units of a full range of 1 (uint8 is divided by 255).

    Every image counts the same, whatever its size, because the network sees each at one size. Images that cannot be
    read are skipped, and so are missing values (see `read_crop`).

    Args:
        images: what to measure.
        in_chans: channels that the network sees.
        max_images: of more, that many are drawn, always the same.
        num_workers: processes that decode.
        max_pixels, nodata: see `read_crop`.
        key: the setting that errors name.
        tells: whether to warn of images that are skipped.

    Returns:
        Mean, std, and the number of images used.

    Raises:
        ValueError: if no image can be read.
    """
    if len(images) > max_images:
        drawn = np.random.default_rng(0).permutation(len(images))[:max_images]
        images = images.subset(np.sort(drawn))
    loader = DataLoader(
        _Moments(images, in_chans, max_pixels, nodata), batch_size=None, num_workers=num_workers, collate_fn=_unchanged
    )  # batch_size=None: one image at a time, of any size
    total, counts = np.zeros((2, in_chans)), np.zeros(in_chans, np.int64)
    num_images, bad = 0, list[str]()
    for moments in tqdm(loader, "mean and std", unit="image", delay=5, disable=None, leave=False):
        if isinstance(moments, str):
            bad.append(moments)
            continue
        total += np.nan_to_num(moments)
        counts += ~np.isnan(moments[0])
        num_images += 1
    if num_images == 0:
        raise ValueError(f"{key}: none of {len(images)} files can be read; {bad[0]}")
    if bad and tells:
        logger.warning("%s: %d of %d images cannot be read, and do not count; %s", key, len(bad), len(images), bad[0])
    if not counts.all():
        raise ValueError(f"{key}: of channel {np.argmin(counts)} all values are missing in all images that were read")
    mean, mean_square = total / counts
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return mean.tolist(), std.tolist(), num_images


def rounded(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means to a thousandth of their deviation, and deviations to four digits and at least 1e-6, as they are shown."""
    places = [3 - math.floor(math.log10(max(value, 1e-6))) for value in std]
    means = [round(value, num) for value, num in zip(mean, places, strict=True)]
    return means, [max(float(f"{value:.4g}"), 1e-6) for value in std]


class _Moments(Dataset[NDArray[np.float64] | str]):
    """Of each image (2, C): the means of its values and of their squares, NaN where all are missing.

    Or why it cannot be read.
    """

    def __init__(self, images: Images, in_chans: int, max_pixels: int, nodata: float | None) -> None:
        self._images, self._in_chans, self._max_pixels, self._nodata = images, in_chans, max_pixels, nodata

    def __len__(self) -> int:
        return len(self._images)

    def _box(self, height: int, width: int) -> Box:
        """All of an image, or the centre of one with more than max_pixels."""
        share = readable_share(height, width, self._in_chans, self._max_pixels)
        rows, columns = (max(1, int(side * math.sqrt(share))) for side in (height, width))
        return (height - rows) // 2, (width - columns) // 2, rows, columns

    def __getitem__(self, position: int) -> NDArray[np.float64] | str:
        try:
            with self._images.open(position) as file:
                image = read_crop(
                    file, self._in_chans, self._box, None, max_pixels=self._max_pixels, nodata=self._nodata
                ).values
        except BadImage as error:
            return f"{printable(self._images.name(position))}: {error}"
        if np.isinf(image).any():
            return f"{printable(self._images.name(position))}: it holds values too large for float32"
        pixels, num_values = image.reshape(self._in_chans, -1), np.zeros(self._in_chans)
        sums = np.zeros((2, self._in_chans))
        for first in range(0, pixels.shape[1], AT_ONCE):  # in float64 the whole would take eight times its memory
            values = pixels[:, first : first + AT_ONCE].astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
            num_values += (~np.isnan(values)).sum(axis=1)
            sums += np.nansum(values, axis=1), np.nansum(values**2, axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0: a channel of which all is missing
            return sums / num_values


def _unchanged(item: Any) -> Any:
    return item
