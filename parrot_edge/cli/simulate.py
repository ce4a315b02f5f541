"""`parrot simulate`: seeds in, dialogues out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from parrot_edge.cli import options
from parrot_edge.cli.progress import ProgressLine
from parrot_edge.engine.base import Engine
from parrot_edge.errors import UsageError
from parrot_edge.intake import Intake
from parrot_edge.journal import Journal
from parrot_edge.jsonl import Writer
from parrot_edge.models import LocalModel, RemoteModel
from parrot_edge.roles import Speaker
from parrot_edge.seeds import builtin_path
from parrot_edge.simulate import RowsOnly, Run, RunSettings, Tally


@click.command()
@click.argument("source", metavar="[SEEDS]", required=False)
@click.option("--seeds", "named", type=click.Choice(["builtin"]), help="Use the seeds that come with parrot.")
@options.output_option
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Most turns; a turn is a user message and its answer.",
)
@click.option("--ask", default="ask", show_default=True, metavar="MODEL", help="Who plays the user.")
@click.option("--chat", default="chat", show_default=True, metavar="MODEL", help="Who answers.")
@options.sampling_options
@options.engine_options
@options.ray_option
@click.option(
    "--endpoint-requests",
    type=click.IntRange(1),
    metavar="N",
    help="Most requests to endpoints at once, however many workers there are.  [default: --parallel]",
)
@options.rows_options
@click.option("--resume", is_flag=True, help="Carry on the run that -o was begun by.")
@click.option("--force", is_flag=True, help="Replace what -o names.")
@options.progress_option
def simulate(source: str | None, named: str | None, **given: Any) -> None:
    """Let Ask and Chat talk to each other, many dialogues at once.

    SEEDS holds a JSON object a line: {"prompt"}, {"topic"} (Ask writes the opening) or {"messages"}
    (to be carried on), each with an optional "id", "system" and "persona". Without SEEDS, stdin is
    read; on a terminal the built-in seeds are used. Every message is on disk before the next is made:
    a run that was stopped, by whatever, goes on with --resume.

    \b
    Examples:
      parrot simulate seeds.jsonl -o dialogues.jsonl
      parrot simulate seeds.jsonl -o dialogues.jsonl --resume
      parrot simulate --seeds builtin --limit 5 --turns 3
      echo "how do I descale a kettle?" | parrot simulate --text
      parrot simulate seeds.jsonl --chat http://localhost:8080/v1 -o dialogues.jsonl
      parrot simulate seeds.jsonl --ray head:6379 -o dialogues.jsonl
    """
    if source is not None and named is not None:
        raise UsageError("give SEEDS or --seeds builtin, not both")
    if source is None:
        source = str(builtin_path()) if named or sys.stdin.isatty() else "-"
    output = given["output"]
    if output == "-" and (given["resume"] or given["force"]):
        raise UsageError("--resume and --force need -o FILE")
    if given["resume"] and given["force"]:
        raise UsageError("give --resume or --force, not both")
    intake = options.open_intake(source, given, replace=given["resume"] or given["force"])
    settings = RunSettings(given["turns"], given["parallel"], given["seed"])
    total = intake.count()
    ask, chat = (
        options.find_model(given[side], parallel=settings.parallel, threads=given["threads"])
        for side in ("ask", "chat")
    )
    sampling = options.take_sampling(given)
    facts = {
        "seed": settings.seed, "turns": settings.turns, "max_tokens": given["max_tokens"],
        "ask": ask.name, "chat": chat.name, "sampling": repr(sampling), "exact": given["exact"],
    }  # fmt: skip
    with options.connect_ray(given["ray"]) as cluster:
        recorder, advice = _open_recorder(source, facts, given)
        left = None if total is None else max(0, total - len(recorder.finished))
        with contextlib.closing(recorder), ProgressLine(given["progress"], left) as line:
            work = _simulate(intake, total, (ask, chat), settings, sampling, recorder, line, given, cluster)
            tally = options.run_interruptibly(work, advice)
            recorder.complete()
            line.finish(tally)
    options.close_rejects(intake.rejects)


def _open_recorder(
    source: str, facts: dict[str, Any], given: dict[str, Any]
) -> tuple[Journal | RowsOnly, str]:
    """Where the run goes, and what to tell whoever stops it."""
    output = given["output"]
    if output == "-":
        return RowsOnly(Writer().write), "the rows written are whole, and with -o FILE a run can be resumed"
    again = options.command_line(add="--resume", drop="--force")
    advice = f"{'give it the same rows and ' if source == '-' else ''}carry on with: {again}"
    return Journal(Path(output), facts, resume=given["resume"], force=given["force"]), advice


async def _simulate(
    intake: Intake,
    total: int | None,
    models: tuple[LocalModel | RemoteModel, LocalModel | RemoteModel],
    settings: RunSettings,
    sampling: Any,
    recorder: Journal | RowsOnly,
    line: ProgressLine,
    given: dict[str, Any],
    cluster: str | None,
) -> Tally:
    from parrot_edge.pair import Load  # loads llama.cpp

    load = Load(
        settings.parallel,
        settings.turns,
        given["max_tokens"],
        context=given["context"],
        threads=given["threads"],
        exact=given["exact"],
        requests=given["endpoint_requests"],
    )
    async with _open_engines(models, load, cluster) as (engines, dialogues):
        ask, chat = (Speaker(engine, given["max_tokens"], sampling) for engine in engines)
        rejects = intake.rejects
        settings = replace(settings, parallel=dialogues)
        run = Run(ask, chat, settings, recorder, line.show, rejects.add_seed if rejects else None)
        return await run.over(intake.seeds() if total is not None else intake.seeds_as_they_come())


@contextlib.asynccontextmanager
async def _open_engines(
    models: tuple[LocalModel | RemoteModel, LocalModel | RemoteModel], load: Any, cluster: str | None
) -> AsyncIterator[tuple[tuple[Engine, Engine], int]]:
    """An engine for each side, here or on the cluster, and how many dialogues they hold at once."""
    if cluster is None:
        from parrot_edge.pair import open_pair

        async with open_pair(*models, load) as engines:
            yield engines, load.parallel
    else:
        from parrot_edge.cluster.engine import open_pair_on_ray

        async with open_pair_on_ray(cluster, *models, load, say=options.say) as opened:
            yield opened
