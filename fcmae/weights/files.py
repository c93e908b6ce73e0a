"""Weights in files: reading them from any source, writing them in any format.

`fcmae.weights.formats` knows names and shapes, `fcmae.weights.tensors` opens a file, `fcmae.weights.record` has what
files of ours say of themselves, `fcmae.weights.directories` what those of timm and transformers do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import fcmae
from fcmae.atomic import replacing, sync
from fcmae.config import PretrainConfig
from fcmae.config.base import near_runs
from fcmae.data.geometry import MAX_CHANNELS
from fcmae.data.source import few
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec, NetworkSpec, describe, read_spec, variant_named
from fcmae.training import checkpoint
from fcmae.weights.directories import (
    DIRECTORIES,
    configs_of,
    describe_directory,
    license_of,
    pretrained,
    shards,
    transformers_holds,
)
from fcmae.weights.formats import Architecture, from_state, network_in, to_state
from fcmae.weights.record import ImageRecord, Record, Weights, encoder_output, first_problem, licensed
from fcmae.weights.tensors import RECORD, digest, load_tensors, write_tensors

logger = logging.getLogger("fcmae")

FILE_SUFFIXES = (".safetensors", ".pth", ".pt")
MAX_VALUES = 2**30  # of an image that weights say they were trained on
HEAD = "head.safetensors"  # of a segmentation model, beside its encoder; see `fcmae.weights.segmenters`


def read_weights(path: Path, variant: str | None = None, key: str | None = None, prefix: str | None = None) -> Weights:
    """Weights of a run, a checkpoint, a timm or transformers directory, or a .safetensors or .pth file of any format.

    Args:
        path: one of these; of a fine-tuning run, the best ones are read.
        variant: the network that they must belong to, a name or its last word; None detects it.
        key: the entry of a .pth file that holds them, such as "model_ema"; None takes "model" or another usual one, or
            the file itself.
        prefix: the prefix of their names there, such as "student."; None detects it.

    Raises:
        ValueError: if `path` is none of these, may not be unpickled or is damaged, if an entry is missing, extra or of
            another shape (all are listed), or if numbers are not finite.
    """
    if path.is_dir() and (key or prefix):
        given = f"key {key!r}" if key else f"prefix {prefix!r}"
        raise ValueError(f"{path} is a directory, and {given} names what is inside a file: give the file")
    if (path / "best" / "config.json").is_file():
        path = path / "best"  # of a fine-tuning run
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        newest = checkpoint.latest(path)
        if newest is None:
            raise ValueError(f"{path} is a run without a checkpoint: let it reach its first one")
        path = newest
    if (path / checkpoint.META).is_file():
        return _read_checkpoint(path, variant)
    if (path / "config.json").is_file():
        return _read_directory(path, variant)
    if path.is_file():
        state, record = _load(path, key)
        record = record or Record(origin={"file": path.name})
        return _weights(path, state, variant, _with_license(path, record), prefix)
    raise ValueError(
        f"{path} is no run, checkpoint, timm or transformers directory, or file of weights: give one of these"
        f"{near_runs(path)}"
    )


def segmenter_in(path: Path) -> Path | None:
    """The directory of a segmenter: the path itself, or best/ of the run that it names; None if there is none."""
    return next((place for place in (path / "best", path) if (place / HEAD).is_file()), None)


def tell_encoder_alone(path: Path) -> None:
    """Warn, if `path` is a segmentation model, that its head is not among the weights."""
    if (place := segmenter_in(path)) is not None:
        logger.warning("%s: left out, as it makes label maps: %s; the encoder alone is taken", place, HEAD)


def read_init(init: str, key: str | None, prefix: str | None, setting: str = "model.init") -> Weights:
    """The weights that a run starts from.

    Args:
        init: path of the weights; or the name of a model of timm's, whose pretrained weights may be fetched.
        key, prefix: see `read_weights`.
        setting: the setting that names them.

    Raises:
        ValueError: see `read_weights`; if there is nothing at that path, and no such model; or if its weights cannot be
            had.
    """
    if Path(init).exists():
        return read_weights(Path(init), key=key, prefix=prefix)
    if Path(init).suffix in FILE_SUFFIXES or not timm.is_model(init):
        raise ValueError(
            f"{setting} = {init} does not exist: give a run, a checkpoint, a directory or a file of weights, or the "
            f"name of a ConvNeXt of timm's{near_runs(init)}"
        )
    if key or prefix:
        raise ValueError(f"{setting} = {init} is a model of timm's, and key and prefix are for a file: leave them out")
    state, record = pretrained(init, setting)
    return _weights(Path(init), state, None, record)


def _weights(
    path: Path, state: Mapping[str, Tensor], variant: str | None, record: Record, prefix: str | None = None
) -> Weights:
    try:
        spec = record.spec if variant is None else VARIANTS[variant_named(variant)]
        inside = _inside(path, state, prefix)
        architecture, source, ours, names = from_state({name: state[whole] for name, whole in inside.items()}, spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if broken := [names[name] for name, value in ours.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{path}: the weights are not finite, {few(broken)} among them: it is of a run that broke down; give an "
            "earlier checkpoint"
        )
    names = {name: inside[theirs] for name, theirs in names.items()}
    image, in_chans = record.image, architecture.in_chans
    sides = (*(image.size or (0, 0)), 2 * architecture.spec.total_stride)
    if in_chans > MAX_CHANNELS or in_chans * max(sides) ** 2 > MAX_VALUES:
        raise ValueError(f"{path}: images of {in_chans} channels and {max(sides)} pixels a side are not read")
    # A model with other channels may still have the statistics of RGB.
    misfits = {key: None for key in ("mean", "std") if len(getattr(image, key) or ()) != in_chans}
    image = image.model_copy(update=misfits | ({} if image.size is None else {"input_size": (in_chans, *image.size)}))
    num_classes = architecture.num_classes
    if num_classes and record.class_names and len(record.class_names) != num_classes:
        raise ValueError(f"{path} names {len(record.class_names)} classes, but its head has {num_classes}")
    # timm and transformers name classes even where there is no head.
    class_names = (record.class_names or tuple(map(str, range(num_classes)))) if num_classes else ()
    return Weights(ours, architecture, image, class_names, record.origin, record.expected_output, source, names)


def _inside(path: Path, state: Mapping[str, Tensor], prefix: str | None) -> dict[str, str]:
    """Map the names of the network in a file to the names in the file, and warn of what else is there."""
    detected, inside = network_in(state, prefix)
    if detected and prefix is None:
        logger.warning("%s: reading the network under the prefix %r", path, detected)
    if others := set(state) - set(inside.values()):
        logger.warning("%s: left out, as they are no part of the network: %s", path, few(sorted(others)))
    return inside


def _read_checkpoint(path: Path, variant: str | None) -> Weights:
    meta = checkpoint.read_meta(path)
    if meta.kind != "pretrain":
        raise ValueError(f"{path} is a {meta.kind} checkpoint: use the run's `best` or `last` directory")
    cfg = PretrainConfig.model_validate(meta.config)
    origin = {
        "run": str(cfg.out),
        "step": meta.step,
        "epochs": cfg.epochs,
        "config_sha256": hashlib.sha256(json.dumps(meta.config, sort_keys=True).encode()).hexdigest(),
        "version": meta.version,
    } | licensed(cfg.model.license)
    mean, std = map(tuple, cfg.data.statistics())
    size = (cfg.data.in_chans, *cfg.data.image_size)
    image = ImageRecord(mean=mean, std=std, input_size=size, crop_pct=1.0, nodata=cfg.data.nodata)
    spec = read_spec(meta.spec) if meta.spec else cfg.model.spec  # a caller's own model has numbers of its own
    state = checkpoint.read_tensors(path, "model")
    if meta.format == checkpoint.FORMAT:
        if cfg.model.target != "pixels":
            origin["decoder"] = f"left out, as it predicts {cfg.model.target}"
        state = _described(path, state, cfg, spec)
    return _weights(path, state, variant, Record(image=image, origin=origin, spec=spec))


def _described(path: Path, state: Mapping[str, Tensor], cfg: PretrainConfig, spec: NetworkSpec) -> dict[str, Tensor]:
    """encoder.*, plus decoder.* only if it is the plain pixel decoder that the settings describe; no format can hold
    another.
    """
    architecture = Architecture(spec, cfg.data.in_chans, cfg.model.decoder_depth, cfg.model.decoder_dim)
    plain = {name: shape for name, shape in architecture.shapes().items() if name.startswith("decoder.")}
    decoder = {name: tuple(value.shape) for name, value in state.items() if name.startswith("decoder.")}
    kept = ("encoder.", "decoder.") if decoder == plain else ("encoder.",)
    known = ("encoder.", "decoder.") if cfg.model.target != "pixels" else kept
    # A model that the caller made may have other parts.
    if others := [name for name in state if not name.startswith(known)]:
        logger.warning("%s: left out, as its settings do not describe them: %s", path, few(others))
    return {name: value for name, value in state.items() if name.startswith(kept)}


def _read_directory(path: Path, variant: str | None) -> Weights:
    """A directory as timm or transformers write it."""
    record, named = describe_directory(path)
    state: dict[str, Tensor] = {}
    for file in shards(path):
        tensors, own = _load(file)
        state |= tensors
        record = record if own is None else _with_license(path, own)
    return _weights(path, state, variant or named, record)


def _with_license(path: Path, record: Record) -> Record:
    """A record that states no licence, with that of `license_of`."""
    if "license" in record.origin:
        return record
    return record.model_copy(update={"origin": license_of(path) | record.origin})


def _load(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], Record | None]:
    """The tensors of a file, mapped into memory, and our record of it or None."""
    state, text = load_tensors(path, key)
    if text is None:
        return state, None
    try:
        fields = json.loads(text)
        record = Record.model_validate(fields)
        sha256 = fields.pop("sha256", None)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its record {RECORD!r} is not one of ours: {first_problem(error)}") from error
    # The record describes the weights that we wrote, not others beside them.
    if key in (None, "model") and sha256 not in (None, digest(state, _dumped(fields))):
        raise ValueError(f"{path} has changed since it was written (its SHA-256 is another): copy or export it again")
    return state, record


def _dumped(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def save_weights(dest: Path, weights: Weights, to: str) -> None:
    """Write the weights in a format; parts for which it has no place are left out.

    Args:
        dest, weights, to: see `writing_weights`.

    Raises:
        ValueError: see `writing_weights`.
    """
    with writing_weights(dest, weights, to):
        pass


@contextmanager
def writing_weights(dest: Path, weights: Weights, to: str) -> Iterator[dict[Path, Path]]:
    """Write the weights in a format, beside the places that they take when the block ends, on the disk by then.

    A network that timm cannot hold is still written with timm's names and files, for `read_weights`; timm refuses the
    architecture that its config.json names.

    Args:
        dest: a directory for timm and transformers; for the others a file, .safetensors, or .pth or .pt (a dict with
            "model"). Each file is written beside its place and then moved into it, and replaces one that is there.
        weights: what is written.
        to: one of FORMATS.

    Yields:
        The place and the file beside it of each.

    Raises:
        ValueError: if the format cannot hold the network: transformers requires 7x7 kernels, 4C hidden channels and a
            plain stem, and networks other than ConvNeXt go into our own file or a directory for timm.
    """
    spec = weights.architecture.spec
    if not isinstance(spec, ConvNeXtSpec):
        if to not in ("fcmae", "timm"):
            raise ValueError(f"{dest}: {to} has ConvNeXts only, and this is {describe(spec)}: use --to fcmae")
    elif to == "transformers" and not transformers_holds(spec):
        raise ValueError(
            f"{dest}: transformers' ConvNeXts have 7x7 kernels, 4C hidden channels and a plain stem: use --to fcmae"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in to_state(weights.state, spec, to).items()}
    fields = {
        "image": weights.image.known(),
        "class_names": weights.class_names,
        "origin": weights.origin | {"exported_by": f"fcmae {fcmae.__version__}"},
        "expected_output": weights.expected_output or encoder_output(weights),
        "spec": spec.model_dump(),
    }
    record = _dumped(fields | {"sha256": digest(state, _dumped(fields))})
    header = {RECORD: record} | licensed(weights.license)
    files: dict[Path, dict[str, Any] | None] = {dest: None}  # contents; None: the tensors
    if to in DIRECTORIES:
        configs = {dest / name: content for name, content in configs_of(weights, to).items()}
        files = {**configs, dest / "model.safetensors": None}
    asides = dict[Path, Path]()
    with ExitStack() as stack:  # all are written before any takes its place
        for path, config in files.items():
            aside = asides[path] = stack.enter_context(replacing(path))
            if config is not None:
                aside.write_text(json.dumps(config, indent=2), encoding="utf-8")
            elif path.suffix == ".safetensors":
                write_tensors(aside, state, header)
            else:
                _save_pth(aside, {"model": state, RECORD: record})
            sync(aside)
        yield asides


def _save_pth(path: Path, content: dict[str, Any]) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's for what the system refused it
        number = errno.EIO if shutil.disk_usage(path.parent).free else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error
