"""How a file type is chosen: by scripted speeds and losses, and once with real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from tiny_gguf import divergence as divergence_of
from tiny_gguf import llama_logits, write_random

from parrot_edge.convert import auto
from parrot_edge.convert.auto import AutoChoice, choose_type
from parrot_edge.engine import native, quantizer
from parrot_edge.errors import ModelError, UsageError


class Machine:
    """Scripted: `speeds` by type, and `losses` where they may be asked for; remembers what was asked."""

    def __init__(self, speeds: dict[str, float], losses: dict[str, float]) -> None:
        self.speeds, self.losses = speeds, losses
        self.timed: list[str] = []
        self.compared: list[str] = []

    def speed(self, path: Path, sequences: int, threads: int) -> float:
        self.timed.append(self.type_of(path))
        return self.speeds[self.timed[-1]]

    def divergence(self, path: Path) -> float:
        self.compared.append(self.type_of(path))
        return self.losses[self.compared[-1]]

    @staticmethod
    def type_of(path: Path) -> str:
        return path.name.split(".")[1] if "candidate" in path.name else "F16"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantizer, "quantize", native.quantize)
    return write_random(tmp_path / "model.gguf")


def choose(source: Path, machine: Machine, **options: object) -> AutoChoice:
    types = [name for name in machine.speeds if name != "F16"]
    return choose_type(
        source,
        source.parent,
        machine.divergence,
        speed=machine.speed,
        types=types,
        threads=2,
        **options,  # type: ignore[arg-type]
    )


SPEEDS = {"Q4_0": 300.0, "Q4_K_M": 250.0, "Q8_0": 200.0, "F16": 100.0}
LOSSES = {"Q4_0": 0.3, "Q4_K_M": 0.04, "Q8_0": 0.004, "F16": 0.0005}


def test_fastest_type_within_the_loss_is_chosen_and_says_why(source: Path) -> None:
    machine = Machine(SPEEDS, LOSSES)
    choice = choose(source, machine)
    assert choice.type == "Q4_K_M"
    assert machine.compared == ["Q4_0", "Q4_K_M"]  # slower ones need not be asked
    assert choice.reason == (
        "Q4_K_M makes 250 tokens/s of dialogue with 2 threads and 16 sequences, at 42 kB, and loses 0.04 "
        "where 0.05 nats a token are allowed (Q4_0 300 but 0.3 lost)"
    )
    assert [(each.type, each.divergence) for each in choice.candidates] == [
        *(("Q4_0", 0.3), ("Q4_K_M", 0.04), ("Q8_0", None), ("F16", None)),
    ]
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(("loss", "chosen"), [(1.0, "Q4_0"), (0.01, "Q8_0"), (0.001, "F16"), (0.0001, "F16")])
def test_loss_that_is_allowed_decides(loss: float, chosen: str, source: Path) -> None:
    assert choose(source, Machine(SPEEDS, LOSSES), loss=loss).type == chosen


def test_near_a_tie_the_smaller_file_is_asked_first(source: Path) -> None:
    machine = Machine({"Q8_0": 202.0, "Q4_0": 200.0, "F16": 100.0}, dict.fromkeys(LOSSES, 0.0))
    assert choose(source, machine).type == "Q4_0"
    machine = Machine({"Q8_0": 220.0, "Q4_0": 200.0, "F16": 100.0}, dict.fromkeys(LOSSES, 0.0))
    assert choose(source, machine).type == "Q8_0"


def test_type_that_needs_an_imatrix_is_left_out_without_one(source: Path) -> None:
    machine = Machine({"IQ2_M": 900.0, **SPEEDS}, LOSSES)
    assert choose(source, machine).type == "Q4_K_M"
    assert "IQ2_M" not in machine.timed


def test_type_that_cannot_be_loaded_is_left_out(source: Path) -> None:
    class Small(Machine):
        def speed(self, path: Path, sequences: int, threads: int) -> float:
            if self.type_of(path) == "Q4_K_M":
                raise ModelError("it takes too much memory")
            return super().speed(path, sequences, threads)

    said = list[str]()
    assert choose(source, Small(SPEEDS, LOSSES), say=said.append).type == "Q8_0"
    assert "Q4_K_M was left out: it takes too much memory" in said


def test_nothing_is_left_when_it_is_interrupted(source: Path) -> None:
    class Stopped(Machine):
        def divergence(self, path: Path) -> float:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(source, Stopped(SPEEDS, LOSSES))
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan"), float("inf")])
def test_loss_that_cannot_be_kept_to_is_misuse(loss: float, source: Path) -> None:
    with pytest.raises(UsageError, match="cannot be kept to; give nats a token above 0"):
        choose(source, Machine(SPEEDS, LOSSES), loss=loss)


def test_real_files_are_written_timed_and_compared(source: Path) -> None:
    before = llama_logits(source)

    def compare(path: Path) -> float:
        return divergence_of(before, llama_logits(path))

    choice = choose_type(
        source, source.parent, compare, types=["Q8_0", "Q2_K"], loss=0.05, sequences=2, threads=1
    )
    assert choice.type in ("Q8_0", "F16")
    assert all(np.isfinite(each.speed) and each.speed > 0 for each in choice.candidates)
    assert auto.CANDIDATES[0] == "Q8_0"
