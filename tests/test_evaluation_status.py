"""What `fcmae status` says of runs in every state."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from reported import finetune_run, pretrain_run

from fcmae import cli
from fcmae.data.dataset import NoUsableImage
from fcmae.data.index import Images
from fcmae.evaluation import paired
from fcmae.evaluation.runs import read_run
from fcmae.evaluation.status import find_runs, state_of, status
from fcmae.processes import Failed
from fcmae.training.messages import logging_to
from fcmae.training.records import Ended, record_end, record_start


def ended(run: Path, how: Ended | None) -> Path:
    """A run whose latest start ended so; None is without a word, or not yet."""
    (run / "train.log").touch()
    starts = json.loads((run / "environment.json").read_text())
    starts[-1]["ended"] = ""
    (run / "environment.json").write_text(json.dumps(starts))
    if how is not None:
        record_end(run, how)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.mark.parametrize("how", ["finished", "stopped", "failed", None])
def test_a_run_keeps_how_its_latest_start_ended(tmp_path: Path, how: Ended | None) -> None:
    run = pretrain_run(tmp_path / "run")
    assert state_of(ended(run, how)) == (how or "cut off")
    record_start(run, cpu=True)
    assert state_of(run) == "cut off"
    (run / "train.log").unlink()
    assert state_of(run) == "not begun"


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        (["step 60/60, epoch 6", "finished 60 steps", "next: fcmae convert"], "finished"),
        (["step 9/60", "stopped by SIGTERM after step 9; the same command resumes"], "stopped"),
        (["step 9/60", "failed: FloatingPointError: step 10: the loss is nan"], "failed"),
        (["step 9/60", "ValueError: as it was written before"], "failed"),
        (["finished 60 steps", "resuming after step 60", "step 9/60, epoch 1"], "cut off"),
        ([], "cut off"),
    ],
)
def test_the_log_tells_how_a_run_of_before_ended(tmp_path: Path, lines: list[str], state: str) -> None:
    run = pretrain_run(tmp_path / "run")
    (run / "train.log").write_text("".join(f"2030-01-02 03:04:05 {line}\n" for line in lines))
    assert state_of(run) == state


@pytest.mark.parametrize("error", [NoUsableImage("none of 3 files can be read"), KeyboardInterrupt(), Failed("killed")])
def test_whatever_ends_a_run_is_in_its_log(tmp_path: Path, error: BaseException) -> None:
    record_start(tmp_path, cpu=True)
    with (
        pytest.raises(type(error)),
        logging_to(tmp_path / "train.log", partial(record_end, tmp_path, "failed")),
    ):
        raise error
    assert state_of(tmp_path) == "failed"
    assert f"failed: {type(error).__name__}: {error}" in (tmp_path / "train.log").read_text()


def _hold(path: str, pipe: Connection) -> None:
    with Path(path).open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        pipe.send(True)
        pipe.recv()


@contextmanager
def held(run: Path) -> Iterator[Path]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(str(run / ".lock"), theirs))
    process.start()
    assert ours.recv()
    yield ended(run, None)
    ours.send(True)
    process.join()


@pytest.fixture
def running(run: Path) -> Iterator[Path]:
    with held(run) as path:
        yield path


def test_a_run_whose_lock_is_held_is_running_and_tells_its_end(running: Path) -> None:
    assert state_of(running) == "running"
    said = status(running)
    assert "running at step 60" in said and " left, to " in said


def test_a_finished_pretraining_names_what_can_be_done_with_it(run: Path) -> None:
    ended(run, "finished")
    (run / "checkpoints" / "step-00000060").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "step-00000060" / "checkpoint.json").write_text("{}")
    said = status(run)
    assert "Is it working? " in said and "The loss went from" in said
    for command in ("evaluate", "finetune LABELLED --init", "convert", "report"):
        assert f"fcmae {command} " in said


def test_the_command_of_tensorboard_is_told_where_it_has_something_to_show(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "tensorboard" not in status(run)
    (run / "tensorboard" / "fcmae").mkdir(parents=True)
    (run / "tensorboard" / "fcmae" / "events.out.tfevents.1").touch()
    assert status(run).endswith(f"\n  tensorboard --logdir {run}/tensorboard")
    monkeypatch.setattr("fcmae.evaluation.status.find_spec", lambda name: None)
    assert "tensorboard" not in status(run)


def test_the_best_score_is_of_the_moving_average_where_that_is_the_model(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "tuned", 0.8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"ema_balanced_accuracy": 0.9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "best ema_balanced_accuracy: 0.9000" in status(run)


def test_a_run_that_broke_down_is_not_told_to_go_on(tmp_path: Path) -> None:
    run = pretrain_run(tmp_path / "run")
    with pytest.raises(FloatingPointError), logging_to(run / "train.log", partial(record_end, run, "failed")):
        raise FloatingPointError("step 61: the loss is nan; start again from GOOD")
    said = status(run)
    assert "Is it working? ! Look closer" in said and "goes on" not in said
    assert "It broke down, and would probably again: step 61: the loss is nan; start again from GOOD" in said
    assert said.count("the loss is nan") == 1
    with pytest.raises(OSError), logging_to(run / "train.log", partial(record_end, run, "failed")):
        raise OSError("the disk is full")
    said = status(run)
    assert "The last start failed: OSError: the disk is full" in said and "# goes on" in said


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(run: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    os.mkfifo(run / ".lock")
    assert state_of(run) == "finished"


def test_no_list_of_images_is_read_for_pretraining(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Images, "load", lambda *_: pytest.fail("is read"))
    assert "pretrain" in status(run)


def test_what_is_in_files_moves_no_terminal(tmp_path: Path) -> None:
    run = ended(pretrain_run(tmp_path / "run"), "stopped")
    starts = json.loads((run / "environment.json").read_text())
    starts[-1]["command"] = "fcmae pretrain \x1b[2J"
    (run / "environment.json").write_text(json.dumps(starts))
    said = status(run)
    assert "\x1b" not in said and f"fcmae pretrain --config {run / 'config.yaml'} --out {run}  # goes on" in said


def test_a_run_that_was_cut_off_names_its_command(run: Path) -> None:
    said = status(ended(run, None))
    assert "ended without a word, probably for want of memory" in said
    assert f"fcmae pretrain --out {run}  # goes on" in said


@pytest.mark.parametrize(
    ("command", "processes", "shown"),
    [
        (
            "pretrain.py --config a.yaml",
            8,
            "accelerate launch --multi_gpu --num_processes 8 -m fcmae.cli pretrain --config {0}/config.yaml --out {0}",
        ),
        ("ipykernel_launcher.py -f x.json", 1, "fcmae pretrain --config {0}/config.yaml --out {0}"),
        ("fcmae pretrain a; rm -rf b", 1, "fcmae pretrain 'a;' rm -rf b --out {0}"),
        ("fcmae pretrain a\n  rm -rf b", 1, "fcmae pretrain --config {0}/config.yaml --out {0}"),
        ("fcmae pretrain 'a", 1, "fcmae pretrain --config {0}/config.yaml --out {0}"),
        ("fcmae pretrain a --overwrite", 1, "fcmae pretrain a --out {0}"),
        ("bash -c 'rm -rf b'", 1, "fcmae pretrain --config {0}/config.yaml --out {0}"),
        ("fcmae pretrain photos", 16, "fcmae pretrain photos --out {0}  # in 16 processes on 2 nodes, as before"),
    ],
)
def test_what_goes_on_is_a_command(run: Path, command: str, processes: int, shown: str) -> None:
    start = {"time": "2026-01-01T00:00:00+00:00", "command": command, "num_processes": processes}
    start["num_nodes"] = 2 if processes == 16 else 1
    (run / "environment.json").write_text(json.dumps([start]))
    said = status(ended(run, None))
    assert f"  {shown.format(run)}  # goes on" in said


def test_the_runs_below_a_folder_are_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain_run(Path("runs/b"))
    finetune_run(Path("runs/group/a"), 0.8)
    (Path("runs") / "damaged").mkdir()
    (Path("runs") / "damaged" / "config.yaml").write_bytes(b"\xff\x00")
    assert cli.main(["status"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["b", "pretrain"], ["group/a", "finetune"]]
    assert rows[1][5].startswith("balanced_accuracy 0.8")
    # A run's name stands for its path, though images are in a folder of that name.
    Path("b").mkdir()
    assert cli.main(["status", "b"]) == 0
    assert capsys.readouterr().out.startswith("runs/b: pretrain")


def test_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run: give the directory of one, or of runs"):
        status(tmp_path)


def test_a_run_that_one_may_only_read_has_the_state_that_its_log_tells(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = run / ".lock"
    lock.touch()
    before, opened = state_of(run), Path.open

    def refused(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if self == lock:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *more, **named)

    lock.chmod(0o444)
    assert state_of(run) == before
    monkeypatch.setattr(Path, "open", refused)
    assert state_of(run) == before != "running"


def test_a_comparison_tells_which_of_its_runs_is_running(tmp_path: Path) -> None:
    found = {
        "arms": [{"name": "scratch", "kind": "scratch"} | dict.fromkeys(("against", "network", "init", "license"))],
        "amounts": [{"labels": "10%", "num_labels": 2, "epochs": 1}],
        "num_train": 20, "num_test": 5, "num_classes": 2, "num_done": 0, "num_runs": 3, "notes": [], "scores": [],
        "command": "fcmae worth labelled",
    }  # fmt: skip
    (tmp_path / paired.FILE).write_text(json.dumps(found))
    run = finetune_run(tmp_path / "runs" / "scratch-10pct-0", 0.5)
    assert f"fcmae worth labelled --out {tmp_path}  # goes on" in status(tmp_path)
    with held(run):
        said = status(tmp_path)
        assert "running: scratch-10pct-0, epoch 3 of 3" in said and "goes on" not in said
    # Where it is, and not where it was begun.
    (tmp_path / paired.FILE).write_text(json.dumps(found | {"command": "fcmae worth labelled --out runs/x --seeds 2"}))
    assert f"fcmae worth labelled --out {tmp_path} --seeds 2  # goes on" in status(tmp_path)
    assert [found.name for found in find_runs(tmp_path)] == []


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("fcmae pretrain photos", "fcmae pretrain photos --out runs/photos-2"),
        ("fcmae pretrain photos --out runs/old --seed 1", "fcmae pretrain photos --out runs/photos-2 --seed 1"),
        ("fcmae pretrain photos --out=runs/old", "fcmae pretrain photos --out runs/photos-2"),
        ("fcmae worth labelled --out runs/old-worth", "fcmae worth labelled --out runs/old-worth"),
    ],
)
def test_a_run_that_was_moved_or_numbered_goes_on_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = pretrain_run(Path("runs/photos-2"))
    start = {"time": "2026-01-01T00:00:00+00:00", "command": command, "directory": str(tmp_path)}
    (run / "environment.json").write_text(json.dumps([start]))
    assert f"  {shown}  # goes on" in status(ended(run, None))


def test_runs_beside_a_comparison_are_found_from_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain_run(tmp_path / "first")
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / paired.FILE).write_text("{}")
    monkeypatch.chdir(tmp_path / "compared")
    assert [run.path for run in find_runs(Path(".."))] == [Path("../first")]


def test_a_path_that_is_no_utf_8_does_not_hide_how_a_run_was_started(run: Path) -> None:
    start = {"time": "2026-01-01T00:00:00+00:00", "command": "fcmae pretrain Bilder_gr\udcf6n", "directory": "/"}
    (run / "environment.json").write_text(json.dumps([start]))
    found = read_run(run, "run")
    assert found.starts[0]["command"] == start["command"] and not found.problems


def test_the_log_of_another_user_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pretrain_run(tmp_path / "run")
    (run / "environment.json").unlink()
    (run / "train.log").touch()
    opened = Path.open

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "train.log":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    assert "cut off" in status(tmp_path)


def test_a_table_of_runs_does_not_read_their_lists_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune_run(tmp_path / "tuned", 0.5)
    read = list[Path]()
    monkeypatch.setattr(Images, "load", read.append)
    assert "tuned" in status(tmp_path) and not read


def test_what_goes_on_elsewhere_begins_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, shown in (
        ("fcmae pretrain photos", f"fcmae pretrain photos --out {run}"),
        ("python -c x", f"fcmae pretrain --config {run / 'config.yaml'} --out {run}"),
    ):
        start = {"time": "2026-01-01T00:00:00+00:00", "command": command, "directory": str(run.parent)}
        (run / "environment.json").write_text(json.dumps([start]))
        assert f"  cd {run.parent} && {shown}  # goes on" in status(ended(run, None))
