"""Tables of cells, each with whether it misses its target."""

from __future__ import annotations

from collections.abc import Container

__all__ = ["Cells", "markdown_table"]

Cells = tuple[list[str], list[list[tuple[str, bool]]]]
"""Heads, and rows of cells, each with whether it misses its target."""


def markdown_table(cells: Cells, left: Container[str]) -> list[str]:
    """Lines of Markdown; what misses its target is bold.

    Args:
        cells: the table.
        left: heads of the columns of text, which go to the left.
    """
    heads, rows = cells
    lines = [
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('---' if head in left else '---:' for head in heads)} |",
    ]
    for row in rows:
        texts = [f"**{text}**" if missed and text else text for text, missed in row]
        lines.append(f"| {' | '.join(texts)} |")
    return lines
