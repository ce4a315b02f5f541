"""Why a file says something else than the trained model: the likely cause, from how it differs.

Beside what the trained model says, the reference holds what it says with none and with twice of its
adapter. In between, and somewhat beyond, ln P of every token is near a parabola in the adapter's
strength; the strength at which the parabola comes nearest to the file tells how much of the adapter is
in it. Where no strength explains the difference, the weights below the adapter are others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from parrot_edge.convert.reference import Reference

_EXPLAINED = 0.3  # of the divergence that may be left where the adapter's strength explains it
_STRENGTHS = np.arange(-1.0, 4.01, 0.25)
_GARBAGE = 0.1  # share of equal likeliest tokens; models of one language have more in common


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln of the probabilities, float32, over the last axis; NaN where a logit is none."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def divergence(trained: np.ndarray, said: np.ndarray) -> np.ndarray:
    """KL divergence in nats of `said` from `trained`, both ln P over the last axis."""
    return (np.exp(trained) * (trained - said)).sum(axis=-1, dtype=np.float64)


@dataclass
class Evidence:
    """What a file said where the reference tells all probabilities.

    listed  KL divergence at each place, nats; agrees: whether the likeliest token is the same
    said    ln P at the places that have anchors, by their row in the reference
    """

    reference: Reference
    listed: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    said: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, row: int, said: np.ndarray, group: str) -> None:
        """Take in ln P of all tokens, float32 (V,), at a row of the reference."""
        trained = log_softmax(np.asarray(self.reference.log_probs[row]))  # rounding undone
        common = min(len(trained), len(said))
        value = max(0.0, float(divergence(trained[:common], said[:common])))
        self.listed.append(value if np.isfinite(value) else float("inf"))
        self.agrees.append(bool(trained.argmax() == said.argmax()))
        self.groups.append(group)
        if row < self.reference.anchors.shape[1] and len(said) == len(trained):
            self.said[row] = said


@dataclass(frozen=True)
class Cause:
    """name: one of "numbers", "none", "twice", "strength", "garbage", "quantised", "base"; `strength` is
    how much of the adapter the file seems to have, where that can be told."""

    name: str
    sentence: str
    strength: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_cause(evidence: Evidence, kl: float, type_name: str, adapter: dict[str, Any] | None) -> Cause:
    """The likely cause of a KL divergence that is too large.

    adapter  of the file's report: what is known of an adapter that runs over its base
    """
    if not np.isfinite(kl):
        return Cause("numbers", "it computes what are no numbers; its weights are damaged, convert again.")
    strength, left = _find_strength(evidence)
    known = None if strength is None else round(strength, 2)
    if strength is not None and left < _EXPLAINED:
        if abs(strength) < 0.2:
            return Cause(
                "none",
                "it says what the base alone says; merge the adapter, or load it over the base.",
                known,
            )
        if abs(strength - 2) < 0.25:
            return Cause(
                "twice",
                "the adapter is in it twice; start from a base that it was not merged into, or leave "
                "the adapter out over a merged one.",
                known,
            )
        if abs(strength - 1) > 0.1:
            return Cause(
                "strength",
                f"it has about {strength:.2g} times the adapter; take lora_alpha / rank as the scale, and "
                "merge into 16-bit weights, as 4 bits round an adapter away.",
                known,
            )
    if np.mean(evidence.agrees) < _GARBAGE:
        return Cause(
            "garbage",
            "its weights are garbage; they are damaged, or come of a 4-bit base that was evaluated before "
            "it was dequantised (on some CPUs that repacks it): convert again from a freshly loaded base.",
            known,
        )
    if adapter is not None and adapter["trained_on_this_base"] is False and not _is_wide(type_name):
        return Cause(
            "base",
            "an adapter belongs to the very base that it was trained on, and this is another file; run it "
            "over that one or a 16-bit copy of it, or merge it and quantise what comes of it.",
            known,
        )
    if not _is_wide(type_name):
        return Cause(
            "quantised",
            f"{type_name} rounds too much of it away; take a type with more bits, or quantise with an "
            "importance matrix of your dialogues (if the 16-bit file fails too, the cause lies before).",
            known,
        )
    return Cause(
        "base",
        "its weights are not those that were trained over; merge the adapter into the very base of the "
        "training, dequantised from 4 bits where it was trained in 4 bits.",
        known,
    )


def _is_wide(type_name: str) -> bool:
    return type_name in ("F32", "F16", "BF16")


def _find_strength(evidence: Evidence) -> tuple[float | None, float]:
    """The adapter's strength that explains the file best, and what part of the divergence it leaves.

    None where the adapter changes too little to tell.
    """
    rows = sorted(evidence.said)
    if not rows:
        return None, 1.0
    said = np.stack([evidence.said[row] for row in rows])  # (M, V)
    none, twice = (log_softmax(np.asarray(part[rows])) for part in evidence.reference.anchors)
    once = log_softmax(np.asarray(evidence.reference.log_probs[rows]))

    def distance(strength: float) -> float:
        guess = none * ((strength - 1) * (strength - 2) / 2)
        guess += once * (strength * (2 - strength))
        guess += twice * (strength * (strength - 1) / 2)
        return float(divergence(log_softmax(guess), said).mean())

    at_once = distance(1.0)
    if not at_once > 0 or float(divergence(once, none).mean()) < 0.1 * at_once:
        return None, 1.0
    best = min(_STRENGTHS, key=distance)
    best = min(best + np.linspace(-0.25, 0.25, 11), key=distance)
    return float(best), distance(best) / at_once
