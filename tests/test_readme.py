"""README.md and the pages of docs/ keep their word: their commands and Python run, links and targets exist.

README's own commands run first, in one folder, on a few tiny images. Each page has a copy of it, and runs its blocks in
the order of the page: commands, Python, and YAML, which is written to the file that its comment names. What makes them
small is SMALL, whose flags take the place of those that a page prints, and of its settings in Python; a network that is
chosen has fewer blocks. accelerate's command is read, and two processes run that of its script. Commands that
install (INSTALLS) are not run: their targets and extras are looked up. Nor is a block below a line that says so, *Not
run by the tests: why.*, or a page of measurements (MEASURED): their scripts exist and their flags are read.
"""

import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from conftest import requires_time
from PIL import Image
from runs import ended, in_forked, start_pair

from fcmae import api, bench, choices, roadmap, verify
from fcmae.cli import COMMANDS, main
from fcmae.evaluation import probes
from fcmae.options import load

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MEASURED = {"benchmarks.md", "performance.md", "results.md"}
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in MEASURED)
SMALL = {"--epochs": "1", "--batch_size": "4", "--device": "cpu", "--data.num_workers": "0", "--log.eval_epochs": "1"}
LONG = {"backends", "container", "evaluating", "export", "howto", "segmentation", "sources", "weights"}
GOES_ON = "# Goes on from the block"  # of Python that has the names of those before it
# What these commands do in full is for their own tests; these flags keep them short here.
QUICK = {"doctor": ["--quick"], "verify": ["--backend", "packed"], "bench": ["--vary", "none", "--seconds", "0.1"]}
ONE = {"--labels": "100%", "--seeds": "1", "--epochs": "1", "--controls": "pixels:4", "--device": "cpu"}
QUICK["worth"] = [word for pair in ONE.items() for word in pair]
INSTALLS = ("make", "pip", "source", "git")


class Block(NamedTuple):
    """What stands between fences: `runs` unless the line before says that it does not."""

    language: str
    text: str
    runs: bool = True

    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if self.language == "bash" and (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^(\*Not run by the tests: [^\n]+\*\n\n)?```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(language, text, not refused) for refused, language, text in found]


def commands(page: Path) -> list[list[str]]:
    return [words for block in blocks(page) if block.runs for words in block.commands()]


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


def run_page(page: Path) -> None:
    """All that stands on it, in this process and this folder."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "python":
            names = names if block.text.startswith(GOES_ON) else {}
            exec(block.text, names)
        elif block.language == "yaml":
            (name,) = re.findall(r"^# (\w+\.yaml)$", block.text, re.M)
            Path(name).write_text(block.text)
        for words in block.commands():
            if words[0] == "fcmae":
                run_fcmae(words[1:] + QUICK.get(words[1], []))
            elif words[0] == "accelerate":
                launch(words[1:])
            else:
                assert words[0] in INSTALLS, f"{page.name} runs {words[0]}, which this test does not know"


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Runs from Python are small too, and no step is timed."""
    given = {flag.removeprefix("--"): value for flag, value in SMALL.items()}
    made = api._settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            api, "_settings", lambda model, settings, *rest, **more: made(model, settings | given, *rest, **more)
        )
        patch.setattr(bench, "in_process", in_forked)
        patch.setattr(choices, "SMALL", choices.SMALL.model_copy(update={"depths": (1, 1, 2)}))
        patch.setattr(probes, "MIN_STEPS", 20)
        patch.setattr(verify, "CASES", verify.CASES[:1])
        patch.setattr(verify, "speeds", lambda *_: {})
        patch.setattr(roadmap, "cost", lambda spec: roadmap.Cost(0, 0))
        yield


@pytest.fixture(scope="module")
def begun(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the pages name, the scripts of a clone, and what README's commands make of them."""
    path = tmp_path_factory.mktemp("begun")
    write_images(path / "photos", 6, (150, 130))
    write_images(path / "small", 6, (32, 32))
    write_images(path / "grey", 6, (60, 50), "L")
    write_images(path / "new", 2, (60, 50))
    for name in ("cat", "dog"):
        write_images(path / "labelled" / name, 4, (50, 60))
        write_images(path / "tested" / name, 2, (50, 60))
    rows = [f"{image},{image.parent.name},{image.stem}" for image in (path / "labelled").glob("*/*.png")]
    (path / "cells.csv").write_text("\n".join(["path,label,patient", *rows]))
    write_images(path / "tiles" / "images", 6, (60, 50))
    write_images(path / "tiles" / "maps", 6, (60, 50), "L")
    for place in (path / "tiles" / "maps").iterdir():
        with Image.open(place) as image:
            Image.fromarray(np.asarray(image) % 3).save(place)
    (path / "bands").mkdir()
    for i in range(6):
        np.save(path / "bands" / f"{i}.npy", np.random.default_rng(i).random((40, 40, 4), dtype=np.float32))
    for script in ("pretrain.py", "finetune.py", "segment.py"):
        (path / script).symlink_to(ROOT / script)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        run_page(README)
    return path


@pytest.fixture
def folder(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to be in."""
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "folder", symlinks=True))
    return Path.cwd()


def run_fcmae(words: list[str]) -> None:
    """Run in this process, which has torch loaded; `> FILE` at the end takes the output."""
    output = None
    if ">" in words:
        words, (_, output) = words[:-2], words[-2:]
    if words[0] in ("pretrain", "finetune", "segment", "bench") and "--help" not in words:
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


def launch(words: list[str]) -> None:
    """accelerate launch: two CPU processes in place of eight GPUs."""
    given = launch_command_parser().parse_args(words[1:])
    assert given.multi_gpu and Path(given.training_script).exists()
    logs = [Path(f"{rank}.log").resolve() for rank in range(2)]
    command = [Path(given.training_script).stem, *with_flags(given.training_script_args, SMALL)]
    assert ended(start_pair(command, logs), 300) == [0, 0], logs[0].read_text()
    assert "2 x cpu" in logs[0].read_text()


def test_the_commands_of_the_first_page_make_what_it_says(begun: Path) -> None:
    assert list((begun / "runs" / "photos" / "reconstructions").glob("*.png"))
    assert (begun / "report.html").exists()
    assert (begun / "runs" / "labelled-tuned" / "best").is_dir()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=requires_time if page.stem in LONG else ()) for page in PAGES],
)
def test_the_commands_and_the_python_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page)
    if page.stem == "tutorial":
        assert (folder / "new.csv").read_text().startswith("path,")


@pytest.mark.skipif(
    find_spec("deepforest") is None and not os.environ.get("FCMAE_REQUIRE_CROWNS"), reason="deepforest is not installed"
)
def test_the_detector_trains_on_the_crowns_of_trees(folder: Path) -> None:
    made_up, _, real = (block.text for block in blocks(ROOT / "docs" / "segmentation.md") if "losses" in block.text)
    names: dict[str, Any] = {}
    exec(made_up, names)
    exec(real.replace("range(31)", "range(2)"), names)
    assert len(names["crowns"]) > 10 and all(loss.isfinite() for loss in names["losses"].values())
    assert set(names["found"]) == {"boxes", "scores", "labels"}


def test_every_command_is_shown() -> None:
    shown = {words[1] for page in (README, *PAGES) for words in commands(page) if words[0] == "fcmae"}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_what_is_not_run_can_be_read(page: Path) -> None:
    assert len(re.findall(r"^```", page.read_text(), re.M)) == 2 * len(blocks(page))  # none is overlooked
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "text", "bibtex") or "fcmae/\n" in block.text
        if block.language != "bash" or (block.runs and page.name not in MEASURED):
            continue
        subprocess.run(["bash", "-n", "-c", block.text], check=True)
        for words in block.commands():
            if words[0] == "python":
                assert (ROOT / words[1]).exists(), words[1]
            elif "fcmae" in words:
                name, *rest = words[words.index("fcmae") + 1 :]
                load(COMMANDS[name][0], rest, prog="test")


