"""What runs start from: how images are read; with labels, weights, model and optimizer; and what evaluations leave."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fcmae.config import DenseConfig, ImageConfig
from fcmae.data.augment import Reading
from fcmae.data.dataset import ImageDataset
from fcmae.data.index import Images, also_in, check_apart
from fcmae.data.source import printable
from fcmae.heads import Classifier, Segmenter
from fcmae.networks.encoder import layer_of, num_layers
from fcmae.networks.spec import describe, read_spec, variant_of
from fcmae.provenance import Seen, seen_by, step_of
from fcmae.training import checkpoint, optim
from fcmae.training.compiling import compile_model
from fcmae.training.log import Log
from fcmae.training.micro_batches import micro_batch_size
from fcmae.training.optim import Schedule
from fcmae.training.records import of_model, read_metrics
from fcmae.training.run import RunDirectory
from fcmae.training.session import Session
from fcmae.training.steps import Steps, check_pooled
from fcmae.weights.convert import adapt_in_chans
from fcmae.weights.files import read_init, tell_encoder_alone
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

logger = logging.getLogger("fcmae")

AnyDense = TypeVar("AnyDense", bound=DenseConfig)
Net = TypeVar("Net", Classifier, Segmenter)


def starting_weights(cfg: DenseConfig) -> Weights:
    """The weights that `model.init` names, checked against the settings; without it, none.

    Raises:
        ValueError: if it does not fit the settings.
    """
    if cfg.model.init is None:
        assert cfg.model.spec is not None  # the settings have seen to it
        return Weights({}, Architecture(cfg.model.spec, cfg.data.in_chans))
    path = cfg.model.init
    weights = read_init(path, cfg.model.key, cfg.model.prefix)
    if not (cfg.eval_only or cfg.model.keep_head):
        tell_encoder_alone(Path(path))
    held = weights.architecture
    if cfg.model.stem_stride not in (None, held.spec.stem_stride):
        raise ValueError(
            f"model.stem_stride = {cfg.model.stem_stride}, but model.init = {path} has {held.spec.stem_stride}: "
            f"set it to {held.spec.stem_stride}"
        )
    asked = None if cfg.model.spec is None else cfg.model.spec.model_copy(update={"stem_stride": held.spec.stem_stride})
    if asked not in (None, held.spec):
        remedy = variant_of(held.spec) or "none, which takes that of model.init"
        found = describe(held.spec)
        raise ValueError(f"model.variant = {describe(asked)}, but model.init = {path} has {found}: set it to {remedy}")
    is_told = not cfg.eval_only or "in_chans" in cfg.data.model_fields_set
    if is_told and cfg.data.in_chans != held.in_chans:
        if cfg.eval_only or held.in_chans != 3:
            raise ValueError(
                f"data.in_chans = {cfg.data.in_chans}, but model.init = {path} has {held.in_chans}: "
                f"set it to {held.in_chans}"
            )
        weights = adapt_in_chans(weights, cfg.data.in_chans)
        logger.info("the stem of %s, for 3 channels, was adapted to %d", path, cfg.data.in_chans)
    return weights


def reading_of(data: ImageConfig, crop_pct: float = 1.0) -> Reading:
    """How images are read, from the settings of a run.

    Args:
        data: the settings.
        crop_pct: see `fcmae.data.augment.center_box`.
    """
    mean, std = map(tuple, data.statistics())
    return Reading(data.in_chans, data.image_size, crop_pct, mean, std, data.max_pixels, data.nodata)


def reading_for(cfg: DenseConfig, weights: Weights, crop_pct: float = 1.0) -> Reading:
    """How a run's images are read: as its settings say, and where they do not as those of the weights were.

    The size of the weights is taken only to evaluate them as they are, as are their channels.

    Args:
        cfg: the run's settings.
        weights: what it starts from.
        crop_pct: of images that are not trained on.

    Raises:
        ValueError: if neither side has the mean and std of images that are not grey or RGB.
    """
    in_chans, learnt = weights.architecture.in_chans, weights.image
    reading = replace(reading_of(cfg.data, crop_pct), in_chans=in_chans)
    if cfg.data.mean is None and learnt.mean and learnt.std:
        reading = replace(reading, mean=learnt.mean, std=learnt.std)
    if len(reading.mean) != in_chans:
        raise ValueError(
            f"data.mean is missing for in_chans = {in_chans}, and model.init does not hold it: "
            "compute it with `fcmae stats`"
        )
    if cfg.eval_only and "image_size" not in cfg.data.model_fields_set and learnt.size is not None:
        reading = replace(reading, image_size=learnt.size)
    unit = weights.architecture.spec.total_stride
    if min(reading.image_size) < unit:
        raise ValueError(
            f"data.image_size: {list(reading.image_size)} is smaller than the total stride {unit}: give more"
        )
    if cfg.data.nodata is None and learnt.nodata is not None:
        logger.info("data.nodata = %s, as the weights were trained", repr(learnt.nodata).removesuffix(".0"))
        reading = replace(reading, nodata=learnt.nodata)
    return reading


def kept_weights(session: Session[AnyDense]) -> Weights | None:
    """What describes the weights of a run that resumes, without tensors, whatever `model.init` holds by now.

    Args:
        session: with the settings and where the run stands.

    Returns:
        None of a run that starts, or that does not have all of it, as its checkpoint is of an earlier version.
    """
    run = session.run
    if run.resume_from is None:
        return None
    with checkpoint.reading_progress(run.resume_from):
        meta = checkpoint.read_meta(run.resume_from)
        image = ImageRecord.model_validate(meta.progress.get("image", {}))
        if not meta.spec or image.in_chans is None:
            return None
        architecture = Architecture(read_spec(meta.spec), image.in_chans)
    held_out = run.path / "val_files.json"  # which a start whose images moved had deleted, if it was ended then
    if not held_out.is_file():
        return None if session.cfg.model.keep_head else Weights({}, architecture, image)
    return Weights({}, architecture, image, class_names=Images.load(held_out).class_names or ())


def build_optimizer(cfg: DenseConfig, net: Classifier | Segmenter) -> torch.optim.AdamW:
    """AdamW on the model's parameters, each layer at its rate."""
    spec, mode = net.encoder.spec, cfg.optim.layer_decay_mode
    layer = partial(layer_of, spec=spec, mode=mode)
    scale = optim.layer_decay_scale(layer, num_layers(spec, mode), cfg.optim.layer_decay)
    groups = optim.parameter_groups(net, cfg.optim.weight_decay, scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.optim.betas, fused=True)


