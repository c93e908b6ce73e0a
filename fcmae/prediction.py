"""Classify images with a fine-tuned model, or give every pixel a class."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fcmae.anytime import Anytime
from fcmae.atomic import replacing
from fcmae.classification import add_predictions, open_table, probabilities_of
from fcmae.config.commands import PredictConfig
from fcmae.data.dataset import check_values
from fcmae.data.find import find_images
from fcmae.data.loader import choose_num_workers, evaluation_loader, readable
from fcmae.data.maps import IGNORED, Classes
from fcmae.data.shards import is_image, without_suffix
from fcmae.data.source import BadImage, printable
from fcmae.data.storage import is_remote
from fcmae.data.tiff import GDAL_NODATA, geo_tags
from fcmae.segmentation import Strip, check_sides, colours, each_image, predictor, probabilities_by_rows
from fcmae.training.own_files import check_outside
from fcmae.weights.convert import build_classifier
from fcmae.weights.files import read_weights, segmenter_in
from fcmae.weights.segmenters import read_segmenter

logger = logging.getLogger("fcmae")


def predict(cfg: PredictConfig) -> int:
    """Print path, class and probability of every image as it comes, and write them to a CSV file if one is named.

    With a segmentation model, write a label map of every image instead; see `predict_maps`. Files that cannot be read
    are named on stderr.

    Returns:
        The exit status: 1 if there are such files.

    Raises:
        ValueError: if the model has no classifier, cfg.csv exists, or no image can be classified.
    """
    if segmenter_in(cfg.model) is not None:
        return predict_maps(cfg)
    if cfg.out is not None or cfg.probabilities or (cfg.tau, cfg.budget, cfg.limit_ms) != (None, None, None):
        what = "out, probabilities, tau, budget and limit_ms are for label maps"
        raise ValueError(f"{what}, and {cfg.model} is no model of `fcmae segment`")
    if cfg.csv is not None and os.path.lexists(cfg.csv):  # also a dangling link
        raise ValueError(f"csv = {cfg.csv} exists: give a new path, or remove it")
    weights = read_weights(cfg.model, key=cfg.key, prefix=cfg.prefix)
    class_names = weights.class_names
    if not class_names:
        raise ValueError(f"{cfg.model} has no classifier: give a fine-tuned model")
    accelerator = Accelerator(cpu=cfg.device == "cpu", mixed_precision="no")  # whatever the environment says
    model = build_classifier(weights).to(accelerator.device).eval()
    reading = weights.reading(str(cfg.model), cfg.image_size).told(cfg.max_pixels, cfg.nodata)
    images = find_images(cfg.images, key="images")
    images.tell_notes()
    check_values(reading, images)
    loader = evaluation_loader(
        reading, images, cfg.batch_size, num_workers=cfg.num_workers, device_type=accelerator.device.type
    )
    normalize = reading.normalize.to(accelerator.device)
    num_done, printer = 0, _Printer(is_all=cfg.csv is None)
    with ExitStack() as stack:
        table = None
        if cfg.csv is not None:
            cfg.csv.parent.mkdir(parents=True, exist_ok=True)
            table = stack.enter_context(open_table(cfg.csv, class_names, labelled=False))
        for pixels, batch in readable(tqdm(loader, unit="batch", disable=None), normalize):
            bad = batch.bad
            if len(pixels):
                names = images.subset(batch.index.numpy()).names()
                probabilities = probabilities_of(model, pixels, accelerator)
                finite = [bool(np.isfinite(row).all()) for row in probabilities]
                bad = bad + [
                    (names[i], "its probabilities are not finite")
                    for i, is_finite in enumerate(finite)
                    if not is_finite
                ]
                names, probabilities = list(compress(names, finite)), probabilities[finite]
                if table is not None:
                    add_predictions(table, names, probabilities, class_names)
                for name, i, row in zip(names, probabilities.argmax(axis=1), probabilities, strict=True):
                    printer.done(f"{printable(name)}\t{printable(class_names[i])}\t{row[i]:.4f}")
                num_done += len(names)
            for name, reason in bad:
                printer.bad(name, reason)
    if not num_done:
        if cfg.csv is not None:
            cfg.csv.unlink()
        raise ValueError(f"none of {len(images)} images could be classified: {printer.first_bad}")
    return _ended(num_done, len(images), "classified")


@dataclass
class _Printer:
    """A line for each image, beside the bar: of those that are done, and on stderr of others.

    is_all: whether what is printed is all that the command gives; else it goes on where nobody reads it.
    """

    is_all: bool = False
    first_bad: str = ""
    is_read: bool = True

    def done(self, line: str) -> None:
        try:
            if self.is_read:
                tqdm.write(line)
        except BrokenPipeError:
            if self.is_all:
                raise
            self.is_read = False

    def bad(self, name: str, reason: str) -> None:
        line = f"{printable(name)}: {printable(reason)}"
        self.first_bad = self.first_bad or line
        tqdm.write(line, file=sys.stderr)


def _ended(num_done: int, num: int, what: str) -> int:
    """The exit status of so many images that are done of all, which is told if some are not."""
    if num_done < num:
        print(f"{num_done} of {num} images were {what}; the others are named above, with the reason", file=sys.stderr)
    return int(num_done < num)


TILE = 256  # side of the tiles of written TIFFs


def predict_maps(cfg: PredictConfig) -> int:
    """Write a label map of every image, whole or not at all, and print its path and the shares of its classes.

    Files that cannot be read are named on stderr.

    Returns:
        The exit status: 1 if there are such files.

    Raises:
        ValueError: if cfg.out is missing or exists, or no image can be read.
    """
    if cfg.out is None or cfg.csv is not None:
        raise ValueError(f"{cfg.model} makes label maps: give --out, a new folder for them, and no --csv")
    if (cfg.key, cfg.prefix) != (None, None):
        raise ValueError(f"{cfg.model} is a run, and key and prefix name what is inside a file: leave them out")
    if os.path.lexists(cfg.out):
        raise ValueError(f"out = {cfg.out} exists: give a new path, or remove it")
    check_outside(cfg.out, {"images": cfg.images})
    model, weights, record = read_segmenter(cfg.model)
    reading = weights.reading(str(cfg.model), cfg.image_size).told(cfg.max_pixels, cfg.nodata)
    unit = model.encoder.total_stride
    check_sides("image_size", reading.image_size, unit)
    accelerator = Accelerator(cpu=cfg.device == "cpu", mixed_precision="no")  # whatever the environment says
    normalize = reading.normalize.to(accelerator.device)
    fill = reading.mean
    if not isinstance(model, Anytime) and (cfg.tau, cfg.budget, cfg.limit_ms) != (None, None, None):
        raise ValueError(f"tau, budget and limit_ms are for models with model.head anytime, and {cfg.model} is none")
    limit_s = math.inf if cfg.limit_ms is None else cfg.limit_ms / 1000
    predict_tiles = predictor(model.to(accelerator.device).eval(), normalize, accelerator, cfg.tau, cfg.budget)
    images = find_images(cfg.images, key="images")
    images.tell_notes()
    check_values(reading, images)
    names, out = images.names(), cfg.out
    places = places_of(names, out)

    def files_of(place: Path) -> list[Path]:
        return [place, probabilities_beside(place)] if cfg.probabilities else [place]

    unplaced = list[Path]()
    first_of = {file: i for i, place in reversed(list(enumerate(places))) for file in files_of(place)}

    def segmented(i: int) -> NDArray[np.float64] | BadImage:
        """The shares of the classes of an image whose map was written."""
        place = places[i]
        try:
            if os.pardir in place.relative_to(out).parts:
                raise BadImage(f"its map would be {place}, outside of out: give it another name")
            if another := next((file for file in files_of(place) if first_of[file] != i), None):
                raise BadImage(f"{another} is of another image: give images whose names differ before the suffix")
            with images.open(i) as file:
                tags = geo_tags(file)
                if tags and place.suffix == ".png" and not unplaced:
                    unplaced.append(place)
                    logger.warning(
                        "%s has a place on earth, which a PNG does not keep: for maps that do, give images a name in "
                        ".tif (told once)",
                        printable(names[i]),
                    )
                file.seek(0)
                raster = reading.raster(file)
                strips = probabilities_by_rows(
                    raster, predict_tiles, reading.image_size, unit, cfg.overlap, fill, cfg.batch_size, limit_s
                )
                shape = (raster.height, raster.width)
                return write_map(place, shape, strips, record.classes, tags, cfg.probabilities)
        except BadImage as error:
            return error
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return BadImage(f"its map's name would be too long: {place.name}")

    num_done, printer = 0, _Printer()
    num_threads = choose_num_workers(cfg.num_workers, accelerator.device.type)
    found = tqdm(each_image(segmented, range(len(names)), num_threads), total=len(names), unit="image", disable=None)
    for name, place, shares in zip(names, places, found, strict=True):
        if isinstance(shares, BadImage):
            printer.bad(name, str(shares))
        else:
            num_done += 1
            told = ", ".join(
                f"{printable(what)} {share:.1%}"
                for what, share in zip(record.class_names, shares, strict=True)
                if share
            )
            printer.done(f"{printable(name)}\t{printable(str(place))}\t{told}")
    if not num_done:
        made = {folder for place in places for folder in place.parents if folder == out or out in folder.parents}
        for folder in sorted(made, reverse=True):  # a folder after its contents
            with suppress(OSError):
                folder.rmdir()
        raise ValueError(f"none of {len(images)} images could be segmented: {printer.first_bad}")
    return _ended(num_done, len(names), "segmented")


def places_of(names: Sequence[str], out: Path) -> list[Path]:
    """The paths of the label maps of images, which lie below `out` as the images do below what they have in common.

    Args:
        names: of the images, paths or URLs.
        out: folder of the maps.
    """
    below = [f"/{_without_query(name)}" if is_remote(name) else name for name in names]  # all of them absolute
    root = os.path.commonpath([os.path.dirname(name) for name in below])  # noqa: PTH120
    places = [out / os.path.relpath(name, root) for name in below]
    return [
        place.with_name(without_suffix(place.name) + (".tif" if place.suffix.lower() in (".tif", ".tiff") else ".png"))
        for place in places
    ]


def _without_query(url: str) -> str:
    """The URL of an image without what is asked of the server, as a signature; that of a program as it is."""
    path, _, _ = url.partition("?")
    return path if is_image(path) else url


def probabilities_beside(place: Path) -> Path:
    """The path of the class probabilities of an image.

    Args:
        place: path of its label map.
    """
    return place.with_suffix(".probabilities.tif")


def write_map(
    place: Path,
    shape: tuple[int, int],
    strips: Iterator[Strip],
    classes: Classes,
    tags: list[Any],
    with_probabilities: bool,
) -> NDArray[np.float64]:
    """Write the label map of an image, and the probabilities of its classes if they are wanted.

    TIFFs are written as the strips come, in bounded memory, including that of the probabilities. Where all bands of a
    pixel are missing, the map holds the ignored value, if there is one, and the probabilities are NaN; the tag
    GDAL_NODATA of a TIFF states this.

    Args:
        place: path of the map, a .tif or a .png file; a .png has the classes' colours if their values are below 256.
        shape: height and width of the image.
        strips: see `probabilities_by_rows`.
        classes: the classes of a pixel.
        tags: of a GeoTIFF, see `geo_tags`.
        with_probabilities: whether to write the probabilities.

    Returns:
        (classes,), each one's share of the pixels that are not missing.

    Raises:
        BadImage: if a probability is not finite; nothing is written then.
    """
    counts = np.zeros(len(classes), np.int64)
    with ExitStack() as stack:
        kept = None
        if with_probabilities:
            aside = stack.enter_context(replacing(probabilities_beside(place)))
            bands, kind = (*shape, len(classes)), {"photometric": "minisblack", "planarconfig": "contig"}
            told = _with_nodata(tags, "nan")
            # Disk space is allocated at once: writing to a memory-mapped sparse file on a full disk kills the process.
            kept = tifffile.memmap(aside, shape=bands, dtype=np.float32, extratags=told, metadata=None, **kind)
            with aside.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

        def labels() -> Iterator[NDArray[Any]]:
            for top, found, is_seen in strips:
                if not np.isfinite(found).all():
                    raise BadImage("its probabilities are not finite: are missing pixels a huge number? Give --nodata")
                numbers = found.argmax(0)
                np.add(counts, np.bincount(numbers[is_seen], minlength=len(classes)), out=counts)
                if kept is not None:
                    kept[top : top + len(numbers)] = found.transpose(1, 2, 0)
                    kept[top : top + len(numbers)][~is_seen] = np.nan
                if classes.ignored is not None:
                    numbers[~is_seen] = IGNORED
                yield classes.stored(numbers)

        aside = stack.enter_context(replacing(place))
        if place.suffix == ".png":
            _picture(np.concatenate(list(labels())), classes).save(aside, format="png")
        else:
            tifffile.imwrite(
                aside,
                _tiles(labels()),
                shape=shape,
                dtype=classes.stored(np.zeros(0, np.int64)).dtype,
                photometric="minisblack",
                tile=(TILE, TILE),
                compression="zlib",
                extratags=tags if classes.ignored is None else _with_nodata(tags, str(classes.ignored)),
                metadata=None,
            )
        if kept is not None:
            kept.flush()
    return counts / max(1, int(counts.sum()))


def _with_nodata(tags: list[Any], value: str) -> list[Any]:
    """Tags in tifffile's form, with GDAL_NODATA added."""
    return [*tags, (GDAL_NODATA, "s", 0, value, True)]


def _tiles(strips: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The TIFF tiles of a map, from strips of any height; tiles at the right and lower edge are padded with 0."""
    for strip in _of_height(strips, TILE):
        for left in range(0, strip.shape[1], TILE):
            tile = np.zeros((TILE, TILE), strip.dtype)
            part = strip[:, left : left + TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _of_height(strips: Iterator[NDArray[Any]], rows: int) -> Iterator[NDArray[Any]]:
    kept: list[NDArray[Any]] = []
    for strip in strips:
        kept.append(strip)
        if sum(map(len, kept)) >= rows:
            whole = np.concatenate(kept)
            end = len(whole) // rows * rows
            yield from np.split(whole[:end], end // rows)
            kept = [whole[end:]]
    if sum(map(len, kept)):
        yield np.concatenate(kept)


def _picture(stored: NDArray[Any], classes: Classes) -> Image.Image:
    """A map as a picture: with a palette, or of 16 bits."""
    picture = Image.fromarray(stored)
    if stored.dtype == np.uint8:
        palette = np.zeros((256, 3), np.uint8)
        palette[list(classes.values)] = colours(len(classes))
        picture.putpalette(palette.tobytes())
    return picture
