"""The numbers that define a network, and published networks by name. Without torch, as settings are checked by them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, SerializeAsAny, model_validator

MLP_RATIO = 4  # of a block's expanded width to its own, where a spec does not say

MAX_DEPTH = 64  # blocks of a stage

# The limits exceed any network's: a damaged file must not describe one that takes all memory.
Widths = tuple[Annotated[int, Field(gt=0, le=2**18)], ...]
Depths = tuple[Annotated[int, Field(gt=0, le=MAX_DEPTH)], ...]


Affinity = Literal["static", "dynamic", "mixed"]


def _odd(side: int) -> int:
    if side % 2 == 0:
        raise ValueError(f"{side} is even: a kernel needs a centre, use {side - 1} or {side + 1}")
    return side


KernelSize = Annotated[int, Field(ge=1, le=255), AfterValidator(_odd)]


class NetworkSpec(BaseModel):
    """What every network has: two to four stages, each at half the resolution of the one before it.

    Stored as JSON in settings, checkpoints and exports, see `Spec`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    depths: Annotated[Depths, Field(min_length=2, max_length=4)]
    """Blocks in each stage."""
    dims: Widths
    """Channels of each stage."""
    stem_stride: Annotated[int, Field(gt=0, le=128)] = 4
    """Pixels along a side of one site of the first stage."""

    @model_validator(mode="after")
    def _has_a_width_a_stage(self) -> NetworkSpec:
        if len(self.dims) != len(self.depths):
            raise ValueError(
                f"dims has {len(self.dims)} stages and depths has {len(self.depths)}: give as many of each"
            )
        return self

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def total_stride(self) -> int:
        """Pixels along a side of one site of the last stage."""
        return self.stem_stride << (self.num_stages - 1)

    @property
    def hidden_widths(self) -> tuple[Widths, ...]:
        """Expanded channels of each block of each stage."""
        raise NotImplementedError

    @property
    def family(self) -> str:
        """Name of this kind of network."""
        raise NotImplementedError

    @property
    def peculiarities(self) -> list[str]:
        """What distinguishes the network from others of the same family, depths and dims, in a few words each."""
        return []

    @property
    def has_final_norm(self) -> bool:
        """Whether a classifier on the network normalises the pooled features."""
        return True

    @property
    def stem_tells_stride(self) -> bool:
        """Whether the stem's kernel is as large as its stride, so that weights reveal the stride."""
        return True

    @property
    def dense_only(self) -> str | None:
        """Why the network cannot compute on visible patches alone, as the predicate of a sentence; None if it can."""
        return None

    @property
    def has_batch_norm(self) -> bool:
        """Whether it has BatchNorm, so that images that are computed together change each other's result."""
        return False

    def settings(self) -> dict[str, Any]:
        """As in a file of settings: without usual values, and without the stride, which is a setting of its own."""
        numbers = self.model_dump(mode="json", exclude_defaults=True, exclude={"stem_stride"})
        return self.model_dump(include={"network"}) | numbers


class ConvNeXtSpec(NetworkSpec):
    """A ConvNeXt: V2 (GRN) or V1 (LayerScale).

    Source: arXiv 2301.00808, Appendix A.1, and arXiv 2201.03545, Sec. 3, which have four stages, a stem of stride 4,
    7x7 kernels and 4C hidden channels.
    """

    kernel_size: KernelSize = 7
    """Side of the depthwise kernels, odd."""
    hidden: tuple[Widths, ...] | None = None
    """Expanded channels of each block of each stage; null is 4 times the stage's."""
    use_grn: bool = True
    """V2's GRN; false is V1, with LayerScale."""
    dense_stem: bool = False
    """A 3x3 convolution, LayerNorm and GELU at every pixel before the stem, whose convolution is then depthwise, as
    MMEarth has it (arXiv 2405.02771)."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_usual_widths(cls, values: Any) -> Any:
        """The same network has one spec: hidden widths that are 4 times the stage's are left out."""
        if isinstance(values, dict) and values.get("hidden") is not None:
            try:
                stages = zip(values["depths"], values["dims"], values["hidden"], strict=True)
                # Nothing is made of numbers that are not checked yet, which may be of any size.
                is_usual = all(len(given) == num and set(given) == {MLP_RATIO * dim} for num, dim, given in stages)
            except (KeyError, TypeError, ValueError):
                return values  # refused field by field
            if is_usual:
                return {**values, "hidden": None}
        return values

    @model_validator(mode="after")
    def _has_a_hidden_width_a_block(self) -> ConvNeXtSpec:
        if self.hidden is not None and tuple(map(len, self.hidden)) != self.depths:
            raise ValueError(
                f"hidden has {list(map(len, self.hidden))} blocks and depths has {list(self.depths)}: one width a block"
            )
        return self

    @property
    def hidden_widths(self) -> tuple[Widths, ...]:
        return self.hidden or _usual_widths(self.depths, self.dims)

    @property
    def family(self) -> str:
        return "ConvNeXt V2" if self.use_grn else "ConvNeXt"

    @property
    def peculiarities(self) -> list[str]:
        told = {
            f"kernel {self.kernel_size}": self.kernel_size != 7,
            f"hidden widths of its own, {sum(map(sum, self.hidden_widths))} in all": self.hidden is not None,
            "a dense stem": self.dense_stem,
        }
        return [words for words, are_so in told.items() if are_so]


