"""Which of many: held out, so many of each class, evenly spaced. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fcmae.data.index import Images


def draw(labels: NDArray[np.int64], counts: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Draw at random so many of each class, or all where a class has fewer.

    Args:
        labels: (N,) class numbers.
        counts: (classes,), how many to draw of each.
        seed: the same labels, counts and seed draw the same.

    Returns:
        Positions in labels, rising, int64.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label, count in enumerate(counts):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:count]] = True
    return np.flatnonzero(chosen)


def share_of_each(counts: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """How many a share of each class is, rounded, but at least one where there is one.

    Args:
        counts: (classes,), how many there are.
        share: in 0..1.
    """
    return np.minimum(np.maximum(1, np.round(share * counts)), counts).astype(np.int64)


def split(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Draw held-out images.

    With labels every class is held out in proportion (at most one image off), and at least one image of each class
    stays in training. The same images and seed draw the same.

    scikit-learn's stratified split is not used: it refuses classes with one image and shares smaller than one image a
    class, and may leave a class out of training.

    Args:
        images: with labels, or without.
        share: of the images, in [0, 1); 0 holds out none, more holds out at least one image where there are two.
        seed: of the draw.

    Returns:
        Training and held-out images, each in the order of `images`.
    """
    labels = np.zeros(len(images), dtype=np.int64) if images.labels is None else images.labels
    if share == 0 or len(images) == 0:
        return images, images.subset([])
    counts = np.bincount(labels)
    quota = share * counts
    num_held = np.floor(quota).astype(np.int64)
    # Largest remainders: the classes that lose most by rounding down get the images that are left of the total.
    missing = max(1, round(share * len(images))) - int(num_held.sum())
    num_held[np.argsort(num_held - quota, kind="stable")[: max(0, missing)]] += 1
    held_out = draw(labels, np.minimum(num_held, np.maximum(counts - 1, 0)), seed)
    return images.subset(np.delete(np.arange(len(images)), held_out)), images.subset(held_out)


def evenly(num: int, most: int) -> list[int]:
    """At most `most` positions below `num`, evenly spaced, the first and the last among them; of one, the first."""
    if num <= most:
        return list(range(num))
    return [round(i * (num - 1) / max(1, most - 1)) for i in range(most)]
