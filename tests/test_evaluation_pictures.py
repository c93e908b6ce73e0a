"""Pictures show what they claim to: the target's own statistics, visible patches as they were."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fcmae.data.normalize import Normalize
from fcmae.evaluation.pictures import (
    displayable,
    limits,
    reconstruction_panels,
    save_curves,
    save_heat_map,
    save_over_time,
    save_overlays,
    save_reconstructions,
    save_tiles,
    with_bands,
)
from fcmae.masked import patch_statistics, patchify

NORMALIZE = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
MASK = torch.tensor([[[True, False, True], [False, True, True]], [[False, True, True], [True, True, False]]])


def pictures() -> tuple[Tensor, Tensor]:
    """Two images of 8 x 12 pixels in 0..1, and the same normalised: 2 x 3 patches of 4."""
    original = torch.rand(2, 3, 8, 12)
    return original, NORMALIZE(original)


def hidden_pixels() -> Tensor:
    return MASK.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)


def test_a_perfect_standardised_prediction_gives_back_the_original() -> None:
    original, images = pictures()
    target = patchify(images, 4)
    mean, std = patch_statistics(target)
    panels = reconstruction_panels((target - mean) / std, images, MASK, NORMALIZE)
    # Float32: two affine maps forth and back on values around 1.
    for panel in (panels[0], panels[2], panels[3]):
        torch.testing.assert_close(panel, original, atol=2e-6, rtol=0)


def test_a_perfect_prediction_of_the_known_values_gives_them_back() -> None:
    original, images = pictures()
    known = torch.ones_like(images, dtype=torch.bool)
    known[0, :, :4, 2:4], known[1, :, 4:, 4:8] = False, False  # half a patch, and a whole one
    images = images.masked_fill(~known, 0)  # as `collate` fills them
    values = patchify(images.masked_fill(~known, torch.nan), 4)
    mean, std = patch_statistics(values, has_missing=True)
    pred = ((values - mean) / std).nan_to_num()
    reconstruction = reconstruction_panels(pred, images, MASK, NORMALIZE, known=known)[2]
    torch.testing.assert_close(reconstruction[known], original[known], atol=2e-6, rtol=0)
    half = (images[0, :, :4, :2].mean() * NORMALIZE.std + NORMALIZE.mean).expand(3, 4, 2)
    torch.testing.assert_close(reconstruction[0, :, :4, 2:4], half, atol=2e-6, rtol=0)
    none = NORMALIZE.mean.expand(3, 4, 4)
    torch.testing.assert_close(reconstruction[1, :, 4:, 4:8], none, atol=2e-6, rtol=0)


def test_a_prediction_of_zero_shows_each_patch_s_own_mean() -> None:
    _, images = pictures()
    reconstruction = reconstruction_panels(torch.zeros(2, 6, 48), images, MASK, NORMALIZE)[2]
    # The statistics are over all pixels and channels of a normalised patch.
    expected = images[1, :, 4:8, 8:12].mean() * NORMALIZE.std + NORMALIZE.mean
    torch.testing.assert_close(reconstruction[1, :, 4:8, 8:12], expected.expand(3, 4, 4), atol=1e-6, rtol=0)


def test_without_normalised_targets_the_prediction_is_the_image() -> None:
    original, images = pictures()
    panels = reconstruction_panels(patchify(images, 4), images, MASK, NORMALIZE, normalize_target=False)
    torch.testing.assert_close(panels[2], original, atol=1e-6, rtol=0)


def test_visible_patches_are_pasted_and_hidden_ones_greyed() -> None:
    _, images = pictures()
    panels = reconstruction_panels(torch.randn(2, 6, 48), images, MASK, NORMALIZE)
    shown, masked, reconstruction, pasted = panels
    hidden = hidden_pixels()
    assert torch.equal(pasted[~hidden], shown[~hidden])
    assert torch.equal(pasted[hidden], reconstruction[hidden])
    assert torch.equal(masked[~hidden], shown[~hidden])
    assert masked[hidden].unique().tolist() == [0.5]


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


def test_dark_images_are_shown_in_their_own_range() -> None:
    image = torch.linspace(0, 1, 12).reshape(1, 3, 4)
    for shown in (image, image / 16):  # 12 bits in 16
        np.testing.assert_allclose(displayable(shown, *limits(shown)), image[0], atol=1e-6)


def test_names_of_classes_are_no_formulas(tmp_path: Path) -> None:
    panel = (np.zeros((3, 8, 8), np.uint8), *(np.zeros((8, 8), np.int64) for _ in range(2)))
    save_overlays(tmp_path / "a.png", [panel], ("$a_1_2$", "other"), "overlays")
    assert (tmp_path / "a.png").stat().st_size


def test_bands_that_are_not_shown_change_nothing_of_those_that_are() -> None:
    bands = torch.linspace(0, 800, 60).reshape(5, 3, 4)
    bands[3:] *= 1e4
    np.testing.assert_allclose(displayable(bands, *limits(bands)), displayable(bands[:3], *limits(bands[:3])))
    assert with_bands("grid", 5) == "grid (bands 1 to 3 of 5)"
    assert with_bands("grid", 2) == "grid (band 1 of 2)"
    assert with_bands("grid", 3) == with_bands("grid", 1) == "grid"


def test_hidden_patches_are_as_grey_in_a_dark_image_as_in_a_bright_one() -> None:
    images = torch.rand(2, 3, 8, 12) * torch.tensor([1.0, 60_000.0])[:, None, None, None]
    plain = Normalize([0.0], [1.0])
    masked = reconstruction_panels(torch.zeros(2, 6, 48), images, MASK, plain)[1]
    for image, hidden, original in zip(masked, hidden_pixels(), images, strict=True):
        low, high = limits(original)
        assert image[hidden].unique().item() == pytest.approx((low + high) / 2)


def test_curves_are_drawn_even_of_one_point_or_none(tmp_path: Path) -> None:
    for curves in ({"loss": ([1.0, 2.0], [0.5, 0.4]), "val_loss": ([2.0], [0.6])}, {}):
        save_curves(tmp_path / "loss.png", curves, "loss")
        with Image.open(tmp_path / "loss.png") as image:
            assert image.width > 300


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_reconstructions_over_time_are_kept_as_tiles_and_drawn_beside_one_another(
    tmp_path: Path, channels: int
) -> None:
    panels = [torch.rand(2, channels, 8, 12) for _ in range(4)]
    moments = []
    for number in range(11):
        path = tmp_path / "tiles" / f"step-{number}.png"
        save_tiles(path, panels)
        moments.append((f"epoch {number}", path))
    assert sorted(path.name for path in (tmp_path / "tiles").iterdir())[0] == "step-0.png"  # nothing left aside
    with Image.open(path) as image:
        tile = np.asarray(image)
    # Rows below one another, in whole levels of grey.
    shown = panels[3][:, :3] if channels > 2 else panels[3][:, :1]
    expected = shown.permute(0, 2, 3, 1).flatten(0, 1).squeeze(-1).numpy() * 255
    np.testing.assert_allclose(tile, expected, atol=0.501)
    widths = []
    for kept in (1, 8, 11):
        save_over_time(tmp_path / "over-time.png", panels, moments[:kept], "title")
        with Image.open(tmp_path / "over-time.png") as image:
            widths.append(image.width)
    assert widths[0] * 3 < widths[1] == widths[2]  # 3, 10 and 10 columns


def test_tiles_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    panels = [torch.rand(2, 3, 8, 12) for _ in range(4)]
    moments = [(name, tmp_path / f"{name}.png") for name in ("a", "b")]
    for _, path in moments:
        save_tiles(path, panels)
    save_over_time(tmp_path / "expected.png", panels, moments, "title")
    whole = moments[0][1].read_bytes()
    damaged = {
        "short": whole[:60],
        "header": whole[:20],
        "none": b"",
        "noise": b"\x89PNG\r\n\x1a\n" + b"x" * 90,
        "flip": b"",
    }
    damaged["flip"] = whole[:50] + bytes(byte ^ 255 for byte in whole[50:90]) + whole[90:]
    for name, content in damaged.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    save_tiles(tmp_path / "other.png", [torch.rand(3, 1, 8, 8)] * 4)  # of other images
    bad = [(name, tmp_path / f"{name}.png") for name in (*damaged, "pipe", "other", "gone")]
    for broken in bad:
        save_over_time(tmp_path / "drawn.png", panels, [moments[0], broken, moments[1]], "title")
        assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "expected.png").read_bytes(), broken[0]


def test_the_moments_drawn_reach_from_the_first_to_the_last(tmp_path: Path) -> None:
    panels = [torch.zeros(1, 1, 8, 8) for _ in range(4)]
    for number in range(0, 250, 25):
        panels[3] = torch.full((1, 1, 8, 8), number / 255)
        save_tiles(tmp_path / f"{number:03}.png", panels)
    moments = [(path.stem, path) for path in sorted(tmp_path.glob("*.png"))]
    save_over_time(tmp_path / "over-time.png", panels, moments, "title")
    with Image.open(tmp_path / "over-time.png") as image:
        pixels = np.asarray(image.convert("L"))
    levels = {level for level in range(0, 250, 25) if (pixels == level).sum() > 100 * 100}
    assert levels >= {0, 225}


def test_large_tiles_are_scaled_down_by_averaging(tmp_path: Path) -> None:
    panels = [torch.rand(1, 1, 200, 400) for _ in range(4)]
    save_tiles(tmp_path / "tile.png", panels)
    with Image.open(tmp_path / "tile.png") as image:
        assert image.size == (128, 64)
        assert np.asarray(image).mean() == pytest.approx(float(panels[3].mean()) * 255, abs=1)


@pytest.mark.parametrize("limits", [(0.0, 0.5), None])
@pytest.mark.parametrize("epochs", [[1.0], [0.5, 1.0, 9.0]])
def test_heat_maps_are_drawn_of_one_moment_or_more_and_with_gaps(
    tmp_path: Path, epochs: list[float], limits: tuple[float, float] | None
) -> None:
    values = np.geomspace(0.01, 0.5, 4 * len(epochs)).reshape(4, -1)
    values[1, 0] = np.nan
    save_heat_map(tmp_path / "map.png", ["a", "b", "c", "d"], epochs, values, "label", limits)
    with Image.open(tmp_path / "map.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
