"""Dialogues to rows: which tokens are learned, on every template; nothing lost, nothing leaked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TEMPLATES, make_tokenizer

from parrot_edge.data.sources import Dialogue, Reader, is_held_out
from parrot_edge.dialogue import Message
from parrot_edge.errors import InputError, ModelError
from parrot_edge.jsonl import Line
from parrot_edge.recipe import DataOptions
from parrot_edge.train.data import (
    CONTEXT,
    Corpus,
    Encoder,
    Row,
    Turn,
    build_corpus,
    build_pairs,
    pack_rows,
    sample_rows,
    split_row,
)
from parrot_edge.train.template import TurnTemplate, Unwritable

pytest.importorskip("transformers")
tokenizer_of = lru_cache(make_tokenizer)

TALK = [
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "Eight minutes.\n\n1. Boil 2. Wait "},
    {"role": "user", "content": "  and if it is cold"},
    {"role": "assistant", "content": "Nine."},
]


def dialogue(rows: Iterable[dict[str, str]], *, tree: str | None = None, ended: bool = True) -> Dialogue:
    messages = tuple(Message(row["role"], row["content"]) for row in rows)
    return Dialogue(messages, tree, ended, Line("talk.jsonl", 1, b""))


def encode(template: str, role: str, talk: Dialogue, *, system: str = "row", end: str = "auto") -> Row:
    tokenizer = tokenizer_of(template)
    return Encoder(
        TurnTemplate(tokenizer, system=system), tokenizer, role, DataOptions(learn_end=end)
    ).encode(talk)[0]


def pieces_of(template: str) -> list[tuple[str, str]]:
    """The dialogue as it is written, by hand: who writes each piece ("" is nobody)."""
    u1, a1, u2, a2 = (row["content"] for row in TALK)
    if template in ("llama2", "llama3", "gemma"):  # these trim
        a1, u2 = a1.strip(), u2.strip()
    if template == "chatml":
        opening = "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n<|im_start|>user\n"
        user, assistant, end = (
            "\n<|im_start|>user\n",
            "\n<|im_start|>assistant\n",
            ("<|im_end|>", "<|im_end|>"),
        )
    elif template == "llama2":
        opening, user, assistant, end = "<s>[INST] ", "<s>[INST] ", " ", (" [/INST]", " </s>")
    elif template == "llama3":
        user = "<|start_header_id|>user<|end_header_id|>\n\n"
        assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
        opening, end = "<s>" + user, ("<|eot_id|>", "<|eot_id|>")
    elif template == "gemma":
        opening, end = "<s><start_of_turn>user\n", ("<end_of_turn>", "<end_of_turn>")
        user, assistant = "\n<start_of_turn>user\n", "\n<start_of_turn>model\n"
    elif template == "mistral":
        opening, user, assistant, end = "<s>[INST] ", "[INST] ", "", (" [/INST]", "</s>")
    elif template == "phi3":
        opening, user, assistant = "<|user|>\n", "\n<|user|>\n", "\n<|assistant|>\n"
        end = ("<|end|>", "<|end|>")
    else:
        opening, user, assistant, end = "<s><|User|>", "<|User|>", "", ("<|Assistant|>", "</s>")
    return [
        *[("", opening), ("user", u1 + end[0]), ("", assistant), ("assistant", a1 + end[1])],
        *[("", user), ("user", u2 + end[0]), ("", assistant), ("assistant", a2 + end[1])],
        *[("", user), ("user", end[0])],
    ]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("role", ["ask", "chat"])
def test_every_token_is_learned_by_the_one_who_writes_it(template: str, role: str) -> None:
    tokenizer = tokenizer_of(template)
    learned = {"ask": "user", "chat": "assistant"}[role]
    text = "".join(piece for _, piece in pieces_of(template))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels, place = tokens.input_ids, [], 0
    writers = [who for who, piece in pieces_of(template) for _ in piece]  # of each character
    for token, (start, end) in zip(ids, tokens.offset_mapping, strict=True):
        # a token that joins the header's last space to a word is written with the word
        labels.append(token if learned in writers[start:end] else CONTEXT)
        place = max(place, end)
    assert place == len(text)
    row = encode(template, role, dialogue(TALK))
    assert row.input_ids.tolist() == ids
    assert row.labels.tolist() == labels


@pytest.mark.parametrize("template", TEMPLATES)
def test_ask_and_chat_see_the_same_stream(template: str) -> None:
    ask, chat = (encode(template, role, dialogue(TALK)) for role in ("ask", "chat"))
    assert ask.input_ids.tolist() == chat.input_ids.tolist()
    assert not ((ask.labels != CONTEXT) & (chat.labels != CONTEXT)).any()


@pytest.mark.parametrize("template", TEMPLATES)
def test_long_turn_keeps_its_start_and_teaches_no_end(template: str) -> None:
    tokenizer, most = tokenizer_of(template), 4
    whole, short = (
        Encoder(TurnTemplate(tokenizer), tokenizer, "ask", DataOptions(turn_tokens=tokens)).encode(
            dialogue(TALK)
        )
        for tokens in (0, most)
    )
    row, turns = short
    for turn, before in zip(turns, whole[1], strict=True):
        ids = whole[0].input_ids[before.text : before.end]
        learned = row.labels[turn.text : turn.end] != CONTEXT
        if len(ids) == turn.end - turn.text:  # one that fits is as it was
            assert row.input_ids[turn.text : turn.end].tolist() == ids.tolist()
            continue
        assert row.input_ids[turn.text : turn.text + most].tolist() == ids[:most].tolist()
        assert row.input_ids[turn.end - 1] == ids[-1]
        assert learned.nonzero()[0].tolist() == list(range(most))
    assert turns[-1].end == len(row.input_ids) < len(whole[0].input_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_last_token_of_ask_is_the_one_that_ends_a_dialogue(template: str) -> None:
    tokenizer = tokenizer_of(template)
    prompt = TurnTemplate(tokenizer).prompt
    row = encode(template, "ask", dialogue(TALK))
    assert prompt.end_marker == ""
    assert tokenizer.decode(row.input_ids).endswith(prompt.user_header + prompt.user_end)
    text = tokenizer.decode(row.input_ids[row.labels != CONTEXT])
    assert text.endswith(prompt.user_end + prompt.user_end)  # of the last question, and of the end


def test_end_is_learned_only_where_the_dialogue_ended() -> None:
    tokenizer = tokenizer_of("chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    count = {
        (ended, how): int((encode("chatml", "ask", dialogue(TALK, ended=ended), end=how).labels == end).sum())
        for ended in (True, False)
        for how in ("auto", "always", "never")
    }
    assert count == {
        **{(True, "auto"): 3, (True, "always"): 3, (True, "never"): 2},
        **{(False, "auto"): 2, (False, "always"): 3, (False, "never"): 2},
    }


@pytest.mark.parametrize(
    ("system", "opening"),
    [
        ("row", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"),
        ("template", "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n<|im_start|>user\n"),
        ("none", "<|im_start|>user\n"),
    ],
)
def test_system_text_comes_from_where_the_recipe_says(system: str, opening: str) -> None:
    talk = dialogue([{"role": "system", "content": "Be kind."}, *TALK])
    row = encode("chatml", "ask", talk, system=system)
    first = int(np.flatnonzero(row.labels != CONTEXT)[0])
    assert tokenizer_of("chatml").decode(row.input_ids[:first]) == opening


@pytest.mark.parametrize("template", TEMPLATES)
def test_system_text_is_context_even_where_the_template_refuses_it(template: str) -> None:
    talk = dialogue([{"role": "system", "content": "Be kind."}, *TALK])
    tokenizer = tokenizer_of(template)
    row = encode(template, "ask", talk)
    first = int(np.flatnonzero(row.labels != CONTEXT)[0])
    assert "Be kind." in tokenizer.decode(row.input_ids[:first])
    assert tokenizer.decode(row.input_ids[first:]).lstrip().startswith("How do I")
    own = TurnTemplate(tokenizer, system="text", system_text="Play a user.")
    assert "Play a user." in own.prompt.opening


def test_template_without_turn_ends_or_none_at_all_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="close turns"):
        TurnTemplate(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ModelError, match="refuses it: no"):
        TurnTemplate(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        TurnTemplate(tokenizer)


def test_control_token_said_as_text_is_refused() -> None:
    talk = dialogue([{"role": "user", "content": "what is <|im_end|>?"}, TALK[1]])
    with pytest.raises(Unwritable, match="turn 1 holds the control token"):
        encode("chatml", "ask", talk)


# Sources


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(dialogues: Iterable[Dialogue]) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in talk.messages] for talk in dialogues]


PLAIN = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
THREAD = [("user", "a"), ("assistant", "B")]
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "text": "a",
        "role": "prompter",
        "replies": [
            {
                "text": "b",
                "role": "assistant",
                "replies": [
                    {
                        "text": "c",
                        "role": "prompter",
                        "replies": [{"text": "d", "role": "assistant", "replies": []}],
                    }
                ],
            },
            {"text": "B", "role": "assistant", "replies": []},
        ],
    },
}
FLAT = [
    {"message_tree_id": "t", "message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
    {"message_tree_id": "t", "message_id": "2", "parent_id": "1", "text": "b", "role": "assistant"},
    {"message_tree_id": "t", "message_id": "3", "parent_id": "1", "text": "B", "role": "assistant"},
    {"message_tree_id": "t", "message_id": "4", "parent_id": "2", "text": "c", "role": "prompter"},
    {"message_tree_id": "t", "message_id": "5", "parent_id": "4", "text": "d", "role": "assistant"},
]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": [{"role": r, "content": c} for r, c in PLAIN]}], [PLAIN]),
        ([{"conversations": [{"from": f, "value": v} for f, v in zip(
            ("human", "gpt", "human", "gpt"), "abcd", strict=True)]}], [PLAIN]),
        ([{"conversation": [{"role": r, "content": c, "toxic": False} for r, c in PLAIN]}], [PLAIN]),
        ([{"data": ["a", "b", "c", "d"]}], [PLAIN]),
        ([TREE], [PLAIN, THREAD]),
        (FLAT, [PLAIN, THREAD]),
    ],
    ids=["messages", "sharegpt", "wildchat", "ultrachat", "oasst-tree", "oasst-messages"],
)  # fmt: skip
def test_every_shape_of_data_reads_the_same(rows: list[Any], expected: Any, tmp_path: Path) -> None:
    reader = Reader([write(tmp_path / "data.jsonl", rows)])
    assert said(reader.dialogues()) == expected
    (source,) = reader.sources
    assert (source.name, source.rows) == ("data.jsonl", len(rows))
    assert len(source.sha256) == 64


def test_hub_dataset_reads_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "owner/none":
            raise FileNotFoundError("no such dataset\nwith a long story")
        return [{"data": ["a", "b", "c", "d"]}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert said(Reader(["hf:owner/name", "hf:owner/name:test"]).dialogues()) == [PLAIN, PLAIN]
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(InputError, match=r"hf:owner/none: cannot be loaded .*\(no such dataset\)"):
        list(Reader(["hf:owner/none"]).dialogues())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "hello"}, "has none of the columns"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "where 'user' is due"),
        ({"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "?"}]}, "is due"),
        ({"data": ["a", "  "]}, "message 2 is empty"),
        ({"conversation": [{"role": "user", "content": None}]}, "message 1 must be"),
        ({"messages": ["a", 3]}, "message 2 must be"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        (
            {"message_tree_id": "t", "message_id": "1", "parent_id": "0", "text": "a"},
            "its parent '0' is missing",
        ),
        ({"message_tree_id": "t", "message_id": ["1"], "parent_id": None, "text": "a"}, "must be texts"),
        ({"prompt": {"text": "a", "role": "prompter", "replies": 5}}, "replies that are no list"),
        ({"k" * 9000: 1}, "but ['kkk"),
    ],
)
def test_bad_row_is_named_by_file_and_line(row: Any, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"data": ["a", "b"]}, row])
    with pytest.raises(InputError) as caught:
        list(Reader([path]).dialogues())
    assert str(caught.value).startswith(f"{path}:2: ")
    assert why in str(caught.value)
    reader = Reader([path], skip=True)
    assert len(list(reader.dialogues())) == 1
    assert reader.skipped == 1
    assert why in str(reader.first_error)


def test_messages_that_stand_twice_do_not_double_their_tree(tmp_path: Path) -> None:
    """Each of them would have two replies, so that sixty of them had 2 ** 59 ends."""
    keys = [(str(n), str(n - 1) if n else None) for n in range(60)]
    rows = [
        {"message_tree_id": "t", "message_id": own, "parent_id": parent, "text": "a", "role": "prompter"}
        for own, parent in keys
        for _ in range(2)
    ]
    reader = Reader([write(tmp_path / "data.jsonl", rows)])
    with pytest.raises(InputError, match="message_id '0' stands twice in its tree"):
        list(reader.dialogues())


def test_empty_or_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no rows"):
        list(Reader([write(tmp_path / "none.jsonl", [])]).dialogues())
    with pytest.raises(InputError, match="cannot be read"):
        list(Reader([str(tmp_path / "missing.jsonl")]).dialogues())


def test_what_a_limit_or_a_collector_cut_did_not_end(tmp_path: Path) -> None:
    rows = [{"data": ["a", "b"], **more} for more in ({}, {"stop_reason": "end"}, {"stop_reason": "turns"},
                                                     {"truncated": True}, {"tree": "t"})]  # fmt: skip
    reader = Reader([write(tmp_path / "data.jsonl", rows)])
    assert [talk.ended for talk in reader.dialogues()] == [True, True, False, False, False]


def test_shared_turns_of_a_tree_are_counted_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    path = write(tmp_path / "tree.jsonl", [TREE, {"data": ["a", "x"]}])
    options = DataOptions(sources=(path,), held_out=0.0, system="none")
    learned = {
        role: [
            tokenizer.decode(row.labels[row.labels != CONTEXT])
            for row in build_corpus(options, role, tokenizer).train
        ]
        for role in ("ask", "chat")
    }
    end = "<|im_end|>"
    # "a" opens both threads of the tree and is learned in the first; another dialogue has its own, and
    # an end, which a thread has not
    assert learned["ask"] == [f"a{end}c{end}", f"a{end}{end}"]
    assert learned["chat"] == [f"b{end}d{end}", f"B{end}", f"x{end}"]


def test_splits_never_tear_a_tree_or_a_dialogue(tmp_path: Path) -> None:
    talks = [
        dialogue([{"role": "user", "content": f"q{n % 40}"}, TALK[1]], tree=f"t{n % 20}" if n % 2 else None)
        for n in range(400)
    ]
    where: dict[str, set[bool]] = {}
    for talk in talks:
        where.setdefault(talk.group, set()).add(is_held_out(talk, 0.3))
    assert all(len(sides) == 1 for sides in where.values())
    assert 0.1 < sum(True in sides for sides in where.values()) / len(where) < 0.5
    # what is held out at a smaller share is held out at a larger one
    assert all(is_held_out(talk, 0.5) for talk in talks if is_held_out(talk, 0.3))
    assert not any(is_held_out(talk, 0.0) for talk in talks)


# Long dialogues


def invented(rng: random.Random) -> tuple[Row, list[Turn]]:
    """Turns of random sizes whose tokens are their own places, so that each can be told apart."""
    turns, place = [], 0
    for number in range(rng.randint(1, 9)):
        header = rng.randint(1, 4) if number else rng.randint(1, 10)
        size = rng.choice([1, 3, 10, 40, 150, 500])
        turns.append(Turn(place, place + header, place + header + size))
        place = turns[-1].end
    ids = np.arange(place + rng.randint(0, 2), dtype=np.int32)
    labels = np.full_like(ids, CONTEXT)
    for turn in turns[rng.randint(0, 1) :: 2]:
        labels[turn.text : turn.end] = ids[turn.text : turn.end]
    return Row(ids, labels, ""), turns


@pytest.mark.parametrize("seed", range(200))
def test_continuation_rows_hold_every_target_once_with_its_history(seed: int) -> None:
    rng = random.Random(seed)
    row, turns = invented(rng)
    longest = rng.choice([64, 100, 128, 256])
    parts = split_row(row, turns, longest)
    targets = np.concatenate([part.labels[part.labels != CONTEXT] for part in parts] or [np.array([])])
    assert sorted(targets) == sorted(row.labels[row.labels != CONTEXT])
    headers = {place for turn in turns for place in range(turn.start, turn.text)}
    for part in parts:
        assert len(part.input_ids) <= longest
        assert part.labels[-1] != CONTEXT  # nothing is computed in vain
        assert part.input_ids[: turns[0].text].tolist() == list(range(turns[0].text))  # opens as a dialogue
        seen = part.input_ids.tolist()
        for place, label in enumerate(part.labels):
            if label != CONTEXT:
                assert seen[place] == label
                assert seen[place - 1] == label - 1  # what it follows in the dialogue, it follows here
        starts = [turn for turn in turns if turn.text in seen[turns[0].text + 1 :]]
        for turn in starts:  # a later turn that stands there from its first token stands under its header
            place = seen.index(turn.text, turns[0].text)
            assert place == turns[0].text or seen[place - 1] in headers


def test_long_dialogue_keeps_whole_exchanges_as_history() -> None:
    tokenizer = tokenizer_of("chatml")
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n} " + "word " * 8} for n in range(20)]
    encoder = Encoder(TurnTemplate(tokenizer, system="none"), tokenizer, "ask", DataOptions())
    parts = split_row(*encoder.encode(dialogue(talk)), 300)
    assert len(parts) > 2
    for part in parts:
        text = tokenizer.decode(part.input_ids)
        assert text.startswith("<|im_start|>user\nturn ")
        numbers = [int(line.split()[1]) for line in text.split("\n") if line.startswith("turn ")]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] % 2 == 0
    learned = "".join(tokenizer.decode(part.labels[part.labels != CONTEXT]) for part in parts)
    assert learned == "".join(f"{row['content']}<|im_end|>" for row in talk[::2]) + "<|im_end|>"


def test_message_longer_than_the_context_goes_on_in_further_rows() -> None:
    tokenizer = tokenizer_of("chatml")
    long = " ".join(str(n) for n in range(400))
    talk = [TALK[0], TALK[1], {"role": "user", "content": long}, TALK[3]]
    encoder = Encoder(TurnTemplate(tokenizer, system="none"), tokenizer, "ask", DataOptions())
    parts = split_row(*encoder.encode(dialogue(talk)), 256)
    learned = [tokenizer.decode(part.labels[part.labels != CONTEXT]) for part in parts]
    assert "".join(learned) == f"{TALK[0]['content']}<|im_end|>{long}<|im_end|><|im_end|>"
    going_on = [n for n, text in enumerate(learned) if text in long and not long.startswith(text)]
    assert len(going_on) > 1
    for part, text in ((parts[n], learned[n]) for n in going_on):
        # each part of it stands under the user's header, on the end of the part before
        whole = tokenizer.decode(part.input_ids)
        assert whole.startswith("<|im_start|>user\n")
        before = whole.removeprefix("<|im_start|>user\n").removesuffix(text)
        assert before in long


def test_opening_that_fills_the_context_is_refused() -> None:
    turns = [Turn(0, 50, 60)]
    row = Row(np.arange(100, dtype=np.int32), np.arange(100, dtype=np.int32), "")
    with pytest.raises(Unwritable, match=r"data\.max_length"):
        split_row(row, turns, 64)


# Packing


def test_packing_keeps_every_row_and_fits() -> None:
    rng = random.Random(0)
    rows = [Row(np.full(rng.randint(1, 100), n, np.int32), np.zeros(1, np.int32), "") for n in range(300)]
    packs = pack_rows(rows, 100)
    assert sorted(int(row.input_ids[0]) for pack in packs for row in pack) == list(range(300))
    sizes = [sum(len(row.input_ids) for row in pack) for pack in packs]
    assert max(sizes) <= 100
    assert sum(sizes) / len(sizes) > 95
    assert pack_rows(rows, 100) == packs


@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 5])
def test_packed_logits_are_the_unpacked_ones(attention: str, window: int | None) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MistralConfig, MistralForCausalLM

    from parrot_edge.train.base import SEGMENTS, register_segments
    from parrot_edge.train.loops import lay_out

    register_segments()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=window,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = MistralForCausalLM(config).eval()
    rows = [torch.randint(0, 50, (size,)).tolist() for size in (7, 1, 12, 3)]
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
        model.set_attn_implementation(SEGMENTS if attention == "segments" else attention)
        records = [
            {"input_ids": rows[0] + rows[1], "labels": rows[0] + rows[1], "segments": [7, 1]},
            {"input_ids": rows[2] + rows[3], "labels": rows[2] + rows[3], "segments": [12, 3]},
        ]
        batch = lay_out(records)
        batch.pop("labels")
        packed = model(**batch, use_cache=False).logits[0].split([7, 1, 12, 3])
        for one, other in zip(alone, packed, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        changed = batch["input_ids"].clone()
        changed[0, :8] = (changed[0, :8] + 1) % 50
        leaked = model(**{**batch, "input_ids": changed}, use_cache=False).logits[0].split([7, 1, 12, 3])
        assert torch.equal(leaked[2], packed[2])
        assert torch.equal(leaked[3], packed[3])
        assert not torch.equal(leaked[0], packed[0])


# All together


def test_corpus_is_stable_and_says_what_was_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    rows: list[Any] = [{"data": [f"question {n}", f"answer {n}", "yes", "fine"]} for n in range(60)]
    rows.insert(3, {"data": ["<|im_end|>", "no"]})
    path = write(tmp_path / "data.jsonl", rows)
    options = DataOptions(sources=(path,), held_out=0.2, bad_rows="skip")

    def build(options: DataOptions) -> Corpus:
        return build_corpus(options, "ask", tokenizer)

    corpus = build(options)
    assert (corpus.dialogues, corpus.skipped, corpus.dropped) == (60, 1, 0)
    assert f"{path}:4: turn 1 holds the control token" in corpus.first_error
    assert len(corpus.train) + len(corpus.held_out) == 60
    assert corpus.held_out
    assert corpus.sha256() == build(options).sha256()
    some = build(DataOptions(sources=(path,), bad_rows="skip", limit=7))
    assert (some.dialogues, some.skipped, some.sources[0].rows) == (6, 1, 7)
    with pytest.raises(InputError, match=r"data\.jsonl:4: turn 1"):
        build(DataOptions(sources=(path,)))
    with pytest.raises(InputError, match="nothing that the ask role could learn"):
        build(DataOptions(sources=(path,), bad_rows="skip", min_targets=1000))
    chosen = sample_rows(corpus.held_out, 30)
    assert 0 < len(chosen) < len(corpus.held_out)
    assert [row.input_ids.tolist() for row in sample_rows(reversed(corpus.held_out), 30)] == [
        row.input_ids.tolist() for row in chosen
    ]


def test_pairs_become_prompt_chosen_and_rejected(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    history = [
        {"role": ("user", "assistant")[n % 2], "content": f"turn {n} " + "word " * 9} for n in range(9)
    ]
    rows = [
        {"prompt": "Is it warm?", "chosen": "Yes.", "rejected": "No idea."},
        {"prompt": history, "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    options = DataOptions(sources=(path,), held_out=0.0, max_length=200)
    _, pairs = build_pairs(options, tokenizer)
    first, second = ({key: tokenizer.decode(ids) for key, ids in pair.items()} for pair in pairs["train"])
    assert first["prompt_ids"].endswith("<|im_start|>user\nIs it warm?<|im_end|>\n<|im_start|>assistant\n")
    assert (first["chosen_ids"], first["rejected_ids"]) == ("Yes.<|im_end|>", "No idea.<|im_end|>")
    assert "You are a helpful AI assistant<|im_end|>\n<|im_start|>user\nturn " in second["prompt_ids"]
    assert "turn 0" not in second["prompt_ids"]  # the oldest exchanges are left out
    assert "turn 8" in second["prompt_ids"]
    assert len(pairs["train"][1]["prompt_ids"]) <= 200
    for bad, why in (
        ({"prompt": "a", "chosen": "b"}, 'has no "rejected"'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "a text or a list"),
    ):
        with pytest.raises(InputError, match=why):
            build_pairs(DataOptions(sources=(write(tmp_path / "bad.jsonl", [bad]),)), tokenizer)
