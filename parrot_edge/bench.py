"""How fast dialogues are made: this engine, its limit, and what else runs the same file.

Every way gets the same openings, sampling and token limits; both sides are the same model, prompted to
continue as the user or as the assistant, or Ask is an activated adapter over it. A chat API cannot
write the user's message, so there Ask is told whom to play. A dialogue has `turns` questions and answers;
nothing ends it earlier, so all ways make about as many tokens, except where Ask, told to play, stops short.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import APIError, AsyncOpenAI

from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Request, Sampling, Session
from parrot_edge.engine.batch import Batcher, Scheduler
from parrot_edge.engine.llama import LlamaEngine
from parrot_edge.engine.native import Context, ContextShape, Model
from parrot_edge.engine.rates import Rates, measure_rates
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.engine.template import ChatTemplate
from parrot_edge.errors import ModelError
from parrot_edge.roles import FLIPPED, ask_view

_SECONDS_FOR_SERVER = 120.0


@dataclass(frozen=True)
class Shape:
    """What is run: `dialogues` of `turns` with messages of up to `max_tokens`, `parallel` at once."""

    dialogues: int = 16
    turns: int = 4
    max_tokens: int = 96
    parallel: int = 16
    threads: int = 2

    @property
    def context(self) -> int:
        """Tokens that a dialogue of this shape can need."""
        return 256 + self.turns * 2 * (self.max_tokens + 16)


@dataclass(frozen=True)
class Result:
    """A way of running the shape: tokens made and seconds taken.

    read  prompt tokens decoded over prompt tokens that were new to their side, or None; below 1 where
          a side finds in the cache what the other one has read
    """

    way: str
    tokens: int
    seconds: float
    read: float | None = None

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


Say = Callable[[int, list[Message], str], Awaitable[str]]
"""(dialogue, messages so far, whose message is next) -> the message."""


async def _talk_all(
    shape: Shape,
    openings: list[str],
    say: Say,
    parallel: int,
    end: Callable[[int], Awaitable[None]] | None = None,
) -> None:
    gate = asyncio.Semaphore(parallel)

    async def talk(index: int) -> None:
        async with gate:
            messages = [Message("user", openings[index % len(openings)])]
            for message in range(1, 2 * shape.turns):
                role = "assistant" if message % 2 else "user"
                text = await say(index, messages, role)
                messages.append(Message(role, text.strip() or "..."))
            if end is not None:
                await end(index)

    await asyncio.gather(*(talk(index) for index in range(shape.dialogues)))


def measure_limit(path: Path, shape: Shape) -> Rates:
    """The best rates of this file at this width; `Rates.exchange` is the limit for two caches."""
    return measure_rates(path, sequences=shape.parallel, threads=shape.threads, seconds=3.0)


def measure_engine(
    path: Path, shape: Shape, openings: list[str], *, contexts: int = 1, adapter: Path | None = None
) -> Result:
    """This engine with one context for both sides, Ask being an activated adapter or none, or with two."""

    async def run() -> Result:
        scheduler = Scheduler()
        with Model(path) as model:
            form = ContextShape(shape.parallel, shape.context, shape.threads)
            batchers = [Batcher(Context(model, form), scheduler) for _ in range(contexts)]
            lora = model.load_adapter(adapter) if adapter else None
            engines = {
                "assistant": LlamaEngine(batchers[0]),
                "user": LlamaEngine(batchers[-1], adapter=lora),
            }
            sessions: dict[tuple[int, str], Session] = {}
            open_sessions = defaultdict[int, contextlib.AsyncExitStack](contextlib.AsyncExitStack)
            heard: dict[tuple[int, str], int] = {}
            new = 0

            async def say(index: int, messages: list[Message], role: str) -> str:
                nonlocal new
                if (index, role) not in sessions:
                    beside = sessions.get((index, "assistant"))  # which speaks first
                    session = engines[role].session(beside=beside)
                    sessions[index, role] = await open_sessions[index].enter_async_context(session)
                request = _request(shape, index, messages, role)
                reply = await sessions[index, role].reply(request)
                new += reply.prompt_tokens - heard.get((index, role), 0)
                heard[index, role] = reply.prompt_tokens + reply.completion_tokens
                return reply.text

            async def end(index: int) -> None:
                await open_sessions.pop(index).aclose()

            began = time.perf_counter()
            await _talk_all(shape, openings, say, shape.parallel, end)
            seconds = time.perf_counter() - began
            made = sum(batcher.tokens_made for batcher in batchers)
            read = sum(batcher.prompt_tokens_read for batcher in batchers)
            for batcher in batchers:
                await batcher.aclose()
        way = "parrot, one context for both sides" if contexts == 1 else "parrot, a context for each side"
        return Result(_name(way, adapter), made, seconds, read / new)

    return asyncio.run(run())


def measure_two_llamas(
    path: Path, shape: Shape, openings: list[str], *, way: str = "two Llama objects taking turns"
) -> Result:
    """Two `llama_cpp.Llama` objects taking turns, a dialogue at a time: what people write today."""
    import llama_cpp

    sides = {
        role: llama_cpp.Llama(
            str(path),
            n_ctx=shape.context,
            n_threads=shape.threads,
            n_threads_batch=shape.threads,
            verbose=False,
        )
        for role in ("user", "assistant")
    }
    with Model(path, vocab_only=True) as model:
        template = _template(model)
    made = 0

    async def say(index: int, messages: list[Message], role: str) -> str:
        nonlocal made
        request = _request(shape, index, messages, role)
        sampling = request.sampling
        prompt = sides[role].tokenize(template.render(messages, role).encode(), add_bos=False, special=True)
        answer = sides[role].create_completion(
            prompt,
            max_tokens=request.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repeat_penalty,
            seed=request.seed,
        )
        made += answer["usage"]["completion_tokens"]
        return answer["choices"][0]["text"]

    began = time.perf_counter()
    asyncio.run(_talk_all(shape, openings, say, 1))
    seconds = time.perf_counter() - began
    for llama in sides.values():
        llama.close()
    return Result(way, made, seconds)


def find_llama_server(name: str | None = None) -> Path | None:
    """The llama-server binary that is named, or on the PATH."""
    found = shutil.which(name or "llama-server")
    if name and not found:
        raise ModelError(f"{name} is no program; give the path of a llama-server binary")
    return Path(found) if found else None


def measure_llama_server(
    server: Path, path: Path, shape: Shape, openings: list[str], *, adapter: Path | None = None
) -> Result:
    """llama-server given prompts as text: a slot per dialogue, read by both sides alike, as many clients.

    It is the best that can be had from it: whoever writes the client renders the template and pins slots.
    """
    with Model(path, vocab_only=True) as model:
        template = _template(model)
    way = _name(f"llama-server, {shape.parallel} slots and clients", adapter)

    async def write(client: AsyncOpenAI, index: int, messages: list[Message], role: str) -> tuple[str, int]:
        request = _request(shape, index, messages, role)
        lora = {"lora": [{"id": 0, "scale": float(role == "user")}]} if adapter else {}
        answer = await client.completions.create(
            model="-",
            prompt=template.render(messages, role),
            max_tokens=request.max_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            seed=request.seed,
            extra_body={**_beyond_openai(request), "id_slot": index % shape.parallel, **lora},
        )
        return answer.choices[0].text, answer.usage.completion_tokens if answer.usage else 0

    return _measure_server(server, path, shape, openings, adapter, way, write)


def measure_llama_server_chat(server: Path, path: Path, shape: Shape, openings: list[str]) -> Result:
    """llama-server over its chat API, as its users write it: Ask is told whom to play, roles exchanged."""
    way = f"llama-server, {shape.parallel} slots and clients, chat API"

    async def write(client: AsyncOpenAI, index: int, messages: list[Message], role: str) -> tuple[str, int]:
        request = _request(shape, index, messages, role)
        view = ask_view(Seed(""), messages, FLIPPED) if role == "user" else messages
        answer = await client.chat.completions.create(
            model="-",
            messages=[{"role": message.role, "content": message.content} for message in view],  # type: ignore[misc]
            max_tokens=request.max_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            seed=request.seed,
            extra_body=_beyond_openai(request),
        )
        return answer.choices[0].message.content or "", answer.usage.completion_tokens if answer.usage else 0

    return _measure_server(server, path, shape, openings, None, way, write)


_Write = Callable[[AsyncOpenAI, int, list[Message], str], Awaitable[tuple[str, int]]]


def _measure_server(
    server: Path,
    path: Path,
    shape: Shape,
    openings: list[str],
    adapter: Path | None,
    way: str,
    write: _Write,
) -> Result:
    made = 0

    async def run(url: str) -> float:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
            await _wait_until_ready(client)

            async def say(index: int, messages: list[Message], role: str) -> str:
                nonlocal made
                text, tokens = await write(client, index, messages, role)
                made += tokens
                return text

            began = time.perf_counter()
            await _talk_all(shape, openings, say, shape.parallel)
            return time.perf_counter() - began

    with _llama_server(server, path, shape, adapter) as url:
        seconds = asyncio.run(run(url))
    return Result(way, made, seconds)


def _beyond_openai(request: Request) -> dict[str, object]:
    """What llama-server takes and OpenAI's API does not name."""
    sampling = request.sampling
    return {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "cache_prompt": True,
    }


