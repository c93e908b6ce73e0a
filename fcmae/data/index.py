"""The images of a run in a fixed order, kept in its directory; which of them are among others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fcmae.atomic import check_file, replacing
from fcmae.data.shards import Parts
from fcmae.data.source import PART, BadImage, Files, Names, Source, printable
from fcmae.data.storage import Storage, is_remote

logger = logging.getLogger("fcmae")

MAX_LOOKED_AT = 200_000  # files whose second names are looked for: that takes as long as listing them
MAX_INDEX = 2**37  # bytes of what `Images.save` writes: a thousand million paths
ANY = Storage()
OF_A_PART = ("paths", "labels", "places")  # in each line of an index; the first has what is of all


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a source in a fixed order, which numbers them, with labels or without.

    Attributes:
        source: what their bytes come from.
        positions: (N,) int64, which images of the source; None is all, in its order.
        labels: (N,) int64, for each image the position of its class in class_names; None for images without labels.
        class_names: of all classes, those without an image too.
        notes: sentences on how they were found, for whoever runs with them.
        lists: SHA-256 in hex of each list of the user's that they were found in, by its address.
    """

    source: Source
    positions: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    lists: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(
        cls,
        paths: Sequence[str],
        labels: Sequence[int] | NDArray[np.int64] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Images:
        """Images that are files.

        Args:
            paths: absolute ones.
            labels: (N,), for each the position of its class in class_names; None for images without labels.
            class_names: of all classes.
        """
        return cls(
            Files(paths),
            labels=None if labels is None else np.array(labels, dtype=np.int64),
            class_names=None if class_names is None else tuple(class_names),
        )

    def __len__(self) -> int:
        return len(self.source) if self.positions is None else len(self.positions)

    def _at(self, i: int) -> int:
        return i if self.positions is None else int(self.positions[i])

    def name(self, i: int) -> str:
        """What image i is called: of a file, its path."""
        return self.source.name(self._at(i))

    def names(self) -> list[str]:
        """The names of all images, in order."""
        return [name for part in self._names() for name in part]

    def _names(self) -> Iterator[list[str]]:
        """Likewise, a part at a time."""
        for start in range(0, len(self), PART):
            end = min(start + PART, len(self))
            yield self.source.names(np.arange(start, end) if self.positions is None else self.positions[start:end])

    def open(self, i: int) -> BinaryIO:
        """Image i as a file that can seek; the caller closes it.

        Raises:
            BadImage: if it is not there or cannot be read.
        """
        try:
            return self.source.open(self._at(i))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise BadImage.unread(error) from error

    def label(self, i: int) -> int | None:
        """The class of image i by number, if it has one."""
        return None if self.labels is None else int(self.labels[i])

    def label_name(self, i: int) -> str | None:
        """The class of image i by name, if it has one."""
        return None if self.labels is None or self.class_names is None else self.class_names[self.labels[i]]

    def fingerprint(self) -> str:
        """SHA-256 in hex of names, labels, class names and what the source tells; names count from their common parent.

        A folder that moves as a whole keeps its fingerprint; a file added, removed or renamed changes it.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        shared: str | None = None
        for part in self._names():
            # What the first and the last in order begin with, all do.
            ends = [min(part), max(part), *([] if shared is None else [shared])]
            shared = os.path.commonprefix(ends)  # noqa: RUF071
        start = 0 if shared is None else shared.rfind("/") + 1
        fingerprint, numbers = self.source.fingerprint(), iter(["null"])
        if self.labels is not None:
            numbers = _json_list(self.labels[i : i + PART].tolist() for i in range(0, len(self), PART))
        names = _json_list([name[start:] for name in part] for part in self._names())
        rest = json.dumps([self.class_names, fingerprint] if fingerprint else [self.class_names])[1:-1]
        digest = hashlib.sha256()
        for text in chain("[", names, [", "], numbers, [f", {rest}]"]):  # of one list, which nothing holds whole
            digest.update(text.encode())
        return digest.hexdigest()

    def tell_notes(self) -> None:
        """Say on stderr what was left out when they were found."""
        for note in self.notes:
            print(note, file=sys.stderr)

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> Images:
        """The images at the given positions, in the given order, of the same source and with the same classes."""
        chosen = np.asarray(positions, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, positions=self._positions()[chosen], labels=labels)

    def _positions(self) -> NDArray[np.int64]:
        return np.arange(len(self.source)) if self.positions is None else self.positions

    def joined(self, other: Images) -> Images:
        """These images and then others of the same source; without labels."""
        assert self.source is other.source
        return Images(self.source, np.concatenate([self._positions(), other._positions()]))

    def save(self, path: str | Path) -> None:
        """Write names, labels and the places of what lies in shards, whole or not at all.

        Each line is a JSON object, of at most PART images, so that nothing is in memory twice.
        """
        with replacing(Path(path)) as aside, aside.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(part)}\n" for part in self._parts())

    def _parts(self) -> Iterator[dict[str, Any]]:
        """What is written of some images at a time, and of all of them in the first."""
        for start in range(0, max(1, len(self)), PART):
            at = np.arange(start, min(start + PART, len(self)))
            labels = None if self.labels is None else self.labels[at].tolist()
            at = at if self.positions is None else self.positions[at]
            part: dict[str, Any] = {"paths": self.source.names(at), "labels": labels}
            if not start:
                part |= {"num_images": len(self), "class_names": self.class_names}
                part |= {"lists": self.lists} if self.lists else {}
            if isinstance(self.source, Parts):
                if not start:
                    # The fingerprint is of all that were found, of which these may be a part, now or when it was read.
                    part |= {"shards": self.source.shards, "stamps": self.source.stamps}
                    part |= {"fingerprint": self.source.fingerprint()}
                part["places"] = self.source.table[:, at].tolist()
            yield part

    @classmethod
    def load(cls, path: str | Path, storage: Storage = ANY) -> Images:
        """Read what `save` wrote of files and shards.

        Args:
            path: of what it wrote.
            storage: that reads the images.

        Raises:
            ValueError: if the file holds something else.
        """
        first: dict[str, Any] = {}
        labels, places = list[NDArray[np.int64]](), list[NDArray[np.int64]]()

        def names(lines: Iterable[str]) -> Iterator[str]:
            for number, line in enumerate(lines):
                part = json.loads(line)
                yield from part["paths"]
                if part["labels"] is not None:
                    labels.append(np.array(part["labels"], np.int64))
                if "places" in part:
                    places.append(np.array(part["places"], np.int64))
                if not number:
                    first.update({key: value for key, value in part.items() if key not in OF_A_PART})

        try:
            check_file(Path(path), MAX_INDEX)
            with Path(path).open(encoding="utf-8", errors="surrogatepass") as file:
                addresses, classes = Names(names(file)), first["class_names"]
            if len(addresses) != (num := first.get("num_images", len(addresses))):  # which indexes began to say
                raise ValueError(f"{len(addresses)} of {num} images")
            source: Source = Files(addresses)
            if "shards" in first:
                table, stamps = np.concatenate(places, axis=1), first.get("stamps", ())
                source = Parts(addresses, first["shards"], table, storage, stamps, first.get("fingerprint"))
            numbers = np.concatenate(labels) if labels else None
            if numbers is not None and numbers.shape != (len(addresses),):
                raise ValueError(f"{len(numbers)} labels of {len(addresses)} images")
            names_of_classes = None if classes is None else tuple(classes)
            if numbers is not None and not -1 < numbers.min(initial=0) <= numbers.max(initial=0) < len(classes or [0]):
                raise ValueError(f"labels of {len(classes or ())} classes up to {numbers.max()}")
            return cls(source, None, numbers, names_of_classes, lists=dict(first.get("lists", {})))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is not an index of images ({error}): delete it to have it made anew") from error


def _json_list(parts: Iterable[list[Any]]) -> Iterator[str]:
    """The JSON text of one list of all items of lists, in pieces."""
    between = "["
    for part in filter(None, parts):
        yield f"{between}{json.dumps(part)[1:-1]}"
        between = ", "
    yield "[]" if between == "[" else "]"


def header_of(config: Path) -> tuple[str, str]:
    """The kind of a run and the version in its config.yaml; empty where that is somebody else's or cannot be read."""
    with suppress(OSError):
        if config.is_file():
            with config.open("rb") as file:
                match file.readline(200).decode(errors="replace").split():
                    case ["#", "fcmae", kind, *version]:
                        return kind, " ".join(version)
    return "", ""


def is_of_run(config: Path) -> bool:
    """Whether a config.yaml is that of a run."""
    return header_of(config)[0] != ""


def also_in(images: Images, others: Images) -> list[str]:
    """The names of images that are among others, a file that has two names too.

    Args:
        images: that are looked for.
        others: that they are looked for among; of very many, names alone count.
    """
    if not len(others):
        return []
    key: Callable[[str], tuple[int, int] | str] = identity
    if len(images) + len(others) > MAX_LOOKED_AT:
        if images.source is others.source and not np.isin(images._positions(), others._positions()).any():
            return []  # which has each name once
        logger.info("of %d images only the names are compared, not links and second names", len(images) + len(others))
        key = str
    keys = set(map(key, others.names()))
    return [name for name in images.names() if key(name) in keys]


def check_apart(learnt: Images, tested: Images, key: str, other: str | None = None) -> None:
    """Refuse to score a model on images that it learns from.

    Args:
        learnt: to learn from.
        tested: held out.
        key: the setting that they are of.
        other: what gives those to learn from; None if both were drawn from one source.

    Raises:
        ValueError: if an image is both, under another name perhaps.
    """
    if both := also_in(tested, learnt):
        some = f"{key}: {len(both)} of the {len(tested)} images held out, such as {printable(min(both))}, are"
        if other is None:
            raise ValueError(f"{some} training images too, under another name: take such links out")
        raise ValueError(f"{some} in {other} too: take them out of one")


def identity(name: str) -> tuple[int, int] | str:
    """The same for a file that has two names.

    Args:
        name: of an image.
    """
    try:
        status = Path(name).stat()
    except (OSError, ValueError):  # of an archive, or elsewhere
        return name
    return status.st_dev, status.st_ino


def kept_images(paths: Sequence[Path], storage: Storage) -> list[Images] | None:
    """What indexes of a run hold; None if one is not there, or if what they were made from is to be read again.

    Tables that were copied since are, and lists of the user's that were changed.

    Args:
        paths: of the indexes.
        storage: that reads the images.

    Raises:
        ValueError: if a file is no index.
    """
    if not all(path.is_file() for path in paths):
        return None
    indexes = [Images.load(path, storage) for path in paths]
    is_copied = any(isinstance(images.source, Parts) and images.source.is_copied() for images in indexes)
    is_changed = any({**images.lists, **hashed_lists(images.lists)} != images.lists for images in indexes)
    return None if is_copied or is_changed else indexes


def hashed_lists(sources: Iterable[str]) -> dict[str, str]:
    """Those of the sources that are lists and can be read now: see `Images.lists`.

    Args:
        sources: as users give them.
    """
    hashes = {}
    for source in sources:
        if source.lower().endswith((".txt", ".csv")) and (is_remote(source) or Path(source).is_file()):
            with suppress(OSError, ValueError):
                address = source if is_remote(source) else os.path.abspath(source)  # noqa: PTH100
                hashes[address] = hashlib.sha256(ANY.read(source)).hexdigest()
    return hashes
