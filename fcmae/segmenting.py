"""Training of a network that gives every pixel a class: build the parts, then the loop, in sight."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from fcmae.anytime import Anytime, build_segmenter
from fcmae.classification import write_confusion
from fcmae.config import SegmentConfig
from fcmae.data.augment import CropBoth, Reading, check_same_size
from fcmae.data.dataset import SegmentDataset, check_values
from fcmae.data.find import find_mapped
from fcmae.data.index import Images, kept_images
from fcmae.data.loader import choose_num_workers
from fcmae.data.maps import Classes, count_values, find_classes
from fcmae.data.rasters import LabelMap, Raster
from fcmae.data.sampler import steps_per_epoch
from fcmae.data.source import BadImage, few
from fcmae.data.split import evenly, split
from fcmae.data.storage import Storage
from fcmae.evaluation.pictures import save_overlays
from fcmae.heads import Segmenter
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import describe
from fcmae.segmentation import (
    Predict,
    Scores,
    check_sides,
    each_image,
    padded,
    predictor,
    probabilities_by_rows,
    segmentation_loss,
)
from fcmae.starting import (
    Keeper,
    check_held_out,
    check_scored,
    check_start,
    class_weights_of,
    kept_weights,
    prepare,
    reading_for,
    starting_weights,
)
from fcmae.training.launch import (
    evaluating,
    giving_back,
    same_everywhere,
    share_buffers,
    waiting_for_all,
)
from fcmae.training.log import Log
from fcmae.training.micro_batches import eval_batch_size
from fcmae.training.optim import Schedule
from fcmae.training.run import Run, RunDirectory
from fcmae.training.session import Session, begin
from fcmae.training.steps import evaluate_if_owed, schedule_of
from fcmae.weights.record import ImageRecord, Weights, licensed
from fcmae.weights.segmenters import read_segmenter, save_segmenter

logger = logging.getLogger("fcmae")

SCORE = "miou"  # by which models are compared
SHOWN = 4  # images of an overlay picture
FILES = ("files.json", "maps.json", "val_files.json", "val_maps.json")


@dataclass(frozen=True)
class Mapped:
    """Images, their label maps, and what these mean.

    Attributes:
        images: to learn from.
        maps: of these.
        val_images: held out.
        val_maps: of these.
        classes: of a pixel.
        counts: (classes,), pixels of each in a sample of the maps.
    """

    images: Images
    maps: Images
    val_images: Images
    val_maps: Images
    classes: Classes
    counts: NDArray[np.int64]

    def __iter__(self) -> Iterator[Images]:
        yield from (self.images, self.maps, self.val_images, self.val_maps)

    def fingerprint(self) -> str:
        """Of all images and maps: the best model is chosen by those that are held out."""
        return "-".join(part.fingerprint() for part in self)


def segment(cfg: SegmentConfig, net: Segmenter | None = None) -> Run:
    """Run or resume the segmentation that `cfg` describes, or evaluate only.

    Args:
        cfg: its settings, with `out` and `data.path`.
        net: a finished model, trained instead of the one that `build_model` makes. None makes that one.

    Returns:
        The run, finished or stopped by a signal.

    Raises:
        ValueError: before anything is written, if the run directory holds something else, the images cannot make a
            batch, their maps cannot be used or `model.init` does not fit.
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    with begin(cfg) as session:
        run, accelerator = session.run, session.accelerator
        weights = kept_weights(session) or starting_weights(session.cfg)
        session.settle_license(weights.license)
        cfg = session.cfg
        data = same_everywhere(accelerator, partial(run_images, cfg, run))
        per_epoch = 0 if cfg.eval_only else steps_per_epoch(len(data.images), cfg.batch_size)
        schedule = schedule_of(cfg, per_epoch, run.resume_step)
        if net is None:
            net = build_model(cfg, weights, data.classes.names)
        run.network = describe(net.encoder.spec)
        reading = reading_for(cfg, weights)
        weights = replace(weights, state={}, image=ImageRecord.of(reading), origin=licensed(cfg.model.license))
        check_sides("data.image_size", reading.image_size, weights.architecture.spec.total_stride)
        num_images = (len(data.images), len(data.val_images))
        check_start(session, net, num_images, data.fingerprint())
        if cfg.eval_only:
            check_scored(run, {"val_files.json": data.val_images, "val_maps.json": data.val_maps})
        class_weights = class_weights_of(cfg, data.counts, accelerator.device)
        with session.open(), giving_back(net):
            with waiting_for_all(accelerator):
                if accelerator.is_main_process:
                    for name, part in zip(FILES, data, strict=True):
                        part.save(run.path / name)
                    for note in dict.fromkeys(note for part in data for note in part.notes):
                        logger.info("%s", note)
                    check_values(reading, data.images if len(data.images) else data.val_images, trains=cfg.trains)
            run.finished = train(session, net, weights, reading, schedule, data, class_weights)
    return session.result()


