"""`parrot stats`: what a file of dialogues is like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from parrot_edge.cli import options
from parrot_edge.cli.table import align_columns, format_figure
from parrot_edge.data.questions import QUESTION_TYPES
from parrot_edge.errors import UsageError


@click.command()
@click.argument("dialogues", default="-")
@click.option("--against", metavar="OTHER", help="Dialogues to stand beside these, say real ones.")
@click.option("--ask", metavar="MODEL", help="With --chat: who finds each message likelier, as whose.")
@click.option("--chat", metavar="MODEL", help="With --ask: the model that answers.")
@click.option("--plots", metavar="DIR", help="Draw the distributions into this new folder, as SVG.")
@click.option("--force", is_flag=True, help="Replace plots.")
@options.skip_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stats(
    dialogues: str,
    against: str | None,
    ask: str | None,
    chat: str | None,
    plots: str | None,
    force: bool,
    on_error: str,
    as_json: bool,
) -> None:
    """Describe dialogues by the measures that papers compare such data by.

    Turns, what leans on the context, topic shifts, diversity, questions, openings, endings and messages in
    the wrong role; with --against also how well a classifier tells the users of one file from those of the
    other (an AUC of 0.5 says that it cannot). Means stand with their 95% interval over dialogues. What
    each measure is, and how far to trust it, is in docs/data.md.

    \b
    Examples:
      parrot stats dialogues.jsonl
      parrot stats simulated.jsonl --against real.jsonl --plots plots
      parrot stats simulated.jsonl --ask ask --chat chat
      parrot stats dialogues.jsonl --json | jq .files[0].self_rouge
    """
    from parrot_edge.data.stats import compare_users, describe_file, describe_roles

    if (ask is None) != (chat is None):
        raise UsageError("--ask and --chat go together; give both")
    if against is not None and against == dialogues == "-":
        raise UsageError("stdin can be read once; name one of the files")
    files, columns = [], []
    for path in (dialogues, against) if against else (dialogues,):
        statistics, reader = describe_file(path, skip=on_error == "skip")
        [source] = reader.sources
        name = "stdin" if path == "-" else source.name
        columns.append({"name": name, "sha256": source.sha256, **statistics.report()})
        files.append(statistics)
        if reader.skipped:
            rows = "1 row was" if reader.skipped == 1 else f"{reader.skipped} rows were"
            click.echo(f"parrot: {rows} left out, first {reader.first_error}", err=True)
        if not statistics.dialogues:
            click.echo(f"parrot: {path} holds no dialogue", err=True)
    if ask and chat:
        from parrot_edge.data.role_likelihood import score_roles
        from parrot_edge.models import parse_model

        models = parse_model(ask), parse_model(chat)
        for statistics, column in zip(files, columns, strict=True):
            scores = score_roles(*models, statistics.drawn_follow_ups)
            column["wrong_role"]["likelihood"] = describe_roles(scores)
    told_apart = compare_users(files[0], files[1]) if against else None
    if plots:
        from parrot_edge.data.plots import draw_plots

        for drawn in draw_plots(columns, Path(plots), force=force):
            click.echo(f"parrot: drew {drawn}", err=True)
    if as_json:
        click.echo(json.dumps({"files": columns, "told_apart": told_apart}, ensure_ascii=False))
        return
    click.echo("\n".join(_table(columns, told_apart)))


_ROWS: dict[str, dict[str, str]] = {
    "Size": {
        "dialogues": "dialogues",
        "user_messages": "messages of users",
        "turns": "turns a dialogue",
        "words.dialogue": "words a dialogue",
        "words.user_mean": "words of a user's message, mean",
        "words.user_median": "median",
        "words.assistant_mean": "words of an answer, mean",
        "words.assistant_median": "median",
    },
    "Context": {
        "context_dependent.per_dialogue": "turns that lean on it, a dialogue",
        "context_dependent.share": "share of follow-ups",
        "topic_shifts.per_dialogue": "topic shifts, a dialogue",
        "topic_shifts.share": "share of follow-ups",
    },
    "Diversity of users' messages": {
        "self_rouge": "Self-ROUGE-L within a dialogue, 0..100",
        "distinct_1": "distinct words in 300",
        "distinct_2": "distinct pairs of words in 300",
        "mtld": "MTLD",
        "openings.distinct": "distinct openings",
        "openings.rouge_l": "ROUGE-L between openings, 0..100",
        "openings.first_words_bits": "entropy of their first words, bits",
    },
    "Wrong role": {
        "wrong_role.phrases": "phrases of an assistant",
        "wrong_role.likeness": "looks like an assistant's",
        "wrong_role.likelihood.share": "likelier as Chat's than as Ask's",
        "wrong_role.likelihood.nats_a_token": "log-likelihood, Ask's less Chat's, nats a token",
    },
    "Questions": {f"questions.{name}": name for name in QUESTION_TYPES},
}
"""Sections, and the title of each figure of a report."""


def _table(columns: list[dict[str, Any]], told_apart: dict[str, float] | None) -> list[str]:
    """The reports as lines: a row for each figure, a column for each file."""
    lines = [["", *(column["name"][-30:] for column in columns)]]
    for section, rows in _sections(columns):
        lines.append([section])
        cells = [[f"  {title}", *(_cell(column, key) for column in columns)] for key, title in rows.items()]
        lines += [row for row in cells if any(row[1:])]
    if told_apart:
        lines += [["AUC, users told apart"], ["  by a classifier", format_figure(told_apart)]]
    return align_columns(lines)


def _sections(columns: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, str]]]:
    yield from _ROWS.items()
    reasons = dict.fromkeys(reason for column in columns for reason in column["stop_reasons"])
    if reasons:
        yield "Ended by", {f"stop_reasons.{reason}": reason for reason in reasons}


def _cell(column: dict[str, Any], key: str) -> str:
    """The figure at a dotted key, as text."""
    value: Any = column
    for part in key.split("."):
        value = (value or {}).get(part)
    if isinstance(value, dict):
        return format_figure(value)
    if isinstance(value, float):
        return format_figure({"value": value, "low": value, "high": value}).partition(" ")[0]
    return "" if value is None else str(value)
