"""Fine-tuning of a dense ConvNeXt for classification, with GRN kept in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fcmae.classification import class_probabilities, scores, write_predictions
from fcmae.config import FinetuneConfig, check_launch
from fcmae.data.augment import CropAndFlip, FinetuneAugment
from fcmae.data.bad_files import BadFiles
from fcmae.data.dataset import Batch, FinetuneDataset
from fcmae.data.index import Images, find_labelled
from fcmae.data.loader import build_loader, default_num_workers
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import evaluation_batches, steps_per_epoch
from fcmae.data.split import split
from fcmae.networks.convnext import VARIANTS
from fcmae.training import checkpoint, optim
from fcmae.training.compiling import compile_model
from fcmae.training.loop import fit
from fcmae.training.run import Metrics, RunDirectory, StopSignal, local_processes, make_accelerator
from fcmae.weights.convert import adapt_in_chans, build_dense, create_dense, save_dense
from fcmae.weights.files import Weights, read_weights
from fcmae.weights.formats import Architecture

logger = logging.getLogger("fcmae")


def main(cfg: FinetuneConfig) -> None:
    """Run or resume the fine-tuning that `cfg` describes, or evaluate only.

    Raises ValueError, before anything is written, if the run directory holds something else, the images cannot make a
    batch or `model.init` does not fit; FloatingPointError if the loss or a gradient stops being finite.
    """
    run = RunDirectory(cfg, "finetune")
    accelerator = make_accelerator(cfg)
    check_launch(cfg, accelerator.num_processes)
    weights = starting_weights(cfg)
    train_index, val_index = find_indices(cfg, run, accelerator, weights)
    names = val_index.class_names
    assert names is not None
    if not cfg.eval_only:
        steps_per_epoch(len(train_index), cfg.batch_size)
    if weights is None:
        assert cfg.model.spec is not None
        weights = Weights({}, Architecture(str(cfg.model.variant), cfg.data.in_chans, cfg.model.spec.stem_stride))
    if len(val_index) == 0:
        raise ValueError(f"data.val_share = {cfg.data.val_share} holds out none of {len(train_index)} images: raise it")
    model = build_model(cfg, weights, len(names))
    weights = replace(weights, state={}, image=image_settings(cfg, weights), class_names=names)
    if run.resume_from is not None:
        checkpoint.check_images(run.resume_from, fingerprint(train_index, val_index))
    with run.open(accelerator.is_main_process), StopSignal() as stop:
        if accelerator.is_main_process:
            train_index.save(run.path / "files.json")
            val_index.save(run.path / "val_files.json")
        train(cfg, run, accelerator, model, weights, train_index, val_index, stop)
    accelerator.end_training()


def starting_weights(cfg: FinetuneConfig) -> Weights | None:
    """What `model.init` names, or None from scratch. Raises ValueError if it does not fit the settings."""
    if cfg.model.init is None:
        return None
    path = Path(cfg.model.init)
    if not path.exists():
        raise ValueError(
            f"model.init = {path} does not exist: give a run, a checkpoint, a directory or a file of weights"
        )
    weights = read_weights(path)
    held = weights.architecture
    for key, setting, value in (
        ("variant", cfg.model.variant, held.variant),
        ("stem_stride", cfg.model.stem_stride, held.stem_stride),
    ):
        if setting not in (None, value):
            raise ValueError(f"model.{key} = {setting}, but model.init = {path} has {value}: set it to {value}")
    if cfg.data.in_chans != held.in_chans:
        if cfg.eval_only or held.in_chans != 3:
            raise ValueError(
                f"data.in_chans = {cfg.data.in_chans}, but model.init = {path} has {held.in_chans}: "
                f"set it to {held.in_chans}"
            )
        weights = adapt_in_chans(weights, cfg.data.in_chans)
        logger.info("the stem of %s, for 3 channels, was adapted to %d", path, cfg.data.in_chans)
    if cfg.eval_only and not weights.class_names:
        raise ValueError(f"model.init = {path} has no classifier to evaluate: give a fine-tuned model")
    return weights


def image_settings(cfg: FinetuneConfig, weights: Weights) -> dict[str, Any]:
    """Mean, std, input size and crop: the configuration's, else those that the weights were trained with.

    Size and crop of the weights are taken only to evaluate them as they are. Raises ValueError if neither side has the
    mean and std of images that are not grey or RGB.
    """
    (mean, std), size, crop_pct = cfg.data.statistics(), [cfg.data.in_chans, *cfg.data.image_size], cfg.data.crop_pct
    if cfg.data.mean is None and "mean" in weights.image:
        mean, std = weights.image["mean"], weights.image["std"]
    if len(mean) != cfg.data.in_chans:
        raise ValueError(
            f"data.mean is missing for in_chans = {cfg.data.in_chans}, and model.init does not hold it: "
            "compute it with `fcmae stats`"
        )
    if cfg.eval_only and "image_size" not in cfg.data.model_fields_set:
        size = list(weights.image.get("input_size", size))
    if cfg.eval_only and "crop_pct" not in cfg.data.model_fields_set:
        crop_pct = weights.image.get("crop_pct", crop_pct)
    return {"input_size": size, "mean": list(mean), "std": list(std), "crop_pct": crop_pct}


def fingerprint(train_index: Images, val_index: Images) -> str:
    """Of the training and the held-out images: the best model is chosen by the latter."""
    return f"{train_index.fingerprint()}-{val_index.fingerprint()}"


def find_indices(
    cfg: FinetuneConfig, run: RunDirectory, accelerator: Accelerator, weights: Weights | None
) -> tuple[Images, Images]:
    """Training and held-out images: as listed in the run directory, else found by the first process for all.

    When only evaluating, the classes are those of the weights.
    """
    found: list[tuple[Images, Images] | None] = [None]
    if accelerator.is_main_process:
        cached = (run.path / "files.json", run.path / "val_files.json")
        if run.kept("data.path", "data.val_path") and all(path.is_file() for path in cached):
            found = [(Images.load(cached[0]), Images.load(cached[1]))]
        else:
            names = weights.class_names if weights is not None and cfg.eval_only else None
            if cfg.data.val_path is None:
                assert cfg.data.path is not None
                found = [split(find_labelled(cfg.data.path, names), cfg.data.val_share, cfg.seed)]
            else:
                train = find_labelled(cfg.data.path, names) if cfg.data.path else Images.of_files((), (), names)
                found = [(train, find_labelled(cfg.data.val_path, train.class_names))]
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def build_model(cfg: FinetuneConfig, weights: Weights, num_classes: int) -> nn.Module:
    """timm's model with the weights and a new head; from scratch where the weights are empty.

    The head of the weights is kept only for evaluation. Everything random is drawn from the run's seed.
    """
    torch.manual_seed(cfg.seed)
    scale = cfg.model.head_init_scale or (0.001 if weights.state else 1.0)
    if not weights.state:
        model = create_dense(
            weights.architecture.variant,
            in_chans=weights.architecture.in_chans,
            num_classes=num_classes,
            stem_stride=weights.architecture.stem_stride,
            drop_path_rate=cfg.model.drop_path_rate,
            head_init_scale=scale,
        )
    else:
        model = build_dense(
            weights,
            num_classes=None if cfg.eval_only else num_classes,
            drop_path_rate=cfg.model.drop_path_rate,
            head_init_scale=scale,
        )
        logger.info("loaded %d tensors from %s", len(weights.state), cfg.model.init)
    if cfg.model.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm is not typed
    return model


def class_weights(
    setting: str | list[float] | None, labels: Sequence[int] | NDArray[np.int64], num_classes: int
) -> list[float] | None:
    """Weights of the classes in the loss; "balanced" is inverse to their frequency, with a mean of 1 over the images.

    Raises ValueError if a list has not one weight a class.
    """
    if setting is None:
        return None
    if isinstance(setting, str):
        counts = np.bincount(labels, minlength=num_classes)
        balanced: list[float] = (len(labels) / (num_classes * np.maximum(counts, 1))).tolist()
        return balanced
    if len(setting) != num_classes:
        raise ValueError(
            f"regularization.class_weights has {len(setting)} values for {num_classes} classes: give one a class"
        )
    return setting


def train(
    cfg: FinetuneConfig,
    run: RunDirectory,
    accelerator: Accelerator,
    net: nn.Module,
    weights: Weights,
    train_index: Images,
    val_index: Images,
    stop: StopSignal,
) -> None:
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    names, labels, regularization = weights.class_names, train_index.labels, cfg.regularization
    assert labels is not None
    per_epoch = 0 if cfg.eval_only else steps_per_epoch(len(train_index), cfg.batch_size)
    total = per_epoch * cfg.epochs

    net = net.to(device)
    ema = ModelEmaV3(net, decay=regularization.ema_decay) if regularization.ema_decay and not cfg.eval_only else None
    depths = VARIANTS[weights.architecture.variant].depths
    scale = optim.layer_decay_scale(depths, cfg.optim.layer_decay, cfg.optim.layer_decay_mode)
    groups = optim.parameter_groups(net, cfg.optim.weight_decay, scale)
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=cfg.optim.betas, fused=True)
    start, best = 0, {"balanced_accuracy": -1.0, "step": 0}
    if (resume := run.resume_from) is not None:
        meta = checkpoint.restore(resume, net, adamw, fingerprint(train_index, val_index))
        start, best = meta.step, meta.progress["best"]
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(meta.progress["scaler"])
        if ema is not None:
            ema.module.load_state_dict(checkpoint.read_tensors(resume, "ema"))

    workers = cfg.data.num_workers
    if workers is None:
        workers = default_num_workers(device.type, local_processes())
    crop = CropAndFlip(cfg.data.in_chans, cfg.data.image_size, cfg.data.crop_scale, cfg.data.hflip, cfg.data.vflip)
    augment = FinetuneAugment(
        crop,
        auto_augment=cfg.data.auto_augment,
        random_erasing=cfg.data.random_erasing,
        mean=weights.image["mean"],
        std=weights.image["std"],
    )
    in_chans, height, width = weights.image["input_size"]
    sizes: dict[str, Any] = {"in_chans": in_chans, "image_size": (height, width), "seed": cfg.seed}
    train_set = FinetuneDataset(train_index, augment=augment, **sizes)
    val_set = FinetuneDataset(val_index, crop_pct=weights.image["crop_pct"], **sizes)
    val_batches = evaluation_batches(
        len(val_index), max(1, cfg.batch_size // processes // cfg.grad_accum), rank, processes
    )
    val_loader = build_loader(val_set, val_batches, num_workers=workers, device_type=device.type)
    normalize = Normalize(weights.image["mean"], weights.image["std"]).to(device)

    balance = class_weights(regularization.class_weights, labels, len(names))
    balance_tensor = None if balance is None else torch.tensor(balance, device=device)
    mixup = None
    if regularization.mixup or regularization.cutmix:
        mixup = Mixup(
            mixup_alpha=regularization.mixup,
            cutmix_alpha=regularization.cutmix,
            label_smoothing=regularization.label_smoothing,
            num_classes=len(names),
        )

    def trial() -> None:
        num = cfg.batch_size // processes // cfg.grad_accum
        with accelerator.autocast():
            logits = net(torch.randn(num, in_chans, height, width, device=device))
        logits.float().mean().backward()

    compile_model(net, cfg.model.compile, trial, (total - start) * cfg.grad_accum)
    # The optimizer's state is where it has to be, beside the parameters.
    model, optimizer = accelerator.prepare(net, adamw, device_placement=[True, False])
    metrics = Metrics(run.path / "metrics.jsonl", accelerator, start)
    bad_files = BadFiles(run.path / "bad_files.txt", len(train_index) + len(val_index), cfg.data.max_bad_share)

    def loss_of(batch: Batch) -> Tensor:
        assert batch.labels is not None
        images, target, smoothing = normalize(batch.images), batch.labels, regularization.label_smoothing
        if mixup is not None:
            images, target = mixup(images, target)  # the targets come smoothed
            smoothing = 0.0
        logits = model(images).float()
        # The sum over the number of images, not torch's weighted mean: its divisor would differ between the parts and
        # processes that a batch is computed in.
        loss = F.cross_entropy(logits, target, weight=balance_tensor, label_smoothing=smoothing, reduction="sum")
        return loss / len(images)

    def evaluate(step: int, place: str = "") -> None:
        """Scores on the held-out images, of the moving average too; the best and the last model are exported."""
        assert val_index.labels is not None
        values: dict[str, float] = {}
        for prefix, network in (("", net), ("ema_", ema.module if ema is not None else None)):
            if network is not None:
                positions, probabilities, bad = class_probabilities(network, val_loader, normalize, accelerator)
                if accelerator.is_main_process:
                    bad_files.add(bad)
                if len(positions) == 0:
                    raise ValueError(f"none of the {len(val_index)} held-out images can be read: see data.val_path")
                truth = val_index.labels[positions]
                found = scores(truth, probabilities)
                values |= {prefix + name: value for name, value in found.items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(f"step {step}: the validation loss is not finite: {values}")
        metrics.write(step, step / max(per_epoch, 1), **values)
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        logger.info("step %d: %s on %d images", step, text, len(positions))
        if not accelerator.is_main_process:
            return
        # What is exported and compared is the moving average where there is one, the weights themselves otherwise.
        places = [place] if place else []
        if not cfg.eval_only:
            exported = ema.module if ema is not None else net
            if found["balanced_accuracy"] > best["balanced_accuracy"]:
                best.update(balanced_accuracy=found["balanced_accuracy"], step=step)
                places.append("best")
            if step == total:
                places.append("last")
            for name in places:
                origin = {"run": str(run.path), "init": cfg.model.init, "step": step, **found}
                save_dense(run.path / name, exported, replace(weights, origin=origin))
        for name in places:
            paths = val_index.subset(positions).names()
            write_predictions(run.path / name / "predictions.csv", paths, probabilities, names, truth.tolist())

    def save(step: int) -> None:
        if accelerator.is_main_process:
            progress = {"best": best, "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}
            images = fingerprint(train_index, val_index)
            meta = checkpoint.Meta("finetune", step, cfg.model_dump(mode="json"), images, progress)
            tensors = {"model": net.state_dict(), "optimizer": checkpoint.optimizer_state(adamw, net)}
            if ema is not None:
                tensors["ema"] = ema.module.state_dict()
            checkpoint.save(run.path, meta, tensors)
            checkpoint.prune(run.path, cfg.checkpoint.keep, cfg.checkpoint.milestone_epochs * per_epoch)

    if cfg.eval_only:
        evaluate(0, ".")
        return
    logger.info(
        "%s: %d training images of %d classes, %d held out",
        weights.architecture.variant,
        len(train_index),
        len(names),
        len(val_index),
    )
    finished = fit(
        cfg,
        cfg.optim,
        run,
        accelerator,
        model,
        optimizer,
        train_set,
        loss_of,
        start_step=start,
        steps_per_epoch=per_epoch,
        num_images=len(train_index),
        num_workers=workers,
        metrics=metrics,
        bad_files=bad_files,
        stop=stop,
        evaluate=evaluate,
        save=save,
        after_step=(lambda: ema.update(net)) if ema is not None else lambda: None,
    )
    if finished:
        logger.info("best and last model: %s, %s", run.path / "best", run.path / "last")
