"""The numbers of a network: what is refused, when two are the same, and what they are called."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import CONVNEXTS
from pydantic import ValidationError

from fcmae.networks.spec import (
    VARIANTS,
    ContainerSpec,
    ConvNeXtSpec,
    NetworkSpec,
    describe,
    read_spec,
    variant_named,
    variant_of,
)

CONTAINER = ContainerSpec(depths=(1, 2), dims=(16, 32), affinity=("static", "mixed"), mlp_ratios=(8, 4))


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"depths": [2]}, "at least 2 items"),
        ({"depths": [1, 1, 1, 1, 1], "dims": [8] * 5}, "at most 4 items"),
        ({"dims": [8, 8, 8]}, "dims has 3 stages and depths has 2: give as many of each"),
        ({"depths": [1, 0]}, "greater than 0"),
        ({"dims": [8, -8]}, "greater than 0"),
        ({"stem_stride": 0}, "greater than 0"),
        ({"kernel_size": 4}, "4 is even: a kernel needs a centre, use 3 or 5"),
        ({"kernel_size": 0}, "greater than or equal to 1"),
        ({"hidden": [[32], [32]]}, r"hidden has \[1, 1\] blocks and depths has \[1, 2\]: one width a block"),
        ({"hidden": [[32], [32, 0]]}, "greater than 0"),
        ({"depths": [10**12, 1], "hidden": [[32], [32]]}, "less than or equal to 64"),
        ({"hidden": 32}, "valid tuple"),
        ({"hidden": [32, 64]}, "valid tuple"),
        ({"widths": [8]}, "not permitted"),
    ],
)
def test_numbers_of_no_network_are_refused(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ConvNeXtSpec.model_validate({"depths": [1, 2], "dims": [8, 16]} | numbers)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"affinity": ["static"]}, "affinity has 1 stages and depths has 2: give as many of each"),
        ({"mlp_ratios": [4, 4, 4]}, "mlp_ratios has 3 stages and depths has 2"),
        ({"dims": [16, 40]}, "40 of dims is no multiple of the 16 heads: choose num_heads"),
        ({"affinity": ["static", "both"]}, "'static', 'dynamic' or 'mixed'"),
        ({"use_grn": True}, "not permitted"),
        ({"network": "resnet"}, "network is 'resnet': use convnext or container"),
        ({"network": ["container"]}, r"network is \['container'\]: use convnext or container"),
    ],
)
def test_numbers_of_no_container_are_refused(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_spec(CONTAINER.model_dump() | numbers)
    # A width that attention could not share among its heads is right where there is none.
    assert read_spec(CONTAINER.model_dump() | {"dims": [17, 32]}) != CONTAINER


def test_numbers_tell_which_network_they_are_of_and_without_a_word_a_convnext() -> None:
    assert CONTAINER.settings() == {
        "network": "container",
        "depths": [1, 2],
        "dims": [16, 32],
        "affinity": ["static", "mixed"],
        "mlp_ratios": [8, 4],
    }
    plain = ConvNeXtSpec(depths=(1, 2), dims=(16, 32))
    assert plain.settings() == {"depths": [1, 2], "dims": [16, 32]} and "network" not in plain.model_dump()
    for said in ({}, {"network": "convnext"}):
        assert read_spec({"depths": [1, 2], "dims": [16, 32]} | said) == plain != CONTAINER
    assert read_spec(CONTAINER) == CONTAINER and CONTAINER.hidden_widths == ((128,), (128, 128))


@pytest.mark.parametrize("missing", ["depths", "dims"])
def test_depths_and_dims_must_be_given(missing: str) -> None:
    numbers = {"depths": [1, 2], "dims": [8, 16], "hidden": [[32], [64, 64]]}
    del numbers[missing]
    with pytest.raises(ValidationError, match="Field required"):
        ConvNeXtSpec.model_validate(numbers)


def test_a_network_has_one_spec_whether_its_usual_widths_are_written_out_or_not() -> None:
    plain = ConvNeXtSpec(depths=(1, 2), dims=(8, 16))
    for hidden in (((32,), (64, 64)), [[32], [64, 64]]):
        written = ConvNeXtSpec.model_validate({"depths": [1, 2], "dims": [8, 16], "hidden": hidden})
        assert written == plain
        assert hash(written) == hash(plain)
        assert written.hidden is None
    other = ConvNeXtSpec(depths=(1, 2), dims=(8, 16), hidden=((32,), (64, 48)))
    assert other != plain
    assert (plain.hidden_widths, other.hidden_widths) == (((32,), (64, 64)), ((32,), (64, 48)))


def test_a_spec_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        VARIANTS["convnextv2_atto"].stem_stride = 2


@pytest.mark.parametrize(
    "spec",
    [
        *VARIANTS.values(),
        ConvNeXtSpec(depths=(1, 2, 1), dims=(8, 16, 24), stem_stride=2, kernel_size=3, use_grn=False),
        ConvNeXtSpec(depths=(1, 2), dims=(8, 16), hidden=((5,), (7, 9))),
        CONTAINER,
        CONTAINER.model_copy(update={"mix": "convex", "num_heads": 2, "stem_stride": 1}),
    ],
)
def test_json_gives_the_same_spec_back(spec: NetworkSpec) -> None:
    assert read_spec(json.loads(json.dumps(spec.model_dump()))) == spec
    assert read_spec(spec.settings() | {"stem_stride": spec.stem_stride}) == spec


@pytest.mark.parametrize(("num_stages", "stride"), [(2, 1), (3, 1), (4, 1), (2, 4), (3, 2), (4, 3), (4, 4)])
def test_each_stage_after_the_first_doubles_the_stride(num_stages: int, stride: int) -> None:
    spec = ConvNeXtSpec(depths=(1,) * num_stages, dims=(8,) * num_stages, stem_stride=stride)
    assert spec.num_stages == num_stages
    assert spec.total_stride == {2: 2, 3: 4, 4: 8}[num_stages] * stride


@pytest.mark.parametrize("name", CONVNEXTS)
def test_a_published_network_is_known_by_its_numbers_at_any_stem_stride(name: str) -> None:
    spec = VARIANTS[name]
    small = spec.model_copy(update={"stem_stride": 1})
    assert variant_of(spec) == variant_of(small) == name
    assert (describe(spec), describe(small)) == (name, f"{name}, stem stride 1")
    for change in ({"kernel_size": 5}, {"depths": (2, 2, 7, 2)}, {"dims": (1, 2, 3, 4)}):
        assert variant_of(spec.model_copy(update=change)) is None
    assert variant_of(spec.model_copy(update={"use_grn": not spec.use_grn})) != name


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({}, "ConvNeXt V2 of depths 1-2, dims 8-16"),
        ({"use_grn": False}, "ConvNeXt of depths 1-2, dims 8-16"),
        ({"kernel_size": 5, "stem_stride": 2}, "ConvNeXt V2 of depths 1-2, dims 8-16, kernel 5, stem stride 2"),
        ({"hidden": ((32,), (64, 48))}, "ConvNeXt V2 of depths 1-2, dims 8-16, hidden widths of its own, 144 in all"),
    ],
)
def test_other_networks_are_described_by_their_numbers(numbers: dict[str, Any], words: str) -> None:
    assert describe(ConvNeXtSpec(depths=(1, 2), dims=(8, 16), **numbers)) == words


@pytest.mark.parametrize("name", ["container_light", "container"])
def test_a_container_is_known_by_its_numbers(name: str) -> None:
    small = VARIANTS[name].model_copy(update={"stem_stride": 1})
    assert (variant_named(name), variant_of(small)) == (name, name)
    assert describe(small) == f"{name}, stem stride 1"
    assert variant_of(small.model_copy(update={"mix": "convex"})) is None
    assert variant_named("light") == "container_light"


def test_a_container_is_described_by_its_numbers() -> None:
    words = "CONTAINER of depths 1-2, dims 16-32, affinity static-mixed, MLP ratios 8-4, 16 heads"
    assert describe(CONTAINER) == words
    assert describe(CONTAINER.model_copy(update={"mix": "convex", "stem_stride": 2})) == (
        f"{words}, convex mix, stem stride 2"
    )
