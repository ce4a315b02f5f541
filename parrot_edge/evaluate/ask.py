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
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from parrot_edge.dialogue import Seed
from parrot_edge.engine.base import Sampling
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.errors import UsageError
from parrot_edge.evaluate.ask_likelihood import find_ending, find_perplexity, score_places
from parrot_edge.evaluate.ask_writing import (
    describe_replies,
    describe_texts,
    repeat_seeds,
    sample_turns,
    simulate_dialogues,
    write_turns,
)
from parrot_edge.evaluate.sources import Source, Turn, resample
from parrot_edge.figures import Resampling, average, average_sources, readable
from parrot_edge.models import LocalModel, RemoteModel, parse_model
from parrot_edge.pair import Load, open_pair
from parrot_edge.roles import FLIPPED, NATIVE, AskPrompt, Speaker
from parrot_edge.simulate import RunSettings


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
    resampling = resample(sources, settings.seed)
    places = sample_turns(sources, settings.points, settings.seed) if settings.points else []
    reports: list[dict[str, Any]] = []
    for system in systems:
        parts = dict.fromkeys(("file", "prompt", "perplexity", "ending", "turns", "simulation"))
        report: dict[str, Any] = {"model": system.model.name, **parts}
        if isinstance(system.model, LocalModel):
            report["file"] = system.model.path.name
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
            perplexity[source.name] = find_perplexity(turns, resampling)
            ending[source.name] = find_ending(stops, resampling)
            counts[source.name] = {
                "tokens": sum(score.tokens for score in turns),
                "shortened": sum(score.shortened for score in turns),
                "cut": sum(score.cut for score in turns),
            }
    return {
        "prompt": prompt_name(prompt),
        "perplexity": {"mean": average_sources(perplexity), "sources": perplexity, "counts": counts},
        "ending": {"mean": average_sources(ending), "sources": ending},
    }


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
