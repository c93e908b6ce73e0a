"""Compare what the channels of models do on the same images: figures, analysis.json and a table."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fcmae
from fcmae.atomic import write_text
from fcmae.data.dataset import denormalize
from fcmae.data.index import FileIndex, find_images, find_labelled
from fcmae.data.loader import default_num_workers
from fcmae.evaluation.analysis import Layer, activation_maps, blocks, grn_norms, measure, spread
from fcmae.evaluation.features import BATCH_SIZE, batches_of
from fcmae.evaluation.figures import last_of_stages, save_activations, save_by_layer, save_selectivity
from fcmae.evaluation.models import Backbone, choose_device, load_backbone
from fcmae.evaluation.outputs import claim, default_out
from fcmae.pictures import displayable
from fcmae.tables import table
from fcmae.training.run import FOUND, cpu_name

RECORD = "analysis.json"
FEW = 10  # images a class, below which the largest of their means is mostly chance


@dataclass(frozen=True)
class Analysis:
    """Of one model. grn: of each block, gamma and beta (see `grn_norms`). image: (H, W) or (H, W, 3), in 0..1.

    maps: of some layers for that image, (channels, h, w).
    """

    backbone: Backbone
    layers: dict[str, Layer]
    num_images: int
    grn: dict[str, tuple[float, float]]
    image: NDArray[Any]
    maps: dict[str, NDArray[np.float32]]


def analyze(
    models: Sequence[str],
    images: Sequence[str] | None = None,
    data: str | None = None,
    out: Path | None = None,
    *,
    max_images: int = 1000,
    image_size: tuple[int, int] | None = None,
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> str:
    """Measure the models, write figures and analysis.json, and return a table.

    models: see `load_backbone`; ConvNeXts. images: images, folders, lists or glob patterns; or data: labelled images,
    see `find_labelled`, for class selectivity too. out: by default RUN/analysis, for RUN and random:RUN. max_images: of
    more, that many are taken, evenly spread over their sorted paths. image_size: height and width; None is each
    model's own. num_workers: None chooses. device: auto or cpu. overwrite: replace an earlier analysis there.
    Raises ValueError, before anything is computed, if a model is no ConvNeXt or something cannot be read or used
    together.
    """
    began = time.perf_counter()
    place = default_out(models, out, "analysis")
    if (images is None) == (data is None):
        raise ValueError("images and data: give one of them, the images without or with labels")
    index = find_images(images, key="images") if images is not None else find_labelled(str(data), key="data")
    index = index.subset(spread(len(index), max_images))
    where = choose_device(device)
    if num_workers is None:
        num_workers = default_num_workers(where.type) if len(index) > batch_size else 0
    backbones = [load_backbone(model, image_size) for model in models]
    for backbone in backbones:
        try:
            blocks(backbone.model)
        except ValueError as error:
            raise ValueError(f"model = {backbone.name!r}: {error}") from None
    claim(place, lambda path: path.name in FOUND["analysis"], overwrite)
    found = [_analyze(backbone, index, where, batch_size, num_workers) for backbone in backbones]
    record = {
        "fcmae": fcmae.__version__,
        "command": _command(models, images, data, place, max_images, image_size),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": torch.cuda.get_device_name() if where.type == "cuda" else cpu_name(),
        "data": {
            "source": list(images) if images is not None else data,
            "num_images": len(index),
            "class_names": list(index.class_names or ()),
        },
        "models": [_record(analysis) for analysis in found],
    }
    write_text(place / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    _draw(place, found, f"{found[0].num_images:,} images")
    lines = [_table(found), f"wrote {place}"]
    num_classes = len(set(index.labels or ()))
    if num_classes and len(index) < FEW * num_classes:
        lines.insert(
            1,
            f"class selectivity is too high, of {len(index) / num_classes:.3g} images a class: raise --max-images",
        )
    return "\n".join(lines)


def _analyze(backbone: Backbone, index: FileIndex, device: torch.device, batch_size: int, num_workers: int) -> Analysis:
    backbone.model.to(device)
    layers, bad = measure(
        backbone, index, device=device, batch_size=batch_size, num_workers=num_workers, title=backbone.name
    )
    for path, reason in bad:
        print(f"{path}: {reason}", file=sys.stderr)
    if not layers:
        raise ValueError(f"none of {len(index)} images can be read: {bad[0][0]}: {bad[0][1]}")
    unread = {path for path, _ in bad}
    first = index.subset([next(i for i, path in enumerate(index.paths) if path not in unread)])
    images, _ = next(iter(batches_of(backbone, first, device=device)))
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
    shown = denormalize(images[0], mean, std)
    chosen = last_of_stages(list(layers))
    maps = activation_maps(backbone.model, images[0], chosen)
    backbone.model.cpu()
    return Analysis(
        backbone=backbone,
        layers=layers,
        num_images=len(index) - len(bad),
        grn=grn_norms(backbone.model),
        image=displayable(shown, float(shown.min()), float(shown.max())),
        maps=dict(zip(chosen, maps, strict=True)),
    )


def _draw(place: Path, found: Sequence[Analysis], what: str) -> None:
    """Write the figures: GRN's if a model has it, selectivity's if there are labels."""
    models = [analysis.backbone.name for analysis in found]

    def values(key: str) -> dict[str, dict[str, float]]:
        return {a.backbone.name: {name: getattr(layer, key) for name, layer in a.layers.items()} for a in found}

    save_by_layer(
        place / "cosine_distance.png",
        models,
        {"mean cosine distance of channel pairs": values("cosine_distance")},
        f"Feature diversity: 0 is collapsed, 0.5 unrelated channels ({what})",
    )
    save_by_layer(
        place / "channels.png",
        models,
        {"dead channels": values("dead_share"), "saturated channels": values("saturated_share")},
        f"Channels that carry nothing: nearly zero, or on everywhere ({what})",
        shares=True,
    )
    save_by_layer(
        place / "effective_rank.png",
        models,
        {"effective rank": values("effective_rank")},
        f"Effective rank of each block's pooled output ({what})",
    )
    grn = {a.backbone.name: a.grn for a in found if a.grn}
    if grn:
        gamma, beta = (
            {model: {name: pair[i] for name, pair in norms.items()} for model, norms in grn.items()} for i in (0, 1)
        )
        save_by_layer(
            place / "grn.png",
            models,
            {"gamma": gamma, "beta": beta},
            "GRN's parameters, root mean square over channels",
        )
    selectivity = {
        a.backbone.name: {n: layer.selectivity for n, layer in a.layers.items() if layer.selectivity is not None}
        for a in found
    }
    if all(selectivity.values()):
        save_selectivity(
            place / "selectivity.png", selectivity, f"Class selectivity index of channels, dashed: its mean ({what})"
        )
    save_activations(
        place / "activations.png",
        [(a.backbone.name, a.image, a.maps) for a in found],
        "Channels' activations for one image (dark all over: dead; bright all over: saturated)",
    )


def _record(analysis: Analysis) -> dict[str, Any]:
    backbone = analysis.backbone
    layers = []
    for name, layer in analysis.layers.items():
        values: dict[str, Any] = {
            "name": name,
            "num_channels": layer.num_channels,
            "cosine_distance": _finite(layer.cosine_distance),
            "dead_share": _finite(layer.dead_share),
            "saturated_share": _finite(layer.saturated_share),
            "effective_rank": _finite(layer.effective_rank),
        }
        if name in analysis.grn:
            values["grn_gamma"], values["grn_beta"] = map(_finite, analysis.grn[name])
        if layer.selectivity is not None:
            counts, _ = np.histogram(layer.selectivity, 25, (0, 1))
            values["selectivity"] = {
                "mean": _finite(float(layer.selectivity.mean())),
                "median": _finite(float(np.median(layer.selectivity))),
                "counts": counts.tolist(),  # of 25 equal bins from 0 to 1
            }
        layers.append(values)
    return {
        "name": backbone.name,
        "architecture": backbone.architecture.variant if backbone.architecture else type(backbone.model).__name__,
        "image_size": list(backbone.image_size),
        "num_images": analysis.num_images,
        "origin": backbone.origin,
        "layers": layers,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(found: Sequence[Analysis]) -> str:
    """A row for each model: means over its layers, the lowest cosine distance, and the last block's rank."""
    header = [
        "model",
        "cosine distance",
        "lowest, in",
        "dead",
        "saturated",
        "effective rank",
        "GRN gamma",
        "selectivity",
    ]
    rows = []
    for analysis in found:
        layers = analysis.layers
        worst = min(layers, key=lambda name: layers[name].cosine_distance)
        last = list(layers.values())[-1]
        gammas = [gamma for gamma, _ in analysis.grn.values()]
        selective = [layer.selectivity.mean() for layer in layers.values() if layer.selectivity is not None]
        rows.append(
            [
                analysis.backbone.name,
                f"{np.mean([layer.cosine_distance for layer in layers.values()]):.3f}",
                f"{layers[worst].cosine_distance:.3f} {worst.removeprefix('stages.')}",
                f"{np.mean([layer.dead_share for layer in layers.values()]):.1%}",
                f"{np.mean([layer.saturated_share for layer in layers.values()]):.1%}",
                f"{last.effective_rank:.1f}",
                f"{np.mean(gammas):.3g}" if gammas else "-",
                f"{np.mean(selective):.3f}" if selective else "-",
            ]
        )
    return table(header, rows)


def _command(
    models: Sequence[str],
    images: Sequence[str] | None,
    data: str | None,
    out: Path,
    max_images: int,
    image_size: tuple[int, int] | None,
) -> str:
    words = ["fcmae", "analyze", *models, *(["--images", *images] if images is not None else ["--data", str(data)])]
    words += ["--out", str(out), "--max-images", str(max_images)]
    if image_size is not None:
        words += ["--image-size", *map(str, image_size)]
    return shlex.join(words)
