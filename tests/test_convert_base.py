"""Six architectures go from adapter to GGUF to llama.cpp, and say there what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")
pytest.importorskip("sentencepiece")

from tiny_bases import ARCHITECTURES, make_base
from tiny_gguf import add_lora, divergence, llama_logits, read_fields, torch_logits

from parrot_edge.convert.base import write_base, write_lora
from parrot_edge.convert.merge import merge_adapter
from parrot_edge.convert.trained import find_trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("toolkit"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_says_what_transformers_says(architecture: str, tmp_path: Path) -> None:
    model = make_base(tmp_path / "tiny", architecture)
    plain = torch_logits(model)
    wanted = torch_logits(add_lora(model, tmp_path / "lora", target_modules="all-linear"))
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
