"""The card of a file of dialogues, as the hub shows it: what it is like, and what it was made from.

All of it is read from the rows themselves and from what `parrot curate` left beside them. A licence is
only named by whoever hands the data out, or where everything that the rows came from has the same.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parrot_edge.data.curate import REASONS
from parrot_edge.data.sources import Reader, Source, Thread
from parrot_edge.data.stats import Statistics
from parrot_edge.data.stats_table import list_statistics
from parrot_edge.dialogue import Message, parse_messages, parse_seed
from parrot_edge.errors import UsageError
from parrot_edge.hub import upload_files
from parrot_edge.jsonl import read_lines
from parrot_edge.machine import format_bytes, plural
from parrot_edge.models import ASK_ADAPTER, EMBEDDED, embedded_path
from parrot_edge.seeds import builtin_path
from parrot_edge.store import new_file, read_json

CARD = "README.md"
"""The card's name, by which the hub knows it."""

_OURS = "apache-2.0"  # of the embedded model, the shipped adapter and the built-in seeds alike

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass
class Origins:
    """What the rows say of themselves.

    models   who played "ask" and who "chat", and in how many rows
    seeds    run seeds, each with its rows
    builtin  rows that start from a seed of the package
    """

    models: dict[str, Counter[str]] = field(default_factory=lambda: {"ask": Counter(), "chat": Counter()})
    seeds: Counter[int] = field(default_factory=Counter)
    builtin: int = 0

    @property
    def synthetic(self) -> bool:
        """Whether models wrote any of it, as far as the rows tell."""
        return any(self.models.values())


@dataclass(frozen=True)
class Card:
    """What a card says.

    path        the file of dialogues
    license     SPDX identifier, or None where nobody has named one
    language    ISO 639-1 code of what users write, or None
    seeds_from  where openings that are not the package's come from, in the user's words
    """

    path: Path
    statistics: Statistics
    source: Source
    origins: Origins
    curation: dict[str, Any]
    license: str | None
    language: str | None
    seeds_from: str

    def text(self) -> str:
        """README.md."""
        parts = [self._front_matter(), f"# {self.path.stem}", self._summary()]
        parts += ["## Made from", self._made_from(), "## Statistics", self._table(), "## Use", self._use()]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        tags = ["dialogue", "multi-turn", "parrot-edge", *(["synthetic"] if self.origins.synthetic else [])]
        size = next((name for most, name in _SIZES if self.source.rows < most), "n>1M")
        lines = [
            f"pretty_name: {json.dumps(self.path.stem, ensure_ascii=False)}",
            *([f"license: {json.dumps(self.license)}"] if self.license else []),
            *([f"language: {json.dumps([self.language])}"] if self.language else []),
            "task_categories: [text-generation]",
            f"size_categories: [{json.dumps(size)}]",
            f"tags: {json.dumps(tags)}",
            "configs:",
            "- config_name: default",
            "  data_files:",
            "  - split: train",
            f"    path: {json.dumps(self.path.name, ensure_ascii=False)}",
        ]
        return "\n".join(["---", *lines, "---"])

    def _summary(self) -> str:
        statistics, size = self.statistics, format_bytes(self.path.stat().st_size)
        messages = statistics.user_words.total() + statistics.assistant_words.total()
        count = f"{plural(statistics.dialogues, 'dialogue')} with {plural(messages, 'message')}"
        lines = [f"{count} in `{self.path.name}` ({size}, SHA-256 `{self.source.sha256}`)."]
        if self.origins.synthetic:
            lines.append(
                "Two language models wrote them, one playing the user (Ask) and one the assistant (Chat), "
                "with `parrot simulate`. Nobody has checked what they say."
            )
        lines.append(
            f"Licence: {self.license}."
            if self.license
            else "No licence was named, so nobody else may use it yet."
        )
        return "\n".join(lines)

    def _made_from(self) -> str:
        dialogues, origins = self.statistics.dialogues, self.origins
        rows = ["| what | name | dialogues | licence |", "| --- | --- | --- | --- |"]
        for role, models in origins.models.items():
            rows += [
                f"| {role.capitalize()} | `{name}` | {count:,} | {_license_of(name) or 'not known'} |"
                for name, count in models.most_common()
            ]
        if origins.builtin:
            rows.append(f"| openings | the seeds of parrot_edge | {origins.builtin:,} | {_OURS} |")
        if others := dialogues - origins.builtin:
            told = _as_cell(self.seeds_from) if self.seeds_from else "not told"
            rows.append(f"| openings | {told} | {others:,} | {'see there' if self.seeds_from else ''} |")
        parts = ["\n".join(rows)]
        if origins.seeds:
            parts.append(f"Seeds of the runs: {', '.join(map(str, sorted(origins.seeds)))}.")
        if self.curation:
            parts.append(self._curated())
        return "\n\n".join(parts)

    def _curated(self) -> str:
        curation = self.curation
        rejected = {reason: count for reason, count in curation["rejected"].items() if reason in REASONS}
        against = [Path(name).name for name in curation["settings"]["against"]]
        lines = [f"`parrot curate` kept {curation['kept']:,} of {plural(curation['read'], 'dialogue')}."]
        if against:
            lines[0] += f" None repeats a question of {', '.join(f'`{name}`' for name in against)}."
        if rejected:
            lines += ["", "| rejected | dialogues | why |", "| --- | --- | --- |"]
            lines += [f"| {reason} | {count:,} | {REASONS[reason]} |" for reason, count in rejected.items()]
        return "\n".join(lines)

    def _table(self) -> str:
        """The statistics, as `parrot stats` shows them."""
        lines = ["| | |", "| --- | --- |"]
        for section, rows in list_statistics([self.statistics.report()]):
            if rows:
                lines.append(f"| **{section}** | |")
                lines += [f"| {title} | {cell} |" for title, [cell] in rows]
        return "\n".join([*lines, "", "Intervals are of 95 %. The measures are those of `parrot stats`."])

    def _use(self) -> str:
        return "\n".join(
            [
                'A row is `{"id", "messages": [{"role", "content"}, ...], ...}`, user first.',
                "",
                "```python",
                "from datasets import load_dataset",
                "",
                f'dialogues = load_dataset("json", data_files={json.dumps(self.path.name)}, split="train")',
                "```",
            ]
        )


