"""Masked pretraining, from a folder of images to checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor

from fcmae.config import PretrainConfig, check_launch
from fcmae.data.bad_files import BadFiles
from fcmae.data.dataset import Batch, PretrainDataset, collate, normalize
from fcmae.data.index import FileIndex, find_images, split
from fcmae.data.loader import build_loader, default_num_workers
from fcmae.data.sampler import EVAL_EPOCH, evaluation_batches, steps_per_epoch
from fcmae.evaluation.features import BATCH_SIZE
from fcmae.loss import reconstruction_loss
from fcmae.masking import num_visible, random_mask
from fcmae.model import FCMAE
from fcmae.monitor import Labelled, Monitor, Watch, draw_over_time, find_monitored_labels, monitored_images
from fcmae.networks.convnext import Encoder
from fcmae.pictures import reconstruction_panels, save_curves, save_over_time, save_reconstructions, save_tiles
from fcmae.training import checkpoint, optim
from fcmae.training.compiling import compile_model
from fcmae.training.loop import fit
from fcmae.training.run import Metrics, RunDirectory, StopSignal, local_processes, make_accelerator, read_metrics
from fcmae.weights.convert import start_from
from fcmae.weights.files import read_weights

logger = logging.getLogger("fcmae")

PICTURED = 6  # images in a reconstruction grid


def main(cfg: PretrainConfig) -> None:
    """Run or resume the pretraining that `cfg` describes.

    Raises ValueError, before anything is written, if the run directory holds something else, the images cannot make a
    batch, or `model.init` or `monitor.labelled` does not fit; FloatingPointError if the loss or a gradient stops being
    finite.
    """
    run = RunDirectory(cfg, "pretrain")
    accelerator = make_accelerator(cfg)
    check_launch(cfg, accelerator.num_processes)
    index = find_index(cfg, run, accelerator)
    train_index, val_index = split(index, cfg.data.val_share, cfg.seed)
    total = cfg.epochs * steps_per_epoch(len(train_index), cfg.batch_size, cfg.data.masks_per_image)
    if cfg.model.freeze_encoder_steps >= total:
        raise ValueError(
            f"model.freeze_encoder_steps = {cfg.model.freeze_encoder_steps}, but the run has {total} steps: "
            "its encoder would never learn"
        )
    net, started = build_model(cfg), ["from scratch"]
    if run.resume_from is None and cfg.model.init is not None:
        started = start(cfg, net, Path(cfg.model.init))
    if run.resume_from is not None:
        checkpoint.check_images(run.resume_from, train_index.fingerprint())
    labelled = None
    if cfg.monitor.labelled is not None and accelerator.is_main_process:
        labelled = find_monitored_labels(cfg.monitor.labelled, cfg.data.in_chans, cfg.data.image_size, cfg.seed)
    with run.open(accelerator.is_main_process), StopSignal() as stop:
        if accelerator.is_main_process:
            index.save(run.path / "files.json")
        if run.resume_from is None:
            logger.info("start: %s", "; ".join(started))
        train(cfg, run, accelerator, net, train_index, val_index, labelled, stop)
    accelerator.end_training()


def find_index(cfg: PretrainConfig, run: RunDirectory, accelerator: Accelerator) -> FileIndex:
    """The images: as listed in the run directory, else found by the first process and sent to the others."""
    found: list[FileIndex | None] = [None]
    if accelerator.is_main_process:
        cached = run.path / "files.json"
        usable = run.kept("data.path") and cached.is_file()
        found = [FileIndex.load(cached) if usable else find_images(cfg.data.path)]
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def build_model(cfg: PretrainConfig) -> FCMAE:
    """The model of the configuration, its weights drawn from the run's seed."""
    torch.manual_seed(cfg.seed)
    encoder = Encoder(
        str(cfg.model.variant),
        in_chans=cfg.data.in_chans,
        stem_stride=cfg.model.spec.stem_stride,
        drop_path_rate=cfg.model.drop_path_rate,
        grad_checkpointing=cfg.model.grad_checkpointing,
    )
    return FCMAE(encoder, cfg.model.decoder_depth, cfg.model.decoder_dim, cfg.model.backend, cfg.model.grn_scope)


def start(cfg: PretrainConfig, net: FCMAE, path: Path) -> list[str]:
    """Load the weights that `model.init` names and say what was done."""
    if not path.exists():
        raise ValueError(f"model.init = {path} does not exist: give a run, a checkpoint, or weights in another format")
    weights = read_weights(path)
    done = [start_from(net, weights)]
    trained, here = [weights.image.get(key) for key in ("mean", "std")], list(cfg.data.statistics())
    if None not in trained and trained != here and weights.architecture.in_chans == cfg.data.in_chans:
        done.append(f"it was trained with [mean, std] {trained} and goes on with {here} (data.mean, data.std)")
    return done


