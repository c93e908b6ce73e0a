"""Which parameters decay, at which rate each learns, and when."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn

from fcmae.heads import Classifier
from fcmae.masked import build_fcmae
from fcmae.networks.convnext import Encoder
from fcmae.networks.encoder import layer_of, num_layers
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.training.optim import layer_decay_scale, learning_rate, parameter_groups, set_learning_rate
from fcmae.weights.formats import rename


def classifier_on_meta(variant: str) -> Classifier:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return Classifier(Encoder(VARIANTS[variant]), 3)


def fcmae_on_meta(variant: str) -> nn.Module:
    with torch.device("meta"):
        return build_fcmae(Encoder(VARIANTS[variant]), 16, 2)


@pytest.mark.parametrize("build", [fcmae_on_meta, classifier_on_meta])
@pytest.mark.parametrize("variant", ["convnextv2_atto", "convnext_tiny"])
def test_only_the_weights_of_convolutions_and_linear_layers_decay(
    build: Callable[[str], nn.Module], variant: str
) -> None:
    model = build(variant)
    # An independent reading of "no decay on biases, norms, GRN, LayerScale and the mask token": by kinds of layers.
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    found = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert found == expected
    held = [names[p] for group in groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())  # each exactly once


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    held = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}


def test_groups_carry_their_own_factor_on_the_learning_rate() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = parameter_groups(model, 0.1, lambda name: 0.5 if name.startswith("0.") else 1.0)
    assert {(g["weight_decay"], g["lr_scale"]) for g in groups} == {(0.0, 0.5), (0.1, 0.5), (0.0, 1.0), (0.1, 1.0)}
    adamw = torch.optim.AdamW(groups, lr=0.0)
    set_learning_rate(adamw, 0.2, 0)
    assert all(group["lr"] == 0.2 * group["lr_scale"] for group in adamw.param_groups)


def test_before_its_first_step_a_group_does_not_move() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    adamw = torch.optim.AdamW(parameter_groups(model, 0.1, first_step=lambda name: 2 if name[0] == "0" else 0), lr=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moved = []
    for step in range(3):
        adamw.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        set_learning_rate(adamw, 0.2, step)
        adamw.step()
        moved.append([not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)])
    # Not even its decay acts before.
    assert moved == [[False, False, True, True]] * 2 + [[True] * 4]


def layers_below(variant: str, mode: str) -> dict[str, set[int]]:
    """Layers from the head of every parameter of a classifier, by its module: downsample_layers.i, stages.i.j, ..."""
    spec = VARIANTS[variant]
    scale = layer_decay_scale(lambda name: layer_of(name, spec, mode), num_layers(spec, mode), 0.5)
    found: dict[str, set[int]] = {}
    for name, _ in classifier_on_meta(variant).named_parameters():
        parts = name.removeprefix("encoder.").split(".")
        module = ".".join(parts[: {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)])
        found.setdefault(module, set()).add(round(-math.log2(scale(name))))
    return found


@pytest.mark.parametrize("variant", ["convnextv2_atto", "convnext_tiny"])
def test_single_mode_is_timms_layer_decay_but_for_the_stem(variant: str) -> None:
    model = timm.create_model(variant, num_classes=3)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    factors = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    top = max(factors.values())
    theirs = {name: round(-math.log2(factors[p] / top)) for name, p in model.named_parameters()}
    spec = VARIANTS[variant]
    scale = layer_decay_scale(lambda name: layer_of(name, spec, "single"), num_layers(spec, "single"), 0.5)
    for name, _ in classifier_on_meta(variant).named_parameters():
        found, other = round(-math.log2(scale(name))), theirs[rename(name, "timm")]
        below = name.startswith("encoder.downsample_layers.0.")  # timm's stem lies a layer below the first block
        assert other == found + below, name


def test_single_mode_gives_each_block_of_atto_a_layer() -> None:
    # Worked by hand from the released code's rule: 12 blocks, the head above them; the stem shares the first block's.
    expected = {"head": 0, "norm": 0, "downsample_layers.0": 12}
    blocks = ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "2.2", "2.3", "2.4", "2.5", "3.0", "3.1"]
    for below, block in enumerate(reversed(blocks), start=1):
        expected[f"stages.{block}"] = below
    expected |= {"downsample_layers.1": 10, "downsample_layers.2": 8, "downsample_layers.3": 2}
    assert layers_below("convnextv2_atto", "single") == {name: {n} for name, n in expected.items()}


def test_group_mode_gives_base_twelve_groups_and_the_stem_below_them() -> None:
    # Released: ids 0 (stem), 1, 2 (stages 0, 1), 3..11 (threes of stage 2), 12 (stage 3), 13 (head); 13 - id here.
    ids = {"head": 13, "norm": 13}
    ids |= {"downsample_layers.0": 0, "downsample_layers.1": 2, "downsample_layers.2": 3, "downsample_layers.3": 12}
    ids |= {f"stages.0.{j}": 1 for j in range(3)} | {f"stages.1.{j}": 2 for j in range(3)}
    ids |= {f"stages.2.{j}": 3 + j // 3 for j in range(27)} | {f"stages.3.{j}": 12 for j in range(3)}
    found = layers_below("convnextv2_base", "group")
    assert found == {name: {13 - number} for name, number in ids.items()}
    assert len(set(ids.values()) - {0, 13}) == 12


def test_group_mode_works_for_depths_that_threes_do_not_divide() -> None:
    found = layers_below("convnextv2_nano", "group")
    assert found["stages.2.7"] == {2}  # the third, short group of stage 2
    assert found["stages.3.0"] == {1}
    assert found["stages.2.0"] == {4}
    assert found["downsample_layers.0"] == {7}


def test_layers_of_three_stages_decay_too() -> None:
    spec = ConvNeXtSpec(depths=(1, 2, 1), dims=(8, 8, 8))
    scale = layer_decay_scale(lambda name: layer_of(name, spec, "single"), num_layers(spec, "single"), 0.5)
    names = ["encoder.downsample_layers.0.0.weight", "encoder.stages.1.0.norm.bias", "encoder.stages.2.0.norm.bias"]
    assert [scale(name) for name in (*names, "head.weight")] == [2**-4, 2**-3, 2**-1, 1]


@pytest.mark.parametrize("mode", ["single", "group"])
def test_a_decay_of_one_leaves_every_rate_as_it_is(mode: str) -> None:
    spec = VARIANTS["convnextv2_atto"]
    scale = layer_decay_scale(lambda name: layer_of(name, spec, mode), num_layers(spec, mode), 1.0)
    assert {scale(name) for name, _ in classifier_on_meta("convnextv2_atto").named_parameters()} == {1.0}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.25),
        (3, 0.75),
        (4, 1.0),
        (6, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),
        (8, 0.6),
        (11, 0.2 + 0.8 * (1 - math.cos(math.pi / 8)) / 2),
    ],
)
def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine(step: int, expected: float) -> None:
    rate = learning_rate(step, peak=1.0, minimum=0.2, warmup_steps=4, total_steps=12)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, peak=3.0, minimum=0.0, warmup_steps=0, total_steps=10) == 3.0


@given(st.integers(0, 50), st.integers(1, 50), st.floats(0, 1), st.floats(1, 10))
def test_the_learning_rate_never_leaves_its_bounds(warmup: int, total: int, minimum: float, peak: float) -> None:
    rates = [learning_rate(s, peak=peak, minimum=minimum, warmup_steps=warmup, total_steps=total) for s in range(total)]
    assert all(-1e-9 <= rate <= peak + 1e-9 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(rate >= minimum - 1e-9 for rate in falling)
