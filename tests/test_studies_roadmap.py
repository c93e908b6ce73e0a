"""The study of the roadmap: its jobs, and what its page makes of their numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fcmae.config import FinetuneConfig
from fcmae.networks.spec import VARIANTS
from fcmae.options import load
from fcmae.roadmap import read_study, scores_of

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
pytest.importorskip("elpv_dataset")
import roadmap


def test_the_commands_of_the_roadmap_train_every_step_on_the_same_images_by_seed(tmp_path: Path) -> None:
    found = list(roadmap.jobs(tmp_path, percent=10, epochs=60, seeds=2, rate="2e-3"))
    names = [job.name for job in found]
    assert len(set(names)) == len(names) == 6 + 2 * 16
    settings = {job.name: load(FinetuneConfig, job.words[job.words.index("finetune") + 1 :], prog="t") for job in found}
    for name, cfg in settings.items():
        assert (cfg.regularization.mixup, cfg.optim.warmup_epochs) == (0.8, 4)
        if name.startswith("tune-"):
            _, step, rate = name.split("-", 2)
            assert (cfg.optim.base_lr, cfg.data.path) == (float(rate), f"{tmp_path}/tune-10-0.csv")
            assert (cfg.seed, cfg.data.val_path) == (0, f"{tmp_path}/tune-test-10-0.csv")
        else:
            step, _, seed = name.rpartition("-")
            assert (cfg.optim.base_lr, cfg.data.path) == (2e-3, f"{tmp_path}/train-10-{seed}.csv")
            assert (cfg.seed, cfg.data.val_path) == (int(seed), f"{tmp_path}/test.csv")
        assert cfg.model.spec == VARIANTS[f"roadmap-small/{step}"].model_copy(update={"stem_stride": 2})


def test_times_are_measured_again_for_images_of_another_size_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(roadmap, "measure", lambda repeats, side: asked.append(side) or {"resnet": 1.0})
    for name, value in (("prepare_tiny20", None), ("schedule", []), ("collect", {"commands": {}}), ("rows", [])):
        monkeypatch.setattr(roadmap, name, lambda *_, value=value, **__: value)
    for side in ("64", "64", "48"):
        roadmap.main(["shards", "--out", str(tmp_path), "--side", side])
    assert asked == [64, 48]


def test_the_page_of_the_roadmap_compares_each_step_with_the_one_that_it_changes(tmp_path: Path) -> None:
    scores = {"move-up": [0.2, 0.3, 0.25], "kernel-7": [0.3, 0.41, 0.34], "kernel-9": [0.2, 0.31, 0.24], "gelu": [0.5]}
    found = {
        "machine": {"gpu": "none"},
        "regime": "roadmap-small",
        "data": "tiny20",
        "side": 64,
        "percent": 10,
        "epochs": 60,
        "rate": "2e-3",
        "commands": {"resnet-0": "fcmae finetune", "gelu-0": "not shown"},
        "time": {"machine": {"cores": 2}, "ms_per_image": {step.name: [1.0, 2.0, 3.0] for step in roadmap.STEPS}},
        "tried": {"resnet-1e-3": 0.3},
        "scores": [
            {"step": step, "seed": seed, "top1": value}
            for step, values in scores.items()
            for seed, value in enumerate(values)
        ],
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "roadmap.json").write_text(json.dumps(found))
    (tmp_path / "results" / "roadmap.md").write_text("What we read.\n")
    (tmp_path / "roadmap.md").write_text(f"# Kept\n\n{roadmap.HEADING}\n\nReplaced.\n")
    for _ in range(2):  # written again, it is the same
        roadmap.write_page(tmp_path)
        page = (tmp_path / "roadmap.md").read_text()
        assert page.startswith(f"# Kept\n\n{roadmap.HEADING}\n\nWhat we read.\n") and "Replaced" not in page
        assert page.count(roadmap.HEADING) == 1
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    by_step = {line[0]: line[3:] for line in lines}
    # Differences to move-up of 10, 11 and 9 points, and of 0, 1 and -1: 4.303 / sqrt(3) is 2.5.
    assert by_step["kernel-7"] == ["2.00", "80.6", "+0.7", "3", "35.0 [21.2, 48.8]", "+10.0 [+7.5, +12.5]", "better"]
    assert by_step["kernel-9"][-2:] == ["+0.0 [-2.5, +2.5]", "no difference seen"]
    assert by_step["gelu"] == ["2.00", "80.6", "+0.0", "1", "50.0", "+20.0", "too few runs"]
    assert by_step["resnet"] == ["2.00", "78.8", "", "0", "", "", ""]
    assert "the median; cores 2." in page
    assert "a batch of 64 and a\nbase_lr of 2e-3; gpu none." in page
    assert "10 % of 10,000" in page and "fcmae finetune" in page and "not shown" not in page
    assert (tmp_path / "roadmap.svg").read_text().startswith("<?xml")
    assert scores_of(read_study(tmp_path / "roadmap.json")) == scores


@pytest.mark.parametrize("study", ["roadmap", "fills"])
def test_how_threads_wait_is_set_before_torch_is_loaded(study: str) -> None:
    code = f"""
import sys
from fcmae import threads
def prepare():
    print("torch" in sys.modules)
    sys.exit()
threads.prepare = prepare
import {study}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(roadmap.__file__).parent
    )
    assert done.stdout == "False\n", done.stderr


def test_networks_of_the_roadmap_are_timed_in_turn() -> None:
    times = roadmap.measure(repeats=2, batch=2)
    assert list(times) == [step.name for step in roadmap.STEPS]
    assert all(0 < low <= middle <= high for low, middle, high in times.values())
