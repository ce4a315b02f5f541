"""The pipe: JSON Lines in, JSON Lines out. The one module that knows encoding and line numbers.

It knows nothing of dialogues: a row here is any JSON object.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from parrot_edge.errors import InputError, OutputError

MAX_LINE_BYTES = 32 * 1024 * 1024
"""Longest line that is read: no dialogue is this long, and memory stays bounded."""

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One raw line of an input: where it stood and its bytes without the line end."""

    source: str
    number: int
    data: bytes

    def error(self, reason: str) -> InputError:
        """An `InputError` that names this line."""
        return InputError(reason, source=self.source, line=self.number)

    def text(self) -> str:
        """The line as text; raises `InputError` where it is not UTF-8 or holds a NUL byte."""
        if len(self.data) > MAX_LINE_BYTES:
            raise self.error(f"line is longer than {MAX_LINE_BYTES // 2**20} MiB; split or remove it")
        if b"\0" in self.data:
            raise self.error("holds a NUL byte; the file is damaged or not text")
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(
                f"is not valid UTF-8 (byte {error.start + 1}); re-save the file as UTF-8"
            ) from None

    def row(self) -> dict[str, Any]:
        """The line as a JSON object; raises `InputError` where it is none."""
        text = self.text()
        try:
            row = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError:
            raise self.error("is nested too deeply") from None
        except ValueError as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise self.error(f"is not JSON ({detail}); one JSON object per line is expected") from None
        if not isinstance(row, dict):
            raise self.error(f"is a JSON {_json_type(row)}, not an object; write {{...}}")
        return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def read_lines(path: str | Path = "-") -> Iterator[Line]:
    """The non-blank lines of a file, or of stdin for `-`, in order and numbered from 1.

    CRLF ends and a leading byte order mark are removed; a longer line than `MAX_LINE_BYTES` is
    passed on cut, so that `Line.text` refuses it, and is never held whole.
    Raises `InputError` where the file cannot be opened or read.
    """
    source = "<stdin>" if str(path) == "-" else str(path)
    try:
        with contextlib.ExitStack() as stack:
            stream = sys.stdin.buffer if source == "<stdin>" else stack.enter_context(open(path, "rb"))
            number = 0
            while data := stream.readline(MAX_LINE_BYTES + 2):
                number += 1
                if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                    _skip_line(stream)
                if number == 1:
                    data = data.removeprefix(_UTF8_BOM)
                if data.strip():
                    yield Line(source, number, data.rstrip(b"\r\n"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=source) from None


def _skip_line(stream: IO[bytes]) -> None:
    while (data := stream.readline(1 << 20)) and not data.endswith(b"\n"):
        pass


def encode(row: dict[str, Any]) -> bytes:
    """One row as a line of bytes; text stays readable UTF-8.

    >>> encode({"id": "1", "text": "héllo"}).decode()
    '{"id": "1", "text": "héllo"}\\n'
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


class Writer:
    """Rows onto stdout (`-`) or a new file, each flushed as it is written.

    An existing file is refused unless it is to be replaced (`force`) or added to (`append`).
    Raises `OutputError` where a row cannot be written; on a full disk the torn tail is cut off, so
    that the file ends with a whole row.
    A closed pipe raises `BrokenPipeError`, which the command line turns into a quiet end.
    """

    def __init__(self, path: str | Path = "-", *, force: bool = False, append: bool = False) -> None:
        self._appender: Appender | None = None
        if str(path) == "-":
            return
        if not (force or append) and os.path.exists(path):
            raise OutputError(f"{path} exists; choose another name or pass --force to replace it")
        self._appender = Appender(path, truncate=not append)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row and flush it."""
        if self._appender is not None:
            self._appender.append(row)
            return
        try:
            sys.stdout.buffer.write(encode(row))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"stdout cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; stdout stays open."""
        if self._appender is not None:
            self._appender.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Appender:
    """A file that one process at a time appends whole rows to.

    Opening takes an exclusive lock (a second writer is refused with `OutputError`) and mends a
    torn last line, which is where a killed writer can have stopped. A row is handed to the
    operating system in `append`, so it survives the death of this process; `sync` makes it
    survive the death of the machine.
    """

    def __init__(self, path: str | Path, *, truncate: bool = False) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise OutputError(
                f"{self.path} is being written by another process; wait for it or choose another name"
            ) from None
        try:
            self._size = 0 if truncate else _end_of_last_row(self._fd)
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            os.close(self._fd)
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from None

    def append(self, row: dict[str, Any]) -> None:
        """Append one row; on failure the file is cut back to its last whole row, and `OutputError` raised."""
        self.append_bytes(encode(row))

    def append_bytes(self, data: bytes) -> None:
        """Append whole lines, already encoded; fails as `append` does."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend the cause"
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}; "
                f"what was written is whole, {hint} and resume"
            ) from None
        self._size += len(data)

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Release the lock and close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end_of_last_row(fd: int) -> int:
    """Offset just after the last line end of the file: what follows is a torn row."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 65536)
        block = os.pread(fd, end - start, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
