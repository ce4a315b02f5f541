"""Sounds that tests make: each dialect a pair of beating tones, each speaker an offset of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from parrot_edge.dialect.audio import RATE, write_wave

TONES = {"high": (1100.0, 2300.0), "low": (300.0, 700.0), "wide": (250.0, 3000.0)}


def make_wave(label: str, speaker: int = 0, seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    """Two tones that swell four times a second, in a little noise: float32 (T,). Steady ones would be taken
    off with the mean of their bands."""
    time = np.arange(round(seconds * RATE)) / RATE
    random = np.random.default_rng(seed)
    tones = sum(np.sin(2 * np.pi * tone * (1 + 0.02 * speaker) * time) for tone in TONES[label])
    swell = 0.55 - 0.45 * np.cos(2 * np.pi * 4 * time)
    return (0.2 * swell * tones + 0.02 * random.standard_normal(len(time))).astype(np.float32)


def write_corpus(
    folder: Path, labels: tuple[str, ...] = ("high", "low"), speakers: int = 3, each: int = 3
) -> Path:
    """Wav files and their manifest; returns the manifest."""
    rows = []
    for label in labels:
        for speaker in range(speakers):
            for number in range(each):
                path = folder / f"{label}-{speaker}-{number}.wav"
                write_wave(path, make_wave(label, speaker, 0.5 + 0.2 * number, seed=number))
                rows.append({"path": path.name, "label": label, "speaker": f"{label}-{speaker}"})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest
