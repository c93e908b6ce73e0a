"""Which images a run uses, with labels or label maps or without: found once and sorted."""

from __future__ import annotations

import csv
import glob
import io
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import cache
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from fcmae.data.index import ANY, Images, hashed_lists
from fcmae.data.shards import SHARDS, SUFFIXES, Shards, is_damage, is_double, is_shard, left_out, without_suffix
from fcmae.data.source import SYSTEM_FOLDERS, few, is_unicode, printable
from fcmae.data.storage import Storage, canonical, is_remote, joined
from fcmae.data.tables import can_read
from fcmae.data.walk import (
    absolute,
    expand,
    image_or_shard,
    is_image_file,
    is_pattern,
    listing,
    matching,
    matching_here,
    refuse_compressed,
    told,
    walk,
    walk_remote,
)

logger = logging.getLogger("fcmae")

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def find_images(sources: Sequence[str], *, key: str = "data.path", storage: Storage = ANY) -> Images:
    """All images of one or several sources, sorted by path and without duplicates.

    Args:
        sources: folders (searched recursively; links are followed, hidden files and folders skipped), .txt files with
            one path a line (relative ones start at the list's folder; any suffix), glob patterns (`**` is recursive; a
            folder that matches is searched), single images, or tar files, wherever they are found: see shards.py. Each
            may be a URL that fsspec knows, such as s3://bucket/photos.
        key: the setting that errors name.
        storage: that reads tar files and images.

    Raises:
        ValueError: for a source that is missing, cannot be listed, or holds no image.
    """
    addresses, others, shards, lists = list[str](), Counter[str](), Shards(storage, key), hashed_lists(sources)
    expanded = [list(told(expand(source, key, others), key)) for source in sources]
    shards.learn(path for paths in expanded for path in paths if is_shard(path))
    for source, paths in zip(sources, expanded, strict=True):
        paths = [name for path in paths for name in (shards.labels(path) if is_shard(path) else [path])]
        if not paths:
            raise ValueError(
                f"{key}: {source!r} holds no image ({' '.join(SUFFIXES)}): give a folder of images, a .txt file that "
                f"lists paths, or a glob pattern{'' if can_read() else '; tables need `pip install fcmae[parquet]`'}"
            )
        addresses += paths
    # Not a set, which would take half a gigabyte of ten million.
    names = [name for name, _ in groupby(sorted(addresses))]
    return Images(shards.source(names), notes=left_out(others, key) + shards.notes(), lists=lists)


