"""Tables of numbers for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, aligned to be read on a terminal too.

    Args:
        header: a text for each column.
        rows: texts, as many in each as in the header.
        left: how many columns, from the first, are aligned left; the others are right.
    """
    lines = [list(header), *map(list, rows)]
    # A column that is aligned right is marked by two signs at least.
    widths = [max(1 if i < left else 2, *map(len, column)) for i, column in enumerate(zip(*lines, strict=True))]
    lines.insert(1, ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    signs = ["<" if i < left else ">" for i in range(len(widths))]
    return "\n".join(
        f"| {' | '.join(f'{c:{s}{w}}' for c, s, w in zip(line, signs, widths, strict=True))} |" for line in lines
    )
