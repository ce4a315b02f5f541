"""What lies beside an adapter for people: its model card, and the loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parrot_edge.jsonl import read_lines
from parrot_edge.recipe import TrainRecipe

_ROLES = {
    "ask": "plays the user: it writes the next question of a person who talks to an assistant",
    "chat": "plays the assistant: it answers in a dialogue of several turns",
}


def write_card(path: Path, recipe: TrainRecipe, record: dict[str, Any]) -> None:
    """The model card of an adapter, from what `training.json` will hold."""
    base, data, prompt = record["base"], record["data"], record["prompt"]
    front = ["---", "library_name: peft", "tags: [parrot-edge, lora, dialogue]"]
    if "file" not in base:
        front.append(f"base_model: {base['name']}")
    if recipe.license:
        front.append(f"license: {recipe.license}")
    measures = record["measures"]
    lora = recipe.lora
    table = [
        f"| {source['name']} | {source['rows']:,} | `{source['sha256']}` |" for source in data["sources"]
    ]
    figures = [
        f"| {name} | {_figure(measures['before'].get(name))} | {_figure(value)} |"
        for name, value in measures["after"].items()
    ]
    activation = ""
    if record["invocation"]:
        activation = (
            "\n\nIt is an activated LoRA (arXiv 2504.12397): the base alone reads what was said before, and\n"
            f"the adapter starts with the header of the turn that it writes, tokens {record['invocation']}."
        )
    text = f"""# {recipe.name}

A LoRA adapter that {_ROLES[recipe.role]}. Trained by `parrot train` with the recipe in `recipe.yaml`;
`training.json` holds everything below for programs.

## Base

{_list(base)}
- adapter: rank {lora.rank}, alpha {lora.alpha}, {record["trained_parameters"]:,} parameters
- quantization while training: {recipe.base.quantization}

The adapter belongs to this very file: over another quantisation of the same model it says something else.

## How to prompt it

{_list({key: json.dumps(value, ensure_ascii=False) for key, value in prompt.items()})}

The model is asked for a turn by a prompt that ends in that turn's header, and ends it by what closes
the turn. A user turn that holds nothing but the end marker ends the dialogue.{activation}

## Data

| source | rows | sha256 |
| --- | --- | --- |
{chr(10).join(table)}

{data["dialogues"]:,} dialogues; {data["tokens"]:,} tokens an epoch, {data["targets"]:,} of them learned.
{recipe.data.held_out:.0%} of the dialogues were kept back for measuring.

## Measures

{measures["steps"]:,} steps over {measures["tokens"]:,} tokens. Losses: means over the role's tokens, in nats.

| on dialogues kept back | base | with the adapter |
| --- | --- | --- |
{chr(10).join(figures)}

## Versions

{", ".join(f"{name} {value}" for name, value in record["versions"].items() if value)}
"""
    path.write_text("\n".join([*front, "---", text]), encoding="utf-8")


def _list(items: dict[str, str]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: `{value}`" for key, value in items.items())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw_curve(curve: Path, picture: Path) -> None:
    """The loss curve of a JSON Lines file as a PNG: each log, and a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [line.row() for line in read_lines(curve)]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    axes.plot(steps, losses, ".", color="0.7", markersize=4, label="logged")
    width = max(1, len(losses) // 20)
    recent = [losses[max(0, end - width) : end] for end in range(1, len(losses) + 1)]
    axes.plot(steps, [sum(part) / len(part) for part in recent], label=f"mean of the last {width}")
    axes.legend(frameon=False)
    figure.savefig(picture)
