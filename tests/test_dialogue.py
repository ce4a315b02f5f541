"""Seeds and dialogues: what a row may look like, and how a bad one is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parrot_edge.dialogue import Message, Seed, content_id, parse_seed
from parrot_edge.errors import InputError
from parrot_edge.jsonl import Line

SYSTEM, USER, ASSISTANT = Message("system", "S"), Message("user", "U"), Message("assistant", "A")


def parse(row: dict[str, Any] | str, *, text: bool = False) -> Seed:
    data = row if isinstance(row, str) else json.dumps(row)
    return parse_seed(Line("seeds.jsonl", 3, data.encode()), text=text)


def refusal(row: dict[str, Any] | str) -> str:
    with pytest.raises(InputError) as caught:
        parse(row)
    assert str(caught.value).startswith("seeds.jsonl:3: ")
    return caught.value.reason


def dicts(*messages: Message) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]


def test_prompt_is_the_opening_user_message() -> None:
    assert parse({"id": "a", "prompt": "U"}) == Seed("a", (USER,))


def test_topic_alone_has_no_message_and_waits_for_the_user() -> None:
    seed = parse({"id": "a", "topic": "tea"})
    assert seed == Seed("a", (), "tea")
    assert seed.next_role == "user"


def test_system_line_comes_first() -> None:
    assert parse({"prompt": "U", "system": "S"}).messages == (SYSTEM, USER)
    assert parse({"messages": dicts(SYSTEM, USER)}).messages == (SYSTEM, USER)
    assert parse({"topic": "tea", "system": "S"}).messages == (SYSTEM,)


def test_persona_is_kept_apart_from_the_messages() -> None:
    assert parse({"prompt": "U", "persona": "a cook"}).persona == "a cook"


def test_other_keys_are_carried() -> None:
    row = {"id": "a", "prompt": "U", "score": 1.5, "tags": ["x"], "stop_reason": None}
    assert parse(row).extra == {"score": 1.5, "tags": ["x"], "stop_reason": None}


def test_keys_that_are_null_count_as_absent() -> None:
    seed = parse(
        {"id": None, "prompt": "U", "topic": None, "system": None, "persona": None, "messages": None}
    )
    assert seed == Seed(seed.id, (USER,))


@pytest.mark.parametrize(
    ("messages", "role"),
    [((USER,), "assistant"), ((USER, ASSISTANT), "user"), ((SYSTEM, USER), "assistant"), ((SYSTEM,), "user")],
)
def test_next_role_is_whose_turn_it_is(messages: tuple[Message, ...], role: str) -> None:
    assert Seed("a", messages, "tea").next_role == role


def test_number_as_an_id_becomes_text() -> None:
    assert parse({"id": 17, "prompt": "U"}).id == "17"


def test_id_comes_from_content_where_none_is_given() -> None:
    rows = [{"prompt": "U"}, {"prompt": "V"}, {"prompt": "U", "persona": "a cook"}, {"topic": "U"}]
    ids = [parse(row).id for row in rows]
    assert len(set(ids)) == len(rows)
    assert ids == [parse(row).id for row in rows]
    assert parse({"prompt": "U", "score": 1}).id == ids[0]
    assert parse({"messages": dicts(USER)}).id == ids[0]


def test_content_id_does_not_depend_on_the_order_of_keys() -> None:
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1})


def test_row_that_failed_at_its_opening_can_be_read_again() -> None:
    assert parse({"id": "a", "topic": "tea", "messages": [], "stop_reason": "context"}).messages == ()
    assert parse({"id": "a", "topic": "tea", "messages": dicts(SYSTEM)}).messages == (SYSTEM,)


def test_line_of_text_is_a_prompt_where_text_is_taken() -> None:
    assert parse("why is the sky blue?  ", text=True).messages == (Message("user", "why is the sky blue?"),)
    assert parse('["not", "an object"]', text=True).messages[0].content == '["not", "an object"]'
    assert parse('{"id": "a", "topic": "tea"}', text=True).topic == "tea"


def test_line_of_text_is_refused_otherwise() -> None:
    assert refusal("why is the sky blue?").startswith("is not JSON")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, 'has no "prompt", no "topic" and no turn in "messages"'),
        ({"id": "a"}, 'has no "prompt"'),
        ({"messages": []}, 'has no "prompt"'),
        ({"messages": dicts(SYSTEM)}, 'has no "prompt"'),
        ({"system": "S"}, 'has no "prompt"'),
        ({"prompt": ""}, '"prompt" must be a non-empty text'),
        ({"prompt": "  \n"}, '"prompt" must be a non-empty text'),
        ({"prompt": 5}, '"prompt" must be a non-empty text'),
        ({"prompt": ["x"]}, '"prompt" must be a non-empty text'),
        ({"id": "", "prompt": "U"}, '"id" must be'),
        ({"id": True, "prompt": "U"}, '"id" must be'),
        ({"id": 1.5, "prompt": "U"}, '"id" must be'),
        ({"prompt": "U", "persona": {}}, '"persona" must be'),
        ({"prompt": "U\0"}, '"prompt" holds a NUL character'),
        ({"prompt": "\ud800"}, '"prompt" holds half of a surrogate pair'),
        ({"id": "\udfff", "prompt": "U"}, '"id" holds half of a surrogate pair'),
        ({"prompt": "U", "messages": dicts(USER)}, 'has both "prompt" and "messages"'),
        ({"system": "S", "messages": dicts(SYSTEM, USER)}, 'has "system" and a system message'),
        ({"messages": {}}, '"messages" must be a list'),
        ({"messages": "U"}, '"messages" must be a list'),
        ({"messages": ["U"]}, "message 1 must be"),
        ({"messages": [{"role": "user"}]}, "message 1 must be"),
        ({"messages": [{"content": "U"}]}, "message 1 must be"),
        ({"messages": [*dicts(USER), {"role": "assistant", "content": None}]}, "message 2 must be"),
        (
            {"messages": [{"role": "tool", "content": "U"}]},
            "message 1 has role 'tool'; use one of system, user",
        ),
        ({"messages": [{"role": ["user"], "content": "U"}]}, "message 1 has role"),
        ({"messages": dicts(ASSISTANT)}, "message 1 is from 'assistant' where 'user' is due"),
        ({"messages": dicts(USER, USER)}, "message 2 is from 'user' where 'assistant' is due"),
        ({"messages": dicts(SYSTEM, USER, ASSISTANT, ASSISTANT)}, "message 4 is from 'assistant'"),
        ({"messages": dicts(USER, SYSTEM)}, "message 2 is from 'system' where 'assistant' is due"),
        ({"messages": dicts(USER, Message("assistant", " "))}, "message 2 is empty"),
        ({"messages": dicts(Message("user", "a\0b"))}, "message 1 holds a NUL character"),
        ({"messages": dicts(Message("user", "\udc00"))}, "message 1 holds half of a surrogate pair"),
    ],
)
def test_bad_row_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(row)


def test_refusal_of_a_long_value_stays_short() -> None:
    assert len(refusal({"messages": [{"role": "x" * 10_000, "content": "U"}]})) < 200
