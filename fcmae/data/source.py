"""Where the bytes of images come from: numbered images, each with a name and a file. What they hold is for readers.

Another kind of place is one class with `__len__`, `name` and `read`; shards.py has the one for parts of larger files.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from array import array
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

MAX_REASON = 300  # characters
PART = 1 << 16  # names that are Python objects at a time, where there are millions
GROUP = 64  # names that are packed together
# What network storage and systems keep in folders beside one's own files: thumbnails, deleted files.
SYSTEM_FOLDERS = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information"}

Item = TypeVar("Item")


class BadImage(ValueError):  # noqa: N818
    """An image that cannot be used; the message is the reason in one sentence, without the name."""

    def __init__(self, reason: str) -> None:
        # Libraries quote what is in the file, which may be long, and hold what a terminal obeys.
        text = printable(" ".join(reason.split()))
        super().__init__(text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}...")

    @classmethod
    def unread(cls, error: Exception) -> BadImage:
        """That it cannot be read, for the reason that an error of a file, a network or a library gives."""
        text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        return cls(f"it cannot be read: {text}")


class OtherChannels(BadImage):
    """An image with another number of channels than was asked for.

    Attributes:
        channels: that it has.
    """

    def __init__(self, channels: int, in_chans: int) -> None:
        super().__init__(f"it has {channels} channel{'s' * (channels != 1)}, in_chans is {in_chans}")
        self.channels = channels


class DataError(ValueError):
    """What ends a run from within a process that reads its images."""

    def __init__(self, message: str) -> None:
        # A DataLoader makes the error of a worker anew, with the worker's traceback as message: keep its last line.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def is_unicode(name: str) -> bool:
    """Whether a name has no bytes that are no UTF-8, which Python keeps as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def printable(name: str) -> str:
    """A name that any terminal can show: bytes that are no Unicode, and control characters, as escapes."""
    text = name.encode("utf-8", errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: object, most: int = 200) -> str:
    """What an error says, in one line that any terminal can show.

    Args:
        error: or its text.
        most: characters.
    """
    return printable(" ".join(str(error).split())[:most])


def few(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, and how many more there are.

    Args:
        names: of anything; as any terminal can show them.
        most: how many to name.
    """
    shown = [printable(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


class Source(Protocol):
    """Images in a fixed order, as bytes. It is copied into every worker process: it must pickle, and be small."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What image i is called in messages and tables, and told apart by: the same name is the same image.

        Names are paths, or like paths: parts after slashes.
        """
        ...

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """What the images at some positions are called."""
        return [self.name(i) for i in positions.tolist()]

    def read(self, i: int) -> bytes:
        """The whole of image i.

        Raises:
            OSError: if it is not there or cannot be read.
        """
        ...

    def open(self, i: int) -> BinaryIO:
        """Image i as a file that can seek, for what is mapped or read in parts; the caller closes it.

        Raises:
            OSError: if it is not there or cannot be read.
        """
        return BytesIO(self.read(i))

    def fingerprint(self) -> str:
        """What it knows of its images' bytes beside their names, in hex; empty if nothing.

        It stays the same when all of them move together.
        """
        return ""


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of a size; the last may be shorter."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


class Names:
    """Many names in one block of bytes, packed by the GROUP.

    Strings would be copied into every worker, page by page, as each use of one writes its reference count; and ten
    million of them take gigabytes. Neighbours have much in common: packed, a name takes 4 to 20 bytes, and 20 us to
    read alone.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._block, ends, self._num = bytearray(), array("q", [0]), 0
        for group in chunks(names, GROUP):
            if not all(isinstance(name, str) for name in group):
                raise TypeError("names that are no text")
            self._block += zlib.compress(json.dumps(group).encode(), 1)  # JSON keeps what is no Unicode
            ends.append(len(self._block))
            self._num += len(group)
        self._ends = ends

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self._num:
            raise IndexError(f"name {i} of {self._num}")
        return self._group(i // GROUP)[i % GROUP]

    def _group(self, number: int) -> list[str]:
        start, end = self._ends[number : number + 2]
        names: list[str] = json.loads(zlib.decompress(self._block[start:end]))
        return names

    def at(self, positions: NDArray[np.int64]) -> list[str]:
        """The names at some positions; soonest if these rise."""
        names, unpacked, group = list[str](), -1, list[str]()
        for number, place in zip(*(part.tolist() for part in np.divmod(positions, GROUP)), strict=True):
            if number != unpacked:
                group, unpacked = self._group(number), number
            names.append(group[place])
        return names


class Listed(Source):
    """Images whose names were listed."""

    def __init__(self, names: Iterable[str] | Names) -> None:
        self._names = names if isinstance(names, Names) else Names(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        return self._names[i]

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        return self._names.at(positions)


class Files(Listed):
    """Files by their paths, which are absolute."""

    def read(self, i: int) -> bytes:
        with self.open(i) as file:
            return file.read()

    def open(self, i: int) -> BinaryIO:
        return open_file(self.name(i))


def open_file(path: str) -> BinaryIO:
    """A file on this machine.

    Args:
        path: of the file.

    Raises:
        OSError: if it is not there, cannot be read, or is a pipe, a socket or a device, which may never end.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  # and a Path costs a while
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is a pipe, a socket or a device, and no file")
    return file


def is_dicom(start: bytes) -> bool:
    """Whether a file with these first 132 bytes is a DICOM file, which may have any name."""
    return start[128:132] == b"DICM"


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for whoever may write to a pipe some day; files know no such waiting."""
    return os.open(path, flags | os.O_NONBLOCK)
