"""Which images a run uses: found once, sorted, kept in the run directory. No image is opened to find it."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import json
import logging
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache, cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from fcmae.atomic import check_file, replacing
from fcmae.data.shards import (
    COMPRESSED,
    SHARDS,
    SUFFIXES,
    Parts,
    Shards,
    is_damage,
    is_double,
    is_image,
    is_nameless,
    is_shard,
    left_out,
    without_suffix,
)
from fcmae.data.source import (
    PART,
    SYSTEM_FOLDERS,
    BadImage,
    Files,
    Names,
    Source,
    few,
    is_dicom,
    is_unicode,
    open_file,
    printable,
)
from fcmae.data.storage import Storage, canonical, is_remote, joined, listed
from fcmae.data.tables import can_read

logger = logging.getLogger("fcmae")

OF_MODELS = {"best", "last", "checkpoints"}  # folders of a run
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_INDEX = 2**37  # bytes of what `Images.save` writes: a thousand million paths
TELL_EVERY_S = 10.0
ANY = Storage()

Found = TypeVar("Found")
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
        known, numbers = self.source.fingerprint(), iter(["null"])
        if self.labels is not None:
            numbers = _json_list(self.labels[i : i + PART].tolist() for i in range(0, len(self), PART))
        names = _json_list([name[start:] for name in part] for part in self._names())
        told = json.dumps([self.class_names, known] if known else [self.class_names])[1:-1]
        digest = hashlib.sha256()
        for text in chain("[", names, [", "], numbers, [f", {told}]"]):  # of one list, which nothing holds whole
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
                    told = {"shards": self.source.shards, "stamps": self.source.stamps}
                    part |= told | {"fingerprint": self.source.fingerprint()}
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
                found, classes = Names(names(file)), first["class_names"]
            if len(found) != (num := first.get("num_images", len(found))):  # which indexes began to say
                raise ValueError(f"{len(found)} of {num} images")
            source: Source = Files(found)
            if "shards" in first:
                known = first.get("stamps", ()), first.get("fingerprint")
                source = Parts(found, first["shards"], np.concatenate(places, axis=1), storage, *known)
            numbers = np.concatenate(labels) if labels else None
            if numbers is not None and numbers.shape != (len(found),):
                raise ValueError(f"{len(numbers)} labels of {len(found)} images")
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


def images_of_run(path: Path) -> Images | None:
    """The images that a run learnt from, with labels if they had them; None where there is no run that says.

    Args:
        path: the run, or weights in its directory: best/, last/ or a checkpoint.
    """
    if (run := run_of(path)) is not None and (run / "files.json").is_file():
        with suppress(ValueError, OSError):
            return Images.load(run / "files.json")
    return None


def labelled_images_of_run(path: Path) -> Images | None:
    """Those of `images_of_run`, if the run learnt their labels, or their label maps.

    Args:
        path: likewise.
    """
    run, found = run_of(path), images_of_run(path)
    if run is None or found is None:
        return None
    return found if found.labels is not None or (run / "maps.json").is_file() else None


def run_of(path: Path) -> Path | None:
    """The run that a path is, or in whose best/, last/ or checkpoints/ it lies; None of others.

    Args:
        path: of a model; one that is not there is the name of a published one.
    """
    if not path.exists():
        return None
    place = path.absolute()
    for run in (place, *place.parents[:3]):
        if (run / "config.yaml").is_file() and (run == place or place.relative_to(run).parts[0] in OF_MODELS):
            return run
    return None


MAX_LOOKED_AT = 200_000  # files whose second names are looked for: that takes as long as listing them


def also_in(images: Images, others: Images) -> list[str]:
    """The names of images that are among others, a file that has two names too.

    Args:
        images: that are looked for.
        others: that they are looked for among; of very many, names alone count.
    """
    key: Callable[[str], tuple[int, int] | str] = identity
    if len(images) + len(others) > MAX_LOOKED_AT:
        if images.source is others.source and not np.isin(images._positions(), others._positions()).any():
            return []  # which has each name once
        logger.info("of %d images only the names are compared, not links and second names", len(images) + len(others))
        key = str
    known = set(map(key, others.names()))
    return [name for name in images.names() if key(name) in known]


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
        found = Path(name).stat()
    except (OSError, ValueError):  # of an archive, or elsewhere
        return name
    return found.st_dev, found.st_ino


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
    found = [Images.load(path, storage) for path in paths]
    is_copied = any(isinstance(images.source, Parts) and images.source.is_copied() for images in found)
    is_changed = any({**images.lists, **_lists(images.lists)} != images.lists for images in found)
    return None if is_copied or is_changed else found


def _lists(sources: Iterable[str]) -> dict[str, str]:
    """Those of the sources that are lists and can be read now: see `Images.lists`."""
    found = {}
    for source in sources:
        if source.lower().endswith((".txt", ".csv")) and (is_remote(source) or Path(source).is_file()):
            with suppress(OSError, ValueError):
                address = source if is_remote(source) else _absolute(source)
                found[address] = hashlib.sha256(ANY.read(source)).hexdigest()
    return found


def find_images(sources: Sequence[str], *, key: str = "data.path", storage: Storage = ANY) -> Images:
    """All images of one or several sources, sorted by path and without duplicates.

    Args:
        sources: folders (searched recursively; links are followed, hidden files and folders skipped), .txt files with
            one path a line (relative ones start at the list's folder; any suffix), glob patterns (`**` is recursive; a
            folder that matches is searched), single images, or tar files, wherever they are found: see shards.py. Each
            may be a URL that fsspec knows, such as s3://bucket/photos.
        key: the setting that errors name.
        storage: that reads tar files and images.

    Raises:
        ValueError: for a source that is missing, cannot be listed, or holds no image.
    """
    found, others, shards, lists = list[str](), Counter[str](), Shards(storage, key), _lists(sources)
    expanded = [list(_told(_expand(source, key, others), key)) for source in sources]
    shards.learn(path for paths in expanded for path in paths if is_shard(path))
    for source, paths in zip(sources, expanded, strict=True):
        paths = [name for path in paths for name in (shards.labels(path) if is_shard(path) else [path])]
        if not paths:
            raise ValueError(
                f"{key}: {source!r} holds no image ({' '.join(SUFFIXES)}): give a folder of images, a .txt file that "
                f"lists paths, or a glob pattern{'' if can_read() else '; tables need `pip install fcmae[parquet]`'}"
            )
        found += paths
    names = [name for name, _ in groupby(sorted(found))]  # not a set, which would take half a gigabyte of ten million
    return Images(shards.source(names), notes=left_out(others, key) + shards.notes(), lists=lists)


def _told(found: Iterable[Found], key: str) -> Iterator[Found]:
    """What a search finds; while it lasts, it is said how much that is."""
    told = time.monotonic()
    for count, item in enumerate(found, 1):
        yield item
        if (now := time.monotonic()) - told > TELL_EVERY_S:
            level = logging.INFO if logger.handlers else logging.WARNING  # which is shown of commands that keep no log
            logger.log(level, "%s: %s images or shards were found so far", key, f"{count:,}")
            told = now


def _expand(source: str, key: str, others: Counter[str]) -> Iterator[str]:
    path = Path(source)
    if is_remote(source):
        yield from _expand_remote(source, key, others)
    elif path.is_dir():
        yield from _walk(path, key, others)
    elif path.suffix.lower() == ".txt" and path.is_file():
        yield from _read_list(str(path), key)
    elif path.is_file():
        yield from _image_or_shard(path, key)
    elif glob.has_magic(source):
        # What is below a folder that was searched matches `**` too.
        searched, seen = set[str](), set[tuple[int, int]]()
        for match in _matching_here(path):
            if searched and not searched.isdisjoint(map(str, match.parents)):
                continue
            if match.is_dir():
                searched.add(str(match))
                yield from _walk(match, key, others, seen=seen)
            else:
                found = list(_image_or_shard(match, key))
                yield from found
                if not found and not match.name.startswith("."):
                    others[match.suffix.lower()] += 1
    else:
        raise ValueError(
            f"{key}: {source!r} does not exist: "
            "give a folder of images, a .txt file that lists paths, or a glob pattern"
        )


def _matching_here(pattern: Path) -> Iterator[Path]:
    """What matches, each folder before what is in it: nothing of systems or runs, nor of a folder again by a link."""
    fixed = next(number for number, part in enumerate(pattern.parts) if glob.has_magic(part))

    @cache
    def is_in_run(folder: Path) -> bool:
        return len(folder.parts) > fixed and (is_of_run(folder / "config.yaml") or is_in_run(folder.parent))

    met = dict[tuple[int, int], Path]()

    @cache
    def has_another_name(folder: Path) -> bool:
        with suppress(OSError):
            status = folder.stat()
            return met.setdefault((status.st_dev, status.st_ino), folder) != folder
        return False

    # Not Path.glob: it takes no absolute pattern.
    for match in map(Path, sorted(glob.glob(str(pattern), recursive=True))):  # noqa: PTH207
        folder = match.parent
        if SYSTEM_FOLDERS.isdisjoint(match.parts[fixed:]) and not (is_in_run(folder) or has_another_name(folder)):
            yield match


def _image_or_shard(path: Path, key: str) -> Iterator[str]:
    _refuse_compressed(str(path), key)
    if is_image(path.name) or is_shard(path.name) or _is_unnamed_dicom(str(path)):
        yield _absolute(path)


def _refuse_compressed(source: str, key: str) -> None:
    if source.endswith(COMPRESSED):
        raise ValueError(f"{key}: {source!r} is compressed, so that no image can be read alone: unpack it")


def _expand_remote(source: str, key: str, others: Counter[str]) -> Iterator[str]:
    _refuse_compressed(source, key)
    name = source.rpartition("/")[2]
    if name.lower().endswith(".txt"):
        yield from _read_list(source, key)
    elif _is_pattern(source):
        # What is below a folder that was searched matches `**` too.
        folder = "?"
        for path in _matching(source, key):
            if path.startswith(folder):
                continue
            if path.endswith("/"):
                folder = path
                yield from _walk_remote(path, key, others)
            elif is_image(os.path.basename(path)) or is_shard(path):  # noqa: PTH119
                yield path
    elif is_image(name) or is_shard(name):
        yield source
    else:
        yield from _walk_remote(source, key, others)


def _matching(pattern: str, key: str) -> list[str]:
    """The files and folders that a URL's pattern matches: hidden ones, as on this machine, only if it names a dot."""
    fixed, names_hidden = re.split(r"[*\[]", canonical(pattern))[0].count("/"), "/." in pattern
    return [
        path
        for path in _listed(pattern, key, "glob")
        if SYSTEM_FOLDERS.isdisjoint(parts := path.split("/")[fixed:])
        and (names_hidden or not any(part.startswith(".") for part in parts))
    ]


