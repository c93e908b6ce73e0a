"""Images in tar files and tables, which are read one by one through an index of where each lies.

A tar is read as the folder that was packed into it. Beside an image may lie its label, as in the convention of
WebDataset: NAME.cls, NAME.json or NAME.txt. An image is called by the tar's address, a slash, and its name in the tar.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import PurePosixPath
from threading import Event
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fcmae.data.cores import num_cores
from fcmae.data.source import SYSTEM_FOLDERS, Files, Listed, Names, Source, is_dicom, open_file, printable
from fcmae.data.storage import Storage, Unanswered, is_remote
from fcmae.data.tables import ARROW, EMPTY, PARQUET, read_row
from fcmae.data.tables import scan as scan_table

TAR = ".tar"
SHARDS = (TAR, PARQUET, ARROW)
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".dcm", ".dicom", ".ima")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
ZIP = b"PK"  # begins an .npz, as an index is
MOST_UNPACKED = 100  # times its packed size; of a million members it is some 5
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512  # bytes; a member's header is one
SCAN = 2  # what `scan` finds: an index that is kept of an earlier one is made anew
GAP = 1 << 16  # bytes between members that are looked at together
LABELS = (".cls", ".json", ".txt")  # the first that an image has counts
MAX_LABEL = 1 << 16  # bytes
MUCH = 100_000_000  # bytes of a TIFF from afar above which it is read in parts; below, most are decoded as a whole
_SHARD = re.compile("(" + "|".join(map(re.escape, SHARDS)) + ")/")

CHANGED = "{} has changed since its index was made: begin another run, or put it back"
# In place of a size.
WHOLE, DAMAGED, TWICE, MISSING, LINK, SPARSE = -1, -2, -3, -4, -6, -7
REASONS = {
    DAMAGED: "the shard is damaged here: pack it again",
    TWICE: "the shard has an earlier member of this name: pack it again",
    MISSING: "the shard has no such member",
    LINK: "it is a link to another member: pack it again with the links' files (tar --dereference --hard-dereference)",
    SPARSE: "it is stored without its holes: pack it again (tar without --sparse)",
    EMPTY: "its row has no bytes of an image",
}


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image: by its suffix, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def without_suffix(name: str) -> str:
    """A file's name without its suffix; a number is none, as in names of DICOM files (1.2.840.7)."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return name if suffix[1:].isdigit() else stem


def is_nameless(name: str) -> bool:
    """Whether a file's name does not say what it is, as those from archives of hospitals (1.2.840.7): it may be DICOM.

    DICOMDIR, which lists the others, is none of them.
    """
    return without_suffix(name) == name and name.upper() != "DICOMDIR"


def is_damage(address: str) -> bool:
    """Whether it stands for bytes of a tar file that are no member: see `scan`."""
    name = os.path.basename(address)  # noqa: PTH119
    return name.startswith("@") and not is_image(name)


def is_double(address: str) -> bool:
    """Whether it stands for a later member of the same name: see `scan`."""
    return re.search(r"#\d+$", address) is not None


def is_shard(address: str) -> bool:
    """Whether a file is a tar file or a table by its name; datasets' own caches are neither."""
    return address.endswith(SHARDS) and not os.path.basename(address).startswith((".", "cache-"))  # noqa: PTH119


def shards_of(addresses: Iterable[str]) -> Iterator[str | None]:
    """For each image's address the tar file or table that it lies in, or None."""
    is_folder = dict[str, bool]()  # a folder may be called so too: each is looked at once
    for address in addresses:
        shard = None
        for end in _SHARD.finditer(address):
            place = address[: end.end() - 1]
            if place not in is_folder:
                is_folder[place] = os.path.isdir(place)  # noqa: PTH112
            if not is_folder[place]:
                shard = place
                break
        yield shard


