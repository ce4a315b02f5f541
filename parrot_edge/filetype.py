"""Which file type of the embedded model is fastest on this machine: measured once, then kept.

A type is another encoding of the same weights, derived from the shipped file into the cache. Another
file says other things, so a choice stands until it is asked for anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from parrot_edge.errors import ModelError, OutputError
from parrot_edge.machine import choose_threads, format_bytes, inspect_machine, plural
from parrot_edge.models import LocalModel, embedded_path
from parrot_edge.store import cache_dir, lock, read_json, sha256_of, write_json

FAITHFUL_TYPES = ("Q8_0", "F16", "BF16")
"""Encodings that are tried beside the shipped one, which is smaller: they differ from it by a KL
divergence of 0.005, 0.003 and 0.003 nats a token. Q4_0 is faster still on some machines, but at 0.32 nats
and 24 % more perplexity it is another model."""

_MOST_TIMED = 16  # sequences, as many as a run has by default; more would only take longer
_TIE = 0.97  # of the best speed; a smaller file that reaches it is taken


@dataclass(frozen=True)
class Choice:
    """A file to load, its type ("" where the name does not tell), and why."""

    path: Path
    type: str
    reason: str


def choose_file(
    model: LocalModel,
    *,
    sequences: int,
    threads: int | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """The fastest file for a model that still says what the model says.

    A model that the user named is taken as it is. Of the embedded one the `FAITHFUL_TYPES` are
    derived and timed beside the shipped file, BF16 where the CPU multiplies it, once for a machine and
    about so many `sequences`, 16 at most (some ten seconds, announced through `say`); the choice is kept,
    and made `again` on demand only. Without a writable cache the shipped file serves.
    """
    source = Choice(model.path, _type_of(model.path), "the file that was named is taken as it is")
    if model.path != embedded_path():
        return source
    folder = cache_dir() / "derived"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):  # two processes that measure at once would both measure wrongly
            return _choose_embedded(model.path, folder, sequences, threads, again, say)
    except OSError as error:
        why = f"the cache {folder} cannot be written ({error.strerror}), so the shipped file serves"
        return replace(source, reason=why)


def _choose_embedded(
    source: Path, folder: Path, sequences: int, threads: int | None, again: bool, say: Callable[[str], None]
) -> Choice:
    """The choice made before for this file, machine and batch; else a new one, kept for the next time."""
    from parrot_edge.engine import native  # loads llama.cpp

    sequences = min(_MOST_TIMED, 1 << (sequences - 1).bit_length())  # a power of two
    origin = f"{sha256_of(source)[:12]}-{native.llama_version()}"
    types = [name for name in FAITHFUL_TYPES if name != "BF16" or native.multiplies_bfloat16()]
    files = {name: folder / f"{source.stem}-{origin}-{name}.gguf" for name in types}
    files = {_type_of(source): source, **files}  # smallest first
    features = hashlib.sha256(native.system_info().encode()).hexdigest()[:12]
    key = f"{origin}, CPU {features}, {inspect_machine().cores} cores, {sequences} sequences"
    kept = read_json(folder / "choices.json")
    if not again:
        # There may be none, its file may be impossible to make again, or another version wrote it.
        with contextlib.suppress(KeyError, ModelError, OutputError, TypeError):
            choice = Choice(files[kept[key]["type"]], **kept[key])
            _derive(source, choice.path)
            return choice
    say(f"choosing the fastest file type for this machine, once (into {folder})")
    choice = _compare(source, files, sequences, threads or choose_threads().count)
    kept[key] = {"type": choice.type, "reason": choice.reason}
    write_json(folder / "choices.json", kept)
    return choice


def _compare(source: Path, files: dict[str, Path], sequences: int, threads: int) -> Choice:
    """Derive and time each file; the first, and smallest, of those as fast as the best is chosen."""
    speeds, left_out = {}, []
    for name, path in files.items():
        try:
            _derive(source, path)
            speeds[name] = measure_speed(path, sequences, threads)
        except (ModelError, OutputError) as error:
            left_out.append(f"{name} was left out: {error}")
    if not speeds:
        return Choice(source, _type_of(source), "; ".join(left_out))
    best = next(name for name, speed in speeds.items() if speed >= _TIE * max(speeds.values()))
    others = " and ".join(f"{speed:.0f} ({name})" for name, speed in speeds.items() if name != best)
    reason = f"{speeds[best]:.0f} tokens/s of dialogue" + (f" against {others}" if others else "")
    reason += f", with {plural(threads, 'thread')} and {plural(sequences, 'sequence')}"
    return Choice(files[best], best, "; ".join([reason, *left_out]))


def measure_speed(path: Path, sequences: int, threads: int) -> float:
    """Tokens a second of dialogue: each is written once, and read once by the other side.

    Raises `ModelError` where the file cannot be loaded, or does not fit into the memory that is free.
    """
    from parrot_edge.engine.rates import measure_rates

    size, available = path.stat().st_size, inspect_machine().memory_available
    if size > available:
        raise ModelError(f"it takes {format_bytes(size)} of memory, and {format_bytes(available)} is free")
    return measure_rates(path, sequences=sequences, threads=threads, seconds=0.5).exchange


def _derive(source: Path, target: Path) -> None:
    """Make `target`, of the type that its name ends in, unless it is there.

    Raises `ModelError` or `OutputError`.
    """
    from parrot_edge.engine import quantizer

    if target.is_file():
        return
    if shutil.disk_usage(target.parent).free < 4 * source.stat().st_size:
        raise ModelError(f"{target.parent} has not enough free space")
    quantizer.quantize(source, target, _type_of(target), inspect_machine().cores)
    _remove_outdated(source, target)


def _remove_outdated(source: Path, target: Path) -> None:
    """Remove what was derived from an older source of that name, or by another llama.cpp, than `target`.

    A process that has such a file open can go on reading it.
    """
    types = "|".join(FAITHFUL_TYPES)
    derived = re.compile(rf"({re.escape(source.stem)}-[0-9a-f]{{12}}-.+-)({types})\.gguf(\.partial)?")
    origin = target.name.removesuffix(f"{_type_of(target)}.gguf")
    for path in target.parent.iterdir():
        match = derived.fullmatch(path.name)
        if match and match[1] != origin:
            with contextlib.suppress(OSError):  # it is in nobody's way
                path.unlink()


def _type_of(path: Path) -> str:
    """The file type that a GGUF's name ends in, by the usual convention.

    >>> _type_of(Path("SmolLM2-135M-Instruct.Q4_1.gguf")), _type_of(Path("model-q4_k_m.gguf"))
    ('Q4_1', 'Q4_K_M')
    """
    match = re.search(r"[.-](I?Q\d\w*|B?F16|F32)$", path.stem, re.IGNORECASE)
    return match[1].upper() if match else ""
