"""The practice corpus, with a program in espeak-ng's place that writes what it was asked."""

from __future__ import annotations

import os
import stat
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from parrot_edge.dialect.corpus import read_corpus, split_by_speaker
from parrot_edge.dialect.synthesize import ENGLISH, builtin_sentences, synthesize
from parrot_edge.errors import OutputError, UsageError

PROGRAM = f"""#!{sys.executable}
import sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["-v"].startswith("none"):
    sys.exit("Error: The specified espeak-ng voice does not exist.")
open(options["-w"], "w").write(f'{{options["-v"]}} says {{sys.stdin.read()}}')
"""


@pytest.fixture
def espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("espeak")
def test_corpus_can_be_split_by_timbre_and_sentence(tmp_path: Path) -> None:
    voices = {"us": "en-us", "gb": "en-gb"}
    texts = [f"Sentence number {number}." for number in range(8)]
    assert synthesize(tmp_path / "corpus", voices, texts, speakers=4, sentences=2) == 16
    rows = read_corpus(tmp_path / "corpus" / "manifest.jsonl")
    assert {row.source for row in rows} == {"espeak-ng"}
    by_speaker = defaultdict(set)
    for row in rows:
        voice, _, text = row.path.read_text().partition(" says ")
        assert voice == f"{voices[row.label]}+{row.speaker}"
        by_speaker[row.speaker].add(text)
    assert sum(map(len, by_speaker.values())) == 8  # no sentence is said by two timbres
    assert {row.label for row in split_by_speaker(rows, 0.25).held_out} == {"us", "gb"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "corpus"]
    with pytest.raises(OutputError, match="exists"):
        synthesize(tmp_path / "corpus", voices, texts)


@pytest.mark.usefixtures("espeak")
def test_voice_that_does_not_exist_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot speak as none\+.*does not exist"):
        synthesize(tmp_path / "corpus", {"us": "none", "gb": "en-gb"}, ["Hello."], speakers=2, sentences=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.usefixtures("espeak")
@pytest.mark.parametrize(
    ("voices", "speakers", "said"),
    [
        ({"us": "en-us"}, 2, "two voices"),
        ({"us": "en-us", "../gb": "en-gb"}, 2, "cannot name a folder"),
        (ENGLISH, 999, "timbres"),
    ],
)
def test_wrong_wishes_are_refused(voices: dict, speakers: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        synthesize(tmp_path / "corpus", voices, ["Hello."], speakers=speakers)


def test_missing_program_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="apt-get install espeak-ng"):
        synthesize(tmp_path / "corpus", ENGLISH, ["Hello."])


def test_builtin_sentences_are_many_and_short() -> None:
    sentences = builtin_sentences()
    assert len(set(sentences)) >= 100
    assert max(map(len, sentences)) <= 120
