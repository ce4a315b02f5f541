"""A user's folders, and the few things that are done with files in them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parrot_edge.errors import ModelError, OutputError


def cache_dir() -> Path:
    """What can be made again: `$PARROT_HOME/cache`, else a folder in the XDG cache directory."""
    return _user_dir("cache", "XDG_CACHE_HOME", ".cache")


def config_dir() -> Path:
    """What the user has set: `$PARROT_HOME/config`, else a folder in the XDG config directory."""
    return _user_dir("config", "XDG_CONFIG_HOME", ".config")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process, whatever happens to that."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """A file's SHA-256, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(path: Path) -> Any:
    """The JSON value in a file; raises `OSError`, or `ValueError` where it is damaged or nests too deep."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nests too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that was written here; {} where it is missing or damaged, as it can be made again."""
    try:
        value = parse_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: object) -> None:
    """Replace a file by a JSON value, whole or not at all; raises `OSError`."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to; it becomes `target` where the block ends well, and else is gone."""
    draft = target.with_name(target.name + ".partial")
    try:
        yield draft
        os.replace(draft, target)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(target: Path, *, force: bool) -> Iterator[Path]:
    """`replacing`, for what a user has asked for by name.

    Raises `OutputError` where `target` exists without `force`, or cannot be written.
    """
    refuse_existing(target, force=force)
    try:
        with replacing(target) as draft:
            yield draft
    except OSError as error:
        reason = error.strerror or "not all bytes were taken, the disk may be full"  # as numpy says it
        raise OutputError(
            f"{target} cannot be written: {reason}; free some space or name another place"
        ) from None


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise `OutputError` where `target` exists without `force`."""
    if os.path.exists(target) and not force:
        raise OutputError(f"{target} exists; choose another name or pass --force to replace it")


def _user_dir(kind: str, variable: str, fallback: str) -> Path:
    if home := os.environ.get("PARROT_HOME"):
        return Path(home).expanduser().absolute() / kind
    xdg = os.environ.get(variable, "")
    if os.path.isabs(xdg):  # others are to be ignored, says the specification
        return Path(xdg) / "parrot_edge"
    try:
        return Path.home() / fallback / "parrot_edge"
    except RuntimeError:
        raise ModelError("this user has no home directory; set PARROT_HOME to a folder of yours") from None
