"""How well dialects are told apart: the measures of the Oriental Language Recognition challenge, and more.

Every measure takes `weights`, float64 (R, N): how often each utterance counts, a row for each resample.
It returns float64 (R,), or (1,) without weights, where each utterance counts once. A *trial* is an
utterance against one label: target where the utterance has that label, else non-target.

Cavg and its 21 thresholds are written from the evaluation plan of AP20-OLR (arXiv 2006.03473) and behave
as the challenge's scorer (`computeCavg.py` and, with unknown utterances, `computeCavg_unknown.py` of
Snowdar/asv-subtools); the equal error rate is that of Kaldi's `compute-eer`, which it calls.
It knows nothing of audio or networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parrot_edge.errors import UsageError
from parrot_edge.figures import Member, Resampling, readable

P_TARGET = 0.5
"""How likely the challenge takes an utterance to be of the label that it is tried against."""

BINS = 20
"""The challenge divides the range of the scores by so many: 21 thresholds."""

_MOST_CELLS = 4_000_000  # of a table of weights that is sorted at once, 32 MB


@dataclass(frozen=True, eq=False)
class Scores:
    """What a system says of utterances whose dialect is known.

    labels    the dialects it knows, L
    matrix    float64 (N, L), higher is likelier
    truth     int (N,): position in `labels`, or -1 for an utterance of none of them
    speakers  (N,): who speaks; utterances of one are drawn together

    Raises `UsageError` where the shapes do not fit, a score is not finite or there is one label only.
    """

    labels: tuple[str, ...]
    matrix: np.ndarray
    truth: np.ndarray
    speakers: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.truth)
        if self.matrix.shape != (count, len(self.labels)) or len(self.speakers) != count:
            raise UsageError(f"scores are {self.matrix.shape} for {count} utterances of {self.labels}")
        if len(self.labels) < 2:
            raise UsageError("there is only one label; nothing can be told apart")
        if not np.isfinite(self.matrix).all():
            raise UsageError("a score is not a finite number; the model is damaged or was not trained")

    @property
    def is_open(self) -> bool:
        """Whether there are utterances of none of the labels."""
        return bool((self.truth < 0).any())

    def known(self) -> Scores:
        """Only the utterances of one of the labels."""
        return self.take(np.flatnonzero(self.truth >= 0))

    def take(self, rows: np.ndarray) -> Scores:
        """Only these utterances."""
        speakers = tuple(self.speakers[row] for row in rows)
        return Scores(self.labels, self.matrix[rows], self.truth[rows], speakers)

    def trials(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every utterance against every label: score, whether it is a target, utterance; each (N * L,)."""
        targets = self.truth[:, None] == np.arange(len(self.labels))  # (N, L)
        owners = np.repeat(np.arange(len(self.truth)), len(self.labels))
        return self.matrix.ravel(), targets.ravel(), owners


def cavg(scores: Scores, threshold: float, weights: np.ndarray | None = None) -> np.ndarray:
    """Average detection cost at one threshold, 0..1 and lower is better.

    A label costs P_TARGET * Pmiss + (1 - P_TARGET) / M * sum of Pfa over its M other classes: the other
    labels and, in an open set, all unknown utterances as one more. A score at the threshold is accepted;
    a class without utterances has no errors.

    >>> one = Scores(("a", "b"), np.array([[0.9, 0.6], [0.2, 0.7]]), np.array([0, 1]), ("x", "y"))
    >>> cavg(one, 0.5)  # b accepts the utterance of a: (0 + 0.5) / 2
    array([0.25])
    """
    return _costs(scores, np.array([threshold]), weights)[:, 0]


def min_cavg(scores: Scores, weights: np.ndarray | None = None) -> np.ndarray:
    """The figure that the challenge reports: the least `cavg` over 21 thresholds, evenly from the lowest to
    the highest score. An oracle: it takes the best threshold with the answers at hand."""
    low, high = float(scores.matrix.min()), float(scores.matrix.max())
    thresholds = low + np.arange(BINS + 1) * ((high - low) / BINS)
    return _costs(scores, thresholds, weights).min(axis=1)


