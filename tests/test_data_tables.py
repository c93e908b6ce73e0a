"""Images in Parquet files and in datasets of Hugging Face are those that their own libraries read."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from PIL import Image

from fcmae.cli import main
from fcmae.data import find, tables, walk
from fcmae.data.find import find_images, find_labelled
from fcmae.data.index import Images
from fcmae.data.source import BadImage
from fcmae.data.storage import Cache, Storage

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def image(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def table(num: int = 10, *, struct: bool = True, large: bool = False, **columns: list[Any]) -> Any:
    content = [image(i) if i != 3 else None for i in range(num)]
    kind = pa.large_binary() if large else pa.binary()
    if struct:
        rows = [{"bytes": value, "path": f"{i}.png"} for i, value in enumerate(content)]
        images = pa.array(rows, pa.struct([("bytes", kind), ("path", pa.string())]))
    else:
        images = pa.array(content, kind)
    return pa.table({"id": list(range(num)), "image": images, **columns})


def write_arrow(path: Path, content: Any, *, stream: bool = True, compression: str | None = None) -> Path:
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, content.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(content, max_chunksize=4)
    return path


def contents(images: Images) -> list[bytes | str]:
    found: list[bytes | str] = []
    for i in range(len(images)):
        try:
            with images.open(i) as file:
                found.append(file.read())
        except BadImage as error:
            found.append(str(error))
    return found


EXPECTED = [image(i) if i != 3 else "it cannot be read: its row has no bytes of an image" for i in range(10)]


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_images_of_a_table_are_its_bytes_in_order(tmp_path: Path, kind: str, struct: bool, large: bool) -> None:
    content = table(struct=struct, large=large)
    if kind == "parquet":
        pq.write_table(content, tmp_path / "x.parquet", row_group_size=4)
    else:
        write_arrow(tmp_path / "x.arrow", content, stream=kind == "stream")
    images = find_images([str(tmp_path)])
    assert contents(images) == EXPECTED
    assert images.name(7).endswith("/000000007")
    images.subset([9, 0]).save(tmp_path / "files.json")
    assert contents(Images.load(tmp_path / "files.json")) == [EXPECTED[9], EXPECTED[0]]


def test_tables_elsewhere_are_read_as_those_here(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    pq.write_table(table(), tmp_path / "x.parquet", row_group_size=4)
    write_arrow(tmp_path / "x.arrow", table())
    for path in tmp_path.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/tables/{path.name}", path.read_bytes())
    assert contents(find_images(["memory://tables"])) == 2 * EXPECTED


def test_row_groups_from_elsewhere_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    pq.write_table(table(), tmp_path / "x.parquet", row_group_size=4)
    fsspec.filesystem("memory").pipe_file("/cached/x.parquet", (tmp_path / "x.parquet").read_bytes())
    images = find_images(["memory://cached"], storage=Storage(cache=Cache(tmp_path / "cache", 10**9)))
    assert contents(images) == EXPECTED
    tables._group.cache_clear()
    monkeypatch.setattr("fcmae.data.storage._read", None)
    assert contents(images) == EXPECTED


def test_another_table_of_the_same_name_is_read_in_the_same_process(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "kept")
    for names in (list(range(10)), list(range(10, 20))):
        rows = [image(i) for i in names]
        pq.write_table(pa.table({"image": pa.array(rows, pa.binary())}), tmp_path / "x.parquet")
        assert contents(find_images([str(tmp_path / "x.parquet")], storage=storage)) == rows


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_labels_of_a_table_are_those_of_its_column(tmp_path: Path, kind: str) -> None:
    content = table(label=["cat", "dog"] * 5)
    path = tmp_path / f"x.{kind}"
    pq.write_table(content, path, row_group_size=4) if kind == "parquet" else write_arrow(path, content)
    found = find_labelled(str(path))
    assert [found.label_name(i) for i in range(10)] == ["cat", "dog"] * 5
    # Of writers that name no text, before the images too.
    of_bytes = table(label=pa.array([b"cat", b"dog"] * 5, pa.binary()))
    of_bytes = of_bytes.select(["label", *(name for name in of_bytes.column_names if name != "label")])
    pq.write_table(of_bytes, tmp_path / "z.parquet")
    found = find_labelled(str(tmp_path / "z.parquet"))
    assert [found.label_name(i) for i in range(10)] == ["cat", "dog"] * 5
    pq.write_table(table(label=["cat", None] * 5), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet/000000001 and 4 more of 10 images have no label"):
        find_labelled(str(tmp_path / "y.parquet"))


def test_a_dataset_saved_by_datasets_is_read_with_its_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(6)], "label": [0, 1, 1, 0, 1, 0]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    made.to_parquet(tmp_path / "table" / "x.parquet")
    for folder in ("saved", "table"):
        found = find_labelled(str(tmp_path / folder))
        assert contents(found) == [image(i) for i in range(6)]
        assert found.class_names == ("cat", "dog")
        assert found.labels is not None and found.labels.tolist() == rows["label"]
        assert find_images([str(tmp_path / folder)]).names() == found.names()


def test_what_datasets_marks_as_not_known_is_no_class(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"]}}
    content = table(label=[0, 1, -1] + [0] * 7)
    kept = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(content.replace_schema_metadata(kept), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no label"):
        find_labelled(str(tmp_path / "x.parquet"))


def test_a_table_that_cannot_be_read_image_by_image_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_arrow(tmp_path / "x.arrow", table(), compression="zstd")
    with pytest.raises(ValueError, match=r"x\.arrow' cannot be used \(it is compressed.*save_to_disk"):
        find_images([str(tmp_path)])
    (tmp_path / "x.arrow").unlink()
    pq.write_table(table(), tmp_path / "x.parquet")
    monkeypatch.setattr(tables, "MAX_GROUP", 1000)
    with pytest.raises(ValueError, match=r"a row group has more than .*row_group_size=100"):
        find_images([str(tmp_path)])
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"no table" * 30)
        with pytest.raises(ValueError, match=rf"data\.path: .*{name}' cannot be used"):
            find_images([str(tmp_path / name)])


def test_tables_without_images_are_passed_over(tmp_path: Path) -> None:
    pq.write_table(pa.table({"features": [[1.0], [2.0]]}), tmp_path / "features.parquet")
    (tmp_path / "a.png").write_bytes(image(0))
    assert contents(find_images([str(tmp_path)])) == [image(0)]
    with pytest.raises(ValueError, match="holds no image"):
        find_images([str(tmp_path / "features.parquet")])


def test_a_table_that_changes_while_it_is_used_is_said_to(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "x.parquet", row_group_size=4)
    images = find_images([str(tmp_path)])
    pq.write_table(table(3), tmp_path / "x.parquet")
    with pytest.raises(BadImage, match="changed since its index was made"):
        images.open(9)


def test_without_pyarrow_tables_are_left_out_or_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(table(), tmp_path / "x.parquet")
    for module in (find, walk, tables):
        monkeypatch.setattr(module, "can_read", lambda: False)
    with pytest.raises(ValueError, match=r"tables need `pip install fcmae\[parquet\]`"):
        find_images([str(tmp_path)])
    with pytest.raises(ValueError, match=r"tables need pyarrow: pip install 'fcmae\[parquet\]'"):
        find_images([str(tmp_path / "x.parquet")])
    (tmp_path / "a.png").write_bytes(image(0))
    images = find_images([str(tmp_path)])
    assert contents(images) == [image(0)] and "1 .parquet" in images.notes[0]


def test_a_row_group_is_read_once_for_the_rows_that_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(), tmp_path / "x.parquet", row_group_size=5)
    images, opened = find_images([str(tmp_path)]), list[str]()
    real = Storage.open
    monkeypatch.setattr(
        Storage, "open", lambda self, address, **how: (opened.append(address), real(self, address, **how))[1]
    )
    assert contents(images) == EXPECTED and len(opened) == 2


@pytest.mark.usefixtures("one_thread", "forgotten")
@pytest.mark.parametrize(("kind", "workers"), [("parquet", 0), ("parquet", 1), ("arrow", 0)])
def test_a_run_on_a_table_is_the_run_on_its_files_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for i in range(10):
        (files / f"{i:09}.png").write_bytes(image(i))
    content = table().set_column(1, "image", pa.array([image(i) for i in range(10)], pa.binary()))
    path = tmp_path / f"x.{kind}"
    pq.write_table(content, path, row_group_size=4) if kind == "parquet" else write_arrow(path, content)
    options = {"data__num_workers": workers}
    assert main(["pretrain", *runs.flags(files, tmp_path / "whole", **options)]) == 0
    runs.forget_accelerator()
    with monkeypatch.context() as patch:
        runs.at_step(patch, 4, runs.kill_self(signal.SIGTERM))
        assert main(["pretrain", *runs.flags(path, tmp_path / "cut", **options)]) == 143
    runs.forget_accelerator()
    os.utime(path, (1, 1))  # as of a copy that each job of a cluster makes anew
    assert main(["pretrain", *runs.flags(path, tmp_path / "cut", **options)]) == 0
    runs.assert_same(runs.final_state(tmp_path / "cut"), runs.final_state(tmp_path / "whole"))
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_that_was_written_anew_gives_no_image_under_an_old_label(tmp_path: Path, kind: str) -> None:
    def write(content: Any) -> None:
        if kind == "parquet":
            pq.write_table(content, tmp_path / f"x.{kind}")
        else:
            write_arrow(tmp_path / f"x.{kind}", content)

    content = table(label=["cat", "dog"] * 5)
    write(content)
    found = find_labelled(str(tmp_path / f"x.{kind}"))
    found.save(tmp_path / "files.json")
    assert contents(Images.load(tmp_path / "files.json")) == contents(found) == EXPECTED
    write(content.take(list(range(9, -1, -1))))
    again = Images.load(tmp_path / "files.json")
    assert sum("has changed since its index was made" in str(value) for value in contents(again)) >= 9


def test_offsets_of_a_table_that_lead_out_of_it_are_refused(tmp_path: Path) -> None:
    path = write_arrow(
        tmp_path / "x.arrow", pa.table({"image": pa.array([image(0)], pa.binary()), "label": ["x" * 1234]})
    )
    true, false = (struct.pack("<ii", 0, end) for end in (1234, 2**31 - 1))
    before, _, after = path.read_bytes().rpartition(true)  # behind the metadata, which has the length too
    path.write_bytes(before + false + after)
    with pytest.raises(ValueError, match=r"x\.arrow' cannot be used \("):
        find_images([str(path)])


@pytest.mark.parametrize(
    "kept",
    [
        '{"info": {"features": {"labels": [{"dtype": "string"}]}}}',
        '{"info": null}',
        "[]",
        '{"info": {"features": {"labels": {"names": 5}}}}',
    ],
)
def test_a_feature_that_is_no_list_of_classes_is_none(tmp_path: Path, kept: str) -> None:
    content = table(labels=[["cat"], ["dog"]] * 5)
    content = content.replace_schema_metadata({b"huggingface": kept.encode()})
    pq.write_table(content, tmp_path / "x.parquet")
    assert contents(find_images([str(tmp_path / "x.parquet")])) == EXPECTED
