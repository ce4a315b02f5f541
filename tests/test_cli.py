"""The command line: pipes that flow, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Parrot

from parrot_edge.cli import VERBS
from parrot_edge.cli import parrot as group
from parrot_edge.cli.progress import ProgressLine
from parrot_edge.errors import InputError
from parrot_edge.intake import Intake
from parrot_edge.simulate import Tally

Done = subprocess.CompletedProcess[str]
SMALL = ["--threads", 1, "--max-tokens", 8, "--parallel", 2]
GOOD = {"id": "good", "prompt": "What is tea?"}


def write(path: Path, *rows: dict[str, Any] | bytes | str) -> Path:
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def rows_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def sentence(done: Done, code: int = 1) -> str:
    """The one line on stderr, of a command that failed with `code`."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("parrot: ")
    return line


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_begins_with_its_line_in_the_list(verb: str) -> None:
    done = CliRunner().invoke(group, [verb, "--help"], prog_name="parrot")
    assert done.exit_code == 0
    first = done.output.split("\n\n")[1]
    assert " ".join(first.split()) == VERBS[verb]


def test_list_of_verbs_is_in_the_help_and_is_what_a_bare_call_shows(parrot: Parrot) -> None:
    asked, bare = parrot("--help"), parrot()
    assert asked.returncode == bare.returncode == 0
    assert asked.stdout == bare.stdout
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\S", asked.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["simulate", "--help"], ["chat", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from parrot_edge.cli import main\n"
        f"sys.argv = ['parrot', *{arguments}]\n"
        "try: main()\n"
        "finally:\n"
        " heavy = {'llama_cpp', 'torch', 'openai', 'jinja2', 'numpy'}\n"
        " print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")


# Bad rows

