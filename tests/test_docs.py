"""What the documents say holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]


def test_the_help_of_every_verb_is_in_the_docs():
    written = subprocess.run(
        [sys.executable, ROOT / "bin" / "write-cli-docs"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    ).stdout
    assert (ROOT / "docs" / "cli.md").read_text() == written, "run: bin/write-cli-docs > docs/cli.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", ["README.md", "docs/engine.md"])
def test_python_examples_run(document, embedded_model, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "model.gguf").symlink_to(embedded_model)
    for block in blocks:
        quick = re.sub(r"max_tokens=\d+", "max_tokens=6", block)
        done = subprocess.run(
            [sys.executable, "-c", quick],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_every_folder_of_the_tree_has_a_line_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    folders = {line.split("/")[0] for line in listed.splitlines() if "/" in line}
    inner = {
        "/".join(line.split("/")[:2]) for line in listed.splitlines() if re.match(r"parrot_edge/[^/]+/", line)
    }
    for folder in folders | {name.removeprefix("parrot_edge/") for name in inner}:
        assert f"{folder}/" in readme, folder