def _walk_remote(source: str, key: str, others: Counter[str]) -> Iterator[str]:
    """As `_walk`, by one listing; a run is a folder with the files of its settings and of its machine."""
    logger.info("%s: listing %s", key, source)
    found, root = _listed(source, key, "find"), canonical(source)
    settings, machines = (
        {path.rpartition("/")[0] for path in found if path.endswith(f"/{name}")}
        for name in ("config.yaml", "environment.json")
    )
    runs = tuple(f"{run}/" for run in settings & machines)
    for path in found:
        *folders, name = path[len(root) + 1 :].split("/")
        is_hidden = any(part.startswith(".") or part in SYSTEM_FOLDERS for part in (*folders, name))
        if is_hidden or path.startswith(runs):
            continue
        if is_image(name) or is_shard(name):
            yield path
        else:
            others[os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122


def _is_pattern(url: str) -> bool:
    return "*" in url or "[" in url  # a question mark begins a query


def _listed(source: str, key: str, method: str) -> list[str]:
    try:
        return listed(source, method)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {source!r} cannot be listed ({error}): see that it is there and yours") from error


def _absolute(path: str | Path) -> str:
    # Links are kept: Path.resolve would ask the file system about every part of every path.
    return os.path.abspath(path)  # noqa: PTH100


def _walk(
    root: Path,
    key: str,
    others: Counter[str],
    links: list[str] | None = None,
    seen: set[tuple[int, int]] | None = None,
) -> Iterator[str]:
    """The images and shards below a folder; files of other formats are counted in `others`, by suffix.

    Hidden files and folders, those of systems, and the directories of runs, whose pictures are no images to learn from,
    are passed over, and so is everything that is no file.

    links: goes on with those to folders and images that are met. seen: of folders that were searched before, device and
    inode; goes on with these.
    """
    seen = set() if seen is None else seen
    folders = [_absolute(root)]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was searched, or is being searched
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
            shown = [entry for entry in shown if not _leads_to_itself(entry)]
        except OSError as error:
            where, why = error.filename, error.strerror
            raise ValueError(f"{key}: {where!r} cannot be listed ({why}): make it readable") from error
        if any(entry.name == "config.yaml" and is_of_run(Path(entry.path)) for entry in shown):
            continue
        inner = [entry for entry in shown if entry.is_dir() and entry.name not in SYSTEM_FOLDERS]
        folders += [entry.path for entry in inner]
        if links is not None:
            links += [entry.path for entry in inner if entry.is_symlink()]
        for entry in shown:
            if entry.is_file():
                is_table = is_shard(entry.name) and (entry.name.endswith(".tar") or can_read())
                if is_image(entry.name) or is_table or _is_unnamed_dicom(entry.path):
                    if links is not None and entry.is_symlink():
                        links.append(entry.path)
                    yield entry.path
                else:
                    others[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122


def _check_links(root: str, links: Mapping[str, list[str]], key: str) -> None:
    """Refuse links that give images the label of a second class.

    root: of the class folders. links: those below each, by its name.
    """
    real, top = cache(os.path.realpath), os.path.realpath(root)
    places = list[tuple[str, str, str]]()  # where each leads, its class and itself
    for name, paths in links.items():
        for link in paths:
            folder, last = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))  # noqa: PTH115, PTH118, PTH120
            is_name = last not in ("", os.curdir, os.pardir)  # then the folder is that of many links
            places.append((f"{real(folder)}/{last}" if is_name else real(link), name, link))
    owners: dict[str, str] = {}
    for place, name, link in sorted(places):  # a folder before what is in it
        if f"{top}/".startswith(f"{place}/"):
            owner: str | None = ""
        elif place.startswith(f"{top}/") and (below := place[len(top) + 1 :].partition("/")[0]) in links:
            owner = below
        else:  # outside, or in what is no class, such as a hidden folder
            owner = next((owners[up] for up in (place, *map(str, Path(place).parents)) if up in owners), None)
            owners.setdefault(place, name)
        if owner not in (name, None):
            what = f"the class {owner!r}" if owner else "the classes' own folder"
            raise ValueError(f"{key}: {link!r} of the class {name!r} is a link to what {what} has: remove the link")


