"""A round of Parrot, on a tiny random model: killed once it goes on, and its report tells what moved."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny_gguf import write_llama
from tiny_models import make_base, make_llama, make_tokenizer

from parrot_edge.errors import UsageError
from parrot_edge.recipe import load_recipe
from parrot_edge.rounds import find_changes, write_report

FOLLOW_UPS = ("and how long does it take?", "why is that so?", "can I freeze it?")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# From Chat to preferences


def test_preferences_are_learned_on_top_of_the_chat_adapter(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from safetensors.numpy import load_file

    from parrot_edge.convert.trained import load_trained
    from parrot_edge.train.trainer import train

    base = make_base(tmp_path / "tiny")
    dialogues = write(
        tmp_path / "d.jsonl", [{"messages": talk(f"Is {n} cold?", "It is.")} for n in range(16)]
    )
    pairs = write(
        tmp_path / "p.jsonl",
        [{"prompt": f"Is {n} cold?", "chosen": "It is.", "rejected": "What is cold?"} for n in range(16)],
    )

    def run(name: str, data: Path, *overrides: str) -> dict[str, Any]:
        small = ("data.max_length=128", "base.dtype=float32", "optim.batch_size=2", "lora.rank=4")
        recipe = load_recipe(name, [f"base.name={base}", f"data.sources={data}", *small, *overrides])
        return train(recipe, tmp_path / f"{recipe.objective}-{len(list(tmp_path.iterdir()))}")

    run("chat-135m-cpu", dialogues, "optim.learning_rate=1e-2", "optim.epochs=2")
    [chat] = tmp_path.glob("sft-*")
    goes_on = (f"base.adapter={chat}", "run.log_steps=1", "lora.dropout=0")
    run("dpo-135m-cpu", pairs, *goes_on, "optim.max_steps=2", "optim.learning_rate=0")
    [still] = tmp_path.glob("dpo-*")
    losses = [json.loads(line)["loss"] for line in (still / "loss.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)  # what is preferred is told from Chat itself
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (chat, still))
    assert all((first[key] == last[key]).all() for key in first)

    for path in chat.iterdir():
        path.unlink()
    chat.rmdir()
    trained = load_trained(still, str(base))  # what Chat learned is in it: its adapter is not asked for
    assert list(trained.model.peft_config) == ["default"]


# The loop


@pytest.fixture
def kitchen(tmp_path: Path) -> Path:
    """A folder with a tiny random model, seeds whose last message leans on what was said, and other talks."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)  # transformers adds it to what a GGUF holds
    write_llama(make_llama(vocab_size=len(tokenizer)), tmp_path / "tiny.gguf", tokenizer)
    seeds = [
        {"id": f"s{n}", "messages": talk(f"How do I cook dish {n}?", f"Boil it for {n} minutes.", follow_up)}
        for n, follow_up in enumerate(FOLLOW_UPS * 4, 3)
    ]
    held_out = [
        {"messages": talk(f"Where does bird {n} go in winter?", "South.", "why there?", "It is warm.")}
        for n in range(4)
    ]
    write(tmp_path / "seeds.jsonl", seeds)
    write(tmp_path / "held-out.jsonl", held_out)
    return tmp_path


