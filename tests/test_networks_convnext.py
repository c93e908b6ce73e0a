"""The network equals timm's where timm has it, and agrees with itself in every layout where it has not."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CONVNEXTS, MINKOWSKI, randomize
from timm.layers import DropPath
from timm.models import ConvNeXt
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae.heads import Classifier
from fcmae.layouts import DENSE, Layout, Packed, make_layout
from fcmae.layouts.sites import upsample_mask
from fcmae.masking import random_mask
from fcmae.networks.convnext import Encoder
from fcmae.networks.encoder import layer_of, num_layers
from fcmae.networks.layers import Block
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.weights.formats import rename, to_state


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Within `tolerance` of the largest element of what is expected."""
    torch.testing.assert_close(
        found, expected, atol=tolerance * float(expected.detach().abs().max()), rtol=0, msg=name or None
    )


# Against timm's


# Wider ones, and small, which is as wide as tiny, have no code of their own; test_weights_formats.py has their shapes.
@pytest.mark.parametrize("variant", [name for name in CONVNEXTS if not name.endswith(("small", "large", "huge"))])
def test_every_variant_equals_timms_in_values_and_gradients(variant: str) -> None:
    # Larger ones have all widths and few blocks. Neither is initialised twice, and both have the same memory.
    few = {"depths": (1, 1, 2, 1)} if variant.endswith(("tiny", "base")) else {}
    spec = VARIANTS[variant].model_copy(update=few)
    with torch.device("meta"):
        ours, theirs = Classifier(Encoder(spec), 5), timm.create_model(variant, num_classes=5, **few)
    ours.to_empty(device="cpu")
    randomize(ours, std=0.02)  # keeps activations of the deep variants in float32's comfortable range
    theirs.load_state_dict(to_state(ours.state_dict(), spec, "timm"), assign=True)
    images = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        features = theirs.eval().forward_features(images)
        assert_close(ours.encoder(images).permute(0, 3, 1, 2), features, 1e-5)
        assert_close(ours(images), theirs.forward_head(features), 1e-5)
        packed = Packed(torch.zeros(1, 2, 1, dtype=torch.bool), 2)
        assert_close(packed.unpack(ours.encoder(images, packed)).permute(0, 3, 1, 2), features, 1e-5)
    cotangent = torch.randn(1, 5)
    for net in (ours, theirs):
        net(images).backward(cotangent)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert_close(p.grad, gradients[rename(name, "timm")].view_as(p), 1e-4)


@pytest.mark.parametrize(
    ("variant", "stem_stride", "backend"),
    [
        ("convnextv2_atto", 4, "dense"),
        ("convnextv2_atto", 2, "packed"),
        ("convnextv2_atto", 1, "dense"),
        ("convnext_atto", 4, "packed"),
        ("convnext_atto", 2, "dense"),
        ("convnext_atto", 1, "packed"),
        ("convnext_tiny", 4, "dense"),
        ("convnextv2_tiny", 4, "packed"),
    ],
)
def test_gradients_equal_timms(variant: str, stem_stride: int, backend: str) -> None:
    few = {"depths": (1, 1, 2, 1)} if variant.endswith("tiny") else {}
    spec = VARIANTS[variant].model_copy(update={"stem_stride": stem_stride} | few)
    ours = Classifier(Encoder(spec), 3).double()
    randomize(ours, std=0.1)
    theirs = timm.create_model(variant, num_classes=3, **few)
    # Exchanged, as timm's own stem of stride 2 comes with one more downsampling.
    theirs.stem[0] = nn.Conv2d(3, spec.dims[0], stem_stride, stem_stride)
    theirs.double().load_state_dict(to_state(ours.state_dict(), spec, "timm"))
    images = torch.randn(2, 3, 16 * stem_stride, 8 * stem_stride, dtype=torch.float64)
    if backend == "dense":
        out, expected = ours(images), theirs(images)
    else:
        layout = Packed(torch.zeros(2, 2, 1, dtype=torch.bool), 2)
        out = layout.unpack(ours.encoder(images, layout)).permute(0, 3, 1, 2)
        expected = theirs.forward_features(images)
    assert_close(out, expected, 1e-11)
    out.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        grad = gradients[rename(name, "timm")]
        if grad is None:
            assert backend == "packed" and not name.startswith("encoder.")
        else:
            assert_close(p.grad, grad.view_as(p), 1e-10, name)