def test_the_installing_commands_name_what_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in (README, *PAGES):
        for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", page.read_text(), re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), f"{page.name} says make {target}"
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"^\[project.optional-dependencies\]$(.*?)^\[", project, re.M | re.S)
    assert extras is not None
    for page in (README, *PAGES):
        for extra in re.findall(r"pip install '(?:\.|fcmae)\[([\w,]+)\]'", page.read_text()):
            for name in extra.split(","):
                assert re.search(rf"^{name} = ", extras[1], re.M), f"{page.name} installs the extra {name}"


@pytest.mark.parametrize("target", ["demo-cifar10", "demo-long", "demo-solar", "bench"])
def test_what_make_would_do_is_taken_by_the_commands(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as of a script that is run
    dry = [*("make", "-n", "-o", ".venv/.ready"), target]
    text = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.startswith(".venv/bin/")]
    assert lines
    for program, *words in lines:
        if program.endswith("/fcmae"):
            load(COMMANDS[words[0]][0], words[1:], prog="test")
        elif words[0].endswith(".py"):
            script = runpy.run_path(str(ROOT / words[0]))  # its main is not called
            if "parser" in script and words[0].startswith("benchmarks/"):
                script["parser"]().parse_args(words[1:])


def test_the_tree_names_every_file_and_nothing_else() -> None:
    tree = next(block.text for block in blocks(README) if "fcmae/\n" in block.text)
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else (name if name.endswith("/") else "")
        path = name if folder == name else folder + name
        assert (ROOT / path).exists(), f"the tree names {path}"
        named.add(path.rstrip("/"))
    package = {path for path in (ROOT / "fcmae").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {str(path.relative_to(ROOT)) for path in package} - {"fcmae/__init__.py"} <= named


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_to_files_and_names_of_configurations_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"\b(?:pretrain|finetune)_(?:[a-z]+_)*[a-z]+\b", text):
        assert (ROOT / "configs" / f"{name}.yaml").exists(), name
    for path in re.findall(r"`((?:tests|docs|benchmarks|configs|fcmae)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_the_figure_is_what_its_script_draws(tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text((ROOT / "docs" / "method.py").read_text())
    subprocess.run([sys.executable, "method.py"], cwd=tmp_path, check=True)
    assert (tmp_path / "method.svg").read_text() == (ROOT / "docs" / "method.svg").read_text()