def _leads_to_itself(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link that the system follows to no end."""
    try:
        entry.is_file()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True
    return False


def _is_image_file(path: Path) -> bool:
    return path.is_file() and (is_image(path.name) or _is_unnamed_dicom(str(path)))


def _is_unnamed_dicom(path: str) -> bool:
    """Whether a file whose name does not say what it is begins as DICOM does."""
    if not is_nameless(os.path.basename(path)):  # noqa: PTH119
        return False
    try:
        with open_file(path) as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def is_of_run(config: Path) -> bool:
    """Whether a config.yaml is that of a run; one that cannot be read is somebody else's."""
    with suppress(OSError):
        if config.is_file():
            with config.open("rb") as file:
                return file.read(8) == b"# fcmae "
    return False


def _read_list(address: str, key: str) -> Iterator[str]:
    folder = os.path.dirname(address)  # noqa: PTH120
    try:
        with io.TextIOWrapper(io.BytesIO(ANY.read(address)), encoding="utf-8-sig") as lines:
            yield from (joined(folder, line.strip()) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}: {address} cannot be read ({error}): give a UTF-8 text file with one path a line"
        ) from error


def find_labelled(
    source: str, class_names: Sequence[str] | None = None, *, key: str | None = None, storage: Storage = ANY
) -> Images:
    """Labelled images, sorted by path: one folder a class, a CSV file with the columns path and label, or tar files.

    Args:
        source: a folder whose sub-folders are the classes (images at any depth below each), a .csv file whose
            relative paths start at its folder, or tar files with labels (see shards.py): one, a folder of them, or a
            glob pattern. Each may be a URL.
        class_names: the classes of the training set, for images held out; labels then point into it. By default the
            classes are the labels found, in alphabetical order, or by their size if all are numbers.
        key: the setting that errors name, by default data.path, or data.val_path if class_names are given.
        storage: that reads tar files and images.

    Raises:
        ValueError: for a source that is missing or malformed, a label not in class_names, or fewer than two classes.
    """
    others, notes, lists = Counter[str](), tuple[str, ...](), _lists([source])
    key = key or ("data.path" if class_names is None else "data.val_path")
    path, shards = Path(source), Shards(storage, key)
    tars = _tars(source, path, key)
    is_folder = path.is_dir() or (is_remote(source) and not _is_file_or_pattern(source))
    if tars is not None and is_folder and _has_class_folders(source, key):
        left = f"{key}: {few(os.path.basename(tar) for tar in tars)} beside the class folders of {source!r} "  # noqa: PTH119
        tars, notes = None, (f"{left}were left out: name them by a pattern to learn from them instead",)
    elif tars is not None and is_folder and (folders := _folders_of_shards(source, key)):
        notes = (
            f"{key}: folders of tar files, {few(folders)}, beside tar files in {source!r} were left out: move these "
            "away to learn from them instead",
        )
    if tars is not None:
        label_of = _labels_of(tars, shards, source, key)
    elif path.suffix.lower() == ".csv" and (is_remote(source) or path.is_file()):
        label_of, notes = _read_csv(source if is_remote(source) else str(path), key)
    elif path.is_dir() or (is_remote(source) and not _is_pattern(source)):
        label_of, beside = _class_folders(source, key, others, may_be_empty=class_names is not None)
        if beside:
            more = f" and {len(beside) - 1} more images" if len(beside) > 1 else ""
            left = f"{key}: {printable(beside[0])}{more} beside the class folders have no label, and were left out"
            notes = (*notes, left)
        shards.learn(tar for tar in label_of if is_shard(tar))
        for tar in [tar for tar in label_of if is_shard(tar)]:
            label_of.update(dict.fromkeys(shards.labels(tar), label_of.pop(tar)))
    else:
        problem = "is neither a folder, a .csv nor a .tar file" if path.exists() else "does not exist"
        raise ValueError(
            f"{key}: {source!r} {problem}: give a folder with one sub-folder a class, a CSV with columns path,label, "
            "or tar files with labels"
        )
    names = _classes_of(set(label_of.values()), class_names, source, key)
    number = {name: i for i, name in enumerate(names)}
    paths = sorted(label_of)
    labels = np.array([number[label_of[path]] for path in paths], dtype=np.int64)
    notes += left_out(others, key) + shards.notes()
    return Images(shards.source(paths), None, labels, tuple(names), notes, lists)


