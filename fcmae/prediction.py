"""Classify images with a fine-tuned model."""

from __future__ import annotations

import sys

from accelerate import Accelerator
from tqdm import tqdm

from fcmae.classification import class_probabilities, write_predictions
from fcmae.config import FinetuneData
from fcmae.config.commands import PredictConfig
from fcmae.data.dataset import FinetuneDataset
from fcmae.data.index import find_images
from fcmae.data.loader import build_loader, default_num_workers
from fcmae.data.normalize import Normalize
from fcmae.data.sampler import evaluation_batches
from fcmae.weights.convert import build_dense
from fcmae.weights.files import read_weights


def predict(cfg: PredictConfig) -> None:
    """Print path, class and probability of every image, and write them to a CSV file if one is named.

    Files that cannot be read are named on stderr.

    Raises:
        ValueError: If the model has no classifier, or cfg.csv exists.
    """
    model_dir, csv = cfg.model, cfg.csv
    if csv is not None and csv.exists():
        raise ValueError(f"csv = {csv} exists: give a new path, or remove it")
    weights = read_weights(model_dir)
    if not weights.architecture.num_classes:
        raise ValueError(f"{model_dir} has no classifier: give a fine-tuned model")
    accelerator = Accelerator(cpu=cfg.device == "cpu")
    model = build_dense(weights)
    model.to(accelerator.device).eval()

    index = find_images(cfg.images)
    # What the file does not say of its images is as published.
    image = weights.image
    defaults = FinetuneData(in_chans=weights.architecture.in_chans)
    in_chans, height, width = image.get("input_size", (defaults.in_chans, *defaults.image_size))
    mean, std = (torch.tensor(image.get(k, v)) for k, v in zip(("mean", "std"), defaults.statistics(), strict=True))
    height, width = cfg.image_size or (height, width)
    if len(mean) != in_chans:
        raise ValueError(f"{model_dir} does not say the mean and std of its {in_chans} channels: export it with fcmae")
    dataset = FinetuneDataset(
        images,
        in_chans=in_chans,
        image_size=(height, width),
        seed=0,
        crop_pct=image.get("crop_pct", defaults.crop_pct),
    )
    device, workers = accelerator.device.type, cfg.num_workers
    if workers is None:
        workers = default_num_workers(device) if len(index) > cfg.batch_size else 0
    loader = build_loader(
        dataset,
        evaluation_batches(len(index), cfg.batch_size),
        num_workers=workers,
        device_type=device,
    )
    batches = tqdm(loader, unit="batch", disable=None)
    normalize = Normalize(mean, std).to(accelerator.device)
    positions, probabilities, bad = class_probabilities(model, batches, normalize, accelerator)
    names = weights.class_names
    read = images.subset(positions).names()
    for path, row in zip(read, probabilities, strict=True):
        best = int(row.argmax())
        print(f"{path}\t{names[best]}\t{row[best]:.4f}")
    for path, reason in bad:
        print(f"{path}: {reason}", file=sys.stderr)
    if csv is not None:
        write_predictions(csv, read, probabilities, names)