def _usual_widths(depths: Depths, dims: Widths) -> tuple[Widths, ...]:
    return tuple((MLP_RATIO * dim,) * depth for depth, dim in zip(depths, dims, strict=False))


class ContainerSpec(NetworkSpec):
    """A CONTAINER, whose blocks mix sites by a learnt kernel (static affinity), attention (dynamic), or both (mixed).

    Source: arXiv 2106.01401 and its released code, which have four stages, 5x5 kernels and 16 heads.
    """

    network: Literal["container"] = "container"
    """Tells the numbers of a CONTAINER from those of other networks."""
    affinity: tuple[Affinity, ...]
    """What the blocks of each stage mix sites by."""
    mlp_ratios: tuple[Annotated[int, Field(gt=0, le=64)], ...]
    """Expanded channels of each stage's blocks, as a multiple of the stage's."""
    num_heads: Annotated[int, Field(gt=0, le=2**10)] = 16
    """Heads of the attention."""
    mix: Literal["free", "convex"] = "free"
    """Of mixed blocks: free is the paper's alpha * dynamic + beta * static; convex the released code's
    s * dynamic + (1 - s) * static, s a sigmoid."""

    @model_validator(mode="after")
    def _has_one_a_stage(self) -> ContainerSpec:
        for name in ("affinity", "mlp_ratios"):
            if (given := len(getattr(self, name))) != self.num_stages:
                raise ValueError(f"{name} has {given} stages and depths has {self.num_stages}: give as many of each")
        for dim, affinity in zip(self.dims, self.affinity, strict=True):
            if affinity != "static" and dim % self.num_heads:
                raise ValueError(f"{dim} of dims is no multiple of the {self.num_heads} heads: choose num_heads")
        return self

    @property
    def hidden_widths(self) -> tuple[Widths, ...]:
        stages = zip(self.depths, self.dims, self.mlp_ratios, strict=True)
        return tuple((ratio * dim,) * depth for depth, dim, ratio in stages)

    @property
    def family(self) -> str:
        return "CONTAINER"

    @property
    def peculiarities(self) -> list[str]:
        ratios = "-".join(map(str, self.mlp_ratios))
        words = [f"affinity {'-'.join(self.affinity)}", f"MLP ratios {ratios}", f"{self.num_heads} heads"]
        return words if self.mix == "free" else [*words, "convex mix"]


