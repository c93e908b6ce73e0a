from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcmae.masking import num_visible, random_mask


def test_the_released_rounding_is_kept() -> None:
    assert num_visible(49, 0.6) == 19


@pytest.mark.parametrize(("patches", "ratio", "expected"), [(10, 0.9, 1), (10, 0.7, 3), (16, 0.75, 4), (20, 0.95, 1)])
def test_products_that_are_whole_in_decimals_stay_whole(patches: int, ratio: float, expected: int) -> None:
    assert num_visible(patches, ratio) == expected


@given(
    gh=st.integers(1, 9),
    gw=st.integers(1, 9),
    share=st.floats(0, 1),
    epoch=st.integers(0, 1000),
    batch=st.integers(1, 4),
)
def test_every_image_hides_the_exact_count(gh: int, gw: int, share: float, epoch: int, batch: int) -> None:
    visible = max(1, round(share * gh * gw))
    mask = random_mask((gh, gw), visible, [(3, epoch, i) for i in range(batch)])
    assert mask.shape == (batch, gh, gw)
    assert mask.dtype == np.bool_
    assert ((~mask).sum((1, 2)) == visible).all()


def test_a_mask_depends_on_its_own_seed_only() -> None:
    seeds = [(0, 1, i) for i in range(8)]
    together = random_mask((7, 7), 19, seeds)
    assert np.array_equal(together[5:6], random_mask((7, 7), 19, seeds[5:6]))
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together, random_mask((7, 7), 19, [(0, 2, i) for i in range(8)]))


def test_every_patch_is_hidden_equally_often() -> None:
    mask = random_mask((2, 3), 2, [(i,) for i in range(6000)])
    # Binomial with p = 2/3 and n = 6000: a standard deviation is .006, so this is five of them.
    assert np.abs(mask.mean(0) - 4 / 6).max() < 0.03


@pytest.mark.parametrize("visible", [0, 7])
def test_an_impossible_count_is_refused(visible: int) -> None:
    with pytest.raises(ValueError, match=f"visible = {visible} of 6 patches"):
        random_mask((2, 3), visible, [(0,)])
