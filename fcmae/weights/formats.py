"""Names and layouts of ConvNeXt weights in every format in use, to and from ours.

Ours are the parameters of `FCMAE` (encoder.*, proj.*, mask_token, decoder.*, pred.*), and for dense models norm.* and
head.*. A format is one function from our name of a parameter to its own, and a few parameters of another shape; the way
back is the same table, read from the other side.

| format | encoder | decoder | norm, head | what it is |
| --- | --- | --- | --- | --- |
| fcmae | yes | yes | yes | ours |
| minkowski | yes | yes | no | the released sparse FCMAE model, with MinkowskiEngine's kernels |
| fair | yes | no | yes | the released dense code, self-supervised or fine-tuned |
| timm | yes | no | yes | timm's ConvNeXt |
| transformers | yes | no | yes | ConvNextV2Model, ConvNextModel and their classifiers |

No value ever changes: tensors are renamed, reshaped and permuted, so a round trip is exact to the bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fcmae.model import FCMAE
from fcmae.networks.convnext import VARIANTS, Encoder

FORMATS = ("fcmae", "timm", "fair", "transformers", "minkowski")

DECODER = ("proj", "mask_token", "decoder", "pred")
_DENSE = ("encoder", "norm", "head")
_HOLDS = {
    "fcmae": (*_DENSE, *DECODER),
    "minkowski": ("encoder", *DECODER),
    "fair": _DENSE,
    "timm": _DENSE,
    "transformers": _DENSE,
}

_FROM_OURS: dict[str, tuple[tuple[str, str], ...]] = {
    "fcmae": (),
    "minkowski": (
        (r"^(encoder\.downsample_layers\.[123]\.0)\.", r"\1.ln."),
        (r"^(encoder\.downsample_layers\.[123]\.1)\.weight$", r"\1.kernel"),
        (r"^(encoder\.stages\.\d\.\d+\.dwconv)\.weight$", r"\1.kernel"),
        (r"^(encoder\.stages\.\d\.\d+\.norm)\.", r"\1.ln."),
        (r"^(encoder\.stages\.\d\.\d+\.pwconv[12])\.", r"\1.linear."),
    ),
    "fair": ((r"^encoder\.", ""),),
    "timm": (
        (r"^encoder\.downsample_layers\.0\.", "stem."),
        (r"^encoder\.downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^encoder\.stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ),
    "transformers": (
        (r"^norm\.", "layernorm."),
        (r"^head\.", "classifier."),
        (r"\.norm\.", ".layernorm."),
        (r"^encoder\.downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
        (r"^encoder\.downsample_layers\.0\.1\.", "embeddings.layernorm."),
        (r"^encoder\.downsample_layers\.(\d)\.", r"encoder.stages.\1.downsampling_layer."),
        (r"^encoder\.stages\.(\d)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
        (r"\.grn\.gamma$", ".grn.weight"),
        (r"\.grn\.beta$", ".grn.bias"),
        (r"\.gamma$", ".layer_scale_parameter"),
    ),
}

# What DDP, torch.compile, Lightning and transformers' classifiers put before the names of a model's parameters.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|convnextv2|convnext)\.)+")

# timm computes the MLP of its small models as 1x1 convolutions.
_SMALL = ("atto", "femto", "pico", "nano")
_TIMM_CONVOLUTIONAL = tuple(f"{family}_{size}" for family in ("convnext", "convnextv2") for size in _SMALL)


@dataclass(frozen=True)
class Architecture:
    """What weights are of: enough to name and shape every one of them.

    variant: key of VARIANTS. decoder_depth, decoder_dim: 0 without a decoder. final_norm: whether there is one.
    num_classes: of the head, 0 without one.
    """

    variant: str
    in_chans: int = 3
    stem_stride: int = 4
    decoder_depth: int = 0
    decoder_dim: int = 0
    final_norm: bool = False
    num_classes: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name and shape of every parameter, in the order of the network."""
        with torch.device("meta"):
            encoder = Encoder(self.variant, self.in_chans, self.stem_stride)
            model = FCMAE(encoder, self.decoder_depth, self.decoder_dim) if self.decoder_depth else None
        named = model.state_dict() if model else {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        if self.final_norm:
            shapes |= {"norm.weight": (encoder.dim,), "norm.bias": (encoder.dim,)}
        if self.num_classes:
            shapes |= {"head.weight": (self.num_classes, encoder.dim), "head.bias": (self.num_classes,)}
        return shapes


def rename(name: str, to: str) -> str:
    """The name of our parameter `name` in another format."""
    for pattern, replacement in _FROM_OURS[to]:
        name = re.sub(pattern, replacement, name)
    return name


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return _WRAPPERS.sub("", name)


def holds(name: str, to: str) -> bool:
    """Whether a format has a place for our parameter `name`."""
    return name.partition(".")[0] in _HOLDS[to]


def detect(names: Iterable[str]) -> str:
    """The format that names are of. Raises ValueError if they are of none."""
    names = set(names)
    # A few parameters that every variant has: one that is missing must not hide what the file is.
    common = [
        f"encoder.stages.{i}.0.{layer}.{p}"
        for i in range(4)
        for layer in ("dwconv", "pwconv1")
        for p in ("weight", "bias")
    ]
    found = {to: sum(rename(name, to) in names for name in common) for to in FORMATS}
    best = max(FORMATS, key=lambda to: found[to])
    # Biases of ours and minkowski's have one name, so the one with the kernels too wins; less than half is a chance.
    if found[best] < len(common) // 2:
        shown = ", ".join(sorted(names)[:3]) or "nothing"
        raise ValueError(f"the entries ({shown}, ...) are of no ConvNeXt in a format of {', '.join(FORMATS)}")
    return best


def from_state(
    state: Mapping[str, Tensor], variant: str | None = None
) -> tuple[Architecture, str, dict[str, Tensor], dict[str, str]]:
    """Weights under any format's names, as ours.

    state: named tensors, under wrappers' prefixes or not. variant: what they must be of; None finds out.
    Returns the architecture, the format found, the tensors under our names and in our shapes (views where possible),
    and our names to theirs. A final norm that is the identity, without a head, counts as none.
    Raises ValueError, with a list, if an entry is missing, extra or of another shape.
    """
    original = {unwrapped(name): name for name in state}
    if len(original) < len(state):
        raise ValueError("the weights hold entries that differ only in a wrapper's prefix: keep one of each")
    named = {name: state[key] for name, key in original.items()}
    source = detect(named)
    architecture = _architecture(named, source, variant)
    rest = dict(named)
    ours: dict[str, Tensor] = {}
    problems = []
    for name, shape in architecture.shapes().items():
        theirs = rename(name, source)
        value = rest.pop(theirs, None)
        needed = _shape_in(source, architecture.variant, name, shape)
        if value is None:
            problems.append(f"missing: {theirs} {needed}")
        elif _without_ones(value.shape) != _without_ones(needed):
            problems.append(f"shape: {theirs} is {tuple(value.shape)}, {architecture.variant} needs {needed}")
        else:
            ours[name] = (
                _from_kernel(value.reshape(needed), shape) if theirs.endswith(".kernel") else value.reshape(shape)
            )
    problems += [f"extra: {name} {tuple(value.shape)}" for name, value in rest.items()]
    if problems:
        found = _architecture(named, source, None).variant
        looks = "" if found == architecture.variant else f" (they look like {found})"
        raise ValueError(
            f"the weights, in {source}'s layout, are not those of {architecture.variant}{looks}:\n  "
            + "\n  ".join(problems)
        )
    if (
        not architecture.num_classes
        and architecture.final_norm
        and _is_identity(ours["norm.weight"], ours["norm.bias"])
    ):
        # What timm has in the place of a norm that was never trained.
        del ours["norm.weight"], ours["norm.bias"]
        architecture = replace(architecture, final_norm=False)
    return architecture, source, ours, {name: original[rename(name, source)] for name in ours}


def _is_identity(weight: Tensor, bias: Tensor) -> bool:
    return bool(weight.eq(1).all() and bias.eq(0).all())


def to_state(state: Mapping[str, Tensor], variant: str, to: str) -> dict[str, Tensor]:
    """Our tensors under a format's names and in its shapes; what the format has no place for is left out.

    timm and transformers always have a final norm, which FCMAE does not train: it is then the identity.
    transformers' classifiers hold the encoder under the model's name.
    """
    prefix = f"{variant.partition('_')[0]}." if to == "transformers" and "head.weight" in state else ""
    named = dict(state)
    if to in ("timm", "transformers") and "norm.weight" not in named:
        like = named["encoder.downsample_layers.3.1.bias"]
        named |= {"norm.weight": torch.ones_like(like), "norm.bias": torch.zeros_like(like)}
    result = {}
    for name, value in named.items():
        if holds(name, to):
            theirs, shape = rename(name, to), _shape_in(to, variant, name, tuple(value.shape))
            key = theirs if theirs.startswith("classifier.") else prefix + theirs
            result[key] = _to_kernel(value) if theirs.endswith(".kernel") else value.reshape(shape)
    return result


def _architecture(tensors: Mapping[str, Tensor], source: str, variant: str | None) -> Architecture:
    """What the tensors are of, as far as they tell: whatever is missing or misshapen is found by comparing later."""

    def size(name: str, dim: int, default: int) -> int:
        value = tensors.get(rename(name, source))
        return value.shape[dim] if value is not None and value.ndim > dim else default

    def agreement(candidate: str) -> int:
        depths, dims, use_grn = VARIANTS[candidate]
        points = int((rename("encoder.stages.0.0.grn.gamma", source) in tensors) == use_grn)
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            points += size(f"encoder.stages.{i}.0.norm.weight", 0, 0) == dim
            points += rename(f"encoder.stages.{i}.{depth - 1}.norm.weight", source) in tensors
            points += rename(f"encoder.stages.{i}.{depth}.norm.weight", source) not in tensors
        return points

    if variant is None:
        variant = max(VARIANTS, key=agreement)
    decoder = [name for name in tensors if source in ("fcmae", "minkowski") and name.partition(".")[0] in DECODER]
    mask_token, num_classes = tensors.get("mask_token"), max(size("head.weight", 0, 0), size("head.bias", 0, 0))
    stem_stride = size("encoder.downsample_layers.0.0.weight", 2, 4)
    return Architecture(
        variant,
        in_chans=max(1, size("encoder.downsample_layers.0.0.weight", 1, 3)),
        stem_stride=stem_stride if stem_stride in (1, 2, 4) else 4,
        decoder_depth=max(1, len({name.split(".")[1] for name in decoder if name.startswith("decoder.")}))
        if decoder
        else 0,
        decoder_dim=(512 if mask_token is None else mask_token.numel()) if decoder else 0,
        final_norm=num_classes > 0 or any(rename(f"norm.{p}", source) in tensors for p in ("weight", "bias")),
        num_classes=num_classes,
    )


def _shape_in(to: str, variant: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a format of our parameter `name`, whose shape is `shape`."""
    layer, parameter = name.split(".")[-2:] if "." in name else ("", name)
    in_encoder = name.startswith("encoder.") and not name.startswith("encoder.downsample_layers.0.")
    if to == "timm":
        if layer == "grn":
            return shape[-1:]
        if layer in ("pwconv1", "pwconv2") and parameter == "weight" and variant in _TIMM_CONVOLUTIONAL:
            return (*shape, 1, 1)
    if to == "minkowski" and in_encoder:
        if rename(name, to).endswith(".kernel"):
            outputs, inputs, *kernel = shape
            return (math.prod(kernel), outputs) if layer == "dwconv" else (math.prod(kernel), inputs, outputs)
        if layer == "grn" or (parameter == "bias" and layer in ("dwconv", "1")):
            return (1, shape[-1])
    return shape


# MinkowskiEngine numbers the offsets of a kernel with the first spatial axis (rows) fastest: hence the transposes.


def _from_kernel(kernel: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(49, C) or (4, Cin, Cout) to a dense weight of `shape`, (C, 1, 7, 7) or (Cout, Cin, 2, 2)."""
    order = (1, 0) if kernel.ndim == 2 else (2, 1, 0)
    return kernel.permute(order).reshape(shape).transpose(2, 3)


def _to_kernel(weight: Tensor) -> Tensor:
    """Inverse of `_from_kernel`: (C, 1, k, k) to (k * k, C), (Cout, Cin, k, k) to (k * k, Cin, Cout)."""
    flat = weight.transpose(2, 3).flatten(2)  # (Cout, Cin, k * k)
    return flat.permute(2, 1, 0).squeeze(1)


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape without singletons, of which files of one format have more or fewer."""
    return tuple(size for size in shape if size != 1)
