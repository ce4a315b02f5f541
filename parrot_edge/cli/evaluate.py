"""`parrot evaluate`: how good Ask and Chat are."""

from __future__ import annotations

import click

from parrot_edge.cli.evaluate_ask import ask


@click.group()
def evaluate() -> None:
    """Measure how much Ask is like the people it plays.

    \b
    Example:
      parrot evaluate ask base.gguf base.gguf+ask.gguf --data held-out.jsonl
    """


evaluate.add_command(ask)