class RoadmapSpec(NetworkSpec):
    """A network on the way from ResNet to ConvNeXt: where a field is false, the network is as in ResNet.

    A block is three convolutions, one of which looks at neighbours. `dims` are the output channels of blocks: a
    bottleneck has a quarter of them inside, an inverted one four times as many.

    Source: arXiv 2201.03545, Sec. 2; the steps are those of `road`.
    """

    network: Literal["roadmap"] = "roadmap"
    """Tells the numbers of the roadmap from those of other networks."""
    patchify: bool = False
    """The stem is one convolution of the stem's stride, in place of a 7x7 one and pooling."""
    depthwise: bool = False
    """The convolution that looks at neighbours is depthwise."""
    inverted: bool = False
    """Blocks are wide inside."""
    moved_up: bool = False
    """The convolution that looks at neighbours comes first in a block, not second."""
    kernel_size: KernelSize = 3
    """Side of that convolution's kernel, odd."""
    gelu: bool = False
    """GELU instead of ReLU."""
    fewer_activations: bool = False
    """One activation in a block, after its first 1x1 convolution, and none after the stem."""
    fewer_norms: bool = False
    """One norm in a block, after the convolution that looks at neighbours."""
    layer_norm: bool = False
    """LayerNorm instead of BatchNorm, and convolutions with biases."""
    separate_downsampling: bool = False
    """A norm and a 2x2 convolution of stride 2 between stages, in place of a stride in their first blocks; and a norm
    after pooling."""

    @model_validator(mode="after")
    def _has_a_quarter(self) -> RoadmapSpec:
        for dim in () if self.inverted else self.dims:
            if dim % MLP_RATIO:
                raise ValueError(f"{dim} of dims is no multiple of 4, and a bottleneck has a quarter of it inside")
        return self

    @property
    def hidden_widths(self) -> tuple[Widths, ...]:
        if self.inverted:
            return _usual_widths(self.depths, self.dims)
        return tuple((dim // MLP_RATIO,) * depth for depth, dim in zip(self.depths, self.dims, strict=True))

    @property
    def family(self) -> str:
        return "network of the roadmap"

    @property
    def peculiarities(self) -> list[str]:
        steps = self.model_dump(exclude_defaults=True, exclude={"depths", "dims", "stem_stride", "kernel_size"})
        kernel = [] if self.kernel_size == 3 else [f"kernel {self.kernel_size}"]
        return [step.replace("_", " ") for step in steps] + kernel

    @property
    def has_final_norm(self) -> bool:
        return self.separate_downsampling

    @property
    def stem_tells_stride(self) -> bool:
        return self.patchify

    @property
    def has_batch_norm(self) -> bool:
        return not self.layer_norm

    @property
    def dense_only(self) -> str | None:
        if self.has_batch_norm:
            return "has BatchNorm, whose statistics would be of visible sites in training and of all sites afterwards"
        if not (self.patchify and self.depthwise and self.separate_downsampling):
            return "has convolutions that see over the borders of patches and are not depthwise of stride 1"
        return None


NETWORKS: dict[str, type[NetworkSpec]] = {
    "convnext": ConvNeXtSpec,
    "container": ContainerSpec,
    "roadmap": RoadmapSpec,
}


def read_spec(value: Any) -> NetworkSpec:
    """A spec from numbers, which may name the kind of network; otherwise it is a ConvNeXt.

    Args:
        value: a mapping, or a spec.

    Raises:
        ValueError: if there is no such network, or the numbers are not valid for it.
    """
    if isinstance(value, NetworkSpec):
        return type(value).model_validate(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} are no numbers of a network: give depths and dims")
    name = value.get("network", "convnext")
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"network is {name!r}: use {' or '.join(NETWORKS)}")
    network = NETWORKS[name]
    known = "network" in network.model_fields
    return network.model_validate({key: each for key, each in value.items() if key != "network" or known})


Spec = Annotated[NetworkSpec, PlainValidator(read_spec), SerializeAsAny()]


class Regime(NamedTuple):
    """The numbers of the networks along the roadmap.

    Attributes:
        depths: blocks of each stage: in the ResNet, and from the step "stage-ratio" on.
        widths: of the first stage's 3x3 convolutions: in the ResNet, from "stage-ratio" on, and from "width" on.
        published: top-1 accuracy on ImageNet-1k in %, by step; arXiv 2201.03545, Sec. 2.
        own_recipe: that of the ResNet as it was first published, trained by its own recipe.
    """

    depths: tuple[Depths, Depths]
    widths: tuple[int, int, int]
    published: Mapping[str, float]
    own_recipe: float | None = None


class RoadmapStep(NamedTuple):
    """A line of the roadmap.

    Attributes:
        name: of the step.
        of: the name of the step that it changes.
        line: the change in words.
        spec: the network after it.
    """

    name: str
    of: str
    line: str
    spec: RoadmapSpec


REGIMES = {
    "roadmap": Regime(
        ((3, 4, 6, 3), (3, 3, 9, 3)),
        (64, 64, 96),
        {
            "resnet": 78.8,
            "stage-ratio": 79.4,
            "patchify": 79.5,
            "depthwise": 78.3,
            "width": 80.5,
            "inverted": 80.6,
            "move-up": 79.9,
            "kernel-7": 80.6,
            "gelu": 80.6,
            "fewer-activations": 81.3,
            "fewer-norms": 81.4,
            "layer-norm": 81.5,
            "downsampling": 82.0,
        },
        own_recipe=76.1,
    ),
    "roadmap-200": Regime(((3, 24, 36, 3), (3, 3, 27, 3)), (64, 84, 128), {"width": 81.9, "inverted": 82.6}),
    # A third of the depth and a quarter of the width, for small images.
    "roadmap-small": Regime(((1, 1, 2, 1), (1, 1, 3, 1)), (16, 16, 24), {}),
}


def road(regime: Regime) -> list[RoadmapStep]:
    """The steps from a ResNet to a ConvNeXt without LayerScale, in the order of the paper.

    Args:
        regime: its numbers; one of REGIMES, or others.
    """
    (resnet, ratio), (narrow, middle, wide) = regime.depths, regime.widths
    bottleneck = _doubling(MLP_RATIO * middle)
    slimmer = "" if middle == narrow else f", width {middle}"
    # Name, what it changes, how, and in words.
    lines: list[tuple[str, str, dict[str, Any], str]] = [
        ("resnet", "", {}, f"ResNet of depths {_dashed(resnet)}, width {narrow}"),
        ("stage-ratio", "resnet", {"depths": ratio, "dims": bottleneck}, f"depths {_dashed(ratio)}{slimmer}"),
        ("patchify", "stage-ratio", {"patchify": True}, "a stem of patches, for 7x7 and pooling"),
        ("depthwise", "patchify", {"depthwise": True}, "depthwise 3x3"),
        ("width", "depthwise", {"dims": _doubling(MLP_RATIO * wide)}, f"width {wide}, for {middle}"),
        ("inverted", "width", {"inverted": True, "dims": _doubling(wide)}, "blocks wide inside, not outside"),
        ("move-up", "inverted", {"moved_up": True}, "the depthwise first in its block"),
        *((f"kernel-{k}", "move-up", {"kernel_size": k}, f"depthwise {k}x{k}, for 3x3") for k in (5, 7, 9, 11)),
        ("gelu", "kernel-7", {"gelu": True}, "GELU, for ReLU; 7x7 from here on"),
        ("fewer-activations", "gelu", {"fewer_activations": True}, "one activation a block, between the 1x1s"),
        ("fewer-norms", "fewer-activations", {"fewer_norms": True}, "one norm a block, before the 1x1s"),
        ("layer-norm", "fewer-norms", {"layer_norm": True}, "LayerNorm, for BatchNorm; biases"),
        (
            "downsampling",
            "layer-norm",
            {"separate_downsampling": True},
            "2x2 between stages; norms there and after pooling",
        ),
    ]
    specs = {"": RoadmapSpec(depths=resnet, dims=_doubling(MLP_RATIO * narrow))}
    for name, of, change, _ in lines:
        specs[name] = specs[of].model_copy(update=change)
    return [RoadmapStep(name, of, line, specs[name]) for name, of, _, line in lines]


def _doubling(dim: int) -> Widths:
    return tuple(dim << stage for stage in range(4))


def _dashed(numbers: Depths) -> str:
    return "-".join(map(str, numbers))


def _v1(depths: Depths, dims: Widths) -> ConvNeXtSpec:
    return ConvNeXtSpec(depths=depths, dims=dims, use_grn=False)


def _v2(depths: Depths, dims: Widths) -> ConvNeXtSpec:
    return ConvNeXtSpec(depths=depths, dims=dims)


def _container(*affinity: Affinity) -> ContainerSpec:
    return ContainerSpec(
        depths=(3, 4, 8, 3), dims=(64, 128, 320, 512), affinity=affinity, mlp_ratios=(8, 8, 4, 4), num_heads=16
    )


# `small` of V2, and V1 below `tiny`, are timm's.
VARIANTS: dict[str, NetworkSpec] = {
    "convnextv2_atto": _v2((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": _v2((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": _v2((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": _v2((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": _v2((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_small": _v2((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnextv2_base": _v2((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": _v2((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": _v2((3, 3, 27, 3), (352, 704, 1408, 2816)),
    "convnext_atto": _v1((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_femto": _v1((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnext_pico": _v1((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnext_nano": _v1((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext_tiny": _v1((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": _v1((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": _v1((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": _v1((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": _v1((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "container_light": _container("static", "static", "static", "mixed"),
    "container": _container("mixed", "mixed", "mixed", "mixed"),
}

LISTED = [*VARIANTS, *(f"{name}/STEP" for name in REGIMES)]  # for messages; `fcmae roadmap` lists the steps
VARIANTS |= {f"{name}/{step.name}": step.spec for name, regime in REGIMES.items() for step in road(regime)}


def variant_named(word: str) -> str:
    """The whole name of a variant of VARIANTS; its last word is enough: atto is convnextv2_atto.

    Raises:
        ValueError: if there is no such variant; it names the nearest, or all.
    """
    for name in VARIANTS:
        if name == word or name.endswith(f"_{word}"):
            return name
    raise ValueError(f"{word!r} is no variant: use {' or '.join(variants_near(word)) or 'one of ' + ', '.join(LISTED)}")


def variants_near(word: str) -> list[str]:
    """Variants that a mistyped name, or last word of one, may mean; empty if none is near."""
    words = {short: name for name in reversed(VARIANTS) for short in (name, name.rpartition("_")[2])}
    return list(dict.fromkeys(words[found] for found in get_close_matches(word, words, cutoff=0.7)))


def variant_of(spec: NetworkSpec) -> str | None:
    """The name of a spec among VARIANTS, whatever its stem's stride; None if it has none."""
    published = spec.model_copy(update={"stem_stride": 4})
    return next((name for name, known in VARIANTS.items() if known == published), None)


def describe(spec: NetworkSpec) -> str:
    """A few words for logs and messages: the variant's name, or the numbers."""
    name = variant_of(spec)
    if name is None:
        name = f"{spec.family} of depths {'-'.join(map(str, spec.depths))}, dims {'-'.join(map(str, spec.dims))}"
        name = ", ".join([name, *spec.peculiarities])
    return name if spec.stem_stride == 4 else f"{name}, stem stride {spec.stem_stride}"