def _classes_of(labels: set[str], class_names: Sequence[str] | None, source: str, key: str) -> list[str]:
    """The classes in their order: see `find_labelled`."""
    names = _sort_classes(labels) if class_names is None else list(class_names)
    if unknown := sorted(labels - set(names)):
        raise ValueError(
            f"{key}: label {unknown[0]!r} of {source!r} is no class of the training images ({few(names, 10)})"
        )
    if len(names) < 2:
        raise ValueError(f"{key}: {source!r} has only the class {names[0]!r}: a classifier needs at least two")
    if class_names is None:
        _warn_of_names(names, key)
    return names


def _tars(source: str, path: Path, key: str) -> list[str] | None:
    """The tar files that a source of labelled images names: itself, those in a folder, or those that match."""
    if is_remote(source):
        _refuse_compressed(source, key)
        if _is_pattern(source):
            found = _matching(source, key)
        else:
            found = [source] if _is_file_or_pattern(source) else _listed(source, key, "ls")
    elif path.is_dir():
        found = [_absolute(inner) for inner in path.iterdir()]
    elif glob.has_magic(source) and not path.exists():
        found = [tar for match in _matching_here(path) for tar in _image_or_shard(match, key)]
    else:
        found = list(_image_or_shard(path, key)) if path.is_file() else []
    return sorted(tar for tar in found if is_shard(tar) and not os.path.isdir(tar)) or None  # noqa: PTH112


