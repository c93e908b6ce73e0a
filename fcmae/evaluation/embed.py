"""Features of images in a file, a map of them and nearest neighbours as pictures: `fcmae embed`.

OUT/
    features.npy, paths.csv   (N, C) float32; row, path and label of each row
    features.parquet          the same in one table, if asked for
    map.png                   every image a point, coloured by label
    neighbours-NAME.png       an image and those most like it
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fcmae.atomic import replacing
from fcmae.config.commands import EmbedConfig
from fcmae.data.augment import CenterCrop
from fcmae.data.dataset import check_values
from fcmae.data.find import find_images, find_labelled
from fcmae.data.index import Images, identity
from fcmae.evaluation.features import check_stages, extract
from fcmae.evaluation.models import Backbone, choose_device, load_backbones
from fcmae.evaluation.outputs import TEMPORARY, claim, file_name, free, tell_unread
from fcmae.evaluation.pictures import displayable, limits, new_figure, save_figure, shortened, with_bands
from fcmae.training.own_files import check_outside

FILES = ("features.npy", "paths.csv", "features.parquet", "map.png")
NEIGHBOURS = "neighbours-"
MAX_STEM = 200  # bytes of a query's name in that of its picture; a file's may have 255
NUM_NEIGHBOURS = 8
MAX_POINTS = 5000  # t-SNE of more takes minutes, and a map of more is a blot
MIN_POINTS = 5
METHODS = {"tsne": "t-SNE", "umap": "UMAP"}  # of maps, and their names
MAX_LEGEND = 20  # colours that can be told apart
ROWS = 16384  # of features in memory at once


def embed(cfg: EmbedConfig) -> str:
    """Write the features of images and pictures of them; return what was written.

    Raises:
        ValueError: before anything is computed, for what cannot be read or is not installed.
    """
    out = cfg.out
    check_outside(out, {"data": cfg.data, "images": cfg.images, "neighbours": cfg.neighbours})
    index = find_labelled(cfg.data, key="data") if cfg.data is not None else find_images(cfg.images or (), key="images")
    index.tell_notes()
    queries = find_images(cfg.neighbours, key="neighbours") if cfg.neighbours else None
    if cfg.parquet:
        _require("pyarrow.parquet", "parquet needs pyarrow: pip install pyarrow, or leave --parquet out for .npy")
    if cfg.map == "umap":
        _require("umap", "map = umap needs umap-learn: pip install umap-learn, or use --map tsne")
    [backbone] = load_backbones([cfg.model], index, cfg.image_size, cfg.max_pixels, cfg.key, cfg.prefix, cfg.nodata)
    check_stages(backbone, [cfg.stage])
    clear = claim(out, _is_ours, cfg.overwrite)
    check_values(backbone.reading, index)
    device = choose_device(cfg.device)
    with TemporaryDirectory(prefix=TEMPORARY[0], dir=out) as directory:

        def features_of(found: Images, name: str) -> tuple[Images, NDArray[np.float32]]:
            aside = Path(directory) / name
            aside.mkdir()
            extracted = extract(
                backbone,
                found,
                [cfg.stage],
                device=device,
                batch_size=cfg.batch_size,
                num_workers=cfg.num_workers,
                directory=aside,
                title=f"features of {name}",
            )
            tell_unread(extracted.bad, name)
            return found.subset(extracted.positions), next(iter(extracted.stages.values()))

        # First, so that nothing is written if none of them can be read.
        asked = None if queries is None else features_of(queries, "queries")
        index, features = features_of(index, "images")
        clear()
        if cfg.parquet:
            written = [write_parquet(out / "features.parquet", features, index)]
        else:
            written = [write_npy(out / "features.npy", features), write_paths(out / "paths.csv", index)]
        lines = [f"{len(features)} images, {features.shape[1]} features each"]
        if cfg.map is not None and len(features) < MIN_POINTS:
            lines.append(f"no map: {len(features)} images are too few")
        elif cfg.map is not None:
            lines += _draw_map(cfg, cfg.map, features, index)
            written.append(out / "map.png")
        if asked is not None:
            queries, query_features = asked
            nearest = neighbours(query_features, features, queries.names(), index.names())
            for number, (rows, similarities) in enumerate(nearest):
                stem = file_name(Path(queries.name(number)).stem)
                short = os.fsencode(stem)[:MAX_STEM].decode(errors="ignore")
                picture = free(out / f"{NEIGHBOURS}{short}.png", written)
                save_neighbours(picture, queries.subset([number]), index.subset(rows), similarities, backbone)
                written.append(picture)
    return "\n".join([*lines, *(f"wrote {path}" for path in written)])


def _draw_map(cfg: EmbedConfig, kind: str, features: NDArray[np.float32], index: Images) -> list[str]:
    """Draw the map of the features (N, C) of images; a sentence, if it shows some of them alone."""
    shown, some, lines = np.arange(len(features)), f"{len(features)}", list[str]()
    if len(features) > MAX_POINTS:
        shown = np.sort(np.random.default_rng(cfg.seed).choice(len(features), MAX_POINTS, replace=False))
        some = f"{MAX_POINTS} of {len(features)}"
        lines = [f"the map shows {MAX_POINTS} of the images, drawn with seed {cfg.seed}"]
    title = f"{shortened(cfg.model, 80)}\n{METHODS[kind]} of {some} images"
    save_map(cfg.out / "map.png", project(features[shown], kind, cfg.seed), index.subset(shown), title)
    return lines


def _is_ours(path: Path) -> bool:
    return path.is_file() and (path.name in FILES or (path.name.startswith(NEIGHBOURS) and path.suffix == ".png"))


def _require(module: str, remedy: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise ValueError(remedy) from error


def write_npy(path: Path, features: NDArray[np.float32]) -> Path:
    """Write (N, C) features, chunk by chunk."""
    header = {"descr": "<f4", "fortran_order": False, "shape": features.shape}
    with replacing(path) as aside, aside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(features), ROWS):
            file.write(features[start : start + ROWS].astype("<f4", copy=False).tobytes())
    return path


def write_paths(path: Path, index: Images) -> Path:
    """Write a CSV file: row of the features, path, and label where known."""
    # A path that is not valid Unicode keeps its bytes.
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "path", *(["label"] if index.labels is not None else [])])
        for row in range(len(index)):
            writer.writerow([row, index.name(row), *_label(index, row)])
    return path


def _label(index: Images, row: int) -> list[str]:
    name = index.label_name(row)
    return [] if name is None else [name]


def write_parquet(path: Path, features: NDArray[np.float32], index: Images) -> Path:
    """Write one table: path, label where known, and feature, a list of floats; one row group per chunk.

    Args:
        path: the file.
        features: (N, C), may lie on disk.
        index: the N images.

    Returns:
        The path.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = [("path", pa.string()), ("label", pa.string()), ("feature", pa.list_(pa.float32(), features.shape[1]))]
    schema = pa.schema([column for column in columns if column[0] != "label" or index.labels is not None])
    with replacing(path) as aside, parquet.ParquetWriter(aside, schema) as writer:
        for start in range(0, len(features), ROWS):
            rows = range(start, min(start + ROWS, len(features)))
            values: dict[str, Any] = {
                # Parquet's text is Unicode: other bytes show as escapes.
                "path": [index.name(row).encode("utf-8", "backslashreplace").decode() for row in rows],
                "label": [name for row in rows for name in _label(index, row)],
                "feature": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.asarray(features[rows.start : rows.stop]).ravel()), features.shape[1]
                ),
            }
            writer.write_table(pa.table({name: values[name] for name in schema.names}, schema))
    return path


