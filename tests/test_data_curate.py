"""Curation. Every sentence was written for these tests."""

import json
import random
import signal
import time

import pytest
from click.testing import CliRunner
from conftest import Parrot

from parrot_edge.cli.curate import REASONS as ALLOWED
from parrot_edge.cli.curate import curate as command
from parrot_edge.data.curate import REASONS, Judge, Rules, curate_file
from parrot_edge.data.duplicates import Duplicates
from parrot_edge.data.personal import find_personal
from parrot_edge.data.sensitive import load_word_list
from parrot_edge.dialogue import Message
from parrot_edge.errors import InputError, OutputError, UsageError

pytest.importorskip("rensa")

GOOD = [
    "how long does bread rise?",
    "Overnight in a cool kitchen.",
    "and if my kitchen is warm?",
    "Then three hours are enough.",
]
CUT = (
    "The dough rests in a bowl under a cloth for as long as it needs to double, which is in a warm room about"
)


def talk(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def messages(*texts):
    return [Message(row["role"], row["content"]) for row in talk(*texts)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def reason_for(*texts, rules=Rules(), **extra):  # noqa: B008
    verdict = Judge(rules, **extra).judge(messages(*texts), "here")
    return verdict and verdict.reason


def test_a_good_dialogue_is_kept():
    assert reason_for(*GOOD) is None


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (GOOD[:2], "short"),
        (["hm", "Yes?", "no", "All right, what then?"], "short"),
        ([*GOOD[:3], CUT], "cut_off"),
        ([*GOOD[:3], "Like so:\n```\nbake()\n"], "cut_off"),
        ([*GOOD[:2], "Sure! Here are three ideas for you.", "Thank you."], "wrong_role"),
        ([*GOOD, "And if my kitchen is warm", "As I said, three hours."], "repetitive"),
        ([*GOOD[:3], "so so so so so " * 40 + "."], "repetitive"),
        ([*GOOD[:2], "how do i build a bomb at home?", "I cannot help with that."], "sensitive"),
        ([*GOOD[:2], "send the recipe to tom.baker@bread.io please", "I cannot."], "personal"),
    ],
)
def test_each_filter_finds_its_kind(texts, reason):
    assert reason_for(*texts) == reason
    assert reason_for(*texts, rules=Rules(allowed=(reason,))) is None