def build_dataset(cfg: PretrainConfig, index: FileIndex, *, augment: bool) -> PretrainDataset:
    """Images of the index with masks: random crops, or centre crops under one mask each that never changes."""
    patch, (height, width) = cfg.model.mask_patch, cfg.data.image_size
    grid = (height // patch, width // patch)
    return PretrainDataset(
        index,
        in_chans=cfg.data.in_chans,
        image_size=cfg.data.image_size,
        crop_scale=cfg.data.crop_scale,
        hflip=cfg.data.hflip,
        grid=grid,
        visible=num_visible(grid[0] * grid[1], cfg.model.mask_ratio),
        seed=cfg.seed,
        augment=augment,
        masks_per_image=cfg.data.masks_per_image if augment else 1,
    )


def noise_batch(cfg: PretrainConfig, visible: int, num: int) -> Batch:
    """`num` images of noise under masks, of the run's shapes: for trying how fast it is."""
    (height, width), patch = cfg.data.image_size, cfg.model.mask_patch
    num_images = num // cfg.data.masks_per_image
    images = torch.randint(256, (num_images, cfg.data.in_chans, height, width), dtype=torch.uint8)
    masks = random_mask((height // patch, width // patch), visible, [(cfg.seed, i) for i in range(num)])
    index = torch.arange(num_images)
    return Batch(images, torch.from_numpy(masks), None, index, torch.ones_like(index, dtype=torch.bool), [])


def train(
    cfg: PretrainConfig,
    run: RunDirectory,
    accelerator: Accelerator,
    net: FCMAE,
    train_index: FileIndex,
    val_index: FileIndex,
    labelled: Labelled | None,
    stop: StopSignal,
) -> None:
    per_epoch = steps_per_epoch(len(train_index), cfg.batch_size, cfg.data.masks_per_image)
    total = cfg.epochs * per_epoch
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    def first_step(name: str) -> int:
        return cfg.model.freeze_encoder_steps if name.startswith("encoder.") else 0

    net = net.to(device)
    groups = optim.parameter_groups(net, cfg.optim.weight_decay, first_step=first_step)
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=cfg.optim.betas, fused=True)
    start = 0
    if (resume := run.resume_from) is not None:
        meta = checkpoint.restore(resume, net, adamw, train_index.fingerprint())
        start = meta.step
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(meta.progress["scaler"])

    workers = cfg.data.num_workers
    if workers is None:
        workers = default_num_workers(device.type, local_processes())
    train_set, val_set = build_dataset(cfg, train_index, augment=True), build_dataset(cfg, val_index, augment=False)
    val_batches = evaluation_batches(len(val_index), cfg.batch_size // processes // cfg.grad_accum, rank, processes)
    val_loader = build_loader(val_set, val_batches, num_workers=workers, device_type=device.type)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in cfg.data.statistics())
    visible = train_set.visible

    def loss_of(batch: Batch, network: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        assert batch.masks is not None
        images = normalize(batch.images, mean, std)
        if (num_masks := len(batch.masks) // len(images)) > 1:
            images = images.repeat_interleave(num_masks, dim=0)
        pred, site_mask = network(images, batch.masks, visible)
        return reconstruction_loss(pred, images, site_mask, normalize=cfg.model.normalize_target)

    def trial() -> None:
        noise = noise_batch(cfg, visible, cfg.batch_size // processes // cfg.grad_accum)
        with accelerator.autocast():
            loss = loss_of(noise.to(device), net)
        torch.autograd.backward(loss)

    compile_model(net, cfg.model.compile, trial, (total - start) * cfg.grad_accum)
    # The optimizer's state is where it has to be, beside the parameters.
    model, optimizer = accelerator.prepare(net, adamw, device_placement=[True, False])
    metrics = Metrics(run.path / "metrics.jsonl", accelerator, start)
    bad_files = BadFiles(run.path / "bad_files.txt", len(train_index) + len(val_index), cfg.data.max_bad_share)
    monitor = Monitor(
        monitored_images(val_index, train_index, cfg.monitor.num_images),
        labelled,
        in_chans=cfg.data.in_chans,
        image_size=cfg.data.image_size,
        mean=cfg.data.statistics()[0],
        std=cfg.data.statistics()[1],
        device=device,
        # Not more at a time than training has, which also keeps what its backward pass needs.
        batch_size=max(1, min(BATCH_SIZE, cfg.batch_size // processes // cfg.grad_accum)),
        num_workers=workers,
    )
    watch = Watch(read_metrics(metrics.path) if accelerator.is_main_process else ())

    @torch.no_grad()
    def evaluate(step: int) -> None:
        """The loss on the held-out images under their fixed masks, what the monitors see, pictures and the curve."""
        net.eval()
        sums = torch.zeros(2, device=device)  # loss times images, images
        bad: list[tuple[str, str]] = []
        for batch in val_loader:
            bad += batch.bad
            if num := int(batch.valid.sum()):
                # net.forward, not net: a compiled model would be compiled again for this batch's size.
                loss = loss_of(batch.select(batch.valid).to(device), net.forward)
                sums += torch.stack([loss * num, loss.new_tensor(num)])
        loss_sum, num_images = accelerator.reduce(sums, reduction="sum").tolist()
        if processes > 1:
            bad = gather_object(bad)
        if accelerator.is_main_process:
            bad_files.add(bad)
        values: dict[str, float] = {}
        if num_images:
            values["val_loss"] = loss_sum / num_images
            if not math.isfinite(values["val_loss"]):
                raise FloatingPointError(f"step {step}: the validation loss is {values['val_loss']}")
            logger.info("step %d: validation loss %.4f on %d images", step, values["val_loss"], num_images)
        if accelerator.is_main_process:
            values |= monitor.measure(net.encoder)
            if "knn_top1" in values:
                logger.info("step %d: nearest neighbours' accuracy %.4f", step, values["knn_top1"])
            if values:
                metrics.write(step, step / per_epoch, **values)
            picture(step)
            lines = read_metrics(metrics.path)
            for name in draw_over_time(run.path, lines):
                show(f"over_time/{name}", run.path / f"{name}.png", step)
            watch.look(lines)
        net.train()

    def picture(step: int) -> None:
        shown = val_set if len(val_set) else build_dataset(cfg, train_index, augment=False)
        batch = collate([shown[(EVAL_EPOCH, i)] for i in range(min(PICTURED, len(shown)))]).to(device)
        assert batch.masks is not None
        images = normalize(batch.images, mean, std)
        pred, site_mask = net.forward(images, batch.masks, visible, hidden_only=False)
        panels = reconstruction_panels(pred, images, site_mask, mean, std, normalize=cfg.model.normalize_target)
        title = (
            f"{cfg.model.variant}, epoch {step / per_epoch:.4g}, {'held-out' if len(val_set) else 'training'} images"
        )
        folder = run.path / "reconstructions"
        save_reconstructions(folder / f"step-{step:08d}.png", panels, title)
        save_tiles(folder / "tiles" / f"step-{step:08d}.png", panels)
        # Steps to come may have been seen by a run that was cut off.
        seen = [(int(path.stem.removeprefix("step-")), path) for path in sorted((folder / "tiles").glob("step-*.png"))]
        moments = [(f"epoch {number / per_epoch:.4g}", path) for number, path in seen if number <= step]
        save_over_time(folder / "over-time.png", panels, moments, f"{cfg.model.variant}: the same images over time")
        show("reconstructions", folder / f"step-{step:08d}.png", step)
        show("over_time/reconstructions", folder / "over-time.png", step)
        save_curves(run.path / "loss.png", metrics.curves("loss", "val_loss"), "loss")

    def show(name: str, path: Path, step: int) -> None:
        """Give a picture to TensorBoard."""
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                tracker.log_images({name: pixels[None]}, step, dataformats="NHWC")

    def save(step: int) -> None:
        if accelerator.is_main_process:
            progress = {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}
            meta = checkpoint.Meta("pretrain", step, cfg.model_dump(mode="json"), train_index.fingerprint(), progress)
            tensors = {"model": net.state_dict(), "optimizer": checkpoint.optimizer_state(adamw, net)}
            checkpoint.save(run.path, meta, tensors)
            checkpoint.prune(run.path, cfg.checkpoint.keep, cfg.checkpoint.milestone_epochs * per_epoch)

    logger.info("%s: %d training images, %d held out", cfg.model.variant, len(train_index), len(val_index))
    finished = fit(
        cfg,
        cfg.optim,
        run,
        accelerator,
        model,
        optimizer,
        train_set,
        lambda batch: loss_of(batch, model),
        start_step=start,
        steps_per_epoch=per_epoch,
        num_images=len(train_index),
        num_workers=workers,
        metrics=metrics,
        bad_files=bad_files,
        stop=stop,
        evaluate=evaluate,
        save=save,
        masks_per_image=cfg.data.masks_per_image,
    )
    if finished:
        logger.info("next: fcmae convert %s DEST, or fcmae finetune --model.init %s", run.path, run.path)
