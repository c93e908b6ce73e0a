"""What the numbers in label maps mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fcmae.data.geometry import MAX_PIXELS, Box
from fcmae.data.index import Images
from fcmae.data.rasters import LabelMap
from fcmae.data.source import BadImage, DataError, few, printable
from fcmae.data.split import evenly

IGNORED = -1  # in place of a class
_UNKNOWN = -2
MAX_MAPS = 200  # that are looked at for their values
MAX_VALUE = 2**16  # above those that a map may hold
BAND_PIXELS = 2**24  # of a map that are looked at together
MAX_CLASSES = 2**15 - 1  # numbers of classes are of 16 bits
MAX_UNNAMED = 256  # classes that are taken for such though nobody named them: more are numbers of objects
MANY_OBJECTS = 20  # in a map: as many classes are hardly all in one


class UnknownClass(DataError):  # noqa: N818
    """A label map holds a number that no class has."""


@dataclass(frozen=True)
class Classes:
    """The classes of a pixel.

    Attributes:
        names: of the classes, which are numbered in this order.
        values: what the maps hold for each.
        ignored: what they hold where the class is unknown, or None.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: int | None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _number_of(self) -> NDArray[np.int16]:
        table = np.full(MAX_VALUE + 1, _UNKNOWN, np.int16)
        if self.ignored is not None:
            table[self.ignored] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def numbers(
        self, stored: NDArray[np.int64], name: str, is_seen: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int16]:
        """Classes by number, IGNORED where they are unknown.

        Args:
            stored: of any shape, what a map holds.
            name: of the map, for the error.
            is_seen: likewise, False where the image is missing and no class is to be known; None: it is nowhere.

        Raises:
            UnknownClass: if a value is of no class.
        """
        numbers = self._number_of[np.clip(stored, -1, MAX_VALUE)]  # -1 is the last entry, which is unknown
        if (unknown := numbers == _UNKNOWN).any():
            raise UnknownClass(
                f"{printable(name)} holds the value {stored[unknown][0]}, which is no class: the classes have "
                f"{few(map(str, self.values), 8)}, and {self.ignored} is ignored; set data.class_names, "
                "data.class_values or data.ignore_value"
            )
        return numbers if is_seen is None else np.where(is_seen, numbers, np.int16(IGNORED))

    def stored(self, numbers: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """What a map holds for classes by number, in the smallest of uint8 and uint16 that can.

        Args:
            numbers: of any shape; IGNORED only where `ignored` is a value.
        """
        values = self.values if self.ignored is None else (*self.values, self.ignored)  # IGNORED is the last
        return np.asarray(values, np.uint8 if max(values) < 2**8 else np.uint16)[numbers]


class Values(NamedTuple):
    """What label maps hold.

    Attributes:
        counts: (MAX_VALUE,), pixels of each value.
        are_objects: whether they seem to number objects: up from 1 without a gap in every map, in one to MANY_OBJECTS
            or more, and not to the same in all.
        nodata: what GDAL_NODATA of some states for pixels without a class.
    """

    counts: NDArray[np.int64]
    are_objects: bool = False
    nodata: frozenset[int] = frozenset()


def count_values(maps: Images, max_pixels: int = MAX_PIXELS) -> Values:
    """Look at a sample of the maps, evenly spread.

    Args:
        maps: all.
        max_pixels: see `LabelMap`.

    Raises:
        ValueError: if none of the sample can be read, or one holds other numbers.
    """
    counts, reason = np.zeros(MAX_VALUE, np.int64), ""
    largest, has_gaps, nodata = set[int](), False, set[int]()
    for i in tqdm(evenly(len(maps), MAX_MAPS), "looking at label maps", unit="map", delay=5, disable=None, leave=False):
        try:
            with maps.open(i) as file:
                label_map = LabelMap(file, max_pixels)
                nodata |= set() if label_map.nodata is None else {label_map.nodata}
                pixels = np.zeros(MAX_VALUE, np.int64)
                for box in bands(label_map.height, label_map.width, max_pixels):
                    values = label_map.read(box)
                    if values.min() < 0 or values.max() >= MAX_VALUE:
                        raise UnknownClass(
                            f"{printable(maps.name(i))} holds values from {values.min()} to {values.max()}: store "
                            f"classes as 0 to {MAX_VALUE - 1}"
                        )
                    pixels += np.bincount(values.ravel(), minlength=MAX_VALUE)
                present = np.flatnonzero(pixels[1:])
                largest.add(len(present))
                has_gaps = has_gaps or present.max(initial=-1) >= len(present)
                counts += pixels
        except BadImage as error:
            reason = reason or f"{printable(maps.name(i))}: {error}"
    if not counts.any():
        raise ValueError(f"data.maps: none of {len(maps)} label maps can be read: {reason}")
    return Values(counts, not has_gaps and len(largest) > 1 and max(largest) >= MANY_OBJECTS, frozenset(nodata))


def bands(height: int, width: int, max_pixels: int = MAX_PIXELS) -> Iterator[Box]:
    """Boxes that make up an image, from the top, of BAND_PIXELS and of max_pixels at most where it is not wider.

    Args:
        height: of the image, in pixels.
        width: likewise.
        max_pixels: see `LabelMap`.
    """
    rows = max(1, min(BAND_PIXELS, max_pixels) // width)
    for top in range(0, height, rows):
        yield top, 0, min(rows, height - top), width


def find_classes(
    found: Values,
    names: Sequence[str],
    values: Sequence[int],
    ignored: int | None,
    tested: NDArray[np.int64] | None = None,
    *,
    is_begun: bool = False,
) -> Classes:
    """The classes of label maps.

    Args:
        found: what the maps hold that are learnt from.
        names: of the classes; none is by their numbers.
        values: what the maps hold for each; none is 0, 1, 2 and so on, up to the largest that was counted.
        ignored: see `Classes`.
        tested: (MAX_VALUE,), pixels of each value in the maps that are held out.
        is_begun: whether a run has taken the maps before: they are not asked again whether they are of classes.

    Raises:
        ValueError: if there are fewer than two classes or too many, or the maps hold none of them or few of many.
    """
    counts = found.counts
    present = np.flatnonzero(counts).tolist()
    if not names and not values:
        if found.are_objects and not is_begun:
            raise ValueError(
                "data.maps: the values count up from 1 without a gap in each map, and not to the same in all, as "
                "objects are numbered: give maps of classes, or say which values are classes by data.class_values"
            )
        all_counts = counts.copy() if tested is None else counts + tested
        if ignored is not None:
            all_counts[ignored] = 0
        largest = int(np.flatnonzero(all_counts)[-1]) if all_counts.any() else 0
        values = [value for value in range(largest + 1) if value != ignored]
        is_sparse = len(values) > MANY_OBJECTS and len(values) > 10 * np.count_nonzero(all_counts) and not is_begun
        if len(values) > MAX_UNNAMED or is_sparse:
            raise ValueError(
                f"data.maps: the maps hold {few(map(str, present), 8)}, values up to {largest}, which would be "
                f"{len(values)} classes: number the classes, or say which values they have by data.class_values"
            )
    values = values or range(len(names))
    names = names or [str(value) for value in values]
    if len(names) < 2:
        raise ValueError(
            f"data.maps: there is one class, {names[0]!r}, as the maps hold {few(map(str, present), 8)} and "
            f"data.ignore_value is {ignored}: set data.ignore_value to none, and of black and white maps "
            "data.class_values to 0 255 too"
        )
    if len(names) > MAX_CLASSES:
        raise ValueError(f"data.class_names: there are {len(names)} classes: give {MAX_CLASSES} at most")
    if not counts[list(values)].any():
        raise ValueError(
            f"data.maps: the maps hold {few(map(str, present), 8)}, and none of the classes, which have "
            f"{few(map(str, values), 8)}: set data.class_values"
        )
    return Classes(tuple(names), tuple(values), ignored)
