"""Weights from any source, into timm's dense model and into files of any format.

`fcmae.formats` knows names and shapes; here are files and directories. Nothing that is read can run code: .pth files
are unpickled with weights_only, and of all classes only argparse.Namespace, which the released checkpoints hold their
flags in, is let through. Files are mapped into memory, not read into it.

What we write says what it is in one record, FCMAE: in config.json, in the header of a .safetensors file, beside
"model" in a .pth file. It holds the encoder's output on a fixed input, so that a reader can tell that it computes what
the writer did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

import fcmae
from fcmae import checkpoint
from fcmae.config import PretrainConfig
from fcmae.encoder import VARIANTS, Encoder, init_weights
from fcmae.formats import FORMATS, Architecture, from_state, holds, rename, to_state
from fcmae.model import FCMAE
from fcmae.sparse import Masked

RECORD = "fcmae"  # the key of what we say of our own files
STEM = "encoder.downsample_layers.0.0.weight"


@dataclass(frozen=True)
class Weights:
    """Weights under our names, and what is known of them.

    state: encoder.*, and where they are there the decoder's proj, mask_token, decoder.*, pred, and norm.*, head.*.
    image: mean, std, input_size (C, H, W) and crop_pct, where known. class_names: of the head, numbers where the file
    names none. origin: what they were made from. expected_output: see `encoder_output`; empty if the file does not
    say. format: what it was in. names: our names to those in the file.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    image: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    expected_output: tuple[float, ...] = ()
    format: str = "fcmae"
    names: dict[str, str] = field(default_factory=dict)


def read_weights(path: Path, variant: str | None = None) -> Weights:
    """Weights of a run, a checkpoint, a timm or transformers directory, or a .safetensors or .pth file of any format.

    Of a fine-tuning run, the best ones. variant: what they must be of; None finds out. Raises ValueError if `path` is
    none of these, may not be unpickled, or an entry is missing, extra or of another shape (all are listed).
    """
    if (path / "best" / "config.json").is_file():
        path = path / "best"  # of a fine-tuning run
    if (path / "config.yaml").is_file():
        newest = checkpoint.latest(path)
        if newest is None:
            raise ValueError(f"{path} is a run without a checkpoint: let it reach its first one")
        path = newest
    if (path / checkpoint.META).is_file():
        return _read_checkpoint(path, variant)
    if (path / "config.json").is_file():
        return _read_directory(path, variant)
    if path.is_file():
        return _read_file(path, variant)
    raise ValueError(
        f"{path} is no run, checkpoint, timm or transformers directory, or file of weights: give one of these"
    )


def _weights(path: Path, state: Mapping[str, Tensor], variant: str | None, known: dict[str, Any]) -> Weights:
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"{path} is of variant {variant!r}: use one of {', '.join(VARIANTS)}")
    try:
        architecture, source, ours, names = from_state(state, variant)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    weights = Weights(ours, architecture, format=source, names=names, **known)
    if len(weights.class_names) != architecture.num_classes:  # no names, or names of a head that is not there
        weights = replace(weights, class_names=tuple(map(str, range(architecture.num_classes))))
    return weights


def _read_checkpoint(path: Path, variant: str | None) -> Weights:
    meta = checkpoint.read_meta(path)
    if meta.kind != "pretrain":
        raise ValueError(f"{path} is a {meta.kind} checkpoint: use the run's `best` or `last` directory")
    cfg = PretrainConfig.model_validate(meta.config)
    mean, std = cfg.data.statistics()
    origin = {
        "run": str(cfg.out),
        "step": meta.step,
        "epochs": cfg.epochs,
        "config_sha256": hashlib.sha256(json.dumps(meta.config, sort_keys=True).encode()).hexdigest(),
        "version": meta.version,
    }
    image = {"mean": mean, "std": std, "input_size": [cfg.data.in_chans, *cfg.data.image_size], "crop_pct": 1.0}
    state = checkpoint.read_tensors(path, "model")
    return _weights(path, state, variant or cfg.model.variant, {"image": image, "origin": origin})


