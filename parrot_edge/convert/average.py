"""The mean of several trained adapters, as one adapter.

The mean of weights that were fine-tuned in several runs is often better than any of them (model soups,
arXiv 2203.05482). Here it is the mean of what the adapters add to a base, their products B A.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.convert.adapter import (
    WEIGHTS,
    Update,
    read_config,
    read_object,
    read_updates,
    scaled_alpha,
)
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.store import refuse_existing, sha256_of, write_json

_CONFIG, _RECIPE, _RECORD = "adapter_config.json", "recipe.yaml", "training.json"
_SHARED = ("role", "base", "prompt", "invocation", "dtype")  # of the record


def average_adapters(
    folders: Sequence[Path], target: Path, *, scale: float = 1.0, force: bool = False
) -> float:
    """Write `scale` times the mean of the peft LoRAs in `folders` as the folder `target`.

    It has the rank of the first: of the mean, whose rank may be the sum of theirs, what has the largest
    singular values. Configuration and recipe are the first one's too, and `training.json` tells of each
    how it was trained, as `mean_of`. A `scale` below 1 takes back what runs over little text overshoot.

    Returns which share of the mean's sum of squares this rank holds, above 0 and up to 1. Raises
    `UsageError` for fewer than two folders, `OutputError` where `target` exists without `force` or cannot
    be written, and `ModelError` where an adapter is damaged, no LoRA, or does not belong with the first.
    """
    if len(folders) < 2:
        raise UsageError("a mean takes two adapters or more; name their folders")
    refuse_existing(target, force=force)
    members = [_Member.read(folder) for folder in folders]
    first = members[0]
    for other in members[1:]:
        _refuse_stranger(first, other)
    rank, mean = first.config["r"], dict[str, Update]()
    kept = whole = 0.0
    for module in first.updates:
        pairs = ((down, member.scale * up) for member in members for down, up in (member.updates[module],))
        (down, up), sizes = average_updates(pairs, rank)
        mean[module] = (down, up * scale / first.scale)
        kept += float(np.sum(sizes[:rank] ** 2))
        whole += float(np.sum(sizes**2))
    _write(members, mean, scale, target)
    return kept / whole if whole else 1.0


def average_updates(updates: Iterable[Update], rank: int) -> tuple[Update, np.ndarray]:
    """The mean of products B A as one such pair of `rank`, and the singular values of the whole mean.

    Each is given as A (r, in) and B (out, r). Of all of that rank the pair is the nearest to the mean
    (Eckart and Young 1936); the singular values fall. No matrix (out, in) is made. Float64.

    >>> one, other = np.eye(2)[:, :1], np.eye(2)[:, 1:]
    >>> (down, up), sizes = average_updates([(one.T, 4 * one), (other.T, 2 * other)], 1)
    >>> (up @ down).round(6).tolist(), sizes.round(6).tolist()
    ([[2.0, 0.0], [0.0, 0.0]], [2.0, 1.0])
    """
    downs, ups = zip(*updates, strict=True)
    right, lower = np.linalg.qr(np.concatenate(downs, dtype=np.float64).T)
    left, upper = np.linalg.qr(np.concatenate(ups, axis=1, dtype=np.float64) / len(ups))
    inner, sizes, outer = np.linalg.svd(upper @ lower.T, full_matrices=False)
    root = np.sqrt(sizes[:rank])
    missing = (0, rank - len(root))  # of a matrix with fewer rows or columns than that
    down = np.pad(root[:, None] * (outer[:rank] @ right.T), (missing, (0, 0)))
    up = np.pad((left @ inner[:, :rank]) * root, ((0, 0), missing))
    return (down, up), sizes


@dataclass(frozen=True)
class _Member:
    """An adapter of the mean; `record` is what `training.json` holds, {} where there is none."""

    folder: Path
    config: dict[str, Any]
    updates: dict[str, Update]
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Member:
        config, path = read_config(folder), folder / _RECORD
        record = read_object(path, "copy or save the adapter again") if path.exists() else {}
        return cls(folder, config, read_updates(folder, config["r"]), record)

    @property
    def scale(self) -> float:
        """What peft multiplies B A by."""
        return scaled_alpha(self.config) / self.config["r"]


def _refuse_stranger(first: _Member, other: _Member) -> None:
    """Raise `ModelError` where `other` changes another model than `first`, or for another purpose."""
    differs = ""
    for key in _SHARED:
        if first.record.get(key) != other.record.get(key):
            differs = key
    if first.config.get("alora_invocation_tokens") != other.config.get("alora_invocation_tokens"):
        differs = "invocation"
    shapes = [
        {module: (up.shape[0], down.shape[1]) for module, (down, up) in member.updates.items()}
        for member in (first, other)
    ]
    if shapes[0] != shapes[1]:
        differs = "set of modules"
    if differs:
        raise ModelError(
            f"{other.folder} has another {differs} than {first.folder}; average adapters of one role that "
            "were trained over one base"
        )


def _write(members: Sequence[_Member], mean: dict[str, Update], scale: float, target: Path) -> None:
    """Leave the folder whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    first, draft = members[0], target.with_name(target.name + ".partial")
    tensors = {
        f"{module}.lora_{half}.weight": np.ascontiguousarray(values, np.float32)
        for module, update in mean.items()
        for half, values in zip("AB", update, strict=True)
    }
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        for name in (_CONFIG, _RECIPE):
            if (first.folder / name).exists():
                shutil.copyfile(first.folder / name, draft / name)
        if first.record:
            members_of = [
                {"sha256": sha256_of(member.folder / WEIGHTS), **member.record} for member in members
            ]
            shared = {key: first.record[key] for key in (*_SHARED, "recipe") if key in first.record}
            write_json(draft / _RECORD, {**shared, "mean_of": members_of, "scale": scale})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(draft, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{target} cannot be written: {reason}; free some space or name another place"
        ) from None
