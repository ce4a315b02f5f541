"""llama.cpp's quantiser in a process of its own: it can be stopped, and if it crashes that is an error.

In this process Ctrl-C would wait until all is written, and a failed assertion in C would end everything.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from parrot_edge.errors import ModelError, OutputError, ParrotError
from parrot_edge.store import new_file

_PACKAGE = Path(__file__).parents[1]
_UNWRITTEN = "iostream"  # in all that C++ says of a stream that could not be written


def quantize(
    source: Path,
    target: Path,
    type_name: str,
    threads: int,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    notes: Mapping[str, int | str] | None = None,
) -> None:
    """As `native.quantize`, but `target` is there whole or not at all, also after Ctrl-C.

    An existing `target` is replaced. Raises `OutputError` where it cannot be written, else `ModelError`.
    """
    data = io.BytesIO()
    np.savez(data, **dict(importance or {}))  # type: ignore[arg-type]
    path = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    pipe = subprocess.PIPE
    with new_file(target, force=True) as draft:
        request = {"paths": [str(source), str(draft)], "type": type_name, "threads": threads, "notes": notes}
        command = [sys.executable, "-m", __name__, json.dumps(request)]
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, "PYTHONPATH": path}
        ) as child:
            try:
                said, _ = child.communicate(data.getvalue())
            except BaseException:
                child.kill()
                child.wait()
                raise
        if child.returncode != 0:
            raise _failure(source, target, type_name, child.returncode, said.decode("utf-8", "replace"))
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())  # whole, or not there, after a power cut as well


def _failure(source: Path, target: Path, type_name: str, code: int, said: str) -> ParrotError:
    """What a child that failed means."""
    if _UNWRITTEN in said:
        return OutputError(
            f"{target} cannot be written, the disk may be full; free some space or name another place"
        )
    if code == 1 and said:
        return ModelError(said.strip())
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    return ModelError(
        f"{source} cannot be written as {type_name}: llama.cpp {how}; check the file and the memory"
    )


def _serve(request: str) -> None:
    """In the child: do what `quantize` was asked; a failure is one sentence on stdout and exit 1."""
    from parrot_edge.engine import native

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    asked = json.loads(request)
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as importance:
        source, target = map(Path, asked["paths"])
        try:
            native.quantize(
                source, target, asked["type"], asked["threads"], importance=importance, notes=asked["notes"]
            )
        except ParrotError as error:
            print(error)
            sys.exit(1)


if __name__ == "__main__":
    _serve(sys.argv[1])
