"""The package as others get it: a wheel that runs the main job elsewhere, without a network."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAIN_JOB = [
    "simulate",
    "--seeds",
    "builtin",
    "--limit",
    "2",
    "--turns",
    "2",
    "--max-tokens",
    "12",
    "--threads",
    "1",
]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """The wheel's files in a folder of their own; its dependencies come from this environment."""
    target = tmp_path_factory.mktemp("installed")
    [wheel] = built.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            target,
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    return target


def run_installed(installed, home, *prefix):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PARROT_HOME": str(home)}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "parrot_edge", *MAIN_JOB],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_the_wheel_runs_the_main_job_without_a_network(installed, tmp_path):
    unshare = shutil.which("unshare")
    assert unshare, "unshare, of util-linux, makes the namespace without a network"
    done = run_installed(installed, tmp_path, unshare, "--map-root-user", "--net")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    assert all(row["messages"] and row["stop_reason"] for row in rows)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    [wheel] = built.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"parrot_edge"}


def test_the_sdist_holds_what_a_build_needs(built):
    [sdist] = built.glob("*.tar.gz")
    names = subprocess.run(["tar", "tzf", sdist], capture_output=True, text=True, check=True).stdout
    for wanted in ("parrot_edge/seeds/builtin.jsonl", "LICENSE", "pyproject.toml"):
        assert wanted in names


def test_importing_the_command_line_is_cheap():
    """`parrot --help` must not load llama.cpp, torch or an HTTP client."""
    script = (
        "import sys; from click.testing import CliRunner; from parrot_edge.cli import parrot;"
        "assert CliRunner().invoke(parrot, ['--help']).exit_code == 0;"
        "heavy = ('llama_cpp', 'torch', 'openai', 'jinja2', 'numpy', 'transformers');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
