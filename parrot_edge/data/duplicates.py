"""What a text has in common with those before it: the same words, or nearly the same.

Texts are compared by their pairs of neighbouring words: two are near duplicates where these have a
Jaccard index of `THRESHOLD` or more, as MinHash estimates it (Broder 1997); candidates are found by
banding (locality-sensitive hashing), so the cost of a text does not grow with their number.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from parrot_edge.errors import UsageError

THRESHOLD = 0.6
"""About one word in eight changed."""

_HASHES, _BANDS = 160, 32
"""A pair with index 0.6 becomes a candidate with probability 0.92, one with 0.7 with 0.996."""

_PIECE = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word, or a letter of a script that writes no spaces."""


class Duplicates:
    """An index of texts, each with a name. Raises `UsageError` where rensa is not installed.

    >>> known = Duplicates()
    >>> known.add("How long do I boil an egg, if it is cold?", "row 1")
    >>> known.find("how long do i boil an EGG if it is cold")
    ('duplicate', 'row 1')
    """

    def __init__(self) -> None:
        try:
            import rensa
        except ModuleNotFoundError:
            raise UsageError("finding duplicates needs rensa; run pip install 'parrot-edge[data]'") from None
        self._new_hash = lambda: rensa.RMinHash(num_perm=_HASHES, seed=1)
        self._bands = rensa.RMinHashLSH(threshold=THRESHOLD, num_perm=_HASHES, num_bands=_BANDS)
        self._names: list[str] = []
        self._trees: list[str | None] = []
        self._hashes: list[Any] = []
        self._exact: dict[bytes, int] = {}
        self._last: tuple[str, bytes, Any] = ("", b"", None)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str, tree: str | None = None) -> tuple[str, str] | None:
        """Whether it is a "duplicate" or "near_duplicate", and of which text by name; else None.

        The branches of a tree share their first turns, so they are no near duplicates of each other.
        """
        digest, signature = self._read(text)
        if digest in self._exact:
            return "duplicate", self._names[self._exact[digest]]
        for number in sorted(self._bands.query(signature)):
            is_branch = tree is not None and tree == self._trees[number]
            if not is_branch and signature.jaccard(self._hashes[number]) >= THRESHOLD:
                return "near_duplicate", self._names[number]
        return None

    def add(self, text: str, name: str, tree: str | None = None) -> None:
        """Take a text into the index, as a branch of a tree or as none."""
        digest, signature = self._read(text)
        number = len(self._names)
        self._exact.setdefault(digest, number)
        self._bands.insert(number, signature)
        self._hashes.append(signature)
        self._names.append(name)
        self._trees.append(tree)

    def _read(self, text: str) -> tuple[bytes, Any]:
        """A digest of its words and its MinHash; what was asked for last is remembered."""
        if self._last[0] != text or self._last[2] is None:
            pieces = _PIECE.findall(text.lower()) or list(text)
            signature = self._new_hash()
            # The ends count as words, so that a text of one word has pairs too
            signature.update(list(map(" ".join, zip(["", *pieces], [*pieces, ""], strict=True))))
            digest = hashlib.blake2b(" ".join(pieces).encode(), digest_size=16).digest()
            self._last = (text, digest, signature)
        return self._last[1:]
