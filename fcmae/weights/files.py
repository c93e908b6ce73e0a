"""Weights in files: reading them from any source, writing them in any format.

`fcmae.weights.formats` knows names and shapes, `fcmae.weights.tensors` opens a file; this module handles what files and
directories hold besides tensors.

Files that we write describe themselves in one record, RECORD: in the header of a .safetensors file, beside "model" in a
.pth file. It holds a SHA-256 of itself and the tensors, which reveals changed bytes, and the encoder's output on a
fixed image, so that a reader can check that it computes what the writer did.
timm's and transformers' config.json are written here, as timm's own writer would add the licence and the origin of its
published weights.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from timm.layers import GELU
from timm.models import ConvNeXt
from torch import Tensor, nn

import fcmae
from fcmae.atomic import read_bytes, replacing, sync
from fcmae.config import FinetuneData, ImageConfig, PretrainConfig
from fcmae.config.base import near_runs
from fcmae.data.augment import Reading, seeded
from fcmae.data.geometry import MAX_CHANNELS, MAX_SIDE
from fcmae.data.source import few, one_line, printable
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import (
    VARIANTS,
    ConvNeXtSpec,
    NetworkSpec,
    Spec,
    describe,
    read_spec,
    variant_named,
    variant_of,
)
from fcmae.training import checkpoint
from fcmae.weights.formats import Architecture, from_state, network_in, to_state
from fcmae.weights.tensors import RECORD, digest, load_tensors, write_tensors

logger = logging.getLogger("fcmae")
NOT_CROPPED = 384  # side from which transformers' processors squash images

NOT_IN_TIMM = "fcmae_convnext"  # what config.json names as the architecture of a network that timm cannot hold
DIRECTORIES = ("timm", "transformers")  # the formats that are directories
FILE_SUFFIXES = (".safetensors", ".pth", ".pt")
MAX_VALUES = 2**30  # of an image that weights say they were trained on
MAX_CARD = 2**20  # bytes of a model card
HEAD = "head.safetensors"  # of a segmentation model, beside its encoder; see `fcmae.weights.segmenters`

Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]


class ImageRecord(BaseModel, frozen=True):
    """How the images were read that weights were trained on, as far as is known.

    Attributes:
        mean: one per channel, in units of a full range of 1.
        std: one per channel, in the same units.
        input_size: (C, H, W), H and W up to 8192, so that a file cannot ask for pictures that take all memory.
        crop_pct: see `fcmae.data.augment.center_box`.
        nodata: the stored value that marked missing data, whatever the files stated.
    """

    mean: tuple[FiniteFloat, ...] | None = None
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...] | None = None
    input_size: tuple[PositiveInt, Side, Side] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    nodata: FiniteFloat | None = None

    @classmethod
    def of(cls, reading: Reading) -> ImageRecord:
        """A record in which everything is known."""
        return cls(
            mean=reading.mean,
            std=reading.std,
            input_size=(reading.in_chans, *reading.image_size),
            crop_pct=reading.crop_pct,
            nodata=reading.nodata,
        )

    @property
    def in_chans(self) -> int | None:
        """Channels."""
        return None if self.input_size is None else self.input_size[0]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width."""
        return None if self.input_size is None else self.input_size[1:]

    def known(self) -> dict[str, Any]:
        """What is known, as JSON has it."""
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Weights:
    """Weights under our names, and what is known of them.

    Attributes:
        state: encoder.*, and decoder.*, norm.*, head.* where present.
        architecture: the network that they belong to.
        image: how the images were read that they were trained on.
        class_names: of the head; numbers if the file names none.
        origin: what they were made from.
        expected_output: see `encoder_output`; empty if the file has none.
        format: the format of the file.
        names: maps our names to those in the file.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    image: ImageRecord = field(default_factory=ImageRecord)
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    expected_output: tuple[float, ...] = ()
    format: str = "fcmae"
    names: dict[str, str] = field(default_factory=dict)

    @property
    def are_published(self) -> bool:
        """Whether no run of ours made them."""
        return not {"run", "step"} & self.origin.keys()  # a page of the hub names no run

    @property
    def license(self) -> str | None:
        """The licence that their files state for them, or for the weights that they were made from."""
        said = self.origin.get("license")
        return printable(said)[:200] if isinstance(said, str) and said else None

    def reading(self, source: str, image_size: tuple[int, int] | None = None) -> Reading:
        """How images are read for the weights: as these state, otherwise as published.

        Args:
            source: name of the weights in errors.
            image_size: height and width; None is the weights' own.

        Raises:
            ValueError: if the mean and std of the channels are unknown, or the size is below the total stride.
        """
        in_chans, image = self.architecture.in_chans, self.image
        defaults = FinetuneData(in_chans=in_chans)
        mean, std = (tuple(a or b) for a, b in zip((image.mean, image.std), defaults.statistics(), strict=True))
        if len(mean) != in_chans:
            raise ValueError(
                f"{source} does not say the mean and std of its {in_chans} channels: pretrain or fine-tune from it "
                "with --data.mean and --data.std, and give that run"
            )
        size = image_size or image.size or defaults.image_size
        if min(size) < (unit := self.architecture.spec.total_stride):
            raise ValueError(f"image_size: {list(size)} is smaller than the total stride {unit} of {source}: give more")
        return Reading(in_chans, size, image.crop_pct or defaults.crop_pct, mean, std, nodata=image.nodata)


def licensed(known: str | None) -> dict[str, str]:
    """The entry of a record for a licence, or none where none is known."""
    return {} if known is None else {"license": known}


def reading_of(data: ImageConfig, crop_pct: float = 1.0) -> Reading:
    """How images are read, from the settings of a run.

    Args:
        data: the settings.
        crop_pct: see `fcmae.data.augment.center_box`.
    """
    mean, std = map(tuple, data.statistics())
    return Reading(data.in_chans, data.image_size, crop_pct, mean, std, data.max_pixels, data.nodata)


class Record(BaseModel):
    """What a file of weights states about itself; empty for files that we did not write.

    Attributes:
        image: how its images are read.
        class_names: see `Weights`.
        origin: see `Weights`.
        expected_output: see `Weights`.
        spec: the encoder's numbers, if the file has them.
        sha256: see `fcmae.weights.tensors.digest`; earlier exports have none.
    """

    image: ImageRecord = ImageRecord()
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = {}
    expected_output: tuple[float, ...] = ()
    spec: Spec | None = None
    sha256: str | None = None


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
        key: see `read_weights`.
        prefix: see `read_weights`.
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
    return _of_timm(init, setting)


def _of_timm(name: str, setting: str) -> Weights:
    """The pretrained weights of a model of timm's."""
    if not name.startswith("convnext"):  # before it is fetched
        raise ValueError(f"{setting} = {name} is no ConvNeXt: give one of timm.list_pretrained('convnext*')")
    try:
        with seeded([0]):
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever timm, the hub's client and its network library raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{setting} = {name}: its weights cannot be had ({reason}): give a path") from error
    told = model.pretrained_cfg
    origin = {"timm": f"{told['architecture']}.{told['tag']}"}
    origin |= {"license": told["license"]} if told.get("license") else {}
    check_timm(model, f"{setting} = {name}")
    if told.get("crop_mode") == "squash":
        _tell_squashed(name)
    record = Record(image=ImageRecord.model_validate(told), origin=origin)
    return _weights(Path(name), model.state_dict(), None, record)