def train(
    session: Session[SegmentConfig],
    net: Segmenter,
    weights: Weights,
    reading: Reading,
    schedule: Schedule,
    data: Mapped,
    class_weights: Tensor | None,
) -> bool:
    """Train `net` from where the run stands to its end, or to a signal; or evaluate only.

    Args:
        session: open.
        net: the model, which starts as it is or is overwritten by the checkpoint that the run resumes from.
        weights: what describes the exported models, without tensors.
        reading: how images are read.
        schedule: when what happens.
        data: images and maps.
        class_weights: (classes,), in the loss; None is 1 each.

    Returns:
        Whether the end was reached.

    Raises:
        FloatingPointError: if the loss or a gradient stops being finite.
        ValueError: if none of the held-out images can be read.
    """
    session.limit_to_known_memory()
    cfg, run, accelerator = session.cfg, session.run, session.accelerator
    ready = prepare(session, net, reading.image_size, schedule)
    normalize = reading.normalize.to(accelerator.device)

    with closing(Log(cfg, accelerator, schedule, len(data.images) + len(data.val_images))) as log:
        keeper = Keeper(session, log, net, ready.ema, weights, SCORE)
        at_once = eval_batch_size(cfg, accelerator.num_processes, accelerator.device.type)
        evaluation = Evaluation(session, reading, data, keeper, at_once)
        if cfg.eval_only:
            evaluation.evaluate(0)
            logger.info("finished evaluating")
            return True
        message = "%s under %s: %d training images of %d classes (%s), %d held out"
        names, num = ", ".join(data.classes.names[:10]), len(data.classes)
        logger.info(
            message, describe(net.encoder.spec), cfg.model.head, len(data.images), num, names, len(data.val_images)
        )
        train_set = build_train_set(cfg, data, reading)

        evaluate_if_owed(session, log, evaluation.evaluate)
        steps = ready.steps(session, log, train_set, data.fingerprint(), weights.image)
        for step in steps:
            for batch in step.micro_batches():
                with step.accumulate():
                    images, target = normalize(batch.images), batch.given_labels  # (B, C, H, W), (B, H, W)
                    step.backward(
                        segmentation_loss(ready.model(images), target, class_weights, cfg.regularization.dice)
                    )
            step.update()
            if ready.ema is not None:
                ready.ema.update(net, step.number)
            step.save()
            if step.evaluates:
                evaluation.evaluate(step.number)
    if steps.finished:
        logger.info("best and last model: %s, %s", run.path / "best", run.path / "last")
    return steps.finished


# The parts


def run_images(cfg: SegmentConfig, run: RunDirectory) -> Mapped:
    """Images and maps, to learn from and held out: as listed in the run directory, else found.

    Args:
        cfg: the run's settings.
        run: its directory.
    """
    cached = [run.path / name for name in FILES]
    same = not cfg.eval_only and run.kept("data.path", "data.maps", "data.val_path", "data.val_maps")
    storage = Storage.of_run(run.path, cfg.data.index, cfg.data.cache_gb)
    if same and (kept := kept_images(cached, storage)) is not None:
        return _counted(cfg, *kept, is_begun=True)
    return find_data(cfg)


