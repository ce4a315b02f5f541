"""How much Ask is like the people it plays, measured on real dialogues that it never saw.

    perplexity  of what people wrote, given what had been said before
    ending      whether Ask would end a dialogue where people ended it
    turns       what Ask writes in their place: its role, length and diversity, and how well a
                classifier tells it from what they wrote (an AUC of 0.5 says that it cannot)
    simulation  how whole dialogues go: messages in the wrong role, and why the dialogues end

All systems are measured at the same places and on the same resamples, in which the branches of a tree,
and dialogues with the same opening, count as one. It does not know the command line.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from parrot_edge.data.diversity import STRETCH, find_distinct
from parrot_edge.data.likeness import COMPARED, tell_apart
from parrot_edge.data.sources import Dialogue, Reader, is_held_out
from parrot_edge.data.text import words_of
from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Engine, Reply, Request, Sampling, Session
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.sampling import derive_seed
from parrot_edge.errors import InputError, UsageError
from parrot_edge.figures import Member, Resampling, average, readable
from parrot_edge.models import LocalModel, RemoteModel, parse_model
from parrot_edge.pair import Load, open_pair
from parrot_edge.roles import END_MARK, FLIPPED, NATIVE, AskPrompt, Speaker, ask_view, sounds_like_assistant
from parrot_edge.simulate import RowsOnly, Run, RunSettings, take_in_turn

# What is measured, and where


@dataclass(frozen=True)
class System:
    """A model and how it is prompted as Ask; None: as its file says, or else as suits it."""

    model: LocalModel | RemoteModel
    prompt: AskPrompt | None = None

    @classmethod
    def parse(cls, text: str, prompt: str = "default") -> System:
        """A system from MODEL@PROMPT, or from MODEL with the `prompt` given; see `parse_prompt`."""
        match = re.fullmatch(r"(.+)@((?:native|flipped|default)(?::.*)?)", text, re.DOTALL)
        model, own = match.groups() if match else (text, prompt)
        return cls(parse_model(model), parse_prompt(own))


def parse_prompt(text: str) -> AskPrompt | None:
    """A prompt from "default" (None), "native", "flipped", or one of these with a system line of one's own.

    >>> parse_prompt("native:A person asks short questions.")
    AskPrompt(native=True, system='A person asks short questions.')
    """
    name, colon, system = text.partition(":")
    prompt = {"native": NATIVE, "flipped": FLIPPED}.get(name)
    if text != "default" and (prompt is None or (colon and not system.strip())):
        raise UsageError(
            f"{text!r} is no prompt; write native, flipped, default, native:TEXT or flipped:TEXT"
        )
    return replace(prompt, system=system.strip()) if prompt and colon else prompt


def prompt_name(prompt: AskPrompt) -> str:
    """How a prompt is named in a report, and may be written in a command.

    >>> prompt_name(NATIVE), prompt_name(AskPrompt(False, "Ask the next question."))
    ('native', 'flipped:Ask the next question.')
    """
    name, usual = ("native", NATIVE) if prompt.native else ("flipped", FLIPPED)
    return name if prompt == usual else f"{name}:{prompt.system or ''}"


@dataclass(frozen=True)
class Turn:
    """A user turn that a person wrote after `history`, which may begin with a system message."""

    member: Member
    dialogue: int
    history: tuple[Message, ...]
    text: str

    @property
    def is_opening(self) -> bool:
        return all(message.role == "system" for message in self.history)


@dataclass(frozen=True)
class Stop:
    """A place after an answer, where the person `ended` the dialogue or went on."""

    member: Member
    dialogue: int
    history: tuple[Message, ...]
    ended: bool


@dataclass
class Source:
    """The dialogues of a file, as the places to be measured, in order."""

    name: str
    groups: list[str]
    dialogues: int = 0
    places: list[Turn | Stop] = field(default_factory=list)

    @property
    def turns(self) -> list[Turn]:
        return [place for place in self.places if isinstance(place, Turn)]


def read_source(
    path: str, *, held_out: float = 1.0, limit: int | None = None, seed: int = 0, skip: bool = False
) -> Source:
    """The dialogues of a file, in any shape that `parrot train` reads.

    held_out  only this share: what a recipe with the same `data.held_out` keeps back
    limit     only so many, drawn by `seed`; the branches of a tree count as one
    skip      leave rows out that cannot be used, instead of raising `InputError`
    """
    reader = Reader([path], skip=skip)
    groups: dict[str, list[Dialogue]] = {}
    for dialogue in reader.dialogues():
        if is_held_out(dialogue, held_out):
            groups.setdefault(dialogue.group, []).append(dialogue)
    if limit is not None:
        drawn = set(sorted(groups, key=lambda group: derive_seed(seed, group))[:limit])
        groups = {group: dialogues for group, dialogues in groups.items() if group in drawn}
    if not groups:
        raise InputError("holds no dialogue to measure on", source=path)
    source = Source(reader.sources[0].name, list(groups))
    for group, dialogues in groups.items():
        source.places += _find_places(dialogues, (source.name, group), source.dialogues)
        source.dialogues += len(dialogues)
    return source


def _find_places(dialogues: Sequence[Dialogue], member: Member, number: int) -> Iterator[Turn | Stop]:
    """Turns and stops of a group, in order and numbered from `number`; what dialogues share comes once,
    and they end only where none of them goes on."""
    threads = [
        tuple(Message(message.role, message.content.strip()) for message in dialogue.messages)
        for dialogue in dialogues
    ]
    gone_on = {thread[:end] for thread in threads for end in range(1, len(thread))}
    seen: set[tuple[Message, ...]] = set()
    for position, (thread, dialogue) in enumerate(zip(threads, dialogues, strict=True), number):
        for end, last in enumerate(thread, 1):
            said = thread[:end]
            if last.role == "system" or said in seen:
                continue
            seen.add(said)
            if last.role == "user":
                yield Turn(member, position, said[:-1], last.content)
            elif said in gone_on or dialogue.ended:
                yield Stop(member, position, said, ended=said not in gone_on)


# Perplexity and ending


@dataclass(frozen=True)
class TurnScore:
    """What a turn costs: nats over its tokens, the closing one included, and bytes of its text.

    shortened  its history was too long for the context
    cut        it was so itself; the figures are those of its first part
    """

    turn: Turn
    nats: float
    tokens: int
    bytes: int
    shortened: bool
    cut: bool


@dataclass(frozen=True)
class StopScore:
    """ln P(Ask ends the dialogue here)."""

    stop: Stop
    log_prob: float


def score_places(
    likelihood: Likelihood, prompt: AskPrompt, places: Iterable[Turn | Stop]
) -> tuple[list[TurnScore], list[StopScore]]:
    """How likely Ask finds each turn (teacher forcing), and an end of the dialogue at each stop.

    Where the context cannot hold a history, the latest whole exchanges that fit in half of it are kept,
    and those that follow join them until it is full again; of a single exchange that takes more than
    that, the last eighth of the context of either message.
    """
    role = "user" if prompt.native else "assistant"
    end_texts = ("",) if prompt.native else ("", END_MARK)
    window = _Window(likelihood, prompt)
    turns: list[TurnScore] = []
    stops: list[StopScore] = []
    for place in places:
        view = window.view_of(place)
        if isinstance(place, Stop):
            ends = [likelihood.log_probs(*likelihood.encode(view, role, text)).sum() for text in end_texts]
            stops.append(StopScore(place, float(np.logaddexp.reduce(ends))))
            continue
        tokens, start = likelihood.encode(view, role, place.text)
        cut, tokens = len(tokens) > likelihood.tokens, tokens[: likelihood.tokens]
        text = likelihood.text_of(tokens[start:]) if cut else place.text
        log_probs = likelihood.log_probs(tokens, start)
        turns.append(
            TurnScore(
                place,
                nats=-float(log_probs.sum()),
                tokens=len(log_probs),
                bytes=len(text.encode("utf-8")),
                shortened=window.first > 0,
                cut=cut,
            )
        )
    return turns, stops


class _Window:
    """What of a history the context holds, from its turn `first` on; it moves in leaps, so that what
    the cache holds serves again."""

    def __init__(self, likelihood: Likelihood, prompt: AskPrompt) -> None:
        self._likelihood, self._prompt = likelihood, prompt
        self._role = "user" if prompt.native else "assistant"
        self._dialogue = -1
        self.first = 0

    def view_of(self, place: Turn | Stop) -> list[Message]:
        """The conversation as Ask is prompted with it."""
        if place.dialogue != self._dialogue:
            self._dialogue, self.first = place.dialogue, 0
        system = [message for message in place.history if message.role == "system"]
        turns = [message for message in place.history if message.role != "system"]

        def view_of(some: Sequence[Message]) -> list[Message]:
            return ask_view(Seed(""), [*system, *some], self._prompt)

        text = place.text if isinstance(place, Turn) else END_MARK
        if self._length(view_of(turns[self.first :]), text) > self._likelihood.tokens:
            half = self._likelihood.tokens // 2
            while self.first < len(turns) and self._length(view_of(turns[self.first :])) > half:
                self.first += 2
        if turns and self.first >= len(turns):
            part = self._likelihood.tokens // 8
            return view_of([Message(m.role, self._likelihood.last_part(m.content, part)) for m in turns[-2:]])
        return view_of(turns[self.first :])

    def _length(self, view: Sequence[Message], text: str = "") -> int:
        return len(self._likelihood.encode(view, self._role, text)[0])


def _find_perplexity(scores: Sequence[TurnScore], resampling: Resampling) -> dict[str, Any]:
    """exp(nats / tokens), of openings and follow-ups apart as well, and exp(nats / bytes)."""

    def perplexity(some: Sequence[TurnScore], sizes: Sequence[int]) -> np.ndarray:
        members = [score.turn.member for score in some]
        return np.exp(resampling.ratio(members, [score.nats for score in some], sizes))

    openings = [score for score in scores if score.turn.is_opening]
    others = [score for score in scores if not score.turn.is_opening]
    return {
        "per_token": perplexity(scores, [score.tokens for score in scores]),
        "opening": perplexity(openings, [score.tokens for score in openings]),
        "follow_up": perplexity(others, [score.tokens for score in others]),
        "per_byte": perplexity(scores, [score.bytes for score in scores]),
    }


def _find_ending(scores: Sequence[StopScore], resampling: Resampling) -> dict[str, Any]:
    """Whether an end is likelier where people ended (AUC), and its mean probability in both places."""
    ended, going_on = (
        ([score.stop.member for score in part], [score.log_prob for score in part])
        for part in ([score for score in scores if score.stop.ended == end] for end in (True, False))
    )
    return {
        "auc": resampling.auc(ended, going_on),
        "at_end": resampling.mean(ended[0], np.exp(ended[1]).tolist()),
        "in_middle": resampling.mean(going_on[0], np.exp(going_on[1]).tolist()),
    }


# Turns that Ask writes


def sample_turns(sources: Sequence[Source], count: int, seed: int = 0) -> list[Turn]:
    """About so many turns, as many of each source where it has them, drawn by `seed`."""
    drawn: list[Turn] = []
    for source in sources:
        numbered = sorted(enumerate(source.turns), key=lambda item: derive_seed(seed, source.name, item[0]))
        drawn += [turn for _, turn in numbered[: math.ceil(count / len(sources))]]
    return drawn


async def write_turns(
    ask: Speaker, turns: Sequence[Turn], *, parallel: int = 16, seed: int = 0
) -> list[Reply]:
    """What Ask says first in the place of each turn, after the real history."""
    prompt = ask.ask_prompt
    replies: dict[int, Reply] = {}

    async def write(number: int) -> None:
        request = Request(
            ask_view(Seed(""), turns[number].history, prompt),
            "user" if prompt.native else "assistant",
            ask.max_tokens,
            ask.sampling,
            seed=derive_seed(seed, "evaluate", number),
        )
        async with ask.engine.session() as session:
            replies[number] = await session.reply(request)

    await take_in_turn(iter(range(len(turns))), write, parallel)
    return [replies[number] for number in range(len(turns))]


def describe_replies(
    turns: Sequence[Turn], replies: Sequence[Reply], resampling: Resampling
) -> dict[str, Any]:
    """What Ask wrote in the place of each turn, beside which it stands; a history that does not fit
    the context is left out."""
    fitting = [(turn, reply) for turn, reply in zip(turns, replies, strict=True) if reply.finish != "context"]
    members = [turn.member for turn, _ in fitting]
    texts = [reply.text.strip() for _, reply in fitting]
    said = [number for number, text in enumerate(texts) if not _ends(text)]
    pairs = [(fitting[number][0].text, texts[number]) for number in said]
    return {
        "places": len(fitting),
        "left_out": len(turns) - len(fitting),
        **describe_texts(texts, members, resampling),
        "too_long": resampling.share(members, [reply.finish == "length" for _, reply in fitting]),
        "auc": tell_apart(pairs, [members[number] for number in said], resampling),
    }


def describe_texts(
    texts: Sequence[str], members: Sequence[Member], resampling: Resampling
) -> dict[str, np.ndarray]:
    """Role, length and diversity of messages; one that ends the dialogue says nothing else."""
    said = [(text, member) for text, member in zip(texts, members, strict=True) if not _ends(text)]
    sayers = [member for _, member in said]
    words = [len(text.split()) for text, _ in said]
    return {
        "wrong_role": resampling.share(members, [sounds_like_assistant(text) for text in texts]),
        "ends": resampling.share(members, [_ends(text) for text in texts]),
        "questions": resampling.share(sayers, ["?" in text for text, _ in said]),
        "words_mean": resampling.mean(sayers, words),
        "words_median": resampling.median(sayers, words),
        "distinct_1": _find_distinct(said, 1),
        "distinct_2": _find_distinct(said, 2),
    }


def _ends(text: str) -> bool:
    return not text or END_MARK in text


def _find_distinct(said: Iterable[tuple[str, Member]], n: int) -> np.ndarray:
    """The share of different n-grams among those of a stretch of words (distinct-n, Li et al. 2016).

    A stretch gathers what some dialogues say, so stretches are what is resampled.
    """
    words: dict[Member, list[str]] = {}
    for text, member in said:
        words.setdefault(member, []).extend(words_of(text[:COMPARED]))
    stretches: list[list[str]] = [[]]
    for member in sorted(words, key=lambda member: derive_seed(*member)):
        stretches[-1] += words[member]
        if len(stretches[-1]) >= STRETCH:
            stretches.append([])
    shares = [find_distinct(stretch[:STRETCH], n) for stretch in stretches[:-1]]  # the last is too short
    if not shares:
        return np.full(1, np.nan)
    resampling, members = Resampling.of(len(shares))
    return resampling.mean(members, shares)


# Whole dialogues


async def simulate_dialogues(
    ask: Speaker, chat: Speaker, seeds: Sequence[Seed], settings: RunSettings
) -> dict[str, Any]:
    """How dialogues go. Every message that Ask draws counts, also one that is drawn again."""
    overheard = _Overheard(ask.engine)
    rows: list[dict[str, Any]] = []
    await Run(replace(ask, engine=overheard), chat, settings, RowsOnly(rows.append)).over(iter(seeds))
    talks = [drawn for drawn in overheard.drawn if drawn]
    resampling, members = Resampling.of(len(talks), settings.seed)
    messages = [(text, member) for member, drawn in zip(members, talks, strict=True) for text in drawn]
    wrong = resampling.share(
        [member for _, member in messages], [sounds_like_assistant(text) for text, _ in messages]
    )
    resampling, members = Resampling.of(len(rows), settings.seed)
    turns = [sum(message["role"] == "user" for message in row["messages"]) for row in rows]
    reasons = [row["stop_reason"] for row in rows]
    return {
        "dialogues": len(rows),
        "messages": len(messages),
        "wrong_role": wrong,
        "turns": resampling.mean(members, turns),
        "stop_reasons": {
            reason: resampling.share(members, [each == reason for each in reasons])
            for reason, _ in Counter(reasons).most_common()
        },
    }


class _Overheard:
    """An engine whose replies are noted, in a list for each session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.writes_any_role, self.metadata = engine.name, engine.writes_any_role, engine.metadata
        self.drawn: list[list[str]] = []

    @asynccontextmanager
    async def session(self, *, beside: Session | None = None) -> AsyncIterator[Session]:
        async with self._engine.session(beside=beside) as session:
            self.drawn.append([])
            yield _OverheardSession(session, self.drawn[-1])

    async def aclose(self) -> None:
        await self._engine.aclose()


