"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from parrot_edge.engine.base import Engine, Sampling
from parrot_edge.errors import UsageError
from parrot_edge.filetype import choose_file
from parrot_edge.intake import Intake, Rejects
from parrot_edge.jsonl import Writer
from parrot_edge.models import LocalModel, RemoteModel, parse_model
from parrot_edge.roles import Speaker

_T = TypeVar("_T")
_Command = Callable[..., Any]

ROW_TURNS = 8
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
set_option = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a value of the recipe."
)
skip_option = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a bad row: stop, or leave it out.",
)
held_out_option = click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    metavar="SHARE",
    help="Only what a recipe with data.held_out=SHARE keeps back.",
)
dialogue_limit_option = click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="N dialogues of each file, drawn by --seed; the branches of a tree count as one.",
)
dialogues_options = stack(
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
rows_options = stack(
    click.option("--text", is_flag=True, help="Take a line that is not a JSON object as a prompt."),
    dialogues_options,
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
ray_option = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Spread the work over a Ray cluster: host:port, or auto for one here.",
)
progress_option = click.option(
    "--progress/--no-progress", default=None, help="Report progress on stderr.  [default: on a terminal]"
)


def take_sampling(options: dict[str, Any]) -> Sampling:
    """Remove the sampling options from a command's keyword arguments and build `Sampling`."""
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    return Sampling(**{name: options.pop(name) for name in names})


def find_model(text: str, *, parallel: int, threads: int | None) -> LocalModel | RemoteModel:
    """The MODEL of an option; the embedded one as the file type that is fastest here, and named so."""
    model = parse_model(text)
    found = take_fastest(model, parallel=parallel, threads=threads)
    if isinstance(found, RemoteModel) or found == model:
        return found
    stem = found.path.stem
    return replace(found, name=f"{stem}+{found.adapter.name}" if found.adapter else stem)


def take_fastest(
    model: LocalModel | RemoteModel, *, parallel: int, threads: int | None
) -> LocalModel | RemoteModel:
    """The same model under its own name; the embedded one as the file type that is fastest here."""
    if isinstance(model, RemoteModel):
        return model
    choice = choose_file(
        model, sequences=parallel, threads=threads, say=lambda note: click.echo(note, err=True)
    )
    return replace(model, path=choice.path)


def say(note: str) -> None:
    """A line on stderr."""
    click.echo(f"parrot: {note}", err=True)


def connect_ray(address: str | None) -> contextlib.AbstractContextManager[str | None]:
    """The cluster of --ray, joined while the context lasts; its name, or None without the option."""
    if address is None:
        return contextlib.nullcontext()
    from parrot_edge.cluster.connection import connect

    return connect(address)


@contextlib.asynccontextmanager
async def open_engine(model: LocalModel | RemoteModel, **load: Any) -> AsyncIterator[Engine]:
    """One engine for a verb that has one side only."""
    from parrot_edge.pair import Load, open_pair

    async with open_pair(model, model, Load(**load)) as (engine, _):
        yield engine


def open_intake(
    source: str,
    given: dict[str, Any],
    *,
    replace: bool,
    waiting: str | None = None,
    may_be_empty: bool = False,
) -> Intake:
    """What is read, and with `--on-error skip` the rejects file, which `replace` replaces."""
    output, rejects = given["output"], None
    path = given["rejects"] or ("rejects.jsonl" if output == "-" else f"{output}.rejects.jsonl")
    refuse_same_file(source, output)
    if given["rejects"] and given["on_error"] != "skip":
        raise UsageError("--rejects needs --on-error skip")
    if given["on_error"] == "skip":
        refuse_same_file(source, path)
        if os.path.abspath(path) == os.path.abspath(output):
            raise UsageError(f"-o and --rejects both name {path}; give them different names")
        rejects = Rejects(Path(path), replace=replace)
    return Intake(source, given.get("text", False), given["limit"], waiting, rejects, may_be_empty)


def refuse_same_file(source: str, target: str) -> None:
    """What is read must not be what is written: it would be gone, or grow without end."""
    try:
        read = os.stat(sys.stdin.fileno() if source == "-" else source)
        written = os.stat(sys.stdout.fileno() if target == "-" else target)
    except (OSError, ValueError):  # one of them does not exist; who opens it will say so
        return
    if stat.S_ISREG(read.st_mode) and os.path.samestat(read, written):
        name = source if source != "-" else target if target != "-" else "stdin"
        raise UsageError(f"{name} cannot be read and written at once; name another output")


def close_rejects(rejects: Rejects | None) -> None:
    """Say how many rows were skipped."""
    if rejects is None:
        return
    rejects.close()
    if rejects.count:
        rows = "1 row was" if rejects.count == 1 else f"{rejects.count} rows were"
        click.echo(f"parrot: {rows} skipped, see {rejects.path}", err=True)


def run_interruptibly(
    work: Coroutine[Any, Any, _T], advice: str, at_stop: Callable[[], None] = lambda: None
) -> _T:
    """Run to the end, or to Ctrl-C or SIGTERM: then call `at_stop`, say `advice` and leave at once.

    Leaving does not wait for the decode under way, which can take long on a large model; all that
    was recorded is with the operating system already.
    """

    def leave(number: int) -> None:
        try:
            at_stop()
            start = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C
            click.echo(f"{start}parrot: stopped; {advice}", err=True)
            sys.stdout.flush()
        finally:
            os._exit(128 + number)

    async def watched() -> _T:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, leave, number)
        return await work

    return asyncio.run(watched())


def command_line(*, add: str, drop: str) -> str:
    """This command again, with a flag of its verb added and another left out."""
    verb, *arguments = sys.argv[1:]
    return shlex.join(["parrot", verb, add, *(each for each in arguments if each not in (add, drop))])


def extend_rows(role: str, source: str, given: dict[str, Any]) -> None:
    """What `parrot ask` and `parrot chat` share: rows in, rows with one message more out."""
    from parrot_edge.extend import extend_dialogues

    parallel, force = given["parallel"], given["force"]
    intake = open_intake(source, given, replace=force, waiting=role)
    rejects, total = intake.rejects, intake.count()
    model = find_model(given["model"], parallel=parallel, threads=given["threads"])
    sampling = take_sampling(given)

    async def extend(writer: Writer) -> None:
        load = {key: given[key] for key in ("parallel", "max_tokens", "context", "threads", "exact")}
        async with open_engine(model, turns=ROW_TURNS, **load) as engine:
            await extend_dialogues(
                role,
                Speaker(engine, given["max_tokens"], sampling),
                intake.seeds() if total is not None else intake.seeds_as_they_come(),
                writer.write,
                run_seed=given["seed"],
                parallel=parallel,
                on_failure=rejects.add_seed if rejects else None,
            )

    with Writer(given["output"], force=force) as writer:
        run_interruptibly(extend(writer), "the rows written are whole")
    close_rejects(rejects)