def find_data(cfg: SegmentConfig) -> Mapped:
    """Images and maps, to learn from and held out.

    Args:
        cfg: the run's settings.

    Raises:
        ValueError: see `find_mapped`, `count_values` and `find_classes`.
    """
    data, nothing = cfg.data, Images.of_files(())
    find = partial(find_mapped, storage=Storage.of_run(cfg.out, data.index, data.cache_gb))
    images, maps = find(data.path, data.maps) if data.path else (nothing, nothing)
    if data.val_path is not None:
        val, val_maps = find(data.val_path, data.val_maps, key="data.val_path")
    else:
        # The maps are as many, in the same order, and without labels like the images: the same are drawn.
        (images, val), (maps, val_maps) = (split(each, data.val_share, cfg.seed) for each in (images, maps))
    check_held_out(cfg, images, val)
    return _counted(cfg, images, maps, val, val_maps)


def _counted(
    cfg: SegmentConfig, images: Images, maps: Images, val_images: Images, val_maps: Images, *, is_begun: bool = False
) -> Mapped:
    """is_begun: the run has taken the maps as they are before."""
    data = cfg.data
    found = count_values(maps if len(maps) else val_maps, max_pixels=data.max_pixels)
    if cfg.eval_only:
        classes = known_classes(cfg, read_segmenter(Path(str(cfg.model.init)))[2].classes)
    else:
        tested = count_values(val_maps, max_pixels=data.max_pixels) if len(val_maps) else found
        classes = find_classes(
            found, data.class_names, data.class_values, data.ignore_value, tested.counts, is_begun=is_begun
        )
        # Refuse what is no class before the run comes to it.
        for key, values in (("data.maps", found), ("data.val_maps" if data.val_path else "data.maps", tested)):
            classes.numbers(np.flatnonzero(values.counts), key)
    if stated := sorted(found.nodata & set(classes.values)):
        logger.warning(
            "the label maps state GDAL_NODATA = %d, which is a class here: if it is none, give --data.ignore_value %d",
            *(stated[0], stated[0]),
        )
    return Mapped(images, maps, val_images, val_maps, classes, found.counts[list(classes.values)])


def known_classes(cfg: SegmentConfig, known: Classes) -> Classes:
    """The classes of a model that is only evaluated, by what the maps to evaluate it on hold for each.

    Args:
        cfg: the run's settings; what they leave out is as the model learnt it.
        known: those that it learnt.

    Raises:
        ValueError: if the settings are of other classes.
    """
    data, what = cfg.data, f"model.init = {cfg.model.init} has {', '.join(known.names[:10])}"
    if data.class_names and tuple(data.class_names) != known.names:
        raise ValueError(f"data.class_names = {','.join(data.class_names)}, but {what}: leave it out")
    if data.class_values and len(data.class_values) != len(known):
        raise ValueError(f"data.class_values has {len(data.class_values)} values, but {what}: give one each, in order")
    values = tuple(data.class_values) or known.values
    ignored = data.ignore_value if "ignore_value" in data.model_fields_set else known.ignored
    if ignored in values:
        raise ValueError(f"data.ignore_value = {ignored} is what maps hold for a class: {what}; give data.class_values")
    return Classes(known.names, values, ignored)


