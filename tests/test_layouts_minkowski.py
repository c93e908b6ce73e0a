"""What is MinkowskiEngine's own: the order of its rows and kernels, its modules, and masks of any kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import randomize, requires_minkowski
from torch import Tensor

from fcmae.layouts import Masked, make_layout
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS

pytestmark = requires_minkowski

SMALL_IMAGES = VARIANTS["convnextv2_atto"].model_copy(update={"stem_stride": 1})

# Images of 2 x 4 patches that show three, none, all and one of them.
UNEVEN = torch.tensor(
    [
        [[0, 1, 1, 0], [1, 1, 0, 1]],
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 1, 1, 1], [1, 1, 0, 1]],
    ],
    dtype=torch.bool,
)


@pytest.fixture
def engine() -> Any:
    from fcmae.layouts.minkowski import MinkowskiEngine

    return MinkowskiEngine


def layout_and_features(engine: Any, mask: Tensor, b: int, channels: int) -> tuple[Any, Tensor, Any]:
    """A layout, features of its visible sites, and the same features as the engine's own sparse tensor."""
    layout = make_layout("minkowski", mask)
    f = layout.pack(torch.randn(len(mask), mask.shape[1] * b, mask.shape[2] * b, channels, dtype=torch.float64))
    sparse = engine.SparseTensor(
        f.clone().requires_grad_(), coordinate_map_key=layout._level(f).key, coordinate_manager=layout.manager
    )
    return layout, f.requires_grad_(), sparse


def test_depthwise_conv_equals_the_engines_module(engine: Any) -> None:
    layout, f, sparse = layout_and_features(engine, UNEVEN, 4, 3)
    module = engine.MinkowskiChannelwiseConvolution(3, kernel_size=7, bias=True, dimension=2).double()
    randomize(module)  # asymmetric: a transposed kernel would show
    # The formula by which released checkpoints are read.
    weight = module.kernel.detach().permute(1, 0).reshape(3, 1, 7, 7).transpose(2, 3).requires_grad_()
    expected = module(sparse).F
    y = layout.depthwise_conv(f, weight, module.bias.detach().flatten())
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(f.grad, sparse.F.grad)
    torch.testing.assert_close(weight.grad, module.kernel.grad.permute(1, 0).reshape(3, 1, 7, 7).transpose(2, 3))


def test_the_engine_leaves_the_number_of_threads_alone() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layout = make_layout("minkowski", UNEVEN)
    layout.depthwise_conv(layout.pack(torch.randn(4, 8, 16, 3)), torch.randn(3, 1, 7, 7), None)
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert found == 1


def test_downsample_equals_the_engines_module(engine: Any) -> None:
    layout, f, sparse = layout_and_features(engine, UNEVEN, 4, 3)
    module = engine.MinkowskiConvolution(3, 5, kernel_size=2, stride=2, bias=True, dimension=2).double()
    randomize(module)
    weight = module.kernel.detach().permute(2, 1, 0).reshape(5, 3, 2, 2).transpose(2, 3).requires_grad_()
    expected = module(sparse).F
    y = layout.downsample(f, weight, module.bias.detach().flatten())
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(f.grad, sparse.F.grad)
    torch.testing.assert_close(weight.grad, module.kernel.grad.permute(2, 1, 0).reshape(5, 3, 2, 2).transpose(2, 3))


def test_16_bit_features_are_computed_in_the_precision_of_the_weights() -> None:
    layout = make_layout("minkowski", UNEVEN)
    f = layout.pack(torch.randn(4, 8, 16, 3)).bfloat16()
    depthwise, strided = torch.randn(3, 1, 7, 7), torch.randn(5, 3, 2, 2)
    assert torch.equal(layout.depthwise_conv(f, depthwise, None), layout.depthwise_conv(f.float(), depthwise, None))
    assert torch.equal(layout.downsample(f, strided, None), layout.downsample(f.float(), strided, None))


def encoded(encoder: Encoder, images: Tensor, layout: Any) -> list[Tensor]:
    """Features as a dense map, and every gradient."""
    encoder.zero_grad()
    y = layout.unpack(encoder(images, layout))
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(p.grad.clone() for p in encoder.parameters())]


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_any_mask_gives_what_the_masked_encoder_does(scope: str) -> None:
    encoder = Encoder(SMALL_IMAGES).double()
    randomize(encoder, std=0.1)
    images = torch.randn(4, 3, 16, 32, dtype=torch.float64)
    found = encoded(encoder, images, make_layout("minkowski", UNEVEN, grn_scope=scope))
    # Exact algebra in another order, through fourteen blocks.
    torch.testing.assert_close(found, encoded(encoder, images, Masked(UNEVEN, scope)), atol=1e-9, rtol=1e-7)


def test_the_order_of_the_rows_does_not_matter(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(SMALL_IMAGES).double()
    randomize(encoder, std=0.1)
    images = torch.randn(4, 3, 16, 32, dtype=torch.float64)
    layout = make_layout("minkowski", UNEVEN)
    expected = encoded(encoder, images, layout)

    insert = engine.CoordinateManager.insert_and_map
    monkeypatch.setattr(
        engine.CoordinateManager,
        "insert_and_map",
        lambda manager, sites, *rest: insert(manager, sites[torch.randperm(len(sites))].contiguous(), *rest),
    )
    shuffled = make_layout("minkowski", UNEVEN)
    found = encoded(encoder, images, shuffled)
    assert not torch.equal(shuffled._levels[8].site, layout._levels[8].site)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def test_a_mask_that_hides_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no patch visible"):
        make_layout("minkowski", torch.ones(2, 2, 2, dtype=torch.bool))