def project(features: NDArray[np.float32], method: str, seed: int) -> NDArray[np.float32]:
    """Project features to points by t-SNE or UMAP of their directions: neighbours are those by cosine.

    Args:
        features: (N, C).
        method: tsne or umap.
        seed: of the projection.

    Returns:
        (N, 2).
    """
    directions = _directions(features)
    if method == "umap":
        import umap

        # With a seed UMAP uses one core, and would warn that it does.
        reducer = umap.UMAP(n_neighbors=min(15, len(features) - 1), random_state=seed, n_jobs=1)
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        reducer = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    points: NDArray[np.float32] = reducer.fit_transform(directions)
    return points


def neighbours(
    queries: NDArray[np.float32],
    features: NDArray[np.float32],
    query_names: Sequence[str],
    names: Sequence[str],
    num: int = NUM_NEIGHBOURS,
) -> list[tuple[list[int], list[float]]]:
    """For each query, the rows of the features most like it by cosine, most similar first, and their similarities.

    Args:
        queries: (Q, C).
        features: (N, C), may lie on disk.
        query_names: of the queries' images.
        names: of the images; a query that is one of them, by another name too, is not its own neighbour.
        num: neighbours of each query, fewer if there are fewer.
    """
    wanted = _directions(queries)
    similarity = np.empty((len(queries), len(features)), np.float32)
    for start in range(0, len(features), ROWS):
        similarity[:, start : start + ROWS] = wanted @ _directions(features[start : start + ROWS]).T
    found = []
    for values, name in zip(similarity, query_names, strict=True):
        rows, own = np.argsort(-values, kind="stable")[: num + 1], identity(name)
        best = [int(row) for row in rows if identity(names[row]) != own][:num]
        found.append((best, values[best].tolist()))
    return found


