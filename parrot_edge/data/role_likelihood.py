"""Whether a user's message is likelier as the user's or as the assistant's, by the models themselves."""

from __future__ import annotations

from collections.abc import Sequence

from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.errors import UsageError
from parrot_edge.models import LocalModel, RemoteModel
from parrot_edge.roles import Speaker, ask_view

SEEN = 800
"""Characters of a message that are scored, or read as history: so that four of them fit a small context."""

HISTORY = 4
"""Messages before it that are read."""

FollowUp = tuple[Sequence[Message], str]
"""What was said before, ending with an answer, and the user's next message."""


def score_roles(
    ask: LocalModel | RemoteModel,
    chat: LocalModel | RemoteModel,
    turns: Sequence[FollowUp],
    *,
    threads: int | None = None,
) -> list[float]:
    """For each message, by how much Ask finds it likelier as the user's next than Chat as its own.

    In nats a token. Both read the same history, so Chat is asked what it would say next if the user said
    nothing. Raises `UsageError` for an endpoint, which tells no likelihoods, and what loading a model raises.
    """
    if isinstance(ask, RemoteModel) or isinstance(chat, RemoteModel):
        raise UsageError("an endpoint tells no likelihoods; name model files with --ask and --chat")
    with Likelihood(ask.path, adapter=ask.adapter, threads=threads) as likelihood:
        prompt = Speaker(likelihood.engine).ask_prompt
        role = "user" if prompt.native else "assistant"
        as_user = [
            _mean_log_prob(likelihood, ask_view(Seed(""), _short(history), prompt), role, text)
            for history, text in turns
        ]
    with Likelihood(chat.path, adapter=chat.adapter, threads=threads) as likelihood:
        as_answer = [
            _mean_log_prob(likelihood, _short(history), "assistant", text) for history, text in turns
        ]
    return [user - answer for user, answer in zip(as_user, as_answer, strict=True)]


def _short(history: Sequence[Message]) -> list[Message]:
    """The last messages, each cut, beginning with the user's."""
    turns = [message for message in history if message.role != "system"][-HISTORY:]
    return [Message(message.role, message.content[:SEEN]) for message in turns]


def _mean_log_prob(likelihood: Likelihood, view: Sequence[Message], role: str, text: str) -> float:
    tokens, start = likelihood.encode(view, role, text[:SEEN])
    tokens = tokens[: likelihood.tokens]
    return float(likelihood.log_probs(tokens, min(start, len(tokens) - 1)).mean())