def _read_directory(path: Path, variant: str | None) -> Weights:
    """A directory as timm or transformers write it."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        known = _known(config.get(RECORD))
        if "architecture" in config:  # timm
            # Not handed to timm.create_model: a name can make it read another directory, or the network.
            variant = variant or str(config["architecture"]).split(".")[0]
            pretrained = dict(config.get("pretrained_cfg") or {})
            found = {key: pretrained[key] for key in ("mean", "std", "input_size", "crop_pct") if pretrained.get(key)}
            known = {"image": found, "class_names": tuple(config.get("label_names") or ())} | known
        elif str(config["model_type"]).startswith("convnext"):  # transformers
            labels = config.get("id2label") or {}
            known = {"class_names": tuple(str(labels[key]) for key in sorted(labels, key=int))} | known
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} is not one of a timm or transformers ConvNeXt: {error!r}") from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            state, _ = _load(path / name)
            return _weights(path, state, variant, known)
    raise ValueError(f"{path} has a config.json but no model.safetensors or pytorch_model.bin")


def _read_file(path: Path, variant: str | None) -> Weights:
    state, record = _load(path)
    known = _known(record)
    known.setdefault("origin", {"file": path.name})
    return _weights(path, state, variant, known)


def _known(record: Any) -> dict[str, Any]:
    """What our own record of a file says, as arguments of Weights; nothing for others' files."""
    if record is None:
        return {}
    return {
        "image": dict(record["image"]),
        "class_names": tuple(map(str, record["class_names"])),
        "origin": dict(record["origin"]),
        "expected_output": tuple(map(float, record["expected_output"])),
    }


