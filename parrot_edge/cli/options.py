"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from parrot_edge.engine.base import Engine, Sampling
from parrot_edge.intake import Intake, Rejects
from parrot_edge.jsonl import Writer
from parrot_edge.models import LocalModel, RemoteModel, choose_file, parse_model
from parrot_edge.roles import Speaker

_T = TypeVar("_T")
_Command = Callable[..., Any]

_ROW_TURNS = 8
"""Turns for which the dialogues of a pipe get memory; --context says otherwise."""


def stack(*decorators: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, in the order of the help page."""

    def decorate(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


output_option = click.option(
    "-o", "--output", default="-", metavar="FILE", help="Where rows go; - is stdout.  [default: -]"
)
rows_options = stack(
    click.option("--text", is_flag=True, help="Take a line that is not a JSON object as a prompt."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop after N rows of the input."),
    click.option(
        "--on-error",
        type=click.Choice(["stop", "skip"]),
        default="stop",
        show_default=True,
        help="At a bad row: stop, or put it into the rejects file and go on.",
    ),
    click.option("--rejects", metavar="FILE", help="The rejects file.  [default: OUT.rejects.jsonl]"),
)
sampling_options = stack(
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        default=Sampling.temperature,
        show_default=True,
        help="0 takes the likeliest token.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        default=Sampling.top_k,
        show_default=True,
        help="Keep the K likeliest tokens; 0 keeps all.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=Sampling.top_p,
        show_default=True,
        help="Keep the likeliest tokens up to this probability.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1, max_open=True),
        default=Sampling.min_p,
        show_default=True,
        help="Drop tokens less likely than this part of the likeliest.",
    ),
    click.option(
        "--repeat-penalty",
        type=click.FloatRange(0, min_open=True),
        default=Sampling.repeat_penalty,
        show_default=True,
        help="Make tokens of the same message less likely; 1 is off.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Longest message, in tokens.",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random numbers."
    ),
)
engine_options = stack(
    click.option(
        "--parallel",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        help="Dialogues under way at once.",
    ),
    click.option(
        "--context",
        type=click.IntRange(1),
        metavar="TOKENS",
        help="Longest dialogue in tokens.  [default: what turns and tokens need]",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: see parrot doctor]"),
    click.option(
        "--exact",
        is_flag=True,
        help="Slower; rows then do not depend on --parallel or on the order of the input.",
    ),
)
progress_option = click.option(
    "--progress/--no-progress", default=None, help="Report progress on stderr.  [default: on a terminal]"
)


def take_sampling(options: dict[str, Any]) -> Sampling:
    """Remove the sampling options from a command's keyword arguments and build `Sampling`."""
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    return Sampling(**{name: options.pop(name) for name in names})


def find_model(text: str, *, parallel: int, threads: int | None) -> LocalModel | RemoteModel:
    """The MODEL of an option; the embedded one as the file type that is fastest here."""
    model = parse_model(text)
    if isinstance(model, RemoteModel):
        return model
    choice = choose_file(
        model, sequences=parallel, threads=threads, say=lambda note: click.echo(note, err=True)
    )
    return LocalModel(choice.path.stem, choice.path, model.adapter) if choice.path != model.path else model


@contextlib.asynccontextmanager
async def open_engine(model: LocalModel | RemoteModel, **load: Any) -> AsyncIterator[Engine]:
    """One engine for a verb that has one side only."""
    from parrot_edge.pair import Load, open_pair

    async with open_pair(model, model, Load(**load)) as (engine, _):
        yield engine


def rejects_path(output: str, rejects: str | None) -> Path:
    """The rejects file that belongs to an output."""
    if rejects is not None:
        return Path(rejects)
    return Path("rejects.jsonl" if output == "-" else f"{output}.rejects.jsonl")


def run_interruptibly(work: Coroutine[Any, Any, _T], advice: str) -> _T:
    """Run to the end, or to Ctrl-C or SIGTERM: then say `advice` and leave at once.

    Leaving does not wait for the decode under way, which can take long on a large model; all that
    was recorded is with the operating system already.
    """

    async def watched() -> _T:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _leave, number, advice)
        return await work

    return asyncio.run(watched())


def _leave(number: int, advice: str) -> None:
    click.echo(f"\nparrot: stopped. {advice}", err=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(128 + number)


def command_line(*, add: str, drop: str) -> str:
    """This command again, with a flag added and another left out."""
    arguments = [argument for argument in sys.argv[1:] if argument not in (add, drop)]
    return shlex.join(["parrot", *arguments, add])


def extend_rows(role: str, source: str, given: dict[str, Any]) -> None:
    """What `parrot ask` and `parrot chat` share: rows in, rows with one message more out."""
    from parrot_edge.extend import extend_dialogues

    output, parallel = given["output"], given["parallel"]
    rejects = Rejects(rejects_path(output, given["rejects"])) if given["on_error"] == "skip" else None
    intake = Intake(source, given["text"], given["limit"], role, rejects)
    total = intake.count()
    model = find_model(given["model"], parallel=parallel, threads=given["threads"])
    sampling = take_sampling(given)

    async def extend(writer: Writer) -> None:
        load = {key: given[key] for key in ("parallel", "max_tokens", "context", "threads", "exact")}
        async with open_engine(model, turns=_ROW_TURNS, **load) as engine:
            await extend_dialogues(
                role,
                Speaker(engine, given["max_tokens"], sampling),
                intake.seeds() if total is not None else intake.seeds_as_they_come(),
                writer.write,
                run_seed=given["seed"],
                parallel=parallel,
                on_failure=rejects.add_seed if rejects else None,
            )

    with Writer(output, force=given["force"]) as writer:
        run_interruptibly(extend(writer), "The rows written are whole.")
