"""How many images a process computes at once: sizes that divide the batch, and none where something pools over them."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import config

from fcmae.config import PretrainConfig
from fcmae.training.micro_batches import micro_batch_size, settle_grad_accum, smaller_micro_batch


def test_parts_become_the_next_smaller_ones_that_divide_the_batch(tmp_path: Path) -> None:
    def sizes(**settings: object) -> list[int]:
        cfg: PretrainConfig | None = config(tmp_path, tmp_path, **settings)
        found = []
        while cfg is not None:
            found.append(micro_batch_size(cfg, 2))
            cfg = smaller_micro_batch(cfg, 2)
        return found

    assert sizes(batch_size=24) == [12, 6, 3, 1]
    assert sizes(batch_size=24, data__masks_per_image=3) == [12, 6, 3]
    assert sizes(batch_size=24, model__grn_scope="batch") == [12]


@pytest.mark.parametrize(
    ("batch_size", "device", "at_once"),
    [(64, "cpu", 64), (96, "cpu", 48), (131, "cpu", 131), (142, "cpu", 71), (521, "cpu", 1), (257, "cuda", 257)],
)
def test_a_batch_that_divides_badly_is_computed_in_parts_that_are_somewhat_large(
    tmp_path: Path, batch_size: int, device: str, at_once: int
) -> None:
    cfg = config(tmp_path, tmp_path, batch_size=batch_size)
    assert micro_batch_size(settle_grad_accum(cfg, 1, device), 1) == at_once
