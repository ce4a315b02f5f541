"""Two engines for two sides: what is shared, what is planned, what is refused."""

import asyncio
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tiny_gguf import write_lora

from parrot_edge import pair
from parrot_edge.errors import ModelError, UsageError
from parrot_edge.machine import Machine
from parrot_edge.models import ASK_ADAPTER, LocalModel
from parrot_edge.pair import Load, open_pair, plan_contexts


@pytest.fixture
def model(embedded_model):
    return LocalModel("smollm2", embedded_model)


def with_memory(monkeypatch, available):
    machine = Machine("", 2, 2, 2, available, available, 0.0)
    monkeypatch.setattr(pair, "inspect_machine", lambda: machine)


def opened(ask, chat, load):
    async def look():
        async with open_pair(ask, chat, load) as (one, other):
            return one, other, one.batcher.model is other.batcher.model

    return asyncio.run(look())


def test_two_sides_of_one_model_share_an_engine(model):
    one, other, _ = opened(model, model, Load(2, 2, 16, threads=1))
    assert one is other


def test_two_files_get_an_engine_each(model, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(model.path, copy)
    one, other, same_base = opened(model, LocalModel("copy", copy), Load(2, 2, 16, threads=1))
    assert one is not other
    assert not same_base


def test_a_pair_that_does_not_fit_names_the_largest_parallel_that_does(model, monkeypatch):
    with_memory(monkeypatch, 400 * 2**20)
    load = Load(64, 8, 256)
    with pytest.raises(
        ModelError, match=r"--parallel 64 needs .*; the largest --parallel that fits is \d+"
    ) as caught:
        plan_contexts([model], load, {model: 64})
    fitting = int(str(caught.value).rsplit(" ", 1)[1])
    assert 1 <= fitting < 64
    assert plan_contexts([model], Load(fitting, 8, 256), {model: fitting})


def test_nothing_fits_into_too_little_memory(model, monkeypatch):
    with_memory(monkeypatch, 50 * 2**20)
    with pytest.raises(ModelError, match="not even one dialogue fits"):
        plan_contexts([model], Load(4, 8, 256), {model: 4})


def test_more_turns_than_the_context_can_hold_are_refused(model):
    with pytest.raises(UsageError, match="--turns 4000 cannot fit 8192 tokens"):
        plan_contexts([model], Load(1, 4000, 16), {model: 1})


def test_a_longer_context_than_was_trained_is_refused(model):
    with pytest.raises(UsageError, match="8192 tokens"):
        plan_contexts([model], Load(1, 2, 16, context=9000), {model: 1})


@pytest.mark.parametrize("shares", [True, False])
def test_a_pair_on_one_base_takes_its_weights_once_and_its_caches(shares, model_file, tmp_path):
    """And at most a fifth of that more; a plain adapter, which changes nothing, has a context of its own."""
    pytest.importorskip("gguf")
    halves = {"a": np.zeros((8, 576), np.float16), "b": np.zeros((576, 8), np.float16)}
    plain = {f"blk.0.attn_q.weight.lora_{half}": values for half, values in halves.items()}
    adapter = (
        ASK_ADAPTER if shares else write_lora(tmp_path / "plain.gguf", {"adapter.lora.alpha": 8.0}, **plain)
    )
    script = str(ROOT / "bin" / "measure-memory")
    command = [sys.executable, script, f"{model_file}+{adapter}", str(model_file), "--parallel", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    weights, caches, _, ratio = map(float, done.stdout.splitlines()[-1].strip("| ").split(" | ")[1:])
    assert weights == pytest.approx(model_file.stat().st_size / 2**20, abs=1)
    assert caches == pytest.approx(765 if shares else 1530, abs=1)
    assert 0.9 < ratio <= 1.2
