"""Classify images with a fine-tuned model."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import compress

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from fcmae.classification import add_predictions, open_table, probabilities_of
from fcmae.config.commands import PredictConfig
from fcmae.data.index import find_images
from fcmae.data.loader import evaluation_loader
from fcmae.data.source import printable
from fcmae.weights.convert import build_classifier
from fcmae.weights.files import read_weights


def predict(cfg: PredictConfig) -> None:
    """Print path, class and probability of every image as it comes, and write them to a CSV file if one is named.

    Files that cannot be read are named on stderr.

    Raises:
        ValueError: if the model has no classifier, cfg.csv exists, or no image can be classified.
    """
    if cfg.csv is not None and os.path.lexists(cfg.csv):  # a link that leads nowhere too
        raise ValueError(f"csv = {cfg.csv} exists: give a new path, or remove it")
    weights = read_weights(cfg.model, key=cfg.key, prefix=cfg.prefix)
    class_names = weights.class_names
    if not class_names:
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
    num_done, first_bad, is_read = 0, "", True
    with ExitStack() as stack:
        table = None
        if cfg.csv is not None:
            cfg.csv.parent.mkdir(parents=True, exist_ok=True)
            table = stack.enter_context(open_table(cfg.csv, class_names, labelled=False))
        for batch in tqdm(loader, unit="batch", disable=None):
            bad, readable = batch.bad, batch.select(batch.valid)
            if len(readable.index):
                names = images.subset(readable.index.numpy()).names()
                probabilities = probabilities_of(model, readable, normalize, accelerator)
                finite = [bool(np.isfinite(row).all()) for row in probabilities]
                bad = bad + [
                    (names[i], "its probabilities are not finite")
                    for i, is_finite in enumerate(finite)
                    if not is_finite
                ]
                names, probabilities = list(compress(names, finite)), probabilities[finite]
                if table is not None:
                    add_predictions(table, names, probabilities, class_names)
                best = probabilities.argmax(axis=1)
                try:
                    for name, i, row in zip(names, best, probabilities, strict=True) if is_read else ():
                        print(f"{printable(name)}\t{printable(class_names[i])}\t{row[i]:.4f}")
                except BrokenPipeError:  # the table is written whole all the same
                    if table is None:
                        raise
                    is_read = False
                num_done += len(names)
            for name, reason in bad:
                line = f"{printable(name)}: {printable(reason)}"
                first_bad = first_bad or line
                print(line, file=sys.stderr)
    if not num_done:
        if cfg.csv is not None:
            cfg.csv.unlink()
        raise ValueError(f"none of {len(images)} images could be classified: {first_bad}")
