"""`parrot curate`: the dialogues that are worth training on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parrot_edge.cli import options
from parrot_edge.errors import UsageError

if TYPE_CHECKING:
    from parrot_edge.data.curate import Entry, Examine, Examiner, Verdict
    from parrot_edge.dialogue import Message

REASONS = (
    "short", "cut_off", "wrong_role", "repetitive", "language", "sensitive", "personal",
    "duplicate", "near_duplicate", "leak",
)  # fmt: skip
"""Those of `data.curate` that may be allowed."""


@click.command()
@click.argument("dialogues", default="-")
@options.output_option
@click.option("--rejects", metavar="FILE", help="Where rejected rows go.  [default: OUT.rejects.jsonl]")
@click.option(
    "--against",
    metavar="FILE",
    multiple=True,
    help="Reject rows with a question of this file, say a benchmark's; may be given again.",
)
@click.option(
    "--min-turns", type=click.IntRange(0), default=2, show_default=True, help="Fewest answered turns."
)
@click.option(
    "--min-words",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Fewest words of a user's message, on average.",
)
@click.option("--language", metavar="CODE", help="The language that users write, say en.  [default: any]")
@click.option("--words", metavar="FILE", help="A list of sensitive words in place of parrot's own.")
@click.option(
    "--allow",
    type=click.Choice(REASONS),
    multiple=True,
    help="Reject nothing for this reason; may be given again.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a row that is no dialogue: stop, or reject it and go on.",
)
@options.ray_option
@click.option("--resume", is_flag=True, help="Carry on the run that -o was begun by.")
@click.option("--force", is_flag=True, help="Replace what -o and --rejects name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; needs -o FILE.")
def curate(dialogues: str, as_json: bool, **given: Any) -> None:
    """Keep the dialogues that are worth training on; the others go aside, each with its reason.

    Rejected are rows that are short, cut off, repetitive, sensitive, in the wrong role or another language,
    that hold personal data or keys, and that repeat an earlier row or a question of --against. Rows keep
    their order. What each filter does, and what it misses, is in docs/data.md.

    \b
    Examples:
      parrot curate dialogues.jsonl -o clean.jsonl --against mt_bench.jsonl
      parrot curate dialogues.jsonl -o clean.jsonl --language en --allow cut_off --resume
      parrot simulate seeds.jsonl | parrot curate --rejects rejects.jsonl > clean.jsonl
    """
    from parrot_edge.data.curate import Report, Rules, curate_file

    output, resume, force = given["output"], given["resume"], given["force"]
    if output == "-" and (resume or as_json):
        raise UsageError("--resume and --json need -o FILE")
    if resume and force:
        raise UsageError("give --resume or --force, not both")
    rejects = given["rejects"] or ("rejects.jsonl" if output == "-" else f"{output}.rejects.jsonl")
    for written in (output, rejects):
        for read in (dialogues, *given["against"]):
            options.refuse_same_file(read, written)
    if Path(rejects).absolute() == Path(output).absolute():
        raise UsageError(f"-o and --rejects both name {output}; give them different names")

    def show(report: Report) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{report.read} rows, {report.kept} kept\x1b[K", err=True, nl=False)

    try:
        with options.connect_ray(given["ray"]) as cluster:
            report = curate_file(
                dialogues,
                None if output == "-" else Path(output),
                Path(rejects),
                Rules(
                    given["min_turns"], given["min_words"], given["language"], given["words"], given["allow"]
                ),
                against=given["against"],
                skip=given["on_error"] == "skip",
                resume=resume,
                force=force,
                on_progress=show,
                spread=partial(_examine_on_ray, cluster) if cluster else None,
            )
    except KeyboardInterrupt:
        again = options.command_line(add="--resume", drop="--force")
        carry_on = f"carry on with: {again}" if output != "-" else "the rows written are whole"
        click.echo(f"\nparrot: stopped; {carry_on}", err=True)
        raise
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items())
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    click.echo(f"{start}parrot: {report['read']} rows, {report['kept']} kept", nl=False, err=True)
    click.echo(f"; rejected, see {rejects}: {reasons}" if reasons else "", err=True)
    if not report["read"]:
        click.echo(f"parrot: {dialogues} holds no dialogue", err=True)


def _examine_on_ray(
    cluster: str, examiner: Examiner, entries: Iterable[Entry]
) -> Iterator[tuple[Entry, Examine]]:
    """A `data.curate.Spread`."""
    from parrot_edge.cluster.spread import map_in_order

    examined = map_in_order(cluster, examiner.examine_all, entries, key=lambda entry: entry.messages)
    for entry, found in examined:
        yield entry, partial(_answer, found)


def _answer(found: Verdict | None, messages: Sequence[Message]) -> Verdict | None:
    return found