LONG = b'{"prompt": "' + b"x" * 50_000_000 + b'"}'
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"What is tea?", "is not JSON"),
    "cut JSON": (b'{"prompt": "What', "is not JSON"),
    "array": (b'["What is tea?"]', "is a JSON array, not an object"),
    "number": (b"5", "is a JSON number, not an object"),
    "no prompt": (b'{"text": "What is tea?"}', 'has no "prompt"'),
    "empty prompt": (b'{"prompt": " "}', '"prompt" must be a non-empty text'),
    "roles out of order": (
        b'{"messages": [{"role": "assistant", "content": "Hi"}]}',
        "message 1 is from 'assistant' where 'user' is due",
    ),
    "unknown role": (b'{"messages": [{"role": "bot", "content": "Hi"}]}', "message 1 has role 'bot'"),
    "NUL byte": (b'{"prompt": "a\0b"}', "holds a NUL byte"),
    "NUL escape": (b'{"prompt": "a\\u0000b"}', "holds a NUL character"),
    "bad UTF-8": (b'{"prompt": "\xff\xfe"}', "is not valid UTF-8"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), "holds a NUL byte"),
    "half a surrogate": (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    "infinite": (b'{"prompt": "x", "score": 1e999}', "1e999 is not a finite number"),
    "nested": (b'{"prompt": "x", "a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nests deeper"),
    "duplicate id": (b'{"id": "good", "prompt": "other"}', "has the id of line 1, 'good'"),
    "long line": (LONG, "line is longer than 32 MiB"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_in_one_sentence(case: str, parrot: Parrot, tmp_path: Path) -> None:
    line, reason = BAD_LINES[case]
    write(tmp_path / "seeds.jsonl", GOOD, line)
    said = sentence(parrot("simulate", "seeds.jsonl", "-o", "out.jsonl"))
    assert said.startswith("parrot: seeds.jsonl:2: ")
    assert reason in said
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("verb", ["ask", "chat"])
def test_bad_line_is_named_by_the_other_verbs_too(verb: str, scripted_parrot: Parrot) -> None:
    said = sentence(scripted_parrot(verb, "-", input=b'\n{"prompt": ""}\n'))
    assert said.startswith('parrot: <stdin>:2: "prompt" must be')


@pytest.mark.parametrize(
    ("verb", "row", "advice"),
    [
        ("ask", {"prompt": "What is tea?"}, "run it through parrot chat first"),
        ("chat", {"topic": "tea"}, "run it through parrot ask first"),
    ],
)
def test_dialogue_that_waits_for_the_other_side_is_refused(
    verb: str, row: dict[str, str], advice: str, parrot: Parrot, tmp_path: Path
) -> None:
    write(tmp_path / "seeds.jsonl", row)
    assert advice in sentence(parrot(verb, "seeds.jsonl"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\r\n"])
def test_empty_input_is_refused(content: bytes, scripted_parrot: Parrot, tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_bytes(content)
    assert "seeds.jsonl: holds no rows" in sentence(scripted_parrot("simulate", "seeds.jsonl"))
    piped = scripted_parrot("simulate", "--on-error", "skip", input=content)
    assert "<stdin>: holds no rows" in sentence(piped)


def test_byte_order_mark_crlf_and_blank_lines_are_fine(scripted_parrot: Parrot, tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}\r\n')
    done = scripted_parrot("simulate", "seeds.jsonl", "--turns", 1)
    assert done.returncode == 0
    assert {row["messages"][0]["content"] for row in rows_in(done.stdout)} == {"one", "two"}


def test_long_line_costs_little_memory(tmp_path: Path) -> None:
    write(tmp_path / "seeds.jsonl", GOOD, LONG)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="longer than"):
            Intake(str(tmp_path / "seeds.jsonl")).count()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 120_000_000


@pytest.mark.parametrize(
    ("name", "reason"), [("nope.jsonl", "No such file"), (".", "Is a directory"), ("x" * 300, "too long")]
)
def test_input_that_cannot_be_read_is_named(name: str, reason: str, parrot: Parrot) -> None:
    said = sentence(parrot("simulate", name))
    assert said.startswith(f"parrot: {name}: cannot be read: ")
    assert reason in said


# Bad models


def gguf(path: Path, metadata: dict[str, str | float], tensors: dict[str, tuple[int, ...]]) -> Path:
    """A GGUF with texts and float32 as metadata and with tensors of float32 zeros."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    data = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        data += text(key)
        data += struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value)
    offset = 0
    for name, shape in tensors.items():
        data += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        size = 4
        for length in shape:
            size *= length
        offset += -(-size // 32) * 32
    path.write_bytes(data + bytes(-len(data) % 32) + bytes(offset))
    return path


def cut_model(model: Path, path: Path) -> str:
    with open(model, "rb") as file:
        path.write_bytes(file.read(5_000_000))
    return str(path)


def adapter_for_another_base(model: Path, path: Path) -> str:
    metadata = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    name = "blk.0.attn_q.weight"
    gguf(path, metadata, {f"{name}.lora_a": (64, 4), f"{name}.lora_b": (4, 64)})
    return f"{model}+{path}"


def text_file(_: Path, path: Path) -> str:
    path.write_text("This is a model, honestly.")
    return str(path)


BAD_MODELS: dict[str, tuple[Callable[[Path, Path], str], str]] = {
    "path that does not exist": (lambda _, path: str(path), "does not exist"),
    "name that does not exist": (lambda *_: "smolm2", "the nearest is 'smollm2'"),
    "directory": (lambda _, path: str(path.parent), "is a directory"),
    "text": (text_file, "is not a GGUF"),
    "header alone": (lambda _, path: str(gguf(path, {}, {})), "cannot be loaded"),
    "cut": (cut_model, "cannot be loaded"),
    "unknown architecture": (
        lambda _, path: str(gguf(path, {"general.architecture": "parrotnet"}, {})),
        "parrotnet",
    ),
    "adapter alone": (
        lambda model, path: adapter_for_another_base(model, path).split("+")[1],
        "cannot be loaded",
    ),
    "adapter for another base": (adapter_for_another_base, "is no adapter for"),
    "adapter that is a model": (lambda model, _: f"{model}+{model}", "is no adapter for"),
}


def refused_model(parrot: Parrot, good: Path, bad: str) -> str:
    """The sentence that a run with a bad model ends with, leaving nothing behind."""
    write(parrot.folder / "seeds.jsonl", GOOD)
    said = sentence(
        parrot("simulate", "seeds.jsonl", "--ask", good, "--chat", bad, "-o", "out.jsonl", *SMALL)
    )
    assert not (parrot.folder / "out.jsonl").exists()
    assert not (parrot.folder / "out.jsonl.journal").exists()
    return said


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_named_in_one_sentence(
    case: str, parrot: Parrot, model_file: Path, tmp_path: Path
) -> None:
    make, reason = BAD_MODELS[case]
    assert reason in refused_model(parrot, model_file, make(model_file, tmp_path / "bad.gguf"))


@pytest.fixture(scope="module")
def copy_of_model(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("copy") / "copy.gguf"
    shutil.copyfile(embedded_model, path)
    yield path
    path.unlink()


def write_template(model: Path, original: Path, template: str) -> None:
    """Give a copy of a model another chat template, of at most the original's length."""
    with open(original, "rb") as file:
        head = file.read(8_000_000)
    key = b"tokenizer.chat_template"
    start = head.index(key) + len(key) + 4
    (length,) = struct.unpack_from("<Q", head, start)
    new = template.encode()
    assert len(new) <= length
    with open(model, "r+b") as file:
        file.seek(start + 8)
        file.write(new.ljust(length))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('users only') }}", "failed: users only"),
        ("{{ messages[99].content }}", "failed: "),
        ("{% for m in %}", "does not compile"),
        ("{{ ''.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{{ 'x' * 10 ** 12 }}", "failed: its text grows beyond all bounds"),
        (LOOP, "does not end"),
    ],
)
def test_bad_template_is_named_in_one_sentence(
    template: str, reason: str, parrot: Parrot, model_file: Path, embedded_model: Path, copy_of_model: Path
) -> None:
    write_template(copy_of_model, embedded_model, template)
    said = refused_model(parrot, model_file, str(copy_of_model))
    assert "the chat template of copy.gguf" in said
    assert reason in said


# Misuse


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["simulate", "--parallel", "0"], "0 is not in the range x>=1"),
        (["simulate", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["simulate", "--turns", "0"], "0 is not in the range x>=1"),
        (["simulate", "--turns", "many"], "'many' is not a valid integer"),
        (["simulate", "--temperature", "-1"], "range"),
        (["simulate", "--colour"], "--colour"),
        (["simulate", "a.jsonl", "b.jsonl"], "b.jsonl"),
        (["simulate", "seeds.jsonl", "--seeds", "builtin"], "not both"),
        (["simulate", "seeds.jsonl", "--rejects", "bad.jsonl"], "--rejects needs --on-error skip"),
        (["simulate", "seeds.jsonl", "--resume"], "need -o FILE"),
        (["simulate", "seeds.jsonl", "--force"], "need -o FILE"),
        (["simulate", "seeds.jsonl", "-o", "x", "--resume", "--force"], "--resume or --force, not both"),
        (["ask", "--parallel", "0"], "0 is not in the range x>=1"),
        (["chat", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["chat", "seeds.jsonl", "--system", "x"], "--system is for a conversation on a terminal"),
        (["simulat"], "simulat"),
    ],
)
def test_misuse_is_told_in_one_sentence(arguments: list[str], reason: str, parrot: Parrot) -> None:
    assert reason in sentence(parrot(*arguments), code=2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--turns", "5000"], "--turns 5000 cannot fit"),
        (["--turns", "100", "--context", "512"], "--turns 100 cannot fit 512 tokens"),
        (["--context", "100000"], "--context 100000 is more than the 8192 tokens"),
    ],
)
def test_more_than_the_context_holds_is_refused(
    options: list[str], reason: str, parrot: Parrot, model_file: Path
) -> None:
    models = ["--ask", model_file, "--chat", model_file]
    done = parrot("simulate", *models, *options, input=json.dumps(GOOD))
    assert reason in sentence(done, code=2)


