"""Preference pairs: what Chat is shown for each kind, which pairs are dropped, and runs that go on."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Parrot

from parrot_edge.data.capo import ALIKE, KINDS, REASONS, find_turns
from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Reply, Request
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.errors import EndpointError, UsageError
from parrot_edge.preferences import PairSettings, PairTally, make_pairs, with_others
from parrot_edge.roles import ATTEMPTS, Speaker
from parrot_edge.simulate import RowsOnly

BRIDGE = ["who built the old bridge?", "A monk did, in 1340.", "and how long did it take him?", "Nine years."]
SOUP = ["Can you suggest a soup for tonight?", "Lentil soup.", "How hot is the sun?", "Very hot."]


def talk(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(texts))


def dialogue(identity: str, *texts: str, system: str | None = None) -> Seed:
    first = (Message("system", system),) if system else ()
    return Seed(identity, first + talk(*texts))


def run(
    engine: ScriptedEngine, *dialogues: Seed, on_failure: Any = None, **settings: Any
) -> tuple[list[dict[str, Any]], PairTally]:
    rows: list[dict[str, Any]] = []
    made = make_pairs(
        Speaker(engine),
        iter(dialogues),
        RowsOnly(rows.append),
        PairSettings(**settings),
        on_failure=on_failure,
    )
    return rows, asyncio.run(made)


def numbered() -> Callable[[Request], str]:
    """Answers that have nothing in common; what was meant, where the user is to say it."""
    count = 0

    def reply(request: Request) -> str:
        nonlocal count
        count += 1
        return "the lighthouse" if request.next_role == "user" else f"word{count} is what{count} comes{count}"

    return reply


def test_turns_that_lean_on_the_history_are_found_with_their_answers() -> None:
    (turn,) = find_turns(dialogue("a", *BRIDGE, "Thanks, how many legs has a spider?", "Eight."))
    assert (turn.dialogue, turn.number, turn.message.content) == ("a", 2, BRIDGE[2])
    assert turn.history == talk(*BRIDGE[:2])
    assert turn.answer == Message("assistant", "Nine years.")
    assert turn.pair_id("neglect") == "a:2:neglect"


def test_dialogue_that_ends_with_a_question_has_no_answer_for_it() -> None:
    (turn,) = find_turns(dialogue("a", *BRIDGE[:3]))
    assert turn.answer is None


def test_what_chat_is_shown_for_each_kind() -> None:
    engine = ScriptedEngine(numbered())
    rows, _ = run(engine, dialogue("a", *BRIDGE, system="Be brief."), dialogue("b", *SOUP))
    brief, question = Message("system", "Be brief."), Message("user", BRIDGE[2])
    asked_back = Message("assistant", "Sorry, what are you talking about? Please name it.")
    guessed = Message("user", f"the lighthouse\n\n{BRIDGE[2]}")
    assert [(list(request.messages), request.next_role) for request in engine.history] == [
        ([brief, *talk(*BRIDGE[:3])], "assistant"),
        ([brief, question], "assistant"),
        ([question, asked_back], "user"),
        ([brief, guessed], "assistant"),
        ([brief, *talk(*SOUP[:2]), question], "assistant"),
    ]
    assert [row["kind"] for row in rows] == list(KINDS)
    assert [[Message(**message) for message in row["rejected_prompt"]] for row in rows] == [
        list(engine.history[index].messages) for index in (1, 3, 4)
    ]


def test_engine_that_only_answers_is_told_to_make_something_up() -> None:
    engine = ScriptedEngine(
        lambda request: "About a tower." if "Make up" in request.messages[-1].content else f"{request.seed}",
        writes_any_role=False,
    )
    (row,), _ = run(engine, dialogue("a", *BRIDGE), kinds=("hallucination",))
    assert BRIDGE[2] in engine.history[1].messages[-1].content
    assert row["rejected_prompt"] == [{"role": "user", "content": f"About a tower.\n\n{BRIDGE[2]}"}]


def test_message_about_which_nothing_is_made_up_gives_no_pair() -> None:
    engine = ScriptedEngine(lambda request: "" if request.next_role == "user" else "Nine years.")
    _, tally = run(engine, dialogue("a", *BRIDGE), kinds=("hallucination",))
    assert dict(tally.dropped) == {"no subject": 1}
    assert len({request.seed for request in engine.history}) == 1 + ATTEMPTS


def test_row_is_a_pair_as_trl_reads_it() -> None:
    rows, _ = run(ScriptedEngine(numbered(), name="parrot"), dialogue("a", *BRIDGE), kinds=("neglect",))
    assert rows == [
        {
            "id": "a:2:neglect",
            "prompt": [message.as_dict() for message in talk(*BRIDGE[:3])],
            "chosen": [{"role": "assistant", "content": "word1 is what1 comes1"}],
            "rejected": [{"role": "assistant", "content": "word2 is what2 comes2"}],
            "kind": "neglect",
            "dialogue": "a",
            "turn": 2,
            "rejected_prompt": [{"role": "user", "content": BRIDGE[2]}],
            "chosen_model": "parrot",
            "rejected_model": "parrot",
            "seed": 0,
        }
    ]
    data_utils = pytest.importorskip("trl.data_utils")
    from tiny_models import make_tokenizer

    texts = data_utils.apply_chat_template(rows[0], make_tokenizer())
    assert texts["chosen"] == "word1 is what1 comes1<|im_end|>\n"
    assert texts["prompt"].endswith(f"{BRIDGE[2]}<|im_end|>\n<|im_start|>assistant\n")


def test_recorded_answer_is_chosen_where_there_is_one() -> None:
    engine = ScriptedEngine(numbered())
    rows, _ = run(
        engine,
        dialogue("a", *BRIDGE),
        dialogue("b", *BRIDGE[:3]),
        kinds=("neglect",),
        recorded=True,
        parallel=1,
    )
    assert [row["chosen"][0]["content"] for row in rows] == ["Nine years.", "word2 is what2 comes2"]
    assert [row["chosen_model"] for row in rows] == ["recorded", "scripted"]


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([Reply("Nine", "length")], "chosen cut"),
        ([Reply("", "context")], "chosen context"),
        (["", "", ""], "chosen repetition"),
        (["Nine years.", Reply("Ten", "length")], "rejected cut"),
        (["Nine years.", Reply("", "context")], "rejected context"),
        (["Nine years.", "", "", ""], "rejected repetition"),
        (["Nine years, and then some more.", "nine years and then some more"], "alike"),
        (["!!", "!!"], "alike"),
    ],
)
def test_pair_that_cannot_be_learned_from_is_dropped_and_counted(replies: list[Any], reason: str) -> None:
    rows, tally = run(ScriptedEngine(replies), dialogue("a", *BRIDGE), kinds=("neglect",))
    assert (rows, dict(tally.dropped), tally.turns) == ([], {reason: 1}, 1)
    assert reason in REASONS


def test_answers_that_differ_by_more_than_a_third_are_a_pair() -> None:
    shared = [f"w{n}" for n in range(10)]
    for common, count in ((7, 0), (6, 1)):
        replies = [" ".join(shared), " ".join([*shared[:common], *(f"v{n}" for n in range(10 - common))])]
        rows, _ = run(ScriptedEngine(replies), dialogue("a", *BRIDGE), kinds=("neglect",))
        assert len(rows) == count
    assert ALIKE == 0.7


def test_cut_answer_of_a_dialogue_is_not_chosen() -> None:
    cut = "It took him as long as it takes one man with a mule and two brothers to bring the stone from the"
    _, tally = run(ScriptedEngine([]), dialogue("a", *BRIDGE[:3], cut), kinds=("neglect",), recorded=True)
    assert dict(tally.dropped) == {"chosen cut": 1}


def test_single_dialogue_has_no_other_history() -> None:
    _, tally = run(ScriptedEngine(numbered()), dialogue("a", *BRIDGE), kinds=("misunderstanding",))
    assert dict(tally.dropped) == {"no other dialogue": 1}


def test_other_history_is_no_longer_than_the_own_and_ends_with_an_answer() -> None:
    engine = ScriptedEngine(numbered())
    long = dialogue("long", *SOUP, "And the moon?", "Cold.", "Then why does it shine?", system="Be kind.")
    run(engine, dialogue("a", *BRIDGE), long, kinds=("misunderstanding",))
    shown = [list(request.messages) for request in engine.history]
    assert [*talk(*SOUP[:2]), Message("user", BRIDGE[2])] in shown
    assert [Message("system", "Be kind."), *talk(*BRIDGE), Message("user", "And the moon?")] in shown


def test_seeds_differ_by_dialogue_turn_and_kind_and_return() -> None:
    def drawn(seed: int) -> dict[str, int]:
        engine = ScriptedEngine(numbered())
        rows = [dialogue(name, *BRIDGE, "and who paid him?", "The town.") for name in "ab"]
        run(engine, *rows, dialogue("c", *SOUP), seed=seed)
        return {f"{request.messages} {request.seed}": request.seed for request in engine.history}

    first = drawn(0)
    assert len(set(first.values())) == 2 * 2 * 5
    assert drawn(0) == first
    assert not set(drawn(1).values()) & set(first.values())


def test_pairs_do_not_depend_on_how_many_run_at_once() -> None:
    rows = [dialogue(f"{name}", f"{name}, {BRIDGE[0]}", *BRIDGE[1:]) for name in range(9)]

    def pairs(parallel: int) -> list[dict[str, Any]]:
        made, _ = run(ScriptedEngine(lambda request: str(request.seed)), *rows, parallel=parallel)
        return sorted(made, key=lambda row: row["id"])

    assert pairs(1) == pairs(4)
    assert len(pairs(1)) == 27


def test_dialogue_with_the_same_opening_lends_no_history() -> None:
    rows = [dialogue(name, *BRIDGE) for name in "ab"] + [dialogue("c", *SOUP), dialogue("d", *BRIDGE)]

    async def others() -> dict[str, str | None]:
        return {seed.id: other and other.id async for seed, other in with_others(iter(rows))}

    assert asyncio.run(others()) == {"a": "c", "b": "c", "c": asyncio.run(others())["c"], "d": "c"}
    assert asyncio.run(others())["c"] in "ab"


def test_dialogues_wait_for_no_more_than_another_opening() -> None:
    taken = []

    def rows() -> Iterator[Seed]:
        for number in range(200):
            taken.append(number)
            yield dialogue(str(number), *BRIDGE)

    async def first() -> tuple[Seed, Seed | None]:
        return await anext(with_others(rows()))

    seed, other = asyncio.run(first())
    assert (seed.id, other) == ("0", None)
    assert len(taken) < 100


def test_engine_that_fails_over_one_dialogue_leaves_the_others() -> None:
    failed: list[str] = []

    def reply(request: Request) -> Any:
        return EndpointError("gone") if "bridge" in request.messages[0].content else f"{request.seed}"

    rows, tally = run(
        ScriptedEngine(reply),
        dialogue("a", *BRIDGE),
        dialogue("b", "what is a monk?", "A man.", "and what does he do?"),
        kinds=("neglect",),
        on_failure=lambda seed, error: failed.append(f"{seed.id}: {error}"),
    )
    assert failed == ["a: gone"]
    assert ([row["id"] for row in rows], tally.dialogues, tally.skipped) == (["b:2:neglect"], 1, 1)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="'ignorance' is no kind of pair; use neglect, hall"):
        PairSettings(("ignorance",))


# The command


def write(path: Path, *dialogues: Seed) -> Path:
    rows = [
        {"id": each.id, "messages": [message.as_dict() for message in each.messages]} for each in dialogues
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


MANY = [dialogue(f"d{n}", f"{n}: {BRIDGE[0]}", *BRIDGE[1:]) for n in range(12)]


def test_command_writes_pairs_and_tells_what_it_did(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *MANY)
    done = scripted_parrot("capo", "in.jsonl", "-o", "pairs.jsonl", "--json")
    assert done.stderr == (
        "parrot: 12 dialogues, 12 context-dependent turns, 36 pairs: 12 neglect, 12 hallucination, "
        "12 misunderstanding\n"
    )
    assert len({row["id"] for row in read(tmp_path / "pairs.jsonl")}) == 36
    report = json.loads(done.stdout)
    assert report["pairs"] == dict.fromkeys(KINDS, 12)
    beside = json.loads((tmp_path / "pairs.jsonl.capo.json").read_text())
    assert beside == {**report, "dropped_pairs": {}}
    assert "-o FILE" in scripted_parrot("capo", "in.jsonl", "--json").stderr


def test_killed_run_goes_on_and_makes_each_pair_once(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *MANY)
    command = ["capo", "in.jsonl", "-o", "pairs.jsonl", "--parallel", 2]
    process = scripted_parrot.start(*command, env={"REPLY_SECONDS": "0.1"})
    pairs = tmp_path / "pairs.jsonl"
    deadline = time.monotonic() + 60
    while not (pairs.exists() and pairs.read_bytes().count(b"\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_whole(pairs)
    assert len(before) < 36
    refused = scripted_parrot(*command, "--resume", "--seed", 1)
    assert (refused.returncode, "was begun with seed 0, not 1" in refused.stderr) == (2, True)
    log = tmp_path / "log"
    done = scripted_parrot(*command, "--resume", env={"REPLY_LOG": str(log)})
    assert (done.returncode, "36 pairs" in done.stderr) == (0, True)
    rows = read(pairs)
    assert rows[: len(before)] == before
    assert len(rows) == len({row["id"] for row in rows}) == 36
    answered = log.read_text().count("\t")
    assert answered < 5 * 12
    again = scripted_parrot(*command, "--resume", env={"REPLY_LOG": str(log)})
    assert "36 pairs" in again.stderr
    assert log.read_text().count("\t") == answered


def read_whole(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_what_was_dropped_is_not_tried_again(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", dialogue("a", *BRIDGE))
    command = ["capo", "in.jsonl", "-o", "pairs.jsonl"]
    assert "2 pairs" in (first := scripted_parrot(*command).stderr)
    assert "dropped: 1 no other dialogue" in first
    report = json.loads((tmp_path / "pairs.jsonl.capo.json").read_text())
    assert report["dropped_pairs"] == {"a:2:misunderstanding": "no other dialogue"}
    assert scripted_parrot(*command, "--resume").stderr == first
    write(tmp_path / "in.jsonl", dialogue("a", *BRIDGE), dialogue("b", *SOUP, "and how old is it?"))
    assert "5 pairs" in scripted_parrot(*command, "--resume").stderr
    refused = scripted_parrot(*command, "--resume", "--chosen", "recorded")
    assert (refused.returncode, "was begun with chosen 'generate'" in refused.stderr) == (2, True)
    assert "--force" in scripted_parrot(*command).stderr
    assert "6 pairs" in scripted_parrot(*command, "--force").stderr


def test_empty_input_gives_a_sentence_and_an_empty_result(scripted_parrot: Parrot, tmp_path: Path) -> None:
    done = scripted_parrot("capo", "-o", "pairs.jsonl", input="")
    assert (done.returncode, done.stderr) == (0, "parrot: the input holds no dialogue\n")
    assert (tmp_path / "pairs.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "message 1 is from 'assistant'"),
        ("What is tea?", "is not JSON"),
    ],
)
def test_bad_row_is_named_or_set_aside(
    row: str, reason: str, scripted_parrot: Parrot, tmp_path: Path
) -> None:
    good = write(tmp_path / "in.jsonl", *MANY[:2]).read_text()
    (tmp_path / "in.jsonl").write_text(good + row + "\n")
    done = scripted_parrot("capo", "in.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"in.jsonl:3: {reason}" in done.stderr
    done = scripted_parrot("capo", "in.jsonl", "--on-error", "skip", "-o", "out.jsonl")
    assert (done.returncode, len(read(tmp_path / "out.jsonl"))) == (0, 6)
    (reject,) = read(tmp_path / "out.jsonl.rejects.jsonl")
    assert reject["line"] == 3


def test_wrong_kinds_are_misuse(scripted_parrot: Parrot, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *MANY[:2])
    done = scripted_parrot("capo", "in.jsonl", "--kinds", "neglect,forgetting")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'forgetting' is no kind of pair" in done.stderr


# The real model, and training


def test_real_model_answers_differently_without_the_history(
    parrot: Parrot, model_file: Path, tmp_path: Path
) -> None:
    colours = dialogue("a", "My dog is called Rex.", "A fine name!", "Say his name in a few words.")
    stars = dialogue("b", "Is the sun a star?", "Yes, it is.", "And how far away is it? Say it shortly.")
    write(tmp_path / "in.jsonl", colours, stars)
    small = ["--threads", 1, "--parallel", 2, "--max-tokens", 32]
    done = parrot("capo", "in.jsonl", "--chat", model_file, *small, "-o", "out.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    report, rows = json.loads(done.stdout), read(tmp_path / "out.jsonl")
    assert report["turns"] == 2
    assert sum(report["pairs"].values()) + sum(report["dropped"].values()) == 6
    assert len(rows) == sum(report["pairs"].values())
    for row in rows:
        assert row["chosen"] != row["rejected"]
        assert row["prompt"] != row["rejected_prompt"]


def test_dpo_learns_from_the_pairs_and_no_dialogue_is_on_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tiny_models import make_base, make_tokenizer

    from parrot_edge.recipe import load_recipe
    from parrot_edge.train.data import build_pairs
    from parrot_edge.train.trainer import train

    def reply(request: Request) -> str:
        knows = len(request.messages) > 1 and "bridge" in request.messages[0].content
        return "Boil it for eight minutes." if knows else f"What? {request.seed % 7}"

    rows = [dialogue(f"d{n}", f"{n}: {BRIDGE[0]}", *BRIDGE[1:], "and who paid him?") for n in range(16)]
    rows.append(dialogue("other", *SOUP))
    pairs, _ = run(ScriptedEngine(reply), *rows, kinds=("neglect", "hallucination"))
    assert len(pairs) == 64
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    small = load_recipe(
        "dpo-135m-cpu",
        [f"base.name={make_base(tmp_path / 'base')}", f"data.sources={tmp_path / 'pairs.jsonl'}",
         "data.max_length=256", "data.held_out=0.25", "base.dtype=float32", "optim.learning_rate=1e-2"],
    )  # fmt: skip
    tokenizer = make_tokenizer()
    _, split = build_pairs(small.data, tokenizer)

    def openings(side: str) -> set[str]:
        return {tokenizer.decode(pair["prompt_ids"]).split("user\n")[1] for pair in split[side]}

    assert min(len(openings("train")), len(openings("held_out"))) > 0
    assert len(openings("train")) + len(openings("held_out")) == 16
    assert {len(found) % 4 for found in split.values()} == {0}
    record = train(small, tmp_path / "out")
    measures, name = record["measures"], "held-out preference accuracy"
    assert record["data"]["held_out_pairs"] == len(split["held_out"])
    assert measures["before"][name] < measures["after"][name]
    assert measures["after"][name] > 0.9
