"""Rows in: counted before the work begins, read as they come, set aside where they are bad."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parrot_edge.dialogue import Message, Seed
from parrot_edge.errors import EndpointError, InputError, OutputError
from parrot_edge.intake import Intake, Rejects
from parrot_edge.jsonl import read_lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "seeds.jsonl"


def write(path: Path, *rows: dict[str, Any] | str) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rejected(path: Path) -> list[dict[str, Any]]:
    return [line.row() for line in read_lines(path)]


A, B, C = ({"id": name, "prompt": name} for name in "abc")
BAD = '{"prompt": ""}'


def ids(seeds: Iterator[Seed]) -> list[str]:
    return [seed.id for seed in seeds]


def test_file_is_counted_and_read_in_order(path: Path) -> None:
    intake = Intake(write(path, A, B, C))
    assert intake.count() == 3
    assert ids(intake.seeds()) == ["a", "b", "c"]


def test_limit_stops_before_what_lies_behind_it(path: Path) -> None:
    intake = Intake(write(path, A, B, BAD), limit=2)
    assert intake.count() == 2
    assert ids(intake.seeds()) == ["a", "b"]


def test_last_line_that_is_bad_is_found_by_counting(path: Path) -> None:
    with pytest.raises(InputError, match=r"seeds\.jsonl:3: "):
        Intake(write(path, A, B, BAD)).count()


def test_lines_of_text_are_prompts(path: Path) -> None:
    intake = Intake(write(path, "why?", A), text=True)
    assert [seed.messages[0].content for seed in intake.seeds()] == ["why?", "a"]


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_file_without_rows_is_refused(path: Path, content: str) -> None:
    path.write_text(content)
    for rejects in (None, Rejects(path.with_name("rejects.jsonl"))):
        with pytest.raises(InputError, match="holds no rows"):
            Intake(str(path), rejects=rejects).count()
        with pytest.raises(InputError, match="holds no rows"):
            list(Intake(str(path), rejects=rejects).seeds())


def test_file_without_rows_is_taken_where_it_may_be_empty(path: Path) -> None:
    intake = Intake(write(path), may_be_empty=True)
    assert (intake.count(), list(intake.seeds())) == (0, [])


def test_second_row_of_an_id_names_the_first(path: Path) -> None:
    with pytest.raises(InputError, match=r"seeds\.jsonl:3: has the id of line 1, 'a'"):
        Intake(write(path, A, B, {"id": "a", "prompt": "other"})).count()


def test_number_and_text_are_the_same_id(path: Path) -> None:
    with pytest.raises(InputError, match="has the id of line 1, '1'"):
        Intake(write(path, {"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"})).count()


def test_rows_without_ids_that_say_the_same_are_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r":2: .*rows that say the same need ids of their own"):
        Intake(write(path, {"prompt": "x"}, {"prompt": "x"})).count()


@pytest.mark.parametrize(
    ("waiting", "row", "verb"),
    [
        ("user", {"prompt": "x"}, "chat"),
        ("assistant", {"topic": "x"}, "ask"),
        (
            "assistant",
            {"messages": [Message("user", "x").as_dict(), Message("assistant", "y").as_dict()]},
            "ask",
        ),
    ],
)
def test_dialogue_that_waits_for_the_other_side_is_refused(
    path: Path, waiting: str, row: dict[str, Any], verb: str
) -> None:
    with pytest.raises(InputError, match=rf":1: is waiting for the .*; run it through parrot {verb} first"):
        Intake(write(path, row), waiting=waiting).count()
    other = {"user": "assistant", "assistant": "user"}[waiting]
    assert Intake(write(path, row), waiting=other).count() == 1


def test_dialogue_that_has_ended_waits_for_nobody(path: Path) -> None:
    row = {"id": "a", "prompt": "x", "stop_reason": "end"}
    assert Intake(write(path, row), waiting="user").count() == 1


@pytest.mark.parametrize("name", ["nope.jsonl", "."])
def test_path_that_cannot_be_read_is_refused_by_counting(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Intake(str(tmp_path / name)).count()


# Stdin


def test_stdin_that_is_a_file_is_counted_from_where_it_stands(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, "header that a script has read", A, B)
    with open(path) as stream:
        os.lseek(stream.fileno(), path.read_text().index("\n") + 1, os.SEEK_SET)
        monkeypatch.setattr("sys.stdin", stream)
        intake = Intake("-")
        assert intake.count() == 2
        assert ids(intake.seeds()) == ["a", "b"]


def test_pipe_is_not_counted_and_its_rows_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write_end = os.pipe()

    async def take() -> list[str]:
        taken = []
        async for seed in Intake("-").seeds_as_they_come():
            taken.append(seed.id)
            if seed.id == "a":
                os.write(write_end, json.dumps(B).encode() + b"\n")
                os.close(write_end)
        return taken

    with open(read) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert Intake("-").count() is None
        os.write(write_end, json.dumps(A).encode() + b"\n")
        assert asyncio.run(take()) == ["a", "b"]


def test_bad_row_of_a_pipe_is_raised_where_it_is_awaited(path: Path) -> None:
    async def take() -> None:
        async for _ in Intake(write(path, A, BAD)).seeds_as_they_come():
            pass

    with pytest.raises(InputError, match=":2: "):
        asyncio.run(take())


def test_pipe_without_a_next_line_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write_end = os.pipe()

    async def take() -> None:
        seeds = Intake("-").seeds_as_they_come()
        assert (await anext(seeds)).id == "a"
        waiting = asyncio.ensure_future(anext(seeds))
        await asyncio.sleep(0.05)
        waiting.cancel()

    late = threading.Timer(5, os.close, [write_end])
    with open(read) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        os.write(write_end, json.dumps(A).encode() + b"\n")
        late.start()
        asyncio.run(take())
        assert late.is_alive()
        late.cancel()
        os.close(write_end)
        for thread in threading.enumerate():
            if thread.daemon:
                thread.join(5)


# Rejects


def test_bad_rows_are_set_aside_with_the_reason(path: Path, tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl")
    intake = Intake(write(path, A, "nope", B, {"id": "a", "prompt": "again"}, BAD, C), rejects=rejects)
    assert intake.count() == 3
    assert not rejects.path.exists()
    assert ids(intake.seeds()) == ["a", "b", "c"]
    rejects.close()
    rows = rejected(rejects.path)
    assert [row["line"] for row in rows] == [2, 4, 5]
    assert rows[0] == {
        "source": str(path),
        "line": 2,
        "id": None,
        "reason": "is not JSON (Expecting value); one JSON object per line is expected",
        "text": "nope",
    }
    assert rejects.count == 3


def test_seed_whose_dialogue_failed_is_set_aside_by_its_id(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl")
    rejects.add_seed(Seed("a", topic="tea"), EndpointError("the server is gone"))
    rejects.close()
    assert rejected(rejects.path) == [
        {"source": None, "line": None, "id": "a", "reason": "the server is gone", "text": None}
    ]


def test_rows_that_are_all_bad_are_all_set_aside(path: Path, tmp_path: Path) -> None:
    intake = Intake(write(path, BAD, "nope"), rejects=Rejects(tmp_path / "rejects.jsonl"))
    assert intake.count() == 0
    assert list(intake.seeds()) == []
    assert len(rejected(tmp_path / "rejects.jsonl")) == 2


def test_of_a_long_bad_line_only_the_start_is_kept(path: Path, tmp_path: Path) -> None:
    intake = Intake(write(path, "x" * 1_000_000), rejects=Rejects(tmp_path / "rejects.jsonl"))
    assert list(intake.seeds()) == []
    assert len(rejected(tmp_path / "rejects.jsonl")[0]["text"]) == 10_000


def test_bytes_that_are_no_text_are_set_aside_readably(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert list(Intake(str(path), rejects=Rejects(tmp_path / "rejects.jsonl")).seeds()) == []
    assert rejected(tmp_path / "rejects.jsonl")[0]["text"] == '{"prompt": "\ufffd"}'


def test_rejects_of_another_run_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rejects.jsonl").write_text("precious\n")
    with pytest.raises(OutputError, match="exists; remove it or name another with --rejects"):
        Rejects(tmp_path / "rejects.jsonl")


def test_run_that_is_carried_on_has_its_rejects_once(path: Path, tmp_path: Path) -> None:
    write(path, A, BAD)
    for replace in (False, True):
        rejects = Rejects(tmp_path / "rejects.jsonl", replace=replace)
        assert ids(Intake(str(path), rejects=rejects).seeds()) == ["a"]
        rejects.close()
    assert len(rejected(tmp_path / "rejects.jsonl")) == 1


def test_rejects_that_are_cured_go(tmp_path: Path) -> None:
    first = Rejects(tmp_path / "rejects.jsonl")
    first.add_seed(Seed("a"), EndpointError("gone"))
    first.close()
    Rejects(tmp_path / "rejects.jsonl", replace=True).close()
    assert not (tmp_path / "rejects.jsonl").exists()
