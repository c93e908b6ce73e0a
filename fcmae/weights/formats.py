"""Names and layouts of ConvNeXt weights in every format in use, to and from ours.

Ours are the parameters of `FCMAE` (encoder.*, decoder.*), and for dense models norm.* and head.*. A format is one
function from our name of a parameter to its own, and a few parameters of another shape; reading uses the same table in
reverse. The network that tensors belong to is inferred from their names and shapes.

| format | encoder | decoder | norm, head | what it is |
| --- | --- | --- | --- | --- |
| fcmae | yes | yes | yes | ours |
| minkowski | yes | yes | no | the released sparse FCMAE model, with MinkowskiEngine's kernels |
| fair | yes | no | yes | the released dense code, self-supervised or fine-tuned |
| timm | yes | no | yes | timm's ConvNeXt |
| transformers | yes | no | yes | ConvNextV2Model, ConvNextModel and their classifiers |
| mmpretrain | yes | no | norm | mmpretrain's backbones; read only, as its heads stand beside them |
| mmearth | yes | no | no | MMEarth's sparse models of satellite images, with MinkowskiEngine's kernels; read only |
| fcmae 0.1 | yes | yes | yes | ours before the decoder was one part; read only |

No value ever changes: tensors are renamed, reshaped and permuted, so a round trip is exact to the bit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from pydantic import ValidationError
from torch import Tensor

from fcmae.data.source import printable
from fcmae.masked import build_fcmae
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import MAX_DEPTH, ConvNeXtSpec, NetworkSpec, describe, variant_of

FORMATS = ("fcmae", "timm", "fair", "transformers", "minkowski")
OURS, OLD, MMPRETRAIN, MMEARTH = "fcmae", "fcmae 0.1", "mmpretrain", "mmearth"  # the last three read only
_SPARSE = ("minkowski", MMEARTH)
_STEM = "encoder.downsample_layers.0.0.weight"

_DENSE = ("encoder", "norm", "head")
_HOLDS = {
    "fcmae": (*_DENSE, "decoder"),
    OLD: (*_DENSE, "decoder"),
    MMPRETRAIN: ("encoder", "norm"),
    MMEARTH: ("encoder",),
    "minkowski": ("encoder", "decoder"),
    "fair": _DENSE,
    "timm": _DENSE,
    "transformers": _DENSE,
}

# The released code has the decoder's parts beside the encoder.
_RELEASED_DECODER = ((r"^decoder\.(?!blocks)", ""), (r"^decoder\.blocks\.", "decoder."))

_SPARSE_ENCODER = (
    (r"^(encoder\.downsample_layers\.[123]\.0)\.", r"\1.ln."),
    (r"^(encoder\.downsample_layers\.[123]\.1)\.weight$", r"\1.kernel"),
    (r"^(encoder\.stages\.\d\.\d+\.dwconv)\.weight$", r"\1.kernel"),
    (r"^(encoder\.stages\.\d\.\d+\.norm)\.", r"\1.ln."),
    (r"^(encoder\.stages\.\d\.\d+\.pwconv[12])\.", r"\1.linear."),
)

_FROM_OURS: dict[str, tuple[tuple[str, str], ...]] = {
    "fcmae": (),
    OLD: _RELEASED_DECODER,
    "minkowski": (*_RELEASED_DECODER, *_SPARSE_ENCODER),
    MMEARTH: (
        *_SPARSE_ENCODER,
        (r"^(encoder\.initial_conv|encoder\.downsample_layers\.0)\.0\.weight$", r"\1.0.kernel"),
        (r"^(encoder\.initial_conv|encoder\.downsample_layers\.0)\.1\.", r"\1.1.ln."),
        (r"^encoder\.downsample_layers\.0\.", "encoder.stem."),
        *((rf"^encoder\.downsample_layers\.{i}\.", f"encoder.downsample_layers.{i - 1}.") for i in (1, 2, 3)),
    ),
    "fair": ((r"^encoder\.", ""),),
    MMPRETRAIN: (
        (r"^norm\.", "norm3."),
        (r"^encoder\.", ""),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv([12])\.", r".pointwise_conv\1."),
    ),
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

# What DDP, DeepSpeed, FSDP, torch.compile, recomputation and transformers' classifiers put into parameters' names.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)"
    r"(?:(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|convnextv2|convnext)\.)+"
)

# A few parameters that every network has: one that is missing must not hide what a file is.
_COMMON = tuple(
    f"encoder.stages.{i}.0.{layer}.{p}"
    for i in range(2)
    for layer in ("dwconv", "pwconv1", "pwconv2", "norm")
    for p in ("weight", "bias")
)
_ENOUGH = len(_COMMON) // 2  # fewer may be there by chance

# Names under which a loss function with weights of its own is stored beside a network.
_LOSSES = ("criterion", "loss", "loss_fn", "loss_func")

# Of MMEarth, which has a decoder for each kind of target.
_TASKS = "decoder_dict."

# timm computes the MLP of its small models as 1x1 convolutions.
_TIMM_CONVOLUTIONAL = ("_atto", "_femto", "_pico", "_nano")

# Parameters that tell the width of a block and of its expanded features, and in which dimension.
_WIDTH = (("norm.weight", 0), ("norm.bias", 0), ("dwconv.bias", -1), ("pwconv2.bias", 0), ("pwconv1.weight", 1))
_DECODER_WIDTH = (("decoder.mask_token", 1), ("decoder.proj.weight", 0), ("decoder.pred.weight", 1))
_HIDDEN = (("pwconv1.bias", 0), ("pwconv1.weight", 0), ("pwconv2.weight", 1), ("grn.gamma", -1))


@dataclass(frozen=True)
class Architecture:
    """The network that weights belong to: enough to know the name and shape of each of them.

    Attributes:
        spec: the encoder's numbers.
        in_chans: image channels.
        decoder_depth: blocks of the decoder, 0 without one.
        decoder_dim: its width, 0 without one.
        final_norm: whether there is a final norm.
        num_classes: of the head, 0 without one.
    """

    spec: NetworkSpec
    in_chans: int = 3
    decoder_depth: int = 0
    decoder_dim: int = 0
    final_norm: bool = False
    num_classes: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name and shape of every parameter, in the order of the network."""
        with torch.device("meta"):
            encoder = make_encoder(self.spec, self.in_chans)
            model = build_fcmae(encoder, self.decoder_dim, self.decoder_depth) if self.decoder_depth else None
        named = model.state_dict() if model else {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        if self.final_norm:
            shapes |= {"norm.weight": (encoder.dim,), "norm.bias": (encoder.dim,)}
        if self.num_classes:
            shapes |= {"head.weight": (self.num_classes, encoder.dim), "head.bias": (self.num_classes,)}
        return shapes


@cache
def rename(name: str, to: str) -> str:
    """The name of our parameter `name` in another format."""
    for pattern, replacement in _FROM_OURS[to]:
        name = re.sub(pattern, replacement, name)
    return name


def unwrapped(name: str) -> str:
    """A parameter's name without the parts that wrappers add before it and inside it."""
    return _WRAPPERS.sub("", name)


def network_in(names: Iterable[str], prefix: str | None = None) -> tuple[str, dict[str, str]]:
    """Find a network among names that may have a prefix and wrappers.

    Args:
        names: of a file's entries.
        prefix: the prefix of the network's own names, such as "student."; None detects it.

    Returns:
        The prefix, and a mapping from the network's own names to those given. Others are left out: those under another
        prefix, and those of a loss function.

    Raises:
        ValueError: if several prefixes have a network, no name has the given prefix, or two names are equal without
            their wrappers.
    """
    plain: dict[str, str] = {}
    for name in names:
        if plain.setdefault(unwrapped(name), name) != name:
            raise ValueError("the weights hold entries that differ only in a wrapper's prefix: keep one of each")
    found = _prefixes(plain)
    listed = ", ".join(map(repr, found))
    if prefix:
        prefix = unwrapped(f"{prefix.rstrip('.')}.")
        if not any(name.startswith(prefix) for name in plain):
            has = f"there is a network under {listed}" if found else "there is no network under any"
            raise ValueError(f"no entry is under the prefix {prefix!r}: {has}")
    # The given prefix may be the beginning of the whole one.
    possible = [each for each in found if each.startswith(prefix or "")]
    if prefix is None or prefix not in possible:
        if len(possible) > 1:
            raise ValueError(f"the entries are of several networks, under {listed}: name one with --prefix")
        prefix = possible[0] if possible else prefix or ""
    others = tuple(each for each in found if each != prefix and each.startswith(prefix))
    inside = {
        name.removeprefix(prefix): whole
        for name, whole in plain.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }
    if any(name.startswith(_TASKS) for name in inside):
        return prefix, {name: whole for name, whole in inside.items() if name.startswith("encoder.")}
    return prefix, {name: whole for name, whole in inside.items() if name.partition(".")[0] not in _LOSSES}


def _prefixes(names: Collection[str]) -> list[str]:
    """The prefixes before the names of networks in any format; empty for names without one."""
    known = {rename(name, to) for name in _COMMON for to in _FROM_OURS}
    counts: Counter[str] = Counter()
    most = max(name.count(".") + 1 for name in known)
    for name in names:
        parts = name.split(".")
        # The longest that is known: "encoder." is part of our own names.
        start = next((i for i in range(max(0, len(parts) - most), len(parts)) if ".".join(parts[i:]) in known), None)
        if start is not None:
            counts["".join(f"{part}." for part in parts[:start])] += 1
    found = [prefix for prefix, count in counts.items() if count >= _ENOUGH]
    # Ours has its norm and head beside its encoder: with them inside, it is the released dense model under that name.
    dense = {name.removesuffix(f"{part}.weight") for name in names for part in ("norm", "head")}
    return sorted(f"{prefix}encoder." if f"{prefix}encoder." in dense else prefix for prefix in found)


def first_weight(spec: NetworkSpec) -> str:
    """Our name of the weight that images meet first."""
    return "encoder.initial_conv.0.weight" if isinstance(spec, ConvNeXtSpec) and spec.dense_stem else _STEM


def holds(name: str, to: str) -> bool:
    """Whether a format has a place for our parameter `name`."""
    return name.partition(".")[0] in _HOLDS[to]


def detect(names: Iterable[str]) -> str:
    """The format that names belong to.

    Args:
        names: of a file's entries, as `network_in` gives them.

    Raises:
        ValueError: if they belong to none.
    """
    names = set(names)
    # The decoder distinguishes our format from our earlier one, and the stem MMEarth's from minkowski's.
    others = ("decoder.mask_token", "decoder.proj.weight", "decoder.pred.weight", _STEM)
    found = {to: sum(rename(name, to) in names for name in (*_COMMON, *others)) for to in _FROM_OURS}
    best = max(_FROM_OURS, key=lambda to: found[to])
    # Biases have the same names in ours and minkowski's, so the one whose kernels match too wins.
    if found[best] < _ENOUGH:
        shown = ", ".join(map(printable, sorted(names)[:3])) or "nothing"
        raise ValueError(f"the entries ({shown}, ...) are of no ConvNeXt in a format of {', '.join(FORMATS)}")
    return best


def from_state(
    state: Mapping[str, Tensor], spec: NetworkSpec | None = None
) -> tuple[Architecture, str, dict[str, Tensor], dict[str, str]]:
    """Convert weights from any format's names to ours; networks other than ConvNeXt have our names already.

    Args:
        state: named tensors, with or without a prefix and wrappers, see `network_in`.
        spec: the network that they must belong to, with any stem stride; None detects which ConvNeXt.

    Returns:
        The architecture, the format found, the tensors under our names and in our shapes (views where possible), and a
        mapping from our names to theirs. A final norm that is the identity, without a head, counts as none.

    Raises:
        ValueError: with a list, if an entry is missing, extra or of another shape; see `network_in` too.
    """
    _, original = network_in(state)
    named = {name: state[key] for name, key in original.items()}
    found: NetworkSpec
    if spec is None or isinstance(spec, ConvNeXtSpec):
        source = detect(named)
        found = _find_spec(named, source)
    else:
        stride = _stem_stride(named, OURS) if spec.stem_tells_stride else spec.stem_stride
        source, found = OURS, spec.model_copy(update={"stem_stride": stride})
    spec = found if spec is None else spec.model_copy(update={"stem_stride": found.stem_stride})
    architecture = _architecture(named, source, spec)
    rest = dict(named)
    ours: dict[str, Tensor] = {}
    problems = []
    for name, shape in architecture.shapes().items():
        theirs = rename(name, source)
        value = rest.pop(theirs, None)
        needed = _shape_in(source, spec, name, shape)
        if value is None:
            problems.append(f"missing: {theirs} {needed}")
        elif _without_ones(value.shape) != _without_ones(needed):
            other = " (prefix = encoder leaves it out)" if name.startswith("decoder.pred.") else ""  # not of pixels
            problems.append(f"shape: {theirs} is {tuple(value.shape)}, {describe(spec)} needs {needed}{other}")
        else:
            ours[name] = (
                _from_kernel(value.reshape(needed), shape) if theirs.endswith(".kernel") else value.reshape(shape)
            )
    problems += [f"extra: {printable(name)} {tuple(value.shape)}" for name, value in rest.items()]
    if problems:
        looks = "" if found == spec else f" (they look like {describe(found)})"
        raise ValueError(
            f"the weights, in {source}'s layout, are not those of {describe(spec)}{looks}:\n  " + "\n  ".join(problems)
        )
    if (
        not architecture.num_classes
        and architecture.final_norm
        and _is_identity(ours["norm.weight"], ours["norm.bias"])
    ):
        # timm has the identity in place of a norm that was never trained.
        del ours["norm.weight"], ours["norm.bias"]
        architecture = replace(architecture, final_norm=False)
    return architecture, source, ours, {name: original[rename(name, source)] for name in ours}


def _is_identity(weight: Tensor, bias: Tensor) -> bool:
    return bool(weight.eq(1).all() and bias.eq(0).all())


def to_state(state: Mapping[str, Tensor], spec: NetworkSpec, to: str) -> dict[str, Tensor]:
    """Our tensors under a format's names and in its shapes; what the format has no place for is left out.

    timm and transformers always have a final norm, which FCMAE does not train: it is then the identity.
    transformers' classifiers hold the encoder under the model's name. Networks other than ConvNeXt keep our names.

    Args:
        state: tensors under our names.
        spec: the network that they belong to.
        to: the format.
    """
    if not isinstance(spec, ConvNeXtSpec):
        return {name: value for name, value in state.items() if holds(name, to)}
    prefix = ""
    if to == "transformers" and "head.weight" in state:
        prefix = "convnextv2." if spec.use_grn else "convnext."
    named = dict(state)
    if to in ("timm", "transformers") and "norm.weight" not in named:
        like = named[f"encoder.downsample_layers.{spec.num_stages - 1}.1.bias"]
        named |= {"norm.weight": torch.ones_like(like), "norm.bias": torch.zeros_like(like)}
    result = {}
    for name, value in named.items():
        if holds(name, to):
            theirs, shape = rename(name, to), _shape_in(to, spec, name, tuple(value.shape))
            key = theirs if theirs.startswith("classifier.") else prefix + theirs
            result[key] = _to_kernel(value) if theirs.endswith(".kernel") else value.reshape(shape)
    return result


def _find_spec(tensors: Mapping[str, Tensor], source: str) -> ConvNeXtSpec:
    """The network that the tensors look like. Where several tell a number, the majority decides: one may be wrong.

    Raises ValueError if they belong to no possible network.
    """

    def of(name: str) -> Tensor | None:
        return tensors.get(rename(name, source))

    def most(names: Iterable[tuple[str, int]]) -> int:
        return _most_told(tensors, source, names) or 1

    stages: list[list[str]] = []
    for i in range(4):
        there = [
            j for j in range(MAX_DEPTH) if any(of(f"encoder.stages.{i}.{j}.{name}") is not None for name, _ in _WIDTH)
        ]
        if there:
            stages.append([f"encoder.stages.{i}.{j}" for j in range(there[-1] + 1)])
    every = [block for stage in stages for block in stage]
    kernels = [kernel.shape for block in every if (kernel := of(f"{block}.dwconv.weight")) is not None and kernel.ndim]
    sides = Counter(math.isqrt(shape[0]) if source in _SPARSE else shape[-1] for shape in kernels)
    odd = [side for side, _ in sides.most_common() if side % 2]
    if len(stages) < 2:
        raise ValueError(f"the entries, in {source}'s layout, have {len(stages)} stages: a ConvNeXt has 2 to 4")
    try:
        return ConvNeXtSpec(
            depths=tuple(map(len, stages)),
            dims=tuple(most((f"{block}.{name}", dim) for block in stage for name, dim in _WIDTH) for stage in stages),
            stem_stride=_stem_stride(tensors, source),
            kernel_size=odd[0] if odd else 7,
            hidden=tuple(tuple(most((f"{b}.{name}", dim) for name, dim in _HIDDEN) for b in stage) for stage in stages),
            use_grn=any(of(f"{block}.grn.{p}") is not None for block in every for p in ("gamma", "beta")),
            dense_stem=any(of(f"encoder.initial_conv.{p}.bias") is not None for p in (0, 1)),
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ValueError(
            f"the shapes are of no ConvNeXt: its {wrong['loc'][0]} would be {wrong['input']}: {wrong['msg']}"
        ) from error


def _stem_stride(tensors: Mapping[str, Tensor], source: str) -> int:
    stem = tensors.get(rename(_STEM, source))
    if stem is not None and source == MMEARTH:  # (s * s, C)
        return math.isqrt(stem.shape[0]) or 4 if stem.ndim > 1 else 1
    return 4 if stem is None or stem.ndim < 3 else stem.shape[2] or 4


def _most_told(tensors: Mapping[str, Tensor], source: str, names: Iterable[tuple[str, int]]) -> int:
    """The size that most of our parameters `names` have in the dimension given with each; 0 if none is there."""
    found = [(tensors.get(rename(name, source)), dim) for name, dim in names]
    counted = Counter(value.shape[dim] for value, dim in found if value is not None and value.ndim > max(dim, 0))
    counted.pop(0, None)
    return counted.most_common(1)[0][0] if counted else 0


def _architecture(tensors: Mapping[str, Tensor], source: str, spec: NetworkSpec) -> Architecture:
    """The rest of the architecture, as far as tensors tell; missing or misshapen ones are found later by comparison."""

    def size(name: str, dim: int, default: int) -> int:
        value = tensors.get(rename(name, source))
        return value.shape[dim] if value is not None and value.ndim > dim else default

    blocks = [
        f"decoder.blocks.{i}"
        for i in range(MAX_DEPTH)
        if any(rename(f"decoder.blocks.{i}.{name}", source) in tensors for name, _ in _WIDTH)
    ]
    widths = [(f"{block}.{name}", dim) for block in blocks for name, dim in _WIDTH]
    has_decoder = holds("decoder.pred.weight", source) and any(
        rename(name, source) in tensors for name in ("decoder.mask_token", "decoder.proj.weight", "decoder.pred.weight")
    )
    num_classes = max(size("head.weight", 0, 0), size("head.bias", 0, 0))
    return Architecture(
        spec,
        in_chans=max(1, size(first_weight(spec), 1, 3)),
        decoder_depth=max(1, len(blocks)) if has_decoder else 0,
        decoder_dim=_most_told(tensors, source, (*_DECODER_WIDTH, *widths)) or 512 if has_decoder else 0,
        final_norm=(num_classes > 0 and spec.has_final_norm)
        or any(rename(f"norm.{p}", source) in tensors for p in ("weight", "bias")),
        num_classes=num_classes,
    )


def _shape_in(to: str, spec: NetworkSpec, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a format of our parameter `name`, whose shape is `shape`."""
    layer, parameter = name.split(".")[-2:] if "." in name else ("", name)
    is_stem = name.startswith(("encoder.initial_conv.", "encoder.downsample_layers.0."))
    is_sparse = to == MMEARTH or (to == "minkowski" and name.startswith("encoder.") and not is_stem)
    if to == "timm":
        if layer == "grn":
            return shape[-1:]
        if layer in ("pwconv1", "pwconv2") and parameter == "weight" and _is_convolutional_in_timm(spec):
            return (*shape, 1, 1)
    if is_sparse:
        if rename(name, to).endswith(".kernel"):
            outputs, inputs, *kernel = shape
            is_depthwise = layer == "dwconv" or name == _STEM
            return (math.prod(kernel), outputs) if is_depthwise else (math.prod(kernel), inputs, outputs)
        if layer == "grn" or (parameter == "bias" and layer in ("dwconv", "0" if is_stem else "1")):
            return (1, shape[-1])
    return shape


def _is_convolutional_in_timm(spec: NetworkSpec) -> bool:
    name = variant_of(spec)
    return name is not None and name.endswith(_TIMM_CONVOLUTIONAL)


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
    """The shape without singletons, whose number differs between files of one format."""
    return tuple(size for size in shape if size != 1)
