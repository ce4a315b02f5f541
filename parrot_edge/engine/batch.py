"""Many conversations over one context, a decode at a time.

A reply reads only what its conversation's cache does not hold yet: usually the other side's last
message. Conversations that have something to read go first, so that as many as possible share
each decode step; all but the shortest prompts stay apart from decode tokens, since llama.cpp splits a mixed
batch into many small ones. It also splits a batch at every gap between sequence numbers. So the
sequences of a context are lanes: the replies under way always hold neighbouring ones, and a
conversation's cache is copied to another lane, or into plain memory, where that takes room.
A copy costs about what half a token costs, and any number of conversations can be open at once. For
the same reason what conversations begin with alike, their system text say, is read once and copied.

A context without an adapter of its own can speak with several **activated** ones (arXiv 2504.12397):
the base reads what was said before, and such an adapter only its invocation, which starts the reply,
and the reply. What it made of these is forgotten when the next reply begins, so one cache serves the
base and all of them.

It knows nothing of roles or dialogues. All work on a context happens in one thread, step by step;
between two steps the event loop runs until every awaiting coroutine has had its say, so the same
calls give the same batches, and the same text, each time.
"""

from __future__ import annotations

import asyncio
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from parrot_edge.engine.base import Reply, Request
from parrot_edge.engine.native import Adapter, BufferPool, Context, Sampler, SavedSequence
from parrot_edge.engine.template import ChatTemplate
from parrot_edge.errors import ModelError

_SETTLE_ROUNDS = 8
"""Rounds of the event loop between two steps: a reply wakes its session, which wakes its dialogue,
which may end, free its place and let the next one ask. Each takes a round or two."""

_PATIENCE = 3
"""How many times busier another side must be to be turned to."""

_LIKE_LENGTH = 0.75
"""Prompts share a decode when the shortest is at least this part of the longest: llama.cpp gives
all sequences of one step the same number of tokens, and the rest goes into further, smaller steps."""

_RIDE = 8
"""Tokens of a prompt that cost less as one more row of so many decode steps than in a step of their own: a
header, mostly, with the end of the message before it."""

_COMPANY = 4
"""Replies that must be under way for a prompt to ride along with them."""

_WORTH_COPYING = 16
"""Tokens of a common beginning that take longer to read than to copy."""


@dataclass(eq=False)
class Conversation:
    """What has been said in a session, and what of it is cached where.

    segments  texts with their tokens, in order; prompts and replies alternate
    cached    how many of the tokens are in the cache
    sound     how many of the cached ones hold what all sides would make of them
    lane      the sequence of the context that holds the cache, or None
    saved     the cache while it has no lane
    """

    segments: list[tuple[bytes, list[int]]] = field(default_factory=list)
    cached: int = 0
    sound: int = sys.maxsize
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
    """A reply in the making.

    adapter      the activated adapter that makes it, or None
    prompt       its tokens
    active_from  place of the first token that the adapter reads
    """

    conversation: Conversation
    request: Request
    adapter: Adapter | None
    future: asyncio.Future[Reply]
    begun: bool = False
    prompt: list[int] = field(default_factory=list)
    active_from: int = sys.maxsize
    sampler: Sampler | None = None
    unread: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    new_tokens: int = 0
    finish: str | None = None
    error: Exception | None = None
    shown: int = 0  # characters passed to on_text

    @property
    def lane(self) -> int:
        assert self.conversation.lane is not None
        return self.conversation.lane

    @property
    def activated(self) -> bool:
        """Whether the adapter reads the next token."""
        return self.conversation.cached >= self.active_from

    def shares(self, other: Conversation) -> int:
        """How many of the prompt's tokens another conversation begins with as well, of those that the base
        reads for both."""
        most = min(len(self.prompt) - 1, self.active_from, other.sound)  # the last is read for its logits
        begins = other.segments[0][1][:most] if other.segments else []
        return bisect_left(range(len(begins)), True, key=lambda i: begins[: i + 1] != self.prompt[: i + 1])

    @property
    def stretch(self) -> list[int]:
        """The unread tokens up to where the adapter begins, or to the end."""
        left = self.active_from - self.conversation.cached
        return self.unread[:left] if left > 0 else self.unread

    @property
    def can_ride(self) -> bool:
        """Whether the prompt is so short that replies being written can take it along."""
        return len(self.unread) <= _RIDE and self.activated == (self.adapter is not None)

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
            prompt_tokens=len(self.prompt),
            new_tokens=self.new_tokens,
            completion_tokens=len(self.made),
        )


