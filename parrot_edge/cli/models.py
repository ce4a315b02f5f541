"""`parrot models`: what there is, what a name stands for, and names of one's own."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from parrot_edge.machine import format_bytes
from parrot_edge.models import LocalModel, add_model, list_models, parse_model, remove_model


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List models, fetch them, and name them.

    Wherever a MODEL is asked for, these can be given: a short name, a path to a GGUF,
    base.gguf+adapter.gguf, hf:owner/repo/file.gguf[@revision], or the http(s):// address of an
    OpenAI-compatible server with #model behind it.

    \b
    Examples:
      parrot models
      parrot models path chat
      parrot models pull hf:HuggingFaceTB/SmolLM2-360M-Instruct-GGUF/smollm2-360m-instruct-q8_0.gguf
      parrot models add tutor ./qwen.gguf+tutor-lora.gguf
      parrot simulate --chat tutor
    """
    if context.invoked_subcommand is not None:
        return
    entries = list_models()
    if as_json:
        click.echo(json.dumps({"models": [asdict(entry) for entry in entries]}, ensure_ascii=False))
        return
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        size = format_bytes(entry.bytes) if entry.bytes is not None else "-"
        click.echo(f"{entry.name:{width}}  {entry.origin:10}  {size:>7}  {entry.target}")


@models.command()
@click.argument("name", metavar="NAME")
def path(name: str) -> None:
    """Print the MODEL that a short name stands for.

    \b
    Example:
      llama-server -m "$(parrot models path chat)"
    """
    click.echo(parse_model(name, download=False).target)


@models.command()
@click.argument("model", metavar="MODEL")
def pull(model: str) -> None:
    """Download the hf: files of a MODEL, or the newest commit of them, and print where they are.

    A file that has been pulled stays at its commit until it is pulled again; its SHA-256 is
    compared with the hub's.

    \b
    Example:
      parrot models pull hf:HuggingFaceTB/SmolLM2-360M-Instruct-GGUF/smollm2-360m-instruct-q8_0.gguf
    """
    click.echo(parse_model(model, refresh=True).target)


@models.command()
@click.argument("name", metavar="NAME")
@click.argument("model", metavar="MODEL")
@click.option("--force", is_flag=True, help="Replace a name, or pair an adapter with any base.")
def add(name: str, model: str, force: bool) -> None:
    """Let NAME stand for MODEL from now on; "ask" and "chat" replace the defaults.

    An adapter is taken over the base that it was trained on, or that a certificate.json beside it names.

    \b
    Examples:
      parrot models add tutor ./qwen.gguf+tutor-lora.gguf
      parrot models add chat http://localhost:8000/v1#qwen2.5-7b
    """
    if not force and not model.lower().startswith("hf:"):  # those of the hub are fetched when they are used
        found = parse_model(model, download=False)
        if isinstance(found, LocalModel) and found.adapter:
            from parrot_edge.convert.deliver import check_base  # loads llama.cpp

            check_base(found)
    add_model(name, model, force=force)


@models.command()
@click.argument("name", metavar="NAME")
def remove(name: str) -> None:
    """Forget a NAME that was added; the files stay.

    \b
    Example:
      parrot models remove tutor
    """
    remove_model(name)
