import pytest
import torch
from torch import Tensor, nn

from fcmae.layouts import DENSE, Layout, Masked, Packed
from fcmae.layouts.norms import l2_norm
from fcmae.networks.layers import GRN, Block, _GRNLinear, gelu_of, grn_linear


def parts(width: int, channels: int, dtype: torch.dtype = torch.float64) -> tuple[GRN, nn.Linear]:
    """GRN and Linear with parameters far from those that make GRN the identity."""
    torch.manual_seed(0)
    grn, linear = GRN(channels).to(dtype), nn.Linear(channels, width).to(dtype)
    nn.init.normal_(grn.gamma)
    nn.init.normal_(grn.beta)
    return grn, linear


def plain(rows: Tensor, grn: GRN, linear: nn.Linear) -> Tensor:
    out: Tensor = linear(grn(rows, l2_norm(rows.to(grn.gamma.dtype), (1,))))
    return out


def gradients(out: Tensor, rows: Tensor, grn: GRN, linear: nn.Linear) -> list[Tensor]:
    pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad(out, [rows, *grn.parameters(), *linear.parameters()], pull))


@pytest.mark.parametrize(("batch", "sites"), [(3, 5), (1, 4), (2, 1)])
def test_grn_and_linear_in_one_give_the_values_and_gradients_of_both(batch: int, sites: int) -> None:
    grn, linear = parts(4, 6)
    rows = torch.randn(batch, sites, 6, dtype=torch.float64, requires_grad=True)
    got, expected = grn_linear(rows, grn, linear), plain(rows, grn, linear)
    torch.testing.assert_close(got, expected)
    for one, other in zip(gradients(got, rows, grn, linear), gradients(expected, rows, grn, linear), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    grn, linear = parts(4, 6)
    rows = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives are not computed"):
        torch.autograd.grad(grn_linear(rows, grn, linear).sum(), rows, create_graph=True)


@pytest.mark.parametrize("learns", [False, True])
def test_gelu_takes_the_place_of_features_that_no_gradient_needs(learns: bool) -> None:
    kept = torch.linspace(-4, 4, 9)
    features = kept.clone().requires_grad_(learns)
    out = gelu_of(nn.Identity(), features)
    torch.testing.assert_close(out, nn.functional.gelu(kept), rtol=0, atol=0)
    assert torch.equal(features, kept if learns else out)
    if learns:
        (got,) = torch.autograd.grad(out.sum(), features)
        assert got[4] == 0.5


def test_a_channel_that_is_zero_in_an_image_has_a_finite_gradient() -> None:
    grn, linear = parts(2, 3)
    rows = torch.randn(2, 4, 3, dtype=torch.float64)
    rows[0, :, 1] = 0
    rows.requires_grad_()
    for one, other in zip(
        gradients(grn_linear(rows, grn, linear), rows, grn, linear),
        gradients(plain(rows, grn, linear), rows, grn, linear),
        strict=True,
    ):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def test_under_autocast_the_scaled_weight_is_rounded_once() -> None:
    grn, linear = parts(4, 6, torch.float32)
    rows = torch.randn(2, 8, 6, requires_grad=True)
    exact = plain(rows, grn, linear)
    with torch.autocast("cpu", torch.bfloat16):
        out = grn_linear(rows, grn, linear)
    assert out.dtype == torch.bfloat16
    # A product of two numbers of 8 bits, summed over 6: a few units of 2**-8.
    assert (out - exact).abs().max() < 2**-5 * exact.abs().max()
    for one, other in zip(gradients(out, rows, grn, linear), gradients(exact, rows, grn, linear), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 2**-4 * other.abs().max()


@pytest.mark.parametrize("sites", [2, 8])  # fewer than the Linear's width, and more
def test_a_channel_that_fp16_can_hardly_hold_has_a_finite_gradient(sites: int) -> None:
    grn, linear = parts(4, 6, torch.float32)
    rows = torch.randn(2, sites, 6)
    rows[:, :, 1] = 0
    rows[:, 0, 1] = 6e-8  # fp16's smallest number: one over its norm is more than fp16's largest
    leaf = rows.half().requires_grad_()
    # Without autocast, which fp16 does not have on every CPU.
    arguments = [
        x.detach() for x in (grn.gamma.flatten(), grn.beta.flatten(), linear.weight.half(), linear.bias.half())
    ]
    out = _GRNLinear.apply(leaf, *arguments)
    (found,) = torch.autograd.grad(out, leaf, torch.randn_like(out))
    assert found.isfinite().all()


@pytest.mark.parametrize("sites", [2, 8])  # fewer than the Linear's width, and more
def test_products_that_fp16_cannot_hold_have_a_finite_gradient(sites: int) -> None:
    grn = parts(4, 6, torch.float32)[0]
    gamma, beta = (x.detach().clone().requires_grad_() for x in (grn.gamma.flatten(), grn.beta.flatten()))
    rows = torch.full((1, sites, 6), 60.0, dtype=torch.float16, requires_grad=True)
    weight, bias = torch.ones(4, 6, dtype=torch.float16), torch.zeros(4, dtype=torch.float16)
    out = _GRNLinear.apply(rows, gamma, beta, weight, bias)
    pull = torch.full_like(out, 500.0 if sites == 2 else 5.0)
    for gradient in torch.autograd.grad(out, [rows, gamma, beta], pull):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("grn_scope", ["image", "batch"])
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_a_block_computes_the_same_with_many_sites_an_image_and_with_few(layout: str, grn_scope: str) -> None:
    # An image has 8 visible sites: with 2 channels the weight is scaled, with 16 the rows are.
    torch.manual_seed(0)
    mask = torch.tensor([[[False, True, False]]])
    for dim in (2, 16):
        block = Block(dim).double()
        assert block.grn is not None
        nn.init.normal_(block.grn.gamma)
        nn.init.normal_(block.grn.beta)
        place = Packed(mask, 2, grn_scope) if layout == "packed" else Masked(mask, grn_scope)
        x = torch.randn(1, 2, 6, dim, dtype=torch.float64)
        f = place.pack(x)
        out = place.unpack(block(f, place))

        seen = torch.zeros(1, 2, 6, 1, dtype=torch.bool)
        seen[:, :, :2] = seen[:, :, 4:] = True
        h = nn.Conv2d.forward(block.dwconv, (x * seen).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h = nn.functional.gelu(block.pwconv1(block.norm(h))) * seen
        expected = x + block.pwconv2(block.grn(h, torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)))
        torch.testing.assert_close(out, expected * seen)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@torch.no_grad()
def test_hooks_see_what_the_layers_give_and_replacements_are_called(layout: str) -> None:
    torch.manual_seed(0)
    block = Block(4).double()
    assert block.grn is not None
    nn.init.normal_(block.grn.gamma)
    place: Layout = DENSE if layout == "dense" else Packed(torch.tensor([[[False, True, False]]]), 2)
    x = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    x = place.pack(x) if isinstance(place, Packed) else x
    expected, seen = block(x, place), dict[str, Tensor]()
    for name, layer in block.named_children():
        layer.register_forward_hook(lambda layer, given, out, name=name: seen.update({name: out}))
    torch.testing.assert_close(block(x, place), expected)
    assert list(seen) == ["dwconv", "norm", "pwconv1", "grn", "pwconv2", "drop_path"]
    torch.testing.assert_close(seen["pwconv1"], nn.functional.linear(seen["norm"], *block.pwconv1.parameters()))
    torch.testing.assert_close(x + seen["pwconv2"], expected)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    other = Block(4).double()
    other.pwconv2 = Doubled(16, 4).double()
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(x, place), x + 2 * (expected - x))
