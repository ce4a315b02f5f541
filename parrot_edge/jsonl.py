"""The pipe: JSON Lines in, JSON Lines out. The one module that knows encoding and line numbers.

It knows nothing of dialogues: a row here is any JSON object.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from parrot_edge.errors import InputError, OutputError
from parrot_edge.store import refuse_existing

MAX_LINE_BYTES = 32 * 1024 * 1024
"""Longest line that is read: no dialogue is this long, and memory stays bounded."""

MAX_NESTING = 64
"""Objects and arrays within each other that a row may hold: what is read must be writable again,
and Python's own limit depends on who calls."""

_MARGIN = 5  # bytes: a byte order mark, one line end's CR, and one that is too much
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
            row = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
        except RecursionError:
            raise self._too_deep() from None
        except ValueError as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise self.error(f"is not JSON ({detail}); one JSON object per line is expected") from None
        if not isinstance(row, dict):
            raise self.error(f"is a JSON {_json_type(row)}, not an object; write {{...}}")
        if text.count("[") + text.count("{") > MAX_NESTING and _nests_deeper(row, MAX_NESTING):
            raise self._too_deep()
        return row

    def check_text(self, value: str, what: str) -> None:
        """Refuse what JSON allows but neither tokenizers nor files take: NUL and lone surrogates."""
        if "\0" in value:
            raise self.error(f"{what} holds a NUL character; remove it")
        if not is_unicode(value):
            raise self.error(f"{what} holds half of a surrogate pair; mend the escape")

    def _too_deep(self) -> InputError:
        return self.error(f"nests deeper than {MAX_NESTING} levels; flatten it")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; halves of surrogate pairs, which escapes can spell, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _nests_deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        members = (member for each in layer for member in (each.values() if isinstance(each, dict) else each))
        layer = [member for member in members if isinstance(member, dict | list)]
    return bool(layer)


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
            # Not sys.stdin: Python cannot end in peace while a thread waits inside that.
            file = sys.stdin.fileno() if source == "<stdin>" else path
            stream = stack.enter_context(open(file, "rb", closefd=source != "<stdin>"))
            number = 0
            while data := stream.readline(MAX_LINE_BYTES + _MARGIN):
                number += 1
                if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                    _skip_line(stream)
                if number == 1:
                    data = data.removeprefix(_UTF8_BOM)
                if data.strip():
                    yield Line(source, number, data.removesuffix(b"\n").removesuffix(b"\r"))
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

    An existing file is refused unless it is to be replaced (`force`). As a context that fails before
    the first row, it leaves no file behind.
    Raises `OutputError` where a row cannot be written; on a full disk the torn tail is cut off, so
    that the file ends with a whole row.
    A closed pipe raises `BrokenPipeError`, which the command line turns into a quiet end.
    """

    def __init__(self, path: str | Path = "-", *, force: bool = False) -> None:
        self._appender: Appender | None = None
        if str(path) == "-":
            return
        refuse_existing(Path(path), force=force)
        self._appender = Appender(path, truncate=True)

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

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and self._appender is not None and self._appender.size == 0:
            self._appender.discard()
        self.close()


class Appender:
    """A file that one process at a time appends whole rows to; `size` is its length in bytes.

    Opening takes an exclusive lock (a second writer is refused with `OutputError`) and mends the
    last line, which is where a killed writer can have stopped: a torn row is cut off, and one that
    lacks only its line end gets it. A row is handed to the operating system in `append`, so it
    survives the death of this process; `sync` makes it survive the death of the machine.
    """

    def __init__(self, path: str | Path, *, truncate: bool = False) -> None:
        self.path = Path(path)
        self.size = 0
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise OutputError(
                f"{self.path} is being written by another process; wait for it or choose another name"
            ) from None
        try:
            if truncate:
                os.ftruncate(self._fd, 0)
            else:
                self._mend()
        except OSError as error:
            self.close()
            raise self._unwritable(error) from None

    def _mend(self) -> None:
        end = os.fstat(self._fd).st_size
        self.size = _end_of_last_line(self._fd, end)
        tail = os.pread(self._fd, min(end - self.size, MAX_LINE_BYTES), self.size)
        try:
            Line(str(self.path), 0, tail).row()
        except InputError:
            os.ftruncate(self._fd, self.size)
        else:
            os.write(self._fd, b"\n")
            self.size = end + 1

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
            try:
                os.ftruncate(self._fd, self.size)
            except OSError:
                self.close()  # nothing may follow a torn row
            hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend the cause"
            raise self._unwritable(error, f"; what was written is whole, {hint} and carry on") from None
        self.size += len(data)

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._unwritable(error) from None

    def discard(self) -> None:
        """Remove the file, which is still locked, and close it."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Release the lock and close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _unwritable(self, error: OSError, advice: str = "") -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error.strerror}{advice}")


def _end_of_last_line(fd: int, end: int) -> int:
    """Offset just after the last line end before `end`: what follows is the start of a line."""
    while end > 0:
        start = max(0, end - 65536)
        block = os.pread(fd, end - start, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
