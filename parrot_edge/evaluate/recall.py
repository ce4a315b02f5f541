"""Whether a model recalls what it was told: facts from templates, told in turn 1 and asked for later.

What is said in between is written here as well, so that every model is asked after the very same text,
and a model that says little is not asked sooner. A probe is answered in two ways:

    said    the model answers greedily; right where it names the told value and none of its rivals
    chosen  of the answers with each of the values, the told one is the likeliest; by chance 1 in 8

A small model that cannot put what it knows into words can still choose.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Engine, Request, Sampling
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.figures import Member, Resampling, average
from parrot_edge.simulate import take_in_turn

ASKED_IN = (2, 5, 8)
"""Turns in which the fact is asked for, each in a dialogue of its own."""

MAX_TOKENS = 48
"""Of an answer to a probe."""


@dataclass(frozen=True)
class Fact:
    """A kind of fact: how it is told, asked for and answered, and the values it can have."""

    telling: str
    question: str
    answer: str
    values: tuple[str, ...]


def _fact(telling: str, question: str, answer: str, values: str) -> Fact:
    return Fact(telling, question, answer, tuple(values.split()))


FACTS = (
    _fact("My name is {}.", "What is my name?", "Your name is {}.",
          "Martin Laura Peter Sarah Thomas Helen Oliver Nina"),
    _fact("I have a dog called {}.", "What is my dog called?", "Your dog is called {}.",
          "Rex Bella Max Luna Charlie Daisy Rocky Molly"),
    _fact("I live in {}.", "Which city do I live in?", "You live in {}.",
          "Berlin Madrid Toronto Chicago Sydney Vienna Dublin Boston"),
    _fact("My favorite color is {}.", "What is my favorite color?", "Your favorite color is {}.",
          "red blue green yellow purple orange pink brown"),
    _fact("I work as a {}.", "What is my job?", "You work as a {}.",
          "baker nurse plumber teacher farmer lawyer painter pilot"),
    _fact("My hotel room is number {}.", "What is the number of my hotel room?",
          "Your hotel room is number {}.", "214 387 126 453 538 679 741 865"),
    _fact("My birthday is in {}.", "In which month is my birthday?", "Your birthday is in {}.",
          "January March April June July September October December"),
    _fact("I am allergic to {}.", "What am I allergic to?", "You are allergic to {}.",
          "peanuts strawberries milk eggs shrimp wheat soy honey"),
    _fact("I am learning to play the {}.", "Which instrument am I learning to play?",
          "You are learning to play the {}.", "piano violin guitar flute cello trumpet drums harp"),
    _fact("My next holiday is in {}.", "Which country am I going to on my next holiday?",
          "You are going to {} on your next holiday.",
          "Norway Japan Brazil Egypt Greece Canada India Portugal"),
    _fact("My sister is called {}.", "What is my sister called?", "Your sister is called {}.",
          "Anna Julia Emma Sophie Maria Karen Alice Rachel"),
    _fact("I am taking lessons in {}.", "Which language am I taking lessons in?",
          "You are taking lessons in {}.", "Spanish French German Italian Russian Arabic Chinese Dutch"),
)  # fmt: skip

ACKNOWLEDGEMENT = "Thank you for telling me. I will keep that in mind."

FILLERS = (
    ("How can I keep bread fresh for longer?",
     "Keep it in a paper bag at room temperature, and freeze what you do not need within two days."),
    ("Why does the moon change its shape?",
     "It does not. We see more or less of the side that the sun shines on as it goes around the earth."),
    ("What is a good way to fall asleep?",
     "Go to bed at the same time every night, keep the room cool and dark, and put your phone away."),
    ("How do I remove a scratch from a wooden table?",
     "Rub it with a walnut. The oil darkens the bare wood, so that a light scratch is hardly seen."),
    ("What makes popcorn pop?",
     "There is a little water in each kernel. It turns to steam, and the pressure bursts the shell."),
    ("How often should I water a cactus?",
     "About every two weeks while it grows. Let the soil dry out completely before you water it again."),
    ("Why do we yawn?",
     "Nobody knows for sure. It may cool the brain, or help us to stay awake when we are bored."),
    ("How do I fold a fitted sheet?",
     "Tuck the corners into each other, lay it flat, fold the edges in, and fold it like any other sheet."),
    ("What is the difference between fog and mist?",
     "Only how far you can see: less than one kilometer in fog, and more than that in mist."),
    ("How can I make my bicycle chain last longer?",
     "Wipe it after every wet ride, and put one drop of oil on each link about once a month."),
    ("Why is the sea salty?",
     "Rivers carry salt from the rocks into it. The water leaves again as vapor, and the salt stays."),
    ("What should I pack for a day in the hills?",
     "Bring water, a map, a rain jacket, something to eat, and shoes with a good sole."),
)  # fmt: skip
"""What is talked about in between; none of it names a value of any fact."""


@dataclass(frozen=True)
class Probe:
    """A fact with the value that is told, and the exchanges that come between, as many as are needed."""

    number: int
    fact: Fact
    told: str
    fillers: tuple[tuple[str, str], ...]

    @property
    def member(self) -> Member:
        """What is resampled: the probes of a fact count as one, as they are alike."""
        return "recall", self.fact.question

    def dialogue(self, asked_in: int) -> list[Message]:
        """The dialogue up to the question, which is the user's message in that turn, >= 2."""
        opening = f"{self.fact.telling.format(self.told)} Please keep that in mind."
        exchanges = [(opening, ACKNOWLEDGEMENT), *self.fillers[: asked_in - 2]]
        said = [
            Message(*pair) for each in exchanges for pair in zip(("user", "assistant"), each, strict=True)
        ]
        return [*said, Message("user", self.fact.question)]

    def is_said(self, reply: str) -> bool:
        """Whether a reply names the told value and none of the others."""
        named = [value for value in self.fact.values if re.search(rf"\b{value}\b", reply, re.IGNORECASE)]
        return named == [self.told]


