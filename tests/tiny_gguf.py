"""Tiny random llamas as GGUF, their adapters, and what llama.cpp and torch say to the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.engine.native import Context, ContextShape, Model

TOKENS = [(7 * i * i + 3 * i + 1) % 96 for i in range(48)]
MODULES = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]


def write_llama(model: Any, path: Path, tokenizer: Any = None, **metadata: str) -> Path:
    """A `LlamaForCausalLM` as llama.cpp has it, in float32; without a tokenizer of `tiny_models` its
    vocabulary is a word for each token."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Base")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    if tokenizer is None:
        writer.add_token_list([f"w{index}é" for index in range(config.vocab_size)])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_merges(["w 1", "w 2"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages }}")
    else:
        special = set(tokenizer.all_special_tokens)
        tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_chat_template(tokenizer.chat_template)
    for key, text in metadata.items():
        writer.add_string(key, text)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, values in model.state_dict().items():
        array = values.float().numpy()
        for module, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if module in key:  # as LlamaModel.permute in llama.cpp's converter has it
                halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(f"{names.get_name(key.removesuffix('.weight'))}.weight", array)
    finish(writer)
    return path


def write_random(path: Path, *, width: int = 64, hidden: int = 96, experts: int = 0) -> Path:
    """A random llama of one block and 96 tokens, made without torch; of its experts two are used."""
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(width // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{index}é" for index in range(96)])
    writer.add_token_types([1] * 96)
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    kind, outer = ("_exps", (experts,)) if experts else ("", ())
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("token_embd", "output"), (96, width)),
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (width,)),
        **{f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")},
        **({"blk.0.ffn_gate_inp": (experts, width)} if experts else {}),
        **{f"blk.0.ffn_{name}{kind}": (*outer, hidden, width) for name in ("gate", "up")},
        f"blk.0.ffn_down{kind}": (*outer, width, hidden),
    }
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(size=shape) / width**0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    finish(writer)
    return path


def write_lora(path: Path, metadata: dict[str, Any], **tensors: np.ndarray) -> Path:
    """An adapter of rank 2 for the matrix `w`, all ones, without alpha; or with other tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **metadata}.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    ones = {"a": np.full((2, 8), 2.0, np.float32), "b": np.ones((4, 2), np.float32)}
    for key, values in (tensors or {f"w.lora_{half}": values for half, values in ones.items()}).items():
        writer.add_tensor(key, values)
    finish(writer)
    return path


def finish(writer: Any) -> None:
    """Write what a `GGUFWriter` was told."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_fields(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def cut(path: Path) -> None:
    """Take the last third of a file away."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def read_llama(path: Path) -> Any:
    """A GGUF as training loads it: dequantised, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()


def add_lora(model: Any, folder: Path, *, seed: int = 1, **options: Any) -> Any:
    """A random LoRA over `model`, saved into `folder` as peft does; returns the adapted model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": MODULES, "init_lora_weights": False, **options}
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def torch_logits(model: Any) -> np.ndarray:
    """Logits at each of TOKENS: float64 (T, V)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def llama_logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    """The same from llama.cpp, with an adapter or none."""
    shape = ContextShape(sequences=1, tokens=256, threads=1, batch=64, outputs=len(TOKENS))
    with (
        Model(path) as model,
        Context(model, shape, model.load_adapter(adapter) if adapter else None) as context,
    ):
        indices = context.decode([(0, 0, TOKENS, len(TOKENS))])
        return np.array([context.logits(index) for index in indices], np.float64)


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    """The largest KL divergence, over the positions, of what `other` says from what `one` says; in nats."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(one), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).max())
