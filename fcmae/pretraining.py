"""Masked pretraining, from images to checkpoints: build the parts, then the loop, in sight."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from fcmae.config import PretrainConfig
from fcmae.data.augment import CenterCrop, CropAndFlip
from fcmae.data.dataset import Batch, PretrainDataset, check_values, collate
from fcmae.data.find import find_images
from fcmae.data.index import Images, kept_images
from fcmae.data.loader import build_loader
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import EVAL_EPOCH, evaluation_batches, steps_per_epoch
from fcmae.data.split import split
from fcmae.data.storage import Storage
from fcmae.evaluation.features import BATCH_SIZE
from fcmae.evaluation.monitor import Monitor, Watch, draw_over_time, find_monitored_labels, monitored_images
from fcmae.evaluation.pictures import (
    reconstruction_panels,
    save_curves,
    save_over_time,
    save_reconstructions,
    save_tiles,
)
from fcmae.layouts import make_layout
from fcmae.masked import FCMAE, build_fcmae, hog, normalized_pixels, pixels, weighted_loss
from fcmae.masking import num_visible, random_mask
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import describe
from fcmae.starting import reading_of
from fcmae.training import checkpoint, optim
from fcmae.training.compiling import compile_model
from fcmae.training.launch import (
    evaluating,
    giving_back,
    same_everywhere,
    waiting_for_all,
)
from fcmae.training.log import Log, curves
from fcmae.training.micro_batches import micro_batch_size
from fcmae.training.optim import Schedule
from fcmae.training.records import read_metrics
from fcmae.training.run import Run, RunDirectory
from fcmae.training.session import Session, begin
from fcmae.training.steps import Steps, check_pooled, evaluate_if_owed, schedule_of
from fcmae.weights.convert import start_from
from fcmae.weights.files import read_init
from fcmae.weights.formats import OLD, rename

logger = logging.getLogger("fcmae")

PICTURED = 6  # images in a reconstruction grid


def pretrain(cfg: PretrainConfig, net: FCMAE | None = None) -> Run:
    """Run or resume the pretraining that `cfg` describes.

    Args:
        cfg: its settings, with `out` and `data.path`.
        net: a finished model, trained instead of the one that `cfg.model` describes and starts from; the run is then
            resumed with the same. It may have an encoder, a decoder and a target of its own, for images of
            `cfg.data.in_chans` channels. None builds that one.

    Returns:
        The run, finished or stopped by a signal.

    Raises:
        ValueError: before anything is written, if the run directory holds something else, the images cannot make a
            batch, or `net`, `model.init` or `monitor.labelled` does not fit.
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    with begin(cfg) as session:
        cfg, run, accelerator = session.cfg, session.run, session.accelerator  # all but the licence is known
        images, are_new = same_everywhere(accelerator, partial(run_images, cfg, run))
        train_images, val_images = split(images, cfg.data.val_share, cfg.seed)
        schedule = build_schedule(cfg, run, train_images)
        if cfg.model.grn_scope == "batch":
            check_pooled(session, "model.grn_scope = batch")
        started, found = list[str](), None
        if net is None:
            net = build_model(cfg)
            if run.resume_from is None:
                started, found = start(cfg, net)
        else:
            check_model(cfg, net)
            started = ["from the model that was handed in"] if run.resume_from is None else []
        session.settle_license(found)
        run.network = describe(net.encoder.spec)
        if run.resume_from is None:
            run.needs = checkpoint.check_space(run.path, net, cfg.num_checkpoints, overwrites=run.overwrites)
        labelled = None
        if cfg.monitor.labelled is not None:
            with waiting_for_all(accelerator):
                if accelerator.is_main_process:
                    labelled = find_monitored_labels(cfg.monitor.labelled, reading_of(cfg.data), cfg.seed)
        with session.open(), giving_back(net):
            with waiting_for_all(accelerator):
                if accelerator.is_main_process:
                    if are_new:
                        images.save(run.path / "files.json")
                    for note in images.notes:
                        logger.info("%s", note)
                    check_values(reading_of(cfg.data), images, trains=True)
            for sentence in started:
                logger.info("start: %s", sentence)
            run.finished = train(session, net, schedule, train_images, val_images, labelled)
    return session.result()


