"""Recordings with their labels: read from many forms, split by speaker, looked over before they are trusted.

A manifest is JSON Lines: `{"path", "label", "speaker"?, "start"?, "end"?, "source"?}`, paths relative to
the file itself, seconds for a part of a recording. `source` names where a recording comes from, such as a
synthesiser or a campaign, so that one can be held out. A recording without a speaker is taken as spoken
by someone of its own.
It knows nothing of features or networks.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_edge.dialect import audio
from parrot_edge.errors import InputError, UsageError, shorten
from parrot_edge.jsonl import Line, read_lines

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph"})
"""File names that are taken for recordings in a folder."""

_MOST_SECONDS = 1e9

KEYS = ("path", "label", "speaker", "start", "end", "source")


@dataclass(frozen=True)
class Utterance:
    """A recording, or a part of it, and what is known of it.

    start, end  seconds; an `end` of None is the end of the file
    place       where it was written: file and line, for messages
    """

    path: Path
    label: str
    speaker: str = ""
    start: float = 0.0
    end: float | None = None
    source: str = ""
    place: str = ""

    @property
    def who(self) -> str:
        """The speaker, or the file where none is named."""
        return self.speaker or str(self.path)

    def row(self) -> dict[str, Any]:
        """As a row of a manifest, with an absolute path."""
        row: dict[str, Any] = {"path": str(self.path.absolute()), "label": self.label}
        if self.speaker:
            row["speaker"] = self.speaker
        if self.start or self.end is not None:
            row |= {"start": self.start, "end": self.end}
        return row | ({"source": self.source} if self.source else {})


def read_corpus(place: str | Path, *, label_column: str = "accents") -> list[Utterance]:
    """The utterances of a manifest (`.jsonl`), of a Common Voice table (`.tsv`), of a Kaldi directory (with
    `wav.scp` and `utt2lang`), or of a folder with a folder per label, in which a further folder is a speaker.

    label_column  the column of a Common Voice table that is the label; rows without it are left out

    Raises `InputError`, naming file and line, for what cannot be read, and where there is no utterance.
    """
    path = Path(place)
    if path.is_dir():
        found = list(_read_kaldi(path) if (path / "wav.scp").is_file() else _read_folder(path))
    elif path.suffix == ".tsv":
        found = list(_read_common_voice(path, label_column))
    else:
        found = [parse_utterance(line) for line in read_lines(path)]
    if not found:
        raise InputError("holds no utterance", source=str(path))
    return found


def parse_utterance(line: Line) -> Utterance:
    """One row of a manifest; raises `InputError` for an unknown key or a wrong value."""
    row = line.row()
    unknown = [key for key in row if key not in KEYS]
    if unknown:
        raise line.error(f"has the key {shorten(unknown[0])}; a manifest knows {', '.join(KEYS)}")
    path, start, end = parse_part(line)
    if not isinstance(row.get("label"), str) or not row["label"].strip():
        raise line.error("has no label; give it as a text")
    for key in ("speaker", "source"):
        if not isinstance(row.get(key) or "", str):
            raise line.error(f"has a {key} that is not a text")
    for key in ("label", "speaker", "source"):
        line.check_text(row.get(key) or "", key)
    return Utterance(
        Path(path),
        row["label"].strip(),
        row.get("speaker") or "",
        start,
        end,
        row.get("source") or "",
        f"{line.source}:{line.number}",
    )


def parse_part(line: Line) -> tuple[str, float, float | None]:
    """Path, start and end of a row that need have nothing else; a relative path is one of the row's file.

    Raises `InputError` for a wrong value.
    """
    row = line.row()
    if not isinstance(row.get("path"), str) or not row["path"].strip():
        raise line.error("has no path; give it as a text")
    line.check_text(row["path"], "path")
    start, end = _seconds(line, row, "start") or 0.0, _seconds(line, row, "end")
    if end is not None and end <= start:
        raise line.error(f"ends at {end} s, which is not after its start at {start} s")
    folder = Path() if line.source == "<stdin>" else Path(line.source).parent
    return str(folder / row["path"]), start, end


def _seconds(line: Line, row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_SECONDS:
        raise line.error(f"has {key} {shorten(value)}; it takes seconds, 0 or more")
    return float(value)


def _read_folder(folder: Path) -> Iterator[Utterance]:
    """`label/file` and `label/speaker/.../file`."""
    for label in sorted(each for each in folder.iterdir() if each.is_dir()):
        for path in sorted(label.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                inner = path.relative_to(label).parts
                yield Utterance(path, label.name, inner[0] if len(inner) > 1 else "", place=str(path))


def _read_kaldi(folder: Path) -> Iterator[Utterance]:
    """`wav.scp` with plain paths, `utt2lang` (or `utt2dialect`), and `utt2spk` and `segments` where there."""
    names = ("utt2lang", "utt2dialect")
    labels_file = next((folder / name for name in names if (folder / name).is_file()), None)
    if labels_file is None:
        raise InputError("has wav.scp but no utt2lang, so its utterances have no labels", source=str(folder))
    paths: dict[str, Path] = {}
    for line, key, value in _pairs(folder / "wav.scp"):
        if value.endswith("|"):
            raise line.error("is a command; write the sound files out and name them")
        paths[key] = folder / value
    speakers = {key: value for _, key, value in _pairs(folder / "utt2spk", needed=False)}
    parts: dict[str, tuple[str, float, float | None]] = {}
    for line, key, value in _pairs(folder / "segments", needed=False):
        try:
            recording, first, last = value.split()
            start, end = float(first), None if float(last) < 0 else float(last)
            if not 0 <= start <= _MOST_SECONDS or (end is not None and not start < end <= _MOST_SECONDS):
                raise ValueError
            parts[key] = (recording, start, end)
        except ValueError:
            raise line.error("is not `utterance recording start end`") from None
    for line, key, label in _pairs(labels_file):
        recording, start, end = parts.get(key, (key, 0.0, None))
        if recording not in paths:
            raise line.error(f"names {shorten(recording)}, which wav.scp does not have")
        place = f"{line.source}:{line.number}"
        yield Utterance(paths[recording], label, speakers.get(key, ""), start, end, place=place)


def _pairs(path: Path, *, needed: bool = True) -> Iterator[tuple[Line, str, str]]:
    if not needed and not path.is_file():
        return
    for line in read_lines(path):
        key, _, value = line.text().strip().partition(" ")
        if not value.strip():
            raise line.error("has a key and no value")
        yield line, key, value.strip()


def _read_common_voice(path: Path, label_column: str) -> Iterator[Utterance]:
    """A table of Common Voice: `client_id`, `path` (below `clips/`), and a column for the label."""
    lines = list(read_lines(path))
    if not lines:
        return
    header = lines[0].text().split("\t")
    for name in ("client_id", "path", label_column):
        if name not in header:
            raise lines[0].error(f"has no column {name!r}; there are {shorten(header)}")
    for line in lines[1:]:
        row = dict(zip(header, line.text().split("\t"), strict=False))  # its fields are never quoted
        if len(row) < len(header):
            raise line.error(f"has {len(row)} columns of {len(header)}; fetch the table again")
        label = row[label_column].strip()
        if label:
            place = f"{line.source}:{line.number}"
            yield Utterance(path.parent / "clips" / row["path"], label, row["client_id"], place=place)


@dataclass(frozen=True)
class Split:
    """Utterances to learn from and utterances to measure on; no speaker is in both."""

    train: tuple[Utterance, ...]
    held_out: tuple[Utterance, ...]


def split_by_speaker(
    utterances: Sequence[Utterance], share: float, seed: int = 0, *, sources: Iterable[str] = ()
) -> Split:
    """Hold back about `share` (0..1) of each label's utterances, whole speakers at a time, drawn by `seed`.

    sources  hold back these sources instead, all of them and nothing else

    Raises `UsageError` where a label would be left without a speaker on either side, or a speaker of a
    held-out source speaks in another one.
    """
    chosen = set(sources)
    if chosen:
        known = {each.source for each in utterances}
        if missing := sorted(chosen - known):
            raise UsageError(f"no utterance has the source {missing[0]!r}; there are {sorted(known)}")
        out = [each for each in utterances if each.source in chosen]
        split = Split(tuple(each for each in utterances if each.source not in chosen), tuple(out))
        check_split(split)
        return split
    speakers: dict[str, dict[str, int]] = defaultdict(Counter)
    for each in utterances:
        speakers[each.label][each.who] += 1
    lonely = sorted(label for label, them in speakers.items() if len(them) < 2)
    if lonely:
        raise UsageError(
            f"the label {lonely[0]!r} has one speaker only, so none can be held back; record more "
            "speakers, or give held-out data of its own"
        )
    order = random.Random(seed)
    held: set[str] = set()
    for label in sorted(speakers):
        names = sorted(speakers[label])
        order.shuffle(names)
        wanted = share * sum(speakers[label].values())
        taken = float(sum(speakers[label][name] for name in names if name in held))
        for name in names:
            left = [other for other in names if other not in held]
            if len(left) < 2 or (taken >= wanted and len(left) < len(names)):
                break
            if name not in held:
                held.add(name)
                taken += speakers[label][name]
    split = Split(
        tuple(each for each in utterances if each.who not in held),
        tuple(each for each in utterances if each.who in held),
    )
    check_split(split)
    return split


def check_split(split: Split) -> None:
    """Raise `UsageError` where a speaker or a file is on both sides, or a label has nothing to learn from."""
    shared = {each.who for each in split.train} & {each.who for each in split.held_out}
    if shared:
        raise UsageError(
            f"the speaker {min(shared)!r} is in the training data and in the held-out data; what was "
            "measured would tell voices apart, not dialects"
        )
    files = {each.path.absolute() for each in split.train} & {each.path.absolute() for each in split.held_out}
    if files:
        raise UsageError(f"{min(files)} is in the training data and in the held-out data; take it out of one")
    train, held = {each.label for each in split.train}, {each.label for each in split.held_out}
    if len(train) < 2:
        raise UsageError(f"the training data has {len(train)} labels; at least two can be told apart")
    if not held & train:
        raise UsageError("the held-out data has none of the labels of the training data")


@dataclass(frozen=True)
class Checked:
    """An utterance that was read: seconds, shares of it clipped and silent, a hash of its samples."""

    utterance: Utterance
    seconds: float
    clipped: float
    silent: float
    digest: str


def check_utterance(utterance: Utterance) -> Checked:
    """Read one utterance; raises `InputError` where it cannot be used."""
    wave = audio.read_wave(utterance.path, utterance.start, utterance.end)
    return Checked(
        utterance,
        len(wave) / audio.RATE,
        audio.clipped_share(wave),
        audio.silent_share(wave),
        hashlib.sha256(wave.tobytes()).hexdigest()[:16],
    )


def audit(
    utterances: Iterable[Utterance], on_error: Callable[[Utterance, InputError], None] | None = None
) -> dict[str, Any]:
    """What a corpus holds and what is wrong with it, as a report that JSON takes.

    `warnings` holds sentences, the gravest first: labels of one speaker, the same sound under two labels,
    duplicates, labels of very different size, clipping, silence. An utterance that cannot be read goes
    to `on_error`, or its `InputError` is raised.
    """
    found: list[Checked] = []
    bad = 0
    for each in utterances:
        try:
            found.append(check_utterance(each))
        except InputError as error:
            if on_error is None:
                raise
            bad += 1
            on_error(each, error)
    seconds: dict[str, float] = defaultdict(float)
    speakers: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    copies: dict[str, list[Utterance]] = defaultdict(list)
    for one in found:
        seconds[one.utterance.label] += one.seconds
        speakers[one.utterance.label][one.utterance.who] += one.seconds
        copies[one.digest].append(one.utterance)
    return {
        "utterances": len(found),
        "unreadable": bad,
        "seconds": round(math.fsum(seconds.values()), 2),
        "labels": {
            label: {
                "seconds": round(seconds[label], 2),
                "speakers": {who: round(length, 2) for who, length in sorted(speakers[label].items())},
            }
            for label in sorted(seconds)
        },
        "clipped": [str(one.utterance.path) for one in found if one.clipped > 0.001],
        "mostly_silent": [str(one.utterance.path) for one in found if one.silent > 0.7],
        "duplicates": [[str(each.path) for each in same] for same in copies.values() if len(same) > 1],
        "warnings": list(_warnings(found, seconds, speakers, copies)),
    }


def _warnings(
    found: list[Checked],
    seconds: dict[str, float],
    speakers: dict[str, dict[str, float]],
    copies: dict[str, list[Utterance]],
) -> Iterator[str]:
    for label in sorted(speakers):
        if len(speakers[label]) == 1:
            yield (
                f"LABEL OF ONE SPEAKER: {label!r} is spoken by {next(iter(speakers[label]))!r} alone; a "
                "model will learn that voice, not the dialect"
            )
    unnamed = sum(1 for one in found if not one.utterance.speaker)
    if unnamed:
        yield f"{unnamed} utterances name no speaker; each file is taken as a speaker of its own"
    for same in copies.values():
        if len({each.label for each in same}) > 1:
            yield f"the same sound has two labels: {same[0].path} and {same[1].path}"
    repeated = sum(len(same) - 1 for same in copies.values())
    if repeated:
        yield f"{repeated} utterances repeat the sound of another one"
    if seconds and max(seconds.values()) > 10 * min(seconds.values()):
        low, high = min(seconds, key=seconds.__getitem__), max(seconds, key=seconds.__getitem__)
        yield f"{high!r} has {seconds[high]:.0f} s and {low!r} {seconds[low]:.0f} s; use optim.balance"
    for what, count in (
        ("are clipped", sum(1 for one in found if one.clipped > 0.001)),
        ("are mostly silent", sum(1 for one in found if one.silent > 0.7)),
    ):
        if count:
            yield f"{count} utterances {what}"
