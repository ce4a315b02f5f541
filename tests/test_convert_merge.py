"""Merging in GGUF form: the numbers of peft's merge, the words of base and adapter, nothing lost."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")

import gguf
from conftest import ROOT
from tiny_gguf import (
    add_lora,
    cut,
    divergence,
    finish,
    llama_logits,
    read_fields,
    read_llama,
    torch_logits,
    write_llama,
    write_lora,
)
from tiny_models import make_llama

from parrot_edge.convert.adapter import write_adapter
from parrot_edge.convert.files import read_gguf
from parrot_edge.convert.merge import merge_adapter
from parrot_edge.engine.native import quantize
from parrot_edge.errors import ModelError, OutputError
from parrot_edge.store import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base.gguf and ask.gguf, an adapter for it."""
    folder = tmp_path_factory.mktemp("made")
    write_llama(make_llama(), folder / "base.gguf")
    add_lora(read_llama(folder / "base.gguf"), folder / "lora")
    write_adapter(folder / "lora", folder / "base.gguf", folder / "ask.gguf", name="Ask", license_id="mit")
    return folder


def merge(made: Path, target: Path, **options: Any) -> Path:
    merge_adapter(made / "base.gguf", made / "ask.gguf", target, **options)
    return target


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and dequantised values of all tensors."""
    dequantize = gguf.quants.dequantize
    return {
        tensor.name: (tensor.tensor_type.name, dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "IQ4_NL"])
def test_merge_is_what_peft_merges(file_type: str, tmp_path: Path) -> None:
    base = write_llama(make_llama(), tmp_path / "base.gguf")
    if file_type != "F32":
        base = tmp_path / f"{file_type}.gguf"
        quantize(tmp_path / "base.gguf", base, file_type, 1)
    adapted = add_lora(read_llama(base), tmp_path / "lora")
    write_adapter(tmp_path / "lora", base, tmp_path / "ask.gguf", name="Ask", license_id="mit")
    merge_adapter(base, tmp_path / "ask.gguf", tmp_path / "merged.gguf")

    model = adapted.merge_and_unload()
    wanted = read_tensors(write_llama(model, tmp_path / "wanted.gguf"))
    merged = read_tensors(tmp_path / "merged.gguf")
    assert {name: kind for name, (kind, _) in merged.items()} == {
        name: "F32" if values.ndim == 1 else "F16" for name, (_, values) in wanted.items()
    }
    for name, (_, values) in merged.items():  # float16 has 11 bits, and the adapter is rounded to it as well
        assert np.abs(values - wanted[name][1]).max() <= 2**-10 * np.abs(wanted[name][1]).max(), name
    assert divergence(torch_logits(model), llama_logits(tmp_path / "merged.gguf")) < 1e-3


def test_merged_model_says_what_base_and_adapter_say(made: Path, tmp_path: Path) -> None:
    apart = llama_logits(made / "base.gguf", made / "ask.gguf")
    merged = llama_logits(merge(made, tmp_path / "merged.gguf"))
    assert divergence(apart, merged) < 1e-3
    assert divergence(apart, llama_logits(made / "base.gguf")) > 1


def test_scale_is_how_much_is_added(made: Path, tmp_path: Path) -> None:
    plain, whole, half, none = (
        read_tensors(path)["blk.1.attn_k.weight"][1]
        for path in (
            made / "base.gguf",
            merge(made, tmp_path / "1.gguf"),
            merge(made, tmp_path / "2.gguf", scale=0.5),
            merge(made, tmp_path / "3.gguf", scale=0.0),
        )
    )
    assert np.abs(whole - plain).max() > 0.3
    assert half == pytest.approx((plain + whole) / 2, abs=2e-3)
    assert none == pytest.approx(plain, abs=1e-3)


def test_metadata_is_the_bases_but_for_name_type_and_role(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base.gguf", tmp_path / "ask.gguf"
    write_typed(base, TYPED)
    write_lora(adapter, {"parrot.role": "ask", "parrot.system": "You are curious."})
    merge_adapter(base, adapter, tmp_path / "merged.gguf")
    reader = gguf.GGUFReader(tmp_path / "merged.gguf")
    before = gguf.GGUFReader(base)
    for key, _, _, _ in TYPED:
        one, other = before.get_field(key), reader.get_field(key)
        assert one.types == other.types, key
        if key != "general.file_type":
            assert [one.parts[i].tobytes() for i in one.data] == [
                other.parts[i].tobytes() for i in other.data
            ]
    assert reader.alignment == before.alignment == 128
    for key, value in {
        "general.architecture": "llama",
        "general.name": "base + ask",
        "general.file_type": 1,
        "parrot.role": "ask",
        "parrot.system": "You are curious.",
    }.items():
        assert reader.get_field(key).contents() == value
    merged = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(merged["v"], np.arange(5, dtype=np.float32))
    assert np.array_equal(merged["w"], np.ones((4, 8)) + 2 * 2)


TYPE = gguf.GGUFValueType
TYPED: list[tuple[str, Any, Any, Any]] = [
    ("raw.text", b"not \xff UTF-8", TYPE.STRING, None),
    ("general.alignment", 128, TYPE.UINT32, None),
    ("general.file_type", 7, TYPE.UINT32, None),
    ("a.flag", True, TYPE.BOOL, None),
    ("a.byte", -5, TYPE.INT8, None),
    ("a.long", 2**63, TYPE.UINT64, None),
    ("a.double", 0.1, TYPE.FLOAT64, None),
    ("an.array.of.text", [b"w\xc3\xa9", b"", b"\xfe"], TYPE.ARRAY, TYPE.STRING),
    ("an.array.of.floats", [-1000.0, 0.25], TYPE.ARRAY, TYPE.FLOAT32),
    ("an.array.of.flags", [True, False], TYPE.ARRAY, TYPE.BOOL),
    ("an.array.of.bytes", [1, 2, 255], TYPE.ARRAY, TYPE.UINT8),
]


def write_typed(path: Path, entries: list[tuple[str, Any, Any, Any]]) -> None:
    """A file with such metadata, a vector and a matrix of ones; llama.cpp could not run it."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value, kind, item in entries:
        writer.add_key_value(key, value, kind, item)
    writer.data_alignment = {key: value for key, value, *_ in entries}.get("general.alignment", 32)
    writer.add_tensor("v", np.arange(5, dtype=np.float32))
    writer.add_tensor("w", np.ones((4, 8), np.float32))
    finish(writer)


