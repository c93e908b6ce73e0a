"""The numbers that define a network, and the published ones by name. No torch: settings are checked against them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MLP_RATIO = 4  # of a block's expanded width to its own, where a spec does not say

MAX_DEPTH = 64  # blocks of a stage

# The limits are beyond any network's: a damaged file must not ask for one that takes all memory to describe.
Widths = tuple[Annotated[int, Field(gt=0, le=2**18)], ...]
Depths = tuple[Annotated[int, Field(gt=0, le=MAX_DEPTH)], ...]


class ConvNeXtSpec(BaseModel):
    """A ConvNeXt of two to four stages: V2 (GRN) or V1 (LayerScale). Travels in checkpoints and exports as JSON.

    Source: arXiv 2301.00808, Appendix A.1, and arXiv 2201.03545, Sec. 3, which have four stages, a stem of stride 4,
    7x7 kernels and 4C hidden channels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    depths: Annotated[Depths, Field(min_length=2, max_length=4)]
    """Blocks in each stage."""
    dims: Widths
    """Channels of each stage."""
    stem_stride: Annotated[int, Field(gt=0, le=128)] = 4
    """Side and stride of the stem's convolution."""
    kernel_size: Annotated[int, Field(ge=1, le=255)] = 7
    """Side of the depthwise kernels, odd."""
    hidden: tuple[Widths, ...] | None = None
    """Expanded channels of each block of each stage; null is 4 times the stage's."""
    use_grn: bool = True
    """V2's GRN; false is V1, with LayerScale."""
    dense_stem: bool = False
    """A 3x3 convolution, LayerNorm and GELU at every pixel before the stem, whose convolution is then depthwise, as
    MMEarth has it (arXiv 2405.02771)."""

    @field_validator("kernel_size")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"{value} is even: a kernel needs a centre, use {value - 1} or {value + 1}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _leave_out_usual_widths(cls, values: Any) -> Any:
        """The same network has one spec: hidden widths that are 4 times the stage's are left out."""
        if isinstance(values, dict) and values.get("hidden") is not None:
            try:
                usual = _usual_widths(values["depths"], values["dims"])
                given = tuple(tuple(stage) for stage in values["hidden"])
            except (KeyError, TypeError):
                return values  # refused field by field
            if given == usual:
                return {**values, "hidden": None}
        return values

    @model_validator(mode="after")
    def _fits(self) -> ConvNeXtSpec:
        if len(self.dims) != len(self.depths):
            raise ValueError(
                f"dims has {len(self.dims)} stages and depths has {len(self.depths)}: give as many of each"
            )
        if self.hidden is not None and tuple(map(len, self.hidden)) != self.depths:
            raise ValueError(
                f"hidden has {list(map(len, self.hidden))} blocks and depths has {list(self.depths)}: one width a block"
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
        return self.hidden or _usual_widths(self.depths, self.dims)


def _usual_widths(depths: Depths, dims: Widths) -> tuple[Widths, ...]:
    return tuple((MLP_RATIO * dim,) * depth for depth, dim in zip(depths, dims, strict=False))


def _v1(depths: Depths, dims: Widths) -> ConvNeXtSpec:
    return ConvNeXtSpec(depths=depths, dims=dims, use_grn=False)


def _v2(depths: Depths, dims: Widths) -> ConvNeXtSpec:
    return ConvNeXtSpec(depths=depths, dims=dims)


# `small` of V2, and V1 below `tiny`, are timm's.
VARIANTS: dict[str, ConvNeXtSpec] = {
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
}


def variant_named(word: str) -> str:
    """The whole name of a variant of VARIANTS, of which the last word is enough: atto is convnextv2_atto.

    Raises:
        ValueError: if there is none; the sentence names the nearest, or all.
    """
    for name in VARIANTS:
        if name == word or name.endswith(f"_{word}"):
            return name
    raise ValueError(
        f"{word!r} is no variant: use {' or '.join(variants_near(word)) or 'one of ' + ', '.join(VARIANTS)}"
    )


def variants_near(word: str) -> list[str]:
    """Variants that a mistyped word, whole or the last alone, may mean; none if none is near."""
    words = {short: name for name in reversed(VARIANTS) for short in (name, name.rpartition("_")[2])}
    return list(dict.fromkeys(words[found] for found in get_close_matches(word, words, cutoff=0.7)))


def variant_of(spec: ConvNeXtSpec) -> str | None:
    """The name of a spec among VARIANTS, whatever its stem's stride; None if it has none."""
    published = spec.model_copy(update={"stem_stride": 4})
    return next((name for name, known in VARIANTS.items() if known == published), None)


def describe(spec: ConvNeXtSpec) -> str:
    """A few words for logs and messages: the variant's name, or the numbers."""
    name = variant_of(spec)
    if name is None:
        kind = "ConvNeXt V2" if spec.use_grn else "ConvNeXt"
        name = f"{kind} of depths {'-'.join(map(str, spec.depths))}, dims {'-'.join(map(str, spec.dims))}"
        if spec.kernel_size != 7:
            name += f", kernel {spec.kernel_size}"
        if spec.hidden is not None:
            name += ", hidden widths of its own"
        if spec.dense_stem:
            name += ", a dense stem"
    return name if spec.stem_stride == 4 else f"{name}, stem stride {spec.stem_stride}"
