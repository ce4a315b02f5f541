"""A corpus to practise on, spoken by espeak-ng: its voices are the dialects, its timbres the speakers.

A timbre speaks all dialects, each with its own pitch and speed, and under one name, so that a split by
speaker holds it out everywhere; no two timbres say the same sentence while there are enough of them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from parrot_edge.errors import OutputError, UsageError
from parrot_edge.jsonl import Writer, read_lines
from parrot_edge.seeds import builtin_path

ENGLISH = {
    "us": "en-us",
    "gb": "en-gb",
    "scotland": "en-gb-scotland",
    "lancaster": "en-gb-x-gbclan",
    "west-midlands": "en-gb-x-gbcwmd",
    "caribbean": "en-029",
}
"""Labels and their voices where none are named."""

SOURCE = "espeak-ng"

_TIMBRES = tuple(
    """
    Alex Alicia Andrea Andy Annie Diogo Gene Hugo Jacky Lee Mario Michael Mike Nguyen adam anika antonio aunty
    belinda benjamin boris david ed edward f1 f2 f3 f4 f5 grandma grandpa iven john linda m1 m2 m3 m4 m5 m6 m7
    m8 marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph travis victor
    zac
    """.split()  # noqa: SIM905
)
"""Those of espeak-ng's variants that sound like people."""

_PITCH, _SPEED = (30, 70), (140, 200)  # espeak-ng's scales: 0..99, words a minute
_LONGEST = 120  # characters


def builtin_sentences() -> list[str]:
    """English sentences that come with the package: its shorter seeds."""
    prompts = [line.row().get("prompt", "") for line in read_lines(builtin_path())]
    return [prompt for prompt in prompts if 20 <= len(prompt) <= _LONGEST and "\n" not in prompt]


def synthesize(
    output: Path,
    voices: Mapping[str, str],
    texts: Sequence[str],
    *,
    speakers: int = 20,
    sentences: int = 10,
    seed: int = 0,
) -> int:
    """Speak `sentences` texts by each of `speakers` timbres in each voice (label to voice); returns how many
    recordings there are. `output` is a folder with `manifest.jsonl` and a folder for each label.

    Raises `UsageError` where espeak-ng, a voice or texts are missing, `OutputError` where `output` exists.
    """
    if shutil.which("espeak-ng") is None:
        raise UsageError("espeak-ng is not installed; on Debian run apt-get install espeak-ng")
    if len(voices) < 2:
        raise UsageError("one label cannot be told from others; name two voices at least")
    if speakers > len(_TIMBRES):
        raise UsageError(f"there are {len(_TIMBRES)} timbres, and {speakers} were asked for")
    if wrong := [label for label in voices if not re.fullmatch(r"[\w.-]+", label)]:
        raise UsageError(f"the label {wrong[0]!r} cannot name a folder; use letters, digits, - and _")
    if not texts:
        raise UsageError("there is nothing to say; give a file with a sentence a line")
    if output.exists():
        raise OutputError(f"{output} exists; choose another name")
    draw = random.Random(seed)
    timbres = draw.sample(_TIMBRES, speakers)
    order = draw.sample(list(texts), len(texts))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for label in voices:
            (partial / label).mkdir(parents=True)
        with Writer(partial / "manifest.jsonl") as manifest:
            for place, timbre in enumerate(timbres):
                pitch, speed = draw.randint(*_PITCH), draw.randint(*_SPEED)
                for label, voice in voices.items():
                    for number in range(sentences):
                        name = f"{label}/{timbre}-{number}.wav"
                        said = order[(place * sentences + number) % len(order)]
                        _speak(said, f"{voice}+{timbre}", pitch, speed, partial / name)
                        manifest.write({"path": name, "label": label, "speaker": timbre, "source": SOURCE})
        os.replace(partial, output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(voices) * speakers * sentences


def _speak(text: str, voice: str, pitch: int, speed: int, path: Path) -> None:
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "-w", str(path), "--stdin"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode or not path.is_file():
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise UsageError(f"espeak-ng cannot speak as {voice}: {reason or 'it wrote nothing'}")
