"""`ScriptedEngine`: what it says, what it remembers, and what it refuses."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Engine, Reply, Request
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.errors import EndpointError, ModelError, UsageError

REQUEST = Request([Message("user", "Hello")])


def ask(engine: Engine, *requests: Request) -> list[Reply]:
    async def talk() -> list[Reply]:
        async with engine.session() as session:
            return [await session.reply(request) for request in requests]

    return asyncio.run(talk())


def test_replies_come_in_order_and_requests_are_kept() -> None:
    engine = ScriptedEngine(["one", Reply("two", "length", completion_tokens=3)])
    other = replace(REQUEST, seed=5)
    assert ask(engine, REQUEST, other) == [Reply("one", "stop"), Reply("two", "length", completion_tokens=3)]
    assert engine.history == [REQUEST, other]


def test_exception_in_the_script_is_raised_in_its_turn() -> None:
    engine = ScriptedEngine([EndpointError("gone"), "back"])
    with pytest.raises(EndpointError, match="gone"):
        ask(engine, REQUEST)
    assert ask(engine, REQUEST)[0].text == "back"


def test_function_makes_replies_from_requests() -> None:
    engine = ScriptedEngine(lambda request: request.messages[-1].content.upper())
    assert ask(engine, REQUEST)[0].text == "HELLO"


def test_script_at_its_end_is_an_error() -> None:
    with pytest.raises(ModelError, match="only 1 replies"):
        ask(ScriptedEngine(["one"]), REQUEST, REQUEST)


def test_on_text_gets_pieces_that_make_the_text() -> None:
    pieces: list[str] = []
    text = " two  words\nand a space "
    ask(ScriptedEngine([text]), replace(REQUEST, on_text=pieces.append))
    assert "".join(pieces) == text
    assert len(pieces) > 3


def test_user_role_is_refused_where_it_is_not_written() -> None:
    request = replace(REQUEST, next_role="user")
    engine = ScriptedEngine(["one", "two"])
    assert ask(engine, request)[0].text == "one"
    engine.writes_any_role = False
    with pytest.raises(ModelError, match="assistant"):
        ask(engine, request)
    assert ask(engine, REQUEST)[0].text == "two"


def test_replies_under_way_are_bounded() -> None:
    engine = ScriptedEngine(lambda request: "x", parallel=3)

    async def made_by_round() -> list[int]:
        """How many replies there are after each round of the event loop."""
        replies = [asyncio.ensure_future(engine.reply(REQUEST)) for _ in range(7)]
        made = []
        while not all(reply.done() for reply in replies):
            await asyncio.sleep(0)
            made.append(len(engine.history))
        return made

    made = [0, *asyncio.run(made_by_round())]
    assert max(later - earlier for earlier, later in pairwise(made)) == 3
    assert made[-1] == 7


def test_any_number_of_sessions_can_be_open() -> None:
    engine = ScriptedEngine(["as Ask", "as Chat"], parallel=1)

    async def talk() -> list[str]:
        async with asyncio.timeout(5), engine.session() as ask, engine.session() as chat:
            return [(await side.reply(REQUEST)).text for side in (ask, chat)]

    assert asyncio.run(talk()) == ["as Ask", "as Chat"]


def test_closed_engine_fails() -> None:
    engine = ScriptedEngine(["one"])
    asyncio.run(engine.aclose())
    with pytest.raises(ModelError, match="closed"):
        ask(engine, REQUEST)


def test_no_room_at_all_is_refused() -> None:
    with pytest.raises(UsageError):
        ScriptedEngine([], parallel=0)