def _is_file_or_pattern(url: str) -> bool:
    """Whether labelled images at an address are not those of a folder."""
    return url.endswith((".csv", *SHARDS)) or _is_pattern(url)


def _labels_of(tars: list[str], shards: Shards, source: str, key: str) -> dict[str, str]:
    shards.learn(tars)
    found = [pair for tar in tars for pair in shards.labels(tar).items()]
    label_of = {name: label for name, label in found if label or not is_damage(name)}
    if not label_of:
        raise ValueError(f"{key}: {source!r} holds no image ({' '.join(SUFFIXES)}): give tar files of labelled images")
    if without := [name for name, label in label_of.items() if not label]:
        raise ValueError(
            f"{key}: {printable(without[0])} and {len(without) - 1} more of {len(label_of)} images have no label: put "
            ".cls, .json or .txt beside each in its tar file, or a column label into its table"
        )
    return {name: _class_name(label, key) for name, label in label_of.items()}


def _sort_classes(names: set[str]) -> list[str]:
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names):  # a column with gaps has 1.0 for 1
        return sorted(names, key=lambda name: (Decimal(name), name))
    return sorted(names)


def _inner_folders(root: Path) -> list[Path]:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [path for path in folders if path.name not in SYSTEM_FOLDERS]


def _has_class_folders(source: str, key: str) -> bool:
    """Whether a sub-folder holds an image, and not in a shard alone."""
    return any(not is_shard(path) for _, paths in _below(source, key) for path in paths)