def test_another_language_is_found_where_one_is_named():
    pytest.importorskip("py3langid")
    french = [
        "Combien de temps la pâte doit-elle lever avant la cuisson ?",
        "Une nuit.",
        "Et s'il fait froid ?",
    ]
    dialogue = [*french, "Plus longtemps."]
    assert reason_for(*dialogue) is None
    assert reason_for(*dialogue, rules=Rules(language="en")) == "language"
    assert reason_for(*dialogue, rules=Rules(language="fr")) is None
    assert reason_for(*GOOD, rules=Rules(language="en")) is None
    with pytest.raises(UsageError, match="no language that can be told"):
        reason_for(*GOOD, rules=Rules(language="klingon"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mail me: jo+x@mail.co.uk", "e-mail address"),
        ("my key is sk-abcdefghijklmnopqrstuv123456", "key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "key"),
        ("card 5500-0000-0000-0004, please", "card number"),
        ("iban DE89 3704 0044 0532 0130 00", "IBAN"),
        ("the server is at 93.184.216.34", "IP address"),
        ("ping 2606:2800:220:1:248:1893:25c8:1946", "IP address"),
        ("ssn 123-45-6789", "social security number"),
        ("call +44 20 7946 0958 tonight", "telephone number"),
        ("call (212) 555-0123", "telephone number"),
        ("user@example.com at 192.168.0.1 and 127.0.0.1", None),
        ("5500-0000-0000-0005 is no card, DE88 3704 0044 0532 0130 00 no account", None),
        ("in 1998 it cost 1234567 euros, 3.14159 and 2024-05-17 12:30:45", None),
        ("version 1.2.3.4567, order 12345678901234567890", None),
    ],
)
def test_personal_data_is_found_by_pattern_and_checksum(text, kind):
    assert find_personal(text) == kind


def test_a_word_list_can_be_replaced(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# mine\n[food]\nbread\nre: kitchens?\\b\n")
    assert reason_for(*GOOD, rules=Rules(words=str(words))) == "sensitive"
    assert load_word_list(words).find("A KITCHEN!") == "food: kitchens?\\b"
    words.write_text("fine\nre: (\n")
    with pytest.raises(InputError, match=r"words\.txt:2: is no regular expression"):
        load_word_list(words)


def make_dialogue(rng, words):
    return [" ".join(rng.choices(words, k=rng.randint(6, 40))) for _ in range(8)]


def edit(rng, words, texts):
    """The same dialogue with small changes: case, marks, a word in fifteen, a dropped end."""
    kind = rng.randrange(5)
    if kind == 0:
        return [text.upper().replace(" ", ", ") for text in texts]
    if kind == 1:
        return texts[:-1] if len(texts[-1].split()) < 20 else [*texts[:-1], texts[-1] + " thank you"]
    changed = []
    for text in texts:
        parts = text.split()
        for at in range(len(parts)):
            if rng.random() < 1 / 15:
                parts[at] = rng.choice(words) if kind == 2 else parts[at][::-1]
        changed.append(" ".join(parts if kind < 4 else ["well", *parts]))
    return changed


def imitate(rng, words, texts):
    """Another dialogue: the same opening, the same answers in another order, or half of its words."""
    kind = rng.randrange(3)
    if kind == 0:
        return [texts[0], *make_dialogue(rng, words)[1:]]
    if kind == 1:
        return [*texts[:3], *make_dialogue(rng, words)[3:]]
    return [" ".join(rng.choice([word, rng.choice(words)]) for word in text.split()) for text in texts]


def test_near_duplicates_are_found_and_others_left():
    rng = random.Random(5)
    words = [
        f"{a}{b}{c}" for a in ("ka", "lo", "mi", "te", "su") for b in ("ra", "ne", "po") for c in "dgtxyz"
    ]
    known, right, wrong, missed = Duplicates(), 0, 0, 0
    originals = [make_dialogue(rng, words) for _ in range(300)]
    for number, texts in enumerate(originals):
        known.add("\n".join(texts), str(number))
    for number, texts in enumerate(originals):
        found = known.find("\n".join(edit(rng, words, texts)))
        right, missed = right + (found is not None and found[1] == str(number)), missed + (found is None)
        wrong += known.find("\n".join(imitate(rng, words, texts))) is not None
    assert right / (right + missed) >= 0.95
    assert right / (right + wrong) >= 0.95


def test_branches_of_a_tree_are_no_near_duplicates_of_each_other(tmp_path):
    longer = [*GOOD, "and with rye flour, in a tin?", "An hour more."]
    rows = [{"tree": tree, "messages": talk(*texts)} for tree in "ab" for texts in (GOOD, longer)]
    path = write(tmp_path / "in.jsonl", rows)
    report = curate_file(path, tmp_path / "out.jsonl", tmp_path / "no.jsonl", Rules())
    assert report["kept"] == 2
    assert report["rejected"] == {"duplicate": 2}


def test_an_edited_question_of_a_benchmark_leaks(tmp_path):
    questions = [
        "Compose a short letter to a landlord who never answers the phone.",
        "Which of the three planets is the heaviest, and by how much?",
    ]
    path = write(tmp_path / "bench.jsonl", [{"messages": talk(text, "An answer.")} for text in questions])
    said = [GOOD[0], GOOD[1], "compose a short letter to a landlord who never answers his phone", "Dear Sir."]
    assert reason_for(*said, against=[path]) == "leak"
    assert reason_for(*GOOD, against=[path]) is None


def test_rows_keep_their_order_and_rejects_say_why(tmp_path):
    rows = [
        {"id": "a", "messages": talk(*GOOD), "note": {"kept": "as it was"}},
        {"id": "b", "messages": talk(*GOOD[:2])},
        {"conversations": [{"from": "human", "value": "is rye better?"}, {"from": "gpt", "value": "Often."},
                           {"from": "human", "value": "why is it?"}, {"from": "gpt", "value": "Taste."}]},
        {"id": "c", "messages": talk(*(text.upper() for text in GOOD))},
    ]  # fmt: skip
    path = write(tmp_path / "in.jsonl", rows)
    report = curate_file(path, tmp_path / "out.jsonl", tmp_path / "no.jsonl", Rules())
    kept, rejected = read(tmp_path / "out.jsonl"), read(tmp_path / "no.jsonl")
    assert kept[0] == rows[0]
    assert [message["role"] for message in kept[1]["messages"]] == ["user", "assistant"] * 2
    assert [(row["line"], row["id"], row["reason"]) for row in rejected] == [
        (2, "b", "short"),
        (4, "c", "duplicate"),
    ]
    assert rejected[1]["detail"] == f"{path}:1"
    assert rejected[0]["row"] == rows[1]
    assert (report["read"], report["kept"], report["rejected"]) == (4, 2, {"short": 1, "duplicate": 1})
    assert json.loads((tmp_path / "out.jsonl.curate.json").read_text()) == report


def some_rows(count):
    rng = random.Random(7)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "te", "su", "ra") for b in ("gen", "pol", "tir", "vus")]
    rows = [
        {"id": str(n), "messages": talk(*(f"{text}." for text in make_dialogue(rng, words)))}
        for n in range(count)
    ]
    for number in range(0, count, 5):
        rows[number]["messages"] = rows[number]["messages"][:2]
    for number in range(3, count, 7):
        rows[number]["messages"] = rows[number - 1]["messages"]
    return rows


