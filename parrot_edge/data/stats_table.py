"""The statistics of dialogues as rows of text, for the terminal and for cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from parrot_edge.data.questions import QUESTION_TYPES
from parrot_edge.table import format_figure

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
        "wrong_role.likelihood.share": "hardly likelier as Ask's than as Chat's",
        "wrong_role.likelihood.nats_a_token": "log-likelihood, Ask's less Chat's, nats a token",
    },
    "Questions": {f"questions.{name}": name for name in QUESTION_TYPES},
}
"""Sections, and the title of each figure of a report."""


def list_statistics(reports: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """Each section's title, and its rows: a title and a cell for each of the `reports` of statistics.

    Intervals stand behind the figures that have one. What no report has is left out.
    """
    sections = dict(_ROWS)
    reasons = dict.fromkeys(reason for report in reports for reason in report["stop_reasons"])
    if reasons:
        sections["Ended by"] = {f"stop_reasons.{reason}": reason for reason in reasons}
    for section, rows in sections.items():
        cells = [(title, [_cell(report, key) for report in reports]) for key, title in rows.items()]
        yield section, [(title, row) for title, row in cells if any(row)]


def _cell(report: dict[str, Any], key: str) -> str:
    """The figure at a dotted key, as text."""
    value: Any = report
    for part in key.split("."):
        value = (value or {}).get(part)
    if isinstance(value, dict):
        return format_figure(value)
    if isinstance(value, float):
        return format_figure({"value": value, "low": value, "high": value}).partition(" ")[0]
    return "" if value is None else str(value)
