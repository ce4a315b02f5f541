"""The conversation and the run around it, with engines that say what they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from parrot_edge import simulate
from parrot_edge.dialogue import STOP_REASONS, Message, Seed
from parrot_edge.engine.base import Reply, Request
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.errors import EndpointError, InputError, ModelError, OutputError, ParrotError, UsageError
from parrot_edge.journal import Journal, Progress
from parrot_edge.roles import ATTEMPTS, AskPrompt, Speaker
from parrot_edge.simulate import RowsOnly, Run, RunSettings, Tally, take_in_turn

Script = Iterable[str | Reply | Exception] | Callable[[Request], str | Reply]

USER, ASSISTANT = Message("user", "What is tea?"), Message("assistant", "A drink.")
PROMPT = Seed("a", (USER,))
ROLE_FLIP = "Sure! Here are three ideas:"
CONTEXT = Reply("", "context", new_tokens=2)


class Recorder(RowsOnly):
    """Keeps rows and everything that was recorded, in order."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.events: list[tuple[str, ...]] = []
        super().__init__(self.rows.append)

    def add_message(self, identity: str, message: Message, **costs: int) -> None:
        self.events.append(("message", identity, message.role, message.content))

    def add_end(self, identity: str, stop_reason: str, **costs: int) -> None:
        self.events.append(("end", identity, stop_reason))

    def add_row(self, row: dict[str, Any]) -> None:
        super().add_row(row)
        self.events.append(("row", row["id"]))


class Stage:
    """A run with an Ask and a Chat that follow their scripts."""

    def __init__(self, ask: Script = (), chat: Script = (), **options: Any) -> None:
        self.ask = ScriptedEngine(ask, name="asker", writes_any_role=options.pop("native", True))
        self.chat = ScriptedEngine(chat, name="chatter")
        self.recorder: Any = options.pop("recorder", None) or Recorder()
        self.on_failure = options.pop("on_failure", None)
        self.seen: list[int] = []
        self.settings = RunSettings(**{"turns": 2, **options})

    def over(self, *seeds: Seed) -> Tally:
        run = Run(
            Speaker(self.ask),
            Speaker(self.chat),
            self.settings,
            self.recorder,
            lambda tally: self.seen.append(tally.messages),
            self.on_failure,
        )
        return asyncio.run(run.over(iter(seeds)))

    def row(self, seed: Seed) -> dict[str, Any]:
        """The row that a seed becomes."""
        self.over(seed)
        (row,) = self.recorder.rows
        return row


