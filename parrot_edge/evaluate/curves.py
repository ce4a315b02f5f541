"""What changes with the turn, as pictures: a curve for each model, with its 95 % interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parrot_edge.data.plots import save_plots
from parrot_edge.store import refuse_existing

_CURVES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "perplexity": (
        "Perplexity of the reference answer, by turn",
        ("history", "mean", "by_turn"),
        "per_token",
    ),
    "gain": ("Gain from the history, nats a token, by turn", ("history", "mean", "by_turn"), "gain"),
    "recall-chosen": (
        "Told value is the likeliest, by the turn it is asked in",
        ("recall", "chosen", "by_turn"),
        None,
    ),
    "recall-said": ("Told value is said, by the turn it is asked in", ("recall", "said", "by_turn"), None),
    "grades": ("Grade of the answer, by turn", ("benchmark", "grades", "by_turn"), None),
    "wins": (
        "Share of wins against the first model, by turn",
        ("benchmark", "against_first", "by_turn"),
        "win",
    ),
}
"""Name of the file: its title, where a model's report has the figures by turn, and the key of each."""


def refuse_existing_curves(folder: Path, *, force: bool) -> None:
    """Raise `OutputError` where a curve is there already, before anything is measured for it."""
    for name in _CURVES:
        refuse_existing(folder / f"{name}.svg", force=force)


def draw_curves(report: dict[str, Any], folder: Path, *, force: bool = False) -> list[Path]:
    """Curves of a report of `evaluate_chat`, those that it has; raises and returns as `save_plots`."""
    plots = {}
    for name, (title, path, key) in _CURVES.items():
        lines = {each["model"]: _find_line(each, path, key) for each in report["models"]}
        if known := {model: line for model, line in lines.items() if line}:
            plots[name] = title, _drawing(known)
    return save_plots(plots, folder, force=force)


def _find_line(report: dict[str, Any], path: tuple[str, ...], key: str | None) -> dict[int, dict[str, float]]:
    """The figure of each turn that has one."""
    tree: Any = report
    for part in path:
        tree = (tree or {}).get(part)
    figures = {int(turn): figure[key] if key else figure for turn, figure in (tree or {}).items()}
    return {turn: figure for turn, figure in figures.items() if figure}


def _drawing(lines: Mapping[str, dict[int, dict[str, float]]]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for name, line in lines.items():
            turns, figures = list(line), list(line.values())
            below, above = (
                [abs(figure[end] - figure["value"]) for figure in figures] for end in ("low", "high")
            )
            values = [figure["value"] for figure in figures]
            axes.errorbar(turns, values, yerr=[below, above], marker="o", markersize=4, capsize=3, label=name)
        axes.set_xticks(sorted({turn for line in lines.values() for turn in line}))
        axes.set_xlabel("turn", fontsize=9)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)

    return draw
