"""Every sentence in here was written for these tests."""

import asyncio
import contextlib
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from parrot_edge.cli.evaluate import evaluate as group
from parrot_edge.cli.evaluate_chat import chat as command
from parrot_edge.dialogue import Message
from parrot_edge.engine.base import Reply
from parrot_edge.engine.likelihood import Likelihood
from parrot_edge.engine.scripted import ScriptedEngine
from parrot_edge.errors import InputError, ParrotError, UsageError
from parrot_edge.evaluate import chat as evaluate
from parrot_edge.evaluate import history, recall
from parrot_edge.evaluate.benchmark import (
    AnswerFile,
    Question,
    answer_questions,
    count_unanswered,
    identify_model,
    read_questions,
)
from parrot_edge.evaluate.chat import Benchmark, ChatSettings
from parrot_edge.evaluate.curves import draw_curves
from parrot_edge.evaluate.history import AnswerScore
from parrot_edge.evaluate.judge import (
    compare_answers,
    describe_grades,
    describe_verdicts,
    grade_answers,
    pair_prompt,
    single_prompt,
)
from parrot_edge.evaluate.sources import Answer, read_source, resample
from parrot_edge.figures import Resampling, readable
from parrot_edge.models import LocalModel, RemoteModel

TALKS = [
    [
        "My neighbor Bernard has a goat that eats my tulips. What can I do?",
        "Talk to Bernard first, and offer to mend the fence so that the goat stays away from the tulips.",
        "How do I put that to him?",
        "You could say: Bernard, your goat has been eating my tulips. Shall we mend the fence together?",
    ],
    [
        "I am building a kayak out of cedar strips.",
        "Cedar is a good choice for a kayak, as the strips are light and bend easily.",
        "How do I keep the water out?",
        "Cover the cedar strips of the kayak with fiberglass cloth and epoxy, inside and outside.",
    ],
    [
        "Our choir sings in a cold church every Sunday.",
        "A cold church makes the voices of a choir tired, so warm them up before the service.",
        "What else?",
        "Let the choir wear scarves, and ask the church to turn the heating on an hour before you sing.",
    ],
]


