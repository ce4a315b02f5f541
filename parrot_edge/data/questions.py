"""What kind of thing a user's message asks."""

from __future__ import annotations

import re

from parrot_edge.data.text import AUXILIARIES, COMMANDS, WH_WORDS, words_of

QUESTION_TYPES = ("what", "how", "why", "which", "who", "when", "where", "polar", "request", "statement")
"""By question word; a question to be answered with yes or no; a request; and what asks nothing."""

_SEEN = 400
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
_REQUEST = re.compile(
    r"(?:can|could|would|will|may) (?:you|i)\b|i(?: would|'d)? (?:want|need|like) |please\b"
)
_SAME = {"whom": "who", "whose": "who"}


def find_question_type(text: str) -> str:
    """One of `QUESTION_TYPES`: the first sentence that asks decides, within the first 400 characters.

    >>> [find_question_type(text) for text in ("ok. but why?", "Is it far?", "could you draw it", "fine")]
    ['why', 'polar', 'request', 'statement']
    """
    for sentence in _SENTENCE.findall(text[:_SEEN]):
        words = words_of(sentence)
        if not words:
            continue
        if _REQUEST.match(sentence.strip().lower()) or words[0] in COMMANDS:
            return "request"
        asked = next((word for word in words[:4] if word in WH_WORDS), None)
        if asked and (sentence.endswith("?") or words[0] == asked):
            return _SAME.get(asked, asked)
        if sentence.endswith("?") or words[0] in AUXILIARIES:
            return "polar"
    return "statement"
