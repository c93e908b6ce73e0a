from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcmae.data.index import FileIndex, find_images, find_labelled, split


def touch(root: Path, *names: str) -> list[str]:
    """Empty files: finding images opens none."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return sorted(str(root / name) for name in names)


def test_folders_are_searched_at_any_depth_in_any_case_and_sorted(tmp_path: Path) -> None:
    images = touch(
        tmp_path, "b.JPG", "a/x.jpeg", "a/b/c/y.Png", "z.tif", "z.TIFF", "w.webp", "v.bmp", "u.npy", "ü é.jpg"
    )
    touch(tmp_path, "notes.txt", ".hidden.jpg", ".cache/a.jpg", "a/.git/b.png", "jpg", "data.csv")
    index = find_images([str(tmp_path)])
    assert list(index.paths) == images
    assert index.labels is None and index.class_names is None and len(index) == len(images)


def test_several_sources_are_joined_without_duplicates(tmp_path: Path) -> None:
    images = touch(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.jpg")
    sources = [str(tmp_path / "c"), str(tmp_path / "a"), str(tmp_path / "a/b"), images[0]]
    assert list(find_images(sources).paths) == images


def test_relative_sources_give_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = touch(tmp_path, "a/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert list(find_images(["a"]).paths) == images


def test_links_to_folders_are_followed_once_and_never_loop(tmp_path: Path) -> None:
    touch(tmp_path, "root/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    found = find_images([str(tmp_path / "root")]).paths
    assert sorted(Path(path).name for path in found) == ["1.jpg", "2.jpg"]


def test_lists_hold_paths_relative_to_their_folder(tmp_path: Path) -> None:
    touch(tmp_path, "lists/a.jpg", "b.jpg", "without_suffix")
    text = f"\ufeffa.jpg\r\n\n  ../b.jpg  \n{tmp_path}/without_suffix\n"
    (tmp_path / "lists/all.txt").write_text(text, encoding="utf-8")
    expected = sorted(str(tmp_path / name) for name in ("lists/a.jpg", "b.jpg", "without_suffix"))
    assert list(find_images([str(tmp_path / "lists/all.txt")]).paths) == expected


def test_globs_match_files_and_search_folders(tmp_path: Path) -> None:
    images = touch(tmp_path, "a1/x.jpg", "a2/deep/y.png", "b/z.jpg")
    touch(tmp_path, "a1/x.txt")
    assert list(find_images([str(tmp_path / "a*")]).paths) == images[:2]
    assert list(find_images([str(tmp_path / "**/*.jpg")]).paths) == [images[0], images[2]]


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
    for index in (FileIndex(("/a/\udcff.jpg", "/b.jpg"), (1, 0), ("x", "y")), FileIndex(("/a.jpg",))):
        index.save(tmp_path / "files.json")
        assert FileIndex.load(tmp_path / "files.json") == index
    assert [path.name for path in tmp_path.iterdir()] == ["files.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"paths": 3, "labels": null, "class_names": null}'])
def test_loading_something_else_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "files.json").write_text(text)
    with pytest.raises(ValueError, match="is not an index of images"):
        FileIndex.load(tmp_path / "files.json")


def test_fingerprint_survives_a_move_and_notices_every_change() -> None:
    index = FileIndex(("/a/b/1.jpg", "/a/c/2.jpg"), (0, 1), ("b", "c"))
    assert index.fingerprint() == FileIndex(("/x/y/b/1.jpg", "/x/y/c/2.jpg"), (0, 1), ("b", "c")).fingerprint()
    assert FileIndex(("/1.jpg",)).fingerprint() == FileIndex(("/a/1.jpg",)).fingerprint()
    changed = [
        FileIndex(("/a/b/1.jpg", "/a/c/3.jpg"), (0, 1), ("b", "c")),
        FileIndex(("/a/b/1.jpg", "/a/c/2.jpg"), (1, 0), ("b", "c")),
        FileIndex(("/a/b/1.jpg", "/a/c/2.jpg"), (0, 1), ("b", "d")),
        FileIndex(("/a/b/1.jpg", "/a/c/2.jpg")),
        FileIndex(("/a/b/1.jpg",), (0,), ("b", "c")),
        FileIndex(()),
    ]
    assert len({item.fingerprint() for item in [index, *changed]}) == len(changed) + 1


def test_class_folders_give_labels_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/more/2.jpg", "ant/3.jpg", "loose.jpg", ".hidden/4.jpg")
    index = find_labelled(str(tmp_path))
    assert index.class_names == ("ant", "cat")
    assert {Path(path).name: label for path, label in zip(index.paths, index.labels, strict=True)} == {
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
    text = f"\ufeffsplit, path,label\nx,b/2.jpg,dog\nx,{tmp_path}/1.jpg,cat\nx,b/2.jpg,dog\n"
    (tmp_path / "labels.CSV").write_text(text, encoding="utf-8")
    index = find_labelled(str(tmp_path / "labels.CSV"))
    assert index == FileIndex((str(tmp_path / "1.jpg"), str(tmp_path / "b/2.jpg")), (0, 1), ("cat", "dog"))


def test_held_out_labels_point_into_the_training_classes(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "c/2.jpg")
    (tmp_path / "a").mkdir()  # a class without held-out images is fine
    index = find_labelled(str(tmp_path), ["c", "a", "b"])
    assert index.labels == (2, 0) and index.class_names == ("c", "a", "b")
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
    ],
)
def test_malformed_csv_files_are_errors_that_say_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.path: .*{message}"):
        find_labelled(str(tmp_path / "a.csv"))


def test_malformed_class_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_labelled(str(tmp_path / "missing"))
    touch(tmp_path, "loose.jpg")
    with pytest.raises(ValueError, match=r"is neither a folder nor a \.csv file"):
        find_labelled(str(tmp_path / "loose.jpg"))
    with pytest.raises(ValueError, match="has no sub-folder with images"):
        find_labelled(str(tmp_path))
    touch(tmp_path, "a/1.jpg", "b/notes.txt")
    with pytest.raises(ValueError, match="b' holds no image: fill or remove it"):
        find_labelled(str(tmp_path))


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_is_a_stratified_partition(labels: list[int], share: float, seed: int) -> None:
    paths = tuple(f"/{i:03}.jpg" for i in range(len(labels)))
    index = FileIndex(paths, tuple(labels), tuple("abcde"))
    train, held_out = split(index, share, seed)
    assert sorted(train.paths + held_out.paths) == list(paths)
    assert list(train.paths) == sorted(train.paths) and list(held_out.paths) == sorted(held_out.paths)
    label_of = dict(zip(paths, labels, strict=True))
    for part in (train, held_out):
        assert part.labels == tuple(label_of[path] for path in part.paths) and part.class_names == index.class_names
    counts, held = Counter(labels), Counter(held_out.labels)
    for label, count in counts.items():
        assert held[label] <= count - 1
        assert abs(held[label] - share * count) <= 1 or held[label] == count - 1
    if share == 0:
        assert len(held_out) == 0
    elif max(counts.values()) > 1 and share * len(labels) >= 1:
        assert len(held_out) >= 1
    assert split(index, share, seed) == (train, held_out)


def test_split_without_labels_draws_the_share_at_random() -> None:
    index = FileIndex(tuple(f"/{i:04}.jpg" for i in range(1000)))
    train, held_out = split(index, 0.01, 0)
    assert (len(train), len(held_out)) == (990, 10)
    assert held_out.labels is None
    assert split(index, 0.01, 1)[1] != held_out
    numbers = np.concatenate([[int(Path(path).stem) for path in split(index, 0.1, seed)[1].paths] for seed in range(9)])
    assert 450 < numbers.mean() < 550  # not one end of the list


def test_a_small_share_still_holds_out_one_image() -> None:
    assert len(split(FileIndex(tuple(f"/{i}.jpg" for i in range(9))), 0.01, 0)[1]) == 1
    assert len(split(FileIndex(("/0.jpg",)), 0.5, 0)[1]) == 0
