"""The pipe: what is read, what is refused, what a file looks like after a failure."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_edge import jsonl
from parrot_edge.errors import InputError, OutputError
from parrot_edge.jsonl import MAX_NESTING, Appender, Line, Writer, encode, read_lines

NAMES = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
ROWS = st.dictionaries(NAMES, VALUES, max_size=4)

TOKENS = ["1e999", "-1e999", "NaN", "-0.0", "9" * 5000, '"\\ud800"', '"\\u0000"', '"é"', "true", "[]", "{}"]
JSON_TEXTS = st.recursive(
    st.sampled_from(TOKENS),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(inner, max_size=3).map(
            lambda items: "{" + ",".join(f'"{i}":{item}' for i, item in enumerate(items)) + "}"
        )
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that each example of a property writes anew."""
    return tmp_path_factory.mktemp("scratch") / "rows.jsonl"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [line.row() for line in read_lines(path)]


def refusal(data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        Line("seeds.jsonl", 7, data).row()
    assert str(caught.value).startswith("seeds.jsonl:7: ")
    assert "\n" not in str(caught.value)
    return caught.value.reason


@given(st.lists(ROWS, max_size=3))
def test_any_rows_come_back_as_they_were_written(scratch: Path, rows: list) -> None:
    with Writer(scratch, force=True) as writer:
        for row in rows:
            writer.write(row)
    assert rows_of(scratch) == rows
    assert scratch.read_bytes().count(b"\n") == len(rows)


@given(st.text(st.characters(codec=None, categories=["Cs"]), min_size=1, max_size=1))
def test_half_of_a_surrogate_pair_comes_back(half: str) -> None:
    assert Line("x", 1, encode({half: half})).row() == {half: half}


@given(st.binary())
def test_any_bytes_are_rows_or_an_input_error(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    for line in read_lines(scratch):
        row, error = None, None
        try:
            row = line.row()
        except InputError as caught:
            error = caught
        if error is None:
            assert isinstance(row, dict)
        else:
            assert str(error).startswith(f"{scratch}:{line.number}: ")
            assert len(str(error).splitlines()) == 1


@given(JSON_TEXTS)
def test_a_row_that_was_read_can_be_written(text: str) -> None:
    try:
        row = Line("x", 1, f'{{"value":{text}}}'.encode()).row()
    except InputError:
        return
    assert Line("x", 1, encode(row)).row() == row


def test_byte_order_mark_and_crlf_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert rows_of(path) == [{"a": 1}, {"a": 2}]
    assert [line.data for line in read_lines(path)] == [b'{"a": 1}', b'{"a": 2}']


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\n \t\n\r\n{"a": 2}')
    assert [(line.number, line.row()["a"]) for line in read_lines(path)] == [(2, 1), (5, 2)]


def test_stdin_is_read_for_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\nnope\n')
    with open(path) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        lines = list(read_lines("-"))
    assert lines[0].row() == {"a": 1}
    with pytest.raises(InputError, match=r"^<stdin>:2: is not JSON"):
        lines[1].row()


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"xxxx", b"xxxxx\r\n", b"\r\r\r\r\r\r\n"])
def test_long_line_is_refused_whatever_surrounds_it(
    start: bytes, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 8)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + b'{"a": 123' + end + b'\n{"a": 2}')
    first, *_, last = read_lines(path)
    with pytest.raises(InputError, match=r":1: line is longer than"):
        first.row()
    assert last.row() == {"a": 2}


def test_line_of_the_greatest_length_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 8)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
    assert rows_of(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b'{"a": 1} {"b": 2}', "is not JSON"),
        (b"[1]", "is a JSON array, not an object"),
        (b'"text"', "is a JSON string, not an object"),
        (b"17", "is a JSON number, not an object"),
        (b"true", "is a JSON boolean, not an object"),
        (b"null", "is a JSON null, not an object"),
        (b'{"a": "\0"}', "holds a NUL byte"),
        (b'{"a": "\xff"}', r"is not valid UTF-8 \(byte 8\)"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests deeper than 64 levels"),
    ],
)
def test_bad_line_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    assert re.search(reason, refusal(data))


def test_nesting_is_bounded() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert Line("x", 1, nested(MAX_NESTING)).row()
    assert "nests deeper" in refusal(nested(MAX_NESTING + 1))
    flat = b'{"a": [' + b"[]," * 500 + b"[]]}"
    assert len(Line("x", 1, flat).row()["a"]) == 501


