"""`parrot recipes`: what training runs there are, to read, to copy and to check."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from parrot_edge.recipe import copy_recipe, find_recipe, list_recipes, load_recipe


@click.group()
def recipes() -> None:
    """List, show, copy and check training recipes.

    \b
    Examples:
      parrot recipes list
      parrot recipes copy ask-8b-16gb mine.yaml
      parrot recipes validate mine.yaml
    """


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(as_json: bool) -> None:
    """List the recipes that come with parrot.

    \b
    Example:
      parrot recipes list --json
    """
    shipped = list_recipes()
    if as_json:
        rows = [{"name": r.name, "summary": r.summary, "command": r.command} for r in shipped]
        click.echo(json.dumps({"recipes": rows}, ensure_ascii=False))
        return
    width = max((len(recipe.name) for recipe in shipped), default=0)
    for recipe in shipped:
        click.echo(f"{recipe.name:{width}}  {recipe.summary}")


@recipes.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a value (with --json).")
@click.option("--json", "as_json", is_flag=True, help="Print every value, defaults too, as one JSON object.")
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe as it is written.

    \b
    Examples:
      parrot recipes show ask-135m-cpu
      parrot recipes show ask-135m-cpu --set lora.rank=8 --json
    """
    if as_json:
        click.echo(json.dumps(asdict(load_recipe(recipe, overrides)), ensure_ascii=False))
    else:
        click.echo(find_recipe(recipe).text, nl=False)


@recipes.command()
@click.argument("recipe", metavar="RECIPE")
@click.argument("target", metavar="TARGET")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def copy(recipe: str, target: str, force: bool) -> None:
    """Copy a recipe to a file, or into a folder, to change it.

    \b
    Example:
      parrot recipes copy ask-135m-cpu mine.yaml
    """
    click.echo(copy_recipe(recipe, target, force=force))


@recipes.command()
@click.argument("files", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def validate(files: tuple[str, ...], as_json: bool) -> None:
    """Check recipes; the first that is wrong is an error that names file, key and value.

    \b
    Example:
      parrot recipes validate mine.yaml recipes/*.yaml
    """
    checked = [{"recipe": file, "kind": load_recipe(file).kind} for file in files]
    if as_json:
        click.echo(json.dumps({"valid": checked}, ensure_ascii=False))
        return
    for row in checked:
        click.echo(f"{row['recipe']}: a valid recipe of kind {row['kind']}")
