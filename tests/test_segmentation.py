"""Loss, tiles and scores of segmentation against plain references, in any parts."""

from __future__ import annotations

import io
import time
import tracemalloc
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import nn

from fcmae.data.maps import IGNORED
from fcmae.data.normalize import Normalize
from fcmae.data.rasters import Raster
from fcmae.segmentation import (
    NEAR,
    Scores,
    boundary,
    colours,
    dice_loss,
    each_image,
    hann,
    overlay,
    predictor,
    probabilities_by_rows,
    segmentation_loss,
    starts,
)

RNG = np.random.default_rng(0)


def blobs(height: int, width: int, num_classes: int, seed: int) -> NDArray[np.int16]:
    """A map of patches of 8 pixels, some ignored."""
    rng = np.random.default_rng(seed)
    small = rng.integers(-1, num_classes, (-(-height // 8), -(-width // 8)))
    return small.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.int16)


def raster(array: NDArray[Any], **settings: Any) -> Raster:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"tile": (16, 16)} | settings)
    file.seek(0)
    return Raster(file, 1, [0.5])


def test_the_loss_is_the_mean_cross_entropy_where_all_is_known() -> None:
    logits, target = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randint(0, 4, (2, 5, 6), dtype=torch.int16)
    loss, expected = segmentation_loss(logits, target), F.cross_entropy(logits, target.long())
    torch.testing.assert_close(loss, expected)
    for one, other in zip(*(torch.autograd.grad(each, logits) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_whatever_is_unknown_in_them() -> None:
    logits, target = torch.randn(4, 3, 5, 6), torch.from_numpy(RNG.integers(-1, 3, (4, 5, 6)).astype(np.int16))
    target[0] = IGNORED
    balance = torch.tensor([1.0, 3.0, 0.5])
    parts = [segmentation_loss(logits[i : i + 2], target[i : i + 2], balance, 0.7) for i in (0, 2)]
    torch.testing.assert_close(segmentation_loss(logits, target, balance, 0.7), (parts[0] + parts[1]) / 2)


def test_unknown_pixels_have_no_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.from_numpy(RNG.integers(-1, 3, (2, 4, 4)).astype(np.int16))
    segmentation_loss(logits, target, dice=1.0).backward()
    assert logits.grad is not None
    has_gradient = (logits.grad != 0).any(1)
    assert (has_gradient == (target != IGNORED)).all() and not (target != IGNORED).all()


def test_the_dice_loss_is_that_of_hard_maps_at_large_logits() -> None:
    predicted, truth = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, IGNORED]]])
    logits = 100.0 * F.one_hot(predicted, 3).permute(0, 3, 1, 2)
    # class 0: 2 predicted, 1 true, 1 common; class 1: 1, 2, 1; class 2 is not there.
    torch.testing.assert_close(dice_loss(logits, truth), torch.tensor(1 - 2 / 3))
    assert dice_loss(logits, torch.full_like(truth, IGNORED)) == 0


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.39, 0.5, 0.9])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 97])
def test_tiles_cover_a_side_and_overlap_as_asked(length: int, overlap: float) -> None:
    found = starts(length, 32, overlap)
    covered = np.zeros(length, int)
    for start in found:
        covered[start : start + 32] += 1
    assert covered.min() >= 1 and found == sorted(set(found)) and (length < 32 or found[-1] + 32 == length)
    assert all(32 - (b - a) >= 32 * overlap for a, b in pairwise(found))
    assert len(found) == 1 or len(found) <= 2 + (length - 32) / max(1, 32 * (1 - overlap) - 1)


def test_hann_weights_rise_to_the_middle_and_are_positive() -> None:
    weights = hann(9)
    assert weights.min() > 0 and weights.argmax() == 4 and np.allclose(weights, weights[::-1])
    assert (np.diff(weights[:5]) > 0).all()


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(100, 130), (40, 40), (7, 90), (32, 32)])
def test_what_depends_on_the_pixel_alone_is_the_same_by_tiles(shape: tuple[int, int], overlap: float) -> None:
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    sizes = set()

    def predict(tiles: NDArray[Any], *_: float) -> NDArray[np.float32]:
        sizes.add(tiles.shape[2:])
        p = tiles[:, 0].astype(np.float32) / 255
        return np.stack([p, 1 - p], 1)

    found = list(probabilities_by_rows(raster(array), predict, (32, 48), 8, overlap, [0.5], 3))
    tops = np.cumsum([0, *(len(strip.is_seen) for strip in found[:-1])]).tolist()
    assert [strip.top for strip in found] == tops and all(strip.is_seen.all() for strip in found)
    whole = np.concatenate([strip.probabilities for strip in found], axis=1)
    np.testing.assert_allclose(whole[0], array / 255, atol=1e-6)
    np.testing.assert_allclose(whole.sum(0), 1, atol=1e-6)
    assert len(sizes) == 1 and all(h % 8 == 0 and w % 8 == 0 and h <= 32 and w <= 48 for h, w in sizes)


