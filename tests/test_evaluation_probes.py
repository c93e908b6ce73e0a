from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import fcmae.evaluation.probes as probes
from fcmae.evaluation.probes import (
    DEFAULT,
    Setting,
    few_shot_counts,
    fit_linear,
    knn_probabilities,
    mean_and_interval,
)

Set = tuple[NDArray[np.float32], NDArray[np.int64]]


def clusters(num: int, seed: int, noise: float = 1.5, num_classes: int = 3, dim: int = 6) -> Set:
    """Features around one centre a class, each on a scale of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num)
    centres = np.random.default_rng(99).normal(size=(num_classes, dim))
    features = (centres[labels] + noise * rng.normal(size=(num, dim))) * 10.0 ** np.arange(dim) + 3
    return features.astype(np.float32), labels


def test_knn_is_dinos_protocol() -> None:
    """L2-normalised features, the 20 nearest by cosine, votes of exp(cosine / .07), vote by vote."""
    (train, labels), (test, _) = clusters(90, 0), clusters(15, 1)
    found = knn_probabilities(train, labels, test, 3, ks=[20])[20]
    for image, probabilities in zip(test.astype(np.float64), found, strict=True):
        cosines = [float(row @ image / np.linalg.norm(row) / np.linalg.norm(image)) for row in train.astype(np.float64)]
        votes = [0.0] * 3
        for neighbour in sorted(range(90), key=lambda i: -cosines[i])[:20]:
            votes[labels[neighbour]] += float(np.exp(cosines[neighbour] / 0.07))
        np.testing.assert_allclose(probabilities, np.array(votes) / sum(votes), atol=1e-4)


def test_knn_votes_as_scikit_learn_with_these_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "TEST_ROWS", 7)  # several chunks of both, the last ones smaller
    monkeypatch.setattr(probes, "TRAIN_ROWS", 16)
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(num, 5)).astype(np.float32) for num in (50, 20))
    labels = rng.integers(3, size=50)
    found = knn_probabilities(train, labels, test, 4, ks=[1, 5, 50])
    for k, probabilities in found.items():
        reference = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute"
        ).fit(train.astype(np.float64), labels)
        np.testing.assert_allclose(probabilities[:, :3], reference.predict_proba(test.astype(np.float64)), atol=1e-4)
        assert (probabilities[:, 3] == 0).all()  # a class that no training image has


def test_knn_by_hand() -> None:
    train = np.array([[1, 0], [0, 2], [-1, 0]], np.float32)
    found = knn_probabilities(train, np.array([0, 1, 1]), np.array([[3, 3]], np.float32), 2, ks=[2, 3], temperature=1.0)
    np.testing.assert_allclose(found[2], [[0.5, 0.5]], rtol=1e-6)
    near, far = np.exp(2**-0.5), np.exp(-(2**-0.5))  # cosines of 45 and 135 degrees
    np.testing.assert_allclose(found[3], [[near / (2 * near + far), (near + far) / (2 * near + far)]], rtol=1e-6)


def test_classes_weigh_as_is_said_in_training_and_in_the_choice() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0] * 90 + [1] * 10)
    train = (rng.normal(size=(100, 3)) + labels[:, None]).astype(np.float32)
    balance = torch.tensor([100 / 180, 5.0])
    weights = {0: 100 / 180, 1: 5.0}
    probe = fit_linear(train, labels, 2, class_weights=balance, grid=[Setting(1e-2, 1e-1)])
    mean, std = train.astype(np.float64).mean(0), train.astype(np.float64).std(0)
    # Of two classes scikit-learn has one vector, ours two, each of half of it: twice the C.
    reference = LogisticRegression(C=0.2, tol=1e-8, max_iter=1000, class_weight=weights).fit(
        (train - mean) / std, labels
    )
    np.testing.assert_allclose(probe.probabilities(train), reference.predict_proba((train - mean) / std), atol=2e-3)
    # Of the two the first always says the large class, the second is right of the small one more often.
    trained = torch.zeros(2, 2, 3), torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(3), torch.ones(3)
    plain, weighted = (probes._losses(*trained, each, train, labels, np.arange(100)) for each in (None, balance))
    assert plain[0] < plain[1] and weighted[0] > weighted[1]


def test_the_linear_probe_is_scikit_learns_logistic_regression() -> None:
    (train, labels), (test, _) = clusters(300, 0), clusters(200, 1)
    l2 = 1e-2
    probe = fit_linear(train, labels, 3, grid=[Setting(1e-2, l2)])
    mean, std = train.astype(np.float64).mean(0), train.astype(np.float64).std(0)
    # Its penalty is 1 / (2 C) on the sum over the images, ours l2 / 2 on their mean.
    reference = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-8, max_iter=1000).fit((train - mean) / std, labels)
    # Both minimise the same convex function; ours stops after a thousand steps.
    np.testing.assert_allclose(probe.probabilities(test), reference.predict_proba((test - mean) / std), atol=2e-3)


def test_batches_and_several_settings_at_once_find_the_same_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = clusters(300, 0)
    rows = np.arange(300)
    whole = probes._train(train, labels, rows, 3, [Setting(1e-2, 1e-2)], 0, "cpu", None)
    monkeypatch.setattr(probes, "BATCH_SIZE", 100)
    monkeypatch.setattr(probes, "TRAIN_ROWS", 77)  # of the mean and deviation, summed in parts
    settings = [Setting(1e-3, 1.0), Setting(1e-2, 1e-2)]
    batches = probes._train(train, labels, rows, 3, settings, 0, "cpu", None)
    torch.testing.assert_close(batches[0][1], whole[0][0], atol=0.02, rtol=0)  # the noise of the batches
    assert batches[0][0].abs().max() < 0.5 * batches[0][1].abs().max()  # the stronger penalty
    torch.testing.assert_close(batches[2:], whole[2:])


def test_many_images_are_all_learnt_from_and_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "BATCH_SIZE", 10)
    monkeypatch.setattr(probes, "MIN_STEPS", 10)
    epochs = []
    order = probes.epoch_order

    def spy(num: int, seed: int, epoch: int) -> Any:
        epochs.append(epoch)
        return order(num, seed, epoch)

    monkeypatch.setattr(probes, "epoch_order", spy)
    train, labels = clusters(105, 0)  # five are left over in each epoch, not always the same
    probes._train(train, labels, np.arange(105), 3, [Setting(1e-2, 1e-2)], 0, "cpu", None)
    assert epochs == list(range(20))


def test_the_setting_that_predicts_held_out_images_is_chosen() -> None:
    train, labels = clusters(200, 0)
    useless = [Setting(1e-12, 1e-2), Setting(1e-2, 1e3)]  # one never learns, the other may not
    assert fit_linear(train, labels, 3, grid=[useless[0], Setting(1e-2, 1e-2), useless[1]]).setting.l2 == 1e-2
    noise = np.random.default_rng(0).normal(size=(60, 100)).astype(np.float32)
    grid = [Setting(1e-2, 1e-5), Setting(1e-2, 10.0)]
    assert fit_linear(noise, labels[:60], 3, grid=grid).setting.l2 == 10.0  # what can be learnt by heart is no use


def test_the_last_fit_uses_all_images_and_only_those_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 100)
    train, labels = clusters(120, 0)
    positions = np.arange(0, 120, 2)
    spoilt = train.copy()
    spoilt[1::2] = np.nan
    probe = fit_linear(spoilt, labels, 3, positions=positions)
    alone = fit_linear(train[positions], labels[positions], 3)
    assert probe.setting == alone.setting
    torch.testing.assert_close(probe.weight, alone.weight)
    torch.testing.assert_close(probe.mean, torch.from_numpy(train[positions].astype(np.float64).mean(0)).float())


def test_scale_shift_and_dead_channels_change_nothing() -> None:
    (train, labels), (test, _) = clusters(150, 0), clusters(50, 1)
    expected = fit_linear(train, labels, 3, grid=[DEFAULT]).probabilities(test)

    def changed(features: NDArray[np.float32]) -> NDArray[np.float32]:
        dead = np.full((len(features), 1), 1000.1, np.float32)
        return np.concatenate([features * 100 - 7, dead], axis=1)

    found = fit_linear(changed(train), labels, 3, grid=[DEFAULT]).probabilities(changed(test))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_classes_of_one_image_leave_nothing_to_choose_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 100)
    train, _ = clusters(3, 0)
    assert fit_linear(train, np.array([0, 1, 2]), 3).setting == DEFAULT


def test_a_class_of_one_image_keeps_it_and_the_others_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 100)
    train, _ = clusters(11, 0)
    labels = np.array([0] * 5 + [1] * 5 + [2])
    seen: list[list[int]] = []
    original = probes._losses

    def spy(*args: Any) -> Any:
        seen.append(sorted(set(labels[args[-1]].tolist())))
        return original(*args)

    monkeypatch.setattr(probes, "_losses", spy)
    fit_linear(train, labels, 3)
    assert seen == [[0, 1]]


def test_a_grid_in_parts_chooses_what_it_chooses_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 100)
    train, labels = clusters(100, 0)
    whole = fit_linear(train, labels, 3)
    monkeypatch.setattr(probes, "MAX_WEIGHTS", 5 * 3 * train.shape[1])
    in_parts = fit_linear(train, labels, 3)
    assert in_parts.setting == whole.setting
    torch.testing.assert_close(in_parts.weight, whole.weight)


def test_features_on_disk_give_the_same_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MIN_STEPS", 100)
    train, labels = clusters(100, 0)
    np.save(tmp_path / "f.npy", train)
    on_disk = fit_linear(np.load(tmp_path / "f.npy", mmap_mode="r"), labels, 3)
    torch.testing.assert_close(on_disk.weight, fit_linear(train, labels, 3).weight, rtol=0, atol=0)


def test_amounts_of_labels_by_hand() -> None:
    labels = np.repeat([0, 1, 2], [200, 30, 2])
    assert few_shot_counts("1%", labels).tolist() == [2, 1, 1]
    assert few_shot_counts("10%", labels).tolist() == [20, 3, 1]
    assert few_shot_counts("100%", labels).tolist() == [200, 30, 2]
    assert few_shot_counts("5", labels).tolist() == [5, 5, 2]


@pytest.mark.parametrize("label", ["0", "0%", "101%", "-1", "1.5", "five", "%", "nan%"])
def test_amounts_that_mean_nothing_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match="is neither a share such as 1% nor a number of images a class such as 5"):
        few_shot_counts(label, np.array([0, 1]))


def test_interval_by_hand() -> None:
    mean, interval = mean_and_interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5)
    # The 97.5 % quantile of Student's t with 2 degrees of freedom is 4.302653, the deviation .1.
    assert interval == pytest.approx((0.5 - 4.302653 * 0.1 / 3**0.5, 0.5 + 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    assert mean_and_interval([0.0, 1.0])[1] == pytest.approx((0.5 - 12.7062 * 0.5, 0.5 + 12.7062 * 0.5), rel=1e-5)
    assert mean_and_interval([0.3]) == (0.3, None)
