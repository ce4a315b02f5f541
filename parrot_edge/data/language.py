"""The language of a text, by py3langid (Lui and Baldwin 2012)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from parrot_edge.errors import UsageError

_SEEN = 500
"""Characters that are looked at."""

_LETTERS = 20
"""Fewest letters that say anything."""

_SURE = 0.9


def is_language(text: str, language: str) -> bool:
    """Whether a text may be in a language (ISO 639-1 code): it is too short, or is not surely in another.

    Raises `UsageError` where py3langid is missing or does not know the language.
    """
    identifier = _open_identifier()
    if language not in identifier.nb_classes:
        known = ", ".join(sorted(identifier.nb_classes))
        raise UsageError(f"{language!r} is no language that can be told; use one of {known}")
    seen = text[:_SEEN]
    if sum(map(str.isalpha, seen)) < _LETTERS:
        return True
    found, probability = identifier.classify(seen)
    return found == language or probability < _SURE


@lru_cache(maxsize=1)
def _open_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise UsageError("telling languages needs py3langid; run pip install 'parrot-edge[data]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
