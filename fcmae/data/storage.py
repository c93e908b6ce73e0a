"""Files by their address, whole or in parts, and where what is known of them is kept."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fcmae.data.source import open_file

INDEX = "index"  # folder of a run directory
AT_ONCE = 1 << 22  # bytes of a file that is read from its beginning to its end


class CutShort(OSError):  # noqa: N818
    """A file ends before the part that was asked for."""


@dataclass(frozen=True)
class Storage:
    """Reads files by their address, a path.

    Attributes:
        kept: folder in which what was found out about a file is kept; None keeps nothing.
        beside: keep it beside the file instead, for everyone who reads it.
    """

    kept: Path | None = None
    beside: bool = False

    @classmethod
    def of_run(cls, out: Path | None, index: str) -> Storage:
        """That of a run.

        Args:
            out: its directory, which it may have to share with nothing else; None keeps nothing.
            index: the setting data.index.
        """
        if index == "beside" or out is None:
            return cls(beside=index == "beside")
        is_run = not out.exists() or (out / "config.yaml").exists() or {path.name for path in out.iterdir()} <= {INDEX}
        return cls(out / INDEX if is_run else None)

    def read(self, address: str, start: int = 0, size: int | None = None) -> bytes:
        """A part of a file.

        Args:
            address: of the file.
            start: first byte.
            size: bytes; None is all that follow.

        Raises:
            CutShort: if the file ends before.
            OSError: if it cannot be read.
        """
        with open_file(address) as file:
            most = max(0, os.fstat(file.fileno()).st_size - start)  # a size from a damaged index may be anything
            content = os.pread(file.fileno(), min(size, most), start) if size is not None else file.read()
        if size is not None and len(content) < size:
            raise CutShort(f"it is cut off: of {size} bytes from byte {start} on there are {len(content)}")
        return content

    def stamp(self, address: str) -> tuple[int, str]:
        """Size of a file in bytes, and what changes when it does.

        Raises:
            OSError: if it is not there.
        """
        status = os.stat(address)  # noqa: PTH116
        return status.st_size, f"{status.st_size}-{status.st_mtime_ns}"

    def open(self, address: str) -> BinaryIO:
        """A file to be read from its beginning to its end; the caller closes it.

        Raises:
            OSError: if it cannot be read.
        """
        return io.BufferedReader(_Parts(self, address), AT_ONCE)

    def recall(self, address: str, name: str) -> bytes | None:
        """What `keep` was given for a file, if anything."""
        for place in self._places(address, name):
            with suppress(OSError):
                return self.read(place)
        return None

    def keep(self, address: str, name: str, content: bytes) -> None:
        """Keep what was found out about a file, whole or not at all; where that is impossible, it is found out again.

        Args:
            address: of the file.
            name: of a file that no other file shares.
            content: of that file.
        """
        path = Path(self._places(address, name)[0 if self.beside else -1])
        if self.beside or self.kept is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
            aside.write_bytes(content)
            aside.replace(path)

    def _places(self, address: str, name: str) -> list[str]:
        return [f"{address}.index"] + ([] if self.kept is None else [str(self.kept / name)])


class _Parts(io.RawIOBase):
    """A file of a storage as one that can seek."""

    def __init__(self, storage: Storage, address: str) -> None:
        self._storage, self._address, self._at = storage, address, 0
        self._size = storage.stamp(address)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._size - self._at))
        buffer[:size] = self._storage.read(self._address, self._at, size)
        self._at += size
        return size
