"""Nothing finished is ever lost: kills at any moment, full disks, second writers, Ctrl-C.

The engine of most of these runs is scripted, so that a kill costs a tenth of a second; what is
around it, from the command line to the files, is what users run.
"""

from __future__ import annotations

import fcntl
import json
import random
import resource
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Parrot

KINDS = ["plain", "end", "farewell", "repetition", "role_flip", "context"]
TURNS = 6
RUN = ["simulate", "seeds.jsonl", "-o", "out.jsonl", "--turns", TURNS, "--parallel", 4]


def write_seeds(folder: Path, count: int) -> None:
    rows = [{"id": f"dialogue {n}", "prompt": f"{KINDS[n % len(KINDS)]} {n}"} for n in range(count)]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that its writer may have left in the middle of the last one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def recorded(folder: Path) -> set[tuple[str, int]]:
    """What is on record of each dialogue: the number of messages that each recorded one came after."""
    known = set()
    for row in whole_rows(folder / "out.jsonl"):
        known |= {(row["id"], length) for length in range(1, 2 * TURNS + 1)}
    lengths: Counter[str] = Counter()
    for entry in whole_rows(folder / "out.jsonl.journal")[1:]:
        lengths[entry["id"]] += 1  # the prompt is the first message
        known.add((entry["id"], lengths[entry["id"]]))
    return known


def generated(log: Path) -> set[tuple[str, int]]:
    """Which replies were made, as `recorded` has them."""
    if not log.exists():
        return set()
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    return {(f"dialogue {first.split()[1]}", int(length)) for first, length in lines}


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a complete output; an id that is there twice is an error."""
    rows = whole_rows(path)
    assert len({row["id"] for row in rows}) == len(rows)
    assert path.read_bytes().endswith(b"\n")
    return {row["id"]: row for row in rows}


def undisturbed(parrot: Parrot) -> dict[str, dict[str, Any]]:
    """The rows of the run if nothing happens to it."""
    done = parrot(*[each if each != "out.jsonl" else "undisturbed.jsonl" for each in RUN])
    assert (done.returncode, done.stderr) == (0, "")
    return by_id(parrot.folder / "undisturbed.jsonl")


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Wait for what a process does."""
    while True:
        has_ended = process.poll() is not None
        if condition():
            return
        assert not has_ended
        time.sleep(0.003)


