"""Durable dialogues: every message is on record before the next one is made.

OUT holds finished rows, and beside it OUT.journal, as long as the run is not complete, the
messages of dialogues under way. Each line of the journal is handed to the operating system
before the dialogue goes on, so killing the process loses nothing; `sync`, called about once a second,
makes that hold for the machine.

It knows the shape of its own lines and the ids in OUT; what a run is, it does not know.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parrot_edge.dialogue import Message
from parrot_edge.errors import InputError, OutputError, UsageError
from parrot_edge.jsonl import Appender, Line, encode, read_lines


@dataclass
class Progress:
    """How far a dialogue has come: messages beyond the seed's, and its end if it has one.

    read, made, cut  tokens read and made, and messages cut at their token limit, so far
    """

    messages: list[Message] = field(default_factory=list)
    read: int = 0
    made: int = 0
    cut: int = 0
    stop_reason: str | None = None


class Journal:
    """The output of a run and the record of what is under way.

    `settings` is what the rows depend on; resuming with others raises `UsageError`. A new run
    refuses an existing OUT unless `resume` or `force`, and leaves none behind if it ends before its
    first message. A torn last line, in either file, is mended: its dialogue is carried on from its
    last whole line.

    `verb` is whose output OUT is, and `key` one that each of its rows has: a file of something else is
    refused.

    finished   ids of the rows in OUT, and those that were dropped
    dropped    why, of the ids that get no row
    under_way  dialogues without a row, as far as they were recorded when the journal was opened
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        verb: str = "simulate",
        key: str = "stop_reason",
    ) -> None:
        if os.path.isdir(path):
            raise OutputError(f"{path} is a directory; name a file")
        if os.path.exists(path) and not (resume or force):
            raise OutputError(f"{path} exists; --resume carries it on, --force replaces it")
        self.path = path
        self.journal_path = path.with_name(path.name + ".journal")
        if resume and os.path.exists(path) and not os.path.exists(self.journal_path):
            _read_ids(path, verb, key)  # raises where this is no output, before anything of it is mended
        self._output = Appender(path, truncate=not resume)
        self._journal: Appender | None = None
        self._is_untouched = not resume
        self.finished: set[str] = set()
        self.dropped: dict[str, str] = {}
        self.under_way: dict[str, Progress] = {}
        try:
            if resume:
                self.finished = _read_ids(path, verb, key)
                self._recall(dict(settings))
                self._output.sync()  # the journal is about to forget what is finished
            self._start_journal({"settings": dict(settings)})
        except BaseException:
            self.close()
            raise
        self._begun = set(self.under_way)
        self._is_untouched = not (self.finished or self.under_way)

    def _recall(self, settings: dict[str, Any]) -> None:
        """Read the journal of the run that is carried on."""
        if not os.path.exists(self.journal_path):
            return
        with Appender(self.journal_path):  # mends a torn tail
            pass
        lines = read_lines(self.journal_path)
        first = next(lines, None)
        if first is not None:
            check_settings(first.row().get("settings"), settings, self.path)
        for line in lines:
            entry = line.row()
            try:
                identity = entry["id"]
                if identity in self.finished:
                    continue
                if "dropped" in entry:
                    self.dropped[identity] = entry["dropped"]
                    continue
                progress = self.under_way.setdefault(identity, Progress())
                progress.read += entry["read"]
                progress.made += entry["made"]
                progress.cut += entry["cut"]
                if entry.get("stop_reason"):
                    progress.stop_reason = entry["stop_reason"]
                else:
                    progress.messages.append(Message(entry["role"], entry["content"]))
            except (KeyError, TypeError):
                raise line.error(
                    "is not a journal line; remove the file to start its dialogues anew"
                ) from None
        self.finished |= self.dropped.keys()

    def _start_journal(self, header: dict[str, Any]) -> None:
        """Begin the journal anew with only what OUT does not tell, in place of the old one at once."""
        draft = self.journal_path.with_name(self.journal_path.name + ".new")
        self._journal = Appender(draft, truncate=True)
        lines = [encode(header), *(encode(_drop_entry(*each)) for each in self.dropped.items())]
        for identity, progress in self.under_way.items():
            for index, message in enumerate(progress.messages):
                costs = (progress.read, progress.made, progress.cut) if index == 0 else (0, 0, 0)
                lines.append(encode(_message_entry(identity, message, *costs)))
            if progress.stop_reason:
                costs = (0, 0, 0) if progress.messages else (progress.read, progress.made, progress.cut)
                lines.append(encode(_end_entry(identity, progress.stop_reason, *costs)))
        self._journal.append_bytes(b"".join(lines))
        self._journal.sync()
        os.replace(draft, self.journal_path)
        self._journal.path = self.journal_path

    def add_message(self, identity: str, message: Message, *, read: int, made: int, cut: int) -> None:
        """Record a message of a dialogue that goes on."""
        self._append(_message_entry(identity, message, read, made, cut))

    def add_end(self, identity: str, stop_reason: str, *, read: int, made: int, cut: int) -> None:
        """Record that a dialogue ended, before its row is written."""
        self._append(_end_entry(identity, stop_reason, read, made, cut))

    def add_drop(self, identity: str, reason: str) -> None:
        """Record that an id gets no row, so that a run that is carried on does not try it again."""
        self._append(_drop_entry(identity, reason))
        self.dropped[identity] = reason
        self.finished.add(identity)
        self._begun.discard(identity)

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        self._is_untouched = False
        self._journal.append(entry)
        self._begun.add(entry["id"])

    def add_row(self, row: dict[str, Any]) -> None:
        """Write the row of a finished dialogue; a second row of an id is an error of the caller."""
        assert row["id"] not in self.finished
        self._is_untouched = False
        self._output.append(row)
        self.finished.add(row["id"])
        self._begun.discard(row["id"])

    def sync(self) -> None:
        """Make all that was recorded survive a failure of the machine."""
        if self._journal is not None:
            self._journal.sync()
        self._output.sync()

    def complete(self) -> None:
        """The run is over: OUT alone remains, unless a dialogue failed that can be carried on."""
        self.sync()
        self._is_untouched = False
        if self._journal is not None and not self._begun:
            self._journal.discard()
        self.close()

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        for appender in (self._journal, self._output):
            if appender is not None:
                (appender.discard if self._is_untouched else appender.close)()
        self._is_untouched = False