def check_timm(model: nn.Module, what: str) -> None:
    """Refuse a network of timm's that computes something else than ours, though its tensors may have the same names.

    Args:
        model: of any kind.
        what: it is, in errors.

    Raises:
        ValueError: if it is no ConvNeXt, or has other activations or norms.
    """
    if not isinstance(model, ConvNeXt):
        raise ValueError(f"{what} is no ConvNeXt: give another")
    activations = [block.mlp.act for stage in model.stages for block in stage.blocks]
    if not all(
        isinstance(act, nn.GELU | GELU) and getattr(act, "approximate", "none") == "none" for act in activations
    ):
        raise ValueError(f"{what} has another activation than GELU: give another")
    if {module.eps for module in model.modules() if hasattr(module, "eps")} != {1e-6}:
        raise ValueError(f"{what} has norms that add another number than 1e-6: give another")


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
    found, inside = network_in(state, prefix)
    if found and prefix is None:
        logger.warning("%s: reading the network under the prefix %r", path, found)
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
    image = ImageRecord.of(reading_of(cfg.data))
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
    record = Record(origin={"directory": path.name} | _license(path))
    try:
        config = _read_json(path / "config.json")
        if "architecture" in config:  # timm
            # Not passed to timm.create_model: a name can make it read another directory, or from the network.
            arguments, name = config.get("model_args") or {}, str(config["architecture"]).split(".")[0]
            variant = variant or (None if {"depths", "dims"} & set(arguments) or name == NOT_IN_TIMM else name)
            _check_computes(arguments.get("act_layer"), arguments.get("norm_eps"))
            if (stride := arguments.get("output_stride")) not in (None, 32):
                raise ValueError(f"its output_stride is {stride}, and that of a ConvNeXt is 32 here")
            if name != NOT_IN_TIMM and (patch := arguments.get("patch_size") or 4) > 7:
                raise ValueError(f"its patch_size is {patch}, for which timm dilates the last stage")
            pool, has_head = arguments.get("global_pool", config.get("global_pool")), config.get("num_classes") != 0
            if has_head and pool not in (None, "", "avg"):
                raise ValueError(f"its global_pool is {pool}, and that of a classifier is avg here")
            told = config.get("pretrained_cfg") or config  # as timm wrote it before
            image = ImageRecord.model_validate(told)
            if told.get("crop_mode") == "squash":
                _tell_squashed(path)
            names = config.get("label_names") or told.get("label_names") or told.get("labels") or ()
            names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
            names = tuple(map(str, names))
            record = Record(image=image, class_names=names, origin=record.origin)
        elif str(config["model_type"]).startswith("convnext"):  # transformers
            labels = config.get("id2label") or {}
            names = tuple(str(labels[key]) for key in sorted(labels, key=int))
            _check_computes(config.get("hidden_act"), None)
            if (eps := config.get("layer_norm_eps", 0.0)) > 1e-5:  # of the final norm; published ones have 1e-12
                raise ValueError(f"its layer_norm_eps is {eps}, and that of a ConvNeXt 1e-6")
            processor = path / "preprocessor_config.json"
            image = _from_processor(_read_json(processor)) if processor.is_file() else ImageRecord()
            if max(image.size or (0,)) >= NOT_CROPPED:
                _tell_squashed(path)
            record = Record(image=image, class_names=names, origin=record.origin)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: its JSON files are not those of a timm or transformers ConvNeXt: {_line(error)}"
        ) from error
    state: dict[str, Tensor] = {}
    for file in _shards(path):
        found, own = _load(file)
        state |= found
        record = record if own is None else _with_license(path, own)
    return _weights(path, state, variant, record)


