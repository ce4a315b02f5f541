"""`parrot evaluate chat`: how good Chat is in long dialogues."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
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
    "--questions", metavar="FILE", help="Questions in MT-Bench's format, to be answered and judged."
)
@click.option("--judge", metavar="MODEL", help="Who grades the answers, and compares them with the first's.")
@click.option(
    "--answers", metavar="FILE", help="Keep the answers in FILE; those it holds are not made again."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Longest answer to a question, in tokens.",
)
@click.option("--plots", metavar="DIR", help="Draw the curves by turn into this folder, as SVG.")
@click.option("--force", is_flag=True, help="Replace plots.")
@click.option(
    "--parallel", type=click.IntRange(1), default=16, show_default=True, help="Messages made at once."
)
@click.option(
    "--context",
    type=click.IntRange(512),
    default=2048,
    show_default=True,
    metavar="TOKENS",
    help="Longest text of --data and probes; of a longer history the latest turns are kept.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: see parrot doctor]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random numbers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.progress_option
def chat(models: tuple[str, ...], paths: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure how good Chat is in long dialogues.

    Without a judge: what knowing the history is worth to the likelihood of the answers in --data, and
    whether Chat recalls facts that it was told. With one: grades from 1 to 10 of its answers to
    --questions, by turn, and from the second MODEL on wins and losses against the first. Every figure
    stands with its 95% interval; "against the first" compares with the first MODEL. What each measure
    is, and how far to trust it, is in docs/evaluate.md.

    \b
    Examples:
      parrot evaluate chat smollm2 smollm2+chat.gguf --data held-out.jsonl
      parrot evaluate chat chat --data dialogues.jsonl --held-out 0.05 --probes 0 --json
      parrot evaluate chat old.gguf new.gguf --questions question.jsonl --judge judge.gguf --plots plots
    """
    from parrot_edge.evaluate import chat as measures  # loads llama.cpp
    from parrot_edge.evaluate.benchmark import AnswerFile, read_questions
    from parrot_edge.evaluate.curves import draw_curves, refuse_existing_curves
    from parrot_edge.evaluate.sources import read_source

    if not (paths or given["probes"] or given["questions"]):
        raise UsageError("there is nothing to measure; give --data, --probes or --questions")
    if given["questions"] and not (given["judge"] or given["answers"]):
        raise UsageError("--questions needs --judge, or --answers to keep what is answered")
    if not given["questions"] and (given["judge"] or given["answers"]):
        raise UsageError("--judge and --answers need --questions")
    if given["force"] and not given["plots"]:
        raise UsageError("--force needs --plots")
    if given["questions"] and given["answers"]:
        options.refuse_same_file(given["questions"], given["answers"])
    if given["plots"]:
        refuse_existing_curves(Path(given["plots"]), force=given["force"])
    which = {"held_out": given["held_out"], "limit": given["limit"], "seed": given["seed"]}
    sources = [read_source(path, **which, skip=given["on_error"] == "skip") for path in paths]
    names = ("probes", "context", "parallel", "threads", "seed")
    settings = measures.ChatSettings(**{name: given[name] for name in names})
    parsed = [parse_model(model) for model in dict.fromkeys(models)]
    advice = "nothing is kept of what was measured"
    with contextlib.ExitStack() as stack:
        benchmark = None
        if given["questions"]:
            questions, kept = read_questions(given["questions"]), None
            if given["answers"]:
                kept = stack.enter_context(contextlib.closing(AnswerFile(Path(given["answers"]))))
                advice = (
                    f"the answers in {given['answers']} are whole, and the same command goes on from there"
                )
            judge = parse_model(given["judge"]) if given["judge"] else None
            benchmark = measures.Benchmark(questions, judge, kept, given["max_tokens"])
        line = stack.enter_context(StepLine(given["progress"]))
        report = options.run_interruptibly(
            measures.evaluate_chat(
                parsed, settings, sources=sources, benchmark=benchmark, progress=line.show
            ),
            advice,
        )
    _say_failures(report)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else "\n".join(_table(report)))
    if given["plots"]:
        for drawn in draw_curves(report, Path(given["plots"]), force=given["force"]):
            click.echo(f"parrot: drew {drawn}", err=True)


def _say_failures(report: dict[str, Any]) -> None:
    """Say what could not be judged, or was not answered."""
    for each in report["models"]:
        benchmark = each["benchmark"] or {}
        if count := benchmark.get("unanswered"):
            graded = ", each graded 1" if benchmark["grades"] else ""
            click.echo(f"parrot: {each['model']} had no answer to {count} turns{graded}", err=True)
        for key, done, what in (
            ("grades", "graded", "answers"),
            ("against_first", "compared", "comparisons"),
        ):
            judged = benchmark.get(key) or {}
            if failed := judged.get("no_verdict"):
                total = failed + judged[done]
                click.echo(
                    f"parrot: {report['benchmark']['judge']} gave no verdict in {failed} of {total} {what} "
                    f"of {each['model']}; they are left out",
                    err=True,
                )


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
_AGAINST = {
    "win": "wins",
    "tie": "ties",
    "loss": "losses",
    "disagree": "the two orders disagree (ties)",
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
    yield from _judged_sections(report)


def _judged_sections(report: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """What the judge said."""
    grades = [dig(each, "benchmark", "grades") for each in report["models"]]
    path = ("benchmark", "grades")
    for key, title in (("by_turn", "turn "), ("by_category", "")):
        names = dict.fromkeys(name for each in grades for name in dig(each, key))
        yield f"Grade, {key.replace('_', ' ')}", [(f"{title}{name}", (*path, key, name)) for name in names]
    yield "Grade, 1 to 10", [("mean", (*path, "mean")), ("above the first", (*path, "above_first"))]
    path = ("benchmark", "against_first")
    turns = dict.fromkeys(turn for each in report["models"] for turn in dig(each, *path, "by_turn"))
    rows: Rows = [(title, (*path, key)) for key, title in _AGAINST.items()]
    rows += [(f"wins in turn {turn}", (*path, "by_turn", turn, "win")) for turn in turns]
    yield "Compared with the first", rows


def _table(report: dict[str, Any]) -> list[str]:
    """The report as lines: a row for each figure, a column for each model."""
    lines = [["", *(each["model"][-26:] for each in report["models"])]]
    return align_columns([*lines, *list_figures(_sections(report), report["models"])])
