"""Fuzzes one target, guided by what each input reaches.

    python tests/fuzz/run.py TARGET --runs 100000 [--seed 0] [--grow FOLDER]

Starts from `corpus/TARGET`. A traceback, ten seconds without an end, or more memory than 2 GiB ends it with
an exit status, and the input is written to crash-*, timeout-* or oom-* in the working directory. With --grow,
inputs that reach something new are kept in a folder, from which a later run starts too.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import struct
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=4096, metavar="BYTES")
    parser.add_argument("--grow", type=Path, metavar="FOLDER")
    given = parser.parse_args()

    sys.path.insert(0, str(HERE.parent.parent))
    import atheris
    from gguf_cases import disturb, put_together, take_apart

    with atheris.instrument_imports(include=["parrot_edge"]):
        from targets import TARGETS

        from parrot_edge.errors import ParrotError

    target = TARGETS[given.target]
    memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)

        def once(data: bytes) -> None:
            try:
                target(data, folder)
            except ParrotError as error:
                said = str(error)
                if "\n" in said or len(said) > 2000:
                    raise ValueError(f"not one sentence: {said}") from error

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            """Half of the changes to a GGUF keep its form, as random ones seldom do."""
            dice = random.Random(seed)
            if dice.random() < 0.5:
                with contextlib.suppress(struct.error, LookupError, ValueError, OverflowError):
                    parts = take_apart(data)
                    disturb(parts, dice)
                    return put_together(parts)[:most]
            return atheris.Mutate(data, most)

        grown = given.grow or folder / "grown"  # the first place is the one that is written to
        grown.mkdir(parents=True, exist_ok=True)
        arguments = [
            sys.argv[0],
            f"-runs={given.runs}",
            f"-seed={given.seed}",
            f"-max_len={given.longest}",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            "-verbosity=0",
            str(grown),
            str(HERE / "corpus" / given.target),
        ]
        options = {"custom_mutator": mutate} if given.target in ("gguf", "adapter", "base") else {}
        atheris.Setup(arguments, once, **options)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
