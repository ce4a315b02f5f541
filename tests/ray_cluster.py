"""Ray nodes on this machine for tests, and who works on them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Parrot

SECONDS = 120
"""Longest wait for anything."""


class Cluster:
    """Nodes on this machine, in a process of their own; see ray_nodes.py."""

    def __init__(self, *cpus: int, **environment: str) -> None:
        script = Path(__file__).with_name("ray_nodes.py")
        self._process = Parrot([str(script)], script.parent.parent, **environment).start(
            *cpus, stderr=subprocess.DEVNULL
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def remove_node(self) -> None:
        """Take the last node away."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._answer()

    def kill_head(self) -> None:
        """Take away what knows the cluster; its workers live on for a while."""
        [head] = [pid for pid in descendants(self._process.pid) if "gcs_server" in command_of(pid).split()[0]]
        os.kill(head, signal.SIGKILL)

    def workers(self) -> list[int]:
        """The processes that hold engines."""
        return [pid for pid in descendants(self._process.pid) if command_of(pid).startswith("ray::Worker")]

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=SECONDS)
        self._process.stdout.close()


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for what happens, while a process lives."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, finish(process)
        time.sleep(0.05)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Wait for a process; its code and its streams."""
    out, errors = process.communicate(timeout=SECONDS)
    return process.returncode, out.decode(), errors.decode()
