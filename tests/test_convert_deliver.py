"""What lies beside a model for people, and its way to a hub, which is one on loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from upload_hub import UploadHub

from parrot_edge.cli.models import models as models_command
from parrot_edge.convert.deliver import Release, check_base, push, write_delivery
from parrot_edge.errors import ModelError, OutputError, UsageError
from parrot_edge.models import ASK_ADAPTER, LocalModel, parse_model
from parrot_edge.store import sha256_of


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": value * 2}


@pytest.fixture
def folder(tmp_path: Path, embedded_model: Path) -> Path:
    folder = tmp_path / "delivered"
    folder.mkdir()
    (folder / "chat Q4_1.gguf").symlink_to(embedded_model)
    shutil.copy(ASK_ADAPTER, folder / "ask.gguf")
    return folder


@pytest.fixture
def release(folder: Path) -> Release:
    model = LocalModel("chat Q4_1.gguf", folder / "chat Q4_1.gguf")
    return Release("Chat: tiny", [model], "chat", "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


CERTIFICATE = {
    "passed": True,
    "files": [
        {"name": "chat Q4_1.gguf", "type": "Q4_1", "kl": {"mean": figure(0.02)}, "agreement": figure(0.9)}
    ],
}


def test_card_tells_licence_base_files_and_figures(folder: Path, release: Release) -> None:
    write_delivery(folder, release, certificate=CERTIFICATE)
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "gguf" in front["tags"]
    assert "| `chat Q4_1.gguf` | Q4_1 | 98 MB | 0.02 (0.01 to 0.04) | 0.9 (0.45 to 1.8) |" in card
    for command in (
        "parrot models add chat-tiny './chat Q4_1.gguf'\nparrot simulate --chat chat-tiny -o dialogues.jsonl",
        "llama-server -m 'chat Q4_1.gguf' --jinja",
        "ollama create chat-tiny -f Modelfile",
        "lms import 'chat Q4_1.gguf'",
    ):
        assert command in card
    assert "Every file was held against the trained model" in card
    assert (folder / "Modelfile").read_text().startswith("FROM ./chat Q4_1.gguf\n")
    assert str(folder.parent) not in card


def test_card_of_a_failed_certificate_says_so(folder: Path, release: Release) -> None:
    failed = {"passed": False, "files": [{"name": "other", "failed": ["It babbles."]}]}
    write_delivery(folder, release, certificate=failed)
    assert "**It failed its certificate:**\n\n- It babbles." in (folder / "README.md").read_text()


def test_activated_ask_gets_no_modelfile_and_its_prompt_is_shown(folder: Path) -> None:
    model = LocalModel("ask", folder / "chat Q4_1.gguf", folder / "ask.gguf")
    write_delivery(folder, Release("Ask", [model], "ask"))
    card = (folder / "README.md").read_text()
    assert "llama-server -m 'chat Q4_1.gguf' --lora ask.gguf --jinja" in card
    assert "Ollama and LM Studio do not know these" in card
    assert r"Boil it with vinegar.<|im_end|>\n<|im_start|>user\n" in card
    assert not (folder / "Modelfile").exists()


def test_existing_card_is_replaced_by_force_alone(folder: Path, release: Release) -> None:
    (folder / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"README.md exists; .* pass --force"):
        write_delivery(folder, release)
    assert not (folder / "Modelfile").exists()
    write_delivery(folder, release, force=True)
    assert (folder / "README.md").read_text() != "mine"


# Pairs


def pair(folder: Path, base: Path) -> LocalModel:
    return LocalModel("pair", base, folder / "ask.gguf")


def test_adapter_belongs_to_the_base_it_was_trained_on(folder: Path, embedded_model: Path) -> None:
    check_base(LocalModel("plain", embedded_model))
    check_base(pair(folder, embedded_model))
    other = folder / "other.gguf"
    other.write_bytes(b"GGUF another")
    with pytest.raises(ModelError, match=r"trained over another file than .*other.gguf.*its own base"):
        check_base(pair(folder, other))


@pytest.mark.parametrize(("failed", "taken"), [([], True), (["It babbles."], False)])
def test_adapter_runs_over_a_base_that_its_certificate_names(
    folder: Path, failed: list[str], taken: bool
) -> None:
    other = folder / "other.gguf"
    other.write_bytes(b"GGUF another")
    file = {"name": "other", "sha256": sha256_of(other), "adapter": {"bytes": 1}, "failed": failed}
    (folder / "certificate.json").write_text(json.dumps({"files": [file]}))
    with contextlib.nullcontext() if taken else pytest.raises(ModelError, match="no certificate beside it"):
        check_base(pair(folder, other))


def test_models_add_refuses_a_foreign_base_and_a_taken_name(
    folder: Path, embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARROT_HOME", str(tmp_path / "home"))
    other = folder / "other.gguf"
    other.write_bytes(b"GGUF another")

    def add(*arguments: object) -> Any:
        return CliRunner().invoke(models_command, ["add", *map(str, arguments)])

    assert isinstance(add("mine", f"{other}+{folder / 'ask.gguf'}").exception, ModelError)
    assert add("mine", f"{embedded_model}+{folder / 'ask.gguf'}").exit_code == 0
    taken = add("mine", other)
    assert isinstance(taken.exception, UsageError)
    assert "already; choose another, or pass --force" in str(taken.exception)
    assert add("mine", f"{other}+{folder / 'ask.gguf'}", "--force").exit_code == 0
    assert parse_model("mine").target == f"{other}+{folder / 'ask.gguf'}"


# The hub


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(1000))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    (folder / "Modelfile").write_text("FROM ./model.gguf\n")
    (folder / "model.gguf.partial").write_bytes(b"half")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's own library
def test_push_uploads_what_was_delivered_and_nothing_else(upload_hub: UploadHub, small: Path) -> None:
    url = push(small, "someone/tiny", endpoint=upload_hub.url)
    assert url == f"{upload_hub.url}/someone/tiny"
    assert upload_hub.files == {
        name: (small / name).read_bytes() for name in ("model.gguf", "README.md", "Modelfile")
    }
    assert "private" in (upload_hub.repos[0].get("visibility"), *upload_hub.repos[0])
    assert upload_hub.tokens == {"Bearer hf_secret"}


def test_failed_certificate_is_not_uploaded(upload_hub: UploadHub, small: Path) -> None:
    (small / "certificate.json").write_text('{"passed": false}')
    with pytest.raises(ModelError, match="failed its certificate, so it is not uploaded"):
        push(small, "someone/tiny", endpoint=upload_hub.url)
    assert not upload_hub.repos


def test_push_without_a_token_or_with_one_that_may_not_write(
    upload_hub: UploadHub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_hub.refuses = True
    with pytest.raises(ModelError, match="does not let this HF_TOKEN write to someone/tiny") as caught:
        push(small, "someone/tiny", endpoint=upload_hub.url)
    assert "hf_secret" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="HF_TOKEN is not set"):
        push(small, "someone/tiny", endpoint=upload_hub.url)


def test_push_of_a_folder_that_holds_no_model_is_refused(upload_hub: UploadHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no GGUF with a README.md"):
        push(tmp_path, "someone/tiny", endpoint=upload_hub.url)
    with pytest.raises(UsageError, match="no repository of the hub"):
        push(tmp_path, "tiny", endpoint=upload_hub.url)
