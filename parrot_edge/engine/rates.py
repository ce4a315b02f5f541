"""How fast this machine runs a model file: tokens read and written per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from parrot_edge.engine.native import Context, ContextShape, Model

_PROMPT = 64  # tokens; about what one side says to the other
_DEPTH = 128  # tokens that each sequence holds while decoding is timed


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
    """Time decoding at `sequences` at once and reading prompts, about `seconds` each.

    The best step counts: other work on the machine can only slow one down.
    """
    with Model(path) as model, Context(model, ContextShape(sequences, 512, threads)) as context:
        return Rates(_decode_rate(context, seconds), _prompt_rate(context, seconds))


def _decode_rate(context: Context, seconds: float) -> float:
    sequences = range(context.shape.sequences)
    for sequence in sequences:
        context.decode([(sequence, 0, _tokens(context, _DEPTH, sequence), False)])
    best, position, deadline = 0.0, _DEPTH, time.monotonic() + seconds
    while position < context.shape.tokens and (position < _DEPTH + 4 or time.monotonic() < deadline):
        rows = [
            (sequence, position, _tokens(context, 1, sequence + position), True) for sequence in sequences
        ]
        start = time.perf_counter()
        context.decode(rows)
        best = max(best, len(rows) / (time.perf_counter() - start))
        position += 1
    return best


def _prompt_rate(context: Context, seconds: float) -> float:
    count = max(1, min(context.shape.sequences, context.shape.batch // _PROMPT))
    best, passes, deadline = 0.0, 0, time.monotonic() + seconds
    while passes < 2 or time.monotonic() < deadline:
        for sequence in range(count):
            context.forget(sequence)
        rows = [(s, 0, _tokens(context, _PROMPT, s), True) for s in range(count)]
        start = time.perf_counter()
        context.decode(rows)
        best = max(best, count * _PROMPT / (time.perf_counter() - start))
        passes += 1
    return best


def _tokens(context: Context, count: int, offset: int) -> list[int]:
    return [(7919 * (offset + i) + 100) % context.model.vocab_size for i in range(count)]
