"""The card of a file of dialogues, and its way to a hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from upload_hub import UploadHub

from parrot_edge.cli.card import card as card_command
from parrot_edge.data.card import describe_dialogues, push_dialogues, write_card
from parrot_edge.errors import InputError, OutputError, UsageError
from parrot_edge.jsonl import read_lines
from parrot_edge.models import ASK_ADAPTER, EMBEDDED
from parrot_edge.seeds import builtin_path

OURS = {"ask_model": f"{EMBEDDED}+{ASK_ADAPTER.name}", "chat_model": EMBEDDED, "seed": 7}


def row(prompt: str, **more: Any) -> dict[str, Any]:
    talk = [prompt, "Vinegar.", "and how often?", "Once a month."]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(talk)]
    return {"messages": messages, "stop_reason": "turns", **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


@pytest.fixture
def builtin(tmp_path: Path) -> Path:
    """Dialogues of the built-in models from built-in seeds."""
    seeds = [line.row() for line in read_lines(builtin_path())]
    prompts = [seed for seed in seeds if "prompt" in seed][:3]
    return write(tmp_path / "clean.jsonl", *(row(seed["prompt"], id=seed["id"], **OURS) for seed in prompts))


def front_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_card_tells_models_seeds_licence_and_statistics(builtin: Path) -> None:
    text = describe_dialogues(builtin).text()
    front = front_of(text)
    assert (front["license"], front["size_categories"]) == ("apache-2.0", ["n<1K"])
    assert "synthetic" in front["tags"]
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "clean.jsonl"}]
    assert "language" not in front
    for line in (
        "3 dialogues with 12 messages in `clean.jsonl`",
        f"| Ask | `{EMBEDDED}+{ASK_ADAPTER.name}` | 3 | apache-2.0 |",
        f"| Chat | `{EMBEDDED}` | 3 | apache-2.0 |",
        "| openings | the seeds of parrot_edge | 3 | apache-2.0 |",
        "Seeds of the runs: 7.",
        "| turns a dialogue | 2.000 [2.000 2.000] |",
    ):
        assert line in text
    assert str(builtin.parent) not in text


def test_card_tells_what_curation_rejected(builtin: Path) -> None:
    record = {
        "complete": True,
        "settings": {"against": ["/secret/bench.jsonl"], "rules": {"language": "en"}},
        "read": 5,
        "kept": 3,
        "rejected": {"short": 2},
    }
    builtin.with_name("clean.jsonl.curate.json").write_text(json.dumps(record))
    text = describe_dialogues(builtin).text()
    assert "kept 3 of 5 dialogues. None repeats a question of `bench.jsonl`." in text
    assert "| short | 2 | too few answered turns, or too few words in them |" in text
    assert front_of(text)["language"] == ["en"]
    assert "secret" not in text


@pytest.mark.parametrize(
    "other",
    [
        row("my own question", id="x", **OURS),
        row("my own question", id="x"),
    ],
    ids=["another opening", "no models"],
)
def test_licence_of_what_is_not_parrots_own_is_asked_for(
    builtin: Path, other: dict[str, Any], upload_hub: UploadHub
) -> None:
    with builtin.open("a") as file:
        file.write(json.dumps(other) + "\n")
    found = describe_dialogues(builtin)
    assert found.license is None
    assert "No licence was named" in found.text()
    assert "| openings | not told | 1 |  |" in found.text()
    with pytest.raises(UsageError, match="does not tell under which licence"):
        push_dialogues(found, "someone/data", endpoint=upload_hub.url)
    assert not upload_hub.repos
    named = describe_dialogues(builtin, license_id="cc-by-4.0", seeds_from="a|b\nc").text()
    assert front_of(named)["license"] == "cc-by-4.0"
    assert r"| openings | a\|b c | 1 | see there |" in named


def test_real_dialogues_are_not_called_synthetic(tmp_path: Path) -> None:
    text = describe_dialogues(write(tmp_path / "real.jsonl", row("hi there"))).text()
    assert "synthetic" not in front_of(text)["tags"]
    assert "language models wrote" not in text


def test_empty_file_gets_a_card_and_a_bad_row_is_named(tmp_path: Path) -> None:
    assert "0 dialogues with 0 messages" in describe_dialogues(write(tmp_path / "empty.jsonl")).text()
    bad = write(tmp_path / "bad.jsonl", row("fine"), {"messages": "none"})
    with pytest.raises(InputError, match=r"bad.jsonl:2: "):
        describe_dialogues(bad)
    with pytest.raises(UsageError, match="is no licence's identifier"):
        describe_dialogues(bad, license_id="a: b")


def test_existing_card_is_replaced_by_force_alone(builtin: Path) -> None:
    target = builtin.with_name("README.md")
    target.write_text("mine")
    with pytest.raises(OutputError, match=r"README.md exists"):
        write_card(describe_dialogues(builtin), target)
    write_card(describe_dialogues(builtin), target, force=True)
    assert target.read_text().startswith("---\npretty_name")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's own library
def test_push_uploads_dialogues_and_card_as_a_private_dataset(builtin: Path, upload_hub: UploadHub) -> None:
    (builtin.parent / "notes.txt").write_text("private")
    found = describe_dialogues(builtin)
    write_card(found, builtin.with_name("README.md"))
    push_dialogues(found, "someone/data", endpoint=upload_hub.url)
    assert upload_hub.files == {
        name: builtin.with_name(name).read_bytes() for name in ("clean.jsonl", "README.md")
    }
    [asked] = upload_hub.repos
    assert asked["type"] == "dataset"
    assert "private" in (asked.get("visibility"), *asked)
    assert upload_hub.tokens == {"Bearer hf_secret"}


def test_command_writes_beside_the_data_and_uploads_nothing_unasked(
    builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(card_command, [str(builtin), *map(str, arguments)])

    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert run().exit_code == 0
    assert builtin.with_name("README.md").is_file()
    assert run("-o", "-").stdout == builtin.with_name("README.md").read_text()
    assert "HF_TOKEN is not set" in str(run("--push", "me/data").exception)
    assert "leave -o out" in str(run("--push", "me/data", "-o", "-").exception)
