"""The same speech elsewhere: faster, louder, in noise, in a room, over a telephone.

Waves are float32 (T,), 16 kHz. All that is drawn comes from the generator that is handed in.
"""

from __future__ import annotations

import io

import numpy as np

from parrot_edge.dialect import audio
from parrot_edge.recipe import DialectAugment

_SNR = (5.0, 25.0)  # decibels
_RT60 = (0.1, 0.6)  # seconds in which a room's sound falls by 60 dB
_BAND_MASK = 10  # most bands, and
_FRAME_MASK = 20  # most frames that one mask blanks: SpecAugment, arXiv 1904.08779


def alter(wave: np.ndarray, options: DialectAugment, random: np.random.Generator) -> np.ndarray:
    """One altered copy, in the order in which the world does it: speaker, room, noise, line, volume."""
    wave = change_speed(wave, float(random.choice(options.speed)))
    if random.random() < options.reverberation:
        wave = add_room(wave, random)
    if random.random() < options.noise:
        wave = add_noise(wave, random)
    if random.random() < options.codec:
        wave = through_telephone(wave) if random.random() < 0.5 else through_mp3(wave)
    gain = 10 ** (random.uniform(-options.volume, options.volume) / 20)
    return np.clip(wave * np.float32(gain), -1, 1)


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play faster by `factor`, pitch and all: (T / factor,)."""
    return audio.resample(wave, audio.RATE * factor)


def add_noise(wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Add noise of a random colour (power falls with frequency to the power of 0..2) at 5 to 25 dB."""
    size = 1 << (len(wave) - 1).bit_length()  # of an odd length the transform can take ten times as long
    spectrum = np.fft.rfft(random.standard_normal(size))
    slope = random.uniform(0, 2)
    spectrum *= np.maximum(np.arange(len(spectrum)), 20.0 * size / audio.RATE) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, size)[: len(wave)]
    ratio = 10 ** (random.uniform(*_SNR) / 20)
    level = np.sqrt(np.mean(wave.astype(float) ** 2) / max(np.mean(noise**2), 1e-20)) / ratio
    return (wave + level * noise).astype(np.float32)


def add_room(wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Convolve with a made-up room: the direct sound, then noise that decays exponentially (Polack 1988)."""
    rt60 = random.uniform(*_RT60)
    tail = np.arange(round(rt60 * audio.RATE)) / audio.RATE
    response = random.standard_normal(len(tail)) * np.exp(-6.908 * tail / rt60)
    response *= random.uniform(0.2, 0.8) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    size = 1 << (len(wave) + len(response) - 1).bit_length()
    heard = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    level = np.sqrt(np.mean(wave.astype(float) ** 2) / max(np.mean(heard**2), 1e-20))
    return (heard * level).astype(np.float32)


def through_telephone(wave: np.ndarray) -> np.ndarray:
    """8 kHz and 8-bit mu-law, as G.711 carries it."""
    narrow = np.clip(audio.resample(wave, audio.RATE, 8000), -1, 1)
    coded = np.round(np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256) * 127) / 127
    decoded = np.sign(coded) * np.expm1(np.abs(coded) * np.log(256)) / 255
    return _fit(audio.resample(decoded.astype(np.float32), 8000), len(wave))


def through_mp3(wave: np.ndarray) -> np.ndarray:
    """Coded as a small mp3 and decoded again."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(wave, -1, 1), audio.RATE, format="MP3", compression_level=0.9)
    file.seek(0)
    return _fit(soundfile.read(file, dtype="float32")[0], len(wave))


def mask_spectrum(features: np.ndarray, masks: int, random: np.random.Generator) -> np.ndarray:
    """Blank stretches of bands and of frames of normalised features, (F, 80), with their mean, 0."""
    masked = features.copy()
    for _ in range(masks):
        for axis, most in ((1, _BAND_MASK), (0, min(_FRAME_MASK, features.shape[0] // 5))):
            width = int(random.integers(0, most + 1))
            start = int(random.integers(0, features.shape[axis] - width + 1))
            np.moveaxis(masked, axis, 0)[start : start + width] = 0
    return masked


def _fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut, or filled up with silence."""
    return np.pad(wave[:length], (0, max(0, length - len(wave))))
