"""The seeds that come with the package."""

from __future__ import annotations

from pathlib import Path


def builtin_path() -> Path:
    """The JSONL file of varied openings and topics that `--seeds builtin` stands for."""
    return Path(__file__).with_name("builtin.jsonl")
