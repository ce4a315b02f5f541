"""From a network's cosines to probabilities that hold, and to an honest "unknown".

Multiclass logistic regression on one scale and an offset per label (Brümmer and van Leeuwen, Odyssey
2006), fitted on recordings that were not trained on, each label weighing the same. numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parrot_edge.errors import UsageError

KEEP_KNOWN = 0.95
"""Share of known recordings that stay known where no unknown ones were there to choose by."""


@dataclass(frozen=True)
class Calibration:
    """Cosines to log-likelihoods, up to a constant: scale * cosine + the label's offset.

    unknown_below  a recording whose highest cosine is below this is of none of the labels
    """

    scale: float
    offsets: tuple[float, ...]
    unknown_below: float

    def log_likelihoods(self, cosines: np.ndarray) -> np.ndarray:
        """float64 (..., L) both."""
        return self.scale * np.asarray(cosines, dtype=float) + np.array(self.offsets)

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """Of each label, all labels being as likely beforehand: float64 (..., L), sum 1."""
        return softmax(self.log_likelihoods(cosines))

    def is_unknown(self, cosines: np.ndarray) -> np.ndarray:
        """bool (...,)."""
        return np.asarray(cosines).max(axis=-1) < self.unknown_below


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis.

    >>> softmax(np.array([0.0, np.log(3)])).round(3).tolist()
    [0.25, 0.75]
    """
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def fit_calibration(cosines: np.ndarray, truth: np.ndarray) -> Calibration:
    """Fit to cosines (N, L) with their labels (N,), -1 for unknown ones, which set the threshold alone.

    Targets are softened as Platt has it (N + 1 of N + 2), so that a set without an error does not claim
    certainty. Raises `UsageError` where fewer than two labels have recordings.
    """
    known, size = truth >= 0, cosines.shape[1]
    rows, labels = np.asarray(cosines, dtype=float)[known], truth[known]
    counts = np.bincount(labels, minlength=size)
    if (counts > 0).sum() < 2:
        raise UsageError("calibration needs recordings of two labels at least")
    weights = 1 / (counts[labels] * (counts > 0).sum())  # (N,), sum 1
    right = (counts[labels] + 1) / (counts[labels] + 2)
    targets = np.repeat(((1 - right) / (size - 1))[:, None], size, axis=1)
    targets[np.arange(len(labels)), labels] = right
    # logits are linear in (scale, offsets): inputs (N, L, 1 + L), and the loss is convex
    inputs = np.concatenate(
        [rows[:, :, None], np.broadcast_to(np.eye(size), (len(rows), size, size))], axis=2
    )
    parameters, ridge = np.zeros(1 + size), 1e-6

    def loss(at: np.ndarray) -> float:
        logits = inputs @ at
        top = logits.max(axis=1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        return float(-(weights[:, None] * targets * logs).sum() + ridge / 2 * at @ at)

    for _ in range(100):
        shares = softmax(inputs @ parameters)  # (N, L)
        slope = np.einsum("nl,nlp->p", weights[:, None] * (shares - targets), inputs) + ridge * parameters
        spread = weights[:, None, None] * (
            shares[:, :, None] * np.eye(size) - shares[:, :, None] * shares[:, None, :]
        )
        curvature = np.einsum("nlp,nlk,nkq->pq", inputs, spread, inputs, optimize=True)
        step = np.linalg.solve(curvature + ridge * np.eye(1 + size), slope)
        length, now = 1.0, loss(parameters)
        while loss(parameters - length * step) > now and length > 1e-6:
            length /= 2
        parameters = parameters - length * step
        if np.abs(slope).max() < 1e-9:
            break
    offsets = parameters[1:] - parameters[1:].mean()
    threshold = _unknown_threshold(rows.max(axis=1), np.asarray(cosines)[~known].max(axis=1, initial=-np.inf))
    return Calibration(float(parameters[0]), tuple(map(float, offsets)), threshold)


def _unknown_threshold(known: np.ndarray, unknown: np.ndarray) -> float:
    """Where as large a share of the known is lost as of the unknown is taken; without unknown ones, where
    `KEEP_KNOWN` of the known stay."""
    if not len(unknown):
        return float(np.quantile(known, 1 - KEEP_KNOWN))
    candidates = np.sort(np.concatenate([known, unknown]))
    lost = np.searchsorted(np.sort(known), candidates, side="left") / len(known)
    taken = 1 - np.searchsorted(np.sort(unknown), candidates, side="left") / len(unknown)
    return float(candidates[np.argmin(np.abs(lost - taken))])
