"""Adapters as GGUF: llama.cpp says with them what peft says, and what it could not apply is refused."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")

import gguf
import llama_cpp.llama_cpp as C
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from tiny_gguf import (
    add_lora,
    cut,
    divergence,
    llama_logits,
    read_fields,
    read_llama,
    torch_logits,
    write_llama,
)
from tiny_models import make_llama

from parrot_edge.convert.adapter import write_adapter
from parrot_edge.engine.native import Model, quantize
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.store import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base.gguf (4 heads, 2 of keys and values) and a peft adapter for it in lora/."""
    folder = tmp_path_factory.mktemp("made")
    write_llama(make_llama(), folder / "base.gguf")
    add_lora(read_llama(folder / "base.gguf"), folder / "lora")
    return folder


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's folder, to be changed."""
    return Path(shutil.copytree(made / "lora", tmp_path / "lora"))


def convert(folder: Path, base: Path, target: Path, **options: Any) -> Path:
    write_adapter(folder, base, target, name="Tiny Ask", license_id="apache-2.0", **options)
    return target


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def describe(folder: Path, role: str, system_text: str | None) -> None:
    """Write what a training run leaves about its role, with a path that must not get out."""
    record = {"role": role, "recipe": {"data": {"system_text": system_text}}, "base": {"name": str(folder)}}
    (folder / "training.json").write_text(json.dumps(record))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_cpp_says_what_peft_says(kv_heads: int, tmp_path: Path) -> None:
    base = write_llama(make_llama(num_key_value_heads=kv_heads), tmp_path / "base.gguf")
    model = read_llama(base)
    plain = torch_logits(model)
    wanted = torch_logits(add_lora(model, tmp_path / "lora"))
    adapter = convert(tmp_path / "lora", base, tmp_path / "ask.gguf")
    assert divergence(plain, llama_logits(base)) < 1e-3
    assert divergence(wanted, llama_logits(base, adapter)) < 1e-3
    assert divergence(wanted, plain) > 1, "the adapter makes no difference to speak of"


def test_llama_cpp_says_what_peft_says_over_a_quantised_base(tmp_path: Path) -> None:
    quantize(write_llama(make_llama(), tmp_path / "full.gguf"), tmp_path / "base.gguf", "Q8_0", 1)
    model = read_llama(tmp_path / "base.gguf")
    wanted = torch_logits(add_lora(model, tmp_path / "lora"))
    adapter = convert(tmp_path / "lora", tmp_path / "base.gguf", tmp_path / "ask.gguf")
    # llama.cpp rounds activations to 8 bits over such a base: 7e-4 without and with the adapter
    assert divergence(wanted, llama_logits(tmp_path / "base.gguf", adapter)) < 2e-3


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"], "r": 2}, {"layers_to_transform": [1]}, {"use_rslora": True}],
)
def test_adapter_of_another_kind_is_converted(options: dict[str, Any], made: Path, tmp_path: Path) -> None:
    model = read_llama(made / "base.gguf")
    wanted = torch_logits(add_lora(model, tmp_path / "lora", **options))
    adapter = convert(tmp_path / "lora", made / "base.gguf", tmp_path / "ask.gguf")
    assert divergence(wanted, llama_logits(made / "base.gguf", adapter)) < 1e-3


def test_bfloat16_adapter_is_converted(made: Path, lora: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = {
        key: values.bfloat16() for key, values in load_file(lora / "adapter_model.safetensors").items()
    }
    save_file(weights, lora / "adapter_model.safetensors")
    convert(lora, made / "base.gguf", tmp_path / "ask.gguf")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "ask.gguf").tensors}
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert np.array_equal(written["blk.1.ffn_down.weight.lora_b"], weights[key].to(torch.float16).numpy())


def test_metadata_tells_what_it_is_and_no_path(made: Path, lora: Path, tmp_path: Path) -> None:
    describe(lora, "ask", "You are curious.")
    adapter = convert(lora, made / "base.gguf", tmp_path / "ask.gguf")
    assert read_fields(adapter) == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "Tiny Ask",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny Base",
        "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
        "parrot.base.sha256": sha256_of(made / "base.gguf"),
        "parrot.role": "ask",
        "parrot.system": "You are curious.",
    }
    assert str(tmp_path.parent).encode() not in adapter.read_bytes()
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(adapter).tensors} == {"F16"}
    assert not list(tmp_path.glob("*.partial"))