def build_model(cfg: SegmentConfig, weights: Weights, class_names: Sequence[str]) -> Segmenter:
    """The encoder of the weights, as far as they have it, and a new head, or theirs; to evaluate only, `model.init`.

    Everything random is drawn from the run's seed.

    Args:
        cfg: the run's settings.
        weights: see `starting_weights`.
        class_names: of a pixel.

    Raises:
        ValueError: if a threshold is given for a model without exits, or the head to keep is none or another.
    """
    if cfg.eval_only:
        model = read_segmenter(Path(str(cfg.model.init)))[0]
        if not isinstance(model, Anytime) and (cfg.model.tau, cfg.model.quantile) != (None, None):
            raise ValueError(
                f"model.tau and model.quantile are for models with model.head anytime, and {cfg.model.init} is none: "
                "leave them out"
            )
        if isinstance(model, Anytime):
            model.head.tau = model.head.tau if cfg.model.tau is None else cfg.model.tau
            model.head.quantile = model.head.quantile if cfg.model.quantile is None else cfg.model.quantile
        return model
    torch.manual_seed(cfg.seed)
    architecture = weights.architecture
    encoder = make_encoder(
        architecture.spec, architecture.in_chans, cfg.model.drop_path_rate, cfg.model.grad_checkpointing
    )
    own = cfg.model
    model = build_segmenter(encoder, own.head, len(class_names), own.head_dim, own.tau, own.quantile)
    if found := {name: value for name, value in weights.state.items() if name.startswith("encoder.")}:
        model.load_state_dict(model.state_dict() | found)
        logger.info("loaded %d tensors from %s", len(found), cfg.model.init)
        if own.keep_head:
            learnt, _, record = read_segmenter(Path(str(own.init)))
            kept, made = (record.kind, record.dim, record.class_names), (own.head, model.head.dim, tuple(class_names))
            if kept != made:
                heads = [f"{kind} of {dim} channels for {few(names, 10)}" for kind, dim, names in (kept, made)]
                raise ValueError(
                    "model.keep_head: set model.head, model.head_dim and data.class_names to those of model.init = "
                    f"{own.init}, which has {heads[0]}, where the settings make {heads[1]}"
                )
            for name in ("tau", "quantile"):
                known = getattr(record, name)
                if known is not None and getattr(own, name) is None and known != getattr(model.head, name):
                    raise ValueError(
                        f"model.keep_head: give model.{name} = {known:g}, which model.init = {own.init} has, or another"
                    )
            model.head.load_state_dict(learnt.head.state_dict())
    return model


def build_train_set(cfg: SegmentConfig, data: Mapped, reading: Reading) -> SegmentDataset:
    """Training crops of images and maps.

    Args:
        cfg: the run's settings.
        data: images and maps.
        reading: how the images are read.
    """
    own = cfg.data
    crop = CropBoth(reading, own.scale, own.hflip, own.vflip, data.classes, own.color_jitter)
    return SegmentDataset(data.images, data.maps, crop, seed=cfg.seed)


# What is looked at while it trains


