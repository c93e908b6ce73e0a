from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fcmae.data.find import find_images
from fcmae.data.index import Images
from fcmae.data.stats import channel_statistics, rounded
from fcmae.data.survey import survey


def test_statistics_agree_with_numpy_and_skip_broken_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (5, 12, 16, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    index = find_images([str(tmp_path)])
    for num_workers in (0, 1):
        mean, std, num_images = channel_statistics(index, 3, num_workers=num_workers)
        assert num_images == 5
        np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), atol=1e-12)


def test_deeper_images_count_in_the_units_they_are_read_in(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(1000, 3, (12, 16, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", image)
    mean, std, _ = channel_statistics(find_images([str(tmp_path)]), 5)
    np.testing.assert_allclose(mean, image.mean(axis=(0, 1), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, image.std(axis=(0, 1), dtype=np.float64), rtol=1e-4)


def test_every_image_counts_the_same_whatever_its_size(tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.zeros((2, 2), np.float32))
    np.save(tmp_path / "large.npy", np.ones((40, 40), np.float32))
    assert channel_statistics(find_images([str(tmp_path)]), 1) == ([0.5], [0.5], 2)


def test_of_many_images_some_are_drawn_always_the_same(tmp_path: Path) -> None:
    for i in range(20):
        np.save(tmp_path / f"{i:02}.npy", np.full((2, 2), i, np.float32))
    index = find_images([str(tmp_path)])
    drawn = channel_statistics(index, 1, max_images=8)
    assert drawn[0] != [3.5]  # the mean of the first ones
    assert drawn[2] == 8 and drawn == channel_statistics(index, 1, max_images=8)


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 1 files can be read; /missing\.png: .*No such file"):
        channel_statistics(Images.of_files(["/missing.png"]), 3)


def test_missing_values_do_not_count(tmp_path: Path) -> None:
    image = np.random.default_rng(0).uniform(0.05, 0.4, (32, 32, 4)).astype(np.float32)
    image[8:16, :, :3] = -9999
    image[0, 0] = np.nan
    tags = [(42113, "s", 0, "-9999", True)]
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", extratags=tags)
    known = np.where(image == -9999, np.nan, image).astype(np.float64)
    mean, std, _ = channel_statistics(find_images([str(tmp_path)]), 4)
    np.testing.assert_allclose(mean, np.nanmean(known, axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(std, np.nanstd(known, axis=(0, 1)), rtol=1e-5)


def test_a_value_that_is_said_to_be_missing_does_not_count(tmp_path: Path) -> None:
    image = np.full((8, 8), 3, np.float32)
    image[:4] = -9999
    np.save(tmp_path / "a.npy", image)
    images = find_images([str(tmp_path)])
    assert channel_statistics(images, 1, nodata=-9999)[:2] == ([3.0], [0.0])
    assert survey(images, nodata=-9999).mean == (3.0,)


def test_all_of_a_large_image_counts(tmp_path: Path) -> None:
    image = np.zeros((300, 300), np.float32)
    image[150:] = 1
    np.save(tmp_path / "a.npy", image)
    assert channel_statistics(find_images([str(tmp_path)]), 1)[:2] == ([0.5], [0.5])


def test_a_channel_without_a_value_is_an_error_and_one_image_may_lack_it(tmp_path: Path) -> None:
    image = np.ones((8, 8, 2), np.float32)
    image[..., 1] = np.nan
    np.save(tmp_path / "a.npy", image)
    with pytest.raises(ValueError, match="of channel 1 all values are missing"):
        channel_statistics(find_images([str(tmp_path)]), 2)
    np.save(tmp_path / "b.npy", np.full((8, 8, 2), 3, np.float32))
    assert channel_statistics(find_images([str(tmp_path)]), 2)[0] == [2.0, 3.0]


def test_values_too_large_for_a_network_count_as_little_as_a_broken_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((4, 4), 0.25))
    np.save(tmp_path / "b.npy", np.full((4, 4), -1.79e308))
    assert channel_statistics(find_images([str(tmp_path)]), 1) == ([0.25], [0.0], 1)


def test_an_error_shows_names_as_any_terminal_can(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m\n.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\\x1b\[31m\\n\.png: it is no JPEG"):
        channel_statistics(find_images([str(tmp_path)]), 3)


def test_a_large_image_takes_a_few_times_its_pixels_of_memory(tmp_path: Path) -> None:
    """In float64 at once it would take 24 times as much."""
    Image.fromarray(np.full((1500, 2000, 3), 51, np.uint8)).save(tmp_path / "large.png")
    images = find_images([str(tmp_path)])
    channel_statistics(images, 3)  # what is loaded once
    tracemalloc.start()
    mean, std, _ = channel_statistics(images, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mean == pytest.approx([0.2] * 3) and std == pytest.approx([0] * 3, abs=1e-6)
    assert peak < 5 * 1500 * 2000 * 3


def test_means_are_as_exact_as_their_deviation_asks() -> None:
    assert rounded([101349.1234, 0.48512], [50.123456, 0.0]) == ([101349.12, 0.48512], [50.12, 1e-6])
    assert rounded([0.485123, 12345.6], [0.229, 4321.0]) == ([0.4851, 12346.0], [0.229, 4321.0])
