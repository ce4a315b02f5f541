"""A peft LoRA as a GGUF that llama.cpp applies to its base at run time, or merges into it.

Knows the Llama layout (what transformers calls LlamaForCausalLM or MistralForCausalLM and llama.cpp
"llama"), whose query and key rows llama.cpp keeps in another order than transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.convert.files import BASE_SHA256_KEY, GgufFile, import_gguf, read_gguf, write_gguf
from parrot_edge.engine.base import INVOCATION_KEY
from parrot_edge.errors import ModelError, UsageError, shorten
from parrot_edge.roles import ROLE_KEY, SYSTEM_KEY
from parrot_edge.store import parse_json, sha256_of

WEIGHTS = "adapter_model.safetensors"
_UNKNOWN_TO_LLAMA_CPP = (
    *("use_dora", "use_qalora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # what these start from is not the base

Update = tuple[np.ndarray, np.ndarray]
"""What an adapter adds to a module, as its two factors: A (rank, in) and B (out, rank)."""


def write_adapter(
    folder: Path, base: Path, target: Path, *, name: str, license_id: str, force: bool = False
) -> None:
    """Write the peft LoRA in `folder`, trained on the GGUF `base`, as the GGUF `target`, in float16.

    `training.json` in the folder, where there is one, tells its role and its fixed system text, which
    go into the metadata with `name`, the SPDX `license_id` ("" for none) and the base's name and hash.
    An activated LoRA (arXiv 2504.12397) keeps its invocation tokens. Raises `OutputError` where
    `target` exists without `force` or cannot be written, and `ModelError` where the adapter is
    damaged, no LoRA for this base, or of a kind that llama.cpp cannot apply.
    """
    with write_gguf(target, "llama", force=force) as writer:
        config = read_config(folder)
        updates = read_updates(folder, config["r"])
        source = read_gguf(base)
        architecture = source.get("general.architecture", kind=str)
        if architecture != "llama":
            raise ModelError(
                f"{base} is of architecture {shorten(architecture)}; only llama adapters are converted"
            )
        writer.add_type("adapter")
        writer.add_name(name)
        if license_id:
            writer.add_license(license_id)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, source.get("general.name", base.stem, str))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", scaled_alpha(config))
        if config.get("alora_invocation_tokens") is not None:
            types = import_gguf().GGUFValueType
            writer.add_key_value(
                INVOCATION_KEY,
                config["alora_invocation_tokens"],
                types.ARRAY,
                types.UINT32,
            )
        writer.add_string(BASE_SHA256_KEY, sha256_of(base))
        for key, text in describe_role(folder).items():
            writer.add_string(key, text)
        for tensor, values in _to_llama_cpp(updates, source, folder):
            writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_config(folder: Path) -> dict[str, Any]:
    """peft's configuration of a plain or activated LoRA; raises `ModelError` for any other kind."""
    path = folder / "adapter_config.json"
    config = read_object(path, "name a folder that peft saved, or save the adapter again")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path} describes no LoRA (peft_type {config.get('peft_type')}); train a LoRA")
    for key in _UNKNOWN_TO_LLAMA_CPP:
        if config.get(key):
            raise ModelError(f"{path} has {key}, which llama.cpp cannot apply; train a LoRA without it")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise ModelError(
            f"{path} was started with {start}, which changes the base too; save it as a plain LoRA "
            "(path_initial_model_for_weight_conversion in peft)"
        )
    rank, alpha, tokens = (config.get(key) for key in ("r", "lora_alpha", "alora_invocation_tokens"))
    if not _is_count(rank) or not rank or not isinstance(alpha, int | float) or not alpha > 0:
        raise ModelError(f"{path} has no rank and lora_alpha above 0; the adapter is damaged, save it again")
    if tokens is not None and not (isinstance(tokens, list) and tokens and all(map(_is_count, tokens))):
        raise ModelError(f"{path}: alora_invocation_tokens is no list of token ids; save the adapter again")
    return config


