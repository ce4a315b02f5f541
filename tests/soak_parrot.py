"""`parrot` as it is, on a machine whose clock jumps, for the soak.

    python tests/soak_parrot.py simulate seeds.jsonl -o out.jsonl

SIGUSR1 lets the wall clock (not the monotonic one, as on a real machine) jump by up to a year, back or
forth. The environment sets

    ENDPOINT_TIMEOUT  seconds to wait for a remote model, where a short soak has no time for the default
"""

from __future__ import annotations

import os
import random
import signal
import time

YEAR = 366 * 86400.0

_time = time.time
_dice = random.Random(os.getpid())
_offset = 0.0


def jump(*_: object) -> None:
    """Set the wall clock to another time."""
    global _offset
    _offset = _dice.uniform(-YEAR, YEAR)


if __name__ == "__main__":
    time.time = lambda: _time() + _offset  # before anybody can import it by name
    signal.signal(signal.SIGUSR1, jump)

    from parrot_edge.cli import main
    from parrot_edge.engine.remote import RemoteEngine

    if seconds := os.environ.get("ENDPOINT_TIMEOUT"):
        RemoteEngine.__init__.__kwdefaults__["timeout"] = float(seconds)
    main()
