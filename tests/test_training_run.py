"""A directory holds one run, of one process at a time, and nothing that is not the run's is ever lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from runs import PROCESSES, config

import fcmae
from fcmae import options
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.training import messages
from fcmae.training.launch import make_accelerator
from fcmae.training.records import record_start
from fcmae.training.run import RunDirectory

OWN = ("train.log", "metrics.jsonl", "files.json", "val_files.json", "checkpoints/step-00000001/checkpoint.json")

pytestmark = pytest.mark.usefixtures("forgotten")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def make_run(out: Path, **changed: object) -> PretrainConfig:
    """A run with a checkpoint in `out`."""
    cfg = config(Path("photos"), out, **changed)
    with RunDirectory(cfg).open(is_main=True):
        for name in OWN:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("")
    return cfg


def test_the_settings_are_written_with_the_kind_of_run(tmp_path: Path) -> None:
    cfg = make_run(tmp_path / "deep" / "out")
    path = tmp_path / "deep" / "out" / "config.yaml"
    assert path.read_text().startswith(f"# fcmae pretrain {fcmae.__version__}\n")
    assert options.read(PretrainConfig, path) == cfg


def test_processes_that_were_given_other_settings_or_find_another_step_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(config(Path("photos"), tmp_path))

    def agree(kind: str = "pretrain", step: int = 0, precision: str = "no", **changed: object) -> None:
        other = options.flat(config(Path("photos"), tmp_path, **changed)) | {"command": kind, "precision": precision}
        monkeypatch.setattr("fcmae.training.run.gather_object", lambda own: [*own, (other, step)])
        run.agree(make_accelerator(run.cfg))

    agree(data__num_workers=3)
    with pytest.raises(ValueError, match=r"^seed: process 1 has 5 and process 0 0: start all with the same settings$"):
        agree(seed=5)
    with pytest.raises(ValueError, match=r"^command: process 1 has segment and process 0 pretrain"):
        agree("segment")
    with pytest.raises(ValueError, match=r"^precision: process 1 has bf16 and process 0 no"):  # what auto is there
        agree(precision="bf16")
    with pytest.raises(ValueError, match="process 1 finds step 7 there and process 0 step 0: put it on storage that"):
        agree(step=7)


def test_looking_at_a_directory_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(config(Path("photos"), tmp_path / "out"))
    assert not run.exists
    assert run.resume_from is None
    assert not list(tmp_path.iterdir())


def test_the_same_settings_find_the_run_and_its_newest_checkpoint(tmp_path: Path) -> None:
    cfg = make_run(tmp_path)
    run = RunDirectory(cfg)
    assert run.exists
    assert run.resume_from == tmp_path / "checkpoints" / "step-00000001"


def test_a_directory_with_anything_else_is_refused_and_stays(tmp_path: Path) -> None:
    cfg = config(Path("photos"), tmp_path)
    # config.yaml is a common name: one of another program makes no run.
    for name, text in (("thesis.tex", "years of work"), ("config.yaml", "seed: 1\n"), ("config.yaml", "")):
        (tmp_path / name).write_text(text)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="is not empty and holds no run of fcmae: give another directory"):
                RunDirectory(cfg.model_copy(update={"overwrite": overwrite}))
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="holds no run of fcmae"):
        RunDirectory(config(Path("photos"), tmp_path / "out"))


def test_what_a_run_left_that_was_killed_before_it_began_is_no_hindrance(tmp_path: Path) -> None:
    for name in (".lock", ".tmp-config.yaml"):
        (tmp_path / name).write_text("")
    make_run(tmp_path)
    assert names(tmp_path) == {*OWN, "config.yaml", "environment.json", ".lock"}


def test_lists_of_images_go_before_a_run_says_that_they_lie_elsewhere(tmp_path: Path) -> None:
    make_run(tmp_path)
    for same, places in ((True, ["photos"]), (False, ["elsewhere"])):
        (tmp_path / "files.json").touch()
        cfg = config(Path("photos"), tmp_path)
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": places})})
        with RunDirectory(cfg).open(is_main=True):  # cut off before it lists them anew
            pass
        assert (tmp_path / "files.json").exists() == same


def test_a_directory_that_is_looked_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    tried = list[object]()

    def lock(*args: object) -> None:
        tried.append(args)
        if len(tried) < 3:
            raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", lock)
    with RunDirectory(config(Path("photos"), tmp_path)).open(is_main=True):
        assert len(tried) == 3


@pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl", "bad_files.txt"])
def test_no_file_elsewhere_is_written_to_by_a_link(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "thesis.csv").write_text("mine")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "thesis.csv")
    with pytest.raises(ValueError, match=f"{name} is a link to a file, .*thesis.csv, which the run would change"):
        RunDirectory(config(Path("photos"), tmp_path / "run"))
    assert (tmp_path / "thesis.csv").read_text() == "mine"


def test_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(ValueError, match=r"holds another kind of run \(fcmae pretrain .*--overwrite"):
        RunDirectory(FinetuneConfig.model_validate({"out": tmp_path, "data": {"path": "x"}, "model": {"init": "run"}}))


def test_every_other_setting_that_matters_is_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        RunDirectory(config(Path("photos"), tmp_path, seed=5, optim__base_lr=0.1))
    _, *lines = str(error.value).splitlines()
    assert [line.strip() for line in lines] == [
        "seed: the run has 0, this command 5",
        "optim.base_lr: the run has 0.5, this command 0.1",
    ]


def test_settings_that_only_say_where_and_how_fast_may_change(tmp_path: Path) -> None:
    make_run(tmp_path)
    changed = config(Path("elsewhere"), tmp_path, data__num_workers=3, checkpoint__keep=7, hours=9)
    run = RunDirectory(changed)
    assert run.exists
    assert run.kept("seed", "model.variant")
    assert not run.kept("seed", "data.path")
    with run.open(is_main=True):
        pass
    assert "hours = 9 changes nothing: the run goes on to its" in (tmp_path / "train.log").read_text()
    # The settings in force are those in the file.
    assert options.read(PretrainConfig, tmp_path / "config.yaml") == changed
    assert RunDirectory(changed).kept("data.path")
    assert set(OWN) - {"files.json", "val_files.json"} < names(tmp_path)  # they list what lay elsewhere


def test_overwrite_deletes_the_run_s_own_files_only(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("notes.txt", "plots/mine.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    run = RunDirectory(config(Path("photos"), tmp_path, overwrite="true", seed=5))
    assert run.resume_from is None
    with run.open(is_main=True):
        pass
    assert names(tmp_path) == {"notes.txt", "plots/mine.png", "config.yaml", "environment.json", "train.log", ".lock"}


@pytest.mark.parametrize("restarted", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_what_is_to_be_deleted_is_deleted_at_the_start_that_said_so_alone(
    tmp_path: Path, restarted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("sys.argv", ["fcmae", "pretrain", "photos", "--overwrite", "TRUE", "--out", "x", "-overwrite"])
    cfg = config(Path("photos"), tmp_path, overwrite="true")
    with RunDirectory(cfg).open(is_main=True):
        pass
    assert starts(tmp_path)[-1]["command"] == "fcmae pretrain photos --out x"
    assert not options.read(PretrainConfig, tmp_path / "config.yaml").overwrite
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5}\n')
    monkeypatch.setenv(restarted, "0")
    assert not RunDirectory(cfg).exists
    monkeypatch.setenv(restarted, "1")
    assert RunDirectory(cfg).exists
    assert messages.same_command(cfg) == "the same command without --overwrite"


def test_a_job_that_was_queued_again_deletes_what_it_has_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its first command took all of its time, and this is the second."""
    make_run(tmp_path)
    known = (tmp_path / "environment.json").read_text()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    cfg = config(Path("photos"), tmp_path, overwrite="true")
    for unknown in ("", known.replace('"job"', '"other"')):  # by whom the run was started
        (tmp_path / "environment.json").write_text(unknown)
        assert RunDirectory(cfg).exists
    (tmp_path / "environment.json").write_text(known)
    assert not RunDirectory(cfg).exists
    with RunDirectory(cfg).open(is_main=True):
        pass
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5}\n')
    assert RunDirectory(cfg).exists


