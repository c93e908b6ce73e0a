"""The classifier is timm's, and starts as asked."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import randomize

from fcmae.heads import Classifier
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
