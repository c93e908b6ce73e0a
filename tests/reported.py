"""Shared by the tests of reports: run directories as training leaves them, made without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from runs import config

import fcmae
from fcmae import options
from fcmae.config import FinetuneConfig, FinetuneData, FinetuneModel
from fcmae.data.index import Images

LAYERS = ("stages.0.0", "stages.1.0", "stages.2.0", "stages.3.0")
START = {
    "time": "2030-01-02T03:04:05+00:00",
    "versions": {"fcmae": fcmae.__version__, "torch": "2.9.0"},
    "device": "cpu",
    "device_name": "some CPU",
    "num_processes": 1,
    "cpu": "some CPU",
    "cores": 2,
    "directory": "/somewhere",
    "command": "fcmae pretrain --out run",
}


def pretrain_run(path: Path, num_epochs: int = 6, **changed: Any) -> Path:
    """A pretraining of 10 steps an epoch, logged every other step and evaluated after each epoch."""
    images = [str(path / f"{number}.png") for number in range(50)]
    cfg = config(path / "photos", path, epochs=num_epochs, data__val_share=0.2, **changed)
    _begin(path, "pretrain", options.dump(cfg))
    Images.of_files(images).save(path / "files.json")
    lines: list[dict[str, float]] = []
    rng = np.random.default_rng(0)
    for step in range(2, 10 * num_epochs + 1, 2):
        place, loss = (
            {"step": step, "epoch": step / 10},
            0.8 + 0.2 * math.exp(-step / 30) + 0.005 * rng.standard_normal(),
        )
        lr, norm = 1e-3 * (1 - step / (10 * num_epochs)), float(rng.random())
        line = {"loss": loss, "images_per_s": 100.5, "data_wait_s": 0.01, "data_wait_share": 0.05, "lr": lr}
        lines.append(place | line | {"grad_norm": norm})
        if step % 10 == 0:
            lines.append(place | {"val_loss": loss + 0.01})
            distances = {f"cosine_distance/{layer}": 0.45 - 0.01 * i for i, layer in enumerate(LAYERS)}
            ranks = {f"effective_rank/{layer}": 3.0 + i for i, layer in enumerate(LAYERS)}
            lines.append(place | distances | ranks | {"knn_top1": 0.3 + step / 1000})
            picture(path / "reconstructions" / f"step-{step:08d}.png", seed=step)
    write_lines(path, lines)
    return path


def finetune_run(path: Path, score: float, *, init: str | None = None, seed: int = 0) -> Path:
    """A fine-tuning of three epochs with two classes, the last evaluation below the best."""
    cfg = FinetuneConfig(
        out=path,
        epochs=3,
        seed=seed,
        batch_size=4,
        data=FinetuneData(path="labelled"),
        model=FinetuneModel(init=init, variant=None if init else "convnextv2_atto"),
    )
    _begin(path, "finetune", options.dump(cfg))
    images = [f"/labelled/{number}.png" for number in range(120)]
    Images.of_files(images[:20], (0, 1) * 10, ("a", "b")).save(path / "files.json")
    Images.of_files(images[20:], (0, 1) * 50, ("a", "b")).save(path / "val_files.json")
    lines: list[dict[str, float]] = []
    for epoch, found in ((1, score - 0.1), (2, score + 0.05), (3, score)):
        place = {"step": 5 * epoch, "epoch": float(epoch)}
        lines.append(place | {"loss": 1 / epoch, "images_per_s": 50.0, "data_wait_s": 0.0, "lr": 1e-3})
        lines.append(place | {"val_loss": 2 / epoch, "top1": found, "balanced_accuracy": found, "auroc": found})
    write_lines(path, lines)
    return path


def _begin(path: Path, kind: str, text: str) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"# fcmae {kind} {fcmae.__version__}\n{text}")
    (path / "environment.json").write_text(json.dumps([START]))


def write_lines(path: Path, lines: list[dict[str, float]]) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)


def evaluation(
    path: Path,
    model: str,
    score: float,
    class_names: tuple[str, ...] = ("a", "b"),
    stage: int | None = 4,
    num_stages: int = 4,
) -> None:
    """PATH/evaluation.json and a picture beside it: a linear probe and few labels on 400 test images."""
    probes = [
        {"probe": "linear", "stage": stage, "setting": {"lr": 0.1, "l2": 0}, "scores": {"balanced_accuracy": score}},
        {
            "probe": "few-shot",
            "stage": stage,
            "setting": {"labels": "1%", "num_images": 8, "draws": 5},
            "scores": {"balanced_accuracy": 0.61},
            "spread": {"balanced_accuracy": [0.58, 0.64]},
        },
    ]
    data = {"train": "labelled", "test": "held", "num_train": 800, "num_test": 400, "class_names": list(class_names)}
    record = {"model": model, "command": f"fcmae evaluate {model} --data labelled", "data": data, "results": probes}
    record |= {} if stage is None else {"num_stages": num_stages}
    size = 400 // len(class_names)
    matrix = [[size * (row == column) for column in range(len(class_names))] for row in range(len(class_names))]
    record["confusion"] = {"probe": "linear", "stage": stage, "matrix": matrix}
    path.mkdir(parents=True)
    (path / "evaluation.json").write_text(json.dumps(record))
    picture(path / "confusion.png")