def train(
    session: Session[PretrainConfig],
    net: FCMAE,
    schedule: Schedule,
    train_images: Images,
    val_images: Images,
    labelled: tuple[Images, Images] | None,
) -> bool:
    """Train `net` from where the run stands to its end, or to a signal.

    Args:
        session: open.
        net: the model, which starts as it is or is overwritten by the checkpoint that the run resumes from.
        schedule: see `build_schedule`.
        train_images: to learn from.
        val_images: held out; may be empty.
        labelled: for the monitor's nearest neighbours, on the main process; or None.

    Returns:
        Whether the end was reached.

    Raises:
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    session.limit_to_known_memory()
    cfg, run, accelerator = session.cfg, session.run, session.accelerator
    net = net.to(accelerator.device)
    adamw = build_optimizer(cfg, net)
    if run.resume_from is not None:
        checkpoint.restore(run.resume_from, net, adamw, partial(rename, to=OLD), accelerator.scaler)
    normalize = Normalize(*cfg.data.statistics()).to(accelerator.device)
    visible = num_visible_patches(cfg)

    # The optimizer's state is where it has to be, beside the parameters.
    model, optimizer = accelerator.prepare(net, adamw, device_placement=[True, False])

    def trial() -> None:
        noise = noise_batch(cfg, micro_batch_size(cfg, accelerator.num_processes)).to(accelerator.device)
        with accelerator.no_sync(model):
            loss = weighted_loss(model, normalize(noise.images), noise.given_masks, visible, target=net.target)
            loss.mean.backward()  # type: ignore[no-untyped-call]

    # With the autocast that the forward pass has by now: without it the first step would compile once more.
    compile_model(net, cfg.model.compile, trial, (schedule.total - schedule.start) * cfg.num_micro_batches)

    train_set = build_dataset(cfg, train_images, augment=True)
    logger.info("%s: %d training images, %d held out", describe(net.encoder.spec), len(train_images), len(val_images))
    with closing(Log(cfg, accelerator, schedule, len(train_images) + len(val_images))) as log:
        evaluation = build_evaluation(cfg, accelerator, normalize, train_images, val_images, labelled, log)

        def evaluate(step: int) -> None:
            with waiting_for_all(accelerator):  # the first one looks at features and draws pictures
                evaluation.evaluate(net, step)

        evaluate_if_owed(session, log, evaluate)
        fingerprint, masks_per_image = train_images.fingerprint(), cfg.data.masks_per_image
        steps = Steps(
            session, log, model, optimizer, train_set, fingerprint=fingerprint, masks_per_image=masks_per_image
        )
        for step in steps:
            for batch in step.micro_batches():
                with step.accumulate():
                    images = normalize(batch.images)  # (B, C, H, W) float32
                    step.backward(
                        *weighted_loss(model, images, batch.given_masks, visible, target=net.target, known=batch.known)
                    )
            step.update()
            step.save()
            if step.evaluates:
                evaluate(step.number)
    return steps.finished


# The parts


def run_images(cfg: PretrainConfig, run: RunDirectory) -> tuple[Images, bool]:
    """The images, and whether they were found now: else they are as listed in the run directory."""
    storage = Storage.of_run(run.path, cfg.data.index, cfg.data.cache_gb)
    listed = [run.path / "files.json"]
    if run.kept("data.path") and (kept := kept_images(listed, storage)) is not None:
        return kept[0], False
    return find_images(cfg.data.path, storage=storage), True


def check_model(cfg: PretrainConfig, net: FCMAE) -> None:
    """Refuse a model that was handed in for other settings; warn of an encoder that is not what its numbers say.

    Args:
        cfg: the run's settings.
        net: the model.

    Raises:
        ValueError: if its channels, its stride or what its GRN pools over do not fit.
    """
    encoder, patch, stride = net.encoder, cfg.model.mask_patch, net.encoder.total_stride
    if encoder.in_chans != cfg.data.in_chans:
        raise ValueError(
            f"data.in_chans is {cfg.data.in_chans}, and the model's encoder has {encoder.in_chans}: set it to that"
        )
    if patch % stride:
        raise ValueError(f"model.mask_patch is {patch}, no multiple of {stride}, the stride of the model's encoder")
    layout = net.make_layout
    if isinstance(layout, partial) and layout.func is make_layout:
        pooled = layout.keywords.get("grn_scope", "image")
        if pooled != cfg.model.grn_scope:
            raise ValueError(
                f"model.grn_scope is {cfg.model.grn_scope!r}, and the model's layout has {pooled!r}: set it to that"
            )
    with torch.device("meta"):
        plain = make_encoder(encoder.spec, encoder.in_chans)
    if type(encoder) is not type(plain) or encoder.state_dict().keys() != plain.state_dict().keys():
        logger.warning(
            "the encoder is a %s.%s: load, export and init make a plain %s of what is stored of it, or refuse it where "
            "its tensors are others",
            *(type(encoder).__module__, type(encoder).__qualname__, describe(encoder.spec)),
        )


def build_schedule(cfg: PretrainConfig, run: RunDirectory, images: Images) -> Schedule:
    """When what happens, from where the run stands.

    Args:
        cfg: the run's settings.
        run: where it stands.
        images: to learn from.

    Raises:
        ValueError: if the images are too few for a batch or are not those of the run, or the encoder would never learn.
    """
    per_epoch = steps_per_epoch(len(images), cfg.batch_size, cfg.data.masks_per_image)
    schedule = schedule_of(cfg, per_epoch, run.resume_step)
    if cfg.model.freeze_encoder_steps >= schedule.total:
        raise ValueError(
            f"model.freeze_encoder_steps = {cfg.model.freeze_encoder_steps}, but the run has {schedule.total} steps: "
            "its encoder would never learn"
        )
    if run.resume_from is not None:
        checkpoint.check_origin(run.resume_from, run.kind, images.fingerprint())
    return schedule


def build_model(cfg: PretrainConfig) -> FCMAE:
    """The model of the settings, its weights drawn from the run's seed."""
    torch.manual_seed(cfg.seed)
    model = cfg.model
    encoder = make_encoder(model.spec, cfg.data.in_chans, model.drop_path_rate, model.grad_checkpointing)
    layout = partial(make_layout, model.backend, grn_scope=model.grn_scope)
    target = hog if model.target == "hog" else normalized_pixels if model.normalize_target else pixels
    return build_fcmae(encoder, model.decoder_dim, model.decoder_depth, layout, target)


