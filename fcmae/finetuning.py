"""Fine-tuning of a dense network for classification, GRN kept in place: build the parts, then the loop, in sight."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from timm.data import Mixup
from torch import Tensor

from fcmae.classification import class_probabilities, scores, write_confusion, write_predictions
from fcmae.config import FinetuneConfig
from fcmae.data.augment import CropAndFlip, FinetuneAugment, Reading
from fcmae.data.dataset import Batch, FinetuneDataset, check_values
from fcmae.data.find import find_labelled
from fcmae.data.index import Images, kept_images
from fcmae.data.loader import evaluation_loader
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import steps_per_epoch
from fcmae.data.source import few
from fcmae.data.split import split
from fcmae.data.storage import Storage
from fcmae.heads import Classifier
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import describe
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
from fcmae.weights.convert import save_classifier
from fcmae.weights.formats import rename
from fcmae.weights.record import ImageRecord, Weights, licensed

logger = logging.getLogger("fcmae")

SCORE = "balanced_accuracy"  # by which models are compared
MOST_CONFUSED = 1000  # classes of which all pairs are written down


def finetune(cfg: FinetuneConfig, net: Classifier | None = None) -> Run:
    """Run or resume the fine-tuning that `cfg` describes, or evaluate only.

    Args:
        cfg: its settings, with `out` and `data.path`.
        net: a finished model of the spec that `cfg.model` gives, trained instead of the one that `build_model` makes of
            it. None makes that one.

    Returns:
        The run, finished or stopped by a signal.

    Raises:
        ValueError: before anything is written, if the run directory holds something else, the images cannot make a
            batch or `model.init` does not fit.
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    with begin(cfg) as session:
        run, accelerator = session.run, session.accelerator
        weights = kept_weights(session) or starting_weights(session.cfg)
        session.settle_license(weights.license)
        cfg = session.cfg
        if _keeps_head(cfg) and not weights.class_names:
            raise ValueError(f"model.init = {cfg.model.init} has no classifier: give a fine-tuned model")
        train_images, val_images = same_everywhere(accelerator, partial(run_images, cfg, run, weights))
        assert val_images.class_names is not None
        per_epoch = 0 if cfg.eval_only else steps_per_epoch(len(train_images), cfg.batch_size)
        schedule = schedule_of(cfg, per_epoch, run.resume_step)
        if net is None:
            net = build_model(cfg, weights, len(val_images.class_names))
        run.network = describe(net.encoder.spec)
        reading = build_reading(cfg, weights)
        weights = replace(
            weights,
            state={},
            image=ImageRecord.of(reading),
            class_names=tuple(val_images.class_names),
            origin=licensed(cfg.model.license),
        )
        num_images, images = (len(train_images), len(val_images)), fingerprint(train_images, val_images)
        check_start(session, net, num_images, images)
        if cfg.eval_only:
            check_scored(run, {"val_files.json": val_images})
        train_set = build_train_set(cfg, train_images, reading) if cfg.trains else None
        assert train_images.labels is not None
        counts = np.bincount(train_images.labels, minlength=len(val_images.class_names))
        class_weights = class_weights_of(cfg, counts, accelerator.device)
        with session.open(), giving_back(net):
            with waiting_for_all(accelerator):
                if accelerator.is_main_process:
                    train_images.save(run.path / "files.json")
                    val_images.save(run.path / "val_files.json")
                    for note in dict.fromkeys(train_images.notes + val_images.notes):
                        logger.info("%s", note)
                    tell_missing(train_images, val_images)
                    check_values(reading, train_images if len(train_images) else val_images, trains=cfg.trains)
            run.finished = train(
                session, net, weights, reading, schedule, train_images, val_images, train_set, class_weights
            )
    return session.result()


