"""Six architectures go from adapter to GGUF to llama.cpp, and say there what transformers says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")
pytest.importorskip("sentencepiece")

from tiny_bases import ARCHITECTURES, make_base
from tiny_gguf import add_lora, divergence, llama_logits, read_fields, torch_logits

from parrot_edge.convert.base import dequantize_base, write_base, write_lora
from parrot_edge.convert.merge import merge_adapter
from parrot_edge.convert.trained import TrainedFiles, find_trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("toolkit"),
]


def adapt(model: Any, folder: Path) -> Any:
    """A random LoRA on every linear layer, saved into `folder`."""
    is_turned = model.config.model_type == "gpt2"
    return add_lora(model, folder, target_modules="all-linear", fan_in_fan_out=is_turned)


def trained_in_4_bits(adapter: Path, base: Path) -> TrainedFiles:
    trained = find_trained(adapter, str(base))
    options = replace(trained.recipe.base, quantization="nf4")
    return replace(trained, recipe=replace(trained.recipe, base=options))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_says_what_transformers_says(architecture: str, tmp_path: Path) -> None:
    model = make_base(tmp_path / "tiny", architecture)
    plain = torch_logits(model)
    wanted = torch_logits(adapt(model, tmp_path / "lora"))
    trained = find_trained(tmp_path / "lora", str(tmp_path / "tiny"))
    base, lora, merged = (tmp_path / f"{name}.gguf" for name in ("base", "lora", "merged"))
    write_base(trained, base)
    write_lora(trained, base, lora)
    merge_adapter(base, lora, merged)

    assert divergence(plain, llama_logits(base)) < 1e-3
    assert divergence(wanted, llama_logits(base, lora)) < 1e-3
    assert divergence(wanted, llama_logits(merged)) < 1e-3
    assert divergence(wanted, plain) > 0.1, "the adapter makes no difference to speak of"
    told = read_fields(base) | read_fields(lora)
    assert not [value for value in told.values() if str(tmp_path) in str(value)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dequantised_base_is_what_the_4_bit_model_computes_with(architecture: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    adapt(make_base(tmp_path / "tiny", architecture, shard="100KB"), tmp_path / "lora")
    trained = trained_in_4_bits(tmp_path / "lora", tmp_path / "tiny")
    dequantize_base(trained, tmp_path / "tiny", tmp_path / "out")

    shards = sorted(path.name for path in (tmp_path / "tiny").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    written = {key: value for name in shards for key, value in load_file(tmp_path / "out" / name).items()}
    model, count = trained.load_base(), 0
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            held = dequantize_4bit(module.weight.data, module.weight.quant_state)
            found = written[f"{name}.weight"]
            assert found.equal(held.T if architecture == "gpt2" else held), name
            count += 1
    assert count == (8 if architecture == "gpt2" else 14)
    assert written.keys() == {key for name in shards for key in load_file(tmp_path / "tiny" / name)}
