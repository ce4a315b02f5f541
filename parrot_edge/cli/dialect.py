"""`parrot dialect`: train, measure, export and run a network that tells dialects apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parrot_edge.cli import options
from parrot_edge.errors import InputError, UsageError
from parrot_edge.jsonl import Writer, read_lines
from parrot_edge.recipe import DialectRecipe, load_recipe

if TYPE_CHECKING:
    from parrot_edge.dialect.runtime import Runtime

_model_option = click.option(
    "--model",
    metavar="MODEL",
    help="A model.onnx, or the folder of a training run.  [default: a demonstration, US and British English]",
)
_threads_option = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of the network."
)
_on_error_option = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a bad recording: stop, or say so and go on.",
)
_column_option = click.option(
    "--label-column",
    default="accents",
    show_default=True,
    metavar="NAME",
    help="The label of a Common Voice table.",
)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _open_model(model: str | None, threads: int) -> Runtime:
    from parrot_edge.dialect.runtime import DEMONSTRATION, Runtime

    runtime = Runtime(model or DEMONSTRATION, threads=threads)
    if model is None:
        _say(
            f"parrot: without --model a demonstration tells {' and '.join(runtime.labels)} English apart; "
            "it knows synthesisers, not people: train your own"
        )
    return runtime


@click.group()
def dialect() -> None:
    """Tell spoken dialects apart: train on recordings, measure, export, identify.

    CORPUS is a manifest (JSON Lines with path, label and speaker), a folder with a folder per label, a
    Kaldi directory, or a Common Voice table (.tsv).

    \b
    Examples:
      parrot dialect audit manifest.jsonl
      parrot dialect train dialect-small --data manifest.jsonl -o dialect
      parrot dialect identify *.wav --model dialect > rows.jsonl
    """


@dialect.command()
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder for sounds and manifest.jsonl.")
@click.option(
    "--source",
    type=click.Choice(["espeak-ng", "flite", "kokoro"]),
    default="espeak-ng",
    show_default=True,
    help="Which synthesiser speaks.",
)
@click.option(
    "--model",
    metavar="DIR",
    help="Kokoro's model, as the hub's onnx-community/Kokoro-82M-v1.0-ONNX has it.",
)
@click.option(
    "--voice",
    "voices",
    metavar="LABEL=VOICE",
    multiple=True,
    help="A label and a voice that speaks it; may be given again.  [default: English ones]",
)
@click.option(
    "--speakers",
    type=click.IntRange(2),
    default=20,
    show_default=True,
    help="Timbres of each of espeak-ng's voices; others' voices are speakers themselves.",
)
@click.option(
    "--sentences", type=click.IntRange(1), default=10, show_default=True, help="Recordings of each speaker."
)
@click.option(
    "--text", metavar="FILE", help="What is said, a sentence a line.  [default: the built-in seeds]"
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random numbers.")
def synthesize(
    output: str,
    source: str,
    model: str | None,
    voices: tuple[str, ...],
    speakers: int,
    sentences: int,
    text: str | None,
    seed: int,
) -> None:
    """Make a corpus to practise on with a synthesiser, which must be installed.

    A model that knows only one synthesiser hears that synthesiser, not people: mix several, and hold one out.

    \b
    Examples:
      parrot dialect synthesize -o practice
      parrot dialect synthesize -o brazil --voice br=pt-br --voice pt=pt --text sentences.txt
      parrot dialect synthesize -o more --source flite --voice us=rms --voice us=slt --voice scotland=awb
      parrot dialect synthesize -o better --source kokoro --model Kokoro-82M-v1.0-ONNX
    """
    from parrot_edge.dialect import synthesize as synthesis
    from parrot_edge.dialect.voices import ENGLISH, FLITE, espeak_voices, flite_voices, kokoro_voices

    if (source == "kokoro") != (model is not None):
        raise UsageError("--source kokoro and --model DIR belong together")
    wishes = [_parse_wish(each) for each in voices]
    if source == "espeak-ng":
        chosen = espeak_voices(wishes or ENGLISH, speakers=speakers, seed=seed)
    elif source == "flite":
        chosen = flite_voices(wishes or FLITE, seed=seed)
    else:
        chosen = kokoro_voices(str(model), wishes, seed=seed)
    texts = [line.text().strip() for line in read_lines(text)] if text else synthesis.builtin_sentences()
    count = synthesis.synthesize(Path(output), chosen, texts, sentences=sentences, seed=seed)
    _say(f"parrot: {count} recordings, see {Path(output) / 'manifest.jsonl'}")


def _parse_wish(text: str) -> tuple[str, str]:
    label, equals, voice = text.partition("=")
    if not (label and equals and voice):
        raise UsageError(f"--voice {text}: write LABEL=VOICE")
    return label, voice


@dialect.command()
@click.argument("corpora", metavar="CORPUS...", nargs=-1, required=True)
@_column_option
@_on_error_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def audit(corpora: tuple[str, ...], label_column: str, on_error: str, as_json: bool) -> None:
    """Look recordings over: seconds of each label and speaker, and what is wrong with them.

    \b
    Example:
      parrot dialect audit recordings/ --on-error skip
    """
    from parrot_edge.dialect import corpus

    utterances = [each for place in corpora for each in corpus.read_corpus(place, label_column=label_column)]
    report = corpus.audit(utterances, _tell if on_error == "skip" else None)
    for warning in report["warnings"]:
        _say(f"parrot: {warning}")
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    for label, found in report["labels"].items():
        click.echo(f"{label}: {found['seconds']:.0f} s, {len(found['speakers'])} speakers")
    click.echo(f"in all: {report['seconds']:.0f} s, {report['utterances']} recordings")


def _tell(utterance: Any, error: InputError) -> None:
    place = f"{utterance.place}: " if utterance.place else ""
    _say(f"parrot: skipped: {place}{error}")


@dialect.command()
@click.argument("recipe", metavar="RECIPE")
@options.set_option
@click.option(
    "--data",
    "sources",
    metavar="CORPUS",
    multiple=True,
    help="Recordings; may be given again. Replaces the recipe's.",
)
@click.option("-o", "--output", metavar="DIR", help="Folder for the model.  [default: the recipe's name]")
@click.option("--resume", is_flag=True, help="Go on after the last whole epoch in the folder, or start.")
@click.option("--force", is_flag=True, help="Replace the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print what training.json holds.")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    sources: tuple[str, ...],
    output: str | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train a network on recordings with labels.

    RECIPE is a name that `parrot recipes list` shows, or a YAML file of kind dialect. Speakers that are
    learned from are never measured on: data that cannot be split so is refused.

    \b
    Examples:
      parrot dialect train dialect-small --data manifest.jsonl -o dialect
      parrot dialect train dialect-small --data manifest.jsonl -o dialect --resume
      parrot dialect train dialect-full --data cv/validated.tsv --set data.bad_rows=skip
      parrot dialect train dialect-small --data all.jsonl --set data.held_out_sources=studio
    """
    values = load_recipe(recipe, overrides)
    if not isinstance(values, DialectRecipe):
        raise UsageError(
            f"{recipe} is a recipe of kind {values.kind!r}; `parrot dialect train` takes 'dialect'"
        )
    if sources:
        values = replace(values, data=replace(values.data, sources=sources))
    if not values.data.sources:
        raise UsageError(f"the recipe {values.name} names no recordings; give some with --data")

    from parrot_edge.dialect import trainer

    record = trainer.train(values, output or values.name, resume=resume, force=force, say=_say)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
        return
    for line in _table({"all": record["measures"]}):
        click.echo(line)