def said(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


# Where a dialogue begins


def test_prompt_is_answered_and_asked_on_in_turn() -> None:
    stage = Stage(["Which is best?"], ["A drink.", "Green tea."])
    row = stage.row(PROMPT)
    assert row["messages"] == [
        {"role": "user", "content": "What is tea?"},
        {"role": "assistant", "content": "A drink."},
        {"role": "user", "content": "Which is best?"},
        {"role": "assistant", "content": "Green tea."},
    ]
    assert [request.next_role for request in stage.ask.history] == ["user"]
    assert [request.next_role for request in stage.chat.history] == ["assistant", "assistant"]
    assert list(stage.chat.history[1].messages) == [USER, ASSISTANT, Message("user", "Which is best?")]


def test_topic_is_opened_by_ask() -> None:
    stage = Stage(["Is tea a plant?"], ["Yes."], turns=1)
    row = stage.row(Seed("a", topic="tea"))
    assert said(row) == ["Is tea a plant?", "Yes."]
    assert row["topic"] == "tea"
    assert "tea" in stage.ask.history[0].messages[0].content
    assert list(stage.chat.history[0].messages) == [Message("user", "Is tea a plant?")]


def test_started_dialogue_is_carried_on_by_whose_turn_it_is() -> None:
    begun = Stage(["And coffee?"], ["Also."])
    assert said(begun.row(Seed("a", (USER, ASSISTANT)))) == [
        "What is tea?",
        "A drink.",
        "And coffee?",
        "Also.",
    ]
    waiting = Stage([], ["Also."])
    messages = (USER, ASSISTANT, Message("user", "And coffee?"))
    assert said(waiting.row(Seed("a", messages))) == ["What is tea?", "A drink.", "And coffee?", "Also."]


def test_turns_of_the_seed_count() -> None:
    stage = Stage()
    row = stage.row(Seed("a", (USER, ASSISTANT, Message("user", "Why?"), Message("assistant", "So."))))
    assert (row["stop_reason"], len(row["messages"])) == ("turns", 4)
    assert stage.ask.history == stage.chat.history == []


def test_system_line_is_for_chat_and_stays_in_the_row() -> None:
    system = Message("system", "Talk like a pirate.")
    stage = Stage([], ["Arr."], turns=1)
    row = stage.row(Seed("a", (system, USER)))
    assert list(stage.chat.history[0].messages) == [system, USER]
    assert row["messages"][0] == system.as_dict()


def test_persona_is_for_ask_alone() -> None:
    stage = Stage(["And then?"], ["A drink.", "More."])
    row = stage.row(Seed("a", (USER,), persona="a tired cook"))
    assert "a tired cook" in stage.ask.history[0].messages[0].content
    assert "cook" not in str([request.messages for request in stage.chat.history])
    assert row["persona"] == "a tired cook"


def test_remote_ask_writes_as_the_assistant_and_sees_roles_exchanged() -> None:
    stage = Stage(["Why?"], ["A drink.", "So."], native=False)
    assert said(stage.row(PROMPT)) == ["What is tea?", "A drink.", "Why?", "So."]
    (request,) = stage.ask.history
    assert request.next_role == "assistant"
    assert [(m.role, m.content) for m in request.messages][-2:] == [
        ("assistant", "What is tea?"),
        ("user", "A drink."),
    ]


# Why it ends


def test_turn_limit_ends_with_an_answer() -> None:
    row = Stage(["b?", "c?"], ["one", "two", "three"], turns=3).row(PROMPT)
    assert (row["stop_reason"], len(row["messages"])) == ("turns", 6)


@pytest.mark.parametrize("end", ["", "  \n", "[END]", "ok [END]"])
def test_end_mark_of_ask_ends_and_is_not_drawn_again(end: str) -> None:
    stage = Stage([end], ["A drink."])
    row = stage.row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("end", ["What is tea?", "A drink."])
    assert len(stage.ask.history) == 1


def test_farewell_is_answered_and_then_ends() -> None:
    row = Stage(["ok thanks, bye!"], ["A drink.", "Goodbye!"], turns=8).row(PROMPT)
    assert (row["stop_reason"], said(row)[-1]) == ("farewell", "Goodbye!")


def test_thanks_twice_is_a_farewell() -> None:
    row = Stage(["thanks", "thank you!"], ["one", "two", "three"], turns=8).row(PROMPT)
    assert (row["stop_reason"], len(row["messages"])) == ("farewell", 6)


def test_question_of_ask_that_repeats_ends_after_its_attempts() -> None:
    stage = Stage(["what is tea"] * ATTEMPTS, ["A drink."])
    row = stage.row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("repetition", ["What is tea?", "A drink."])
    assert len(stage.ask.history) == ATTEMPTS


@pytest.mark.parametrize("answer", ["A drink!", "", "no no no " * 40])
def test_answer_of_chat_that_repeats_or_is_empty_ends_without_the_question(answer: str) -> None:
    row = Stage(["And then?"], ["A drink.", *[answer] * ATTEMPTS]).row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("repetition", ["What is tea?", "A drink."])


def test_role_flip_is_drawn_again_with_another_seed() -> None:
    stage = Stage([ROLE_FLIP, ROLE_FLIP, "And then?"], ["A drink.", "More."])
    row = stage.row(PROMPT)
    assert (row["stop_reason"], said(row)[2]) == ("turns", "And then?")
    assert len({request.seed for request in stage.ask.history}) == ATTEMPTS == 3


def test_role_flip_that_no_retry_cures_ends() -> None:
    stage = Stage([ROLE_FLIP] * ATTEMPTS, ["A drink."])
    row = stage.row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("role_flip", ["What is tea?", "A drink."])
    assert len(stage.ask.history) == ATTEMPTS


def test_full_context_of_ask_ends() -> None:
    row = Stage([CONTEXT], ["A drink."]).row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("context", ["What is tea?", "A drink."])


def test_full_context_of_chat_ends_without_the_question() -> None:
    row = Stage(["And then?"], ["A drink.", CONTEXT]).row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("context", ["What is tea?", "A drink."])


def test_opening_that_is_not_answered_stays() -> None:
    row = Stage([], [CONTEXT]).row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("context", ["What is tea?"])


def test_topic_that_is_not_opened_has_no_message() -> None:
    row = Stage([ROLE_FLIP] * ATTEMPTS).row(Seed("a", topic="tea"))
    assert (row["stop_reason"], row["messages"], row["topic"]) == ("role_flip", [], "tea")


def test_every_reason_is_one_of_the_contract() -> None:
    assert set(STOP_REASONS) == {"end", "turns", "farewell", "repetition", "role_flip", "context"}


# The row


def test_row_has_the_keys_of_the_contract_in_order() -> None:
    row = Stage([], ["A drink."], turns=1, seed=5).row(PROMPT)
    keys = ["id", "messages", "stop_reason", "topic", "ask_model", "chat_model", "seed", "usage"]
    assert list(row) == keys
    assert (row["id"], row["topic"], row["seed"]) == ("a", None, 5)
    assert (row["ask_model"], row["chat_model"]) == ("asker", "chatter")


def test_other_keys_of_the_seed_are_carried_but_replace_none() -> None:
    extra = {"score": 1.5, "seed": 99, "usage": "old", "stop_reason": "end", "ask_model": "old"}
    row = Stage([], ["A drink."], turns=1).row(Seed("a", (USER,), extra=extra))
    assert (row["score"], row["seed"], row["stop_reason"], row["ask_model"]) == (1.5, 0, "turns", "asker")


def test_usage_counts_every_attempt_and_what_was_cut() -> None:
    def reply(text: str, finish: str = "stop") -> Reply:
        return Reply(text, finish, prompt_tokens=1000, new_tokens=10, completion_tokens=3)

    stage = Stage(
        [reply(ROLE_FLIP), reply("And then?", "length")], [reply("A drink."), reply("More", "length")]
    )
    row = stage.row(PROMPT)
    assert row["usage"] == {"prompt_tokens": 40, "completion_tokens": 12, "cut_messages": 2}


def test_seeds_of_replies_depend_on_run_dialogue_turn_and_role() -> None:
    def draw(identity: str, seed: int) -> list[int]:
        stage = Stage(["b?"], ["one", "two"], seed=seed)
        stage.over(Seed(identity, (USER,)))
        return [request.seed for engine in (stage.ask, stage.chat) for request in engine.history]

    one = draw("a", 0)
    assert one == draw("a", 0)
    assert len({*one, *draw("b", 0), *draw("a", 1)}) == 9


# The run


def test_message_is_recorded_before_the_next_is_asked_for() -> None:
    recorder = Recorder()
    known: list[int] = []

    def answer(request: Request) -> str:
        known.append(len(recorder.events))
        return f"answer {request.messages[-1].content} {len(known)}"

    Stage(answer, answer, recorder=recorder, turns=3).over(PROMPT)
    assert known == [0, 1, 2, 3, 4]
    assert [event[0] for event in recorder.events] == ["message"] * 5 + ["end", "row"]


def test_progress_is_told_after_every_message() -> None:
    stage = Stage(["b?"], ["one", "two"])
    tally = stage.over(PROMPT)
    assert sorted(set(stage.seen)) == [1, 2, 3]
    assert (tally.dialogues, tally.messages, tally.reasons) == (1, 3, {"turns": 1})


def test_dialogues_run_beside_each_other_up_to_parallel() -> None:
    under_way = most = 0

    class Slow(ScriptedEngine):
        async def reply(self, request: Request) -> Reply:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.001)
            under_way -= 1
            return Reply(f"answer {request.messages[0].content}", "stop")

    engine = Slow([])
    recorder = Recorder()
    run = Run(Speaker(engine), Speaker(engine), RunSettings(turns=1, parallel=3), recorder)
    asyncio.run(run.over(Seed(str(n), (Message("user", f"{n}?"),)) for n in range(10)))
    assert most == 3
    assert len(recorder.rows) == 10


