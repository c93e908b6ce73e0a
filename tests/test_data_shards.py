"""Tar shards are read as the folders that they were packed from, image by image, whatever is wrong with them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import flags

from fcmae.cli import main
from fcmae.data import shards
from fcmae.data.find import find_images, find_labelled, find_mapped
from fcmae.data.index import Images
from fcmae.data.shards import BLOCK, Members, Parts, scan
from fcmae.data.source import BadImage
from fcmae.data.storage import Storage


def pack(path: Path, *members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def image(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def labelled(num: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Images of two classes."""
    range_ = range(first, first + num)
    return [pair for i in range_ for pair in ((f"{i:03}.png", image(i)), (f"{i:03}.cls", b"%d" % (i % 2)))]


def scanned(path: Path) -> Members:
    with path.open("rb") as file:
        return scan(file)


def contents(images: Images) -> dict[str, bytes | str]:
    found = dict[str, bytes | str]()
    for i in range(len(images)):
        try:
            with images.open(i) as file:
                found[images.name(i).rpartition(".tar/")[2]] = file.read()
        except BadImage as error:
            found[images.name(i).rpartition(".tar/")[2]] = str(error)
    return found


# Finding


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_extracts(tmp_path: Path, form: int) -> None:
    names = ["a/b.jpg", "./c.PNG", "d" * 90 + ".npy", "e/" * 40 + "f.webp"]
    names += ["ü/ß 日本.jpg", "long/" * 60 + "g.tif"] if form != tarfile.USTAR_FORMAT else []
    members = [(name, bytes([i]) * (i * 300)) for i, name in enumerate(names, 1)]
    pack(tmp_path / "x.tar", *members, ("notes.md", b"x"), (".hidden.jpg", b"x"), (".git/a.jpg", b"x"), form=form)
    images = find_images([str(tmp_path)])
    assert contents(images) == {name.removeprefix("./"): content for name, content in members}
    assert images.names() == sorted(images.names())
    again = pickle.loads(pickle.dumps(images.source))
    assert [again.read(i) for i in range(len(again))] == [images.source.read(i) for i in range(len(images))]


def test_shards_are_found_as_files_in_folders_lists_and_patterns_beside_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("deep/a.tar", "b.tar"):
        pack(tmp_path / name, ("1.png", image(1)))
    (tmp_path / "c.png").write_bytes(image(2))
    (tmp_path / "list.txt").write_text("deep/a.tar\nc.png\nb.tar/1.png\n")
    every = sorted(str(tmp_path / name) for name in ("deep/a.tar/1.png", "b.tar/1.png", "c.png"))
    for sources in (
        [str(tmp_path)],
        [str(tmp_path / "list.txt")],
        [str(tmp_path / "*")],
        [str(tmp_path / name) for name in ("deep/a.tar", "b.tar", "c.png")],
    ):
        images = find_images(sources)
        assert images.names() == every
        assert set(contents(images).values()) == {image(1), image(2)}


def test_a_file_beside_a_shard_is_opened_and_not_read_into_memory(tmp_path: Path) -> None:
    pack(tmp_path / "b.tar", ("1.png", image(1)))
    (tmp_path / "scene.tif").write_bytes(image(2))
    images = find_images([str(tmp_path)])
    with images.open(images.names().index(str(tmp_path / "scene.tif"))) as file:
        assert isinstance(file.raw, io.FileIO)  # type: ignore[attr-defined]


def test_a_folder_named_like_a_shard_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar/1.png").write_bytes(image(1))
    pack(tmp_path / "x.tar/y.tar", ("2.png", image(2)))
    assert set(contents(find_images([str(tmp_path)])).values()) == {image(1), image(2)}
    (tmp_path / "list.txt").write_text("x.tar/1.png\nx.tar/y.tar/2.png\n")
    assert set(contents(find_images([str(tmp_path / "list.txt")])).values()) == {image(1), image(2)}


