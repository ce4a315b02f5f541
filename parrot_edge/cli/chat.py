"""`parrot chat`: the assistant's next message, or a conversation on a terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from parrot_edge.cli import options
from parrot_edge.dialogue import Message, Seed, content_id
from parrot_edge.errors import UsageError
from parrot_edge.jsonl import Writer
from parrot_edge.roles import Speaker, say_as_chat

_CONVERSATION_TURNS = 64
"""Turns for which a conversation on a terminal gets memory, at most."""


@click.command()
@click.argument("source", metavar="[DIALOGUES]", required=False)
@options.output_option
@click.option("--chat", "model", default="chat", show_default=True, metavar="MODEL", help="Who answers.")
@click.option("--system", metavar="TEXT", help="System message of a conversation on a terminal.")
@options.sampling_options
@options.engine_options
@options.rows_options
@click.option("--force", is_flag=True, help="Replace what -o names.")
def chat(source: str | None, system: str | None, **given: Any) -> None:
    """Add the assistant's next message to each dialogue; on a terminal, talk to it.

    Without DIALOGUES stdin is read; where that is a terminal, a conversation begins, which -o keeps
    as a row.

    \b
    Examples:
      parrot chat
      parrot chat --system "Answer like a pirate." -o talk.jsonl
      parrot chat prompts.jsonl -o answers.jsonl
    """
    if source is not None or not sys.stdin.isatty():
        if system is not None:
            raise UsageError(
                '--system is for a conversation on a terminal; give rows a "system" of their own'
            )
        options.extend_rows("assistant", source or "-", given)
        return
    messages = [Message("system", system)] if system else []

    def keep() -> None:
        if given["output"] != "-" and messages[-1:] and messages[-1].role == "assistant":
            rows = [message.as_dict() for message in messages]
            writer.write({"id": content_id(rows), "messages": rows, "stop_reason": None})

    with Writer(given["output"], force=given["force"]) as writer:
        try:
            options.run_interruptibly(_talk(messages, given), "the conversation is over", at_stop=keep)
        finally:
            keep()


async def _talk(messages: list[Message], given: dict[str, Any]) -> None:
    """Read a line, stream its answer, until the end of the input or of the context."""
    model = options.find_model(given["model"], parallel=1, threads=given["threads"])
    sampling = options.take_sampling(given)
    load = {key: given[key] for key in ("max_tokens", "context", "threads", "exact")}
    async with (
        options.open_engine(model, parallel=1, turns=_CONVERSATION_TURNS, **load) as engine,
        engine.session() as session,
    ):
        click.echo(f"Talking to {engine.name}. Ctrl-D ends the conversation.", err=True)
        speaker = Speaker(engine, given["max_tokens"], sampling)
        while (line := await asyncio.to_thread(_read_line)) is not None:  # so that Ctrl-C is heard
            if not line:
                continue
            question = Message("user", line)
            said = await say_as_chat(
                speaker, session, Seed("terminal"), [*messages, question], given["seed"], _show
            )
            click.echo("\n")
            if said.stop_reason == "context":
                click.echo("The conversation has filled the model's context, so it ends here.", err=True)
                return
            if said.stop_reason is None:  # else it said nothing
                messages += [question, Message("assistant", said.text)]


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        click.echo("", err=True)
        return None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