@pytest.mark.parametrize("size", [(70, 45), (95, 33), (32, 63)])
@pytest.mark.parametrize("stem_stride", [3, 4])
def test_sizes_that_are_no_multiple_of_the_stride_give_what_timm_gives(size: tuple[int, int], stem_stride: int) -> None:
    spec = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=stem_stride)
    ours = Classifier(Encoder(spec), 3)
    randomize(ours)
    theirs = ConvNeXt(depths=spec.depths, dims=spec.dims, patch_size=stem_stride, num_classes=3, use_grn=True)
    for block in theirs.modules():
        if isinstance(block, ConvNeXtBlock):
            block.gamma = None
    theirs.load_state_dict(to_state(ours.state_dict(), spec, "timm"))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = ours.encoder(images).permute(0, 3, 1, 2)
        assert features.shape[2:] == tuple(side // spec.total_stride for side in size)
        assert_close(features, theirs.forward_features(images), 1e-5)
        assert_close(ours(images), theirs(images), 1e-5)


@pytest.mark.parametrize("variant", ["convnextv2_atto", "convnext_tiny"])
def test_drop_path_rises_as_timms_does(variant: str) -> None:
    with torch.device("meta"):
        ours = Encoder(VARIANTS[variant], drop_path_rate=0.3)
        theirs = timm.create_model(variant, drop_path_rate=0.3)
    rates = [block.drop_path.rate for block in ours.modules() if isinstance(block, Block)]
    blocks = [block for block in theirs.modules() if isinstance(block, ConvNeXtBlock)]
    expected = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for b in blocks]
    assert rates == pytest.approx(expected)
    assert rates[-1] == 0.3


# Millions, of the paper's and its code's, with the final norm.
MILLIONS = {"atto": 3.39, "femto": 4.85, "pico": 8.55, "nano": 14.98, "tiny": 27.87, "small": 49.55, "base": 87.69}
MILLIONS |= {"large": 196.42, "huge": 657.47}


@pytest.mark.parametrize("variant", CONVNEXTS)
def test_every_variant_has_timms_number_of_parameters(variant: str) -> None:
    with torch.device("meta"):
        encoder, theirs = Encoder(VARIANTS[variant]), timm.create_model(variant, num_classes=0)
    count = sum(p.numel() for p in encoder.parameters()) + 2 * encoder.dim  # the final norm
    assert count == sum(p.numel() for p in theirs.parameters())
    family, size = variant.split("_")
    if family == "convnextv2":
        assert round(count / 1e6, 2) == MILLIONS[size]


@pytest.mark.parametrize("use_grn", [True, False])
@pytest.mark.parametrize(("kernel", "hidden"), [(3, 32), (5, 8), (7, 24), (9, 40)])
def test_a_block_of_any_kernel_and_width_equals_timms(kernel: int, hidden: int, use_grn: bool) -> None:
    ours = Block(8, hidden, kernel, use_grn=use_grn).double()
    randomize(ours)
    scale = None if use_grn else 1e-6
    theirs = ConvNeXtBlock(8, kernel_size=kernel, mlp_ratio=hidden / 8, use_grn=use_grn, ls_init_value=scale).double()
    state = {rename(f"encoder.stages.0.0.{name}", "timm"): value for name, value in ours.state_dict().items()}
    state = {name.removeprefix("stages.0.blocks.0."): value for name, value in state.items()}
    theirs.load_state_dict({k: v.flatten() if ".grn." in k else v for k, v in state.items()})
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x.permute(0, 2, 3, 1), DENSE).permute(0, 3, 1, 2), theirs(x)
    assert_close(found, expected, 1e-12)
    pull = torch.randn_like(found)
    assert_close(torch.autograd.grad(found, x, pull)[0], torch.autograd.grad(expected, x, pull)[0], 1e-12)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_fewer_stages_are_the_first_ones_of_timms_four(num_stages: int) -> None:
    depths, dims = (1, 2, 1, 1), (4, 6, 8, 10)
    whole = ConvNeXtSpec(depths=depths, dims=dims, kernel_size=5, use_grn=False)
    ours = Encoder(ConvNeXtSpec(depths=depths[:num_stages], dims=dims[:num_stages], kernel_size=5, use_grn=False))
    randomize(ours)
    theirs = ConvNeXt(depths=depths, dims=dims, kernel_sizes=5, num_classes=0)
    state = to_state({f"encoder.{name}": value for name, value in Encoder(whole).state_dict().items()}, whole, "timm")
    state |= {rename(f"encoder.{name}", "timm"): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, norm=False, intermediates_only=True)
        for found, of_timm in zip(ours.pyramid(images), expected[:num_stages], strict=True):
            assert_close(found.permute(0, 3, 1, 2), of_timm, 1e-5)


