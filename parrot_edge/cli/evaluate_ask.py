"""`parrot evaluate ask`: how much Ask is like the people it plays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click

from parrot_edge.cli import options
from parrot_edge.intake import Intake
from parrot_edge.models import LocalModel, RemoteModel, parse_model
from parrot_edge.seeds import builtin_path
from parrot_edge.table import Rows, align_columns, dig, list_figures


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    "paths",
    metavar="DIALOGUES",
    multiple=True,
    required=True,
    help="Real dialogues that no MODEL was trained on; may be given again.",
)
@click.option(
    "--prompt",
    "prompts",
    metavar="PROMPT",
    multiple=True,
    help="How a MODEL without one is prompted; may be given again.  [default: as its file says]",
)
@options.held_out_option
@options.dialogue_limit_option
@options.skip_option
@click.option(
    "--points",
    type=click.IntRange(0),
    default=300,
    show_default=True,
    help="Turns that Ask writes itself, over all files; 0 leaves that out.",
)
@click.option(
    "--simulate",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Simulate N dialogues with each MODEL.",
)
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="Most turns of a simulated dialogue.",
)
@click.option("--chat", default="chat", show_default=True, metavar="MODEL", help="Who answers in them.")
@click.option("--seeds", metavar="SEEDS", help="What they start from.  [default: the built-in seeds]")
@options.sampling_options
@click.option(
    "--parallel", type=click.IntRange(1), default=16, show_default=True, help="Messages made at once."
)
@click.option(
    "--context",
    type=click.IntRange(64),
    default=2048,
    show_default=True,
    metavar="TOKENS",
    help="Longest text; of a longer dialogue the latest turns are kept.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: see parrot doctor]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ask(models: tuple[str, ...], paths: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure Ask on real dialogues that it was not trained on.

    MODEL may be followed by @PROMPT: native (continue after the user's header), flipped (told to play
    the user, with roles exchanged), either with a system line of your own as native:TEXT, or default.
    The embedded model is measured as the file type that is fastest here, as it is run.
    Every figure stands with its 95% interval over dialogues. The perplexity of a user turn counts its
    tokens and the one that closes it; "below the first" compares with the first MODEL.

    \b
    Examples:
      parrot evaluate ask smollm2@native smollm2@flipped smollm2+ask.gguf --data held-out.jsonl
      parrot evaluate ask ask --data oasst.jsonl --data wildchat.jsonl --held-out 0.05 --json
      parrot evaluate ask ask --data held-out.jsonl --points 0 --simulate 200 --turns 6
    """
    from parrot_edge.evaluate import ask as measures  # loads llama.cpp
    from parrot_edge.evaluate.sources import read_source

    def say(text: str) -> None:
        click.echo(text, err=True)

    sampling = options.take_sampling(given)
    systems = [
        measures.System.parse(model, prompt)
        for model in models
        for prompt in given["prompts"] or ("default",)
    ]
    which = {"held_out": given["held_out"], "limit": given["limit"], "seed": given["seed"]}
    sources = [read_source(path, **which, skip=given["on_error"] == "skip") for path in paths]
    names = ("points", "simulate", "turns", "context", "max_tokens", "parallel", "threads", "seed")
    settings = measures.AskSettings(**{name: given[name] for name in names}, sampling=sampling)
    seeds = list(Intake(given["seeds"] or str(builtin_path())).seeds()) if settings.simulate else []
    chat = parse_model(given["chat"]) if settings.simulate else None

    def fastest(model: LocalModel | RemoteModel) -> LocalModel | RemoteModel:
        return options.take_fastest(model, parallel=settings.parallel, threads=settings.threads)

    systems = [replace(system, model=fastest(system.model)) for system in dict.fromkeys(systems)]
    report = options.run_interruptibly(
        measures.evaluate_ask(systems, sources, settings, chat=chat and fastest(chat), seeds=seeds, say=say),
        "nothing is kept of what was measured",
    )
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    click.echo("\n".join(_table(report)))


_PERPLEXITY = {
    "per_token": "Perplexity per token",
    "opening": "Perplexity per token, openings",
    "follow_up": "Perplexity per token, follow-ups",
    "short": "Perplexity per token, up to 40 words",
    "per_byte": "Perplexity per byte",
}
_ENDING = {
    "auc": "AUC, end against middle",
    "at_end": "where people ended",
    "in_middle": "where they went on",
}
_TURNS = {
    "wrong_role": "in the wrong role",
    "ends": "that end the dialogue",
    "too_long": "longer than --max-tokens",
    "questions": "with a question",
    "words_mean": "words, mean",
    "words_median": "words, median",
    "distinct_1": "distinct words",
    "distinct_2": "distinct pairs of words",
    "auc": "AUC, told from people's",
}
_SIMULATION = {"wrong_role": "messages in the wrong role", "turns": "turns"}


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """The table's sections, each with its title."""
    names = [source["name"] for source in report["data"]]
    reasons = dict.fromkeys(
        reason for each in report["systems"] for reason in dig(each, "simulation", "stop_reasons")
    )

    def by_source(*path: str, key: tuple[str, ...] = ()) -> Rows:
        rows: Rows = [(name, (*path, "sources", name, *key)) for name in names]
        return [*rows, ("mean of the files", (*path, "mean", *key))]

    for key, title in _PERPLEXITY.items():
        yield title, by_source("perplexity", key=(key,))
    yield "Per token, below the first", by_source("perplexity", "below_first")
    yield "Probability of an end", [(title, ("ending", "mean", key)) for key, title in _ENDING.items()]
    yield "Turns in people's place", [(title, ("turns", key)) for key, title in _TURNS.items()]
    simulated: Rows = [(title, ("simulation", key)) for key, title in _SIMULATION.items()]
    ends: Rows = [(f"ended by {reason}", ("simulation", "stop_reasons", reason)) for reason in reasons]
    yield "Simulated dialogues", simulated + ends


def _table(report: dict[str, Any]) -> list[str]:
    """The report as lines: a row for each figure, a column for people and each system."""
    columns = [{"model": "people", "prompt": "", "turns": report["people"]}, *report["systems"]]
    names = [column["model"][-26:] for column in columns]
    prompts = [f"@{column['prompt']}"[:26] if column["prompt"] else "" for column in columns]
    lines = [["", *names], ["", *prompts]]
    return align_columns([*lines, *list_figures(_sections(report), columns)])
