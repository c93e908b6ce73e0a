"""The container's files name what exists, and MinkowskiEngine's installer says what it lacks.

No image is built here: there may be no Docker. Each RUN step that does more than prepare the system is one of the
scripts in docker/, and .ci/run runs those in a fresh environment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from fcmae import options
from fcmae.cli import main
from fcmae.config import PretrainConfig

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
INSTALLER = DOCKER / "install_minkowski.sh"
TOOLS = Path(sys.executable).parent
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
# A torch that imports at once, and has what the installer asks of it.
TORCH = """
__version__ = "2.15.0"
class version:
    cuda = {cuda!r}
class cuda:
    def is_available():
        return False
"""


def instructions(word: str) -> list[str]:
    return re.findall(rf"^{word} (.*)$", DOCKERFILE.replace("\\\n", " "), re.M)


def in_context(path: str) -> bool:
    """Whether .dockerignore lets this path through: the last line that names it, or a folder of it, decides."""
    names = [path, *map(str, Path(path).parents)]
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and any(fnmatch(name, line.removeprefix("!")) for name in names):
            kept = line.startswith("!")
    return kept


def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([TOOLS / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_run_step_prepares_the_system_or_is_a_script_that_ci_runs() -> None:
    scripts = set()
    for step in instructions("RUN"):
        if re.fullmatch(r"(apt-get .*|useradd .*)", step):
            assert subprocess.run(["bash", "-nc", step]).returncode == 0
        else:
            found = re.fullmatch(r"(?:--mount=\S+ )?(?:\w+=\S+ )?(?:/opt/fcmae/)?(docker/\w+\.sh) \w+", step)
            assert found, f"RUN {step} is no script of docker/"
            scripts.add(found[1])
    assert scripts == {"docker/install_fcmae.sh", "docker/install_minkowski.sh"}
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK)
        assert script in (ROOT / ".ci" / "run").read_text()


def test_the_context_holds_the_package_and_nothing_private() -> None:
    for path in (".git/config", ".venv/bin/python", "runs/first/config.yaml", "data/a.jpg", "tests/test_docker.py"):
        assert not in_context(path), path
    assert not in_context("fcmae/__pycache__/cli.cpython-311.pyc")
    assert in_context("fcmae/layouts/packed.py")


def test_what_the_dockerfile_copies_makes_the_package(tmp_path: Path) -> None:
    image = tmp_path / "image"
    for *sources, target in map(str.split, instructions("COPY")):
        for source in map(ROOT.joinpath, sources):
            for path in source.rglob("*") if source.is_dir() else [source]:
                if path.is_file() and in_context(str(path.relative_to(ROOT))):
                    place = image / target / (path.relative_to(source) if source.is_dir() else path.name)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, place)
    assert {"install_fcmae.sh", "install_minkowski.sh"} == {path.name for path in (image / "docker").iterdir()}
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(build, cwd=image, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fcmae/cli.py", "fcmae/configs/pretrain_cpu.yaml"} <= names


def test_the_entry_point_and_the_health_check_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions("ENTRYPOINT") == ['["fcmae"]']
    (check,) = instructions("HEALTHCHECK")
    program, command, *flags = json.loads(check[check.index("[") :])
    assert (program, command) == ("fcmae", "doctor")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert set(flags) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("service", ["pretrain", "pretrain-cuda"])
def test_compose_pretrains_on_data_that_it_cannot_write(service: str) -> None:
    described = compose()[service]
    command, *flags = described["command"]
    assert command == "pretrain"
    config = options.load(PretrainConfig, flags, prog="fcmae pretrain")
    assert str(config.data.path[0] if isinstance(config.data.path, list) else config.data.path) == "/data"
    assert str(config.out).startswith("/runs/")
    assert any(volume.endswith(":/data:ro") for volume in described["volumes"])
    assert f"AS {described['build']['target']}\n" in DOCKERFILE
    assert (DOCKER / described["build"]["context"] / described["build"]["dockerfile"]).exists()


def test_compose_starts_a_tensorboard_that_knows_its_flags() -> None:
    described = compose()["tensorboard"]
    assert described["entrypoint"] == ["tensorboard"]
    usage = subprocess.run([TOOLS / "tensorboard", "--help"], capture_output=True, text=True).stdout
    for flag in (word for word in described["command"] if word.startswith("--")):
        assert f"  {flag} " in usage, flag


def install(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("PYTHON", "MINKOWSKI_DEVICE", "CXX", "CUDA_HOME")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**outside, "PYTHON": str(python), **environment}
    return subprocess.run([INSTALLER, *arguments], capture_output=True, text=True, env=environment)


def environment(folder: Path, **modules: str) -> Path:
    """The Python of a new virtual environment that has these modules."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, code in modules.items():
        (packages / f"{name}.py").write_text(code)
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("modules", "device", "sentence"),
    [
        ({}, "cpu", "has no pip: run "),
        ({"pip": ""}, "cpu", r"cannot import torch \(No module named 'torch'\): install it there"),
        ({"pip": "", "torch": '__version__ = "2.1.0"'}, "cpu", "torch 2.1.0 is too old: install 2.9 or newer"),
        ({"pip": "", "torch": TORCH.format(cuda=None)}, "cuda", "built without CUDA: install a CUDA build of it"),
        ({"pip": "", "torch": TORCH.format(cuda="12.8")}, "cuda", "/nowhere/bin/nvcc is not there: install CUDA 12.8"),
        (
            {"pip": "", "torch": TORCH.format(cuda="12.8")},
            "auto",
            r"compiler nocc is not found: .*apt install g\+\+",
        ),
        ({}, "tpu", "the device is 'tpu': cpu, cuda or auto"),
    ],
)
def test_the_installer_says_what_is_missing(
    tmp_path: Path, modules: dict[str, str], device: str, sentence: str
) -> None:
    python = environment(tmp_path / "venv", **modules)
    compiler = {"CXX": "nocc"} if device == "auto" else {}
    done = install(python, device, CUDA_HOME="/nowhere", FCMAE_CACHE=str(tmp_path / "cache"), **compiler)
    assert done.returncode == 2
    assert re.fullmatch(rf"install_minkowski\.sh: .*{sentence}.*\n", done.stderr), done.stderr
    assert not (tmp_path / "cache").exists()


