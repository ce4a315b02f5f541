"""Two engines for two sides: what is loaded once, what fits in memory, what is refused.

Files that both sides use are loaded once. Sides that are the same file, without an adapter or with
activated ones, share a context; any other adapter gets a context of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from parrot_edge.engine.base import Engine
from parrot_edge.engine.batch import Batcher, Scheduler
from parrot_edge.engine.llama import LlamaEngine
from parrot_edge.engine.native import MAX_SEQUENCES, Context, ContextShape, Model, is_activated
from parrot_edge.engine.remote import RemoteEngine
from parrot_edge.errors import ModelError, UsageError
from parrot_edge.machine import MEMORY_SHARE, choose_threads, format_bytes, inspect_machine
from parrot_edge.models import LocalModel, RemoteModel

MOST_LANES = 64
"""Replies made at once by one context: beyond this a CPU gains nothing, and memory is allocated."""

_LEAST_TOKENS = 512  # a context that is shorter holds no dialogue worth having
_HEADER_TOKENS = 16  # around a message, generously
_OPENING_TOKENS = 1024  # room for the seed


@dataclass(frozen=True)
class Load:
    """What a pair of models has to bear.

    parallel    dialogues at once
    turns       user messages of a dialogue, at most
    max_tokens  of a message
    context     tokens of the longest dialogue, or None for what turns and max_tokens need
    threads     or None for what suits the machine
    exact       see `Batcher`
    requests    to an endpoint under way at once, or None for `parallel`
    """

    parallel: int
    turns: int
    max_tokens: int
    context: int | None = None
    threads: int | None = None
    exact: bool = False
    requests: int | None = None

    @property
    def endpoint_requests(self) -> int:
        return self.requests or self.parallel


@asynccontextmanager
async def open_pair(
    ask: LocalModel | RemoteModel, chat: LocalModel | RemoteModel, load: Load
) -> AsyncIterator[tuple[Engine, Engine]]:
    """Engines for both sides, planned before anything large is allocated and closed at the end.

    Raises `ModelError` where a model cannot be used or the pair does not fit into memory (naming
    the largest `parallel` that would), and `UsageError` where no dialogue of that many turns fits.
    """
    sides = [_Side.of(model) for model in (ask, chat) if isinstance(model, LocalModel)]
    files = [side.file for side in sides]
    shapes = plan_contexts(
        list(dict.fromkeys(files)), load, {file: files.count(file) * load.parallel for file in files}
    )
    async with AsyncExitStack() as stack:
        bases: dict[Path, Model] = {}
        batchers: dict[LocalModel, Batcher] = {}
        engines: dict[LocalModel | RemoteModel, Engine] = {}
        scheduler = Scheduler()

        def load_side(side: _Side) -> Engine:
            base = bases.get(side.file.path) or bases.setdefault(side.file.path, Model(side.file.path))
            if side.file not in batchers:
                lora = base.load_adapter(side.file.adapter) if side.file.adapter else None
                batchers[side.file] = Batcher(
                    Context(base, shapes[side.file], lora), scheduler, exact=load.exact
                )
            activated = base.load_adapter(side.activated) if side.activated else None
            return LlamaEngine(batchers[side.file], adapter=activated, name=side.name)

        for model in dict.fromkeys((ask, chat)):
            if isinstance(model, RemoteModel):
                engines[model] = RemoteEngine(model.url, model.model, parallel=load.endpoint_requests)
                stack.push_async_callback(engines[model].aclose)
            else:
                # In a thread, so that Ctrl-C is heard while a large file is read
                engines[model] = await asyncio.to_thread(load_side, _Side.of(model))
        for batcher in batchers.values():
            stack.push_async_callback(batcher.aclose)
        yield engines[ask], engines[chat]


@dataclass(frozen=True)
class _Side:
    """A local model as it is loaded: what its context holds, and the activated adapter over that."""

    name: str
    file: LocalModel
    activated: Path | None

    @classmethod
    def of(cls, model: LocalModel) -> _Side:
        activated = model.adapter is not None and is_activated(model.adapter)
        file = LocalModel("", model.path, None if activated else model.adapter)
        return cls(model.name, file, model.adapter if activated else None)


def plan_contexts(
    sides: list[LocalModel], load: Load, conversations: dict[LocalModel, int]
) -> dict[LocalModel, ContextShape]:
    """A context shape for each side that together fit the memory that is free.

    `conversations` counts the dialogues of each side: those beyond a context's lanes wait in
    plain memory, which is planned as if all were as long as can be.
    """
    if not sides:
        return {}
    machine = inspect_machine()
    budget = machine.memory_available * MEMORY_SHARE
    plan = _Plan(sides, load, conversations, load.threads or choose_threads(machine).count)
    for share in (1.0, 0.75, 0.5):
        shapes = plan.shapes(load.parallel, share)
        if (
            plan.bytes(shapes, load.parallel) <= budget
            and min(s.tokens for s in shapes.values()) >= _LEAST_TOKENS
        ):
            return shapes
    needed = plan.bytes_at(load.parallel)
    fitting = [n for n in range(1, load.parallel) if plan.bytes_at(n) <= budget]
    advice = f"the largest --parallel that fits is {fitting[-1]}" if fitting else "not even one dialogue fits"
    raise ModelError(
        f"--parallel {load.parallel} needs {format_bytes(int(needed))} "
        f"and {format_bytes(int(budget))} can be used; {advice}"
    )


def memory_needed(models: Iterable[LocalModel], load: Load) -> int:
    """Bytes that a pair of local models takes where every dialogue is as long as can be.

    Raises as `open_pair` does for what no machine can hold.
    """
    files = [_Side.of(model).file for model in models]
    conversations = {file: files.count(file) * load.parallel for file in files}
    return int(_Plan(list(conversations), load, conversations, threads=1).bytes_at(load.parallel))


class _Plan:
    """What contexts for some sides would take."""

    def __init__(
        self, sides: list[LocalModel], load: Load, conversations: dict[LocalModel, int], threads: int
    ) -> None:
        self._sides, self._load, self._conversations, self._threads = sides, load, conversations, threads
        self._headers = {side.path: Model(side.path, vocab_only=True) for side in sides}
        self._weights = sum(path.stat().st_size for path in self._headers)

    def shapes(self, parallel: int, share: float = 1.0) -> dict[LocalModel, ContextShape]:
        """Contexts for so many dialogues, each with a share of the longest one's tokens."""
        lanes = min(parallel, MOST_LANES, MAX_SEQUENCES)
        return {
            side: ContextShape(
                lanes, int(_tokens_needed(self._headers[side.path], self._load) * share), self._threads
            )
            for side in self._sides
        }

    def bytes(self, shapes: dict[LocalModel, ContextShape], parallel: int) -> float:
        """Memory for the weights, the contexts, and what stands beside them: dialogues that wait, or the one
        that is being copied."""
        total = float(self._weights)
        for side, shape in shapes.items():
            model = self._headers[side.path]
            waiting = self._conversations[side] * parallel // self._load.parallel - shape.sequences
            beside = max(waiting, int(shape.sequences > 1))
            total += shape.bytes(model) + beside * shape.sequence_bytes(model)
        return total

    def bytes_at(self, parallel: int) -> float:
        """The same with whole contexts."""
        return self.bytes(self.shapes(parallel), parallel)


def _tokens_needed(model: Model, load: Load) -> int:
    """Tokens of the longest dialogue, within what the model was trained for."""
    least = load.turns * 2 * (_HEADER_TOKENS // 4 + 1)
    most = model.trained_context
    if load.context is not None and load.context > most > 0:
        raise UsageError(
            f"--context {load.context} is more than the {most} tokens that {model.path.name} was trained for"
        )
    limit = load.context or most
    if least > limit > 0:
        raise UsageError(
            f"--turns {load.turns} cannot fit {limit} tokens of context on {model.path.name}; ask for fewer"
        )
    wanted = load.context or _OPENING_TOKENS + load.turns * 2 * (load.max_tokens + _HEADER_TOKENS)
    return min(max(wanted, _LEAST_TOKENS), most or wanted)
