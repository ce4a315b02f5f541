"""A model in fewer bits: every file type that llama.cpp writes, and what became of each matrix."""

from __future__ import annotations

import difflib
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parrot_edge.convert.files import GgufFile, read_gguf
from parrot_edge.convert.imatrix import check_imatrix, read_imatrix
from parrot_edge.engine import quantizer
from parrot_edge.engine.native import file_types, tensor_kinds, tensor_types
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.machine import format_bytes, inspect_machine
from parrot_edge.store import refuse_existing

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Names that llama-quantize takes beside those of `file_types`."""

NEEDS_IMATRIX = frozenset(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
)
"""Types that llama.cpp does not write without an importance matrix: what came out would babble."""

_PLAIN = ("F32", "F16", "BF16")
_MIXES = {"IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "MXFP4"}
"""The type of most matrices, for those files that are not named after it."""

_MIXED = 1.2  # a mix gives some matrices more bits than most have
_SURE = "Q8_0"  # the largest of the quantised types, which outputs and odd rows get at most


@dataclass(frozen=True)
class Quantized:
    """What a quantised file holds.

    type             as llama-quantize names it
    bytes            size of the file
    bits_per_weight  over all tensors
    tensors          how many are of each type
    fallbacks        how many matrices could not be of the type asked for, because their rows do not divide
                     into its blocks, by the type that they are of instead
    matrices         how many there are
    block            numbers of a row that the type keeps together
    imatrix          whether an importance matrix was used
    seconds          that it took
    """

    type: str
    bytes: int
    bits_per_weight: float
    tensors: dict[str, int]
    fallbacks: dict[str, int]
    matrices: int
    block: int
    imatrix: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @property
    def note(self) -> str:
        """What is to be said of matrices that fell back, as a sentence; "" where none did."""
        return _say_fallbacks(self.type, self.block, self.fallbacks, self.matrices)


def parse_type(text: str) -> str:
    """A file type by the name that llama-quantize has for it, in any case; raises `UsageError`.

    >>> parse_type("q4_k_m"), parse_type("Q4_K")
    ('Q4_K_M', 'Q4_K_M')
    """
    name = ALIASES.get(text.upper(), text.upper())
    if name in file_types():
        return name
    near = difflib.get_close_matches(name, file_types(), n=1)
    hint = f"the nearest is {near[0]}" if near else "Q8_0, Q4_K_M and F16 are some"
    raise UsageError(f"{text} is no file type of llama.cpp; {hint}")


def quantize(
    source: Path,
    target: Path,
    type_name: str,
    *,
    imatrix: Path | None = None,
    threads: int | None = None,
    force: bool = False,
) -> Quantized:
    """Write the 16- or 32-bit GGUF `source` as `target`, of a type that `parse_type` knows.

    `imatrix` is an importance matrix of the same model. The target appears whole or not at all. Raises
    `UsageError` for a type that there is not or that needs an importance matrix, and for a matrix of
    another model; `ModelError` for a source that is damaged, no model or quantised already;
    `OutputError` where the target exists without `force`, or has no room.
    """
    type_name = parse_type(type_name)
    refuse_existing(target, force=force)
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the source itself; name another output")
    if type_name in NEEDS_IMATRIX and imatrix is None:
        raise UsageError(
            f"{type_name} needs an importance matrix, or the model would babble; give dialogues to make it"
        )
    model = read_gguf(source)
    _check_source(model, source)
    matrix = read_imatrix(imatrix) if imatrix else None
    if matrix is not None and imatrix is not None:
        check_imatrix(matrix, model, source)
    _check_space(target, estimate_bytes(model, source, type_name), type_name)
    importance = {name: each.means for name, each in matrix.tensors.items()} if matrix else None
    notes: dict[str, int | str] = {}
    if matrix is not None and imatrix is not None:  # as llama-quantize notes it, without folders
        notes["quantize.imatrix.file"] = imatrix.name
        notes["quantize.imatrix.entries_count"] = len(matrix.tensors)
        if matrix.datasets:
            notes["quantize.imatrix.dataset"] = ", ".join(Path(name).name for name in matrix.datasets)
    start = time.monotonic()
    cores = threads or inspect_machine().cores
    quantizer.quantize(source, target, type_name, cores, importance=importance, notes=notes)
    return _describe(model, target, type_name, matrix is not None, time.monotonic() - start)


def main_type(type_name: str) -> str:
    """The type of most matrices in a file of a type.

    >>> main_type("Q4_K_M"), main_type("IQ3_XS"), main_type("Q8_0")
    ('Q4_K', 'IQ3_S', 'Q8_0')
    """
    return _MIXES.get(type_name, re.sub(r"(_K)_[SML]$", r"\1", type_name))


def estimate_bytes(model: GgufFile, source: Path, type_name: str) -> int:
    """About how large a model's file of a type will be, rather too large than too small."""
    kinds = {kind.name: kind for kind in tensor_kinds()}
    kind, sure = kinds[main_type(type_name)], kinds[_SURE]
    header = source.stat().st_size - sum(tensor.data.nbytes for tensor in model.tensors.values())
    total = float(max(0, header))
    for name, tensor in model.tensors.items():
        bits = tensor.data.nbytes * 8 / math.prod(tensor.shape)
        if len(tensor.shape) > 1 and type_name != "F32":
            wanted = kind.bytes * 8 / kind.block
            if kind.block > 1:
                odd = tensor.shape[-1] % kind.block or name in ("token_embd.weight", "output.weight")
                odd = odd or (type_name == "MXFP4_MOE" and len(tensor.shape) == 2)  # experts alone are MXFP4
                wanted = max(wanted * _MIXED, sure.bytes * 8 / sure.block if odd else 0)
                wanted = 16 if tensor.shape[-1] % sure.block else wanted
            bits = wanted
        elif len(tensor.shape) > 1:
            bits = 32
        total += math.prod(tensor.shape) * bits / 8 + model.alignment
    return int(total)


