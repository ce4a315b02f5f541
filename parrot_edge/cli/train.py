"""`parrot train`: a recipe and dialogues become an adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import click

from parrot_edge.cli import options
from parrot_edge.errors import UsageError
from parrot_edge.recipe import TrainRecipe, load_recipe


@click.command()
@click.argument("recipe", metavar="RECIPE")
@options.set_option
@click.option(
    "--data",
    "sources",
    metavar="DIALOGUES",
    multiple=True,
    help="A JSON Lines file, or hf:owner/name[:split]; may be given again. Replaces the recipe's.",
)
@click.option("-o", "--output", metavar="DIR", help="Folder for the adapter.  [default: the recipe's name]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the folder, or start.")
@click.option("--force", is_flag=True, help="Replace the folder.")
@click.option("--dry-run", "--plan-only", "plan_only", is_flag=True, help="Say the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print what training.json holds (or the plan).")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    sources: tuple[str, ...],
    output: str | None,
    resume: bool,
    force: bool,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Train an adapter that plays the user (Ask) or the assistant (Chat).

    RECIPE is a name that `parrot recipes list` shows, or a YAML file. The plan, the progress and the
    time left go to stderr.

    \b
    Examples:
      parrot train ask-135m-cpu --data dialogues.jsonl -o ask-135m
      parrot train chat-8b-16gb --data hf:HuggingFaceH4/ultrachat_200k:train_sft --dry-run
      parrot train ask-135m-cpu --data dialogues.jsonl --set lora.rank=8 --set optim.epochs=2
      parrot train ask-135m-cpu --data dialogues.jsonl -o ask-135m --resume
      accelerate launch -m parrot_edge train ask-13b-24gb --data dialogues.jsonl -o ask-13b
    """
    values = load_recipe(recipe, overrides)
    if not isinstance(values, TrainRecipe):
        raise UsageError(f"{recipe} is a recipe of kind {values.kind!r}; `parrot train` takes kind 'train'")
    if sources:
        values = replace(values, data=replace(values.data, sources=sources))
    if not values.data.sources:
        raise UsageError(f"the recipe {values.name} names no data; give some with --data")

    from parrot_edge.train import trainer

    def say(line: str) -> None:
        click.echo(line, err=True)

    if plan_only:
        plan = trainer.plan_run(values, say=say)
        for line in plan.lines():
            say(line)
        report = asdict(plan)
    else:
        report = trainer.train(values, output or values.name, resume=resume, force=force, say=say)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