def test_alpha_is_divided_by_the_rank(tmp_path: Path) -> None:
    write_typed(tmp_path / "base.gguf", [])
    adapter = write_lora(tmp_path / "ask.gguf", {"adapter.lora.alpha": 3.0})
    merge_adapter(tmp_path / "base.gguf", adapter, tmp_path / "merged.gguf", scale=0.5)
    assert np.array_equal(read_tensors(tmp_path / "merged.gguf")["w"][1], np.ones((4, 8)) + 0.5 * 3 / 2 * 4)


def refuses(message: str, base: Path, adapter: Path, target: Path, **options: Any) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        merge_adapter(base, adapter, target, **options)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not list(target.parent.glob("*.partial"))


HALF = np.ones((2, 8), np.float32)
WRONG_ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "activated": ({"adapter.alora.invocation_tokens": [1, 4093]}, {}, "is an activated LoRA"),
    "a model": ({"general.type": "model"}, {}, "no LoRA adapter"),
    "another kind": ({"adapter.type": "ia3"}, {}, "no LoRA adapter"),
    "another architecture": ({"general.architecture": "gemma"}, {}, "is for 'gemma' models"),
    "half a pair": ({}, {"w.lora_a": HALF}, "only half of an update of w"),
    "a norm": ({}, {"v.weight": np.ones(5, np.float32)}, "only half of an update of v.weight"),
    "another tensor": ({}, {"u.lora_a": HALF, "u.lora_b": np.ones((4, 2), np.float32)}, "does not fit"),
    "other rows": ({}, {"w.lora_a": HALF, "w.lora_b": np.ones((3, 2), np.float32)}, "does not fit"),
    "two ranks": ({}, {"w.lora_a": HALF, "w.lora_b": np.ones((4, 3), np.float32)}, "does not fit"),
    "vectors": ({}, {"v.lora_a": np.ones(5, np.float32), "v.lora_b": np.ones(5, np.float32)}, "does not fit"),
    "too large": (
        {"adapter.lora.alpha": 1e9},
        {"w.lora_a": HALF, "w.lora_b": np.ones((4, 2), np.float32)},
        "too large for float16",
    ),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_adapter_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    metadata, tensors, message = WRONG_ADAPTERS[case]
    write_typed(tmp_path / "base.gguf", [])
    adapter = write_lora(tmp_path / "ask.gguf", dict(metadata), **tensors)
    refuses(message, tmp_path / "base.gguf", adapter, tmp_path / "merged.gguf")