def scaled_alpha(config: Mapping[str, Any]) -> float:
    """What llama.cpp divides by the rank: rank-stabilised LoRA divides alpha by the rank's root instead.

    >>> scaled_alpha({"r": 16, "lora_alpha": 32, "use_rslora": True})
    128.0
    """
    return float(config["lora_alpha"]) * (config["r"] ** 0.5 if config.get("use_rslora") else 1)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def describe_role(folder: Path) -> dict[str, str]:
    """Metadata: the role that a run trained, and its system text if that was fixed; {} without a record."""
    path = folder / "training.json"
    if not path.exists():
        return {}
    record = read_object(path, "copy or save the adapter again")
    try:
        role, system = record["role"], record["recipe"]["data"]["system_text"]
    except (KeyError, TypeError):
        raise ModelError(f"{path} tells no role; remove it, or train again for an adapter with one") from None
    return {ROLE_KEY: role, **({SYSTEM_KEY: system} if system else {})}


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as they were saved; bfloat16 as float32."""
    try:
        from safetensors import SafetensorError, deserialize
    except ModuleNotFoundError:
        raise UsageError("converting needs safetensors; run pip install 'parrot-edge[convert]'") from None
    try:
        entries = dict(deserialize(path.read_bytes()))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; name a folder that peft saved") from None
    except SafetensorError:
        raise ModelError(f"{path} is damaged or cut short; copy or save the adapter again") from None
    weights = {}
    for key, entry in entries.items():
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16
            weights[key] = bits.view(np.float32).reshape(entry["shape"])
        elif entry["dtype"] in ("F16", "F32"):
            dtype = np.float16 if entry["dtype"] == "F16" else np.float32
            weights[key] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        else:
            raise ModelError(f"{path}: {key} is of type {entry['dtype']}; save it as float32")
    return weights


def read_updates(folder: Path, rank: int) -> dict[str, Update]:
    """What the adapter in a folder adds to each module, under peft's names: A (rank, in) and B (out, rank).

    Raises `ModelError` where that is damaged, or nothing.
    """
    path = folder / WEIGHTS
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, values in _read_weights(path).items():
        module, _, part = key.removesuffix(".weight").rpartition(".lora_")
        if part not in ("A", "B"):
            raise ModelError(f"{path}: {key} is no part of a LoRA; train a LoRA without it")
        halves.setdefault(module, {})[part] = values
    if not halves:
        raise ModelError(f"{path} holds no tensors; save the adapter again")
    for module, pair in halves.items():
        if len(pair) < 2:
            raise ModelError(f"{path} has only half of the update of {module}; save the adapter again")
        down, up = pair["A"], pair["B"]
        if (down.ndim, up.ndim) != (2, 2) or (down.shape[0], up.shape[1]) != (rank, rank):
            raise ModelError(
                f"{path} updates {module} by {up.shape} x {down.shape}, which is nothing at rank {rank}; "
                "save the adapter again"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(halves.items())}


def _to_llama_cpp(
    updates: Mapping[str, Update], base: GgufFile, folder: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names and row order: A is float16 (rank, in), B is float16 (out, rank)."""
    gguf = import_gguf()
    blocks, width, heads, head = (
        base.get(f"llama.{key}", 0, int)
        for key in ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
    )
    if not 0 < blocks <= len(base.tensors) or not (head or heads):
        raise ModelError(f"the base of {folder} tells no number of blocks and heads; fetch or make it again")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    head = head or width // heads
    for module, (down, up) in updates.items():
        tensor = f"{names.get_name(module.removeprefix('base_model.model.'))}.weight"
        if tensor not in base.tensors or tensor == "token_embd.weight":
            raise ModelError(
                f"{folder}: {module} has no place in this base; take the base that the adapter was trained on"
            )
        shape = base.tensors[tensor].shape
        if (up.shape[0], down.shape[1]) != shape:
            raise ModelError(
                f"{folder} updates {tensor} by {up.shape} x {down.shape}, and the base has {shape} there; "
                "take the base that the adapter was trained on"
            )
        if tensor.endswith(("attn_q.weight", "attn_k.weight")):
            up = _interleave(up, head)
        for suffix, values in (("a", down), ("b", up)):
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            if not np.isfinite(half).all():
                raise ModelError(
                    f"{folder} holds numbers for {tensor} that are none or too large for float16; "
                    "the training diverged, train again with a lower learning rate"
                )
            yield f"{tensor}.lora_{suffix}", half


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file; raises `ModelError`, which ends in `advice`, where there is none."""
    try:
        value = parse_json(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; {advice}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is no JSON object, so it is damaged; {advice}")
    return value


def _interleave(rows: np.ndarray, head: int) -> np.ndarray:
    """The two rotary halves of each head row by row in turn, as llama.cpp has them; (out, rank) stays.

    >>> _interleave(np.arange(8)[:, None], head=4).ravel().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.reshape(-1, 2, head // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