def start(cfg: PretrainConfig, net: FCMAE) -> tuple[list[str], str | None]:
    """Load the weights that `model.init` names, if it does, and say what was done and which licence they have.

    Args:
        cfg: the run's settings.
        net: what they are loaded into.

    Raises:
        ValueError: if `model.init` does not exist or does not fit.
    """
    if cfg.model.init is None:
        return ["from scratch"], None
    weights = read_init(cfg.model.init, cfg.model.key, cfg.model.prefix)
    done = [start_from(net, weights)]
    image, here = weights.image, cfg.data.statistics()
    if image.mean and image.std and weights.architecture.in_chans == cfg.data.in_chans:
        trained = (list(image.mean), list(image.std))
        if trained != here:
            done.append(f"it was trained with (mean, std) {trained} and goes on with {here} (data.mean, data.std)")
    return done, weights.license


def build_optimizer(cfg: PretrainConfig, net: FCMAE) -> torch.optim.AdamW:
    """AdamW on the model's parameters; the encoder's may be frozen at first."""

    def first_step(name: str) -> int:
        return cfg.model.freeze_encoder_steps if name.startswith("encoder.") else 0

    groups = optim.parameter_groups(net, cfg.optim.weight_decay, first_step=first_step)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.optim.betas, fused=True)


def mask_grid(cfg: PretrainConfig) -> tuple[int, int]:
    """Rows and columns of mask patches."""
    height, width = cfg.data.image_size
    return height // cfg.model.mask_patch, width // cfg.model.mask_patch


