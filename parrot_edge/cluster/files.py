"""Model files on their way to the nodes: by content, and once a node.

A node that has the file, under the same path or from an earlier run, takes that; to any other it is
sent in pieces, read by one actor beside the driver, into the node's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from parrot_edge.errors import ModelError
from parrot_edge.models import LocalModel
from parrot_edge.store import cache_dir, lock, replacing, sha256_of

PIECE_BYTES = 32 * 2**20
"""Bytes sent at once: what a node holds in memory of a file that it is sent."""

Read = Callable[[Path, int, int], bytes]
"""Bytes of a file of the driver's, from an offset, at most so many."""


@dataclass(frozen=True)
class PackedFile:
    """A file of the driver's, as a node can tell whether it has it."""

    path: Path
    size: int
    changed: int  # nanoseconds since 1970
    sha256: str

    @classmethod
    def of(cls, path: Path) -> PackedFile:
        """Raises `ModelError` where the file cannot be read."""
        try:
            status = os.stat(path)
            return cls(Path(os.path.abspath(path)), status.st_size, status.st_mtime_ns, sha256_of(path))
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class PackedModel:
    """A `LocalModel` that can be unpacked on any node."""

    name: str
    file: PackedFile
    adapter: PackedFile | None

    @classmethod
    def of(cls, model: LocalModel) -> PackedModel:
        return cls(
            model.name, PackedFile.of(model.path), PackedFile.of(model.adapter) if model.adapter else None
        )

    def unpack(self, read: Read) -> LocalModel:
        """The model with its files at hand; raises `ModelError` where they cannot be had."""
        adapter = find_or_fetch(self.adapter, read) if self.adapter else None
        return LocalModel(self.name, find_or_fetch(self.file, read), adapter)


def find_or_fetch(file: PackedFile, read: Read) -> Path:
    """Where a file lies on this node; it is fetched where the node has none of that content.

    Raises `ModelError` where it cannot be stored, or changes meanwhile.
    """
    if _is_here(file):
        return file.path
    folder = cache_dir() / "shipped"
    target = folder / f"{file.sha256[:16]}-{file.path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f".{file.sha256[:16]}.lock"):  # the other workers of the node wait
            if not (target.is_file() and target.stat().st_size == file.size):
                _fetch(file, target, read)
    except OSError as error:
        raise ModelError(
            f"{file.path.name} cannot be stored in a node's {folder} ({error.strerror}); free some space"
        ) from None
    return target


def read_piece(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file from an offset, fewer at its end."""
    with open(path, "rb") as source:
        source.seek(offset)
        return source.read(size)


def _is_here(file: PackedFile) -> bool:
    """Whether the path holds that very content: it does on the driver's machine and on a shared disk."""
    try:
        status = os.stat(file.path)
        if status.st_size != file.size:
            return False
        return status.st_mtime_ns == file.changed or sha256_of(file.path) == file.sha256
    except OSError:
        return False


def _fetch(file: PackedFile, target: Path, read: Read) -> None:
    digest = sha256()
    with replacing(target) as draft:
        with open(draft, "wb") as copy:
            for offset in range(0, file.size, PIECE_BYTES):
                piece = read(file.path, offset, PIECE_BYTES)
                digest.update(piece)
                copy.write(piece)
        if digest.hexdigest() != file.sha256:
            raise ModelError(f"{file.path} changed while it was sent to a node; start the run again")