def test_seeds_are_taken_only_as_there_is_room() -> None:
    taken: list[int] = []

    async def seeds() -> AsyncIterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    async def work(number: int) -> None:
        assert len(taken) <= number + 2
        await asyncio.sleep(0)

    asyncio.run(take_in_turn(seeds(), work, 2))
    assert taken == list(range(6))


def test_a_session_is_beside_the_other_where_both_read_the_same() -> None:
    neighbours: list[Any] = []

    class Noting(ScriptedEngine):
        def session(self, *, beside: Any = None) -> Any:
            neighbours.append(beside)
            return super().session()

    def sessions(seed: Seed) -> list[bool]:
        neighbours.clear()
        engine = Noting(lambda request: f"answer {len(request.messages)}")
        speaker = Speaker(engine, prompt=AskPrompt(native=True))
        asyncio.run(Run(speaker, speaker, RunSettings(turns=1), Recorder()).over(iter([seed])))
        return [beside is not None for beside in neighbours]

    assert sessions(PROMPT) == [False, True]
    assert sessions(Seed("a", (USER,), persona="a cook")) == [False, False]
    assert sessions(Seed("a", topic="tea")) == [False, False]


@pytest.mark.parametrize(("name", "value"), [("turns", 0), ("parallel", 0), ("parallel", -3), ("seed", -1)])
def test_settings_outside_their_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least"):
        RunSettings(**{name: value})


