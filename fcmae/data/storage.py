"""Files by their address, a path or a URL that fsspec knows, and where what is known of them is kept."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fcmae.atomic import UNFINISHED, replacing
from fcmae.data.source import open_file

INDEX, CACHE = "index", "cache"  # folders of a run directory
AT_ONCE = 1 << 22  # bytes of a file that is read from its beginning to its end
TIMEOUT_S = 60.0  # of one request
TRIES, BACKOFF_S = 5, 0.5  # which doubles each time
GIGABYTE = 10**9
LOOKS, USED_S = 16, 600.0  # at a cache while it is filled once; seconds after which a use is noted again
# What tells versions of an object apart, by what the stores call it.
VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "blob_id", "mtime", "LastModified", "last_modified", "created"),
    *("Last-Modified", "Content-MD5", "Digest"),  # of web servers
)

Found = TypeVar("Found")


class CutShort(OSError):  # noqa: N818
    """A file ends before the part that was asked for."""


class Unanswered(OSError):  # noqa: N818
    """A server did not answer, or could not, as often as it was asked: it may, later."""


def is_remote(address: str) -> bool:
    """Whether an address is a URL."""
    return "://" in address


def joined(folder: str, name: str) -> str:
    """The address of a name in a folder, either of which may be a URL; an absolute name stays on its server."""
    if is_remote(name):
        return name
    if is_remote(folder):
        scheme, _, place = folder.partition("://")
        host, _, inner = place.partition("/")  # a server, a bucket; none of file:///folder
        path = posixpath.normpath(posixpath.join(f"/{inner}", name)).lstrip("/")
        return f"{scheme}://{host}/{path}" if path else f"{scheme}://{host}"
    # Links are kept: Path.resolve would ask the file system about every part of every path.
    # And a Path takes five times as long, which counts in a list of millions.
    return os.path.abspath(os.path.join(folder, os.path.expanduser(name)))  # noqa: PTH100, PTH111, PTH118


DIGEST = 16  # bytes before a content that is kept, which tell whether the disk has damaged it


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


class Cache:
    """What was read from afar; what was used last stays.

    Whoever writes looks by chance at what is there, LOOKS times while the cache is filled once, however many processes
    fill it: to list and measure thousands of files costs more than to write one.

    Args:
        folder: of its files, which several processes may share.
        most_bytes: that they take, a few per cent more at times.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.read"

    def get(self, key: str) -> bytes | None:
        """What was put there under a key, if it is there still and as it was."""
        try:
            with self._path(key).open("rb") as file:
                stored = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > USED_S:
                    os.utime(file.fileno())
        except OSError:
            return None
        content = stored[DIGEST:]
        return content if stored[:DIGEST] == _digest(content) else None

    def put(self, key: str, content: bytes) -> None:
        """Keep something, or not, if the disk is full or it is a large part of all that may be kept."""
        if len(content) > self._most // 64:
            return
        with suppress(OSError):
            with replacing(self._path(key), is_shared=True) as aside:
                aside.write_bytes(_digest(content) + content)
            if secrets.randbelow(self._most) < LOOKS * (DIGEST + len(content)):
                self._trim()

    def _trim(self) -> None:
        files = []
        for path in self._folder.glob("*/*.read"):
            with suppress(OSError):  # another process may have removed it
                files.append((path.stat(), path))
        total = sum(status.st_size for status, _ in files)
        if total <= self._most:
            return
        for status, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if total <= self._most * 7 // 8:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size


@dataclass(frozen=True)
class Storage:
    """Reads files by their address.

    Attributes:
        kept: folder in which what was found out about a file is kept; None keeps nothing.
        beside: keep it beside the file instead, for everyone who reads it.
        cache: of what is read from afar.
    """

    kept: Path | None = None
    beside: bool = False
    cache: Cache | None = None

    @classmethod
    def of_run(cls, out: Path | None, index: str, cache_gb: float) -> Storage:
        """That of a run.

        Args:
            out: its directory, where nothing is kept if it is somebody else's; None keeps nothing.
            index: the setting data.index.
            cache_gb: the setting data.cache_gb.
        """
        names = {path.name for path in out.iterdir()} if out is not None and out.exists() else set()
        strange = {
            name for name in names if not name.startswith((".lock", UNFINISHED))
        }  # not of a start that was ended
        if out is None or (strange and not strange & {INDEX, CACHE, "config.yaml"}):
            return cls(beside=index == "beside")
        cache = Cache(out / CACHE, int(cache_gb * GIGABYTE)) if cache_gb else None
        return cls(out / INDEX, index == "beside", cache)

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
        if not is_remote(address) or self.cache is None:
            return _read(address, start, size)
        key = f"{address} {start} {size}"
        if (content := self.cache.get(key)) is None:
            content = _read(address, start, size)
            self.cache.put(key, content)
        return content

    def held(self, address: str) -> bytes | None:
        """The whole of a file from afar, if the cache has it.

        Args:
            address: of the file.
        """
        return None if self.cache is None else self.cache.get(f"{address} 0 None")

    def stamp(self, address: str) -> tuple[int, str]:
        """Size of a file in bytes, and what changes when it does.

        Raises:
            OSError: if it is not there.
        """
        if is_remote(address):
            info = _asked(address, "info")
            if (size := info.get("size")) is None:
                raise OSError("the server does not tell its size")
            return int(size), "-".join(str(info[key]) for key in ("size", *VERSIONS) if key in info)
        status = os.stat(address)  # noqa: PTH116
        return status.st_size, f"{status.st_size}-{status.st_mtime_ns}"

    def open(self, address: str, *, cached: bool = False) -> io.BufferedReader:
        """A file that can seek; the caller closes it.

        Args:
            address: of the file.
            cached: keep in the cache what is read; not for what is read once from its beginning to its end.

        Raises:
            OSError: if it cannot be read.
        """
        read = self.read if cached else _read
        return io.BufferedReader(_Parts(partial(read, address), self.stamp(address)[0]), AT_ONCE)

    def recall(self, address: str, name: str) -> Iterator[bytes]:
        """What `keep` was given for a file, beside it and in the folder, as far as it is there.

        Raises:
            OSError: if what is beside the file, where it is to be kept, cannot be read.
        """
        beside = f"{address}.index"
        try:
            yield _read(beside)
        except FileNotFoundError:
            pass
        except OSError as error:
            is_absent = is_remote(beside) and isinstance(error, PermissionError)  # as S3 says of what is not there
            if self.beside and not is_absent:
                raise
        if self.kept is not None and not self.beside:
            with suppress(OSError):
                yield _read(str(self.kept / name))

    def keep(self, address: str, name: str, content: bytes) -> None:
        """Keep what was found out about a file, whole or not at all, if anything is to be kept.

        Args:
            address: of the file.
            name: of a file that no other file shares.
            content: of that file.

        Raises:
            OSError: if it cannot be written.
        """
        if self.beside and is_remote(address):
            _asked(f"{address}.index", "pipe_file", content)
        elif self.beside or self.kept is not None:
            path = Path(f"{address}.index") if self.beside else self.kept / name  # type: ignore[operator]
            with replacing(path, is_shared=True) as aside:
                aside.write_bytes(content)