def test_overlapping_tiles_are_weighted_by_hann_windows() -> None:
    """Each tile says its own number: what comes out is the weighted mean, by hand."""
    array, numbers = np.zeros((32, 80), np.uint8), iter(range(10))

    def predict(tiles: NDArray[Any], *_: float) -> NDArray[np.float32]:
        return np.stack([np.full((1, 32, 32), next(numbers), np.float32) for _ in tiles])

    ((_, strip, _),) = probabilities_by_rows(raster(array), predict, (32, 32), 8, 0.5, [0.5], 2)
    sums, weights = np.zeros(80), np.zeros(80)
    for number, start in enumerate((0, 16, 32, 48)):
        sums[start : start + 32] += number * hann(32)
        weights[start : start + 32] += hann(32)
    np.testing.assert_allclose(strip[0, 10], sums / weights, atol=1e-5)


def test_overlapping_rows_of_tiles_are_weighted_along_both_sides() -> None:
    tops, numbers, limits = (0, 16, 32, 48), iter(range(16)), []

    def predict(tiles: NDArray[Any], limit_s: float) -> NDArray[np.float32]:
        limits.append(limit_s)
        return np.stack([np.full((1, 32, 32), next(numbers), np.float32) for _ in tiles])

    array = np.zeros((80, 80), np.uint8)
    strips = probabilities_by_rows(raster(array), predict, (32, 32), 8, 0.5, [0.5], 3, limit_s=8.0)
    found = np.concatenate([strip.probabilities[0] for strip in strips])
    sums, weights = np.zeros((80, 80)), np.zeros((80, 80))
    for number, (top, left) in enumerate(product(tops, tops)):
        window = np.outer(hann(32), hann(32))
        sums[top : top + 32, left : left + 32] += number * window
        weights[top : top + 32, left : left + 32] += window
    np.testing.assert_allclose(found, sums / weights, atol=1e-4)
    assert sum(limits) == pytest.approx(8.0) and max(limits) == pytest.approx(3 * 8 / 16)  # 16 tiles, 3 at most at once


def test_an_image_smaller_than_a_tile_is_padded_with_the_mean() -> None:
    seen = []

    def predict(tiles: NDArray[Any], *_: float) -> NDArray[np.float32]:
        seen.append(tiles)
        return np.ones((len(tiles), 1, *tiles.shape[2:]), np.float32)

    (found,) = probabilities_by_rows(raster(np.full((10, 12), 9, np.uint8)), predict, (32, 32), 8, 0.5, [0.2], 4)
    assert found.probabilities.shape == (1, 10, 12) and seen[0].shape == (1, 1, 16, 16)
    assert (seen[0][0, 0, 10:] == 51).all() and (seen[0][0, 0, :10, :12] == 9).all()


def test_the_memory_of_a_tall_raster_does_not_grow_with_its_height() -> None:
    peaks = []
    for height in (256, 4096):
        tracemalloc.start()
        image = raster(np.zeros((height, 128), np.uint8), compression="zlib")
        for _ in probabilities_by_rows(image, lambda tiles, *_: tiles / np.float32(255), (64, 64), 8, 0.5, [0.5], 4):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1] - height * 128)  # the array that was written
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] < 4096 * 128 * 4  # less than all probabilities


def test_a_predictor_normalises_and_gives_probabilities() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Conv2d(1, 2, 1).eval()
    tiles = RNG.integers(0, 256, (2, 1, 4, 4), dtype=np.uint8)
    found = predictor(model, Normalize([0.4], [0.3]), accelerator)(tiles)
    images = (torch.from_numpy(tiles).float() / 255 - 0.4) / 0.3
    np.testing.assert_allclose(found, model(images).softmax(1).detach().numpy(), rtol=1e-5)


def confident(labels: NDArray[np.int16], num_classes: int) -> NDArray[np.float32]:
    return np.eye(num_classes, dtype=np.float32)[np.maximum(labels, 0)].transpose(2, 0, 1)


