"""A GGUF adapter merged into its GGUF base, with numpy alone: one float16 model that needs no adapter."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from parrot_edge.convert.files import (
    BASE_SHA256_KEY,
    GgufFile,
    Metadata,
    Tensor,
    add_metadata,
    import_gguf,
    read_gguf,
    write_gguf,
)
from parrot_edge.engine.base import INVOCATION_KEY
from parrot_edge.errors import ModelError, shorten
from parrot_edge.roles import ROLE_KEY, SYSTEM_KEY
from parrot_edge.store import sha256_of

_CHUNK = 2**22  # numbers that are expanded to float32 at a time, 16 MiB

Update = tuple[np.ndarray, np.ndarray]
"""What an adapter adds to a tensor, as two factors: float32 (rows, rank) and (rank, columns)."""


def merge_adapter(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    scale: float = 1.0,
    check_base: bool = True,
    metadata: Metadata = MappingProxyType({}),
    force: bool = False,
) -> None:
    """Write `base` with `scale` times `adapter` added to it as `target`, both being GGUF files.

    Matrices become float16, whatever they were; norms and other vectors stay as they are. The base's
    metadata is kept, but for the name, the file type, the role that the adapter was trained for, and
    what `metadata` sets.
    Memory: the two files, mapped, and the largest matrix in float16. Raises `OutputError` where
    `target` exists without `force` or cannot be written, and `ModelError` where a file is damaged, the
    adapter does not fit or is an activated one, or `check_base` and it was trained on another file.
    """
    model, lora = read_gguf(base), read_gguf(adapter)
    architecture = model.get("general.architecture", kind=str)
    if architecture is None or model.get("general.type", "model") != "model":
        raise ModelError(f"{base} is no model; name the base that the adapter was trained on")
    updates = _read_updates(lora, model, adapter, base, scale)
    if check_base and lora.get(BASE_SHA256_KEY) not in (None, sha256_of(base)):
        raise ModelError(
            f"{adapter} was trained on another file than {base} ({BASE_SHA256_KEY} differs); merge it into "
            "the one it was trained on"
        )
    names = ((model, base.stem), (lora, adapter.stem))
    name = " + ".join(file.get("general.name", stem, str) for file, stem in names)
    half = import_gguf().GGMLQuantizationType.F16
    with write_gguf(target, architecture, force=force) as writer:
        _write_metadata(writer, model, lora, name, metadata)
        for tensor in model.tensors.values():
            if len(tensor.shape) == 1:
                data = tensor.data[0]
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.type)
            else:
                size = 2 * math.prod(tensor.shape)
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float16), size, half)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in model.tensors.values():
            is_kept = len(tensor.shape) == 1 or (tensor.type == half and tensor.name not in updates)
            writer.write_tensor_data(
                tensor.data if is_kept else _merge(tensor, updates.get(tensor.name), base)
            )


def _read_updates(
    lora: GgufFile, model: GgufFile, adapter: Path, base: Path, scale: float
) -> dict[str, Update]:
    """What the adapter adds to each tensor of the base, as llama.cpp would at run time."""
    if lora.get("general.type") != "adapter" or lora.get("adapter.type") != "lora":
        raise ModelError(f"{adapter} is no LoRA adapter in GGUF form; convert the folder of one first")
    architectures = [file.get("general.architecture") for file in (lora, model)]
    if architectures[0] != architectures[1]:
        wanted, given = map(shorten, architectures)
        raise ModelError(f"{adapter} is for {wanted} models and {base} is a {given} one")
    if lora.get(INVOCATION_KEY):
        raise ModelError(
            f"{adapter} is an activated LoRA, which a merge would apply to what comes before its invocation "
            "too; run it as an adapter"
        )
    if not lora.tensors:
        raise ModelError(f"{adapter} holds no tensors; make the adapter again")
    alpha = lora.get("adapter.lora.alpha", 0.0, float)
    updates = dict[str, Update]()
    for name in sorted({name.removesuffix(".lora_a").removesuffix(".lora_b") for name in lora.tensors}):
        down, up = (lora.tensors.get(f"{name}.lora_{half}") for half in "ab")
        if down is None or up is None:
            raise ModelError(f"{adapter} has only half of an update of {name}; make the adapter again")
        rank, shape = down.shape[0], model.tensors[name].shape if name in model.tensors else ()
        if len(shape) != 2 or (up.shape, down.shape) != ((shape[0], rank), (rank, shape[1])):
            raise ModelError(
                f"{adapter} updates {name} by {up.shape} x {down.shape}, which does not fit {base}; take the "
                "base that it was trained on"
            )
        factor = scale * alpha / rank if alpha else scale  # llama.cpp's rule
        updates[name] = (np.float32(factor) * up.floats(), down.floats())
    return updates


def _write_metadata(writer: Any, model: GgufFile, lora: GgufFile, name: str, given: Metadata) -> None:
    """The base's metadata with what the adapter changes."""
    writer.data_alignment = model.alignment
    writer.add_name(name)
    writer.add_file_type(import_gguf().LlamaFileType.MOSTLY_F16)
    for key in (ROLE_KEY, SYSTEM_KEY):
        writer.add_string(key, lora.get(key, "", str))
    add_metadata(writer, given, model)


def _merge(tensor: Tensor, update: Update | None, base: Path) -> np.ndarray:
    """A tensor with what is added to it: float16, (rows, columns) with outer dimensions folded into rows.

    Raises `ModelError` where a number is too large for float16.
    """
    merged = np.empty((len(tensor.data), tensor.shape[-1]), np.float16)
    step = max(1, _CHUNK // merged.shape[1])
    for start in range(0, len(merged), step):
        rows = slice(start, start + step)
        values = tensor.floats(rows)
        if update is not None:
            up, down = update
            values = values + up[rows] @ down
        with np.errstate(over="ignore"):
            merged[rows] = values
        if not np.isfinite(merged[rows]).all():
            raise ModelError(f"{base} with the adapter has numbers in {tensor.name} too large for float16")
    return merged
