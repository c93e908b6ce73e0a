"""Files that are there whole or not at all."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from fcmae import atomic
from fcmae.atomic import read_bytes, replacing, sha256_of, write_text


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as aside:
        aside.write_text("half")
        assert path.read_text() == "old"
        raise KeyError
    assert [found.name for found in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
    with replacing(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"


def test_names_that_are_no_unicode_keep_their_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "names", "caf\udce9")
    assert (tmp_path / "names").read_bytes() == b"caf\xe9"


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_that_is_none_or_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for found, most, why in (
        (path, 4, "more than 4 bytes"),
        (tmp_path / "pipe", 9, "no file"),
        (tmp_path, 9, "no file"),
    ):
        with pytest.raises(OSError, match=f"it .*{why}"):
            read_bytes(found, most)


def test_what_a_full_disk_stops_is_named(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "file") as aside:
        fill(aside)
    assert caught.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_a_checksum_is_of_all_bytes_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than is read at a time
    for changed in (content, b"", content[:-1], content[:-1] + b"\0"):
        (tmp_path / "file").write_bytes(changed)
        assert sha256_of(tmp_path / "file") == hashlib.sha256(changed).hexdigest()


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".tmp-table.csv").write_text("half")
    with replacing(tmp_path / "table.csv") as aside, aside.open("x") as file:
        file.write("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "whole"


def test_what_several_write_at_the_same_time_is_that_of_the_last(tmp_path: Path) -> None:
    path = tmp_path / "shared.json"
    with replacing(path, is_shared=True) as first, replacing(path, is_shared=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def test_where_folders_cannot_be_synced_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    atomic.sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        atomic.sync(tmp_path / "a")


def test_a_file_takes_its_name_once_its_content_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def synced(path: Path) -> None:
        found.append((path.read_text(), (tmp_path / "config.yaml").exists()))

    monkeypatch.setattr(atomic, "sync", synced)
    write_text(tmp_path / "config.yaml", "seed: 1\n")
    assert found == [("seed: 1\n", False)]
