"""CONTAINER: its counts, its four families against plain networks, and its layouts against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MINKOWSKI, randomize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fcmae.heads import Classifier
from fcmae.layouts import DENSE, Layout, Masked, make_layout
from fcmae.layouts.sites import upsample_mask
from fcmae.masked import build_fcmae, masked_loss
from fcmae.networks.build import make_encoder
from fcmae.networks.container import Aggregation, Block, Encoder
from fcmae.networks.encoder import layer_of, num_layers
from fcmae.networks.layers import LayerNorm
from fcmae.networks.spec import VARIANTS, ContainerSpec
from fcmae.training.optim import parameter_groups

TINY = ContainerSpec(
    depths=(1, 1, 2, 1),
    dims=(4, 6, 8, 12),
    affinity=("static", "static", "dynamic", "mixed"),
    mlp_ratios=(3, 2, 2, 4),
    num_heads=2,
    stem_stride=1,
)
MASK = torch.tensor([[[0, 1, 0], [1, 0, 1]], [[1, 1, 0], [0, 1, 0]]]).bool()  # three of six patches visible


class Matrix(nn.Module):
    """A static affinity without a form: any matrix over the sites of a grid, as MLP-mixer has one."""

    def __init__(self, num_sites: int, num_heads: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_sites, num_sites))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Features (..., C) in `layout` to features of the same shape; hidden sites count as zero."""
        dense = layout.unpack(x)  # (B, h, w, C)
        heads = dense.reshape(
            len(dense), self.weight.shape[1], len(self.weight), -1
        )  # (B, n, num_heads, C / num_heads)
        return layout.pack(torch.einsum("hij,bjhc->bihc", self.weight, heads).reshape(dense.shape))


def macs(call: Callable[[], Any]) -> dict[str, int]:
    """Multiply-adds by operation, attention as the products that it is made of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize(("name", "params_m", "gmacs"), [("container_light", 20.63, 3.85), ("container", 22.43, 8.95)])
def test_parameters_and_multiply_adds_are_the_released_codes(name: str, params_m: float, gmacs: float) -> None:
    with torch.device("meta"):
        model, images = Classifier(make_encoder(VARIANTS[name]), 1000), torch.empty(1, 3, 224, 224)
    num = sum(p.numel() for p in model.parameters())
    assert (round(num / 1e6, 2), round(sum(macs(lambda: model(images)).values()) / 1e9, 2)) == (params_m, gmacs)
    # With BatchNorm in the blocks and before the pooling, as released, there would be as many.
    norms = [m for m in model.modules() if isinstance(m, LayerNorm)]
    released = [nn.BatchNorm2d(m.normalized_shape[0], device="meta") for m in norms]
    assert sum(p.numel() for m in released for p in m.parameters()) == sum(
        p.numel() for m in norms for p in m.parameters()
    )


def test_attention_to_visible_tokens_costs_the_square_of_their_share() -> None:
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[0, torch.randperm(100)[:40]] = False  # ratio .6
    layout = make_layout("packed", mask.view(1, 10, 10), 40)
    for b in (1, 2):
        q = torch.randn(1, 10 * b, 10 * b, 8)
        f = layout.pack(q)
        whole = macs(lambda q=q: DENSE.attention(q, q, q, 2))["aten.bmm"]
        assert whole == 2 * (100 * b * b) ** 2 * 8
        assert macs(lambda f=f: layout.attention(f, f, f, 2))["aten.bmm"] / whole == pytest.approx(0.16)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def static_reference(a: Aggregation, x: Tensor) -> Tensor:
    """1x1, depthwise 5x5, 1x1 convolutions of (B, C, H, W): the branch of a depthwise ConvNet."""
    dim = x.shape[1]
    x = F.conv2d(x, a.values.weight[:dim, :, None, None], a.values.bias[:dim])
    x = F.conv2d(x, a.static.weight, a.static.bias, padding=2, groups=dim)
    return F.conv2d(x, a.output.weight[..., None, None], a.output.bias)


def dynamic_reference(a: Aggregation, x: Tensor, num_heads: int) -> Tensor:
    """torch's own attention, of (B, C, H, W): the branch of a transformer."""
    dim, (height, width) = x.shape[1], x.shape[2:]
    order = [*range(dim, 3 * dim), *range(dim)]  # ours are value, query, key
    attention = nn.MultiheadAttention(dim, num_heads, batch_first=True, dtype=x.dtype)
    state = {
        "in_proj_weight": a.values.weight[order],
        "in_proj_bias": a.values.bias[order],
        "out_proj.weight": a.output.weight,
        "out_proj.bias": a.output.bias,
    }
    attention.load_state_dict(state)
    tokens = x.flatten(2).transpose(1, 2)
    return attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, (height, width))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 5, 8, dtype=torch.float64)


