"""A run removes what it wrote and nothing else, and takes no other directory for its own."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import runs

from fcmae import cli
from fcmae.training import own_files
from fcmae.training.run import RunDirectory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining of the smallest kind, with TensorBoard's files and pictures."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(["pretrain", *runs.flags(images, run, log__trackers="tensorboard", log__eval_epochs=1)]) == 0
    runs.forget_accelerator()
    return run


@pytest.fixture
def run(finished: Path, images: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    return copied


def pretrain(images: Path, out: Path, *more: str) -> int:
    status = cli.main(["pretrain", *runs.flags(images, out), *more])
    runs.forget_accelerator()
    return status


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_file_of_a_run_is_known(run: Path) -> None:
    assert not own_files.strangers(run)
    own = {path for path in own_files.written(run, (*own_files.STARTED, *own_files.RESULTS)) if path.is_file()}
    assert own == {path for path in run.rglob("*") if path.is_file()}


def test_overwrite_leaves_nothing_of_the_old_run_and_all_that_is_not_its_own(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "figures").mkdir()
    (run / "figures" / "loss.png").write_text("mine")
    own_files.remove(run)
    assert set(contents(run)) == {"notes.txt", "figures/loss.png", ".lock", "config.yaml"}


@pytest.mark.parametrize(
    "mine",
    [
        "checkpoints/keep-this/model.safetensors",
        "checkpoints/step-00000009/notes.txt",
        "checkpoints/step-00000009-good/model.safetensors",
        "checkpoints/step-final/checkpoint.json",
        "checkpoints/step-00000009/mine.safetensors",
        "reconstructions/step-best.png",
        "reconstructions/mine.psd",
        "best/mine/model.safetensors",
        "tensorboard/other/events.out",
        "loss.png/picture.png",
        "last/model.safetensors/x",
    ],
)
def test_overwrite_refuses_folders_that_hold_something_else_and_lists_it(
    run: Path, images: Path, mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (run / mine).parent.is_file():
        (run / mine).parent.unlink()
    (run / mine).parent.mkdir(parents=True, exist_ok=True)
    (run / mine).write_text("mine")
    before = contents(run)
    assert pretrain(images, run, "--overwrite") == 2
    assert contents(run) == before
    assert mine.split("/")[0] in capsys.readouterr().err


def test_a_directory_with_a_copied_config_is_not_cleared(
    finished: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "next"
    for name in ("checkpoints/old/weights.pth", "best/model.safetensors", "tensorboard/mine.txt"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
    shutil.copy(finished / "config.yaml", out)
    before = contents(out)
    assert pretrain(images, out) == 2
    assert contents(out) == before
    assert "give another --out" in capsys.readouterr().err
    shutil.rmtree(out / "best")  # what is left is in no run's way, and stays
    assert pretrain(images, out) == 0
    kept = contents(out)
    assert kept["checkpoints/old/weights.pth"] == kept["tensorboard/mine.txt"] == b"mine"


def test_results_without_a_checkpoint_are_a_finished_run(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert pretrain(images, run) == 2
    assert contents(run) == before
    assert "no checkpoint to go on from" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_anew(run: Path, images: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / own_files.SAVED).unlink()
    (run / "train.log").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    assert pretrain(images, run) == 0
    assert [step for step, _ in runs.losses(run)] == list(range(1, 10))


def test_overwrite_refuses_to_delete_what_the_run_starts_from(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert pretrain(images, run, "--overwrite", "--init", str(run)) == 2
    assert contents(run) == before
    assert "model.init" in capsys.readouterr().err


def test_a_run_inside_its_own_images_is_refused(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(images, images / "runs" / "first") == 2
    assert not (images / "runs").exists()
    assert "where images are searched" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoints_that_are_a_link_stay_one(run: Path, images: Path, tmp_path: Path, overwrite: bool) -> None:
    disk = tmp_path / "disk"
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    more = ["--overwrite"] if overwrite else []
    assert pretrain(images, run, *more) == 0
    assert (run / "checkpoints").is_symlink()
    assert [path.name for path in sorted(disk.iterdir())] == ["step-00000006", "step-00000009"]


def test_what_a_clearing_that_was_cut_off_left_is_removed_at_the_next_start(run: Path, images: Path) -> None:
    (run / own_files.ASIDE / "step-00000003").mkdir(parents=True)
    assert pretrain(images, run) == 0
    assert not (run / own_files.ASIDE).exists()


def test_a_home_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = runs.config(Path("~/photos"), Path("~/runs/first"))
    assert cfg.out == tmp_path / "runs" / "first"
    assert cfg.data.path == [str(tmp_path / "photos")]
    assert RunDirectory(cfg).path == tmp_path / "runs" / "first"


def test_files_that_were_being_written_are_the_runs_and_go_at_its_next_start(run: Path, images: Path) -> None:
    halves = [run / place for place in (".tmp-loss.png", "reconstructions/.tmp-step-00000003.png")]
    for path in halves:
        path.write_text("half")
    mine, notes = run / "reconstructions" / ".tmp-mine.png", run / ".tmp-notes.txt"
    mine.write_text("mine")
    notes.write_text("mine")
    assert own_files.strangers(run) == [mine]
    assert pretrain(images, run) == 0
    assert mine.exists() and notes.exists() and not any(path.exists() for path in halves)
    mine.unlink()
    halves[1].write_text("half")
    assert pretrain(images, run, "--overwrite", "true") == 0


@pytest.mark.parametrize(
    ("source", "is_taken"),
    [("photos/**", False), ("photos/**/*_sat.tif", False), ("photos/**/*.png", False), ("photos/**/*.jpg", True)],
)
def test_nothing_is_written_where_a_pattern_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_taken: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with contextlib.nullcontext() if is_taken else pytest.raises(ValueError, match="where images are searched"):
        own_files.check_outside(Path("photos/maps"), {"images": [source]})
