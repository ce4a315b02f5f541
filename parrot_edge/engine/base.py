"""What an engine promises.

An engine holds a model and answers many conversations at once. It knows nothing of Ask or Chat,
of dialogues or files: a caller opens a session per conversation and awaits replies; the engine
gathers what all sessions wait for into one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from parrot_edge.dialogue import Message

INVOCATION_KEY = "adapter.alora.invocation_tokens"
"""Metadata of a GGUF that is an activated adapter: the tokens that it begins with."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults suit small chat models.

    temperature     0 takes the likeliest token; must be >= 0
    top_k           keep the k likeliest tokens; 0 keeps all
    top_p           keep the smallest set whose probability reaches p, 0 < p <= 1
    min_p           drop tokens below min_p times the likeliest one's probability, 0 <= p < 1
    repeat_penalty  divide the logits of tokens of this reply's last 64 by this; 1 is off
    grammar         GBNF text that the reply must match (local engines), or None
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    grammar: str | None = None


@dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    messages    the conversation so far; a system message may lead
    next_role   whose message comes next: "assistant", or "user" where the engine can write it
    max_tokens  longest reply in tokens, >= 1
    stop        texts that end the reply; they are not part of it
    seed        of the random numbers, 0 .. 2**32 - 1
    on_text     called with each new piece of text as it is made
    """

    messages: Sequence[Message]
    next_role: str = "assistant"
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int = 0
    on_text: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Reply:
    """One reply: its text, why it ended, and what it cost.

    finish            "stop" (the model ended its turn, or a stop text came), "length" (max_tokens),
                      or "context" (the prompt and a reply do not fit; the text is empty or cut)
    prompt_tokens     tokens of the whole prompt
    new_tokens        tokens of the prompt that had to be read for this reply
    completion_tokens tokens made, the closing one included
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    completion_tokens: int = 0


class Session(Protocol):
    """One conversation with an engine. Replies of a session are awaited one after the other."""

    async def reply(self, request: Request) -> Reply:
        """The next message; raises `ModelError` or `EndpointError` where none can be had."""


class Engine(Protocol):
    """A model that answers many conversations at once."""

    @property
    def name(self) -> str:
        """The model, as it is named in rows."""

    @property
    def writes_any_role(self) -> bool:
        """Whether `next_role="user"` works; a remote chat endpoint only writes "assistant"."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the adapter's file, or else the model's, says of itself; empty for a remote engine."""

    def session(self, *, beside: Session | None = None) -> AbstractAsyncContextManager[Session]:
        """A new conversation; any number can be open, it is replies that wait for room.

        beside: another side's session that reads the very same text and takes turns with this one; an
        engine that can lets both use one cache.
        """

    async def aclose(self) -> None:
        """Free what the engine holds; sessions still open fail."""
