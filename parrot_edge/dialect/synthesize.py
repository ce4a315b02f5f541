"""A corpus to practise on: its dialects and its speakers are a synthesiser's voices.

A timbre that speaks several dialects does so under one name, so that a split by speaker holds it out
everywhere; no two timbres say the same sentence while there are enough of them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from parrot_edge.dialect.voices import Voice
from parrot_edge.errors import OutputError, UsageError
from parrot_edge.jsonl import Writer, read_lines
from parrot_edge.seeds import builtin_path

_SHORTEST, _LONGEST = 20, 120  # characters


def builtin_sentences() -> list[str]:
    """English sentences that come with the package: those of its seeds that are neither short nor long."""
    prompts = [line.row().get("prompt", "") for line in read_lines(builtin_path())]
    found = [each.strip() for prompt in prompts for each in re.split(r"(?<=[.!?])\s+|\n+", prompt)]
    return [each for each in dict.fromkeys(found) if _SHORTEST <= len(each) <= _LONGEST]


def synthesize(
    output: Path, voices: Sequence[Voice], texts: Sequence[str], *, sentences: int = 10, seed: int = 0
) -> int:
    """Let each voice say `sentences` of the texts; returns how many recordings there are. `output` is a
    folder with `manifest.jsonl` and a folder for each label.

    Raises `UsageError` where there are fewer than two labels or no texts, or a voice cannot speak, and
    `OutputError` where `output` exists or cannot be written.
    """
    labels = list(dict.fromkeys(voice.label for voice in voices))
    if len(labels) < 2:
        raise UsageError("one label cannot be told from others; name voices of two labels at least")
    if wrong := [label for label in labels if not re.fullmatch(r"[\w.-]+", label)]:
        raise UsageError(f"the label {wrong[0]!r} cannot name a folder; use letters, digits, - and _")
    if not texts:
        raise UsageError("there is nothing to say; give a file with a sentence a line")
    if output.exists():
        raise OutputError(f"{output} exists; choose another name")
    order = random.Random(seed).sample(list(texts), len(texts))
    speakers = list(dict.fromkeys(voice.speaker for voice in voices))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for label in labels:
            (partial / label).mkdir(parents=True)
        with Writer(partial / "manifest.jsonl") as manifest:
            for voice in voices:
                first = speakers.index(voice.speaker) * sentences
                for number in range(sentences):
                    path = (
                        f"{voice.label}/{'-'.join(dict.fromkeys((voice.name, voice.speaker)))}-{number}.wav"
                    )
                    voice.say(order[(first + number) % len(order)], partial / path)
                    row = {"path": path, "label": voice.label, "speaker": voice.speaker}
                    manifest.write({**row, "source": voice.source})
        os.replace(partial, output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(voices) * sentences