@dataclass(frozen=True)
class Evaluation:
    """Scores on the held-out images, whole; pictures of some; the best and the last model are exported.

    Attributes:
        session: of the run.
        reading: how images are read, and the size of a tile.
        data: the held-out images are taken.
        keeper: of what an evaluation leaves.
        at_once: tiles at a time.
    """

    session: Session[SegmentConfig]
    reading: Reading
    data: Mapped
    keeper: Keeper[Segmenter]
    at_once: int

    def evaluate(self, step: int) -> None:
        """Score the model and its moving average after a step, on every process at once.

        Args:
            step: steps that were done; 0 where the run only evaluates.

        Raises:
            FloatingPointError: if the loss is not finite.
            ValueError: if none of the images can be read, or no pixel has a class.
        """
        head, classes = self.session.cfg.model.head, self.data.classes
        with waiting_for_all(self.session.accelerator):  # the first one writes models
            results = [self.score(network) for network in self.keeper.networks]
            if not self.session.accelerator.is_main_process:
                return
            scores, num_read = results[-1]
            values = [each.values(classes.names) for each, _ in results]
            with self.keeper.keeping(step, values, num_read) as (folders, weights):
                self.draw(self.keeper.model, step)
                for folder in folders:
                    if step:
                        save_segmenter(folder, self.keeper.model, weights, head, classes)
                    write_confusion(folder / "confusion.csv", scores.confusion, classes.names)

    def score(self, network: Segmenter) -> tuple[Scores, int]:
        """The scores of all processes together, and the number of images that they could read.

        Raises:
            ValueError: if none of the images can be read, or no pixel has a class.
        """
        accelerator, classes = self.session.accelerator, self.data.classes
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        scores, bad, num_read = Scores(len(classes)), list[tuple[str, str]](), 0
        which = range(rank, len(self.data.val_images), num_processes)
        share_buffers(network)
        num_threads = choose_num_workers(self.session.cfg.data.num_workers, accelerator.device.type)
        with waiting_for_all(accelerator), evaluating(network):  # images are of many sizes
            predict = self._predictor(network)
            for i, one in zip(which, each_image(partial(self._score_one, predict), which, num_threads), strict=True):
                if isinstance(one, BadImage):
                    bad.append((self.data.val_images.name(i), str(one)))
                else:
                    scores.merge(one)
                    num_read += 1
        parts = [(scores, bad, num_read)]
        if num_processes > 1:
            parts = gather_object(parts)
        self.keeper.log.note_bad_files([each for _, others, _ in parts for each in others])
        num_read = sum(num for _, _, num in parts)
        if not num_read:
            raise ValueError(
                f"none of the {len(self.data.val_images)} held-out images can be read: see bad_files.txt in "
                f"{self.keeper.log.folder}"
            )
        total = Scores(len(classes))
        for part, _, _ in parts:
            total.merge(part)
        if not total.confusion.any():
            num = len(self.data.val_images)
            raise ValueError(f"no pixel of the {num} held-out label maps has a class: hold out others")
        return total, num_read

    def _predictor(self, network: Segmenter) -> Predict:
        return predictor(network, self.reading.normalize.to(self.session.accelerator.device), self.session.accelerator)

    def _score_one(self, predict: Predict, i: int) -> Scores | BadImage:
        scores, name = Scores(len(self.data.classes)), self.data.val_maps.name(i)
        tile, fill, overlap = self.reading.image_size, self.reading.mean, self.session.cfg.data.overlap
        unit = self.keeper.model.encoder.spec.total_stride
        try:
            with self._opened(i) as (raster, labels):
                strips = probabilities_by_rows(raster, predict, tile, unit, overlap, fill, self.at_once)
                scores.add(
                    (found, self.data.classes.numbers(labels.read((top, 0, *is_seen.shape)), name, is_seen))
                    for top, found, is_seen in strips
                )
        except BadImage as error:
            return error
        return scores

    @contextmanager
    def _opened(self, i: int) -> Iterator[tuple[Raster, LabelMap]]:
        """Held-out image i and its map."""
        reading = self.reading
        with self.data.val_images.open(i) as file, self.data.val_maps.open(i) as map_file:
            raster = reading.raster(file)
            labels = LabelMap(map_file, reading.max_pixels)
            check_same_size(raster, labels)
            yield raster, labels

    def draw(self, network: Segmenter, step: int) -> None:
        """Draw the middle of some held-out images, with the true and the predicted classes over it.

        Args:
            network: the model.
            step: after which it is drawn.
        """
        size, fill, panels = self.reading.image_size, self.reading.mean, []
        with evaluating(network):
            predict = self._predictor(network)
            for i in evenly(len(self.data.val_images), SHOWN):
                with suppress(BadImage), self._opened(i) as (raster, labels):
                    h, w = min(size[0], raster.height), min(size[1], raster.width)
                    box = ((raster.height - h) // 2, (raster.width - w) // 2, h, w)
                    pixels = raster.read(box)
                    image = pixels.values  # (C, h, w)
                    truth = self.data.classes.numbers(labels.read(box), self.data.val_maps.name(i), pixels.is_seen)
                    predicted = predict(padded(image, size, fill)[None], math.inf)[0, :, :h, :w].argmax(0)
                    panels.append((image, truth, predicted))
        place = self.keeper.log.folder / "overlays" / f"step-{step:08}.png"
        save_overlays(place, panels, self.data.classes.names, f"step {step:,}")
        self.keeper.log.show("overlays", place, step)
