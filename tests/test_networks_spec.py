"""The numbers of a network: what is refused, when two are the same, and what they are called."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from fcmae.networks.spec import VARIANTS, ConvNeXtSpec, describe, variant_of


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
        ({"hidden": 32}, "valid tuple"),
        ({"hidden": [32, 64]}, "valid tuple"),
        ({"widths": [8]}, "not permitted"),
    ],
)
def test_numbers_of_no_network_are_refused(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ConvNeXtSpec.model_validate({"depths": [1, 2], "dims": [8, 16]} | numbers)


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
    ],
)
def test_json_gives_the_same_spec_back(spec: ConvNeXtSpec) -> None:
    assert ConvNeXtSpec.model_validate(json.loads(json.dumps(spec.model_dump()))) == spec
    assert ConvNeXtSpec.model_validate_json(spec.model_dump_json(exclude_defaults=True)) == spec


@pytest.mark.parametrize(("num_stages", "stride"), [(2, 1), (3, 1), (4, 1), (2, 4), (3, 2), (4, 3), (4, 4)])
def test_each_stage_after_the_first_doubles_the_stride(num_stages: int, stride: int) -> None:
    spec = ConvNeXtSpec(depths=(1,) * num_stages, dims=(8,) * num_stages, stem_stride=stride)
    assert spec.num_stages == num_stages
    assert spec.total_stride == {2: 2, 3: 4, 4: 8}[num_stages] * stride


@pytest.mark.parametrize("name", VARIANTS)
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
        ({"hidden": ((32,), (64, 48))}, "ConvNeXt V2 of depths 1-2, dims 8-16, hidden widths of its own"),
    ],
)
def test_other_networks_are_described_by_their_numbers(numbers: dict[str, Any], words: str) -> None:
    assert describe(ConvNeXtSpec(depths=(1, 2), dims=(8, 16), **numbers)) == words