def _load(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file, mapped into memory, and our record of it or None."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(RECORD)
            return load_file(path), json.loads(header) if header else None
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and was not loaded: save its state dict alone") from error
    except (SafetensorError, OSError, RuntimeError, KeyError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or holds no weights: {error}") from error
    record, state = None, loaded
    if isinstance(loaded, dict):
        record = loaded.get(RECORD)
        state = next((loaded[key] for key in ("model", "state_dict") if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path} holds no state dict: expected named tensors, bare or under "model" or "state_dict"')
    return state, record


def adapt_in_chans(weights: Weights, in_chans: int) -> Weights:
    """The weights for images of another number of channels, as timm does it: RGB summed for 1, repeated for more.

    The decoder predicts pixels of the old channels and statistics are of them: both are left out. Raises ValueError
    if the weights are not of RGB images.
    """
    if weights.architecture.in_chans == in_chans:
        return weights
    if weights.architecture.in_chans != 3:
        raise ValueError(
            f"data.in_chans = {in_chans}, but the weights are of {weights.architecture.in_chans} channels: "
            "only those of 3 (RGB) adapt to another number"
        )
    state = {name: value for name, value in weights.state.items() if name.split(".")[0] in ("encoder", "norm", "head")}
    state[STEM] = adapt_input_conv(in_chans, state[STEM])
    architecture = replace(weights.architecture, in_chans=in_chans, decoder_depth=0, decoder_dim=0)
    return replace(weights, state=state, architecture=architecture, image={}, expected_output=())


def start_from(model: FCMAE, weights: Weights) -> str:
    """Load the encoder, and the decoder if there is one that fits, into a new FCMAE; say what was done.

    Raises ValueError if the encoder is of another variant or stem stride; its channels adapt from RGB.
    """
    encoder = model.encoder
    held = weights.architecture
    if (held.variant, held.stem_stride) != (encoder.variant, encoder.stem_stride):
        raise ValueError(
            f"model.init is {held.variant} with a stem of stride {held.stem_stride}, but the run is {encoder.variant} "
            f"with {encoder.stem_stride}: set model.variant and model.stem_stride to those of model.init"
        )
    weights = adapt_in_chans(weights, encoder.in_chans)
    text = f"encoder from {held.variant} in {weights.format}'s layout"
    if held.in_chans != encoder.in_chans:
        text += f", its stem adapted from {held.in_chans} channels to {encoder.in_chans}"
    # What an FCMAE has no place for, the norm and head of a dense model, is left out.
    found = {name: value for name, value in weights.state.items() if holds(name, "minkowski")}
    own = model.state_dict()
    fits = {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in own.items()}
    if not fits:
        found = {name: value for name, value in found.items() if name.startswith("encoder.")}
    model.load_state_dict(own | found)
    if fits:
        return f"{text}; decoder too"
    why = "none"
    if held.decoder_depth:
        why = f"one of depth {held.decoder_depth} and width {held.decoder_dim} for {held.in_chans} channels"
    return f"{text}; a fresh decoder, as model.init has {why}"


def create_dense(
    variant: str,
    *,
    in_chans: int = 3,
    num_classes: int = 0,
    stem_stride: int = 4,
    drop_path_rate: float = 0.0,
    head_init_scale: float = 1.0,
) -> nn.Module:
    """timm's dense ConvNeXt with our stem strides, randomly initialised.

    timm's stem of stride 2 comes with one more downsampling layer, for a total stride of 32 instead of 16; so that
    one is built at stride 4 and given the 2x2 convolution that the encoder has.
    """
    model: nn.Module = timm.create_model(
        variant,
        in_chans=in_chans,
        num_classes=num_classes,
        patch_size=1 if stem_stride == 1 else 4,
        drop_path_rate=drop_path_rate,
        head_init_scale=head_init_scale,
    )
    if stem_stride == 2:
        stem = model.get_submodule("stem")
        assert isinstance(stem, nn.Sequential)
        stem[0] = nn.Conv2d(in_chans, VARIANTS[variant].dims[0], kernel_size=2, stride=2)
        init_weights(stem[0])
    return model


def build_dense(weights: Weights, num_classes: int | None = None, **options: float) -> nn.Module:
    """timm's model holding the weights; a final norm that they do not have stays the identity.

    num_classes: of a new head; None keeps the head that the weights have, or none. options: drop_path_rate,
    head_init_scale of `create_dense`.
    """
    architecture = weights.architecture
    model = create_dense(
        architecture.variant,
        in_chans=architecture.in_chans,
        num_classes=architecture.num_classes if num_classes is None else num_classes,
        stem_stride=architecture.stem_stride,
        drop_path_rate=options.get("drop_path_rate", 0.0),
        head_init_scale=options.get("head_init_scale", 1.0),
    )
    state = to_state(weights.state, architecture.variant, "timm")
    if num_classes is not None:
        own = model.state_dict()
        state = {name: value for name, value in state.items() if not name.startswith("head.fc.")}
        state |= {name: value for name, value in own.items() if name.startswith("head.fc.")}
    model.load_state_dict(state)
    return model


@torch.no_grad()
def encoder_output(weights: Weights) -> tuple[float, ...]:
    """What the encoder makes of a fixed image with nothing masked: 16 of its channels, averaged over the image.

    The image, (1, C, 2s, 2s) at total stride s, is sin(i) at its i-th value in row-major order. Every weight of the
    encoder takes part, so a damaged, renamed or transposed one shows.
    """
    architecture = weights.architecture
    with torch.device("meta"):
        encoder = Encoder(architecture.variant, architecture.in_chans, architecture.stem_stride)
    state = {k.removeprefix("encoder."): v for k, v in weights.state.items() if k.startswith("encoder.")}
    # The mapped tensors become the parameters: huge has 2.6 GB of them.
    encoder.load_state_dict(state, assign=True)
    encoder.float()
    side = 2 * encoder.total_stride
    values = torch.arange(encoder.in_chans * side * side, dtype=torch.float64).sin()
    image = values.view(1, encoder.in_chans, side, side)
    features = encoder(image.float(), Masked(None)).mean((0, 1, 2))
    output: list[float] = features[:: max(1, encoder.dim // 16)][:16].tolist()
    return tuple(output)


def check(path: Path) -> str:
    """Compare the encoder's output on a fixed image with the one that the file's writer saw, and say how they agree.

    Raises ValueError if they differ by more than 1e-4 of the largest (float32 on another machine, summed in another
    order, stays within 1e-5), or if the file does not say what to expect, as those of others do not.
    """
    weights = read_weights(path)
    if not weights.expected_output:
        raise ValueError(f"{path} does not say what to expect of it: only what `fcmae convert` and finetune write does")
    error, allowed = _difference(encoder_output(weights), weights.expected_output)
    if not error <= allowed:
        raise ValueError(f"{path}: the encoder's output is off by {error:.3g}, more than {allowed:.3g}: it is damaged")
    return f"{path}: the encoder's output is as expected, to {error:.1e} (allowed {allowed:.1e})"


def _difference(found: tuple[float, ...], expected: tuple[float, ...]) -> tuple[float, float]:
    a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    if a.shape != b.shape:
        return float("inf"), 0.0
    return float((a - b).abs().max()), 1e-4 * float(b.abs().max())


def _record(weights: Weights) -> dict[str, Any]:
    return {
        "variant": weights.architecture.variant,
        "image": weights.image,
        "class_names": list(weights.class_names),
        "origin": weights.origin,
        "expected_output": list(weights.expected_output or encoder_output(weights)),
        "exported_by": fcmae.__version__,
    }


def save_weights(dest: Path, weights: Weights, to: str) -> None:
    """Write the weights in a format: what it has no place for is left out.

    dest: a directory for timm and transformers; for the others a file, .safetensors or .pth (a dict with "model").
    Each file is written beside its place and then moved into it, and replaces one that is there.
    """
    state = to_state(weights.state, weights.architecture.variant, to)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    record = _record(weights)
    if to in ("timm", "transformers"):
        dest.mkdir(parents=True, exist_ok=True)
        if to == "transformers" and weights.architecture.num_classes:
            # As its classifiers name them; its bare model has no prefix.
            name = weights.architecture.variant.partition("_")[0]
            state = {key if key.startswith("classifier.") else f"{name}.{key}": value for key, value in state.items()}
        config = _timm_config(weights) if to == "timm" else _transformers_config(weights)
        aside = {name: dest / f".tmp-{name}" for name in ("model.safetensors", "config.json")}
        save_file(state, aside["model.safetensors"], {"format": "pt"})
        aside["config.json"].write_text(json.dumps(config | {RECORD: record}, indent=2), encoding="utf-8")
        for name, path in aside.items():
            path.replace(dest / name)
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    path = dest.with_name(f".tmp-{dest.name}")
    if dest.suffix == ".safetensors":
        save_file(state, path, {"format": "pt", RECORD: json.dumps(record)})
    else:
        torch.save({"model": state, RECORD: record}, path)
    path.replace(dest)


def save_dense(dest: Path, model: nn.Module, weights: Weights) -> None:
    """Write timm's model as a timm directory; of `weights`, all but the tensors describes it."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    architecture, _, ours, _ = from_state(state, weights.architecture.variant)
    save_weights(dest, replace(weights, state=ours, architecture=architecture, expected_output=()), "timm")


def _timm_config(weights: Weights) -> dict[str, Any]:
    """As timm's own writer, which would also put the licence and the origin of its published weights here."""
    architecture = weights.architecture
    return {
        "architecture": architecture.variant,
        "num_classes": architecture.num_classes,
        "num_features": VARIANTS[architecture.variant].dims[-1],
        "global_pool": "avg",
        **({"label_names": list(weights.class_names)} if weights.class_names else {}),
        "model_args": {"in_chans": architecture.in_chans, "patch_size": architecture.stem_stride},
        "pretrained_cfg": {
            "custom_load": False,
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_mode": "center",
            **weights.image,
            "num_classes": architecture.num_classes,
            "pool_size": None,
            # timm adapts RGB stems to other channel counts; weights of another count are loaded as they are.
            "first_conv": "stem.0" if architecture.in_chans == 3 else None,
            "classifier": "head.fc",
        },
    }


def _transformers_config(weights: Weights) -> dict[str, Any]:
    architecture = weights.architecture
    depths, dims, use_grn = VARIANTS[architecture.variant]
    family = "ConvNextV2" if use_grn else "ConvNext"
    names = weights.class_names or tuple(f"LABEL_{i}" for i in range(architecture.num_classes))
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {
        "architectures": [f"{family}ForImageClassification" if architecture.num_classes else f"{family}Model"],
        "model_type": family.lower(),
        "num_channels": architecture.in_chans,
        "patch_size": architecture.stem_stride,
        "num_stages": len(depths),
        "depths": list(depths),
        "hidden_sizes": list(dims),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # of the final norm; the others are fixed
        **({"image_size": weights.image["input_size"][-1]} if "input_size" in weights.image else {}),
        **(classes if architecture.num_classes else {}),
    }


def convert(source: Path, dest: Path | None, to: str = "timm", variant: str | None = None) -> str:
    """Write the weights of any source in another format, read them back, and describe what was mapped.

    dest: None writes nothing. variant: what the source must be of; None finds out. Raises ValueError if the source
    cannot be read or does not fit (see `read_weights`), dest exists or has another kind of name than the format needs,
    or what was written does not compute the same.
    """
    if to not in FORMATS:
        raise ValueError(f"to = {to!r}: use one of {', '.join(FORMATS)}")
    if dest is not None and dest.exists():
        raise ValueError(f"{dest} exists: give a new path, or remove it")
    if dest is not None and to in ("fcmae", "fair", "minkowski") and dest.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{dest}: the format {to} is one file: give it a name that ends in .safetensors or .pth")
    weights = read_weights(source, variant)
    state = to_state(weights.state, weights.architecture.variant, to)
    named = {rename(name, to): weights.names[name] for name in weights.state if holds(name, to)}
    lines = [f"{named.get(key, 'identity')} -> {key} {tuple(value.shape)}" for key, value in state.items()]
    if left_out := [weights.names[name] for name in weights.state if not holds(name, to)]:
        lines.append(f"left out, as {to} has no place for them: {', '.join(left_out)}")
    origin = ", ".join(f"{key} {value}" for key, value in weights.origin.items())
    lines.append(f"{len(state)} tensors of {weights.architecture.variant} from {weights.format}'s layout ({origin})")
    if dest is None:
        return "\n".join([*lines, "dry run: nothing was written"])
    save_weights(dest, weights, to)
    lines += [f"wrote {dest}", check(dest)]
    use = {
        "timm": f'timm.create_model("local-dir:{dest}", pretrained=True)',
        "transformers": f'transformers.AutoModel.from_pretrained("{dest}")',
    }.get(to, f"fcmae pretrain --model.init {dest}")
    if to == "timm" and weights.architecture.stem_stride == 2:
        use = f'fcmae.convert.build_dense(fcmae.convert.read_weights(Path("{dest}")))  # timm has no such stem'
    return "\n".join([*lines, f"use: {use}"])