def test_role_without_system_text_names_none(made: Path, lora: Path, tmp_path: Path) -> None:
    describe(lora, "chat", None)
    metadata = read_fields(convert(lora, made / "base.gguf", tmp_path / "chat.gguf"))
    assert metadata["parrot.role"] == "chat"
    assert "parrot.system" not in metadata


def test_activated_adapter_keeps_its_invocation(made: Path, lora: Path, tmp_path: Path) -> None:
    change(lora / "adapter_config.json", alora_invocation_tokens=[1, 4093, 198])
    convert(lora, made / "base.gguf", tmp_path / "ask.gguf")
    with Model(made / "base.gguf") as model:
        adapter = model.load_adapter(tmp_path / "ask.gguf")
        count = C.llama_adapter_get_alora_n_invocation_tokens(adapter.pointer)
        tokens = C.llama_adapter_get_alora_invocation_tokens(adapter.pointer)
        assert ctypes.cast(tokens, ctypes.POINTER(C.llama_token))[:count] == [1, 4093, 198]


def test_plain_adapter_has_no_invocation(made: Path, tmp_path: Path) -> None:
    convert(made / "lora", made / "base.gguf", tmp_path / "ask.gguf")
    with Model(made / "base.gguf") as model:
        adapter = model.load_adapter(tmp_path / "ask.gguf")
        assert C.llama_adapter_get_alora_n_invocation_tokens(adapter.pointer) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"lora_alpha": 0}, "lora_alpha above 0"),
        ({"r": "4"}, "rank"),
        ({"r": 8}, "at rank 8"),
        ({"alora_invocation_tokens": []}, "no list of token ids"),
        ({"alora_invocation_tokens": ["<s>"]}, "no list of token ids"),
    ],
)
def test_configuration_that_llama_cpp_cannot_apply_is_refused(
    values: dict[str, Any], message: str, made: Path, lora: Path, tmp_path: Path
) -> None:
    change(lora / "adapter_config.json", **values)
    refuses(message, lora, made / "base.gguf", tmp_path / "ask.gguf")


def rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(weights: dict[str, np.ndarray]) -> None:
        for key in [key for key in weights if old in key]:
            weights[key.replace(old, new)] = weights.pop(key)

    return apply


