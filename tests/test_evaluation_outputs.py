from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import file_limit
from PIL import Image
from runs import write_images

from fcmae import cli
from fcmae.evaluation.outputs import claim, tell_unread
from fcmae.evaluation.pictures import shortened

ATTO = "random:convnextv2_atto"
LATIN = os.fsdecode(b"caf\xe9\x1b[31m")  # no UTF-8, and a code that colours a terminal
SMALL = ("--image-size", "32", "--device", "cpu", "--num-workers", "0")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five images, of which the names of the files are no UTF-8."""
    root = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate("ab"):
        for path in write_images(root / name, 5, seed).iterdir():
            path.rename(path.with_name(f"{LATIN}{path.name}"))
    return root


def commands(labelled: Path, model: str = ATTO) -> dict[str, Sequence[str]]:
    return {
        "evaluate": [model, "--data", str(labelled), *SMALL],
        "embed": [model, "--data", str(labelled), "--neighbours", f"{labelled}/a/*", *SMALL],
        "analyze": [model, "--data", str(labelled), *SMALL],
    }


def run(command: str, words: Sequence[str], out: Path) -> int:
    return cli.main([command, *words, "--out", str(out)])


@pytest.mark.parametrize("command", ["evaluate", "embed", "analyze"])
def test_pictures_are_not_written_where_images_are_searched(
    labelled: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, commands(labelled)[command], labelled / "a" / "found") == 2
    assert "where images are searched: give another out" in capsys.readouterr().err
    assert not (labelled / "a" / "found").exists()


def test_earlier_results_stay_until_the_first_new_one_is_there(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("1")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="holds earlier results: give another --out, or --overwrite"):
        claim(tmp_path, lambda path: True, overwrite=False)
    clear = claim(tmp_path, lambda path: True, overwrite=True)
    (tmp_path / "new.json").write_text("2")
    assert len(list(tmp_path.iterdir())) == 3
    clear()
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_a_link_that_leads_nowhere_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unplugged")
    with pytest.raises(ValueError, match=r"link is a link that leads nowhere: give a directory"):
        claim(tmp_path / "link", lambda path: True, overwrite=True)
    assert not (tmp_path / "unplugged").exists()


@pytest.mark.parametrize("command", ["evaluate", "embed", "analyze"])
def test_names_that_are_no_utf8_hinder_no_command(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = Path(shutil.copytree(labelled, tmp_path / LATIN))
    (folder / "a" / f"{LATIN}bad.png").write_bytes(b"no image")
    assert run(command, commands(folder)[command], tmp_path / f"{LATIN}out") == 0
    error = capsys.readouterr().err
    assert r"caf\udce9\x1b[31mbad.png: " in error and "\x1b[31m" not in error
    assert "1 of the " in error and "images cannot be read and are left out" in error


@pytest.mark.parametrize("command", ["evaluate", "embed", "analyze"])
def test_images_of_which_none_can_be_read_give_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name in "ab":
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "bad" / name / f"{number}.png").write_bytes(b"no image")
    words = [word for word in commands(tmp_path / "bad")[command] if "neighbours" not in word and "*" not in word]
    assert run(command, words, tmp_path / "out") == 2
    assert "images can be read" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("command", ["evaluate", "embed", "analyze"])
@pytest.mark.parametrize("num_bytes", [0, 2000, 20_000])
def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, num_bytes: int
) -> None:
    with file_limit(num_bytes):
        status = run(command, commands(labelled)[command], tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fcmae: error: ")]
    assert status == 2 and "File too large" in line
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert not path.name.startswith(".")
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".npy":
            assert np.load(path).shape[0] == 10


def test_names_in_figures_are_shown_with_escapes() -> None:
    assert shortened("a\udce9\x1b") == r"a\udce9\x1b"
    assert shortened(r"_$\frac$") == r" _\$\frac\$"


def test_long_names_keep_their_beginning_or_their_end() -> None:
    assert shortened("runs/first") == shortened("runs/first", keep_end=True) == "runs/first"
    assert shortened("x" * 50 + "/first", 10) == "xxxxxxxxx…"
    assert shortened("x" * 50 + "/first", 10, keep_end=True) == "…xxx/first"


def test_what_is_left_out_is_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tell_unread([("a\n", "it is none"), ("b", "nor that")], "test images")
    tell_unread([], "test images")
    assert capsys.readouterr().err.splitlines() == [
        r"a\n: it is none", "b: nor that", "2 of the test images cannot be read and are left out"
    ]  # fmt: skip
