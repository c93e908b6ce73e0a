"""Every step from ResNet to ConvNeXt is the network of the paper's table, and a step changes what its line says."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomize
from pydantic import ValidationError
from timm.layers import ConvNormAct
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fcmae.config import PretrainConfig
from fcmae.heads import Classifier
from fcmae.layouts import DENSE, make_layout
from fcmae.masked import build_fcmae
from fcmae.masking import random_mask
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import layer_of, num_layers
from fcmae.networks.roadmap import BatchNorm, Conv
from fcmae.networks.spec import (
    REGIMES,
    VARIANTS,
    RoadmapSpec,
    describe,
    read_spec,
    road,
    variant_named,
    variant_of,
)

# GMACs and parameters in millions at 224 x 224 pixels and 1,000 classes: counted from the definitions by other code,
# and as published where the paper's text gives them (4.42, 2.35, 5.27, 4.64, 4.15).
COUNTS = {
    "resnet": (4.09, 25.56),
    "stage-ratio": (4.53, 28.63),
    "patchify": (4.42, 28.62),
    "depthwise": (2.35, 15.72),
    "width": (5.27, 33.76),
    "inverted": (4.64, 25.85),
    "move-up": (4.07, 25.63),
    "kernel-5": (4.10, 25.72),
    "kernel-7": (4.15, 25.86),
    "kernel-9": (4.21, 26.05),
    "kernel-11": (4.29, 26.29),
    "gelu": (4.15, 25.86),
    "fewer-activations": (4.15, 25.86),
    "fewer-norms": (4.15, 25.80),
    "layer-norm": (4.15, 25.84),
    "downsampling": (4.46, 28.58),
}
LARGER = {
    "resnet": 15.01,
    "stage-ratio": 14.52,
    "patchify": 14.38,
    "depthwise": 7.23,
    "width": 16.76,
    "inverted": 15.68,
    "move-up": 14.63,
    "kernel-5": 14.70,
    "kernel-7": 14.81,
    "kernel-9": 14.95,
    "kernel-11": 15.13,
    "gelu": 14.81,
    "fewer-activations": 14.81,
    "fewer-norms": 14.81,
    "layer-norm": 14.81,
    "downsampling": 15.35,  # as timm's convnext_base
}
STEPS = list(COUNTS)
SHALLOW = REGIMES["roadmap"]._replace(depths=((1, 1, 2, 1), (1, 2, 1, 1)))  # widths as timm's ResNet has them
TINY = REGIMES["roadmap"]._replace(depths=((1, 2, 1, 1), (1, 1, 2, 1)), widths=(4, 4, 6))


def spec_of(step: str, regime: Any = TINY) -> RoadmapSpec:
    return next(each.spec for each in road(regime) if each.name == step)


def classifier(spec: RoadmapSpec, num_classes: int = 5) -> Classifier:
    """In double precision, all weights and statistics drawn at random."""
    model = Classifier(make_encoder(spec), num_classes).double()
    randomize(model, std=0.1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


# The table


LARGER_TOO = ("resnet", "stage-ratio", "depthwise", "width", "inverted", "downsampling")  # what its numbers go into


@pytest.mark.parametrize("name", [*(f"roadmap/{step}" for step in STEPS), *(f"roadmap-200/{s}" for s in LARGER_TOO)])
def test_multiply_adds_and_parameters_are_those_of_the_table(name: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Classifier(make_encoder(VARIANTS[name]), 1000).eval()
        model(torch.empty(1, 3, 224, 224))
    gmacs, params = counter.get_total_flops() / 2e9, sum(p.numel() for p in model.parameters()) / 1e6
    regime, _, step = name.partition("/")
    if regime == "roadmap":
        assert (gmacs, params) == tuple(pytest.approx(value, abs=0.005) for value in COUNTS[step])
    else:
        assert gmacs == pytest.approx(LARGER[step], abs=0.005)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_row_has_a_name_and_is_known_by_its_numbers(regime: str) -> None:
    rows = road(REGIMES[regime])
    assert [row.name for row in rows] == STEPS
    assert set(REGIMES[regime].published) <= set(STEPS)
    for row in rows:
        name = f"{regime}/{row.name}"
        small = row.spec.model_copy(update={"stem_stride": 2})
        assert (variant_named(name), VARIANTS[name], variant_of(small)) == (name, row.spec, name)
        assert read_spec(row.spec.settings()) == RoadmapSpec.model_validate(row.spec.model_dump()) == row.spec
        assert describe(small) == f"{name}, stem stride 2"


# The fields of the spec that each line is about, and the parameters of which it changes the shape, or that come or go.
BLOCK, AT_STRIDE = r"stages\.\d\.\d\.", r"stages\.[123]\.0\."
CHANGES: dict[str, tuple[set[str], str]] = {
    "stage-ratio": ({"depths"}, r"stages\.(1\.1|2\.1)\."),
    "patchify": ({"patchify"}, r"downsample_layers\.0\.0\.weight"),
    "depthwise": ({"depthwise"}, BLOCK + r"conv\.weight"),
    "width": ({"dims"}, ".*"),
    "inverted": ({"inverted", "dims"}, BLOCK + r"(pwconv[12]|conv|norm|norm[12]|shortcut\.[01])\."),
    "move-up": ({"moved_up"}, BLOCK + r"(conv|norm)\."),
    **{f"kernel-{k}": ({"kernel_size"}, BLOCK + r"conv\.weight") for k in (5, 7, 9, 11)},
    "gelu": ({"gelu"}, "nothing"),
    "fewer-activations": ({"fewer_activations"}, "nothing"),
    "fewer-norms": ({"fewer_norms"}, BLOCK + r"norm[12]\."),
    "layer-norm": ({"layer_norm"}, r".*\.(running_mean|running_var|bias)$"),
    "downsampling": (
        {"separate_downsampling"},
        rf"{AT_STRIDE}(conv|norm|pwconv1|shortcut\.[01])\.|downsample_layers\.[123]\.[01]\.",
    ),
}


@pytest.mark.parametrize("step", road(TINY)[1:], ids=lambda step: step.name)
def test_a_step_changes_what_its_line_says_and_nothing_else(step: Any) -> None:
    fields, pattern = CHANGES[step.name]
    before, after = spec_of(step.of).model_dump(), step.spec.model_dump()
    assert {name for name in after if after[name] != before[name]} == fields
    old, new = (
        {k: v.shape for k, v in make_encoder(spec).state_dict().items()} for spec in (spec_of(step.of), step.spec)
    )
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    assert bool(changed) == (pattern != "nothing")
    assert all(re.match(pattern, name) for name in changed), changed
    if not changed:  # the same weights, and another function of them
        model, other = (classifier(spec) for spec in (spec_of(step.of), step.spec))
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        assert not torch.allclose(model(images), other(images), rtol=1e-3, atol=1e-6)


# References


def plain(step: str, spec: RoadmapSpec, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network after a step, in NCHW, by the words of the table: evaluated, from our weights."""

    def after(other: str) -> bool:
        return STEPS.index(step) >= STEPS.index(other)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if after("layer-norm"):
            return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, 1e-6).movedim(-1, 1)
        return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias)

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        assert (bias is not None) == after("layer-norm")
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1] // weight.shape[1])

    act: Callable[[Tensor], Tensor] = F.gelu if after("gelu") else F.relu

    def block(name: str, x: Tensor, stride: int) -> Tensor:
        def spatial(h: Tensor) -> Tensor:
            h = norm(f"{name}.norm", conv(f"{name}.conv", h, stride, state[f"{name}.conv.weight"].shape[-1] // 2))
            return h if after("fewer-activations") else act(h)

        def narrow(h: Tensor) -> Tensor:
            h = conv(f"{name}.pwconv1", h)
            return act(h if after("fewer-norms") else norm(f"{name}.norm1", h))

        h = narrow(spatial(x)) if after("move-up") else spatial(narrow(x))
        h = conv(f"{name}.pwconv2", h)
        h = h if after("fewer-norms") else norm(f"{name}.norm2", h)
        if f"{name}.shortcut.0.weight" in state:
            x = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", x, stride))
        return x + h if after("fewer-activations") else act(x + h)

    stem = "encoder.downsample_layers.0"
    x = conv(f"{stem}.0", images, 4) if after("patchify") else conv(f"{stem}.0", images, 2, 3)
    x = norm(f"{stem}.1", x)
    x = x if after("fewer-activations") else act(x)
    x = x if after("patchify") else F.max_pool2d(x, 3, 2, 1)
    for i, depth in enumerate(spec.depths):
        if i > 0 and after("downsampling"):
            x = conv(f"encoder.downsample_layers.{i}.1", norm(f"encoder.downsample_layers.{i}.0", x), 2)
        for j in range(depth):
            x = block(f"encoder.stages.{i}.{j}", x, 2 if i > 0 and j == 0 and not after("downsampling") else 1)
    x = x.mean((2, 3), keepdim=True)
    x = norm("norm", x) if after("downsampling") else x
    return F.linear(x.flatten(1), state["head.weight"], state["head.bias"])


@pytest.mark.parametrize("step", STEPS)
def test_every_row_is_what_the_table_says_in_words(step: str) -> None:
    spec = spec_of(step)
    model, images = classifier(spec), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(model(images), plain(step, spec, model.state_dict(), images), rtol=1e-9, atol=1e-9)


def to_resnet(spec: RoadmapSpec) -> tuple[nn.Module, tuple[tuple[str, str], ...]]:
    return ResNet(Bottleneck, spec.depths, num_classes=5), (
        (r"encoder\.downsample_layers\.0\.0\.", "conv1."),
        (r"encoder\.downsample_layers\.0\.1\.", "bn1."),
        (r"encoder\.stages\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}."),
        (r"\.conv\.", ".conv2."),
        (r"\.norm\.", ".bn2."),
        (r"\.norm1\.", ".bn1."),
        (r"\.norm2\.", ".bn3."),
        (r"\.pwconv1\.", ".conv1."),
        (r"\.pwconv2\.", ".conv3."),
        (r"\.shortcut\.", ".downsample."),
        (r"head\.", "fc."),
    )


def to_byobnet(spec: RoadmapSpec) -> tuple[nn.Module, tuple[tuple[str, str], ...]]:
    stages = zip(spec.depths, spec.dims, strict=True)
    ratio = 4.0 if spec.inverted else 0.25
    blocks = tuple(ByoBlockCfg("bottle", d, c, 1 + (i > 0), gs=1, br=ratio) for i, (d, c) in enumerate(stages))
    stem_dim = spec.dims[0] if spec.inverted else spec.dims[0] // 4
    model = ByobNet(ByoModelCfg(blocks, stem_chs=stem_dim, stem_pool=""), num_classes=5)
    model.stem = ConvNormAct(3, stem_dim, 4, stride=4, padding=0)
    return model, (
        (r"encoder\.downsample_layers\.0\.0\.", "stem.conv."),
        (r"encoder\.downsample_layers\.0\.1\.", "stem.bn."),
        (r"encoder\.", ""),
        (r"(\.\d\.\d)\.conv\.", r"\1.conv2_kxk.conv."),
        (r"\.norm\.", ".conv2_kxk.bn."),
        (r"\.pwconv1\.", ".conv1_1x1.conv."),
        (r"\.norm1\.", ".conv1_1x1.bn."),
        (r"\.pwconv2\.", ".conv3_1x1.conv."),
        (r"\.norm2\.", ".conv3_1x1.bn."),
        (r"\.shortcut\.0\.", ".shortcut.conv."),
        (r"\.shortcut\.1\.", ".shortcut.bn."),
        (r"^head\.", "head.fc."),
    )


def to_convnext(spec: RoadmapSpec) -> tuple[nn.Module, tuple[tuple[str, str], ...]]:
    return ConvNeXt(depths=spec.depths, dims=spec.dims, ls_init_value=None, num_classes=5), (
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
        (r"encoder\.downsample_layers\.0\.", "stem."),
        (r"encoder\.downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"encoder\.stages\.(\d)\.", r"stages.\1.blocks."),
        (r"\.conv\.", ".conv_dw."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
    )


def hand_over(ours: Classifier, theirs: nn.Module, names: tuple[tuple[str, Any], ...]) -> Callable[[str], str]:
    """Give timm's model our weights, all of its own but LayerScale, and return what a name of ours is there."""
    theirs.double().eval()

    def renamed(name: str) -> str:
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        return name

    known = theirs.state_dict()
    state = {renamed(name): value for name, value in ours.state_dict().items()}
    state = {name: value.reshape(known[name].shape) for name, value in state.items()}
    assert {name for name in known if not name.endswith(("num_batches_tracked", ".gamma"))} == state.keys()
    theirs.load_state_dict(known | state)
    return renamed


@pytest.mark.parametrize(
    ("step", "build"),
    [
        ("resnet", to_resnet),
        ("stage-ratio", to_resnet),
        ("depthwise", to_byobnet),
        ("width", to_byobnet),
        ("inverted", to_byobnet),
        ("downsampling", to_convnext),
    ],
)
def test_what_timm_can_build_has_the_same_values_and_gradients(step: str, build: Callable[[RoadmapSpec], Any]) -> None:
    spec = spec_of(step, SHALLOW)
    ours = classifier(spec)
    theirs, names = build(spec)
    renamed = hand_over(ours, theirs, names)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)
    # In training BatchNorm's statistics are the batch's, and move its running ones.
    for model in (ours.train(), theirs.train()):
        model(images).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        found = gradients[renamed(name)].grad
        torch.testing.assert_close(parameter.grad, found.reshape(parameter.shape), rtol=1e-7, atol=1e-9, msg=name)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.state_dict()[renamed(name)], msg=name)


@pytest.mark.parametrize(
    ("step", "known", "build"),
    [
        ("resnet", partial(timm.create_model, "resnet50"), to_resnet),
        ("downsampling", partial(timm.create_model, "convnext_tiny", ls_init_value=1.0), to_convnext),
    ],
)
def test_the_ends_of_the_road_are_timms_models_in_full(
    step: str, known: Any, build: Callable[[RoadmapSpec], Any]
) -> None:
    spec = VARIANTS[f"roadmap/{step}"]
    ours, (_, names) = classifier(spec, 1000), build(spec_of(step))
    theirs = known()
    hand_over(ours, theirs, names)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "known"), [("roadmap", "convnext_tiny"), ("roadmap-200", "convnext_base")])
