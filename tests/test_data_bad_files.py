from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fcmae.data.bad_files import BadFiles


def test_files_are_listed_once_with_a_warning_that_names_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadFiles(tmp_path / "bad_files.txt", 1000, 0.01)
    with caplog.at_level(logging.WARNING):
        bad.add([])
        assert not (tmp_path / "bad_files.txt").exists() and not caplog.records
        bad.add([("/a.jpg", "it is broken"), ("/b.jpg", "it is empty"), ("/a.jpg", "it is broken")])
        bad.add([("/b.jpg", "it is empty")])
    assert (tmp_path / "bad_files.txt").read_text() == "/a.jpg\tit is broken\n/b.jpg\tit is empty\n"
    assert len(bad) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped /a.jpg: it is broken and 1 more; 2 bad files so far, listed in {tmp_path / 'bad_files.txt'}"
    ]


def test_more_than_the_share_stops_the_run(tmp_path: Path) -> None:
    bad = BadFiles(tmp_path / "bad_files.txt", 200, 0.01)
    bad.add([("/a", "x"), ("/b", "x")])  # 1% exactly is allowed
    with pytest.raises(
        ValueError, match=r"data\.max_bad_share: 3 of 200 files .* 0\.01 \(/c: why; all are in .*bad_files"
    ):
        bad.add([("/c", "why")])
    assert len((tmp_path / "bad_files.txt").read_text().splitlines()) == 3


def test_a_resumed_run_keeps_counting(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.txt"
    BadFiles(path, 100, 0.02).add([("/a", "x"), ("/b", "x")])
    resumed = BadFiles(path, 100, 0.02)
    resumed.add([("/a", "x")])
    assert len(resumed) == 2
    with pytest.raises(ValueError, match="3 of 100"):
        resumed.add([("/c", "x")])


def test_odd_names_stay_on_one_line_and_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.txt"
    names = [
        "/new\nline.jpg",
        "/a\ttab.jpg",
        "/not unicode \udcff.jpg",
        "/ü.jpg",
        "/two  spaces.jpg",
        "/\x0b\u2028.jpg",
    ]
    BadFiles(path, 100, 1.0).add([(name, "two\nlines") for name in names])
    resumed = BadFiles(path, 100, 1.0)
    assert len(resumed) == len(names)
    resumed.add([(name, "again") for name in names])
    assert len(resumed) == len(names)
    assert b"/not unicode \xff.jpg\ttwo lines\n" in path.read_bytes()