def find_labelled(
    source: str, class_names: Sequence[str] | None = None, *, key: str | None = None, storage: Storage = ANY
) -> Images:
    """Labelled images, sorted by path: one folder a class, a CSV file with the columns path and label, or tar files.

    Args:
        source: a folder whose sub-folders are the classes (images at any depth below each), a .csv file whose
            relative paths start at its folder, or tar files with labels (see shards.py): one, a folder of them, or a
            glob pattern. Each may be a URL.
        class_names: the classes of the training set, for images held out; labels then point into it. By default the
            classes are the labels found, in alphabetical order, or by their size if all are numbers.
        key: the setting that errors name, by default data.path, or data.val_path if class_names are given.
        storage: that reads tar files and images.

    Raises:
        ValueError: for a source that is missing or malformed, a label not in class_names, or fewer than two classes.
    """
    others, notes, lists = Counter[str](), tuple[str, ...](), hashed_lists([source])
    key = key or ("data.path" if class_names is None else "data.val_path")
    path, shards = Path(source), Shards(storage, key)
    tars = _tars(source, path, key)
    is_folder = path.is_dir() or (is_remote(source) and not _is_file_or_pattern(source))
    if tars is not None and is_folder and _has_class_folders(source, key):
        left = f"{key}: {few(os.path.basename(tar) for tar in tars)} beside the class folders of {source!r} "  # noqa: PTH119
        tars, notes = None, (f"{left}were left out: name them by a pattern to learn from them instead",)
    elif tars is not None and is_folder and (folders := _folders_of_shards(source, key)):
        notes = (
            f"{key}: folders of tar files, {few(folders)}, beside tar files in {source!r} were left out: move these "
            "away to learn from them instead",
        )
    if tars is not None:
        label_of = _labels_of(tars, shards, source, key)
    elif path.suffix.lower() == ".csv" and (is_remote(source) or path.is_file()):
        label_of, notes = _read_csv(source if is_remote(source) else str(path), key)
    elif path.is_dir() or (is_remote(source) and not is_pattern(source)):
        label_of, beside = _class_folders(source, key, others, may_be_empty=class_names is not None)
        if beside:
            more = f" and {len(beside) - 1} more images" if len(beside) > 1 else ""
            left = f"{key}: {printable(beside[0])}{more} beside the class folders have no label, and were left out"
            notes = (*notes, left)
        shards.learn(tar for tar in label_of if is_shard(tar))
        for tar in [tar for tar in label_of if is_shard(tar)]:
            label_of.update(dict.fromkeys(shards.labels(tar), label_of.pop(tar)))
    else:
        problem = "is neither a folder, a .csv nor a .tar file" if path.exists() else "does not exist"
        raise ValueError(
            f"{key}: {source!r} {problem}: give a folder with one sub-folder a class, a CSV with columns path,label, "
            "or tar files with labels"
        )
    names = _classes_of(set(label_of.values()), class_names, source, key)
    number = {name: i for i, name in enumerate(names)}
    paths = sorted(label_of)
    labels = np.array([number[label_of[path]] for path in paths], dtype=np.int64)
    notes += left_out(others, key) + shards.notes()
    return Images(shards.source(paths), None, labels, tuple(names), notes, lists)


def _classes_of(labels: set[str], class_names: Sequence[str] | None, source: str, key: str) -> list[str]:
    """The classes in their order: see `find_labelled`."""
    names = _sort_classes(labels) if class_names is None else list(class_names)
    if unknown := sorted(labels - set(names)):
        raise ValueError(
            f"{key}: label {unknown[0]!r} of {source!r} is no class of the training images ({few(names, 10)})"
        )
    if len(names) < 2:
        raise ValueError(f"{key}: {source!r} has only the class {names[0]!r}: a classifier needs at least two")
    if class_names is None:
        _warn_of_names(names, key)
    return names


def _tars(source: str, path: Path, key: str) -> list[str] | None:
    """The tar files that a source of labelled images names: itself, those in a folder, or those that match."""
    if is_remote(source):
        refuse_compressed(source, key)
        if is_pattern(source):
            paths = matching(source, key)
        else:
            paths = [source] if _is_file_or_pattern(source) else listing(source, key, "ls")
    elif path.is_dir():
        paths = [absolute(inner) for inner in path.iterdir()]
    elif glob.has_magic(source) and not path.exists():
        paths = [tar for match in matching_here(path) for tar in image_or_shard(match, key)]
    else:
        paths = list(image_or_shard(path, key)) if path.is_file() else []
    return sorted(tar for tar in paths if is_shard(tar) and not os.path.isdir(tar)) or None  # noqa: PTH112


def _is_file_or_pattern(url: str) -> bool:
    """Whether labelled images at an address are not those of a folder."""
    return url.endswith((".csv", *SHARDS)) or is_pattern(url)


def _labels_of(tars: list[str], shards: Shards, source: str, key: str) -> dict[str, str]:
    shards.learn(tars)
    labelled = [pair for tar in tars for pair in shards.labels(tar).items()]
    label_of = {name: label for name, label in labelled if label or not is_damage(name)}
    if not label_of:
        raise ValueError(f"{key}: {source!r} holds no image ({' '.join(SUFFIXES)}): give tar files of labelled images")
    if without := [name for name, label in label_of.items() if not label]:
        raise ValueError(
            f"{key}: {printable(without[0])} and {len(without) - 1} more of {len(label_of)} images have no label: put "
            ".cls, .json or .txt beside each in its tar file, or a column label into its table"
        )
    return {name: _class_name(label, key) for name, label in label_of.items()}