def _check_source(model: GgufFile, source: Path) -> None:
    if model.get("general.architecture") is None or model.get("general.type", "model") != "model":
        raise ModelError(f"{source} is no model; name the merged model, or the base")
    quantized = Counter(tensor.type.name for tensor in model.tensors.values() if len(tensor.shape) > 1)
    kind = next((name for name, _ in quantized.most_common() if name not in _PLAIN), None)
    if kind is not None:
        raise ModelError(
            f"{source} is quantised already ({kind}), and what that lost would be lost twice; name the "
            "16-bit file that it was made from"
        )


def _check_space(target: Path, needed: int, type_name: str) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is no folder; make it or name another place")
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(
            f"{target} needs about {format_bytes(needed)} as {type_name}, {format_bytes(free)} of disk is "
            "left; free some space or name another place"
        )


def _describe(model: GgufFile, target: Path, type_name: str, imatrix: bool, seconds: float) -> Quantized:
    """What was written, by comparing the types of the tensors with what was asked for."""
    kinds = {kind.name: kind for kind in tensor_kinds()}
    types = tensor_types(target)
    sizes = {name: math.prod(tensor.shape) for name, tensor in model.tensors.items()}
    bits = sum(sizes[name] * 8 * kinds[kind].bytes / kinds[kind].block for name, kind in types.items())
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    return Quantized(
        type=type_name,
        bytes=target.stat().st_size,
        bits_per_weight=round(bits / sum(sizes.values()), 3),
        tensors=dict(Counter(types.values()).most_common()),
        fallbacks=_find_fallbacks(shapes, types, type_name),
        matrices=sum(len(shape) > 1 for shape in shapes.values()),
        block=kinds[main_type(type_name)].block,
        imatrix=imatrix,
        seconds=round(seconds, 2),
    )


def note_fallbacks(model: GgufFile, type_name: str) -> str:
    """`Quantized.note` of a file that was written before, or by another program; "" for no known type."""
    if type_name not in file_types():
        return ""
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    types = {name: tensor.type.name for name, tensor in model.tensors.items()}
    block = next(kind.block for kind in tensor_kinds() if kind.name == main_type(type_name))
    matrices = sum(len(shape) > 1 for shape in shapes.values())
    return _say_fallbacks(type_name, block, _find_fallbacks(shapes, types, type_name), matrices)


def _find_fallbacks(
    shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], type_name: str
) -> dict[str, int]:
    """How many matrices a type could not be given to, by the type that they have instead."""
    block = next(kind.block for kind in tensor_kinds() if kind.name == main_type(type_name))
    odd = [name for name, shape in shapes.items() if len(shape) > 1 and shape[-1] % block]
    return dict(Counter(types[name] for name in odd if types[name] != "F32").most_common())


def _say_fallbacks(type_name: str, block: int, fallbacks: Mapping[str, int], matrices: int) -> str:
    if not fallbacks:
        return ""
    instead = ", ".join(f"{number} {name}" for name, number in fallbacks.items())
    return (
        f"{sum(fallbacks.values())} of {matrices} matrices have rows that do not divide by the {block} of "
        f"{type_name} and are of another type: {instead}"
    )
