"""How likely Ask finds what people wrote, and an end of the dialogue where they ended it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parrot_edge.dialogue import Seed
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.evaluate.sources import Stop, Turn
from parrot_edge.evaluate.window import Window
from parrot_edge.figures import Resampling
from parrot_edge.roles import END_MARK, AskPrompt, ask_view

SHORT_TURN = 40
"""Words that a person types rather than pastes; a few long pastes outweigh all of these."""


@dataclass(frozen=True)
class TurnScore:
    """What a turn costs: nats over its tokens, the closing one included, and bytes of its text.

    shortened  its history was too long for the context
    cut        it was so itself; the figures are those of its first part
    """

    turn: Turn
    nats: float
    tokens: int
    bytes: int
    shortened: bool
    cut: bool


@dataclass(frozen=True)
class StopScore:
    """ln P(Ask ends the dialogue here)."""

    stop: Stop
    log_prob: float


def score_places(
    likelihood: Likelihood, prompt: AskPrompt, places: Iterable[Turn | Stop]
) -> tuple[list[TurnScore], list[StopScore]]:
    """How likely Ask finds each turn (teacher forcing), and an end of the dialogue at each stop.

    Where the context cannot hold a history, `Window` says what is kept.
    """
    role = "user" if prompt.native else "assistant"
    end_texts = ("",) if prompt.native else ("", END_MARK)
    window = Window(likelihood, role, lambda some: ask_view(Seed(""), some, prompt))
    turns: list[TurnScore] = []
    stops: list[StopScore] = []
    for place in places:
        text = place.text if isinstance(place, Turn) else END_MARK
        view = window.view_of(place.dialogue, place.history, text)
        if isinstance(place, Stop):
            ends = [likelihood.log_probs(*likelihood.encode(view, role, text)).sum() for text in end_texts]
            stops.append(StopScore(place, float(np.logaddexp.reduce(ends))))
            continue
        tokens, start = likelihood.encode(view, role, place.text)
        cut, tokens = len(tokens) > likelihood.tokens, tokens[: likelihood.tokens]
        text = likelihood.text_of(tokens[start:]) if cut else place.text
        log_probs = likelihood.log_probs(tokens, start)
        turns.append(
            TurnScore(
                place,
                nats=-float(log_probs.sum()),
                tokens=len(log_probs),
                bytes=len(text.encode("utf-8")),
                shortened=window.first > 0,
                cut=cut,
            )
        )
    return turns, stops


def find_perplexity(scores: Sequence[TurnScore], resampling: Resampling) -> dict[str, Any]:
    """exp(nats / tokens), of openings, follow-ups and turns of up to `SHORT_TURN` words apart as well, and
    exp(nats / bytes)."""

    def perplexity(some: Sequence[TurnScore], sizes: Sequence[int]) -> np.ndarray:
        members = [score.turn.member for score in some]
        return np.exp(resampling.ratio(members, [score.nats for score in some], sizes))

    openings = [score for score in scores if score.turn.is_opening]
    others = [score for score in scores if not score.turn.is_opening]
    short = [score for score in scores if len(score.turn.text.split()) <= SHORT_TURN]
    return {
        "per_token": perplexity(scores, [score.tokens for score in scores]),
        "opening": perplexity(openings, [score.tokens for score in openings]),
        "follow_up": perplexity(others, [score.tokens for score in others]),
        "short": perplexity(short, [score.tokens for score in short]),
        "per_byte": perplexity(scores, [score.bytes for score in scores]),
    }


def find_ending(scores: Sequence[StopScore], resampling: Resampling) -> dict[str, Any]:
    """Whether an end is likelier where people ended (AUC), and its mean probability in both places."""
    ended, going_on = (
        ([score.stop.member for score in part], [score.log_prob for score in part])
        for part in ([score for score in scores if score.stop.ended == end] for end in (True, False))
    )
    return {
        "auc": resampling.auc(ended, going_on),
        "at_end": resampling.mean(ended[0], np.exp(ended[1]).tolist()),
        "in_middle": resampling.mean(going_on[0], np.exp(going_on[1]).tolist()),
    }
