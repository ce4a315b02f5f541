"""What is fuzzed: each target reads bytes as one kind of file, and may raise nothing but a `ParrotError`.

A target gets the bytes and a folder of its own in memory, whose files it may leave.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from parrot_edge.convert.adapter import describe_role, read_config, write_adapter
from parrot_edge.convert.files import read_gguf
from parrot_edge.convert.merge import merge_adapter
from parrot_edge.convert.reference import read_reference
from parrot_edge.data.sources import Reader
from parrot_edge.dialect.corpus import read_corpus
from parrot_edge.errors import InputError, ParrotError
from parrot_edge.intake import Intake
from parrot_edge.journal import Journal
from parrot_edge.jsonl import encode, read_lines
from parrot_edge.models import parse_model
from parrot_edge.recipe import dump_recipe, load_recipe

Target = Callable[[bytes, Path], None]

BASE = Path(__file__).parent / "base.gguf"
"""A random llama of a few kilobytes."""


def rows(data: bytes, folder: Path) -> None:
    """The JSONL reader: what it takes can be written, and reads back the same."""
    path = _file(folder / "rows.jsonl", data)
    for line in read_lines(path):
        with contextlib.suppress(InputError):
            row = line.row()
            assert json.loads(encode(row)) == row


def seeds(data: bytes, folder: Path) -> None:
    """What `parrot simulate` and the other verbs over rows take in."""
    path = _file(folder / "seeds.jsonl", data[1:])
    Intake(str(path), text=data[:1] == b"t").count()


def dialogues(data: bytes, folder: Path) -> None:
    """What is trained on, in all the shapes that public data has."""
    reader = Reader([str(_file(folder / "dialogues.jsonl", data[1:]))], skip=True, may_be_empty=True)
    for item in reader.pairs() if data[:1] == b"p" else reader.dialogues():
        if data[:1] != b"p":
            _ = item.group


def journal(data: bytes, folder: Path) -> None:
    """What a run that is carried on finds: rows, and behind a line of --- the journal."""
    output = folder / "out.jsonl"
    finished, mark, under_way = data.partition(b"---\n")
    _file(output, finished)
    journal_path = folder / "out.jsonl.journal"
    if mark:
        _file(journal_path, under_way)
    else:
        journal_path.unlink(missing_ok=True)
    opened = Journal(output, {"seed": 0}, resume=True)
    again = opened.finished, opened.under_way
    opened.close()
    reopened = Journal(output, {"seed": 0}, resume=True)
    assert (reopened.finished, reopened.under_way) == again
    reopened.close()


def recipe(data: bytes, folder: Path) -> None:
    """A recipe, and behind a line of --- settings, one a line."""
    text, _, overrides = data.partition(b"\n---\n")
    path = _file(folder / "recipe.yaml", text)
    loaded = load_recipe(path, overrides.decode("utf-8", "replace").splitlines())
    again = load_recipe(_file(folder / "again.yaml", dump_recipe(loaded).encode()))
    assert again == loaded, (loaded, again)


def corpus(data: bytes, folder: Path) -> None:
    """A manifest of recordings, a Common Voice table, or a Kaldi directory, told by the first byte."""
    kind, data = data[:1], data[1:]
    if kind == b"k":
        place = folder / "kaldi"
        place.mkdir(exist_ok=True)
        names = ("wav.scp", "utt2lang", "segments", "utt2spk")
        for name, part in zip(names, [*data.split(b"---\n"), b"", b"", b"", b""], strict=False):
            _file(place / name, part)
    else:
        place = _file(folder / ("table.tsv" if kind == b"t" else "manifest.jsonl"), data)
    for utterance in read_corpus(place):
        json.dumps(utterance.row(), allow_nan=False)


def gguf(data: bytes, folder: Path) -> None:
    """A GGUF, its numbers expanded."""
    for tensor in read_gguf(_file(folder / "model.gguf", data)).tensors.values():
        with np.errstate(all="ignore"):
            tensor.floats()


def adapter(data: bytes, folder: Path) -> None:
    """A GGUF that is merged into a base as an adapter."""
    path = _file(folder / "adapter.gguf", data)
    with np.errstate(all="ignore"):
        merge_adapter(BASE, path, folder / "merged.gguf", check_base=False, force=True)


def base(data: bytes, folder: Path) -> None:
    """A GGUF that an adapter is merged into."""
    path = _file(folder / "base.gguf", data)
    with np.errstate(all="ignore"):
        merge_adapter(path, BASE.with_name("adapter.gguf"), folder / "merged.gguf", force=True)


def peft(data: bytes, folder: Path) -> None:
    """The folder of an adapter: its configuration, its record and its weights, apart by lines of ---."""
    parts = [*data.split(b"\n---\n", 2), b"", b""]
    for name, part in zip(
        ("adapter_config.json", "training.json", "adapter_model.safetensors"), parts, strict=False
    ):
        _file(folder / name, part)
    with contextlib.suppress(ParrotError):
        read_config(folder)
    with contextlib.suppress(ParrotError):
        describe_role(folder)
    with np.errstate(all="ignore"):
        write_adapter(folder, BASE, folder / "adapter.gguf", name="", license_id="", force=True)


def reference(data: bytes, folder: Path) -> None:
    """What a trained model said, as a certificate compares with it."""
    parts = [*data.split(b"\n---\n", 3), b"", b"", b""]
    names = ("reference.json", "vocabulary.json", "log_probs.f16", "anchors.f16")
    for name, part in zip(names, parts, strict=False):
        _file(folder / name, part)
    read_reference(folder)


def names(data: bytes, folder: Path) -> None:
    """A MODEL, and behind a line of --- the file with a user's own names."""
    text, _, own = data.partition(b"\n---\n")
    (folder / "config").mkdir(exist_ok=True)
    _file(folder / "config" / "models.json", own or b"{}")
    os.environ["PARROT_HOME"] = str(folder)
    # A line end in a name is repeated in the message, and is no mistake of the message
    parse_model(text.translate(None, b"\0\r\n").decode("utf-8", "surrogateescape"), download=False)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        *(rows, seeds, dialogues, journal, recipe, corpus),
        *(gguf, adapter, base, peft, reference, names),
    )
}


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