def _message_entry(identity: str, message: Message, read: int, made: int, cut: int) -> dict[str, Any]:
    return {"id": identity, **message.as_dict(), "read": read, "made": made, "cut": cut}


def _end_entry(identity: str, stop_reason: str, read: int, made: int, cut: int) -> dict[str, Any]:
    return {"id": identity, "stop_reason": stop_reason, "read": read, "made": made, "cut": cut}


def _drop_entry(identity: str, reason: str) -> dict[str, Any]:
    return {"id": identity, "dropped": reason}


def _read_ids(path: Path, verb: str, key: str) -> set[str]:
    return {_row_id(line, verb, key) for line in read_lines(path)}


def _row_id(line: Line, verb: str, key: str) -> str:
    row = line.row()
    if not isinstance(row.get("id"), str) or key not in row:
        raise line.error(f"is not a row of parrot {verb}, so nothing was carried on; choose another -o")
    return row["id"]


def check_settings(old: object, new: Mapping[str, Any], path: Path) -> None:
    """Raise `UsageError` where a run was begun by other settings than those it is to be carried on with."""
    if not isinstance(old, dict):
        raise InputError("is not a journal; remove it to start anew", source=f"{path}.journal", line=1)
    for key, value in new.items():
        if key in old and old[key] != value:
            raise UsageError(
                f"{path} was begun with {key} {old[key]!r}, not {value!r}; resume with the same settings"
            )