def describe_dialogues(
    path: Path, *, license_id: str | None = None, language: str | None = None, seeds_from: str = ""
) -> Card:
    """Read a file of dialogues and what lies beside it.

    license_id  SPDX identifier; without it, that of all models and seeds where they are known to agree
    language    ISO 639-1 code; without it, the one that `parrot curate` was told to keep

    Raises `InputError` for a row that is no dialogue.
    """
    if license_id and not re.fullmatch(r"[A-Za-z0-9.+-]+", license_id):
        raise UsageError(
            f"{license_id!r} is no licence's identifier; write it as the hub does, say cc-by-4.0"
        )
    statistics, origins, openings = Statistics(), Origins(), _read_openings()
    reader = Reader([str(path)], may_be_empty=True)
    for thread, messages in reader.read(
        lambda thread: (thread, parse_messages(thread.line, thread.messages))
    ):
        statistics.add(messages, _text_of(thread, "stop_reason"))
        for role, names in origins.models.items():
            if name := _text_of(thread, f"{role}_model"):
                names[name] += 1
        if isinstance(seed := thread.row.get("seed"), int):
            origins.seeds[seed] += 1
        origins.builtin += _starts_from(openings, thread, messages)
    curation = read_json(path.with_name(path.name + ".curate.json"))
    if not curation.get("complete"):
        curation = {}
    return Card(
        path,
        statistics,
        reader.sources[0],
        origins,
        curation,
        license_id or _common_license(origins, statistics.dialogues),
        language or curation.get("settings", {}).get("rules", {}).get("language"),
        seeds_from,
    )


def write_card(card: Card, target: Path, *, force: bool = False) -> None:
    """Write a card; raises `OutputError` where `target` exists without `force` or cannot be written."""
    with new_file(target, force=force) as draft:
        draft.write_text(card.text(), encoding="utf-8")


def push_dialogues(card: Card, repo_id: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Upload the dialogues and the card beside them, as a dataset, and return its address.

    Raises as `hub.upload_files` does, and `UsageError` without a licence: what is handed out must have one.
    """
    check_license(card)
    names = (card.path.name, CARD, f"{card.path.name}.curate.json")
    return upload_files(
        card.path.parent,
        [glob.escape(name) for name in names],
        repo_id,
        kind="dataset",
        message="Upload dialogues",
        private=private,
        endpoint=endpoint,
    )


def check_license(card: Card) -> None:
    """Raise `UsageError` where a card names no licence."""
    if not card.license:
        raise UsageError(
            f"{card.path} does not tell under which licence it is; name one with --license, say cc-by-4.0"
        )


def _license_of(model: str) -> str | None:
    """The licence of a model, by its name in the rows: known of what comes with parrot.

    >>> _license_of("smollm2+ask-smollm2.gguf"), _license_of("smollm2+mine.gguf")
    ('apache-2.0', None)
    """
    base, _, adapter = model.partition("+")
    is_embedded = base == EMBEDDED or base.startswith(embedded_path().stem)
    return _OURS if is_embedded and adapter in ("", ASK_ADAPTER.name) else None


def _common_license(origins: Origins, dialogues: int) -> str | None:
    """The licence where all models and openings are known to have the same one."""
    names = origins.models.values()
    is_ours = all(_license_of(name) == _OURS for each in names for name in each)
    is_told = {origins.builtin, *(each.total() for each in names)} == {dialogues}
    return _OURS if dialogues and is_ours and is_told else None


def _read_openings() -> dict[str, str]:
    """What each seed of the package opens with, or is about, by its id."""
    seeds = [parse_seed(line) for line in read_lines(builtin_path())]
    return {seed.id: seed.topic or seed.messages[-1].content for seed in seeds}


def _starts_from(openings: Mapping[str, str], thread: Thread, messages: Sequence[Message]) -> bool:
    known = openings.get(_text_of(thread, "id") or "")
    first = next((message.content for message in messages if message.role == "user"), None)
    return known is not None and known in (first, thread.row.get("topic"))


def _parse(thread: Thread) -> tuple[Thread, tuple[Message, ...]]:
    return thread, parse_messages(thread.line, thread.messages)


def _text_of(thread: Thread, key: str) -> str | None:
    value = thread.row.get(key)
    return value if isinstance(value, str) else None


def _as_cell(text: str) -> str:
    """A text that stays in its cell of a table."""
    return " ".join(text.replace("|", r"\|").split())
