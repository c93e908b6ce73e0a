"""README.md keeps its word: its commands and Python run, its tree, links and targets exist.

The commands run in the order of the page, in one folder, on a few tiny images, and then the Python. What makes them
small is SMALL, whose flags take the place of those that the page prints, and of its settings in Python; accelerate
starts two processes, which --device cpu keeps on the CPU. Commands that install (INSTALLS) are not run: their targets
and extras are looked up.
"""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from fcmae import api
from fcmae.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {"--epochs": "1", "--batch_size": "4", "--device": "cpu", "--data.num_workers": "0"}
LAUNCH = {"--num_processes": "2"}
# What these commands do in full is for their own tests; these flags keep them short here.
QUICK = {"doctor": ["--quick"], "verify": ["--backend", "packed"], "bench": ["--vary", "none", "--seconds", "0.1"]}
INSTALLS = ("make", "pip", "source", "git")


def blocks(language: str) -> list[str]:
    return [text for found, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if found == language]


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines() if line]


def with_flags(words: list[str], flags: dict[str, str]) -> list[str]:
    """The command with each flag given this value, in place of the one it has or at its end."""
    words = list(words)
    for flag, value in flags.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def write_images(folder: Path, count: int, size: tuple[int, int], mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the page names, and the scripts of a clone."""
    write_images(tmp_path / "photos", 6, (60, 50))
    write_images(tmp_path / "small", 6, (32, 32))
    write_images(tmp_path / "grey", 6, (60, 50), "L")
    write_images(tmp_path / "new", 2, (60, 50))
    for name in ("cat", "dog"):
        write_images(tmp_path / "labelled" / name, 4, (50, 60))
    (tmp_path / "bands").mkdir()
    for i in range(6):
        np.save(tmp_path / "bands" / f"{i}.npy", np.random.default_rng(i).random((40, 40, 4), dtype=np.float32))
    for script in ("pretrain.py", "finetune.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_fcmae(words: list[str]) -> None:
    """Run in this process, which has torch loaded; `> FILE` at the end takes the output."""
    output = None
    if ">" in words:
        words, (_, output) = words[:-2], words[-2:]
    if words[0] in ("pretrain", "finetune", "bench") and "--help" not in words:
        words = with_flags(words, SMALL)
    with contextlib.ExitStack() as stack:
        if output is not None:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(output).open("w"))))
        try:
            status = main(words)
        except SystemExit as stopped:  # --help and --print-config
            status = stopped.code or 0
        finally:  # accelerate keeps the devices of the first run of a process
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    assert status == 0, shlex.join(words)


def test_the_commands_and_the_python_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, small = api._settings, {flag.removeprefix("--"): value for flag, value in SMALL.items()}
    monkeypatch.setattr(api, "_settings", lambda model, given, *rest: made(model, given | small, *rest))
    ran = set()
    for words in commands():
        if words[0] == "fcmae":
            run_fcmae(words[1:] + QUICK.get(words[1], []))
            ran.add(words[1])
        else:
            assert words[0] in (*INSTALLS, "accelerate"), f"README runs {words[0]}, which this test does not know"
    assert ran == {
        *("pretrain", "convert", "finetune", "predict", "stats", "configs", "doctor", "verify", "bench"),
        *("evaluate", "embed", "analyze", "report"),
    }
    for block in blocks("python"):
        exec(block, {})
    assert (folder / "new.csv").read_text().startswith("path,")
    assert list((folder / "runs" / "try" / "reconstructions").glob("*.png"))


def test_the_commands_for_several_gpus_run_on_two_cpu_processes(folder: Path) -> None:
    launched = [words for words in commands() if words[0] == "accelerate"]
    assert launched
    for _, launch, *words in launched:
        words = with_flags(with_flags(words, LAUNCH), SMALL)
        line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", launch, *words]
        done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert "2 x cpu" in done.stderr


def test_the_installing_commands_name_what_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert {"demo", "test"} <= set(targets)
    for target in (*targets, *re.findall(r"`make (\w+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.M), f"README says make {target}"


def test_the_tree_names_every_file_and_nothing_else() -> None:
    tree = next(block for block in blocks("") if "fcmae/\n" in block)
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else (name if name.endswith("/") else "")
        path = name if folder == name else folder + name
        assert (ROOT / path).exists(), f"the tree names {path}"
        named.add(path.rstrip("/"))
    package = {path for path in (ROOT / "fcmae").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {str(path.relative_to(ROOT)) for path in package} - {"fcmae/__init__.py"} <= named


def test_links_to_files_and_names_of_configurations_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"\b(?:pretrain|finetune)_(?:[a-z]+_)*[a-z]+\b", README):
        assert (ROOT / "configs" / f"{name}.yaml").exists(), name
    for path in re.findall(r"`((?:tests|docs|benchmarks|configs|fcmae)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path


def test_the_figure_is_what_its_script_draws(tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text((ROOT / "docs" / "method.py").read_text())
    subprocess.run([sys.executable, "method.py"], cwd=tmp_path, check=True)
    assert (tmp_path / "method.svg").read_text() == (ROOT / "docs" / "method.svg").read_text()