Side = tuple["Batcher", Adapter | None]
"""A context and the adapter that it speaks with."""


class Scheduler:
    """The one worker that all contexts of a process share, so that they do not fight for its cores."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama")
        self._batchers: list[Batcher] = []
        self._current: Side | None = None
        self._task: asyncio.Task[None] | None = None

    def add(self, batcher: Batcher) -> None:
        self._batchers.append(batcher)

    def remove(self, batcher: Batcher) -> None:
        self._batchers.remove(batcher)
        self._current = None
        if not self._batchers:
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
        while (side := self._choose()) is not None:
            batcher, adapter = side
            try:
                await loop.run_in_executor(self._pool, batcher.step, adapter)
            except Exception as error:  # whatever it is, those who wait must hear of it
                batcher.fail(error)
            batcher.deliver()
            await _let_others_run()

    def _choose(self) -> Side | None:
        """Stay with a side while it keeps at least a third as many busy as the busiest: a switch
        costs little, but a thin batch does, and a batch that is left fills up meanwhile."""
        busy = {
            (batcher, adapter): count
            for batcher in self._batchers
            for adapter, count in batcher.admit().items()
        }
        if not busy:
            return None
        busiest = max(busy, key=lambda side: busy[side])
        if self._current is None or _PATIENCE * busy.get(self._current, 0) < busy[busiest]:
            self._current = busiest
        return self._current


async def _let_others_run() -> None:
    for _ in range(_SETTLE_ROUNDS):
        await asyncio.sleep(0)


class Batcher:
    """A context, and the replies that are made on it; up to `shape.sequences` at once.

    `exact` decodes each sequence by itself: slower, but then neither the number of conversations
    nor their order changes a single bit of the text. Raises `ModelError` where the model's chat
    template cannot be used.
    """

    def __init__(self, context: Context, scheduler: Scheduler, *, exact: bool = False) -> None:
        model = context.model
        if model.chat_template is None:
            raise ModelError(f"{model.path} carries no chat template; take an instruct model")
        self.context, self.model, self.exact = context, model, exact
        self._template = ChatTemplate(model.chat_template, bos=model.bos, eos=model.eos, name=model.path.name)
        self._scheduler = scheduler
        self._lanes: list[Conversation | None] = [None] * context.shape.sequences
        self._pool = BufferPool(context.shape.sequence_bytes(model))
        self._queue: list[_Job] = []  # replies that wait for a lane
        self._jobs: list[_Job] = []  # replies under way, at most one for each lane
        self._ended: list[Conversation] = []
        self._pieces: dict[int, bytes] = {}
        self._drops_parts = True  # of a sequence's cache, as far as is known
        self.prompt_tokens_read = self.tokens_made = 0
        scheduler.add(self)

    def submit(
        self, conversation: Conversation, request: Request, adapter: Adapter | None = None
    ) -> asyncio.Future[Reply]:
        """Queue a reply, to be made with an activated adapter or without; the future fails with
        `ModelError` where none can be made."""
        job = _Job(conversation, request, adapter, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._scheduler.wake()
        return job.future

    def end(self, conversation: Conversation) -> None:
        """Give up a conversation; its lane is freed at the next step."""
        self._ended.append(conversation)

    def render(self, request: Request) -> bytes:
        """The prompt of a request as UTF-8 text, just up to where the reply begins."""
        text = self._template.render(request.messages, request.next_role)
        if self.model.adds_bos and not text.startswith(self.model.bos):
            text = self.model.bos + text
        return text.encode("utf-8")

    def step(self, adapter: Adapter | None) -> None:
        """One decode for the replies that an adapter, or none, makes: prompts that are to be read if
        there are any, else a token for each."""
        while self._ended:
            self._forget(self._ended.pop())
        jobs = [job for job in self._jobs if job.adapter is adapter]
        self._arrange([job.conversation for job in jobs])
        for job in jobs:
            if not job.begun:
                job.begun = True
                try:
                    self._start(job)
                except Exception as error:  # of this reply alone: its template, its grammar, its text
                    job.error = error
        batch, most = self._next_batch(jobs)
        if not batch:
            return
        self.context.apply(adapter if batch[0].activated else self.context.adapter)
        rows = []
        for job in batch:
            tokens = job.stretch[:most]
            rows.append((job.lane, job.conversation.cached, tokens, len(tokens) == len(job.unread)))
        outputs = iter(self.context.decode(rows))
        for job, (_, _, tokens, complete) in zip(batch, rows, strict=True):
            if not job.made:
                job.new_tokens += len(tokens)
                self.prompt_tokens_read += len(tokens)
            job.conversation.cached += len(tokens)
            del job.unread[: len(tokens)]
            if complete:
                self._take_token(job, next(outputs))

    def admit(self) -> Counter[Adapter | None]:
        """Take waiting replies in as lanes allow; how many are under way, by the adapter that makes them.

        Runs in the event loop, between two steps.
        """
        self._jobs = [job for job in self._jobs if not job.future.cancelled()]
        room = self.context.shape.sequences - len(self._jobs)
        self._jobs += self._queue[:room]
        del self._queue[:room]
        return Counter(job.adapter for job in self._jobs)

    def _arrange(self, conversations: list[Conversation]) -> None:
        """Move the conversations to neighbouring lanes, to those that most of them hold already."""
        taken = {conversation.lane for conversation in conversations}
        starts = range(len(self._lanes) - len(conversations) + 1)
        first = max(starts, key=lambda start: sum(start + i in taken for i in range(len(conversations))))
        block = range(first, first + len(conversations))
        free = [lane for lane in block if lane not in taken]
        for conversation in sorted(conversations, key=lambda each: each.lane is None):  # these need room
            if conversation.lane not in block:
                self._move(conversation, free.pop(0), block)

    def _move(self, conversation: Conversation, lane: int, block: range) -> None:
        """Bring a conversation's cache into a lane of `block`; an idle one there goes to a free lane outside,
        or into plain memory."""
        idle = self._lanes[lane]
        for leaving in (idle, conversation):
            if leaving is not None and leaving.lane is not None:
                if leaving.cached:
                    leaving.saved = self.context.save(leaving.lane, self._pool)
                self._leave_lane(leaving)
        self._enter_lane(conversation, lane)
        outside = [free for free, held in enumerate(self._lanes) if held is None and free not in block]
        if idle is not None and outside:
            self._enter_lane(idle, outside[0])

    def _enter_lane(self, conversation: Conversation, lane: int) -> None:
        self._lanes[lane], conversation.lane = conversation, lane
        if conversation.saved is not None:
            self.context.restore(lane, conversation.saved, self._pool)
            conversation.saved = None

    def _leave_lane(self, conversation: Conversation) -> None:
        if conversation.lane is not None:
            self.context.forget(conversation.lane)
            self._lanes[conversation.lane] = None
            conversation.lane = None

    def _forget(self, conversation: Conversation) -> None:
        """Give up a conversation's cache, wherever it is."""
        self._leave_lane(conversation)
        if conversation.saved is not None:
            self._pool.give(conversation.saved.buffer)
            conversation.saved = None

    def _start(self, job: _Job) -> None:
        """Find out what of the prompt is new, and drop from the cache what the prompt does not share."""
        conversation, prompt = job.conversation, self.render(job.request)
        rest = conversation.keep_prefix(prompt)
        kept = conversation.length
        if rest:
            conversation.segments.append((rest, self.model.tokenize(rest)))
        job.prompt = [token for _, tokens in conversation.segments for token in tokens]
        if job.adapter is not None:
            job.active_from = find_invocation(job.prompt, job.adapter)
        keep = min(conversation.cached, conversation.sound, kept, job.active_from)
        keep = min(keep, len(job.prompt) - 1)  # the last is read for its logits
        conversation.sound = job.active_from
        self._keep(conversation, keep)
        if len(job.prompt) >= self.context.shape.tokens:
            job.finish = "context"
            return
        job.unread = job.prompt[conversation.cached :]
        job.sampler = Sampler(self.model, job.request.sampling, job.request.seed)

    def _keep(self, conversation: Conversation, count: int) -> None:
        """Keep a conversation's first `count` cached tokens; none where the model cannot drop a part."""
        assert conversation.lane is not None
        if count < conversation.cached:
            if not self.context.forget(conversation.lane, count):
                self.context.forget(conversation.lane)
                self._drops_parts, count = False, 0
            conversation.cached = count

    def _next_batch(self, jobs: list[_Job]) -> tuple[list[_Job], int]:
        """The replies of the next decode, and how many tokens each may read; prompts come first, and of these
        what the base reads, longest first, with others of like length. Short ones ride along with the
        replies that are being written, a token a step."""
        ready = [job for job in jobs if job.finish is None and job.error is None]
        prompts = [job for job in ready if len(job.unread) > 1]
        if self.exact:
            return (prompts or ready)[:1], self.context.shape.batch
        if len(ready) - len(prompts) >= _COMPANY:
            prompts = [job for job in prompts if not job.can_ride]
        prompts = [job for job in prompts if not job.activated] or prompts
        if not prompts:
            return sorted(ready, key=lambda job: job.lane), 1
        prompts = sorted(self._share_beginnings(prompts), key=lambda job: -len(job.stretch))
        room, longest = self.context.shape.batch, len(prompts[0].stretch)
        batch: list[_Job] = []
        for job in prompts:
            length = len(job.stretch)
            if batch and (length > room or length < _LIKE_LENGTH * longest):
                break
            batch.append(job)
            room -= length
        return sorted(batch, key=lambda job: job.lane), self.context.shape.batch

    def _share_beginnings(self, prompts: list[_Job]) -> list[_Job]:
        """Copy what a new conversation begins with from one that has read the same. Returns the prompts to
        read now: not those that begin as another one of them does, which is to be read first."""
        now: list[_Job] = []
        for job in prompts:
            if not job.conversation.cached and self._drops_parts:
                lanes = (held for held in self._lanes if held is not None and held.cached)
                read = {held: min(job.shares(held), held.cached) for held in lanes}
                source = max(read, key=lambda held: (read[held], -held.cached), default=None)
                most = read[source] if source is not None else 0
                if any(job.shares(other.conversation) >= max(_WORTH_COPYING, most + 1) for other in now):
                    continue
                if source is not None and most >= _WORTH_COPYING:
                    self._copy_beginning(source, job, most)
            now.append(job)
        return now

    def _copy_beginning(self, source: Conversation, job: _Job, count: int) -> None:
        """Let a reply find its first `count` tokens read, as `source` has read them."""
        conversation = job.conversation
        assert source.lane is not None
        self.context.restore(job.lane, self.context.save(source.lane, self._pool), self._pool)
        conversation.cached = source.cached
        self._keep(conversation, count)
        job.unread = job.prompt[conversation.cached :]

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
            self._forget(job.conversation)
            job.conversation.segments.clear()
            job.conversation.cached = 0
        self._queue.clear()

    async def aclose(self) -> None:
        """Wait for the step under way, then free the context; the model goes with its last one."""
        await self._scheduler.settle()
        self.close()

    def close(self) -> None:
        """Free the context; for use outside an event loop."""
        self._scheduler.remove(self)
        self.context.close()


def find_invocation(tokens: Sequence[int], adapter: Adapter) -> int:
    """Where the last invocation of an adapter begins; raises `ModelError` where there is none."""
    mark = adapter.invocation
    for start in range(len(tokens) - len(mark), -1, -1):
        if list(tokens[start : start + len(mark)]) == mark:
            return start
    raise ModelError(
        f"{adapter.path.name} does not answer here: the prompt holds none of the headers it was trained after"
    )


def _find_stop(text: bytearray, newest: int, stops: tuple[str, ...]) -> int | None:
    """Where the first stop text begins that ends within the newest bytes, or None."""
    found = []
    for stop in stops:
        mark = stop.encode("utf-8")
        at = text.find(mark, max(0, len(text) - newest - len(mark) + 1))
        if at >= 0:
            found.append(at)
    return min(found, default=None)