def _read(address: str, start: int = 0, size: int | None = None) -> bytes:
    if is_remote(address):
        part = {"start": start, "end": start + size} if size is not None else {}
        content: bytes = _asked(address, "cat_file", **part)
        if size is not None and len(content) > size:
            raise OSError("the server gives the whole file in place of a part")
    else:
        with open_file(address) as file:
            most = max(0, os.fstat(file.fileno()).st_size - start)  # a size from a damaged index may be anything
            file.seek(start)  # one pread ends at two gigabytes
            content = file.read() if size is None else file.read(min(size, most))
    if size is not None and len(content) < size:
        raise CutShort(f"it is cut off: of {size} bytes from byte {start} on there are {len(content)}")
    return content


def listed(address: str, method: str) -> list[str]:
    """The addresses of files and folders elsewhere, those of folders with a slash at their end.

    Args:
        address: a URL.
        method: of fsspec: find for all files below it, ls for all in it, glob for those that match.

    Raises:
        OSError: if they cannot be listed.
    """
    filesystem, _ = _filesystem(address)
    listing = _asked(address, method, detail=True)
    # Of ls a list; of find nothing may be told of a file that is asked for itself.
    entries = ((entry["name"], entry) for entry in listing) if isinstance(listing, list) else listing.items()
    return sorted(
        f"{filesystem.unstrip_protocol(path).rstrip('/')}{'/' * (entry.get('type') == 'directory')}"
        for path, entry in entries
    )


def canonical(address: str) -> str:
    """A URL as `listed` begins those of files below it."""
    filesystem, path = _filesystem(address)
    return str(filesystem.unstrip_protocol(path)).rstrip("/")


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec.core  # takes a while, and most have files

    try:
        # Made anew in each process, as fsspec sees to; listings are not remembered: an object may change.
        filesystem, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(f"{address}: {error}: pip install 'fcmae[remote]' has what s3:// and https:// need") from error
    return filesystem, path


def _asked(address: str, method: str, *content: bytes, **options: Any) -> Any:
    """What a method of fsspec's says of an address, in time and after some tries, or an OSError."""
    filesystem, path = _filesystem(address)

    def call() -> Any:
        if filesystem.async_impl:
            from fsspec.asyn import sync

            function = getattr(filesystem, f"_{method}")
            # A listing is as many requests as it takes.
            timeout = None if method in ("find", "ls", "glob") else TIMEOUT_S
            return sync(filesystem.loop, function, path, *content, timeout=timeout, **options)
        return getattr(filesystem, method)(path, *content, **options)

    return _tried(call)


def _tried(call: Callable[[], Found]) -> Found:
    for number in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError):
            raise
        except Exception as error:  # each library has its own
            status = getattr(error, "status", None)
            is_final = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
            if is_final or number == TRIES - 1:
                reason = getattr(error, "message", "") or str(error) or type(error).__name__
                kind = OSError if is_final else Unanswered
                raise kind(f"{f'{status} ' if status else ''}{reason}") from error
            time.sleep(BACKOFF_S * 2**number * random.SystemRandom().uniform(0.5, 1.5))
    raise AssertionError


class _Parts(io.RawIOBase):
    """A file that can seek, of so many bytes, by what reads a part of it.

    It keeps the first part and the last one that it read: whoever reads a file's header seeks to and fro.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0
        self._first = self._last = (0, b"")  # where each begins, and what it holds

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readall(self) -> bytes:
        size = max(0, self._size - self._at)
        content = self._read(self._at, size) if size else b""
        self._at += len(content)
        return content

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._size - self._at))
        for start, content in (self._first, self._last):
            if start <= self._at < start + len(content):
                part = content[self._at - start :][:size]
                break
        else:
            part = self._read(self._at, size) if size else b""
            if size <= AT_ONCE:
                self._first = self._first if self._first[1] else (self._at, part)
                self._last = self._at, part
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