@dataclass(frozen=True)
class _OverheardSession:
    session: Session
    drawn: list[str]

    async def reply(self, request: Request) -> Reply:
        reply = await self.session.reply(request)
        if reply.finish != "context":
            self.drawn.append(reply.text.strip())
        return reply


def repeat_seeds(seeds: Sequence[Seed], count: int) -> list[Seed]:
    """So many seeds; where there are fewer they come again under other ids.

    >>> [seed.id for seed in repeat_seeds([Seed("a"), Seed("b")], 3)]
    ['a', 'b', 'a#2']
    """
    again = (replace(seed, id=f"{seed.id}#{lap}") for lap in range(2, count + 2) for seed in seeds)
    return [*seeds, *islice(again, max(0, count - len(seeds)))][:count]


# All of it


@dataclass(frozen=True)
class AskSettings:
    """What `evaluate_ask` does.

    points      turns that Ask writes itself, over all sources; 0 leaves this out
    simulate    dialogues that are simulated; 0 leaves this out
    turns       most turns of one
    context     tokens of the longest text, within what the model was trained for
    max_tokens  of a message that is written
    """

    points: int = 300
    simulate: int = 0
    turns: int = 6
    context: int = 2048
    max_tokens: int = 256
    parallel: int = 16
    threads: int | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)


