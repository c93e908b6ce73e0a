"""The files of a run that cannot be read: counted, listed, and too many of them stop the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from fcmae.data.source import printable

logger = logging.getLogger(__name__)


class BadFiles:
    """Keeps the list of a run's bad files. For one process: others hand their findings to it.

    Args:
        path: of the list (path and reason, tab-separated, one file a line). One that exists is counted on, so that a
            resumed run stops at the same count.
        num_files: files of the run.
        max_share: of them that may be bad.
    """

    def __init__(self, path: str | Path, num_files: int, max_share: float) -> None:
        self._path, self._num_files, self._max_share = Path(path), num_files, max_share
        self._known: set[str] = set()
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8", errors="surrogateescape")
            self._known = {line.split("\t")[0] for line in text.splitlines() if line}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Take note of bad files, and warn with the first new one.

        Args:
            bad: (path, reason) pairs; files known already are ignored.

        Raises:
            ValueError: if more than max_share of the files are bad now.
        """
        new: dict[str, str] = {}
        for path, reason in bad:
            name = _one_line(path)
            if name not in self._known:
                new.setdefault(name, _one_line(reason))
        if not new:
            return
        self._known.update(new)
        # A path that is not valid Unicode keeps its bytes.
        with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\t{reason}\n" for name, reason in new.items())
        name, reason = next(iter(new.items()))
        first = f"{printable(name)}: {reason}"
        if len(self._known) > self._max_share * self._num_files:
            raise ValueError(
                f"data.max_bad_share: {len(self._known)} of {self._num_files} files cannot be used, more than the "
                f"share {self._max_share:g} ({first}; all are in {self._path}): "
                "repair them and delete that list, raise the share, or leave them out in another --out"
            )
        others = f" and {len(new) - 1} more" if len(new) > 1 else ""
        logger.warning("skipped %s%s; %d bad files so far, listed in %s", first, others, len(self._known), self._path)


def _one_line(text: str) -> str:
    return " ".join(text.replace("\t", " ").splitlines())
