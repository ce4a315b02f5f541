"""`parrot bench`: this engine against its limit and against others."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from parrot_edge.cli import options
from parrot_edge.errors import UsageError
from parrot_edge.intake import Intake
from parrot_edge.machine import choose_threads
from parrot_edge.models import RemoteModel, parse_model
from parrot_edge.seeds import builtin_path


@click.command()
@click.option(
    "--model", default="chat", show_default=True, metavar="MODEL", help="The file that every way runs."
)
@click.option(
    "--ask",
    default="ask",
    show_default=True,
    metavar="MODEL",
    help="If it is an activated adapter over that file, the pair is measured as well.",
)
@click.option("--dialogues", type=click.IntRange(1), default=32, show_default=True, help="Dialogues in all.")
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=16, show_default=True, help="Dialogues at once."
)
@click.option("--turns", type=click.IntRange(1), default=4, show_default=True, help="Turns of a dialogue.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=96, show_default=True, help="Tokens of a message."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of every way.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Run every way so often, in turn; the median counts.",
)
@click.option("--llama-server", "server", metavar="PATH", help="The binary.  [default: the one on the PATH]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model: str,
    ask: str,
    dialogues: int,
    parallel: int,
    turns: int,
    max_tokens: int,
    threads: int | None,
    rounds: int,
    server: str | None,
    as_json: bool,
) -> None:
    """Measure the engine against its limit and against other ways to run the same file.

    The limit is what a pair could reach that writes every token once at the best measured rate and
    reads it once, on the other side, at the best measured rate; each round measures it anew. Of the
    embedded model the file that is fastest here is run; two Llama objects also run the shipped one.
    Run it on a quiet machine.

    \b
    Examples:
      parrot bench
      parrot bench --model big.gguf --parallel 32 --llama-server ~/llama.cpp/build/bin/llama-server
    """
    from parrot_edge import bench as ways  # loads llama.cpp

    threads = threads or choose_threads().count
    shape = ways.Shape(dialogues, turns, max_tokens, parallel, threads)
    openings = [seed.messages[-1].content for seed in Intake(str(builtin_path())).seeds() if seed.messages]
    path, origin = _files(model, parallel, threads)
    binary = ways.find_llama_server(server)
    adapter = _adapter(ask, path, parallel, threads)
    runs: list[Callable[[], ways.Result]] = []
    for lora in dict.fromkeys((None, adapter)):
        runs.append(partial(ways.measure_engine, path, shape, openings, adapter=lora))
        if binary is not None:
            runs.append(partial(ways.measure_llama_server, binary, path, shape, openings, adapter=lora))
    if binary is not None:
        runs.append(partial(ways.measure_llama_server_chat, binary, path, shape, openings))
    runs.append(partial(ways.measure_engine, path, shape, openings, contexts=2))
    runs.append(partial(ways.measure_two_llamas, path, shape, openings))
    if origin != path:
        way = "two Llama objects on the shipped file"
        runs.append(partial(ways.measure_two_llamas, origin, shape, openings, way=way))
    if not as_json:
        click.echo(
            f"{path.name}: {dialogues} dialogues of {turns} turns, {parallel} at once, {threads} threads\n"
        )
        click.echo(f"{'':52}{'tokens/s':>10}{'of limit':>10}{'read':>8}")
    limits: list[ways.Rates] = []
    results: dict[str, list[tuple[ways.Result, float]]] = {}  # of each way, with the limit of its round
    for _ in range(rounds):
        limit = ways.measure_limit(path, shape)
        limits.append(limit)
        if not as_json:
            name = f"limit: {limit.decode:.0f} tokens/s written, {limit.prompt:.0f} read"
            click.echo(_line(name, limit.exchange, 1.0, 1.0))
        for run in runs:
            result = run()
            results.setdefault(result.way, []).append((result, limit.exchange))
            if not as_json:
                click.echo(_line(result.way, result.rate, result.rate / limit.exchange, result.read))
    if as_json:
        measured = [
            {**asdict(result), "rate": result.rate, "of_limit": result.rate / limit}
            for of_way in results.values()
            for result, limit in of_way
        ]
        rates = [{**asdict(limit), "exchange": limit.exchange} for limit in limits]
        report = {"model": str(path), "shape": asdict(shape), "limits": rates, "results": measured}
        click.echo(json.dumps(report))
        return
    if rounds > 1:
        click.echo(f"\nmedians of {rounds} rounds")
        for way, of_way in results.items():
            rate = statistics.median(result.rate for result, _ in of_way)
            of_limit = statistics.median(result.rate / limit for result, limit in of_way)
            click.echo(_line(way, rate, of_limit, None))
    if binary is None:
        click.echo("llama-server is not on the PATH and is left out")


def _line(way: str, rate: float, of_limit: float, read: float | None) -> str:
    return f"{way:52}{rate:10.0f}{of_limit:10.2f}" + (f"{read:8.2f}" if read is not None else "")


def _adapter(text: str, path: Path, parallel: int, threads: int) -> Path | None:
    """The activated adapter of a MODEL over this very file, if it has one."""
    from parrot_edge.engine.native import is_activated

    model = options.find_model(text, parallel=parallel, threads=threads)
    if isinstance(model, RemoteModel) or model.adapter is None or model.path != path:
        return None
    return model.adapter if is_activated(model.adapter) else None


def _files(text: str, parallel: int, threads: int) -> tuple[Path, Path]:
    """The file that is run for a MODEL and the one it was made from, which differ for the embedded model."""
    origin = parse_model(text)
    model = options.find_model(text, parallel=parallel, threads=threads)
    if isinstance(origin, RemoteModel) or isinstance(model, RemoteModel):
        raise UsageError("bench measures files; name a GGUF")
    return model.path, origin.path
