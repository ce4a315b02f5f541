"""Recordings and their labels: every form reads the same, no speaker is on both sides, faults are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from dialect_sounds import make_wave, write_corpus

from parrot_edge.dialect.audio import RATE, probe, read_blocks, read_wave, write_wave
from parrot_edge.dialect.corpus import (
    Split,
    Utterance,
    audit,
    check_split,
    read_corpus,
    split_by_speaker,
)
from parrot_edge.errors import InputError, UsageError

FORMS = [(suffix, rate) for suffix in ("wav", "flac", "ogg", "mp3") for rate in (8000, 16000, 44100, 192000)]
FORMS.remove(("mp3", 192000))  # a rate that mp3 does not have


@pytest.mark.parametrize(("suffix", "rate"), FORMS)
def test_sound_of_any_form_and_rate_becomes_16_khz_mono(suffix: str, rate: int, tmp_path: Path) -> None:
    time = np.arange(rate) / rate
    stereo = np.stack([0.5 * np.sin(2 * np.pi * 440 * time), np.zeros(rate)], axis=1)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, stereo, rate)
    wave = read_wave(path)
    assert wave.dtype == np.float32
    assert abs(len(wave) - RATE) < 0.08 * RATE  # codecs pad
    spectrum = np.abs(np.fft.rfft(wave[2000:14000]))
    assert abs(spectrum.argmax() * RATE / 12000 - 440) < 3
    assert np.abs(wave[2000:14000]).max() == pytest.approx(0.25, abs=0.03)
    assert probe(path).channels == 2


def test_eight_channels_are_averaged(tmp_path: Path) -> None:
    wave = make_wave("low")
    soundfile.write(tmp_path / "a.wav", np.stack([wave] * 4 + [0 * wave] * 4, axis=1), RATE)
    assert read_wave(tmp_path / "a.wav") == pytest.approx(wave / 2, abs=1e-4)


def test_part_of_a_recording_is_that_part(tmp_path: Path) -> None:
    ramp = np.linspace(0, 0.9, 3 * RATE).astype(np.float32)
    write_wave(tmp_path / "a.wav", ramp)
    assert read_wave(tmp_path / "a.wav", 1, 2) == pytest.approx(ramp[RATE : 2 * RATE], abs=1e-4)
    with pytest.raises(InputError, match=r"has 3\.00 s"):
        read_wave(tmp_path / "a.wav", 1, 9)


def test_blocks_are_the_whole_wave(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.tile(make_wave("low"), 50), 44100)
    blocks = list(read_blocks(tmp_path / "long.wav"))
    assert sum(map(len, blocks)) == pytest.approx(50 * RATE * RATE / 44100, abs=2)


def write_faults(folder: Path) -> dict[str, str]:
    """Files that cannot be used, and what is said of each."""
    (folder / "text.wav").write_text("this is no sound")
    (folder / "empty.wav").write_bytes(b"")
    write_wave(folder / "short.wav", make_wave("low")[:160])
    write_wave(folder / "silent.wav", np.zeros(RATE, np.float32))
    write_wave(folder / "whole.wav", make_wave("low"))
    (folder / "header.wav").write_bytes((folder / "whole.wav").read_bytes()[:44])
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    return {
        "text.wav": "not a sound file",
        "empty.wav": "not a sound file",
        "short.wav": "0.010 s of sound",
        "silent.wav": "is silent",
        "header.wav": "0.000 s",
        "nan.wav": "not finite",
        "none.wav": "is no file",
    }


def test_what_cannot_be_heard_is_one_sentence(tmp_path: Path) -> None:
    for name, said in write_faults(tmp_path).items():
        with pytest.raises(InputError, match=said) as caught:
            read_wave(tmp_path / name)
        assert name in str(caught.value)


def test_truncated_file_gives_what_is_there(tmp_path: Path) -> None:
    write_wave(tmp_path / "a.wav", make_wave("low"))
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[: RATE + 44])
    assert len(read_wave(tmp_path / "cut.wav")) == RATE // 2


def test_all_forms_of_a_corpus_read_the_same(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, speakers=2, each=2)
    expected = sorted((u.label, u.speaker, u.path.name) for u in read_corpus(manifest))
    assert len(expected) == 8
    folder, kaldi = tmp_path / "folder", tmp_path / "kaldi"
    kaldi.mkdir()
    table = ["client_id\tpath\tsentence\taccents"]
    scp, lang, spk = [], [], []
    (tmp_path / "clips").mkdir()
    for each in read_corpus(manifest):
        place = folder / each.label / each.speaker
        place.mkdir(parents=True, exist_ok=True)
        (place / each.path.name).symlink_to(each.path)
        (tmp_path / "clips" / each.path.name).symlink_to(each.path)
        table.append(f'{each.speaker}\t{each.path.name}\tsays "so\t{each.label}')
        scp.append(f"{each.path.stem} {each.path}")
        lang.append(f"{each.path.stem} {each.label}")
        spk.append(f"{each.path.stem} {each.speaker}")
    table.append("someone\tother.mp3\tno accent given\t")
    (tmp_path / "validated.tsv").write_text("\n".join(table) + "\n")
    for name, lines in (("wav.scp", scp), ("utt2lang", lang), ("utt2spk", spk)):
        (kaldi / name).write_text("\n".join(lines) + "\n")
    for place in (folder, kaldi, tmp_path / "validated.tsv"):
        found = read_corpus(place)
        assert sorted((u.label, u.speaker, u.path.name) for u in found) == expected
        assert all(u.path.exists() for u in found)


def test_kaldi_segments_are_parts(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("call call.wav\n")
    (tmp_path / "segments").write_text("u1 call 0.5 1.5\nu2 call 2 -1\n")
    (tmp_path / "utt2lang").write_text("u1 north\nu2 south\n")
    one, two = read_corpus(tmp_path)
    assert (one.start, one.end, two.start, two.end) == (0.5, 1.5, 2.0, None)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": "a"}, "has no path"),
        ({"path": "a.wav", "label": " "}, "has no label"),
        ({"path": "a.wav", "label": "a", "begin": 1}, "has the key 'begin'"),
        ({"path": "a.wav", "label": "a", "start": 2, "end": 1}, "is not after"),
        ({"path": "a.wav", "label": "a", "start": "0"}, "takes seconds"),
        ({"path": "a.wav", "label": "a", "speaker": 7}, "not a text"),
        ({"path": "a.wav", "label": "a", "end": 10**400}, "has end 1000"),
        ({"path": "a\0.wav", "label": "a"}, "path holds a NUL"),
        ({"path": "a.wav", "label": "\ud800"}, "label holds half of a surrogate pair"),
        ({"path": "a.wav", "label": "a", "k" * 9000: 1}, "has the key 'kkk"),
    ],
)
def test_wrong_row_is_named_by_file_and_line(row: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"path": "x.wav", "label": "x"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=said) as caught:
        read_corpus(path)
    assert f"{path}:2: " in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "segment", ["u1 call nan 1", "u1 call 2 1", "u1 call -1 1", "u1 call 1 inf", "u1 call 1"]
)
def test_kaldi_segment_that_is_none_is_named(segment: str, tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("call call.wav\n")
    (tmp_path / "segments").write_text(segment + "\n")
    (tmp_path / "utt2lang").write_text("u1 north\n")
    with pytest.raises(InputError, match="segments:1: is not `utterance recording start end`"):
        read_corpus(tmp_path)


def test_common_voice_row_cut_short_is_named_and_a_long_one_read(tmp_path: Path) -> None:
    table = tmp_path / "validated.tsv"
    table.write_text(f"client_id\tpath\taccents\n1\ta.mp3\t{'x' * 200_000}\n")
    assert len(read_corpus(table)[0].label) == 200_000
    table.write_text("client_id\tpath\taccents\n1\ta.mp3\n")
    with pytest.raises(InputError, match="tsv:2: has 2 columns of 3"):
        read_corpus(table)


def test_split_shares_no_speaker_and_keeps_every_label() -> None:
    rows = [Utterance(Path(f"{i}.wav"), "ab"[i % 2], f"s{i % 12}") for i in range(120)]
    for seed in range(10):
        split = split_by_speaker(rows, 0.25, seed)
        assert not {u.speaker for u in split.train} & {u.speaker for u in split.held_out}
        assert {u.label for u in split.train} == {u.label for u in split.held_out} == {"a", "b"}
        assert len(split.train) + len(split.held_out) == 120
        assert 0.15 <= len(split.held_out) / 120 <= 0.4
    assert split_by_speaker(rows, 0.25, 3) == split_by_speaker(rows, 0.25, 3)


def test_split_that_cannot_be_kept_is_refused() -> None:
    lonely = [Utterance(Path("1.wav"), "a", "x"), Utterance(Path("2.wav"), "b", "y")]
    with pytest.raises(UsageError, match="one speaker only"):
        split_by_speaker(lonely, 0.5)
    both = Split((Utterance(Path("1.wav"), "a", "x"),), (Utterance(Path("2.wav"), "a", "x"),))
    with pytest.raises(UsageError, match="speaker 'x' is in the training data"):
        check_split(both)
    same = Split((Utterance(Path("1.wav"), "a", "x"),), (Utterance(Path("1.wav"), "a", "y"),))
    with pytest.raises(UsageError, match=r"1\.wav is in"):
        check_split(same)


def test_source_can_be_held_out() -> None:
    rows = [Utterance(Path(f"{i}.wav"), "ab"[i % 2], f"s{i}", source="xyz"[i % 3]) for i in range(12)]
    split = split_by_speaker(rows, 0.1, sources=["y"])
    assert {u.source for u in split.held_out} == {"y"}
    assert {u.source for u in split.train} == {"x", "z"}
    with pytest.raises(UsageError, match="no utterance has the source 'q'"):
        split_by_speaker(rows, 0.1, sources=["q"])


def test_audit_tells_what_is_wrong(tmp_path: Path) -> None:
    wave = make_wave("low")
    write_wave(tmp_path / "a.wav", wave)
    write_wave(tmp_path / "copy.wav", wave)
    write_wave(tmp_path / "clipped.wav", np.clip(9 * wave, -1, 1))
    write_wave(tmp_path / "quiet.wav", np.concatenate([wave[:4000], np.zeros(2 * RATE, np.float32)]))
    rows = [
        Utterance(tmp_path / "a.wav", "one", "x"),
        Utterance(tmp_path / "copy.wav", "two", "y"),
        Utterance(tmp_path / "clipped.wav", "two", "z"),
        Utterance(tmp_path / "quiet.wav", "two"),
        Utterance(tmp_path / "none.wav", "two", "z"),
    ]
    missing: list[str] = []
    report = audit(rows, lambda each, error: missing.append(str(error)))
    assert len(missing) == report["unreadable"] == 1
    assert report["labels"]["one"] == {"seconds": 1.0, "speakers": {"x": 1.0}}
    assert [Path(path).name for path in report["clipped"]] == ["clipped.wav"]
    assert [Path(path).name for path in report["mostly_silent"]] == ["quiet.wav"]
    assert len(report["duplicates"]) == 1
    assert report["warnings"][0].startswith("LABEL OF ONE SPEAKER: 'one'")
    assert any("two labels" in warning for warning in report["warnings"])
    with pytest.raises(InputError, match="is no file"):
        audit(rows)
