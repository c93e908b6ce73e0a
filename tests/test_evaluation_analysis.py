"""Statistics of channels agree with their definitions, written out with numpy, however the images are streamed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from conftest import randomize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics.pairwise import cosine_similarity
from timm.models import ConvNeXt
from torch import Tensor

from fcmae.evaluation.analysis import (
    Statistics,
    activation_maps,
    as_encoder,
    class_selectivity,
    cosine_distance,
    dead_channels,
    effective_rank,
    grn_norms,
    layer_names,
    saturated_channels,
    walk,
)
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.weights.formats import to_state

LAYERS = ["stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "stages.3.0"]


def network(use_grn: bool = True) -> Encoder:
    """A small ConvNeXt, V2 or V1, with random parameters."""
    encoder = Encoder(ConvNeXtSpec(depths=(1, 2, 1, 1), dims=(4, 6, 8, 6), use_grn=use_grn))
    randomize(encoder)
    return encoder.double().eval()


def by_hand(encoder: Encoder, images: Tensor) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Expanded features (B, n, 4C) and pooled outputs (B, C) of each block, computed layer by layer by timm's."""
    spec = encoder.spec
    scale = None if spec.use_grn else 1e-6
    model = ConvNeXt(depths=spec.depths, dims=spec.dims, num_classes=0, use_grn=spec.use_grn, ls_init_value=scale)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    model.double().eval().load_state_dict(to_state(state, spec, "timm"))
    found = {}
    x = model.stem(images)
    for i, stage in enumerate(model.stages):
        x = stage.downsample(x)
        for j, block in enumerate(stage.blocks):
            h = block.mlp.act(block.mlp.fc1(block.norm(block.conv_dw(x).permute(0, 2, 3, 1))))
            if spec.use_grn:
                h = block.mlp.grn(h)
            x = block(x)
            found[f"stages.{i}.{j}"] = (h.flatten(1, 2).detach().numpy(), x.mean((2, 3)).detach().numpy())
    return found


# Cosine distance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cosine_distance_is_the_papers_mean_over_all_pairs(dtype: torch.dtype) -> None:
    features = (torch.randn(3, 10, 7, dtype=torch.float64) + 0.5).to(dtype)
    expected = [((1 - cosine_similarity(x.T)) / 2).mean() for x in features.double().numpy()]
    # Whatever the features come in, norms are in float32 at least.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(cosine_distance(features), expected, atol=tolerance)


def test_the_cosine_distance_of_channels_worked_by_hand() -> None:
    on, off = [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]
    features = {
        "alike": ([on, [3 * v for v in on]], 0.0),
        "orthogonal": ([on, off], 0.25),  # of four pairs two are 1/2 apart
        "opposite": ([on, [-v for v in on]], 0.5),  # and here 1
        "one is zero": ([on, [0.0] * 3], 0.25),
        "two are zero": ([on, [0.0] * 3, [0.0] * 3], 2 / 9),  # of nine pairs four are 1/2 apart
        "all are zero": ([[0.0] * 3] * 2, 0.0),
    }
    for name, (channels, expected) in features.items():
        assert cosine_distance(torch.tensor([channels]).mT).item() == pytest.approx(expected, abs=1e-6), name


def test_large_features_of_16_bits_do_not_overflow() -> None:
    features = torch.full((1, 5, 2), 60000.0, dtype=torch.float16)
    assert cosine_distance(features).item() == pytest.approx(0, abs=1e-6)


# Dead and saturated channels


@given(st.floats(1e-3, 1e3))
def test_dead_and_saturated_channels_are_told_whatever_the_scale(scale: float) -> None:
    rng = np.random.default_rng(0)
    channels = {
        "varied": rng.normal(size=4000),
        "shifted": rng.normal(0.5, 1, 4000),
        "on everywhere": rng.normal(2, 0.1, 4000),
        "negative everywhere": rng.normal(-2, 0.1, 4000),
        "constant": np.full(4000, 1.0),
        "nearly nothing": rng.normal(size=4000) * 0.005,
        "nearly nothing and constant": np.full(4000, 0.005),
        "zero": np.zeros(4000),
    }
    values = torch.tensor(np.stack(list(channels.values()))) * scale
    mean, rms = values.mean(1), values.square().mean(1).sqrt()
    names = np.array(list(channels))
    assert set(names[dead_channels(rms)]) == {"nearly nothing", "nearly nothing and constant", "zero"}
    assert set(names[saturated_channels(mean, rms)]) == {"on everywhere", "negative everywhere", "constant"}


def test_channels_of_a_layer_that_is_zero_are_dead() -> None:
    assert dead_channels(torch.zeros(3)).all()
    assert not saturated_channels(torch.zeros(3), torch.zeros(3)).any()


# Effective rank


def test_the_effective_rank_is_exp_of_the_entropy_of_the_singular_values() -> None:
    features = np.random.default_rng(0).normal(0.3, 1, (50, 8)) * np.geomspace(1, 1e-3, 8)
    singular = np.linalg.svd(features, compute_uv=False)
    p = singular / singular.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    # The Gram matrix squares the singular values: half of the digits are left of the small ones.
    assert effective_rank(torch.tensor(features.T @ features)) == pytest.approx(expected, rel=1e-7)


