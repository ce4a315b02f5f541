"""Real log-probabilities of the 135M model."""

import llama_cpp
import numpy as np
import pytest

from parrot_edge.dialogue import Message
from parrot_edge.engine import native
from parrot_edge.engine.attention import Attention
from parrot_edge.engine.likelihood import Likelihood

HISTORY = [
    Message("user", "my sourdough is flat again, what am i doing wrong?"),
    Message(
        "assistant", "Most flat loaves are underproofed. How long do you let the dough rise, and how warm?"
    ),
]
NEXT = "about 4 hours, the kitchen is maybe 18 degrees"


@pytest.fixture(scope="module")
def likelihood(embedded_model):
    with Likelihood(embedded_model, tokens=512, threads=1) as opened:
        yield opened


@pytest.fixture
def counted(likelihood, monkeypatch):
    """How many tokens each decode reads."""
    sizes, decode = [], likelihood._context.decode

    def count(rows):
        sizes.append(sum(len(row[2]) for row in rows))
        return decode(rows)

    monkeypatch.setattr(likelihood._context, "decode", count)
    return sizes


def test_it_is_what_the_logits_of_the_whole_text_say(embedded_model, monkeypatch):
    """With llama.cpp's own attention, as `Llama` has it."""
    long = " ".join(f"day {number}: fed the starter, no bubbles yet." for number in range(1, 25))
    monkeypatch.setattr(native, "attention", lambda: Attention(None, "for this test"))
    with Likelihood(embedded_model, tokens=512, threads=1) as likelihood:
        tokens, start = likelihood.encode(HISTORY, "user", long)
        found = likelihood.log_probs(tokens, start)
    assert start < 256 < len(tokens)  # more than one decode
    same = {"n_batch": 256, "n_ubatch": 256, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1}
    model = llama_cpp.Llama(str(embedded_model), n_ctx=512, logits_all=True, verbose=False, **same)
    model.eval(tokens[:-1])
    logits = model.scores[start - 1 : len(tokens) - 1].astype(np.float64)  # (T - start, V)
    model.close()
    expected = [
        row[token] - np.logaddexp.reduce(row) for row, token in zip(logits, tokens[start:], strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_message_is_its_own_tokens_and_what_closes_it(likelihood):
    tokens, start = likelihood.encode(HISTORY, "user", NEXT)
    assert likelihood.text_of(tokens[:start]).endswith("<|im_start|>user\n")
    assert likelihood.text_of(tokens[start:]) == f"{NEXT}<|im_end|>"
    assert likelihood.closing_token("user") == likelihood.closing_token("assistant") == tokens[-1]
    empty, same = likelihood.encode(HISTORY, "user")
    assert (empty[:-1], same) == (tokens[:start], start)


def test_what_is_likely_costs_less_than_what_is_not(likelihood):
    def nats(text):
        return -likelihood.log_probs(*likelihood.encode(HISTORY, "user", text)).sum()

    assert nats("How long should it rise?") < nats("rise? long it How should")


def test_a_shared_start_is_not_read_again(likelihood, counted):
    tokens, start = likelihood.encode(HISTORY, "user", NEXT)
    fresh = likelihood.log_probs(tokens, start)
    read = sum(counted)
    ending, at = likelihood.encode(HISTORY, "user")
    assert likelihood.log_probs(ending, at)[0] < 0
    assert sum(counted) - read == 1  # the last token of the header, for its logits
    longer = [*HISTORY, Message("user", NEXT), Message("assistant", "That is cold; give it twice as long.")]
    tokens_after, start_after = likelihood.encode(longer, "user", "ok will try")
    assert tokens_after[: len(tokens)] == tokens
    likelihood.log_probs(tokens, start)
    del counted[:]
    likelihood.log_probs(tokens_after, start_after)
    assert sum(counted) == len(tokens_after) - len(tokens)
    again = likelihood.log_probs(tokens, start)
    assert again.mean() == pytest.approx(fresh.mean(), abs=0.1)  # Q4_1 differs between batch sizes


def test_the_context_is_no_longer_than_the_model_was_trained_for(embedded_model):
    with Likelihood(embedded_model, tokens=100_000, threads=1) as opened:
        assert opened.tokens < 100_000


def test_the_last_part_of_a_text_is_whole_characters(likelihood):
    assert "wörter und größere".endswith(likelihood.last_part("wörter und größere", 3))
    assert likelihood.last_part("short", 100) == "short"