def num_visible_patches(cfg: PretrainConfig) -> int:
    """Patches of an image that its mask leaves."""
    return num_visible(math.prod(mask_grid(cfg)), cfg.model.mask_ratio)


def build_dataset(cfg: PretrainConfig, images: Images, *, augment: bool) -> PretrainDataset:
    """Images with masks.

    Args:
        cfg: the run's settings.
        images: which.
        augment: random crops, under as many masks each as the settings say; otherwise centre crops under one mask each
            that never changes.
    """
    grid, reading = mask_grid(cfg), reading_of(cfg.data, crop_pct=0.875)
    crop = CropAndFlip(reading, cfg.data.crop_scale, cfg.data.hflip, cfg.data.vflip)
    return PretrainDataset(
        images,
        crop if augment else CenterCrop(reading),
        grid=grid,
        visible=num_visible_patches(cfg),
        seed=cfg.seed,
        masks_per_image=cfg.data.masks_per_image if augment else 1,
    )


def noise_batch(cfg: PretrainConfig, num: int) -> Batch:
    """Images of noise under masks, of the run's shapes: for trying how fast it is.

    Args:
        cfg: the run's settings.
        num: images, each counted as often as it has masks.
    """
    (height, width), grid = cfg.data.image_size, mask_grid(cfg)
    num_images = num // cfg.data.masks_per_image
    images = torch.randint(256, (num_images, cfg.data.in_chans, height, width), dtype=torch.uint8)
    masks = random_mask(grid, num_visible_patches(cfg), [(cfg.seed, i) for i in range(num)])
    index = torch.arange(num_images)
    return Batch(images, torch.from_numpy(masks), None, index, torch.ones_like(index, dtype=torch.bool), [])