def test_adapter_of_another_file_is_refused_unless_unchecked(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    quantize(made / "base.gguf", other, "F16", 1)
    refuses("was trained on another file than", other, made / "ask.gguf", tmp_path / "merged.gguf")
    merge_adapter(other, made / "ask.gguf", tmp_path / "merged.gguf", check_base=False)
    apart = llama_logits(other, made / "ask.gguf")
    assert divergence(apart, llama_logits(tmp_path / "merged.gguf")) < 1e-3


DAMAGED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no base": (lambda base, _: base.unlink(), "cannot be opened"),
    "base cut short": (lambda base, _: cut(base), "cut short"),
    "a folder": (lambda base, _: (base.unlink(), base.mkdir()), "cannot be opened"),
    "no adapter": (lambda _, ask: ask.unlink(), "cannot be opened"),
    "adapter cut short": (lambda _, ask: cut(ask), "cut short"),
    "adapter of text": (lambda _, ask: ask.write_text("no adapter"), "no GGUF file"),
    "exchanged": (
        lambda base, ask: (base.rename(ask.with_name("x")), ask.rename(base), ask.with_name("x").rename(ask)),
        "is no model",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_missing_and_damaged_files_are_named(case: str, made: Path, tmp_path: Path) -> None:
    base = Path(shutil.copy(made / "base.gguf", tmp_path))
    adapter = Path(shutil.copy(made / "ask.gguf", tmp_path))
    damage, message = DAMAGED[case]
    damage(base, adapter)
    refuses(message, base, adapter, tmp_path / "merged.gguf")


def test_flipped_bytes_raise_a_model_error_or_nothing(made: Path, tmp_path: Path) -> None:
    whole, generator = (made / "base.gguf").read_bytes(), np.random.default_rng(0)
    path = tmp_path / "flipped.gguf"
    for position in generator.integers(0, 6000, size=500):
        path.write_bytes(whole[:position] + generator.bytes(1) + whole[position + 1 :])
        with contextlib.suppress(ModelError):
            read_gguf(path)


def with_header(path: Path, *parts: bytes, tensors: int = 0, values: int = 0) -> Path:
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, tensors, values) + b"".join(parts) + bytes(64))
    return path


