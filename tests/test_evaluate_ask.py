"""Every sentence in here was written for these tests."""

import asyncio
import contextlib
import json
import math
import random

import numpy as np
import pytest
from click.testing import CliRunner

from parrot_edge.cli import options
from parrot_edge.cli.evaluate import ask as command
from parrot_edge.cli.evaluate import evaluate as group
from parrot_edge.dialogue import Message, Seed
from parrot_edge.engine.base import Reply
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.errors import InputError, ModelError, UsageError
from parrot_edge.evaluate import ask as evaluate
from parrot_edge.evaluate import ask_likelihood, ask_writing
from parrot_edge.evaluate.ask import AskSettings, System
from parrot_edge.evaluate.ask_likelihood import StopScore, TurnScore
from parrot_edge.evaluate.sources import Stop, Turn, read_source
from parrot_edge.evaluate.window import Window
from parrot_edge.figures import Resampling, readable
from parrot_edge.filetype import Choice
from parrot_edge.models import LocalModel, RemoteModel
from parrot_edge.roles import END_MARK, FLIPPED, NATIVE, AskPrompt, Speaker, ask_view
from parrot_edge.simulate import RunSettings

TALKS = {
    "kettle": [
        "how do i get the white stuff out of my kettle",
        "Fill it with equal parts of water and vinegar, boil it once and leave it for half an hour.",
        "which vinegar? i only have balsamic lol",
        "Balsamic would leave sugar behind. The juice of two lemons does the same job.",
    ],
    "train": [
        "my train was 70 minutes late, do i get money back?",
        "Usually a quarter of the fare after one hour. You have to claim it from the operator.",
        "where do i claim",
        "On the operator's website, under passenger rights, with a photo of your ticket.",
        "thats it, thanks",
        "You are welcome. Have a safe journey.",
    ],
    "bike": [
        "Bike chain keeps dropping off the big ring when I shift up.",
        "The limit screw of the front derailleur is probably set too far out.",
    ],
}


def rows(**extra):
    return [{"id": name, "messages": messages(*texts), **extra} for name, texts in TALKS.items()]