def _tell_squashed(source: Path | str) -> None:
    message = "%s: its images were made square by squashing them; here and in what is exported their sides are cut off"
    logger.warning(message, source)


def _check_computes(activation: Any, norm_eps: Any) -> None:
    """Refuse a network that computes something else than ours, though its tensors have the same names."""
    if activation not in (None, "gelu"):
        raise ValueError(f"its activation is {activation}, and that of a ConvNeXt is gelu")
    if norm_eps not in (None, 1e-6):
        raise ValueError(f"its norms add {norm_eps}, and those of a ConvNeXt 1e-6")


def _with_license(path: Path, record: Record) -> Record:
    """A record that states no licence, with that of `_license`."""
    if "license" in record.origin:
        return record
    return record.model_copy(update={"origin": _license(path) | record.origin})


def _license(path: Path) -> dict[str, str]:
    """The licence stated by files that we did not write: in timm's config.json, a model card or a safetensors header.

    For released weights it is in timm's table, under their tag or the name of their file.
    """
    said: object = None
    # Other faults of the files are reported where they are read; timm raises RuntimeError for what it does not know.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError):
        if path.is_dir():
            config = _read_json(path / "config.json")
            published = config.get("pretrained_cfg") or config
            said = published.get("license") or config.get("license") or _in_card(path / "README.md")
            if not said and (tag := published.get("tag")):
                said = timm.models.get_pretrained_cfg_value(f"{config['architecture']}.{tag}", "license")
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("license")
        else:
            released = map(timm.get_pretrained_cfg, timm.list_pretrained("convnext*"))
            said = next((each.license for each in released if each and Path(str(each.url)).name == path.name), None)
        if not said and path.is_file() and path in _shards(path.parent):  # whose licence is beside it
            return _license(path.parent)
    return {"license": said} if isinstance(said, str) and said else {}


