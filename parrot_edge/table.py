"""Figures as text, and tables of them for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Rows = list[tuple[str, tuple[str, ...]]]
"""Titles of rows, and where a report has the figure."""


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, each column as wide as its widest cell; lines may be shorter than others.

    >>> align_columns([["", "one", "two"], ["Sizes"], ["  mean", "1", "2"]])
    ['        one  two', 'Sizes', '  mean  1    2']
    """
    count = max(map(len, lines), default=0)
    widths = [max(len(line[at]) for line in lines if at < len(line)) for at in range(count)]
    return ["  ".join(cell.ljust(widths[at]) for at, cell in enumerate(line)).rstrip() for line in lines]


def format_figure(figure: dict[str, float] | None) -> str:
    """A figure with its interval, "" where there is none.

    >>> format_figure({"value": 0.5, "low": 0.25, "high": 1})
    '0.500 [0.250 1.000]'
    >>> format_figure({"value": 31.25, "low": 30, "high": 33})
    '31.25 [30.00 33.00]'
    >>> format_figure({"value": 0.00123, "low": 0, "high": 0.002})
    '1.2e-03 [0.0e+00 2.0e-03]'
    """
    if not figure:
        return ""
    size = abs(figure["value"])
    form = ".1e" if 0 < size < 0.01 else ".3f" if size < 10 else ".2f" if size < 100 else ".1f"
    value, low, high = (format(figure[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low} {high}]"


def list_figures(sections: Iterable[tuple[str, Rows]], columns: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of cells: each section's title, then its rows with a figure of every column's report; rows and
    sections without any are left out.

    >>> half = {"value": 0.5, "low": 0.25, "high": 1}
    >>> list_figures([("Shares", [("first", ("a", "b")), ("none", ("x", "y"))])], [{"a": {"b": half}}])
    [['Shares'], ['  first', '0.500 [0.250 1.000]']]
    """
    lines = []
    for section, rows in sections:
        cells = [(title, [format_figure(dig(column, *path)) for column in columns]) for title, path in rows]
        known = [[f"  {title}", *row] for title, row in cells if any(row)]
        lines += [[section], *known] if known else []
    return lines


def dig(tree: Any, *path: str) -> Any:
    """What lies at a path of keys; an empty dictionary where there is nothing."""
    for key in path:
        tree = tree.get(key) or {}
    return tree