# Carrying on


def test_dialogue_is_carried_on_from_its_last_message() -> None:
    recorder = Recorder()
    done = [ASSISTANT, Message("user", "And then?")]
    recorder.under_way["a"] = Progress(list(done), read=20, made=6, cut=1)
    stage = Stage([], [Reply("More.", "stop", new_tokens=5, completion_tokens=2)], recorder=recorder)
    row = stage.row(PROMPT)
    assert said(row) == ["What is tea?", "A drink.", "And then?", "More."]
    assert row["usage"] == {"prompt_tokens": 25, "completion_tokens": 8, "cut_messages": 1}
    assert list(stage.chat.history[0].messages) == [USER, *done]


def test_dialogue_that_had_ended_gets_its_row_without_a_word() -> None:
    recorder = Recorder()
    recorder.under_way["a"] = Progress([ASSISTANT], stop_reason="end")
    row = Stage(recorder=recorder).row(PROMPT)
    assert (row["stop_reason"], said(row)) == ("end", ["What is tea?", "A drink."])


def test_finished_dialogue_is_passed_over() -> None:
    recorder = Recorder()
    recorder.finished.add("a")
    stage = Stage([], ["So."], recorder=recorder, turns=1)
    tally = stage.over(PROMPT, Seed("b", (USER,)))
    assert [row["id"] for row in recorder.rows] == ["b"]
    assert tally.dialogues == 1


def test_resumed_run_draws_with_the_same_seeds() -> None:
    whole = Stage(["b?", "c?"], ["one", "two", "three"], turns=3)
    whole.over(PROMPT)
    recorder = Recorder()
    recorder.under_way["a"] = Progress([Message("assistant", "one"), Message("user", "b?")])
    rest = Stage(["c?"], ["two", "three"], turns=3, recorder=recorder)
    rest.over(PROMPT)
    assert rest.ask.history == whole.ask.history[1:]
    assert rest.chat.history == whole.chat.history[1:]


