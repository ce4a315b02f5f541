"""`parrot evaluate`: how good Ask and Chat are."""

from __future__ import annotations

import click

from parrot_edge.cli.evaluate_ask import ask
from parrot_edge.cli.evaluate_chat import chat


@click.group()
def evaluate() -> None:
    """Measure how much Ask is like the people it plays, and how good Chat is in long dialogues.

    \b
    Examples:
      parrot evaluate ask base.gguf base.gguf+ask.gguf --data held-out.jsonl
      parrot evaluate chat base.gguf base.gguf+chat.gguf --data held-out.jsonl
    """


evaluate.add_command(ask)
evaluate.add_command(chat)
