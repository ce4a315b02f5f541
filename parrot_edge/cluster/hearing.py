"""Recordings heard on the nodes of a cluster; they have to lie under the same path there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from parrot_edge.cluster.engine import start_clerk
from parrot_edge.cluster.files import PackedFile, find_or_fetch
from parrot_edge.cluster.spread import map_in_order
from parrot_edge.cluster.worker import read_from
from parrot_edge.dialect.identify import identify_file
from parrot_edge.dialect.runtime import Runtime
from parrot_edge.errors import InputError

Part = tuple[str, float, float | None]
"""Path, start and end of what is to be heard."""

Outcome = tuple[list[dict[str, Any]], InputError | None]
"""Rows, and why there are no more of them."""


def hear_on_ray(
    name: str, model: str | Path, parts: Iterable[Part | InputError], *, window: float, threads: int
) -> Iterator[Outcome]:
    """Rows for each part, in order, as `identify_file` gives them; what cannot be heard has its error.

    `name` is the cluster's. Raises as `map_in_order` does.
    """
    path = Path(model)
    packed = PackedFile.of(path / "model.onnx" if path.is_dir() else path)
    hear = partial(_hear, packed, start_clerk(), threads, window, os.getcwd())
    for _, outcome in map_in_order(name, hear, parts, key=lambda part: part, size=4):
        yield outcome


def _hear(
    model: PackedFile, clerk: Any, threads: int, window: float, folder: str, parts: list[Part | InputError]
) -> list[Outcome]:
    with contextlib.suppress(OSError):  # then relative paths will not be found, and say so
        os.chdir(folder)
    runtime = _open(str(find_or_fetch(model, read_from(clerk))), threads)
    outcomes: list[Outcome] = []
    for part in parts:
        rows: list[dict[str, Any]] = []
        error = part if isinstance(part, InputError) else None
        try:
            if not isinstance(part, InputError):
                path, start, end = part
                rows.extend(
                    answer.row(path) for answer in identify_file(runtime, path, start, end, window=window)
                )
        except InputError as found:
            error = found
        outcomes.append((rows, error))
    return outcomes


@lru_cache(maxsize=1)
def _open(path: str, threads: int) -> Runtime:
    return Runtime(path, threads=threads)
