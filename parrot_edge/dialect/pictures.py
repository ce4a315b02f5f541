"""Curves and tables as PNG pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from parrot_edge.dialect.scoring import Scores, confusion, det_points, detection_ratios

_TICKS = (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95)


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path)


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and held-out equal error rate by epoch."""
    with _picture(path, 7, 4) as figure:
        axes = figure.add_subplot(xlabel="epoch", ylabel="loss (nats)")
        epochs = [row["epoch"] for row in rows]
        axes.plot(epochs, [row["loss"] for row in rows], label="training loss")
        axes.plot(epochs, [row["held_out_loss"] for row in rows], label="held-out loss, no margin")
        other = axes.twinx()
        other.set_ylabel("held-out equal error rate (%)")
        other.plot(epochs, [100 * row["eer"] for row in rows], "k:", label="held-out EER")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)


def draw_confusion(scores: Scores, path: Path) -> None:
    """What each label is taken for, in per cent of its recordings."""
    counts = confusion(scores)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [*scores.labels, "unknown"][: len(counts)]
    size = 2.5 + 0.6 * len(names)
    with _picture(path, size + 1, size) as figure:
        axes = figure.add_subplot(xlabel="taken for", ylabel="is")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(scores.labels)), scores.labels, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", color="w" if share > 50 else "k")


def draw_det(scores: Scores, path: Path) -> None:
    """Misses against false alarms on normal deviates (Martin et al. 1997), of log-likelihoods."""
    fa, miss = det_points(replace(scores, matrix=detection_ratios(scores.matrix)))
    probit = np.vectorize(lambda share: NormalDist().inv_cdf(min(max(share, 5e-4), 1 - 5e-4)))
    with _picture(path, 5, 5) as figure:
        axes = figure.add_subplot(xlabel="false alarms (%)", ylabel="misses (%)", aspect="equal")
        axes.plot(probit(fa), probit(miss))
        places = [NormalDist().inv_cdf(tick) for tick in _TICKS]
        names = [f"{100 * tick:g}" for tick in _TICKS]
        axes.set_xticks(places, names)
        axes.set_yticks(places, names)
        axes.grid(alpha=0.3)
