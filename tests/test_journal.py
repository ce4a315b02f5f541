"""Durable dialogues: what a journal keeps, what it refuses, and what is left after a cut at any byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_edge.dialogue import Message
from parrot_edge.errors import InputError, OutputError, UsageError
from parrot_edge.journal import Journal, Progress
from parrot_edge.jsonl import encode, read_lines

SETTINGS = {"seed": 0, "turns": 8}
COSTS = {"read": 7, "made": 5, "cut": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where each example of a property begins anew; the disk is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield tmp_path_factory.mktemp("journal")


def say(journal: Journal, identity: str, index: int) -> None:
    journal.add_message(identity, message(identity, index), **COSTS)


def message(identity: str, index: int) -> Message:
    return Message("assistant" if index % 2 == 0 else "user", f"{identity} says {index}\nand é")


def finish(journal: Journal, identity: str) -> None:
    journal.add_end(identity, "end", **COSTS)
    journal.add_row(row(identity))


def row(identity: str, length: int = 2) -> dict[str, Any]:
    messages = [message(identity, index).as_dict() for index in range(length)]
    return {"id": identity, "messages": messages, "stop_reason": "end"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [line.row() for line in read_lines(path)]


def abandon(journal: Journal) -> None:
    """What the death of the process does: nothing is tidied up, the locks are gone."""
    journal._output.close()
    assert journal._journal is not None
    journal._journal.close()


def resume(path: Path, **settings: Any) -> Journal:
    return Journal(path, {**SETTINGS, **settings}, resume=True)


def test_messages_under_way_come_back(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "a", 0)
    say(first, "b", 0)
    say(first, "a", 1)
    abandon(first)
    second = resume(path)
    assert second.finished == set()
    assert second.under_way == {
        "a": Progress([message("a", 0), message("a", 1)], read=14, made=10),
        "b": Progress([message("b", 0)], read=7, made=5),
    }
    abandon(second)


def test_what_came_back_comes_back_again(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "a", 0)
    first.add_message("a", message("a", 1), read=1, made=2, cut=1)
    first.add_end("a", "end", **COSTS)
    first.add_end("b", "context", **COSTS)
    abandon(first)
    for _ in range(3):
        again = resume(path)
        assert again.under_way == {
            "a": Progress([message("a", 0), message("a", 1)], read=15, made=12, cut=1, stop_reason="end"),
            "b": Progress([], read=7, made=5, stop_reason="context"),
        }
        abandon(again)


def test_finished_dialogue_is_not_under_way(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "a", 0)
    finish(first, "a")
    abandon(first)
    second = resume(path)
    assert second.finished == {"a"}
    assert second.under_way == {}
    assert b'"a"' not in second.journal_path.read_bytes()
    abandon(second)


def test_every_message_is_in_the_file_at_once(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    say(journal, "a", 0)
    assert rows_of(journal.journal_path)[-1]["content"] == message("a", 0).content
    finish(journal, "a")
    assert rows_of(path) == [row("a")]
    abandon(journal)


def test_complete_run_leaves_its_rows_alone(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    say(journal, "a", 0)
    finish(journal, "a")
    journal.complete()
    assert os.listdir(path.parent) == ["out.jsonl"]
    assert rows_of(path) == [row("a")]


def test_complete_run_without_rows_leaves_an_empty_file(path: Path) -> None:
    Journal(path, SETTINGS).complete()
    assert os.listdir(path.parent) == ["out.jsonl"]


def test_dialogue_that_was_skipped_can_be_carried_on_after_the_run(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "failed", 0)
    say(first, "fine", 0)
    finish(first, "fine")
    first.complete()
    second = resume(path)
    assert second.finished == {"fine"}
    assert second.under_way["failed"].messages == [message("failed", 0)]
    finish(second, "failed")
    second.complete()
    assert [row["id"] for row in rows_of(path)] == ["fine", "failed"]
    assert os.listdir(path.parent) == ["out.jsonl"]


def test_dialogue_that_a_later_run_does_not_ask_for_is_kept(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "a", 0)
    abandon(first)
    resume(path).complete()
    assert resume(path).under_way["a"].messages == [message("a", 0)]


def test_what_was_dropped_is_known_to_later_runs_until_the_run_is_complete(path: Path) -> None:
    first = Journal(path, SETTINGS)
    first.add_drop("a", "alike")
    abandon(first)
    second = resume(path)
    assert (second.finished, second.dropped) == ({"a"}, {"a": "alike"})
    abandon(second)
    third = resume(path)
    assert third.dropped == {"a": "alike"}
    third.complete()
    assert os.listdir(path.parent) == ["out.jsonl"]
    assert resume(path).finished == set()


def test_rows_of_another_verb_are_told_apart(path: Path) -> None:
    path.write_bytes(encode(row("a")))
    with pytest.raises(InputError, match=r"out\.jsonl:1: is not a row of parrot capo"):
        Journal(path, SETTINGS, resume=True, verb="capo", key="rejected")


def test_run_that_ends_before_its_first_message_leaves_nothing(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    journal.close()
    assert os.listdir(path.parent) == []


def test_run_that_ends_later_leaves_all_it_has(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    say(journal, "a", 0)
    journal.close()
    journal.close()
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.journal"]


def test_resumed_run_that_says_nothing_new_leaves_all_as_it_was(path: Path) -> None:
    first = Journal(path, SETTINGS)
    finish(first, "a")
    say(first, "b", 0)
    first.close()
    resume(path).close()
    last = resume(path)
    assert (last.finished, list(last.under_way)) == ({"a"}, ["b"])
    last.close()


def test_resume_without_anything_there_begins_a_run(path: Path) -> None:
    journal = resume(path)
    finish(journal, "a")
    journal.complete()
    assert rows_of(path) == [row("a")]


def test_complete_run_can_be_added_to(path: Path) -> None:
    for identity in "ab":
        journal = resume(path)
        finish(journal, identity)
        journal.complete()
    assert [row["id"] for row in rows_of(path)] == ["a", "b"]


def test_last_row_without_its_line_end_is_whole(path: Path) -> None:
    path.write_bytes(encode(row("a")).rstrip(b"\n"))
    journal = resume(path)
    assert journal.finished == {"a"}
    finish(journal, "b")
    journal.complete()
    assert rows_of(path) == [row("a"), row("b")]


def test_existing_output_is_refused(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists; --resume carries it on, --force replaces it"):
        Journal(path, SETTINGS)
    assert path.read_text() == "precious"


def test_force_replaces_output_and_journal(path: Path) -> None:
    first = Journal(path, SETTINGS)
    finish(first, "a")
    say(first, "b", 0)
    first.close()
    second = Journal(path, SETTINGS, force=True)
    assert (second.finished, second.under_way) == (set(), {})
    finish(second, "c")
    second.complete()
    assert [row["id"] for row in rows_of(path)] == ["c"]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}])
def test_directory_is_refused(tmp_path: Path, options: dict[str, bool]) -> None:
    with pytest.raises(OutputError, match="is a directory; name a file"):
        Journal(tmp_path, SETTINGS, **options)


@pytest.mark.parametrize("name", ["x" * 300, "missing/out.jsonl"])
def test_path_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / name, SETTINGS)


def test_name_that_leaves_no_room_for_the_journal_is_refused_without_a_trace(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        Journal(tmp_path / ("x" * 250), SETTINGS)
    assert os.listdir(tmp_path) == []


def test_second_writer_is_refused(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "a", 0)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputError, match="is being written by another process"):
            Journal(path, SETTINGS, **options)
    say(first, "a", 1)
    abandon(first)
    second = resume(path)
    assert len(second.under_way["a"].messages) == 2
    second.close()


def test_other_settings_are_refused_and_change_nothing(path: Path) -> None:
    first = Journal(path, SETTINGS)
    say(first, "a", 0)
    first.close()
    with pytest.raises(UsageError, match="was begun with turns 8, not 3; resume with the same settings"):
        resume(path, turns=3)
    last = resume(path)
    assert last.under_way["a"].messages == [message("a", 0)]
    last.close()


@pytest.mark.parametrize(
    "content",
    [
        b"my notes, one line, no end",
        b"my notes\n",
        b'{"prompt": "a seed"}',
        b'{"id": "a", "prompt": "a seed"}\n{"id": "b", "prompt": "another, without a line end"}',
        b'{"id": 5, "stop_reason": "end"}\n',
        b'{"id": "a", "stop_reason": "end"}\ntorn, but no run was under way',
        b"\xff\xfe\0",
    ],
)
def test_file_of_another_kind_is_refused_and_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"out\.jsonl:\d"):
        resume(path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["out.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        '{"id": "b"}',
        '{"id": "b", "role": "user", "content": "x", "read": "y", "made": 0, "cut": 0}',
        '{"id": ["a"], "stop_reason": "end", "read": 0, "made": 0, "cut": 0}',
        "rubbish",
    ],
)
def test_damaged_line_of_the_journal_is_named_and_kept(path: Path, line: str) -> None:
    first = Journal(path, SETTINGS)
    finish(first, "a")
    first.close()
    journal_path = Path(f"{path}.journal")
    damaged = json.dumps({"settings": SETTINGS}) + "\n" + line + "\n"
    journal_path.write_text(damaged)
    with pytest.raises(InputError, match=r"out\.jsonl\.journal:2: "):
        resume(path)
    assert journal_path.read_text() == damaged
    assert rows_of(path) == [row("a")]


def test_file_that_is_no_journal_is_refused(path: Path) -> None:
    path.write_bytes(encode(row("a")))
    Path(f"{path}.journal").write_text('{"id": "x"}\n')
    with pytest.raises(InputError, match=r"out\.jsonl\.journal:1: is not a journal"):
        resume(path)


def test_rows_are_on_the_disk_before_the_journal_forgets_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Journal(path, SETTINGS)
    finish(first, "a")
    first.close()
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        sync(fd)

    def put(source: Path, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", put)
    resume(path).close()
    assert order == ["out.jsonl", "out.jsonl.journal.new", "replace"]


# Property: cut anywhere, resumed, nothing whole is lost

LENGTHS = {"a": 3, "b": 1, "c": 4}
"""Dialogues and how many messages each is to have."""


def step(journal: Journal, identity: str, said: dict[str, int]) -> None:
    """The next thing that a run does for a dialogue."""
    if identity in journal.finished:
        return
    if said[identity] < LENGTHS[identity]:
        say(journal, identity, said[identity])
        said[identity] += 1
    else:
        journal.add_end(identity, "end", **COSTS)
        journal.add_row(row(identity, LENGTHS[identity]))


def whole_lines(data: bytes) -> list[dict[str, Any]]:
    """The rows that a reader can make out, the last one perhaps without its line end."""
    lines = data.split(b"\n")
    rows = [json.loads(line) for line in lines[:-1]]
    try:
        return [*rows, json.loads(lines[-1])]
    except ValueError:
        return rows


steps = st.lists(st.sampled_from(sorted(LENGTHS)), max_size=20)


@given(st.lists(st.tuples(steps, st.data()), min_size=1, max_size=4))
def test_cut_at_any_byte_loses_only_what_was_not_written(
    folder: Path, lives: list[tuple[list[str], st.DataObject]]
) -> None:
    path = folder / "out.jsonl"
    for file in folder.iterdir():
        file.unlink()
    said = dict.fromkeys(LENGTHS, 0)
    for life, data in lives:
        journal = resume(path)
        for identity in life:
            step(journal, identity, said)
        abandon(journal)
        for file in (path, journal.journal_path):
            size = file.stat().st_size
            # Mostly near the end, where a killed writer stops; else anywhere.
            cut = data.draw(st.integers(max(0, size - 90), size) | st.integers(0, size))
            os.truncate(file, cut)
        rows, entries = whole_lines(path.read_bytes()), whole_lines(journal.journal_path.read_bytes())
        mended = resume(path)
        assert mended.finished == {row["id"] for row in rows}
        for identity in LENGTHS.keys() - mended.finished:
            own = [entry for entry in entries if entry.get("id") == identity]
            progress = mended.under_way.get(identity, Progress())
            kept = [entry["content"] for entry in own if "content" in entry]
            assert [message.content for message in progress.messages] == kept
            assert progress.stop_reason == ("end" if any("stop_reason" in entry for entry in own) else None)
            assert progress.made == sum(entry["made"] for entry in own)
            said[identity] = len(kept)
        abandon(mended)
    journal = resume(path)
    for identity, length in LENGTHS.items():
        for _ in range(length + 1):
            step(journal, identity, said)
    journal.complete()
    assert sorted(rows_of(path), key=lambda row: row["id"]) == [row(*item) for item in LENGTHS.items()]
    assert not journal.journal_path.exists()
