"""Batched replies over llama.cpp: many conversations, one decode at a time.

    from parrot_edge.engine.llama import LlamaEngine

    questions = ["Name three rivers.", "Why is the sky blue?", "Write a haiku about rain."]
    with LlamaEngine.open("model.gguf", sequences=16) as engine:
        for reply in engine.generate(questions, max_tokens=100):
            print(reply.text)

A reply reads only what its conversation's cache does not hold yet: usually the other side's last
message. Conversations that have something to read go first, so that as many as possible share
each decode step; prompt and decode tokens stay in separate calls, since llama.cpp splits a mixed
batch into many small ones. It also splits a batch at every gap between sequence numbers. So the
sequences of a context are lanes: the replies under way always hold the lowest ones without a gap,
and a conversation's cache is copied to another lane, or into plain memory, where that takes room.
A copy costs about what half a token costs, and any number of conversations can be open at once.

It knows nothing of roles or dialogues. All work on a context happens in one thread, step by step;
between two steps the event loop runs until every awaiting coroutine has had its say, so the same
calls give the same batches, and the same text, each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Reply, Request, Sampling
from parrot_edge.engine.native import (
    MAX_SEQUENCES,
    BufferPool,
    Context,
    ContextShape,
    Model,
    Sampler,
    SavedSequence,
)
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.engine.template import ChatTemplate
from parrot_edge.errors import ModelError, UsageError
from parrot_edge.machine import choose_threads

_SETTLE_ROUNDS = 8
"""Rounds of the event loop between two steps: a reply wakes its session, which wakes its dialogue,
which may end, free its place and let the next one ask. Each takes a round or two."""

_PATIENCE = 3
"""How many times busier another context must be to be turned to."""

_LIKE_LENGTH = 0.75
"""Prompts share a decode when the shortest is at least this part of the longest: llama.cpp gives
all sequences of one step the same number of tokens, and the rest goes into further, smaller steps."""


@dataclass(eq=False)
class _Conversation:
    """What has been said in a session, and what of it is cached where.

    segments  texts with their tokens, in order; prompts and replies alternate
    cached    how many of the tokens are in the cache
    lane      the sequence of the context that holds the cache, or None
    saved     the cache while it has no lane
    """

    segments: list[tuple[bytes, list[int]]] = field(default_factory=list)
    cached: int = 0
    lane: int | None = None
    saved: SavedSequence | None = None

    @property
    def length(self) -> int:
        return sum(len(tokens) for _, tokens in self.segments)

    def keep_prefix(self, prompt: bytes) -> bytes:
        """Keep the segments that `prompt` starts with and return the rest of it."""
        kept = offset = 0
        for text, _ in self.segments:
            if not prompt.startswith(text, offset):
                break
            kept, offset = kept + 1, offset + len(text)
        del self.segments[kept:]
        return prompt[offset:]


@dataclass(eq=False)
class _Job:
    """A reply in the making."""

    conversation: _Conversation
    request: Request
    future: asyncio.Future[Reply]
    sampler: Sampler | None = None
    unread: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: str | None = None
    error: Exception | None = None
    shown: int = 0  # characters passed to on_text

    @property
    def lane(self) -> int:
        assert self.conversation.lane is not None
        return self.conversation.lane

    def show_text(self) -> None:
        """Pass on what is new, holding back what could still become a stop text."""
        if self.request.on_text is None:
            return
        text = self.text.decode("utf-8", "ignore")
        held = 0 if self.finish else max((len(stop) - 1 for stop in self.request.stop), default=0)
        if len(text) - held > self.shown:
            self.request.on_text(text[self.shown : len(text) - held])
            self.shown = len(text) - held

    def reply(self) -> Reply:
        assert self.finish is not None
        return Reply(
            self.text.decode("utf-8", "ignore").replace("\0", ""),
            self.finish,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            completion_tokens=len(self.made),
        )


class Scheduler:
    """The one worker that all contexts of a process share, so that they do not fight for its cores."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama")
        self._engines: list[LlamaEngine] = []
        self._current: LlamaEngine | None = None
        self._task: asyncio.Task[None] | None = None

    def add(self, engine: LlamaEngine) -> None:
        self._engines.append(engine)

    def remove(self, engine: LlamaEngine) -> None:
        self._engines.remove(engine)
        if self._current is engine:
            self._current = None
        if not self._engines:
            self._pool.shutdown()

    def wake(self) -> None:
        """Make sure that the work is being done; called with each new job."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def settle(self) -> None:
        """Wait until no step is under way."""
        await asyncio.get_running_loop().run_in_executor(self._pool, int)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        await _let_others_run()
        while (engine := self._choose()) is not None:
            engine.admit()
            try:
                await loop.run_in_executor(self._pool, engine.step)
            except Exception as error:  # whatever it is, those who wait must hear of it
                engine.fail(error)
            engine.deliver()
            await _let_others_run()

    def _choose(self) -> LlamaEngine | None:
        """Stay with a context while it keeps at least a third as many busy as the busiest: a switch
        costs nothing, but a thin batch does, and a batch that is left fills up meanwhile."""
        busiest = max(self._engines, key=lambda engine: engine.busy, default=None)
        if busiest is None or busiest.busy == 0:
            return None
        if self._current is None or _PATIENCE * self._current.busy < busiest.busy:
            self._current = busiest
        return self._current


async def _let_others_run() -> None:
    for _ in range(_SETTLE_ROUNDS):
        await asyncio.sleep(0)


class LlamaEngine:
    """A context over a loaded model; up to `shape.sequences` replies are made at once.

    `exact` decodes each sequence by itself: slower, but then neither the number of conversations
    nor their order changes a single bit of the text. Raises `ModelError` where the model or its
    chat template cannot be used.
    """

    writes_any_role = True

    def __init__(
        self, context: Context, scheduler: Scheduler, *, name: str | None = None, exact: bool = False
    ) -> None:
        model = context.model
        if model.chat_template is None:
            raise ModelError(f"{model.path} carries no chat template; take an instruct model")
        self.name = name or model.path.stem
        self.context, self.model, self.exact = context, model, exact
        self._template = ChatTemplate(model.chat_template, bos=model.bos, eos=model.eos, name=model.path.name)
        self._scheduler = scheduler
        self._lanes: list[_Conversation | None] = [None] * context.shape.sequences
        self._pool = BufferPool()
        self._queue: list[_Job] = []  # replies that wait for a lane
        self._jobs: list[_Job] = []  # replies under way, each on a lane
        self._new: list[_Job] = []  # those of them that have not begun
        self._ended: list[_Conversation] = []
        self._pieces: dict[int, bytes] = {}
        self.prompt_tokens_read = self.tokens_made = 0
        scheduler.add(self)

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
        return cls(Context(model, shape, lora), Scheduler(), exact=exact)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the adapter's file, or else the model's, says of itself."""
        adapter = self.context.adapter
        return adapter.metadata if adapter is not None else self.model.metadata

    @property
    def busy(self) -> int:
        """Replies under way or waiting for a lane."""
        return len(self._jobs) + len(self._queue)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[LlamaSession]:
        """A conversation with a cache of its own; any number can be open."""
        conversation = _Conversation()
        try:
            yield LlamaSession(self, conversation)
        finally:
            self._ended.append(conversation)

    def submit(self, conversation: _Conversation, request: Request) -> asyncio.Future[Reply]:
        """Queue a reply; the future fails with `ModelError` where none can be made."""
        job = _Job(conversation, request, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._scheduler.wake()
        return job.future

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
        text = self._template.render(request.messages, request.next_role)
        if self.model.adds_bos and not text.startswith(self.model.bos):
            text = self.model.bos + text
        return text.encode("utf-8")

    def step(self) -> None:
        """One decode: prompts that are to be read if there are any, else a token for every reply."""
        while self._ended:
            self._leave_lane(self._ended.pop())
        self._arrange()
        for job in self._new:
            try:
                self._start(job)
            except Exception as error:  # of this reply alone: a template, a grammar, half a surrogate pair
                job.error = error
        batch = self._next_batch()
        rows = []
        for job in batch:
            tokens = job.unread[: self.context.shape.batch]
            rows.append((job.lane, job.conversation.cached, tokens, len(tokens) == len(job.unread)))
        if not rows:
            return
        outputs = iter(self.context.decode(rows))
        for job, (_, _, tokens, complete) in zip(batch, rows, strict=True):
            job.conversation.cached += len(tokens)
            del job.unread[: len(tokens)]
            if complete:
                self._take_token(job, next(outputs))

    def admit(self) -> None:
        """Take waiting replies in as lanes allow; runs in the event loop, between two steps."""
        self._jobs = [job for job in self._jobs if not job.future.cancelled()]
        room = self.context.shape.sequences - len(self._jobs)
        self._new = self._queue[:room]
        del self._queue[:room]
        self._jobs += self._new

    def _arrange(self) -> None:
        """Move all replies under way to lanes 0 .. n-1; those that hold one of these keep it."""
        conversations = [job.conversation for job in self._jobs]
        taken = {c.lane for c in conversations}
        free = [lane for lane in range(len(conversations)) if lane not in taken]
        for conversation in conversations:
            if conversation.lane is None or conversation.lane >= len(conversations):
                self._move(conversation, free.pop(0))

    def _move(self, conversation: _Conversation, lane: int) -> None:
        """Bring a conversation's cache into a lane; an idle one there takes its old lane, or plain memory."""
        idle, old = self._lanes[lane], conversation.lane
        for leaving in (idle, conversation):
            if leaving is not None and leaving.lane is not None:
                if leaving.cached:
                    leaving.saved = self.context.save(leaving.lane, self._pool)
                self._leave_lane(leaving)
        self._enter_lane(conversation, lane)
        if idle is not None and old is not None:
            self._enter_lane(idle, old)

    def _enter_lane(self, conversation: _Conversation, lane: int) -> None:
        self._lanes[lane], conversation.lane = conversation, lane
        if conversation.saved is not None:
            self.context.restore(lane, conversation.saved, self._pool)
            conversation.saved = None

    def _leave_lane(self, conversation: _Conversation) -> None:
        if conversation.lane is not None:
            self.context.forget(conversation.lane)
            self._lanes[conversation.lane] = None
            conversation.lane = None

    def _start(self, job: _Job) -> None:
        """Find out what of the prompt is new, and drop from the cache what the prompt does not share."""
        conversation, prompt = job.conversation, self.render(job.request)
        rest = conversation.keep_prefix(prompt)
        kept = conversation.length
        if rest:
            conversation.segments.append((rest, self.model.tokenize(rest)))
        job.prompt_tokens = conversation.length
        keep = min(conversation.cached, kept, job.prompt_tokens - 1)  # the last is read for its logits
        if keep < conversation.cached:
            if not self.context.forget(job.lane, keep):
                self.context.forget(job.lane)
                keep = 0
            conversation.cached = keep
        if job.prompt_tokens >= self.context.shape.tokens:
            job.finish = "context"
            return
        tokens = [token for _, tokens in conversation.segments for token in tokens]
        job.unread = tokens[conversation.cached :]
        job.new_tokens = len(job.unread)
        self.prompt_tokens_read += job.new_tokens
        job.sampler = Sampler(self.model, job.request.sampling, job.request.seed)

    def _next_batch(self) -> list[_Job]:
        """The replies of the next decode; prompts come first, longest first, with others of like length."""
        ready = [job for job in self._jobs if job.finish is None and job.error is None]
        prompts = sorted((job for job in ready if len(job.unread) > 1), key=lambda job: -len(job.unread))
        if self.exact:
            return (prompts or ready)[:1]
        if not prompts:
            return sorted(ready, key=lambda job: job.lane)
        room, longest = self.context.shape.batch, len(prompts[0].unread)
        batch: list[_Job] = []
        for job in prompts:
            length = len(job.unread)
            if batch and (length > room or length < _LIKE_LENGTH * longest):
                break
            batch.append(job)
            room -= length
        return sorted(batch, key=lambda job: job.lane)

    def _take_token(self, job: _Job, output: int) -> None:
        """Draw the reply's next token and see whether it ends the reply."""
        assert job.sampler is not None
        token = job.sampler.sample(self.context, output)
        job.made.append(token)
        self.tokens_made += 1
        if self.model.ends_turn(token):
            self._finish(job, "stop", job.made[:-1])
            return
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self.model.piece(token)
        job.text += piece
        cut = _find_stop(job.text, len(piece), job.request.stop)
        if cut is not None:
            del job.text[cut:]
            self._finish(job, "stop", job.made)
        elif len(job.made) >= job.request.max_tokens:
            self._finish(job, "length", job.made)
        elif job.conversation.cached + 1 >= self.context.shape.tokens:
            self._finish(job, "context", job.made)
        else:
            job.unread.append(token)

    def _finish(self, job: _Job, why: str, tokens: list[int]) -> None:
        """Record the reply; what of it is not in the cache is read with the next prompt."""
        job.finish = why
        if tokens:
            text = b"".join(self._pieces[token] for token in tokens)
            job.conversation.segments.append((text, list(tokens)))

    def deliver(self) -> None:
        """Hand out new text and finished replies; runs in the event loop, between two steps."""
        for job in self._jobs:
            if job.future.done():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
                continue
            job.show_text()
            if job.finish is not None:
                job.future.set_result(job.reply())
        for job in self._jobs:
            if job.future.done() and job.sampler is not None:
                job.sampler.close()
        self._jobs = [job for job in self._jobs if not job.future.done()]

    def fail(self, error: Exception) -> None:
        """Fail every reply under way; the caches are forgotten."""
        for job in (*self._jobs, *self._queue):
            if not job.future.done():
                job.future.set_exception(error)
            self._leave_lane(job.conversation)
            job.conversation.segments.clear()
            job.conversation.cached = 0
        self._queue.clear()

    async def aclose(self) -> None:
        """Wait for the step under way, then free the context; the model goes with its last context."""
        await self._scheduler.settle()
        self.close()

    def close(self) -> None:
        """Free the context; for use outside an event loop."""
        self._scheduler.remove(self)
        self.context.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LlamaSession:
    """A conversation with a `LlamaEngine`."""

    def __init__(self, engine: LlamaEngine, conversation: _Conversation) -> None:
        self._engine, self._conversation = engine, conversation

    async def reply(self, request: Request) -> Reply:
        """The next message. Raises `ModelError` where the template refuses the conversation, and
        `UsageError` for a sampling option outside its range."""
        check_request(request)
        return await self._engine.submit(self._conversation, request)


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


def _find_stop(text: bytearray, newest: int, stops: tuple[str, ...]) -> int | None:
    """Where the first stop text begins that ends within the newest bytes, or None."""
    found = []
    for stop in stops:
        mark = stop.encode("utf-8")
        at = text.find(mark, max(0, len(text) - newest - len(mark) + 1))
        if at >= 0:
            found.append(at)
    return min(found, default=None)