def put(key: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(weights: dict[str, np.ndarray]) -> None:
        weights[FIRST + key] = value(weights[FIRST + key])

    return apply


FIRST = "base_model.model.model.layers.0."
WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "a layer too many": (rename("layers.1.", "layers.2."), "has no place in this base"),
    "an unknown module": (rename("mlp.up_proj", "mlp.side_proj"), "has no place in this base"),
    "embeddings": (rename("layers.1.mlp.up_proj", "embed_tokens"), "has no place in this base"),
    "whole weights": (rename("self_attn.v_proj.lora_B", "self_attn.v_proj"), "no part of a LoRA"),
    "half a pair": (lambda weights: weights.pop(f"{FIRST}mlp.up_proj.lora_A.weight"), "only half"),
    "other columns": (put("mlp.up_proj.lora_A.weight", lambda a: a[:, :32].copy()), "the base has"),
    "other rows": (put("mlp.up_proj.lora_B.weight", lambda b: b[:64].copy()), "the base has"),
    "another rank": (put("mlp.up_proj.lora_B.weight", lambda b: b[:, :2].copy()), "at rank 4"),
    "one dimension": (put("mlp.up_proj.lora_A.weight", lambda a: a.ravel()), "at rank 4"),
    "not a number": (put("mlp.up_proj.lora_A.weight", lambda a: a * np.float32("nan")), "none or too large"),
    "too large": (put("self_attn.q_proj.lora_B.weight", lambda b: b * np.float32(1e9)), "none or too large"),
    "integers": (put("mlp.up_proj.lora_A.weight", lambda a: a.astype(np.int32)), "of type I32"),
    "nothing": (dict.clear, "no tensors"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused(case: str, made: Path, lora: Path, tmp_path: Path) -> None:
    damage, message = WRONG_TENSORS[case]
    weights = load_file(lora / "adapter_model.safetensors")
    damage(weights)
    save_file(weights, lora / "adapter_model.safetensors")
    refuses(message, lora, made / "base.gguf", tmp_path / "ask.gguf")


DAMAGED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no weights": (lambda lora, _: (lora / "adapter_model.safetensors").unlink(), "cannot be read"),
    "weights cut short": (lambda lora, _: cut(lora / "adapter_model.safetensors"), "cut short"),
    "empty weights": (lambda lora, _: (lora / "adapter_model.safetensors").write_bytes(b""), "damaged"),
    "no configuration": (lambda lora, _: (lora / "adapter_config.json").unlink(), "cannot be read"),
    "configuration cut short": (lambda lora, _: cut(lora / "adapter_config.json"), "is no JSON object"),
    "a list": (lambda lora, _: (lora / "adapter_config.json").write_text("[]"), "no JSON object"),
    "bytes": (lambda lora, _: (lora / "adapter_config.json").write_bytes(b"\xff\xfe{"), "is no JSON object"),
    "record without a role": (lambda lora, _: (lora / "training.json").write_text("{}"), "tells no role"),
    "record of lists": (
        lambda lora, _: (lora / "training.json").write_text('{"role": "ask", "recipe": []}'),
        "tells no role",
    ),
    "no folder": (lambda lora, _: shutil.rmtree(lora), "cannot be read"),
    "no base": (lambda _, base: base.unlink(), "cannot be opened"),
    "base cut short": (lambda _, base: cut(base), "cut short"),
    "empty base": (lambda _, base: base.write_bytes(b""), "no GGUF file"),
    "base of text": (lambda _, base: base.write_text("no model at all\n" * 9), "no GGUF file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_missing_and_damaged_files_are_named(case: str, made: Path, lora: Path, tmp_path: Path) -> None:
    base = Path(shutil.copy(made / "base.gguf", tmp_path / "base.gguf"))
    damage, message = DAMAGED[case]
    damage(lora, base)
    refuses(message, lora, base, tmp_path / "ask.gguf")


def test_base_of_another_architecture_is_refused(made: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma")
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses("of architecture 'gemma'", made / "lora", tmp_path / "other.gguf", tmp_path / "ask.gguf")


def test_adapter_of_another_shape_of_base_is_refused(made: Path, tmp_path: Path) -> None:
    other = write_llama(make_llama(num_key_value_heads=1), tmp_path / "other.gguf")
    refuses("take the base", made / "lora", other, tmp_path / "ask.gguf")


def refuses(message: str, folder: Path, base: Path, target: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        convert(folder, base, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not list(target.parent.glob("*.partial"))


def test_existing_target_is_replaced_by_force_alone(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "ask.gguf"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another name or pass --force"):
        convert(made / "lora", made / "base.gguf", target)
    assert target.read_text() == "mine"
    convert(made / "lora", made / "base.gguf", target, force=True)
    assert read_fields(target)["general.type"] == "adapter"


def test_refused_replacement_leaves_the_target(made: Path, lora: Path, tmp_path: Path) -> None:
    target = tmp_path / "ask.gguf"
    target.write_text("mine")
    change(lora / "adapter_config.json", use_dora=True)
    with pytest.raises(ModelError):
        convert(lora, made / "base.gguf", target, force=True)
    assert target.read_text() == "mine"


def test_full_disk_is_one_error_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.gguf.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        convert(made / "lora", made / "base.gguf", tmp_path / "ask.gguf")
    assert not list(tmp_path.iterdir())


def test_folder_that_is_not_there_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        convert(made / "lora", made / "base.gguf", tmp_path / "nowhere" / "ask.gguf")


@pytest.mark.parametrize("library", ["gguf", "safetensors"])
def test_missing_library_is_named(
    library: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"needs {library}; run pip install 'parrot-edge\[convert\]'"):
        convert(made / "lora", made / "base.gguf", tmp_path / "ask.gguf")


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "convert" / "adapter_to_gguf.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)


def test_script_writes_what_the_function_does(made: Path, tmp_path: Path) -> None:
    wanted = convert(made / "lora", made / "base.gguf", tmp_path / "one.gguf").read_bytes()
    arguments = ["--name", "Tiny Ask", "--license", "apache-2.0"]
    done = run_script(made / "lora", made / "base.gguf", "-o", tmp_path / "two.gguf", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "two.gguf").read_bytes() == wanted


def test_script_says_one_sentence_and_exits_1(made: Path, tmp_path: Path) -> None:
    done = run_script(tmp_path, made / "base.gguf", "-o", tmp_path / "ask.gguf", "--license", "mit")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: .*adapter_config.json cannot be read: .*\n", done.stderr)