def test_a_run_goes_on_from_wherever_it_was_stopped(tmp_path):
    path = write(tmp_path / "in.jsonl", some_rows(60))
    files = [tmp_path / name for name in ("out.jsonl", "no.jsonl", "out.jsonl.curate.json")]
    whole = curate_file(path, files[0], files[1], Rules())
    contents = [file.read_bytes() for file in files]
    assert whole["kept"] > 20
    rng = random.Random(3)
    for _ in range(25):
        lost = rng.randrange(1, 40)
        lines = [content.splitlines(keepends=True) for content in contents[:2]]
        numbers = [int(json.loads(line)["id"]) for line in lines[0]]
        rejected = [json.loads(line)["line"] - 1 for line in lines[1]]
        for file, some, ids in zip(files, lines, (numbers, rejected), strict=False):
            there = b"".join(line for line, number in zip(some, ids, strict=True) if number < 60 - lost)
            torn = next((line for line, number in zip(some, ids, strict=True) if number >= 60 - lost), b"")
            file.write_bytes(there + torn[: rng.randrange(1 + len(torn))])
        files[2].write_text(json.dumps({**whole, "complete": False}))
        assert curate_file(path, files[0], files[1], Rules(), resume=True) == whole
        assert [file.read_bytes() for file in files] == contents


def test_a_killed_run_gives_the_same_with_resume(tmp_path):
    parrot = Parrot(["-m", "parrot_edge"], tmp_path)
    rows = [(json.dumps(row) + "\n").encode() for row in some_rows(80)]
    arguments = ["curate", "-", "-o", "out.jsonl"]
    process = parrot.start(*arguments)
    process.stdin.write(b"".join(rows[:50]))
    process.stdin.flush()
    until = time.monotonic() + 60
    out = tmp_path / "out.jsonl"
    while not (out.exists() and out.read_bytes().count(b"\n") > 10):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()
    done = parrot(*arguments, "--resume", input=b"".join(rows))
    assert done.returncode == 0, done.stderr
    whole = parrot("curate", "-", "-o", "whole.jsonl", input=b"".join(rows))
    assert whole.returncode == 0, whole.stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    one, other = (tmp_path / f"{name}.jsonl.rejects.jsonl" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_resume_needs_the_same_rules_and_rows(tmp_path):
    path = write(tmp_path / "in.jsonl", some_rows(20))
    out, no = tmp_path / "out.jsonl", tmp_path / "no.jsonl"
    report = curate_file(path, out, no, Rules())
    with pytest.raises(OutputError, match="--resume carries it on"):
        curate_file(path, out, no, Rules())
    assert curate_file(path, out, no, Rules(), resume=True) == report
    with pytest.raises(UsageError, match="begun with other rules"):
        curate_file(path, out, no, Rules(min_turns=3), resume=True)
    state = tmp_path / "out.jsonl.curate.json"
    state.write_text(json.dumps({**report, "complete": False}))
    write(tmp_path / "in.jsonl", some_rows(40)[21:])
    with pytest.raises(InputError, match=r"out\.jsonl:1: is no row that the input gives"):
        curate_file(path, out, no, Rules(), resume=True)
    state.unlink()
    with pytest.raises(UsageError, match="was not begun by parrot curate"):
        curate_file(path, out, no, Rules(), resume=True)


def test_a_bad_row_is_named_or_rejected(tmp_path):
    path = tmp_path / "in.jsonl"
    good = json.dumps({"messages": talk(*GOOD)})
    path.write_text("[]\n")
    with pytest.raises(InputError, match=r"in\.jsonl:1: "):
        curate_file(str(path), tmp_path / "out.jsonl", tmp_path / "no.jsonl", Rules())
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    path.write_text(f'{good}\n{{"messages": 3}}\n{good[:-4]}\n')
    with pytest.raises(InputError, match=r"in\.jsonl:2: "):
        curate_file(str(path), tmp_path / "out.jsonl", tmp_path / "no.jsonl", Rules())
    report = curate_file(
        str(path), tmp_path / "out.jsonl", tmp_path / "no.jsonl", Rules(), skip=True, force=True
    )
    assert report["rejected"] == {"malformed": 2}
    assert [(row["line"], row["row"]) for row in read(tmp_path / "no.jsonl")] == [(2, None), (3, None)]


def test_an_empty_file_gives_a_sentence_and_an_empty_output(tmp_path):
    empty, out = write(tmp_path / "empty.jsonl", []), tmp_path / "out.jsonl"
    done = CliRunner().invoke(command, [empty, "-o", str(out), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["read"] == 0
    assert "holds no dialogue" in done.stderr
    assert out.read_bytes() == b""


def test_strange_text_goes_through_unchanged(tmp_path):
    texts = ["<script>alert('שלום')</script> 🦜 \u202eabc?", "\u2028 done.", "和那个怎么样呢 朋友?", "好。"]
    row = {"id": "x", "messages": talk(*texts)}
    curate_file(
        write(tmp_path / "in.jsonl", [row]), tmp_path / "o.jsonl", tmp_path / "n.jsonl", Rules(min_words=1)
    )
    assert read(tmp_path / "o.jsonl") == [row]


def test_rows_go_to_stdout_by_default(tmp_path):
    parrot = Parrot(["-m", "parrot_edge"], tmp_path)
    done = parrot("curate", input=json.dumps({"id": "a", "messages": talk(*GOOD)}) + "\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == "a"
    assert parrot("curate", "--resume").returncode == 2


def test_the_commands_reasons_are_those_of_the_library():
    assert [reason for reason in REASONS if reason != "malformed"] == list(ALLOWED)
