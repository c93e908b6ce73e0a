from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from conftest import file_limit
from test_weights_convert import dense_features, write_checkpoint

from fcmae.data.augment import CenterCrop
from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.evaluation.features import extract
from fcmae.evaluation.models import Backbone, load_backbone, stage_maps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("random:convnextv2_atto", (32, 64))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return find_images([str(runs.write_images(tmp_path_factory.mktemp("images"), 7))])


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_the_last_stage_is_what_pretraining_saw_with_nothing_masked(tmp_path: Path, stem_stride: int) -> None:
    checkpoint, net = write_checkpoint(tmp_path, variant="convnextv2_atto", stem_stride=stem_stride)
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        maps = stage_maps(load_backbone(str(checkpoint)).model, images)
        expected = dense_features(net, images)
    assert [found.shape[1] for found in maps] == [40, 80, 160, 320]
    assert [found.shape[2] for found in maps] == [64 // stem_stride // 2**i for i in range(4)]
    # float32, two ways to compute the same
    torch.testing.assert_close(maps[3], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_features_are_means_over_each_image_in_the_order_of_the_index(
    backbone: Backbone, index: Images, tmp_path: Path
) -> None:
    found = extract(backbone, index, [1, 4], device=CPU, directory=tmp_path, batch_size=3)
    assert found.positions.tolist() == list(range(7))
    assert not found.bad
    crop = CenterCrop(backbone.reading)
    for row in (0, 6):
        image = torch.from_numpy(crop(Path(index.name(row)).read_bytes(), np.random.default_rng(0)).values)
        maps = stage_maps(backbone.model, backbone.reading.normalize(image[None]))
        for stage in (1, 4):
            expected = maps[stage - 1][0].double().mean((1, 2)).numpy()
            np.testing.assert_allclose(found.stages[stage][row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_that_cannot_be_read_are_left_out_and_named(
    backbone: Backbone, index: Images, tmp_path: Path, num_workers: int
) -> None:
    for name in ("mixed", "whole", "none"):
        (tmp_path / name).mkdir()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    mixed = Images.of_files([index.name(0), str(damaged), index.name(1)])
    found = extract(
        backbone, mixed, [-1], device=CPU, directory=tmp_path / "mixed", batch_size=2, num_workers=num_workers
    )
    whole = extract(backbone, index, [4], device=CPU, directory=tmp_path / "whole")
    assert found.positions.tolist() == [0, 2]
    assert [path for path, _ in found.bad] == [str(damaged)]
    np.testing.assert_allclose(found.stages[4], whole.stages[4][:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"none of 1 images can be read: .*damaged.png"):
        extract(backbone, mixed.subset([1]), [-1], device=CPU, directory=tmp_path / "none")


@pytest.mark.parametrize("stage", [0, 5, -5])
def test_stages_that_are_not_there_are_refused(backbone: Backbone, index: Images, tmp_path: Path, stage: int) -> None:
    with pytest.raises(ValueError, match=f"stages: {stage} is none of the network's 4: use 1 to 4"):
        extract(backbone, index, [stage], device=CPU, directory=tmp_path)


def test_images_of_which_features_are_not_finite_are_left_out(
    backbone: Backbone, index: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()

    def broken(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        seen.append(len(images))
        maps = stage_maps(model, images)
        return [maps[0], *(found.index_fill(0, torch.tensor([1]), torch.inf) for found in maps[1:])]

    monkeypatch.setattr("fcmae.evaluation.features.stage_maps", broken)
    found = extract(backbone, index.subset(range(3)), None, device=CPU, directory=tmp_path)
    assert seen == [3] and found.positions.tolist() == [0, 2] and list(found.stages) == [1, 2, 3, 4]
    assert found.bad == [(index.name(1), "its features are not finite")]
    assert all(values.shape[0] == 2 and np.isfinite(values).all() for values in found.stages.values())


def test_features_that_do_not_fit_on_the_disk_are_an_error(backbone: Backbone, index: Images, tmp_path: Path) -> None:
    with file_limit(2000), pytest.raises(OSError, match="File too large"):
        extract(backbone, index, [4], device=CPU, num_workers=0, directory=tmp_path)
