from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcmae.data.index import Images
from fcmae.data.split import draw, evenly, share_of_each, split


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_is_a_stratified_partition(labels: list[int], share: float, seed: int) -> None:
    paths = [f"/{i:03}.jpg" for i in range(len(labels))]
    images = Images.of_files(paths, labels, "abcde")
    train, held_out = split(images, share, seed)
    assert sorted(train.names() + held_out.names()) == paths
    assert train.names() == sorted(train.names()) and held_out.names() == sorted(held_out.names())
    label_of = dict(zip(paths, labels, strict=True))
    for part in (train, held_out):
        assert part.labels.tolist() == [label_of[name] for name in part.names()]
        assert part.class_names == images.class_names
    counts, held = Counter(labels), Counter(held_out.labels.tolist())
    for label, count in counts.items():
        assert held[label] <= count - 1
        assert abs(held[label] - share * count) <= 1 or held[label] == count - 1
    if share == 0:
        assert len(held_out) == 0
    elif max(counts.values()) > 1 and share * len(labels) >= 1:
        assert len(held_out) >= 1
    assert [part.names() for part in split(images, share, seed)] == [train.names(), held_out.names()]


@pytest.mark.parametrize(
    ("seed", "labelled", "plain"),
    [
        (0, [0, 6, 9, 13, 16, 20, 23, 34], [2, 3, 4, 11, 23, 24, 27, 34]),
        (1, [2, 3, 4, 10, 21, 25, 26, 30], [0, 6, 7, 9, 17, 22, 23, 28]),
    ],
)
def test_a_seed_draws_what_it_has_always_drawn(seed: int, labelled: list[int], plain: list[int]) -> None:
    """A run that goes on after an update keeps its held-out images: they are drawn again at each start."""
    paths = [f"/{i:02}.jpg" for i in range(40)]
    images = Images.of_files(paths, [i % 3 for i in range(40)], "abc")
    assert split(images, 0.2, seed)[1].names() == [paths[i] for i in labelled]
    assert split(Images.of_files(paths), 0.2, seed)[1].names() == [paths[i] for i in plain]


def test_split_without_labels_draws_the_share_at_random() -> None:
    images = Images.of_files([f"/{i:04}.jpg" for i in range(1000)])
    train, held_out = split(images, 0.01, 0)
    assert (len(train), len(held_out)) == (990, 10)
    assert held_out.labels is None
    assert split(images, 0.01, 1)[1].names() != held_out.names()
    numbers = [int(Path(name).stem) for seed in range(9) for name in split(images, 0.1, seed)[1].names()]
    assert 450 < np.mean(numbers) < 550  # not one end of the list


def test_a_small_share_still_holds_out_one_image() -> None:
    assert len(split(Images.of_files([f"/{i}.jpg" for i in range(9)]), 0.01, 0)[1]) == 1
    assert len(split(Images.of_files(["/0.jpg"]), 0.5, 0)[1]) == 0


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.integers(0, 100),
)
def test_draws_have_so_many_of_each_class(labels: list[int], counts: list[int], seed: int) -> None:
    array = np.array(labels)
    drawn = draw(array, np.array(counts), seed)
    assert (np.diff(drawn) > 0).all()
    found, there = np.bincount(array[drawn], minlength=4), np.bincount(array, minlength=4)
    assert found.tolist() == np.minimum(counts, there).tolist()
    assert drawn.tolist() == draw(array, np.array(counts), seed).tolist()


def test_other_seeds_draw_other_images() -> None:
    labels = np.repeat([0, 1], 50)
    assert len({tuple(draw(labels, np.array([3, 3]), seed)) for seed in range(5)}) == 5


def test_a_share_of_each_class_is_rounded_but_at_least_one_where_there_is_one() -> None:
    assert share_of_each(np.array([200, 30, 2, 0]), 0.1).tolist() == [20, 3, 1, 0]
    assert share_of_each(np.array([16, 14, 1]), 1.0).tolist() == [16, 14, 1]


@given(st.integers(0, 500), st.integers(0, 60))
def test_evenly_takes_both_ends_and_no_position_twice(num: int, most: int) -> None:
    found = evenly(num, most)
    assert len(found) == len(set(found)) == min(num, most)
    assert found == sorted(found)
    assert not found or found[0] == 0
    assert len(found) < 2 or found[-1] == num - 1
    gaps = set(np.diff(found).tolist())
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
