"""The engine on the real 135M model: batches, caches, determinism, ends."""

import asyncio
from contextlib import AsyncExitStack

import numpy as np
import pytest

from parrot_edge.dialogue import Message
from parrot_edge.engine import native
from parrot_edge.engine.attention import Attention
from parrot_edge.engine.base import Request, Sampling
from parrot_edge.engine.llama import LlamaEngine
from parrot_edge.engine.native import BufferPool
from parrot_edge.errors import ModelError, UsageError

QUESTIONS = [
    "Name three rivers.",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "Hi!",
    "What is 2 + 2?",
    "Describe a fox in one sentence.",
]


@pytest.fixture(scope="module")
def engine(embedded_model):
    with LlamaEngine.open(embedded_model, sequences=4, tokens=512, threads=1) as engine:
        yield engine


def replies_to(engine, conversations, **options):
    async def one(index, messages):
        async with engine.session() as session:
            return await session.reply(Request(messages, seed=index, **options))

    async def all_of_them():
        return await asyncio.gather(*(one(index, messages) for index, messages in conversations.items()))

    return dict(zip(conversations, asyncio.run(all_of_them()), strict=True))


def ask(text):
    return [Message("user", text)]


def test_more_conversations_than_sequences_are_all_answered(engine):
    replies = engine.generate(QUESTIONS, max_tokens=12)
    assert len(replies) == len(QUESTIONS)
    assert all(reply.text and reply.finish in ("stop", "length") for reply in replies)
    assert all(reply.completion_tokens <= 12 for reply in replies)


def test_the_same_calls_give_the_same_text(engine):
    first, second = (engine.generate(QUESTIONS, max_tokens=12, seed=7) for _ in range(2))
    assert first == second


def test_another_seed_gives_other_text(engine):
    one, other = (engine.generate(QUESTIONS, max_tokens=12, seed=seed) for seed in (1, 2))
    assert [reply.text for reply in one] != [reply.text for reply in other]


def test_exact_mode_depends_on_neither_order_nor_width(embedded_model):
    conversations = {index: ask(question) for index, question in enumerate(QUESTIONS)}
    backwards = dict(reversed(conversations.items()))
    with LlamaEngine.open(embedded_model, sequences=4, tokens=512, threads=1, exact=True) as wide:
        many = replies_to(wide, conversations, max_tokens=10)
    with LlamaEngine.open(embedded_model, sequences=1, tokens=512, threads=1, exact=True) as narrow:
        single = replies_to(narrow, backwards, max_tokens=10)
    assert {key: reply.text for key, reply in many.items()} == {
        key: reply.text for key, reply in single.items()
    }


def test_greedy_text_equals_that_of_llama_cpp_python(embedded_model, monkeypatch):
    """With llama.cpp's own attention; ours may take the other of two tokens that are about as likely."""
    import llama_cpp

    monkeypatch.setattr(native, "attention", lambda: Attention(None, "for this test"))
    request = Request(ask(QUESTIONS[0]), max_tokens=8, sampling=Sampling(temperature=0, repeat_penalty=1.0))
    with LlamaEngine.open(embedded_model, sequences=1, tokens=512, threads=1) as engine:
        [reply] = replies_to(engine, {0: request.messages}, max_tokens=8, sampling=request.sampling).values()
        prompt = engine.render(request).decode()
    llama = llama_cpp.Llama(str(embedded_model), n_ctx=512, n_threads=1, verbose=False)
    answer = llama.create_completion(prompt, max_tokens=8, temperature=0, repeat_penalty=1.0)
    llama.close()
    assert reply.text == answer["choices"][0]["text"]


def test_a_long_dialogue_reads_only_what_is_new(engine):
    async def talk():
        messages, read, new = [Message("user", "Tell me about foxes.")], 0, 0
        async with engine.session() as session:
            before = 0
            for turn in range(4):
                reply = await session.reply(Request(messages, max_tokens=16, seed=turn))
                read += reply.new_tokens
                new += reply.prompt_tokens - before
                before = reply.prompt_tokens + reply.completion_tokens
                messages += [Message("assistant", reply.text.strip() or "ok"), Message("user", "And then?")]
        return read, new

    read, new = asyncio.run(talk())
    assert new <= read <= 1.15 * new


PERSONA = (
    "You are the keeper of a lighthouse on a small island, and you answer everyone in one short sentence."
)


def told(question):
    return [Message("system", PERSONA), Message("user", question)]


