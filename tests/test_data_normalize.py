from __future__ import annotations

import numpy as np
import pytest
import torch

from fcmae.data.normalize import Normalize

MEAN, STD = [0.4, 0.5], [0.2, 0.1]


def test_normalize_in_units_of_the_full_range_and_back() -> None:
    normalize = Normalize(MEAN, STD)
    images = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8)
    expected = (images.numpy() / 255 - np.reshape(MEAN, (2, 1, 1))) / np.reshape(STD, (2, 1, 1))
    before = images.clone()
    normalized = normalize(images)
    assert torch.equal(images, before)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(normalize(images / 255), normalized)
    torch.testing.assert_close(normalize.inverse(normalized), images / 255)
    assert torch.equal(normalize(images[0]), normalized[0])


def test_images_of_floats_are_not_written_to() -> None:
    images = torch.rand(1, 2, 3, 3)
    before = images.clone()
    Normalize(MEAN, STD).inverse(Normalize(MEAN, STD)(images))
    assert torch.equal(images, before)


def test_mean_and_deviation_move_with_the_module_and_are_in_no_state_dict() -> None:
    model = torch.nn.Sequential(Normalize(MEAN, STD))
    assert model.state_dict() == {} and not list(model.parameters())
    assert model.to("meta")(torch.empty(1, 2, 3, 3, device="meta")).is_meta


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5]])
def test_one_pair_a_channel_and_no_other_number(values: list[float]) -> None:
    normalized = Normalize(values, values)(torch.full((2, len(values), 4, 4), 128, dtype=torch.uint8))
    torch.testing.assert_close(normalized, torch.full_like(normalized, (128 / 255 - 0.5) / 0.5))
