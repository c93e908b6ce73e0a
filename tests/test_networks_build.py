"""An encoder is made from its spec in one place, and what is built on encoders takes any encoder of stages."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fcmae.evaluation.analysis import grn_norms, layer_names, walk
from fcmae.heads import Classifier
from fcmae.layouts import Layout
from fcmae.masked import build_fcmae, masked_loss
from fcmae.networks import convnext
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import StagedEncoder, drop_path_rates, layer_of, num_layers
from fcmae.networks.layers import LayerNorm
from fcmae.networks.spec import ConvNeXtSpec

SPEC = ConvNeXtSpec(depths=(1, 2), dims=(4, 6), stem_stride=2)


class Square(nn.Module):
    """A block of another network: x + Linear(x^2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return self.trace(x, layout)[1]

    def trace(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return x.square(), x + self.linear(x.square())


class Squares(StagedEncoder):
    def __init__(self) -> None:
        super().__init__(SPEC, 3, grad_checkpointing=True)
        stem = nn.Sequential(nn.Conv2d(3, 4, 2, 2), LayerNorm(4))
        convs = (nn.Conv2d(dim, next_dim, 2, 2) for dim, next_dim in pairwise(SPEC.dims))
        self.downsample_layers = nn.ModuleList([stem, *convs])
        stages = zip(SPEC.depths, SPEC.dims, strict=True)
        self.stages = nn.ModuleList(nn.ModuleList(Square(dim) for _ in range(depth)) for depth, dim in stages)

    def downsample(self, stage: int, f: Tensor, layout: Layout) -> Tensor:
        conv = self.downsample_layers[stage]
        assert isinstance(conv, nn.Conv2d)
        return layout.downsample(f, conv.weight, conv.bias)


def test_an_encoder_is_made_from_its_numbers() -> None:
    torch.manual_seed(0)
    made = make_encoder(SPEC, 2, 0.3, True)
    torch.manual_seed(0)
    own = convnext.Encoder(SPEC, 2, 0.3, True)
    assert type(made) is convnext.Encoder and made.grad_checkpointing
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in made.state_dict().items())
    assert [b.drop_path.rate for stage in made.stages for b in stage] == [
        b.drop_path.rate for s in own.stages for b in s
    ]


def test_stochastic_depth_rises_to_the_last_block() -> None:
    assert list(drop_path_rates(SPEC, 0.4)) == pytest.approx([0, 0.2, 0.4])
    assert list(drop_path_rates(ConvNeXtSpec(depths=(1, 1), dims=(4, 4)), 0.4)) == pytest.approx([0, 0.4])


def test_an_encoder_of_other_blocks_is_trained_classified_and_analysed() -> None:
    torch.manual_seed(0)
    encoder, images = Squares(), torch.randn(2, 3, 16, 8)
    assert Classifier(encoder, 5)(images).shape == (2, 5)
    assert [(p.name, tuple(p.expanded.shape), tuple(p.output.shape)) for p in walk(encoder, images)] == [
        ("stages.0.0", (2, 8, 4, 4), (2, 8, 4, 4)),
        ("stages.1.0", (2, 4, 2, 6), (2, 4, 2, 6)),
        ("stages.1.1", (2, 4, 2, 6), (2, 4, 2, 6)),
    ]
    assert layer_names(encoder) == ["stages.0.0", "stages.1.0", "stages.1.1"] and grn_norms(encoder) == {}
    mask = torch.tensor([[[True, False], [False, True]]] * 2).view(2, 2, 2)
    model = build_fcmae(encoder, 8, 1)
    masked_loss(model, torch.randn(2, 3, 8, 8), mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        layer = layer_of(name, encoder.spec, "single")
        assert (layer == num_layers(encoder.spec, "single")) == (not name.startswith("encoder."))
