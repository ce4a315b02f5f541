"""The measuring itself, at a shape that takes seconds."""

import json

import pytest
from click.testing import CliRunner

from parrot_edge import bench
from parrot_edge.cli import parrot
from parrot_edge.errors import ModelError

SHAPE = bench.Shape(dialogues=3, turns=2, max_tokens=8, parallel=2, threads=1)
OPENINGS = ["Name a river.", "hi"]


def test_the_engine_makes_every_message_and_reads_little_twice(embedded_model):
    shared, apart = (
        bench.measure_engine(embedded_model, SHAPE, OPENINGS, contexts=contexts) for contexts in (1, 2)
    )
    messages = SHAPE.dialogues * (2 * SHAPE.turns - 1)
    for result in (shared, apart):
        assert messages <= result.tokens <= messages * SHAPE.max_tokens
        assert result.rate == pytest.approx(result.tokens / result.seconds)
    # What all dialogues begin with is read once; of a cut message the last token is read with the next prompt
    assert 0 < shared.read < 0.7
    assert shared.read < 0.7 * apart.read
    assert apart.read < 1.3


def test_two_llama_objects_make_as_many_messages(embedded_model):
    result = bench.measure_two_llamas(embedded_model, SHAPE, OPENINGS)
    assert result.tokens <= SHAPE.dialogues * (2 * SHAPE.turns - 1) * SHAPE.max_tokens
    assert result.tokens > 0


def test_the_limit_is_below_both_rates(embedded_model):
    rates = bench.measure_limit(embedded_model, SHAPE)
    assert 0 < rates.exchange < min(rates.decode, rates.prompt)


def test_a_server_that_is_no_program_is_refused():
    with pytest.raises(ModelError, match="nowhere/llama-server is no program"):
        bench.find_llama_server("nowhere/llama-server")


def test_the_report_as_json(embedded_model):
    shape = ["--dialogues", "1", "--turns", "1", "--max-tokens", "4", "--parallel", "1", "--threads", "1"]
    result = CliRunner().invoke(parrot, ["bench", "--model", str(embedded_model), "--json", *shape])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    ways = [row["way"] for row in report["results"]]
    assert [way.split(",")[0] for way in ways][:2] == ["parrot", "parrot"]
    [limit] = report["limits"]
    assert limit["exchange"] > 0
    assert report["results"][0]["of_limit"] == report["results"][0]["rate"] / limit["exchange"]
    derived = report["model"] != str(embedded_model)  # else the shipped file is the fastest here
    assert ("two Llama objects on the shipped file" in ways) == derived


def test_each_round_has_a_limit_of_its_own(embedded_model, monkeypatch):
    limits = iter([bench.Rates(100.0, 100.0), bench.Rates(200.0, 200.0), bench.Rates(400.0, 400.0)])
    monkeypatch.setattr(bench, "measure_limit", lambda path, shape: next(limits))
    for way in ("engine", "two_llamas"):
        result = bench.Result(way, tokens=100, seconds=1.0, read=0.5)
        monkeypatch.setattr(bench, f"measure_{way}", lambda *_, result=result, **__: result)
    monkeypatch.setattr(bench, "find_llama_server", lambda binary: None)
    result = CliRunner().invoke(parrot, ["bench", "--model", str(embedded_model), "--rounds", "3"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("engine")]
    assert {line[2] for line in lines[:-1]} == {"2.00", "1.00", "0.50"}
    assert lines[-1][1:] == ["100", "1.00"]
