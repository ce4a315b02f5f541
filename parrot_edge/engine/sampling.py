"""Where the random numbers of a turn come from."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A 32-bit seed from, say, (run seed, dialogue id, turn, role): a stable hash of the parts.

    Each turn draws from its own stream, so neither the order of dialogues nor how many run at
    once changes what is drawn.

    >>> derive_seed(0, "a", 1, "ask") == derive_seed(0, "a", 1, "ask")
    True
    >>> derive_seed(0, "a", 1, "ask") == derive_seed(0, "a", 1, "chat")
    False
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