# What is looked at while it trains


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out images under masks that stay the same, what the monitors see, pictures and curves.

    Attributes:
        accelerator: of the run's processes.
        normalize: as in training.
        batches: this process's share of the held-out images.
        pictured: images that reconstructions are shown of.
        title: of these.
        monitor: of the encoder's features.
        watch: warns of what the numbers show.
        log: of the run.
    """

    accelerator: Accelerator
    normalize: Normalize
    batches: Iterable[Batch]
    pictured: PretrainDataset
    title: str
    monitor: Monitor
    watch: Watch
    log: Log

    @torch.no_grad()
    def evaluate(self, net: FCMAE, step: int) -> None:
        """Evaluate `net` after a step, on every process at once.

        Args:
            net: the model.
            step: steps that were done.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        epoch = self.log.schedule.epoch(step)
        with evaluating(net):
            values = self.loss(net, step)
            if not self.accelerator.is_main_process:
                return
            values |= self.monitor.measure(net.encoder)
            if "knn_top1" in values:
                logger.info("step %d: nearest neighbours' accuracy %.4f", step, values["knn_top1"])
            lines = [*read_metrics(self.log.metrics.path), {"step": step, "epoch": epoch, **values}]
            self.log.metrics.path.touch()  # which marks a run, before pictures that would be a stranger's without it
            self.picture(net, step, lines)
        for name in draw_over_time(self.log.folder, lines):
            self.log.show(f"over_time/{name}", self.log.folder / f"{name}.png", step)
        self.watch.look(lines)
        if values:
            self.log.metrics.write(step, epoch, **values)  # last: without it the evaluation is owed

    def loss(self, net: FCMAE, step: int) -> dict[str, float]:
        """The loss on the held-out images.

        Args:
            net: the model.
            step: steps that were done.

        Returns:
            val_loss: the mean over the images of all processes that could be read, each counting by the share of its
                hidden values that is known; nothing without any.

        Raises:
            FloatingPointError: if it is not finite.
        """
        sums = torch.zeros(3, device=self.accelerator.device)  # loss times weight, weight, images
        bad: list[tuple[str, str]] = []
        for batch in self.batches:
            bad += batch.bad
            if num := int(batch.valid.sum()):
                read = batch.select(batch.valid).to(self.accelerator.device)
                # net.forward, not net: a compiled model would be compiled again for this batch's size.
                loss, share = weighted_loss(
                    net.forward,
                    self.normalize(read.images),
                    read.given_masks,
                    self.pictured.visible,
                    target=net.target,
                    known=read.known,
                )
                weight = loss.new_tensor(num) * share
                sums += torch.stack([loss * weight, weight, loss.new_tensor(num)])
        loss_sum, weight_sum, num_images = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.log.add_bad_files(bad)
        if not weight_sum:
            return {}
        value = loss_sum / weight_sum
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: the validation loss is {value}")
        logger.info("step %d: validation loss %.4f on %d images", step, value, num_images)
        return {"val_loss": value}

    def picture(self, net: FCMAE, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Draw the curves of the loss, and where pixels are predicted reconstructions, and the same over time.

        Args:
            net: the model.
            step: steps that were done.
            lines: of metrics.jsonl, this evaluation's too.
        """
        save_curves(self.log.folder / "loss.png", curves(lines, "loss", "val_loss"), "loss")
        if net.target not in (pixels, normalized_pixels):
            return
        shown = [self.pictured[(EVAL_EPOCH, i)] for i in range(min(PICTURED, len(self.pictured)))]
        batch = collate(shown).to(self.accelerator.device)
        images = self.normalize(batch.images)
        pred, site_mask = net.forward(images, batch.given_masks, self.pictured.visible, hidden_only=False)
        panels = reconstruction_panels(
            *(pred, images, site_mask, self.normalize),
            normalize_target=net.target is normalized_pixels,
            known=batch.known,
        )
        name, folder = describe(net.encoder.spec), self.log.folder / "reconstructions"
        epoch = self.log.schedule.epoch
        now, over_time = folder / f"step-{step:08d}.png", folder / "over-time.png"
        save_reconstructions(now, panels, f"{name}, epoch {epoch(step):.4g}, {self.title}")
        save_tiles(folder / "tiles" / now.name, panels)
        # Steps to come may have been seen by a run that was cut off.
        tiles = {path.stem[5:]: path for path in sorted((folder / "tiles").glob("step-*.png"))}
        seen = [(int(number), path) for number, path in tiles.items() if number.isdecimal()]
        moments = [(f"epoch {epoch(number):.4g}", path) for number, path in seen if number <= step]
        save_over_time(over_time, panels, moments, f"{name}: the same images over time")
        self.log.show("reconstructions", now, step)
        self.log.show("over_time/reconstructions", over_time, step)


def build_evaluation(
    cfg: PretrainConfig,
    accelerator: Accelerator,
    normalize: Normalize,
    train_images: Images,
    val_images: Images,
    labelled: tuple[Images, Images] | None,
    log: Log,
) -> Evaluation:
    """The evaluation of a run, from its settings and images.

    Args:
        cfg: the run's settings.
        accelerator: of this process.
        normalize: on its device, as in training.
        train_images: pictured and measured where those that are held out do not suffice.
        val_images: held out; may be empty.
        labelled: for the monitor's nearest neighbours, or None.
        log: of the run.
    """
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    at_once, workers = micro_batch_size(cfg, processes), cfg.data.num_workers
    val_set = build_dataset(cfg, val_images, augment=False)
    keys = evaluation_batches(len(val_set), at_once, rank, processes)
    monitor = Monitor(
        monitored_images(val_images, train_images, cfg.monitor.num_images),
        labelled,
        reading_of(cfg.data),
        device=device,
        # Not more at a time than training has, which also keeps what its backward pass needs.
        batch_size=max(1, min(BATCH_SIZE, at_once)),
        num_workers=workers,
    )
    return Evaluation(
        accelerator=accelerator,
        normalize=normalize,
        batches=build_loader(val_set, keys, num_workers=workers, device_type=device.type),
        pictured=val_set if len(val_set) else build_dataset(cfg, train_images, augment=False),
        title=f"{'held-out' if len(val_set) else 'training'} images",
        monitor=monitor,
        watch=Watch(read_metrics(log.metrics.path) if accelerator.is_main_process else ()),
        log=log,
    )
