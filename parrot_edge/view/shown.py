"""What a page says of a dialogue: its messages, and what they can be filtered by.

It knows nothing of HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parrot_edge.data.context import find_links
from parrot_edge.data.questions import find_question_type
from parrot_edge.data.sources import Thread
from parrot_edge.dialogue import Message, content_id, parse_messages
from parrot_edge.roles import sounds_like_assistant

_OPENING = 140  # characters that the list shows
_HISTORY = 8  # messages before a turn that it is compared with, as in `parrot stats`

_MESSAGE_COLUMNS = (
    "messages",
    "conversations",
    "conversation",
    "data",
    "prompt",
    "replies",
    "text",
    "chosen",
)
"""Columns that a thread's messages come from; the others are shown as details."""

_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_OVERRIDES = re.compile(r"[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Shown:
    """A dialogue as a page holds it; every text is valid UTF-8 without control characters.

    details   the row's other columns
    rejected  of a preference pair, the answer that the last message was preferred to
    opening   how it begins, on one line
    measures  a number by name, each of them 0 or more: a page plots it and filters by its range
    labels    what may be said of it, by kind: a page counts them and filters by them
    """

    id: str
    messages: tuple[Message, ...]
    details: dict[str, Any]
    opening: str
    measures: dict[str, int]
    labels: dict[str, tuple[str, ...]]
    rejected: str | None = None


def show(thread: Thread) -> Shown:
    """A thread as it is shown; raises `InputError` naming the line of one that is no dialogue."""
    messages = parse_messages(thread.line, visible(thread.messages))
    details = {key: visible(value) for key, value in thread.row.items() if key not in _MESSAGE_COLUMNS}
    given, rejected = details.pop("id", None), details.pop("rejected", None)
    turns = [message for message in messages if message.role != "system"]
    first = turns[0].content if turns else str(details.get("topic") or "")
    return Shown(
        id=str(given) if isinstance(given, str | int) and str(given) else content_id(_identity(messages)),
        messages=messages,
        details=details,
        opening=" ".join(first[: 4 * _OPENING].split())[:_OPENING],
        measures={
            "turns": sum(message.role == "user" for message in turns),
            "words": sum(len(message.content.split()) for message in turns),
            **_count_links(turns),
        },
        labels={
            "stop reason": (str(reason),) if (reason := details.get("stop_reason")) else (),
            "flags": tuple(dict.fromkeys(_flags(thread, messages, details))),
            "opening": (find_question_type(first),) if turns else (),
        },
        rejected=_answer(rejected),
    )


def visible(value: Any) -> Any:
    """A JSON value, its texts with a sign for each character that no page can show.

    Control characters become their pictures, and halves of surrogate pairs the replacement character.

    >>> visible(["a\\0b", "tab\\tand\\nline stay", {"half": "\\ud83d"}])
    ['a␀b', 'tab\\tand\\nline stay', {'half': '�'}]
    """
    if isinstance(value, str):
        return _UNSEEN.sub(_picture, value) if _UNSEEN.search(value) else value
    if isinstance(value, list):
        return [visible(item) for item in value]
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    return value


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return "\ufffd" if code >= 0xD800 else "\u2421" if code == 0x7F else chr(0x2400 + code)


def _count_links(turns: list[Message]) -> dict[str, int]:
    """How many of the user's messages lean on what was said before, and how many leave its subject."""
    links = [
        find_links(turns[max(0, place - _HISTORY) : place], message.content)
        for place, message in enumerate(turns)
        if place and message.role == "user"
    ]
    return {
        "context-dependent turns": sum(link.dependent for link in links),
        "topic shifts": sum(link.shift for link in links),
    }


def _answer(value: Any) -> str | None:
    """The text of a pair's answer, which is a text, a message, or messages of which it is the last."""
    last = value[-1] if isinstance(value, list) and value else value
    text = last.get("content") if isinstance(last, dict) else last
    return text if isinstance(text, str) else None


def _identity(messages: tuple[Message, ...]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _flags(thread: Thread, messages: tuple[Message, ...], details: dict[str, Any]) -> Iterator[str]:
    """What a reader may want to look at; docs/view.md says what each flag means."""
    usage = details.get("usage")
    if details.get("truncated") or (isinstance(usage, dict) and usage.get("cut_messages")):
        yield "cut"
    if not messages or messages[-1].role != "assistant":
        yield "unanswered"
    if any(message.role == "user" and sounds_like_assistant(message.content) for message in messages):
        yield "wrong role"
    if len(set(messages)) < len(messages):
        yield "repeated"
    if any(_OVERRIDES.search(message.content) for message in messages) or any(
        _UNSEEN.search(item["content"]) for item in thread.messages
    ):
        yield "hidden characters"
    own = details.get("flags")
    yield from (flag for flag in own if isinstance(flag, str) and flag) if isinstance(own, list) else ()
