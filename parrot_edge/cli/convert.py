"""`parrot convert`: an adapter becomes certified GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from parrot_edge.convert.auto import LOSS
from parrot_edge.errors import ModelError


@click.command()
@click.argument("adapter", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.argument("more_types", metavar="[TYPE]...", nargs=-1)
@click.option("-o", "--output", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option(
    "--quant",
    "types",
    metavar="TYPE",
    multiple=True,
    help="File types beside F16, such as Q8_0 Q4_K_M, or auto, the fastest here.",
)
@click.option(
    "--loss",
    type=click.FloatRange(0, min_open=True),
    default=LOSS,
    show_default=True,
    help="What auto may lose: KL divergence from the trained model, nats a token.",
)
@click.option("--base", metavar="BASE", help="Where the base lies: a GGUF, a folder, or a hub name.")
@click.option(
    "--data",
    "sources",
    metavar="DIALOGUES",
    multiple=True,
    help="Dialogues to measure on, and to weight quantisation by; may be given again.",
)
@click.option("--license", "license_id", metavar="SPDX", default="", help="Licence of what is made.")
@click.option(
    "--threshold",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="Of the certificate, such as kl.Q4_0=0.3, perplexity=1.05 or end_of_turn=0.1.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: see parrot doctor]")
@click.option("--resume", is_flag=True, help="Go on with a folder: what is whole is not made again.")
@click.option("--force", is_flag=True, help="Replace a folder that a conversion made.")
@click.option("--push", "repository", metavar="OWNER/NAME", help="Upload the folder to the hub (HF_TOKEN).")
@click.option("--json", "as_json", is_flag=True, help="Print what convert.json holds.")
def convert(
    adapter: Path,
    more_types: tuple[str, ...],
    output: Path,
    types: tuple[str, ...],
    loss: float,
    base: str | None,
    sources: tuple[str, ...],
    license_id: str,
    settings: tuple[str, ...],
    threads: int | None,
    resume: bool,
    force: bool,
    repository: str | None,
    as_json: bool,
) -> None:
    """Turn an adapter into GGUF files that provably say what was trained.

    ADAPTER is a folder that parrot train, or peft, has saved. It is merged, converted, quantised, and
    every file is held against the trained model: DIR/certificate.html shows how. Where a file says
    something else the exit code is 1, and the sentence tells what to do.

    \b
    Examples:
      parrot convert ask-135m -o ask-gguf
      parrot convert ask-8b -o ask-gguf --quant Q8_0 Q4_K_M --data dialogues.jsonl
      parrot convert ask-8b -o ask-gguf --base ./Qwen2.5-7B --quant Q4_K_M --resume
      parrot convert chat-8b -o chat-gguf --quant auto --loss 0.02 --data dialogues.jsonl
      parrot convert chat-8b -o chat-gguf --quant Q4_0 --threshold kl.Q4_0=0.3
    """
    from parrot_edge.convert.certify import parse_thresholds
    from parrot_edge.convert.deliver import push
    from parrot_edge.convert.pipeline import Job, convert

    def say(line: str) -> None:
        click.echo(line, err=True)

    job = Job(
        types=types + more_types,
        loss=loss,
        base=base,
        sources=sources,
        license=license_id,
        thresholds=parse_thresholds(settings),
        threads=threads,
    )
    record = convert(adapter, output, job, resume=resume, force=force, say=say)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
    failed = record["certificate"]["failed"]
    if failed:
        more = f" ({len(failed) - 1} more in {output / 'certificate.html'})" if failed[1:] else ""
        raise ModelError(failed[0] + more)
    say(f"every file says what was trained; see {output / 'certificate.html'}")
    if repository:
        say(push(output, repository))
