"""The file of an index: JSON whose lists may have millions of items, written and read a part at a time.

What is written is what `json.dumps` makes of the whole, to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from fcmae.data.source import PART, Names

PIECE = 1 << 22  # characters that are read at a time


def json_list(parts: Iterable[list[Any]]) -> Iterator[str]:
    """The text of one list of all items, in pieces.

    Args:
        parts: its items, which follow each other.
    """
    between = "["
    for part in parts:
        if part:
            yield f"{between}{json.dumps(part)[1:-1]}"
            between = ", "
    yield "[]" if between == "[" else "]"


def json_numbers(values: NDArray[np.int64] | None) -> Iterator[str]:
    """The text of (N,) numbers, in pieces; of None, that of none."""
    if values is None:
        return iter(["null"])
    return json_list(values[start : start + PART].tolist() for start in range(0, len(values), PART))


def read_listing(file: TextIO) -> dict[str, Any]:
    """What was written of an index.

    Args:
        file: at its start; it can seek.

    Returns:
        paths, Names; labels, (N,) int64 or None; class_names; and where there are shards, these, their stamps and the
        fingerprint if they were kept, and places, (3, N) int64.

    Raises:
        ValueError: if it holds something else; or KeyError, TypeError, OverflowError, RecursionError.
    """
    try:
        return _in_pieces(_Text(file))
    except ValueError:  # it is not laid out as ours are, or wrong
        file.seek(0)
        values = json.load(file)
    labels = values["labels"]
    found = {"paths": Names(values["paths"]), "class_names": values["class_names"]}
    found["labels"] = None if labels is None else np.array(labels, np.int64)
    if "shards" in values:
        found |= {"shards": values["shards"], "places": np.array(values["places"], np.int64)}
        found |= {key: values[key] for key in ("stamps", "fingerprint") if key in values}
    return found


class _Text:
    """A text that is read in pieces. What is not laid out as expected raises ValueError."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text = file, ""

    def _more(self) -> None:
        piece = self._file.read(PIECE)
        if not piece:
            raise ValueError("it ends too early")
        self._text += piece

    def up_to(self, word: str) -> str:
        """What stands before a word; both are then behind."""
        while word not in self._text:
            self._more()
        before, _, self._text = self._text.partition(word)
        return before

    def up_to_or_end(self, word: str) -> tuple[str, bool]:
        """Likewise, or all that is left; and whether the word is there."""
        try:
            return self.up_to(word), True
        except ValueError:
            return self._text, False

    def goes_on_with(self, character: str) -> bool:
        if not self._text:
            self._more()
        return self._text.startswith(character)

    def items(self, between: str, end: str) -> Iterator[list[Any]]:
        """The items of the list that it stands in, which is then behind, piece by piece.

        Neither `between` nor `end` can be within a string, where each quote has a backslash before it.
        """
        quote = between.startswith('"')
        while (stop := self._text.find(end)) < 0:
            if (cut := self._text.rfind(between)) >= 0:
                yield json.loads(f"[{self._text[: cut + quote]}]")
                self._text = self._text[cut + len(between) - quote :]
            self._more()
        yield json.loads(f"[{self._text[: stop + quote]}]")
        self._text = self._text[stop + len(end) - quote :]

    def numbers(self) -> NDArray[np.int64]:
        self.up_to("[")
        return np.concatenate([np.array(part, np.int64) for part in self.items(", ", "]")])


def _in_pieces(text: _Text) -> dict[str, Any]:
    if text.up_to('{"paths": ['):
        raise ValueError("it does not begin with paths")
    found: dict[str, Any] = {"paths": Names(chain.from_iterable(text.items('", "', '"], "')))}
    text.up_to('"labels": ')
    found["labels"] = text.numbers() if text.goes_on_with("[") else None
    text.up_to('"class_names": ')
    rest, has_places = text.up_to_or_end(', "places": [')
    found |= json.loads(f'{{"class_names": {rest}' + "}" * has_places)
    if has_places:
        found["places"] = np.stack([text.numbers() for _ in range(3)])
    return found
