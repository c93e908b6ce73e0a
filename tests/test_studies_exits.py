"""The study of what leaving costs: its networks differ in the threshold alone, and its table is of pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fcmae.cli import COMMANDS
from fcmae.config import SegmentConfig
from fcmae.options import load

sys.path.append(str(Path(__file__).parents[1] / "studies"))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import anytime
import exits as study
from study import shown


def test_networks_differ_in_the_threshold_alone(tmp_path: Path) -> None:
    jobs = {job.name: job for job in study.jobs(tmp_path, 30, 2)}
    assert list(jobs) == ["pretrained", "masks-0", "exits-0", "masks-1", "exits-1"]
    for name, tau in (("masks", 0.9), ("exits", 1.0)):
        words = jobs[f"{name}-1"].words
        cfg = load(COMMANDS["segment"][0], list(words[words.index("segment") + 1 :]), prog=name)
        assert isinstance(cfg, SegmentConfig) and (cfg.model.tau, cfg.seed) == (tau, 1)
    assert set(jobs["masks-1"].words) ^ set(jobs["exits-1"].words) == {
        "--model.tau=0.9", "--model.tau=1", f"--out={tmp_path}/runs/masks-1", f"--out={tmp_path}/runs/exits-1",
    }  # fmt: skip


def test_each_network_is_timed_on_the_squares(tmp_path: Path) -> None:
    jobs = {job.name: job for job in study.timings(tmp_path, 2, 5)}
    assert list(jobs) == ["timed-masks-0", "timed-exits-0", "timed-masks-1", "timed-exits-1"]
    for name, budgets in (("masks", [0.5, 0.25, 0.1, 0.05]), ("exits", [])):
        job = jobs[f"timed-{name}-1"]
        args = anytime.parser().parse_args(job.words[2:])
        assert job.needs == (f"{name}-1",) and args.model == tmp_path / "runs" / f"{name}-1"
        assert args.repeats == 5 and 0.8 in args.taus and args.budgets == budgets
        assert args.json == study.timed(tmp_path, name, 1)
        assert shown(job, tmp_path).startswith("python benchmarks/anytime.py --model runs/studies/runs/")


def test_tables_are_of_the_pairs_of_each_seed(tmp_path: Path) -> None:
    wanted = list(study.timings(tmp_path, 3, 5))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "runs").mkdir()
    for seed, whole in enumerate((0.6, 0.7, 0.8)):
        for name, less in (("masks", 0.0), ("exits", 0.02)):
            (tmp_path / "jobs" / f"timed-{name}-{seed}.json").write_text('{"command": "-", "seconds": 60}')
            results = {
                side: {"miou": miou, "pixel_accuracy": 0.9, "boundary_f1": 0.5, "multiply_adds": macs}
                for side, miou, macs in (("dense", whole - less, 100), ("tau-0.8", whole - less - 0.01, 25))
            }
            ratios = {"dense": {"time": 1.0}, "tau-0.8": {"time": 0.5}}
            found = {"results": results, "ratios": ratios, "calibration": [{"ece": 0.02}, {"ece": 0.01}]}
            study.timed(tmp_path, name, seed).write_text(json.dumps(found))
    collected = study.collect(tmp_path, wanted, 30)
    # Of three values one tenth apart the interval reaches 4.303 / sqrt(3) times that to each side.
    same, costs = "100 [100, 100]", ["50 [50, 50]", "25 [25, 25]"]
    assert study.rows(collected) == [
        ["masks", "dense", "70.00 [45.16, 94.84]", "", same, same],
        ["masks", "tau-0.8", "69.00 [44.16, 93.84]", "-1.00 [-1.00, -1.00]", *costs],
        ["exits", "dense", "68.00 [43.16, 92.84]", "-2.00 [-2.00, -2.00]", same, same],
        ["exits", "tau-0.8", "67.00 [42.16, 91.84]", "-3.00 [-3.00, -3.00]", *costs],
    ]  # fmt: skip
    assert study.errors(collected)[1] == ["masks", "2", "1.0 [1.0, 1.0]"]


def test_what_was_not_timed_is_not_in_the_tables(tmp_path: Path) -> None:
    found = study.collect(tmp_path, [*study.jobs(tmp_path, 30, 1), *study.timings(tmp_path, 1, 5)], 30)
    assert found["scores"] == [] and study.rows(found) == study.errors(found) == []