def _sort_classes(names: set[str]) -> list[str]:
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names):  # a column with gaps has 1.0 for 1
        return sorted(names, key=lambda name: (Decimal(name), name))
    return sorted(names)


def _inner_folders(root: Path) -> list[Path]:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [path for path in folders if path.name not in SYSTEM_FOLDERS]


def _has_class_folders(source: str, key: str) -> bool:
    """Whether a sub-folder holds an image, and not in a shard alone."""
    return any(not is_shard(path) for _, paths in _below(source, key) for path in paths)


def _folders_of_shards(source: str, key: str) -> list[str]:
    """The sub-folders that hold shards, by name."""
    return [name for name, paths in _below(source, key) if any(map(is_shard, paths))]


def _below(source: str, key: str) -> Iterator[tuple[str, Iterable[str]]]:
    """The sub-folders by name, with the images and shards in each."""
    if not is_remote(source):
        for folder in _inner_folders(Path(source)):
            yield folder.name, walk(folder, key, Counter())
        return
    root = canonical(source)
    names = (path[len(root) + 1 :] for path in walk_remote(source, key, Counter()))
    yield from groupby((name for name in names if "/" in name), lambda name: name.partition("/")[0])


def _class_folders(
    source: str, key: str, others: Counter[str], *, may_be_empty: bool
) -> tuple[dict[str, str], list[str]]:
    """The images and shards in each sub-folder, and its name; and the images beside the folders."""
    if is_remote(source):
        paths, paths_of = list(expand(source, key, others)), dict[str, list[str]]()
        root = canonical(source)
        for path in paths:
            name, slash, _ = path[len(root) + 1 :].partition("/")
            if root.startswith(("http://", "https://")):
                name = unquote(name)
            if slash:
                paths_of.setdefault(name, []).append(path)
        beside = [path for path in paths if "/" not in path[len(root) + 1 :] and not is_shard(path)]
        _refuse_splits(root, set(paths_of), key)
    else:
        root = str(Path(source))
        folders = _inner_folders(Path(root))
        _refuse_splits(root, {path.name for path in folders}, key)
        beside = sorted(str(path) for path in Path(root).iterdir() if is_image_file(path))
        paths_of = {folder.name: [] for folder in folders}
        links = {folder.name: [absolute(folder)] if folder.is_symlink() else [] for folder in folders}
        for name, path in told(
            ((folder.name, path) for folder in folders for path in walk(folder, key, others, links[folder.name])), key
        ):
            paths_of[name].append(path)
        _check_links(root, links, key)
    label_of = dict[str, str]()
    for name, images in paths_of.items():
        if not images and not may_be_empty:
            raise ValueError(f"{key}: the class folder '{root}/{name}' holds no image: fill or remove it")
        label_of.update(dict.fromkeys(images, _class_name(name, key)))
    if not label_of:
        raise ValueError(f"{key}: {root!r} has no sub-folder with images: put each class in a folder of its own")
    return label_of, beside


def _check_links(root: str, links: Mapping[str, list[str]], key: str) -> None:
    """Refuse links that give images the label of a second class.

    root: of the class folders. links: those below each, by its name.
    """
    real, top = cache(os.path.realpath), os.path.realpath(root)
    places = list[tuple[str, str, str]]()  # where each leads, its class and itself
    for name, paths in links.items():
        for link in paths:
            folder, last = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))  # noqa: PTH115, PTH118, PTH120
            is_name = last not in ("", os.curdir, os.pardir)  # then the folder is that of many links
            places.append((f"{real(folder)}/{last}" if is_name else real(link), name, link))
    owners: dict[str, str] = {}
    for place, name, link in sorted(places):  # a folder before what is in it
        if f"{top}/".startswith(f"{place}/"):
            owner: str | None = ""
        elif place.startswith(f"{top}/") and (below := place[len(top) + 1 :].partition("/")[0]) in links:
            owner = below
        else:  # outside, or in what is no class, such as a hidden folder
            owner = next((owners[up] for up in (place, *map(str, Path(place).parents)) if up in owners), None)
            owners.setdefault(place, name)
        if owner not in (name, None):
            what = f"the class {owner!r}" if owner else "the classes' own folder"
            raise ValueError(f"{key}: {link!r} of the class {name!r} is a link to what {what} has: remove the link")


