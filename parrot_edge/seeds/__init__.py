"""Seeds that come with parrot_edge: about 200 varied openings."""

from __future__ import annotations

from pathlib import Path


def builtin_path() -> Path:
    """The file of the built-in seeds."""
    return Path(__file__).with_name("builtin.jsonl")