def test_scores_are_those_of_scikit_learn() -> None:
    scores, predicted, truth = Scores(4), [], []
    for seed in range(3):
        one, other = np.maximum(blobs(40, 50, 3, seed), 0), blobs(40, 50, 3, seed + 10)  # class 3 is nowhere
        scores.add([(confident(one, 4), other)])
        predicted.append(one[other != IGNORED])
        truth.append(other[other != IGNORED])
    p, t = np.concatenate(predicted), np.concatenate(truth)
    found = scores.values(("a", "b", "c", "d"))
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(t, p, labels=range(4)))
    each = jaccard_score(t, p, labels=[0, 1, 2], average=None)
    assert [found[f"iou/{name}"] for name in "abc"] == pytest.approx(each) and "iou/d" not in found
    assert found["miou"] == pytest.approx(each.mean())
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(t, p))


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 40])
def test_scores_are_the_same_in_any_strips(rows: int) -> None:
    truth = blobs(40, 50, 3, 0)
    logits = RNG.normal(size=(3, 40, 50)).astype(np.float32) + 3 * confident(np.roll(truth, 2, 0), 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    whole, parts = Scores(3), Scores(3)
    whole.add([(probabilities, truth)])
    parts.add((probabilities[:, i : i + rows], truth[i : i + rows]) for i in range(0, 40, rows))
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    np.testing.assert_array_equal(parts.boundaries, whole.boundaries)
    assert parts.loss == pytest.approx(whole.loss)
    known = truth != IGNORED
    expected = -np.log(np.take_along_axis(probabilities, np.maximum(truth, 0)[None].astype(int), 0)[0][known]).mean()
    assert whole.values("abc")["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_class_that_is_predicted_and_nowhere_true_counts_as_0() -> None:
    truth = np.zeros((10, 20), np.int16)
    predicted = truth.copy()
    predicted[0, 0] = 1
    scores = Scores(3)
    scores.add([(confident(predicted, 3), truth)])
    found = scores.values("abc")
    assert found["miou"] == pytest.approx((199 / 200 + 0) / 2) and found["iou/b"] == 0 and "iou/c" not in found
    assert found["largest_class_miou"] == 1


def test_what_the_largest_class_everywhere_scores_counts_the_true_classes() -> None:
    truth = np.zeros((10, 20), np.int16)
    truth[0], truth[1, :3] = 1, IGNORED
    predicted = np.full_like(truth, 2)
    scores, constant = Scores(3), Scores(3)
    scores.add([(confident(predicted, 3), truth)])
    constant.add([(confident(np.zeros_like(truth), 3), truth)])
    assert scores.values("abc")["largest_class_miou"] == pytest.approx(177 / 197 / 2)
    assert constant.values("abc")["miou"] == pytest.approx(177 / 197 / 2)


def test_the_f1_of_boundaries_is_the_harmonic_mean_of_precision_and_recall() -> None:
    """Two true edges, of which one is found, and nothing more: both classes have precision 1 and recall 1 / 2."""
    truth, predicted = np.zeros((6, 40), np.int16), np.zeros((6, 40), np.int16)
    truth[:, 10:30], predicted[:, 10:] = 1, 1
    scores = Scores(2)
    scores.add([(confident(predicted, 2), truth)])
    assert NEAR == 2
    assert scores.values("ab")["boundary_f1"] == pytest.approx(2 * 1 * 0.5 / 1.5)


@pytest.mark.parametrize(("shift", "f1"), [(0, 1.0), (NEAR, 1.0), (NEAR + 2, 0.0)])
def test_a_boundary_may_be_off_by_two_pixels(shift: int, f1: float) -> None:
    truth = np.zeros((20, 30), np.int16)
    truth[:, 12:] = 1
    scores = Scores(2)
    scores.add([(confident(np.roll(truth, shift, 1)[:, 8:26], 2), truth[:, 8:26])])
    assert scores.values("ab")["boundary_f1"] == f1


def test_a_boundary_is_between_known_pixels_only() -> None:
    labels = np.array([[0, 0, 1], [0, 0, 1]], np.int16)
    assert boundary(labels, np.ones((2, 3), bool)).tolist() == [[False, True, True]] * 2
    known = np.array([[True, True, False], [True, True, True]])
    assert boundary(labels, known).tolist() == [[False, False, False], [False, True, True]]


def test_scores_of_several_processes_add_up() -> None:
    together, parts = Scores(3), [Scores(3), Scores(3)]
    for i in range(2):
        image = [(confident(np.maximum(blobs(16, 16, 3, i), 0), 3), blobs(16, 16, 3, i + 5))]
        together.add(image)
        parts[i].add(image)
    parts[0].merge(parts[1])
    assert parts[0].values("abc") == together.values("abc")


def test_colours_differ_and_overlays_show_them() -> None:
    assert len({tuple(colour) for colour in colours(60).tolist()}) == 60
    shown = overlay(np.full((2, 2), 0.5, np.float32), np.array([[0, 1], [IGNORED, 1]]))
    assert shown.shape == (2, 2, 3) and (shown[1, 0] == 0).all() and (shown[0, 1] == shown[1, 1]).all()
    assert not np.allclose(shown[0, 0], shown[0, 1])


# Several images at once


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_images_come_in_order_from_any_number_of_threads(num_threads: int) -> None:
    def late(i: int) -> int:
        time.sleep(0.002 * (i % 3 == 0))
        return i

    assert list(each_image(late, range(20), num_threads)) == list(range(20))


@pytest.mark.parametrize("num_threads", [0, 3])
def test_an_error_comes_in_its_place_and_ends_the_work(num_threads: int) -> None:
    done = []

    def fails(i: int) -> int:
        if i == 2:
            raise ValueError("the third")
        time.sleep(0.002)
        done.append(i)
        return i

    found = each_image(fails, range(1000), num_threads)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(found)
    assert len(done) < 100


def test_one_batch_is_predicted_at_a_time() -> None:
    inside, most = 0, 0

    class Slow(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.005)
            inside -= 1
            return images

    predict = predictor(Slow(), Normalize([0.5], [0.5]), Accelerator(cpu=True))
    list(each_image(lambda i: predict(np.full((1, 1, 2, 2), i, np.uint8)), range(8), 4))
    assert most == 1