def _name(way: str, adapter: Path | None) -> str:
    return f"{way}, Ask an adapter" if adapter else way


@contextlib.contextmanager
def _llama_server(server: Path, path: Path, shape: Shape, adapter: Path | None) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(server), "-m", str(path), "--host", "127.0.0.1", "--port", str(port)),
        *("-np", str(shape.parallel), "-c", str(shape.parallel * shape.context)),
        *("-t", str(shape.threads), "-tb", str(shape.threads)),
        *(("--lora", str(adapter)) if adapter else ()),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def _wait_until_ready(client: AsyncOpenAI) -> None:
    deadline = time.monotonic() + _SECONDS_FOR_SERVER
    while True:
        try:
            await client.completions.create(model="-", prompt="hi", max_tokens=1)
            return
        except APIError:
            if time.monotonic() > deadline:
                raise ModelError("llama-server did not come up; run it by hand to see why") from None
            await asyncio.sleep(0.25)


def _request(shape: Shape, index: int, messages: list[Message], role: str) -> Request:
    seed = derive_seed("bench", index, len(messages))
    return Request(messages, role, max_tokens=shape.max_tokens, sampling=Sampling(), seed=seed)


def _template(model: Model) -> ChatTemplate:
    if model.chat_template is None:
        raise ModelError(f"{model.path} carries no chat template; take an instruct model")
    return ChatTemplate(model.chat_template, bos=model.bos, eos=model.eos, name=model.path.name)