@pytest.mark.parametrize("verb", ["simulate", "chat"])
def test_reading_and_writing_the_same_file_is_refused(verb: str, parrot: Parrot, tmp_path: Path) -> None:
    path = write(tmp_path / "seeds.jsonl", GOOD)
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    reason = "cannot be read and written at once"
    assert reason in sentence(parrot(verb, "seeds.jsonl", "-o", "link.jsonl", "--force"), code=2)
    with open(path) as stdin:
        assert reason in sentence(parrot(verb, "-", "-o", path, "--force", stdin=stdin), code=2)
    with open(path, "ab") as stdout:
        assert reason in sentence(parrot(verb, path, stdout=stdout), code=2)
    rejects = ["--on-error", "skip", "--rejects", path, "--force", "-o", "out.jsonl"]
    assert reason in sentence(parrot(verb, path, *rejects), code=2)
    assert path.read_bytes() == before


def test_rejects_and_rows_in_one_file_are_refused(parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "seeds.jsonl", GOOD)
    options = ["-o", "out.jsonl", "--on-error", "skip", "--rejects", "./out.jsonl"]
    assert "give them different names" in sentence(parrot("simulate", "seeds.jsonl", *options), code=2)


# Outputs


@pytest.mark.parametrize("verb", ["simulate", "chat"])
def test_existing_output_is_refused_and_kept(verb: str, scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "seeds.jsonl", GOOD)
    (tmp_path / "out.jsonl").write_text("precious\n")
    assert "out.jsonl exists" in sentence(scripted_parrot(verb, "seeds.jsonl", "-o", "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"
    done = scripted_parrot(verb, "seeds.jsonl", "-o", "out.jsonl", "--force")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (row,) = rows_in((tmp_path / "out.jsonl").read_text())
    assert row["id"] == "good"


@pytest.mark.parametrize(
    ("output", "reason"),
    [("missing/out.jsonl", "No such file"), (".", "is a directory"), ("x" * 300, "File name too long")],
)
def test_output_that_cannot_be_is_named(
    output: str, reason: str, scripted_parrot: Parrot, tmp_path: Path
) -> None:
    write(tmp_path / "seeds.jsonl", GOOD)
    assert reason in sentence(scripted_parrot("simulate", "seeds.jsonl", "-o", output))


@pytest.mark.parametrize("verb", ["simulate", "chat"])
def test_stdout_that_is_full_is_told_in_one_sentence(verb: str, scripted_parrot: Parrot) -> None:
    with open("/dev/full", "wb") as full:
        done = scripted_parrot(verb, "-", stdout=full, input=json.dumps(GOOD))
    assert "stdout cannot be written: No space left on device" in sentence(done)


def test_streams_that_are_closed_are_told_in_one_sentence(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "seeds.jsonl", GOOD)

    def without(descriptor: int, *arguments: str) -> Done:
        return scripted_parrot(*arguments, preexec_fn=lambda: os.close(descriptor))

    assert "holds no rows" in sentence(without(0, "simulate"))
    assert "stdout cannot be written: Bad file descriptor" in sentence(without(1, "simulate", "seeds.jsonl"))
    for descriptor in range(3):
        done = without(descriptor, "simulate", "seeds.jsonl", "-o", f"out{descriptor}.jsonl")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert len(rows_in((tmp_path / f"out{descriptor}.jsonl").read_text())) == 1


# Skipping


def test_bad_rows_are_skipped_into_the_rejects_file(scripted_parrot: Parrot, tmp_path: Path) -> None:
    bad = [line for line, _ in BAD_LINES.values()]
    write(tmp_path / "seeds.jsonl", GOOD, *bad, {"id": "last", "prompt": "Why?"})
    done = scripted_parrot("simulate", "seeds.jsonl", "-o", "out.jsonl", "--on-error", "skip")
    assert done.returncode == 0
    assert done.stderr == f"parrot: {len(bad)} rows were skipped, see out.jsonl.rejects.jsonl\n"
    assert {row["id"] for row in rows_in((tmp_path / "out.jsonl").read_text())} == {"good", "last"}
    rejects = rows_in((tmp_path / "out.jsonl.rejects.jsonl").read_text())
    assert [row["line"] for row in rejects] == list(range(2, len(bad) + 2))
    for row, (_, reason) in zip(rejects, BAD_LINES.values(), strict=True):
        assert reason in row["reason"]


@pytest.mark.parametrize("verb", ["ask", "chat"])
def test_bad_rows_of_a_pipe_are_skipped_by_the_other_verbs(
    verb: str, scripted_parrot: Parrot, tmp_path: Path
) -> None:
    row = {"topic": "tea"} if verb == "ask" else GOOD
    given = f"nope\n{json.dumps(row)}\n"
    done = scripted_parrot(verb, "--on-error", "skip", "--rejects", "bad.jsonl", input=given)
    assert (done.returncode, len(rows_in(done.stdout))) == (0, 1)
    assert done.stderr == "parrot: 1 row was skipped, see bad.jsonl\n"
    assert [row["line"] for row in rows_in((tmp_path / "bad.jsonl").read_text())] == [1]


def test_rejects_of_an_earlier_run_are_kept(scripted_parrot: Parrot, tmp_path: Path) -> None:
    (tmp_path / "rejects.jsonl").write_text("precious\n")
    said = sentence(scripted_parrot("simulate", "--on-error", "skip", input="nope"))
    assert "rejects.jsonl exists; remove it or name another with --rejects" in said
    assert (tmp_path / "rejects.jsonl").read_text() == "precious\n"


# Pipes


def test_ask_and_chat_make_one_turn_of_every_dialogue(scripted_parrot: Parrot, tmp_path: Path) -> None:
    first = scripted_parrot(
        "simulate", "--turns", 1, input='{"id": 1, "prompt": "a"}\n{"id": 2, "topic": "b"}'
    )
    asked = scripted_parrot("ask", input=first.stdout.replace('"turns"', "null"))
    chatted = scripted_parrot("chat", input=asked.stdout)
    rows = {row["id"]: row for row in rows_in(chatted.stdout)}
    assert {key: len(row["messages"]) for key, row in rows.items()} == {"1": 4, "2": 4}
    for row in rows_in(first.stdout):
        assert list(rows[row["id"]]["messages"][:2]) == row["messages"]
        assert row.keys() - rows[row["id"]].keys() <= {"topic"}
    assert rows["2"]["topic"] == "b"


def test_dialogues_that_have_ended_go_through_the_pipe_as_they_are(scripted_parrot: Parrot) -> None:
    kinds = ["end", "farewell", "repetition", "role_flip", "context"]
    done = scripted_parrot("simulate", "--text", "--turns", 8, input="\n".join(kinds))
    ended = {row["messages"][0]["content"]: row for row in rows_in(done.stdout)}
    assert {kind: row["stop_reason"] for kind, row in ended.items()} == {kind: kind for kind in kinds}
    for verb in ("ask", "chat"):
        again = scripted_parrot(verb, input=done.stdout)
        rows = {row["messages"][0]["content"]: row for row in rows_in(again.stdout)}
        dropped = {kind: {k: v for k, v in row.items() if k != "topic"} for kind, row in ended.items()}
        assert rows == dropped


def test_real_models_make_one_turn_through_a_pipe(parrot: Parrot, model_file: Path, tmp_path: Path) -> None:
    write(
        tmp_path / "d.jsonl", {"id": "1", "topic": "growing tomatoes"}, {"id": "2", "topic": "a leaking tap"}
    )
    command = shlex.join(parrot.program)
    small = shlex.join(map(str, SMALL))
    done = subprocess.run(
        f"set -o pipefail; {command} ask --ask {model_file} {small} < d.jsonl"
        f" | {command} chat --chat {model_file} {small} > e.jsonl",
        shell=True,
        executable="/bin/bash",
        cwd=tmp_path,
        env=parrot.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rows = rows_in((tmp_path / "e.jsonl").read_text())
    assert {row["id"] for row in rows} == {"1", "2"}
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == (["user", "assistant"] if row["stop_reason"] is None else roles[:1])


def test_reader_that_has_enough_ends_the_run_quietly(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "seeds.jsonl", *({"prompt": f"What is {n}?"} for n in range(300)))
    for verb in ("simulate", "chat"):
        process = scripted_parrot.start(verb, "seeds.jsonl", "--parallel", 2, env={"REPLY_SECONDS": "0.002"})
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""


def test_reader_that_has_enough_ends_the_run_while_the_writer_is_still_there(scripted_parrot: Parrot) -> None:
    process = scripted_parrot.start("simulate", "--turns", 1)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'{"prompt": "a"}\n')
    process.stdin.flush()
    assert json.loads(process.stdout.readline())
    process.stdout.close()
    process.stdin.write(b'{"prompt": "b"}\n')
    process.stdin.flush()
    assert process.wait(20) == 0


def test_error_ends_the_run_while_the_writer_is_still_there(scripted_parrot: Parrot, tmp_path: Path) -> None:
    process = scripted_parrot.start("simulate", "-o", "out.jsonl", "--turns", 1, env={"FULL_AFTER": "300"})
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b'{"prompt": "a"}\n{"prompt": "b"}\n')
    process.stdin.flush()
    assert process.wait(20) == 1
    assert process.stderr.read().count(b"\n") == 1


def test_row_flows_out_before_the_next_comes_in(scripted_parrot: Parrot) -> None:
    process = scripted_parrot.start("chat")
    assert process.stdin is not None
    assert process.stdout is not None
    for text in ("one", "two"):
        process.stdin.write(json.dumps({"id": text, "prompt": text}).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], 20)
        assert ready
        assert json.loads(process.stdout.readline())["id"] == text
    process.stdin.close()
    assert process.wait(20) == 0


