"""`parrot view`: dialogues as a page."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from parrot_edge.cli import options
from parrot_edge.errors import UsageError


@click.command()
@click.argument("dialogues", default="-")
@click.option(
    "-o", "--output", default="-", metavar="PAGE", help="The page, an HTML file; - is stdout.  [default: -]"
)
@click.option("--force", is_flag=True, help="Replace what -o names.")
@options.skip_option
def view(dialogues: str, output: str, force: bool, on_error: str) -> None:
    """Make one HTML page of dialogues, to read, search and filter them.

    The page needs no network and no other file, and runs nothing that a dialogue says. A dialogue's
    address is that of the page with #ID.

    \b
    Examples:
      parrot view dialogues.jsonl -o dialogues.html
      parrot simulate --seeds builtin --limit 5 | parrot view -o five.html
    """
    from parrot_edge.data.sources import Reader
    from parrot_edge.view.page import open_page, write_page
    from parrot_edge.view.shown import show

    if output == "-" and force:
        raise UsageError("--force needs -o PAGE")
    if output == "-" and sys.stdout.isatty():
        raise UsageError("a page is nothing for a terminal; name a file with -o PAGE")
    options.refuse_same_file(dialogues, output)
    reader = Reader([dialogues], skip=on_error == "skip", may_be_empty=True, chosen=True)
    title = "Dialogues" if dialogues == "-" else dialogues.rpartition("/")[2]
    if output == "-":
        count = write_page(reader.read(show), sys.stdout.buffer, title=title)
    else:
        with open_page(Path(output), force=force) as page:
            count = write_page(reader.read(show), page, title=title)
    if reader.skipped:
        rows = "1 row was" if reader.skipped == 1 else f"{reader.skipped} rows were"
        click.echo(f"parrot: {rows} left out, first {reader.first_error}", err=True)
    if not count:
        source = "<stdin>" if dialogues == "-" else dialogues
        click.echo(f"parrot: {source} holds no dialogue; the page is empty", err=True)