def _in_card(path: Path) -> str | None:
    """The licence in the header of a Hugging Face model card; its license_name, if there is one."""
    if not path.is_file():
        return None
    head = read_bytes(path, MAX_CARD).decode(errors="replace").split("---")[1:2]
    found = dict(re.findall(r"^(license|license_name): *[\"']?([^\"'\n]+)", "".join(head), re.M))
    return found.get("license_name") or found.get("license")


def _line(error: Exception) -> str:
    """An error in one line; of pydantic's errors, whose text shows all of the input, only the first."""
    if isinstance(error, ValidationError):
        wrong = error.errors()[0]
        return f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    return " ".join(str(error).split())


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no object")
    return content


def _from_processor(config: dict[str, Any]) -> ImageRecord:
    """Read the settings of transformers' image processor: sizes below NOT_CROPPED are cropped, the others squashed."""
    size, mean = config["size"], config["image_mean"]
    side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]  # as releases have written it
    crop_pct = config.get("crop_pct") if side < NOT_CROPPED else 1.0
    return ImageRecord(mean=mean, std=config["image_std"], input_size=(len(mean), side, side), crop_pct=crop_pct)


def _shards(path: Path) -> list[Path]:
    """The files that a directory's weights are in."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files of other directories")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not one that transformers writes: {error}") from error
        return [path / name for name in names]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
    raise ValueError(f"{path} has a config.json but no model.safetensors or pytorch_model.bin")


def _load(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], Record | None]:
    """The tensors of a file, mapped into memory, and our record of it or None."""
    state, text = load_tensors(path, key)
    if text is None:
        return state, None
    try:
        fields = json.loads(text)
        record = Record.model_validate(fields)
        said = fields.pop("sha256", None)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its record {RECORD!r} is not one of ours: {_line(error)}") from error
    # The record describes the weights that we wrote, not others beside them.
    if key in (None, "model") and said not in (None, digest(state, _dumped(fields))):
        raise ValueError(f"{path} has changed since it was written (its SHA-256 is another): copy or export it again")
    return state, record


def _dumped(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


@torch.no_grad()
def encoder_output(weights: Weights) -> tuple[float, ...]:
    """The encoder's output on a fixed image with nothing masked: 16 of its channels, averaged over the image.

    The image, (1, C, 2s, 2s) at total stride s, is sin(i) at its i-th value in row-major order. Every weight of the
    encoder takes part, so a damaged, renamed or transposed one shows; except, in V1, those of blocks that LayerScale
    still multiplies by 1e-6.
    """
    architecture = weights.architecture
    with torch.device("meta"):
        encoder = make_encoder(architecture.spec, architecture.in_chans)
    state = {k.removeprefix("encoder."): v for k, v in weights.state.items() if k.startswith("encoder.")}
    # The mapped tensors become the parameters: huge has 2.6 GB of them.
    encoder.load_state_dict(state, assign=True)
    encoder.float().eval()
    side = 2 * encoder.total_stride
    values = torch.arange(encoder.in_chans * side * side, dtype=torch.float64).sin()
    image = values.view(1, encoder.in_chans, side, side)
    features = encoder(image.float()).mean((0, 1, 2))
    output: list[float] = features[:: max(1, encoder.dim // 16)][:16].tolist()
    return tuple(output)


def timm_holds(spec: NetworkSpec) -> bool:
    """Whether timm can build it: a ConvNeXt of four stages, 4C hidden channels, a plain stem of stride 1 or 3 to 7.

    timm's stem of stride 2 comes with one more downsampling layer; from 8 on it dilates the last stage instead of
    downsampling to it, as its total stride is 32 at most.
    """
    plain = isinstance(spec, ConvNeXtSpec) and spec.hidden is None and not spec.dense_stem
    return plain and spec.num_stages == 4 and spec.stem_stride in (1, 3, 4, 5, 6, 7)


def transformers_holds(spec: NetworkSpec) -> bool:
    """Whether transformers can build it: any stages, but 7x7 kernels, 4C hidden channels and a plain stem."""
    return isinstance(spec, ConvNeXtSpec) and spec.hidden is None and spec.kernel_size == 7 and not spec.dense_stem


def save_weights(dest: Path, weights: Weights, to: str) -> None:
    """Write the weights in a format; parts for which it has no place are left out.

    Args:
        dest: see `writing_weights`.
        weights: likewise.
        to: likewise.

    Raises:
        ValueError: likewise.
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
        files = {dest / "config.json": (_timm_config if to == "timm" else _transformers_config)(weights)}
        if to == "transformers" and reads_alike(weights):
            files[dest / "preprocessor_config.json"] = _processor_config(weights)
        files[dest / "model.safetensors"] = None
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