def test_interrupted_pipe_says_so_and_leaves_whole_rows(scripted_parrot: Parrot) -> None:
    process = scripted_parrot.start("simulate", "--turns", 1)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b'{"prompt": "a"}\n')
    process.stdin.flush()
    assert json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == (
        b"parrot: stopped; the rows written are whole, and with -o FILE a run can be resumed\n"
    )


# A terminal


class Terminal:
    """A pseudo-terminal that a command talks to."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self._ahead = ""

    def read_until(self, text: str) -> str:
        """What is shown from here on up to `text`."""
        while text not in self._ahead:
            ready, _, _ = select.select([self.ours], [], [], 20)
            assert ready, self._ahead
            self._ahead += os.read(self.ours, 10_000).decode()
        shown, _, self._ahead = self._ahead.partition(text)
        return shown

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Any:
    terminal = Terminal()
    yield terminal
    terminal.close()


def talk(parrot: Parrot, terminal: Terminal, *options: str) -> subprocess.Popen[bytes]:
    """A conversation in which one question has been asked."""
    streams = {"stdin": terminal.theirs, "stdout": terminal.theirs, "stderr": terminal.theirs}
    process = parrot.start("chat", *options, **streams)
    terminal.read_until("> ")
    terminal.type("What is tea?\n")
    terminal.read_until("What is tea?")
    return process


def test_conversation_on_a_terminal_streams_and_keeps_its_row(
    scripted_parrot: Parrot, terminal: Terminal, tmp_path: Path
) -> None:
    process = talk(scripted_parrot, terminal, "-o", "talk.jsonl", "--system", "Be brief.")
    answers = [terminal.read_until("> ")]
    terminal.type("\n")
    terminal.read_until("> ")
    terminal.type("Why?\n")
    terminal.read_until("Why?")
    answers.append(terminal.read_until("> "))
    terminal.type("\x04")
    assert process.wait(20) == 0
    (row,) = rows_in((tmp_path / "talk.jsonl").read_text())
    assert [message["role"] for message in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in row["messages"][2::2]] == [text.strip() for text in answers]
    assert row["stop_reason"] is None


def test_conversation_that_is_interrupted_ends_at_once_and_keeps_its_row(
    scripted_parrot: Parrot, terminal: Terminal, tmp_path: Path
) -> None:
    process = talk(scripted_parrot, terminal, "-o", "talk.jsonl")
    terminal.read_until("> ")
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert time.monotonic() - start < 2
    terminal.read_until("parrot: stopped; the conversation is over")
    (row,) = rows_in((tmp_path / "talk.jsonl").read_text())
    assert len(row["messages"]) == 2
    assert scripted_parrot("ask", "talk.jsonl").returncode == 0


def test_progress_is_shown_on_a_terminal_alone(
    scripted_parrot: Parrot, terminal: Terminal, tmp_path: Path
) -> None:
    write(tmp_path / "seeds.jsonl", GOOD)
    run = ["simulate", "seeds.jsonl", "--turns", "2"]
    assert scripted_parrot(*run).stderr == ""
    wanted = scripted_parrot(*run, "--progress").stderr
    assert "1/1 dialogues · 3 messages" in wanted
    assert wanted.endswith("ended by: 1 turns\x1b[K\n")
    process = scripted_parrot.start(*run, stderr=terminal.theirs)
    terminal.read_until("1/1 dialogues")
    process.communicate()
    terminal.read_until("ended by: 1 turns\x1b[K\r\n")
    process = scripted_parrot.start(*run, "--no-progress", stderr=terminal.theirs)
    process.communicate()
    assert select.select([terminal.ours], [], [], 0)[0] == []


def test_terminal_that_has_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with ProgressLine(True, 1) as line:
            line.show(Tally())
            line.finish(Tally())
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())  # for what is still buffered