# Of any numbers, in every layout


CUSTOM = [
    ConvNeXtSpec(depths=(1, 2), dims=(4, 6), stem_stride=4, kernel_size=3),
    ConvNeXtSpec(depths=(2, 1), dims=(5, 4), stem_stride=3, kernel_size=9, hidden=((7, 20), (3,))),
    ConvNeXtSpec(depths=(1, 1, 2), dims=(4, 4, 6), stem_stride=2, kernel_size=5, use_grn=False),
    ConvNeXtSpec(depths=(1, 2, 1), dims=(4, 6, 8), stem_stride=1, hidden=((5,), (6, 7), (40,))),
    ConvNeXtSpec(depths=(1, 1, 1, 2), dims=(4, 6, 6, 8), stem_stride=1, kernel_size=9),
    ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 5, 6, 7), stem_stride=3, kernel_size=3, hidden=((9,), (8,), (7,), (6,))),
    ConvNeXtSpec(depths=(1, 1), dims=(4, 6), stem_stride=2, dense_stem=True),
    ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 6, 8), stem_stride=1, dense_stem=True),
]


def named(spec: ConvNeXtSpec) -> str:
    own = "dense" if spec.dense_stem else "own" if spec.hidden else "4c"
    return f"{spec.num_stages}stages-stride{spec.stem_stride}-kernel{spec.kernel_size}-{own}"


def run(encoder: Encoder, images: Tensor, layout: Layout) -> list[Tensor]:
    """Features as a dense map, and the gradients of the images and of every parameter."""
    leaf = images.clone().requires_grad_()
    out = layout.unpack(encoder(leaf, layout))
    pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *encoder.parameters()], pull)]


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("spec", CUSTOM, ids=named)
@pytest.mark.parametrize("backend", ["packed", MINKOWSKI])
def test_custom_networks_equal_the_masked_reference(backend: str, spec: ConvNeXtSpec, sites: int) -> None:
    encoder = Encoder(spec, in_chans=2).double()
    randomize(encoder)
    mask = torch.from_numpy(random_mask((2, 3), 3, [(7, i) for i in range(2)]))
    patch = sites * spec.total_stride  # of the mask
    images = torch.randn(2, 2, 2 * patch, 3 * patch, dtype=torch.float64)
    expected = run(encoder, images, make_layout("masked", mask))
    for found, masked in zip(run(encoder, images, make_layout(backend, mask)), expected, strict=True):
        torch.testing.assert_close(found, masked, atol=1e-9 * max(1.0, float(masked.abs().max())), rtol=1e-7)
    hidden = upsample_mask(mask, patch)[:, None].expand_as(images)
    assert expected[1][hidden].eq(0).all()  # hidden pixels have no influence
    assert expected[1][~hidden].ne(0).any()


