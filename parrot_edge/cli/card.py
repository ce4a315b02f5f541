"""`parrot card`: the card of a file of dialogues, and its way to the hub."""

from __future__ import annotations

from pathlib import Path

import click

from parrot_edge.errors import UsageError


@click.command()
@click.argument("dialogues", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="FILE", help="The card; - is stdout.  [default: README.md beside them]"
)
@click.option(
    "--license",
    "license_id",
    metavar="SPDX",
    help="Licence of the dialogues.  [default: that of models and seeds, where they are parrot's own]",
)
@click.option("--language", metavar="CODE", help="Language of the users.  [default: what parrot curate kept]")
@click.option(
    "--seeds-from", metavar="TEXT", default="", help="Where openings come from that are not parrot's own."
)
@click.option("--force", is_flag=True, help="Replace the card.")
@click.option("--push", "repository", metavar="OWNER/NAME", help="Upload both to the hub (HF_TOKEN).")
def card(
    dialogues: Path,
    output: str | None,
    license_id: str | None,
    language: str | None,
    seeds_from: str,
    force: bool,
    repository: str | None,
) -> None:
    """Write the card of a file of dialogues: statistics, models, licences; hand it out on the hub.

    Models, seeds and curation are read from the rows and from what parrot curate left beside them. The
    card is what the hub shows of a dataset. Without --push nothing leaves this machine; what is
    uploaded needs a licence, and is for its owner alone until that is changed on the hub.

    \b
    Examples:
      parrot card clean.jsonl
      parrot card clean.jsonl --license cc-by-4.0 --seeds-from "UltraChat (MIT)" --language en
      parrot card clean.jsonl --push me/clean-dialogues
    """
    from parrot_edge.data.card import CARD, check_license, describe_dialogues, push_dialogues, write_card
    from parrot_edge.hub import check_upload

    beside = dialogues.parent / CARD
    target = Path(output) if output else beside
    if repository:
        if output:
            raise UsageError(f"--push uploads {beside}; leave -o out")
        check_upload(repository)
    written = describe_dialogues(dialogues, license_id=license_id, language=language, seeds_from=seeds_from)
    if repository:
        check_license(written)
    if output == "-":
        click.echo(written.text(), nl=False)
        return
    write_card(written, target, force=force)
    click.echo(f"parrot: wrote {target}", err=True)
    if not written.statistics.dialogues:
        click.echo(f"parrot: {dialogues} holds no dialogue", err=True)
    if not written.license:
        click.echo("parrot: the card names no licence; give one with --license", err=True)
    if repository:
        click.echo(push_dialogues(written, repository), err=True)
