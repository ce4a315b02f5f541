"""Rows in: every line parsed, every bad one refused or set aside, no id twice.

A file is read through once before the work begins, so that its last line is known to be good
before the first model is loaded; a pipe is read as it comes.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from parrot_edge.dialogue import Seed, parse_seed
from parrot_edge.errors import InputError
from parrot_edge.jsonl import Line, Writer, read_lines


@dataclass(frozen=True)
class Intake:
    """Seeds of a file or of stdin (`-`).

    text     take a line that is no JSON object as a prompt
    limit    stop after so many seeds
    waiting  "user" or "assistant": whose message a dialogue without a stop reason must be waiting for
    rejects  where bad lines go; without it the first one raises `InputError`
    """

    path: str = "-"
    text: bool = False
    limit: int | None = None
    waiting: str | None = None
    rejects: Rejects | None = None

    def count(self) -> int | None:
        """How many seeds there are, all of them checked, or None for a pipe.

        Raises `InputError` for the first bad line unless rejects are taken, and where there is no seed.
        """
        if not self._can_be_read_twice():
            return None
        count = sum(1 for _ in self._read(lambda line, error: None))  # rejects are written on the second pass
        if self.path == "-":
            sys.stdin.buffer.seek(0)
        if count == 0:
            raise self._nothing()
        return count

    def seeds(self) -> Iterator[Seed]:
        """The seeds in order; raises as `count` does."""
        empty = True
        for seed in self._read(self.rejects.add_line if self.rejects else None):
            empty = False
            yield seed
        if empty:
            raise self._nothing()

    async def seeds_as_they_come(self) -> AsyncIterator[Seed]:
        """The same for a pipe, without holding up the event loop."""
        seeds = self.seeds()
        while (seed := await asyncio.to_thread(next, seeds, None)) is not None:
            yield seed

    def _read(self, reject: Callable[[Line, InputError], None] | None) -> Iterator[Seed]:
        seen: dict[str, int] = {}

        def parsed() -> Iterator[Seed]:
            for line in read_lines(self.path):
                try:
                    seed = parse_seed(line, text=self.text)
                    self._check_turn(line, seed)
                    if seed.id in seen:
                        raise line.error(f"has the id {seed.id!r} of line {seen[seed.id]}; ids must differ")
                except InputError as error:
                    if self.rejects is None or reject is None:
                        raise
                    reject(line, error)
                    continue
                seen[seed.id] = line.number
                yield seed

        return islice(parsed(), self.limit)

    def _check_turn(self, line: Line, seed: Seed) -> None:
        if self.waiting is None or seed.extra.get("stop_reason") is not None:
            return
        if (seed.next_role == "user") != (self.waiting == "user"):
            verb = "chat" if seed.next_role == "assistant" else "ask"
            raise line.error(f"is waiting for the {seed.next_role}; run it through parrot {verb} first")

    def _can_be_read_twice(self) -> bool:
        try:
            mode = os.fstat(sys.stdin.fileno()).st_mode if self.path == "-" else os.stat(self.path).st_mode
        except (OSError, ValueError):
            return self.path != "-"  # reading it will say what is wrong
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def _nothing(self) -> InputError:
        source = "<stdin>" if self.path == "-" else self.path
        return InputError("holds no rows; one JSON object per line is expected", source=source)


class Rejects:
    """A file of what was skipped: `{"source", "line", "id", "reason", "text"}` a row.

    It is made when the first row is rejected; a run that is carried on adds to it.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self.path, self.count = path, 0
        self._append = append
        self._writer: Writer | None = None

    def add_line(self, line: Line, error: InputError) -> None:
        """Set a bad line aside; of a long one only the start is kept."""
        text = line.data[:10_000].decode("utf-8", "replace")
        self._add(
            {"source": line.source, "line": line.number, "id": None, "reason": error.reason, "text": text}
        )

    def add_seed(self, seed: Seed, error: Exception) -> None:
        """Set a seed aside whose dialogue failed."""
        self._add({"source": None, "line": None, "id": seed.id, "reason": str(error), "text": None})

    def _add(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = Writer(self.path, force=True, append=self._append)
        self._writer.write(row)
        self.count += 1
