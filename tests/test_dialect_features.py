"""Features and what augmentation does to a wave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dialect_sounds import make_wave, write_corpus

from parrot_edge.dialect import augment
from parrot_edge.dialect.audio import RATE
from parrot_edge.dialect.corpus import Utterance, read_corpus
from parrot_edge.dialect.features import BANDS, FeatureStore, log_mel, normalize
from parrot_edge.errors import InputError
from parrot_edge.recipe import DialectAugment

NONE = DialectAugment(copies=0)


def test_log_mel_is_one_frame_of_80_bands_each_10_ms() -> None:
    assert log_mel(make_wave("low", seconds=1.0)).shape == (98, BANDS)
    assert log_mel(np.zeros(399, np.float32)).shape == (0, BANDS)


def test_log_mel_is_kaldis_definition() -> None:
    """Against Kaldi's published recipe in numpy, frame by frame."""
    import kaldi_native_fbank

    wave = make_wave("wide", seconds=0.2)
    options = kaldi_native_fbank.FbankOptions()
    options.mel_opts.num_bins = BANDS
    banks = kaldi_native_fbank.MelBanks(options.mel_opts, options.frame_opts).get_matrix()
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    expected = []
    for start in range(0, len(wave) - 399, 160):
        frame = 32768.0 * wave[start : start + 400].astype(float)
        frame -= frame.mean()
        frame = np.concatenate([[frame[0] * 0.03], frame[1:] - 0.97 * frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)) ** 2
        expected.append(np.log(np.maximum(np.asarray(banks) @ power, 1.2e-7)))
    assert log_mel(wave) == pytest.approx(np.array(expected), abs=0.01)


def test_normalized_features_do_not_know_the_volume() -> None:
    wave = make_wave("low")
    assert normalize(log_mel(0.1 * wave)) == pytest.approx(normalize(log_mel(wave)), abs=0.02)


def level(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave.astype(float) ** 2)))


def test_each_alteration_does_what_its_name_says() -> None:
    wave, random = make_wave("low", seconds=1.0), np.random.default_rng(0)
    assert len(augment.change_speed(wave, 1.25)) == pytest.approx(RATE / 1.25, abs=2)
    noisy = augment.add_noise(wave, random)
    assert 5 <= 20 * np.log10(level(wave) / level(noisy - wave)) <= 25
    for altered in (augment.add_room(wave, random), augment.through_mp3(wave)):
        assert altered.dtype == np.float32
        assert len(altered) == len(wave)
        assert level(altered) == pytest.approx(level(wave), rel=0.2)
    wide = augment.through_telephone(make_wave("wide", seconds=1.0) + 0)
    spectrum = np.abs(np.fft.rfft(wide))
    assert spectrum[4200:].max() < 0.02 * spectrum.max()  # nothing above 4 kHz


def test_altering_is_the_same_for_the_same_seed() -> None:
    wave, options = make_wave("low"), DialectAugment(noise=1, reverberation=1, codec=1)
    one, same, other = (augment.alter(wave, options, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert len(one) != len(other) or not np.array_equal(one, other)
    assert np.abs(one).max() <= 1


def test_masks_blank_bands_and_frames_and_leave_the_rest() -> None:
    features = np.ones((100, BANDS), np.float32)
    masked = augment.mask_spectrum(features, 2, np.random.default_rng(1))
    assert features.all()
    assert 0 < (masked == 0).mean() < 0.6
    assert set(np.unique(masked)) == {0, 1}
    assert augment.mask_spectrum(np.ones((1, BANDS), np.float32), 2, np.random.default_rng(0)).shape == (
        1,
        BANDS,
    )


def test_store_is_made_once_and_holds_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utterances = read_corpus(write_corpus(tmp_path, speakers=1, each=2))
    options = DialectAugment(copies=1)
    store = FeatureStore.build(utterances, options, cache=str(tmp_path / "cache"))
    assert (len(store), store.copies) == (4, 1)
    clean = log_mel(make_wave("high", 0, 0.5, seed=0))
    assert store[0, 0] == pytest.approx(clean, abs=0.05)
    assert store[3, 1].shape[1] == BANDS
    monkeypatch.setattr("parrot_edge.dialect.features.log_mel", None)  # a second making would fail
    again = FeatureStore.build(utterances, replace(options, masks=3), cache=str(tmp_path / "cache"))
    assert np.array_equal(again[3, 1], store[3, 1])
    with pytest.raises(TypeError):
        FeatureStore.build(utterances, options, seed=1, cache=str(tmp_path / "cache"))


def test_bad_recording_is_refused_or_skipped(tmp_path: Path) -> None:
    utterances = read_corpus(write_corpus(tmp_path, speakers=1, each=1))
    (tmp_path / "text.wav").write_text("no sound")
    utterances.insert(1, Utterance(tmp_path / "text.wav", "low", place="m.jsonl:2"))
    cache = str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"text\.wav: is not a sound file"):
        FeatureStore.build(utterances, NONE, cache=cache)
    store = FeatureStore.build(utterances, NONE, cache=cache, skip=True)
    assert store.kept == [0, 2]
    assert store.skipped[0].startswith("m.jsonl:2: ")
    with pytest.raises(InputError, match="not a sound file"):
        FeatureStore.build(utterances, NONE, cache=cache)
    with pytest.raises(InputError, match="none of the 1 recordings"):
        FeatureStore.build(utterances[1:2], NONE, cache=cache, skip=True)
