"""The quantiser as a process: what it leaves when it is stopped, fails, or crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from parrot_edge.engine import native, quantizer
from parrot_edge.engine.quantizer import quantize
from parrot_edge.errors import ModelError, OutputError

SLOW = "import time, sys; open(sys.argv[1], 'wb').write(b'GG'); time.sleep(60)"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model-Q8_0.gguf"


def run_instead(monkeypatch: pytest.MonkeyPatch, code: str, *arguments: object) -> None:
    """Let the child run `code` in place of the quantiser."""
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", code, *map(str, arguments)], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(quantizer.subprocess, "Popen", start)


def test_quantised_file_is_a_model_that_llama_cpp_reads(embedded_model: Path, target: Path) -> None:
    quantize(embedded_model, target, "Q8_0", 1)
    metadata = native.read_metadata(target)
    assert (metadata["general.file_type"], metadata["general.architecture"]) == ("7", "llama")
    assert set(native.tensor_types(target).values()) == {"F32", "Q8_0"}
    assert list(target.parent.iterdir()) == [target]


def test_ctrl_c_is_heard_at_once_and_leaves_nothing(
    embedded_model: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = target.with_name(target.name + ".partial")
    run_instead(monkeypatch, SLOW, draft)

    def interrupt() -> None:
        while not draft.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        quantize(embedded_model, target, "Q8_0", 1)
    assert time.monotonic() - start < 20
    assert not list(target.parent.iterdir())


def test_crash_of_llama_cpp_is_one_sentence(
    embedded_model: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, "import os; os.abort()")
    with pytest.raises(ModelError, match=r"cannot be written as Q8_0: llama.cpp was ended by SIGABRT; check"):
        quantize(embedded_model, target, "Q8_0", 1)


def test_full_disk_is_one_sentence_and_leaves_nothing(embedded_model: Path, target: Path) -> None:
    target.with_name(target.name + ".partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="the disk may be full; free some space"):
        quantize(embedded_model, target, "Q8_0", 1)
    assert not list(target.parent.iterdir())


def test_failure_leaves_an_existing_target_as_it_was(tmp_path: Path, target: Path) -> None:
    target.write_text("mine")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="cannot be written as Q8_0"):
        quantize(tmp_path / "damaged.gguf", target, "Q8_0", 1)
    assert target.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2
