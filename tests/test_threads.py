"""How threads wait: set before torch is there, by how busy the cores are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import runs
from conftest import requires_time

from fcmae import threads
from fcmae.cli import main

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nobody has set anything and torch is not loaded."""
    monkeypatch.setattr(threads.os, "environ", {k: v for k, v in os.environ.items() if k not in threads.SETTINGS})
    monkeypatch.delitem(sys.modules, "torch")


def set_busy(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(threads, "busy", lambda: share)


@pytest.mark.parametrize(
    ("share", "setting"),
    [(0.0, "GOMP_SPINCOUNT=10000"), (0.2, "GOMP_SPINCOUNT=10000"), (0.5, "OMP_WAIT_POLICY=PASSIVE")],
)
def test_threads_spin_a_little_on_a_quiet_machine_and_sleep_on_a_busy_one(
    fresh: None, monkeypatch: pytest.MonkeyPatch, share: float, setting: str
) -> None:
    set_busy(monkeypatch, share)
    assert threads.prepare() == f"{setting}, as other processes use {share:.0%} of the cores"
    assert threads.in_force() == setting
    assert threads.prepare() == f"{setting} is set"  # in the processes that it starts too


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_the_user_has_set_stays(fresh: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_busy(monkeypatch, 1.0)
    threads.os.environ[name] = "7"
    before = dict(threads.os.environ)
    assert threads.prepare() == f"{name}=7 is set"
    assert threads.os.environ == before


def test_nothing_is_set_when_it_would_come_too_late(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_busy(monkeypatch, 1.0)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert threads.prepare() == "nothing, as torch is loaded already"
    assert threads.in_force() == ""


def test_processes_of_one_launcher_are_no_strangers(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_busy(monkeypatch, 1.0)
    threads.os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert threads.prepare().startswith("GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("idle", "own", "share"),
    [
        ((1.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 0.0, 0.5),  # one of two cores is taken
        ((0.0, 0.0), 0.0, 1.0),
        ((0.0, 1.0), 1.0, 0.0),  # by this process
        ((0.25, 0.25), 0.5, 0.5),
        ((1.1, 1.1), 0.0, 0.0),  # the system counts in ticks
    ],
)
def test_busy_is_what_is_neither_idle_nor_our_own(
    monkeypatch: pytest.MonkeyPatch, idle: tuple[float, float], own: float, share: float
) -> None:
    """In a second of two cores, of which each waits for a disk in half of what it idles; a third is not for us."""
    clock = SimpleNamespace(now=0.0)

    def times(percpu: bool) -> list[SimpleNamespace]:
        cores = [SimpleNamespace(idle=clock.now * each / 2, iowait=clock.now * each / 2) for each in idle]
        return [*cores, SimpleNamespace(idle=0.0, iowait=0.0)]

    def used(share: float, *children: SimpleNamespace) -> SimpleNamespace:
        times = lambda: (clock.now * share, 0.0, 0.0, 0.0, 0.0)  # noqa: E731
        return SimpleNamespace(cpu_times=times, children=lambda recursive: list(children))

    # A data worker has half of what is our own.
    monkeypatch.setattr(psutil, "Process", lambda: used(own / 2, used(own / 2)))
    ticks = {"perf_counter": lambda: clock.now, "sleep": lambda s: setattr(clock, "now", 1.0)}
    monkeypatch.setattr(threads, "time", SimpleNamespace(**ticks))
    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert threads.busy() == pytest.approx(share)


def test_a_real_sample_is_a_share() -> None:
    assert 0 <= threads.busy(0.02) <= 1


def test_commands_that_compute_prepare_before_torch_and_no_others() -> None:
    """Whatever a command line says that is refused at last: torch is loaded with the setting in its environment."""
    code = """
import sys
from fcmae import cli, threads
seen = []
threads.prepare = lambda: seen.append("torch" in sys.modules)
cli.main(["evaluate", "nowhere", "--data", "nowhere"])
cli.main(["configs"])
try:
    cli.main(["pretrain", "--help"])
except SystemExit:
    pass
print(seen, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[False] True", done.stderr


def test_the_benchmark_times_each_setting_on_a_quiet_and_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = import_module("threads")
    asked: list[tuple[str, int]] = []

    def timed(setting: str, argv: list[str]) -> tuple[float, str]:
        asked.append((setting, len(psutil.Process().children())))
        return float(len(asked)), setting

    monkeypatch.setattr(script, "in_process", timed)
    path = tmp_path / "threads.json"
    script.main(["--settings", "default", "prepare", "--repeats", "3", "--busy", "2", "--json", str(path)])
    others = asked[0][1]
    assert asked == 3 * [(n, others + busy) for busy in (0, 2) for n in ("default", "prepare")]
    assert len(psutil.Process().children()) == others
    found = json.loads(path.read_text())["results"]
    assert found["quiet"]["prepare"]["images_per_s"] == [2, 6, 10] and found["busy"]["default"]["median"] == 7
    rows = [line.split("|")[1:] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["quiet", "default", "5.0"],
        ["quiet", "prepare", "6.0"],
        ["busy", "default", "7.0"],
        ["busy", "prepare", "8.0"],
    ]


@requires_time
def test_the_benchmark_times_pretraining_in_a_process_under_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # of this process; not of that
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    speed, did = import_module("threads").in_process("prepare", ["--seconds", "0.01", "--batch", "2", "--size", "64"])
    assert speed > 0 and did.endswith("of the cores")


@pytest.mark.parametrize("share", [0.1, 0.52])
def test_a_run_says_at_its_start_that_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float
) -> None:
    set_busy(monkeypatch, share)
    images = runs.write_images(tmp_path / "photos")
    assert main(["pretrain", *runs.flags(images, tmp_path / "run", epochs=1, optim__warmup_epochs=0)]) == 0
    runs.forget_accelerator()
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert sum("other processes use 52 % of the cores" in line for line in lines) == (share > 0.5)
    assert sum("other processes" in line for line in lines) == (share > 0.5)


def test_doctor_names_the_setting_of_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from fcmae import doctor

    set_busy(monkeypatch, 0.52)
    monkeypatch.setattr(threads, "in_force", lambda: "")
    (found,) = doctor.checks()["threads"]()
    assert (found.state, found.needed) == ("note", False)
    assert found.found == "OMP_WAIT_POLICY=PASSIVE for a run that starts now; other processes use 52% of the cores"
    assert "end other programs" in found.mend
    set_busy(monkeypatch, 0.01)
    monkeypatch.setattr(threads, "in_force", lambda: "GOMP_SPINCOUNT=7")
    (found,) = doctor.checks()["threads"]()
    assert (found.state, found.found) == ("ok", "GOMP_SPINCOUNT=7, as set; other processes use 1% of the cores")


def test_the_command_says_what_is_wrong_without_waiting_for_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nowhere"]) == 2
    assert "data" in capsys.readouterr().err