@dialect.command()
@click.argument("corpora", metavar="CORPUS...", nargs=-1, required=True)
@_model_option
@click.option(
    "--held-out", is_flag=True, help="Only the speakers that the model's own training run kept back."
)
@click.option(
    "--seconds",
    "lengths",
    type=click.FloatRange(0.2, 60),
    multiple=True,
    help="Also the first so many seconds alone; may be given again.  [default: 1, 3, 10]",
)
@click.option("--pictures", metavar="DIR", help="Write confusion.png and det.png there.")
@_column_option
@_threads_option
@_on_error_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    corpora: tuple[str, ...],
    model: str | None,
    held_out: bool,
    lengths: tuple[float, ...],
    pictures: str | None,
    label_column: str,
    threads: int,
    on_error: str,
    as_json: bool,
) -> None:
    """Measure a model: accuracy, EER, Cavg and minDCF, each with its 95% interval over speakers.

    Recordings of labels that the model does not know are unknown ones, and make the set an open one.
    "min Cavg" takes the best of 21 thresholds, as the OLR challenge does; "Cavg" the calibrated one.

    \b
    Examples:
      parrot dialect evaluate test.jsonl --model dialect
      parrot dialect evaluate manifest.jsonl --held-out --model dialect --seconds 3 --json
    """
    from parrot_edge.dialect.corpus import read_corpus, split_by_speaker
    from parrot_edge.dialect.evaluate import evaluate_corpus, score_corpus

    runtime = _open_model(model, threads)
    found = [each for place in corpora for each in read_corpus(place, label_column=label_column)]
    if held_out:
        split = runtime.card.split
        if not split:
            raise UsageError(
                f"{runtime.card.name} held back a corpus of its own; measure on that, without --held-out"
            )
        found = list(
            split_by_speaker(found, split["held_out"], split["seed"], sources=split["sources"]).held_out
        )
    scores = score_corpus(runtime, found, lengths or (1, 3, 10), _tell if on_error == "skip" else None)
    report = evaluate_corpus(runtime, scores)
    if pictures:
        everything = scores["all"]
        calibrated = runtime.calibration.log_likelihoods(everything.matrix)
        _draw(replace(everything, matrix=calibrated), Path(pictures))
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    for line in _table(report["lengths"]):
        click.echo(line)


