"""Models as timm and transformers have them: their directories, both ways, the licences they state, timm's by name.

Their config.json are written here, as timm's own writer would add the licence and the origin of its published weights.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.layers import GELU
from timm.models import ConvNeXt
from torch import Tensor, nn

from fcmae.atomic import read_bytes
from fcmae.config import usual_statistics
from fcmae.data.augment import seeded
from fcmae.data.source import one_line
from fcmae.networks.spec import ConvNeXtSpec, NetworkSpec, variant_of
from fcmae.weights.record import USUAL, ImageRecord, Record, Weights, first_problem, licensed

logger = logging.getLogger("fcmae")

DIRECTORIES = ("timm", "transformers")  # the formats that are directories
NOT_IN_TIMM = "fcmae_convnext"  # what config.json names as the architecture of a network that timm cannot hold
NOT_CROPPED = 384  # side from which transformers' processors squash images
MAX_CARD = 2**20  # bytes of a model card


def describe_directory(path: Path) -> tuple[Record, str | None]:
    """What a directory that timm or transformers wrote says of its weights, and the variant that timm names.

    Args:
        path: with a config.json.

    Raises:
        ValueError: if it is of no ConvNeXt, or of one that computes something else than ours.
    """
    image, names, variant = ImageRecord(), tuple[str, ...](), None
    try:
        config = _read_json(path / "config.json")
        if "architecture" in config:
            image, names, variant = _said_by_timm(path, config)
        elif str(config["model_type"]).startswith("convnext"):
            image, names = _said_by_transformers(path, config)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: its JSON files are not those of a timm or transformers ConvNeXt: {first_problem(error)}"
        ) from error
    return Record(image=image, class_names=names, origin={"directory": path.name} | license_of(path)), variant


def _said_by_timm(path: Path, config: dict[str, Any]) -> tuple[ImageRecord, tuple[str, ...], str | None]:
    """How images are read, names of classes, and the variant; None where the numbers are others than its own."""
    # Not passed to timm.create_model: a name can make it read another directory, or from the network.
    arguments, name = config.get("model_args") or {}, str(config["architecture"]).split(".")[0]
    variant = None if {"depths", "dims"} & set(arguments) or name == NOT_IN_TIMM else name
    _check_computes(arguments.get("act_layer"), arguments.get("norm_eps"))
    if (stride := arguments.get("output_stride")) not in (None, 32):
        raise ValueError(f"its output_stride is {stride}, and that of a ConvNeXt is 32 here")
    if name != NOT_IN_TIMM and (patch := arguments.get("patch_size") or 4) > 7:
        raise ValueError(f"its patch_size is {patch}, for which timm dilates the last stage")
    pool, has_head = arguments.get("global_pool", config.get("global_pool")), config.get("num_classes") != 0
    if has_head and pool not in (None, "", "avg"):
        raise ValueError(f"its global_pool is {pool}, and that of a classifier is avg here")
    published = config.get("pretrained_cfg") or config  # as timm wrote it before
    image = ImageRecord.model_validate(published)
    if published.get("crop_mode") == "squash":
        _tell_squashed(path)
    names = config.get("label_names") or published.get("label_names") or published.get("labels") or ()
    names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    return image, tuple(map(str, names)), variant


def _said_by_transformers(path: Path, config: dict[str, Any]) -> tuple[ImageRecord, tuple[str, ...]]:
    """How images are read, and names of classes."""
    labels = config.get("id2label") or {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    _check_computes(config.get("hidden_act"), None)
    if (eps := config.get("layer_norm_eps", 0.0)) > 1e-5:  # of the final norm; published ones have 1e-12
        raise ValueError(f"its layer_norm_eps is {eps}, and that of a ConvNeXt 1e-6")
    processor = path / "preprocessor_config.json"
    image = _from_processor(_read_json(processor)) if processor.is_file() else ImageRecord()
    if max(image.size or (0,)) >= NOT_CROPPED:
        _tell_squashed(path)
    return image, names


def _from_processor(config: dict[str, Any]) -> ImageRecord:
    """Read the settings of transformers' image processor: sizes below NOT_CROPPED are cropped, the others squashed."""
    size, mean = config["size"], config["image_mean"]
    side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]  # as releases have written it
    crop_pct = config.get("crop_pct") if side < NOT_CROPPED else 1.0
    return ImageRecord(mean=mean, std=config["image_std"], input_size=(len(mean), side, side), crop_pct=crop_pct)


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no object")
    return content


def _tell_squashed(source: Path | str) -> None:
    message = "%s: its images were made square by squashing them; here and in what is exported their sides are cut off"
    logger.warning(message, source)


