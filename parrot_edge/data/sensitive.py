"""Sensitive subjects, by a list of words that may be replaced.

A list of words knows nothing of what is meant: a doctor's question and a threat may share them. So it is
for the coarse first pass, and what it rejects is kept aside with the entry that matched.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from parrot_edge.data.text import words_of
from parrot_edge.errors import InputError


@dataclass
class WordList:
    """Entries by their first word, each with its category; and patterns."""

    phrases: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    patterns: list[tuple[re.Pattern[str], str]] = field(default_factory=list)

    def find(self, text: str) -> str | None:
        """The first entry of the text as "category: entry", or None.

        >>> words = read_word_list(["[rude]", "you idiot"])
        >>> words.find("You IDIOT!"), words.find("that is idiotic of you")
        ('rude: you idiot', None)
        """
        words = words_of(text)
        spaced = ""
        for word in self.phrases.keys() & set(words):
            spaced = spaced or f" {' '.join(words)} "
            for phrase, category in self.phrases[word]:
                if f" {phrase} " in spaced:
                    return f"{category}: {phrase}"
        lower = text.lower() if self.patterns else ""
        for pattern, category in self.patterns:
            if pattern.search(lower):
                return f"{category}: {pattern.pattern}"
        return None


def read_word_list(lines: Iterable[str], source: str = "the list") -> WordList:
    """A list from its lines; raises `InputError` naming the line of a pattern that is none."""
    words, category = WordList(), "sensitive"
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if entry.startswith("[") and entry.endswith("]"):
            category = entry[1:-1].strip()
        elif entry.startswith("re:"):
            try:
                words.patterns.append((re.compile(entry.removeprefix("re:").strip()), category))
            except re.error as error:
                reason = f"is no regular expression ({error})"
                raise InputError(reason, source=source, line=number) from None
        elif parts := words_of(entry):
            words.phrases.setdefault(parts[0], []).append((" ".join(parts), category))
    return words


def load_word_list(path: Path | None = None) -> WordList:
    """The list of a file, or the one that comes with the package; raises `InputError`."""
    if path is None:
        text = importlib.resources.files("parrot_edge.data").joinpath("sensitive.txt").read_text("utf-8")
        return read_word_list(text.splitlines())
    try:
        return read_word_list(path.read_text("utf-8").splitlines(), str(path))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=str(path)) from None
    except UnicodeDecodeError:
        raise InputError("is not valid UTF-8; re-save the file as UTF-8", source=str(path)) from None
