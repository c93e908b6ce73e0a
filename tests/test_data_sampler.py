from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcmae.data.sampler import EVAL_EPOCH, Key, StepSampler, epoch_order, evaluation_batches, steps_per_epoch


def steps(num_images: int, batch_size: int, processes: int, grad_accum: int, start: int, end: int) -> list[list[Key]]:
    """The keys of each step, put together from all processes and accumulated batches."""
    out: list[list[Key]] = [[] for _ in range(start, end)]
    for rank in range(processes):
        sampler = StepSampler(
            num_images,
            batch_size,
            seed=5,
            start_step=start,
            end_step=end,
            rank=rank,
            num_processes=processes,
            grad_accum=grad_accum,
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == (end - start) * grad_accum
        assert {len(batch) for batch in batches} <= {batch_size // processes // grad_accum}
        for i, batch in enumerate(batches):
            out[i // grad_accum] += batch
    return out


@given(
    num_images=st.integers(8, 60),
    layout=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 2), (8, 1)]),
    cut=st.integers(0, 20),
)
def test_order_is_equal_for_any_layout_and_resume_continues_it(
    num_images: int, layout: tuple[int, int], cut: int
) -> None:
    uninterrupted = steps(num_images, 8, 1, 1, 0, 20)
    assert steps(num_images, 8, *layout, 0, cut) + steps(num_images, 8, 2, 1, cut, 20) == uninterrupted


@given(st.sampled_from([1, 2, 4]), st.sampled_from([(1, 1), (2, 1), (1, 2)]), st.integers(0, 12))
def test_an_epoch_stays_one_pass_over_the_images_whatever_the_masks(
    masks: int, layout: tuple[int, int], cut: int
) -> None:
    def step_keys(start: int, end: int) -> list[list[Key]]:
        out: list[list[Key]] = [[] for _ in range(start, end)]
        for rank in range(layout[0]):
            sampler = StepSampler(
                21, 8, 5, start_step=start, end_step=end, rank=rank, num_processes=layout[0], grad_accum=layout[1],
                masks_per_image=masks,
            )  # fmt: skip
            for i, batch in enumerate(sampler):
                out[i // layout[1]] += batch
        return out

    per_epoch = steps_per_epoch(21, 8, masks)
    assert per_epoch == 21 * masks // 8
    # batch_size counts an image under each of its masks: the same keys as with that many fewer of them.
    assert step_keys(0, 12) == steps(21, 8 // masks, 1, 1, 0, 12)
    assert step_keys(0, cut) + step_keys(cut, 12) == step_keys(0, 12)
    first = [index for step in step_keys(0, min(12, per_epoch)) for _, index in step]
    assert len(set(first)) == len(first)


def test_every_epoch_sees_each_image_once_but_for_the_incomplete_batch() -> None:
    keys = [key for step in steps(10, 4, 1, 1, 0, 6) for key in step]
    for epoch in range(3):
        order = epoch_order(10, 5, epoch)
        assert keys[epoch * 8 : epoch * 8 + 8] == [(epoch, index) for index in order[:8]]
    assert all(type(number) is int for key in keys for number in key)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.integers(0, 2000))
def test_epoch_order_is_a_permutation(num_images: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_images, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_images))
    np.testing.assert_array_equal(order, epoch_order(num_images, seed, epoch))
    # Runs of earlier versions go on in this order.
    np.testing.assert_array_equal(order, np.random.default_rng([seed, epoch, 0, 2]).permutation(num_images))
    assert order.dtype == np.int32


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_sizes_that_cannot_work_are_errors_with_the_remedy() -> None:
    assert steps_per_epoch(11, 4) == 2
    with pytest.raises(ValueError, match="batch_size: 8 is more than the 7 training images: use at most 7"):
        steps_per_epoch(7, 8)
    with pytest.raises(ValueError, match="batch_size: 8 is more than the 7"):
        StepSampler(7, 8, 0, end_step=1)
    with pytest.raises(ValueError, match=r"batch_size: 8 is not a multiple of processes x grad_accum = 3 x 2"):
        StepSampler(70, 8, 0, end_step=1, num_processes=3, grad_accum=2)
    with pytest.raises(ValueError, match=r"16 is more than the 3 training images under 4 masks each: use at most 12"):
        steps_per_epoch(3, 16, 4)
    with pytest.raises(ValueError, match=r"processes x grad_accum x masks_per_image = 2 x 1 x 3: change one"):
        StepSampler(70, 8, 0, end_step=1, num_processes=2, masks_per_image=3)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_sees_every_image_exactly_once(num_images: int, batch_size: int, processes: int) -> None:
    batches = [
        batch for rank in range(processes) for batch in evaluation_batches(num_images, batch_size, rank, processes)
    ]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(EVAL_EPOCH, index) for index in range(num_images)]
