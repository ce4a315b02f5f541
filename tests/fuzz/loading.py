"""Hands llama.cpp files that are wrong in meaning, each in a process of its own, which must not crash.

    python tests/fuzz/loading.py --runs 1000 [--seed 0] [--keep FOLDER]

A case ends well where the model speaks, a `ParrotError` is raised, or the process ends with a sentence and
exit status 1. It does not where it dies by a signal, takes ten seconds or more than 3 GiB, or leaves a
traceback; then its file is kept and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from gguf_cases import disturb, put_together, take_apart  # noqa: E402

from parrot_edge.engine.native import Context, ContextShape, Model, is_activated  # noqa: E402
from parrot_edge.errors import ParrotError  # noqa: E402

BASE, ADAPTER = HERE / "base.gguf", HERE / "adapter.gguf"


def speak(path: Path, source: Path) -> None:
    """What every use of a model, or of an adapter, begins with."""
    is_activated(path)
    model = Model(path if source == BASE else BASE)
    adapter = None if source == BASE else model.load_adapter(path)
    context = Context(model, ContextShape(sequences=1, tokens=32, threads=1, batch=32), adapter)
    tokens = model.tokenize(b"w1 and w2", add_special=True)[:8] or [0]
    model.ends_turn(tokens[0])
    context.decode([(0, 0, tokens, 1)])


def try_case(path: Path, source: Path, errors: Path) -> tuple[int, str]:
    """Exit status of a process that speaks, below 0 for a signal, and what it wrote to stderr."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
        signal.alarm(10)
        status = 0
        try:
            speak(path, source)
        except ParrotError:
            status = 1
        except BaseException:
            traceback.print_exc()
            status = 2
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, errors.read_text(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(), metavar="FOLDER")
    given = parser.parse_args()
    ends: Counter[str] = Counter()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        path, errors = Path(name) / "model.gguf", Path(name) / "stderr"
        for number in range(given.runs):
            dice = random.Random(f"{given.seed} {number}")
            source = ADAPTER if dice.random() < 0.3 else BASE
            parts = take_apart(source.read_bytes())
            disturb(parts, dice)
            path.write_bytes(put_together(parts))
            status, said = try_case(path, source, errors)
            if status in (0, 1):
                ends["speaks" if status == 0 else "gave up" if "gave up" in said else "refused"] += 1
                continue
            ends["crashed"] += 1
            kept = given.keep / f"crash-loading-{given.seed}-{number}.gguf"
            kept.write_bytes(path.read_bytes())
            print(f"{kept}: exit status {status}\n{said}", file=sys.stderr)
    print(f"{given.runs} files: {dict(ends)}")
    sys.exit(1 if ends["crashed"] else 0)


if __name__ == "__main__":
    main()
