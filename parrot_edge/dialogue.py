"""The row: what a seed and a dialogue look like, and what makes one valid.

It knows nothing of models or files; `jsonl` brings the lines.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from parrot_edge.errors import shorten
from parrot_edge.jsonl import Line

ROLES = ("system", "user", "assistant")

STOP_REASONS = ("end", "turns", "farewell", "repetition", "role_flip", "context")
"""Why a dialogue ended.

end         Ask wrote its end marker
turns       the turn limit was reached
farewell    both sides said goodbye
repetition  a side said again what it had said before
role_flip   Ask kept answering instead of asking, also after retries
context     the next message would not fit a model's context
"""


@dataclass(frozen=True)
class Message:
    """One message: `role` is one of `ROLES`, `content` is plain text."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Seed:
    """Where a dialogue starts: a prompt, a topic, or messages to be carried on.

    `messages` may be empty (then `topic` is set and Ask writes the opening); a leading system
    message is Chat's. `persona` describes the person whom Ask plays. `extra` holds the row's other
    keys, which are carried through unchanged.
    """

    id: str
    messages: tuple[Message, ...] = ()
    topic: str | None = None
    persona: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def next_role(self) -> str:
        """Whose message comes next: "user" or "assistant"."""
        return "assistant" if self.messages and self.messages[-1].role == "user" else "user"


def parse_seed(line: Line, *, text: bool = False) -> Seed:
    """A seed from a line: `{"id"?, "prompt" | "topic" | "messages", "system"?, "persona"?}`.

    With `text`, a line that is not a JSON object is taken as a prompt. A seed without an id gets
    one from its content. Raises `InputError` naming file and line.
    """
    if text and not line.data.lstrip().startswith(b"{"):
        row: dict[str, Any] = {"prompt": line.text().strip()}
    else:
        row = line.row()
    row = dict(row)
    given_id = _take_text(line, row, "id")
    system = _take_text(line, row, "system")
    persona = _take_text(line, row, "persona")
    topic = _take_text(line, row, "topic")
    prompt = _take_text(line, row, "prompt")
    listed = row.pop("messages", None)
    messages = parse_messages(line, listed) if listed is not None else ()
    if prompt is not None and messages:
        raise line.error('has both "prompt" and "messages"; keep one')
    if prompt is not None:
        messages = (Message("user", prompt),)
    if topic is None and all(message.role == "system" for message in messages):
        raise line.error('has no "prompt", no "topic" and no turn in "messages"; add one of them')
    if system is not None:
        if messages and messages[0].role == "system":
            raise line.error('has "system" and a system message; keep one')
        messages = (Message("system", system), *messages)
    identity = [[m.role, m.content] for m in messages], topic, persona
    return Seed(given_id or content_id(identity), messages, topic, persona, row)


def parse_messages(line: Line, value: object) -> tuple[Message, ...]:
    """Messages in order: an optional system message, then user and assistant in turn, user first.

    The list may be empty: a dialogue that failed at its opening has none.
    """
    if not isinstance(value, list):
        raise line.error('"messages" must be a list')
    messages = []
    for position, item in enumerate(value, 1):
        if not isinstance(item, dict) or not isinstance(item.get("content"), str) or "role" not in item:
            raise line.error(f'message {position} must be {{"role": ..., "content": text}}')
        if item["role"] not in ROLES:
            role = shorten(item["role"])
            raise line.error(f"message {position} has role {role}; use one of {', '.join(ROLES)}")
        line.check_text(item["content"], f"message {position}")
        messages.append(Message(item["role"], item["content"]))
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for offset, message in enumerate(turns):
        expected = "user" if offset % 2 == 0 else "assistant"
        if message.role != expected:
            position = offset + 1 + (len(messages) - len(turns))
            raise line.error(
                f"message {position} is from {message.role!r} where {expected!r} is due; "
                "roles must alternate, user first"
            )
        if not message.content.strip():
            raise line.error(f"message {offset + 1 + (len(messages) - len(turns))} is empty")
    return tuple(messages)


def _take_text(line: Line, row: dict[str, Any], key: str) -> str | None:
    value = row.pop(key, None)
    if value is None:
        return None
    if key == "id" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise line.error(f'"{key}" must be a non-empty text')
    line.check_text(value, f'"{key}"')
    return value


def content_id(value: object) -> str:
    """A short id that depends on content alone: 16 hex digits of SHA-256 over its JSON.

    >>> content_id("hello")
    '5aa762ae383fbb72'
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
