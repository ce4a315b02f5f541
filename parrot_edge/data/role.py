"""How much a message reads as an assistant's, from what it looks like: no model is asked.

A logistic regression on what can be seen in the first characters: `find_features`, and a weight for
each. What they were fitted on, and how well they tell the sides apart elsewhere, is in docs/data.md.
"""

from __future__ import annotations

import math
import re

from parrot_edge.data.text import AUXILIARIES, COMMANDS, WH_WORDS, word_set, words_of
from parrot_edge.roles import sounds_like_assistant

SEEN = 300
"""Characters that are looked at."""

_FIRST_PERSON = word_set("i i'm i've i'd i'll im ive me my mine we our")
_SECOND_PERSON = word_set("you your you're you'll yours")
_STATEMENTS = word_set("the a an this these it there to as in yes no for by here")
_REACTIONS = word_set("thanks thank ok okay great hi hello and but also so now")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_LIST = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+\S|\*\*|```", re.MULTILINE)


def find_features(text: str) -> list[float]:
    """What the weights are for, each about 0..1 but the first (the log of the length in words)."""
    seen = text.strip()[:SEEN]
    words = words_of(seen)
    count = max(1, len(words))
    first = words[0] if words else ""
    return [
        math.log1p(len(words)),
        "?" in seen,
        first in COMMANDS,
        first in WH_WORDS or first in AUXILIARIES,
        first in _STATEMENTS,
        first in _REACTIONS,
        min(1.0, 5 * sum(word in _FIRST_PERSON for word in words) / count),
        min(1.0, 5 * sum(word in _SECOND_PERSON for word in words) / count),
        min(4, len(_SENTENCE_END.findall(seen))) / 4,
        seen[:1].islower(),
        bool(_LIST.search(seen)),
        sounds_like_assistant(text),
        sum(map(len, words)) / count / 5,
    ]


_BIAS = -4.84
_WEIGHTS = (1.15, -1.77, -2.43, -1.56, 0.94, -1.45, -2.18, 3.0, 1.56, -2.21, 0.19, 3.04, 1.13)


def find_assistant_likeness(text: str) -> float:
    """How sure the regression is that an assistant wrote it, 0..1.

    >>> find_assistant_likeness("ok and what about my old phone?") < 0.1
    True
    >>> find_assistant_likeness("You can reset your phone in the settings. The steps are as follows.") > 0.9
    True
    """
    total = _BIAS + sum(weight * value for weight, value in zip(_WEIGHTS, find_features(text), strict=True))
    return 1 / (1 + math.exp(-total))
