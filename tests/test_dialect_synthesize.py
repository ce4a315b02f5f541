"""The practice corpus, with programs in the synthesisers' place that write what they were asked."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from parrot_edge.cli.dialect import dialect
from parrot_edge.dialect.corpus import read_corpus, split_by_speaker
from parrot_edge.dialect.synthesize import builtin_sentences, synthesize
from parrot_edge.dialect.voices import Kokoro, Wish, espeak_voices, flite_voices, kokoro_voices
from parrot_edge.errors import ModelError, OutputError, UsageError

ESPEAK = f"""#!{sys.executable}
import sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--ipa" in sys.argv:
    print(" " + sys.stdin.read().strip().replace("o", "əʊ"))
elif options["-v"].startswith("none"):
    sys.exit("Error: The specified espeak-ng voice does not exist.")
else:
    open(sys.argv[-1], "w").write(f'{{options["-v"]}} says {{sys.stdin.read()}}')
"""
FLITE = f"""#!{sys.executable}
import sys
if "-lv" in sys.argv:
    print("Voices available: rms slt awb ")
else:
    open(sys.argv[-1], "w").write(f"{{sys.argv[2]}} says {{sys.stdin.read()}}")
"""
TWO: list[Wish] = [("us", "en-us"), ("gb", "en-gb")]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("espeak-ng", ESPEAK), ("flite", FLITE)):
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.usefixtures("programs")
def test_corpus_can_be_split_by_timbre_and_sentence(tmp_path: Path) -> None:
    texts = [f"Sentence number {number}." for number in range(8)]
    voices = espeak_voices(TWO, speakers=4)
    assert synthesize(tmp_path / "corpus", voices, texts, sentences=2) == 16
    rows = read_corpus(tmp_path / "corpus" / "manifest.jsonl")
    assert {row.source for row in rows} == {"espeak-ng"}
    by_speaker = defaultdict(set)
    for row in rows:
        voice, _, text = row.path.read_text().partition(" says ")
        assert voice == f"{dict(TWO)[row.label]}+{row.speaker}"
        by_speaker[row.speaker].add(text)
    assert sum(map(len, by_speaker.values())) == 8  # no sentence is said by two timbres
    assert {row.label for row in split_by_speaker(rows, 0.25).held_out} == {"us", "gb"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "corpus"]
    with pytest.raises(OutputError, match="exists"):
        synthesize(tmp_path / "corpus", voices, texts)


@pytest.mark.usefixtures("programs")
def test_flite_voices_are_speakers_of_a_source_of_their_own(tmp_path: Path) -> None:
    voices = flite_voices([("us", "rms"), ("us", "slt"), ("scotland", "awb")])
    assert synthesize(tmp_path / "corpus", voices, ["Hello."], sentences=1) == 3
    rows = read_corpus(tmp_path / "corpus" / "manifest.jsonl")
    assert [(row.label, row.speaker, row.source) for row in rows] == [
        ("us", "rms", "flite"),
        ("us", "slt", "flite"),
        ("scotland", "awb", "flite"),
    ]
    assert rows[2].path.read_text() == "awb says Hello."
    with pytest.raises(UsageError, match="no voice 'kal'; it has rms, slt, awb"):
        flite_voices([("us", "kal")])


@pytest.mark.usefixtures("programs")
def test_kokoro_speaks_phonemes_in_the_style_of_a_voice(tmp_path: Path) -> None:
    folder = write_kokoro(tmp_path / "kokoro")
    assert Kokoro(folder).phonemes("bf_emma", "so, no") == "sQ, nQ"
    voices = kokoro_voices(folder)
    assert [(voice.label, voice.speaker) for voice in voices] == [("us", "af_sky"), ("gb", "bf_emma")]
    assert synthesize(tmp_path / "corpus", voices, ["so, no"], sentences=1) == 2
    wave, rate = soundfile.read(tmp_path / "corpus" / "gb" / "bf_emma-0.wav")
    assert rate == 16000
    # what the model of `write_kokoro` says: the style for 6 signs, as long as there are of them
    assert wave[len(wave) // 4 : len(wave) // 2] == pytest.approx(0.006, abs=1e-3)
    with pytest.raises(UsageError, match="no voice 'bm_lewis'"):
        kokoro_voices(folder, [("gb", "bm_lewis")])
    with pytest.raises(UsageError, match="phonemes at once, not 0"):
        Kokoro(folder).say("bf_emma", 1.0, "?", tmp_path / "x.wav")
    with pytest.raises(ModelError, match="no Kokoro model"):
        kokoro_voices(tmp_path)


def write_kokoro(folder: Path) -> Path:
    """A folder like Kokoro's, whose model says the style's first number, 1,000 samples for each sign."""
    from onnx import TensorProto, helper, save

    (folder / "onnx").mkdir(parents=True)
    (folder / "voices").mkdir()
    vocabulary = {sign: place for place, sign in enumerate(["", *"sonQ ,"])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    styles = np.repeat(np.arange(510, dtype=np.float32)[:, None] / 1000, 256, axis=1)
    for name in ("af_sky", "bf_emma", "jf_alpha"):
        styles.tofile(folder / "voices" / f"{name}.bin")
    number = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Slice", ["style", "zero", "one", "axis"], ["first"]),
            helper.make_node("Shape", ["tokens"], ["size"]),
            helper.make_node("Mul", ["size", "many"], ["shape"]),
            helper.make_node("Expand", ["first", "shape"], ["audio"]),
        ],
        "kokoro",
        [
            number("tokens", TensorProto.INT64, [1, None]),
            number("style", TensorProto.FLOAT, [1, 256]),
            number("speed", TensorProto.FLOAT, [1]),
        ],
        [number("audio", TensorProto.FLOAT, [None, None])],
        [
            helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("many", TensorProto.INT64, [2], [1, 1000]),
        ],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    save(model, str(folder / "onnx" / "model.onnx"))
    return folder


@pytest.mark.usefixtures("programs")
def test_voice_that_does_not_exist_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    voices = espeak_voices([("us", "none"), ("gb", "en-gb")], speakers=2)
    with pytest.raises(UsageError, match=r"cannot speak as none\+.*does not exist"):
        synthesize(tmp_path / "corpus", voices, ["Hello."], sentences=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ([("us", "en-us")], "two labels"),
        ([("us", "en-us"), ("../gb", "en-gb")], "cannot name a folder"),
    ],
)
def test_wrong_labels_are_refused(wishes: list[Wish], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        synthesize(tmp_path / "corpus", espeak_voices(wishes, speakers=2), ["Hello."])


@pytest.mark.usefixtures("programs")
def test_command_takes_voices_of_its_source(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(dialect, ["synthesize", "-o", str(tmp_path / "corpus"), *arguments])
        if done.exception is not None:
            raise done.exception
        return done.stderr

    for wrong in (["--source", "kokoro"], ["--model", "x"], ["--voice", "us"]):
        with pytest.raises(UsageError):
            run(*wrong)
    with pytest.raises(UsageError, match="timbres"):
        run("--speakers", "999")
    assert "20 recordings" in run("--source", "flite", "--voice", "us=rms", "--voice", "sco=awb")


def test_missing_program_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="apt-get install espeak-ng"):
        espeak_voices()


def test_builtin_sentences_are_many_and_short() -> None:
    sentences = builtin_sentences()
    assert len(set(sentences)) >= 400
    assert max(map(len, sentences)) <= 120
