"""The distributions of `parrot stats` as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parrot_edge.errors import UsageError
from parrot_edge.store import new_file, refuse_existing

_PLOTS = {
    "turns": ("histograms.turns", "Turns of a dialogue"),
    "user-words": ("histograms.user_words", "Words of a user's message, up to"),
    "assistant-words": ("histograms.assistant_words", "Words of an answer, up to"),
    "questions": ("questions", "What users ask"),
    "stop-reasons": ("stop_reasons", "What ended the dialogues"),
}
"""Name of the file: where a report has the numbers, and the title."""


def draw_plots(reports: Sequence[dict[str, Any]], folder: Path, *, force: bool = False) -> list[Path]:
    """A bar chart as SVG for each distribution, files side by side; raises and returns as `save_plots`."""
    names = [report["name"] for report in reports]

    def bars(key: str) -> Callable[[Any], None]:
        return lambda axes: _draw_bars(axes, [_shares(report, key) for report in reports], names)

    return save_plots(
        {name: (title, bars(key)) for name, (key, title) in _PLOTS.items()}, folder, force=force
    )


def save_plots(
    plots: Mapping[str, tuple[str, Callable[[Any], None]]], folder: Path, *, force: bool = False
) -> list[Path]:
    """An SVG for each plot, given by name as its title and what draws it onto matplotlib's axes; the paths.

    Raises `OutputError` where a file exists, and `UsageError` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("plots need matplotlib; run pip install 'parrot-edge[data]'") from None
    paths = [folder / f"{name}.svg" for name in plots]
    for path in paths:
        refuse_existing(path, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    for path, (title, draw) in zip(paths, plots.values(), strict=True):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        with new_file(path, force=force) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
    return paths


def _shares(report: dict[str, Any], key: str) -> dict[str, float]:
    numbers: Any = report
    for part in key.split("."):
        numbers = numbers[part]
    total = sum(value or 0 for value in numbers.values()) or 1
    return {name: (value or 0) / total for name, value in numbers.items()}


def _draw_bars(axes: Any, shares: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    labels = list(dict.fromkeys(label for each in shares for label in each))
    if all(label.isdigit() for label in labels):
        labels.sort(key=int)
    width = 0.8 / len(shares)
    for number, (each, name) in enumerate(zip(shares, names, strict=True)):
        places = [place + width * (number - (len(shares) - 1) / 2) for place in range(len(labels))]
        axes.bar(places, [each.get(label, 0) for label in labels], width, label=name)
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=30 if len(labels) > 12 else 0)
    axes.set_ylabel("share", fontsize=9)
    if len(shares) > 1:
        axes.legend(frameon=False, fontsize=9)