def prompts_of(engine, questions):
    return [engine.batcher.model.tokenize(engine.render(Request(told(text)))) for text in questions]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_conversations_begin_with_alike_is_read_once(engine, at_once):
    greedy = {"max_tokens": 8, "sampling": Sampling(temperature=0)}
    questions = QUESTIONS[:3]
    alone = [replies_to(engine, {0: told(text)}, **greedy)[0] for text in questions]

    async def one_after_the_other():
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(engine.session()) for _ in questions]
            return [
                await session.reply(Request(told(text), **greedy))
                for session, text in zip(sessions, questions, strict=True)
            ]

    if at_once:
        replies = list(replies_to(engine, dict(enumerate(map(told, questions))), **greedy).values())
    else:
        replies = asyncio.run(one_after_the_other())
    prompts = prompts_of(engine, questions)
    same = next(at for at, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert same > 20
    read = [reply.new_tokens for reply in replies]
    assert max(read) == len(prompts[read.index(max(read))])
    assert sum(read) == sum(map(len, prompts)) - 2 * same
    assert [reply.text for reply in replies] == [reply.text for reply in alone]
    assert [reply.new_tokens for reply in alone] == [reply.prompt_tokens for reply in alone]


def test_different_beginnings_are_read_side_by_side(engine, monkeypatch):
    decoded = count_rows(engine.batcher.context, monkeypatch)
    replies_to(engine, {0: told("Hi!"), 1: told("Hello!")}, max_tokens=2)
    alike, decoded[:] = list(decoded), []
    replies_to(
        engine, {0: told("Where is it?"), 1: ask("Where is the lighthouse of Alexandria?")}, max_tokens=2
    )
    assert alike[:2] == [1, 1]
    assert decoded[0] == 2


def count_rows(context, monkeypatch):
    """How many sequences each decode has."""
    counts, decode = [], context.decode
    monkeypatch.setattr(context, "decode", lambda rows: counts.append(len(rows)) or decode(rows))
    return counts


@pytest.mark.parametrize(("others", "rides"), [(4, True), (3, False)])
def test_a_header_is_read_beside_the_replies_under_way(embedded_model, monkeypatch, others, rides):
    """A token a step; with few beside it, in a step of its own."""

    async def both_turns(engine):
        async with engine.session() as session:
            answer = await session.reply(Request(ask("Hi!"), max_tokens=2))
            read = len(decoded)
            messages = [*ask("Hi!"), Message("assistant", answer.text)]
            return read, await session.reply(Request(messages, "user", max_tokens=2))

    async def talk_beside(engine):
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(engine.session()) for _ in range(others)]
            request = Request(ask(QUESTIONS[2]), max_tokens=24, sampling=Sampling(temperature=0))
            turns = asyncio.create_task(both_turns(engine))
            await asyncio.gather(*(session.reply(request) for session in sessions))
            return await turns

    with LlamaEngine.open(embedded_model, sequences=5, tokens=256, threads=1) as engine:
        context, decoded = engine.batcher.context, []
        decode = context.decode
        monkeypatch.setattr(
            context, "decode", lambda rows: decoded.append([len(row[2]) for row in rows]) or decode(rows)
        )
        read, reply = asyncio.run(talk_beside(engine))
    assert 2 < reply.new_tokens <= 8
    assert reply.completion_tokens > 0
    alone = [rows for rows in decoded[read:] if max(rows) > 1]
    assert alone == ([] if rides else [[reply.new_tokens]])
    together = [rows for rows in decoded[read:] if len(rows) == others + 1]
    assert len(together) >= (reply.new_tokens if rides else 1)


def test_exact_mode_reads_every_beginning(embedded_model):
    with LlamaEngine.open(embedded_model, sequences=2, tokens=256, threads=1, exact=True) as exact:
        replies = replies_to(exact, {0: told("Hi!"), 1: told("Who are you?")}, max_tokens=2)
    assert all(reply.new_tokens == reply.prompt_tokens for reply in replies.values())


def test_a_model_that_cannot_drop_a_part_of_its_cache_reads_every_beginning(embedded_model, monkeypatch):
    with LlamaEngine.open(embedded_model, sequences=3, tokens=256, threads=1) as engine:
        context = engine.batcher.context
        forget = context.forget
        monkeypatch.setattr(context, "forget", lambda lane, start=0: start == 0 and forget(lane))
        replies = replies_to(
            engine, {index: told(text) for index, text in enumerate(QUESTIONS[:3])}, max_tokens=2
        )
    assert all(reply.text and reply.new_tokens == reply.prompt_tokens for reply in replies.values())


async def talk(engine, index):
    """Three turns of a conversation: its replies, and how many tokens were read for them."""
    messages, texts, read = ask(QUESTIONS[index]), [], 0
    async with engine.session() as session:
        for turn in range(3):
            reply = await session.reply(Request(messages, max_tokens=8, seed=turn))
            texts.append(reply.text)
            read += reply.new_tokens
            messages = [*messages, Message("assistant", reply.text), Message("user", "Go on.")]
    return texts, read


async def talk_at_once(engine, count):
    return await asyncio.gather(*(talk(engine, index) for index in range(count)))


def test_a_conversation_that_lost_its_lane_keeps_its_cache(embedded_model):
    """With one lane, two conversations push each other out of it at every turn."""
    with LlamaEngine.open(embedded_model, sequences=1, tokens=512, threads=1, exact=True) as engine:
        together = asyncio.run(talk_at_once(engine, 2))
        alone = [asyncio.run(talk(engine, index)) for index in (0, 1)]
    assert together == alone


