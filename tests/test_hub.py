"""Files of the hub: pinned, checked, and at hand without a network. The hub is one on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants as hub_constants
from huggingface_hub import file_download

from parrot_edge.cli.models import models as models_command
from parrot_edge.errors import ModelError
from parrot_edge.models import LocalModel, parse_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("PARROT_HOME", str(home))
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return home


class Hub:
    """A hub on loopback: `files` by name; what was asked is kept in `requests`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"model.gguf": b"GGUF" + bytes(range(256)) * 40}
        self.commit = COMMIT
        self.etag: str | None = None
        self.error: tuple[int, str] | None = None
        self.requests: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(f"{request.command} {request.path}")
        name = request.path.split("?")[0].split("/resolve/", 1)[-1].partition("/")[2]
        status, code = self.error or ((200, "") if name in self.files else (404, "EntryNotFound"))
        body = self.files.get(name, b"") if status == 200 else b""
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("ETag", f'"{self.etag or hashlib.sha256(body).hexdigest()}"')
        if code:
            request.send_header("X-Error-Code", code)
            request.send_header("X-Error-Message", code)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT would do, had it been set before huggingface_hub was imported."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (hub_constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        yield hub
        server.shutdown()
        thread.join()
    with contextlib.suppress(AttributeError):  # older versions keep no session
        huggingface_hub.close_session()


def test_hub_file_is_downloaded_once_and_pinned_to_its_commit(hub: Hub, home: Path) -> None:
    model = parse_model("hf:owner/repo/model.gguf")
    path = home / "cache/hub/owner/repo@main/model.gguf"
    assert model == LocalModel(f"hf:owner/repo/model.gguf@{COMMIT}", path)
    assert path.read_bytes() == hub.files["model.gguf"]
    assert f"GET /owner/repo/resolve/{COMMIT}/model.gguf" in hub.requests
    hub.requests.clear()
    hub.files["model.gguf"] = b"GGUF another"
    assert parse_model("hf:owner/repo/model.gguf") == model
    assert hub.requests == []


def test_pull_takes_the_newest_commit_and_prints_where_it_is(hub: Hub) -> None:
    parse_model("hf:owner/repo/model.gguf")
    hub.files["model.gguf"], hub.commit = b"GGUF another", "f" * 40
    result = CliRunner().invoke(models_command, ["pull", "hf:owner/repo/model.gguf"])
    path = Path(result.stdout.rstrip())
    assert path.read_bytes() == b"GGUF another"
    assert parse_model("hf:owner/repo/model.gguf") == LocalModel("hf:owner/repo/model.gguf@" + "f" * 40, path)


def test_failed_pull_keeps_the_old_file(hub: Hub) -> None:
    before = parse_model("hf:owner/repo/model.gguf")
    hub.error = (404, "EntryNotFound")
    with pytest.raises(ModelError, match=r"no file model\.gguf"):
        parse_model("hf:owner/repo/model.gguf", refresh=True)
    assert parse_model("hf:owner/repo/model.gguf") == before


def test_file_deleted_from_the_shared_cache_comes_back_at_its_commit(hub: Hub) -> None:
    model = parse_model("hf:owner/repo/model.gguf")
    assert isinstance(model, LocalModel)
    model.path.resolve().unlink()
    hub.requests.clear()
    assert parse_model("hf:owner/repo/model.gguf") == model
    assert hub.requests[0] == f"HEAD /owner/repo/resolve/{COMMIT}/model.gguf"


def test_revision_is_asked_for_and_has_a_place_of_its_own(hub: Hub, home: Path) -> None:
    parse_model("hf:owner/repo/model.gguf@refs/pr/1")
    assert "HEAD /owner/repo/resolve/refs%2Fpr%2F1/model.gguf" in hub.requests
    assert (home / "cache/hub/owner/repo@refs%2Fpr%2F1/model.gguf").exists()


def test_hub_base_with_a_hub_adapter(hub: Hub) -> None:
    hub.files["lora/adapter.gguf"] = b"GGUF adapter"
    model = parse_model("hf:owner/repo/model.gguf@v1+hf:owner/repo/lora/adapter.gguf")
    assert isinstance(model, LocalModel)
    assert model.adapter is not None
    assert model.adapter.read_bytes() == b"GGUF adapter"
    assert model.name == f"hf:owner/repo/model.gguf@{COMMIT}+hf:owner/repo/lora/adapter.gguf@{COMMIT}"