def _draw(scores: Any, folder: Path) -> None:
    try:
        from parrot_edge.dialect.pictures import draw_confusion, draw_det

        folder.mkdir(parents=True, exist_ok=True)
        draw_confusion(scores, folder / "confusion.png")
        draw_det(scores, folder / "det.png")
    except ImportError:
        raise UsageError("pictures need matplotlib; run pip install 'parrot-edge[train]'") from None


def _table(lengths: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each length, with value and interval of each measure."""
    names = {"accuracy": "accuracy", "eer": "EER", "cavg": "Cavg", "min_cavg": "min Cavg"}
    names["min_dcf"] = "minDCF"
    yield ("       n  " + "  ".join(f"{title:22}" for title in names.values())).rstrip()
    for name, measures in lengths.items():
        cells = [
            "{value:.3f} [{low:.3f} {high:.3f}]".format(**measures[key]) if measures[key] else ""
            for key in names
        ]
        line = f"{name:4} {measures['utterances']:4}  " + "  ".join(f"{cell:22}" for cell in cells)
        yield line.rstrip()


@dialect.command()
@click.argument("run", metavar="RUN")
@click.option("-o", "--output", required=True, metavar="FILE", help="The ONNX file.")
@click.option("--half", is_flag=True, help="Keep weights in 16 bits: half the size, the same speed.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def export(run: str, output: str, half: bool, force: bool) -> None:
    """Write the network of a training run as one ONNX file, checked against torch at several lengths.

    Inputs and outputs: features (B, F, 80), log-mel less their mean; embedding (B, E); cosines (B, L).

    \b
    Example:
      parrot dialect export dialect -o dialect.onnx --half
    """
    from parrot_edge.dialect.export import export_onnx
    from parrot_edge.dialect.trainer import load_trained

    model, card = load_trained(run)
    difference = export_onnx(model, card, Path(output), force=force, half=half)
    click.echo(f"{output}: differs from torch by at most {difference:.1e}")


@dialect.command()
@click.argument("files", metavar="[WAV...|-]", nargs=-1)
@_model_option
@options.output_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--window",
    type=click.FloatRange(1, 60),
    default=10.0,
    show_default=True,
    help="Seconds that are heard at once.",
)
@click.option("--pcm", is_flag=True, help="Stdin is sound: signed 16-bit little-endian mono samples.")
@click.option(
    "--rate", type=click.IntRange(4000, 384000), default=16000, show_default=True, help="Of --pcm, in Hz."
)
@click.option(
    "--topic",
    metavar="TEXT",
    help="Write a seed for `parrot simulate` a recording: someone who speaks its dialect asks about this.",
)
@_threads_option
@_on_error_option
@options.ray_option
def identify(
    files: tuple[str, ...],
    model: str | None,
    output: str,
    force: bool,
    window: float,
    pcm: bool,
    rate: int,
    topic: str | None,
    threads: int,
    on_error: str,
    ray: str | None,
) -> None:
    """Say which dialect is spoken in recordings, or in a stream as it comes.

    With - (the default) stdin holds rows with a path, and start and end where wanted. A row comes out for
    each window: path, start, end, label, scores, unknown. The label is null where there is no speech, and
    where what is heard is none of the dialects (unknown is then true). With --ray, recordings have to lie
    under the same path on every node.

    \b
    Examples:
      parrot dialect identify *.wav --model dialect > rows.jsonl
      parrot dialect identify - --model dialect --on-error skip < manifest.jsonl
      arecord -f S16_LE -r 16000 -t raw | parrot dialect identify --pcm --model dialect
      parrot dialect identify *.wav --topic "a train that is late" | parrot simulate -o dialogues.jsonl
    """
    from parrot_edge.dialect.audio import require_audio
    from parrot_edge.dialect.identify import identify_file, identify_stream, read_pcm
    from parrot_edge.dialect.runtime import DEMONSTRATION

    if pcm and files not in ((), ("-",)):
        raise UsageError("--pcm takes sound from stdin; leave the file names out")
    if pcm and topic:
        raise UsageError("--topic makes a seed of a recording, and --pcm has no end; give one of them")
    if pcm and ray:
        raise UsageError("--pcm is one stream, so there is nothing to spread; leave --ray out")
    require_audio()
    runtime = _open_model(model, threads)
    with options.connect_ray(ray) as cluster, Writer(output, force=force) as writer:
        if pcm:
            for answer in identify_stream(runtime, read_pcm(sys.stdin.buffer, rate), window=window):
                writer.write(answer.row("-"))
            return
        refuse = _raise if on_error == "stop" else lambda error: _say(f"parrot: skipped: {error}")
        wanted = _wanted(files or ("-",))
        if cluster:
            from parrot_edge.cluster.hearing import hear_on_ray

            parts = map(_part_or_error, wanted)
            where = model or DEMONSTRATION
            for rows, failure in hear_on_ray(cluster, where, parts, window=window, threads=threads):
                if topic is None or not failure:
                    _write_rows(writer, rows, topic)
                if failure:
                    refuse(failure)
            return
        for part in wanted:
            try:
                path, start, end = part()
                answers = identify_file(runtime, path, start, end, window=window)
                _write_rows(writer, (answer.row(path) for answer in answers), topic)
            except InputError as error:
                refuse(error)


def _write_rows(writer: Writer, rows: Iterable[dict[str, Any]], topic: str | None) -> None:
    """The rows of a recording, or with a topic one seed made of all of them."""
    if topic is None:
        for row in rows:
            writer.write(row)
        return
    from parrot_edge.dialect.identify import seed_row

    heard = list(rows)
    if seed := seed_row(heard, topic):
        writer.write(seed)
    else:
        _say(f"parrot: no seed: no dialect was heard in {heard[0]['path']}")


def _raise(error: InputError) -> None:
    raise error


def _part_or_error(
    part: Callable[[], tuple[str, float, float | None]],
) -> tuple[str, float, float | None] | InputError:
    """What is to be heard, or what is wrong with its row."""
    try:
        return part()
    except InputError as error:
        return error


def _wanted(files: tuple[str, ...]) -> Iterator[Callable[[], tuple[str, float, float | None]]]:
    """What is to be heard, each as a call that may find its row wrong."""
    from parrot_edge.dialect.corpus import parse_part

    for name in files:
        if name == "-" or name.endswith(".jsonl"):
            for line in read_lines(name):
                yield lambda line=line: parse_part(line)  # type: ignore[misc]
        else:
            yield lambda name=name: (name, 0.0, None)  # type: ignore[misc]
