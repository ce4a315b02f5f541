"""Who speaks a practice corpus: the voices of espeak-ng, flite and Kokoro.

Each synthesiser is a source of its own, so that one can be held out. Nothing is downloaded: espeak-ng and
flite are programs of the system, Kokoro's model is a folder that the user has.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.dialect import audio
from parrot_edge.errors import ModelError, UsageError

Wish = tuple[str, str]
"""A label and a voice of a synthesiser."""

ENGLISH: tuple[Wish, ...] = (
    ("us", "en-us"),
    ("gb", "en-gb"),
    ("scotland", "en-gb-scotland"),
    ("lancaster", "en-gb-x-gbclan"),
    ("west-midlands", "en-gb-x-gbcwmd"),
    ("caribbean", "en-029"),
)
"""Of espeak-ng, where none are named."""

FLITE: tuple[Wish, ...] = (("us", "kal16"), ("us", "rms"), ("us", "slt"), ("scotland", "awb"))
"""Of flite, where none are named; awb is a Scot, read by American rules."""

KOKORO = {"a": "us", "b": "gb"}
"""Labels of Kokoro's English voices, by the first letter of their names."""

TIMBRES = tuple(
    """
    Alex Alicia Andrea Andy Annie Diogo Gene Hugo Jacky Lee Mario Michael Mike Nguyen adam anika antonio aunty
    belinda benjamin boris david ed edward f1 f2 f3 f4 f5 grandma grandpa iven john linda m1 m2 m3 m4 m5 m6 m7
    m8 marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph travis victor
    zac
    """.split()  # noqa: SIM905
)
"""Those of espeak-ng's variants that sound like people."""

_PITCH, _SPEED = (30, 70), (140, 200)  # espeak-ng's scales: 0..99, words a minute
_STRETCH = (0.85, 1.15)  # of the length that flite's voices have; Kokoro's speed
_KOKORO_RATE = 24000


@dataclass(frozen=True)
class Voice:
    """Someone who can speak a dialect.

    source   the synthesiser
    speaker  the timbre; the same name with another label is the same timbre
    say      writes a text as a sound file; raises `UsageError`
    """

    source: str
    label: str
    name: str
    speaker: str
    say: Callable[[str, Path], None]


def espeak_voices(wishes: Iterable[Wish] = ENGLISH, *, speakers: int = 20, seed: int = 0) -> list[Voice]:
    """So many timbres of espeak-ng, each with every voice, and with a pitch and a speed of its own.

    Raises `UsageError` where espeak-ng is missing or has fewer timbres.
    """
    program = _find("espeak-ng")
    if speakers > len(TIMBRES):
        raise UsageError(f"there are {len(TIMBRES)} timbres, and {speakers} were asked for")
    draw = random.Random(seed)
    found = []
    for timbre in draw.sample(TIMBRES, speakers):
        pitch, speed = draw.randint(*_PITCH), draw.randint(*_SPEED)
        for label, name in wishes:
            command = [program, "-v", f"{name}+{timbre}", "-p", str(pitch), "-s", str(speed), "--stdin", "-w"]
            found.append(Voice("espeak-ng", label, name, timbre, partial(_run, command)))
    return found


def flite_voices(wishes: Iterable[Wish] = FLITE, *, seed: int = 0) -> list[Voice]:
    """Voices of flite, each a speaker; raises `UsageError` where flite or one of them is missing."""
    program, draw = _find("flite"), random.Random(seed)
    listed = subprocess.run([program, "-lv"], capture_output=True, text=True).stdout
    there = listed.partition(":")[2].split()
    found = []
    for label, name in wishes:
        if name not in there:
            raise UsageError(f"flite has no voice {name!r}; it has {', '.join(there)}")
        stretch = f"duration_stretch={draw.uniform(*_STRETCH):.2f}"
        command = [program, "-voice", name, "--setf", stretch, "-f", "/dev/stdin", "-o"]
        found.append(Voice("flite", label, name, name, partial(_run, command)))
    return found


def kokoro_voices(folder: str | Path, wishes: Sequence[Wish] = (), *, seed: int = 0) -> list[Voice]:
    """Voices of Kokoro-82M, each a speaker; without wishes all its English ones.

    folder  as the hub's onnx-community/Kokoro-82M-v1.0-ONNX has it: `tokenizer.json`, a model in `onnx/`,
            and `voices/*.bin`

    Raises `ModelError` where the folder holds no such model, `UsageError` where espeak-ng, which gives it the
    phonemes, or a voice is missing.
    """
    model, draw = Kokoro(Path(folder)), random.Random(seed)
    names = model.voices()
    chosen = wishes or [(KOKORO[name[0]], name) for name in names if name[0] in KOKORO]
    found = []
    for label, name in chosen:
        if name not in names:
            raise UsageError(f"{folder} has no voice {name!r}; it has {', '.join(names)}")
        say = partial(model.say, name, draw.uniform(*_STRETCH))
        found.append(Voice("kokoro", label, name, name, say))
    return found


