"""From recordings to a model that answers, on tones: train, resume, measure, export, identify."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from conftest import Parrot
from dialect_sounds import make_wave, write_corpus

from parrot_edge.cli.dialect import dialect
from parrot_edge.dialect.audio import RATE, write_wave
from parrot_edge.dialect.batches import Batches, deal, draw_stretch
from parrot_edge.dialect.corpus import read_corpus
from parrot_edge.dialect.evaluate import score_corpus
from parrot_edge.dialect.features import log_mel
from parrot_edge.dialect.identify import count_speech, identify_file, identify_stream, read_pcm
from parrot_edge.dialect.runtime import DEMONSTRATION, Runtime
from parrot_edge.dialect.trainer import prepare, train
from parrot_edge.errors import InputError, OutputError, UsageError
from parrot_edge.recipe import (
    DialectAugment,
    DialectData,
    DialectNetwork,
    DialectOptim,
    DialectRecipe,
    DialectRun,
)


def make_recipe(folder: Path, **optim: Any) -> DialectRecipe:
    return DialectRecipe(
        name="tones",
        network=DialectNetwork(
            channels=16, stride=2, blocks=(1, 1), growth=16, bottleneck=16, embedding=16, dilations=(1, 2)
        ),
        data=DialectData(
            sources=(str(folder / "manifest.jsonl"),),
            held_out=0.3,
            seconds=0.6,
            min_seconds=0.4,
            cache=str(folder / "cache"),
        ),
        augment=DialectAugment(copies=1, noise=0.2, reverberation=0.2, codec=0, masks=0),
        optim=DialectOptim(**{"epochs": 8, "batch_size": 4, "learning_rate": 0.01, **optim}),
        run=DialectRun(device="cpu", threads=1),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of tones and the folder `run` with a model of it."""
    folder = tmp_path_factory.mktemp("tones")
    write_corpus(folder, speakers=4)
    train(make_recipe(folder), folder / "run")
    return folder


@pytest.fixture(scope="module")
def runtime(trained: Path) -> Runtime:
    return Runtime(trained / "run")


def test_run_leaves_a_model_that_tells_unheard_speakers_apart(trained: Path) -> None:
    names = {path.name for path in (trained / "run").iterdir()}
    pictures = {"curve.png", "confusion.png", "det.png"}
    assert names == pictures | {
        *("model.onnx", "network.pt", "recipe.yaml", "training.json", "README.md", "curve.jsonl")
    }
    record = json.loads((trained / "run" / "training.json").read_text())
    assert record["measures"]["accuracy"]["value"] >= 0.8
    assert record["measures"]["accuracy"]["low"] < record["measures"]["accuracy"]["value"]
    assert record["data"]["speakers_held_out"] >= 2
    assert str(trained) not in (trained / "run" / "training.json").read_text()
    assert str(trained) not in (trained / "run" / "recipe.yaml").read_text()
    assert "95 % interval" in (trained / "run" / "README.md").read_text()