def check_held_out(cfg: DenseConfig, train: Images, val: Images) -> None:
    """Refuse to score a model on images that it learns from, or has learnt from; warn of those that were named.

    Args:
        cfg: the run's settings.
        train: to learn from.
        val: held out: data.val_path's, or drawn from data.path.

    Raises:
        ValueError: if an image is both; of a run that only evaluates, if its weights learnt from one that was drawn.
    """
    if cfg.trains:
        check_apart(train, val, *(("data.path",) if cfg.data.val_path is None else ("data.val_path", "data.path")))
    seen = Seen() if cfg.model.init is None else seen_by(cfg.model.init)
    learnt = seen.labels_of(val)
    if learnt and (cfg.trains or cfg.data.val_path is not None):
        logger.warning(
            "model.init = %s learnt labels of %d of the %d images held out, such as %s: scores on them are too high",
            *(cfg.model.init, len(learnt), len(val), printable(min(learnt))),
        )
    elif learnt:
        raise ValueError(
            f"data.val_share = {cfg.data.val_share:g} with seed = {cfg.seed} holds out {len(learnt)} of {len(val)} "
            f"images that model.init = {cfg.model.init} learnt from, such as {printable(min(learnt))}: give the seed "
            "and val_share of its run, or, if one that it began with learnt them, others by data.val_path"
        )
    if not cfg.trains and (chose := also_in(val, seen.chose)):
        logger.warning(
            "%d of the %d images held out chose the weights of model.init = %s, so that scores are too high: give "
            "others, or those of last/",
            *(len(chose), len(val), cfg.model.init),
        )


