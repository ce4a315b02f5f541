"""Preference pairs of many dialogues at once: the run around `data.capo`.

It knows neither llama.cpp nor the command line; the engine comes in as `engine.base` promises it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from parrot_edge.data.capo import (
    KINDS,
    Answer,
    Turn,
    answer_turn,
    find_fault,
    find_turns,
    make_row,
    opening_of,
    recorded_answer,
    show_instead,
)
from parrot_edge.dialogue import Seed
from parrot_edge.engine.base import Session
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.errors import ParrotError, UsageError
from parrot_edge.roles import Speaker
from parrot_edge.simulate import Tally, concerns_one_dialogue, synced_regularly, take_in_turn

_OTHERS = 64
"""Dialogues before this one of which one lends its history."""


class Recorder(Protocol):
    """Where a run puts its pairs; `journal.Journal` is one."""

    finished: set[str]
    dropped: dict[str, str]

    def add_row(self, row: dict[str, Any]) -> None: ...
    def add_drop(self, identity: str, reason: str) -> None: ...
    def sync(self) -> None: ...


@dataclass(frozen=True)
class PairSettings:
    """Which pairs are made.

    kinds     of `data.capo.KINDS`, one pair each for a turn
    recorded  take the answer that the dialogue has as the chosen one, where it has one
    parallel  dialogues under way at once, >= 1
    seed      of all random numbers, >= 0
    """

    kinds: tuple[str, ...] = KINDS
    recorded: bool = False
    parallel: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"{kind!r} is no kind of pair; use {', '.join(KINDS)}")
        for name, least in (("parallel", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass
class PairTally(Tally):
    """A run so far: context-dependent turns found, pairs of each kind, and those dropped for each reason.

    Pairs of the run that is carried on count as well.
    """

    turns: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {
            "dialogues": self.dialogues,
            "skipped": self.skipped,
            "turns": self.turns,
            "pairs": {kind: self.pairs[kind] for kind in KINDS if self.pairs[kind]},
            "dropped": dict(sorted(self.dropped.items())),
        }


async def make_pairs(
    chat: Speaker,
    dialogues: Iterator[Seed] | AsyncIterator[Seed],
    recorder: Recorder,
    settings: PairSettings,
    *,
    on_progress: Callable[[PairTally], None] = lambda tally: None,
    on_failure: Callable[[Seed, ParrotError], None] | None = None,
) -> PairTally:
    """Record the pairs of all context-dependent turns that are not recorded yet, as they are made.

    Raises what the dialogues, the engine or the recorder raise; an engine's failure over one dialogue
    goes to `on_failure` where that is given, and its remaining pairs are left out.
    """
    run = _Run(chat, recorder, settings, on_progress)

    async def work(item: tuple[Seed, Seed | None]) -> None:
        dialogue, other = item
        try:
            await run.take(dialogue, other)
        except ParrotError as error:
            if on_failure is None or not concerns_one_dialogue(error):
                raise
            on_failure(dialogue, error)
            run.tally.skipped += 1
        else:
            run.tally.dialogues += 1
        on_progress(run.tally)

    async with synced_regularly(recorder.sync):
        await take_in_turn(with_others(dialogues, settings.seed), work, settings.parallel)
    return run.tally


@dataclass
class _Run:
    chat: Speaker
    recorder: Recorder
    settings: PairSettings
    on_progress: Callable[[PairTally], None]
    tally: PairTally = field(default_factory=PairTally)

    async def take(self, dialogue: Seed, other: Seed | None) -> None:
        """Make the pairs of a dialogue, one turn after the other."""
        async with AsyncExitStack() as stack:
            sessions: list[Session] = []
            for turn in find_turns(dialogue):
                self.tally.turns += 1
                left = [kind for kind in self.settings.kinds if not self._is_known(turn, kind)]
                if left and not sessions:  # one reads on in the dialogue, the other begins ever anew
                    for _ in range(2):
                        sessions.append(await stack.enter_async_context(self.chat.engine.session()))
                if left:
                    await self._take_turn(turn, left, other, *sessions)

    def _is_known(self, turn: Turn, kind: str) -> bool:
        identity = turn.pair_id(kind)
        if identity not in self.recorder.finished:
            return False
        reason = self.recorder.dropped.get(identity)
        if reason is None:
            self.tally.pairs[kind] += 1
        else:
            self.tally.dropped[reason] += 1
        return True

    async def _take_turn(
        self, turn: Turn, kinds: list[str], other: Seed | None, whole: Session, instead: Session
    ) -> None:
        chat, seed = self.chat, self.settings.seed
        chosen = recorded_answer(turn) if self.settings.recorded else None
        is_recorded = chosen is not None
        if chosen is None:
            chosen = self._count(await answer_turn(chat, whole, turn.prompt, turn, "chosen", seed))
        facts = {
            "chosen_model": "recorded" if is_recorded else chat.engine.name,
            "rejected_model": chat.engine.name,
            "seed": seed,
        }
        for kind in kinds:
            if chosen.fault:
                self._drop(turn, kind, f"chosen {chosen.fault}")
                continue
            view, made = await show_instead(chat, instead, turn, kind, other, seed)
            self.tally.tokens += made
            if isinstance(view, str):
                self._drop(turn, kind, view)
                continue
            rejected = self._count(await answer_turn(chat, instead, view, turn, kind, seed))
            if fault := find_fault(chosen, rejected):
                self._drop(turn, kind, fault)
                continue
            self.recorder.add_row(make_row(turn, kind, chosen, rejected, view, facts))
            self.tally.pairs[kind] += 1

    def _count(self, answer: Answer) -> Answer:
        self.tally.messages += 1
        self.tally.tokens += answer.made
        self.on_progress(self.tally)
        return answer

    def _drop(self, turn: Turn, kind: str, reason: str) -> None:
        self.recorder.add_drop(turn.pair_id(kind), reason)
        self.tally.dropped[reason] += 1


async def with_others(
    dialogues: Iterator[Seed] | AsyncIterator[Seed], run_seed: int = 0
) -> AsyncIterator[tuple[Seed, Seed | None]]:
    """Each dialogue with one of the 64 before it that has another opening, drawn by seed and id.

    Those that stand before the first such one wait for it; None where there is none. What is drawn
    depends on the dialogues and their order alone.
    """
    earlier: deque[Seed] = deque(maxlen=_OTHERS)
    waiting: deque[Seed] = deque()
    async for dialogue in _as_they_come(dialogues):
        opening = opening_of(dialogue)
        unlike = [other for other in earlier if opening_of(other) != opening]
        if any(message.role == "assistant" for message in dialogue.messages):
            earlier.append(dialogue)
            while waiting and opening_of(waiting[0]) != opening:
                yield waiting.popleft(), dialogue
        if unlike:
            yield dialogue, unlike[derive_seed(run_seed, dialogue.id, "other") % len(unlike)]
        else:
            waiting.append(dialogue)
            if len(waiting) > _OTHERS:
                yield waiting.popleft(), None
    for dialogue in waiting:
        yield dialogue, None


async def _as_they_come(items: Iterator[Seed] | AsyncIterator[Seed]) -> AsyncIterator[Seed]:
    if isinstance(items, Iterator):
        for item in items:
            yield item
    else:
        async for item in items:
            yield item
