"""Classify images with a fine-tuned model."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from accelerate import Accelerator
from tqdm import tqdm

from fcmae.classification import class_probabilities, write_predictions
from fcmae.config.commands import PredictConfig
from fcmae.data.index import find_images
from fcmae.data.loader import evaluation_loader
from fcmae.data.source import printable
from fcmae.weights.convert import build_classifier
from fcmae.weights.files import read_weights


def predict(cfg: PredictConfig) -> None:
    """Print path, class and probability of every image, and write them to a CSV file if one is named.

    Files that cannot be read are named on stderr.

    Raises:
        ValueError: if the model has no classifier, or cfg.csv exists.
    """
    if cfg.csv is not None and os.path.lexists(cfg.csv):  # a link that leads nowhere too
        raise ValueError(f"csv = {cfg.csv} exists: give a new path, or remove it")
    weights = read_weights(cfg.model)
    if not weights.architecture.num_classes:
        raise ValueError(f"{cfg.model} has no classifier: give a fine-tuned model")
    accelerator = Accelerator(cpu=cfg.device == "cpu")
    model = build_classifier(weights).to(accelerator.device).eval()
    reading = replace(weights.reading(str(cfg.model), cfg.image_size), max_pixels=cfg.max_pixels)
    images = find_images(cfg.images)
    reading.check_values(images)
    loader = evaluation_loader(
        reading, images, cfg.batch_size, num_workers=cfg.num_workers, device_type=accelerator.device.type
    )
    normalize = reading.normalize.to(accelerator.device)
    batches = tqdm(loader, unit="batch", disable=None)
    positions, probabilities, bad = class_probabilities(model, batches, normalize, accelerator)
    names = images.subset(positions).names()
    if cfg.csv is not None:
        write_predictions(cfg.csv, names, probabilities, weights.class_names)
    for name, row in zip(names, probabilities, strict=True):
        best = int(row.argmax())
        print(f"{printable(name)}\t{printable(weights.class_names[best])}\t{row[best]:.4f}")
    for name, reason in bad:
        print(f"{printable(name)}: {reason}", file=sys.stderr)
