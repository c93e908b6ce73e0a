"""Images with label maps: how they are found, what their numbers mean, and that one geometry moves both."""

from __future__ import annotations

import io
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fcmae.data import maps
from fcmae.data.augment import CropBoth, Reading
from fcmae.data.dataset import SegmentDataset, collate
from fcmae.data.find import find_images, find_mapped
from fcmae.data.index import Images
from fcmae.data.loader import build_loader
from fcmae.data.maps import IGNORED, Classes, UnknownClass, Values, count_values, find_classes
from fcmae.data.rasters import LabelMap
from fcmae.data.source import BadImage
from fcmae.data.storage import Storage

CLASSES = Classes(("sea", "land", "lake"), (0, 1, 7), 255)
# Maps of noise whose images hold the same numbers, so that pixel and class can be compared anywhere.
VALUES = np.array([0, 1, 7, 255], np.uint8)


def write_pairs(folder: Path, num: int = 5, size: tuple[int, int] = (40, 56)) -> tuple[Path, Path]:
    images, labels = folder / "images", folder / "maps"
    rng = np.random.default_rng(0)
    for number in range(num):
        values = VALUES[rng.integers(0, 4, (size[0] // 8, size[1] // 8))].repeat(8, 0).repeat(8, 1)
        for place, suffix in ((images / "a", "png"), (labels / "a", "tif")):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(place / f"{number}.{suffix}")
    return images, labels


def crop(**changes: object) -> CropBoth:
    given = {
        "in_chans": 1, "image_size": (32, 48), "scale": (1.0, 1.0), "hflip": 0.5, "vflip": 0.5, "classes": CLASSES
    } | changes  # fmt: skip
    own = {name: given.pop(name) for name in Reading.__dataclass_fields__ if name in given}
    return CropBoth(Reading(**own), **given)  # type: ignore[arg-type]


def test_crops_are_from_everywhere_and_of_every_scale_alike() -> None:
    """Without flips, of an image in which each pixel says where it is; scales by their logarithm."""
    values = np.stack([*np.indices((64, 64)), np.zeros((64, 64))], 2).astype(np.float32)
    image, label = io.BytesIO(), io.BytesIO()
    np.save(image, values)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(label, "PNG")
    view = crop(in_chans=3, image_size=(16, 16), fill=[0.5] * 3, scale=(0.5, 2.0), hflip=0, vflip=0)
    corners, scales, rng = [], [], np.random.default_rng(0)
    for _ in range(500):
        image.seek(0)
        label.seek(0)
        found = view(image, label, "a", rng)[0]
        rows, columns = found[0, :, 0], found[1, 0, :]
        corners.append((rows[0], columns[0]))
        scales.append(15 / (rows[-1] - rows[0]))
    for found in np.transpose(corners):
        assert found.min() < 4 and found.max() > 36 and abs(np.mean(found) - 23) < 4
    # Half of them are below 1, the middle of .5 and 2 by logarithm; those that round to it are half below.
    assert abs(np.mean(np.sign(np.log(scales)))) < 0.12


@pytest.mark.parametrize("bands", [1, 5])
def test_missing_values_stay_filled_where_the_rest_is_jittered(tmp_path: Path, bands: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((40, 56, bands), dtype=np.float32)
    values[8:20, 10:30, 0] = np.nan
    np.save(tmp_path / "a.npy", values)
    Image.fromarray(VALUES[rng.integers(0, 4, (40, 56))]).save(tmp_path / "a.png")
    settings = {"in_chans": bands, "image_size": (40, 56), "fill": [0.5] * bands, "hflip": 0, "vflip": 0}
    found = []
    for strength in (0.0, 0.9):
        with (tmp_path / "a.npy").open("rb") as file, (tmp_path / "a.png").open("rb") as map_file:
            view = crop(**settings, color_jitter=strength)
            found.append(view(file, map_file, "a.png", np.random.default_rng(1))[0])
    is_known = np.isfinite(values.transpose(2, 0, 1))
    assert (found[1][~is_known] == 0.5).all()
    assert (found[1] != found[0])[is_known].mean() > 0.9


def test_two_folders_are_paired_by_name_whatever_the_suffix(tmp_path: Path) -> None:
    images, labels = write_pairs(tmp_path)
    (labels / "more.png").write_bytes((labels / "a" / "0.tif").read_bytes())
    found = find_mapped(str(images), str(labels))
    assert [Path(name).relative_to(images).with_suffix("") for name in found[0].names()] == [
        Path(name).relative_to(labels).with_suffix("") for name in found[1].names()
    ]
    assert len(found[0]) == 5 and found[0].notes == ("data.maps: 1 label maps are of no image and were left out",)


def test_a_csv_file_pairs_what_it_lists(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    (tmp_path / "list.csv").write_text("mask,image\nmaps/a/3.tif,images/a/1.png\nmaps/a/0.tif,images/a/0.png\n")
    images, labels = find_mapped(str(tmp_path / "list.csv"), None)
    assert [Path(name).name for name in images.names()] == ["0.png", "1.png"]
    assert [Path(name).name for name in labels.names()] == ["0.tif", "3.tif"]


@pytest.mark.parametrize("where", ["maps", "maps.tar"])
def test_several_images_may_share_a_map(tmp_path: Path, where: str) -> None:
    _, folder = write_pairs(tmp_path)
    with tarfile.open(tmp_path / "maps.tar", "w") as tar:
        tar.add(folder, ".")
    rows = [f"images/a/{number}.png,{where}/a/{number // 2}.tif" for number in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask", *rows]))
    _, labels = find_mapped(str(tmp_path / "list.csv"), None)
    for number in range(4):
        with labels.open(number) as file:
            assert file.read() == (folder / "a" / f"{number // 2}.tif").read_bytes()


@pytest.mark.parametrize("where", ["tar", "url", "csv by url", "csv of members"])
def test_pairs_in_tar_files_and_by_url_are_those_of_folders(tmp_path: Path, where: str) -> None:
    folders = write_pairs(tmp_path)
    expected = [[Path(name).read_bytes() for name in part.names()] for part in find_mapped(*map(str, folders))]
    for folder in folders:
        with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as tar:
            tar.add(folder, ".")
    rows = [f"images/a/{number}.png,maps/a/{number}.tif" for number in range(5)]
    if where == "csv of members":
        rows = [row.replace("images/", "images.tar/").replace("maps/", "maps.tar/") for row in rows]
    (tmp_path / "list.csv").write_text("\n".join(["image,mask", *rows]))
    source, maps = {
        "tar": (f"{tmp_path}/images.tar", f"{tmp_path}/maps.tar"),
        "url": (f"file://{tmp_path}/images", f"file://{tmp_path}/maps"),
        "csv by url": (f"file://{tmp_path}/list.csv", None),
        "csv of members": (f"{tmp_path}/list.csv", None),
    }[where]
    storage = Storage(tmp_path / "kept")
    found = find_mapped(source, maps, storage=storage)
    for name, part in zip(("files.json", "maps.json"), found, strict=True):
        part.save(tmp_path / name)
    again = [Images.load(tmp_path / name, storage) for name in ("files.json", "maps.json")]
    for images in (found, again):
        assert [[part.open(i).read() for i in range(len(part))] for part in images] == expected


@pytest.mark.parametrize("damaged", ["images", "maps"])
def test_damage_and_doubled_members_cost_a_pair_and_no_others(tmp_path: Path, damaged: str) -> None:
    for folder in write_pairs(tmp_path):
        with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as tar:
            tar.add(folder, ".")
            twice = next(folder.rglob("0.*"))
            tar.add(twice, twice.relative_to(folder))
    with tarfile.open(tmp_path / f"{damaged}.tar") as tar:
        header = tar.getmember(f"./a/3.{'png' if damaged == 'images' else 'tif'}").offset_data - 512
    broken = bytearray((tmp_path / f"{damaged}.tar").read_bytes())
    broken[header + 148] ^= 1  # its sum
    (tmp_path / f"{damaged}.tar").write_bytes(broken)
    images, maps = find_mapped(f"{tmp_path}/images.tar", f"{tmp_path}/maps.tar")
    assert [Path(name).stem for name in images.names()] == ["0", "1", "2", "4"]
    assert [Path(name).stem for name in maps.names()] == ["0", "1", "2", "4"]
    notes = " ".join(images.notes)
    assert "damaged, doubled or links" in notes
    assert ("1 images, such as 'a/3', have no map in what is whole of" in notes) == (damaged == "maps")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda images, labels: (labels / "a" / "2.tif").unlink(), "no label map for 1 of 5 images, 'a/2' the first"),
        (lambda images, labels: (images / "a" / "2.jpg").write_bytes(b""), "differ in their suffix only"),
        (lambda images, labels: [path.unlink() for path in labels.glob("a/*")], "data.maps: .* holds no image"),
    ],
)
def test_pairs_that_are_incomplete_are_refused(tmp_path: Path, spoil: object, sentence: str) -> None:
    images, labels = write_pairs(tmp_path)
    spoil(images, labels)  # type: ignore[operator]
    with pytest.raises(ValueError, match=sentence):
        find_mapped(str(images), str(labels))


def test_a_csv_without_its_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\na.png,b\n")
    with pytest.raises(ValueError, match="it needs image and mask"):
        find_mapped(str(tmp_path / "list.csv"), None)


def test_values_become_classes_and_back() -> None:
    numbers = CLASSES.numbers(np.array([[0, 1], [7, 255]]), "map")
    assert numbers.tolist() == [[0, 1], [2, IGNORED]]
    assert CLASSES.stored(np.array([0, 2])).tolist() == [0, 7]
    deep = Classes(("a", "b"), (3, 60000), None)
    assert deep.stored(np.array([1])).dtype == np.uint16


@pytest.mark.parametrize("value", [2, 256, 70000, -5])
def test_a_value_of_no_class_ends_the_run(value: int) -> None:
    with pytest.raises(UnknownClass, match=f"map holds the value {value}, which is no class"):
        CLASSES.numbers(np.array([0, value]), "map")


def test_classes_are_found_by_the_values_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, labels = find_mapped(*map(str, write_pairs(tmp_path)))
    found = count_values(labels)
    everything = np.concatenate([np.asarray(Image.open(name)).ravel() for name in labels.names()])
    np.testing.assert_array_equal(found.counts[:256], np.bincount(everything, minlength=256))
    monkeypatch.setattr(maps, "BAND_PIXELS", 56 * 7)  # in bands of rows
    np.testing.assert_array_equal(count_values(labels).counts, found.counts)
    assert find_classes(found, (), (), 255) == Classes(tuple("01234567"), tuple(range(8)), 255)
    assert find_classes(found, ("sea", "other"), (0, 7), None).values == (0, 7)
    assert find_classes(found, ("sea", "other"), (), 255).values == (0, 1)


def test_black_and_white_maps_are_told_of_the_ignored_value() -> None:
    counts = np.zeros(maps.MAX_VALUE, np.int64)
    counts[[0, 255]] = 1
    found = Values(counts)
    with pytest.raises(ValueError, match=r"hold 0, 255 and data.ignore_value is 255: set data.ignore_value to none"):
        find_classes(found, (), (), 255)
    with pytest.raises(
        ValueError, match=r"hold 0, 255, values up to 255, which would be 256 classes: number the class"
    ):
        find_classes(found, (), (), None)
    assert len(find_classes(found, (), (), None, is_begun=True)) == 256
    assert len(find_classes(found, (), (0, 255), None)) == 2


def pair(values: NDArray[np.uint8]) -> tuple[io.BytesIO, io.BytesIO]:
    files = io.BytesIO(), io.BytesIO()
    for file in files:
        Image.fromarray(values).save(file, "PNG")
        file.seek(0)
    return files


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (0.4, 3.0)])
@pytest.mark.parametrize("shape", [(20, 90), (64, 64)])
def test_image_and_map_move_together(scale: tuple[float, float], shape: tuple[int, int]) -> None:
    """A wedge in two directions: each place is known by its value, in the image and in the map."""
    values = (np.arange(shape[0])[:, None] + 3 * np.arange(shape[1])[None]) // 4
    assert values.max() < 200
    classes = Classes(tuple(map(str, range(200))), tuple(range(200)), None)
    seen = []
    for seed in range(12):
        view = crop(scale=scale, classes=classes, fill=[1.0])
        image, labels = view(*pair(values.astype(np.uint8)), "map", np.random.default_rng(seed))
        assert image.shape == (1, 32, 48) and labels.shape == (32, 48)
        known = labels != IGNORED
        assert (image[0][~known] == 255).all()  # what is missing is missing in both
        assert np.abs(image[0][known].astype(int) - labels[known]).max() <= 2  # bicubic beside the nearest
        seen.append(image.tobytes())
    assert len(set(seen)) > 3


def test_a_crop_at_scale_1_is_exact_and_flips_both() -> None:
    values = VALUES[np.random.default_rng(1).integers(0, 4, (40, 60))]
    for flips in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        view = crop(hflip=flips[0], vflip=flips[1])
        image, labels = view(*pair(values), "map", np.random.default_rng(2))
        np.testing.assert_array_equal(CLASSES.numbers(image[0].astype(np.int64), ""), labels)
        unflipped = np.flip(labels, [axis for axis, flip in ((1, flips[0]), (0, flips[1])) if flip])
        assert flips == (0.0, 0.0) or not np.array_equal(unflipped, labels)
        first = crop(hflip=0.0, vflip=0.0)(*pair(values), "map", np.random.default_rng(2))[1]
        np.testing.assert_array_equal(unflipped, first)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_pixel_without_any_band_has_no_class(scale: float) -> None:
    values = VALUES[np.random.default_rng(1).integers(1, 3, (40, 60))]  # 0 is missing
    values[:, 20:40] = 0
    image, labels = crop(scale=(scale, scale), nodata=0.0, fill=[0.5])(*pair(values), "map", np.random.default_rng(2))
    assert set(labels.flatten()) == {IGNORED, 1, 2}
    assert scale < 1 or (image[0][labels == IGNORED] == 128).all()


def test_a_map_of_another_size_is_a_bad_image() -> None:
    image, _ = pair(np.zeros((40, 60), np.uint8))
    _, labels = pair(np.zeros((60, 40), np.uint8))
    with pytest.raises(BadImage, match="the image has 40 x 60 pixels and its label map 60 x 40"):
        crop()(image, labels, "map", np.random.default_rng(0))


def test_a_sample_depends_on_its_key_alone_and_batches_pass_through_workers(tmp_path: Path) -> None:
    images, labels = find_mapped(*map(str, write_pairs(tmp_path)))
    dataset = SegmentDataset(images, labels, crop(scale=(0.5, 2.0)), seed=3)
    keys = [(0, 1), (0, 2), (4, 1)]
    batch = collate([dataset[key] for key in keys])
    assert batch.given_labels.shape == (3, 32, 48) and not np.array_equal(batch.images[0], batch.images[2])
    again = SegmentDataset(images, labels, crop(scale=(0.5, 2.0)), seed=3)
    (sent,) = build_loader(again, [keys], num_workers=1, device_type="cpu")
    assert (sent.images == batch.images).all() and (sent.given_labels == batch.given_labels).all()


def test_a_pair_that_cannot_be_read_is_replaced_as_a_pair(tmp_path: Path) -> None:
    images, labels = find_mapped(*map(str, write_pairs(tmp_path)))
    Path(labels.name(0)).write_bytes(b"broken")
    sample = SegmentDataset(images, labels, crop(), seed=0)[(0, 0)]
    assert sample.bad[0][0] == images.name(0)
    np.testing.assert_array_equal(CLASSES.numbers(sample.image[0].astype(np.int64), ""), sample.label)


def test_none_that_can_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of 1 label maps can be read: .*a.png: it"):
        count_values(Images.of_files([str(tmp_path / "a.png")]))


def test_numbers_of_objects_are_not_taken_for_classes_and_some_class_must_be_there() -> None:
    counts = np.zeros(maps.MAX_VALUE, np.int64)
    counts[[0, 7000]] = 1
    found = Values(counts)
    with pytest.raises(ValueError, match=r"values up to 7000, which would be 7000 classes: .* data.class_values"):
        find_classes(found, (), (), 255)
    assert find_classes(found, (), (0, 7000), 255).names == ("0", "7000")
    with pytest.raises(ValueError, match="the maps hold 0, 7000, and none of the classes, which have 3, 4"):
        find_classes(found, (), (3, 4), 255)
    many = tuple(map(str, range(maps.MAX_CLASSES + 1)))
    with pytest.raises(ValueError, match="there are 32768 classes: give 32767 at most"):
        find_classes(found, many, (), None)


@pytest.mark.parametrize("is_semantic", [False, True])
def test_maps_that_number_their_objects_are_told_from_maps_of_classes(tmp_path: Path, *, is_semantic: bool) -> None:
    for number, num in enumerate((5, 31, 12)):
        values = np.arange(num).repeat(4).reshape(num, 4) * (2 if is_semantic else 1)
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / f"{number}.png")
    found = count_values(find_images([str(tmp_path)]))
    assert found.are_objects is not is_semantic
    if not is_semantic:
        with pytest.raises(ValueError, match=r"as objects are numbered: .* data.class_values"):
            find_classes(found, (), (), 255)
        assert len(find_classes(found, (), (1, 2), 255)) == 2