def _folders_of_shards(source: str, key: str) -> list[str]:
    """The sub-folders that hold shards, by name."""
    return [name for name, paths in _below(source, key) if any(map(is_shard, paths))]


def _below(source: str, key: str) -> Iterator[tuple[str, Iterable[str]]]:
    """The sub-folders by name, with the images and shards in each."""
    if not is_remote(source):
        for folder in _inner_folders(Path(source)):
            yield folder.name, _walk(folder, key, Counter())
        return
    root = canonical(source)
    names = (path[len(root) + 1 :] for path in _walk_remote(source, key, Counter()))
    yield from groupby((name for name in names if "/" in name), lambda name: name.partition("/")[0])


def _class_folders(
    source: str, key: str, others: Counter[str], *, may_be_empty: bool
) -> tuple[dict[str, str], list[str]]:
    """The images and shards in each sub-folder, and its name; and the images beside the folders."""
    if is_remote(source):
        paths, found = list(_expand_remote(source, key, others)), dict[str, list[str]]()
        root = canonical(source)
        for path in paths:
            name, slash, _ = path[len(root) + 1 :].partition("/")
            if root.startswith(("http://", "https://")):
                name = unquote(name)
            if slash:
                found.setdefault(name, []).append(path)
        beside = [path for path in paths if "/" not in path[len(root) + 1 :] and not is_shard(path)]
        _refuse_splits(root, set(found), key)
    else:
        root = str(Path(source))
        folders = _inner_folders(Path(root))
        _refuse_splits(root, {path.name for path in folders}, key)
        beside = sorted(str(path) for path in Path(root).iterdir() if _is_image_file(path))
        found = {folder.name: [] for folder in folders}
        links = {folder.name: [_absolute(folder)] if folder.is_symlink() else [] for folder in folders}
        for name, path in _told(
            ((folder.name, path) for folder in folders for path in _walk(folder, key, others, links[folder.name])), key
        ):
            found[name].append(path)
        _check_links(root, links, key)
    label_of = dict[str, str]()
    for name, images in found.items():
        if not images and not may_be_empty:
            raise ValueError(f"{key}: the class folder '{root}/{name}' holds no image: fill or remove it")
        label_of.update(dict.fromkeys(images, _class_name(name, key)))
    if not label_of:
        raise ValueError(f"{key}: {root!r} has no sub-folder with images: put each class in a folder of its own")
    return label_of, beside


