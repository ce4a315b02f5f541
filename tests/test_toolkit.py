"""llama.cpp's converters: got once, checked, kept apart; what they cannot do is one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from conftest import ROOT

from parrot_edge.convert import toolkit as module
from parrot_edge.convert.toolkit import VERSION, convert_hf, find_toolkit
from parrot_edge.errors import ModelError, OutputError

INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
FILES = {
    "convert_hf_to_gguf.py": "a",
    "convert_lora_to_gguf.py": "b",
    "conversion/base.py": "c",
    "gguf-py/gguf/__init__.py": "d",
    "gguf-py/gguf/scripts/gguf_dump.py": "e",
    "LICENSE": "f",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARROT_HOME", str(tmp_path))
    return tmp_path / "cache" / "llama.cpp"


@pytest.fixture
def archive(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source archive with what is wanted and what is not, placed by hand."""
    home.mkdir(parents=True)
    path = home / f"llama_cpp_python-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as content:
        for name, text in {**FILES, "src/llama.cpp": "no", "../../evil.py": "no"}.items():
            member = tarfile.TarInfo(INSIDE + name)
            member.size = len(text)
            content.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "_download", None)
    return path


def test_version_is_the_one_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={VERSION}" in project["dependencies"]


def test_what_is_wanted_of_a_placed_archive_is_kept(archive: Path) -> None:
    folder = find_toolkit()
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == FILES
    archive.unlink()
    assert find_toolkit() == folder, "the second time the archive is not needed"


def test_damaged_archive_is_refused_and_leaves_nothing(archive: Path, home: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(ModelError, match="is damaged or of another version: its SHA-256 differs; replace it"):
        find_toolkit()
    assert [path.name for path in home.iterdir() if not path.name.startswith(".")] == [archive.name]


def test_failed_download_says_where_to_place_the_archive(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        requirement = Path(command[-1]).read_text()
        assert requirement == f"llama-cpp-python=={VERSION} --hash=sha256:{module.SHA256}\n"
        said = "WARNING: retrying\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(module.subprocess, "run", fail)
    place = re.escape(str(home / f"llama_cpp_python-{VERSION}.tar.gz"))
    with pytest.raises(
        ModelError, match=rf"\(pip: No matching distribution found\); .* or place .* at {place}$"
    ):
        find_toolkit()


def test_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another name or pass --force"):
        convert_hf(tmp_path, tmp_path / "model.gguf", metadata={})
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_model_that_cannot_be_converted_is_one_sentence(toolkit: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(
        ModelError, match=r"odd cannot be converted: .*NoSuchModel is not supported"
    ) as caught:
        convert_hf(tmp_path / "odd", tmp_path / "model.gguf", metadata={})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "odd"]


def test_converters_gguf_stays_in_its_process(toolkit: Path) -> None:
    assert module._PROCESS.is_file()
    import gguf

    assert not Path(gguf.__file__).is_relative_to(toolkit)
    assert not [name for name in sys.path if str(toolkit) in name]