def test_the_last_step_is_a_convnext_but_for_layerscale(name: str, known: str) -> None:
    spec, published = VARIANTS[f"{name}/downsampling"], VARIANTS[known]
    assert (spec.depths, spec.dims, spec.hidden_widths) == (published.depths, published.dims, published.hidden_widths)
    with torch.device("meta"):
        ours, theirs = Classifier(make_encoder(spec), 1000), timm.create_model(known)
    left = [p.numel() for name, p in theirs.named_parameters() if not name.endswith(".gamma")]
    assert sorted(p.numel() for p in ours.parameters()) == sorted(left)


# Other strides, and what must be refused


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("step", ["resnet", "patchify", "downsampling"])
def test_a_stem_of_any_stride_gives_features_at_the_total_stride(step: str, stride: int) -> None:
    spec = spec_of(step).model_copy(update={"stem_stride": stride})
    maps = make_encoder(spec, 1).pyramid(torch.randn(1, 1, 8 * stride, 16 * stride))
    assert [tuple(f.shape) for f in maps] == [(1, 8 >> i, 16 >> i, dim) for i, dim in enumerate(spec.dims)]


def test_stochastic_depth_drops_the_branch_and_keeps_the_shortcut() -> None:
    spec = spec_of("inverted")
    encoder = make_encoder(spec, drop_path_rate=0.5)
    rates = [block.drop_path.rate for stage in encoder.stages for block in stage]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    block = encoder.stages[0][0]
    block.drop_path.rate = 1 - 1e-9
    x = torch.randn(2, 4, 4, spec.dims[0])
    torch.testing.assert_close(block.train()(x, DENSE), F.relu(block.shortcut(x)))