def test_all_shards_are_downloaded(hub: Hub) -> None:
    for number in (1, 2):
        hub.files[f"big-0000{number}-of-00002.gguf"] = b"GGUF" + bytes([number])
    model = parse_model("hf:owner/repo/big-00001-of-00002.gguf")
    assert isinstance(model, LocalModel)
    assert sorted(path.name for path in model.path.parent.glob("*.gguf")) == sorted(
        name for name in hub.files if name.startswith("big")
    )


def test_two_that_want_the_same_file_download_it_once(hub: Hub) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(parse_model, ["hf:owner/repo/model.gguf"] * 2)
    assert first == second
    assert sum(request.startswith("GET") for request in hub.requests) == 1


def test_damaged_download_is_refused(hub: Hub, home: Path) -> None:
    whole = hub.files["model.gguf"]
    hub.etag = hashlib.sha256(whole).hexdigest()
    hub.files["model.gguf"] = whole.swapcase()
    with pytest.raises(ModelError, match="SHA-256"):
        parse_model("hf:owner/repo/model.gguf")
    assert not list(home.glob("**/*.gguf"))
    hub.files["model.gguf"] = whole
    parse_model("hf:owner/repo/model.gguf")


def test_pull_mends_a_file_that_was_cut_short(hub: Hub) -> None:
    model = parse_model("hf:owner/repo/model.gguf")
    assert isinstance(model, LocalModel)
    model.path.write_bytes(b"GGUF")
    assert parse_model("hf:owner/repo/model.gguf", refresh=True) == model
    assert model.path.read_bytes() == hub.files["model.gguf"]


def test_pull_of_a_file_that_is_whole_and_unchanged_downloads_nothing(hub: Hub) -> None:
    parse_model("hf:owner/repo/model.gguf")
    hub.requests.clear()
    parse_model("hf:owner/repo/model.gguf", refresh=True)
    assert {request.split()[0] for request in hub.requests} == {"HEAD"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ((404, "EntryNotFound"), "no file model.gguf"),
        ((404, "RepoNotFound"), "owner/repo is not on the hub"),
        ((404, "RevisionNotFound"), "no revision 'main'"),
        ((403, "GatedRepo"), "is gated"),
    ],
)
def test_refusal_of_the_hub_is_said_in_a_sentence(hub: Hub, error: tuple[int, str], reason: str) -> None:
    hub.error = error
    with pytest.raises(ModelError, match=reason):
        parse_model("hf:owner/repo/model.gguf")


def test_without_network_the_error_names_the_place_and_the_file_is_found_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        parse_model("hf:owner/repo/folder/model.gguf")
    place = Path(str(caught.value).rsplit(" ", 1)[-1])
    assert place == home / "cache/hub/owner/repo@main/folder/model.gguf"
    place.write_bytes(b"GGUF by hand")
    assert parse_model("hf:owner/repo/folder/model.gguf") == LocalModel(
        "hf:owner/repo/folder/model.gguf", place
    )


def test_offline_mode_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with contextlib.suppress(AttributeError):
        huggingface_hub.close_session()  # a session remembers the mode it was made in
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        parse_model("hf:owner/repo/model.gguf")
    assert hub.requests == []


def test_file_in_the_hub_cache_of_another_program_is_used_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    repo = tmp_path / "hub" / "models--owner--repo"
    content = b"GGUF shared"
    blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repo / "snapshots" / COMMIT
    for folder in (blob.parent, snapshot, repo / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(content)
    (repo / "refs" / "main").write_text(COMMIT)
    (snapshot / "model.gguf").symlink_to(blob)
    model = parse_model("hf:owner/repo/model.gguf")
    assert isinstance(model, LocalModel)
    assert model.name.endswith("@" + COMMIT)
    assert model.path.resolve() == blob


def test_unwritable_cache_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARROT_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be stored"):
        parse_model("hf:owner/repo/model.gguf")