def _refuse_splits(root: str, names: set[str], key: str) -> None:
    if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
        held_out = sorted(names - {"train", "training"})
        example = f"{key} {root}/{sorted(names & {'train', 'training'} or names)[0]}"
        if (other := {"data.path": "data.val_path", "data": "test"}.get(key)) is not None:
            example += f" with {other} {root}/{held_out[-1]}"
        raise ValueError(
            f"{key}: {root!r} holds splits ({', '.join(sorted(names))}) and no classes: give the folder of one of "
            f"them, such as {example}"
        )


def _class_name(name: str, key: str) -> str:
    """A class's name as it is kept: accents composed, whichever way a file system has them."""
    if not is_unicode(name):
        raise ValueError(f"{key}: the class {printable(name)} has a name that is no UTF-8: rename it")
    return unicodedata.normalize("NFC", name)


def _warn_of_names(names: Sequence[str], key: str) -> None:
    """Of classes that may not be meant: spreadsheets write nan where nothing was."""
    if odd := [name for name in names if name.lower() in ("nan", "none", "null")]:
        logger.warning("%s: there is a class %r: is that a missing label?", key, odd[0])
    same = Counter(name.casefold() for name in names)
    if twice := [name for name in names if same[name.casefold()] > 1]:
        logger.warning("%s: the classes %s differ in their case only", key, " and ".join(map(repr, twice[:2])))


