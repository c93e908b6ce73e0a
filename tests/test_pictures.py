"""Pictures show what they claim to: the target's own statistics, visible patches as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fcmae.loss import patch_statistics, patchify
from fcmae.pictures import reconstruction_panels, save_curves, save_reconstructions

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
MASK = torch.tensor([[[True, False, True], [False, True, True]], [[False, True, True], [True, True, False]]])


def pictures() -> tuple[Tensor, Tensor]:
    """Two images of 8 x 12 pixels in 0..1, and the same normalised: 2 x 3 patches of 4."""
    original = torch.rand(2, 3, 8, 12)
    return original, (original - MEAN) / STD


def hidden_pixels() -> Tensor:
    return MASK.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)


def test_a_perfect_standardised_prediction_gives_back_the_original() -> None:
    original, images = pictures()
    target = patchify(images, 4)
    mean, std = patch_statistics(target)
    panels = reconstruction_panels((target - mean) / std, images, MASK, MEAN, STD)
    # Float32: two affine maps forth and back on values around 1.
    for panel in (panels[0], panels[2], panels[3]):
        torch.testing.assert_close(panel, original, atol=2e-6, rtol=0)


def test_a_prediction_of_zero_shows_each_patch_s_own_mean() -> None:
    _, images = pictures()
    reconstruction = reconstruction_panels(torch.zeros(2, 6, 48), images, MASK, MEAN, STD)[2]
    # The statistics are over all pixels and channels of a normalised patch.
    expected = images[1, :, 4:8, 8:12].mean() * STD + MEAN
    torch.testing.assert_close(reconstruction[1, :, 4:8, 8:12], expected.expand(3, 4, 4), atol=1e-6, rtol=0)


def test_without_normalised_targets_the_prediction_is_the_image() -> None:
    original, images = pictures()
    panels = reconstruction_panels(patchify(images, 4), images, MASK, MEAN, STD, normalize=False)
    torch.testing.assert_close(panels[2], original, atol=1e-6, rtol=0)


def test_visible_patches_are_pasted_and_hidden_ones_greyed() -> None:
    _, images = pictures()
    panels = reconstruction_panels(torch.randn(2, 6, 48), images, MASK, MEAN, STD)
    shown, masked, reconstruction, pasted = panels
    hidden = hidden_pixels()
    assert torch.equal(pasted[~hidden], shown[~hidden])
    assert torch.equal(pasted[hidden], reconstruction[hidden])
    assert torch.equal(masked[~hidden], shown[~hidden])
    assert masked[hidden].unique().numel() == 1
    assert shown.min() < masked[hidden][0] < shown.max()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_grids_are_readable_files_for_any_number_of_channels_and_range(
    tmp_path: Path, channels: int, scale: float
) -> None:
    panels = [torch.rand(2, channels, 8, 12) * scale for _ in range(4)]
    path = tmp_path / "deep" / "grid.png"
    save_reconstructions(path, panels, "title")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] * 1.5  # four columns, two rows
    assert len(np.unique(pixels)) > 50
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]  # nothing left aside


def test_curves_are_drawn_even_of_one_point_or_none(tmp_path: Path) -> None:
    for curves in ({"loss": ([1.0, 2.0], [0.5, 0.4]), "val_loss": ([2.0], [0.6])}, {}):
        save_curves(tmp_path / "loss.png", curves, "loss")
        with Image.open(tmp_path / "loss.png") as image:
            assert image.width > 300
