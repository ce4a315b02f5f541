"""A model as the judge of answers: a grade for each, and which of two is the better.

Both ways are those of Zheng et al. 2023 (arXiv 2306.05685), in words of our own: a grade from 1 to 10
for the answer of a turn, seen after the conversation before it and beside a reference where there is one;
and a comparison that is made twice, each answer coming first once, in which an answer only wins where
both orders say so. The judge answers greedily. A reply without a verdict is counted and left out.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Engine, Request, Sampling
from parrot_edge.evaluate.benchmark import Answers, Question
from parrot_edge.figures import Member, Resampling
from parrot_edge.simulate import take_in_turn

WORST, BEST = 1, 10

MAX_TOKENS = 512
"""Of what the judge says, its verdict included."""

_SINGLE = """\
You grade the work of an assistant. Below are a conversation between a user and the assistant, and the \
assistant's answer to the user's last message. Grade that answer alone. What was said before it tells you \
what the user means: an answer that forgets or contradicts it, or misses what the user refers to, is a bad \
one. Ask yourself whether the answer is correct, does what was asked, leaves nothing important out and does \
not ramble.{hint}

Say in a few sentences what is good and what is bad about it. Then write your grade in double square \
brackets on a line of its own: a whole number from 1 (useless) to 10 (could not be better), like [[5]].

--- The conversation ---
{history}

--- The answer to be graded ---
{answer}
{reference}--- End ---"""

_PAIR = """\
You compare the work of two assistants, A and B. A user said the same to both; below are the two \
conversations. Decide who gave the better answer to the user's last message. What was said before tells you \
what the user means: an answer that forgets or contradicts it, or misses what the user refers to, is a bad \
one. What counts is which answer is correct, does what was asked and leaves nothing important out. Neither \
the order of the two nor their length counts.{hint}

Say in a few sentences how they differ. Then write your verdict in double square brackets on a line of its \
own: [[A]] where A is better, [[B]] where B is better, or [[C]] where they are equally good.

--- The conversation with A ---
{first}

--- The conversation with B ---
{second}
{reference}--- End ---"""

_HINT = " A good answer is given for reference; what contradicts it is probably wrong."

Grades = list[list[float | None]]
"""For each question the grade of each turn's answer, 1 .. 10; None where the judge gave none."""

Verdicts = list[list[tuple[str, str] | None]]
"""For each question and turn, how the answer did in both orders, each "win", "tie" or "loss"; None where
the judge did not say."""


def parse_grade(text: str) -> float | None:
    """The last grade in double brackets, None where there is none from 1 to 10.

    >>> parse_grade("Not [[3]], rather [[ 7.5 ]]"), parse_grade("[[8/10]]")
    (7.5, 8.0)
    >>> parse_grade("[[11]]"), parse_grade("8 of 10")
    (None, None)
    """
    found = re.findall(r"\[\[\s*(\d{1,4}(?:\.\d+)?)(?:\s*/\s*10)?\s*\]\]", text)
    grade = float(found[-1]) if found else 0.0
    return grade if WORST <= grade <= BEST else None


def parse_choice(text: str) -> str | None:
    """The last of [[A]], [[B]] and [[C]] as its letter, or None.

    >>> parse_choice("[[A]] is wrong in part. [[B]]"), parse_choice("A is better.")
    ('B', None)
    """
    found = re.findall(r"\[\[\s*([ABC])\s*\]\]", text)
    return found[-1] if found else None


def single_prompt(question: Question, answers: Sequence[str], turn: int) -> str:
    """What the judge is told to grade the answer in a turn, counted from 0."""
    history = "\n\n".join(_lines(question, answers, turn)[:-1])
    return _SINGLE.format(history=history, answer=answers[turn], **_reference(question, turn))


def pair_prompt(question: Question, first: Sequence[str], second: Sequence[str], turn: int) -> str:
    """What the judge is told to compare two answers in a turn, counted from 0."""
    talks = ["\n\n".join(_lines(question, answers, turn)) for answers in (first, second)]
    return _PAIR.format(first=talks[0], second=talks[1], **_reference(question, turn))


def _lines(question: Question, answers: Sequence[str], turn: int) -> list[str]:
    pairs = zip(question.turns[: turn + 1], answers, strict=False)
    return [line for said, answer in pairs for line in (f"User: {said}", f"Assistant: {answer}")]


def _reference(question: Question, turn: int) -> dict[str, str]:
    reference = question.references[turn]
    section = f"\n--- A good answer to the last message ---\n{reference}\n\n" if reference else "\n"
    return {"hint": _HINT if reference else "", "reference": section}