@pytest.mark.parametrize("name", ["../../etc/a.png", "/etc/a.png", "a/../b.png", "./a.png", "a//b.png"])
def test_a_members_name_leads_nowhere_but_into_its_shard(tmp_path: Path, name: str) -> None:
    pack(tmp_path / "x.tar", (name, image(1)))
    (found,) = find_images([str(tmp_path)]).names()
    assert str(Path(found).resolve()).startswith(f"{tmp_path}/x.tar/")
    (tmp_path / "list.txt").write_text(found)
    images = find_images([str(tmp_path / "list.txt")])
    assert images.names() == [found] and list(contents(images).values()) == [image(1)]


@pytest.mark.parametrize(("mode", "suffix"), [("gz", ".tar.gz"), ("gz", ".tar"), ("bz2", ".tar"), ("xz", ".tar")])
def test_a_compressed_tar_is_refused_with_the_reason(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with tarfile.open(path, f"w:{mode}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.png"))
    for find in (lambda: find_images([str(path)]), lambda: find_labelled(str(path))):
        with pytest.raises(ValueError, match=r"data\.path: .*compressed.*unpack it"):
            find()


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"no tar" * 300])
def test_a_tar_without_an_image_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.path: .*x\.tar"):
        find_images([str(tmp_path / "x.tar")])


# What is wrong with them


def test_a_shard_that_is_cut_off_gives_the_images_before_the_cut(tmp_path: Path) -> None:
    whole = pack(tmp_path / "x.tar", *labelled(3)).read_bytes()
    starts = scan(io.BytesIO(whole)).starts
    for cut in range(int(starts[1]) - 2 * BLOCK, int(starts[2]) + 600, 171):
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        found = contents(find_images([str(tmp_path / "x.tar")]))
        assert found["000.png"] == image(0)
        assert {name for name in found if not name.startswith("@")} <= {"000.png", "001.png", "002.png"}
        for name, seed in (("001.png", 1), ("002.png", 2)):
            value = found.get(name)
            complete = cut >= starts[seed] + len(image(seed))
            assert value == image(seed) if complete else value is None or "cut off" in str(value)


