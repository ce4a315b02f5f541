"""What a round of `bin/parrot-loop` did, and whether it made Chat better, as one page of Markdown.

    python -m parrot_edge.rounds DIR/round-1

It reads what the stages have printed: `done/NAME.json` of a stage, and `done/seconds`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_edge.errors import ParrotError, UsageError
from parrot_edge.machine import plural
from parrot_edge.store import read_json
from parrot_edge.table import dig, format_figure

Figure = Mapping[str, float]

_AGAINST = ("history", "against_first", "mean")
_MEASURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "perplexity of held-out answers",
        ("history", "mean", "per_token"),
        (*_AGAINST, "perplexity_below"),
    ),
    ("gain from the history (nats a token)", ("history", "mean", "gain"), (*_AGAINST, "gain_above")),
    (
        "gain over another dialogue's history (nats a token)",
        ("history", "mean", "gain_over_another"),
        (*_AGAINST, "gain_over_another_above"),
    ),
    (
        "recall: the told value is the likeliest",
        ("recall", "chosen", "mean"),
        ("recall", "chosen", "above_first", "mean"),
    ),
    ("recall: the told value is said", ("recall", "said", "mean"), ("recall", "said", "above_first", "mean")),
)
"""What is compared: a title, where a model's report has the figure, and where its difference to the first
model, above 0 where it is better."""


@dataclass(frozen=True)
class Change:
    """How far a model is from the one before the round by one measure.

    gain  the paired difference, above 0 where the model is better, with its 95 % interval
    """

    measure: str
    model: str
    before: Figure | None
    after: Figure | None
    gain: Figure

    @property
    def verdict(self) -> str:
        """Better or worse where the interval is clear of zero.

        >>> Change("", "", None, None, {"value": 0.1, "low": -0.1, "high": 0.3}).verdict
        'no difference shown'
        """
        if self.gain["low"] > 0:
            return "better"
        return "worse" if self.gain["high"] < 0 else "no difference shown"


def find_changes(evaluation: Mapping[str, Any]) -> list[Change]:
    """The differences of all models to the first one, in the report of `parrot evaluate chat`."""
    first, *others = evaluation["models"]
    return [
        Change(measure, model["model"], dig(first, *value) or None, dig(model, *value) or None, gain)
        for model in others
        for measure, value, difference in _MEASURES
        if (gain := dig(model, *difference))
    ]


def write_report(round_folder: Path) -> str:
    """The page; raises `UsageError` where the folder is no finished round."""
    done = {name: read_json(round_folder / "done" / f"{name}.json") for name in _STAGES}
    if not done["evaluate"]:
        raise UsageError(f"{round_folder} is no finished round; run bin/parrot-loop to its end")
    changes = find_changes(done["evaluate"])
    last = changes[-1].model if changes else ""
    parts = [
        f"# {round_folder.resolve().name}",
        _headline([change for change in changes if change.model == last]),
        "## Before and after",
        _table_of(changes),
        _NOTE,
        "## What was done",
        _list_stages(round_folder, done),
    ]
    return "\n\n".join(parts) + "\n"


_STAGES = (
    *("simulate", "curate", "card", "train-chat", "convert-chat", "capo"),
    *("train-dpo", "convert-dpo", "evaluate"),
)
_VERDICTS = ("better", "worse", "no difference shown")
_NOTE = (
    "Differences are paired, over the held-out dialogues and over the facts told, with 95 % intervals; above "
    "0 is better. That of the perplexity is the part by which it fell. One of twenty such intervals misses "
    "zero by chance."
)


def _headline(changes: list[Change]) -> str:
    """One sentence: on which measures the round's model is better, worse, or neither."""
    found = []
    for verdict in _VERDICTS:
        if measures := [change.measure for change in changes if change.verdict == verdict]:
            found.append(f"**{verdict}** in {', '.join(measures)}")
    if not found:
        return "Nothing was measured that compares the model after the round with the one before it."
    return f"`{changes[0].model}` against the model before the round: {'; '.join(found)}."


def _table_of(changes: list[Change]) -> str:
    rows = ["| measure | model | before | after | better by | |", "| --- " * 6 + "|"]
    for change in changes:
        cells = [
            change.measure,
            f"`{change.model}`",
            *(format_figure(dict(figure)) if figure else "" for figure in (change.before, change.after)),
            format_figure(dict(change.gain)),
            change.verdict,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _list_stages(round_folder: Path, done: Mapping[str, dict[str, Any]]) -> str:
    seconds = _read_seconds(round_folder / "done" / "seconds")
    rows = ["| stage | seconds | |", "| --- | --- | --- |"]
    for name in _STAGES:
        if name in seconds:
            told = "; ".join(_describe(name, round_folder, done[name]))
            rows.append(f"| {name} | {seconds[name]:,} | {told} |")
    return "\n".join([*rows, "", "Seconds are those of the start that finished a stage."])


def _describe(name: str, folder: Path, printed: Mapping[str, Any]) -> Iterator[str]:
    """What a stage says of itself."""
    if name == "simulate":
        yield plural(_count_lines(folder / "dialogues.jsonl"), "dialogue")
    elif name == "curate":
        yield f"{printed['kept']:,} of {printed['read']:,} kept"
        yield from (f"{count:,} {reason}" for reason, count in printed["rejected"].items())
    elif name == "capo":
        yield plural(_count_lines(folder / "pairs.jsonl"), "preference pair")
    elif name.startswith("train"):
        measures = printed["measures"]
        yield plural(measures["steps"], "step")
        for measure, value in measures["after"].items():
            before = measures["before"].get(measure)
            yield f"{measure} {value:.4g}" + ("" if before is None else f", before {before:.4g}")
    elif name.startswith("convert"):
        yield "certified" if printed["certificate"]["passed"] else "failed its certificate"


def _read_seconds(path: Path) -> dict[str, int]:
    """Seconds by stage, in the order in which stages came to their end."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: int(count) for name, _, count in (line.partition(" ") for line in lines) if count.isdigit()}


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


if __name__ == "__main__":
    try:
        [folder] = sys.argv[1:]
    except ValueError:
        sys.exit("usage: python -m parrot_edge.rounds FOLDER")
    try:
        sys.stdout.write(write_report(Path(folder)))
    except (ParrotError, OSError) as error:
        sys.exit(f"parrot: {error}")