def test_nothing_is_deleted_under_a_launcher_that_counts_not_all_of_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that comes has torchrun start all workers anew, the first time as the first time."""
    make_run(tmp_path)
    before = names(tmp_path)
    cfg = config(Path("photos"), tmp_path, overwrite="true")
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="overwrite: a launcher of several nodes gives it again"):
        RunDirectory(cfg)
    assert names(tmp_path) == before
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert not RunDirectory(cfg).exists


def test_an_overwrite_cut_off_anywhere_leaves_the_old_run_with_all_its_checkpoints_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(BaseException):
        pass

    operations = 0

    def counted(function: object) -> object:
        def call(*args: object, **options: object) -> object:
            nonlocal operations
            operations += 1
            if operations == limit:
                raise Cut
            return function(*args, **options)  # type: ignore[operator]

        return call

    for limit in range(1, 100):
        out = tmp_path / str(limit)
        old = make_run(out)
        (out / "notes.txt").write_text("mine")
        new = config(Path("photos"), out, overwrite="true", seed=5)
        operations = 0
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "replace"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            patch.setattr(os, "unlink", counted(os.unlink))  # what shutil.rmtree calls
            patch.setattr(os, "rmdir", counted(os.rmdir))
            try:
                with RunDirectory(new).open(is_main=True):
                    break
            except Cut:
                pass
        assert set(OWN[-1:]) <= names(out) or not (out / "checkpoints").exists()
        assert RunDirectory(old).path == out  # still taken for a run, not for somebody's files
        with RunDirectory(new).open(is_main=True):
            assert names(out) == {"config.yaml", "environment.json", "train.log", ".lock", "notes.txt"}
    assert limit > 10  # it was cut in many places


def hold(out: str, opened: object, release: object) -> None:
    with RunDirectory(config(Path("photos"), Path(out))).open(is_main=True):
        opened.set()  # type: ignore[attr-defined]
        release.wait(60)  # type: ignore[attr-defined]


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    opened, release = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(str(tmp_path), opened, release))
    process.start()
    assert opened.wait(60)
    run = RunDirectory(config(Path("photos"), tmp_path))
    with pytest.raises(ValueError, match="is in use by another process"), run.open(is_main=True):
        pass
    process.kill()  # a lock that outlived its process would need a hand to remove it
    process.join()
    with run.open(is_main=True):
        pass


def test_a_disk_without_locks_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    sentence = rf"^out = {tmp_path} lies where files cannot be locked \(No locks available\): mount it with locks"
    with pytest.raises(OSError, match=sentence), RunDirectory(config(Path("photos"), tmp_path)).open(True):
        pass


def test_a_run_that_was_made_since_the_first_look_is_not_deleted(tmp_path: Path) -> None:
    cfg = config(Path("photos"), tmp_path)
    early = RunDirectory(cfg)
    make_run(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"), early.open(is_main=True):
        pass
    assert set(OWN) < names(tmp_path)


def test_other_processes_of_a_run_write_nothing(tmp_path: Path) -> None:
    level = logging.getLogger("fcmae").level
    with RunDirectory(config(Path("photos"), tmp_path)).open(is_main=False):
        pass
    logging.getLogger("fcmae").setLevel(level)
    assert not names(tmp_path)


def test_the_log_is_on_the_terminal_and_in_the_file_which_ends_with_what_stopped_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(config(Path("photos"), tmp_path))
    with pytest.raises(FloatingPointError), run.open(is_main=True):
        logging.getLogger("fcmae.somewhere").info("größer")
        raise FloatingPointError("step 3: the loss is nan")
    assert capsys.readouterr().err.endswith(" größer\n")  # the command itself prints what it raised
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    told = "failed: FloatingPointError: step 3: the loss is nan; there is no checkpoint yet; start again with another "
    told += "--out, a lower optim.base_lr, or optim.clip_grad 1"
    assert [line.split(" ", 2)[2] for line in lines] == ["größer", told]
    assert not logging.getLogger("fcmae").handlers


def test_a_run_that_was_refused_before_its_first_line_takes_other_settings(tmp_path: Path) -> None:
    with RunDirectory(config(Path("photos"), tmp_path)).open(is_main=True):
        pass
    corrected = config(Path("photos"), tmp_path, seed=5)
    with RunDirectory(corrected).open(is_main=True):
        pass
    assert options.read(PretrainConfig, tmp_path / "config.yaml") == corrected


def starts(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((path / "environment.json").read_text())
    return found


def test_each_start_says_what_it_ran_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/fcmae", "pretrain", "--data.path", "my photos", "--seed", "0"])
    make_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/opt/fcmae/cli.py", "pretrain"])  # python -m fcmae.cli
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_run(tmp_path)
    first, second = starts(tmp_path)
    assert [first["command"], second["command"]] == [
        "fcmae pretrain --data.path 'my photos' --seed 0",
        "fcmae pretrain",
    ]
    assert [first["num_processes"], second["num_processes"]] == [1, 2]
    assert first["versions"]["fcmae"] == fcmae.__version__
    assert first["versions"].keys() == {"fcmae", "torch", "timm", "accelerate", "python"}
    assert (first["device"], first["device_name"]) == ("cpu", first["cpu"])
    assert first["cores"] >= 1 and first["directory"] == str(Path.cwd())
    assert datetime.fromisoformat(first["time"]) <= datetime.fromisoformat(second["time"])


@pytest.mark.parametrize("content", ["", "{", "{}", "[1"])
def test_a_record_of_starts_that_cannot_be_read_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    record_start(tmp_path, cpu=True)
    assert len(starts(tmp_path)) == 1


def test_an_overwritten_run_forgets_its_starts_and_what_was_found_of_it_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in (
        "evaluation/run/evaluation.json",
        "evaluation/table.md",
        "analysis/channels.png",
        "analysis/mine.ipynb",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the old run")
    with RunDirectory(config(Path("photos"), tmp_path, overwrite="true")).open(is_main=True):
        pass
    assert len(starts(tmp_path)) == 1
    assert not (tmp_path / "evaluation").exists()
    assert [path.name for path in (tmp_path / "analysis").iterdir()] == ["mine.ipynb"]


def test_lines_that_find_no_space_in_the_log_or_no_terminal_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make_run(tmp_path)
    (tmp_path / "train.log").unlink()
    (tmp_path / "train.log").symlink_to("/dev/full")
    with RunDirectory(config(Path("photos"), tmp_path)).open(is_main=True):
        logging.getLogger("fcmae").info("seen")
        monkeypatch.setattr(messages.tqdm, "write", gone)
        logging.getLogger("fcmae").info("lost")
    error = capsys.readouterr().err
    assert "seen" in error and "lost" not in error and "Error" not in error


def test_what_a_removal_that_was_cut_off_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / ".tmp-checkpoints")
    with RunDirectory(config(Path("photos"), tmp_path)).open(is_main=True):
        assert not (tmp_path / ".tmp-checkpoints").exists()


def test_a_run_that_went_on_since_the_first_look_is_not_trained_from_the_wrong_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    early = RunDirectory(config(Path("photos"), tmp_path))
    (tmp_path / "checkpoints" / "step-00000099").mkdir(parents=True)
    with pytest.raises(ValueError, match="in use by another process"), early.open(is_main=True):
        pass
    with RunDirectory(config(Path("photos"), tmp_path)).open(is_main=True):
        pass


def test_settings_that_could_not_be_read_again_are_refused(tmp_path: Path) -> None:
    cfg = config(Path("photos"), tmp_path / "run")
    many = [f"/data/shards/photographs-of-something-{number:08}.tar" for number in range(6000)]
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": many})})
    with pytest.raises(ValueError, match=r"data\.path has too many places .* put quotes round the pattern"):
        RunDirectory(cfg)
    assert not (tmp_path / "run").exists()


def test_numbers_beside_a_copied_configuration_are_no_runs(tmp_path: Path) -> None:
    """A config.yaml that was copied to begin the next experiment, where somebody's metrics.jsonl lies."""
    cfg = config(Path("photos"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(f"# fcmae pretrain 0.1.0\n{options.dump(cfg)}")
    (tmp_path / "out" / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"has a config\.yaml and metrics\.jsonl, but no run that can go on"):
        RunDirectory(cfg)
