"""Weights as an ONNX file: a classifier or an encoder for any batch and size of images, checked by onnxruntime."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fcmae
from fcmae.atomic import UNFINISHED
from fcmae.config.commands import ExportConfig
from fcmae.data.augment import Reading
from fcmae.data.dataset import centre_crops, collate
from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.data.normalize import Normalize
from fcmae.data.shards import Parts
from fcmae.data.source import printable
from fcmae.data.split import evenly
from fcmae.data.storage import is_remote
from fcmae.heads import Classifier
from fcmae.layouts import DENSE, Layout
from fcmae.layouts.masked import Masked
from fcmae.networks.spec import describe
from fcmae.provenance import images_of_run
from fcmae.weights.convert import build_classifier, build_encoder
from fcmae.weights.files import read_weights, tell_encoder_alone
from fcmae.weights.record import Weights, licensed

NEEDED = ("onnx", "onnxscript", "onnxruntime")
NUM_IMAGES = 4  # on which outputs are compared
TOLERANCE = 1e-4  # of the largest output; float32 summed in another order stays within 1e-5


class _Plain(Masked):
    """Nothing hidden, and each layer as its equation: the fused operations of the dense layout do not exist in ONNX."""

    def __init__(self) -> None:
        super().__init__(None)

    def image_rows(self, f: Tensor) -> Tensor | None:
        return None


class Outputs(nn.Module):
    """Maps images (B, C, H, W) to a file's output: logits (B, classes), pooled features (B, dim), or each stage's map.

    Features are taken before any norm; maps are (B, dims[i], h_i, w_i).

    Args:
        weights: of the network, with a head for logits.
        output: logits, pooled or pyramid.
        normalize: the normalisation of images; None if they are normalised already.
        layout: one without a mask.
    """

    def __init__(self, weights: Weights, output: str, normalize: Normalize | None, layout: Layout) -> None:
        super().__init__()
        self.net = build_classifier(weights) if output == "logits" else build_encoder(weights)
        self.output, self.normalize, self.layout = output, normalize, layout
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.normalize is not None:
            images = self.normalize(images)
        if isinstance(self.net, Classifier):
            return (self.net(images, self.layout),)
        maps = self.net.pyramid(images, self.layout)
        return (maps[-1].mean((1, 2)),) if self.output == "pooled" else tuple(f.permute(0, 3, 1, 2) for f in maps)


def export_onnx(cfg: ExportConfig) -> str:
    """Write an ONNX file, compare the outputs of onnxruntime and torch on images, and say how well they agree.

    Batch, height and width are free: several images together and one that is wider are compared. If the weights take
    more than 2 GB, they are in a second file beside it, DEST.data.

    Args:
        cfg: what to write of which weights, in float32, and which images to compare on; by default those of the run
            if they lie on this machine, or synthetic ones.

    Raises:
        ValueError: if a package is missing, cfg.dest is not a new .onnx file, the weights have no head for logits, none
            of the images can be read, or the outputs differ by more than TOLERANCE of the largest.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'fcmae[onnx]'")
    if cfg.dest.suffix != ".onnx":
        raise ValueError(f"dest = {cfg.dest}: give it a name in .onnx")
    for path in (cfg.dest, _data_of(cfg.dest)):
        if os.path.lexists(path):
            raise ValueError(f"{path} exists: give a new path, or remove it")
    tell_encoder_alone(cfg.model)
    weights = read_weights(cfg.model, key=cfg.key, prefix=cfg.prefix)
    spec, num_classes = weights.architecture.spec, weights.architecture.num_classes
    output = cfg.output or ("logits" if num_classes else "pooled")
    if output == "logits" and not num_classes:
        raise ValueError(f"output = logits, but {cfg.model} has no classifier: use pooled or pyramid")
    reading = weights.reading(str(cfg.model))
    images, what = _images(cfg, reading)
    inside = reading.normalize if cfg.normalize else None
    names: list[str] = [output] if output != "pyramid" else [f"stage{i + 1}" for i in range(spec.num_stages)]
    cfg.dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cfg.dest.parent) as folder:
        aside = Path(folder) / cfg.dest.name
        _write(aside, Outputs(weights, output, inside, _Plain()), names, _described(weights, cfg.normalize))
        error = _difference(aside, Outputs(weights, output, inside, DENSE), images)
        if not error <= TOLERANCE:
            raise ValueError(
                f"{cfg.model}: onnxruntime and torch differ by {error:.1e} of the largest output on {what}, more than "
                f"{TOLERANCE:.0e}: nothing was written"
            )
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the file of weights, if there is one, is first
            file.replace(cfg.dest.with_name(file.name))
    taken = "images as fcmae reads them" if cfg.normalize else "normalised images"
    return (
        f"wrote {cfg.dest}: {', '.join(names)} of {describe(spec)} from {taken} (batch, {reading.in_chans}, height, "
        f"width)\nonnxruntime and torch differ by at most {error:.1e} of the largest output, on {what} (allowed "
        f"{TOLERANCE:.0e})"
    )


