"""Activated adapters on the real 135M model: the base reads, the adapter writes, one cache serves both."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

from tiny_gguf import write_lora

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Request, Sampling
from parrot_edge.engine.batch import Batcher, Scheduler
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.llama import LlamaEngine
from parrot_edge.engine.native import Context, ContextShape, Model, is_activated
from parrot_edge.errors import ModelError
from parrot_edge.models import LocalModel
from parrot_edge.pair import Load, open_pair

HEADER = "<|im_start|>user\n"
GREEDY = Sampling(temperature=0, repeat_penalty=1.0)
TALK = [Message("user", "Name a river."), Message("assistant", "The Rhine. It flows through Basel.")]


@pytest.fixture(scope="module")
def adapter(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of rank 4 on the attention of five blocks, activated by the user's header."""
    path = tmp_path_factory.mktemp("adapter") / "ask.gguf"
    with Model(embedded_model, vocab_only=True) as model:
        invocation = model.tokenize(HEADER.encode())
    metadata = {
        "adapter.lora.alpha": 4.0,
        "parrot.role": "ask",
        "adapter.alora.invocation_tokens": invocation,
    }
    rng, tensors = np.random.default_rng(0), {}
    for block in range(5):
        for part, rows in (("q", 576), ("v", 192)):
            name = f"blk.{block}.attn_{part}.weight.lora_"
            tensors[name + "a"] = rng.normal(0, 0.05, (4, 576)).astype(np.float32)
            tensors[name + "b"] = rng.normal(0, 0.4, (rows, 4)).astype(np.float32)
    return write_lora(path, metadata, **tensors)


def reference(path: Path, adapter: Path, history: str, start: str, count: int) -> str:
    """What llama.cpp writes after `start`, read with the adapter, when it read `history` without; greedy."""
    with Model(path) as model, Context(model, ContextShape(1, 512, 1)) as context:
        before, tokens = model.tokenize(history.encode()), model.tokenize(start.encode())
        if before:
            context.decode([(0, 0, before, False)])
        context.apply(model.load_adapter(adapter))
        position, made = len(before), b""
        for _ in range(count):
            [output] = context.decode([(0, position, tokens, True)])
            position += len(tokens)
            tokens = [int(context.logits(output).argmax())]
            if model.ends_turn(tokens[0]):
                break
            made += model.piece(tokens[0])
        return made.decode("utf-8", "ignore")


def test_only_the_reply_is_the_adapters(embedded_model: Path, adapter: Path) -> None:
    with LlamaEngine.open(
        embedded_model, adapter=adapter, sequences=2, tokens=512, threads=1, exact=True
    ) as engine:
        prompt = engine.render(Request(TALK, "user")).decode()
        assert prompt.endswith(HEADER)

        async def ask() -> str:
            async with engine.session() as session:
                return (await session.reply(Request(TALK, "user", max_tokens=10, sampling=GREEDY))).text

        said = asyncio.run(ask())
    history = prompt.removesuffix(HEADER)
    assert said == reference(embedded_model, adapter, history, HEADER, 10)
    assert said != reference(embedded_model, adapter, "", prompt, 10)  # as a plain adapter would


def talk(ask: Any, chat: Any, *, shared: bool) -> tuple[list[str], int]:
    """Four messages; what was said, and how many tokens had to be read for them."""

    async def run() -> tuple[list[str], int]:
        messages, read = list(TALK), 0
        async with chat.session() as answering, ask.session(beside=answering if shared else None) as asking:
            for turn in range(4):
                role = "assistant" if turn % 2 else "user"
                session = asking if role == "user" else answering
                reply = await session.reply(Request(messages, role, max_tokens=8, sampling=GREEDY))
                messages = [*messages, Message(role, reply.text)]
                read += reply.new_tokens
        return [message.content for message in messages[len(TALK) :]], read

    return asyncio.run(run())


