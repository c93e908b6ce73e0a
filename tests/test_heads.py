"""The classifier is timm's, and starts as asked; the heads of segmentation are what their equations say."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import Tensor

from fcmae.heads import Classifier, ConvNormAct, FeaturePyramid, Segmenter, UPerNet, build_head
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.weights.formats import to_state

SPEC = ConvNeXtSpec(depths=(1, 1), dims=(4, 64))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_logits_and_their_gradients_are_those_of_timms_head(in_chans: int) -> None:
    spec = VARIANTS["convnextv2_atto"]
    ours = Classifier(Encoder(spec, in_chans), 7).double()
    randomize(ours, std=0.1)
    theirs = timm.create_model("convnextv2_atto", num_classes=7, in_chans=in_chans).double()
    theirs.load_state_dict(to_state(ours.state_dict(), spec, "timm"))
    images = torch.randn(2, in_chans, 64, 96, dtype=torch.float64)
    found, expected = ours(images), theirs(images)
    assert found.shape == (2, 7)
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(found)
    pairs = {"norm.weight": "head.norm.weight", "norm.bias": "head.norm.bias"}
    pairs |= {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}
    for name, other in pairs.items():
        (grad,) = torch.autograd.grad(found, ours.get_parameter(name), pull, retain_graph=True)
        (reference,) = torch.autograd.grad(expected, theirs.get_parameter(other), pull, retain_graph=True)
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_the_heads_first_weights_are_drawn_and_scaled(scale: float) -> None:
    model = Classifier(Encoder(SPEC), 500, scale)
    weight = model.head.weight
    # Five standard errors of the mean and of the deviation of 32,000 draws.
    assert abs(float(weight.detach().mean())) < 5 * scale * 0.02 / 32000**0.5
    assert abs(float(weight.detach().std()) / (scale * 0.02) - 1) < 5 / (2 * 32000) ** 0.5
    assert model.head.bias.eq(0).all()
    assert model.norm.weight.eq(1).all()


def test_the_scale_changes_the_heads_weights_only() -> None:
    models = []
    for scale in (1.0, 0.001):
        torch.manual_seed(0)
        models.append(Classifier(Encoder(SPEC), 5, scale).state_dict())
    one, small = models
    torch.testing.assert_close(small.pop("head.weight"), one.pop("head.weight") * 0.001)
    assert all(torch.equal(value, small[name]) for name, value in one.items())


def test_under_autocast_the_norm_is_in_float32_and_the_logits_are_close() -> None:
    model = Classifier(Encoder(SPEC), 5)
    randomize(model, std=0.1)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        assert model.norm(model.encoder(images).mean((1, 2))).dtype == torch.float32
    exact = model(images)
    # bf16 keeps 8 bits; two blocks and a head add up to a few percent.
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


def by_hand(layer: ConvNormAct, x: Tensor) -> Tensor:
    """A layer of a head, site by site in plain operations."""
    conv, norm = layer[0], layer[1]
    y = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
    centred = y - y.mean(1, keepdim=True)
    y = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return F.gelu(y * norm.weight[:, None, None] + norm.bias[:, None, None])


def larger(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def stages(odd: bool = False) -> list[Tensor]:
    return [torch.randn(2, c, 12 // s + odd, 20 // s + odd, dtype=torch.float64) for c, s in ((4, 1), (6, 2), (8, 4))]


@pytest.mark.parametrize("odd", [False, True])
def test_a_feature_pyramid_sums_its_levels(odd: bool) -> None:
    head, maps = FeaturePyramid((4, 6, 8), 3, 5).double(), stages(odd)
    randomize(head)
    c = [by_hand(layer, f) for layer, f in zip(head.laterals, maps, strict=True)]
    p2 = c[1] + larger(c[2], c[1])
    p1 = c[0] + larger(p2, c[0])
    levels = [larger(by_hand(layer, p), p1) for layer, p in zip(head.smooth, (p1, p2, c[2]), strict=True)]
    expected = F.conv2d(levels[0] + levels[1] + levels[2], head.classify.weight, head.classify.bias)
    torch.testing.assert_close(head(maps), expected)


def test_upernet_fuses_pooled_context_and_all_levels() -> None:
    head, maps = UPerNet((4, 6, 8), 3, 5).double(), stages()
    randomize(head)
    last = maps[2]
    pooled = [F.adaptive_avg_pool2d(last, side) for side in (1, 2, 3, 6)]
    context = [larger(by_hand(layer, p), last) for layer, p in zip(head.pooled, pooled, strict=True)]
    c2 = by_hand(head.bottleneck, torch.cat([last, *context], 1))
    c0, c1 = (by_hand(head.laterals[i], maps[i]) for i in range(2))
    p1 = c1 + larger(c2, c1)
    p0 = c0 + larger(p1, c0)
    levels = [by_hand(head.smooth[0], p0), larger(by_hand(head.smooth[1], p1), p0), larger(c2, p0)]
    fused = by_hand(head.fuse, torch.cat(levels, 1))
    torch.testing.assert_close(head(maps), F.conv2d(fused, head.classify.weight, head.classify.bias))


@pytest.mark.parametrize("kind", ["pyramid", "upernet"])
def test_a_segmenter_gives_every_pixel_logits_and_every_parameter_a_gradient(kind: str) -> None:
    spec = ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 6, 8))
    model = Segmenter(Encoder(spec, 2), build_head(kind, spec.dims, 3, 8))
    randomize(model)
    logits = model(torch.randn(2, 2, 32, 48))
    assert logits.shape == (2, 3, 32, 48)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head = 'unet': use pyramid, upernet or anytime"):
        build_head("unet", (4, 6), 2)