def messages(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def talks(tmp_path):
    return write(tmp_path / "talks.jsonl", [{"messages": messages(*talk)} for talk in TALKS])


@pytest.fixture(scope="module")
def likelihood(embedded_model):
    with Likelihood(embedded_model, tokens=512, threads=1) as opened:
        yield opened


# What the history is worth


def test_answers_are_told_with_their_turn_and_those_of_branches_once(tmp_path):
    branches = [
        {"tree": "t", "messages": messages("hi", "Hello.", "who is there", "Me.")},
        {"tree": "t", "messages": messages("hi", "Hello.", "how are you", "Fine.")},
    ]
    source = read_source(write(tmp_path / "tree.jsonl", branches))
    assert [(answer.text, answer.number) for answer in source.answers] == [
        ("Hello.", 1),
        ("Me.", 2),
        ("Fine.", 2),
    ]
    assert source.answers[1].history[-1] == Message("user", "who is there")


def test_a_real_model_gains_from_the_history_and_from_no_other(likelihood, talks):
    source = read_source(talks)
    steps = []
    scores = history.score_answers(likelihood, source.answers, lambda *step: steps.append(step))
    assert steps[-1] == (12, 12)
    figures = readable(history.describe_scores(scores, resample([source])))
    assert figures["gain"]["low"] > 0.1
    assert figures["gain_over_another"]["low"] > 0.1
    assert figures["by_turn"]["1"]["gain"] is None
    assert figures["by_turn"]["2"] == {
        key: figures[key] for key in ("per_token", "gain", "gain_over_another")
    }
    for score in scores:
        first = score.answer.number == 1
        assert math.isnan(score.alone) == math.isnan(score.another) == first
        assert (score.bytes, score.shortened, score.cut) == (len(score.answer.text), False, False)


def test_all_histories_are_measured_on_the_same_tokens_also_of_a_long_answer(likelihood):
    endless = "and then it goes on " * 60
    answers = [
        Answer(("s", str(number)), number, tuple(Message(*each) for each in said), endless)
        for number in range(2)
        for said in [[("user", f"{number} " + "word " * 500), ("assistant", "Yes."), ("user", "go on")]]
    ]
    scores = history.score_answers(likelihood, answers)
    assert all(score.cut and score.shortened for score in scores)
    assert all(score.tokens <= likelihood.tokens // 4 for score in scores)
    # What is left of the history is its latest message: the same as it alone
    assert all(score.all == pytest.approx(score.alone, rel=0.05) for score in scores)


def test_an_endless_system_message_leaves_room_for_the_rest(likelihood):
    said = (Message("system", "be kind " * 500), Message("user", "word " * 500))
    scores = history.score_answers(likelihood, [Answer(("s", "a"), 0, said, "Yes.")])
    assert scores[0].tokens == 3


def test_each_dialogue_gets_the_history_of_another_group():
    def answer(dialogue, group, number):
        turns = [Message(("user", "assistant")[at % 2], f"{dialogue} {at}") for at in range(2 * number - 1)]
        return Answer(("s", group), dialogue, tuple(turns), "Yes.")

    answers = [answer(0, "a", 1), answer(0, "a", 2), answer(1, "a", 2), answer(2, "b", 2), answer(2, "b", 3)]
    cases = history._find_others(answers)
    said = [[message.content for message in case.history] if case else None for case in cases]
    assert said == [
        None,
        ["2 0", "2 1", "0 2"],
        ["2 0", "2 1", "1 2"],
        ["0 0", "0 1", "2 2"],
        ["0 0", "0 1", "2 4"],
    ]
    assert history._find_others(answers[:3]) == [None] * 3


def test_a_better_model_is_better_than_the_first_beyond_chance():
    random = np.random.default_rng(1)
    members = [("s", str(number)) for number in range(60)]
    resampling = Resampling({"s": [name for _, name in members]})
    costs = random.uniform(20, 60, 60)

    def report(factor):
        said = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
        scores = [
            AnswerScore(
                Answer(member, 0, said, "d"), cost * factor, cost + 10, math.nan, 10, 40, False, False
            )
            for member, cost in zip(members, costs, strict=True)
        ]
        return {"sources": {"s": history.describe_scores(scores, resampling)}}

    first, second = report(1.0), report(0.9)
    evaluate._compare_histories([first, second])
    against = readable(second["against_first"]["mean"])
    assert against["perplexity_below"]["low"] > 0.2
    assert against["gain_above"]["low"] > 0.2
    assert against["gain_over_another_above"] is None
    assert readable(first["against_first"]["mean"]["gain_above"]) == {"value": 0, "low": 0, "high": 0}


# Recall


def test_probes_tell_every_value_before_one_comes_again():
    probes = recall.make_probes(96)
    assert len({(probe.fact.question, probe.told) for probe in probes}) == 96
    assert {len(fact.values) for fact in recall.FACTS} == {8}
    assert [p.told for p in probes] == [p.told for p in recall.make_probes(96)]
    assert [p.told for p in probes] != [p.told for p in recall.make_probes(96, seed=1)]


def test_a_value_is_told_once_and_asked_for_in_the_right_turn():
    for probe in recall.make_probes(96):
        for turn in recall.ASKED_IN:
            said = probe.dialogue(turn)
            assert [message.role for message in said] == (["user", "assistant"] * turn)[:-1]
            assert sum(probe.told in message.content for message in said) == 1
            assert probe.told in said[0].content
            rest = " ".join(message.content for message in said[1:])
            assert not any(
                probe.is_said(f"{value} {rest}") for value in probe.fact.values[1:] if value in rest
            )
        fillers = " ".join(text for filler in recall.FILLERS for text in filler)
        assert not any(f" {value} ".lower() in fillers.lower() for value in probe.fact.values)


def test_only_the_told_value_alone_is_right():
    probe = recall.make_probes(1)[0]
    rival = next(value for value in probe.fact.values if value != probe.told)
    assert probe.is_said(f"Your name is {probe.told.upper()}!")
    assert not probe.is_said(f"Either {probe.told} or {rival}.")
    assert not probe.is_said(f"{probe.told}ella")
    assert not probe.is_said("I do not know.")


def test_said_values_are_counted_by_turn():
    def script(request):
        told = request.messages[0].content.split()[-6].strip(".")
        return f"It is {told}." if len(request.messages) < 9 else "I forgot."

    probes = recall.make_probes(24)
    outcomes = asyncio.run(recall.answer_probes(ScriptedEngine(script), probes, parallel=4))
    report = readable(recall.describe_recall(probes, outcomes))
    values = {turn: figure["value"] for turn, figure in report["by_turn"].items()}
    assert values == {"2": 1, "5": 0, "8": 0}
    assert report["by_turn"]["8"]["high"] > 0.1  # twelve facts do not prove that none is recalled


def test_a_real_model_chooses_what_it_was_told(likelihood):
    outcomes = recall.choose_values(likelihood, recall.make_probes(3))
    assert {turn: len(right) for turn, right in outcomes.items()} == {2: 3, 5: 3, 8: 3}
    assert sum(map(sum, outcomes.values())) >= 5  # of 9; about one by chance


# Questions and answers

KETTLE = Question(81, "writing", ("How do I descale a kettle?", "Shorter, please."), ("With vinegar.", None))
TEA = Question("tea", None, ("What is tea?",), (None,))


def test_questions_are_read_in_the_format_of_mt_bench(tmp_path):
    rows = [
        {
            "question_id": 81,
            "category": "writing",
            "turns": list(KETTLE.turns),
            "reference": ["With vinegar."],
        },
        {"question_id": "tea", "turns": ["What is tea?"], "reference": None},
    ]
    assert read_questions(write(tmp_path / "questions.jsonl", rows)) == [KETTLE, TEA]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": messages("hi", "Hello.")}, 'has no "question_id"'),
        ({"question_id": 1}, '"turns" must be a list'),
        ({"question_id": 1, "turns": []}, '"turns" must be a list'),
        ({"question_id": 1, "turns": ["a", " "]}, '"turns" must be a list'),
        ({"question_id": 1, "turns": ["a"], "reference": "b"}, '"reference" must be a list'),
        ({"question_id": 1, "turns": ["a"], "category": 3}, '"category" must be a text'),
        ({"question_id": 0, "turns": ["a"]}, "comes a second time"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(row, reason, tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"question_id": 0, "turns": ["fine"]}, row])
    with pytest.raises(InputError, match=r"bad\.jsonl:2: ") as caught:
        read_questions(path)
    assert reason in str(caught.value)
    with pytest.raises(InputError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl", []))


def test_questions_are_answered_turn_by_turn():
    engine = ScriptedEngine(lambda request: f" {len(request.messages)} ")
    answers = asyncio.run(answer_questions(engine, [KETTLE, TEA], model=("m", "1")))
    assert answers == {81: ["1", "3"], "tea": ["1"]}
    longest = max((request.messages for request in engine.history), key=len)
    assert [message.content for message in longest] == [KETTLE.turns[0], "1", KETTLE.turns[1]]
    assert {request.sampling.temperature for request in engine.history} == {0}


def test_a_full_context_leaves_the_rest_unanswered():
    engine = ScriptedEngine(["Fine.", Reply("", "context")])
    answers = asyncio.run(answer_questions(engine, [KETTLE], model=("m", "1")))
    assert answers == {81: ["Fine.", ""]}
    assert count_unanswered(answers) == 1


def test_kept_answers_are_not_made_again(tmp_path):
    path = tmp_path / "answers.jsonl"

    def run(script, **changed):
        given = {"model": ("m", "1"), "max_tokens": 9, "questions": [KETTLE, TEA], **changed}
        engine = ScriptedEngine(script)
        with contextlib.closing(AnswerFile(path)) as kept:
            answers = asyncio.run(answer_questions(engine, kept=kept, parallel=1, **given))
        return answers, len(engine.history)

    with pytest.raises(ParrotError, match="only 2 replies"):
        run(["a", "b"])  # stopped after the first question
    assert run(["c"]) == ({81: ["a", "b"], "tea": ["c"]}, 1)
    assert run([]) == ({81: ["a", "b"], "tea": ["c"]}, 0)
    row = json.loads(path.read_text().splitlines()[0])
    assert row["choices"] == [{"index": 0, "turns": ["a", "b"]}]
    assert (row["question_id"], row["model_id"]) == (81, "m")
    assert run(["x", "y", "z"], model=("other", "2"))[1] == 3
    other = Question("tea", None, ("What is coffee?",), (None,))
    for changed in ({"model": ("m", "2")}, {"max_tokens": 8}, {"questions": [other]}):
        with pytest.raises(InputError, match=r"answers\.jsonl:\d: m answered this under other conditions"):
            run([], **changed)


def test_answers_of_other_programs_are_taken_as_they_are(tmp_path):
    rows = [{"question_id": 81, "model_id": "big", "choices": [{"index": 0, "turns": ["a", ""]}]}]
    with contextlib.closing(AnswerFile(path := tmp_path / "answers.jsonl")) as kept:
        assert kept.find(KETTLE, "big", "x") is None
    assert not path.exists()  # nothing was written
    write(path, rows)
    with contextlib.closing(AnswerFile(path)) as kept:
        assert kept.find(KETTLE, "big", "x") == ["a", ""]
    write(path, [{"id": 1, "messages": []}])
    with pytest.raises(InputError, match=r"answers\.jsonl:1: has no \"choices\""):
        AnswerFile(path)


def test_a_model_is_identified_by_its_files(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (identify_model(LocalModel("m", tmp_path / name)) for name in "abc")
    assert a == b != c
    assert identify_model(RemoteModel("m", "http://x/v1", "m")) == "http://x/v1#m"


# The judge


def test_the_judge_sees_what_it_needs_and_nothing_later():
    first = single_prompt(KETTLE, ["Use lemon.", "Lemon."], 0)
    assert "With vinegar." in first
    assert "Use lemon." in first
    assert "Shorter" not in first
    second = single_prompt(KETTLE, ["Use lemon.", "Lemon."], 1)
    assert second.index("Use lemon.") < second.index("Shorter, please.") < second.index("\nLemon.")
    assert "reference" not in second
    both = pair_prompt(KETTLE, ["Use lemon."], ["Buy one."], 0)
    assert both.index("Use lemon.") < both.index("Buy one.") < both.index("With vinegar.")


def test_grades_are_averaged_by_turn_and_category():
    grades = {"With lemon.": "Good. [[8]]", "Lemon.": "Hm, [[4]]", "A leaf.": "I would not say."}
    engine = ScriptedEngine(
        lambda request: next(g for a, g in grades.items() if f"\n{a}\n" in request.messages[0].content)
    )
    questions = [KETTLE, TEA]
    answers = {81: ["With lemon.", "Lemon."], "tea": ["A leaf."]}
    table = asyncio.run(grade_answers(engine, questions, answers))
    assert table == [[8, 4], [None]]
    assert {request.sampling.temperature for request in engine.history} == {0}
    report = readable(describe_grades(questions, table))
    assert (report["graded"], report["no_verdict"]) == (2, 1)
    assert report["mean"]["value"] == 6
    assert {turn: figure["value"] for turn, figure in report["by_turn"].items()} == {"1": 8, "2": 4}
    assert report["by_category"]["writing"]["value"] == 6


def test_a_missing_answer_gets_the_worst_grade_without_a_look():
    engine = ScriptedEngine(["[[9]]"])
    assert asyncio.run(grade_answers(engine, [KETTLE], {81: ["Fine.", ""]})) == [[9, 1]]
    verdicts = asyncio.run(compare_answers(ScriptedEngine([]), [TEA], {"tea": [""]}, {"tea": ["A leaf."]}))
    assert verdicts == [[("loss", "loss")]]


def test_an_answer_wins_only_where_both_orders_agree():
    turns = tuple(f"{name}?" for name in ("win", "loss", "tie", "first", "second", "half", "mute"))
    question = Question(1, None, turns, (None,) * len(turns))
    said = {
        "win": ("[[A]]", "[[B]]"), "loss": ("[[B]]", "[[A]]"), "tie": ("[[C]]", "[[C]]"),
        "first": ("[[A]]", "[[A]]"), "second": ("[[B]]", "[[B]]"), "half": ("[[A]]", "[[C]]"),
        "mute": ("[[A]]", "who knows"),
    }  # fmt: skip

    def script(request):
        text = request.messages[0].content
        name = text.rpartition("?\n\nAssistant")[0].rpartition(" ")[2]
        return said[name][text.index("Assistant: own") > text.index("Assistant: other")]

    own, other = {1: ["own"] * len(turns)}, {1: ["other"] * len(turns)}
    verdicts = asyncio.run(compare_answers(ScriptedEngine(script), [question], own, other))
    assert verdicts == [
        [
            ("win", "win"),
            ("loss", "loss"),
            ("tie", "tie"),
            ("win", "loss"),
            ("loss", "win"),
            ("win", "tie"),
            None,
        ]
    ]
    report = readable(describe_verdicts([question], verdicts))
    assert {key: report[key]["value"] for key in ("win", "tie", "loss", "disagree")} == pytest.approx(
        {"win": 1 / 6, "tie": 4 / 6, "loss": 1 / 6, "disagree": 3 / 6}, abs=1e-5
    )
    assert (report["compared"], report["no_verdict"]) == (6, 1)
    assert [each["win"] and each["win"]["value"] for each in report["by_turn"].values()] == [
        1,
        0,
        0,
        0,
        0,
        0,
        None,
    ]


# All of it


@pytest.fixture
def scripted_models(monkeypatch):
    """Endpoints "good", "bad" and "judge" that are not there: the judge likes what "good" says."""

    def reply(name):
        def script(request):
            text = request.messages[-1].content
            if name == "mute":
                return "I would rather not say."
            if name != "judge":
                return f"{name} answer {len(request.messages)}"
            if "You compare" in text:
                return "[[A]]" if text.index("good answer 1") < text.index("bad answer 1") else "[[B]]"
            return "[[8]]" if "good answer" in text else "[[3]]"

        return script

    @contextlib.asynccontextmanager
    async def open_pair(one, other, load):
        engine = ScriptedEngine(reply(one.name), writes_any_role=False)
        yield engine, engine

    monkeypatch.setattr(evaluate, "open_pair", open_pair)
    return {name: f"http://localhost:1/v1#{name}" for name in ("good", "bad", "judge", "mute")}


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"question_id": number, "category": "abc"[number % 3], "turns": [f"What is {number}?", "And why?"]}
        for number in range(6)
    ]
    return write(tmp_path / "questions.jsonl", rows)


def run(*arguments):
    return CliRunner().invoke(group, ["chat", *map(str, arguments)], catch_exceptions=False)


def test_models_are_judged_side_by_side(scripted_models, questions, tmp_path):
    answers, plots = tmp_path / "answers.jsonl", tmp_path / "plots"
    arguments = [scripted_models["bad"], scripted_models["good"], "--questions", questions, "--probes", 0]
    arguments += ["--judge", scripted_models["judge"], "--answers", answers]
    done = run(*arguments, "--json")
    report = json.loads(done.stdout)
    assert report["benchmark"] == {"questions": 6, "judge": "judge", "max_tokens": 512}
    bad, good = (each["benchmark"] for each in report["models"])
    assert [bad["grades"]["mean"]["value"], good["grades"]["mean"]["value"]] == [3, 8]
    assert good["grades"]["above_first"] == {"value": 5, "low": 5, "high": 5}
    assert bad["against_first"] is None
    assert good["against_first"]["win"]["value"] == 1
    assert good["against_first"]["disagree"]["value"] == 0
    assert len(answers.read_text().splitlines()) == 12
    table = run(*arguments, "--plots", plots)
    assert "Grade, by turn" in table.stdout
    with pytest.raises(ParrotError, match=r"grades\.svg exists"):
        run(scripted_models["mute"], "--probes", 1, "--plots", plots)  # before anything is measured
    assert sorted(path.name for path in plots.iterdir()) == ["grades.svg", "wins.svg"]
    assert len(answers.read_text().splitlines()) == 12


def test_a_judge_that_never_says_a_verdict_is_told(scripted_models, questions):
    done = run(
        scripted_models["good"],
        "--questions",
        questions,
        "--judge",
        scripted_models["mute"],
        "--probes",
        0,
        "--json",
    )
    assert "mute gave no verdict in 12 of 12 answers of good; they are left out" in done.stderr
    assert json.loads(done.stdout)["models"][0]["benchmark"]["grades"]["mean"] is None


def test_an_endpoint_recalls_but_tells_no_likelihoods(scripted_models, talks):
    done = run(scripted_models["good"], "--probes", 12, "--json")
    [model] = json.loads(done.stdout)["models"]
    assert (model["history"], model["recall"]["chosen"], model["benchmark"]) == (None, None, None)
    assert model["recall"]["said"]["mean"]["value"] == 0
    with pytest.raises(UsageError, match="tells no likelihoods"):
        run(scripted_models["good"], "--data", talks)


def test_arguments_that_mean_nothing_are_refused(scripted_models, questions, tmp_path):
    good = scripted_models["good"]
    for arguments, reason in (
        (["--probes", 0], "nothing to measure"),
        (["--questions", questions], "needs --judge"),
        (["--judge", good], "need --questions"),
        (["--force"], "needs --plots"),
        (["--questions", questions, "--answers", questions], "read and written at once"),
    ):
        with pytest.raises(UsageError, match=reason):
            run(good, *arguments)
    same = [good, good.replace("localhost", "127.0.0.1"), "--questions", questions, "--probes", 0]
    with pytest.raises(UsageError, match="two MODELs have the same name"):
        run(*same, "--answers", tmp_path / "answers.jsonl")


def test_a_local_model_is_measured_on_all_but_the_judge(model_file, talks):
    done = run(
        model_file,
        "--data",
        talks,
        "--probes",
        1,
        "--threads",
        1,
        "--context",
        512,
        "--parallel",
        2,
        "--json",
    )
    report = json.loads(done.stdout)
    assert report["data"] == [{"name": "talks.jsonl", "dialogues": 3, "groups": 3, "answers": 6}]
    assert report["recall"] == {"facts": 12, "chance": 0.125}
    [model] = report["models"]
    assert model["history"]["mean"]["gain"] == model["history"]["sources"]["talks.jsonl"]["gain"]
    assert model["history"]["against_first"]["mean"]["perplexity_below"]["value"] == 0
    assert (
        set(model["recall"]["chosen"]["by_turn"])
        == set(model["recall"]["said"]["by_turn"])
        == {"2", "5", "8"}
    )


def test_plots_are_drawn_of_what_there_is(tmp_path):
    figure = {"value": 0.5, "low": 0.4, "high": 0.7}
    history_ = {
        "mean": {
            "by_turn": {"1": {"per_token": figure, "gain": None}, "2": {"per_token": figure, "gain": figure}}
        }
    }
    report = {"models": [{"model": "m", "history": history_, "recall": None, "benchmark": None}]}
    paths = draw_curves(report, tmp_path / "plots")
    assert [path.name for path in paths] == ["perplexity.svg", "gain.svg"]
    assert paths[0].read_text().lstrip().startswith("<?xml")
    with pytest.raises(ParrotError, match="exists"):
        draw_curves(report, tmp_path / "plots")


def test_the_commands_defaults_are_the_settings_own():
    defaults = {option.name: option.default for option in command.params}
    for name in ("probes", "context", "parallel", "seed"):
        assert defaults[name] == getattr(ChatSettings(), name), name
    assert defaults["max_tokens"] == Benchmark(()).max_tokens