def named(name: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return named(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE: dict[str, tuple[dict[str, int], list[bytes]]] = {
    "a million dimensions": ({"tensors": 1}, [tensor(b"w", [2**63] * 1_000_000)]),
    "a tensor of nothing": ({"tensors": 1}, [tensor(b"w", [8, 0, 4])]),
    "part of a block": ({"tensors": 1}, [tensor(b"w", [33], kind=2)]),
    "a name that is two": ({"tensors": 2}, [tensor(b"w", [4]), tensor(b"w", [4])]),
    "a long name": ({"tensors": 1}, [tensor(b"w" * 64, [4])]),
    "a name of two lines": ({"tensors": 1}, [tensor(b"w\nv", [4])]),
    "a key that is two": ({"values": 2}, [named(b"k") + struct.pack("<IB", 0, 1)] * 2),
    "a huge alignment": ({"values": 1}, [named(b"general.alignment") + struct.pack("<II", 4, 2**31)]),
    "an alignment of no number": (
        {"values": 1},
        [named(b"general.alignment") + struct.pack("<IIQ", 9, 4, 0)],
    ),
    "more text than there is": ({"values": 1}, [struct.pack("<Q", 2**63)]),
    "more values than there are": ({"values": 2**63}, []),
    "an array too long": (
        {"values": 1},
        [named(b"k") + struct.pack("<IIQ", 9, 1, 65 * 2**20) + bytes(65 * 2**20)],
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_at_once(case: str, tmp_path: Path) -> None:
    counts, parts = HOSTILE[case]
    started = time.monotonic()
    with pytest.raises(ModelError, match="is no GGUF file, or damaged"):
        read_gguf(with_header(tmp_path / "hostile.gguf", *parts, **counts))
    assert time.monotonic() - started < 5


def test_values_of_another_type_count_as_none(tmp_path: Path) -> None:
    """An alpha of text, a name that is a number: what is there cannot be used, and nothing breaks over it."""
    write_typed(tmp_path / "base.gguf", [("general.name", 7, TYPE.UINT32, None)])
    adapter = write_lora(tmp_path / "ask.gguf", {"adapter.lora.alpha": "3", "general.name": 0.5})
    merge_adapter(tmp_path / "base.gguf", adapter, tmp_path / "merged.gguf")
    assert read_fields(tmp_path / "merged.gguf")["general.name"] == "base + ask"


def test_part_of_a_split_model_is_refused(made: Path, tmp_path: Path) -> None:
    write_typed(tmp_path / "base-00001-of-00002.gguf", [("split.count", 2, TYPE.UINT16, None)])
    part = tmp_path / "base-00001-of-00002.gguf"
    refuses("is one part of several", part, made / "ask.gguf", tmp_path / "merged.gguf")


def test_existing_target_is_replaced_by_force_alone(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged.gguf"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another name or pass --force"):
        merge(made, target)
    assert target.read_text() == "mine"
    assert read_fields(merge(made, target, force=True))["general.name"] == "Tiny Base + Ask"


def test_full_disk_is_one_error_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "merged.gguf.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        merge(made, tmp_path / "merged.gguf")
    assert not list(tmp_path.iterdir())


def write_real_lora(base: Path, path: Path) -> Path:
    """A random adapter for the attention and the downward projection of a real model."""
    generator, tensors = np.random.default_rng(0), {}
    for tensor in gguf.GGUFReader(base).tensors:
        if re.search(r"(attn_q|attn_v|ffn_down)\.weight", tensor.name):
            columns, rows = map(int, tensor.shape)
            down, up = generator.normal(size=(8, columns)), generator.normal(size=(rows, 8))
            tensors[f"{tensor.name}.lora_a"] = (down / columns**0.5).astype(np.float16)
            tensors[f"{tensor.name}.lora_b"] = (0.1 * up).astype(np.float16)
    return write_lora(path, {"adapter.lora.alpha": 8.0, "parrot.base.sha256": sha256_of(base)}, **tensors)


SCRIPT = """
import sys
from pathlib import Path
from parrot_edge.convert.files import read_gguf
from parrot_edge.convert.merge import merge_adapter
merge_adapter(*map(Path, sys.argv[1:]))
assert "torch" not in sys.modules
status = Path("/proc/self/status").read_text()  # ru_maxrss would know what the parent had before exec
print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


def test_real_model_is_merged_in_little_memory(embedded_model: Path, tmp_path: Path) -> None:
    adapter, merged = write_real_lora(embedded_model, tmp_path / "ask.gguf"), tmp_path / "merged.gguf"
    command = [sys.executable, "-c", SCRIPT, embedded_model, adapter, merged]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) < 1.5 * merged.stat().st_size
    plain = llama_logits(embedded_model)
    apart = llama_logits(embedded_model, adapter)
    # llama.cpp rounds activations to 8 bits over the base's Q4_1, and not over float16
    assert divergence(apart, llama_logits(merged)) < 0.05 * divergence(apart, plain)
    before, after = read_fields(embedded_model), read_fields(merged)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == {"general.name", "general.file_type"}


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "convert" / "merge_adapter.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)


def test_script_writes_what_the_function_does(made: Path, tmp_path: Path) -> None:
    wanted = merge(made, tmp_path / "one.gguf", scale=0.5).read_bytes()
    model = f"{made / 'base.gguf'}+{made / 'ask.gguf'}"
    done = run_script(model, "-o", tmp_path / "two.gguf", "--scale", "0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "two.gguf").read_bytes() == wanted


def test_script_says_one_sentence_and_exits_1(made: Path, tmp_path: Path) -> None:
    done = run_script(made / "base.gguf", "-o", tmp_path / "merged.gguf")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .*base.gguf has no adapter to merge; .*\n", done.stderr)
