from __future__ import annotations

import numpy as np
import pytest
import torch

from fcmae.loss import patch_statistics, patchify, reconstruction_loss, unpatchify


def test_patch_values_are_ordered_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Second patch of the first row: pixels (0..1, 2..3), channels fastest.
    expected = [float(images[1, c, r, col]) for r in (0, 1) for col in (2, 3) for c in range(3)]
    assert patches[1, 1].tolist() == expected


def test_unpatchify_inverts_patchify() -> None:
    images = torch.randn(2, 5, 6, 9)
    assert torch.equal(unpatchify(patchify(images, 3), 3, (6, 9)), images)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_mean_over_hidden_patches(normalize: bool) -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]]], dtype=torch.bool)
    pred = torch.randn(2, 3, 48, dtype=torch.float64)
    errors = []
    for i in range(2):
        hidden = [(r, c) for r in range(2) for c in range(3) if mask[i, r, c]]
        for answer, (r, c) in zip(pred[i].numpy(), hidden, strict=True):
            target = images[i, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].permute(1, 2, 0).reshape(-1).numpy()
            if normalize:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((answer - target) ** 2).mean())
    loss = reconstruction_loss(pred, images, mask, normalize=normalize)
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-12)


def test_the_loss_of_16_bit_predictions_is_float32() -> None:
    images = torch.randn(1, 1, 4, 4)
    mask = torch.tensor([[[True, False], [False, False]]])
    loss = reconstruction_loss(torch.full((1, 1, 4), 300.0, dtype=torch.float16), images, mask)
    assert loss.dtype == torch.float32  # 300 squared is infinite in float16
    assert float(loss) == pytest.approx(90000, rel=0.02)


def test_a_constant_patch_has_a_finite_target() -> None:
    mean, std = patch_statistics(torch.full((1, 4), 0.5))
    assert mean.item() == 0.5
    assert std.item() == pytest.approx(1e-3)


def test_nothing_hidden_is_refused() -> None:
    with pytest.raises(ValueError, match="hides no patch"):
        reconstruction_loss(torch.empty(1, 0, 48), torch.randn(1, 3, 8, 8), torch.zeros(1, 2, 2, dtype=torch.bool))