@pytest.mark.parametrize("spec", CUSTOM, ids=named)
@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_hidden_pixels_may_be_anything(backend: str, spec: ConvNeXtSpec) -> None:
    encoder = Encoder(spec, in_chans=1)
    randomize(encoder)
    mask = torch.from_numpy(random_mask((3, 3), 4, [(3, i) for i in range(2)]))
    patch = spec.total_stride
    images = torch.randn(2, 1, 3 * patch, 3 * patch)
    poisoned = torch.where(upsample_mask(mask, patch)[:, None], torch.nan, images)
    with torch.no_grad():
        outputs = [
            layout.unpack(encoder(x, layout)) for x in (images, poisoned) for layout in [make_layout(backend, mask)]
        ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("spec", CUSTOM, ids=named)
def test_the_pyramid_has_each_stages_widths_and_strides(spec: ConvNeXtSpec) -> None:
    encoder = Encoder(spec)
    images = torch.randn(1, 3, 2 * spec.total_stride, spec.total_stride)
    maps = encoder.pyramid(images)
    strides = [spec.stem_stride * 2**i for i in range(spec.num_stages)]
    assert [tuple(f.shape[1:]) for f in maps] == [
        (2 * spec.total_stride // stride, spec.total_stride // stride, dim)
        for stride, dim in zip(strides, spec.dims, strict=True)
    ]
    assert torch.equal(maps[-1], encoder(images))
    blocks = [[block.pwconv1.out_features for block in stage] for stage in encoder.stages]
    assert blocks == [list(widths) for widths in spec.hidden_widths]


def test_a_dense_stem_is_a_3x3_convolution_of_what_is_visible_and_a_depthwise_one_of_each_patch() -> None:
    spec = ConvNeXtSpec(depths=(1, 1), dims=(4, 6), stem_stride=2, dense_stem=True)
    encoder = Encoder(spec, in_chans=3)
    randomize(encoder)
    state, images = encoder.state_dict(), torch.randn(2, 3, 12, 8)
    mask = torch.from_numpy(random_mask((3, 2), 4, [(5, i) for i in range(2)]))
    hidden = upsample_mask(mask, 4)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = (state[f"{name}.1.{p}"] for p in ("weight", "bias"))
        return F.layer_norm(x.permute(0, 2, 3, 1), (4,), weight, bias, 1e-6).permute(0, 3, 1, 2)

    name, stem = "initial_conv", "downsample_layers.0"
    x = F.conv2d(images.masked_fill(hidden, 0), state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=1)
    x = F.conv2d(F.gelu(norm(x, name)), state[f"{stem}.0.weight"], state[f"{stem}.0.bias"], stride=2, groups=4)
    expected = norm(x, stem).permute(0, 2, 3, 1).masked_fill(upsample_mask(mask, 2)[..., None], 0)
    layout = make_layout("packed", mask)
    with torch.no_grad():
        torch.testing.assert_close(layout.unpack(encoder.stem(images, layout)), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_stem_sees_the_pixels_beyond_the_last_whole_patch() -> None:
    encoder = Encoder(ConvNeXtSpec(depths=(1, 1), dims=(4, 6), stem_stride=4, dense_stem=True), in_chans=3)
    randomize(encoder)
    images = torch.randn(1, 3, 18, 17)
    with torch.no_grad():
        found = encoder.stem(images, DENSE)
        cut = encoder.stem(images[:, :, :16, :16], DENSE)
    assert found.shape == cut.shape == (1, 4, 4, 4)
    torch.testing.assert_close(found[:, :3, :3], cut[:, :3, :3])
    assert not torch.isclose(found[:, 3], cut[:, 3]).all(dim=-1).any()


# Layers, for layer decay


def layers(spec: ConvNeXtSpec, mode: str) -> dict[str, set[int]]:
    """The layers of all parameters of a classifier, by the module: downsample_layers.i, stages.i.j, norm, head."""
    with torch.device("meta"):
        model = Classifier(Encoder(spec), 3)
    found: dict[str, set[int]] = {}
    for name, _ in model.named_parameters():
        parts = name.removeprefix("encoder.").split(".")
        module = ".".join(parts[: {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)])
        found.setdefault(module, set()).add(layer_of(name, spec, mode))
    return found


def test_layers_of_three_stages_one_a_block() -> None:
    spec = ConvNeXtSpec(depths=(1, 2, 4), dims=(4, 6, 8))
    expected: dict[str, Any] = {"downsample_layers.0": 1, "stages.0.0": 1, "downsample_layers.1": 2, "stages.1.0": 2}
    expected |= {"stages.1.1": 3, "downsample_layers.2": 4, "stages.2.0": 4, "stages.2.1": 5, "stages.2.2": 6}
    expected |= {"stages.2.3": 7, "norm": 8, "head": 8}
    assert layers(spec, "single") == {name: {layer} for name, layer in expected.items()}
    assert num_layers(spec, "single") == 8


@pytest.mark.parametrize("mode", ["single", "group"])
def test_a_dense_stem_is_a_layer_with_the_rest_of_the_stem(mode: str) -> None:
    found = layers(ConvNeXtSpec(depths=(1, 1), dims=(4, 6), dense_stem=True), mode)
    assert found["initial_conv"] == found["downsample_layers.0"]


def test_layers_of_three_stages_in_groups_of_three_blocks() -> None:
    spec = ConvNeXtSpec(depths=(1, 2, 4), dims=(4, 6, 8))
    expected: dict[str, Any] = {"downsample_layers.0": 0, "stages.0.0": 1, "downsample_layers.1": 2, "stages.1.0": 2}
    expected |= {"stages.1.1": 2, "downsample_layers.2": 3, "stages.2.0": 3, "stages.2.1": 3, "stages.2.2": 3}
    expected |= {"stages.2.3": 4, "norm": 5, "head": 5}
    assert layers(spec, "group") == {name: {layer} for name, layer in expected.items()}
    assert num_layers(spec, "group") == 5