def _timm_config(weights: Weights) -> dict[str, Any]:
    """Like timm's own writer, which would also add the licence and the origin of its published weights."""
    architecture, spec = weights.architecture, weights.architecture.spec
    name = variant_of(spec)
    arguments: dict[str, Any] = {"in_chans": architecture.in_chans, "patch_size": spec.stem_stride}
    if name is None and isinstance(spec, ConvNeXtSpec):  # a variant of timm's with other numbers
        name = "convnextv2_tiny" if spec.use_grn else "convnext_tiny"
        arguments |= {"depths": spec.depths, "dims": spec.dims, "kernel_sizes": spec.kernel_size}
    return {
        "architecture": name if timm_holds(spec) else NOT_IN_TIMM,
        "num_classes": architecture.num_classes,
        "num_features": spec.dims[-1],
        "global_pool": "avg",
        **({"label_names": list(weights.class_names)} if weights.class_names else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_mode": "center",
            **weights.image.model_copy(update={"nodata": None}).known(),  # which timm does not know
            **licensed(weights.license),
            "num_classes": architecture.num_classes,
            "pool_size": None,
            # timm adapts RGB stems to other channel counts; weights of another count are loaded as they are.
            "first_conv": "stem.0" if architecture.in_chans == 3 else None,
            "classifier": "head.fc",
        },
    }


def _transformers_config(weights: Weights) -> dict[str, Any]:
    architecture, spec = weights.architecture, weights.architecture.spec
    assert isinstance(spec, ConvNeXtSpec)
    family = "ConvNextV2" if spec.use_grn else "ConvNext"
    names = weights.class_names or tuple(f"LABEL_{i}" for i in range(architecture.num_classes))
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {
        "architectures": [f"{family}ForImageClassification" if architecture.num_classes else f"{family}Model"],
        "model_type": family.lower(),
        "num_channels": architecture.in_chans,
        "patch_size": spec.stem_stride,
        "num_stages": spec.num_stages,
        "depths": list(spec.depths),
        "hidden_sizes": list(spec.dims),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # of the final norm; the others are fixed
        **licensed(weights.license),
        **({} if weights.image.size is None else {"image_size": weights.image.size[-1]}),
        **(classes if architecture.num_classes else {}),
    }


def reads_alike(weights: Weights) -> bool:
    """Whether transformers' ConvNeXt processor can read images as in the training of these weights.

    It makes square images, from 384 pixels on by squashing them, and divides by 255.

    Args:
        weights: with what is known of their images.
    """
    height, width = weights.image.size or (224, 224)
    return learnt_bytes(weights) and height == width < NOT_CROPPED


def learnt_bytes(weights: Weights) -> bool:
    """Whether the images had 8 bits a channel, as far as their mean and std tell: those usual for photographs.

    Those of deeper images are measured, but for a recipe that does not give them; how deep images were is not stored.

    Args:
        weights: with what is known of their images.
    """
    in_chans, image = weights.architecture.in_chans, weights.image
    usual = FinetuneData(in_chans=in_chans).statistics()
    told = [list(values or ()) for values in (image.mean, image.std)]
    return in_chans in (1, 3) and told in (list(usual), [[0.5] * in_chans] * 2)


def _processor_config(weights: Weights) -> dict[str, Any]:
    """transformers' description of how images are read, for AutoImageProcessor."""
    image = weights.image
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": (image.size or (224, 224))[-1]},
        "crop_pct": image.crop_pct or 0.875,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image.mean,
        "image_std": image.std,
    }
