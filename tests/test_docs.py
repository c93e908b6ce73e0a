"""The site is built from docs/ without a warning and needs no other host; its notebooks run, and are kept small."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fcmae.cli import COMMANDS
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.options.help import described

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {"num_images": 24, "num_labels": 16, "num_tested": 8, "seeds": 1, "epochs": 1, "tuning_epochs": 1}
# Notebooks take half a minute each, and mkdocs need not be there. Where all must run, as in CI: FCMAE_REQUIRE_DOCS=1.
REQUIRED = bool(os.environ.get("FCMAE_REQUIRE_DOCS"))
requires_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None and not REQUIRED, reason="mkdocs is not installed")
requires_time = pytest.mark.skipif(not REQUIRED, reason="FCMAE_REQUIRE_DOCS=1 runs the notebooks")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "FCMAE_SITE" in os.environ:  # built before, as `make docs` does
        return Path(os.environ["FCMAE_SITE"])
    path: Path = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@requires_mkdocs
def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{page.name}: {tag}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", sheet.read_text()), sheet.name


@requires_mkdocs
def test_every_setting_and_command_has_its_place(site: Path) -> None:
    settings, commands = ((site / name).read_text() for name in ("settings.html", "commands.html"))
    for model in (PretrainConfig, FinetuneConfig):
        for setting in described(model):
            assert f"<code>{setting.key}</code>" in settings
    for name in COMMANDS:
        assert f'<h2 id="{name}">' in commands
    assert not re.search("<!-- (?:settings|commands)", settings + commands)


@requires_mkdocs
def test_a_notebook_is_shown_with_what_it_drew(site: Path) -> None:
    page = (site / "notebooks" / "pretrain.html").read_text()
    pictures = re.findall(r'src="(pretrain-\d+\.png)"', page)
    assert pictures
    assert all((site / "notebooks" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_every_script_and_test_that_a_page_names_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"\b(?:tests|benchmarks|studies)/[\w/]+\.py\b", page.read_text())
    }
    assert len(named) > 30
    assert sorted(f"{page} names {path}" for page, path in named if not (ROOT / path).exists()) == []


@requires_time
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's packages, not ours
def test_a_notebook_runs_at_small_sizes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "docs" / "pictures.py", tmp_path)
    notebook = nbformat.read(path, 4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [line.partition(" = ")[0] for line in parameters.source.splitlines()]
    assert set(names) - {"photos"} <= set(SMALL)
    parameters.source += "".join(f"\n{name} = {SMALL[name]}" for name in names if name in SMALL)
    parameters.source += "\nfrom fcmae import planning\nplanning._measured_s = lambda hours: 0.1"  # steps are timed
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "error" not in {output.output_type for output in outputs}  # cell magics swallow them
    runs = {"pretrain": ["photos"], "few_labels": ["photos", "pretrained-0", "scratch-0"]}[path.stem]
    assert sorted(run.name for run in (tmp_path / "notebooks" / "runs").iterdir()) == runs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run_to_its_end(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert len(json.dumps(output)) < 100_000
