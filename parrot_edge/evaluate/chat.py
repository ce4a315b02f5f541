"""How good Chat is in long dialogues.

    history  what knowing the history is worth to the likelihood of answers that others wrote
    recall   whether it recalls in turn 5 or 8 what it was told in turn 1

All models are measured at the same places and on the same resamples, so that two can be compared. It
does not know the command line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.errors import UsageError
from parrot_edge.evaluate import history, recall
from parrot_edge.evaluate.sources import Source, resample
from parrot_edge.figures import Resampling, average_sources, readable
from parrot_edge.models import LocalModel, RemoteModel
from parrot_edge.pair import Load, open_pair


class Progress(Protocol):
    """Told what is being done, how many steps of it are, and of how many."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class ChatSettings:
    """What `evaluate_chat` does.

    probes   of recall, each asked in every turn of `recall.ASKED_IN`; 0 leaves this out
    context  tokens of the longest text, within what the model was trained for
    """

    probes: int = 48
    context: int = 2048
    parallel: int = 16
    threads: int | None = None
    seed: int = 0


async def evaluate_chat(
    models: Sequence[LocalModel | RemoteModel],
    settings: ChatSettings,
    *,
    sources: Sequence[Source] = (),
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure all models alike; the report holds plain values and `readable` figures.

    An endpoint tells no likelihoods, so what rests on them stays None.

    sources  dialogues that no model was trained on, for `history`

    Raises `UsageError` where two sources share a name, where likelihoods are all that is asked for and
    every model is an endpoint, and what models and engines raise.
    """
    if sources and all(isinstance(model, RemoteModel) for model in models):
        raise UsageError("an endpoint tells no likelihoods; leave --data out, or name a model file as well")
    resampling = resample(sources, settings.seed) if sources else None
    probes = recall.make_probes(settings.probes, settings.seed)
    reports: list[dict[str, Any]] = []
    for model in models:
        report: dict[str, Any] = {"model": model.name, "history": None, "recall": None}
        chosen = said = None
        if isinstance(model, LocalModel) and (resampling or probes):
            report["history"], chosen = await asyncio.to_thread(
                _measure_likelihood, model, sources, resampling, probes, settings, progress
            )
        if probes:
            said = await _measure_recall(model, probes, settings, progress)
            report["recall"] = {"chosen": chosen, "said": said}
        reports.append(report)
    _compare_histories([report["history"] for report in reports if report["history"]])
    for way in ("chosen", "said"):
        _compare_recall([report["recall"][way] for report in reports if report["recall"]])
    data = [
        {"name": s.name, "dialogues": s.dialogues, "groups": len(s.groups), "answers": len(s.answers)}
        for s in sources
    ]
    asked = {"facts": len(recall.FACTS), "chance": 1 / len(recall.FACTS[0].values)} if probes else None
    return readable({"data": data, "settings": asdict(settings), "recall": asked, "models": reports})


def _measure_likelihood(
    model: LocalModel,
    sources: Sequence[Source],
    resampling: Resampling | None,
    probes: Sequence[recall.Probe],
    settings: ChatSettings,
    progress: Progress,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The report's history, and what is chosen in recall; None where they are not asked for."""
    figures, counts, chosen = {}, {}, None
    with Likelihood(
        model.path, adapter=model.adapter, tokens=settings.context, threads=settings.threads
    ) as likelihood:
        for source in sources:
            what = f"{model.name}: answers of {source.name}"
            scores = history.score_answers(likelihood, source.answers, _steps(progress, what))
            assert resampling is not None
            figures[source.name] = history.describe_scores(scores, resampling)
            counts[source.name] = {
                "tokens": sum(score.tokens for score in scores),
                "shortened": sum(score.shortened for score in scores),
                "cut": sum(score.cut for score in scores),
            }
        if probes:
            outcomes = recall.choose_values(
                likelihood, probes, _steps(progress, f"{model.name}: recall, chosen")
            )
            chosen = recall.describe_recall(probes, outcomes)
    if not figures:
        return None, chosen
    return {"mean": _average_histories(figures), "sources": figures, "counts": counts}, chosen


def _average_histories(sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean of the sources, by turn of those that have it."""
    turns = sorted({turn for source in sources.values() for turn in source["by_turn"]}, key=int)
    flat = {
        name: {key: value for key, value in source.items() if key != "by_turn"}
        for name, source in sources.items()
    }
    by_turn = {
        turn: average_sources({n: s["by_turn"][turn] for n, s in sources.items() if turn in s["by_turn"]})
        for turn in turns
    }
    return {**average_sources(flat), "by_turn": by_turn}


async def _measure_recall(
    model: LocalModel | RemoteModel,
    probes: Sequence[recall.Probe],
    settings: ChatSettings,
    progress: Progress,
) -> dict[str, Any]:
    """What is said in recall."""
    load = Load(
        settings.parallel, max(recall.ASKED_IN), recall.MAX_TOKENS, settings.context, settings.threads
    )
    async with open_pair(model, model, load) as (engine, _):
        steps = _steps(progress, f"{model.name}: recall, said")
        outcomes = await recall.answer_probes(engine, probes, parallel=settings.parallel, on_step=steps)
    return recall.describe_recall(probes, outcomes)


def _steps(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _compare_histories(histories: Sequence[dict[str, Any]]) -> None:
    """Add by what part each perplexity per token is below the first one's, and by how many nats a token
    each gain is above it, by source and on average."""
    if not histories:
        return
    first = histories[0]["sources"]
    for each in histories:
        sources = {
            name: {
                "perplexity_below": 1 - source["per_token"] / first[name]["per_token"],
                "gain_above": source["gain"] - first[name]["gain"],
                "gain_over_another_above": source["gain_over_another"] - first[name]["gain_over_another"],
            }
            for name, source in each["sources"].items()
        }
        each["against_first"] = {"mean": average_sources(sources), "sources": sources}


def _compare_recall(recalls: Sequence[dict[str, Any] | None]) -> None:
    """Add by how much each share is above the first one's."""
    known = [each for each in recalls if each is not None]
    for each in known:
        each["above_first"] = {
            "mean": each["mean"] - known[0]["mean"],
            "by_turn": {turn: each["by_turn"][turn] - known[0]["by_turn"][turn] for turn in each["by_turn"]},
        }
