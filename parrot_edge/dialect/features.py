"""Log-mel features: the same code for training, measuring and running.

80 Kaldi filter banks (25 ms frames every 10 ms, Povey window, no dither) by kaldi-native-fbank; then the
mean of the stretch at hand is taken off each band (cepstral mean normalisation), which removes what a
microphone does to all of it. What is cached is before the mean, as stretches are drawn later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.dialect import audio
from parrot_edge.dialect.augment import alter
from parrot_edge.dialect.corpus import Utterance
from parrot_edge.errors import InputError, OutputError
from parrot_edge.recipe import DialectAugment
from parrot_edge.store import cache_dir, lock, read_json, write_json

BANDS = 80
FRAMES_PER_SECOND = 100

_VERSION = 2  # of what is cached: raise it when a feature changes


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Features of a wave, float32 (T,), 16 kHz, -1..1: float32 (F, 80), F = 1 + (T - 400) // 160."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = BANDS
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(audio.RATE, (wave * 32768.0).tolist())  # Kaldi's scale; a list is read faster
    bank.input_finished()
    frames = [bank.get_frame(at) for at in range(bank.num_frames_ready)]
    return np.stack(frames) if frames else np.zeros((0, BANDS), np.float32)


def normalize(features: np.ndarray) -> np.ndarray:
    """Take the mean over time off each band: float32 (F, 80) both.

    >>> normalize(np.array([[1.0, 4.0], [3.0, 4.0]])).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    return features - features.mean(axis=0, keepdims=True)


class FeatureStore:
    """The features of utterances on disk, read as they are needed: `store[utterance, copy]` is (F, 80).

    Copy 0 is clean, the others are altered. It is made once for the same files and options, whole or
    not at all, and found again by what it was made from.
    """

    def __init__(self, folder: Path) -> None:
        self._frames = np.load(folder / "frames.npy", mmap_mode="r")  # float16 (all frames, 80)
        self._ends = np.load(folder / "ends.npy")  # int64 (N * (1 + copies),)
        self._record = read_json(folder / "store.json")
        self.identity = folder.name
        self.copies = int(self._record["copies"])
        self.skipped: list[str] = self._record["skipped"]
        self.kept: list[int] = self._record["kept"]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: tuple[int, int]) -> np.ndarray:
        at = place[0] * (1 + self.copies) + place[1]
        start = self._ends[at - 1] if at else 0
        return np.asarray(self._frames[start : self._ends[at]], dtype=np.float32)

    @classmethod
    def build(
        cls,
        utterances: Sequence[Utterance],
        augment: DialectAugment,
        *,
        seed: int = 0,
        cache: str = "",
        skip: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> FeatureStore:
        """Find the store of these utterances in the folder `cache`, or make it.

        `kept` tells which of the utterances it holds: with `skip` one that cannot be read is left out and
        told in `skipped`, else it raises `InputError`. Raises `OutputError` where the disk is full.
        """
        key = _fingerprint(utterances, augment, seed)
        root = Path(cache) if cache else cache_dir() / "dialect"
        folder = root / key
        try:
            root.mkdir(parents=True, exist_ok=True)
            with lock(root / f"{key}.lock"):
                if not (folder / "store.json").is_file():
                    partial = root / f"{key}.partial"
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    _write_store(partial, utterances, augment, seed, skip, say)
                    os.replace(partial, folder)
                store = cls(folder)
        except OSError as error:
            raise OutputError(f"features cannot be kept in {root}: {error.strerror or error}") from None
        if store.skipped and not skip:
            raise InputError(store.skipped[0])
        return store


def _write_store(
    folder: Path,
    utterances: Sequence[Utterance],
    augment: DialectAugment,
    seed: int,
    skip: bool,
    say: Callable[[str], None],
) -> None:
    ends: list[int] = []
    kept: list[int] = []
    skipped: list[str] = []
    total = 0
    with open(folder / "frames.raw", "wb") as raw:
        for at, each in enumerate(utterances):
            try:
                wave = audio.read_wave(each.path, each.start, each.end)
            except InputError as error:
                if not skip:
                    raise
                skipped.append(f"{each.place}: {error}" if each.place else str(error))
                continue
            kept.append(at)
            for copy in range(1 + augment.copies):
                random = np.random.default_rng((seed, at, copy))
                features = log_mel(alter(wave, augment, random) if copy else wave)
                total += len(features)
                ends.append(total)
                raw.write(features.astype(np.float16).tobytes())
            if len(kept) % 200 == 0:
                say(f"features: {len(kept)} of {len(utterances)} recordings")
    if not kept:
        raise InputError(f"none of the {len(utterances)} recordings can be used; the first: {skipped[0]}")
    frames = np.memmap(folder / "frames.raw", np.float16, "r", shape=(total, BANDS))
    np.save(folder / "frames.npy", frames)
    del frames
    (folder / "frames.raw").unlink()
    np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
    write_json(folder / "store.json", {"copies": augment.copies, "kept": kept, "skipped": skipped})


def _fingerprint(utterances: Sequence[Utterance], augment: DialectAugment, seed: int) -> str:
    """What the features depend on; `masks` are drawn later."""
    files: list[Any] = []
    for each in utterances:
        try:
            state = each.path.stat()
            files.append([str(each.path.absolute()), each.start, each.end, state.st_size, state.st_mtime_ns])
        except OSError:
            files.append([str(each.path.absolute()), each.start, each.end])
    options = {key: value for key, value in asdict(augment).items() if key != "masks"}
    text = json.dumps([_VERSION, seed, options, files])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