def test_a_map_of_several_pages_is_refused() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((3, 8, 9), np.uint8), photometric="minisblack")
    file.seek(0)
    with pytest.raises(BadImage, match="it has 3 pages, and a label map is one"):
        LabelMap(file)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("1", "png"), ("L", "png"), ("P", "png"), ("I;16", "png"), ("1", "tif"), ("L", "tif")]
)
def test_a_large_map_of_one_class_is_no_damaged_file(tmp_path: Path, mode: str, suffix: str) -> None:
    compression = {"compression": "group4" if mode == "1" else "tiff_lzw"} if suffix == "tif" else {}
    Image.new(mode, (4200, 4200)).save(tmp_path / f"a.{suffix}", **compression)
    with (tmp_path / f"a.{suffix}").open("rb") as file:
        found = LabelMap(file)
        assert (found.height, found.width) == (4200, 4200)
        assert not found.read((0, 0, 4200, 4200), (2, 2)).any()


def test_a_map_larger_than_max_pixels_is_counted_in_parts(tmp_path: Path) -> None:
    labels = np.arange(64 * 48, dtype=np.uint8).reshape(64, 48) % 3
    tifffile.imwrite(tmp_path / "map.tif", labels, tile=(16, 16))
    counts = count_values(find_images([str(tmp_path)]), max_pixels=48 * 20).counts
    np.testing.assert_array_equal(counts[:3], np.bincount(labels.ravel()))


def test_a_map_that_a_table_names_is_opened_by_its_own_spelling(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFD", name) for name in ("Zürich.png", "Zürich_mask.png")]
    for name in names:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "list.csv").write_text(f"image,mask\n{names[0]},{names[1]}\n")
    for found in find_mapped(str(tmp_path / "list.csv"), None):
        with found.open(0) as file:
            assert file.read(4) == b"\x89PNG"