def test_a_shared_cache_changes_nothing_but_the_work(embedded_model: Path, adapter: Path) -> None:
    model = Model(embedded_model)
    batcher = Batcher(Context(model, ContextShape(2, 512, 1)), Scheduler(), exact=True)
    chat = LlamaEngine(batcher)
    ask = LlamaEngine(batcher, adapter=model.load_adapter(adapter))
    together, read = talk(ask, chat, shared=True)
    apart, read_twice = talk(ask, chat, shared=False)
    chat.close()
    assert together == apart
    assert read < 0.7 * read_twice


def test_base_and_adapter_share_a_context(embedded_model: Path, adapter: Path) -> None:
    ask = LocalModel("smollm2+ask", embedded_model, adapter)
    chat = LocalModel("smollm2", embedded_model)

    async def look() -> None:
        async with open_pair(ask, chat, Load(4, 2, 16, threads=1)) as (one, other):
            assert isinstance(one, LlamaEngine)
            assert isinstance(other, LlamaEngine)
            assert one is not other
            assert one.batcher is other.batcher
            assert one.metadata["parrot.role"] == "ask"
            assert "parrot.role" not in other.metadata

    asyncio.run(look())


def test_many_dialogues_with_both_voices_at_once(embedded_model: Path, adapter: Path) -> None:
    """Sides change at different moments, more conversations than lanes: each still reads its own text."""
    model = Model(embedded_model)
    batcher = Batcher(Context(model, ContextShape(2, 512, 1)), Scheduler(), exact=True)
    chat, ask = LlamaEngine(batcher), LlamaEngine(batcher, adapter=model.load_adapter(adapter))
    openings = ["Name a river.", "Why is the sky blue?", "Hi!", "Count to 3.", "Why?", "Sing a song for me."]

    async def converse(opening: str) -> list[str]:
        messages = [Message("user", opening)]
        async with chat.session() as answering, ask.session(beside=answering) as asking:
            for turn in range(4):
                role, session = ("user", asking) if turn % 2 else ("assistant", answering)
                most = 4 + len(opening) % 5
                reply = await session.reply(Request(messages, role, max_tokens=most, sampling=GREEDY))
                messages = [*messages, Message(role, reply.text or "...")]
        return [message.content for message in messages]

    async def all_at_once() -> list[list[str]]:
        return await asyncio.wait_for(asyncio.gather(*map(converse, openings)), timeout=300)

    together = asyncio.run(all_at_once())
    alone = [asyncio.run(converse(opening)) for opening in openings]
    chat.close()
    assert together == alone


def test_a_prompt_without_the_invocation_is_refused(embedded_model: Path, adapter: Path) -> None:
    with LlamaEngine.open(embedded_model, adapter=adapter, sequences=1, tokens=256, threads=1) as engine:

        async def answer() -> None:
            async with engine.session() as session:
                await session.reply(Request([], "assistant", max_tokens=2))

        with pytest.raises(ModelError, match="none of the headers"):
            asyncio.run(answer())


def test_likelihood_reads_the_history_with_the_base(embedded_model: Path, adapter: Path) -> None:
    text = "and what about the Danube?"
    with Likelihood(embedded_model, adapter=adapter, tokens=512, threads=1) as likelihood:
        tokens, start = likelihood.encode(TALK, "user", text)
        scores = likelihood.log_probs(tokens, start)
        again = likelihood.log_probs(tokens, start)
    np.testing.assert_allclose(scores, again, atol=1e-4)
    with Model(embedded_model) as model, Context(model, ContextShape(1, 512, 1, outputs=64)) as context:
        active = start - len(model.tokenize(HEADER.encode()))
        context.decode([(0, 0, tokens[:active], False)])
        context.apply(model.load_adapter(adapter))
        outputs = context.decode([(0, active, tokens[active:-1], len(tokens) - active - 1)])
        expected = []
        for output, token in zip(outputs[start - active - 1 :], tokens[start:], strict=True):
            logits = context.logits(output).astype(np.float64)
            expected.append(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    np.testing.assert_allclose(scores, expected, atol=0.02)


def test_the_header_tells_what_is_activated(embedded_model: Path, adapter: Path, tmp_path: Path) -> None:
    assert is_activated(adapter)
    assert not is_activated(embedded_model)
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(adapter.read_bytes()[:40])
    with pytest.raises(ModelError, match=r"torn\.gguf cannot be read"):
        is_activated(torn)
