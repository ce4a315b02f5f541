"""Two Ray nodes on this machine, a worker killed every 20 seconds for 5 minutes, and the driver once.

    python tests/ray_kills.py FOLDER --dialogues 150 --minutes 5

The real model talks, with a thread a worker, and the run then goes on to its end. FOLDER, which must not be
there, gets the run and `kills.json`. It fails where a message on record was lost, or an id is missing or
there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from conftest import Parrot
from ray_cluster import Cluster, wait_for
from test_kills import by_id, texts_of, whole_rows

from parrot_edge.models import embedded_path
from parrot_edge.seeds import builtin_path
from parrot_edge.store import write_json


class Ordeal:
    """A run and what it is put through."""

    def __init__(self, folder: Path, dialogues: int, minutes: float, every: float) -> None:
        folder.mkdir(parents=True)
        model = folder / "model.gguf"
        model.symlink_to(embedded_path())
        self.folder, self.dialogues, self.seconds, self.every = folder, dialogues, 60 * minutes, every
        self.cluster = Cluster(1, 1, PARROT_HOME=str(folder / "home"))
        self.parrot = Parrot(["-m", "parrot_edge"], folder, PARROT_HOME=str(folder / "home"))
        self.run = ["simulate", builtin_path(), "--limit", dialogues, "-o", "out.jsonl", "--resume",
                    "--ask", model, "--chat", model, "--threads", 1, "--parallel", 4, "--turns", 3,
                    "--max-tokens", 32, "--ray", self.cluster.address]  # fmt: skip
        self.kills = 0

    def endure(self) -> dict[str, float]:
        """The run from start to end; what it went through."""
        begun = time.monotonic()
        dice = random.Random(0)
        process = self._start()
        for number in range(1, int(self.seconds / self.every) + 1):
            self._wait(process)
            assert process.poll() is None, "the run was over too early; take more --dialogues"
            if workers := self.cluster.workers():
                os.kill(dice.choice(workers), signal.SIGKILL)
                self.kills += 1
            if number == int(self.seconds / self.every) // 2:
                process.kill()
                process.communicate()
                known = texts_of(self.folder)
                process = self._start()
                wait_for(lambda: not (self.folder / "out.jsonl.journal.new").exists(), process)
                assert known <= texts_of(self.folder), "a message on record was lost"
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b""), errors
        assert len(by_id(self.folder / "out.jsonl")) == self.dialogues
        # Only a question that was not answered is no part of its row
        ended = {row["id"]: row["stop_reason"] for row in whole_rows(self.folder / "out.jsonl")}
        lost = {identity for identity, _ in known - texts_of(self.folder)}
        assert {ended[identity] for identity in lost} <= {"repetition", "context", "role_flip"}, lost
        return {"dialogues": self.dialogues, "seconds": round(time.monotonic() - begun),
                "on record when the driver died": len(known), "workers killed": self.kills,
                "drivers killed": 1}  # fmt: skip

    def _start(self) -> subprocess.Popen[bytes]:
        return self.parrot.start(*self.run, stdout=subprocess.DEVNULL)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        ends = time.monotonic() + self.every
        while process.poll() is None and time.monotonic() < ends:
            time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dialogues", type=int, default=150)
    parser.add_argument("--minutes", type=float, default=5.0, help="of kills")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills of a worker")
    given = parser.parse_args()
    ordeal = Ordeal(given.folder, given.dialogues, given.minutes, given.every)
    try:
        report = ordeal.endure()
    finally:
        ordeal.parrot.end()
        ordeal.cluster.end()
    write_json(given.folder / "kills.json", report)
    print(json.dumps(report))