def test_file_that_does_not_exist_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nope\.jsonl: cannot be read: No such file"):
        list(read_lines(tmp_path / "nope.jsonl"))


def test_directory_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        list(read_lines(tmp_path))


# Writer


def test_writer_refuses_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(OutputError, match="exists"):
        Writer(path)
    assert path.read_text() == "precious\n"


def test_writer_replaces_a_file_by_force(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with Writer(path, force=True) as writer:
        writer.write({"a": 1})
    assert rows_of(path) == [{"a": 1}]


def test_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Writer(path) as writer:
        writer.write({"a": 1})
        assert rows_of(path) == [{"a": 1}]


def test_writer_that_fails_before_its_first_row_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyError), Writer(path):
        raise KeyError
    assert not path.exists()


def test_writer_that_fails_later_leaves_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    writer = Writer(path)
    writer.write({"a": 1})
    with pytest.raises(KeyError), writer:
        raise KeyError
    assert rows_of(path) == [{"a": 1}]


def test_writer_without_rows_leaves_an_empty_file(tmp_path: Path) -> None:
    with Writer(tmp_path / "out.jsonl"):
        pass
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize("name", ["x" * 300, "missing/out.jsonl"])
def test_path_that_cannot_be_is_an_output_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        Writer(tmp_path / name)


# Appender


@given(st.lists(ROWS, max_size=3), st.data())
def test_file_cut_anywhere_is_mended_to_whole_rows(scratch: Path, rows: list, data: st.DataObject) -> None:
    lines = [encode(row) for row in rows]
    ends = [len(b"".join(lines[: count + 1])) for count in range(len(lines))]
    cut = data.draw(st.integers(0, max(ends, default=0)))
    scratch.write_bytes(b"".join(lines)[:cut])
    with Appender(scratch) as appender:
        appender.append({"last": True})
    whole = sum(end - 1 <= cut for end in ends)  # a line end can be added
    assert scratch.read_bytes() == b"".join(lines[:whole]) + encode({"last": True})


def test_torn_last_line_of_any_length_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * 200_000)
    Appender(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_whole_last_row_without_a_line_end_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    with Appender(path) as appender:
        assert appender.size == path.stat().st_size == 18
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_second_appender_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Appender(path) as first:
        first.append({"a": 1})
        with pytest.raises(OutputError, match="is being written by another process"):
            Appender(path, truncate=True)
    with Appender(path) as second:
        second.append({"a": 2})
    assert rows_of(path) == [{"a": 1}, {"a": 2}]


def write_then_fail(length: int, code: int) -> Callable[[int, bytes], int]:
    """An `os.write` that writes `length` bytes, once, and then fails."""
    write, lengths = os.write, iter([length])

    def write_once(fd: int, data: bytes) -> int:
        for length in lengths:
            return write(fd, bytes(data)[:length])
        raise OSError(code, os.strerror(code))

    return write_once


def test_full_disk_leaves_whole_rows_and_can_be_written_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    with Appender(path) as appender:
        appender.append({"a": 1})
        with monkeypatch.context() as full:
            full.setattr(os, "write", write_then_fail(5, errno.ENOSPC))
            with pytest.raises(OutputError, match=r"No space left on device.*free some space"):
                appender.append({"a": 2})
        assert path.read_bytes() == b'{"a": 1}\n'
        appender.append({"a": 3})
    assert rows_of(path) == [{"a": 1}, {"a": 3}]


def test_nothing_follows_a_torn_row_that_cannot_be_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    appender = Appender(path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", write_then_fail(5, errno.EIO))
        broken.setattr(os, "ftruncate", lambda fd, size: os.close(-1))
        with pytest.raises(OutputError, match="mend the cause"):
            appender.append({"a": 2})
    with pytest.raises(OutputError):
        appender.append({"a": 3})
    assert path.read_bytes() == encode({"a": 2})[:5]
    with Appender(path) as mended:
        mended.append({"a": 4})
    assert rows_of(path) == [{"a": 4}]


def test_encoded_row_is_one_line_of_readable_utf8() -> None:
    data = encode({"text": "zwei\nZeilen, é"})
    assert data.count(b"\n") == 1
    assert "é" in data.decode()
    assert json.loads(data) == {"text": "zwei\nZeilen, é"}
