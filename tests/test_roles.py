"""How Ask is prompted, and the detectors: role flip, repetition, farewell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Reply
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.roles import (
    ATTEMPTS,
    END_MARK,
    FLIPPED,
    NATIVE,
    ROLE_KEY,
    SYSTEM_KEY,
    AskPrompt,
    Speaker,
    Utterance,
    ask_view,
    repeats,
    say_as_ask,
    say_as_chat,
    says_farewell,
    sounds_like_assistant,
)

SYSTEM = Message("system", "Talk like a pirate.")
USER, ASSISTANT = Message("user", "What is tea?"), Message("assistant", "A drink.")


def user(*texts: str) -> list[Message]:
    """A dialogue with these messages of the user, each answered."""
    return [message for text in texts for message in (Message("user", text), Message("assistant", "Fine."))]


# What Ask sees


def test_native_view_is_the_conversation_itself() -> None:
    prompt = AskPrompt(native=True)
    assert ask_view(Seed("a"), [USER, ASSISTANT], prompt) == [USER, ASSISTANT]


def test_native_view_tells_whom_to_play_in_a_system_line() -> None:
    prompt = AskPrompt(native=True)
    system, *turns = ask_view(Seed("a", persona="a tired cook"), [SYSTEM, USER, ASSISTANT], prompt)
    assert system.role == "system"
    assert "a tired cook" in system.content
    assert "pirate" not in system.content
    assert turns == [USER, ASSISTANT]


def test_native_view_tells_the_topic_for_the_opening_alone() -> None:
    prompt, seed = AskPrompt(native=True), Seed("a", topic="green tea")
    (opening,) = ask_view(seed, [], prompt)
    assert (opening.role, "green tea" in opening.content) == ("system", True)
    assert "green tea" not in str(ask_view(seed, [USER, ASSISTANT], prompt))


def test_native_view_begins_with_the_line_of_the_prompt() -> None:
    view = ask_view(Seed("a", persona="a cook"), [USER], AskPrompt(native=True, system="Be a user."))
    assert view[0].content.startswith("Be a user.")
    assert "a cook" in view[0].content


def test_flipped_view_exchanges_the_roles_and_ends_with_the_answer() -> None:
    view = ask_view(Seed("a"), [SYSTEM, USER, ASSISTANT], FLIPPED)
    assert [message.role for message in view] == ["system", "user", "assistant", "user"]
    assert [message.content for message in view[2:]] == [USER.content, ASSISTANT.content]
    assert END_MARK in view[0].content
    assert "pirate" not in str(view)


def test_flipped_view_of_an_opening_ends_with_a_greeting_to_answer() -> None:
    view = ask_view(Seed("a", topic="green tea", persona="a cook"), [], FLIPPED)
    assert [message.role for message in view] == ["system", "user"]
    assert "green tea" in view[0].content
    assert "a cook" in view[0].content


def test_prompt_suits_the_engine() -> None:
    engine = ScriptedEngine([])
    assert Speaker(engine).ask_prompt == NATIVE
    assert Speaker(engine, prompt=FLIPPED).ask_prompt == FLIPPED
    engine.metadata = {ROLE_KEY: "ask", SYSTEM_KEY: "You are a user."}
    assert Speaker(engine).ask_prompt == AskPrompt(native=True, system="You are a user.")
    engine.writes_any_role = False
    assert Speaker(engine).ask_prompt == FLIPPED


# Attempts


def ask_once(replies: Iterable[str | Reply], *, native: bool = True) -> tuple[Utterance, ScriptedEngine]:
    engine = ScriptedEngine(replies)
    speaker = Speaker(engine, prompt=NATIVE if native else FLIPPED)

    async def say() -> Utterance:
        async with engine.session() as session:
            return await say_as_ask(speaker, session, Seed("a"), [USER, ASSISTANT], 0)

    return asyncio.run(say()), engine


def chat_once(
    replies: Iterable[str | Reply], shown: list[str] | None = None
) -> tuple[Utterance, ScriptedEngine]:
    engine = ScriptedEngine(replies)
    on_text = None if shown is None else shown.append

    async def say() -> Utterance:
        async with engine.session() as session:
            messages = [USER, ASSISTANT, Message("user", "And?")]
            return await say_as_chat(Speaker(engine), session, Seed("a"), messages, 0, on_text)

    return asyncio.run(say()), engine


def test_white_space_around_a_message_is_dropped() -> None:
    assert ask_once(["  And then?\n"])[0] == Utterance("And then?")


@pytest.mark.parametrize("native", [True, False])
def test_end_mark_ends_at_once(native: bool) -> None:
    said, engine = ask_once([END_MARK], native=native)
    assert (said.stop_reason, len(engine.history)) == ("end", 1)


def test_every_attempt_has_a_seed_of_its_own_and_is_counted() -> None:
    replies = [Reply("As an AI, I cannot", "stop", new_tokens=4, completion_tokens=2)] * ATTEMPTS
    said, engine = ask_once(replies)
    assert said == Utterance(stop_reason="role_flip", read=4 * ATTEMPTS, made=2 * ATTEMPTS)
    assert len({request.seed for request in engine.history}) == ATTEMPTS


def test_message_cut_at_its_limit_is_kept_and_marked() -> None:
    assert ask_once([Reply("And then", "length")])[0] == Utterance("And then", cut=True)


def test_message_cut_by_the_context_is_not_kept() -> None:
    assert ask_once([Reply("And th", "context", new_tokens=3)])[0] == Utterance(stop_reason="context", read=3)


def test_answer_is_drawn_again_where_it_repeats_or_is_empty() -> None:
    said, engine = chat_once(["A drink!", "", "It grows."])
    assert (said.text, len(engine.history)) == ("It grows.", 3)


def test_answer_that_was_shown_is_not_taken_back() -> None:
    shown: list[str] = []
    said, engine = chat_once(["A drink!"], shown)
    assert (said.text, said.stop_reason, len(engine.history)) == ("A drink!", None, 1)
    assert "".join(shown) == "A drink!"


def test_chat_may_sound_like_an_assistant() -> None:
    assert chat_once(["Sure! Here are three ideas:"])[0].text == "Sure! Here are three ideas:"


# Detectors


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here are three ideas for dinner:",
        "Certainly. Tea is a drink.",
        "As an AI language model, I have no taste.",
        "I'd be happy to help with that.",
        "That's a great question!",
        "Great question. Tea comes from",
        "**Of course**, let us begin.",
        "Tea is a drink. I hope this helps!",
        "It is green. Let me know if you have more to ask.",
        "Is there anything else I can do",
        "1. Boil water.\n2. Add leaves.\n3. Wait.",
        "- one\n- two\n- three",
        "You are a helpful AI assistant named Otto, made in a shed",
        "You are a helpful AI named Otto, made in a shed",
    ],
)
def test_answer_in_the_users_place_is_a_role_flip(text: str) -> None:
    assert sounds_like_assistant(text)


@pytest.mark.parametrize(
    "text",
    [
        "sounds good, but what about the rice?",
        "how do i make tea",
        "What do you mean by that?",
        "I tried this:\n1. boil\n2. wait\n3. drink\nwhat did I do wrong?",
        "thanks! and coffee?",
        "sure, but how long does it take?",
        "I have two things to buy:\n- rice\n- beans",
        "Surely that is too hot.",
        "You are a strict assistant that shortens letters. Shorten this one.",
        "ok",
        "",
    ],
)
def test_message_of_a_user_is_no_role_flip(text: str) -> None:
    assert not sounds_like_assistant(text)


@pytest.mark.parametrize(
    ("text", "earlier"),
    [
        ("And what about the rice?", "and what about the rice"),
        ("And what about the rice?", "And what about the  rice, then?"),
        ("What is the best way to cook white rice?", "What is the best way to cook the white rice?"),
        ("!!!", "?"),
    ],
)
def test_what_was_said_before_is_a_repetition(text: str, earlier: str) -> None:
    assert repeats(text, ["something else", earlier])


def test_message_that_runs_in_a_circle_is_a_repetition() -> None:
    assert repeats("The tea is hot. " * 30, [])
    assert repeats("ab" * 300, [])


@pytest.mark.parametrize(
    ("text", "earlier"),
    [
        ("And what about the rice?", "And what about the wine that you told me of?"),
        ("How long does it take to cook rice?", "How much water do I need for rice?"),
        ("yes", "no"),
        ("no no no", "no"),
    ],
)
def test_something_new_is_no_repetition(text: str, earlier: str) -> None:
    assert not repeats(text, [earlier])


def test_long_plain_text_runs_in_no_circle() -> None:
    words = [f"{start}{end}" for start in ("ket", "gar", "riv", "sum") for end in ("tle", "den", "er", "mer")]
    text = " ".join(f"{words[i * 7 % 16]} {words[i * 5 % 13]} {i * 37 % 101}" for i in range(60))
    assert not repeats(text, [])


@pytest.mark.parametrize(
    "texts",
    [
        ["ok thanks, bye!"],
        ["Goodbye."],
        ["have a nice day"],
        ["that's all, cheers"],
        ["no more questions"],
        ["thanks", "thank you so much"],
        ["what is tea", "I'll try that, take care!"],
    ],
)
def test_goodbye_is_a_farewell(texts: list[str]) -> None:
    assert says_farewell(user(*texts))


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["thanks, that helps"],
        ["thanks", "and how long?"],
        ["bye bye is a song, do you know it?"],
        ["thanks, what else?", "thanks, and then?"],
        ["I write a story in which a man says goodbye to an old friend at a station in the rain at night"],
    ],
)
def test_going_on_is_no_farewell(texts: list[str]) -> None:
    assert not says_farewell(user(*texts))


def test_goodbye_of_the_assistant_is_no_farewell() -> None:
    assert not says_farewell([USER, Message("assistant", "Goodbye!")])
