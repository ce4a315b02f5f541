"""`parrot ask`: the user's next message."""

from __future__ import annotations

from typing import Any

import click

from parrot_edge.cli import options


@click.command()
@click.argument("source", metavar="[DIALOGUES]", default="-")
@options.output_option
@click.option("--ask", "model", default="ask", show_default=True, metavar="MODEL", help="Who plays the user.")
@options.sampling_options
@options.engine_options
@options.rows_options
@click.option("--force", is_flag=True, help="Replace what -o names.")
def ask(source: str, **given: Any) -> None:
    """Add the user's next message to each dialogue.

    Rows flow out as they finish. Where Ask ends a dialogue its row gets a "stop_reason"; rows that
    have one are passed on as they are.

    \b
    Examples:
      parrot ask dialogues.jsonl -o longer.jsonl
      parrot ask < dialogues.jsonl | parrot chat > one-turn-more.jsonl
      echo '{"topic": "growing tomatoes"}' | parrot ask
    """
    options.extend_rows("user", source, given)
