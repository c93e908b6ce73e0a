import pytest
import torch

from fcmae.layouts.norms import LARGE, at_least_float32, l2_norm, root


def test_l2_norm_is_torchs_in_values_and_gradients() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    got, expected = l2_norm(x, (0, 1)), torch.linalg.vector_norm(x, dim=(0, 1), keepdim=True)
    torch.testing.assert_close(got, expected)
    pull = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, x, pull), torch.autograd.grad(expected, x, pull))


def test_the_norm_of_a_large_image_by_parts_is_that_of_all() -> None:
    """Of two images, parts whose last is shorter than the others; where there is a gradient, all at once."""
    x = torch.randn(2, LARGE // 3 + 5, 3, dtype=torch.float64)
    expected = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    torch.testing.assert_close(l2_norm(x, (1,)), expected)
    torch.testing.assert_close(l2_norm(x.requires_grad_(), (1,)), expected)


def test_the_root_of_zero_has_the_gradient_zero() -> None:
    squares = torch.tensor([0.0, 4.0], requires_grad=True)
    out = root(squares)
    out.sum().backward()
    assert out.tolist() == [0, 2]
    assert squares.grad is not None
    assert squares.grad.tolist() == [0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_widen_to_float32(dtype: torch.dtype) -> None:
    assert at_least_float32(torch.zeros(1, dtype=dtype)).dtype == torch.float32


def test_float64_stays() -> None:
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