def train(
    session: Session[FinetuneConfig],
    net: Classifier,
    weights: Weights,
    reading: Reading,
    schedule: Schedule,
    train_images: Images,
    val_images: Images,
    train_set: FinetuneDataset | None,
    class_weights: Tensor | None,
) -> bool:
    """Train `net` from where the run stands to its end, or to a signal; or evaluate only.

    Args:
        session: open.
        net: the classifier, which starts as it is or is overwritten by the checkpoint that the run resumes from.
        weights: what describes the exported models, without tensors.
        reading: how images are read.
        schedule: when what happens.
        train_images: to learn from.
        val_images: held out.
        train_set: of train_images; None to evaluate only.
        class_weights: (classes,), in the loss; None is 1 each.

    Returns:
        Whether the end was reached.

    Raises:
        FloatingPointError: if the loss or a gradient stops being finite.
        ValueError: if none of the held-out images can be read.
    """
    session.limit_to_known_memory()
    cfg, run, accelerator = session.cfg, session.run, session.accelerator
    ready = prepare(session, net, reading.image_size, schedule, partial(rename, to="timm"))
    normalize = reading.normalize.to(accelerator.device)
    mixup = build_mixup(cfg, len(weights.class_names))
    smoothing = 0.0 if mixup is not None else cfg.regularization.label_smoothing  # mixup's targets come smoothed

    with closing(Log(cfg, accelerator, schedule, len(train_images) + len(val_images))) as log:
        batches = evaluation_loader(
            reading,
            val_images,
            eval_batch_size(cfg, accelerator.num_processes, accelerator.device.type),
            num_workers=cfg.data.num_workers,
            device_type=accelerator.device.type,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        keeper = Keeper(session, log, net, ready.ema, weights, SCORE)
        evaluation = Evaluation(accelerator, normalize, val_images, batches, keeper)
        if train_set is None:
            evaluation.evaluate(0)
            logger.info("finished evaluating")
            return True
        message = "%s: %d training images of %d classes, %d held out"
        name, num_classes = describe(net.encoder.spec), len(weights.class_names)
        logger.info(message, name, len(train_images), num_classes, len(val_images))

        evaluate_if_owed(session, log, evaluation.evaluate)
        steps = ready.steps(session, log, train_set, fingerprint(train_images, val_images), weights.image)
        for step in steps:
            for batch in step.micro_batches():
                with step.accumulate():
                    images, target = normalize(batch.images), batch.given_labels  # (B, C, H, W) float32, (B,) int64
                    if mixup is not None:
                        images, target = mixup(images, target)  # (B, classes)
                    step.backward(classification_loss(ready.model(images), target, class_weights, smoothing))
            step.update()
            if ready.ema is not None:
                ready.ema.update(net, step.number)
            step.save()
            if step.evaluates:
                evaluation.evaluate(step.number)
    if steps.finished:
        logger.info("best and last model: %s, %s", run.path / "best", run.path / "last")
    return steps.finished


def classification_loss(logits: Tensor, target: Tensor, class_weights: Tensor | None, label_smoothing: float) -> Tensor:
    """Cross-entropy, the mean over the images.

    Args:
        logits: (B, classes).
        target: (B,) class indices, or (B, classes) shares of classes.
        class_weights: (classes,); None is 1 each. An image's loss is multiplied by its class's, and the sum is over the
            number of images, not torch's weighted mean: its divisor would differ between micro-batches and processes.
        label_smoothing: share of the target spread over all classes.

    Returns:
        A float32 scalar.
    """
    loss = F.cross_entropy(
        logits.float(), target, weight=class_weights, label_smoothing=label_smoothing, reduction="sum"
    )
    return loss / len(logits)


# The parts


def _keeps_head(cfg: FinetuneConfig) -> bool:
    return cfg.eval_only or cfg.model.keep_head


def build_reading(cfg: FinetuneConfig, weights: Weights) -> Reading:
    """How images are read: see `reading_for`; crop_pct is the settings', or with eval_only the weights' unless given.

    Raises:
        ValueError: see there.
    """
    crop_pct = cfg.data.crop_pct
    if cfg.eval_only and "crop_pct" not in cfg.data.model_fields_set:
        crop_pct = weights.image.crop_pct or crop_pct
    return reading_for(cfg, weights, crop_pct)


def fingerprint(train_images: Images, val_images: Images) -> str:
    """Of the training and of the held-out images, as these choose the best model."""
    return f"{train_images.fingerprint()}-{val_images.fingerprint()}"


def run_images(cfg: FinetuneConfig, run: RunDirectory, weights: Weights) -> tuple[Images, Images]:
    """Training and held-out images: as listed in the run directory, else found.

    Args:
        cfg: the run's settings.
        run: its directory.
        weights: where their classifier is kept, the classes are theirs.
    """
    cached = (run.path / "files.json", run.path / "val_files.json")
    storage = Storage.of_run(run.path, cfg.data.index, cfg.data.cache_gb)
    same = not cfg.eval_only and run.kept("data.path", "data.val_path")
    if same and (kept := kept_images(cached, storage)) is not None:
        return kept[0], kept[1]
    names = weights.class_names if _keeps_head(cfg) else None
    own = cfg.data.path
    train = find_labelled(own, names, key="data.path", storage=storage) if own else Images.of_files((), (), names)
    if cfg.data.val_path is None:
        train, val = split(train, cfg.data.val_share, cfg.seed)
    else:
        val = find_labelled(cfg.data.val_path, train.class_names, storage=storage)
    check_held_out(cfg, train, val)
    return train, val


def tell_missing(train_images: Images, val_images: Images) -> None:
    """Warn of classes without an image to learn from, or held out.

    Args:
        train_images: to learn from; where there are none, nothing is learnt.
        val_images: held out.
    """
    for images, lack in ((train_images, "to learn from"), (val_images, "held out, and count in no score")):
        assert images.class_names is not None and images.labels is not None
        names, counts = images.class_names, np.bincount(images.labels, minlength=len(images.class_names))
        missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
        if missing and len(images):
            logger.warning("%d of %d classes have no image %s: %s", len(missing), len(names), lack, few(missing))


def build_model(cfg: FinetuneConfig, weights: Weights, num_classes: int) -> Classifier:
    """The classifier: encoder and final norm of the weights, as far as they have them, and a new head.

    Their head too, for evaluation and where it is asked for. Everything random is drawn from the run's seed.

    Args:
        cfg: the run's settings.
        weights: see `starting_weights`.
        num_classes: outputs.
    """
    torch.manual_seed(cfg.seed)
    architecture = weights.architecture
    encoder = make_encoder(
        architecture.spec, architecture.in_chans, cfg.model.drop_path_rate, cfg.model.grad_checkpointing
    )
    model = Classifier(encoder, num_classes, cfg.model.head_init_scale or (0.001 if weights.state else 1.0))
    if weights.state:
        kept = ("encoder.", "norm.", "head.") if _keeps_head(cfg) else ("encoder.", "norm.")
        found = {name: value for name, value in weights.state.items() if name.startswith(kept)}
        model.load_state_dict(model.state_dict() | found)
        logger.info("loaded %d tensors from %s", len(found), cfg.model.init)
    return model


def build_train_set(cfg: FinetuneConfig, images: Images, reading: Reading) -> FinetuneDataset:
    """Training images, cropped and augmented.

    Args:
        cfg: the run's settings.
        images: to learn from.
        reading: how they are read.
    """
    data = cfg.data
    crop = CropAndFlip(reading, data.crop_scale, data.hflip, data.vflip)
    augment = FinetuneAugment(crop, auto_augment=data.auto_augment, random_erasing=data.random_erasing)
    return FinetuneDataset(images, augment, seed=cfg.seed)


def build_mixup(cfg: FinetuneConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which also smooth the labels; None without either."""
    regularization = cfg.regularization
    if not (regularization.mixup or regularization.cutmix):
        return None
    return Mixup(
        mixup_alpha=regularization.mixup,
        cutmix_alpha=regularization.cutmix,
        label_smoothing=regularization.label_smoothing,
        num_classes=num_classes,
    )


# What is looked at while it trains


@dataclass(frozen=True)
class Evaluation:
    """Scores on the held-out images, of the moving average too; the best and the last model are exported.

    Attributes:
        accelerator: of the run's processes.
        normalize: as in training.
        images: the held-out ones.
        batches: this process's share of them.
        keeper: of what an evaluation leaves.
    """

    accelerator: Accelerator
    normalize: Normalize
    images: Images
    batches: Iterable[Batch]
    keeper: Keeper[Classifier]

    def evaluate(self, step: int) -> None:
        """Score the model and its moving average after a step, on every process at once.

        Args:
            step: steps that were done; 0 where the run only evaluates.

        Raises:
            FloatingPointError: if the loss is not finite.
            ValueError: if none of the images can be read.
        """
        from sklearn.metrics import confusion_matrix

        with waiting_for_all(self.accelerator):  # the first one writes models
            results = [self.score(network) for network in self.keeper.networks]
            if not self.accelerator.is_main_process:
                return
            read, probabilities, _ = results[-1]
            assert read.labels is not None
            with self.keeper.keeping(step, [values for *_, values in results], len(read)) as (folders, weights):
                names, classes, truth = read.names(), weights.class_names, read.labels
                for folder in folders:
                    if step:
                        save_classifier(folder, self.keeper.model, weights)
                    write_predictions(folder / "predictions.csv", names, probabilities, classes, truth.tolist())
                    if len(classes) <= MOST_CONFUSED:
                        confusion = confusion_matrix(truth, probabilities.argmax(1), labels=range(len(classes)))
                        write_confusion(folder / "confusion.csv", confusion, classes)

    def score(self, network: Classifier) -> tuple[Images, NDArray[np.float32], dict[str, float]]:
        """Score a network, on every process at once.

        Returns:
            The N images that could be read, their probabilities (N, classes), and scores by name: on the main process.

        Raises:
            ValueError: on the main process, if none of the images can be read.
        """
        share_buffers(network)
        positions, probabilities, bad = class_probabilities(network, self.batches, self.normalize, self.accelerator)
        read = self.images.subset(positions)
        if not self.accelerator.is_main_process:
            return read, probabilities, {}
        self.keeper.log.note_bad_files(bad)
        if len(read) == 0:
            raise ValueError(
                f"none of the {len(self.images)} held-out images can be read: see bad_files.txt in "
                f"{self.keeper.log.folder}"
            )
        assert read.labels is not None
        return read, probabilities, scores(read.labels, probabilities)
