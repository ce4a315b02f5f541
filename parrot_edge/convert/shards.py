"""Safetensors files rewritten a tensor at a time, so that memory holds one tensor and not a shard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def rewrite_shard(source: Path, target: Path, change: Callable[[str, Any], Any], dtype: Any) -> None:
    """Write `target` with the tensors of `source`, each as `change(name, tensor)` makes it.

    A floating-point tensor must come back in the torch `dtype`, of 32 or 16 bits; any other as it was,
    and every one in its shape. The file is a header's length in eight bytes, the header as JSON, and the
    numbers (https://github.com/huggingface/safetensors#format). Raises `SafetensorError` where `source`
    is damaged and `OSError` where `target` cannot be written.
    """
    import torch
    from safetensors import safe_open

    with safe_open(source, "pt") as content, open(target, "wb") as file:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        names, end = list(content.keys()), 0
        for name in names:
            part = content.get_slice(name)
            kind, size = part.get_dtype(), math.prod(part.get_shape()) * dtype.itemsize
            if kind.startswith(("F", "BF")):
                kind = _NAMES[str(dtype)]
            else:
                size = content.get_tensor(name).nbytes
            header[name] = {"dtype": kind, "shape": part.get_shape(), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the numbers are to be aligned
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = change(name, content.get_tensor(name)).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy())
            del tensor  # not to be held beside the next one