def aggregation(*arguments: Any, **keywords: Any) -> Aggregation:
    a = Aggregation(8, *arguments, num_heads=2, **keywords).double()
    randomize(a)
    return a


@torch.no_grad()
def test_without_dynamic_affinity_it_is_a_depthwise_convnet(x: Tensor) -> None:
    mixed, alone = aggregation("mixed"), aggregation("static")
    mixed.alpha.zero_()
    mixed.beta.fill_(1)
    for a in (mixed, alone):
        torch.testing.assert_close(nchw(a(x, DENSE)), static_reference(a, nchw(x)))
    assert not any(name in dict(alone.named_parameters()) for name in ("alpha", "beta", "share"))


@torch.no_grad()
def test_without_static_affinity_it_is_a_transformer(x: Tensor) -> None:
    mixed, alone = aggregation("mixed"), aggregation("dynamic")
    mixed.alpha.fill_(1)
    mixed.beta.zero_()
    for a in (mixed, alone):
        torch.testing.assert_close(nchw(a(x, DENSE)), dynamic_reference(a, nchw(x), 2))
    assert alone.static is None


@pytest.mark.parametrize("num_heads", [1, 2])
@torch.no_grad()
def test_with_a_static_affinity_of_any_form_it_is_an_mlp_mixer(x: Tensor, num_heads: int) -> None:
    a = aggregation("static", Matrix(20, num_heads))
    tokens = F.linear(x.flatten(1, 2), a.values.weight, a.values.bias)  # (B, n, C)
    # A Linear over sites for each head's channels.
    mixed = torch.cat(
        [F.linear(part.mT, a.static.weight[h]).mT for h, part in enumerate(tokens.chunk(num_heads, dim=2))], dim=2
    )
    expected = F.linear(mixed, a.output.weight, a.output.bias).view_as(x)
    torch.testing.assert_close(a(x, DENSE), expected)


@pytest.mark.parametrize("mix", ["free", "convex"])
@torch.no_grad()
def test_mixed_affinity_is_the_weighted_sum_of_both(x: Tensor, mix: str) -> None:
    a = Aggregation(8, "mixed", num_heads=2, mix=mix).double()
    assert [float(weight) for weight in a.weights()] == [0.5, 0.5]  # both start as the released code does
    randomize(a)
    if mix == "free":
        alpha, beta = float(a.alpha), float(a.beta)
    else:
        alpha = 1 / (1 + math.exp(-float(a.share)))
        beta = 1 - alpha
    no_bias = a.output.bias[:, None, None]
    parts = static_reference(a, nchw(x)) - no_bias, dynamic_reference(a, nchw(x), 2) - no_bias
    torch.testing.assert_close(nchw(a(x, DENSE)), alpha * parts[1] + beta * parts[0] + no_bias)


@pytest.mark.parametrize("affinity", ["static", "dynamic", "mixed"])
def test_a_block_is_position_then_aggregation_then_mlp(x: Tensor, affinity: Any) -> None:
    block = Block(8, 24, Aggregation(8, affinity, num_heads=2), drop_path_rate=0.5).double().eval()
    randomize(block)
    y = nchw(x)
    y = y + F.conv2d(y, block.position.weight, block.position.bias, padding=1, groups=8)
    y = y.permute(0, 2, 3, 1)
    y = y + block.aggregate(F.layer_norm(y, (8,), block.norm1.weight, block.norm1.bias, 1e-6), DENSE)
    normed = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
    hidden = F.gelu(F.linear(normed, block.pwconv1.weight, block.pwconv1.bias))
    y = y + F.linear(hidden, block.pwconv2.weight, block.pwconv2.bias)
    torch.testing.assert_close(block(x, DENSE), y)
    expanded, output = block.trace(x, DENSE)
    torch.testing.assert_close((expanded, output), (hidden, y))


def test_drop_path_drops_either_branch_of_an_image() -> None:
    block = Block(8, 16, Aggregation(8, num_heads=2), drop_path_rate=0.5)
    randomize(block)
    x = torch.randn(1, 2, 2, 8)
    found = {tuple(block(x, DENSE).detach().flatten().round(decimals=3).tolist()) for _ in range(40)}
    assert len(found) == 4  # each branch there or not


LAYOUTS = ["packed", MINKOWSKI]


@pytest.mark.parametrize("backend", LAYOUTS)
@pytest.mark.parametrize("b", [1, 2, 4])
@pytest.mark.parametrize(
    ("affinity", "mix"), [("static", "free"), ("dynamic", "free"), ("mixed", "free"), ("mixed", "convex")]
)
def test_a_block_in_a_layout_equals_the_masked_block(backend: str, b: int, affinity: Any, mix: str) -> None:
    block = Block(8, 24, Aggregation(8, affinity, num_heads=2, mix=mix)).double()
    compare(block, backend, b)


