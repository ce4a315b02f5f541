"""`parrot` with an engine that invents its replies, for tests of everything around the engine.

    python tests/scripted_parrot.py simulate seeds.jsonl -o out.jsonl

A reply is a function of the conversation alone. The content of a dialogue's first message says how
it is to end: "end", "farewell", "repetition", "role_flip" and "context" in it bring that about in
the third turn. The environment sets

    REPLY_SECONDS  how long a reply takes, at most
    REPLY_LOG      a file that gets the first message and the number of messages of every conversation
                   that was answered
    TEAR_WRITE     the how-manieth write to a file dies: it writes a part and kills the process
    FULL_AFTER     bytes after which the disk is full
    PATIENCE       seconds for which a Ray cluster may have no worker
    RAY_VERSION    the version that Ray says it has

The workers of a Ray cluster invent in the same way.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import signal
import sys
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from parrot_edge.cli import main, options
from parrot_edge.engine.base import Reply, Request
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.models import LocalModel

_write = os.write
_REPLIES = {name: os.environ[name] for name in ("REPLY_SECONDS", "REPLY_LOG") if name in os.environ}


class InventiveEngine(ScriptedEngine):
    async def reply(self, request: Request) -> Reply:
        await asyncio.sleep(random.uniform(0.2, 1) * float(os.environ.get("REPLY_SECONDS", "0")))
        return await super().reply(request)


def invent(request: Request) -> Reply:
    messages = [message for message in request.messages if message.role != "system"]
    first = messages[0].content if messages else ""
    if log := os.environ.get("REPLY_LOG"):
        with open(log, "a") as file:
            file.write(f"{first}\t{len(messages)}\n")
    text = hashlib.sha256(f"{request.next_role} {[m.content for m in messages]}".encode()).hexdigest()
    finish = "stop"
    if len(messages) == 4:
        if "end" in first:
            text = ""
        elif "farewell" in first:
            text = "ok thanks, bye"
        elif "repetition" in first:
            text = messages[2].content
        elif "role_flip" in first:
            text = "Sure! Here are three ideas:"
        elif "context" in first:
            text, finish = "", "context"
    return Reply(text, finish, prompt_tokens=99, new_tokens=7, completion_tokens=5)


@dataclass(frozen=True)
class Load:
    """As much of `pair.Load` as is looked at."""

    parallel: int
    turns: int
    max_tokens: int
    context: int | None = None
    threads: int | None = None
    exact: bool = False
    requests: int | None = None


@asynccontextmanager
async def open_pair(*_: object) -> AsyncIterator[tuple[ScriptedEngine, ScriptedEngine]]:
    os.environ.update(_REPLIES)  # in a worker it is the node's environment
    yield InventiveEngine(invent, parallel=64, name="ask"), InventiveEngine(invent, parallel=64, name="chat")


def tear_write(number: int) -> None:
    """Let the `number`th write from now on be the last, and incomplete."""
    left = number

    def write(fd: int, data: bytes) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            _write(fd, bytes(data)[: random.randint(0, len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return _write(fd, data)

    os.write = write


def fill_disk(room: int) -> None:
    """Let writes fail after `room` bytes, the last one halfway, as on a full disk."""
    left = room

    def write(fd: int, data: bytes) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = _write(fd, bytes(data)[:left])
        left -= written
        return written

    os.write = write


if __name__ == "__main__":
    pair = types.ModuleType("parrot_edge.pair")
    pair.Load = Load  # type: ignore[attr-defined]
    pair.memory_needed = lambda *_: 2**20  # type: ignore[attr-defined]
    pair.open_pair = open_pair  # type: ignore[attr-defined]
    sys.modules["parrot_edge.pair"] = pair
    options.find_model = lambda text, **_: LocalModel(text, Path(__file__))
    if number := os.environ.get("TEAR_WRITE"):
        tear_write(int(number))
    if room := os.environ.get("FULL_AFTER"):
        fill_disk(int(room))
    if seconds := os.environ.get("PATIENCE"):
        from parrot_edge.cluster import engine

        engine.PATIENCE = float(seconds)
    if version := os.environ.get("RAY_VERSION"):
        import ray

        ray.__version__ = version
    main()