def messages(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def write(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture
def talks(tmp_path):
    return write(tmp_path / "talks.jsonl", rows())


@pytest.fixture(scope="module")
def likelihood(embedded_model):
    with Likelihood(embedded_model, tokens=256, threads=1) as opened:
        yield opened


def test_a_dialogue_becomes_its_user_turns_and_the_places_where_it_could_have_ended(talks):
    source = read_source(talks)
    assert (source.name, source.dialogues, len(source.groups)) == ("talks.jsonl", 3, 3)
    train = [place for place in source.places if place.dialogue == 1]
    kinds = [type(place) for place in train]
    assert kinds == [Turn, Stop, Turn, Stop, Turn, Stop]
    assert [stop.ended for stop in train if isinstance(stop, Stop)] == [False, False, True]
    assert [turn.is_opening for turn in train if isinstance(turn, Turn)] == [True, False, False]
    assert [message.content for message in train[2].history] == TALKS["train"][:2]


def test_a_turn_that_branches_share_is_measured_once(tmp_path):
    branches = [
        {"tree": "t", "messages": messages("hi", "Hello.", "who is there")},
        {"tree": "t", "messages": messages("hi", "Good day.")},
    ]
    source = read_source(write(tmp_path / "tree.jsonl", branches))
    assert [turn.text for turn in source.turns] == ["hi", "who is there"]
    # Where a branch stops, collectors stopped, not the person
    assert [place.ended for place in source.places if isinstance(place, Stop)] == [False]
    assert source.groups == ["t"]


def test_a_conversation_that_was_stored_twice_ends_once(tmp_path):
    texts = TALKS["train"]
    grown = [{"messages": messages(*texts[:2])}, {"messages": messages(*texts)}]
    source = read_source(write(tmp_path / "grown.jsonl", grown))
    assert len(source.turns) == 3
    assert [place.ended for place in source.places if isinstance(place, Stop)] == [False, False, True]


def test_a_dialogue_that_ran_into_a_limit_did_not_end(tmp_path):
    source = read_source(write(tmp_path / "cut.jsonl", rows(stop_reason="turns")))
    assert not any(place.ended for place in source.places if isinstance(place, Stop))


def test_a_share_is_held_out_as_training_holds_it_out(tmp_path):
    talks = [{"messages": messages(f"question {number}", "Answer.")} for number in range(200)]
    path = write(tmp_path / "many.jsonl", talks)
    held_out = read_source(path, held_out=0.2)
    assert 20 < held_out.dialogues < 60
    some = read_source(path, held_out=0.2, limit=10)
    assert some.dialogues == 10
    assert set(some.groups) < set(held_out.groups)
    assert some.groups != read_source(path, held_out=0.2, limit=10, seed=1).groups


def test_bad_rows_are_refused_with_their_place_or_left_out(tmp_path):
    path = write(tmp_path / "bad.jsonl", [*rows(), {"messages": [{"role": "user", "content": "hello?"}]}])
    with pytest.raises(InputError, match=r"bad\.jsonl:4: has no assistant turn"):
        read_source(path)
    assert read_source(path, skip=True).dialogues == 3
    with pytest.raises(InputError, match="holds no dialogue to measure on"):
        read_source(write(tmp_path / "worse.jsonl", [{"messages": []}]), skip=True)


def test_a_model_is_named_with_its_prompt(model_file):
    path = str(model_file)
    assert System.parse(path).prompt is None
    assert System.parse(path, "flipped").prompt == FLIPPED
    assert System.parse(f"{path}@native", "flipped").prompt == NATIVE
    own = System.parse(f"{path}@native:People type short: a@b.c")
    assert own.prompt == AskPrompt(True, "People type short: a@b.c")
    assert evaluate.prompt_name(own.prompt) == "native:People type short: a@b.c"
    for wrong in ("nativ", "native:", "default:x", ""):
        with pytest.raises(UsageError, match="is no prompt"):
            evaluate.parse_prompt(wrong)
    with pytest.raises(ModelError):
        System.parse(f"{path}@nativ")


def test_perplexity_is_that_of_the_turns_tokens_and_what_closes_them(likelihood, talks):
    source = read_source(talks)
    turns, stops = ask_likelihood.score_places(likelihood, NATIVE, source.places)
    assert (len(turns), len(stops)) == (6, 6)
    score = next(score for score in turns if score.turn.text == TALKS["kettle"][2])
    tokens, start = likelihood.encode(score.turn.history, "user", score.turn.text)
    expected = likelihood.log_probs(tokens, start)
    assert score.nats == pytest.approx(-expected.sum(), rel=0.03)  # batches differ in the last bits
    assert (score.tokens, score.bytes) == (len(tokens) - start, len(TALKS["kettle"][2]))
    assert not any(score.shortened or score.cut for score in turns)
    figures = ask_likelihood.find_perplexity(turns, Resampling({source.name: source.groups}))
    assert figures["per_token"][0] == pytest.approx(
        math.exp(sum(score.nats for score in turns) / sum(score.tokens for score in turns))
    )
    assert min(figures["opening"][0], figures["follow_up"][0]) < figures["per_token"][0]
    assert max(figures["opening"][0], figures["follow_up"][0]) > figures["per_token"][0]
    assert 1 < figures["per_byte"][0] < figures["per_token"][0]


def test_long_turns_stand_apart_from_short_ones(likelihood, tmp_path):
    pasted = " ".join(["one two three four"] * 20)
    talks = [{"messages": messages("hi", "Hello!")}, {"messages": messages(pasted, "Counting?")}]
    path = write(tmp_path / "pasted.jsonl", talks)
    source = read_source(path)
    turns, _ = ask_likelihood.score_places(likelihood, NATIVE, source.places)
    figures = ask_likelihood.find_perplexity(turns, Resampling({source.name: source.groups}))
    short = next(score for score in turns if score.turn.text == "hi")
    assert figures["short"][0] == pytest.approx(math.exp(short.nats / short.tokens))
    assert figures["per_token"][0] != pytest.approx(figures["short"][0], rel=0.1)


def test_flipped_ask_ends_with_its_mark_and_writes_as_the_assistant(likelihood, talks):
    source = read_source(talks)
    native, _ = ask_likelihood.score_places(likelihood, NATIVE, source.places[:2])
    flipped, stops = ask_likelihood.score_places(likelihood, FLIPPED, source.places[:2])
    assert [score.tokens for score in flipped] == [score.tokens for score in native]
    assert [score.nats for score in flipped] != [score.nats for score in native]
    stop = stops[0].stop
    view = ask_view(Seed(""), stop.history, FLIPPED)
    with_mark = likelihood.log_probs(*likelihood.encode(view, "assistant", END_MARK)).sum()
    assert stops[0].log_prob >= with_mark - 0.1


def test_a_history_that_is_too_long_keeps_its_latest_exchanges(likelihood):
    exchange = [
        Message("user", "and one more?"),
        Message("assistant", "One more makes it " + "so " * 20 + "many."),
    ]
    history = tuple(exchange * 12)
    member = ("s", "g")
    turns = [Turn(member, 0, history[: 2 * count], "ok and after that") for count in range(1, 13)]
    views = []
    encode = likelihood.encode
    window = Window(likelihood, "user", lambda some: ask_view(Seed(""), some, NATIVE))
    firsts = []
    for turn in turns:
        views.append(window.view_of(turn.dialogue, turn.history, turn.text))
        firsts.append(window.first)
        assert len(encode(views[-1], "user", turn.text)[0]) <= likelihood.tokens
        assert views[-1] == list(turn.history[window.first :])
    assert firsts[0] == 0 < firsts[-1]
    assert len(set(firsts)) < len(firsts) / 2  # in leaps
    assert window.view_of(1, (), "hello") == []  # another dialogue


def test_what_fits_no_way_is_cut(likelihood):
    member, endless = ("s", "g"), "word " * 300
    long_answer = (Message("user", "tell me all"), Message("assistant", endless))
    places = [
        Turn(member, 0, (), endless),
        Turn(member, 1, long_answer, "shorter please"),
        Stop(member, 1, long_answer, ended=True),
    ]
    (opening, follow_up), stops = ask_likelihood.score_places(likelihood, NATIVE, places)
    assert opening.cut
    assert not opening.shortened
    assert opening.bytes < len(endless)
    assert opening.tokens < likelihood.tokens
    assert (follow_up.cut, follow_up.shortened, follow_up.bytes) == (False, True, len("shorter please"))
    assert len(stops) == 1


def test_ending_compares_real_ends_with_the_middle():
    members = [("s", str(number)) for number in range(20)]

    def auc(at_end, in_middle):
        scores = [StopScore(Stop(m, 0, (), True), math.log(at_end)) for m in members]
        scores += [StopScore(Stop(m, 0, (), False), math.log(in_middle)) for m in members]
        return readable(ask_likelihood.find_ending(scores, Resampling({"s": [name for _, name in members]})))

    assert auc(0.5, 0.1)["auc"]["value"] == 1
    assert auc(0.1, 0.5)["auc"]["value"] == 0
    level = auc(0.2, 0.2)
    assert level["auc"]["value"] == 0.5
    assert level["at_end"]["value"] == level["in_middle"]["value"] == pytest.approx(0.2)


def _turns(count, text="and how long does that take?"):
    history = (Message("user", "hello"), Message("assistant", "Good day."))
    return [Turn(("s", f"g{number}"), number, history, text) for number in range(count)]


def _resampling(turns):
    return Resampling({"s": [name for _, name in dict.fromkeys(turn.member for turn in turns)]})


def test_written_turns_are_described_and_stand_at_their_places():
    pytest.importorskip("sklearn")
    turns = _turns(8)
    script = ["Sure! Here is a list of ideas:", "", "ok and what does it cost?", "why", "[END]", "oh"]
    script += [Reply("cut off in the", "length"), Reply("", "context")]
    engine = ScriptedEngine(script)
    replies = asyncio.run(ask_writing.write_turns(Speaker(engine, prompt=NATIVE), turns, parallel=1))
    assert [reply.text for reply in replies[:2]] == script[:2]
    assert {request.next_role for request in engine.history} == {"user"}
    assert len({request.seed for request in engine.history}) == 8
    report = readable(ask_writing.describe_replies(turns, replies, _resampling(turns)))
    assert (report["places"], report["left_out"]) == (7, 1)
    values = {key: figure["value"] for key, figure in report.items() if isinstance(figure, dict)}
    assert values["wrong_role"] == pytest.approx(1 / 7, abs=1e-5)
    assert values["ends"] == pytest.approx(2 / 7, abs=1e-5)
    assert values["too_long"] == pytest.approx(1 / 7, abs=1e-5)
    assert values["questions"] == pytest.approx(1 / 5)
    assert values["words_mean"] == pytest.approx((7 + 6 + 1 + 1 + 4) / 5)
    assert values["words_median"] == 4
    assert report["distinct_1"] is None  # too few words to say


def test_a_flipped_ask_is_asked_as_the_assistant():
    engine = ScriptedEngine(["hm"])
    asyncio.run(ask_writing.write_turns(Speaker(engine, prompt=FLIPPED), _turns(1)))
    assert engine.history[0].next_role == "assistant"
    assert engine.history[0].messages[0].content == FLIPPED.system


def test_the_same_words_again_and_again_are_not_diverse():
    words = random.Random(0)
    varied = [" ".join(f"w{words.randrange(5000)}" for _ in range(20)) for _ in range(60)]
    members = [("s", str(number)) for number in range(60)]

    def distinct(texts):
        figures = ask_writing.describe_texts(texts, members, Resampling({"s": [name for _, name in members]}))
        return readable([figures["distinct_1"], figures["distinct_2"]])

    same, different = distinct(["and what about the rice"] * 60), distinct(varied)
    assert same[0]["value"] < 0.05 > same[1]["value"]
    assert different[0]["value"] > 0.9 < different[1]["value"]


def test_the_classifier_tells_what_differs_and_nothing_else():
    pytest.importorskip("sklearn")
    words = random.Random(1)

    def say(vocabulary):
        return " ".join(words.choice(vocabulary) for _ in range(8))

    people = ["ok", "so", "why", "does", "my", "cat", "sit", "on", "the", "stairs", "lol", "pls", "help"]
    machine = ["Furthermore", "it", "is", "important", "to", "consider", "various", "significant", "aspects"]
    turns = _turns(100)
    members, resampling = [turn.member for turn in turns], _resampling(turns)
    some, same, other = ([say(words) for _ in turns] for words in (people, people, machine))

    def auc(one, two, count=100):
        pairs = list(zip(one, two, strict=True))[:count]
        return readable(ask_writing.tell_apart(pairs, members[:count], resampling))

    assert auc(some, other)["value"] > 0.99
    alike = auc(some, same)
    assert 0.35 < alike["value"] < 0.65
    assert alike["low"] < 0.5 < alike["high"]
    assert auc(some, other, count=1) is None


def test_points_are_drawn_evenly_and_always_the_same(talks, tmp_path):
    many = [{"messages": messages(f"number {number}", "Yes.")} for number in range(50)]
    sources = [read_source(talks), read_source(write(tmp_path / "many.jsonl", many))]
    drawn = ask_writing.sample_turns(sources, 20)
    assert [sum(turn.member[0] == source.name for turn in drawn) for source in sources] == [6, 10]
    assert drawn == ask_writing.sample_turns(sources, 20)
    assert drawn != ask_writing.sample_turns(sources, 20, seed=1)


def test_simulated_dialogues_count_what_is_drawn_again():
    def script(request):
        if request.next_role == "assistant":
            return ["It depends.", "Mostly on the weather."][len(request.messages) // 2]
        said = [message.content for message in request.messages]
        if said[0] == "flip":
            return "Sure! Here are some ideas:"
        return "" if len(said) > 2 else "and then?"

    engine = ScriptedEngine(script)
    seeds = [Seed(name, (Message("user", name),)) for name in ("flip", "a", "b", "c")]
    speaker = Speaker(engine, prompt=NATIVE)
    report = readable(
        asyncio.run(ask_writing.simulate_dialogues(speaker, speaker, seeds, RunSettings(turns=4, parallel=2)))
    )
    assert report["dialogues"] == 4
    assert report["messages"] == 3 + 3 * 2
    assert report["wrong_role"]["value"] == pytest.approx(3 / 9, abs=1e-5)
    reasons = {reason: figure["value"] for reason, figure in report["stop_reasons"].items()}
    assert reasons == {"end": 0.75, "role_flip": 0.25}
    assert report["turns"]["value"] == pytest.approx((3 * 2 + 1) / 4)


def test_topics_open_sessions_of_their_own_and_flipped_chat_is_not_counted():
    def script(request):
        if not request.messages[0].content.startswith(FLIPPED.system):
            return "Of course! Look:"
        return "i think so" if len(request.messages) == 2 else "[END]"

    engine = ScriptedEngine(script)
    seeds = [Seed("a", topic="soup"), Seed("b", topic="rain")]
    report = asyncio.run(
        ask_writing.simulate_dialogues(
            Speaker(engine, prompt=FLIPPED), Speaker(engine), seeds, RunSettings(turns=4)
        )
    )
    assert (report["dialogues"], report["messages"], report["wrong_role"][0]) == (2, 4, 0)
    native = asyncio.run(
        ask_writing.simulate_dialogues(
            Speaker(ScriptedEngine(lambda r: r.next_role), prompt=NATIVE),
            Speaker(engine),
            seeds,
            RunSettings(turns=1),
        )
    )
    assert native["messages"] == 2


def test_the_report_has_all_systems_side_by_side(tmp_path, model_file, monkeypatch):
    pytest.importorskip("sklearn")
    names = ("kettle", "bike")
    talks = write(tmp_path / "talks.jsonl", [row for row in rows() if row["id"] in names])
    few = {"points": 2, "max-tokens": 4, "simulate": 1, "turns": 2, "threads": 1, "context": 512}
    systems = [f"{model_file}@native", f"{model_file}@flipped"]
    arguments = ["ask", *systems, "--data", talks, "--chat", str(model_file)]
    arguments += [f"--{option}={value}" for option, value in few.items()]
    reports = []
    measure = evaluate.evaluate_ask

    async def keep(*given, **named):
        reports.append(await measure(*given, **named))
        return reports[-1]

    monkeypatch.setattr(evaluate, "evaluate_ask", keep)
    table = CliRunner().invoke(group, arguments, catch_exceptions=False)
    [report] = reports
    report = json.loads(json.dumps(report, allow_nan=False))
    assert report["data"] == [{"name": "talks.jsonl", "dialogues": 2, "groups": 2, "turns": 3}]
    native, flipped = report["systems"]
    assert (native["prompt"], flipped["prompt"]) == ("native", "flipped")
    assert native["file"] == flipped["file"] == model_file.name
    assert native["perplexity"]["below_first"]["mean"] == {"value": 0, "low": 0, "high": 0}
    assert flipped["perplexity"]["below_first"]["mean"]["value"] == pytest.approx(
        1
        - flipped["perplexity"]["mean"]["per_token"]["value"]
        / native["perplexity"]["mean"]["per_token"]["value"],
        abs=1e-3,
    )
    for system in report["systems"]:
        per_token = system["perplexity"]["sources"]["talks.jsonl"]["per_token"]
        assert per_token["low"] <= per_token["value"] <= per_token["high"]
        assert system["perplexity"]["mean"]["per_token"] == per_token
        assert 0 <= system["ending"]["mean"]["auc"]["value"] <= 1
        assert system["turns"]["places"] == 2
        assert system["simulation"]["dialogues"] == 1
    assert "Perplexity per token" in table.stdout
    assert "mean of the files" in table.stdout
    assert "@flipped" in table.stdout


def test_an_endpoint_has_no_likelihoods(talks, monkeypatch):
    @contextlib.asynccontextmanager
    async def open_pair(one, other, load):
        engine = ScriptedEngine(lambda request: "hm, and why?", writes_any_role=False)
        yield engine, engine

    monkeypatch.setattr(evaluate, "open_pair", open_pair)
    pytest.importorskip("sklearn")
    systems = [System(RemoteModel("big", "http://localhost:1/v1"))]
    report = asyncio.run(evaluate.evaluate_ask(systems, [read_source(talks)], AskSettings(points=6)))
    [system] = report["systems"]
    assert (system["perplexity"], system["ending"], system["prompt"]) == (None, None, "flipped")
    assert system["file"] is None
    assert system["turns"]["places"] == 6


def test_the_embedded_model_is_measured_as_the_file_that_is_run(talks, tmp_path, monkeypatch):
    fastest, measured = tmp_path / "fastest.gguf", []

    async def keep(systems, sources, settings, *, chat, **named):
        measured.extend([*(system.model for system in systems), chat])
        return {}

    monkeypatch.setattr(options, "choose_file", lambda *given, **named: Choice(fastest, "F16", "it is"))
    monkeypatch.setattr(evaluate, "evaluate_ask", keep)
    arguments = [
        "ask",
        "smollm2@native",
        "http://localhost:1/v1#big",
        "--data",
        talks,
        "--simulate=1",
        "--json",
    ]
    CliRunner().invoke(group, arguments, catch_exceptions=False)
    base, endpoint, chat = measured
    assert base == LocalModel("smollm2", fastest)
    assert endpoint == RemoteModel("big", "http://localhost:1/v1", "big")
    assert chat.path == fastest


def test_without_scikit_learn_there_is_one_sentence(talks, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    source = read_source(talks)
    with pytest.raises(UsageError, match=r"needs scikit-learn; run pip install 'parrot-edge\[train\]'"):
        asyncio.run(evaluate.evaluate_ask([], [source], AskSettings()))
    with pytest.raises(UsageError, match="the same name"):
        asyncio.run(evaluate.evaluate_ask([], [source, source], AskSettings(points=0)))


def test_the_commands_defaults_are_the_settings_own():
    settings = AskSettings()
    defaults = {option.name: option.default for option in command.params}
    for name in ("points", "simulate", "turns", "context", "max_tokens", "parallel", "seed"):
        assert defaults[name] == getattr(settings, name), name


def test_a_paired_difference_is_narrower_than_what_it_is_made_of():
    random_ = np.random.default_rng(3)
    turns = _turns(40)
    hard = random_.uniform(10, 100, size=40)
    resampling = _resampling(turns)

    def perplexity(factor):
        scores = [
            TurnScore(turn, float(nats * factor), 10 + number % 7, 40, False, False)
            for number, (turn, nats) in enumerate(zip(turns, hard, strict=True))
        ]
        return {"sources": {"s": ask_likelihood.find_perplexity(scores, resampling)}}

    first, second = perplexity(1.0), perplexity(0.99)
    evaluate._compare_with_first([first, second])
    below = readable(second["below_first"]["mean"])
    alone = readable(first["sources"]["s"]["per_token"])
    assert (below["high"] - below["low"]) < 0.1 * (alone["high"] - alone["low"]) / alone["value"]
    assert below["low"] > 0


def test_a_local_model_keeps_its_adapter(embedded_model, tmp_path):
    adapter = tmp_path / "ask.gguf"
    adapter.write_bytes(b"GGUF")
    base = tmp_path / "base.gguf"
    base.symlink_to(embedded_model)
    model = System.parse(f"{base}+{adapter}@native").model
    assert isinstance(model, LocalModel)
    assert (model.path, model.adapter) == (base, adapter)
