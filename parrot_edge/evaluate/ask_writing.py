"""What Ask writes: turns in people's place, and whole dialogues."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from parrot_edge.data.diversity import STRETCH, find_distinct
from parrot_edge.data.likeness import COMPARED, tell_apart
from parrot_edge.data.text import words_of
from parrot_edge.dialogue import Seed
from parrot_edge.engine.base import Engine, Reply, Request, Session
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.evaluate.sources import Source, Turn
from parrot_edge.figures import Member, Resampling
from parrot_edge.roles import END_MARK, Speaker, ask_view, sounds_like_assistant
from parrot_edge.simulate import RowsOnly, Run, RunSettings, take_in_turn


def sample_turns(sources: Sequence[Source], count: int, seed: int = 0) -> list[Turn]:
    """About so many turns, as many of each source where it has them, drawn by `seed`."""
    drawn: list[Turn] = []
    for source in sources:
        numbered = sorted(enumerate(source.turns), key=lambda item: derive_seed(seed, source.name, item[0]))
        drawn += [turn for _, turn in numbered[: math.ceil(count / len(sources))]]
    return drawn


async def write_turns(
    ask: Speaker, turns: Sequence[Turn], *, parallel: int = 16, seed: int = 0
) -> list[Reply]:
    """What Ask says first in the place of each turn, after the real history."""
    prompt = ask.ask_prompt
    replies: dict[int, Reply] = {}

    async def write(number: int) -> None:
        request = Request(
            ask_view(Seed(""), turns[number].history, prompt),
            "user" if prompt.native else "assistant",
            ask.max_tokens,
            ask.sampling,
            seed=derive_seed(seed, "evaluate", number),
        )
        async with ask.engine.session() as session:
            replies[number] = await session.reply(request)

    await take_in_turn(iter(range(len(turns))), write, parallel)
    return [replies[number] for number in range(len(turns))]


def describe_replies(
    turns: Sequence[Turn], replies: Sequence[Reply], resampling: Resampling
) -> dict[str, Any]:
    """What Ask wrote in the place of each turn, beside which it stands; a history that does not fit
    the context is left out."""
    fitting = [(turn, reply) for turn, reply in zip(turns, replies, strict=True) if reply.finish != "context"]
    members = [turn.member for turn, _ in fitting]
    texts = [reply.text.strip() for _, reply in fitting]
    said = [number for number, text in enumerate(texts) if not _ends(text)]
    pairs = [(fitting[number][0].text, texts[number]) for number in said]
    return {
        "places": len(fitting),
        "left_out": len(turns) - len(fitting),
        **describe_texts(texts, members, resampling),
        "too_long": resampling.share(members, [reply.finish == "length" for _, reply in fitting]),
        "auc": tell_apart(pairs, [members[number] for number in said], resampling),
    }


def describe_texts(
    texts: Sequence[str], members: Sequence[Member], resampling: Resampling
) -> dict[str, np.ndarray]:
    """Role, length and diversity of messages; one that ends the dialogue says nothing else."""
    said = [(text, member) for text, member in zip(texts, members, strict=True) if not _ends(text)]
    sayers = [member for _, member in said]
    words = [len(text.split()) for text, _ in said]
    return {
        "wrong_role": resampling.share(members, [sounds_like_assistant(text) for text in texts]),
        "ends": resampling.share(members, [_ends(text) for text in texts]),
        "questions": resampling.share(sayers, ["?" in text for text, _ in said]),
        "words_mean": resampling.mean(sayers, words),
        "words_median": resampling.median(sayers, words),
        "distinct_1": _find_distinct(said, 1),
        "distinct_2": _find_distinct(said, 2),
    }


def _ends(text: str) -> bool:
    return not text or END_MARK in text


def _find_distinct(said: Iterable[tuple[str, Member]], n: int) -> np.ndarray:
    """The share of different n-grams among those of a stretch of words (distinct-n, Li et al. 2016).

    A stretch gathers what some dialogues say, so stretches are what is resampled.
    """
    words: dict[Member, list[str]] = {}
    for text, member in said:
        words.setdefault(member, []).extend(words_of(text[:COMPARED]))
    stretches: list[list[str]] = [[]]
    for member in sorted(words, key=lambda member: derive_seed(*member)):
        stretches[-1] += words[member]
        if len(stretches[-1]) >= STRETCH:
            stretches.append([])
    shares = [find_distinct(stretch[:STRETCH], n) for stretch in stretches[:-1]]  # the last is too short
    if not shares:
        return np.full(1, np.nan)
    resampling, members = Resampling.of(len(shares))
    return resampling.mean(members, shares)


# Whole dialogues


async def simulate_dialogues(
    ask: Speaker, chat: Speaker, seeds: Sequence[Seed], settings: RunSettings
) -> dict[str, Any]:
    """How dialogues go. Every message that Ask draws counts, also one that is drawn again."""
    overheard = _Overheard(ask.engine)
    rows: list[dict[str, Any]] = []
    await Run(replace(ask, engine=overheard), chat, settings, RowsOnly(rows.append)).over(iter(seeds))
    talks = [drawn for drawn in overheard.drawn if drawn]
    resampling, members = Resampling.of(len(talks), settings.seed)
    messages = [(text, member) for member, drawn in zip(members, talks, strict=True) for text in drawn]
    wrong = resampling.share(
        [member for _, member in messages], [sounds_like_assistant(text) for text, _ in messages]
    )
    resampling, members = Resampling.of(len(rows), settings.seed)
    turns = [sum(message["role"] == "user" for message in row["messages"]) for row in rows]
    reasons = [row["stop_reason"] for row in rows]
    return {
        "dialogues": len(rows),
        "messages": len(messages),
        "wrong_role": wrong,
        "turns": resampling.mean(members, turns),
        "stop_reasons": {
            reason: resampling.share(members, [each == reason for each in reasons])
            for reason, _ in Counter(reasons).most_common()
        },
    }


class _Overheard:
    """An engine whose replies are noted, in a list for each session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.writes_any_role, self.metadata = engine.name, engine.writes_any_role, engine.metadata
        self.drawn: list[list[str]] = []

    @asynccontextmanager
    async def session(self, *, beside: Session | None = None) -> AsyncIterator[Session]:
        async with self._engine.session(beside=beside) as session:
            self.drawn.append([])
            yield _OverheardSession(session, self.drawn[-1])

    async def aclose(self) -> None:
        await self._engine.aclose()


@dataclass(frozen=True)
class _OverheardSession:
    session: Session
    drawn: list[str]

    async def reply(self, request: Request) -> Reply:
        reply = await self.session.reply(request)
        if reply.finish != "context":
            self.drawn.append(reply.text.strip())
        return reply


def repeat_seeds(seeds: Sequence[Seed], count: int) -> list[Seed]:
    """So many seeds; where there are fewer they come again under other ids.

    >>> [seed.id for seed in repeat_seeds([Seed("a"), Seed("b")], 3)]
    ['a', 'b', 'a#2']
    """
    again = (replace(seed, id=f"{seed.id}#{lap}") for lap in range(2, count + 2) for seed in seeds)
    return [*seeds, *islice(again, max(0, count - len(seeds)))][:count]
