"""`parrot capo`: context-aware preference pairs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from parrot_edge import __version__
from parrot_edge.cli import options
from parrot_edge.cli.progress import ProgressLine
from parrot_edge.data.capo import KINDS
from parrot_edge.engine.base import Sampling
from parrot_edge.errors import ParrotError, UsageError
from parrot_edge.intake import Intake
from parrot_edge.journal import Journal, check_settings
from parrot_edge.jsonl import Writer
from parrot_edge.models import LocalModel, RemoteModel
from parrot_edge.preferences import PairSettings, PairTally, make_pairs
from parrot_edge.roles import Speaker
from parrot_edge.simulate import RowsOnly
from parrot_edge.store import read_json, write_json


@click.command()
@click.argument("dialogues", default="-")
@options.output_option
@click.option("--chat", "model", default="chat", show_default=True, metavar="MODEL", help="Who answers.")
@click.option(
    "--chosen",
    type=click.Choice(["generate", "recorded"]),
    default="generate",
    show_default=True,
    help="The better answer: Chat's to the whole history, or the one in the dialogue where it has one.",
)
@click.option(
    "--kinds",
    default=",".join(KINDS),
    show_default=True,
    metavar="KIND,...",
    help="Which worse answers are made.",
)
@options.sampling_options
@options.engine_options
@options.dialogues_options
@click.option("--resume", is_flag=True, help="Carry on the run that -o was begun by.")
@click.option("--force", is_flag=True, help="Replace what -o names.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; needs -o FILE.")
@options.progress_option
def capo(dialogues: str, as_json: bool, **given: Any) -> None:
    """Make preference pairs: answers that use the history, and answers that miss it.

    For every user message that leans on what was said before, Chat answers the whole history (chosen),
    and the message without it, with a made-up subject, and after another dialogue's history (rejected).
    The rows are what parrot train dpo-135m-cpu and trl's DPO read. Pairs that hardly differ are dropped.

    \b
    Examples:
      parrot capo dialogues.jsonl -o pairs.jsonl
      parrot capo dialogues.jsonl -o pairs.jsonl --resume
      parrot capo real.jsonl -o pairs.jsonl --chosen recorded --kinds neglect,hallucination
      parrot capo dialogues.jsonl --chat http://localhost:8080/v1 -o pairs.jsonl
    """
    output, resume, force = given["output"], given["resume"], given["force"]
    if output == "-" and (resume or force or as_json):
        raise UsageError("--resume, --force and --json need -o FILE")
    if resume and force:
        raise UsageError("give --resume or --force, not both")
    kinds = tuple(dict.fromkeys(kind.strip() for kind in given["kinds"].split(",")))
    settings = PairSettings(kinds, given["chosen"] == "recorded", given["parallel"], given["seed"])
    intake = options.open_intake(dialogues, given, replace=resume or force, may_be_empty=True)
    total = intake.count()
    model = options.find_model(given["model"], parallel=settings.parallel, threads=given["threads"])
    sampling = options.take_sampling(given)
    facts = {
        "seed": settings.seed, "chat": model.name, "chosen": given["chosen"], "kinds": list(kinds),
        "max_tokens": given["max_tokens"], "sampling": repr(sampling), "exact": given["exact"],
    }  # fmt: skip
    if output == "-":
        advice = "the rows written are whole, and with -o FILE a run can be resumed"
        recorder: Journal | RowsOnly = RowsOnly(Writer().write)
    else:
        advice = f"carry on with: {options.command_line(add='--resume', drop='--force')}"
        recorder = _open_journal(Path(output), facts, resume=resume, force=force)
    with contextlib.closing(recorder), ProgressLine(given["progress"], total) as line:
        tally = options.run_interruptibly(
            _make_pairs(intake, total, model, sampling, settings, recorder, line, given), advice
        )
        report = {**tally.as_dict(), "settings": facts, "version": __version__}
        if output != "-":
            recorder.sync()
            write_json(_report_path(Path(output)), {**report, "dropped_pairs": recorder.dropped})
        recorder.complete()
        line.finish(tally)
    options.close_rejects(intake.rejects)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    _tell(tally, dialogues)


def _open_journal(path: Path, facts: dict[str, Any], *, resume: bool, force: bool) -> Journal:
    """The journal of a run; what a complete one dropped stands in its report, and is not tried again."""
    journal = Journal(path, facts, resume=resume, force=force, verb="capo", key="rejected")
    report = _report_path(path)
    if not resume:
        report.unlink(missing_ok=True)
    elif before := read_json(report):
        try:
            check_settings(before.get("settings"), facts, path)
        except ParrotError:
            journal.close()
            raise
        for identity, reason in before.get("dropped_pairs", {}).items():
            if identity not in journal.finished:
                journal.add_drop(identity, reason)
    return journal


def _report_path(path: Path) -> Path:
    return path.with_name(path.name + ".capo.json")


async def _make_pairs(
    intake: Intake,
    total: int | None,
    model: LocalModel | RemoteModel,
    sampling: Sampling,
    settings: PairSettings,
    recorder: Journal | RowsOnly,
    line: ProgressLine,
    given: dict[str, Any],
) -> PairTally:
    if total == 0:
        return PairTally()
    load = {key: given[key] for key in ("parallel", "max_tokens", "context", "threads", "exact")}
    async with options.open_engine(model, turns=options.ROW_TURNS, **load) as engine:
        return await make_pairs(
            Speaker(engine, given["max_tokens"], sampling),
            intake.seeds() if total is not None else intake.seeds_as_they_come(),
            recorder,
            settings,
            on_progress=line.show,
            on_failure=intake.rejects.add_seed if intake.rejects else None,
        )


def _tell(tally: PairTally, source: str) -> None:
    """What was found and made, in a line on stderr."""
    if not tally.dialogues + tally.skipped:
        click.echo(f"parrot: {'the input' if source == '-' else source} holds no dialogue", err=True)
        return
    pairs = ", ".join(f"{count} {kind}" for kind, count in tally.as_dict()["pairs"].items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in tally.as_dict()["dropped"].items())
    text = f"parrot: {tally.dialogues} dialogues, {tally.turns} context-dependent turns, "
    text += f"{tally.pairs.total()} pairs" + (f": {pairs}" if pairs else "")
    click.echo(text + (f"; dropped: {dropped}" if dropped else ""), err=True)