def _find(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise UsageError(f"{program} is not installed; on Debian run apt-get install {program}")
    return found


def _run(command: list[str], text: str, path: Path) -> None:
    """Let a program say a text that it reads from stdin; the file's name comes last."""
    done = subprocess.run([*command, str(path)], input=text.encode(), capture_output=True)
    if done.returncode or not path.is_file():
        program, name = Path(command[0]).name, command[2]
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise UsageError(f"{program} cannot speak as {name}: {reason or 'it wrote nothing'}")


class Kokoro:
    """Kokoro-82M by ONNX Runtime, with espeak-ng's phonemes written as Kokoro has learned them."""

    def __init__(self, folder: Path) -> None:
        audio.require_audio()
        import onnxruntime

        self._espeak, self._folder = _find("espeak-ng"), folder
        try:
            tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            self._ids: dict[str, int] = tokenizer["model"]["vocab"]
            path = min((folder / "onnx").glob("*.onnx"), key=lambda each: each.stat().st_size)
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{folder} holds no Kokoro model as the hub has it ({reason})") from None

    def voices(self) -> list[str]:
        """Names such as bf_emma: language, sex, name."""
        return sorted(path.stem for path in (self._folder / "voices").glob("*.bin"))

    def say(self, name: str, speed: float, text: str, path: Path) -> None:
        """Write what a voice says as a 16 kHz file."""
        ids = [self._ids[sign] for sign in self.phonemes(name, text) if sign in self._ids]
        styles = np.fromfile(self._folder / "voices" / f"{name}.bin", np.float32).reshape(-1, 1, 256)
        if not 0 < len(ids) < len(styles):
            raise UsageError(f"Kokoro speaks 1 to {len(styles) - 1} phonemes at once, not {len(ids)}: {text}")
        tokens, style, rate = (each.name for each in self._session.get_inputs())
        given: dict[str, Any] = {
            tokens: np.array([[0, *ids, 0]]),
            style: styles[len(ids)],
            rate: np.array([speed], np.float32),
        }
        wave = self._session.run(None, given)[0].ravel()
        audio.write_wave(path, audio.resample(wave, _KOKORO_RATE))

    def phonemes(self, name: str, text: str) -> str:
        """A text as a voice's language says it; punctuation stays, as it is spoken too."""
        language = {"a": "en-us", "b": "en-gb", "e": "es", "f": "fr-fr", "i": "it", "p": "pt-br"}.get(name[0])
        if language is None:
            raise UsageError(f"{name} speaks a language whose phonemes espeak-ng does not give")
        parts = re.split(r"([;:,.!?—…\"()]+\s*)", text)  # what is said, and in odd places what stands between
        command = [self._espeak, "-q", "--ipa", "-v", language, "--stdin"]
        said = []
        for place, part in enumerate(parts):
            if place % 2 or not part.strip():
                said.append(part)
            else:
                heard = subprocess.run(command, input=part.encode(), capture_output=True).stdout.decode()
                said.append(" ".join(heard.split()))
        return _as_learned("".join(said), language)


_SIGNS = {
    "aɪ": "I", "aʊ": "W", "eɪ": "A", "ɔɪ": "Y", "tʃ": "ʧ", "dʒ": "ʤ",
    "ɚɹ": "əɹ", "ɚ": "əɹ", "r": "ɹ", "x": "k", "ɐ": "ə",
}  # fmt: skip
_SIGNS_OF = {
    "en-us": {"oʊ": "O", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": "", "ɾ": "T"},
    "en-gb": {"əʊ": "Q", "eə": "ɛː", "iə": "ɪə"},
}


def _as_learned(phonemes: str, language: str) -> str:
    """English diphthongs and affricates as the single signs that Kokoro was trained with.

    >>> _as_learned("dʒˈoʊ mˈeɪd ɐ kˈoːɹ", "en-us")
    'ʤˈO mˈAd ə kˈoɹ'
    """
    if language in _SIGNS_OF:
        for old, new in (_SIGNS | _SIGNS_OF[language]).items():
            phonemes = phonemes.replace(old, new)
    return phonemes
