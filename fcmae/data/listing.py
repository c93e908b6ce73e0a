"""The JSON text of lists that may have millions of items, a part at a time: what `json.dumps` makes of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcmae.data.source import PART


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
