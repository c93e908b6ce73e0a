"""Compare what the channels of models do on the same images: figures, analysis.json and a table."""

from __future__ import annotations

import json
import math
import shlex
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
from fcmae import options
from fcmae.atomic import write_text
from fcmae.config.commands import AnalyzeConfig
from fcmae.data.dataset import check_values
from fcmae.data.find import find_images, find_labelled
from fcmae.data.index import Images
from fcmae.data.split import evenly
from fcmae.evaluation.analysis import LayerStatistics, activation_maps, as_encoder, grn_norms, measure
from fcmae.evaluation.features import batches_of
from fcmae.evaluation.figures import last_of_stages, save_activations, save_by_layer, save_selectivity
from fcmae.evaluation.models import Backbone, choose_device, load_backbones
from fcmae.evaluation.outputs import claim, default_out, tell_unread
from fcmae.evaluation.pictures import displayable, limits, with_bands
from fcmae.options.line import flags
from fcmae.tables import table
from fcmae.training.own_files import FOUND, check_outside
from fcmae.training.records import device_name

RECORD = "analysis.json"
FEW = 10  # images per class, below which the largest of their means is mostly chance


@dataclass(frozen=True)
class Analysis:
    """The results of one model.

    Attributes:
        backbone: the model.
        layers: statistics of each block.
        num_images: number of images that could be read.
        grn: of each block, gamma and beta (see `grn_norms`).
        image: (H, W) or (H, W, 3), in 0..1.
        maps: of some layers for that image, (channels, h, w).
    """

    backbone: Backbone
    layers: dict[str, LayerStatistics]
    num_images: int
    grn: dict[str, tuple[float, float]]
    image: NDArray[Any]
    maps: dict[str, NDArray[np.float32]]


def analyze(cfg: AnalyzeConfig) -> str:
    """Measure the models, write figures and analysis.json, and return a table.

    Raises:
        ValueError: before anything is computed, if a model is not a ConvNeXt or inputs cannot be read or used together.
    """
    began = time.perf_counter()
    place = default_out(cfg.models, cfg.out, "analysis")
    check_outside(place, {"data": cfg.data, "images": cfg.images})
    index = find_labelled(cfg.data, key="data") if cfg.data is not None else find_images(cfg.images or (), key="images")
    index.tell_notes()
    num_found = len(index)
    index = index.subset(evenly(len(index), cfg.max_images))
    where = choose_device(cfg.device)
    backbones = load_backbones(cfg.models, index, cfg.image_size, cfg.max_pixels, cfg.key, cfg.prefix, cfg.nodata)
    for backbone in backbones:
        try:
            as_encoder(backbone.model)
        except ValueError as error:
            raise ValueError(f"model = {backbone.name!r}: {error}") from None
    clear = claim(place, lambda path: path.name in FOUND["analysis"], cfg.overwrite)
    check_values(backbones[0].reading, index)
    found = [_analyze(backbone, index, where, cfg.batch_size, cfg.num_workers) for backbone in backbones]
    record = {
        "fcmae": fcmae.__version__,
        "command": _command(cfg, place),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": device_name(where),
        "data": {
            "source": cfg.images if cfg.data is None else cfg.data,
            "num_images": len(index),
            "class_names": list(index.class_names or ()),
        },
        "models": [_record(analysis) for analysis in found],
    }
    clear()
    write_text(place / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    _draw(place, found, f"{found[0].num_images:,} images")
    lines = [_table(found), f"wrote {place}"]
    num_classes = 0 if index.labels is None else len(np.unique(index.labels))
    if num_classes and len(index) < FEW * num_classes:
        lines.insert(
            1,
            f"class selectivity is too high, of {len(index) / num_classes:.3g} images a class: "
            f"{'raise --max-images' if len(index) < num_found else 'give more images'}",
        )
    return "\n".join(lines)


def _analyze(
    backbone: Backbone, index: Images, device: torch.device, batch_size: int, num_workers: int | None
) -> Analysis:
    encoder, reading, title = as_encoder(backbone.model).to(device), backbone.reading, backbone.name
    layers, bad = measure(
        encoder, reading, index, device=device, batch_size=batch_size, num_workers=num_workers, title=title
    )
    tell_unread(bad, "images")
    if not layers:
        raise ValueError(f"none of {len(index)} images can be read: {bad[0][0]}: {bad[0][1]}")
    unread = {name for name, _ in bad}
    first = index.subset([next(i for i in range(len(index)) if index.name(i) not in unread)])
    images, _ = next(iter(batches_of(reading, first, device=device)))
    shown = reading.normalize.inverse(images[0].cpu())
    chosen = last_of_stages(list(layers))
    maps = activation_maps(encoder, images[0], chosen)
    encoder.cpu()
    return Analysis(
        backbone=backbone,
        layers=layers,
        num_images=len(index) - len(bad),
        grn=grn_norms(encoder),
        image=displayable(shown, *limits(shown)),
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
        with_bands(
            "Channels' activations for one image (dark all over: dead; bright all over: saturated)",
            found[0].backbone.reading.in_chans,
        ),
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
        "architecture": backbone.kind,
        "image_size": list(backbone.reading.image_size),
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


def _command(cfg: AnalyzeConfig, place: Path) -> str:
    found = options.changed(cfg.model_copy(update={"out": place, "overwrite": False}))
    return shlex.join(["fcmae", "analyze", *found.pop("models"), *flags(found)])
