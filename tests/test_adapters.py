"""The adapter that ships: small, clean, for the embedded base, and the default Ask."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from parrot_edge.convert.files import BASE_SHA256_KEY, read_gguf
from parrot_edge.engine.base import INVOCATION_KEY
from parrot_edge.engine.llama import LlamaSession
from parrot_edge.models import ASK_ADAPTER, LocalModel, embedded_path, parse_model
from parrot_edge.pair import Load, open_pair
from parrot_edge.roles import AskPrompt, Speaker
from parrot_edge.store import sha256_of


def test_it_is_the_default_ask_over_the_embedded_base() -> None:
    ask, chat = parse_model("ask"), parse_model("chat")
    assert isinstance(ask, LocalModel)
    assert isinstance(chat, LocalModel)
    assert ask.path == chat.path == embedded_path()
    assert ask.adapter == ASK_ADAPTER


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert ASK_ADAPTER.stat().st_size <= 10_000_000
    file = read_gguf(ASK_ADAPTER)
    assert file.get(BASE_SHA256_KEY) == sha256_of(embedded_path())
    assert file.get("general.license") == "apache-2.0"
    assert file.get("parrot.role") == "ask"
    assert file.get(INVOCATION_KEY)
    texts = [value.raw for value in file.metadata.values() if isinstance(value.raw, bytes)]
    assert not any(b"/" in text for text in texts)


def test_its_card_tells_data_licence_and_measures() -> None:
    card = ASK_ADAPTER.with_suffix(".md").read_text(encoding="utf-8")
    for word in ("SmolLM2-135M", "apache-2.0", "oasst_en_threads.jsonl", "wildchat_en.jsonl", "held-out"):
        assert word in card
    assert str(Path.home()) not in card
    assert "/tmp/" not in card


def test_it_is_prompted_as_it_was_trained_and_shares_the_bases_cache() -> None:
    async def look() -> None:
        async with open_pair(parse_model("ask"), parse_model("chat"), Load(2, 2, 16, threads=1)) as (
            ask,
            chat,
        ):
            assert Speaker(ask).ask_prompt == AskPrompt(native=True, system=None)
            async with chat.session() as one, ask.session(beside=one) as other:
                assert isinstance(one, LlamaSession)
                assert isinstance(other, LlamaSession)
                assert one.conversation is other.conversation

    asyncio.run(look())
