"""Which file type to take: the fastest on this machine that loses no more than is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parrot_edge.convert.quantize import NEEDS_IMATRIX, parse_type, quantize
from parrot_edge.engine import native
from parrot_edge.errors import ModelError, UsageError
from parrot_edge.filetype import measure_speed
from parrot_edge.machine import DEFAULT_SEQUENCES, choose_threads, format_bytes, plural

CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")
"""Types that are tried where none are named: those that are fast somewhere, at eight to four bits; and BF16
where the CPU multiplies it."""

LOSS = 0.05
"""KL divergence, nats a token, that is allowed where nothing else is said."""

_WHOLE = "F16"
_TIE = 0.97  # of a speed; a smaller file that reaches it is preferred, as `filetype` does


@dataclass(frozen=True)
class Candidate:
    """A type as it was measured: bytes, tokens a second of dialogue, and KL divergence in nats a token, or
    None where a faster type was good enough already."""

    type: str
    bytes: int
    speed: float
    divergence: float | None


@dataclass(frozen=True)
class AutoChoice:
    """The type that was chosen, why, and all that were measured, fastest first."""

    type: str
    reason: str
    candidates: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def choose_type(
    source: Path,
    folder: Path,
    divergence: Callable[[Path], float],
    *,
    types: Sequence[str] | None = None,
    loss: float = LOSS,
    imatrix: Path | None = None,
    sequences: int = DEFAULT_SEQUENCES,
    threads: int | None = None,
    speed: Callable[[Path, int, int], float] = measure_speed,
    say: Callable[[str], None] = lambda text: None,
) -> AutoChoice:
    """The fastest type for the 16-bit GGUF `source` whose `divergence`, of a file, is at most `loss`.

    Each type (`CANDIDATES` if none are given) is written into `folder`, timed with so many sequences, and
    removed again; then divergences are measured from the fastest type on, until one is small enough. The
    source competes as well, and is taken where no other will do. Types that need an importance matrix are
    left out without `imatrix`.
    Raises `UsageError` where `loss` is not positive, and what `quantize` raises.
    """
    if not 0 < loss < math.inf:
        raise UsageError(f"a loss of {loss:g} cannot be kept to; give nats a token above 0, such as {LOSS}")
    cores = threads or choose_threads().count
    if types is None:
        types = (*CANDIDATES, "BF16") if native.multiplies_bfloat16() else CANDIDATES
    names = [name for name in map(parse_type, types) if imatrix or name not in NEEDS_IMATRIX]
    files = {name: folder / f"{source.stem}.{name}.candidate.gguf" for name in dict.fromkeys(names)}
    measured: list[Candidate] = []
    try:
        for name, path in files.items():
            say(f"timing {name}")
            quantize(source, path, name, imatrix=imatrix, force=True)
            try:
                measured.append(Candidate(name, path.stat().st_size, speed(path, sequences, cores), None))
            except ModelError as error:
                say(f"{name} was left out: {error}")
        say("timing the 16-bit file")
        measured.append(Candidate(_WHOLE, source.stat().st_size, speed(source, sequences, cores), None))
        ranked = _rank(measured)
        for place, candidate in enumerate(ranked):
            say(f"measuring what {candidate.type} loses")
            lost = divergence(files.get(candidate.type, source))
            ranked[place] = chosen = replace(candidate, divergence=lost)
            if lost <= loss:
                break
        else:
            chosen = next(each for each in ranked if each.type == _WHOLE)
    finally:
        for path in files.values():
            path.unlink(missing_ok=True)
    return AutoChoice(chosen.type, _reason(chosen, ranked, loss, cores, sequences), tuple(ranked))


def _rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of those that are as good as tied, the smallest."""
    left, ranked = sorted(candidates, key=lambda each: -each.speed), list[Candidate]()
    while left:
        tied = [each for each in left if each.speed >= _TIE * left[0].speed]
        ranked.append(min(tied, key=lambda each: each.bytes))
        left.remove(ranked[-1])
    return ranked


def _reason(chosen: Candidate, ranked: Sequence[Candidate], loss: float, threads: int, sequences: int) -> str:
    """Why a candidate was chosen, as a sentence."""
    faster = [each for each in ranked[: ranked.index(chosen)] if each.divergence is not None]
    lost = ", ".join(f"{each.type} {each.speed:.0f} but {each.divergence:.3g} lost" for each in faster)
    return (
        f"{chosen.type} makes {chosen.speed:.0f} tokens/s of dialogue with {plural(threads, 'thread')} and "
        f"{plural(sequences, 'sequence')}, at {format_bytes(chosen.bytes)}, and loses "
        f"{chosen.divergence:.3g} where {loss:g} nats a token are allowed" + (f" ({lost})" if lost else "")
    )