@pytest.mark.parametrize("step", STEPS)
def test_masked_pretraining_is_for_the_last_step_alone(step: str) -> None:
    settings = {"out": "run", "data": {"path": ["images"]}, "model": {"variant": f"roadmap/{step}"}}
    if step == "downsampling":
        assert PretrainConfig.model_validate(settings).model.spec.dense_only is None
        return
    reason = "convolutions that see over the borders" if step == "layer-norm" else "BatchNorm, whose statistics"
    with pytest.raises(ValidationError, match=f"roadmap/{step} has {reason}.*: fine-tune it, or pretrain convnextv2"):
        PretrainConfig.model_validate(settings)
    encoder = make_encoder(spec_of(step))
    mask = torch.from_numpy(random_mask((2, 2), 2, [(0, 0, 0)]))
    with pytest.raises(ValueError, match=f"has {reason}.*: mask another network"):
        build_fcmae(encoder, 8, 1)(torch.randn(1, 3, 64, 64), mask)


def test_the_last_step_sees_visible_patches_alone_in_every_layout() -> None:
    encoder = make_encoder(spec_of("downsampling")).double()
    randomize(encoder)
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    mask = torch.from_numpy(random_mask((3, 2), 2, [(0, 0, 0), (0, 0, 1)]))
    found = {}
    for backend in ("packed", "masked"):
        layout = make_layout(backend, mask)
        found[backend] = layout.unpack(encoder(images, layout))
    torch.testing.assert_close(found["packed"], found["masked"], rtol=1e-9, atol=1e-9)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    layout = make_layout("packed", mask)
    torch.testing.assert_close(layout.unpack(encoder(torch.where(hidden, 9.0, images), layout)), found["packed"])


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"dims": [64, 126]}, "126 of dims is no multiple of 4, and a bottleneck has a quarter of it inside"),
        ({"kernel_size": 4}, "4 is even: a kernel needs a centre, use 3 or 5"),
        ({"depths": [1]}, "at least 2 items"),
        ({"use_grn": True}, "not permitted"),
    ],
)
def test_numbers_of_no_step_are_refused(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_spec({"network": "roadmap", "depths": [1, 1], "dims": [64, 128]} | numbers)
    assert read_spec({"network": "roadmap", "depths": [1, 1], "dims": [6, 13], "inverted": True}).dims == (6, 13)


def test_networks_between_the_steps_run_and_are_described_by_what_they_have() -> None:
    spec = RoadmapSpec(depths=(1, 1), dims=(8, 16), patchify=True, depthwise=True, kernel_size=5, layer_norm=True)
    spec = spec.model_copy(update={"separate_downsampling": True})
    assert describe(spec) == (
        "network of the roadmap of depths 1-1, dims 8-16, patchify, depthwise, layer norm, separate downsampling, "
        "kernel 5"
    )
    assert spec.hidden_widths == ((2,), (4,)) and spec.dense_only is None
    mask = torch.tensor([[[True, False]]])
    images = torch.randn(1, 3, 16, 32)
    encoder, layouts = make_encoder(spec), [make_layout(backend, mask) for backend in ("packed", "masked")]
    packed, masked = (layout.unpack(encoder(images, layout)) for layout in layouts)
    torch.testing.assert_close(packed, masked)


def test_a_depthwise_kernel_of_one_pixel_scales_channels() -> None:
    conv, x = Conv(4, 4, 1, stride=2, groups=4), torch.randn(2, 6, 6, 4)
    torch.testing.assert_close(conv(x), x[:, ::2, ::2] * conv.weight.flatten() + conv.bias)


class Convolved(TorchDispatchMode):
    """The sides of the kernels that torch was asked to convolve with."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.sides.append(args[1].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", STEPS)
def test_one_pixel_is_never_convolved(step: str) -> None:
    """oneDNN writes past its buffers there, on some CPUs."""
    with Convolved() as seen:
        make_encoder(spec_of(step))(torch.randn(2, 3, 32, 32))
    assert seen.sides and 1 not in seen.sides


def test_recomputing_blocks_would_count_batches_twice() -> None:
    with pytest.raises(ValueError, match=r"grad_checkpointing would count each batch twice in the BatchNorm of"):
        make_encoder(spec_of("gelu"), grad_checkpointing=True)
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    whole = make_encoder(spec_of("layer-norm"))
    torch.manual_seed(0)
    again = make_encoder(spec_of("layer-norm"), grad_checkpointing=True)
    for encoder in (whole, again):
        encoder(images).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_weights_start_as_convnexts_do() -> None:
    for step in ("resnet", "downsampling"):
        state = make_encoder(spec_of(step, SHALLOW)).state_dict()
        for name, value in state.items():
            if value.ndim > 1:
                assert float(value.std()) == pytest.approx(0.02, rel=0.1), name
            else:  # norms' weights and running variances, and all else
                assert value.eq(float(name.endswith(("weight", "var")))).all(), name


def test_layers_are_those_of_the_stages_whatever_the_step() -> None:
    for step in ("resnet", "downsampling"):
        spec = spec_of(step)
        names = [f"encoder.{name}" for name, _ in make_encoder(spec).named_parameters()]
        layers = {name: layer_of(name, spec, "single") for name in names}
        assert set(layers.values()) == set(range(1, num_layers(spec, "single")))
        assert layers["encoder.stages.1.0.conv.weight"] == 1 + spec.depths[0]
