"""One trial of each kind of `make chaos`, so that it still works; and its page is made from its counts."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import runs
from chaos import __main__ as chaos
from chaos import commands, kills, page
from chaos.commands import Outcome, fault
from chaos.samples import Samples

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_no_folder_of_the_users_is_taken_for_a_module_of_the_tests() -> None:
    """`make demo` leaves runs/, which the servers of processes, that know no tests/, would import."""
    modules = {path.stem for path in (ROOT / "tests").iterdir()}
    for preloaded in (runs.PRELOADED, commands.PRELOADED):
        assert modules.isdisjoint(name.partition(".")[0] for name in preloaded)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


# Seeds of short ones.
@pytest.mark.parametrize(
    ("part", "seed", "expected"),
    [
        ("kills", 239, "SIGKILL"),
        ("corruptions", 25, "empty"),
        ("overwrites", 14, "files in a run"),
        ("hostile", 0, "settings"),
        ("full_disk", 1, "a limit on files"),
    ],
)
def test_a_trial_of_each_part_holds(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, seed: int, expected: str
) -> None:
    monkeypatch.setattr(kills, "KILLS", 1)
    assert chaos.PARTS[part](samples, random.Random(seed), tmp_path) == (expected, None)


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (Outcome(0, "done"), None),
        (Outcome(2, "fcmae: error: w.pth is damaged: give another file"), None),
        (Outcome(None, "step 3"), "hangs: step 3"),
        (Outcome(-signal.SIGSEGV, ""), "dies of signal 11: "),
        (Outcome(1, "Traceback (most recent call last):\nKeyError: 'a'"), "a traceback: KeyError: 'a'"),
        (Outcome(2, "fcmae: error: 'a'"), "status 2 and no sentence: fcmae: error: 'a'"),
        (Outcome(2, ""), "status 2 without a sentence: "),
        (Outcome(0, "\x1b[31mred"), "terminal escapes in what it prints"),
        (Outcome(3, "over"), "status 3: over"),
    ],
)
def test_what_no_command_may_do_is_a_fault(outcome: Outcome, found: str | None) -> None:
    assert fault(outcome) == found


def test_a_trial_is_the_same_for_the_same_seed_and_failures_are_counted_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(samples: Samples, rng: random.Random, folder: Path) -> tuple[str, str | None]:
        (folder / "file").touch()
        return "drawn", f"{rng.random()}\x1b" if rng.random() < 0.5 else None

    monkeypatch.setattr(chaos, "PARTS", {"kills": trial, "hostile": trial})
    counts = chaos.run_for(0, ["kills", "hostile"], 3, Samples(tmp_path), tmp_path)
    failed = counts["kills"]["drawn"]["failed"] + counts["hostile"]["drawn"]["failed"]
    printed = capsys.readouterr().out
    assert 0 < failed < counts["kills"]["drawn"]["tried"] + counts["hostile"]["drawn"]["tried"]
    assert len(list(tmp_path.glob("*/file"))) == failed == printed.count("its files: ")
    assert "\x1b" not in printed
    name = printed.split()[0]
    part, seed, number = name.split(":")
    chaos.run_one(part, int(seed), int(number), Samples(tmp_path), tmp_path)
    assert capsys.readouterr().out.splitlines()[0] == next(line for line in printed.splitlines() if name in line)


def test_the_page_is_what_its_counts_say(tmp_path: Path) -> None:
    page.write(tmp_path, {"kills": {"SIGKILL": {"tried": 7, "failed": 1}, "SIGHUP": {"tried": 4, "failed": 0}}}, 5, 2)
    page.write(tmp_path, {"hostile": {"names": {"tried": 1, "failed": 0}}}, 6, 1)  # keeps the others
    text = (tmp_path / "reliability.md").read_text()
    assert "| SIGKILL |     7 |      1 |" in text
    assert "| all     |    11 |      1 |" in text
    assert "Seed 5, of a pass of 2 minutes; fcmae " in text
    assert text.count("Not tried.") == len(page.PARTS) - 2
    assert page.PARTS.keys() == chaos.PARTS.keys()


def test_the_committed_page_is_made_from_the_committed_counts() -> None:
    assert (DOCS / "reliability.md").read_text() == page.page(json.loads((DOCS / "reliability.json").read_text()))
