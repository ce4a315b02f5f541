"""Files that llama.cpp would not survive: each is one sentence, and no process dies by a signal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("gguf")

from fuzz.gguf_cases import Parts, put_together, take_apart
from tiny_gguf import write_random

from parrot_edge.engine.native import Model
from parrot_edge.errors import ModelError

ADAPTER = ROOT / "tests" / "fuzz" / "adapter.gguf"
BASE = ROOT / "tests" / "fuzz" / "base.gguf"


def changed(source: Path, target: Path, change: Callable[[Parts], None]) -> Path:
    parts = take_apart(source.read_bytes())
    change(parts)
    target.write_bytes(put_together(parts))
    return target


def set_value(key: bytes, kind: int, value: object) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.values[:] = [each for each in parts.values if each[0] != key]
        parts.values.append((key, kind, value))

    return change


def set_tensor(name: bytes, shape: list[int], kind: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensors[:] = [
            (name, shape, kind, each[3]) if each[0] == name else each for each in parts.tensors
        ]

    return change


UINT32, FLOAT32, TEXT = 4, 6, 8
MODELS: dict[str, tuple[Callable[[Parts], None], str]] = {
    "weights that are no numbers to multiply": (
        set_tensor(b"blk.0.ffn_down.weight", [8, 8], 24),
        "blk.0.ffn_down.weight is empty or I8",
    ),
    "a norm that is none": (set_tensor(b"output_norm.weight", [8], 25), "output_norm.weight is empty or I16"),
    "a tokenizer without bytes": (
        set_value(b"tokenizer.ggml.model", TEXT, b"llama"),
        "has no tokenizer that can be used",
    ),
    "no tokenizer": (set_value(b"tokenizer.ggml.model", TEXT, b"none"), "has no tokenizer that can be used"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_that_llama_cpp_would_not_survive_is_refused(case: str, tmp_path: Path) -> None:
    change, said = MODELS[case]
    with pytest.raises(ModelError, match=said):
        Model(changed(BASE, tmp_path / "model.gguf", change))


ADAPTERS: dict[str, tuple[Callable[[Parts], None], str]] = {
    "alpha as text": (set_value(b"adapter.lora.alpha", TEXT, b"4"), "adapter.lora.alpha is of another type"),
    "a type as number": (set_value(b"adapter.type", UINT32, 4), "adapter.type is of another type"),
    "a tensor of nothing": (set_tensor(b"blk.0.attn_v.weight.lora_b", [2, 8, 0], 1), "is empty or F16"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_that_llama_cpp_would_not_survive_is_refused(case: str, tmp_path: Path) -> None:
    change, said = ADAPTERS[case]
    with Model(BASE) as model, pytest.raises(ModelError, match=said):
        model.load_adapter(changed(ADAPTER, tmp_path / "adapter.gguf", change))


ASSERTED = {
    "no blocks": set_value(b"llama.block_count", UINT32, 0),
    "a thousand blocks": set_value(b"llama.block_count", UINT32, 1000),
    "experts used that are not there": set_value(b"llama.expert_used_count", UINT32, 2),
}


@pytest.mark.parametrize("case", ASSERTED)
def test_where_llama_cpp_gives_up_the_user_hears_one_sentence(case: str, tmp_path: Path) -> None:
    path = changed(BASE, tmp_path / "model.gguf", ASSERTED[case])
    program = (
        f"from pathlib import Path; from parrot_edge.engine.native import Model; Model(Path({str(path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("parrot: llama.cpp gave up (GGML_ASSERT(")
    assert f"is {path} damaged? Fetch or make it again" in done.stderr


def test_sound_files_are_taken(tmp_path: Path) -> None:
    with Model(BASE) as model:
        assert model.load_adapter(ADAPTER).metadata["general.name"] == "tiny adapter"
    with Model(write_random(tmp_path / "random.gguf")) as model:
        assert model.vocab_size == 96
