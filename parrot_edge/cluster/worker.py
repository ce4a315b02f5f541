"""What runs on the nodes: an engine for each side, and the conversations that they remember."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from parrot_edge.cluster.files import PackedModel, Read
from parrot_edge.engine.base import Engine, Reply, Request, Session

OpenEngines = Callable[..., AbstractAsyncContextManager[Sequence[Engine]]]
"""`pair.open_pair`, or what stands for it."""


@dataclass(frozen=True)
class Trait:
    """What the driver has to know of an engine."""

    metadata: dict[str, str]
    writes_any_role: bool


@dataclass
class _Conversation:
    """Sessions of one dialogue, by side."""

    sessions: dict[int, Session] = field(default_factory=dict)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)


class Worker:
    """A pair of engines in a process of its own.

    Every request says the whole conversation, so a worker may begin in the middle of a dialogue that
    another one began; what it remembers only saves it the reading.
    """

    def __init__(self, open_engines: OpenEngines, models: Sequence[PackedModel], load: Any) -> None:
        self._open = open_engines
        self._models, self._load = models, load
        self._engines: Sequence[Engine] = ()
        self._conversations: dict[int, _Conversation] = {}
        self._stack = AsyncExitStack()

    async def exist(self) -> None:
        """Answered as soon as there is a worker, long before it is ready."""

    async def open(self, clerk: Any) -> list[Trait]:
        """Get the files, from the `clerk` where need be, and load them; raises what `open_pair` does."""
        models = [await asyncio.to_thread(model.unpack, read_from(clerk)) for model in self._models]
        self._engines = await self._stack.enter_async_context(self._open(*models, self._load))
        return [Trait(dict(engine.metadata), engine.writes_any_role) for engine in self._engines]

    async def reply(self, conversation: int, side: int, beside: int | None, request: Request) -> Reply:
        """The next message of a side, its session made where there is none; for `beside` see `Engine`."""
        held = self._conversations.setdefault(conversation, _Conversation())
        for each in (beside, side):
            if each is not None and each not in held.sessions:
                other = held.sessions[beside] if beside is not None and each != beside else None
                session = self._engines[each].session(beside=other)
                held.sessions[each] = await held.stack.enter_async_context(session)
        return await held.sessions[side].reply(request)

    async def end(self, conversation: int) -> None:
        """Forget a conversation."""
        if held := self._conversations.pop(conversation, None):
            await held.stack.aclose()


def read_from(clerk: Any) -> Read:
    """How the files of a `Clerk` are read."""
    import ray

    return lambda path, offset, size: ray.get(clerk.read.remote(path, offset, size))


class Clerk:
    """Reads the driver's files to those who lack them; lives on the driver's node."""

    def read(self, path: Any, offset: int, size: int) -> bytes:
        from parrot_edge.cluster.files import read_piece

        return read_piece(path, offset, size)