def test_killed_run_goes_on_to_the_same_weights(trained: Path, tmp_path: Path) -> None:
    recipe = make_recipe(trained, epochs=3)

    def die(line: str) -> None:
        if line.startswith("epoch 2/"):
            raise KeyboardInterrupt

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe, whole)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, killed, say=die)
    with pytest.raises(OutputError, match="--resume"):
        train(recipe, killed)
    with pytest.raises(OutputError, match="another recipe"):
        train(replace(recipe, optim=replace(recipe.optim, margin=0.3)), killed, resume=True)
    said: list[str] = []
    train(recipe, killed, resume=True, say=said.append)
    assert "going on with epoch 3" in said
    one, other = (torch.load(each / "network.pt")["weights"] for each in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train(recipe, killed, resume=True)["best_epoch"] >= 1  # finished already


def test_run_ends_early_without_progress(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parrot_edge.dialect.trainer._balanced_loss", lambda scores, scale: 1.0)
    monkeypatch.setattr("parrot_edge.dialect.trainer.eer", lambda scores: np.array([0.5]))
    record = train(make_recipe(trained, epochs=9, patience=1), tmp_path / "run")
    assert (record["epochs"], record["best_epoch"]) == (2, 1)


def test_missing_gpu_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = make_recipe(trained)
    with pytest.raises(Exception, match="wants a GPU"):
        train(replace(recipe, run=replace(recipe.run, device="gpu")), tmp_path / "run")


def test_batches_balance_labels_and_depend_on_the_epoch_alone(trained: Path) -> None:
    job = prepare(make_recipe(trained))
    keep = np.flatnonzero((job.train_labels == 0) | (np.arange(len(job.train_labels)) % 3 == 0))
    labels = np.where(np.isin(np.arange(len(job.train_labels)), keep), job.train_labels, 0)
    batches = Batches(job.train, labels, job.recipe)
    one = list(batches.epoch(1))
    seen = np.concatenate([labels for _, labels in one])
    assert abs((seen == 0).mean() - 0.5) < 0.1
    assert len({features.shape[1] for features, _ in one}) > 1  # lengths are mixed
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(one, batches.epoch(1), strict=True))
    assert (
        not np.array_equal(one[0][1], next(batches.epoch(2))[1])
        or one[0][0].shape != next(batches.epoch(2))[0].shape
    )
    weigh = replace(job.recipe, optim=replace(job.recipe.optim, balance="weigh"))
    weights = Batches(job.train, labels, weigh).class_weights()
    assert weights is not None
    assert weights[1] > 1 > weights[0]


def test_source_does_not_tell_the_label(trained: Path) -> None:
    job = prepare(make_recipe(trained))
    recipe = replace(job.recipe, optim=replace(job.recipe.optim, batch_size=len(job.train_labels)))
    sources = ["studio" if at % 4 == 0 or label else "field" for at, label in enumerate(job.train_labels)]
    batches = Batches(job.train, job.train_labels, recipe, sources)
    drawn = batches._order(np.random.default_rng(0))
    shares = Counter((int(job.train_labels[at]), sources[at]) for at in drawn)
    assert shares[0, "studio"] == pytest.approx(shares[0, "field"], abs=1)
    assert shares[0, "studio"] + shares[0, "field"] == pytest.approx(shares[1, "studio"], abs=1)


def test_cards_are_dealt_once_each_round() -> None:
    random = np.random.default_rng(0)
    assert sorted(deal([3, 5], 4, random)) == [3, 3, 5, 5]
    assert draw_stretch(np.arange(6).reshape(3, 2), 7, random).shape == (7, 2)


def test_long_recording_is_answered_in_windows(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    wave = np.concatenate([make_wave("high", 1, 4.0), make_wave("low", 1, 4.5)])
    soundfile.write(path, wave, RATE)
    answers = list(identify_file(runtime, path, window=1.0))
    assert [answer.start for answer in answers] == [float(at) for at in range(8)]
    assert answers[-1].end == 8.5
    assert [answer.label for answer in answers[:3]] == ["high"] * 3
    assert answers[4].label != "low"  # what was heard before still weighs
    assert answers[-1].label == "low"
    assert all(sum(answer.scores.values()) == pytest.approx(1, abs=1e-5) for answer in answers)
    [part] = identify_file(runtime, path, 5.0, 6.0)
    assert (part.start, part.end, part.label) == (5.0, 6.0, "low")


def test_pause_has_no_label(runtime: Runtime, tmp_path: Path) -> None:
    wave = np.concatenate([make_wave("high", 0, 1.0), np.zeros(RATE, np.float32), make_wave("high", 0, 1.0)])
    write_wave(tmp_path / "a.wav", wave)
    labels = [answer.label for answer in identify_file(runtime, tmp_path / "a.wav", window=1.0)]
    assert labels == ["high", None, "high"]
    assert count_speech(log_mel(np.zeros(RATE, np.float32))) == 0


def test_stream_is_answered_as_it_comes(runtime: Runtime) -> None:
    taken = 0.0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal taken
        for at in range(30):
            taken += 0.1
            yield make_wave("low", 0, 0.1, seed=at)

    answers = identify_stream(runtime, pieces(), step=0.5)
    assert next(answers).end == pytest.approx(1.0)
    assert taken == pytest.approx(1.0)  # not a sample more was waited for
    ends = [answer.end for answer in answers]
    assert ends == pytest.approx([1.5, 2.0, 2.5, 3.0])
    assert not list(identify_stream(runtime, []))
    assert [each.end for each in identify_stream(runtime, [make_wave("low", 0, 0.5)])] == [0.5]


def test_pcm_of_any_rate_and_torn_samples_is_read(tmp_path: Path) -> None:
    wave = make_wave("low", 0, 1.0)
    (tmp_path / "raw").write_bytes((wave * 32767).astype("<i2").tobytes() + b"\1")
    with open(tmp_path / "raw", "rb", buffering=0) as raw:
        assert np.concatenate(list(read_pcm(raw, seconds=0.01))) == pytest.approx(wave, abs=1e-3)
    with open(tmp_path / "raw", "rb") as raw:
        assert sum(map(len, read_pcm(raw, 8000))) == pytest.approx(2 * RATE, abs=20)
    with pytest.raises(UsageError, match="cannot be"):
        next(read_pcm(io.BytesIO(), 5))


def test_scores_by_length_take_only_recordings_that_have_it(runtime: Runtime, trained: Path) -> None:
    utterances = read_corpus(trained / "manifest.jsonl")
    scores = score_corpus(runtime, utterances, [0.6, 5])
    assert len(scores["all"].truth) == len(utterances)
    assert len(scores["0.6s"].truth) == sum(1 for each in utterances if "-0.wav" not in each.path.name)
    assert "5s" not in scores


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(dialect, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_identify_reads_files_rows_and_pcm(trained: Path, parrot: Parrot) -> None:
    model, wav = trained / "run" / "model.onnx", trained / "high-0-2.wav"
    [row] = map(json.loads, run("identify", wav, "--model", model).stdout.splitlines())
    assert set(row) == {"path", "start", "end", "label", "scores", "unknown"}
    assert (row["path"], row["end"], row["label"]) == (str(wav), 0.9, "high")
    listed = run("identify", trained / "manifest.jsonl", "--model", trained / "run").stdout
    assert len(listed.splitlines()) == 24
    rows = parrot("dialect", "identify", "--model", model, input=json.dumps({"path": str(wav), "end": 0.5}))
    assert json.loads(rows.stdout)["end"] == 0.5
    pcm = (make_wave("low", 0, 2.0) * 32767).astype("<i2").tobytes()
    answers = parrot("dialect", "identify", "--pcm", "--model", model, input=pcm).stdout.splitlines()
    assert [json.loads(line)["end"] for line in answers] == [1.0, 2.0]


def test_bad_recording_stops_or_is_skipped_and_the_rest_goes_on(trained: Path, tmp_path: Path) -> None:
    model, good = trained / "run", trained / "high-0-2.wav"
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(InputError, match="is not a sound file"):
        run("identify", tmp_path / "text.wav", good, "--model", model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"path": 7}\nnonsense\n' + json.dumps({"path": str(good)}) + "\n")
    done = run("identify", tmp_path / "text.wav", rows, good, "--model", model, "--on-error", "skip")
    assert len(done.stdout.splitlines()) == 2
    said = done.stderr.splitlines()
    assert len(said) == 3
    assert f"{rows}:1: has no path" in said[1]
    assert f"{rows}:2: " in said[2]


def test_export_writes_the_model_of_a_run(trained: Path, tmp_path: Path) -> None:
    assert "differs from torch by" in run("export", trained / "run", "-o", tmp_path / "m.onnx").stdout
    assert Runtime(tmp_path / "m.onnx").card == Runtime(trained / "run").card
    with pytest.raises(OutputError, match="--force"):
        run("export", trained / "run", "-o", tmp_path / "m.onnx")


def test_evaluate_prints_every_measure_and_knows_the_held_out(trained: Path, tmp_path: Path) -> None:
    manifest, model = trained / "manifest.jsonl", trained / "run"
    report = json.loads(
        run("evaluate", manifest, "--held-out", "--model", model, "--json", "--pictures", tmp_path).stdout
    )
    record = json.loads((trained / "run" / "training.json").read_text())
    assert report["lengths"]["all"]["utterances"] == record["data"]["held_out"]
    assert report["lengths"]["all"]["accuracy"] == record["measures"]["accuracy"]
    assert (tmp_path / "det.png").stat().st_size > 1000
    table = run("evaluate", manifest, "--model", model, "--seconds", 0.5).stdout.splitlines()
    assert table[0].split()[:3] == ["n", "accuracy", "EER"]
    assert [line.split()[0] for line in table[1:]] == ["all", "0.5s"]
    stranger = tmp_path / "s.jsonl"
    stranger.write_text(json.dumps({"path": str(trained / "low-0-0.wav"), "label": "klingon"}) + "\n")
    with pytest.raises(InputError, match="has a label of the model"):
        run("evaluate", stranger, "--model", model)


def test_audit_prints_seconds_and_warns(trained: Path) -> None:
    done = run("audit", trained / "manifest.jsonl")
    assert "high: 8 s, 4 speakers" in done.stdout
    assert json.loads(run("audit", trained / "manifest.jsonl", "--json").stdout)["utterances"] == 24


def test_train_command_trains_what_its_recipe_says(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data"):
        run("train", "dialect-small", "-o", tmp_path / "run")
    with pytest.raises(UsageError, match="takes 'dialect'"):
        run("train", "ask-135m-cpu", "-o", tmp_path / "run")
    lonely = tmp_path / "one.jsonl"
    lonely.write_text(json.dumps({"path": str(trained / "low-0-0.wav"), "label": "low"}) + "\n")
    with pytest.raises(UsageError, match="one speaker only"):
        run("train", "dialect-small", "--data", lonely, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recordings_seed_dialogues_of_people_who_speak_so(trained: Path, tmp_path: Path) -> None:
    """The pipe: identify's seeds go into simulate, and the dialect into Ask's persona and into the row."""
    wavs = [trained / "high-0-2.wav", trained / "low-1-2.wav"]
    seeds = run("identify", *wavs, "--model", trained / "run", "--topic", "a late train").stdout
    command = Parrot([str(Path(__file__).with_name("scripted_parrot.py"))], tmp_path)
    done = command("simulate", "--turns", 1, input=seeds)
    command.end()
    rows = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda row: row["path"])
    assert [(row["path"], row["dialect"]) for row in rows] == [(str(wavs[0]), "high"), (str(wavs[1]), "low")]
    assert rows[0]["topic"] == "a late train"
    assert rows[0]["persona"] == "someone who speaks the dialect high"
    assert len(rows[0]["messages"]) == 2
    click = tmp_path / "click.wav"
    write_wave(click, np.eye(1, RATE, 99, dtype=np.float32)[0])  # a click
    quiet = run("identify", click, "--model", trained / "run", "--topic", "a late train")
    assert not quiet.stdout
    assert "no dialect was heard" in quiet.stderr
    with pytest.raises(UsageError, match="--pcm has no end"):
        run("identify", "--pcm", "--model", trained / "run", "--topic", "a late train")


def test_demonstration_answers_where_no_model_is_named(trained: Path) -> None:
    done = run("identify", trained / "high-0-2.wav")
    [row] = map(json.loads, done.stdout.splitlines())
    assert set(row["scores"]) == {"gb", "us"}
    assert "a demonstration tells gb and us English apart" in done.stderr
    assert (DEMONSTRATION / "README.md").is_file()
    stranger = trained / "stranger.jsonl"
    stranger.write_text(json.dumps({"path": str(trained / "low-0-0.wav"), "label": "us"}) + "\n")
    assert "demonstration" in run("evaluate", stranger, "--seconds", 0.4).stderr