def _costs(scores: Scores, thresholds: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Cavg at each of T thresholds: float64 (R, T)."""
    weights = _or_ones(weights, len(scores.truth))
    classes = list(range(len(scores.labels))) + [-1] * scores.is_open
    costs = np.zeros((len(weights), len(thresholds)))
    for one in classes:
        rows = np.flatnonzero(scores.truth == one)
        mine = weights[:, rows]  # (R, n)
        total = np.maximum(mine.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        for label in range(len(scores.labels)):
            accepted = (scores.matrix[rows, label, None] >= thresholds).astype(float)  # (n, T)
            if label == one:
                costs += P_TARGET * (mine @ (1 - accepted)) / total
            else:
                costs += (1 - P_TARGET) / (len(classes) - 1) * (mine @ accepted) / total
    return costs / len(scores.labels)


def eer(scores: Scores, weights: np.ndarray | None = None) -> np.ndarray:
    """Equal error rate over all trials together, 0..1, as Kaldi's `compute-eer` finds it.

    Thresholds are the target scores from low to high; the first at which no larger share of non-targets
    is accepted than of targets was missed gives its share of misses.
    """

    def find(targets: np.ndarray, fa: np.ndarray) -> np.ndarray:
        """From the targets' weights in order, and the false alarms at each of their scores."""
        total = targets.sum(axis=1, keepdims=True)
        before = np.cumsum(targets, axis=1) - targets
        # a target that counts several times is as many thresholds with the same score
        place = np.maximum(before, np.ceil(fa * total - 1e-9) + 0.0)  # no -0.0
        fits = (place < before + targets) & (targets > 0)
        first = np.argmax(fits, axis=1)
        missed = np.take_along_axis(place, first[:, None], axis=1)[:, 0]
        return np.where(fits.any(axis=1), missed, total[:, 0] - 1) / total[:, 0]

    return _over_targets(scores, weights, find)


def min_dcf(
    scores: Scores, weights: np.ndarray | None = None, *, p_target: float = 0.01, miss_cost: float = 1.0
) -> np.ndarray:
    """Least detection cost over all thresholds and trials, over that of refusing or accepting all (NIST SRE).

    0 is perfect, 1 is worth nothing; a false alarm costs 1.
    """
    miss_weight, fa_weight = miss_cost * p_target, 1 - p_target

    def find(targets: np.ndarray, fa: np.ndarray) -> np.ndarray:
        total = targets.sum(axis=1, keepdims=True)
        miss = (np.cumsum(targets, axis=1) - targets) / total
        costs = np.where(targets > 0, miss_weight * miss + fa_weight * fa, np.inf)
        return np.minimum(costs.min(axis=1), miss_weight) / min(miss_weight, fa_weight)

    return _over_targets(scores, weights, find)


def _over_targets(
    scores: Scores, weights: np.ndarray | None, find: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """What `find` says of the targets' weights, by rising score, and the false alarm rate at each."""
    values, is_target, owners = scores.trials()
    order = np.argsort(values[is_target], kind="stable")
    target_values, target_owners = values[is_target][order], owners[is_target][order]
    others = np.argsort(values[~is_target], kind="stable")
    other_values, other_owners = values[~is_target][others], owners[~is_target][others]
    if not len(target_values) or not len(other_values):
        return np.full(1 if weights is None else len(weights), np.nan)
    below = np.searchsorted(other_values, target_values, side="left")  # non-targets under each target's score
    weights = _or_ones(weights, len(scores.truth))
    found = []
    rows = max(1, _MOST_CELLS // len(values))
    for start in range(0, len(weights), rows):
        part = weights[start : start + rows]
        refused = np.cumsum(np.pad(part[:, other_owners], ((0, 0), (1, 0))), axis=1)  # (r, M + 1)
        fa = 1 - refused[:, below] / refused[:, -1:]
        found.append(find(part[:, target_owners], fa))
    return np.concatenate(found)


def accuracy(scores: Scores, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of the known utterances whose label has the highest score."""
    weights = _or_ones(weights, len(scores.truth))
    right = (scores.matrix.argmax(axis=1) == scores.truth).astype(float)
    known = (scores.truth >= 0).astype(float)
    with np.errstate(invalid="ignore"):
        return (weights @ right) / (weights @ known)


def confusion(scores: Scores) -> np.ndarray:
    """How many utterances of each label (rows, and a last one for the unknown in an open set) are taken for
    each (columns): int (L or L + 1, L)."""
    size = len(scores.labels)
    counts = np.zeros((size + scores.is_open, size), dtype=int)
    np.add.at(counts, (scores.truth, scores.matrix.argmax(axis=1)), 1)  # -1 is the last row
    return counts


def det_points(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """False alarm and miss rates at every score as a threshold: float64 (N * L + 1,) each, for a DET curve
    (Martin et al. 1997); misses rise from 0 to 1, false alarms fall from 1 to 0."""
    values, is_target, _ = scores.trials()
    order = np.argsort(values, kind="stable")
    miss = np.cumsum(np.concatenate([[0], is_target[order]])) / max(1, is_target.sum())
    fa = 1 - np.cumsum(np.concatenate([[0], ~is_target[order]])) / max(1, (~is_target).sum())
    last = np.concatenate([[True], np.diff(values[order]) > 0, [True]])  # ties are passed at once
    return fa[last], miss[last]


def detection_ratios(log_likelihoods: np.ndarray) -> np.ndarray:
    """Log-likelihood ratios of each label against the others taken together: float64 (N, L) both.

    Where the likelihoods are calibrated, 0 is the best threshold for `P_TARGET` = 0.5 (Brümmer and van
    Leeuwen, Odyssey 2006); scale and offset of a row do not matter.

    >>> detection_ratios(np.log([[0.5, 0.25, 0.25]])).round(3).tolist()
    [[0.693, -0.405, -0.405]]
    """
    size = log_likelihoods.shape[1]
    likelihoods = np.exp(log_likelihoods - log_likelihoods.max(axis=1, keepdims=True))
    others = likelihoods @ (1 - np.eye(size)) / (size - 1)
    tiny = np.finfo(float).tiny
    return np.log(np.maximum(likelihoods, tiny)) - np.log(np.maximum(others, tiny))


def resample_speakers(scores: Scores, seed: int = 0) -> np.ndarray:
    """Weights (1 + RESAMPLES, N): the data, then resamples of the speakers of each label.

    A resample holds as many speakers of each label as there are, so none is without utterances.
    """
    names = [*scores.labels, "unknown"]
    members: list[Member] = [
        (names[truth], who) for truth, who in zip(scores.truth, scores.speakers, strict=True)
    ]
    groups: dict[str, list[str]] = {}
    for label, who in dict.fromkeys(members):
        groups.setdefault(label, []).append(who)
    return Resampling(groups, seed).weights(members).astype(float)


def measure(scores: Scores, log_likelihoods: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """All measures with their 95 % intervals over speakers, as a report that JSON takes.

    log_likelihoods  float64 (N, L), the same utterances after calibration: what `identify` decides by. `cavg`
                     holds at threshold 0 of their `detection_ratios`, fixed before the answers were seen
    """
    weights = resample_speakers(scores, seed)
    decided = replace(scores, matrix=log_likelihoods)
    ratios = replace(scores, matrix=detection_ratios(log_likelihoods))
    counts = confusion(decided)
    names = [*scores.labels, "unknown"][: len(counts)]
    speakers = [
        len({who for who, truth in zip(scores.speakers, scores.truth, strict=True) if truth == at})
        for at in range(len(scores.labels))
    ]
    fewest = max(1, min(speakers))
    errors = {
        "eer": eer(ratios, weights),
        "cavg": cavg(ratios, 0.0, weights),
        "min_cavg": min_cavg(ratios, weights),
        "min_dcf": min_dcf(ratios, weights),
    }
    return readable(
        {
            "utterances": len(scores.truth),
            "speakers": len(set(scores.speakers)),
            "set": "open" if scores.is_open else "closed",
            "accuracy": _with_limits(accuracy(decided, weights), 1.0, fewest),
            **{name: _with_limits(figure, 0.0, fewest) for name, figure in errors.items()},
            "confusion": {name: counts[at].tolist() for at, name in enumerate(names)},
            "labels": list(scores.labels),
            "labels_of_one_speaker": [
                label for label, count in zip(scores.labels, speakers, strict=True) if count < 2
            ],
        }
    )


def _with_limits(figure: np.ndarray, best: float, speakers: int) -> np.ndarray:
    """Where nothing went wrong every resample says the same; its draws are then those of Clopper and
    Pearson's limits (1934), with as many trials as the label of fewest speakers has."""
    if abs(figure[0] - best) < 1e-12:
        errors = 1 - np.linspace(0, 1, len(figure) - 1) ** (1 / speakers)
        figure = np.concatenate([figure[:1], np.abs(best - errors)])
    return figure


def _or_ones(weights: np.ndarray | None, count: int) -> np.ndarray:
    return np.ones((1, count)) if weights is None else weights


def gather(
    labels: Sequence[str], rows: Sequence[Any], truth: Sequence[str], speakers: Sequence[str]
) -> Scores:
    """`Scores` from lists, a row (L,) for each utterance; a label that is not among `labels` is unknown."""
    place = {label: at for at, label in enumerate(labels)}
    found = np.array([place.get(label, -1) for label in truth], dtype=int)
    return Scores(tuple(labels), np.array(rows, dtype=float).reshape(-1, len(labels)), found, tuple(speakers))