def make_probes(count: int, seed: int = 0) -> list[Probe]:
    """So many probes, drawn by `seed`: the facts in turn, and of each all values before one comes again."""
    probes = []
    for number in range(count):
        lap, kind = divmod(number, len(FACTS))
        fact = FACTS[kind]
        order = sorted(fact.values, key=lambda value: derive_seed(seed, "told", kind, value))
        fillers = sorted(FILLERS, key=lambda filler: derive_seed(seed, "filler", number, filler[0]))
        told = order[lap % len(order)]
        probes.append(Probe(number, fact, told, tuple(fillers[: max(ASKED_IN) - 2])))
    return probes


Outcomes = dict[int, list[bool]]
"""For each turn of `ASKED_IN`, whether each probe was right."""


def choose_values(
    likelihood: Likelihood, probes: Sequence[Probe], on_step: Callable[[int, int], None] = lambda *_: None
) -> Outcomes:
    """Whether the model finds the answer with the told value likelier than any other; one that its context
    cannot hold is wrong."""
    outcomes: Outcomes = {turn: [] for turn in ASKED_IN}
    for done, probe in enumerate(probes, 1):
        for turn in ASKED_IN:
            view = probe.dialogue(turn)
            answers = {
                value: likelihood.encode(view, "assistant", probe.fact.answer.format(value))[0]
                for value in probe.fact.values
            }
            alike = itertools.takewhile(
                lambda tokens: len(set(tokens)) == 1, zip(*answers.values(), strict=False)
            )
            start = len(list(alike))  # what all answers begin with decides nothing
            if max(map(len, answers.values())) > likelihood.tokens:
                outcomes[turn].append(False)
                continue
            log_probs = {
                value: float(likelihood.log_probs(tokens, start).sum()) for value, tokens in answers.items()
            }
            outcomes[turn].append(max(log_probs, key=lambda value: log_probs[value]) == probe.told)
        on_step(done, len(probes))
    return outcomes


async def answer_probes(
    engine: Engine,
    probes: Sequence[Probe],
    *,
    parallel: int = 16,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Outcomes:
    """Whether the model says the told value, and no other, when it is asked."""
    outcomes: Outcomes = {turn: [False] * len(probes) for turn in ASKED_IN}
    done = 0

    async def ask(case: tuple[Probe, int]) -> None:
        nonlocal done
        probe, turn = case
        greedy = Sampling(temperature=0.0, repeat_penalty=1.0)
        async with engine.session() as session:
            reply = await session.reply(Request(probe.dialogue(turn), max_tokens=MAX_TOKENS, sampling=greedy))
        outcomes[turn][probe.number] = probe.is_said(reply.text)
        done += 1
        on_step(done, len(probes) * len(ASKED_IN))

    await take_in_turn(((probe, turn) for turn in ASKED_IN for probe in probes), ask, parallel)
    return outcomes


def describe_recall(probes: Sequence[Probe], outcomes: Outcomes) -> dict[str, Any]:
    """The share of probes that were right, on average and by the turn in which they were asked."""
    members = [probe.member for probe in probes]
    resampling = Resampling({"recall": [name for _, name in dict.fromkeys(members)]})
    by_turn = {str(turn): resampling.share(members, right) for turn, right in outcomes.items()}
    return {"mean": average(by_turn.values()), "by_turn": by_turn}
