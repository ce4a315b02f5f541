"""The command `parrot`: a file per verb, loaded when that verb is called.

The only package that knows click. Library errors become one sentence on stderr here, and nowhere else.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from parrot_edge import __version__
from parrot_edge.errors import ParrotError, UsageError

VERBS = {
    "simulate": "Let Ask and Chat talk to each other, many dialogues at once.",
    "ask": "Add the user's next message to each dialogue.",
    "chat": "Add the assistant's next message to each dialogue; on a terminal, talk to it.",
    "train": "Train an Ask or Chat adapter by a recipe.",
    "recipes": "List, show, copy and check the training recipes.",
    "models": "List, find, download and name models.",
    "doctor": "Say what this machine has, and which settings suit it and why.",
    "bench": "Measure the engine against its limit and against other ways to run the same file.",
}
"""Every verb and its line in `parrot --help`; the verb's own help begins with the same sentence."""


class _Verbs(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return getattr(importlib.import_module(f"parrot_edge.cli.{name}"), name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="parrot")
def parrot() -> None:
    """Dialogues on your own machine: simulate them, train on them, ship the models.

    \b
    Examples:
      parrot simulate seeds.jsonl -o dialogues.jsonl
      parrot ask < dialogues.jsonl | parrot chat > longer.jsonl
      parrot chat
    """


def main() -> NoReturn:
    """Run `parrot`; exit 0, or 1 with one sentence, or 2 for a wrong call."""
    try:
        parrot.main(prog_name="parrot", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _leave_without_flushing()
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except ParrotError as error:
        click.echo(f"parrot: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _leave_without_flushing() -> NoReturn:
    """End quietly after the reader of stdout has gone: what is buffered has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
