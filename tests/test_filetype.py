"""How a file type is chosen for the embedded model, and what `parrot doctor` says of it."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from parrot_edge import filetype
from parrot_edge.cli.doctor import doctor
from parrot_edge.engine import native, quantizer, rates
from parrot_edge.errors import ModelError
from parrot_edge.filetype import Choice, choose_file
from parrot_edge.models import LocalModel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("PARROT_HOME", str(home))
    return home


class Bench:
    """Stands in for llama.cpp: `speeds` by type; remembers what was derived and timed."""

    def __init__(self) -> None:
        self.speeds = {"Q4_1": 100.0, "Q8_0": 200.0, "F16": 150.0, "BF16": 250.0}
        self.derived: list[str] = []
        self.timed: list[tuple[str, int, int]] = []

    def quantize(self, source: Path, target: Path, type_name: str, threads: int) -> None:
        self.derived.append(type_name)
        target.write_bytes(b"GGUF " + type_name.encode())

    def measure(self, path: Path, *, sequences: int, threads: int, seconds: float) -> rates.Rates:
        type_name = path.stem.replace(".", "-").rsplit("-", 1)[-1]
        self.timed.append((type_name, sequences, threads))
        return rates.Rates(decode=self.speeds[type_name], prompt=2 * self.speeds[type_name])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    bench = Bench()
    shipped = tmp_path / "shipped.Q4_1.gguf"
    shipped.write_bytes(b"GGUF shipped")
    monkeypatch.setattr(filetype, "embedded_path", lambda: shipped)
    monkeypatch.setattr(quantizer, "quantize", bench.quantize)
    monkeypatch.setattr(rates, "measure_rates", bench.measure)
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return bench


def choose(sequences: int = 16, *, again: bool = False) -> Choice:
    model = LocalModel("smollm2", filetype.embedded_path())
    return choose_file(model, sequences=sequences, threads=2, again=again)


def test_fastest_faithful_type_is_chosen_and_says_why(bench: Bench, home: Path) -> None:
    choice = choose()
    assert choice.type == "Q8_0"
    assert choice.path.parent == home / "cache" / "derived"
    assert choice.path.read_bytes() == b"GGUF Q8_0"
    assert choice.reason == (
        "133 tokens/s of dialogue against 67 (Q4_1) and 100 (F16), with 2 threads and 16 sequences"
    )


def test_bfloat16_is_tried_where_the_cpu_multiplies_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: True)
    assert choose().type == "BF16"
    assert bench.derived == ["Q8_0", "F16", "BF16"]


def test_choice_is_made_once_for_about_so_many_sequences(bench: Bench) -> None:
    first = choose(16)
    assert choose(13) == choose(64) == first
    assert len(bench.timed) == 3
    choose(1)
    assert [row[1] for row in bench.timed] == [16, 16, 16, 1, 1, 1]
    assert bench.derived == ["Q8_0", "F16"]


def test_choice_stands_until_it_is_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose()
    bench.speeds["F16"] = 300.0
    monkeypatch.setattr("os.getloadavg", lambda: (10_000.0, 0.0, 0.0))
    assert choose() == first
    assert choose(again=True).type == choose().type == "F16"


@pytest.mark.parametrize(("speed", "chosen"), [(102.0, "Q4_1"), (110.0, "Q8_0")])
def test_near_a_tie_the_shipped_file_wins(bench: Bench, speed: float, chosen: str) -> None:
    bench.speeds.update(Q8_0=speed, F16=speed)
    assert choose().type == chosen


def test_derived_file_that_was_deleted_is_made_again(bench: Bench) -> None:
    choice = choose()
    choice.path.unlink()
    assert choose() == choice
    assert choice.path.read_bytes() == b"GGUF Q8_0"
    assert bench.derived == ["Q8_0", "F16", "Q8_0"]


def test_files_of_an_older_source_are_removed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old = choose().path
    others = [
        old.with_name(name) for name in ("choices.json", "shipped.Q4_1-mine-F16.gguf", "other-F16.gguf")
    ]
    others.append(old.with_name(f"another-{old.name}"))
    for path in others[1:]:
        path.write_bytes(b"mine")
    with open(old, "rb") as in_use:
        filetype.embedded_path().write_bytes(b"GGUF shipped anew")
        new = choose().path
        assert in_use.read() == b"GGUF Q8_0"
    left = {new, new.with_name(new.name.replace("Q8_0", "F16")), *others, old.with_name(".lock")}
    assert set(old.parent.iterdir()) == left
    monkeypatch.setattr(native, "llama_version", lambda: "99.0")
    newer = choose().path
    assert newer.exists()
    assert not new.exists()


def test_shipped_file_serves_where_the_cache_cannot_be_written(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARROT_HOME", str(tmp_path / "file"))
    choice = choose()
    assert (choice.path, choice.type) == (filetype.embedded_path(), "Q4_1")
    assert "cannot be written" in choice.reason
    assert bench.timed == []


def test_type_that_cannot_be_derived_is_left_out_and_says_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path, type_name: str, threads: int) -> None:
        if type_name == "F16":
            raise ModelError("no space")
        bench.quantize(source, target, type_name, threads)

    monkeypatch.setattr(quantizer, "quantize", fail)
    choice = choose()
    assert choice.type == "Q8_0"
    assert choice.reason.endswith("F16 was left out: no space")
    assert choose() == choice


def test_types_larger_than_memory_are_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(filetype.inspect_machine(), memory_available=len(b"GGUF F16"))
    monkeypatch.setattr(filetype, "inspect_machine", lambda: machine)
    choice = choose()
    assert choice.type == "F16"
    assert "Q8_0 was left out: it takes 9 bytes of memory, and 8 bytes is free" in choice.reason


def test_choice_that_cannot_be_kept_is_the_shipped_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filetype, "write_json", refuse)
    assert choose().path == filetype.embedded_path()


def test_choice_of_an_unknown_version_is_made_anew(bench: Bench, home: Path) -> None:
    choice = choose()
    path = home / "cache" / "derived" / "choices.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({key: {"type": "Q8_0"} for key in saved}))
    assert choose() == choice
    path.write_text("[]")
    assert choose() == choice


def test_named_file_is_taken_as_it_is(bench: Bench, tmp_path: Path) -> None:
    choice = choose_file(LocalModel("base", tmp_path / "base-q4_k_m.gguf"), sequences=16)
    assert (choice.path, choice.type) == (tmp_path / "base-q4_k_m.gguf", "Q4_K_M")
    assert bench.timed == []


def test_derived_q8_0_is_a_model_that_llama_cpp_reads(tmp_path: Path) -> None:
    target = tmp_path / "model-Q8_0.gguf"
    quantizer.quantize(filetype.embedded_path(), target, "Q8_0", 1)
    metadata = native.read_metadata(target)
    assert metadata["general.file_type"] == "7"
    assert metadata["general.architecture"] == "llama"


def test_doctor_reports_every_choice_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "parrot_edge.cli.doctor.choose_file", lambda model, **_: Choice(model.path, "Q4_1", "shipped")
    )
    result = CliRunner().invoke(doctor, ["--json", "--parallel", "3"])
    report = json.loads(result.stdout)
    assert report["threads"]["count"] >= 1
    assert report["sequences"]["count"] == 3
    assert report["file"]["type"] == "Q4_1"
    assert all(report[key]["reason"] for key in ("threads", "sequences", "file"))
    starts = {line.split()[0] for line in CliRunner().invoke(doctor, []).stdout.splitlines()}
    assert {"threads", "file", "dialogues", "cache", "config"} <= starts
