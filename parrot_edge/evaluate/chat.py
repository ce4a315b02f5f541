"""How good Chat is in long dialogues.

    history    what knowing the history is worth to the likelihood of answers that others wrote
    recall     whether it recalls in turn 5 or 8 what it was told in turn 1
    benchmark  the grades that a judge gives to its answers to questions of several turns

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
from parrot_edge.evaluate.benchmark import (
    AnswerFile,
    Answers,
    Question,
    answer_questions,
    count_unanswered,
    identify_model,
)
from parrot_edge.evaluate.judge import compare_answers, describe_grades, describe_verdicts, grade_answers
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


@dataclass(frozen=True)
class Benchmark:
    """Questions that are answered, and then judged where there is a `judge`.

    kept        where answers are kept and taken from
    max_tokens  of an answer
    """

    questions: Sequence[Question]
    judge: LocalModel | RemoteModel | None = None
    kept: AnswerFile | None = None
    max_tokens: int = 512


async def evaluate_chat(
    models: Sequence[LocalModel | RemoteModel],
    settings: ChatSettings,
    *,
    sources: Sequence[Source] = (),
    benchmark: Benchmark | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure all models alike; the report holds plain values and `readable` figures.

    An endpoint tells no likelihoods, so what rests on them stays None.

    sources  dialogues that no model was trained on, for `history`

    Raises `UsageError` where two sources share a name, where every model is an endpoint though there are
    sources, where answers are kept of two models of one name, and what models and engines raise.
    """
    names = [model.name for model in models]
    if benchmark and benchmark.kept and len(set(names)) < len(names):
        raise UsageError("two MODELs have the same name, by which their answers are kept; rename a file")
    if sources and all(isinstance(model, RemoteModel) for model in models):
        raise UsageError("an endpoint tells no likelihoods; leave --data out, or name a model file as well")
    resampling = resample(sources, settings.seed) if sources else None
    probes = recall.make_probes(settings.probes, settings.seed)
    reports: list[dict[str, Any]] = []
    for model in models:
        report: dict[str, Any] = {
            "model": model.name, "history": None, "recall": None, "benchmark": None
        }  # fmt: skip
        chosen = said = None
        if isinstance(model, LocalModel) and (resampling or probes):
            report["history"], chosen = await asyncio.to_thread(
                _measure_likelihood, model, sources, resampling, probes, settings, progress
            )
        if probes:
            said = await _measure_recall(model, probes, settings, progress)
            report["recall"] = {"chosen": chosen, "said": said}
        reports.append(report)
    if benchmark:
        found = await _measure_benchmark(models, benchmark, settings, progress)
        for report, each in zip(reports, found, strict=True):
            report["benchmark"] = each
    _compare_histories([report["history"] for report in reports if report["history"]])
    for way in ("chosen", "said"):
        _compare_recall([report["recall"][way] for report in reports if report["recall"]])
    data = [
        {"name": s.name, "dialogues": s.dialogues, "groups": len(s.groups), "answers": len(s.answers)}
        for s in sources
    ]
    facts = {"facts": len(recall.FACTS), "chance": 1 / len(recall.FACTS[0].values)} if probes else None
    judged = None
    if benchmark:
        judge = benchmark.judge.name if benchmark.judge else None
        judged = {"questions": len(benchmark.questions), "judge": judge, "max_tokens": benchmark.max_tokens}
    about = {"data": data, "settings": asdict(settings), "recall": facts, "benchmark": judged}
    return readable({**about, "models": reports})


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


async def _measure_benchmark(
    models: Sequence[LocalModel | RemoteModel],
    benchmark: Benchmark,
    settings: ChatSettings,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The report's benchmark of each model: its grades, and how it does against the first."""
    questions = benchmark.questions
    turns = max(len(question.turns) for question in questions)

    def load(max_tokens: int) -> Load:
        return Load(settings.parallel, turns, max_tokens, threads=settings.threads)

    answers: list[Answers] = []
    for model in models:
        async with open_pair(model, model, load(benchmark.max_tokens)) as (engine, _):
            found = await answer_questions(
                engine,
                questions,
                model=(model.name, identify_model(model) if benchmark.kept else ""),
                max_tokens=benchmark.max_tokens,
                parallel=settings.parallel,
                kept=benchmark.kept,
                on_step=_steps(progress, f"{model.name}: questions"),
            )
        answers.append(found)
    reports: list[dict[str, Any]] = [
        {"unanswered": count_unanswered(each), "grades": None, "against_first": None} for each in answers
    ]
    if benchmark.judge is None:
        return reports
    async with open_pair(benchmark.judge, benchmark.judge, load(benchmark.max_tokens)) as (judge, _):
        for model, given, report in zip(models, answers, reports, strict=True):
            steps = _steps(progress, f"{benchmark.judge.name}: grades of {model.name}")
            grades = await grade_answers(judge, questions, given, parallel=settings.parallel, on_step=steps)
            report["grades"] = describe_grades(questions, grades)
            report["grades"]["above_first"] = report["grades"]["mean"] - reports[0]["grades"]["mean"]
            if report is not reports[0]:
                steps = _steps(progress, f"{benchmark.judge.name}: {model.name} against {models[0].name}")
                verdicts = await compare_answers(
                    judge, questions, given, answers[0], parallel=settings.parallel, on_step=steps
                )
                report["against_first"] = describe_verdicts(questions, verdicts)
    return reports


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