def check_scored(run: RunDirectory, parts: Mapping[str, Images]) -> None:
    """Refuse to put the scores of other images into the place of an evaluation's.

    Args:
        run: that only evaluates.
        parts: its images, by the name of the list that it keeps of them.

    Raises:
        ValueError: if it has been done on others.
    """
    if not run.exists or not read_metrics(run.path / "metrics.jsonl"):
        return
    for name, images in parts.items():
        kept = run.path / name
        if kept.is_file() and Images.load(kept).fingerprint() != images.fingerprint():
            raise ValueError(
                f"out = {run.path} has the scores of other images: give another --out, or --overwrite to delete them"
            )


def check_start(
    session: Session[AnyDense], net: Classifier | Segmenter, num_images: tuple[int, int], images: str
) -> None:
    """Refuse to start where the run could not end, or where a checkpoint is of other images.

    Args:
        session: of the run.
        net: what it trains.
        num_images: to learn from, and held out.
        images: the fingerprint of all.

    Raises:
        ValueError: in one sentence.
    """
    cfg, run = session.cfg, session.run
    if num_images[1] == 0:
        remedy = "raise it, or " * (num_images[0] > 1) + "give images to hold out by data.val_path"
        raise ValueError(f"data.val_share = {cfg.data.val_share} holds out none of {num_images[0]} images: {remedy}")
    if net.encoder.spec.has_batch_norm:
        check_pooled(session, "BatchNorm")
    if run.resume_from is not None:
        keys = [key for key in cfg.inputs() if key.startswith("data.")]
        checkpoint.check_origin(run.resume_from, run.kind, images, keys)
    elif not cfg.eval_only:
        # The best and the last model too, which are a third of a checkpoint each.
        num_states = 4 if cfg.regularization.ema_decay else 3
        num = cfg.num_checkpoints + 1
        run.needs = checkpoint.check_space(run.path, net, num, num_states, overwrites=run.overwrites)


