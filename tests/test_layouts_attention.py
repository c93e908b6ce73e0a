"""Attention is softmax(q k^T / sqrt(d)) v over what is visible, in every layout, and what is hidden changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import MINKOWSKI
from torch import Tensor

from fcmae.layouts import DENSE, Masked, make_layout
from fcmae.layouts.attention import attend
from fcmae.layouts.sites import upsample_mask

MASK = torch.tensor([[[0, 1, 0], [1, 0, 1]], [[1, 1, 0], [0, 1, 0]]]).bool()  # three of six patches visible


def by_hand(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """(n, C) each: head by head, row by row."""
    d = q.shape[1] // num_heads
    heads = []
    for h in range(num_heads):
        part = slice(h * d, (h + 1) * d)
        rows = [torch.softmax(k[:, part] @ row / math.sqrt(d), 0) @ v[:, part] for row in q[:, part]]
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1)


def maps(b: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 2 * b, 3 * b, 6, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_attention_by_hand(num_heads: int) -> None:
    q, k, v, _ = (x.flatten(1, 2) for x in maps(1))
    expected = torch.stack([by_hand(*image, num_heads) for image in zip(q, k, v, strict=True)])
    torch.testing.assert_close(attend(q, k, v, num_heads), expected)
    torch.testing.assert_close(DENSE.attention(*maps(1)[:3], num_heads).flatten(1, 2), expected)


@pytest.mark.parametrize("backend", ["packed", "masked", MINKOWSKI])
def test_attention_is_among_the_visible_sites_of_one_image(backend: str) -> None:
    q, k, v, _ = maps(2)
    layout = make_layout(backend, MASK)
    found = layout.unpack(layout.attention(layout.pack(q), layout.pack(k), layout.pack(v), 2))
    hidden = upsample_mask(MASK, 2)
    for image in range(2):
        rows = [x[image][~hidden[image]] for x in (q, k, v)]
        torch.testing.assert_close(found[image][~hidden[image]], by_hand(*rows, 2))
    assert (found[hidden] == 0).all()


@pytest.mark.parametrize("backend", ["packed", MINKOWSKI])
@pytest.mark.parametrize("b", [1, 2])
def test_layouts_attend_alike_in_values_and_gradients(backend: str, b: int) -> None:
    *inputs, cotangent = maps(b)
    results = []
    for layout in (make_layout(backend, MASK), Masked(MASK)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = layout.unpack(layout.attention(*map(layout.pack, leaves), 3))
        y.backward(cotangent)
        results.append([y.detach(), *(x.grad for x in leaves)])
    for other, masked in zip(*results, strict=True):
        torch.testing.assert_close(other, masked)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_hidden_sites_give_and_take_nothing_whatever_they_hold(value: float) -> None:
    *inputs, cotangent = maps(1)
    layout, hidden = Masked(MASK), MASK[..., None]
    plain = layout.unpack(layout.attention(*inputs, 2))
    leaves = [x.masked_fill(hidden, value).requires_grad_() for x in inputs]
    y = layout.unpack(layout.attention(*leaves, 2))
    assert torch.equal(y, plain)
    y.backward(cotangent)
    assert all((x.grad[MASK] == 0).all() and x.grad.isfinite().all() for x in leaves)


def test_an_image_of_which_nothing_is_seen_does_no_harm() -> None:
    mask = MASK.clone()
    mask[0] = True
    *inputs, cotangent = maps(1)
    leaves = [x.requires_grad_() for x in inputs]
    y = Masked(mask).unpack(Masked(mask).attention(*leaves, 2))
    assert (y[0] == 0).all() and y.isfinite().all()
    y.backward(cotangent)
    assert all(x.grad.isfinite().all() for x in leaves)
