"""How much of what is written is new: distinct-n, MTLD and ROUGE-L between texts.

It knows words only, not dialogues.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

STRETCH = 300
"""Words in which distinct n-grams are counted: their share falls the more words there are."""

_TTR = 0.72
"""The type-token ratio at which a factor of MTLD is full (McCarthy and Jarvis 2010)."""


def find_distinct(words: Sequence[str], n: int) -> float:
    """The share of different n-grams among all of a text (distinct-n, Li et al. 2016); 0 without any.

    >>> find_distinct(["a", "b", "a", "b"], 2)
    0.6666666666666666
    """
    grams = list(zip(*(words[offset:] for offset in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 0.0


def find_mtld(words: Sequence[str]) -> float:
    """The measure of textual lexical diversity (McCarthy and Jarvis 2010): how many words a text goes on
    for, on average, before its type-token ratio falls to 0.72, forwards and backwards; 0 without words.

    >>> find_mtld(["a", "b"] * 30)
    3.0
    """
    if not words:
        return 0.0
    return (_mean_factor(words) + _mean_factor(words[::-1])) / 2


def _mean_factor(words: Sequence[str]) -> float:
    factors, types, start = 0.0, set[str](), 0
    for place, word in enumerate(words, 1):
        types.add(word)
        if len(types) < _TTR * (place - start):
            factors, types, start = factors + 1, set(), place
    if rest := len(words) - start:
        factors += (1 - len(types) / rest) / (1 - _TTR)
    return len(words) / factors if factors else float(len(words))


def find_rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L of two texts (Lin 2004): the F1 of their longest common subsequence, 0..1.

    >>> find_rouge_l("how is the soup".split(), "and how was the soup made".split())
    0.6
    """
    if not one or not other:
        return 0.0
    return 2 * _common_length(one, other) / (len(one) + len(other))


def find_self_rouge(texts: Sequence[Sequence[str]]) -> float:
    """The mean ROUGE-L of all pairs of texts, 0..1; 0 where there is no pair."""
    pairs = list(combinations(texts, 2))
    return sum(find_rouge_l(*pair) for pair in pairs) / len(pairs) if pairs else 0.0


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit for each word (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(one)) - 1
    row = everywhere
    for word in other:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    return len(one) - row.bit_count()