def left_out(others: Counter[str], key: str) -> tuple[str, ...]:
    """A sentence on files of other formats, if there are any.

    Args:
        others: their numbers by suffix.
        key: the setting that it names.
    """
    if not others:
        return ()
    counts = [f"{number} {printable(suffix) or 'without a suffix'}" for suffix, number in others.most_common(8)]
    return (
        f"{key}: files left out, as their names are not those of images: {', '.join(counts)} (to read them all the "
        "same, list their paths in a .txt file)",
    )


@dataclass(frozen=True)
class Members:
    """The images of a tar file.

    Attributes:
        names: of the images, each once.
        starts: (N,) int64, first byte of each.
        sizes: (N,) int64, bytes, or why it cannot be used (REASONS).
        labels: of the images, empty where there is none.
        others: files of other formats by suffix, where it has just been read.
    """

    names: list[str]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: list[str]
    others: Counter[str] = field(default_factory=Counter)

    def packed(self, stamp: str) -> bytes:
        """As `unpacked` reads them."""
        texts = {"stamp": f"{SCAN} {stamp}", "names": "\0".join(self.names), "labels": "\0".join(self.labels)}
        arrays: dict[str, Any] = {key: np.frombuffer(os.fsencode(text), np.uint8) for key, text in texts.items()}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays, starts=self.starts, sizes=self.sizes)
        return file.getvalue()

    @classmethod
    def unpacked(cls, content: bytes, stamp: str) -> Members | None:
        """What `packed` made of a shard of the same stamp; None for anything else."""
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                if sum(member.file_size for member in packed.infolist()) > MOST_UNPACKED * len(content):
                    return None
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                texts = {key: os.fsdecode(arrays[key].tobytes()) for key in ("stamp", "names", "labels")}
                starts, sizes = (np.asarray(arrays[key]) for key in ("starts", "sizes"))
        except Exception:  # an index comes with others' shards, and each library has its own errors
            return None
        fits = starts.dtype == sizes.dtype == np.int64 and starts.ndim == sizes.ndim == 1 and len(starts) == len(sizes)
        both = [texts[key] for key in ("names", "labels")]
        if not fits or any(text.count("\0") != max(0, len(starts) - 1) for text in both):
            return None
        names, labels = (text.split("\0") if len(starts) else [] for text in both)
        fits = texts["stamp"] == f"{SCAN} {stamp}" and all(name == str(_plain(name)) for name in names)
        return cls(names, starts, sizes, labels) if fits else None


def scan(file: BinaryIO, stop: Event | None = None) -> Members:
    """Read a tar file's headers, and the labels beside images.

    What is damaged or cut off costs the members that it holds, and not those that follow.

    Args:
        file: at its start.
        stop: is set where nobody waits for it any longer.

    Raises:
        ValueError: if it is compressed, or no tar file.
        OSError: if it cannot be read, or to stop.
    """
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = file.read(BLOCK)
    for magic, name in MAGIC.items():
        if begin.startswith(magic):
            raise ValueError(f"it is compressed by {name}, so that no image can be read alone: unpack it")
    file.seek(0)
    names, places, texts, end = list[str](), list[tuple[int, int]](), dict[str, str](), 0
    others = Counter[str]()

    def skipped(start: int, until: int) -> None:
        """Take note of bytes that are neither a member, nor said of all of them, nor padding."""
        while start < until:
            file.seek(start)
            part = file.read(min(GAP, until - start))
            if rest := part.lstrip(b"\0"):
                zeros = (len(part) - len(rest)) // BLOCK * BLOCK
                if not _is_global_header(part[zeros : zeros + BLOCK], until - start - zeros):
                    names.append(f"@{start + zeros}")
                    places.append((start + zeros, DAMAGED))
                return
            start += GAP

    for member in _headers(file, total):
        if stop is not None and stop.is_set():
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        skipped(end, member.offset)
        has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES  # such as lists of incremental backups
        end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if has_data else 0)
        path = _plain(member.name)
        name, suffix = str(path), path.suffix.lower()
        is_link = member.islnk() or member.issym()
        is_hidden = any(part.startswith(".") or part in SYSTEM_FOLDERS for part in path.parts)
        if is_hidden or not (member.isreg() or is_link):
            continue
        if is_image(path.name) or (member.isreg() and not member.issparse() and _is_dicom(file, member)):
            names.append(name)
            places.append((member.offset_data, LINK if is_link else SPARSE if member.issparse() else member.size))
        elif suffix in LABELS and not is_link and not member.issparse() and member.size <= MAX_LABEL and end <= total:
            file.seek(member.offset_data)
            texts.setdefault(name, _label(file.read(member.size), suffix))
        else:
            others[suffix] += 1
    if end < total:
        skipped(end, total)
    if end == 0 and total:
        raise ValueError("it is no tar file")
    labels = [next((texts[other] for other in _beside(name) if texts.get(other)), "") for name in names]
    starts, sizes = np.array(places, np.int64).reshape(-1, 2).T.copy()
    counts = dict[str, int]()
    for i, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            names[i], sizes[i] = f"{name}#{counts[name]}", TWICE
    return Members(names, starts, sizes, labels, others)


