"""Tiny random bases of six architectures, each a folder as transformers saves it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from tiny_models import CORPUS, make_tokenizer

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 16},
    "mistral": {**_SIZES, "sliding_window": None},
    "gemma": {**_SIZES, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {**_SIZES, "sliding_window": None, "original_max_position_embeddings": 512},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "n_ctx": 512,
        "initializer_range": 0.15,
    },
}
"""transformers' configuration of each."""

ON_SENTENCEPIECE = ("gemma", "phi3")
"""Those that llama.cpp converts with a tokenizer.model alone."""


def make_base(folder: Path, architecture: str, *, shard: str = "1GB") -> Any:
    """Save a random model with its tokenizer; returns the model, in evaluation."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), **_TOKENS, **ARCHITECTURES[architecture]
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    if architecture in ON_SENTENCEPIECE:
        (folder / "tokenizer.model").write_bytes(_train_sentencepiece())
    return model


def _train_sentencepiece() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=318,
        control_symbols=[f"<spare-{number}>" for number in range(20)],  # whose ids the chat's tokens take
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()
