"""Ask and Chat talk: the conversation, and the run of many of them around it.

It knows neither llama.cpp nor the command line; engines come in as `engine.base` promises them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from parrot_edge.dialogue import Message, Seed
from parrot_edge.errors import EndpointError, ModelError, ParrotError, UsageError
from parrot_edge.journal import Progress
from parrot_edge.roles import Speaker, Utterance, ask_view, say_as_ask, say_as_chat, says_farewell

_SECONDS_BETWEEN_SYNCS = 1.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class RunSettings:
    """What a run does.

    turns     most user messages of a dialogue, those of its seed included, >= 1
    parallel  dialogues under way at once, >= 1
    seed      of all random numbers, >= 0
    """

    turns: int = 8
    parallel: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("turns", 1), ("parallel", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")


class Recorder(Protocol):
    """Where a run puts what it makes; `journal.Journal` is one."""

    finished: set[str]
    under_way: dict[str, Progress]

    def add_message(self, identity: str, message: Message, *, read: int, made: int, cut: int) -> None: ...
    def add_end(self, identity: str, stop_reason: str, *, read: int, made: int, cut: int) -> None: ...
    def add_row(self, row: dict[str, Any]) -> None: ...
    def sync(self) -> None: ...
    def complete(self) -> None: ...
    def close(self) -> None: ...


class RowsOnly:
    """A recorder that passes finished rows on and keeps nothing: what a pipe gets."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self.finished: set[str] = set()
        self.dropped: dict[str, str] = {}
        self.under_way: dict[str, Progress] = {}
        self._write = write

    def add_message(self, identity: str, message: Message, *, read: int, made: int, cut: int) -> None:
        pass

    def add_end(self, identity: str, stop_reason: str, *, read: int, made: int, cut: int) -> None:
        pass

    def add_drop(self, identity: str, reason: str) -> None:
        pass

    def add_row(self, row: dict[str, Any]) -> None:
        self.finished.add(row["id"])
        self._write(row)

    def sync(self) -> None:
        pass

    def complete(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Tally:
    """A run so far: dialogues finished and skipped, messages and tokens made, and when it began."""

    dialogues: int = 0
    skipped: int = 0
    messages: int = 0
    tokens: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@dataclass(frozen=True)
class Run:
    """A run of dialogues from seeds.

    on_progress  called after every message
    on_failure   called with a seed and the error of its dialogue, which is then skipped; without
                 it the first error ends the run
    """

    ask: Speaker
    chat: Speaker
    settings: RunSettings
    recorder: Recorder
    on_progress: Callable[[Tally], None] = lambda tally: None
    on_failure: Callable[[Seed, ParrotError], None] | None = None

    async def over(self, seeds: Iterator[Seed] | AsyncIterator[Seed]) -> Tally:
        """Simulate a dialogue for every seed whose row is not there yet; ids must differ.

        Raises what the seeds, an engine or the recorder raise.
        """
        tally = Tally()

        async def work(seed: Seed) -> None:
            if seed.id not in self.recorder.finished:
                await self._simulate(seed, tally)

        async with synced_regularly(self.recorder.sync):
            await take_in_turn(seeds, work, self.settings.parallel)
        return tally

    async def _simulate(self, seed: Seed, tally: Tally) -> None:
        try:
            row = await self._converse(seed, tally)
        except ParrotError as error:
            if self.on_failure is None or not concerns_one_dialogue(error):
                raise
            self.on_failure(seed, error)
            tally.skipped += 1
            return
        self.recorder.add_row(row)
        tally.dialogues += 1
        tally.reasons[row["stop_reason"]] = tally.reasons.get(row["stop_reason"], 0) + 1
        self.on_progress(tally)

    async def _converse(self, seed: Seed, tally: Tally) -> dict[str, Any]:
        """The dialogue itself, carried on from where the recorder knows it to be."""
        progress = self.recorder.under_way.pop(seed.id, None) or Progress()
        messages = [*seed.messages, *progress.messages]
        async with AsyncExitStack() as stack:
            chat = await stack.enter_async_context(self.chat.engine.session())
            beside = chat if self._reads_the_same(seed) else None
            ask = await stack.enter_async_context(self.ask.engine.session(beside=beside))
            while progress.stop_reason is None:
                asks = not messages or messages[-1].role != "user"
                if asks and sum(message.role == "user" for message in messages) >= self.settings.turns:
                    said = Utterance(stop_reason="turns")
                elif asks and messages and says_farewell(messages):
                    said = Utterance(stop_reason="farewell")
                elif asks:
                    said = await say_as_ask(self.ask, ask, seed, messages, self.settings.seed)
                else:
                    said = await say_as_chat(self.chat, chat, seed, messages, self.settings.seed)
                self._record(seed, progress, said, "user" if asks else "assistant")
                if said.stop_reason is None:
                    messages = [*messages, progress.messages[-1]]  # an engine may keep the old list
                    tally.messages += 1
                tally.tokens += said.made
                self.on_progress(tally)
        return self._row(seed, messages, progress)

    def _reads_the_same(self, seed: Seed) -> bool:
        """Whether both sides read the very same text, so that one cache can serve both."""
        prompt = self.ask.ask_prompt
        if not prompt.native or not seed.messages:
            return False
        return ask_view(seed, seed.messages, prompt) == list(seed.messages)

    def _record(self, seed: Seed, progress: Progress, said: Utterance, role: str) -> None:
        costs = {"read": said.read, "made": said.made, "cut": int(said.cut)}
        if said.stop_reason is None:
            message = Message(role, said.text)
            self.recorder.add_message(seed.id, message, **costs)
            progress.messages.append(message)
        else:
            self.recorder.add_end(seed.id, said.stop_reason, **costs)
            progress.stop_reason = said.stop_reason
        progress.read += said.read
        progress.made += said.made
        progress.cut += int(said.cut)

    def _row(self, seed: Seed, messages: list[Message], progress: Progress) -> dict[str, Any]:
        complete = messages[:-1] if len(messages) > 2 and messages[-1].role == "user" else messages
        row = {
            "id": seed.id,
            "messages": [message.as_dict() for message in complete],
            "stop_reason": progress.stop_reason,
            "topic": seed.topic,
            "ask_model": self.ask.engine.name,
            "chat_model": self.chat.engine.name,
            "seed": self.settings.seed,
            "usage": {
                "prompt_tokens": progress.read,
                "completion_tokens": progress.made,
                "cut_messages": progress.cut,
            },
        }
        if seed.persona is not None:
            row["persona"] = seed.persona
        return row | {key: value for key, value in seed.extra.items() if key not in row}


@contextlib.asynccontextmanager
async def synced_regularly(sync: Callable[[], None]) -> AsyncIterator[None]:
    """Call `sync` about once a second, beside what is done meanwhile; raises what it raises."""

    async def sync_for_ever(disk: ThreadPoolExecutor) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(_SECONDS_BETWEEN_SYNCS)
                await asyncio.get_running_loop().run_in_executor(disk, sync)

    with ThreadPoolExecutor(1, thread_name_prefix="sync") as disk:  # waits for a sync under way
        task = asyncio.create_task(sync_for_ever(disk))
        try:
            yield
        finally:
            task.cancel()
            await task  # raises where the disk did


def concerns_one_dialogue(error: ParrotError) -> bool:
    """Whether the run can go on without this dialogue: not so where its output or settings are at fault."""
    return isinstance(error, EndpointError | ModelError)


async def take_in_turn(
    items: Iterator[_T] | AsyncIterator[_T], work: Callable[[_T], Awaitable[None]], parallel: int
) -> None:
    """Do `work` on every item, `parallel` at once, each taken when there is room for it.

    The first failure cancels the rest and is raised.
    """
    source = _Source(items)

    async def worker() -> None:
        while (item := await source.next()) is not None:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(worker())
    except* (ParrotError, BrokenPipeError) as failures:
        raise _first(failures) from None


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Source(Generic[_T]):
    """Items for many takers: each gets the next one, in turn."""

    def __init__(self, items: Iterator[_T] | AsyncIterator[_T]) -> None:
        self._items, self._turn = items, asyncio.Lock()

    async def next(self) -> _T | None:
        """The next item, or None after the last."""
        if isinstance(self._items, Iterator):
            return next(self._items, None)
        async with self._turn:
            return await anext(self._items, None)