async def evaluate_ask(
    systems: Sequence[System],
    sources: Sequence[Source],
    settings: AskSettings,
    *,
    chat: LocalModel | RemoteModel | None = None,
    seeds: Sequence[Seed] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure all systems at the same places; the report holds plain values and `readable` figures.

    An endpoint tells no likelihoods, so its perplexity and ending stay None.

    chat   who answers in simulated dialogues, which begin with the `seeds`
    say    told what is being measured

    Raises `UsageError` where two sources share a name or scikit-learn is missing, and what models
    and engines raise.
    """
    if settings.points and importlib.util.find_spec("sklearn") is None:
        raise UsageError(
            "telling Ask's turns from people's needs scikit-learn; run pip install 'parrot-edge[train]', "
            "or leave it out with --points 0"
        )
    groups = {source.name: source.groups for source in sources}
    if len(groups) < len(sources):
        raise UsageError("two data files have the same name; rename one to tell their figures apart")
    resampling = Resampling(groups, settings.seed)
    places = sample_turns(sources, settings.points, settings.seed) if settings.points else []
    reports: list[dict[str, Any]] = []
    for system in systems:
        parts = dict.fromkeys(("prompt", "perplexity", "ending", "turns", "simulation"))
        report: dict[str, Any] = {"model": system.model.name, **parts}
        if isinstance(system.model, LocalModel):
            report |= await asyncio.to_thread(
                _measure_likelihood, system.model, system.prompt, sources, resampling, settings, say
            )
        if settings.points or settings.simulate:
            report |= await _measure_writing(system, chat, seeds, places, resampling, settings, say)
        reports.append(report)
    _compare_with_first([report["perplexity"] for report in reports if report["perplexity"]])
    people = describe_texts([turn.text for turn in places], [turn.member for turn in places], resampling)
    counts = [
        {"name": s.name, "dialogues": s.dialogues, "groups": len(s.groups), "turns": len(s.turns)}
        for s in sources
    ]
    report = {"data": counts, "settings": asdict(settings), "people": people if places else None}
    return readable({**report, "systems": reports})


def _measure_likelihood(
    model: LocalModel,
    prompt: AskPrompt | None,
    sources: Sequence[Source],
    resampling: Resampling,
    settings: AskSettings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The report's perplexity and ending."""
    perplexity, ending, counts = {}, {}, {}
    with Likelihood(
        model.path, adapter=model.adapter, tokens=settings.context, threads=settings.threads
    ) as likelihood:
        prompt = Speaker(likelihood.engine, prompt=prompt).ask_prompt
        for source in sources:
            say(f"{model.name}, {prompt_name(prompt)}: how likely it finds {source.name}")
            turns, stops = score_places(likelihood, prompt, source.places)
            perplexity[source.name] = _find_perplexity(turns, resampling)
            ending[source.name] = _find_ending(stops, resampling)
            counts[source.name] = {
                "tokens": sum(score.tokens for score in turns),
                "shortened": sum(score.shortened for score in turns),
                "cut": sum(score.cut for score in turns),
            }
    return {
        "prompt": prompt_name(prompt),
        "perplexity": {"mean": _average_sources(perplexity), "sources": perplexity, "counts": counts},
        "ending": {"mean": _average_sources(ending), "sources": ending},
    }


def _average_sources(sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    keys = next(iter(sources.values()))
    return {key: average([source[key] for source in sources.values()]) for key in keys}


def _compare_with_first(perplexities: Sequence[dict[str, Any]]) -> None:
    """Add by what part each perplexity per token is below the first one's, by source and on average."""
    for perplexity in perplexities:
        below = {
            name: 1 - source["per_token"] / perplexities[0]["sources"][name]["per_token"]
            for name, source in perplexity["sources"].items()
        }
        perplexity["below_first"] = {"mean": average(below.values()), "sources": below}


async def _measure_writing(
    system: System,
    chat: LocalModel | RemoteModel | None,
    seeds: Sequence[Seed],
    places: Sequence[Turn],
    resampling: Resampling,
    settings: AskSettings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The report's turns and simulation."""
    load = Load(settings.parallel, settings.turns, settings.max_tokens, settings.context, settings.threads)
    other = chat if chat is not None and settings.simulate else system.model
    async with open_pair(system.model, other, load) as engines:
        ask, answering = (Speaker(engine, settings.max_tokens, settings.sampling) for engine in engines)
        ask = replace(ask, prompt=system.prompt)
        report: dict[str, Any] = {"prompt": prompt_name(ask.ask_prompt)}
        name = f"{system.model.name}, {report['prompt']}"
        if places:
            say(f"{name}: what it writes in {len(places)} places")
            replies = await write_turns(ask, places, parallel=settings.parallel, seed=settings.seed)
            report["turns"] = describe_replies(places, replies, resampling)
        if settings.simulate:
            say(f"{name}: how {settings.simulate} dialogues go")
            run = RunSettings(settings.turns, settings.parallel, settings.seed)
            report["simulation"] = await simulate_dialogues(
                ask, answering, repeat_seeds(seeds, settings.simulate), run
            )
    return report