def _read_csv(
    address: str, key: str, column: str = "path", other: str = "label"
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What stands beside each image, by its address, in a CSV file; and a note of columns that are not read."""
    beside, folder = dict[str, str](), os.path.dirname(address)  # noqa: PTH120
    try:
        rows = csv.DictReader(io.StringIO(ANY.read(address).decode("utf-8-sig"), newline=""), skipinitialspace=True)
        columns = rows.fieldnames or []
        if not {column, other} <= set(columns):
            raise ValueError(f"{key}: the header of {address} is {','.join(columns)!r}: it needs {column} and {other}")
        if twice := [name for name in (column, other) if columns.count(name) > 1]:
            raise ValueError(f"{key}: the header of {address} has {twice[0]} twice: keep one")
        for row in rows:
            if any(field.strip() for field in row.get(None, ())):  # DictReader's key of what is too many
                raise ValueError(
                    f"{key}: line {rows.line_num} of {address} has more fields than the header's {len(columns)}: put "
                    "quotes round what has a comma"
                )
            image, text = (row[column] or "").strip(), (row[other] or "").strip()
            if other == "label":
                text = _class_name(text, key)
            if not image or not text:
                raise ValueError(f"{key}: line {rows.line_num} of {address} lacks its {column} or {other}: complete it")
            image = joined(folder, image)
            if beside.setdefault(image, text) != text:
                raise ValueError(
                    f"{key}: line {rows.line_num} of {address} gives {image} the {other} {text!r}, "
                    f"an earlier one {beside[image]!r}: keep one"
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{key}: {address} cannot be read ({error}): give a UTF-8 CSV with columns {column},{other}"
        ) from error
    if not beside:
        raise ValueError(f"{key}: {address} lists no image: give one {column},{other} a line")
    if more := [name for name in columns if name not in (column, other)]:
        note = (
            f"{key}: of {address} only {column} and {other} are read, not {few(more)}: what fcmae "
            "holds out it draws image by image, also where several are of one patient or scene"
        )
        return beside, (note,)
    return beside, ()


def find_mapped(
    source: str, maps: str | None, *, key: str = "data.path", storage: Storage = ANY
) -> tuple[Images, Images]:
    """Images and their label maps, in one order, sorted by the images' paths.

    Args:
        source: a folder of images or a tar file, or a .csv file with the columns image and mask whose relative paths
            start at its folder. Each may be a URL.
        maps: but for a .csv file, the folder or tar file of the maps, which have the images' names but for the suffix,
            in the same sub-folders.
        key: the setting that errors name.
        storage: that reads tar files and images.

    Raises:
        ValueError: for a source that is missing or malformed, an image without a map, or names that differ in their
            suffix only.
    """
    maps_key = key.replace("path", "maps")
    if source.lower().endswith(".csv"):
        lists = _lists([source])
        beside, notes = _read_csv(source, key, "image", "mask")
        folder, paths, shards = os.path.dirname(source), sorted(beside), Shards(storage, key)  # noqa: PTH120
        found = Images(shards.source(paths), lists=lists)
        maps_found = Images(shards.source([joined(folder, beside[image]) for image in paths]))
        return replace(found, notes=notes + shards.notes()), maps_found
    if maps is None:
        raise ValueError(
            f"{key}: {source!r} has no folder of label maps beside it, and is no .csv file: give images and their maps "
            "in two folders or tar files, or a CSV with columns image,mask"
        )
    images, found = (
        find_images([each], key=each_key, storage=storage) for each, each_key in ((source, key), (maps, maps_key))
    )
    image_of, map_of = _by_stem(images, source, key), _by_stem(found, maps, maps_key)
    absent = [stem for stem in image_of if stem not in map_of]
    notes = images.notes
    if len(absent) < len(image_of) and absent and any(map(is_damage, found.names())):
        notes += (f"{maps_key}: {len(absent)} images, such as {absent[0]!r}, have no map in what is whole of {maps!r}",)
        image_of = {stem: i for stem, i in image_of.items() if stem in map_of}
    elif absent:
        raise ValueError(
            f"{maps_key}: {maps!r} has no label map for {len(absent)} of {len(image_of)} images, {absent[0]!r} the "
            "first: give each image a map of its name, or a CSV with columns image,mask"
        )
    if surplus := len(map_of) - len(image_of):
        notes += (f"{maps_key}: {surplus} label maps are of no image and were left out",)
    usable = images if len(image_of) == len(images) else images.subset(list(image_of.values()))
    return replace(usable, notes=notes), found.subset([map_of[stem] for stem in image_of])


def _above(source: str) -> str:
    """The folder above all that a pattern matches; what is none as it is."""
    if not (_is_pattern(source) if is_remote(source) else glob.has_magic(source) and not os.path.exists(source)):  # noqa: PTH110
        return source
    return re.split(r"[*?\[]", source)[0].rpartition("/")[0] or ("/" if source.startswith("/") else ".")


def _by_stem(images: Images, root: str, key: str) -> dict[str, int]:
    """Images by what they are called below a folder or in a tar file, without suffixes."""
    root = canonical(_above(root)) if is_remote(root) else _absolute(_above(root))
    named: dict[str, int] = {}
    for i, name in enumerate(images.names()):
        if is_damage(name) or is_double(name):  # a note tells of them
            continue
        stem = without_suffix(os.path.relpath(name, root))
        if (other := named.setdefault(stem, i)) != i:
            raise ValueError(
                f"{key}: {images.name(other)} and {name} differ in their suffix only: if one is the other's map, name "
                "each kind by a pattern, such as '*.tif' and --data.maps '*.png', or give a CSV with columns image,mask"
            )
    return named
