from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from runs import write_colors
from sklearn.neighbors import NearestNeighbors

import fcmae.evaluation.embed as embedding
from fcmae import cli
from fcmae.data.find import find_labelled
from fcmae.data.index import Images
from fcmae.evaluation.embed import neighbours, project, save_map
from fcmae.evaluation.features import extract
from fcmae.evaluation.models import load_backbone

ATTO = "random:convnextv2_atto"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of six noisy images each, one file that cannot be read among them."""
    root = write_colors(tmp_path_factory.mktemp("labelled"), {"a": (60, 60, 180), "b": (60, 180, 60)}, (6, 6))
    (root / "a" / "damaged.png").write_bytes(b"no image")
    return root


def embed(*words: object) -> int:
    """`fcmae embed` in this process, on images of 32 pixels."""
    return cli.main(["embed", ATTO, *map(str, words), "--image-size", "32", "--device", "cpu"])


def test_features_lie_beside_the_paths_they_are_of(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert embed("--data", labelled, "--out", out, "--map", "none", "--stage", "2") == 0
    assert sorted(path.name for path in out.iterdir()) == ["features.npy", "paths.csv"]
    features = np.load(out / "features.npy")
    with (out / "paths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    index = find_labelled(str(labelled))
    expected = extract(load_backbone(ATTO, (32, 32)), index, [2], device=torch.device("cpu"), directory=tmp_path)
    np.testing.assert_array_equal(features, expected.stages[2])
    assert features.dtype == np.float32 and features.shape == (12, 80)
    assert [row["path"] for row in rows] == [index.name(i) for i in expected.positions]
    assert [row["label"] for row in rows] == ["a"] * 6 + ["b"] * 6
    assert [row["row"] for row in rows] == list(map(str, range(12)))


def test_parquet_holds_the_same_in_one_table(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "ROWS", 5)  # several row groups
    for flag, out in (([], tmp_path / "npy"), (["--parquet"], tmp_path / "parquet")):
        assert embed("--images", labelled, "--out", out, "--map", "none", *flag) == 0
    assert f"{labelled / 'a' / 'damaged.png'}: " in capsys.readouterr().err
    table = parquet.read_table(tmp_path / "parquet" / "features.parquet")
    assert table.column_names == ["path", "feature"]
    np.testing.assert_array_equal(
        np.array(table["feature"].to_pylist(), np.float32), np.load(tmp_path / "npy" / "features.npy")
    )
    with (tmp_path / "npy" / "paths.csv").open(newline="") as file:
        assert table["path"].to_pylist() == [row["path"] for row in csv.DictReader(file)]
    assert embed("--data", labelled, "--out", tmp_path / "labels", "--map", "none", "--parquet") == 0
    table = parquet.read_table(tmp_path / "labels" / "features.parquet")
    assert table["label"].to_pylist() == ["a"] * 6 + ["b"] * 6


def test_pictures_are_drawn_and_replaced_only_when_asked(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "MAX_POINTS", 8)
    out = tmp_path / "out"
    queries = [labelled / "a" / "1.png", labelled / "b" / "1.png"]
    command = ["--data", labelled, "--out", out, "--neighbours", *queries]
    maps, pictures = [], []
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "save_map", lambda path, points, index, title: maps.append((points, index)))
        patch.setattr(embedding, "save_neighbours", lambda *args: pictures.append(args[2:4]))
        assert embed("--data", labelled, "--out", tmp_path / "spied", "--neighbours", *queries) == 0
    drawn = np.sort(np.random.default_rng(0).choice(12, 8, replace=False))
    assert list(drawn) != list(range(8))
    features = np.load(tmp_path / "spied" / "features.npy")
    with (tmp_path / "spied" / "paths.csv").open(newline="") as file:
        row_of = {row["path"]: number for number, row in enumerate(csv.DictReader(file))}
    ((points, shown),) = maps
    assert [row_of[name] for name in shown.names()] == list(drawn) and len(points) == 8
    for (found, similarities), query in zip(pictures, queries, strict=True):
        one = features[row_of[str(query)]]
        others = features[[row_of[name] for name in found.names()]]
        cosines = others @ one / np.linalg.norm(others, axis=1) / np.linalg.norm(one)
        np.testing.assert_allclose(similarities, cosines, atol=1e-4)
    assert embed(*command) == 0
    assert "the map shows 8 of the images, drawn with seed 0" in capsys.readouterr().out
    written = ["features.npy", "map.png", "neighbours-1-2.png", "neighbours-1.png", "paths.csv"]
    assert sorted(path.name for path in out.iterdir()) == written
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG"
    assert embed(*command) == 2
    assert "holds earlier results" in capsys.readouterr().err
    assert embed("--images", labelled, "--out", out, "--map", "none", "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["features.npy", "paths.csv"]
    (out / "mine.npy").touch()
    assert embed("--images", labelled, "--out", out, "--map", "none", "--overwrite") == 2
    assert "holds 'mine.npy', which is not of this command" in capsys.readouterr().err


def test_queries_that_cannot_be_read_are_told_before_anything_is_written(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    given = ["--images", labelled, "--out", tmp_path / "out", "--neighbours"]
    assert embed(*given, tmp_path / "broken.jpg") == 2
    assert "none of 1 images can be read" in capsys.readouterr().err
    assert embed(*given, labelled / "a" / "0.png") == 0  # the same place is free


def test_a_few_images_have_no_map(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = labelled / "a" / "0.png"
    assert embed("--images", query, "--out", tmp_path / "out", "--neighbours", query) == 0
    assert "no map: 1 images are too few" in capsys.readouterr().out
    assert (tmp_path / "out" / "neighbours-0.png").is_file()  # of an image that is the only one


def test_neighbours_are_scikit_learns_by_cosine_and_never_the_image_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "ROWS", 7)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 6)).astype(np.float32)
    paths = [f"{number}.png" for number in range(30)]
    queries = np.concatenate([features[[4]], rng.normal(size=(1, 6)).astype(np.float32)])
    (own_rows, own), (rows, similarities) = neighbours(queries, features, ["4.png", "other.png"], paths, num=5)
    distances, expected = NearestNeighbors(n_neighbors=6, metric="cosine").fit(features).kneighbors(queries)
    assert expected[0][0] == 4
    assert own_rows == expected[0][1:].tolist()
    assert rows == expected[1][:5].tolist()
    np.testing.assert_allclose([own, similarities], [1 - distances[0][1:], 1 - distances[1][:5]], atol=1e-6)


def test_an_image_by_another_name_is_not_its_own_neighbour_and_may_have_a_long_one(
    labelled: Path, tmp_path: Path
) -> None:
    name = "a" * 240
    (tmp_path / f"{name}.png").hardlink_to(labelled / "a" / "1.png")
    features = np.eye(3, dtype=np.float32)
    paths = [str(labelled / "a" / f"{number}.png") for number in range(3)]
    ((rows, _),) = neighbours(features[[1]], features, [str(tmp_path / f"{name}.png")], paths)
    assert sorted(rows) == [0, 2]
    given = ["--images", labelled / "a", "--map", "none", "--neighbours", tmp_path / f"{name}.png"]
    assert embed(*given, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / f"neighbours-{name[:200]}.png").is_file()


def test_maps_keep_groups_together_and_are_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 10))
    labels = np.repeat([0, 1], 30)
    features = (centres[labels] + 0.1 * rng.normal(size=(60, 10))).astype(np.float32)
    features *= rng.uniform(0.1, 10, size=(60, 1)).astype(np.float32)  # only directions count
    points = project(features, "tsne", 0)
    assert points.shape == (60, 2)
    nearest = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points)[1][:, 1]
    assert (labels[nearest] == labels).all()
    np.testing.assert_array_equal(points, project(features, "tsne", 0))


@pytest.mark.parametrize("num_classes", [0, 2, 15, 30])
def test_maps_of_any_number_of_classes_are_drawn(tmp_path: Path, num_classes: int) -> None:
    labels = np.arange(40) % num_classes if num_classes else None
    names = tuple(f"_${number} of a class with quite a long name" for number in range(num_classes))
    index = Images.of_files(
        tuple(f"{n}.png" for n in range(40)),
        None if labels is None else tuple(labels.tolist()),
        None if labels is None else names,
    )
    points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    save_map(tmp_path / "map.png", points, index, "a map")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("flags", "module", "message"),
    [
        (["--map", "umap"], "umap", "map = umap needs umap-learn: pip install umap-learn, or use --map tsne"),
        (["--parquet"], "pyarrow.parquet", "parquet needs pyarrow: pip install pyarrow, or leave --parquet out"),
        (["--stage", "all"], "", "features of one stage are written"),
        (["--neighbours", "missing.png"], "", "neighbours: 'missing.png' does not exist"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    module: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    assert embed("--data", labelled, "--out", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
