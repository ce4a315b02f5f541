"""A short run of every fuzz target, always the same one; `bin/fuzz` runs a million cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

for needed in ("atheris", "gguf", "safetensors"):
    pytest.importorskip(needed)

FUZZ = ROOT / "tests" / "fuzz"
RUNS = {"adapter": 100, "base": 100, "recipe": 100, "peft": 300}


def run(folder: Path, script: str, *arguments: object) -> None:
    """A run that must end well; what it says is shown if it does not."""
    done = subprocess.run(
        [sys.executable, str(FUZZ / script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", sorted(each.name for each in (FUZZ / "corpus").iterdir()))
def test_no_input_breaks_what_reads_it(target: str, tmp_path: Path) -> None:
    run(tmp_path, "run.py", target, "--runs", RUNS.get(target, 1000), "--seed", 1)


def test_no_file_kills_the_process_that_loads_it(tmp_path: Path) -> None:
    run(tmp_path, "loading.py", "--runs", 150)