async def grade_answers(
    judge: Engine,
    questions: Sequence[Question],
    answers: Answers,
    *,
    parallel: int = 16,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Grades:
    """A grade for each answer; one that is missing gets the worst without a look."""
    grades: Grades = [[None] * len(question.turns) for question in questions]

    async def grade(place: int, turn: int) -> None:
        question = questions[place]
        given = answers[question.id]
        if given[turn]:
            grades[place][turn] = parse_grade(await _ask(judge, single_prompt(question, given, turn)))
        else:
            grades[place][turn] = WORST

    await _over_turns(questions, grade, parallel, on_step)
    return grades


async def compare_answers(
    judge: Engine,
    questions: Sequence[Question],
    answers: Answers,
    others: Answers,
    *,
    parallel: int = 16,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Verdicts:
    """How each answer does against the other model's; a missing one loses against one that is there."""
    verdicts: Verdicts = [[None] * len(question.turns) for question in questions]

    async def compare(place: int, turn: int) -> None:
        question = questions[place]
        own, other = answers[question.id], others[question.id]
        if not (own[turn] and other[turn]):
            outcome = "tie" if own[turn] == other[turn] else "win" if own[turn] else "loss"
            verdicts[place][turn] = outcome, outcome
            return
        first = parse_choice(await _ask(judge, pair_prompt(question, own, other, turn)))
        second = parse_choice(await _ask(judge, pair_prompt(question, other, own, turn)))
        if first and second:
            verdicts[place][turn] = (
                {"A": "win", "B": "loss", "C": "tie"}[first],
                {"A": "loss", "B": "win", "C": "tie"}[second],
            )

    await _over_turns(questions, compare, parallel, on_step)
    return verdicts


async def _ask(judge: Engine, prompt: str) -> str:
    request = Request(
        [Message("user", prompt)],
        max_tokens=MAX_TOKENS,
        sampling=Sampling(temperature=0.0, repeat_penalty=1.0),
    )
    async with judge.session() as session:
        return (await session.reply(request)).text


async def _over_turns(
    questions: Sequence[Question],
    work: Callable[[int, int], Awaitable[None]],
    parallel: int,
    on_step: Callable[[int, int], None],
) -> None:
    places = [
        (place, turn) for place, question in enumerate(questions) for turn in range(len(question.turns))
    ]
    done = 0

    async def step(case: tuple[int, int]) -> None:
        nonlocal done
        await work(*case)
        done += 1
        on_step(done, len(places))

    await take_in_turn(iter(places), step, parallel)


def describe_grades(questions: Sequence[Question], grades: Grades) -> dict[str, Any]:
    """The mean grade, by turn and by category, over questions; and how many answers had none."""
    resampling, members = Resampling.of(len(questions))
    cases = list(_flatten(grades, members))

    def mean(some: Sequence[tuple[int, int, Member, float]]) -> Any:
        return resampling.mean([case[2] for case in some], [case[3] for case in some])

    turns = range(max(len(question.turns) for question in questions))
    categories = dict.fromkeys(question.category for question in questions if question.category)
    return {
        "mean": mean(cases),
        "by_turn": {str(turn + 1): mean([case for case in cases if case[1] == turn]) for turn in turns},
        "by_category": {
            category: mean([case for case in cases if questions[case[0]].category == category])
            for category in categories
        },
        "graded": len(cases),
        "no_verdict": sum(grade is None for each in grades for grade in each),
    }


def describe_verdicts(questions: Sequence[Question], verdicts: Verdicts) -> dict[str, Any]:
    """Shares of wins, ties and losses, in all and by turn, over questions; where the two orders disagree
    it is a tie, and those are also given as `disagree`."""
    resampling, members = Resampling.of(len(questions))
    cases = list(_flatten(verdicts, members))

    def shares(some: Sequence[tuple[int, int, Member, tuple[str, str]]]) -> dict[str, Any]:
        at = [case[2] for case in some]
        outcomes = [one if one == other else "tie" for _, _, _, (one, other) in some]
        return {
            name: resampling.share(at, [outcome == name for outcome in outcomes])
            for name in ("win", "tie", "loss")
        }

    turns = range(max(len(question.turns) for question in questions))
    return {
        **shares(cases),
        "disagree": resampling.share(
            [case[2] for case in cases], [case[3][0] != case[3][1] for case in cases]
        ),
        "by_turn": {str(turn + 1): shares([case for case in cases if case[1] == turn]) for turn in turns},
        "compared": len(cases),
        "no_verdict": sum(verdict is None for each in verdicts for verdict in each),
    }


def _flatten(
    table: Sequence[Sequence[Any]], members: Sequence[Member]
) -> Iterator[tuple[int, int, Member, Any]]:
    """Question, turn, member and value of everything that the judge said."""
    for place, row in enumerate(table):
        for turn, value in enumerate(row):
            if value is not None:
                yield place, turn, members[place], value