def _is_dicom(file: BinaryIO, member: tarfile.TarInfo) -> bool:
    """Whether a member is DICOM whose name does not say so."""
    if not is_nameless(PurePosixPath(member.name).name):
        return False
    file.seek(member.offset_data)
    return is_dicom(file.read(min(member.size, 132)))


def _is_global_header(block: bytes, size: int) -> bool:
    """Whether it begins a global header of so many bytes, as `git archive` writes one."""
    try:
        header = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return header.type == tarfile.XGLTYPE and size == BLOCK + -(-header.size // BLOCK) * BLOCK


def _headers(file: BinaryIO, total: int) -> Iterable[tarfile.TarInfo]:
    """Of all members; what is none is passed over."""
    start = 0
    while start < total:
        file.seek(start)
        # It ends within a member, or what belongs to a header is damaged: whether that is the first or not.
        with suppress(tarfile.ReadError), tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as archive:
            while (member := archive.next()) is not None and member.size >= 0:  # which would lead back
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                start = archive.offset
                yield member
            return
        start += BLOCK


def _may_be(header: tarfile.TarInfo, name: str) -> bool:
    """Whether a header is that of a member, as far as it can tell: an earlier one tells names that do not fit in it.

    A long one is cut, in one way or another, and programs write "?" or else for what is not ASCII: the rest is there.
    """
    if len(os.fsencode(header.name)) >= 99 or (plain := str(_plain(header.name))) == name:
        return True
    left = iter(plain)
    return not name.isascii() and all(c in left for c in name if c.isascii())


def _plain(name: str) -> PurePosixPath:
    """A member's name as one below its tar file, which leads nowhere else."""
    return PurePosixPath(*("__" if part == ".." else part for part in name.split("/") if part))


def _beside(name: str) -> Iterator[str]:
    """Where an image's label may be: beside it by its name without the suffix, or up to its first dot."""
    folder, slash, last = name.rpartition("/")
    for stem in (without_suffix(last), *([last.partition(".")[0]] if is_image(last) else [])):
        yield from (f"{folder}{slash}{stem}{suffix}" for suffix in LABELS)


def _label(content: bytes, suffix: str) -> str:
    text = content.decode("utf-8-sig", "replace")
    if suffix == ".json":
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        if isinstance(value, dict):
            value = next((value[key] for key in ("label", "cls", "class") if key in value), None)
        text = str(value) if isinstance(value, str | int) or (isinstance(value, float) and isfinite(value)) else ""
    text = text.encode("utf-8", "replace").decode()  # JSON may name half of a character
    return " ".join(text.replace("\0", " ").split())


class Shards:
    """What is known of tar files: their members, found once.

    Args:
        storage: where they are read, and what is found is kept.
        key: the setting that errors name.
    """

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._known = dict[str, Members]()
        self._stamps = dict[str, str]()

    def learn(self, shards: Iterable[str]) -> None:
        """Find the members of some tar files, several at a time; those that were kept are not looked for again.

        Raises:
            ValueError: for one that cannot be read.
        """
        missing, stop = sorted(set(shards) - self._known.keys()), Event()
        with ThreadPoolExecutor(min(32, 4 * num_cores())) as pool:
            try:
                members = tqdm(
                    pool.map(partial(self._find, stop), missing),
                    "index",
                    len(missing),
                    delay=2,
                    unit="shard",
                    disable=None,
                )
                self._known.update(zip(missing, members, strict=True))
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _find(self, stop: Event, shard: str) -> Members:
        try:
            _, stamp = self._storage.stamp(shard)
            self._stamps[shard] = stamp
            name = f"{hashlib.sha256(os.fsencode(shard)).hexdigest()[:32]}.index"
            for index in self._storage.recall(shard, name):
                if members := Members.unpacked(index, stamp):
                    return members
                if index and self._storage.beside and not index.startswith(ZIP):
                    raise ValueError(
                        f"{shard}.index is there and was not made by fcmae, and data.index is beside: move it"
                    )
            if shard.endswith(TAR):
                with self._storage.open(shard) as file:
                    members = scan(file, stop)
            else:
                starts, sizes, labels = scan_table(self._storage, shard)
                members = Members([f"{row:09}" for row in range(len(starts))], starts, sizes, labels)
        except (OSError, ValueError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise ValueError(f"{self._key}: {shard!r} cannot be used ({why}): repair it, or leave it out") from error
        try:
            self._storage.keep(shard, name, members.packed(stamp))
        except OSError as error:
            raise ValueError(f"data.index: the index of {shard!r} cannot be written ({error})") from error
        return members

    def labels(self, shard: str) -> dict[str, str]:
        """The addresses of the images of a tar file that was learnt, and their labels, which may be empty."""
        members = self._known[shard]
        return {f"{shard}/{name}": label for name, label in zip(members.names, members.labels, strict=True)}

    def notes(self) -> tuple[str, ...]:
        """Sentences on what cannot be used of the tar files that were learnt, and is left out of those just read."""
        others = sum((members.others for members in self._known.values()), Counter[str]())
        return (*self._damages(), *left_out(others, self._key))

    def _damages(self) -> tuple[str, ...]:
        counts = {shard: int(np.isin(members.sizes, list(REASONS)).sum()) for shard, members in self._known.items()}
        if not (bad := {shard: count for shard, count in counts.items() if count}):
            return ()
        total, first = sum(bad.values()), printable(next(iter(bad)))
        return (f"{self._key}: {total} places in {len(bad)} shards are damaged, doubled or links, first in {first}",)

    def source(self, addresses: Sequence[str]) -> Source:
        """Images by their addresses, in tar files or not, in the given order.

        Raises:
            ValueError: for a tar file that cannot be read.
        """
        once = list(dict.fromkeys(addresses))  # a label map may be that of several images
        lies_in = list(shards_of(once))
        shards = sorted({shard for shard in lies_in if shard is not None})
        if not shards and not any(map(is_remote, addresses)):
            return Files(addresses)
        self.learn(shards)
        wanted = {address: i for i, address in enumerate(once)}
        is_member = np.array([shard is not None for shard in lies_in], np.bool_)
        # Number of the shard, first byte, and size or what stands in its place.
        table = np.stack([np.full(len(once), -1), np.zeros(len(once)), np.where(is_member, MISSING, WHOLE)])
        table = table.astype(np.int64)
        for number, shard in enumerate(shards):
            members, prefix = self._known[shard], f"{shard}/"
            at = np.array([wanted.get(prefix + name, -1) for name in members.names], np.int64)
            table[0, at[at >= 0]] = number
            table[1:, at[at >= 0]] = members.starts[at >= 0], members.sizes[at >= 0]
        if len(once) < len(addresses):
            table = table[:, [wanted[address] for address in addresses]]
        return Parts(addresses, shards, table, self._storage, [self._stamps[shard] for shard in shards])


class Parts(Listed):
    """Images that are members of tar files, or files.

    Args:
        names: their addresses.
        shards: addresses of the tar files.
        table: (3, N) int64: number of the tar file or -1, first byte, and size or what stands in its place.
        storage: that reads them.
        stamps: of the shards, see `Storage.stamp`; a table says nothing else of whether it is the same.
        known: the fingerprint, of more images than these where they are a part of what was found.

    Raises:
        ValueError: if the table has another shape, or names a tar file that is not there.
    """

    def __init__(
        self,
        names: Sequence[str] | Names,
        shards: Sequence[str],
        table: NDArray[np.int64],
        storage: Storage,
        stamps: Sequence[str] = (),
        known: str | None = None,
    ) -> None:
        if table.shape != (3, len(names)) or not len(shards) > table[0].max(initial=-1) >= -1:
            raise ValueError(f"places of {len(names)} images in {len(shards)} shards of shape {table.shape}")
        super().__init__(names)
        self.shards, self.table, self._storage = tuple(shards), table, storage
        self.stamps, self._seen, self._fingerprint = tuple(stamps), set[int](), known
        self._whole = bytearray()  # a bit for each image: a TIFF from afar that is read at once, as it was found out

    def read(self, i: int) -> bytes:
        number, start, size = self.table[:, i].tolist()
        name = self.name(i)
        if size in REASONS:
            raise OSError(REASONS[size])
        if number < 0:
            return self._storage.read(name)
        shard = self.shards[number]
        if not shard.endswith(TAR):
            self._check(number)
        if shard.endswith(PARQUET):
            stamp = self.stamps[number] if number < len(self.stamps) else ""
            return read_row(self._storage, shard, stamp, start, size)
        if shard.endswith(ARROW):
            return self._storage.read(shard, start, size)
        # With its header: that it is there still, as it was when the index was made.
        content = self._storage.read(shard, start - BLOCK, size + BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(content[:BLOCK], tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            header = tarfile.TarInfo()
        if header.size != size or not _may_be(header, name[len(shard) + 1 :]):
            raise OSError(CHANGED.format(shard))
        return content[BLOCK:]

    def open(self, i: int) -> BinaryIO:
        name = self.name(i)
        number, _, size = self.table[:, i].tolist()
        is_file = number < 0 and size == WHOLE
        if is_file and not is_remote(name):
            return open_file(name)
        is_tiff = is_file and name.lower().endswith((".tif", ".tiff"))
        if is_tiff and not (self._whole and self._whole[i >> 3] >> (i & 7) & 1):
            if (content := self._storage.held(name)) is not None:
                return io.BytesIO(content)
            try:
                file = self._storage.open(name, cached=True)
                if file.seek(0, os.SEEK_END) > MUCH:
                    file.seek(0)
                    file.peek(1)
                    return file
            except Unanswered:  # the next read asks for parts again
                raise
            except OSError:  # a server that tells no size or gives no parts gives the whole
                pass
            self._whole = self._whole or bytearray(len(self) // 8 + 1)
            self._whole[i >> 3] |= 1 << (i & 7)
        return super().open(i)

    def _check(self, number: int) -> None:
        """Once in each process."""
        if number < len(self.stamps) and number not in self._seen:
            if self._storage.stamp(self.shards[number])[1] != self.stamps[number]:
                raise OSError(CHANGED.format(self.shards[number]))
            self._seen.add(number)

    def is_copied(self) -> bool:
        """Whether a table on this machine has its size and another time, as a copy has: it is to be looked at again."""
        for shard, stamp in zip(self.shards, self.stamps, strict=False):  # none of an older index
            if not shard.endswith(TAR) and not is_remote(shard):
                with suppress(OSError):  # it is gone, which is told where it is read
                    size, now = self._storage.stamp(shard)
                    if now != stamp and stamp.startswith(f"{size}-"):
                        return True
        return False

    def fingerprint(self) -> str:
        """Of the sizes of the images within tar files, all that were found."""
        return self._fingerprint or hashlib.sha256(self.table[2].astype("<i8").tobytes()).hexdigest()