def _refuse_splits(root: str, names: set[str], key: str) -> None:
    if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
        held_out = sorted(names - {"train", "training"})
        example = f"{key} {root}/{sorted(names & {'train', 'training'} or names)[0]}"
        if (other := {"data.path": "data.val_path", "data": "test"}.get(key)) is not None:
            example += f" with {other} {root}/{held_out[-1]}"
        raise ValueError(
            f"{key}: {root!r} holds splits ({', '.join(sorted(names))}) and no classes: give the folder of one of "
            f"them, such as {example}"
        )


def _class_name(name: str, key: str) -> str:
    """A class's name as it is kept: accents composed, whichever way a file system has them."""
    if not is_unicode(name):
        raise ValueError(f"{key}: the class {printable(name)} has a name that is no UTF-8: rename it")
    return unicodedata.normalize("NFC", name)


def _warn_of_names(names: Sequence[str], key: str) -> None:
    """Of classes that may not be meant: spreadsheets write nan where nothing was."""
    if odd := [name for name in names if name.lower() in ("nan", "none", "null")]:
        logger.warning("%s: there is a class %r: is that a missing label?", key, odd[0])
    same = Counter(name.casefold() for name in names)
    if twice := [name for name in names if same[name.casefold()] > 1]:
        logger.warning("%s: the classes %s differ in their case only", key, " and ".join(map(repr, twice[:2])))


