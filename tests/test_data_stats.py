"""Statistics of dialogues. Every sentence was written for these tests."""

import json
import random
import tracemalloc
from itertools import product

import pytest
from click.testing import CliRunner

from parrot_edge.cli.stats import stats as command
from parrot_edge.data.diversity import find_distinct, find_mtld, find_rouge_l, find_self_rouge
from parrot_edge.data.stats import Mean, Sample, Statistics, compare_users, describe_file
from parrot_edge.dialogue import Message
from parrot_edge.errors import InputError, UsageError


def talk(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


ROWS = [
    {
        "id": "bread",
        "messages": talk(
            "how long does bread rise?",
            "Overnight.",
            "and if it is cold?",
            "Longer.",
            "Write a poem about owls.",
            "No.",
        ),
        "stop_reason": "turns",
    },
    {"id": "bike", "messages": talk("which tyre is best?", "That depends."), "stop_reason": "end"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_is_described(tmp_path):
    statistics, reader = describe_file(write(tmp_path / "talks.jsonl", ROWS))
    report = statistics.report()
    assert reader.sources[0].rows == report["dialogues"] == 2
    assert (report["user_messages"], report["assistant_messages"]) == (4, 4)
    assert report["turns"]["value"] == 2
    assert report["context_dependent"]["per_dialogue"]["value"] == 0.5
    assert report["context_dependent"]["share"] == report["topic_shifts"]["share"] == 0.5
    assert report["words"]["user_median"] == 5
    assert report["questions"]["how"] == report["questions"]["which"] == 0.25
    assert report["openings"]["distinct"] == 1
    assert report["stop_reasons"] == {"turns": 0.5, "end": 0.5}
    assert report["histograms"]["turns"] == {"1": 1, "3": 1}
    assert sum(report["histograms"]["user_words"].values()) == 4


def test_rouge_l_is_that_of_the_plain_recurrence():
    rng = random.Random(1)
    for _ in range(60):
        one, other = (rng.choices("abcde", k=rng.randint(1, 90)) for _ in range(2))
        table = {}
        for i, j in product(range(len(one)), range(len(other))):
            equal = table.get((i - 1, j - 1), 0) + 1 if one[i] == other[j] else 0
            table[i, j] = max(equal, table.get((i - 1, j), 0), table.get((i, j - 1), 0))
        longest = table[len(one) - 1, len(other) - 1]
        assert find_rouge_l(one, other) == pytest.approx(2 * longest / (len(one) + len(other)))


def test_a_dialogue_that_says_the_same_has_self_rouge_1():
    assert find_self_rouge([["what", "now"]] * 3) == 1
    assert find_self_rouge([["what", "now"], ["how", "far"]]) == 0
    assert find_self_rouge([["alone"]]) == find_rouge_l([], ["a"]) == 0


def test_mtld_is_higher_for_varied_text():
    varied, poor = [str(number) for number in range(200)], ["the", "cat", "sat"] * 66
    assert find_mtld(poor) < 10 < find_mtld(varied)
    assert find_mtld([]) == find_distinct([], 2) == 0


def test_a_mean_has_the_interval_of_a_normal_distribution():
    mean = Mean()
    for value in (1, 2, 3, 4):
        mean.add(value)
    figure = mean.figure()
    assert figure["value"] == 2.5
    assert figure["high"] - figure["value"] == pytest.approx(1.96 * (5 / 3 / 4) ** 0.5, rel=1e-5)
    assert Mean().figure() is None


def test_a_sample_does_not_grow_and_is_spread_over_the_stream():
    sample = Sample(size=50)
    for number in range(5000):
        if sample.wants(number):
            sample.add(number, number)
    drawn = sample.items()
    assert len(drawn) == len(set(drawn)) == 50
    assert min(drawn) < 1000 < 4000 < max(drawn)


def test_memory_does_not_grow_with_the_file():
    def peak(count):
        rng = random.Random(2)
        words = [f"word{number}" for number in range(500)]
        statistics = Statistics()
        tracemalloc.start()
        for number in range(count):
            said = [
                Message(role, f"{number} " + " ".join(rng.choices(words, k=12)))
                for role in ("user", "assistant")
            ]
            statistics.add(said)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(6000) < peak(3000) + 1_000_000  # a few bytes for each opening


def test_users_of_two_files_are_told_apart():
    pytest.importorskip("sklearn")
    loud, quiet = Statistics(), Statistics()
    for number in range(60):
        loud.add([Message("user", f"HEY!!! WHAT IS {number} TIMES {number * 7}???")])
        quiet.add([Message("user", f"please tell me about house number {number * 3}")])
    assert compare_users(loud, quiet)["value"] > 0.95
    assert compare_users(Statistics(), quiet) is None


def test_a_bad_row_is_named_or_left_out(tmp_path):
    path = write(tmp_path / "talks.jsonl", [ROWS[0], {"text": "no dialogue"}, ROWS[1]])
    with pytest.raises(InputError, match=r"talks\.jsonl:2: "):
        describe_file(path)
    statistics, reader = describe_file(path, skip=True)
    assert (statistics.dialogues, reader.skipped) == (2, 1)


def test_a_dialogue_that_nobody_answered_counts(tmp_path):
    rows = [{"messages": []}, {"messages": talk("hello?")}]
    report = describe_file(write(tmp_path / "talks.jsonl", rows))[0].report()
    assert report["histograms"]["turns"] == {"0": 1, "1": 1}


def test_an_empty_file_gives_a_sentence_and_an_empty_report(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    done = CliRunner().invoke(command, [empty, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    [report] = json.loads(done.stdout)["files"]
    assert (report["dialogues"], report["turns"], report["self_rouge"]) == (0, None, None)
    assert "holds no dialogue" in done.stderr
    assert CliRunner().invoke(command, [empty], catch_exceptions=False).exit_code == 0


def test_files_stand_side_by_side_with_plots(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    one, other = write(tmp_path / "one.jsonl", ROWS * 6), write(tmp_path / "other.jsonl", ROWS[1:] * 12)
    arguments = [one, "--against", other, "--plots", str(tmp_path / "plots")]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "one.jsonl" in done.stdout
    assert "other.jsonl" in done.stdout
    assert "told apart" in done.stdout
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 5
    again = CliRunner().invoke(command, arguments)
    assert "exists" in str(again.exception)


def test_a_message_is_scored_by_both_sides(embedded_model):
    from parrot_edge.data.role_likelihood import score_roles
    from parrot_edge.models import LocalModel, RemoteModel

    model = LocalModel("small", embedded_model)
    said = [Message("user", "hi, i need a name for my cat"), Message("assistant", "How about Moritz?")]
    asked, answered = score_roles(
        model,
        model,
        [(said, "hm no, what else?"), (said, "Sure! Here are some names for a cat: Felix, Luna and Tiger.")],
        threads=1,
    )
    assert asked > answered
    with pytest.raises(UsageError, match="tells no likelihoods"):
        score_roles(model, RemoteModel("big", "http://localhost:1/v1"), [])


def test_models_are_asked_in_pairs(tmp_path):
    done = CliRunner().invoke(command, [write(tmp_path / "talks.jsonl", ROWS), "--ask", "ask"])
    assert "go together" in str(done.exception)
