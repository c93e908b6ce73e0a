"""The images and shards in a folder, a bucket or a list, or that a pattern matches: found by name, none is opened."""

from __future__ import annotations

import errno
import glob
import io
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from fcmae.data.index import ANY, is_of_run
from fcmae.data.shards import COMPRESSED, is_image, is_nameless, is_shard
from fcmae.data.source import SYSTEM_FOLDERS, is_dicom, open_file
from fcmae.data.storage import canonical, is_remote, joined, listed
from fcmae.data.tables import can_read

logger = logging.getLogger("fcmae")

TELL_EVERY_S = 10.0
Found = TypeVar("Found")


def told(found: Iterable[Found], key: str) -> Iterator[Found]:
    """What a search finds; while it lasts, it is said how much that is.

    Args:
        found: that it finds.
        key: the setting that it is for.
    """
    last = time.monotonic()
    for count, item in enumerate(found, 1):
        yield item
        if (now := time.monotonic()) - last > TELL_EVERY_S:
            level = logging.INFO if logger.handlers else logging.WARNING  # which is shown of commands that keep no log
            logger.log(level, "%s: %s images or shards were found so far", key, f"{count:,}")
            last = now


def expand(source: str, key: str, others: Counter[str]) -> Iterator[str]:
    """The images and shards of a source: see `fcmae.data.find.find_images`.

    Args:
        source: a folder, a list, a pattern, an image or a shard, or the URL of one.
        key: the setting that errors name.
        others: counts files of other formats, by suffix.

    Raises:
        ValueError: for a source that is missing or cannot be listed.
    """
    path = Path(source)
    if is_remote(source):
        yield from _expand_remote(source, key, others)
    elif path.is_dir():
        yield from walk(path, key, others)
    elif path.suffix.lower() == ".txt" and path.is_file():
        yield from _read_list(str(path), key)
    elif path.is_file():
        yield from image_or_shard(path, key)
    elif glob.has_magic(source):
        # What is below a folder that was searched matches `**` too.
        searched, seen = set[str](), set[tuple[int, int]]()
        for match in matching_here(path):
            if searched and not searched.isdisjoint(map(str, match.parents)):
                continue
            if match.is_dir():
                searched.add(str(match))
                yield from walk(match, key, others, seen=seen)
            else:
                addresses = list(image_or_shard(match, key))
                yield from addresses
                if not addresses and not match.name.startswith("."):
                    others[match.suffix.lower()] += 1
    else:
        raise ValueError(
            f"{key}: {source!r} does not exist: "
            "give a folder of images, a .txt file that lists paths, or a glob pattern"
        )


def _expand_remote(source: str, key: str, others: Counter[str]) -> Iterator[str]:
    refuse_compressed(source, key)
    name = source.rpartition("/")[2]
    if name.lower().endswith(".txt"):
        yield from _read_list(source, key)
    elif is_pattern(source):
        # What is below a folder that was searched matches `**` too.
        folder = "?"
        for path in matching(source, key):
            if path.startswith(folder):
                continue
            if path.endswith("/"):
                folder = path
                yield from walk_remote(path, key, others)
            elif is_image(os.path.basename(path)) or is_shard(path):  # noqa: PTH119
                yield path
    elif is_image(name) or is_shard(name):
        yield source
    else:
        yield from walk_remote(source, key, others)


def walk(
    root: Path,
    key: str,
    others: Counter[str],
    links: list[str] | None = None,
    seen: set[tuple[int, int]] | None = None,
) -> Iterator[str]:
    """The images and shards below a folder.

    Hidden files and folders, those of systems, and the directories of runs, whose pictures are no images to learn from,
    are passed over, and so is everything that is no file.

    Args:
        root: the folder.
        key: the setting that errors name.
        others: counts files of other formats, by suffix.
        links: goes on with those to folders and images that are met.
        seen: of folders that were searched before, device and inode; goes on with these.

    Raises:
        ValueError: if a folder cannot be listed.
    """
    seen = set() if seen is None else seen
    folders = [absolute(root)]
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


