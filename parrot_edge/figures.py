"""Figures, each with the 95 % interval that a bootstrap gives it (Efron 1979), over dialogues or speakers.

A figure is a float64 array (1 + RESAMPLES,): what the data says, then what each resample of it says.
So figures are added, divided and averaged like numbers, and two of the same resampling are paired.
Where there is nothing to measure they are NaN. It knows nothing of models or of what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
"""Each end of a 95 % interval then rests on the 25 resamples beyond it."""

Member = tuple[str, str]
"""What a measurement belongs to, and is drawn together with: a group of dialogues in a source."""


class Resampling:
    """How often each group of dialogues counts: once in the data, then in resamples of each source.

    groups  those of each source; a source keeps its size in every resample
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self._columns: dict[Member, int] = {}
        counts = []
        for source, names in groups.items():
            for name in names:
                self._columns[source, name] = len(self._columns)
            counts.append(random.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES))
        drawn = np.concatenate(counts, axis=1)
        self._weights = np.concatenate([np.ones_like(drawn[:1]), drawn]).astype(np.float32)

    @classmethod
    def of(cls, count: int, seed: int = 0) -> tuple[Resampling, list[Member]]:
        """A resampling of so many things, each for itself, and their members."""
        names = [str(number) for number in range(count)]
        return cls({"": names}, seed), [("", name) for name in names]

    def ratio(self, members: Sequence[Member], above: Sequence[float], below: Sequence[float]) -> np.ndarray:
        """The sum of one quantity over the sum of another; a value of both for each member given."""
        weights = self.weights(members)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ np.asarray(above, np.float64)) / (weights @ np.asarray(below, np.float64))

    def mean(self, members: Sequence[Member], values: Sequence[float]) -> np.ndarray:
        """The mean of the values."""
        return self.ratio(members, values, [1.0] * len(values))

    def share(self, members: Sequence[Member], cases: Sequence[bool]) -> np.ndarray:
        """The share of cases. Where all or none are, every resample says the same: its draws are then
        those of Clopper and Pearson's limits (1934), with each group of dialogues one trial."""
        share = self.mean(members, cases)
        if share[0] in (0, 1):
            least = np.linspace(0, 1, RESAMPLES) ** (1 / len(set(members)))
            share[1:] = least if share[0] else 1 - least
        return share

    def median(self, members: Sequence[Member], values: Sequence[float]) -> np.ndarray:
        """The median, the lower of two."""
        if not len(values):
            return np.full(1 + RESAMPLES, np.nan)
        order = np.argsort(values, kind="stable")
        mass = np.cumsum(self.weights(members)[:, order], axis=1)  # (1 + RESAMPLES, N)
        return np.asarray(values, np.float64)[order][np.argmax(2 * mass >= mass[:, -1:], axis=1)]

    def auc(
        self, high: tuple[Sequence[Member], Sequence[float]], low: tuple[Sequence[Member], Sequence[float]]
    ) -> np.ndarray:
        """Area under the ROC curve: how often a value of `high` is above one of `low`, ties counting
        half (Hanley and McNeil 1982); both are members with their values."""
        upper, lower = (self.weights(members) for members, _ in (high, low))
        one, other = np.asarray(high[1])[:, None], np.asarray(low[1])[None, :]
        above = (one > other).astype(np.float32) + np.float32(0.5) * (one == other)  # (N, M)
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((upper @ above) * lower).sum(1, dtype=np.float64) / (
                upper.sum(1, dtype=np.float64) * lower.sum(1, dtype=np.float64)
            )

    def weights(self, members: Sequence[Member]) -> np.ndarray:
        """What each measurement counts: float32 (1 + RESAMPLES, N)."""
        return self._weights[:, [self._columns[member] for member in members]]


def average(figures: Collection[np.ndarray]) -> np.ndarray:
    """The mean of those figures that there are."""
    known = [figure for figure in figures if not math.isnan(figure[0])]
    return np.mean(known, axis=0) if known else np.full(1 + RESAMPLES, np.nan)


def average_sources(sources: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean over sources of each of the figures that they have in common."""
    keys = next(iter(sources.values()))
    return {key: average([source[key] for source in sources.values()]) for key in keys}


def readable(tree: Any) -> Any:
    """A report with each figure as `{"value", "low", "high"}` of six digits, or None where it is NaN."""
    if isinstance(tree, dict):
        return {key: readable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [readable(value) for value in tree]
    if not isinstance(tree, np.ndarray):
        return tree
    value = float(tree[0])
    if math.isnan(value):
        return None
    drawn = tree[1:][~np.isnan(tree[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (value, value)
    ends = {"value": value, "low": min(low, value), "high": max(high, value)}
    return {name: float(f"{number:.6g}") for name, number in ends.items()}
