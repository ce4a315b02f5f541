"""How fast this machine runs a model file: tokens read and written per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from parrot_edge.engine.native import Context, ContextShape, Model

_PROMPT = 64  # tokens; about what one side says to the other
_STEPS = 4  # decode steps that are timed at least


@dataclass(frozen=True)
class Rates:
    """Tokens per second over all sequences: `decode` writes, `prompt` reads."""

    decode: float
    prompt: float

    @property
    def exchange(self) -> float:
        """Generated tokens/s where each is written once and read once by the other side."""
        return 1 / (1 / self.decode + 1 / self.prompt)


def measure_rates(path: Path, *, sequences: int, threads: int, seconds: float = 1.0) -> Rates:
    """Time reading a short prompt for each sequence, then decoding them all for about `seconds`.

    The best call counts: other work on the machine can only slow one down.
    """
    with Model(path) as model, Context(model, ContextShape(sequences, 4 * _PROMPT, threads)) as context:
        context.decode([(0, 0, _tokens(model, _PROMPT), False)])  # the first call also pages the weights in
        context.forget(0)
        width = max(1, min(sequences, context.shape.batch // _PROMPT))
        groups = [range(start, min(start + width, sequences)) for start in range(0, sequences, width)]
        prompt = max(_time(context, group, 0, _tokens(model, _PROMPT)) for group in groups)
        decode, position, deadline = 0.0, _PROMPT, time.monotonic() + seconds
        while position < context.shape.tokens and (
            position < _PROMPT + _STEPS or time.monotonic() < deadline
        ):
            decode = max(decode, _time(context, range(sequences), position, _tokens(model, 1)))
            position += 1
        return Rates(decode, prompt)


def _time(context: Context, sequences: range, position: int, tokens: list[int]) -> float:
    """Tokens per second of one decode of the same tokens in each sequence."""
    rows = [(sequence, position, tokens, True) for sequence in sequences]
    start = time.perf_counter()
    context.decode(rows)
    return len(rows) * len(tokens) / (time.perf_counter() - start)


def _tokens(model: Model, count: int) -> list[int]:
    return [(7919 * i + 100) % model.vocab_size for i in range(count)]