def test_the_installer_wants_a_python_that_runs(tmp_path: Path) -> None:
    done = install(tmp_path / "python")
    assert done.returncode == 2
    assert done.stderr == f"install_minkowski.sh: {tmp_path / 'python'} does not run: name your Python in PYTHON\n"


def test_the_installer_explains_its_variables() -> None:
    done = install(Path(sys.executable), "--help")
    assert done.returncode == 0
    code = INSTALLER.read_text().partition("set -euo pipefail")[2]
    for name in ("PYTHON", "MINKOWSKI_DEVICE", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "FCMAE_CACHE"):
        assert re.search(rf"^  {name} ", done.stdout, re.M)
        assert f"${{{name}:-" in code


def test_an_edit_that_matches_nothing_fails(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("other\n")
    functions = re.search(r"^fail\(\) .*?^}\n.*?^edit\(\) .*?^}\n", INSTALLER.read_text(), re.M | re.S)
    assert functions
    for expression, status in (("s/other/mended/", 0), ("s/other/again/", 2)):
        code = f"{functions[0]} edit source '{expression}'"
        assert subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True).returncode == status
    assert (tmp_path / "source").read_text() == "mended\n"


def test_a_second_run_takes_the_wheel_of_the_first(tmp_path: Path) -> None:
    if find_spec("MinkowskiEngine") is None and os.environ.get("FCMAE_REQUIRE_MINKOWSKI") != "1":
        pytest.skip("MinkowskiEngine is not built: make minkowski")
    python = environment(tmp_path)
    # What is installed here is seen there, and what is installed there stays there.
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = install(python, "cpu", CXX="nocc")  # to build it would fail
    assert done.returncode == 0, f"make minkowski comes first: {done.stderr}"
    assert (packages / "MinkowskiEngine").is_dir()
    assert "cpu: weight gradient against torch's conv2d: largest error" in done.stdout