def test_conversations_that_fit_keep_a_lane(embedded_model):
    """Whoever speaks gets neighbouring lanes; who has to leave one for that finds another that is free."""

    async def come_and_go(engine):
        kept = []
        async with engine.session() as first:
            await first.reply(Request(ask("Hi!"), max_tokens=2))
            for count in (1, 2, 3, 2):
                async with AsyncExitStack() as stack:
                    others = [await stack.enter_async_context(engine.session()) for _ in range(count)]
                    await asyncio.gather(
                        *(other.reply(Request(ask("Hi!"), max_tokens=2)) for other in others)
                    )
                    kept.append(first.conversation.saved is None)
        return kept

    with LlamaEngine.open(embedded_model, sequences=4, tokens=256, threads=1) as engine:
        assert asyncio.run(come_and_go(engine)) == [True] * 4


def test_memory_of_saved_conversations_is_used_again(embedded_model, monkeypatch):
    """Conversations that end while they are saved give their memory back as well."""
    made = []
    monkeypatch.setattr(native.np, "empty", lambda *shape: made.append(shape) or np.zeros(*shape))
    with LlamaEngine.open(embedded_model, sequences=1, tokens=256, threads=1) as engine:
        for _ in range(4):
            asyncio.run(talk_at_once(engine, 3))
    assert 1 <= len(made) <= 3


def test_a_buffer_that_is_larger_than_planned_is_not_kept():
    pool = BufferPool(100)
    assert pool.take(200).size == 200
    pool.give(pool.take(200))
    assert pool.take(100).size == 100


def test_the_users_turn_can_be_written(engine):
    messages = [Message("user", "hi"), Message("assistant", "Hello! How can I help?")]
    request = Request(messages, "user", max_tokens=16)
    assert engine.render(request).endswith(b"<|im_start|>user\n")
    [reply] = replies_to(engine, {0: messages}, next_role="user", max_tokens=16).values()
    assert reply.completion_tokens > 0


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(engine):
    sampling = Sampling(temperature=0)
    [free] = replies_to(engine, {0: ask("Count from 1 to 9.")}, max_tokens=30, sampling=sampling).values()
    stop = free.text[5:8]
    [cut] = replies_to(
        engine, {0: ask("Count from 1 to 9.")}, max_tokens=30, sampling=sampling, stop=(stop,)
    ).values()
    assert cut.finish == "stop"
    assert cut.text == free.text[: free.text.index(stop)]


def test_streamed_pieces_make_the_reply(engine):
    pieces = []
    [reply] = replies_to(
        engine, {0: ask("Say something nice.")}, max_tokens=20, stop=("nowhere",), on_text=pieces.append
    ).values()
    assert "".join(pieces) == reply.text
    assert len(pieces) > 1


def test_a_grammar_binds_the_reply(engine):
    sampling = Sampling(grammar='root ::= ("yes" | "no")')
    [reply] = replies_to(engine, {0: ask("Is water wet?")}, max_tokens=8, sampling=sampling).values()
    assert reply.text in ("yes", "no")


def test_a_bad_grammar_fails_that_reply_alone(engine):
    async def two():
        async with engine.session() as good, engine.session() as bad:
            return await asyncio.gather(
                good.reply(Request(ask("hi"), max_tokens=4)),
                bad.reply(Request(ask("hi"), max_tokens=4, sampling=Sampling(grammar="root ::= ("))),
                return_exceptions=True,
            )

    good, bad = asyncio.run(two())
    assert good.completion_tokens > 0
    assert isinstance(bad, UsageError)


def test_a_prompt_that_does_not_fit_says_so(engine):
    [reply] = replies_to(engine, {0: ask("word " * 600)}, max_tokens=4).values()
    assert (reply.finish, reply.text) == ("context", "")


def test_a_reply_that_fills_the_context_says_so(engine):
    [reply] = replies_to(engine, {0: ask("word " * 460)}, max_tokens=300).values()
    assert reply.finish in ("context", "stop")
    assert reply.prompt_tokens + reply.completion_tokens <= 513


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"sampling": Sampling(temperature=-1)}, {"sampling": Sampling(top_p=0)}],
)
def test_an_option_outside_its_range_is_refused(engine, options):
    with pytest.raises(UsageError, match="outside its range"):
        replies_to(engine, {0: ask("hi")}, **options)


def test_a_cancelled_reply_leaves_the_engine_working(engine):
    async def cancel_one():
        async with engine.session() as session:
            task = asyncio.create_task(session.reply(Request(ask("Tell me a long story."), max_tokens=400)))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel_one())
    assert engine.generate(["hi"], max_tokens=4)[0].completion_tokens > 0


def test_a_template_that_refuses_fails_that_reply_alone(embedded_model):
    with LlamaEngine.open(embedded_model, sequences=2, tokens=256, threads=1) as engine:

        def refuse(messages, next_role):
            raise ModelError("no")

        async def two():
            async with engine.session() as one, engine.session() as other:
                first = asyncio.create_task(one.reply(Request(ask("hi"), max_tokens=4)))
                await asyncio.sleep(0.05)
                template = engine.batcher._template
                render, template.render = template.render, refuse
                second = await asyncio.gather(other.reply(Request(ask("hi"))), return_exceptions=True)
                template.render = render
                return await first, second[0]

        first, second = asyncio.run(two())
    assert first.completion_tokens > 0
    assert isinstance(second, ModelError)
