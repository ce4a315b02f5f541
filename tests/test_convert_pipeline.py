"""A conversion in stages: whole or gone on from, certified, and refused before it costs anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("gguf")
pytest.importorskip("trl")

from tiny_bases import make_base
from tiny_gguf import add_lora, cut, read_fields

from parrot_edge.cli import parrot
from parrot_edge.convert import pipeline
from parrot_edge.convert.pipeline import Job, Stages, convert
from parrot_edge.errors import ModelError, OutputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture
def stages(tmp_path: Path) -> Callable[..., Stages]:
    def make(*, resume: bool = False, force: bool = False) -> Stages:
        made = Stages(tmp_path / "out", resume=resume, force=force, say=lambda text: None)
        made.open()
        return made

    return make


def write(path: Path, text: str, calls: list[str]) -> Callable[[], str]:
    def make() -> str:
        calls.append(text)
        path.write_text(text)
        return f"made {text}"

    return make


def test_stage_that_is_whole_is_not_done_again(stages: Callable[..., Stages], tmp_path: Path) -> None:
    path, calls = tmp_path / "out" / "one", list[str]()
    assert stages().run("one", {"from": 1}, [path], write(path, "a", calls)) == "made a"
    assert stages(resume=True).run("one", {"from": 1}, [path], write(path, "b", calls)) == "made a"
    assert calls == ["a"]


@pytest.mark.parametrize("harm", [cut, Path.unlink, lambda path: path.write_text("A")])
def test_stage_whose_file_is_not_whole_is_done_again(
    harm: Callable[[Path], Any], stages: Callable[..., Stages], tmp_path: Path
) -> None:
    path, calls = tmp_path / "out" / "one", list[str]()
    stages().run("one", {}, [path], write(path, "aaa", calls))
    harm(path)
    assert stages(resume=True).run("one", {}, [path], write(path, "b", calls)) == "made b"
    assert path.read_text() == "b"


def test_stage_made_from_something_else_is_done_again(stages: Callable[..., Stages], tmp_path: Path) -> None:
    path, calls = tmp_path / "out" / "one", list[str]()
    stages().run("one", {"from": 1}, [path], write(path, "a", calls))
    assert stages(resume=True).run("one", {"from": 2}, [path], write(path, "b", calls)) == "made b"


def test_failed_stage_leaves_those_before(stages: Callable[..., Stages], tmp_path: Path) -> None:
    path, calls = tmp_path / "out" / "one", list[str]()
    made = stages()
    made.run("one", {}, [path], write(path, "a", calls))

    def fail() -> None:
        raise ModelError("no")

    with pytest.raises(ModelError):
        made.run("two", {}, [tmp_path / "out" / "two"], fail)
    record = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert list(record["stages"]) == ["one"]


def test_what_a_killed_run_was_making_is_cleared_away(stages: Callable[..., Stages], tmp_path: Path) -> None:
    stages()
    (tmp_path / "out" / ".base-x1").mkdir()
    (tmp_path / "out" / ".base-x1" / "large").write_text("")
    stages(resume=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["convert.json"]


def test_existing_folder_is_refused(stages: Callable[..., Stages], tmp_path: Path) -> None:
    stages()
    with pytest.raises(OutputError, match="exists; choose another, pass --force to replace it or --resume"):
        stages()
    (tmp_path / "out" / "one").write_text("")
    stages(force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["convert.json"]


def test_folder_of_something_else_is_never_replaced(stages: Callable[..., Stages], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for options in ({"force": True}, {"resume": True}):
        with pytest.raises(OutputError, match="holds no conversion; choose another folder"):
            stages(**options)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base tiny, an adapter for it in lora/, and dialogues."""
    folder = tmp_path_factory.mktemp("made")
    add_lora(make_base(folder / "tiny", "llama"), folder / "lora", lora_alpha=1)
    rows = [[f"How do I boil {n} eggs?", "Put them into water.", "and if cold?", "Wait."] for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"data": row}) + "\n" for row in rows))
    return folder


def test_types_are_checked_before_anything_is_read(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Q4_X is no file type of llama"):
        convert(tmp_path, tmp_path / "out", Job(types=("Q4_X",)))
    with pytest.raises(UsageError, match="IQ2_XS needs an importance matrix; give dialogues with --data"):
        convert(tmp_path, tmp_path / "out", Job(types=("IQ2_XS",)))
    assert not (tmp_path / "out").exists()


def test_disk_space_is_checked_before_the_work(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match=r"needs about .* kB, and the disk has 1 kB left; free some space"):
        convert(made / "lora", tmp_path / "out", Job(base=str(made / "tiny")))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("toolkit")
def test_adapter_becomes_certified_files_and_resumes(made: Path, tmp_path: Path) -> None:
    job = Job(
        ("Q8_0",),
        base=str(made / "tiny"),
        sources=(str(made / "data.jsonl"),),
        license="mit",
        threads=1,
        speed=False,
    )
    out, said = tmp_path / "out", list[str]()
    record = convert(made / "lora", out, job, say=said.append)
    assert record["certificate"] == {"passed": True, "failed": []}
    assert {path.name for path in out.iterdir()} == {
        *("lora-base-f16.gguf", "lora-lora.gguf", "lora-f16.gguf", "lora-Q8_0.gguf", "reference"),
        *("certificate.json", "certificate.html", "README.md", "Modelfile", "convert.json"),
    }
    told = read_fields(out / "lora-Q8_0.gguf")
    assert (told["general.name"], told["general.license"]) == ("lora", "mit")
    assert told["general.base_model.0.name"] == "tiny"
    assert "im_start" in told["tokenizer.chat_template"]
    assert not [value for value in told.values() if str(made) in str(value) or str(tmp_path) in str(value)]

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.gguf")}
    cut(out / "lora-Q8_0.gguf")
    said.clear()
    assert convert(made / "lora", out, job, resume=True, say=said.append)["certificate"]["passed"]
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.gguf")}
    assert [name for name in before if before[name] != after[name]] == ["lora-Q8_0.gguf"]
    assert [line for line in said if line.endswith("...")] == ["quantise to Q8_0 ..."]


def test_one_option_takes_several_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def note(adapter: Path, output: Path, job: Job, **options: Any) -> dict[str, Any]:
        asked.append((adapter, job.types))
        return {"certificate": {"passed": True, "failed": []}}

    monkeypatch.setattr(pipeline, "convert", note)
    command = ["convert", "ask", "-o", str(tmp_path / "out"), "--quant", "Q4_0", "Q8_0"]
    result = CliRunner().invoke(parrot, command)
    assert result.exit_code == 0, result.output
    assert asked == [(Path("ask"), ("Q4_0", "Q8_0"))]
