"""Which dialect is spoken: in files of any length, and in a stream as it comes.

A recording is heard in windows; a window's cosines are averaged with what came before it, and only then
calibrated. A window without speech is answered by no label. It writes nothing; the command line does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from parrot_edge.dialect import audio
from parrot_edge.dialect.features import log_mel
from parrot_edge.dialect.runtime import Runtime
from parrot_edge.errors import UsageError

WINDOW = 10.0
"""Seconds that are heard at once."""

SHORTEST = 1.0
"""Seconds after which a stream is answered first."""

_LEAST_SPEECH = 20  # frames, 0.2 s
_SPEECH_RANGE = 5.0  # nats of mean log-mel below the loudest frame: 22 dB
_FLOOR = 4.0  # nats; -60 dB of full scale is louder
_SMOOTHING = 0.5  # what the windows before weigh


@dataclass
class Answer:
    """What was heard between two times in seconds.

    label    the likeliest dialect; None where there is no speech or it is of none of them
    scores   probability of each label, sum 1; empty where there is no speech
    unknown  whether there is speech, and of none of the labels
    """

    start: float
    end: float
    label: str | None
    scores: dict[str, float]
    unknown: bool

    def row(self, path: str) -> dict[str, Any]:
        """As a row of output."""
        return {"path": path, **vars(self)}


def seed_row(rows: Sequence[dict[str, Any]], topic: str) -> dict[str, Any] | None:
    """A recording's rows, one or more, as a seed of a dialogue: someone who speaks so asks about a topic.

    The dialect is the one that was heard for most seconds; None where there was none.

    >>> seed = seed_row([Answer(0.0, 9.5, "Hokkien", {"Hokkien": 1.0}, False).row("a.wav")], "trains")
    >>> seed["topic"], seed["persona"], seed["dialect"]
    ('trains', 'someone who speaks the dialect Hokkien', 'Hokkien')
    """
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["label"] is not None:
            seconds[row["label"]] += row["end"] - row["start"]
    if not seconds:
        return None
    dialect = max(seconds, key=seconds.__getitem__)
    path, start, end = rows[0]["path"], rows[0]["start"], rows[-1]["end"]
    return {
        "id": f"{path}:{start:g}-{end:g}",
        "topic": topic,
        "persona": f"someone who speaks the dialect {dialect}",
        "dialect": dialect,
        "path": path,
        "start": start,
        "end": end,
    }


class Listener:
    """Windows of one recording, each answered in the light of those before."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._memory: np.ndarray | None = None

    def hear(self, wave: np.ndarray, start: float) -> Answer:
        """Answer a window, float32 (T,), 16 kHz, that begins at `start` seconds."""
        end = start + len(wave) / audio.RATE
        start, end = round(start, 3), round(end, 3)
        features = log_mel(wave)
        if count_speech(features) < _LEAST_SPEECH:
            return Answer(start, end, None, {}, False)
        cosines = self._runtime.cosines(features)
        if self._memory is not None:
            cosines = _SMOOTHING * self._memory + (1 - _SMOOTHING) * cosines
        self._memory = cosines
        calibration, labels = self._runtime.calibration, self._runtime.labels
        shares = calibration.probabilities(cosines)
        unknown = bool(calibration.is_unknown(cosines))
        scores = {label: round(float(share), 6) for label, share in zip(labels, shares, strict=True)}
        return Answer(start, end, None if unknown else labels[int(shares.argmax())], scores, unknown)


def count_speech(features: np.ndarray) -> int:
    """Frames of log-mel features (F, 80) that are near the loudest one and above the floor.

    By level alone: steady noise counts as speech.
    """
    if not len(features):
        return 0
    levels = features.mean(axis=1)
    return int((levels >= max(float(levels.max()) - _SPEECH_RANGE, _FLOOR)).sum())


def identify_file(
    runtime: Runtime,
    path: str | Path,
    start: float = 0.0,
    end: float | None = None,
    *,
    window: float = WINDOW,
) -> Iterator[Answer]:
    """Answers for a recording, or the seconds `start..end` of it, one for each window of so many seconds.

    One of up to one and a half windows is answered once. Any length takes the same memory.
    Raises `InputError` for what cannot be heard; answers that were given before stand.
    """
    listener, size = Listener(runtime), round(window * audio.RATE)
    waiting, place, loudest, answered = np.zeros(0, np.float32), start, 0.0, False
    for block in audio.read_blocks(path, start, end):
        waiting = np.concatenate((waiting, block))
        loudest = max(loudest, float(np.abs(block).max(initial=0)))
        while len(waiting) > 1.5 * size:
            yield listener.hear(waiting[:size], place)
            waiting, place, answered = waiting[size:], place + window, True
    if not answered or loudest <= audio.SILENCE:
        audio.check_wave(waiting, path)
    if len(waiting) >= audio.SHORTEST * audio.RATE:
        yield listener.hear(waiting, place)


def identify_stream(
    runtime: Runtime, pieces: Iterable[np.ndarray], *, window: float = WINDOW, step: float = 1.0
) -> Iterator[Answer]:
    """Answers for sound as it comes, in pieces of any length: the first after `SHORTEST` seconds, then one
    for each `step` seconds, each of up to a window that ends there, and one for what is left at the end."""
    listener = Listener(runtime)
    size, hop = round(window * audio.RATE), round(step * audio.RATE)
    heard = np.zeros(0, np.float32)
    total, due = 0, max(hop, round(SHORTEST * audio.RATE))
    for piece in pieces:
        for at in range(0, len(piece), hop):
            part = piece[at : at + hop]
            heard = np.concatenate((heard, part))[-size:]
            total += len(part)
            if total >= due:
                due = total + hop
                yield listener.hear(heard, (total - len(heard)) / audio.RATE)
    rest = total - (due - hop)
    if total and rest > 0 and len(heard) >= audio.SHORTEST * audio.RATE:
        yield listener.hear(heard, (total - len(heard)) / audio.RATE)


def read_pcm(stream: BinaryIO, rate: int = audio.RATE, seconds: float = 0.1) -> Iterator[np.ndarray]:
    """Signed 16-bit little-endian mono samples from a pipe as float32 pieces at 16 kHz, as they come.

    Raises `UsageError` for a rate that cannot be.
    """
    import soxr

    if not 4000 <= rate <= 384000:
        raise UsageError(f"a rate of {rate} samples a second cannot be; use 4000 to 384000")
    resampler = soxr.ResampleStream(rate, audio.RATE, 1, dtype="float32") if rate != audio.RATE else None
    size, left = 2 * max(1, round(seconds * rate)), b""
    read = getattr(stream, "read1", stream.read)  # what there is, without waiting for more
    while data := read(size):
        data = left + data
        even = len(data) // 2 * 2
        data, left = data[:even], data[even:]
        wave = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        if len(wave):
            yield resampler.resample_chunk(wave) if resampler else wave
    if resampler:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