def _directions(features: NDArray[np.float32]) -> NDArray[np.float32]:
    directions: NDArray[np.float32] = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return directions


def save_map(path: Path, points: NDArray[np.float32], index: Images, title: str) -> None:
    """Draw points, coloured by label if they have one; with many classes, only the largest have a colour.

    Args:
        path: the file.
        points: (N, 2).
        index: the N images.
        title: above the picture.
    """
    from matplotlib import colormaps

    figure = new_figure(9, 7)
    axis = figure.subplots()
    size = min(max(20000 / len(points), 6), 60)  # square points
    if index.labels is None or index.class_names is None:
        axis.scatter(points[:, 0], points[:, 1], s=size, linewidths=0)
    else:
        labels = index.labels
        counts = np.bincount(labels, minlength=len(index.class_names))
        shown = np.argsort(-counts, kind="stable")[:MAX_LEGEND]
        colours = colormaps["tab10" if len(shown) <= 10 else "tab20"]
        for number, label in enumerate(sorted(shown[counts[shown] > 0])):
            name = f"{shortened(index.class_names[label])} ({counts[label]})"
            x, y = points[labels == label].T
            axis.scatter(x, y, s=size, linewidths=0, color=colours(number), label=name)
        others = ~np.isin(labels, shown)
        if others.any():
            x, y = points[others].T
            name = f"{np.count_nonzero(counts) - len(shown)} more classes ({others.sum()})"
            axis.scatter(x, y, s=size, marker="x", linewidths=1, color="0.8", zorder=0, label=name)
        figure.legend(loc="outside right upper", fontsize=8, markerscale=(30 / size) ** 0.5, frameon=False)
    # What lies near each other is alike; positions and directions mean nothing.
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=10)
    save_figure(figure, path)


def save_neighbours(
    path: Path, query: Images, found: Images, similarities: Sequence[float], backbone: Backbone
) -> None:
    """Draw an image and its neighbours, as the network sees them, with similarity and label.

    Args:
        path: the file.
        query: the image, alone.
        found: its neighbours, in the order in which they are shown.
        similarities: of each.
        backbone: the network that the features are of.
    """
    figure = new_figure(10, 4.9)
    grid = figure.add_gridspec(2, 6)
    axes = [figure.add_subplot(grid[:, :2])]
    axes += [figure.add_subplot(grid[row, column]) for row in range(2) for column in range(2, 6)]
    titles = [shortened(Path(query.name(0)).name)]
    for row, similarity in enumerate(similarities):
        titles.append("\n".join([f"{similarity:.3f}", *map(shortened, _label(found, row))]))
    for axis in axes:
        axis.set_axis_off()
    shown = [(query, 0), *((found, row) for row in range(len(found)))]
    for axis, (images, row), title in zip(axes[: len(shown)], shown, titles, strict=True):
        with images.open(row) as file:
            values = CenterCrop(backbone.reading)(file, np.random.default_rng(0)).values
        pixels = torch.from_numpy(values) / (255 if values.dtype == np.uint8 else 1)
        axis.imshow(displayable(pixels, *limits(pixels)), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
    title = f"Nearest by cosine of the features of {shortened(backbone.name, 80)}"
    figure.suptitle(with_bands(title, backbone.reading.in_chans), fontsize=10)
    save_figure(figure, path)