@dataclass(frozen=True)
class Prepared:
    """What a run trains with.

    Attributes:
        model: as accelerate prepared it.
        optimizer: as accelerate prepared it.
        ema: moving average of the model, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None

    def steps(
        self, session: Session[AnyDense], log: Log, dataset: ImageDataset, fingerprint: str, image: ImageRecord
    ) -> Steps:
        """The steps of the run, whose checkpoints hold what `kept_weights` reads.

        Args:
            session: open.
            log: of the run.
            dataset: to learn from.
            fingerprint: of the run's images.
            image: how images are read.
        """
        return Steps(
            session,
            log,
            self.model,
            self.optimizer,
            dataset,
            fingerprint=fingerprint,
            progress={"image": image.known()},
            ema=None if self.ema is None else self.ema.module,
        )


def prepare(
    session: Session[AnyDense],
    net: Classifier | Segmenter,
    image_size: tuple[int, int],
    schedule: Schedule,
    renamed: Callable[[str], str] = str,
) -> Prepared:
    """Move the model to its device, restore the checkpoint that the run resumes from, and compile it where that pays.

    Args:
        session: open.
        net: the model, which starts as it is or is overwritten.
        image_size: height and width of the images.
        schedule: of the run.
        renamed: our names to those of checkpoints of the first format.
    """
    cfg, accelerator = session.cfg, session.accelerator
    net = net.to(accelerator.device)
    ema_decay = cfg.regularization.ema_decay
    # After n steps the decay is (n - 1) / (n + 8) at most: .9999 would keep a short run's first weights to its end.
    rising: dict[str, Any] = {"use_warmup": True, "warmup_gamma": 9, "warmup_power": 1}
    ema = ModelEmaV3(net, decay=ema_decay, **rising) if ema_decay and not cfg.eval_only else None
    adamw = build_optimizer(cfg, net)
    if (resumed := session.run.resume_from) is not None:
        checkpoint.restore(resumed, net, adamw, renamed, accelerator.scaler)
        if ema is not None:
            ema.module.load_state_dict(checkpoint.read_state(resumed, "ema", net, renamed))
    at_once = micro_batch_size(cfg, accelerator.num_processes)

    # The optimizer's state is where it has to be, beside the parameters.
    model, optimizer = accelerator.prepare(net, adamw, device_placement=[True, False])

    def trial() -> None:
        with accelerator.no_sync(model):
            logits = model(torch.randn(at_once, net.encoder.in_chans, *image_size, device=accelerator.device))
            logits.float().mean().backward()

    if not cfg.eval_only:  # which computes no step
        # With the autocast that the forward pass has by now: without it the first step would compile once more.
        compile_model(net, cfg.model.compile, trial, (schedule.total - schedule.start) * cfg.num_micro_batches)
    return Prepared(model, optimizer, ema)


class Keeper(Generic[Net]):
    """What the evaluations of a run leave in it: lines of metrics, the best and the last model.

    The model that is compared and exported is the moving average where there is one, the weights themselves otherwise.

    Attributes:
        networks: what is scored: the weights themselves, then their moving average if there is one.
        model: the last of these, the one that is exported.
        log: as it was given.
        best: the highest score so far.

    Args:
        session: open.
        log: of the run.
        net: the weights themselves.
        ema: their moving average, or None.
        weights: what describes the exported models, without tensors.
        score: the name of that by which evaluations are compared.
    """

    def __init__(
        self, session: Session[AnyDense], log: Log, net: Net, ema: ModelEmaV3 | None, weights: Weights, score: str
    ) -> None:
        self.networks: list[Net] = [net] if ema is None else [net, ema.module]
        self.model: Net = self.networks[-1]
        self.log, self.best = log, _best_score(session.run, score)
        self._weights, self._score, self._init = weights, score, session.cfg.model.init

    @contextmanager
    def keeping(
        self, step: int, scores: Sequence[Mapping[str, float]], num_images: int
    ) -> Iterator[tuple[list[Path], Weights]]:
        """Around the writing of an evaluation's files, on the main process, with their folders and the model's record.

        Args:
            step: steps that were done; 0 where the run only evaluates, whose model is kept elsewhere.
            scores: of each of `networks`, by name.
            num_images: that they are over.

        Raises:
            FloatingPointError: before anything is written, if a score is not finite.
        """
        schedule = self.log.schedule
        prefixed = zip(("", "ema_"), scores, strict=False)
        values = {prefix + name: value for prefix, named in prefixed for name, value in named.items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(f"step {step}: the validation loss is not finite: {values}")
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if "/" not in name)
        logger.info("step %d: %s on %d images", step, text, num_images)
        self.log.metrics.path.touch()  # which marks a run, before anything that it can go on from or do anew
        places = ["."] if step == 0 else ["last"] if step == schedule.total else []
        if step and scores[-1][self._score] > self.best:
            self.best = scores[-1][self._score]
            places.append("best")
        origin = {"run": str(self.log.folder.absolute()), "init": self._init, "step": step, **scores[-1]}
        weights = replace(self._weights, origin=self._weights.origin | origin)
        yield [self.log.folder / place for place in places], weights
        self.log.metrics.write(step, schedule.epoch(step), **values)  # last: without it the evaluation is owed


def _best_score(run: RunDirectory, score: str) -> float:
    """That of the model in `best`; -1 where that was made after the step from which a run goes on, or there is none."""
    if run.resume_from is None:
        return -1.0
    step = step_of(run.path / "best")
    lines = [line for line in read_metrics(run.path / "metrics.jsonl") if line["step"] == step <= run.resume_step]
    return next((value for line in reversed(lines) if (value := of_model(line, score)) is not None), -1.0)


def class_weights_of(
    cfg: DenseConfig, counts: Sequence[int] | NDArray[np.int64], device: torch.device
) -> Tensor | None:
    """Weights of the classes in the loss, as the settings have them.

    Args:
        cfg: the run's settings: one weight a class; or "balanced", inverse to their frequency, with a mean of 1 over
            what is counted. A class with count 0 gets the weight of the rarest class present.
        counts: (classes,), how often each is there: images or pixels.
        device: where the weights are to be.

    Returns:
        (classes,) float32, or None.

    Raises:
        ValueError: if a list has not one weight a class.
    """
    setting = cfg.regularization.class_weights
    if cfg.eval_only or setting is None:
        return None
    if setting == "balanced":
        met = [count for count in counts if count] or [1]
        setting = (np.mean(met) / np.maximum(counts, min(met))).tolist()
    if len(setting) != len(counts):
        raise ValueError(
            f"regularization.class_weights has {len(setting)} values for {len(counts)} classes: give one a class"
        )
    return torch.tensor(setting, device=device)
