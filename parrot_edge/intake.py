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
from queue import SimpleQueue
from threading import Thread
from typing import Any

from parrot_edge.dialogue import Seed, parse_seed
from parrot_edge.errors import InputError, OutputError, shorten
from parrot_edge.jsonl import Line, Writer, read_lines


@dataclass(frozen=True)
class Intake:
    """Seeds of a file or of stdin (`-`).

    text          take a line that is no JSON object as a prompt
    limit         stop after so many seeds
    waiting       "user" or "assistant": whose message a dialogue without a stop reason must be waiting for
    rejects       where bad lines go; without it the first one raises `InputError`
    may_be_empty  whether an input without a line holds no seeds, rather than raising `InputError`
    """

    path: str = "-"
    text: bool = False
    limit: int | None = None
    waiting: str | None = None
    rejects: Rejects | None = None
    may_be_empty: bool = False

    def count(self) -> int | None:
        """How many seeds there are, all of them checked, or None for a pipe.

        Raises `InputError` for the first bad line unless rejects are taken, and where there is no line
        but should be.
        """
        if not self._can_be_read_twice():
            return None
        start = os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) if self.path == "-" else 0
        count = sum(1 for _ in self._read(lambda line, error: None))  # rejects are written on the second pass
        if self.path == "-":
            os.lseek(sys.stdin.fileno(), start, os.SEEK_SET)
        return count

    def seeds(self) -> Iterator[Seed]:
        """The seeds in order; raises as `count` does."""
        return self._read(self.rejects.add_line if self.rejects else None)

    async def seeds_as_they_come(self) -> AsyncIterator[Seed]:
        """The same for a pipe, without holding up the event loop, nor its end while no line comes."""
        loop = asyncio.get_running_loop()
        asked: SimpleQueue[asyncio.Future[Seed | None] | None] = SimpleQueue()
        Thread(target=_take_when_asked, args=(self.seeds(), loop, asked), daemon=True).start()
        try:
            while True:
                seed: asyncio.Future[Seed | None] = loop.create_future()
                asked.put(seed)
                if (taken := await seed) is None:
                    return
                yield taken
        finally:
            asked.put(None)

    def _read(self, reject: Callable[[Line, InputError], None] | None) -> Iterator[Seed]:
        seen: dict[str, int] = {}

        def parsed() -> Iterator[Seed]:
            empty = True
            for line in read_lines(self.path):
                empty = False
                try:
                    seed = parse_seed(line, text=self.text)
                    self._check_turn(line, seed)
                    if seed.id in seen:
                        raise line.error(
                            f"has the id of line {seen[seed.id]}, {shorten(seed.id)}; ids must differ, "
                            "and rows that say the same need ids of their own"
                        )
                except InputError as error:
                    if self.rejects is None or reject is None:
                        raise
                    reject(line, error)
                    continue
                seen[seed.id] = line.number
                yield seed
            if empty and not self.may_be_empty:
                source = "<stdin>" if self.path == "-" else self.path
                raise InputError("holds no rows; one JSON object per line is expected", source=source)

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


def _take_when_asked(
    seeds: Iterator[Seed],
    loop: asyncio.AbstractEventLoop,
    asked: SimpleQueue[asyncio.Future[Seed | None] | None],
) -> None:
    """Settle each future that is `asked` for with the next seed, or None after the last; None ends it."""

    def settle(taken: asyncio.Future[Seed | None], seed: Seed | None, error: Exception | None) -> None:
        if taken.done():  # nobody waits any more
            return
        if error is not None:
            taken.set_exception(error)
        else:
            taken.set_result(seed)

    while (taken := asked.get()) is not None:
        result: tuple[Seed | None, Exception | None]
        try:
            result = next(seeds, None), None
        except Exception as error:
            result = None, error
        try:
            loop.call_soon_threadsafe(settle, taken, *result)
        except RuntimeError:  # the loop has ended meanwhile
            return


class Rejects:
    """A file of what was skipped: `{"source", "line", "id", "reason", "text"}` a row.

    It is made when the first row is rejected. A run that is carried on meets its bad rows again, so
    an existing file is replaced then (`replace`), and refused otherwise.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        if not replace and os.path.exists(path):
            raise OutputError(f"{path} exists; remove it or name another with --rejects")
        self.path, self.count = path, 0
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
            self._writer = Writer(self.path, force=True)
        self._writer.write(row)
        self.count += 1

    def close(self) -> None:
        """The run is over; where nothing was rejected, the file of an earlier attempt goes."""
        if self._writer is not None:
            self._writer.close()
        else:
            self.path.unlink(missing_ok=True)
