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
    "train": "Train an adapter that plays the user (Ask) or the assistant (Chat).",
    "convert": "Turn an adapter into GGUF files that provably say what was trained.",
    "evaluate": "Measure how much Ask is like the people it plays, and how good Chat is in long dialogues.",
    "stats": "Describe dialogues by the measures that papers compare such data by.",
    "curate": "Keep the dialogues that are worth training on; the others go aside, each with its reason.",
    "card": "Write the card of a file of dialogues: statistics, models, licences; hand it out on the hub.",
    "capo": "Make preference pairs: answers that use the history, and answers that miss it.",
    "view": "Make one HTML page of dialogues, to read, search and filter them.",
    "dialect": "Tell spoken dialects apart: train on recordings, measure, export, identify.",
    "recipes": "List, show, copy and check training recipes.",
    "models": "List models, fetch them, and name them.",
    "doctor": (
        "Say what this machine has, which file type and how many threads and dialogues suit it, and why."
    ),
    "bench": "Measure the engine against its limit and against other ways to run the same file.",
}
"""Every verb and its line in `parrot --help`; the verb's own help begins with the same sentence."""


class _Verbs(click.Group):
    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except BrokenPipeError:  # click itself would make it exit 1
            return context.exit(0)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return getattr(importlib.import_module(f"parrot_edge.cli.{name}"), name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="parrot")
@click.pass_context
def parrot(context: click.Context) -> None:
    """Dialogues on your own machine: simulate them, train on them, ship the models.

    \b
    Examples:
      parrot simulate seeds.jsonl -o dialogues.jsonl
      parrot ask < dialogues.jsonl | parrot chat > longer.jsonl
      parrot chat
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """Run `parrot`; exit 0, or 1 with one sentence, or 2 for a wrong call."""
    _open_missing_streams()
    code = 1
    try:
        result = parrot.main(prog_name="parrot", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.UsageError as error:
        code = error.exit_code
        command = error.ctx.command_path if error.ctx else "parrot"
        message = " ".join(error.format_message().split()).rstrip(".")
        click.echo(f"parrot: {message}; see {command} --help", err=True)
    except click.ClickException as error:
        code = error.exit_code
        click.echo(f"parrot: {error.format_message()}", err=True)
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except ParrotError as error:
        code = 2 if isinstance(error, UsageError) else 1
        click.echo(f"parrot: {error}", err=True)
    except OSError as error:  # not foreseen, so no more is known of it
        click.echo(f"parrot: {error.filename or 'the output'} failed: {error.strerror}", err=True)
    finally:
        _drop_unwritable_output()
    sys.exit(code)


def _open_missing_streams() -> None:
    """Where a standard stream is closed, put one there: a file that is opened must not take its number.

    Stdin is at its end, stdout fails, and stderr takes all.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _drop_unwritable_output() -> None:
    """What stdout cannot take has nowhere to go, and Python shall not try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
