"""Features of images: each stage's output, averaged over the image, in arrays that may lie on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fcmae.data.augment import Reading
from fcmae.data.dataset import Batch
from fcmae.data.index import Images
from fcmae.data.loader import evaluation_loader, readable
from fcmae.evaluation.models import Backbone, stage_maps

BATCH_SIZE = 64


def batches_of(
    reading: Reading,
    images: Images,
    *,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """Images as a network takes them, centre crops, in batches.

    Args:
        reading: how they are read.
        images: which.
        device: where they are normalised.
        batch_size: images at a time.
        num_workers: processes that decode; None chooses.

    Returns:
        See `fcmae.data.loader.readable`.
    """
    loader = evaluation_loader(reading, images, batch_size, num_workers=num_workers, device_type=device.type)
    return readable(loader, reading.normalize.to(device))


@dataclass(frozen=True)
class Extracted:
    """Features of the N images that could be read, in their order.

    Attributes:
        positions: (N,) int64, positions among all given images.
        stages: by number, from 1, the stage's output averaged over the image, (N, C) float32.
        bad: (name, reason) of the images that could not be read.
    """

    positions: NDArray[np.int64]
    stages: dict[int, NDArray[np.float32]]
    bad: list[tuple[str, str]]


@torch.no_grad()
def extract(
    backbone: Backbone,
    images: Images,
    stages: Sequence[int] | None,
    *,
    device: torch.device,
    directory: Path,
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
    title: str = "features",
) -> Extracted:
    """Pooled features of all images.

    Args:
        backbone: the network, which is moved to the device.
        images: images whose features are computed.
        stages: numbers, from 1; negative ones count from the last; None is all.
        device: where the network computes.
        directory: an empty directory, where the features are written as they come and mapped into memory.
        batch_size: images at a time.
        num_workers: processes that decode; None chooses.
        title: of the progress bar.

    Returns:
        The features; images whose features are not finite count as unreadable.

    Raises:
        OSError: if the features cannot be written.
        ValueError: if there is no such stage, or none of the images can be read.
    """
    backbone.model.to(device)
    batches = batches_of(backbone.reading, images, device=device, batch_size=batch_size, num_workers=num_workers)
    positions: list[NDArray[np.int64]] = []
    widths: dict[int, int] = {}
    bad: list[tuple[str, str]] = []
    total = math.ceil(len(images) / batch_size)
    for pixels, batch in tqdm(batches, total=total, desc=title, unit="batch", disable=None):
        bad += batch.bad
        if not len(pixels):
            continue
        maps = stage_maps(backbone.model, pixels)
        numbers = _numbers(stages, len(maps))
        pooled = {number: maps[number - 1].float().mean((2, 3)).cpu().numpy() for number in numbers}  # (B, C) each
        finite = np.all([np.isfinite(rows).all(1) for rows in pooled.values()], axis=0)  # (B,)
        index = batch.index.numpy()
        bad += [(images.name(int(i)), "its features are not finite") for i in index[~finite]]
        positions.append(index[finite])
        for number, rows in pooled.items():
            widths[number] = rows.shape[1]
            # Written, not mapped: a mapped file that outgrows its disk kills the process.
            with (directory / f"stage{number}.bin").open("ab") as file:
                file.write(rows[finite].tobytes())
    usable = np.concatenate(positions) if positions else np.empty(0, np.int64)
    if not len(usable):
        raise ValueError(f"none of {len(images)} images can be read: {bad[0][0]}: {bad[0][1]}" if bad else "no images")
    mapped: dict[int, NDArray[np.float32]] = {
        number: np.memmap(directory / f"stage{number}.bin", np.float32, "r").reshape(-1, width)
        for number, width in widths.items()
    }
    return Extracted(usable, mapped, bad)


def check_stages(backbone: Backbone, stages: Sequence[int] | None) -> None:
    """Check that the network, which is on the CPU, has the given stages.

    Args:
        backbone: the network.
        stages: numbers, as in `extract`.

    Raises:
        ValueError: if it has no such stage.
    """
    blank = torch.zeros(1, backbone.reading.in_chans, *backbone.reading.image_size)
    with torch.inference_mode():
        _numbers(stages, len(stage_maps(backbone.model, blank)))


def _numbers(stages: Sequence[int] | None, num_stages: int) -> list[int]:
    if stages is None:
        return list(range(1, num_stages + 1))
    if wrong := [stage for stage in stages if not 1 <= abs(stage) <= num_stages]:
        raise ValueError(f"stages: {wrong[0]} is none of the network's {num_stages}: use 1 to {num_stages}")
    return sorted({stage if stage > 0 else num_stages + 1 + stage for stage in stages})
