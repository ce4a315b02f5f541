"""An engine that says what it is told to, for tests and for trying out a pipeline without a model."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from parrot_edge.engine.base import Reply, Request, Session
from parrot_edge.errors import ModelError, UsageError


class ScriptedEngine:
    """An `Engine` whose replies are a queue, or come from a function of the request.

    script           texts, `Reply`s, or exceptions to be raised, given out in the order in which they
                     are asked for, over all sessions; or a function that makes a reply from a request
    parallel         most replies under way at once, >= 1
    writes_any_role  whether `next_role="user"` is answered; settable at any time, as is `metadata`

    `history` holds every request, in order. A text is a reply that ended with "stop" and cost no
    tokens. Raises `UsageError` where `parallel` is less than 1.

    >>> from parrot_edge.dialogue import Message
    >>> async def talk(engine: ScriptedEngine) -> str:
    ...     async with engine.session() as session:
    ...         return (await session.reply(Request([Message("user", "Hello")]))).text
    >>> engine = ScriptedEngine(["Hi!"])
    >>> asyncio.run(talk(engine))
    'Hi!'
    >>> engine.history[0].messages
    [Message(role='user', content='Hello')]
    """

    def __init__(
        self,
        script: Iterable[str | Reply | Exception] | Callable[[Request], str | Reply],
        *,
        parallel: int = 16,
        name: str = "scripted",
        writes_any_role: bool = True,
    ) -> None:
        if parallel < 1:
            raise UsageError(f"parallel is {parallel}; at least 1 reply has to be under way")
        self.name = name
        self.writes_any_role = writes_any_role
        self.metadata: dict[str, str] = {}
        self.history: list[Request] = []
        self._next = script if callable(script) else _queue(script)
        self._room = asyncio.Semaphore(parallel)
        self._closed = False

    @asynccontextmanager
    async def session(self, *, beside: Session | None = None) -> AsyncIterator[ScriptedEngine]:
        """A new conversation; any number can be open."""
        yield self

    async def reply(self, request: Request) -> Reply:
        """The next reply of the script; waits while `parallel` others are under way.

        Raises the script's exception where one is due, and `ModelError` where the script is at its
        end, the engine is closed, or the role is one that it does not write.
        """
        async with self._room:
            await asyncio.sleep(0)  # other conversations get their turn, as with a real engine
            return self._reply(request)

    async def aclose(self) -> None:
        """Later replies raise `ModelError`."""
        self._closed = True

    def _reply(self, request: Request) -> Reply:
        if self._closed:
            raise ModelError(f"{self.name} has been closed")
        if request.next_role != "assistant" and not self.writes_any_role:
            raise ModelError(f"{self.name} only writes the assistant's messages")
        self.history.append(request)
        item = self._next(request)
        if isinstance(item, Exception):
            raise item
        reply = item if isinstance(item, Reply) else Reply(item, "stop")
        if request.on_text:
            for piece in re.findall(r"\s*\S+|\s+", reply.text):
                request.on_text(piece)
        return reply


def _queue(items: Iterable[str | Reply | Exception]) -> Callable[[Request], str | Reply | Exception]:
    left = deque(items)
    size = len(left)

    def take(request: Request) -> str | Reply | Exception:
        if not left:
            raise ModelError(f"the script has only {size} replies; give it more")
        return left.popleft()

    return take