def test_damage_costs_the_members_it_hits_and_no_others(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", *labelled(4))
    content, starts = bytearray(path.read_bytes()), scanned(path).starts
    content[starts[1] - BLOCK : starts[1] - BLOCK + 200] = b"?" * 200
    path.write_bytes(content)
    images = find_images([str(path)])
    found = contents(images)
    assert found.pop(f"@{starts[1] - BLOCK}") == "it cannot be read: the shard is damaged here: pack it again"
    assert found == {f"{i:03}.png": image(i) for i in (0, 2, 3)}
    assert images.notes == (f"data.path: 1 places in 1 shards are damaged, doubled or links, first in {path}",)
    assert [Path(name).name for name in find_labelled(str(path)).names()] == ["000.png", "002.png", "003.png"]


def test_shards_appended_to_each_other_are_one_without_damage(tmp_path: Path) -> None:
    parts = [pack(tmp_path / "x.tar", *labelled(2, first)).read_bytes() for first in (0, 2)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    assert contents(find_images([str(tmp_path)])) == {f"{i:03}.png": image(i) for i in range(4)}


@pytest.mark.parametrize("what", ["zeroed header", "behind padding"])
def test_damage_is_told_of_whatever_it_begins_with(tmp_path: Path, what: str) -> None:
    parts = [pack(tmp_path / "x.tar", *labelled(2, first)).read_bytes() for first in (0, 2)]
    content = bytearray(b"".join(parts))
    if what == "zeroed header":
        start = int(scan(io.BytesIO(bytes(content))).starts[1]) - BLOCK
        content[start : start + BLOCK] = bytes(BLOCK)
        lost, at = 1, start + BLOCK  # the first bytes that say that there was something
    else:
        lost, at = 2, len(parts[0])
        content[at + 148] ^= 1  # its sum
    (tmp_path / "x.tar").write_bytes(content)
    images = find_images([str(tmp_path / "x.tar")])
    found = contents(images)
    assert f"@{at}" in found and {f"{i:03}.png" for i in range(4)} - found.keys() == {f"{lost:03}.png"}
    assert images.notes[0].startswith("data.path: 1 places in 1 shards are damaged")


def test_folders_of_shards_beside_shards_are_told_of(tmp_path: Path) -> None:
    for place in ("cats/a.tar", "dogs/b.tar", "extra.tar"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        pack(tmp_path / place, *labelled(2))
    found = find_labelled(str(tmp_path))
    assert len(found) == 2 and {Path(name).parent.name for name in found.names()} == {"extra.tar"}
    assert found.notes[0].startswith("data.path: folders of tar files, cats, dogs, beside tar files in")
    (tmp_path / "extra.tar").unlink()
    assert find_labelled(str(tmp_path)).class_names == ("cats", "dogs")


def test_a_table_of_pairs_tells_of_damaged_shards(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", *labelled(4))
    content, starts = bytearray(path.read_bytes()), scanned(path).starts
    content[starts[1] - BLOCK : starts[1] - BLOCK + 200] = b"?" * 200
    path.write_bytes(content)
    (tmp_path / "pairs.csv").write_text("image,mask\nx.tar/000.png,x.tar/002.png\nx.tar/003.png,x.tar/002.png\n")
    images, _ = find_mapped(str(tmp_path / "pairs.csv"), None)
    assert len(images) == 2 and "places in 1 shards are damaged" in images.notes[0]


def test_the_second_member_of_a_name_is_bad(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", ("a.png", image(0)), ("b.png", image(1)), ("a.png", image(2)), ("a.cls", b"1"))
    found = contents(find_images([str(tmp_path)]))
    assert found.pop("a.png#2") == "it cannot be read: the shard has an earlier member of this name: pack it again"
    assert found == {"a.png": image(0), "b.png": image(1)}


def test_what_is_said_of_all_members_is_no_damage(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", *labelled(2))
    comment = tarfile.TarInfo.create_pax_global_header({"comment": "a" * 40})  # as `git archive` begins
    path.write_bytes(comment + path.read_bytes())
    images = find_images([str(path)])
    assert contents(images) == {f"{i:03}.png": image(i) for i in range(2)} and not images.notes


@pytest.mark.parametrize("number", [0, 1])
def test_damage_behind_a_pax_header_costs_one_member(tmp_path: Path, number: int) -> None:
    members = [("ü" * 40 + f"{i}.png", image(i)) for i in range(3)]
    path = pack(tmp_path / "x.tar", *members, form=tarfile.PAX_FORMAT)
    with tarfile.open(path) as archive:
        header = archive.getmembers()[number].offset_data - BLOCK
    content = bytearray(path.read_bytes())
    content[header + 148] ^= 1  # its sum
    path.write_bytes(content)
    found = contents(find_images([str(path)]))
    assert {name: found[name] for name in found if not name.startswith("@")} == {
        name: value for i, (name, value) in enumerate(members) if i != number
    }


def test_a_member_of_a_negative_size_ends_the_scan(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", ("a.png", image(0)), ("b.png", b""), ("c.cls", b""))
    content = bytearray(path.read_bytes())
    for name in (b"b.png", b"c.cls"):
        start = content.index(name)
        content[start + 124 : start + 136] = b"\xff" * 10 + (2**16 - BLOCK).to_bytes(2)  # in base 256
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + BLOCK])
    path.write_bytes(content)
    assert contents(find_images([str(path)]))["a.png"] == image(0)


@pytest.mark.parametrize(
    ("folder", "a"),
    [(".", "a"), ("Müller", "a"), (".", "ä"), (".", "å" * 40)],
    ids=["ASCII", "folder", "short", "long"],
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_shard_that_changes_while_it_is_used_gives_no_wrong_image(
    tmp_path: Path, renamed: bool, folder: str, a: str, form: int
) -> None:
    first, second = image(0), image(1)
    size = max(len(first), len(second))
    (tmp_path / folder).mkdir(exist_ok=True)
    path, both = tmp_path / folder / "x.tar", [(f"{a}1.npy", first.ljust(size)), (f"{a}2.npy", second.ljust(size))]
    pack(path, *both, form=form)
    images = find_images([str(path)])
    assert [images.open(i).read() for i in range(2)] == [content for _, content in both]
    # The other order, of the same sizes; or with another before.
    pack(path, *(both[::-1] if renamed else [("c.npy", b"x" * 700), *both]), form=form)
    for i in range(2):
        with pytest.raises(BadImage, match=r"x\.tar has changed since its index was made"):
            images.open(i)


def test_what_is_listed_and_not_in_the_shard_is_bad(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", ("a.png", image(0)))
    (tmp_path / "list.txt").write_text("x.tar/a.png\nx.tar/b.png\n")
    found = contents(find_images([str(tmp_path / "list.txt")]))
    assert found == {"a.png": image(0), "b.png": "it cannot be read: the shard has no such member"}


@given(st.binary(max_size=3000), st.integers(0, 6000))
def test_no_bytes_make_the_scan_fail_but_with_a_sentence(noise: bytes, at: int) -> None:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in labelled(2):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        content = bytearray(file.getvalue())
    content[at : at + len(noise)] = noise
    try:
        found = scan(io.BytesIO(content))
    except ValueError as error:
        assert str(error).startswith(("it is compressed by", "it is no tar file"))
        return
    assert len(set(found.names)) == len(found.names) == len(found.starts) == len(found.sizes) == len(found.labels)


# Labels


def test_labels_come_from_beside_the_images(tmp_path: Path) -> None:
    texts = {
        "a.cls": b"7\n", "a.json": b'"no"', "a.txt": b"no", "b.json": b'{"label": "cat"}', "c.json": b'{"cls": 3}',
        "d.txt": b"\xef\xbb\xbfa  tabby cat\n", "f.json": b'{"label": 1.0}', "d.json": b"{broken",
        "e.seg.cls": b"no", "e.cls": b"7",
    }  # fmt: skip
    pack(
        tmp_path / "x.tar",
        *((f"{name}.png", image(0)) for name in "abcdef"),
        *((name, text) for name, text in texts.items()),
        ("sub/a.png", image(1)),
        ("sub/a.txt", b"cat"),
        *((f"1.2.{number}", bytes(128) + b"DICM") for number in (7, 8)),
        *((f"1.2{end}.cls", label) for end, label in (("", b"no"), (".7", b"7"), (".8", b"cat"))),
    )
    found = find_labelled(str(tmp_path))
    pairs = {found.name(i).rpartition(".tar/")[2]: found.label_name(i) for i in range(len(found))}
    assert pairs == {
        "a.png": "7",
        "b.png": "cat",
        "c.png": "3",
        "d.png": "a tabby cat",
        "e.png": "7",
        "f.png": "1.0",
        "sub/a.png": "cat",
        "1.2.7": "7",
        "1.2.8": "cat",
    }
    assert found.class_names == ("1.0", "3", "7", "a tabby cat", "cat")


def test_held_out_shards_have_the_classes_of_the_training_shards(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", *labelled(4))
    pack(tmp_path / "train-1.tar", *labelled(4, 4))
    pack(tmp_path / "val.tar", ("a.png", image(0)), ("a.cls", b"1"))
    train = find_labelled(str(tmp_path / "train-*.tar"))
    assert len(train) == 8 and train.class_names == ("0", "1")
    assert find_labelled(str(tmp_path / "val.tar"), train.class_names).label(0) == 1
    with pytest.raises(ValueError, match=r"data\.val_path: label '1' .* is no class of the training images"):
        find_labelled(str(tmp_path / "val.tar"), ["0", "2"])


def test_an_image_without_a_label_is_an_error(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", *labelled(2), ("z.png", image(0)))
    with pytest.raises(ValueError, match=r"data\.path: .*x\.tar/z\.png and 0 more of 3 images have no label"):
        find_labelled(str(tmp_path / "x.tar"))


def test_a_table_of_labels_may_name_members(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", *labelled(2))
    (tmp_path / "labels.csv").write_text("path,label\nx.tar/000.png,cat\nx.tar/001.png,dog\n")
    found = find_labelled(str(tmp_path / "labels.csv"))
    assert list(contents(found).values()) == [image(0), image(1)] and found.class_names == ("cat", "dog")


# The index


def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each tar file that is scanned."""
    found = list[int]()
    monkeypatch.setattr(shards, "scan", lambda file, stop: (found.append(1), scan(file, stop))[1])
    return found


@pytest.mark.parametrize("beside", [False, True])
def test_an_index_is_made_once_and_anew_when_its_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    found = scans(monkeypatch)
    (tmp_path / "data").mkdir()
    for i in range(3):
        pack(tmp_path / f"data/{i}.tar", *labelled(2, 2 * i))
    storage = Storage(tmp_path / "kept", beside)
    names = find_images([str(tmp_path / "data")], storage=storage).names()
    assert len(found) == 3 and (tmp_path / "kept").exists() != beside
    assert find_images([str(tmp_path / "data")], storage=storage).names() == names
    assert find_labelled(str(tmp_path / "data"), storage=storage).names() == names
    assert len(found) == 3
    find_images([str(tmp_path / "data")])
    assert len(found) == (3 if beside else 6)  # what lies beside is found by everyone
    del found[:]
    pack(tmp_path / "data/1.tar", *labelled(3, 2))
    assert len(find_images([str(tmp_path / "data")], storage=storage)) == 7 and len(found) == 1


def test_making_an_index_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        pack(tmp_path / f"{i}.tar", *labelled(1, i))
    (tmp_path / "3.tar").write_bytes(b"broken" * 1000)
    storage = Storage(tmp_path / "kept")
    monkeypatch.setattr(shards, "num_cores", lambda: 1)
    with pytest.raises(ValueError, match=r"3\.tar' cannot be used \(it is no tar file\)"):
        find_images([str(tmp_path)], storage=storage)
    pack(tmp_path / "3.tar", *labelled(1, 3))
    found = scans(monkeypatch)
    assert len(find_images([str(tmp_path)], storage=storage)) == 4 and len(found) == 1


def test_an_index_beside_a_shard_that_is_not_its_own_does_not_hide_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "x.tar", *labelled(2))
    (tmp_path / "x.tar.index").write_text("block 0: 000.png\n")
    found, storage = scans(monkeypatch), Storage(tmp_path / "kept")
    for _ in range(2):
        assert len(find_images([str(tmp_path)], storage=storage)) == 2 and len(found) == 1


def test_an_index_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "x.tar", *labelled(2))
    (tmp_path / "x.tar.index").mkdir()
    with pytest.raises(ValueError, match=r"x\.tar' cannot be used \(Is a directory\)"):
        find_images([str(tmp_path)], storage=Storage(beside=True))
    assert len(find_images([str(tmp_path)])) == 2


def test_what_another_program_wrote_beside_a_shard_is_not_replaced(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", *labelled(2))
    (tmp_path / "x.tar.index").write_text("block 0: 000.png\n")  # as GNU tar writes one
    with pytest.raises(ValueError, match=r"x\.tar\.index is there and was not made by fcmae, .* move it"):
        find_images([str(tmp_path)], storage=Storage(beside=True))
    assert (tmp_path / "x.tar.index").read_text() == "block 0: 000.png\n"
    assert len(find_images([str(tmp_path)])) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, content: bytes) -> None:
    pack(tmp_path / "x.tar", *labelled(2))
    (tmp_path / "x.tar.index").write_bytes(content)
    assert len(find_images([str(tmp_path)], storage=Storage(beside=True))) == 2
    assert (tmp_path / "x.tar.index").read_bytes() != content


def test_an_index_holds_what_was_scanned_and_is_for_one_stamp(tmp_path: Path) -> None:
    found = scanned(pack(tmp_path / "x.tar", *labelled(2), ("ü\udcff.png", b"x"), form=tarfile.GNU_FORMAT))
    for members in (found, Members([], found.starts[:0], found.sizes[:0], [])):
        again = Members.unpacked(members.packed("a"), "a")
        assert again is not None
        assert (again.names, again.labels) == (members.names, members.labels)
        assert np.array_equal([again.starts, again.sizes], [members.starts, members.sizes])
        assert Members.unpacked(members.packed("a"), "b") is None


def test_a_link_in_a_tar_file_is_told_with_the_remedy(tmp_path: Path) -> None:
    """A folder would give the image under both names."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(image(0))
    (folder / "b.png").hardlink_to(folder / "a.png")
    (folder / "c.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder, "photos")
    images = find_images([str(tmp_path / "x.tar")])
    found = list(contents(images).values())
    assert found[0] == image(0) and len(found) == 3
    assert all("it is a link to another member: pack it again" in str(reason) for reason in found[1:])
    (note,) = images.notes
    assert note.startswith("data.path: 2 places in 1 shards are damaged, doubled or links, first in ")


def test_images_in_shards_are_saved_with_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "x.tar", *labelled(4))
    (tmp_path / "y.png").write_bytes(image(9))
    images = find_images([str(tmp_path)])
    found = scans(monkeypatch)
    for part in (images, images.subset([3, 1])):
        part.save(tmp_path / "files.json")
        again = Images.load(tmp_path / "files.json")
        assert again.names() == part.names() and contents(again) == contents(part)
        assert isinstance(again.source, Parts)
    assert again.subset([0]).names() == images.subset([3]).names() and not found
    values = json.loads((tmp_path / "files.json").read_text())
    for damaged in ({"places": [[0], [1]]}, {"shards": []}):
        (tmp_path / "files.json").write_text(json.dumps(values | damaged))
        with pytest.raises(ValueError, match="is not an index of images"):
            Images.load(tmp_path / "files.json")


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_the_place(tmp_path: Path) -> None:
    found = list[str]()
    for folder, members in (("a", labelled(2)), ("b", labelled(2)), ("c", [("000.png", b"?"), ("001.png", b"?")])):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "x.tar", *members)
        found.append(find_images([str(tmp_path / folder)]).fingerprint())
    assert found[0] == found[1] != found[2]


# Runs


@pytest.fixture
def _alone(one_thread: None) -> Iterator[None]:
    yield
    runs.forget_accelerator()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two shards, of 14 images in all, the first with an image that is broken."""
    root = tmp_path / "packed"
    root.mkdir()
    pack(root / "0.tar", *labelled(7), ("broken.png", b"no image"), ("broken.cls", b"0"))
    pack(root / "1.tar", *labelled(6, 7))
    return root


def unpacked(root: Path) -> Path:
    """The same as folders, which have the names of the shards."""
    for path in root.glob("*.tar"):
        with tarfile.open(path) as archive:
            archive.extractall(root.parent / "folders" / path.name, filter="data")
    return root.parent / "folders"


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_shards_is_the_run_on_their_folders_and_goes_on_exactly(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    options = {"data__max_bad_share": 0.5, "data__num_workers": workers}
    assert main(["pretrain", *flags(unpacked(packed), tmp_path / "whole", **options)]) == 0
    with monkeypatch.context() as patch:
        runs.at_step(patch, 5, runs.kill_self(signal.SIGTERM))
        assert main(["pretrain", *flags(packed, tmp_path / "cut", **options)]) == 143
    found = scans(monkeypatch)
    packed.rename(tmp_path / "moved")  # what is resumed finds another folder of the same images
    assert main(["pretrain", *flags(tmp_path / "moved", tmp_path / "cut", **options)]) == 0
    assert len(found) == 2
    runs.assert_same(runs.final_state(tmp_path / "cut"), runs.final_state(tmp_path / "whole"))
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")
    listed = (tmp_path / "cut/bad_files.txt").read_text()
    assert "0.tar/broken.png" in listed and len(listed.splitlines()) <= 2
    assert len(list((tmp_path / "cut/index").iterdir())) == 4


@pytest.mark.usefixtures("_alone")
def test_a_run_goes_on_by_its_own_index_and_is_deleted_with_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = flags(packed, tmp_path / "out", data__max_bad_share=0.5)
    with monkeypatch.context() as patch:
        runs.at_step(patch, 5, runs.kill_self(signal.SIGTERM))
        assert main(["pretrain", *run]) == 143
    found = scans(monkeypatch)
    shutil.rmtree(tmp_path / "out/index")
    assert main(["pretrain", *run]) == 0 and not found
    assert main(["pretrain", *run, "--overwrite", "true"]) == 0 and len(found) == 2


def tuned(packed: Path, out: Path, epochs: int = 1) -> list[str]:
    """The command of a short fine-tuning whose held-out images are split off."""
    names = ("--data.auto_augment", "none", "--model.variant", "{depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}")
    small = ("--model.stem_stride", "1", "--epochs", str(epochs))
    command = ["finetune", "--config", str(runs.DEFAULTS), "--data.path", str(packed), "--out", str(out)]
    command += ["--device", "cpu", "--data.image_size", "32", "--data.num_workers", "0", "--batch_size", "4", *names]
    command += ["--log.trackers", "none", "--data.max_bad_share", "0.5", *small]
    return command


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("moved", [False, True])
def test_a_fine_tuning_whose_images_are_split_goes_on_exactly(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    assert main(tuned(packed, tmp_path / "whole", epochs=2)) == 0
    for step in (1, 2):  # the second start reads the list that the third reads as the second wrote it
        with monkeypatch.context() as patch:
            runs.at_step(patch, step, runs.kill_self(signal.SIGTERM))
            assert main(tuned(packed, tmp_path / "cut", epochs=2)) == 143
    if moved:
        packed = packed.rename(tmp_path / "moved")
    assert main(tuned(packed, tmp_path / "cut", epochs=2)) == 0
    runs.assert_same(runs.final_state(tmp_path / "cut"), runs.final_state(tmp_path / "whole"))


@pytest.mark.usefixtures("_alone")
def test_labels_of_shards_are_learnt_and_evaluated(packed: Path, tmp_path: Path) -> None:
    assert main(tuned(packed, tmp_path / "out")) == 0
    rows = (tmp_path / "out/last/predictions.csv").read_text().splitlines()
    assert all(".tar/" in row for row in rows[1:]) and len(rows) > 2
    runs.forget_accelerator()
    tables = ["--data", str(packed / "0.tar"), "--test", str(packed / "1.tar"), "--out", str(tmp_path / "evaluation")]
    given = [*tables, "--probes", "knn", "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "out"), *given]) == 2  # it has learnt their labels
    assert main(["evaluate", f"random:{tmp_path / 'out'}", *given]) == 0
    record = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert (record["data"]["num_train"], record["data"]["num_test"]) == (7, 6)


# The layout of a real set: NNNNNN.jpg beside NNNNNN.cls, of which FCMAE_TINY20 names a folder


@pytest.fixture
def tiny20(tmp_path: Path) -> Path:
    """The folder, or one of eight small images of two classes a shard."""
    if "FCMAE_TINY20" in os.environ:
        return Path(os.environ["FCMAE_TINY20"])
    root = tmp_path / "tiny20"
    root.mkdir()
    for number, name in enumerate(("train-000", "train-001", "val-000")):
        members = []
        for i in range(8):
            file = io.BytesIO()
            noise = np.random.default_rng((number, i)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file, "jpeg")
            members += [(f"{i:06}.jpg", file.getvalue()), (f"{i:06}.cls", b"%d" % (i % 2))]
        pack(root / f"{name}.tar", *members)
    return root


@pytest.mark.usefixtures("_alone")
def test_shards_that_webdataset_wrote_are_read_and_trained_on_as_they_lie(tiny20: Path, tmp_path: Path) -> None:
    train = find_labelled(f"{tiny20}/train-*.tar")
    val = find_labelled(f"{tiny20}/val-*.tar", train.class_names)
    assert set(np.bincount(train.labels)) == {len(train) // len(train.class_names or ())}
    assert set(np.bincount(val.labels)) == {len(val) // len(train.class_names or ())}
    with tarfile.open(val.name(3).rpartition("/")[0]) as archive, val.open(3) as file:
        member = archive.extractfile(Path(val.name(3)).name)
        assert member is not None and member.read() == file.read()
    steps = {"epochs": 12 / len(val), "batch_size": 4, "data__val_share": 0}
    assert main(["pretrain", *flags(tiny20 / "val-000.tar", tmp_path / "out", **steps)]) == 0
    assert [step for step, _ in runs.losses(tmp_path / "out")] == [1, 2, 3]
    assert not (tmp_path / "out/bad_files.txt").exists()


def test_thumbnails_and_deleted_files_in_a_tar_are_left_out_as_in_its_folder(tmp_path: Path) -> None:
    names = ("a.png", "@eaDir/a.png/thumb.png", "#recycle/b.png", "__MACOSX/c.png")
    assert scanned(pack(tmp_path / "x.tar", *((name, image(0)) for name in names))).names == ["a.png"]


def test_a_member_that_is_stored_without_its_holes_is_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(0) + bytes(1 << 20))
    os.truncate(tmp_path / "a.png", 1 << 22)
    subprocess.run(["tar", "--sparse", "-cf", "x.tar", "a.png"], cwd=tmp_path, check=True)
    assert "without its holes" in str(contents(find_images([str(tmp_path / "x.tar")]))["a.png"])


def test_a_backups_list_of_a_folder_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(image(0))
    subprocess.run(["tar", "--listed-incremental=list", "-cf", "x.tar", "photos"], cwd=tmp_path, check=True)
    (name,) = scanned(tmp_path / "x.tar").names
    assert name.endswith("photos/a.png")


def test_half_a_character_in_a_label_costs_no_other_image(tmp_path: Path) -> None:
    members = [*labelled(2), ("7.png", image(7)), ("7.json", rb'{"label": "\ud83d"}')]
    found = find_labelled(str(pack(tmp_path / "x.tar", *members)))
    assert [found.label_name(i) for i in range(3)] == ["0", "1", "?"]


@pytest.mark.parametrize("name", ["../é.png", "/é.png", "a/../../é.png"])
def test_an_index_whose_names_lead_elsewhere_is_made_anew(tmp_path: Path, name: str) -> None:
    found = scanned(pack(tmp_path / "x.tar", *labelled(1)))
    assert Members.unpacked(Members([name], found.starts, found.sizes, [""]).packed("a"), "a") is None


def test_an_index_that_would_fill_the_memory_is_made_anew() -> None:
    zeros = np.zeros(10**6, np.int64)
    found = Members(["a"] * 10**6, zeros, zeros, [""] * 10**6)
    assert len(found.packed("a")) < 10**5 and Members.unpacked(found.packed("a"), "a") is None
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as made:
        made.writestr("stamp.npy", file.getvalue())
    assert Members.unpacked(packed.getvalue(), "a") is None


@pytest.mark.parametrize("part", ["names", "starts", "labels"])
@pytest.mark.parametrize(
    "content", [b"\x93NUMPY\x01\x00v\x00{'descr': (", b"no array", np.zeros(()), np.zeros(10**5, np.uint8)]
)
def test_an_index_of_something_else_is_made_anew(tmp_path: Path, part: str, content: Any) -> None:
    packed = scanned(pack(tmp_path / "x.tar", *labelled(2))).packed("a")
    with zipfile.ZipFile(io.BytesIO(packed)) as kept, zipfile.ZipFile(made := io.BytesIO(), "w") as spoiled:
        for name in kept.namelist():
            if name != f"{part}.npy":
                spoiled.writestr(name, kept.read(name))
            elif isinstance(content, bytes):
                spoiled.writestr(name, content)
            else:
                np.save(file := io.BytesIO(), content)
                spoiled.writestr(name, file.getvalue())
    assert Members.unpacked(made.getvalue(), "a") is None


def test_an_index_that_zipfile_cannot_read_is_made_anew(tmp_path: Path) -> None:
    packed = scanned(pack(tmp_path / "x.tar", *labelled(2))).packed("a")
    at = packed.index(b"PK\x01\x02") + 8  # the flags of the directory's first entry: encrypted
    spoiled = packed[:at] + bytes([packed[at] | 1]) + packed[at + 1 :]
    assert Members.unpacked(spoiled, "a") is None