def test_the_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.diag(torch.tensor([4.0, 4.0, 0.0]).double())) == pytest.approx(2)
    one = torch.arange(1.0, 7).double()
    assert effective_rank(torch.outer(one, one)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_there_is_no_rank_of_features_that_are_zero_or_not_finite(value: float) -> None:
    assert math.isnan(effective_rank(torch.full((3, 3), value, dtype=torch.float64)))


# Class selectivity


def test_class_selectivity_worked_by_hand() -> None:
    means = torch.tensor([[3.0, 1.0, 0.0, 2.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0]])
    # The rest's means are 1/2, 1, 0 and 1.
    assert class_selectivity(means).tolist() == pytest.approx([2.5 / 3.5, 0, 0, 1 / 3])
    assert class_selectivity(means[:2]).tolist() == pytest.approx([0.5, 0, 0, 1])


# All of it, streamed through a network


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("use_grn", [True, False])
def test_statistics_streamed_through_a_network_are_those_of_all_features_at_once(
    use_grn: bool, batch_size: int
) -> None:
    model, images, labels = (
        network(use_grn),
        torch.randn(5, 3, 64, 96).double(),
        torch.tensor([2, 0, 2, 0, 2]),
    )
    statistics = Statistics(model, num_classes=3)  # of which one has no image
    assert statistics.layers() == {}
    for part, of in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        statistics.add(part, of)
    found = statistics.layers()
    assert list(found) == LAYERS
    for name, (expanded, pooled) in by_hand(model, images).items():
        layer, flat = found[name], expanded.reshape(-1, expanded.shape[2])
        assert layer.num_channels == flat.shape[1] == 4 * pooled.shape[1]
        pairs = [((1 - cosine_similarity(x.T)) / 2).mean() for x in expanded]
        assert layer.cosine_distance == pytest.approx(np.mean(pairs), rel=1e-10)
        rms = np.sqrt((flat**2).mean(0))
        dead = rms < 0.01 * np.sort(rms)[(len(rms) - 1) // 2]
        assert layer.dead_share == dead.mean()
        assert layer.saturated_share == ((flat.std(0) < 0.1 * abs(flat.mean(0))) & ~dead).mean()
        singular = np.linalg.svd(pooled, compute_uv=False)
        p = singular / singular.sum()
        assert layer.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
        first, second = (np.maximum(expanded[labels.numpy() == label], 0).mean((0, 1)) for label in (0, 2))
        total = first + second
        expected = np.divide(abs(first - second), total, out=np.zeros_like(total), where=total > 0)
        assert layer.selectivity is not None
        np.testing.assert_allclose(layer.selectivity, expected, atol=1e-12)


def test_dead_and_saturated_channels_of_a_network_are_counted() -> None:
    model = network(use_grn=False)
    block = model.stages[1][1]
    fc1 = block.pwconv1  # 24 channels
    with torch.no_grad():
        block.norm.weight.fill_(3)  # the others vary
        fc1.weight[:5] = 0
        fc1.bias[:3] = -100  # GELU makes it 0
        fc1.bias[3:5] = 2
    statistics = Statistics(model)
    statistics.add(torch.randn(4, 3, 64, 64).double())
    layer = statistics.layers()["stages.1.1"]
    assert (layer.dead_share, layer.saturated_share) == (3 / 24, 2 / 24)


def test_without_labels_or_with_one_class_there_is_no_selectivity() -> None:
    model, images = network(), torch.randn(2, 3, 32, 32).double()
    for statistics, labels in ((Statistics(model), None), (Statistics(model, 2), torch.tensor([1, 1]))):
        statistics.add(images, labels)
        assert all(layer.selectivity is None for layer in statistics.layers().values())


def test_features_that_are_not_finite_give_nan_and_no_error() -> None:
    model, images = network(), torch.randn(1, 3, 32, 32).double()
    statistics = Statistics(model)
    statistics.add(images * math.inf)
    for layer in statistics.layers().values():
        assert all(map(math.isnan, (layer.cosine_distance, layer.dead_share, layer.saturated_share)))
        assert math.isnan(layer.effective_rank)


def test_images_that_do_not_fit_add_nothing() -> None:
    statistics = Statistics(network())
    with pytest.raises(RuntimeError):
        statistics.add(torch.ones(1, 5, 32, 32).double())
    assert statistics.layers() == {}


def test_the_walk_ends_where_the_encoder_does() -> None:
    model, images = network(), torch.randn(2, 3, 64, 32).double()
    names, _, inputs, expanded, outputs = zip(*walk(model, images), strict=True)
    assert inputs[2] is outputs[1]
    assert list(names) == layer_names(model) == LAYERS
    torch.testing.assert_close(outputs[-1], model(images), atol=1e-12, rtol=1e-12)
    assert [h.shape[-1] for h in expanded] == [4 * f.shape[-1] for f in outputs]


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="ResNet is no ConvNeXt, so it has no blocks with expanded features: give"):
        as_encoder(timm.create_model("resnet10t", num_classes=0))


# What is drawn


@pytest.mark.parametrize("use_grn", [True, False])
def test_activation_maps_are_of_channels_spread_over_the_layer(use_grn: bool) -> None:
    model, image = network(use_grn), torch.randn(3, 64, 96).double()
    maps = activation_maps(model, image, ["stages.2.0", "stages.0.0"], num_maps=4)
    expanded = by_hand(model, image[None])
    assert [found.shape for found in maps] == [(4, 4, 6), (4, 16, 24)]
    for found, (name, channels) in zip(
        maps, (("stages.2.0", [0, 10, 21, 31]), ("stages.0.0", [0, 5, 10, 15])), strict=True
    ):
        expected = expanded[name][0][0].T[channels].reshape(found.shape)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(activation_maps(model, image, ["stages.0.0"])[0]) == 16  # all there are


def test_grn_norms_are_root_mean_squares_and_v1_has_none() -> None:
    model = network()
    found = grn_norms(model)
    assert list(found) == LAYERS
    weight, bias = (p.detach().numpy() for p in model.stages[1][1].grn.parameters())
    assert found["stages.1.1"] == pytest.approx([np.sqrt((p**2).mean()) for p in (weight, bias)])
    assert grn_norms(network(use_grn=False)) == {}
