"""Batched replies over llama.cpp: many conversations at once.

    from parrot_edge.engine.llama import LlamaEngine

    questions = ["Name three rivers.", "Why is the sky blue?", "Write a haiku about rain."]
    with LlamaEngine.open("model.gguf", sequences=16) as engine:
        for reply in engine.generate(questions, max_tokens=100):
            print(reply.text)

What happens between a request and its reply is in `batch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Reply, Request, Sampling, Session
from parrot_edge.engine.batch import Batcher, Conversation, Scheduler
from parrot_edge.engine.ggml import Observer
from parrot_edge.engine.native import MAX_SEQUENCES, Adapter, Context, ContextShape, Model
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.errors import UsageError
from parrot_edge.machine import choose_threads


class LlamaEngine:
    """A model, with an adapter or none, over a `Batcher`.

    adapter  an activated adapter to speak with; one of another kind belongs to the batcher's context

    Engines over the same batcher share its lanes, and can share caches (see `session`).
    """

    writes_any_role = True

    def __init__(self, batcher: Batcher, *, adapter: Adapter | None = None, name: str | None = None) -> None:
        self.batcher, self.adapter = batcher, adapter
        self.name = name or batcher.model.path.stem

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        adapter: str | Path | None = None,
        sequences: int = 16,
        tokens: int = 2048,
        threads: int | None = None,
        exact: bool = False,
    ) -> LlamaEngine:
        """Load a GGUF, with a LoRA adapter or none, to make `sequences` replies at once in conversations of
        up to `tokens` tokens."""
        if not 1 <= sequences <= MAX_SEQUENCES:
            raise UsageError(f"sequences must be 1 to {MAX_SEQUENCES}, not {sequences}")
        model = Model(Path(path))
        lora = model.load_adapter(Path(adapter)) if adapter is not None else None
        shape = ContextShape(sequences, tokens, threads or choose_threads().count)
        return cls.over(model, shape, lora, exact=exact)

    @classmethod
    def over(
        cls,
        model: Model,
        shape: ContextShape,
        lora: Adapter | None,
        *,
        exact: bool = False,
        observer: Observer | None = None,
    ) -> LlamaEngine:
        """An engine with a context of its own; an activated adapter stays out of that. For `observer` see
        `Context`."""
        always, activated = (None, lora) if lora is not None and lora.invocation else (lora, None)
        context = Context(model, shape, always, observer=observer)
        return cls(Batcher(context, Scheduler(), exact=exact), adapter=activated)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the adapter's file, or else the model's, says of itself."""
        adapter = self.adapter or self.batcher.context.adapter
        return adapter.metadata if adapter is not None else self.batcher.model.metadata

    @asynccontextmanager
    async def session(self, *, beside: Session | None = None) -> AsyncIterator[LlamaSession]:
        """A conversation; any number can be open. Its cache is that of the session `beside`, where this
        is one over the same batcher: for two sides that read the same text and take turns."""
        if isinstance(beside, LlamaSession) and beside.batcher is self.batcher:
            yield LlamaSession(self.batcher, beside.conversation, self.adapter)
            return
        conversation = Conversation()
        try:
            yield LlamaSession(self.batcher, conversation, self.adapter)
        finally:
            self.batcher.end(conversation)

    def generate(
        self,
        conversations: Sequence[str | Sequence[Message]],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: tuple[str, ...] = (),
        seed: int = 0,
    ) -> list[Reply]:
        """The next assistant message of each conversation (a text is a first user message), in order.

        For use outside an event loop.
        """

        async def answer(index: int, conversation: str | Sequence[Message]) -> Reply:
            messages = [Message("user", conversation)] if isinstance(conversation, str) else conversation
            request = Request(
                messages,
                max_tokens=max_tokens,
                sampling=sampling or Sampling(),
                stop=stop,
                seed=derive_seed(seed, index),
            )
            async with self.session() as session:
                return await session.reply(request)

        async def answer_all() -> list[Reply]:
            return await asyncio.gather(*(answer(i, c) for i, c in enumerate(conversations)))

        return asyncio.run(answer_all())

    def render(self, request: Request) -> bytes:
        """The prompt of a request as UTF-8 text, just up to where the reply begins."""
        return self.batcher.render(request)

    async def aclose(self) -> None:
        """Wait for the step under way, then free the context, also for other engines over it."""
        await self.batcher.aclose()

    def close(self) -> None:
        """Free the context; for use outside an event loop."""
        self.batcher.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LlamaSession:
    """A conversation with a `LlamaEngine`."""

    def __init__(self, batcher: Batcher, conversation: Conversation, adapter: Adapter | None) -> None:
        self.batcher, self.conversation, self._adapter = batcher, conversation, adapter

    async def reply(self, request: Request) -> Reply:
        """The next message. Raises `ModelError` where the template refuses the conversation, and
        `UsageError` for a sampling option outside its range."""
        check_request(request)
        return await self.batcher.submit(self.conversation, request, self._adapter)


def check_request(request: Request) -> None:
    """Raise `UsageError` where an option of a request is outside its range."""
    sampling = request.sampling
    for name, value, fine in (
        ("max_tokens", request.max_tokens, request.max_tokens >= 1),
        ("seed", request.seed, 0 <= request.seed < 2**32),
        ("temperature", sampling.temperature, sampling.temperature >= 0),
        ("top_k", sampling.top_k, sampling.top_k >= 0),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1),
        ("min_p", sampling.min_p, 0 <= sampling.min_p < 1),
        ("repeat_penalty", sampling.repeat_penalty, sampling.repeat_penalty > 0),
    ):
        if not fine:
            raise UsageError(f"{name} is {value}, which is outside its range")
