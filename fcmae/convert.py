"""From sparse checkpoints to dense models: timm directories and FAIR-keyed files, and back into timm's ConvNeXt.

Our encoder already holds its parameters in dense layout under the released (FAIR) names, so a conversion renames and
drops singleton dimensions; no value changes. What FCMAE does not train, timm's final norm, starts as the identity.

A timm directory is config.json and model.safetensors, as `timm.create_model("local-dir:DIR", pretrained=True)` reads
it. config.json is written here because timm's own writer adds the licence and the origin of its published weights.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fcmae
from fcmae import checkpoint
from fcmae.config import PretrainConfig
from fcmae.encoder import VARIANTS, init_weights

_FAIR_TO_TIMM = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


@dataclass(frozen=True)
class Weights:
    """Weights of a dense model and what is needed to build it.

    state: tensors under FAIR's or timm's names. variant: key of VARIANTS. image: mean, std and input_size (C, H, W)
    where known. class_names: of the head, empty without one. source: what to write beside an export.
    """

    state: dict[str, Tensor]
    variant: str
    in_chans: int
    stem_stride: int
    image: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)


def fair_to_timm(name: str) -> str:
    """timm's name for a parameter of the released dense code."""
    for pattern, replacement in _FAIR_TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


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


def load_dense(model: nn.Module, state: Mapping[str, Tensor], *, new_head: bool = False) -> list[str]:
    """Load FAIR- or timm-named weights into timm's model and say what went where.

    new_head: leave the classifier as it is, for another task. The final norm may be absent (FCMAE trains none); it
    then stays the identity. Anything else missing, extra or of another shape: ValueError listing all of it, and the
    model unchanged. Returns one line for each tensor: source name, name in timm, shape.
    """
    target = model.state_dict()
    mapped, lines, problems, misshapen = {}, [], [], set()
    for name, value in state.items():
        key = fair_to_timm(name)
        if new_head and key.startswith("head.fc."):
            continue
        if key not in target:
            problems.append(f"extra: {name} {tuple(value.shape)}")
        elif _shape(value) != _shape(target[key]):
            problems.append(f"shape: {name} is {tuple(value.shape)}, {key} needs {tuple(target[key].shape)}")
            misshapen.add(key)
        else:
            mapped[key] = value.reshape(target[key].shape)
            lines.append(f"{name} -> {key} {tuple(target[key].shape)}")
    optional = ("head.norm.", "head.fc.") if new_head else ("head.norm.",)
    missing = [key for key in target if key not in mapped and key not in misshapen and not key.startswith(optional)]
    problems += [f"missing: {key} {tuple(target[key].shape)}" for key in missing]
    if problems:
        raise ValueError(f"the weights do not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    model.load_state_dict(target | mapped)
    return lines


def _shape(value: Tensor) -> tuple[int, ...]:
    """The shape without singletons, of which the formats have more or fewer."""
    return tuple(size for size in value.shape if size != 1)


def read_weights(path: Path) -> Weights:
    """Weights of a run, a pretraining checkpoint, or a timm directory. Of a fine-tuning run, the best ones.

    Raises ValueError when `path` is none of them or its weights are incomplete.
    """
    if (path / "best" / "config.json").is_file():
        path = path / "best"  # of a fine-tuning run
    if (path / "config.yaml").is_file():
        newest = checkpoint.latest(path)
        if newest is None:
            raise ValueError(f"{path} is a run without a checkpoint: let it reach its first one")
        return _read_checkpoint(newest)
    if (path / checkpoint.META).is_file():
        return _read_checkpoint(path)
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _read_timm_directory(path)
    raise ValueError(f"{path} is no run, checkpoint or timm directory of ours: give one of these")


def _read_checkpoint(path: Path) -> Weights:
    meta = checkpoint.read_meta(path)
    if meta.kind != "pretrain":
        raise ValueError(f"{path} is a {meta.kind} checkpoint: use the run's `best` or `last` directory")
    cfg = PretrainConfig.model_validate(meta.config)
    tensors = checkpoint.read_tensors(path, "model")
    mean, std = cfg.data.statistics()
    return Weights(
        state={name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")},
        variant=cfg.model.variant,
        in_chans=cfg.data.in_chans,
        stem_stride=cfg.model.stem_stride,
        image={"mean": mean, "std": std, "input_size": [cfg.data.in_chans, *cfg.data.image_size], "crop_pct": 1.0},
        source={
            "run": str(cfg.out),
            "step": meta.step,
            "epochs": cfg.epochs,
            "config_sha256": hashlib.sha256(json.dumps(meta.config, sort_keys=True).encode()).hexdigest(),
            "version": meta.version,
        },
    )


def _read_timm_directory(path: Path) -> Weights:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        variant = str(config["architecture"]).split(".")[0]
        pretrained = dict(config.get("pretrained_cfg", {}))
        names, source = tuple(config.get("label_names", ())), dict(config.get("fcmae", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} is not one that timm writes: {error!r}") from error
    state = _load_safetensors(path / "model.safetensors")
    image = {key: pretrained[key] for key in ("mean", "std", "input_size", "crop_pct") if key in pretrained}
    return _weights(path, state, "stem.0.weight", variant, image, names, source)


def read_fair(path: Path, variant: str | None = None) -> Weights:
    """Weights under the released dense names: a .safetensors file, or a .pth with tensors only, bare or in "model".

    variant: may be left out for files that `convert` wrote. Raises ValueError if the file holds no such tensors or
    does not say its variant. A .pth is unpickled with weights_only, which runs no code.
    """
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        state = _load_safetensors(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than tensors and was not loaded: save its state dict alone") from error
        except (RuntimeError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is damaged or no checkpoint of torch: {error!r}") from error
        state = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
        state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    variant = variant or header.get("variant")
    if variant is None:
        raise ValueError(f"{path} does not say its variant: give model.variant")
    image = json.loads(header.get("image", "{}"))
    return _weights(path, state, "downsample_layers.0.0.weight", variant, image)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return state


def _weights(
    path: Path,
    state: dict[str, Tensor],
    stem: str,
    variant: str,
    image: dict[str, Any],
    class_names: tuple[str, ...] = (),
    source: dict[str, Any] | None = None,
) -> Weights:
    """The weights that a file holds, if it names a variant of ours and has that stem."""
    # A name goes to timm.create_model, which would also take one that reads another directory or the network.
    if variant not in VARIANTS:
        raise ValueError(f"{path} is of variant {variant!r}: use one of {', '.join(VARIANTS)}")
    if stem not in state or state[stem].ndim != 4:
        raise ValueError(f"{path} has no {stem}: it holds no dense ConvNeXt in this format")
    _, in_chans, stem_stride, _ = state[stem].shape
    return Weights(state, variant, in_chans, stem_stride, image, class_names, source or {})


def build_dense(weights: Weights, num_classes: int | None = None, **options: float) -> tuple[nn.Module, list[str]]:
    """timm's model holding the weights, and the lines of `load_dense`.

    num_classes: of a new head; None keeps the head that the weights have, or none. options: drop_path_rate,
    head_init_scale of `create_dense`.
    """
    head = weights.state.get("head.fc.weight", weights.state.get("head.weight"))
    kept = 0 if head is None else head.shape[0]
    model = create_dense(
        weights.variant,
        in_chans=weights.in_chans,
        num_classes=kept if num_classes is None else num_classes,
        stem_stride=weights.stem_stride,
        drop_path_rate=options.get("drop_path_rate", 0.0),
        head_init_scale=options.get("head_init_scale", 1.0),
    )
    return model, load_dense(model, weights.state, new_head=num_classes is not None)


def save_timm_directory(dest: Path, model: nn.Module, weights: Weights) -> None:
    """Write config.json and model.safetensors, each beside its place and then moved into it.

    model: timm's, whose parameters are written. weights: describes it (its own tensors are not used).
    """
    config = {
        "architecture": weights.variant,
        "num_classes": len(weights.class_names),
        "num_features": VARIANTS[weights.variant].dims[-1],
        "global_pool": "avg",
        **({"label_names": list(weights.class_names)} if weights.class_names else {}),
        "model_args": {"in_chans": weights.in_chans, "patch_size": weights.stem_stride},
        "pretrained_cfg": {
            "custom_load": False,
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_mode": "center",
            **weights.image,
            "num_classes": len(weights.class_names),
            "pool_size": None,
            # timm adapts RGB stems to other channel counts; weights of another count are loaded as they are.
            "first_conv": "stem.0" if weights.in_chans == 3 else None,
            "classifier": "head.fc",
        },
        "fcmae": weights.source | {"exported_by": fcmae.__version__},
    }
    dest.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    aside = {name: dest / f".tmp-{name}" for name in ("model.safetensors", "config.json")}
    save_file(state, aside["model.safetensors"], {"format": "pt"})
    aside["config.json"].write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name, path in aside.items():
        path.replace(dest / name)


def convert(source: Path, dest: Path, to: str = "timm") -> str:
    """Write the encoder of a pretraining run or checkpoint in another format and describe what was mapped.

    to: "timm", a directory; or "fair", a .safetensors file under the released dense names. Raises ValueError if the
    source is none of ours, its weights do not fit its variant (all mismatches are listed), or dest exists.
    """
    if dest.exists():
        raise ValueError(f"{dest} exists: give a new path, or remove it")
    weights = read_weights(source)
    model, lines = build_dense(weights)
    if to == "timm":
        save_timm_directory(dest, model, weights)
        use = f'timm.create_model("local-dir:{dest}", pretrained=True)'
        if weights.stem_stride == 2:
            use = f'fcmae.convert.build_dense(fcmae.convert.read_weights(Path("{dest}")))  # timm has no such stem'
    elif to == "fair":
        if any(not name.startswith(("downsample_layers.", "stages.")) for name in weights.state):
            raise ValueError(f"{source} is in timm's layout: give the run or checkpoint that it was made from")
        dest.parent.mkdir(parents=True, exist_ok=True)
        aside = dest.with_name(f".tmp-{dest.name}")
        metadata = {"format": "pt", "variant": weights.variant, "image": json.dumps(weights.image)}
        metadata |= {key: str(value) for key, value in weights.source.items()}
        save_file({k: v.contiguous() for k, v in weights.state.items()}, aside, metadata)
        aside.replace(dest)
        lines = [f"{name} {tuple(value.shape)}" for name, value in weights.state.items()]
        use = f"safetensors.torch.load_file({str(dest)!r})"
    else:
        raise ValueError(f"to = {to!r}: use timm or fair")
    source_text = ", ".join(f"{key} {value}" for key, value in weights.source.items())
    return "\n".join(
        [*lines, f"{len(lines)} tensors of {weights.variant} ({source_text})", f"wrote {dest}", f"use: {use}"]
    )