@pytest.mark.parametrize("chance", range(3))
def test_no_kill_loses_or_repeats_anything(chance: int, scripted_parrot: Parrot, tmp_path: Path) -> None:
    """Twenty kills each: half at a random moment, half in the middle of a random write."""
    dice = random.Random(chance)
    write_seeds(tmp_path, 150)
    expected = undisturbed(scripted_parrot)
    assert {row["stop_reason"] for row in expected.values()} == {"turns", *KINDS[1:]}
    kills = 0
    for life in range(100):
        log = tmp_path / f"replies {life}"
        before = recorded(tmp_path)
        environment = {"REPLY_SECONDS": "0.004", "REPLY_LOG": str(log)}
        if kills < 20 and life % 2:
            environment["TEAR_WRITE"] = str(dice.randint(1, 40))
        process = scripted_parrot.start(*RUN, "--resume", env=environment)
        if kills < 20 and not life % 2:
            wait_until(process, log.exists)
            time.sleep(dice.uniform(0, 0.03))
            process.kill()
        _, errors = process.communicate(timeout=30)
        assert generated(log) & before == set()
        if process.returncode == 0:
            break
        assert (process.returncode, errors) == (-signal.SIGKILL, b"")
        kills += 1
        assert before <= recorded(tmp_path)
    assert kills == 20
    assert by_id(tmp_path / "out.jsonl") == expected
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_no_kill_between_the_first_writes_loses_anything(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write_seeds(tmp_path, 2)
    expected = undisturbed(scripted_parrot)
    for number in (1, 1, 2, 1, 3, 4, 1):
        done = scripted_parrot(*RUN, "--resume", env={"TEAR_WRITE": str(number)})
        assert done.returncode == -signal.SIGKILL
    assert scripted_parrot(*RUN, "--resume").returncode == 0
    assert by_id(tmp_path / "out.jsonl") == expected


def texts_of(folder: Path) -> set[tuple[str, str]]:
    """Every message on record, with its dialogue."""
    entries = whole_rows(folder / "out.jsonl.journal")[1:]
    texts = {(entry["id"], entry["content"]) for entry in entries if "content" in entry}
    rows = whole_rows(folder / "out.jsonl")
    return texts | {(row["id"], message["content"]) for row in rows for message in row["messages"]}


def test_real_models_carry_on_after_kills(parrot: Parrot, model_file: Path, tmp_path: Path) -> None:
    rows = [{"id": str(n), "prompt": f"Tell me about the number {n}."} for n in range(4)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--turns", 2, "--max-tokens", 16, "--threads", 1, "--parallel", 2]
    run = ["simulate", "seeds.jsonl", "-o", "out.jsonl", "--ask", model_file, "--chat", model_file, *small]
    known: set[tuple[str, str]] = set()
    for _ in range(3):
        process = parrot.start(*run, "--resume")
        wanted = len(known) + 2
        wait_until(process, lambda wanted=wanted: len(texts_of(tmp_path)) >= wanted)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert known <= texts_of(tmp_path)
        known = texts_of(tmp_path)
    done = parrot(*run, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    result = by_id(tmp_path / "out.jsonl")
    assert result.keys() == {"0", "1", "2", "3"}
    for row in result.values():
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    # Only a question that was not answered is no part of its row.
    lost = {identity for identity, _ in known - texts_of(tmp_path)}
    assert {result[identity]["stop_reason"] for identity in lost} <= {"repetition", "context"}


def test_second_writer_is_refused_and_disturbs_nothing(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write_seeds(tmp_path, 8)
    expected = undisturbed(scripted_parrot)
    log = tmp_path / "replies"
    first = scripted_parrot.start(*RUN, env={"REPLY_SECONDS": "0.05", "REPLY_LOG": str(log)})
    wait_until(first, log.exists)
    for option in ("--resume", "--force"):
        second = scripted_parrot(*RUN, option)
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert "out.jsonl is being written by another process" in second.stderr
    assert first.wait(60) == 0
    assert by_id(tmp_path / "out.jsonl") == expected


@pytest.mark.parametrize("room", [0, 1, 150, 700, 3000, 9000])
def test_full_disk_is_one_sentence_and_the_run_goes_on_later(
    room: int, scripted_parrot: Parrot, tmp_path: Path
) -> None:
    write_seeds(tmp_path, 12)
    expected = undisturbed(scripted_parrot)
    full = scripted_parrot(*RUN, env={"FULL_AFTER": str(room)})
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert "No space left on device; what was written is whole, free some space" in full.stderr
    for name in ("out.jsonl", "out.jsonl.journal"):
        path = tmp_path / name
        assert not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    again = scripted_parrot(*RUN, "--resume")
    assert (again.returncode, again.stderr) == (0, "")
    assert by_id(tmp_path / "out.jsonl") == expected


def test_limit_on_file_size_is_one_sentence_and_the_run_goes_on_later(
    scripted_parrot: Parrot, tmp_path: Path
) -> None:
    write_seeds(tmp_path, 12)
    expected = undisturbed(scripted_parrot)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    full = scripted_parrot(*RUN, preexec_fn=limit)
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert "cannot be written: File too large; what was written is whole" in full.stderr
    assert max(path.stat().st_size for path in tmp_path.glob("out.jsonl*")) <= 5000
    assert scripted_parrot(*RUN, "--resume").returncode == 0
    assert by_id(tmp_path / "out.jsonl") == expected


def interrupt(process: subprocess.Popen[bytes], number: int) -> str:
    """Send a signal; returns what the process said before it ended, within two seconds."""
    process.send_signal(number)
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 2
    return errors.decode()


def as_arguments(command: str) -> list[str]:
    name, *arguments = shlex.split(command)
    assert name == "parrot"
    return arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_prints_the_command_that_carries_it_on(
    number: int, scripted_parrot: Parrot, tmp_path: Path
) -> None:
    write_seeds(tmp_path, 12)
    expected = undisturbed(scripted_parrot)
    (tmp_path / "seeds.jsonl").rename(tmp_path / "my seeds.jsonl")
    run = ["my seeds.jsonl" if each == "seeds.jsonl" else each for each in RUN]
    log = tmp_path / "replies"
    (tmp_path / "out.jsonl").write_text("an old run\n")
    process = scripted_parrot.start(*run, "--force", env={"REPLY_SECONDS": "0.02", "REPLY_LOG": str(log)})
    wait_until(process, lambda: log.exists() and len(log.read_text().splitlines()) >= 20)
    said = interrupt(process, number)
    assert process.returncode == 128 + number
    assert said.startswith("parrot: stopped; carry on with: parrot simulate ")
    assert said.count("\n") == 1
    before = recorded(tmp_path)
    assert before
    done = scripted_parrot(
        *as_arguments(said.split("carry on with: ")[1]), env={"REPLY_LOG": str(tmp_path / "again")}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert generated(tmp_path / "again") & before == set()
    assert by_id(tmp_path / "out.jsonl") == expected


def test_interrupted_run_over_a_pipe_wants_its_rows_again(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write_seeds(tmp_path, 4)
    expected = undisturbed(scripted_parrot)
    rows = (tmp_path / "seeds.jsonl").read_bytes()
    process = scripted_parrot.start("simulate", "-o", "out.jsonl", "--turns", TURNS)
    assert process.stdin is not None
    process.stdin.write(rows)
    process.stdin.flush()
    wait_until(process, lambda: bool(whole_rows(tmp_path / "out.jsonl")))
    said = interrupt(process, signal.SIGINT)
    assert said.startswith("parrot: stopped; give it the same rows and carry on with: parrot simulate ")
    assert scripted_parrot(*as_arguments(said.split("carry on with: ")[1]), input=rows).returncode == 0
    assert by_id(tmp_path / "out.jsonl") == expected


def test_real_models_are_interrupted_at_once_and_carry_on(
    parrot: Parrot, model_file: Path, tmp_path: Path
) -> None:
    rows = [{"id": str(n), "prompt": f"Tell me a long story about the number {n}."} for n in range(4)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--turns", 1, "--max-tokens", 12, "--threads", 1, "--parallel", 2]
    run = ["simulate", "seeds.jsonl", "-o", "out.jsonl", "--ask", model_file, "--chat", model_file, *small]
    process = parrot.start(*run)
    wait_until(process, lambda: bool(whole_rows(tmp_path / "out.jsonl")))
    said = interrupt(process, signal.SIGINT)
    assert process.returncode == 130
    done = parrot(*as_arguments(said.split("carry on with: ")[1]))
    assert (done.returncode, done.stderr) == (0, "")
    assert by_id(tmp_path / "out.jsonl").keys() == {"0", "1", "2", "3"}


def test_output_can_be_watched_and_locked_files_are_freed_by_death(
    scripted_parrot: Parrot, tmp_path: Path
) -> None:
    write_seeds(tmp_path, 12)
    process = scripted_parrot.start(*RUN, env={"REPLY_SECONDS": "0.02"})
    wait_until(process, lambda: bool(whole_rows(tmp_path / "out.jsonl")))
    process.kill()
    process.wait()
    for name in ("out.jsonl", "out.jsonl.journal"):
        with open(tmp_path / name) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