class Loop:
    """`bin/parrot-loop` at toy size."""

    def __init__(self, folder: Path) -> None:
        model = str(folder / "tiny.gguf")
        self.command = [
            *(str(ROOT / "bin" / "parrot-loop"), "-o", "run", "--data", "held-out.jsonl"),
            *("--seeds", "seeds.jsonl", "--dialogues", "12", "--turns", "3", "--max-tokens", "48"),
            *("--ask", model, "--chat", model, "--probes", "2", "--license", "cc0-1.0"),
        ]
        self.folder = folder
        self.environment = {
            **os.environ,
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
            "PARROT_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *more], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )


@pytest.mark.slow
def test_killed_round_goes_on_and_the_next_one_begins_where_it_ended(kitchen: Path) -> None:
    loop, done = Loop(kitchen), kitchen / "run" / "round-1" / "done"
    process = loop.start()
    while process.poll() is None and not (done / "train-chat.partial").exists():
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it trained"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    simulated = (done / "simulate.json").stat().st_mtime_ns

    finished = loop.run()
    assert finished.returncode == 0, finished.stderr
    assert (done / "simulate.json").stat().st_mtime_ns == simulated
    assert "round 1, simulate" not in finished.stderr
    report = (done.parent / "report.md").read_text()
    assert finished.stdout == report
    assert "| perplexity of held-out answers | `tiny.gguf+dpo-1-lora.gguf` |" in report
    assert json.loads((done / "train-dpo.json").read_text())["recipe"]["base"]["adapter"] == "chat-1"
    assert "license: " in (done.parent / "README.md").read_text()
    evaluated = [model["model"] for model in json.loads((done / "evaluate.json").read_text())["models"]]
    assert evaluated == ["tiny.gguf", "tiny.gguf+chat-1-lora.gguf", "tiny.gguf+dpo-1-lora.gguf"]

    again = loop.run()
    assert (again.returncode, again.stdout, again.stderr) == (0, report, "")
    other = loop.run("--turns", "4")
    assert other.returncode == 2
    assert "run was begun with other settings" in other.stderr

    second = loop.run("--rounds", "2")
    assert second.returncode == 0, second.stderr
    assert "round 1" not in second.stderr
    done = kitchen / "run" / "round-2" / "done"
    evaluated = [model["model"] for model in json.loads((done / "evaluate.json").read_text())["models"]]
    assert evaluated == [
        "tiny.gguf+dpo-1-lora.gguf",
        "tiny.gguf+chat-2-lora.gguf",
        "tiny.gguf+dpo-2-lora.gguf",
    ]
    learned = {name: json.loads((done / f"{name}.json").read_text()) for name in ("train-chat", "train-dpo")}
    assert [each["recipe"]["base"]["adapter"] for each in learned.values()] == ["dpo-1", "chat-2"]
    assert second.stdout == report + (done.parent / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "-o DIR and --data HELD_OUT are needed"),
        (("-o",), 2, "-o needs a value"),
        (("--depth", "3"), 2, "--depth is no option"),
        (("-o", "run", "--data", "none.jsonl"), 1, "none.jsonl is empty or not there"),
    ],
)
def test_wrong_call_is_told_in_one_sentence(
    arguments: tuple[str, ...], code: int, sentence: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(ROOT / "bin" / "parrot-loop"), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "")
    [line] = done.stderr.splitlines()
    assert sentence in line
    assert not list(tmp_path.iterdir())


# The report


def figure(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def model(name: str, perplexity: float, below: dict[str, float] | None) -> dict[str, Any]:
    history: dict[str, Any] = {"mean": {"per_token": figure(perplexity, perplexity - 1, perplexity + 1)}}
    if below:
        history["against_first"] = {"mean": {"perplexity_below": below, "gain_above": None}}
    return {"model": name, "history": history, "recall": None}


def test_report_calls_better_only_what_is_clear_of_zero(tmp_path: Path) -> None:
    done = tmp_path / "round-1" / "done"
    done.mkdir(parents=True)
    with pytest.raises(UsageError, match="no finished round"):
        write_report(tmp_path / "round-1")
    evaluation = {
        "models": [
            model("before", 20, figure(0, 0, 0)),
            model("chat", 21, figure(-0.05, -0.07, -0.03)),
            model("dpo", 19, figure(0.05, -0.01, 0.09)),
            model("other", 18, figure(0.1, 0.02, 0.2)),
        ]
    }
    assert [(change.model, change.verdict) for change in find_changes(evaluation)] == [
        ("chat", "worse"),
        ("dpo", "no difference shown"),
        ("other", "better"),
    ]
    (done / "evaluate.json").write_text(json.dumps(evaluation))
    (done / "seconds").write_text("simulate 4\nevaluate 1200\nsimulate\n")
    (tmp_path / "round-1" / "dialogues.jsonl").write_text("{}\n{}\n")
    report = write_report(tmp_path / "round-1")
    assert (
        "`other` against the model before the round: **better** in perplexity of held-out answers." in report
    )
    assert "| evaluate | 1,200 |  |" in report
    assert "| simulate | 4 | 2 dialogues |" in report
