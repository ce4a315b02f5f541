"""What knowing the history is worth to the likelihood of an answer that others wrote.

Each answer of a dialogue is measured (teacher forcing) as the next message after

    all      the whole history
    alone    the last user message alone
    another  another dialogue's history, then the last user message

The gain is the mean log-likelihood of its tokens after `all`, less that after one of the others: in nats a
token, above 0 where the model makes use of what was said. Any text before it makes an answer likelier, as
it shows what the answers look like; `another` tells that from knowing what this dialogue is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parrot_edge.dialogue import Message
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.evaluate.sources import Answer
from parrot_edge.evaluate.window import Window
from parrot_edge.figures import Resampling

LAST_TURN = 8
"""Turns beyond it are not shown one by one."""

_ROLE = "assistant"


@dataclass(frozen=True)
class AnswerScore:
    """What an answer costs after each history: nats over the same tokens; NaN where it was not measured.

    tokens     of the answer, the closing one included
    bytes      of its text
    shortened  the whole history was too long for the context
    cut        it took more than a quarter of the context, and only that part of it is measured
    """

    answer: Answer
    all: float
    alone: float
    another: float
    tokens: int
    bytes: int
    shortened: bool
    cut: bool


def score_answers(
    likelihood: Likelihood, answers: Sequence[Answer], on_step: Callable[[int, int], None] = lambda *_: None
) -> list[AnswerScore]:
    """How likely the model finds each answer; opening ones after the whole history alone.

    answers  of a source, in order; where none is of another group, `another` stays NaN
    on_step  told after each measurement how many are done, and of how many
    """
    texts = [likelihood.first_part(answer.text, likelihood.tokens // 4) for answer in answers]
    histories: dict[str, list[_Case | None]] = {
        "all": [_Case(answer.dialogue, answer.history) for answer in answers],
        "alone": [
            _Case(place, _last_message(answer)) if answer.number > 1 else None
            for place, answer in enumerate(answers)
        ],
        "another": _find_others(answers),
    }
    total = sum(case is not None for cases in histories.values() for case in cases)
    costs: dict[str, list[float]] = {}
    tokens, shortened = [0] * len(answers), [False] * len(answers)
    done = 0
    for name, cases in histories.items():
        window = Window(likelihood, _ROLE)
        costs[name] = [math.nan] * len(answers)
        for place, case in enumerate(cases):
            if case is None:
                continue
            view = window.view_of(case.dialogue, case.history, texts[place])
            log_probs = likelihood.log_probs(*likelihood.encode(view, _ROLE, texts[place]))
            if texts[place] != answers[place].text:
                log_probs = log_probs[:-1]  # what is cut does not close there
            costs[name][place], tokens[place] = -float(log_probs.sum()), len(log_probs)
            if name == "all":
                shortened[place] = window.first > 0
            done += 1
            on_step(done, total)
    return [
        AnswerScore(
            answer,
            all=costs["all"][place],
            alone=costs["alone"][place],
            another=costs["another"][place],
            tokens=tokens[place],
            bytes=len(texts[place].encode("utf-8")),
            shortened=shortened[place],
            cut=texts[place] != answer.text,
        )
        for place, answer in enumerate(answers)
    ]


@dataclass(frozen=True)
class _Case:
    """A history, and the number of the dialogue that it grows with."""

    dialogue: int
    history: Sequence[Message]


def _last_message(answer: Answer) -> list[Message]:
    system = [message for message in answer.history if message.role == "system"]
    return [*system, answer.history[-1]]


def _find_others(answers: Sequence[Answer]) -> list[_Case | None]:
    """For each follow-up the history of a dialogue of another group, as long as its own, or nearly.

    A dialogue takes the next one that is long enough, or else the longest: so all are used.
    """
    last = {answer.dialogue: answer for answer in answers}  # each dialogue's longest history
    numbers = list(last)
    others: dict[int, list[Message]] = {}
    for place, number in enumerate(numbers):
        own = last[number]
        after = [last[other] for other in numbers[place + 1 :] + numbers[:place]]
        strangers = (other for other in after if other.member != own.member)
        other = next((other for other in strangers if other.number >= own.number), None)
        if other is None:
            rest = (other for other in after if other.member != own.member)
            other = max(rest, key=lambda stranger: stranger.number, default=None)
        if other is not None:
            others[number] = [message for message in other.history if message.role != "system"]
    cases: list[_Case | None] = []
    for answer in answers:
        if answer.number == 1 or answer.dialogue not in others:
            cases.append(None)
            continue
        *system, message = _last_message(answer)
        exchanges = others[answer.dialogue][: 2 * (answer.number - 1)]
        if exchanges and exchanges[-1].role == "user":
            exchanges.pop()
        cases.append(_Case(answer.dialogue, [*system, *exchanges, message]))
    return cases


def describe_scores(scores: Sequence[AnswerScore], resampling: Resampling) -> dict[str, Any]:
    """Perplexity after the whole history, per token and per byte, and the gains: of all answers after the
    opening exchange, and by turn up to `LAST_TURN`."""
    follow_ups = [score for score in scores if score.answer.number > 1]
    figures = _find_figures(follow_ups, resampling)
    figures["per_byte"] = np.exp(_ratio(follow_ups, resampling, lambda s: s.all, lambda s: s.bytes))
    by_turn = {}
    for number in range(1, LAST_TURN + 1):
        if some := [score for score in scores if score.answer.number == number]:
            by_turn[str(number)] = _find_figures(some, resampling)
    return {**figures, "by_turn": by_turn}


def _find_figures(scores: Sequence[AnswerScore], resampling: Resampling) -> dict[str, np.ndarray]:
    def gain(scores: Sequence[AnswerScore], name: str) -> np.ndarray:
        known = [score for score in scores if not math.isnan(getattr(score, name))]
        return _ratio(known, resampling, lambda s: getattr(s, name) - s.all, lambda s: s.tokens)

    return {
        "per_token": np.exp(_ratio(scores, resampling, lambda s: s.all, lambda s: s.tokens)),
        "gain": gain(scores, "alone"),
        "gain_over_another": gain(scores, "another"),
    }


def _ratio(
    scores: Sequence[AnswerScore],
    resampling: Resampling,
    above: Callable[[AnswerScore], float],
    below: Callable[[AnswerScore], float],
) -> np.ndarray:
    members = [score.answer.member for score in scores]
    return resampling.ratio(members, [above(score) for score in scores], [below(score) for score in scores])
