"""`parrot evaluate chat`: how good Chat is in long dialogues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from parrot_edge.cli import options
from parrot_edge.cli.progress import StepLine
from parrot_edge.errors import UsageError
from parrot_edge.models import parse_model
from parrot_edge.table import Rows, align_columns, dig, list_figures


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    "paths",
    metavar="DIALOGUES",
    multiple=True,
    help="Dialogues that no MODEL was trained on: what is their history worth? May be given again.",
)
@options.held_out_option
@options.dialogue_limit_option
@options.skip_option
@click.option(
    "--probes",
    type=click.IntRange(0),
    default=48,
    show_default=True,
    help="Facts that are told in turn 1 and asked for in turns 2, 5 and 8; 0 leaves that out.",
)
@click.option(
    "--parallel", type=click.IntRange(1), default=16, show_default=True, help="Messages made at once."
)
@click.option(
    "--context",
    type=click.IntRange(512),
    default=2048,
    show_default=True,
    metavar="TOKENS",
    help="Longest text; of a longer history the latest turns are kept.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: see parrot doctor]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random numbers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.progress_option
def chat(models: tuple[str, ...], paths: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure how good Chat is in long dialogues.

    Without a judge: what knowing the history is worth to the likelihood of the answers in --data, and
    whether Chat recalls facts that it was told. Every figure stands with its 95% interval; "against the
    first" compares with the first MODEL. What each measure is, and how far to trust it, is in
    docs/evaluate.md.

    \b
    Examples:
      parrot evaluate chat smollm2 smollm2+chat.gguf --data held-out.jsonl
      parrot evaluate chat chat --data dialogues.jsonl --held-out 0.05 --probes 0 --json
    """
    from parrot_edge.evaluate import chat as measures  # loads llama.cpp
    from parrot_edge.evaluate.sources import read_source

    if not paths and not given["probes"]:
        raise UsageError("there is nothing to measure; give --data or --probes")
    which = {"held_out": given["held_out"], "limit": given["limit"], "seed": given["seed"]}
    sources = [read_source(path, **which, skip=given["on_error"] == "skip") for path in paths]
    names = ("probes", "context", "parallel", "threads", "seed")
    settings = measures.ChatSettings(**{name: given[name] for name in names})
    with StepLine(given["progress"]) as line:
        report = options.run_interruptibly(
            measures.evaluate_chat(
                [parse_model(model) for model in dict.fromkeys(models)],
                settings,
                sources=sources,
                progress=line.show,
            ),
            "nothing is kept of what was measured",
        )
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    click.echo("\n".join(_table(report)))


_HISTORY = {
    "per_token": "Perplexity per token, with the history",
    "gain": "Gain from the history, nats a token",
    "gain_over_another": "Gain over another dialogue's history",
}
_AGAINST_FIRST = {
    "perplexity_below": "perplexity, by what part below",
    "gain_above": "gain from the history, above",
    "gain_over_another_above": "gain over another's, above",
}
_RECALL = {"chosen": "told value is the likeliest", "said": "told value is said"}


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """The table's sections, each with its title."""
    sources = [source["name"] for source in report["data"]]
    turns = dict.fromkeys(
        turn for each in report["models"] for turn in dig(each, "history", "mean", "by_turn")
    )
    for key, title in _HISTORY.items():
        rows: Rows = [(name, ("history", "sources", name, key)) for name in sources]
        if len(sources) > 1:
            rows.append(("mean of the files", ("history", "mean", key)))
        yield title, rows + [(f"turn {turn}", ("history", "mean", "by_turn", turn, key)) for turn in turns]
    if len(report["models"]) > 1:
        yield (
            "Answers of others, against the first",
            [(title, ("history", "against_first", "mean", key)) for key, title in _AGAINST_FIRST.items()],
        )
    asked = dict.fromkeys(
        turn for each in report["models"] for turn in dig(each, "recall", "said", "by_turn")
    )
    for key, title in _RECALL.items():
        path = ("recall", key)
        rows = [(f"asked in turn {turn}", (*path, "by_turn", turn)) for turn in asked]
        rows.append(("mean", (*path, "mean")))
        if len(report["models"]) > 1:
            rows.append(("above the first", (*path, "above_first", "mean")))
        yield f"Recall, {title}", rows


def _table(report: dict[str, Any]) -> list[str]:
    """The report as lines: a row for each figure, a column for each model."""
    lines = [["", *(each["model"][-26:] for each in report["models"])]]
    return align_columns([*lines, *list_figures(_sections(report), report["models"])])
