from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fcmae.data import index, walk
from fcmae.data.find import find_images, find_labelled, find_mapped
from fcmae.data.index import Images, kept_images
from fcmae.data.shards import Parts
from fcmae.data.source import BadImage
from fcmae.data.split import split
from fcmae.data.storage import Storage


def touch(root: Path, *names: str) -> list[str]:
    """Empty files: finding images opens none."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return sorted(str(root / name) for name in names)


def content(images: Images) -> tuple[list[str], list[int] | None, tuple[str, ...] | None]:
    return images.names(), None if images.labels is None else images.labels.tolist(), images.class_names


def test_folders_are_searched_at_any_depth_in_any_case_and_sorted(tmp_path: Path) -> None:
    images = touch(
        tmp_path, "b.JPG", "a/x.jpeg", "a/b/c/y.Png", "z.tif", "z.TIFF", "w.webp", "v.bmp", "u.npy", "ü é.jpg"
    )
    touch(tmp_path, "notes.txt", ".hidden.jpg", ".cache/a.jpg", "a/.git/b.png", "jpg", "data.csv")
    index = find_images([str(tmp_path)])
    assert index.names() == images
    assert index.labels is None and index.class_names is None and len(index) == len(images)


def test_several_sources_are_joined_without_duplicates(tmp_path: Path) -> None:
    images = touch(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.jpg")
    sources = [str(tmp_path / "c"), str(tmp_path / "a"), str(tmp_path / "a/b"), images[0]]
    assert find_images(sources).names() == images


def test_relative_sources_give_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = touch(tmp_path, "a/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_images(["a"]).names() == images


def test_links_to_folders_are_followed_once_and_never_loop(tmp_path: Path) -> None:
    touch(tmp_path, "root/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    found = find_images([str(tmp_path / "root")]).names()
    assert sorted(Path(path).name for path in found) == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("link", "to", "what"),
    [
        ("cat/up", "..", "the classes' own folder"),
        ("cat/further", "../..", "the classes' own folder"),
        ("dog/others", "../cat", "the class 'cat'"),
        ("cat/others", "../dog", "the class 'dog'"),
        ("cat/one", "../dog/deep", "the class 'dog'"),
        ("emu", "cat", "the class 'cat'"),
        ("dog/shared", "../../shared", "the class 'cat'"),
        ("dog/below", "../../shared/below", "the class 'cat'"),
        ("dog/7.jpg", "../../pool/7.jpg", "the class 'cat'"),
        ("dog/1.jpg", "../cat/1.jpg", "the class 'cat'"),
        ("cat/2.jpg", "../dog/2.jpg", "the class 'dog'"),
    ],
)
def test_a_link_that_gives_images_a_second_label_is_refused(tmp_path: Path, link: str, to: str, what: str) -> None:
    touch(tmp_path, "labelled/cat/1.jpg", "labelled/dog/2.jpg", "labelled/dog/deep/3.jpg", "labelled/README.md")
    touch(tmp_path, "shared/8.jpg", "shared/below/9.jpg", "pool/6.jpg", "pool/7.jpg")
    (tmp_path / "labelled/cat/shared").symlink_to("../../shared")
    (tmp_path / "labelled/cat/again").symlink_to("shared")
    (tmp_path / "labelled/cat/7.jpg").symlink_to("../../pool/7.jpg")
    (tmp_path / "labelled/dog/6.jpg").symlink_to("../../pool/6.jpg")
    for name in ("cat", "dog"):  # which are no images
        (tmp_path / "labelled" / name / "README.md").symlink_to("../README.md")
    (tmp_path / "root").symlink_to("labelled")
    for root in (tmp_path / "labelled", tmp_path / "root"):
        assert find_labelled(str(root)).class_names == ("cat", "dog")
    (tmp_path / "labelled" / link).symlink_to(to)
    sentence = f"'.*/{link}' of the class '{link.partition('/')[0]}' is a link to what {what} has: remove the link"
    for root in (tmp_path / "labelled", tmp_path / "root"):
        with pytest.raises(ValueError, match=sentence):
            find_labelled(str(root))


def test_links_may_lead_to_where_no_class_is(tmp_path: Path) -> None:
    touch(tmp_path, "labelled/.git/annex/1.jpg", "labelled/.git/annex/2.jpg")
    for name, number in (("cat", 1), ("dog", 2)):
        (tmp_path / "labelled" / name).mkdir()
        (tmp_path / "labelled" / name / f"{number}.jpg").symlink_to(f"../.git/annex/{number}.jpg")
    assert find_labelled(str(tmp_path / "labelled")).class_names == ("cat", "dog")
    (tmp_path / "labelled/dog/1.jpg").symlink_to("../.git/annex/1.jpg")
    with pytest.raises(ValueError, match="of the class 'dog' is a link to what the class 'cat' has"):
        find_labelled(str(tmp_path / "labelled"))


def test_lists_hold_paths_relative_to_their_folder(tmp_path: Path) -> None:
    touch(tmp_path, "lists/a.jpg", "b.jpg", "without_suffix")
    text = f"\ufeffa.jpg\r\n\n  ../b.jpg  \n{tmp_path}/without_suffix\n"
    (tmp_path / "lists/all.txt").write_text(text, encoding="utf-8")
    expected = sorted(str(tmp_path / name) for name in ("lists/a.jpg", "b.jpg", "without_suffix"))
    assert find_images([str(tmp_path / "lists/all.txt")]).names() == expected


def test_a_long_search_says_how_much_it_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    monkeypatch.setattr(walk, "TELL_EVERY_S", 5)
    monkeypatch.setattr("time.monotonic", iter([0, 1, 6, 7, 20, 21, 22, 23]).__next__)
    with caplog.at_level("INFO", logger="fcmae"):
        find_images([str(tmp_path)])
        assert caplog.messages == ["data.path: 2 images or shards were found so far"]
        find_labelled(str(tmp_path))
    assert len(caplog.messages) == 1


def test_globs_bring_no_pictures_of_systems_and_runs(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/@eaDir/thumb.jpg", "@eaDir/2.jpg", "b.jpg", "runs/x/reconstructions/3.png")
    run = tmp_path / "runs" / "x"
    (run / "config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    (run / "environment.json").write_text("[]")
    both = [str(tmp_path / "a/1.jpg"), str(tmp_path / "b.jpg")]
    for pattern in ("*", "**", "**/*", "**/*.*g"):
        assert find_images([str(tmp_path / pattern)]).names() == both, pattern
    with pytest.raises(ValueError, match="holds no image"):
        find_images([str(tmp_path / "**" / "*.png")])
    assert len(find_images([str(run / "reconstructions" / "*.png")])) == 1  # named, so meant


def test_patterns_find_a_folder_once_whatever_leads_to_it(tmp_path: Path) -> None:
    touch(tmp_path, "data/2024/a.jpg", "data/2024/b.jpg", "data/c/d.jpg")
    (tmp_path / "data" / "latest").symlink_to("2024")
    (tmp_path / "data" / "c" / "up").symlink_to("..")
    for pattern in ("**/*.jpg", "*/*.jpg", "*", "**"):
        found = find_images([str(tmp_path / "data" / pattern)]).names()
        assert sorted(os.path.basename(name) for name in found) == ["a.jpg", "b.jpg", "d.jpg"], pattern  # noqa: PTH119


def test_patterns_of_labelled_tar_files_leave_out_what_was_deleted(tmp_path: Path) -> None:
    for name in ("a.tar", "#recycle/a.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in (("1.jpg", b"x"), ("1.cls", b"cat"), ("2.jpg", b"y"), ("2.cls", b"dog")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert len(find_labelled(str(tmp_path / "**" / "*.tar"))) == 2


def test_of_kept_images_only_lists_that_were_changed_are_read_again(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.jpg", "more/b.jpg")
    listed, index = tmp_path / "more.txt", tmp_path / "files.json"
    listed.write_text("more/b.jpg\n")
    sources = [str(tmp_path / "photos"), str(listed)]
    found = find_images(sources)
    found.subset([0, 1]).save(index)
    touch(tmp_path, "photos/c.jpg")
    (kept,) = kept_images([index], Storage()) or [None]
    assert kept is not None and kept.names() == found.names() and kept.lists == found.lists
    listed.write_text("more/b.jpg\nphotos/a.jpg\n")
    assert kept_images([index], Storage()) is None
    listed.unlink()
    assert kept_images([index], Storage()) is not None


def test_changed_lists_elsewhere_and_those_of_maps_are_read_again(tmp_path: Path) -> None:
    index, table = tmp_path / "files.json", fsspec.filesystem("memory")
    table.pipe("/lists/labels.csv", b"path,label\na.jpg,cat\nb.jpg,dog\n")
    find_labelled("memory://lists/labels.csv").save(index)
    assert kept_images([index], Storage()) is not None
    table.pipe("/lists/labels.csv", b"path,label\na.jpg,dog\nb.jpg,dog\nc.jpg,cat\n")
    assert kept_images([index], Storage()) is None
    (tmp_path / "pairs.csv").write_text("image,mask\na.jpg,a.png\n")
    images, _ = find_mapped(str(tmp_path / "pairs.csv"), None)
    images.save(index)
    assert kept_images([index], Storage()) is not None
    (tmp_path / "pairs.csv").write_text("image,mask\na.jpg,other.png\n")
    assert kept_images([index], Storage()) is None


def test_globs_match_files_and_search_folders(tmp_path: Path) -> None:
    images = touch(tmp_path, "a1/x.jpg", "a2/deep/y.png", "b/z.jpg")
    touch(tmp_path, "a1/x.txt")
    assert find_images([str(tmp_path / "a*")]).names() == images[:2]
    assert find_images([str(tmp_path / "**/*.jpg")]).names() == [images[0], images[2]]


@pytest.mark.parametrize("source", ["missing", "empty", "no_images", "blank.txt", "no*match", "notes.md"])
def test_a_source_without_images_is_an_error_that_names_it(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "no_images/readme.md", "blank.txt", "notes.md", "good/a.jpg")
    with pytest.raises(ValueError, match=r"data\.path: .*give a folder of images") as error:
        find_images([str(tmp_path / "good"), str(tmp_path / source)])
    assert source in str(error.value)


def test_a_list_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"data\.path: .*a\.txt cannot be read"):
        find_images([str(tmp_path / "a.txt")])


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"locked' cannot be listed \(Permission denied\)"):
        find_images([str(tmp_path)])


def test_save_and_load_round_trip_and_nothing_else_is_left(tmp_path: Path) -> None:
    labelled = Images.of_files(["/a/\udcff.jpg", "/b.jpg"], [1, 0], ["x", "y"])
    for images in (labelled, labelled.subset([1]), Images.of_files(["/a.jpg"]), Images.of_files([], [], ["x", "y"])):
        images.save(tmp_path / "files.json")
        assert content(Images.load(tmp_path / "files.json")) == content(images)
    assert [path.name for path in tmp_path.iterdir()] == ["files.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"paths": 3, "labels": null, "num_images": 1, "class_names": null}',
        '{"paths": [3], "labels": null, "num_images": 1, "class_names": null}',
        '{"paths": ["/a.jpg"], "labels": [0, 1], "num_images": 1, "class_names": ["x", "y"]}',
        '{"paths": ["/a.jpg"], "labels": ["x"], "num_images": 1, "class_names": ["x", "y"]}',
        '{"paths": ["/a.jpg"], "labels": [2], "num_images": 1, "class_names": ["x", "y"]}',
        '{"paths": ["/a.jpg"], "labels": [-1], "num_images": 1, "class_names": ["x", "y"]}',
        '{"paths": ["/a.jpg"], "labels": [10000000000], "num_images": 1, "class_names": null}',
    ],
)
def test_loading_something_else_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "files.json").write_text(text)
    with pytest.raises(ValueError, match="is not an index of images"):
        Images.load(tmp_path / "files.json")


def test_fingerprint_survives_a_move_and_notices_every_change() -> None:
    files = Images.of_files
    index = files(["/a/b/1.jpg", "/a/c/2.jpg"], [0, 1], ["b", "c"])
    assert index.fingerprint() == files(["/x/y/b/1.jpg", "/x/y/c/2.jpg"], [0, 1], ["b", "c"]).fingerprint()
    assert files(["/1.jpg"]).fingerprint() == files(["/a/1.jpg"]).fingerprint()
    changed = [
        files(["/a/b/1.jpg", "/a/c/3.jpg"], [0, 1], ["b", "c"]),
        files(["/a/b/1.jpg", "/a/c/2.jpg"], [1, 0], ["b", "c"]),
        files(["/a/b/1.jpg", "/a/c/2.jpg"], [0, 1], ["b", "d"]),
        files(["/a/b/1.jpg", "/a/c/2.jpg"]),
        files(["/a/b/1.jpg"], [0], ["b", "c"]),
        files([]),
    ]
    assert len({item.fingerprint() for item in [index, *changed]}) == len(changed) + 1


def test_fingerprints_and_files_of_earlier_runs_are_those_of_today(tmp_path: Path) -> None:
    """They decide whether a run goes on, whatever the version that began it: values written down, not computed."""
    written = (
        '{"paths": ["/a/b/1.jpg", "/a/b/\\udcff.jpg", "/a/c/\\u00fc.jpg", "/a/c/4.jpg"], '
        '"labels": [0, 0, 1, 1], "num_images": 4, "class_names": ["b", "c"]}'
    )
    (tmp_path / "files.json").write_text(written)
    images = Images.load(tmp_path / "files.json")
    assert content(images) == (
        ["/a/b/1.jpg", "/a/b/\udcff.jpg", "/a/c/ü.jpg", "/a/c/4.jpg"],
        [0, 0, 1, 1],
        ("b", "c"),
    )
    images.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == f"{written}\n"
    (tmp_path / "files.json").write_text(written.replace('"num_images": 4, ', ""))  # as it was before
    assert content(Images.load(tmp_path / "files.json")) == content(images)
    for found, expected in (
        (images, "84855018e19cb67e085e5eabeb91889ea6e5cf9a29dc0a3a7f4cbad45f5b2a42"),
        # Of a part, names count from the folder that its own images share.
        (images.subset([2, 3]), "58ba43aa13d68afdf2c271fdfd709d8902410d6ab5ea23b594d77caaac90fea7"),
        (Images(images.source), "2db5575c1bb058cff25c8cc7226e12dda5d7c045162e0f4713c7010a3ae05a42"),
        (Images.of_files([]), "b4848660d62b08b3c9acbc73afa645649353e232ecb63dbeef268e7376f46e6d"),
    ):
        assert found.fingerprint() == expected


ODD_NAMES = [
    '/a/"], "b.jpg',
    '/a/", ".jpg',
    "/a/\\",
    "/a/[1, 2].jpg",
    "/a/\udcff\ud83d\n.jpg",
    '/a/}"labels": [.jpg',
    "/a/ü.jpg",
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_an_index_is_written_and_read_in_lines_of_so_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """However many, its fingerprint is the same, and it knows when one is missing."""
    monkeypatch.setattr(index, "PART", size)
    path, places = tmp_path / "files.json", np.array([[0, 0, -1], [512, 2**40, 0], [10, -2, -1]])
    labels = [i % 3 for i in range(len(ODD_NAMES))]
    for images in (
        Images.of_files(ODD_NAMES, labels, ["x", 'y"], "', "z}"]),
        Images.of_files(ODD_NAMES),
        Images(Parts(ODD_NAMES[:3], ['/a/"places": [.tar'], places, Storage())),
        Images(Parts(ODD_NAMES[:3], ['/a/"places": [.tar'], places, Storage())).subset([2, 0]),
    ):
        images.save(path)
        paths = images.names()
        values = {"paths": paths, "labels": images.labels, "num_images": len(paths), "class_names": images.class_names}
        values["labels"] = None if images.labels is None else images.labels.tolist()
        if isinstance(images.source, Parts):
            at = slice(None) if images.positions is None else images.positions
            values |= {"shards": [*images.source.shards], "stamps": [], "fingerprint": images.source.fingerprint()}
            values |= {"places": images.source.table[:, at].tolist()}
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == -(-len(paths) // size)
        assert all(len(line["paths"]) <= size for line in lines)
        assert [name for line in lines for name in line["paths"]] == paths
        if len(lines) == 1:
            assert path.read_text() == f"{json.dumps(values)}\n"
        again = Images.load(path)
        assert content(again) == content(images) and type(again.source) is type(images.source)
        assert again.fingerprint() == images.fingerprint()
        if isinstance(again.source, Parts):
            assert again.source.table.tolist() == values["places"]
        with monkeypatch.context() as whole:
            whole.setattr(index, "PART", 1000)
            assert replace(images).fingerprint() == images.fingerprint()
        if len(lines) > 1:
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
            with pytest.raises(ValueError, match=f"of {len(paths)} images"):
                Images.load(path)


def test_a_part_of_a_part_has_the_names_and_labels_of_its_images() -> None:
    images = Images.of_files("abcdef", [0, 1, 2, 0, 1, 2], ["x", "y", "z"])
    part = images.subset([5, 0, 3, 4]).subset(np.array([2, 0]))
    assert content(part) == (["d", "f"], [0, 2], ("x", "y", "z"))
    assert (part.name(1), part.label(1), part.label_name(1)) == ("f", 2, "z")
    assert content(images.subset([])) == ([], [], ("x", "y", "z"))
    with pytest.raises(IndexError):
        part.subset([2])
    plain = Images(images.source, np.array([1, 2]))
    assert plain.joined(part).names() == [*"bcdf"] and (plain.label(0), plain.label_name(0)) == (None, None)


def test_names_are_one_packed_block_that_is_not_copied_by_a_part() -> None:
    names = [f"/photographs/of/last/summer/{i:06}.jpg" for i in range(10_000)]
    images = Images.of_files(names)
    assert len(pickle.dumps(images)) < 10_000 * 8
    assert images.subset([1, 2]).source is images.source
    for positions in ([9_999, 0, 63, 64, 65, 64], range(0, 10_000, 7), []):
        part = images.subset([*positions])
        assert part.names() == [part.name(i) for i in range(len(part))] == [names[i] for i in positions]
    with pytest.raises(IndexError):
        images.name(10_000)


def test_class_folders_give_labels_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/more/2.jpg", "ant/3.jpg", "loose.jpg", ".hidden/4.jpg")
    index = find_labelled(str(tmp_path))
    assert index.class_names == ("ant", "cat")
    assert {Path(path).name: label for path, label in zip(index.names(), index.labels, strict=True)} == {
        "1.jpg": 1,
        "2.jpg": 1,
        "3.jpg": 0,
    }


def test_integer_class_names_are_in_numerical_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/a.jpg" for name in (10, 9, 1, 100)))
    assert find_labelled(str(tmp_path)).class_names == ("1", "9", "10", "100")
    touch(tmp_path, "x/a.jpg")
    assert find_labelled(str(tmp_path)).class_names == ("1", "10", "100", "9", "x")


def test_csv_gives_labels_with_paths_relative_to_its_folder(tmp_path: Path) -> None:
    text = f"\ufeffsplit, path,label\nx,b/2.jpg,dog,\nx,{tmp_path}/1.jpg,cat\nx,b/2.jpg,dog,,\n"
    (tmp_path / "labels.CSV").write_text(text, encoding="utf-8")
    index = find_labelled(str(tmp_path / "labels.CSV"))
    assert content(index) == ([str(tmp_path / "1.jpg"), str(tmp_path / "b/2.jpg")], [0, 1], ("cat", "dog"))
    (note,) = index.notes
    assert "only path and label are read, not split: what fcmae holds out it draws image by image" in note


def test_rows_of_a_csv_that_are_one_by_an_open_quotation_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'path,label,note\na.jpg,x,"first\n\nsecond"\n\nb.jpg,y,"odd\nc.jpg,x,ok\nd.jpg,y,ok\n'
    )
    index = find_labelled(str(tmp_path / "a.csv"))
    assert len(index) == 2
    assert "lines 2 to 4 of" in index.notes[0] and "close it on its line" in index.notes[0]
    (tmp_path / "a.csv").write_text("path,label,note\na.jpg,x,ok\n\n\nb.jpg,y,ok\n")
    assert not any("lines" in note for note in find_labelled(str(tmp_path / "a.csv")).notes)


def test_held_out_labels_point_into_the_training_classes(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "c/2.jpg")
    (tmp_path / "a").mkdir()  # a class without held-out images is fine
    index = find_labelled(str(tmp_path), ["c", "a", "b"])
    assert index.labels.tolist() == [2, 0] and index.class_names == ("c", "a", "b")
    with pytest.raises(
        ValueError, match=r"data\.val_path: label 'c' of .* is no class of the training images \(a, b\)"
    ):
        find_labelled(str(tmp_path), ["a", "b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.jpg,x\n", "the header of .* is 'file,label': it needs path and label"),
        ("", "it needs path and label"),
        ("path,label\n", "lists no image"),
        ("path,label\na.jpg,x\nb.jpg,\n", "line 3 of .* lacks its path or label"),
        ("path,label\na.jpg\n", "line 2 of .* lacks its path or label"),
        ("path,label\na.jpg,x\na.jpg,y\n", "line 3 of .* the label 'y', an earlier one 'x'"),
        ("path,label\na.jpg,x\n", "has only the class 'x'"),
        ("path,label\na,b.jpg,cat\n", "line 2 of .* has more fields than the header's 2: put quotes round"),
        ("path,label,label\na.jpg,x,y\n", "the header of .* has label twice: keep one"),
        ('path,label\na.jpg,x\nb.jpg,"y\nc.jpg,x\nd.jpg,y\n', "a quotation mark that is open before line 5 of"),
        ('path,label\na.jpg,x\n"b.jpg,y\nc.jpg",x\nd.jpg,y\n', "open before line 4 of .* close it on its line"),
    ],
)
def test_malformed_csv_files_are_errors_that_say_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.path: .*{message}"):
        find_labelled(str(tmp_path / "a.csv"))


def test_images_beside_class_folders_are_told_of(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "3.jpg", "2.jpg", "readme.md")
    found = find_labelled(str(tmp_path))
    assert len(found) == 2
    assert found.notes == (
        f"data.path: {tmp_path}/2.jpg and 1 more images beside the class folders have no label, and were left out",
    )


def test_malformed_class_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_labelled(str(tmp_path / "missing"))
    touch(tmp_path, "loose.jpg")
    with pytest.raises(ValueError, match=r"is neither a folder, a \.csv nor a \.tar file"):
        find_labelled(str(tmp_path / "loose.jpg"))
    with pytest.raises(ValueError, match="has no sub-folder with images"):
        find_labelled(str(tmp_path))
    touch(tmp_path, "a/1.jpg", "b/notes.txt")
    with pytest.raises(ValueError, match="b' holds no image: fill or remove it"):
        find_labelled(str(tmp_path))


def test_folders_of_systems_and_of_runs_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "cat/0.png", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/1.png", "$RECYCLE.BIN/2.png")
    touch(tmp_path, "__MACOSX/3.png", "lost+found/4.png", "runs/a/reconstructions/step-1.png", "other/5.png")
    (tmp_path / "runs/a/config.yaml").write_text("# fcmae pretrain 0.1.0\n")
    (tmp_path / "other/config.yaml").write_text("seed: 1\n")
    touch(tmp_path, "odd/config.yaml/6.png", "odd/7.png")
    names = ("cat/0.png", "odd/7.png", "odd/config.yaml/6.png", "other/5.png")
    assert find_images([str(tmp_path)]).names() == [str(tmp_path / name) for name in names]


def test_what_is_no_file_is_no_image_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    touch(tmp_path, "0.png")
    os.mkfifo(tmp_path / "1.png")
    images = find_images([str(tmp_path)])
    assert images.names() == [str(tmp_path / "0.png")]
    listed = tmp_path / "list.txt"
    listed.write_text("1.png\n")
    with pytest.raises(BadImage, match="it is a pipe, a socket or a device"):
        find_images([str(listed)]).open(0)


def test_files_of_other_formats_are_counted_in_a_note_that_parts_keep(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.png", "b/1.gif", "b/2.GIF", "b/3.eps", "b/README", "b/4.png", "b/5.\x1b[2J", "b/6.\x1b[2J")
    note = "data.path: files left out, as their names are not those of images: 2 .gif, 2 .\\x1b[2j, 1 .eps, "
    note += "1 without a suffix (to read them all the same, list their paths in a .txt file)"
    assert find_images([str(tmp_path)]).notes == (note,)
    assert [part.notes for part in split(find_labelled(str(tmp_path)), 0.5, seed=0)] == [(note,)] * 2
    with tarfile.open(tmp_path.parent / "x.tar", "w") as archive:
        archive.add(tmp_path, "x")
    assert find_images([str(tmp_path.parent / "x.tar")]).notes == (note,)
    (told,) = find_images([str(tmp_path / "b" / "*")]).notes
    assert told == note


def test_dicom_without_a_suffix_is_found_by_its_first_bytes(tmp_path: Path) -> None:
    touch(tmp_path, "IM0001", "1.2.840.113.7", "notes.1", "README", "series.x", "DICOMDIR")
    for name in ("IM0001", "1.2.840.113.7", "series.x", "DICOMDIR"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(9))
    found = find_images([str(tmp_path)])
    assert [Path(name).name for name in found.names()] == ["1.2.840.113.7", "IM0001"]
    (note,) = found.notes
    assert "images: 2 without a suffix, 1 .1, 1 .x (" in note
    assert find_images([str(tmp_path / "*")]).names() == found.names()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for path in sorted(tmp_path.iterdir()):
            archive.add(path, f"x/{path.name}")
    packed = find_images([str(tmp_path / "x.tar")])
    assert [Path(name).name for name in packed.names()] == ["1.2.840.113.7", "IM0001"]
    assert packed.notes == found.notes
    with packed.open(0) as file:
        assert file.read(132)[128:] == b"DICM"


def test_dicom_without_a_suffix_beside_class_folders_is_told_of(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.png", "b/1.png", "IM0001")
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    assert any("IM0001" in note for note in find_labelled(str(tmp_path)).notes)


def test_a_number_at_the_end_of_a_name_is_no_suffix(tmp_path: Path) -> None:
    for number in (7, 8):
        touch(tmp_path, f"images/1.2.840.{number}", f"maps/1.2.840.{number}.png")
        (tmp_path / f"images/1.2.840.{number}").write_bytes(bytes(128) + b"DICM")
    images, maps = find_mapped(str(tmp_path / "images"), str(tmp_path / "maps"))
    assert [Path(name).name for name in images.names()] == ["1.2.840.7", "1.2.840.8"]
    assert [Path(name).name for name in maps.names()] == ["1.2.840.7.png", "1.2.840.8.png"]


@pytest.mark.parametrize(("images", "maps"), [("*.tif", ""), ("", "*.png"), ("*.tif", "*.png"), ("**/*.tif", "")])
def test_patterns_of_images_are_paired_with_maps_by_what_is_below_their_folder(
    tmp_path: Path, images: str, maps: str
) -> None:
    touch(tmp_path, "images/a.tif", "images/b.tif", "maps/a.png", "maps/b.png")
    found = find_mapped(str(tmp_path / "images" / images), str(tmp_path / "maps" / maps))
    assert [[Path(name).stem for name in part.names()] for part in found] == [["a", "b"]] * 2


@pytest.mark.parametrize(
    ("labels", "ordered"),
    [
        (["10", "9", "2"], ["2", "9", "10"]),
        (["0.0", "10.0", "2.0"], ["0.0", "2.0", "10.0"]),
        (["-1", "10", "2", "-12"], ["-12", "-1", "2", "10"]),
        (["10", "9", "b"], ["10", "9", "b"]),
    ],
)
def test_classes_that_are_numbers_are_ordered_by_size(tmp_path: Path, labels: list[str], ordered: list[str]) -> None:
    touch(tmp_path, *(f"{label}.png" for label in labels))
    (tmp_path / "table.csv").write_text("path,label\n" + "".join(f"{label}.png,{label}\n" for label in labels))
    assert find_labelled(str(tmp_path / "table.csv")).class_names == tuple(ordered)


def test_a_folder_of_splits_is_not_taken_for_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png")
    found = r"holds splits \(train, val\) and no classes.*/train with data.val_path .*/val"
    with pytest.raises(ValueError, match=found):
        find_labelled(str(tmp_path))
    assert find_labelled(str(tmp_path / "train")).class_names == ("cat", "dog")


def test_composed_and_decomposed_accents_are_one_class(tmp_path: Path) -> None:
    touch(tmp_path, "caf\u00e9/0.png")
    touch(tmp_path, "cafe\u0301/1.png")
    touch(tmp_path, "tea/2.png")
    images = find_labelled(str(tmp_path))
    assert images.class_names == ("caf\u00e9", "tea")
    assert images.labels is not None
    assert sorted(images.labels.tolist()) == [0, 0, 1]


def test_a_class_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "tea/0.png")
    touch(tmp_path, os.fsdecode(b"caf\xe9/1.png"))
    with pytest.raises(ValueError, match=r"the class caf\\udce9 has a name that is no UTF-8: rename it"):
        find_labelled(str(tmp_path))


def test_names_of_classes_that_may_not_be_meant_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "nan/0.png", "Cat/1.png", "cat/2.png")
    find_labelled(str(tmp_path))
    assert "is that a missing label?" in caplog.text
    assert "differ in their case only" in caplog.text


def test_class_folders_go_before_tar_files_and_tables_beside_them(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "ant/2.jpg", "all.tar", "meta.parquet")
    index = find_labelled(str(tmp_path))
    assert index.class_names == ("ant", "cat") and len(index) == 2
    assert any("all.tar" in note and "were left out" in note for note in index.notes)


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    touch(tmp_path, "root/a/1.jpg")
    (tmp_path / "root/a/round").symlink_to("round")
    assert len(find_images([str(tmp_path / "root")])) == 1
