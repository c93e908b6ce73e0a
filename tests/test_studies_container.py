"""The study of CONTAINER: networks of equal compute, commands that fcmae takes, and a table of paired differences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.networks.build import make_encoder
from fcmae.options import load

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import container


def test_both_networks_take_the_same_multiply_adds() -> None:
    found = {}
    for name, (_, spec) in container.NETWORKS.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            make_encoder(spec)(torch.zeros(1, 3, 64, 64))
        found[name] = counter.get_total_flops()
    assert found["container"] == pytest.approx(found["convnextv2"], rel=0.02)


def test_the_commands_are_ones_that_fcmae_takes_and_differ_in_the_network_alone(tmp_path: Path) -> None:
    found = list(container.jobs(tmp_path, 2, 2, full_epochs=10, side=32, at_once=2))
    names = [job.name for job in found]
    assert len(set(names)) == len(names) == 2 + 8 + 2 * 2 * 2 * 2
    for job in found:
        assert set(job.needs) <= set(names)
        kind = PretrainConfig if "pretrain" in job.words else FinetuneConfig
        cfg = load(kind, job.words[4:], prog="fcmae")
        assert cfg.data.image_size == (32, 32)
        assert cfg.data.num_workers == (3 if "pretrain" in job.words else 1)
        if "-100-" in job.name:
            assert (cfg.epochs, cfg.optim.warmup_epochs) == (10, 1.25)
        network = job.name.removeprefix("tune-").split("-")[0]
        assert job.needs in ((), (f"{network}-p",))
        settings = cfg.model_copy(update={"model": cfg.model.model_copy(update={"init": None})}).model
        assert (settings.variant, cfg.model.stem_stride) == (variant(network), 2)
        assert bool(job.needs) == (getattr(cfg.model, "init", None) is not None)


def variant(network: str) -> Any:
    return PretrainConfig.model_validate(
        {"model": {"variant": container.NETWORKS[network][1].settings()}, "data": {"path": ["x"]}, "out": "x"}
    ).model.variant


def test_the_table_pairs_the_networks_by_seed() -> None:
    scores = {("convnextv2", "scratch"): [0.2, 0.3, 0.25], ("container", "scratch"): [0.3, 0.41, 0.34]}
    found = {
        "scores": [
            {"network": network, "start": start, "percent": 10, "seed": seed, "top1": value, "machine": machine}
            for machine, seeds in (("A", (0, 1, 2)), ("B", (2,)))
            for (network, start), values in scores.items()
            for seed, value in enumerate(values)
            if seed in seeds
        ]
    }
    text = container.result(found)
    first, second = text.split("On B:")
    assert "On A:" in first and "CONTAINER-LIGHT, scratch" in first and "CONTAINER-LIGHT, scratch" in second
    assert "+10.0 [+7.5, +12.5]" in first  # 10, 11 and 9: +- 4.303 / sqrt(3)
    assert "too few runs" in second


def test_what_is_finished_is_collected(tmp_path: Path) -> None:
    every = list(container.jobs(tmp_path, 2, 1, full_epochs=20, side=64, at_once=1))
    (tmp_path / "jobs").mkdir()
    for name, value in (("container-scratch-10-0", 0.25), ("tune-container-scratch-4e-3", 0.5)):
        (tmp_path / "jobs" / f"{name}.json").write_text('{"command": "-", "seconds": 3, "machine": "A"}')
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(f'{{"step": 1, "epoch": 1, "top1": {value}}}\n')
    found = container.collect(tmp_path, every, 2, 20, 64)
    (score,) = found["scores"]
    assert score == {
        "network": "container", "start": "scratch", "percent": 10, "seed": 0, "top1": 0.25, "machine": "A",
    }  # fmt: skip
    assert found["tried"] == {"container-scratch-4e-3": 0.5}
    text = container.section(found)
    assert "CONTAINER-LIGHT, scratch" in text and "| container-scratch-4e-3 |     50.0 |" in text
    assert "for 20\nepochs" in text and "for 2, once" in text
