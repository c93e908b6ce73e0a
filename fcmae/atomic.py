"""Files that are there whole or not at all, known to be what was written, and read only if they are not too large."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".tmp-"  # before the name of what is being written or deleted


@contextmanager
def replacing(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """A place beside `path` to write a file to, which takes that path when the block ends; an error removes it.

    It is whole even if the machine goes off just then.

    Args:
        path: of the file, which may be there already. Missing folders are made.
        is_shared: other processes may write it at the same time; the last one's stays. Whoever reads it checks it, so
            that nobody waits for the disk.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{UNFINISHED}{secrets.token_hex(4) + '-' if is_shared else ''}{path.name}")
    aside.unlink(missing_ok=True)  # what was killed here has left one
    try:
        yield aside
        if not is_shared:
            sync(aside)  # the rename must not reach the disk before the content does
        aside.replace(path)
    except OSError as error:
        if error.errno is not None:  # what a full disk stops knows no name
            error.filename = error.filename or str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where its file system can tell of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, is_shared: bool = False) -> None:
    """Write a UTF-8 file whole or not at all; bytes of names that are no Unicode (surrogates) are kept.

    Args:
        path: see `replacing`.
        text: its content.
        is_shared: see `replacing`.

    Raises:
        OSError: if the file cannot be written.
    """
    with replacing(path, is_shared=is_shared) as aside:
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")


def check_file(path: Path, most: int) -> None:
    """Refuse what cannot be read to its end.

    Args:
        path: of a file; a pipe or a device, which may never end, is none.
        most: bytes that it may have.

    Raises:
        OSError: if it is not there, is no file, or is larger.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))
    if path.stat().st_size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file.

    Args:
        path: see `check_file`.
        most: likewise.

    Raises:
        OSError: if it cannot be read, is no file, or is larger.
    """
    check_file(path, most)
    return path.read_bytes()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Args:
        path: of the file, which is read a piece at a time.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
