"""The layouts agree with each other in values and gradients, and hidden sites reach nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import CONVNEXTS, MINKOWSKI, randomize
from torch import Tensor

from fcmae.layouts import Masked, Packed, make_layout
from fcmae.layouts.sites import count_visible, true_rows, upsample_mask
from fcmae.masking import num_visible, random_mask
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import Block
from fcmae.networks.spec import VARIANTS

ATTO = VARIANTS["convnextv2_atto"]
BACKENDS = ["packed", "masked", MINKOWSKI]
AGAINST_MASKED = ["packed", MINKOWSKI]

# Exact algebra in another order: float64 leaves a few ulps times the length of the sums.
TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}


def masks(batch: int, grid: tuple[int, int], visible: int) -> Tensor:
    return torch.from_numpy(random_mask(grid, visible, [(7, i) for i in range(batch)]))


@pytest.mark.parametrize(
    ("grid", "visible", "batch"),
    [((3, 3), 4, 2), ((2, 5), 3, 2), ((5, 2), 1, 1), ((1, 4), 2, 3), ((3, 3), 9, 1), ((7, 7), 19, 1)],
)
@pytest.mark.parametrize("b", [1, 2, 4, 8])
@pytest.mark.parametrize("use_grn", [True, False])
@pytest.mark.parametrize("backend", AGAINST_MASKED)
def test_block_equals_masked_block(
    backend: str, grid: tuple[int, int], visible: int, batch: int, b: int, use_grn: bool
) -> None:
    mask = masks(batch, grid, visible)
    block = Block(6, use_grn=use_grn).double()
    randomize(block)
    dense = torch.randn(batch, grid[0] * b, grid[1] * b, 6, dtype=torch.float64)
    cotangent = torch.randn_like(dense)
    results = []
    for layout in (make_layout(backend, mask, visible), Masked(mask)):
        x = dense.clone().requires_grad_()
        block.zero_grad()
        y = layout.unpack(block(layout.pack(x), layout))
        y.backward(cotangent)
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
    for other, masked in zip(*results, strict=True):
        torch.testing.assert_close(other, masked, **TOLERANCE)


@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
@pytest.mark.parametrize("backend", AGAINST_MASKED)
def test_downsample_equals_convolution(backend: str, grid: tuple[int, int]) -> None:
    mask = masks(2, grid, 2)
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)  # asymmetric: a transposed kernel would show
    bias = torch.randn(5, dtype=torch.float64)
    x = torch.randn(2, grid[0] * 4, grid[1] * 4, 3, dtype=torch.float64)
    layout, masked = make_layout(backend, mask), Masked(mask)
    torch.testing.assert_close(
        layout.unpack(layout.downsample(layout.pack(x), weight, bias)),
        masked.unpack(masked.downsample(masked.pack(x), weight, bias)),
        **TOLERANCE,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpack_inverts_pack_and_zeroes_hidden_sites(backend: str) -> None:
    mask = masks(3, (2, 4), 3)
    x = torch.randn(3, 6, 12, 2)
    layout = make_layout(backend, mask)
    expected = x * upsample_mask(~mask, 3)[..., None]
    assert torch.equal(layout.unpack(layout.pack(x)), expected)
    assert torch.equal(Masked(mask).unpack(x), expected)


def norms(backend: str, mask: Tensor, x: Tensor, scope: str) -> Tensor:
    """The norm that each site is divided by, (B, H, W, C), zero at hidden sites."""
    layout = make_layout(backend, mask, grn_scope=scope)
    f = layout.pack(x)
    return layout.unpack(layout.image_norm(f).expand_as(f))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scope", "dims"), [("image", (1, 2)), ("batch", (0, 1, 2))])
def test_image_norm_is_over_the_visible_sites_of_an_image_or_of_the_batch(
    backend: str, scope: str, dims: tuple[int, ...]
) -> None:
    mask = masks(2, (2, 3), 2)
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    visible = upsample_mask(~mask, 2)[..., None]
    expected = (x * visible).square().sum(dims, keepdim=True).sqrt() * visible
    torch.testing.assert_close(norms(backend, mask, x, scope), expected)
    alone = [norms(backend, mask[:1], x[:1], scope) for scope in ("image", "batch")]
    torch.testing.assert_close(*alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_a_channel_that_is_zero_has_no_gradient_rather_than_an_infinite_one(backend: str, scope: str) -> None:
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    x[0, ..., 1] = 0
    x[..., 2] = 0
    gradients = []
    for name in (backend, "masked"):
        leaf = x.clone().requires_grad_()
        norms(name, masks(2, (2, 2), 2), leaf, scope).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0][..., 2].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_path_drops_whole_images_and_scales_the_others(backend: str) -> None:
    mask = masks(64, (1, 3), 2)
    layout = make_layout(backend, mask)
    x = torch.ones(64, 2, 6, 5)
    y = layout.unpack(layout.drop_path(layout.pack(x), 0.25))
    visible = upsample_mask(~mask, 2)
    images = torch.stack([image[sites].flatten() for image, sites in zip(y, visible, strict=True)])
    kept = images.ne(0).any(1)
    torch.testing.assert_close(images, kept[:, None].expand_as(images) / 0.75)  # one value an image
    assert 31 <= kept.sum() < 64  # of 64 draws of probability .75: five standard deviations are 17


@pytest.mark.parametrize("backend", AGAINST_MASKED)
def test_drop_path_draws_the_same_images_in_every_layout(backend: str) -> None:
    mask = masks(16, (1, 3), 2)
    dropped = []
    for name in (backend, "masked"):
        layout = make_layout(name, mask)
        torch.manual_seed(3)
        dropped.append(layout.unpack(layout.drop_path(layout.pack(torch.ones(16, 1, 3, 1)), 0.5)))
    assert torch.equal(*dropped)


def test_drop_path_acts_in_training_only() -> None:
    mask = masks(32, (1, 2), 1)
    block = Block(4, drop_path_rate=0.9)
    layout = Packed(mask, 1)
    x = layout.pack(torch.randn(32, 1, 2, 4))
    changed = (block.train()(x, layout) != x).flatten(1).any(1)
    assert 0 < changed.sum() < 16
    assert (block.eval()(x, layout) != x).flatten(1).any(1).all()


# One case for each set of stage widths and each kind of geometry; the deep variants differ only in depth.
@pytest.mark.parametrize(
    ("variant", "stem_stride", "mask_patch", "size", "ratio", "batch"),
    [
        ("convnextv2_atto", 4, 32, (96, 128), 0.6, 2),
        ("convnextv2_atto", 4, 64, (128, 192), 0.5, 1),
        ("convnextv2_atto", 2, 16, (48, 32), 0.75, 2),
        ("convnextv2_atto", 1, 8, (24, 40), 0.6, 2),
        ("convnextv2_atto", 1, 24, (48, 48), 0.6, 2),
        ("convnext_tiny", 4, 32, (64, 96), 0.6, 2),
        ("convnextv2_tiny", 4, 32, (32, 96), 0.6, 1),
    ],
)
@pytest.mark.parametrize("backend", AGAINST_MASKED)
def test_encoder_equals_masked_encoder(
    backend: str, variant: str, stem_stride: int, mask_patch: int, size: tuple[int, int], ratio: float, batch: int
) -> None:
    encoder = Encoder(VARIANTS[variant].model_copy(update={"stem_stride": stem_stride})).double()
    randomize(encoder, std=0.1)
    grid = (size[0] // mask_patch, size[1] // mask_patch)
    visible = num_visible(grid[0] * grid[1], ratio)
    mask = masks(batch, grid, visible)
    images = torch.randn(batch, 3, *size, dtype=torch.float64)
    results = []
    for name in (backend, "masked"):
        layout = make_layout(name, mask, visible)
        encoder.zero_grad()
        y = layout.unpack(encoder(images, layout))
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y))
        results.append([y.detach(), *(p.grad.clone() for p in encoder.parameters())])
    for other, masked in zip(*results, strict=True):
        torch.testing.assert_close(other, masked, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dim", sorted({d for name in CONVNEXTS for d in VARIANTS[name].dims if d <= 1024}))
@pytest.mark.parametrize("backend", AGAINST_MASKED)
def test_block_equals_masked_block_at_every_stage_width(backend: str, dim: int) -> None:
    stage = next(i for v in VARIANTS.values() for i, d in enumerate(v.dims) if d == dim)
    b = 8 >> stage
    mask = masks(2, (2, 3), 2)
    block = Block(dim)
    randomize(block, std=dim**-0.5)
    x = torch.randn(2, 2 * b, 3 * b, dim)
    results = []
    for layout in (make_layout(backend, mask, 2), Masked(mask)):
        block.zero_grad()
        y = layout.unpack(block(layout.pack(x), layout))
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
    for other, masked in zip(*results, strict=True):
        # float32 sums of up to 4 * 1024 terms in another order.
        torch.testing.assert_close(other, masked, atol=2e-4 * float(masked.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_pixels_cannot_reach_visible_features(backend: str) -> None:
    encoder = Encoder(ATTO)
    randomize(encoder, std=0.1)
    mask = masks(2, (2, 3), 2)
    layout = make_layout(backend, mask)
    images = torch.randn(2, 3, 64, 96, requires_grad=True)
    features = layout.unpack(encoder(images, layout))
    features.square().sum().backward()
    hidden = upsample_mask(mask, 32)[:, None].expand_as(images)
    assert images.grad[hidden].eq(0).all()
    assert images.grad[~hidden].ne(0).any()
    # Not even a NaN comes through.
    poisoned = torch.where(hidden, torch.nan, images.detach())
    torch.testing.assert_close(layout.unpack(encoder(poisoned, layout)), features)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_alone_equals_the_same_image_in_a_batch(backend: str) -> None:
    encoder = Encoder(ATTO).double()
    randomize(encoder, std=0.1)
    mask = masks(3, (2, 2), 2)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    together = make_layout(backend, mask)
    alone = make_layout(backend, mask[1:2])
    torch.testing.assert_close(
        alone.unpack(encoder(images[1:2], alone)), together.unpack(encoder(images, together))[1:2], **TOLERANCE
    )


def test_true_rows_are_in_order() -> None:
    mask = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]])
    assert true_rows(mask, 2).tolist() == [0, 3, 5, 6]
    assert true_rows(~mask, 2).tolist() == [1, 2, 4, 7]


def test_masks_of_unequal_count_are_refused() -> None:
    uneven = torch.tensor([[[True, False]], [[False, False]]])
    with pytest.raises(ValueError, match=r"\[1, 2\] patches visible"):
        count_visible(uneven)
    with pytest.raises(ValueError, match="at least 1"):
        count_visible(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="masked and minkowski take any"):
        make_layout("packed", uneven)


@pytest.mark.parametrize("backend", ["packed", MINKOWSKI])
@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 12, 8), (3, 8, 8), (2, 7, 8)])
def test_masks_that_do_not_lie_on_the_maps_are_refused(backend: str, shape: tuple[int, int, int]) -> None:
    layout = make_layout(backend, masks(2, (4, 4), 3))
    with pytest.raises(ValueError, match=r"mask: 2 of 4 x 4 patches do not lie on \d maps of"):
        layout.pack(torch.zeros(*shape, 5))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend = 'dense': use packed, triton, masked or minkowski"):
        make_layout("dense", masks(1, (2, 2), 1))
    with pytest.raises(ValueError, match="grn_scope = 'layer': use image or batch"):
        make_layout("packed", masks(1, (2, 2), 1), grn_scope="layer")


def test_a_missing_engine_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "fcmae.layouts.minkowski", raising=False)
    with pytest.raises(ValueError, match="make minkowski"):
        make_layout("minkowski", masks(1, (2, 2), 1))