def _data_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _is_elsewhere(images: Images) -> bool:
    names = [images.name(i) for i in evenly(len(images), NUM_IMAGES)]
    return isinstance(images.source, Parts) and any(map(is_remote, (*images.source.shards, *names)))


def _images(cfg: ExportConfig, reading: Reading) -> tuple[Tensor, str]:
    """Images as the file takes them, (B, C, H, W) float32, and what they are."""
    found = find_images(cfg.images, key="images") if cfg.images else images_of_run(cfg.model)
    if found is not None and not cfg.images and _is_elsewhere(found):
        found = None  # no request goes to places that a run of somebody's names
    if found is not None:
        dataset = centre_crops(reading, found)
        samples = [dataset[(0, i)] for i in evenly(len(found), NUM_IMAGES)]
        if not (readable := [sample for sample in samples if sample.valid]):
            name, reason = samples[0].bad[0]
            raise ValueError(f"{name} cannot be read ({reason}): name images to compare with by --images")
        images, what = reading.normalize(collate(readable).images), f"{len(readable)} images such as {found.name(0)}"
        return (reading.normalize.inverse(images) if cfg.normalize else images), printable(what)
    images = torch.rand(2, reading.in_chans, *reading.image_size, generator=torch.Generator().manual_seed(0))
    return (images if cfg.normalize else reading.normalize(images)), "made-up images, as --images names none"


def _described(weights: Weights, normalize: bool) -> dict[str, str]:
    """What the file states about itself, as JSON except for the licence and the version."""
    said: dict[str, Any] = {
        "class_names": weights.class_names,
        **weights.image.known(),
        "normalizes": normalize,
        "origin": weights.origin,
    }
    texts = {key: json.dumps(value) for key, value in said.items()}
    return texts | licensed(weights.license) | {"fcmae": fcmae.__version__}


def _write(path: Path, model: Outputs, names: list[str], described: dict[str, str]) -> None:
    encoder = model.net.encoder if isinstance(model.net, Classifier) else model.net
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    example = torch.zeros(2, encoder.in_chans, 2 * encoder.total_stride, 3 * encoder.total_stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's warnings about itself
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": free},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The exporter notes which line of which file here each node comes from.
    graph = program.model.graph
    noted: Any
    for noted in (*graph.inputs, *graph.outputs, *(part for node in graph for part in (node, *node.outputs))):
        noted.metadata_props.clear()
    program.model.metadata_props.update(described)
    program.save(path)


@torch.no_grad()
def _difference(path: Path, expected: Outputs, images: Tensor) -> float:
    """The largest difference of onnxruntime's and torch's outputs, as a share of the largest value of each output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    width = images.shape[3]
    wider = torch.cat([images[:1], images[:1]], dim=3)[..., : width + width // 2 + 1]
    found = [
        (torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max()
        for given in (images, wider)
        for theirs, ours in zip(session.run(None, {"images": given.numpy()}), expected(given), strict=True)
    ]
    return float(torch.stack(found).max())  # NaN if any is
