import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import requires_minkowski

from fcmae import doctor
from fcmae.cli import main
from fcmae.doctor import Finding, diagnose
from fcmae.masked import build_fcmae
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS

ROOT = Path(__file__).parent.parent

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a module with this source before the installed one, for the Pythons that the doctor starts."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.syspath_prepend(modules)
    return lambda name, source: (modules / f"{name}.py").write_text(source) and None


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Writes a file of the container's limits."""
    monkeypatch.setattr("fcmae.data.cores.CGROUP", tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    return write


def set_free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    usage = SimpleNamespace(total=1e10, free=num_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def rows(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def find(name: str, out: Path = Path(), **options: Any) -> list[Finding]:
    """What one check finds."""
    return list(doctor.checks(out)[name](**options))


def test_this_machine_can_pretrain(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fcmae.cli", "doctor", "--quick", "--json", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert told["can_pretrain"] is True
    states = {row["name"]: row["state"] for row in told["findings"]}
    for name in ("Python", "packages", "torch", "torchvision", "timm", "accelerate", "disk", "memory"):
        assert states[name] in ("ok", "note"), name
    versions = {row["name"]: row["found"] for row in told["findings"]}
    assert versions["torch"] == torch.__version__
    assert not {"torch.compile", "processes"} & states.keys()  # --quick


def test_a_broken_torch_is_a_row_and_the_rest_is_still_told(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    assert main(["doctor", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "torch            broken   OSError: libcudart.so.13: cannot open shared object" in lines
    assert any(line.startswith("open files ") for line in lines)
    assert lines[-1].startswith("This machine cannot pretrain: mend torch, torchvision, timm")


def test_torch_and_torchvision_that_are_no_pair_are_told_apart_from_the_rest(fake: Fake) -> None:
    fake("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    found = rows(diagnose(quick=True))
    assert found["torch"].state == "ok" and found["accelerate"].state == "ok"
    pair = found["torchvision"]
    assert (pair.state, pair.needed) == ("broken", True)
    assert pair.found == "RuntimeError: operator torchvision::nms does not exist"
    assert "pip install --force-reinstall torch torchvision" in pair.mend
    assert (found["timm"].state, found["timm"].needed) == ("broken", True)  # it imports torchvision


def test_a_package_that_is_not_there_is_missing_not_broken(fake: Fake) -> None:
    fake("torch", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    found = rows(diagnose(quick=True))["torch"]
    assert (found.state, found.needed) == ("missing", True)


def test_a_package_that_kills_python_is_a_row_and_the_rest_is_still_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    command = [sys.executable, "-m", "fcmae.cli", "doctor", "--quick", "--json"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    found = {row["name"]: row for row in json.loads(done.stdout)["findings"]}
    assert (found["torch"]["state"], found["torch"]["needed"]) == ("broken", True)
    assert found["torch"]["found"] == "Python was killed by SIGABRT"
    assert found["Pillow"]["state"] == "ok" and "open files" in found


def test_a_broken_minkowski_engine_costs_pretraining_nothing(fake: Fake) -> None:
    fake("torch", "")
    fake("MinkowskiEngine", "raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    (found,) = find("MinkowskiEngine")
    assert (found.state, found.needed) == ("broken", False)
    assert found.found == "ImportError: undefined symbol: _ZN3c10 more"
    assert "make minkowski" in found.mend


@requires_minkowski
def test_an_installed_minkowski_engine_convolves() -> None:
    (found,) = find("MinkowskiEngine")
    assert found.state in ("ok", "note") and "a convolution runs on" in found.found


def test_minkowski_engine_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (found,) = doctor.checks(quick=True)["MinkowskiEngine"]()
    assert (found.state, found.found, found.needed) == ("missing", "not installed", False)
    assert found.mend.startswith("make minkowski")


def test_a_check_that_does_not_end_is_stopped(fake: Fake) -> None:
    fake("torch", "import time; time.sleep(60)")
    (found,) = find("torch", timeout_s=0.5)
    assert (found.state, found.needed, found.found) == ("broken", True, "it was not done after 0.5 s")


def test_without_a_compiler_torch_compile_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    (found,) = find("torch.compile")
    assert (found.state, found.needed) == ("missing", False)
    assert found.found == "there is no C++ compiler (g++)"
    assert "apt install g++" in found.mend


def test_two_processes_form_a_group() -> None:
    (found,) = find("processes")
    assert found.state == "ok"


def test_processes_without_a_network_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    (found,) = find("processes")
    assert (found.state, found.needed) == ("broken", False)
    assert "nowhere0" in found.found


@pytest.mark.parametrize(
    ("free", "state", "needed"), [(1e8, "broken", True), (1e9, "note", False), (1e10, "ok", False)]
)
def test_a_disk_must_hold_the_checkpoints_of_atto(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str, needed: bool
) -> None:
    set_free(monkeypatch, free)
    (found,) = find("disk", tmp_path / "not" / "yet")
    assert (found.state, found.needed) == (state, needed)
    assert f"{tmp_path}; a run's checkpoints take 0.348 GB for atto, 4.41 GB for base" in found.found


def test_a_place_that_may_not_be_looked_at_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, allowed = os.stat, os.access

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/closed/"):
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path, *args, **options)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and allowed(path, mode))
    (found,) = find("disk", tmp_path / "closed" / "runs")
    assert (found.state, found.needed) == ("broken", True)
    assert "closed cannot be written to" in found.found


def test_a_place_that_cannot_be_written_to_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = find("disk", tmp_path / "file")
    assert (found.state, found.needed) == ("broken", True)
    assert "file cannot be written to" in found.found


@pytest.mark.parametrize("variant", doctor.NUM_PARAMETERS)
def test_checkpoints_are_sized_by_the_models_parameters(variant: str) -> None:
    with torch.device("meta"):
        model = build_fcmae(Encoder(VARIANTS[f"convnextv2_{variant}"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == doctor.NUM_PARAMETERS[variant]


def test_a_containers_small_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    set_free(monkeypatch, 67e6)
    (found,) = find("/dev/shm")
    assert found.state == "note" and "--shm-size" in found.mend


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_with_too_little_memory_cannot_pretrain(cgroup: Fake, name: str) -> None:
    cgroup(name, "512000000\n")
    (found,) = find("memory")
    assert (found.state, found.needed) == ("broken", True)
    assert found.found.startswith("0.512 GB of 0.512 GB available in this container; the machine has ")


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n"])
def test_memory_that_others_use_is_only_noted(monkeypatch: pytest.MonkeyPatch, cgroup: Fake, limit: str) -> None:
    cgroup("memory.max", limit)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8e9, available=5e8))
    (found,) = find("memory")
    assert (found.state, found.needed, found.found) == ("note", False, "0.5 GB of 8 GB available")


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"cpu.max": "50000 100000\n"}, "note"),
        ({"cpu.max": "max 100000\n"}, "ok"),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "note"),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "ok"),
        ({}, "ok"),
    ],
)
def test_a_containers_share_of_the_cores_is_noted(cgroup: Fake, files: dict[str, str], state: str) -> None:
    for name, text in files.items():
        cgroup(name, text)
    (found,) = find("CPU")
    assert found.state == state
    assert ("the time of 0.5" in found.found) == (found.mend == "set OMP_NUM_THREADS=1") == (state == "note")


def test_packages_are_held_to_the_minimum_that_fcmae_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=99", "numpy>=1", "nowhere-to-be-found>=1", "other>=1; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: asked)
    missing, old = find("packages")
    assert (missing.state, missing.needed, missing.found) == ("missing", True, "nowhere-to-be-found>=1")
    assert missing.mend == "pip install 'nowhere-to-be-found>=1'"
    assert (old.state, old.needed) == ("note", False)
    assert old.found.startswith("torch is ") and old.found.endswith(", not >=99")


def test_a_pillow_without_libjpeg_turbo_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check", lambda name: name != "libjpeg_turbo")
    (found,) = find("Pillow")
    assert found.state == "note" and "built without libjpeg_turbo" in found.found


def test_the_environment_of_a_launcher_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = find("launcher")
    assert "RANK=1" in found.found and "WORLD_SIZE=2" in found.found


def test_a_check_that_fails_itself_is_a_row(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("torch", "raise ImportError")

    def fail() -> str:
        raise PermissionError("/proc is hidden")

    monkeypatch.setattr("platform.platform", fail)
    found = rows(diagnose(quick=True))
    assert found["Python"].found == "it could not be looked at: PermissionError: /proc is hidden"
    assert found["Python"].state == "broken" and "CPU" in found


def test_the_table_and_the_json_hold_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        Finding("Python", "ok", "3.11"),
        Finding("GPU", "note", "none " * 20, "slow training", "docker run --gpus all"),
        Finding("timm", "missing", "No module", "nothing can be pretrained", "pip install timm", needed=True),
    ]
    asked: list[tuple[Path, bool]] = []
    monkeypatch.setattr(doctor, "diagnose", lambda out, quick: (asked.append((out, quick)), iter(findings))[1])
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 24)))
    for words in (["doctor", "--out", "runs"], ["doctor", "--json", "--quick"]):
        assert main(words) == 1
    assert asked == [(Path("runs"), False), (Path(), True)]
    table, _, told = capsys.readouterr().out.partition("\n{")
    assert [Finding(**row) for row in json.loads("{" + told)["findings"]] == findings
    assert table.splitlines() == [
        "Python           ok       3.11",
        "GPU              note     none none none none none none none none none none none",
        "                          none none none none none none none none none",
        "                          costs: slow training",
        "                          mend: docker run --gpus all",
        "timm             missing  No module",
        "                          costs: nothing can be pretrained",
        "                          mend: pip install timm",
        "",
        "This machine cannot pretrain: mend timm.",
    ]