def walk_remote(source: str, key: str, others: Counter[str]) -> Iterator[str]:
    """As `walk`, of a URL, by one listing; a run is a folder with the files of its settings and of its machine.

    Args:
        source: the URL of a folder.
        key: the setting that errors name.
        others: counts files of other formats, by suffix.

    Raises:
        ValueError: if it cannot be listed.
    """
    logger.info("%s: listing %s", key, source)
    paths, root = listing(source, key, "find"), canonical(source)
    settings, machines = (
        {path.rpartition("/")[0] for path in paths if path.endswith(f"/{name}")}
        for name in ("config.yaml", "environment.json")
    )
    runs = tuple(f"{run}/" for run in settings & machines)
    for path in paths:
        *folders, name = path[len(root) + 1 :].split("/")
        is_hidden = any(part.startswith(".") or part in SYSTEM_FOLDERS for part in (*folders, name))
        if is_hidden or path.startswith(runs):
            continue
        if is_image(name) or is_shard(name):
            yield path
        else:
            others[os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122


def matching_here(pattern: Path) -> Iterator[Path]:
    """What matches, each folder before what is in it: nothing of systems or runs, nor of a folder again by a link.

    Args:
        pattern: of paths on this machine.
    """
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


def matching(pattern: str, key: str) -> list[str]:
    """The files and folders that a URL's pattern matches: hidden ones, as on this machine, only if it names a dot.

    Args:
        pattern: for which `is_pattern` holds.
        key: the setting that errors name.

    Raises:
        ValueError: if what it is of cannot be listed.
    """
    fixed, names_hidden = re.split(r"[*\[]", canonical(pattern))[0].count("/"), "/." in pattern
    return [
        path
        for path in listing(pattern, key, "glob")
        if SYSTEM_FOLDERS.isdisjoint(parts := path.split("/")[fixed:])
        and (names_hidden or not any(part.startswith(".") for part in parts))
    ]


def image_or_shard(path: Path, key: str) -> Iterator[str]:
    """A file's absolute path, if it is an image or a shard.

    Args:
        path: of the file.
        key: the setting that errors name.

    Raises:
        ValueError: if it is compressed.
    """
    refuse_compressed(str(path), key)
    if is_image(path.name) or is_shard(path.name) or _is_unnamed_dicom(str(path)):
        yield absolute(path)


def refuse_compressed(source: str, key: str) -> None:
    """Refuse a shard that is compressed as a whole.

    Args:
        source: its path or URL.
        key: the setting that errors name.

    Raises:
        ValueError: if it is.
    """
    if source.endswith(COMPRESSED):
        raise ValueError(f"{key}: {source!r} is compressed, so that no image can be read alone: unpack it")


def _read_list(address: str, key: str) -> Iterator[str]:
    folder = os.path.dirname(address)  # noqa: PTH120
    try:
        with io.TextIOWrapper(io.BytesIO(ANY.read(address)), encoding="utf-8-sig") as lines:
            yield from (joined(folder, line.strip()) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}: {address} cannot be read ({error}): give a UTF-8 text file with one path a line"
        ) from error


def listing(source: str, key: str, method: str) -> list[str]:
    """What is at a URL.

    Args:
        source: the URL.
        key: the setting that errors name.
        method: of fsspec's file systems, that lists it: "ls", "find" or "glob".

    Raises:
        ValueError: if it cannot be listed.
    """
    try:
        return listed(source, method)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {source!r} cannot be listed ({error}): see that it is there and yours") from error


def is_pattern(url: str) -> bool:
    """Whether a URL is a pattern: not by a question mark, which begins a query.

    Args:
        url: of a source.
    """
    return "*" in url or "[" in url


def absolute(path: str | Path) -> str:
    """A path from the root, links kept: Path.resolve would ask the file system about every part of every path.

    Args:
        path: on this machine.
    """
    return os.path.abspath(path)  # noqa: PTH100


def _leads_to_itself(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link that the system follows to no end."""
    try:
        entry.is_file()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True
    return False


def is_image_file(path: Path) -> bool:
    """Whether it is a file with an image, by its name or as DICOM without one.

    Args:
        path: on this machine.
    """
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
