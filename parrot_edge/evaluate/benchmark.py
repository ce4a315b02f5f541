"""Questions of several turns in MT-Bench's format, and what models answer to them.

    {"question_id", "category"?, "turns": [text, ...], "reference"?: [text, ...]}            a question
    {"question_id", "answer_id", "model_id", "choices": [{"index", "turns": [text, ...]}], "tstamp"}
                                                                                    a model's answers to it

The formats are those of FastChat's llm_judge (Zheng et al. 2023, arXiv 2306.05685). It knows nothing of
judges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_edge.dialogue import Message, content_id
from parrot_edge.engine.base import Engine, Request, Sampling
from parrot_edge.errors import InputError
from parrot_edge.jsonl import Appender, Line, read_lines
from parrot_edge.models import LocalModel, RemoteModel
from parrot_edge.simulate import take_in_turn
from parrot_edge.store import sha256_of

SAMPLING = Sampling(temperature=0.0)
"""Greedy, but for the usual penalty of repetition: small models run in circles without."""


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn; `references` holds a good answer or None for each turn."""

    id: int | str
    category: str | None
    turns: tuple[str, ...]
    references: tuple[str | None, ...]


Answers = dict[int | str, list[str]]
"""By a question's id, an answer for each of its turns; "" where the model had none, or no room for one."""


def read_questions(path: str) -> list[Question]:
    """The questions of a file; raises `InputError`, also where two have the same id or there are none."""
    questions: dict[int | str, Question] = {}
    for line in read_lines(path):
        question = _parse_question(line)
        if question.id in questions:
            raise line.error(f"question_id {question.id!r} comes a second time; give each question its own")
        questions[question.id] = question
    if not questions:
        raise InputError("holds no questions", source=path)
    return list(questions.values())


def _parse_question(line: Line) -> Question:
    row = line.row()
    identity = _question_id(line, row)
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise line.error('"category" must be a text')
    turns = _texts(line, row.get("turns"), "turns")
    listed = row.get("reference") or []
    if not isinstance(listed, list) or not all(each is None or isinstance(each, str) for each in listed):
        raise line.error('"reference" must be a list of texts, one for each turn')
    references = [each.strip() or None if each else None for each in listed[: len(turns)]]
    return Question(identity, category, tuple(turns), (*references, *[None] * (len(turns) - len(references))))


def _question_id(line: Line, row: dict[str, Any]) -> int | str:
    identity = row.get("question_id")
    if not isinstance(identity, int | str) or isinstance(identity, bool):
        raise line.error('has no "question_id"; this is not MT-Bench\'s format')
    return identity


def _texts(line: Line, value: object, key: str, *, may_be_empty: bool = False) -> list[str]:
    texts = value if isinstance(value, list) else []
    if not texts or not all(isinstance(text, str) and (text.strip() or may_be_empty) for text in texts):
        raise line.error(f'"{key}" must be a list of one text or more')
    return texts


def count_unanswered(answers: Answers) -> int:
    """Turns that a model had no answer to."""
    return sum(not text for texts in answers.values() for text in texts)


def identify_model(model: LocalModel | RemoteModel) -> str:
    """What tells a model from others of its name: its files' SHA-256, or an endpoint's address."""
    if isinstance(model, RemoteModel):
        return model.target
    return content_id([sha256_of(path) for path in (model.path, model.adapter) if path])


class AnswerFile:
    """Answers that are kept: those that the file holds need not be made again, new ones are appended.

    Answers of other programs are taken as they are. Raises `InputError` where a row is none or was made
    of another question or model, or with another limit, and `OutputError` where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._rows: dict[tuple[int | str, str], tuple[Line, list[str], str | None]] = {}
        self._file = Appender(path)
        try:
            self._read(path)
        except InputError:
            self._file.close()
            raise

    def _read(self, path: Path) -> None:
        for line in read_lines(path):
            row = line.row()
            try:
                turns = row["choices"][0]["turns"]
            except (KeyError, IndexError, TypeError):
                raise line.error('has no "choices" with "turns"; these are not MT-Bench\'s answers') from None
            key = _question_id(line, row), str(row.get("model_id"))
            self._rows[key] = line, _texts(line, turns, "turns", may_be_empty=True), row.get("made_from")

    def find(self, question: Question, model: str, made_from: str) -> list[str] | None:
        """The answers to a question, or None; `made_from` is what they depend on."""
        if (question.id, model) not in self._rows:
            return None
        line, answers, source = self._rows[question.id, model]
        if (source or made_from) != made_from or len(answers) != len(question.turns):
            raise line.error(
                f"{model} answered this under other conditions (questions, model file or --max-tokens); "
                "name another file with --answers"
            )
        return answers

    def add(self, question: Question, model: str, made_from: str, answers: list[str]) -> None:
        """Keep answers."""
        self._file.append(
            {
                "question_id": question.id,
                "answer_id": content_id([question.id, model, answers]),
                "model_id": model,
                "choices": [{"index": 0, "turns": answers}],
                "tstamp": time.time(),
                "made_from": made_from,
            }
        )

    def close(self) -> None:
        """Release the file; one that has nothing in it goes."""
        if self._file.size:
            self._file.close()
        else:
            self._file.discard()


async def answer_questions(
    engine: Engine,
    questions: Sequence[Question],
    *,
    model: tuple[str, str],
    max_tokens: int = 512,
    parallel: int = 16,
    kept: AnswerFile | None = None,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Answers:
    """What a model answers, turn by turn, `parallel` questions at once.

    model  its name, and what tells it from others of that name
    """
    name, identity = model
    answers: Answers = {}

    async def answer(question: Question) -> None:
        made_from = content_id([question.turns, identity, max_tokens])
        found = kept.find(question, name, made_from) if kept else None
        if found is None:
            found = await _converse(engine, question, max_tokens)
            if kept:
                kept.add(question, name, made_from, found)
        answers[question.id] = found
        on_step(len(answers), len(questions))

    await take_in_turn(iter(questions), answer, parallel)
    return answers


async def _converse(engine: Engine, question: Question, max_tokens: int) -> list[str]:
    messages: list[Message] = []
    answers: list[str] = []
    async with engine.session() as session:
        for turn in question.turns:
            messages = [*messages, Message("user", turn)]
            reply = await session.reply(Request(messages, max_tokens=max_tokens, sampling=SAMPLING))
            if reply.finish == "context":
                break
            answers.append(reply.text.strip())
            messages = [*messages, Message("assistant", answers[-1])]
    return answers + [""] * (len(question.turns) - len(answers))
