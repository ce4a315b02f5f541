"""`parrot doctor`: what this machine has, what would be chosen for it, and why."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import parrot_edge
from parrot_edge.filetype import choose_file
from parrot_edge.machine import (
    DEFAULT_SEQUENCES,
    choose_sequences,
    choose_threads,
    format_bytes,
    inspect_machine,
    plural,
)
from parrot_edge.models import LocalModel, parse_model
from parrot_edge.store import cache_dir, config_dir


@click.command()
@click.option("--model", metavar="MODEL", default="chat", show_default=True, help="The model to examine.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=DEFAULT_SEQUENCES,
    show_default=True,
    help="Dialogues side by side that are wanted.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=2048, show_default=True, help="Length of a dialogue."
)
@click.option("--measure", is_flag=True, help="Time the file types again, whatever was measured before.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(model: str, parallel: int, tokens: int, measure: bool, as_json: bool) -> None:
    """Say what this machine has, which file type and how many threads and dialogues suit it, and why.

    The first call times the file types, which can take half a minute.

    \b
    Examples:
      parrot doctor
      parrot doctor --measure
      parrot doctor --parallel 64 --tokens 4096 --json
    """
    report = examine(model, parallel, tokens, measure)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    for line in describe(report):
        click.echo(line)


def examine(name: str, parallel: int, tokens: int, measure: bool) -> dict[str, Any]:
    """All that is reported, ready for JSON; raises `ModelError` where the model cannot be used."""
    from parrot_edge.engine import native  # loads llama.cpp

    machine, attention = inspect_machine(), native.attention()
    threads = choose_threads(machine)
    report: dict[str, Any] = {
        "parrot_edge": parrot_edge.__version__,
        "llama_cpp_python": native.llama_version(),
        "features": native.cpu_features(),
        "attention": {"compiled": attention.callback is not None, "reason": attention.reason},
        "machine": asdict(machine),
        "threads": asdict(threads),
    }
    model = parse_model(name, download=False)
    report["model"] = {"name": model.name, "target": model.target}
    if isinstance(model, LocalModel):
        choice = choose_file(
            model,
            sequences=parallel,
            threads=threads.count,
            again=measure,
            say=lambda text: click.echo(text, err=True),
        )
        with native.Model(choice.path, vocab_only=True) as base:
            shape = native.ContextShape(1, tokens, threads.count)
            each = 2 * shape.sequences * shape.tokens * base.kv_bytes_per_token  # Ask's cache and Chat's
            once = choice.path.stat().st_size + 2 * shape.bytes(base) - each
        report["file"] = {**asdict(choice), "path": str(choice.path)}
        report["sequences"] = asdict(choose_sequences(once, each, machine, wanted=parallel))
        report["sequences"]["tokens"] = tokens
    report["cache"] = _folder(cache_dir())
    report["config"] = _folder(config_dir())
    return report


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a reader."""
    machine, threads, model = report["machine"], report["threads"], report["model"]
    cores = f"{plural(machine['cores'], 'core')} usable, load {machine['load']:.1f}"
    memory = f"{format_bytes(machine['memory_available'])} available of {format_bytes(machine['memory'])}"
    lines = [
        ("parrot_edge", f"{report['parrot_edge']}, with llama-cpp-python {report['llama_cpp_python']}"),
        ("processor", f"{machine['cpu'] or 'unknown'}, {cores}"),
        ("features", " ".join(report["features"])),
        ("attention", report["attention"]["reason"]),
        ("memory", memory),
        ("threads", f"{threads['count']}: {threads['reason']}"),
        ("model", f"{model['name']}: {model['target']}"),
    ]
    if "file" in report:
        file, sequences = report["file"], report["sequences"]
        lines.append(("file type", f"{file['type'] or 'as it is'}: {file['reason']}"))
        lines.append(("file", file["path"]))
        each = plural(sequences["tokens"], "token")
        lines.append(("dialogues", f"{sequences['count']} of {each} side by side: {sequences['reason']}"))
    for kind in ("cache", "config"):
        folder = report[kind]
        writable = "" if folder["writable"] else ", cannot be written"
        lines.append((kind, f"{folder['path']} ({format_bytes(folder['bytes'])}{writable})"))
    return [f"{label:12} {text}" for label, text in lines]


def _folder(path: Path) -> dict[str, Any]:
    """Size of a folder and whether it, or the folder it would be made in, can be written."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return {"path": str(path), "bytes": size, "writable": os.access(there, os.W_OK)}
