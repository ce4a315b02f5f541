"""One message more for every dialogue: what `parrot ask` and `parrot chat` do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Reply
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.errors import EndpointError, OutputError, ParrotError
from parrot_edge.extend import extend_dialogues
from parrot_edge.roles import ATTEMPTS, Speaker

USER, ASSISTANT = Message("user", "What is tea?"), Message("assistant", "A drink.")


def extend(role: str, engine: ScriptedEngine, *seeds: Seed, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    write = options.pop("write", rows.append)
    asyncio.run(extend_dialogues(role, Speaker(engine), iter(seeds), write, **options))
    return rows


def test_chat_answers() -> None:
    engine = ScriptedEngine(["A drink."])
    assert extend("assistant", engine, Seed("a", (USER,))) == [
        {"id": "a", "messages": [USER.as_dict(), ASSISTANT.as_dict()], "stop_reason": None}
    ]
    assert engine.history[0].next_role == "assistant"


def test_ask_asks_on() -> None:
    engine = ScriptedEngine(["And then?"])
    (row,) = extend("user", engine, Seed("a", (USER, ASSISTANT)))
    assert row["messages"][2:] == [{"role": "user", "content": "And then?"}]
    assert engine.history[0].next_role == "user"


def test_ask_opens_a_topic() -> None:
    (row,) = extend("user", ScriptedEngine(["What is tea?"]), Seed("a", topic="tea", persona="a cook"))
    assert row == {
        "id": "a",
        "messages": [USER.as_dict()],
        "topic": "tea",
        "persona": "a cook",
        "stop_reason": None,
    }


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([""], "end"),
        ([Reply("", "context")], "context"),
        (["What is tea?"] * ATTEMPTS, "repetition"),
        (["Sure! Here are three ideas:"] * ATTEMPTS, "role_flip"),
    ],
)
def test_dialogue_that_ends_here_gets_its_reason_and_no_message(
    replies: list[str | Reply], reason: str
) -> None:
    (row,) = extend("user", ScriptedEngine(replies), Seed("a", (USER, ASSISTANT)))
    assert (row["stop_reason"], len(row["messages"])) == (reason, 2)


def test_dialogue_that_has_ended_is_passed_on_as_it_is() -> None:
    engine = ScriptedEngine([])
    extra = {"ask_model": "x", "stop_reason": "end", "score": 1}
    (row,) = extend("user", engine, Seed("a", (USER, ASSISTANT), extra=extra))
    assert row == {"id": "a", "messages": [USER.as_dict(), ASSISTANT.as_dict()], **extra}
    assert engine.history == []


def test_same_keys_go_out_as_came_in() -> None:
    (row,) = extend(
        "assistant", ScriptedEngine(["A drink."]), Seed("a", (USER,), extra={"stop_reason": None, "n": 1})
    )
    assert row["n"] == 1
    assert row["stop_reason"] is None


def test_error_of_an_engine_ends_the_work() -> None:
    with pytest.raises(EndpointError):
        extend("assistant", ScriptedEngine([EndpointError("gone")]), Seed("a", (USER,)))


def test_error_of_one_dialogue_is_passed_on_where_that_is_wanted() -> None:
    failed: list[str] = []

    def note(seed: Seed, error: ParrotError) -> None:
        failed.append(f"{seed.id}: {error}")

    engine = ScriptedEngine([EndpointError("gone"), "A drink."])
    rows = extend("assistant", engine, Seed("a", (USER,)), Seed("b", (USER,)), on_failure=note, parallel=1)
    assert failed == ["a: gone"]
    assert [row["id"] for row in rows] == ["b"]


def test_output_that_fails_ends_the_work_even_so() -> None:
    def write(row: dict[str, Any]) -> None:
        raise OutputError("disk full")

    with pytest.raises(OutputError):
        extend(
            "assistant",
            ScriptedEngine(["A drink."]),
            Seed("a", (USER,)),
            write=write,
            on_failure=lambda *_: None,
        )