def test_run_over_a_journal_ends_with_its_rows_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl", {})
    Stage(["b?"], ["one", "two"], recorder=journal).over(PROMPT)
    journal.complete()
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


# What goes wrong


@pytest.mark.parametrize("error", [EndpointError("gone"), ModelError("no template")])
def test_error_of_an_engine_ends_the_run(error: ParrotError) -> None:
    with pytest.raises(type(error), match=str(error)):
        Stage([], [error], turns=1).over(PROMPT)


@pytest.mark.parametrize("error", [EndpointError("gone"), ModelError("no template")])
def test_error_of_one_dialogue_is_passed_on_where_that_is_wanted(error: ParrotError) -> None:
    failures: list[tuple[str, str]] = []
    stage = Stage(
        [], [error, "fine"], turns=1, parallel=1, on_failure=lambda s, e: failures.append((s.id, str(e)))
    )
    tally = stage.over(PROMPT, Seed("b", (USER,)))
    assert failures == [("a", str(error))]
    assert [row["id"] for row in stage.recorder.rows] == ["b"]
    assert (tally.dialogues, tally.skipped) == (1, 1)


@pytest.mark.parametrize("error", [OutputError("disk full"), UsageError("wrong"), BrokenPipeError()])
def test_error_that_concerns_all_ends_the_run_even_so(error: Exception) -> None:
    class Broken(Recorder):
        def add_message(self, identity: str, message: Message, **costs: int) -> None:
            raise error

        def add_row(self, row: dict[str, Any]) -> None:
            raise error

    for turns in (1, 2):
        seed = Seed("a", (USER, ASSISTANT)) if turns == 1 else PROMPT
        stage = Stage([], ["one"], turns=turns, recorder=Broken(), on_failure=lambda *_: None)
        with pytest.raises(type(error)):
            stage.over(seed)


def test_bad_seed_ends_the_run_and_keeps_the_rows_before() -> None:
    def seeds() -> Any:
        yield PROMPT
        raise InputError("is bad", source="seeds.jsonl", line=2)

    recorder = Recorder()
    engine = ScriptedEngine(["one"])
    run = Run(Speaker(engine), Speaker(engine), RunSettings(turns=1, parallel=1), recorder)
    with pytest.raises(InputError, match=r"seeds\.jsonl:2"):
        asyncio.run(run.over(seeds()))
    assert len(recorder.rows) == 1


def test_first_failure_stops_the_others() -> None:
    done: list[int] = []

    async def work(number: int) -> None:
        await asyncio.sleep(0.001 * number)
        if number == 1:
            raise EndpointError("gone")
        await asyncio.sleep(0.05)
        done.append(number)

    with pytest.raises(EndpointError):
        asyncio.run(take_in_turn(iter(range(5)), work, 5))
    assert done == []


def test_disk_that_fails_while_the_run_goes_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Recorder):
        def sync(self) -> None:
            raise OutputError("out.jsonl cannot be written: Input/output error")

    class Slow(ScriptedEngine):
        async def reply(self, request: Request) -> Reply:
            await asyncio.sleep(0.05)
            return await super().reply(request)

    monkeypatch.setattr(simulate, "_SECONDS_BETWEEN_SYNCS", 0.001)
    engine = Slow(["one"])
    run = Run(Speaker(engine), Speaker(engine), RunSettings(turns=1), Failing())
    with pytest.raises(OutputError, match="Input/output error"):
        asyncio.run(run.over(iter([PROMPT])))


def test_recorder_is_synced_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Recorder):
        synced = 0

        def sync(self) -> None:
            self.synced += 1

    class Slow(ScriptedEngine):
        async def reply(self, request: Request) -> Reply:
            await asyncio.sleep(0.05)
            return await super().reply(request)

    monkeypatch.setattr(simulate, "_SECONDS_BETWEEN_SYNCS", 0.001)
    engine, recorder = Slow(["one"]), Counting()
    asyncio.run(Run(Speaker(engine), Speaker(engine), RunSettings(turns=1), recorder).over(iter([PROMPT])))
    assert recorder.synced > 1
