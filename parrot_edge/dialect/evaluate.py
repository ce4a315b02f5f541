"""Measuring a model file on recordings: all of each, and its first seconds alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parrot_edge.dialect import audio
from parrot_edge.dialect.corpus import Utterance
from parrot_edge.dialect.features import log_mel
from parrot_edge.dialect.runtime import Runtime
from parrot_edge.dialect.scoring import Scores, gather, measure
from parrot_edge.errors import InputError

LONGEST = 10.0
"""Seconds of a recording that are measured where nothing else is said."""


def score_corpus(
    runtime: Runtime,
    utterances: Sequence[Utterance],
    lengths: Sequence[float] = (),
    on_error: Callable[[Utterance, InputError], None] | None = None,
) -> dict[str, Scores]:
    """The cosines of all recordings under "all", and under "3s" those of the first 3 s of all that have them.

    A recording that cannot be heard goes to `on_error`, or its `InputError` is raised.
    """
    cuts = {"all": LONGEST, **{f"{length:g}s": length for length in lengths}}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in cuts}
    heard: dict[str, list[Utterance]] = {name: [] for name in cuts}
    for each in utterances:
        try:
            wave = audio.read_wave(each.path, each.start, each.end)
        except InputError as error:
            if on_error is None:
                raise
            on_error(each, error)
            continue
        for name, seconds in cuts.items():
            samples = round(seconds * audio.RATE)
            if name == "all" or len(wave) >= samples:
                rows[name].append(runtime.cosines(log_mel(wave[:samples])))
                heard[name].append(each)
    return {
        name: gather(runtime.labels, rows[name], [u.label for u in found], [u.who for u in found])
        for name, found in heard.items()
        if found
    }


def evaluate_corpus(runtime: Runtime, scores: dict[str, Scores], *, seed: int = 0) -> dict[str, Any]:
    """The measures of what `score_corpus` gave, by length; raises `InputError` where no label is known."""
    if not scores or not (scores["all"].truth >= 0).any():
        raise InputError(f"no recording has a label of the model, which knows {', '.join(runtime.labels)}")
    return {
        "model": runtime.card.name,
        "lengths": {
            name: measure(each, runtime.calibration.log_likelihoods(each.matrix), seed=seed)
            for name, each in scores.items()
            if (each.truth >= 0).any()
        },
    }