def _check_computes(activation: Any, norm_eps: Any) -> None:
    """Refuse a network that computes something else than ours, though its tensors have the same names."""
    if activation not in (None, "gelu"):
        raise ValueError(f"its activation is {activation}, and that of a ConvNeXt is gelu")
    if norm_eps not in (None, 1e-6):
        raise ValueError(f"its norms add {norm_eps}, and those of a ConvNeXt 1e-6")


def shards(path: Path) -> list[Path]:
    """The files that a directory's weights are in.

    Raises:
        ValueError: if there are none, or their index is not one that transformers writes.
    """
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


def license_of(path: Path) -> dict[str, str]:
    """The licence stated by files that we did not write: in timm's config.json, a model card or a safetensors header.

    For released weights it is in timm's table, under their tag or the name of their file.
    """
    license_: object = None
    # Other faults of the files are reported where they are read; timm raises RuntimeError for what it does not know.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError):
        if path.is_dir():
            config = _read_json(path / "config.json")
            published = config.get("pretrained_cfg") or config
            license_ = published.get("license") or config.get("license") or _in_card(path / "README.md")
            if not license_ and (tag := published.get("tag")):
                license_ = timm.models.get_pretrained_cfg_value(f"{config['architecture']}.{tag}", "license")
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                license_ = (file.metadata() or {}).get("license")
        else:
            released = map(timm.get_pretrained_cfg, timm.list_pretrained("convnext*"))
            license_ = next((each.license for each in released if each and Path(str(each.url)).name == path.name), None)
        if not license_ and path.is_file() and path in shards(path.parent):  # whose licence is beside it
            return license_of(path.parent)
    return {"license": license_} if isinstance(license_, str) and license_ else {}


def _in_card(path: Path) -> str | None:
    """The licence in the header of a Hugging Face model card; its license_name, if there is one."""
    if not path.is_file():
        return None
    head = read_bytes(path, MAX_CARD).decode(errors="replace").split("---")[1:2]
    entries = dict(re.findall(r"^(license|license_name): *[\"']?([^\"'\n]+)", "".join(head), re.M))
    return entries.get("license_name") or entries.get("license")


def pretrained(name: str, setting: str) -> tuple[dict[str, Tensor], Record]:
    """The tensors of a model of timm's, which may be fetched, and what timm says of them.

    Args:
        name: of the model.
        setting: that names it.

    Raises:
        ValueError: if it is no ConvNeXt as ours are, or its weights cannot be had.
    """
    if not name.startswith("convnext"):  # before it is fetched
        raise ValueError(f"{setting} = {name} is no ConvNeXt: give one of timm.list_pretrained('convnext*')")
    try:
        with seeded([0]):
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever timm, the hub's client and its network library raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{setting} = {name}: its weights cannot be had ({reason}): give a path") from error
    published = model.pretrained_cfg
    origin = {"timm": f"{published['architecture']}.{published['tag']}"} | licensed(published.get("license") or None)
    check_timm(model, f"{setting} = {name}")
    if published.get("crop_mode") == "squash":
        _tell_squashed(name)
    return model.state_dict(), Record(image=ImageRecord.model_validate(published), origin=origin)


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


def configs_of(weights: Weights, to: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a directory, by name.

    Args:
        weights: that are beside them.
        to: one of DIRECTORIES.
    """
    if to == "timm":
        return {"config.json": _timm_config(weights)}
    processor = {"preprocessor_config.json": _processor_config(weights)} if reads_alike(weights) else {}
    return {"config.json": _transformers_config(weights), **processor}


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
    height, width = weights.image.size or USUAL.image_size
    return learnt_bytes(weights) and height == width < NOT_CROPPED


def learnt_bytes(weights: Weights) -> bool:
    """Whether the images had 8 bits a channel, as far as their mean and std tell: those usual for photographs.

    Those of deeper images are measured, but for a recipe that does not give them; how deep images were is not stored.

    Args:
        weights: with what is known of their images.
    """
    in_chans, image = weights.architecture.in_chans, weights.image
    usual = [list(values) for values in usual_statistics(in_chans)]
    statistics = [list(values or ()) for values in (image.mean, image.std)]
    return in_chans in (1, 3) and statistics in (usual, [[0.5] * in_chans] * 2)


def _processor_config(weights: Weights) -> dict[str, Any]:
    """transformers' description of how images are read, for AutoImageProcessor."""
    image = weights.image
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": (image.size or USUAL.image_size)[-1]},
        "crop_pct": image.crop_pct or USUAL.crop_pct,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image.mean,
        "image_std": image.std,
    }