@pytest.mark.parametrize("backend", LAYOUTS)
def test_a_matrix_in_a_layout_equals_the_masked_one(backend: str) -> None:
    compare(Block(8, 24, Aggregation(8, "static", Matrix(24))).double(), backend, 2)


def compare(block: Block, backend: str, b: int) -> None:
    randomize(block)
    dense = torch.randn(2, 2 * b, 3 * b, 8, dtype=torch.float64)
    cotangent = torch.randn_like(dense)
    results = []
    for layout in (make_layout(backend, MASK), Masked(MASK)):
        x = dense.clone().requires_grad_()
        block.zero_grad()
        y = layout.unpack(block(layout.pack(x), layout))
        y.backward(cotangent)
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
    for other, masked in zip(*results, strict=True):
        torch.testing.assert_close(other, masked, atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    made = make_encoder(TINY).double()
    assert isinstance(made, Encoder)
    randomize(made)
    return made


def features(encoder: Encoder, images: Tensor, layout: Layout) -> list[Tensor]:
    return [layout.unpack(f) for f in encoder.pyramid(images, layout)]


@pytest.mark.parametrize("backend", LAYOUTS)
def test_every_stage_agrees_in_values_and_gradients(encoder: Encoder, backend: str) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)  # mask patches of 16 pixels, 2 x 2 sites at the end
    results = []
    for layout in (make_layout(backend, MASK), Masked(MASK)):
        encoder.zero_grad()
        maps = features(encoder, images, layout)
        sum((f * torch.arange(f.numel()).view(f.shape).sin()).sum() for f in maps).backward()
        results.append([*(f.detach() for f in maps), *(p.grad.clone() for p in encoder.parameters())])
    for other, masked in zip(*results, strict=True):
        torch.testing.assert_close(other, masked, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_hidden_pixels_reach_no_visible_feature_and_no_gradient(encoder: Encoder, backend: str) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    hidden = upsample_mask(MASK, 16)[:, None].expand_as(images)
    plain = features(encoder, images, make_layout(backend, MASK))
    for value in (torch.nan, torch.inf, -3.0):
        other = images.masked_fill(hidden, value).requires_grad_()
        found = features(encoder, other, make_layout(backend, MASK))
        assert all(torch.equal(f, g) for f, g in zip(found, plain, strict=True))
        gradients = torch.autograd.grad(sum(f.square().sum() for f in found), [other, *encoder.parameters()])
        assert (gradients[0][hidden] == 0).all() and (gradients[0][~hidden] != 0).any()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_visible_pixel_reaches_the_whole_image_through_attention_and_no_other_image(encoder: Encoder) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    other = images.clone()
    other[0, :, 0, 0] += 1
    plain, changed = (encoder(x, make_layout("packed", MASK)) for x in (images, other))
    assert (plain[0] != changed[0]).any(-1).all() and torch.equal(plain[1], changed[1])


def test_with_nothing_hidden_the_layouts_are_the_dense_network(encoder: Encoder) -> None:
    images, mask = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.bool)
    layout = make_layout("packed", mask)
    torch.testing.assert_close(layout.unpack(encoder(images, layout)), encoder(images))


def test_any_image_size_goes_and_recomputing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = make_encoder(TINY)
    again = make_encoder(TINY, grad_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 19, 26)
    for encoder in (plain, again):
        encoder(images).square().mean().backward()
    assert plain(images).shape == (1, 2, 3, 12)
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_every_parameter_learns_in_masked_pretraining_and_starts_as_it_should() -> None:
    model = build_fcmae(make_encoder(TINY), 8, 1)
    starts = {name: p.detach() for name, p in model.encoder.named_parameters()}
    for name, p in starts.items():
        if p.ndim >= 2:
            assert float(p.square().mean().sqrt()) == pytest.approx(0.02, rel=0.5), name
        elif "norm" in name or (name.startswith("downsample_layers") and ".1." in name):
            assert p.eq(1 if name.endswith("weight") else 0).all(), name
        else:
            assert p.eq(0.5 if p.ndim == 0 else 0).all(), name
    masked_loss(model, torch.randn(2, 3, 32, 48), MASK).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_layers_for_layer_decay_and_what_does_not_decay() -> None:
    model = Classifier(make_encoder(TINY), 3)
    found: dict[int, set[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(layer_of(name, TINY, "single"), set()).add(".".join(name.split(".")[:4]))
    assert sorted(found) == [*range(1, num_layers(TINY, "single") + 1)]
    decaying = {id(p) for group in parameter_groups(model, 0.05) if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decaying) == (p.ndim > 1) for p in model.parameters())
