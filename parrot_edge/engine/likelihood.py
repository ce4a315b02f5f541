"""How likely a model finds messages that others wrote (teacher forcing), through llama.cpp.

It knows nothing of Ask or Chat, of dialogues or files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Request, Sampling
from parrot_edge.engine.batch import find_invocation
from parrot_edge.engine.ggml import Observer
from parrot_edge.engine.llama import LlamaEngine
from parrot_edge.engine.native import ContextShape, Model
from parrot_edge.machine import choose_threads

_BATCH = 256
"""Tokens of one decode; at 4 bytes a logit of a vocabulary of 50,000 that is 50 MB."""

_GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)

_MARK = "PARROT-TEXT"


class Likelihood:
    """Log-probabilities of messages under a GGUF, with an adapter or none.

    What a conversation has in common with the one measured before it is not read again, so the turns
    of a dialogue, measured in order, cost one pass over it. `tokens` is the longest text that is
    measured, the model's own limit where that is less. For `observer` see `Context`.
    """

    def __init__(
        self,
        path: Path,
        *,
        adapter: Path | None = None,
        tokens: int = 2048,
        threads: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        model = Model(path)
        self.tokens = min(tokens, model.trained_context or tokens)
        shape = ContextShape(1, self.tokens, threads or choose_threads().count, _BATCH, outputs=_BATCH)
        lora = model.load_adapter(adapter) if adapter else None
        self.engine = LlamaEngine.over(model, shape, lora, observer=observer)
        self._activated, self._context = self.engine.adapter, self.engine.batcher.context
        self._model = model
        self._read: list[int] = []  # what the cache holds, as far as every message would read it
        self._closing: dict[str, int] = {}

    def encode(self, messages: Sequence[Message], role: str, text: str = "") -> tuple[list[int], int]:
        """The conversation and a next message of `role` as tokens, and where that message starts.

        The last token is the first of what the template writes after such a message; the message
        itself starts with the first token that the conversation alone does not have.
        """
        prompt = self.engine.render(Request(messages, role))
        tokens = self._model.tokenize(prompt + text.encode("utf-8"))
        start = _common_length(self._model.tokenize(prompt), tokens)
        return [*tokens, self.closing_token(role)], max(1, start)

    def log_probs(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """ln P(token | all before it) of `tokens[start:]`: float64 (T - start,); see `logits`."""
        said = zip(self.logits(tokens, start), tokens[start:], strict=True)
        return np.array([_log_softmax(logits, token) for logits, token in said])

    def logits(self, tokens: Sequence[int], start: int) -> Iterator[np.ndarray]:
        """What the model says before each of `tokens[start:]`: float32 (vocab_size,), one after the other.

        `start` is at least 1, and there are at most `self.tokens` tokens. An activated adapter reads
        from its last invocation before `start` on; raises `ModelError` where there is none.
        """
        active = find_invocation(tokens[:start], self._activated) if self._activated else len(tokens)
        position = min(_common_length(self._read, tokens), start - 1, active)
        if not self._context.forget(0, position):
            self._context.forget(0)
            position = 0
        self._read = []
        last = len(tokens) - 1  # the last token predicts no other
        while position < last:
            begins = active if position < active else last
            chunk = tokens[position : min(position + _BATCH, begins, last)]
            end = position + len(chunk)
            if self._activated:
                self._context.apply(self._activated if position >= active else None)
            wanted = min(len(chunk), max(0, end - start + 1))
            for output in self._context.decode([(0, position, chunk, wanted)]):
                yield self._context.logits(output)
            position = end
        self._read = list(tokens[: min(active, last)])

    def write_on(self, messages: Sequence[Message], role: str, max_tokens: int) -> str:
        """What the model writes next as `role`, taking the likeliest token each time."""
        self._context.forget(0)
        self._read = []
        request = Request(messages, role, max_tokens=max_tokens, sampling=_GREEDY)

        async def reply() -> str:
            async with self.engine.session() as session:
                return (await session.reply(request)).text

        try:
            return asyncio.run(reply())
        finally:
            self._context.forget(0)

    def closing_token(self, role: str) -> int:
        """The first token that the template writes after a message of `role`."""
        if role not in self._closing:
            asked = [Message("user", "Hello")] if role == "assistant" else []
            other = "user" if role == "assistant" else "assistant"
            prompt = self.engine.render(Request([*asked, Message(role, _MARK)], other))
            after = prompt.rpartition(_MARK.encode())[2]
            self._closing[role] = self._model.tokenize(after)[0]
        return self._closing[role]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for; what is left of a cut character is dropped."""
        return b"".join(map(self._model.piece, tokens)).decode("utf-8", "ignore")

    def first_part(self, text: str, tokens: int) -> str:
        """What the first so many tokens of a text stand for; the text itself where it has no more."""
        read = self._model.tokenize(text.encode("utf-8"))
        return self.text_of(read[:tokens]) if len(read) > tokens else text

    def last_part(self, text: str, tokens: int) -> str:
        """What the last so many tokens of a text stand for."""
        return self.text_of(self._model.tokenize(text.encode("utf-8"))[-tokens:])

    def close(self) -> None:
        """Free the context and the model."""
        self.engine.close()

    def __enter__(self) -> Likelihood:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from the start.

    >>> _common_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:shorter]) != np.asarray(other[:shorter]))
    return int(differ[0]) if len(differ) else shorter


def _log_softmax(logits: np.ndarray, token: int) -> float:
    """ln of a token's probability; `logits` is float32 (vocab_size,).

    >>> round(_log_softmax(np.float32([0, 0, 0, 0]), 2), 4)
    -1.3863
    """
    top = logits.max()
    return float(logits[token] - top) - float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
