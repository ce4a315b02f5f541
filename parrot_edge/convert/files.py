"""GGUF files in and out: checked when read, whole or not there when written."""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parrot_edge.errors import ModelError, UsageError
from parrot_edge.store import new_file

Metadata = Mapping[str, tuple[Any, Any]]
"""Metadata to set: the name of a type, as `gguf.GGUFValueType` spells it, and a value; a list with the
name in it stands for an array of that type."""

BASE_SHA256_KEY = "parrot.base.sha256"
"""Metadata of an adapter: SHA-256 of the GGUF that it was trained on."""


def import_gguf() -> Any:
    """The module `gguf`; raises `UsageError` where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UsageError("converting needs gguf; run pip install 'parrot-edge[convert]'") from None
    return gguf


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: shape as numpy has it, (..., rows, columns); data uint8 (rows of all, bytes)."""

    name: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType, or a native.TensorKind that `gguf` does not know
    data: np.ndarray

    def floats(self, rows: slice = slice(None)) -> np.ndarray:
        """Some rows as float32 (rows, columns); raises `ModelError` where `gguf` cannot expand them."""
        try:
            return import_gguf().quants.dequantize(self.data[rows], self.type)
        except NotImplementedError:
            raise ModelError(f"{self.name} is of type {self.type.name}, which cannot be expanded") from None


@dataclass(frozen=True)
class Value:
    """A metadata value: type, type of an array's items (else None), and text as bytes."""

    type: int
    item: int | None
    raw: Any


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a GGUF; the tensors' data stay in the file, which is mapped."""

    metadata: dict[str, Value]
    tensors: dict[str, Tensor]
    alignment: int

    def get(self, key: str, default: Any = None, kind: type = object) -> Any:
        """A metadata value, text as str; one that is of another `kind` counts as not there."""
        value = self.metadata.get(key)
        raw = None if value is None else value.raw
        known = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
        return default if known is None or not isinstance(known, kind) else known


def read_gguf(path: Path) -> GgufFile:
    """The parts of a file; several times faster and smaller than `gguf.GGUFReader` makes them.

    Raises `ModelError` where the file is missing, no GGUF, cut short, or one part of several.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            source = _Cursor(content).read_file(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}; name a GGUF file") from None
    except (ValueError, LookupError, TypeError, ArithmeticError):  # what damage leads to
        raise ModelError(f"{path} is no GGUF file, or damaged or cut short; fetch or make it again") from None
    if source.get("split.count", 1) not in (0, 1):
        raise ModelError(f"{path} is one part of several; join them with llama-gguf-split --merge first")
    return source


_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LONGEST_HEADER = 64 * 2**20  # bytes: ten times a large vocabulary's, and numbers take ten times that here
_LONGEST_NAME = 63  # bytes of a tensor's, llama.cpp's limit as is the next
_MOST_DIMENSIONS = 4
_ALIGNMENTS = frozenset(2**power for power in range(17))


class _Cursor:
    """Reads the header of a GGUF from front to end; raises `ValueError` and the like for what is none."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def read_file(self, mapped: np.ndarray) -> GgufFile:
        if self.take(4) != b"GGUF" or self.number("I") not in (2, 3):
            raise ValueError
        tensors, values = self.number("Q"), self.number("Q")
        pairs = [(self.text().decode(), self.value()) for _ in range(values)]
        infos = [self.info() for _ in range(tensors)]
        metadata, names = dict(pairs), {info[0] for info in infos}
        alignment = metadata["general.alignment"].raw if "general.alignment" in metadata else 32
        if len(metadata) < values or len(names) < tensors or alignment not in _ALIGNMENTS:
            raise ValueError
        start = -(-self.at // alignment) * alignment
        return GgufFile(metadata, {info[0]: _map_tensor(mapped, start, *info) for info in infos}, alignment)

    def take(self, size: int) -> bytes:
        if size > _LONGEST_HEADER - self.at:
            raise ValueError
        piece = self.content[self.at : self.at + size]
        if len(piece) != size:
            raise ValueError
        self.at += size
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def value(self) -> Value:
        kind = self.number("I")
        if kind != _ARRAY:
            return Value(kind, None, self.text() if kind == _TEXT else self.number(_CODES[kind]))
        item, count = self.number("I"), self.number("Q")
        if item == _TEXT:
            return Value(kind, item, [self.text() for _ in range(count)])
        code = _CODES[item]  # arrays of arrays are in no model
        data = self.take(count * struct.calcsize("<" + code))
        return Value(kind, item, list(struct.unpack(f"<{count}{code}", data)))

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name, dimensions = self.text().decode(), self.number("I")
        if len(name.encode()) > _LONGEST_NAME or not name.isprintable() or dimensions > _MOST_DIMENSIONS:
            raise ValueError
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _map_tensor(
    mapped: np.ndarray, start: int, name: str, shape: tuple[int, ...], type_id: int, offset: int
) -> Tensor:
    gguf = import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(type_id)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except ValueError:  # llama.cpp may know types that `gguf` does not
        from parrot_edge.engine.native import tensor_kinds

        kind = tensor_kinds()[type_id]
        block, size = kind.block, kind.bytes
    if not math.prod(shape) or not shape or shape[-1] % block:
        raise ValueError
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * size
    data = mapped[start + offset : start + offset + rows * row_bytes]
    return Tensor(name, shape, kind, data.reshape(rows, row_bytes))


@contextlib.contextmanager
def write_gguf(target: Path, architecture: str, *, force: bool) -> Iterator[Any]:
    """A `gguf.GGUFWriter` whose file becomes `target` where the block ends well, and else is gone.

    Raises `OutputError` where `target` exists without `force`, or cannot be written.
    """
    with new_file(target, force=force) as draft:
        writer = import_gguf().GGUFWriter(draft, architecture)
        try:
            yield writer
            writer.close()
        finally:
            with contextlib.suppress(OSError):
                writer.close()


def add_metadata(writer: Any, given: Metadata, source: GgufFile | None = None) -> None:
    """Set what is given, then what `source` has beside it; empty arrays, which say nothing, are left out."""
    types = import_gguf().GGUFValueType
    for key, (kind, value) in given.items():
        is_array = isinstance(kind, list)
        item = types[kind[0]] if is_array else None
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, types.ARRAY if is_array else types[kind], item)
    for key, known in source.metadata.items() if source else ():
        if key not in writer.kv_data[0] and known.raw != []:
            item = None if known.item is None else types(known.item)
            writer.add_key_value(key, known.raw, types(known.type), item)
