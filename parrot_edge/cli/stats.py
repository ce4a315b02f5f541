"""`parrot stats`: what a file of dialogues is like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from parrot_edge.cli import options
from parrot_edge.data.stats_table import list_statistics
from parrot_edge.errors import UsageError
from parrot_edge.table import align_columns, format_figure


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


def _table(columns: list[dict[str, Any]], told_apart: dict[str, float] | None) -> list[str]:
    """The reports as lines: a row for each figure, a column for each file."""
    lines = [["", *(column["name"][-30:] for column in columns)]]
    for section, rows in list_statistics(columns):
        lines += [[section], *([f"  {title}", *cells] for title, cells in rows)]
    if told_apart:
        lines += [["AUC, users told apart"], ["  by a classifier", format_figure(told_apart)]]
    return align_columns(lines)