def _read_csv(
    address: str, key: str, column: str = "path", other: str = "label"
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What stands beside each image, by its address, in a CSV file; and a note of columns that are not read."""
    beside, folder, notes = dict[str, str](), os.path.dirname(address), list[str]()  # noqa: PTH120
    try:
        rows = csv.DictReader(io.StringIO(ANY.read(address).decode("utf-8-sig"), newline=""), skipinitialspace=True)
        columns = rows.fieldnames or []
        if not {column, other} <= set(columns):
            raise ValueError(f"{key}: the header of {address} is {','.join(columns)!r}: it needs {column} and {other}")
        if twice := [name for name in (column, other) if columns.count(name) > 1]:
            raise ValueError(f"{key}: the header of {address} has {twice[0]} twice: keep one")
        before = rows.line_num
        for row in rows:
            if rows.line_num > before + 1 and not notes and any("\n" in (field or "") for field in row.values()):
                notes.append(
                    f"{key}: lines {before + 1} to {rows.line_num} of {address} are one row, as a quotation mark is "
                    "open: if each is meant to be one, close it on its line"
                )
            before = rows.line_num
            if any(field.strip() for field in row.get(None, ())):  # DictReader's key of what is too many
                raise ValueError(
                    f"{key}: line {rows.line_num} of {address} has more fields than the header's {len(columns)}: put "
                    "quotes round what has a comma"
                )
            image, text = (row[column] or "").strip(), (row[other] or "").strip()
            if any(end in image + text for end in "\r\n"):
                raise ValueError(
                    f"{key}: a quotation mark that is open before line {rows.line_num} of {address} makes one "
                    f"{column},{other} of several lines: close it on its line"
                )
            if other == "label":
                text = _class_name(text, key)
            if not image or not text:
                raise ValueError(f"{key}: line {rows.line_num} of {address} lacks its {column} or {other}: complete it")
            image = joined(folder, image)
            if beside.setdefault(image, text) != text:
                raise ValueError(
                    f"{key}: line {rows.line_num} of {address} gives {image} the {other} {text!r}, "
                    f"an earlier one {beside[image]!r}: keep one"
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{key}: {address} cannot be read ({error}): give a UTF-8 CSV with columns {column},{other}"
        ) from error
    if not beside:
        raise ValueError(f"{key}: {address} lists no image: give one {column},{other} a line")
    if more := [name for name in columns if name not in (column, other)]:
        notes.append(
            f"{key}: of {address} only {column} and {other} are read, not {few(more)}: what fcmae "
            "holds out it draws image by image, also where several are of one patient or scene"
        )
    return beside, tuple(notes)


def find_mapped(
    source: str, maps: str | None, *, key: str = "data.path", storage: Storage = ANY
) -> tuple[Images, Images]:
    """Images and their label maps, in one order, sorted by the images' paths.

    Args:
        source: a folder of images or a tar file, or a .csv file with the columns image and mask whose relative paths
            start at its folder. Each may be a URL.
        maps: but for a .csv file, the folder or tar file of the maps, which have the images' names but for the suffix,
            in the same sub-folders.
        key: the setting that errors name.
        storage: that reads tar files and images.

    Raises:
        ValueError: for a source that is missing or malformed, an image without a map, or names that differ in their
            suffix only.
    """
    maps_key = key.replace("path", "maps")
    if source.lower().endswith(".csv"):
        lists = hashed_lists([source])
        beside, notes = _read_csv(source, key, "image", "mask")
        folder, paths, shards = os.path.dirname(source), sorted(beside), Shards(storage, key)  # noqa: PTH120
        images = Images(shards.source(paths), lists=lists)
        label_maps = Images(shards.source([joined(folder, beside[image]) for image in paths]))
        return replace(images, notes=notes + shards.notes()), label_maps
    if maps is None:
        raise ValueError(
            f"{key}: {source!r} has no folder of label maps beside it, and is no .csv file: give images and their maps "
            "in two folders or tar files, or a CSV with columns image,mask"
        )
    images, label_maps = (
        find_images([each], key=each_key, storage=storage) for each, each_key in ((source, key), (maps, maps_key))
    )
    image_of, map_of = _by_stem(images, source, key), _by_stem(label_maps, maps, maps_key)
    absent = [stem for stem in image_of if stem not in map_of]
    notes = images.notes
    if len(absent) < len(image_of) and absent and any(map(is_damage, label_maps.names())):
        notes += (f"{maps_key}: {len(absent)} images, such as {absent[0]!r}, have no map in what is whole of {maps!r}",)
        image_of = {stem: i for stem, i in image_of.items() if stem in map_of}
    elif absent:
        raise ValueError(
            f"{maps_key}: {maps!r} has no label map for {len(absent)} of {len(image_of)} images, {absent[0]!r} the "
            "first: give each image a map of its name, or a CSV with columns image,mask"
        )
    if surplus := len(map_of) - len(image_of):
        notes += (f"{maps_key}: {surplus} label maps are of no image and were left out",)
    usable = images if len(image_of) == len(images) else images.subset(list(image_of.values()))
    return replace(usable, notes=notes), label_maps.subset([map_of[stem] for stem in image_of])


def _above(source: str) -> str:
    """The folder above all that a pattern matches; what is none as it is."""
    if not (is_pattern(source) if is_remote(source) else glob.has_magic(source) and not os.path.exists(source)):  # noqa: PTH110
        return source
    return re.split(r"[*?\[]", source)[0].rpartition("/")[0] or ("/" if source.startswith("/") else ".")


def _by_stem(images: Images, root: str, key: str) -> dict[str, int]:
    """Images by what they are called below a folder or in a tar file, without suffixes."""
    root = canonical(_above(root)) if is_remote(root) else absolute(_above(root))
    named: dict[str, int] = {}
    for i, name in enumerate(images.names()):
        if is_damage(name) or is_double(name):  # a note tells of them
            continue
        stem = without_suffix(os.path.relpath(name, root))
        if (other := named.setdefault(stem, i)) != i:
            raise ValueError(
                f"{key}: {images.name(other)} and {name} differ in their suffix only: if one is the other's map, name "
                "each kind by a pattern, such as '*.tif' and --data.maps '*.png', or give a CSV with columns image,mask"
            )
    return named
