"""The two sets of images that the studies use, as folders of classes and CSV files that every command reads.

    python studies/datasets.py tiny20 SHARDS runs/studies/tiny20
    python studies/datasets.py solar runs/studies/solar

tiny20: 20 classes of Tiny ImageNet (every tenth in sorted order), 10,000 photographs for training and 1,000 for
testing, 64 x 64, as tar shards in WebDataset's convention: `NNNNNN.jpg` beside `NNNNNN.cls`, the number of the class as
text, and classes.json with the names. The images are ImageNet's, for research only, and are not part of this project.

solar: the demo's photographs of solar cells, from the package `elpv-dataset`, split into the demo's whole blocks.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcmae.atomic import replacing
from fcmae.data.split import draw, share_of_each


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


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Rows of (path, label), as `fcmae finetune` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


def folder_rows(folder: Path) -> list[tuple[str, str]]:
    """(absolute path, class) of every photograph in a folder of classes, sorted."""
    return [(str(path.absolute()), path.parent.name) for path in sorted(folder.glob("*/*.jpg"))]


def solar_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(path, class) of the solar cells to learn from and to test on: whole blocks of the published list."""
    file = Path(__file__).parents[1] / "demo" / "run.py"
    spec = importlib.util.spec_from_file_location("demo_run", file)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    paths, labels = demo.read_dataset()
    training, test = demo.split_blocks(len(paths))
    return [(str(paths[i]), labels[i]) for i in training], [(str(paths[i]), labels[i]) for i in test]


def few(rows: Sequence[tuple[str, str]], share: float, seed: int) -> list[tuple[str, str]]:
    """A random share of the rows, of each class alike and at least one of each, in their order."""
    _, labels, counts = np.unique([label for _, label in rows], return_inverse=True, return_counts=True)
    return [rows[i] for i in draw(labels, share_of_each(counts, share), seed)]


def write_csvs(out: Path, training: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], seeds: int) -> None:
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
    solar = sets.add_parser("solar", help="list the photographs of the package elpv-dataset")
    for command in (tiny20, solar):
        command.add_argument("out", type=Path, help="where to write")
        command.add_argument("--seeds", type=int, default=3, help="draws of the labels [3]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.name == "tiny20":
        unpack_shards(args.shards, args.out)
        training, test = folder_rows(args.out / "train"), folder_rows(args.out / "val")
    else:
        training, test = solar_rows()
    write_csvs(args.out, training, test, args.seeds)
    print(f"{len(training)} photographs to learn from, {len(test)} to test on, in {args.out}")


if __name__ == "__main__":
    main()
