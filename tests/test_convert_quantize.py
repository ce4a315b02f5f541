"""Every file type that llama.cpp writes: what comes out, what it needs, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

from tiny_gguf import cut, divergence, llama_logits, read_fields, write_random

from parrot_edge.convert.files import read_gguf
from parrot_edge.convert.imatrix import Importance, ImportanceMatrix, write_imatrix
from parrot_edge.convert.quantize import (
    NEEDS_IMATRIX,
    Quantized,
    estimate_bytes,
    note_fallbacks,
    parse_type,
    quantize,
)
from parrot_edge.engine import native, quantizer
from parrot_edge.errors import ModelError, OutputError, ParrotError, UsageError

TYPES = native.file_types()


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process for each file; test_quantizer.py has that."""
    monkeypatch.setattr(quantizer, "quantize", native.quantize)


def write_importance(model: Path, path: Path, *, rare: int | None = None) -> Path:
    """A matrix in which all columns matter alike, or one, number `rare`, above all."""
    tensors = {}
    for name, tensor in read_gguf(model).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            sums = np.ones((int(np.prod(tensor.shape[:-2])), tensor.shape[-1]), np.float32)
            if rare is not None:
                sums[:, rare] = 1e4
            tensors[name] = Importance(sums, np.ones(len(sums), np.float32))
    write_imatrix(ImportanceMatrix(tensors, ("folder/rows.jsonl",)), path)
    return path


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose rows are of 256 numbers, and its importance matrix."""
    folder = tmp_path_factory.mktemp("even")
    write_random(folder / "model.gguf", width=256, hidden=256)
    write_importance(folder / "model.gguf", folder / "imatrix.gguf")
    return folder


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_written_and_runs(name: str, even: Path, tmp_path: Path) -> None:
    done = quantize(even / "model.gguf", tmp_path / "q.gguf", name, imatrix=even / "imatrix.gguf", threads=1)
    assert (done.type, done.bytes) == (name, (tmp_path / "q.gguf").stat().st_size)
    assert not done.fallbacks
    assert sum(done.tensors.values()) == 12
    assert int(native.read_metadata(tmp_path / "q.gguf")["general.file_type"]) == TYPES[name]
    logits = llama_logits(tmp_path / "q.gguf")
    assert np.isfinite(logits).all()
    assert len(read_gguf(tmp_path / "q.gguf").tensors) == 12
    if done.bits_per_weight > 5:
        assert divergence(llama_logits(even / "model.gguf"), logits) < 0.1
    assert done.bytes <= estimate_bytes(read_gguf(even / "model.gguf"), even / "model.gguf", name)


@pytest.mark.parametrize("name", TYPES)
def test_types_that_need_an_imatrix_are_those_of_llama_cpp(name: str, even: Path, tmp_path: Path) -> None:
    try:
        native.quantize(even / "model.gguf", tmp_path / "q.gguf", name, 1)
        refused = False
    except ModelError as error:
        refused = "importance matrix" in str(error)
    assert refused == (name in NEEDS_IMATRIX)


def test_rows_that_do_not_divide_are_reported(tmp_path: Path) -> None:
    source = write_random(tmp_path / "odd.gguf", width=64, hidden=96)
    done = quantize(source, tmp_path / "q.gguf", "Q4_K", threads=1)
    assert (done.type, done.matrices, sum(done.fallbacks.values())) == ("Q4_K_M", 9, 9)
    assert set(done.fallbacks) == {"Q5_0", "Q8_0"}
    assert done.note == (
        "9 of 9 matrices have rows that do not divide by the 256 of Q4_K_M and are of another type: "
        f"{done.fallbacks['Q5_0']} Q5_0, {done.fallbacks['Q8_0']} Q8_0"
    )
    assert note_fallbacks(read_gguf(tmp_path / "q.gguf"), "Q4_K_M") == done.note
    assert not quantize(source, tmp_path / "q8.gguf", "Q8_0", threads=1).note


def test_importance_is_where_precision_is_spent(even: Path, tmp_path: Path) -> None:
    source = even / "model.gguf"
    rare = write_importance(source, tmp_path / "rare.gguf", rare=7)

    def error(imatrix: Path) -> float:
        quantize(source, tmp_path / "q.gguf", "Q4_K_S", imatrix=imatrix, threads=1, force=True)
        name = "blk.0.attn_q.weight"
        before, after = (read_gguf(path).tensors[name].floats() for path in (source, tmp_path / "q.gguf"))
        return float(np.square(after - before)[:, 7].mean())

    assert error(rare) < 0.5 * error(even / "imatrix.gguf")


def test_use_of_an_imatrix_is_noted_as_llama_quantize_does(even: Path, tmp_path: Path) -> None:
    quantize(even / "model.gguf", tmp_path / "q.gguf", "Q4_0", imatrix=even / "imatrix.gguf", threads=1)
    fields = read_fields(tmp_path / "q.gguf")
    assert fields["quantize.imatrix.file"] == "imatrix.gguf"
    assert fields["quantize.imatrix.dataset"] == "rows.jsonl"
    assert int(fields["quantize.imatrix.entries_count"]) == 7


def refuses(
    error: type[ParrotError], message: str, source: Path, target: Path, name: str, **options: Any
) -> None:
    before = set(target.parent.iterdir())
    with pytest.raises(error, match=message):
        quantize(source, target, name, threads=1, **options)
    assert set(target.parent.iterdir()) == before


def test_what_cannot_be_quantised_is_refused_in_a_sentence(even: Path, tmp_path: Path) -> None:
    source, target = even / "model.gguf", tmp_path / "q.gguf"
    for name in NEEDS_IMATRIX:
        refuses(UsageError, f"{name} needs an importance matrix", source, target, name)
    refuses(UsageError, "Q4_M is no file type of llama.cpp; the nearest is Q4_K_M", source, target, "Q4_M")
    refuses(UsageError, "NVFP4 is no file type", source, target, "NVFP4")
    refuses(ModelError, "cannot be opened", tmp_path / "none.gguf", target, "Q8_0")
    refuses(ModelError, "is no model; name the merged model", even / "imatrix.gguf", target, "Q8_0")
    native.quantize(source, tmp_path / "q4.gguf", "Q4_0", 1)
    refuses(ModelError, r"is quantised already \(Q4_0\).*16-bit file", tmp_path / "q4.gguf", target, "Q8_0")
    cut(Path(shutil.copy(source, tmp_path / "cut.gguf")))
    refuses(ModelError, "damaged or cut short", tmp_path / "cut.gguf", target, "Q8_0")
    other = write_random(tmp_path / "other.gguf")
    refuses(UsageError, "does not fit", other, target, "Q4_0", imatrix=even / "imatrix.gguf")


def test_existing_target_is_replaced_by_force_alone(even: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(even / "model.gguf", tmp_path))
    target = tmp_path / "q.gguf"
    target.write_text("mine")
    refuses(OutputError, "exists; choose another name or pass --force", source, target, "Q8_0")
    assert target.read_text() == "mine"
    quantize(source, target, "Q8_0", force=True)
    refuses(UsageError, "is the source itself", source, source, "Q8_0", force=True)


def test_space_is_checked_before_the_work(
    even: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refuses(
        OutputError,
        r"q.gguf needs about \d+ kB as Q8_0, 1 kB of disk is left; free some space",
        even / "model.gguf",
        tmp_path / "q.gguf",
        "Q8_0",
    )


def test_names_are_those_of_llama_quantize() -> None:
    assert [parse_type(name) for name in ("q3_k", "Q4_K", "q5_k", "iq4_nl")] == [
        *("Q3_K_M", "Q4_K_M", "Q5_K_M", "IQ4_NL"),
    ]
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_K_M", "IQ1_S", "TQ2_0", "MXFP4_MOE", "Q1_0"} <= set(TYPES)


def test_report_is_plain_for_json() -> None:
    report = Quantized("Q8_0", 10, 8.5, {"Q8_0": 1}, {}, 1, 32, False, 0.1)
    assert report.as_dict()["tensors"] == {"Q8_0": 1}
    assert report.note == ""
