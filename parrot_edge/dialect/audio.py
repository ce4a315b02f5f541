"""Sound files as 16 kHz mono waves: whatever libsndfile reads (wav, flac, ogg, mp3, ...), resampled by soxr.

It knows nothing of labels or features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.errors import InputError, UsageError

RATE = 16000
"""Samples a second of every wave in this package."""

SHORTEST = 0.1
"""Seconds below which there is nothing to hear a dialect from."""

SILENCE = 10 ** (-60 / 20)
"""A file whose loudest sample is below this (-60 dB of full scale) is silent."""

_BLOCK_SECONDS = 20
_FULL_SCALE = 0.999


@dataclass(frozen=True)
class Sound:
    """What a file holds: samples a second, channels, seconds."""

    rate: int
    channels: int
    seconds: float


def require_audio() -> None:
    """Raise `UsageError` with the pip line where the libraries for sound are missing."""
    try:
        import kaldi_native_fbank  # noqa: F401
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except ImportError as error:
        raise UsageError(f"dialects need {error.name}; run pip install 'parrot-edge[dialect]'") from None


def probe(path: str | Path) -> Sound:
    """What the file says it holds, without reading it; raises `InputError` where it is no sound file."""
    with _open(path) as file:
        return Sound(file.samplerate, file.channels, file.frames / file.samplerate)


def read_wave(path: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """A file, or the seconds `start..end` of it, as float32 (T,), 16 kHz, -1..1, channels averaged.

    Raises `InputError` for what is no sound file, is shorter than `SHORTEST`, silent or damaged.
    """
    blocks = list(read_blocks(path, start, end))
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    check_wave(wave, path)
    return wave


def check_wave(wave: np.ndarray, path: str | Path) -> None:
    """Raise `InputError` where nothing can be heard."""
    if len(wave) < SHORTEST * RATE:
        raise InputError(
            f"holds {len(wave) / RATE:.3f} s of sound; at least {SHORTEST} s are needed", source=str(path)
        )
    if not np.abs(wave).max() > SILENCE:
        raise InputError("is silent; check the recording", source=str(path))


def read_blocks(path: str | Path, start: float = 0.0, end: float | None = None) -> Iterator[np.ndarray]:
    """The same wave in pieces of some seconds, so that a file of any length takes little memory.

    Raises `InputError` as `read_wave` does, also in the middle of a damaged file.
    """
    import soundfile
    import soxr

    with _open(path) as file:
        rate, length = file.samplerate, file.frames / file.samplerate
        if start < 0 or (end is not None and end <= start):
            raise InputError(f"the part {start}..{end} s is empty", source=str(path))
        if start >= length > 0 or (end is not None and end > length + 0.05):
            raise InputError(
                f"has {length:.2f} s, and the part {start}..{end} s was asked for", source=str(path)
            )
        resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32") if rate != RATE else None
        left = file.frames if end is None else round((end - start) * rate)
        try:
            if start:
                file.seek(round(start * rate))
            while left > 0:
                data = file.read(min(left, _BLOCK_SECONDS * rate), dtype="float32", always_2d=True)
                left = left - len(data) if len(data) else 0
                mono = data.mean(axis=1) if file.channels > 1 else data[:, 0]
                if not np.isfinite(mono).all():
                    raise InputError("holds samples that are not finite numbers", source=str(path))
                yield resampler.resample_chunk(mono, last=left <= 0) if resampler else mono
        except soundfile.LibsndfileError as error:
            raise InputError(f"is damaged: {_reason(error)}", source=str(path)) from None


def write_wave(path: Path, wave: np.ndarray) -> None:
    """A wave as a 16-bit file, wav or flac by its name."""
    import soundfile

    soundfile.write(path, wave, RATE, subtype="PCM_16")


def resample(wave: np.ndarray, rate: float, target: float = RATE) -> np.ndarray:
    """A whole wave (T,) at another rate: (T * target / rate,)."""
    import soxr

    return soxr.resample(wave, rate, target) if rate != target else wave


def clipped_share(wave: np.ndarray) -> float:
    """Share of the samples at full scale, 0..1.

    >>> clipped_share(np.array([0.5, 1.0, -1.0, 0.0], np.float32))
    0.5
    """
    return float(np.mean(np.abs(wave) >= _FULL_SCALE))


def silent_share(wave: np.ndarray) -> float:
    """Share of the 25 ms pieces that lie 40 dB or more below the loudest one, 0..1."""
    size = RATE // 40
    pieces = wave[: len(wave) // size * size].reshape(-1, size)
    if not len(pieces):
        return 0.0
    energies = (pieces.astype(np.float64) ** 2).mean(axis=1)
    return float(np.mean(energies <= energies.max() * 1e-4))


def _open(path: str | Path) -> Any:
    require_audio()
    import soundfile

    if not Path(path).is_file():
        raise InputError("is no file; check the path", source=str(path))
    try:
        return soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, TypeError, OSError) as error:
        raise InputError(
            f"is not a sound file that can be read ({_reason(error)}); wav, flac, ogg and mp3 can",
            source=str(path),
        ) from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")
