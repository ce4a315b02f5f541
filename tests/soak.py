"""Hours of simulation on the embedded models while everything goes wrong.

    python tests/soak.py OUT --minutes 120

Three runs of `parrot simulate` side by side, each on one thread:

    steady  both sides local; stopped and continued, its clock jumps
    remote  as steady, and the Chat side is an endpoint on this machine that falls ill in every way
    killed  both sides local; killed, interrupted, its disk fills up, and resumed each time

Judged are the first two for resident memory, file handles and threads, as the third never lives long,
and all for their rows: every seed's exactly once, with every message that ever was in the journal.
OUT gets soak.json and soak.svg; `python tests/soak.py --show soak.json` prints the figures as a table.
SIGTERM ends it early, with its figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import cycle
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from soak_endpoint import ILLNESSES, Endpoint  # noqa: E402

from parrot_edge.dialogue import parse_seed  # noqa: E402
from parrot_edge.jsonl import Line, encode, read_lines  # noqa: E402
from parrot_edge.seeds import builtin_path  # noqa: E402
from parrot_edge.store import write_json  # noqa: E402

PARALLEL = 8
TURNS = 4
MAX_TOKENS = 48
MOST_GROWTH = 0.05
"""Of resident memory after the warm-up."""

SAMPLE_COLUMNS = ["seconds", "resident_kib", "anonymous_kib", "files", "sockets", "threads", "life"]

_DISK_MIB = 64
_HEALTHY = (24.0, 40.0)
"""Seconds between two illnesses: more than the longest wait before a retry (16 s) and a stop, so that no
request meets illnesses alone."""

_SECONDS_BETWEEN_SAMPLES = 2.0
_PATIENCE = 1200.0  # seconds; a machine may be busy with other things
_OPENINGS = [line.row() for line in read_lines(builtin_path())]

Recorded = dict[str, list[dict[str, str]]]
"""The messages made for each dialogue, by its id."""


def seed_row(number: int) -> dict[str, Any]:
    """The seeds never end: those that are built in, again and again, each time under another id."""
    row = _OPENINGS[number % len(_OPENINGS)]
    return {**row, "id": f"{number}-{row['id']}"}


class Run:
    """One `parrot simulate`, its output in `folder`; it may have several lives."""

    def __init__(self, name: str, folder: Path, chat: str, environment: dict[str, str]) -> None:
        folder.mkdir(exist_ok=True)
        self.name, self.folder = name, folder
        self.output, self.journal = folder / "out.jsonl", folder / "out.jsonl.journal"
        self.lives = 0
        self.faults: Counter[str] = Counter()
        self.recorded: Recorded = {}
        self.samples: list[list[float]] = []
        self._command = [sys.executable, str(ROOT / "tests" / "soak_parrot.py"), "simulate"]
        self._options = [
            "-o", str(self.output), "--chat", chat, "--turns", str(TURNS), "--threads", "1",
            "--max-tokens", str(MAX_TOKENS), "--parallel", str(PARALLEL),
        ]  # fmt: skip
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
        self.process: subprocess.Popen[bytes]

    def start(self, *arguments: str, preexec_fn: Callable[[], None] | None = None) -> None:
        self.close()
        self.lives += 1
        self._old_journal = self.journal.stat().st_ino if self.journal.exists() else None
        command = [*self._command, *arguments, *self._options]
        # Not in the folder, whose disk may be full
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stderr=self._errors, preexec_fn=preexec_fn
        )

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    def close(self) -> None:
        """End the process, if there is one, and close what is open."""
        if not hasattr(self, "process"):
            return
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.close_stdin()
        self._errors.close()

    def signal(self, number: int, fault: str) -> None:
        self.faults[fault] += 1
        self.process.send_signal(number)

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def expect_end(self, code: int, said: str = "", seconds: float = _PATIENCE) -> None:
        """Wait for the process; it must end so, with one line on stderr, or none."""
        self.close_stdin()
        self.process.wait(seconds)
        errors = self._said()
        assert (self.process.returncode, errors.count("\n")) == (code, 1 if said else 0), (
            f"{self.name} ended with {self.process.returncode}, not {code}: {errors}"
        )
        assert said in errors, errors

    def wait_for_progress(self) -> None:
        """Wait until a process has opened its journal, or opened it anew, and added to it."""
        self._wait_until(lambda: self.journal.exists() and self.journal.stat().st_ino != self._old_journal)
        size = self.journal.stat().st_size
        self._wait_until(lambda: self.journal.stat().st_size > size)

    def _wait_until(self, condition: Callable[[], bool], seconds: float = _PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            self.check_alive()
            assert time.monotonic() < deadline, f"{self.name} does not go on"
            time.sleep(0.1)

    def check_alive(self) -> None:
        code = self.process.poll()
        assert code is None, f"{self.name} ended with {code}: {self._said()}"

    def rows(self) -> list[dict[str, Any]]:
        return _whole_rows(self.output)

    def collect_journal(self) -> None:
        """Remember what is in the journal; it must go on from what was there before."""
        now: Recorded = {}
        for entry in _whole_rows(self.journal)[1:]:
            messages = now.setdefault(entry["id"], [])
            if "content" in entry:
                messages.append({"role": entry["role"], "content": entry["content"]})
        for identity, messages in now.items():
            before = self.recorded.get(identity, [])
            assert messages[: len(before)] == before, f"{self.name}: {identity} lost messages"
        self.recorded |= now

    def check_rows(self, seeds: int) -> dict[str, int]:
        """Every id exactly once, every message of the journal in its row."""
        assert not self.journal.exists(), f"{self.name}: the run is not complete"
        rows = {row["id"]: row for row in self.rows()}
        expected = {row["id"]: row for row in map(seed_row, range(seeds))}
        assert len(self.rows()) == len(rows), f"{self.name}: an id is there twice"
        assert rows.keys() == expected.keys(), f"{self.name}: ids are missing, or too many"
        for identity, recorded in self.recorded.items():
            given = parse_seed(Line("seeds", 1, encode(expected[identity]))).messages
            made = rows[identity]["messages"][len(given) :]
            unanswered = recorded[len(made) :]
            assert recorded[: len(made)] == made[: len(recorded)], f"{self.name}: {identity} was changed"
            assert [each["role"] for each in unanswered] in ([], ["user"]), f"{self.name}: {identity} was cut"
        return {
            "rows": len(rows),
            "messages": sum(len(row["messages"]) for row in rows.values()),
            "messages_compared": sum(map(len, self.recorded.values())),
        }

    def sample(self, folder: Path, seconds: float) -> None:
        """Note what the kernel says of the process: KiB resident, of that anonymous, handles, threads."""
        process = Path(f"/proc/{self.process.pid}")
        with contextlib.suppress(OSError, KeyError):  # it has just ended
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            kib = [int(status[key].split()[0]) for key in ("VmRSS", "RssAnon")]
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            sockets = sum(link.startswith("socket:") for link in links)
            threads = int(status["Threads"])
            sample = [round(seconds, 1), *kib, len(links) - sockets, sockets, threads, self.lives]
            self.samples.append(sample)
            with open(folder / f"{self.name}.samples", "a") as file:  # to be looked at while it lasts
                file.write(json.dumps(sample) + "\n")


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose writer may be in the middle of one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


class Feeder:
    """Gives a run that reads a pipe its seeds, never far ahead of what it has done."""

    def __init__(self, run: Run) -> None:
        self.run, self.given = run, 0
        self._done, self._offset = 0, 0

    def feed(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.run.output, "rb") as file:
            file.seek(self._offset)
            data = file.read()
            self._done += data.count(b"\n")
            self._offset += len(data)
        while self.given < self._done + PARALLEL + 4:
            assert self.run.process.stdin is not None
            self.run.process.stdin.write(encode(seed_row(self.given)))
            self.given += 1
        self.run.process.stdin.flush()


class SmallDisk:
    """A file system that can be filled up: one in memory where this user may mount one, else a folder
    whose files are held below a size."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._ballast = folder, folder / "ballast"
        command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "soak", str(folder)]
        try:
            self.is_real = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            self.is_real = False

    @property
    def complaint(self) -> str:
        return "No space left on device" if self.is_real else "File too large"

    def fill(self, run: Run) -> None:
        run.faults["full disk"] += 1
        if self.is_real:
            with contextlib.suppress(OSError), open(self._ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        else:
            size = min(path.stat().st_size for path in (run.output, run.journal))
            _, hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def limit_new_process(self) -> None:
        """In a process about to be started while the disk is full."""
        if not self.is_real:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        if self.is_real:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class Soak:
    """What goes wrong, and when; `minutes` of it, all judged after `warm_up` minutes."""

    def __init__(self, folder: Path, minutes: float, warm_up: float, seed: int) -> None:
        self.minutes, self.warm_up, self._seed = minutes, warm_up, seed
        self._folder = folder
        self._over = threading.Event()
        self._hours = minutes > 30
        self.disk = SmallDisk(folder / "disk")
        self.endpoint = Endpoint()
        patience = {} if self._hours else {"ENDPOINT_TIMEOUT": "4"}
        self.steady = Run("steady", folder / "steady", "chat", {})
        self.remote = Run(
            "remote", folder / "remote", self.endpoint.url, {"NO_PROXY": "127.0.0.1", **patience}
        )
        self.killed = Run("killed", self.disk.folder / "killed", "chat", {})
        self.runs = [self.steady, self.remote, self.killed]

    def go(self) -> dict[str, Any]:
        """The soak from start to end; what it measured. Raises `AssertionError` at what must not be."""
        feeders = [Feeder(self.steady), Feeder(self.remote)]
        jobs: list[Callable[[], None]] = [
            self._watch,
            *(lambda feeder=feeder: self._keep_feeding(feeder) for feeder in feeders),
            lambda: self._disturb(self.steady, random.Random(self._seed)),
            lambda: self._disturb(self.remote, random.Random(self._seed + 1)),
            lambda: self._sicken(random.Random(self._seed + 2)),
            lambda: self._kill(random.Random(self._seed + 3)),
        ]
        self._choose_file()
        for feeder in feeders:
            feeder.run.start("-")
            feeder.feed()
            feeder.run.wait_for_progress()
        self.began = time.monotonic()
        with ThreadPoolExecutor(len(jobs)) as pool:
            tasks = [pool.submit(job) for job in jobs]
            while not self._over.is_set():
                left = 60 * self.minutes - (time.monotonic() - self.began)
                done, _ = wait(tasks, timeout=max(0.0, min(left, 1.0)), return_when=FIRST_EXCEPTION)
                if done or left <= 0:
                    self._over.set()
            self.endpoint.recover()
        for task in tasks:
            task.result()
        begun = {row["id"] for row in self.killed.rows()} | self.killed.recorded.keys()
        seeds = {self.killed.name: 1 + max(int(identity.split("-")[0]) for identity in begun)}
        self.killed.start("--resume", "--limit", str(seeds["killed"]), str(self._folder / "seeds.jsonl"))
        for feeder in feeders:
            feeder.run.collect_journal()
            feeder.run.close_stdin()
            seeds[feeder.run.name] = feeder.given
        for run in self.runs:
            run.expect_end(0)
        return self._report({run.name: run.check_rows(seeds[run.name]) for run in self.runs})

    def _choose_file(self) -> None:
        """Have the file type for this machine chosen, which is done once and said on stderr."""
        first = Run("first", self._folder / "first", "chat", {})
        first.start("--seeds", "builtin", "--limit", "1")
        first.process.wait(_PATIENCE)
        first.close()

    def stop(self, *_: object) -> None:
        """Let no more go wrong, and judge what has been."""
        self._over.set()

    def close(self) -> None:
        """End what still runs."""
        self.endpoint.shutdown()
        self.endpoint.server_close()
        for run in self.runs:
            run.close()
        self.disk.unmount()

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_SAMPLES):
            for run in self.runs:
                if hasattr(run, "process"):
                    run.sample(self._folder, time.monotonic() - self.began)

    def _keep_feeding(self, feeder: Feeder) -> None:
        while not self._over.wait(0.5):
            feeder.run.check_alive()
            feeder.feed()

    def _disturb(self, run: Run, dice: random.Random) -> None:
        """Stop a process for a while; let its clock jump."""
        while not self._over.wait(dice.uniform(3, self._longest_peace)):
            if dice.random() < 0.5:
                run.signal(signal.SIGUSR1, "clock jump")
                continue
            run.signal(signal.SIGSTOP, "stop")
            self._over.wait(dice.uniform(0.5, 20 if self._hours else 5))
            run.process.send_signal(signal.SIGCONT)

    def _sicken(self, dice: random.Random) -> None:
        for illness in self._in_turn(ILLNESSES, dice):
            if self._over.wait(dice.uniform(*_HEALTHY)):
                return
            self.remote.faults[f"{illness} endpoint"] += 1
            self.endpoint.fall_ill(illness)
            hangs = illness in ("silent", "stalled")
            self._over.wait(dice.uniform(10, 180 if self._hours else 12) if hangs else dice.uniform(1, 5))
            self.endpoint.recover()

    def _kill(self, dice: random.Random) -> None:
        """Begin, and go on after each of the ways in which a run can end."""
        seeds, run = self._folder / "seeds.jsonl", self.killed
        with open(seeds, "wb") as file:
            file.writelines(encode(seed_row(number)) for number in range(100 + int(self.minutes * 60 * 5)))
        run.start("--resume", str(seeds))
        for fault in self._in_turn(["kill", "kill", "interrupt", "kill", "full disk"], dice):
            over = self._over.wait(dice.uniform(5, self._longest_peace))
            if fault != "kill":
                run.wait_for_progress()
            run.check_alive()
            if fault == "full disk":
                self.disk.fill(run)
                run.expect_end(1, self.disk.complaint)
                run.start("--resume", str(seeds), preexec_fn=self.disk.limit_new_process)
                run.expect_end(1, self.disk.complaint)
                self.disk.free()
            elif fault == "interrupt":
                run.signal(signal.SIGTERM, fault)
                run.expect_end(128 + signal.SIGTERM, "stopped; carry on with: parrot simulate --resume")
            else:
                run.signal(signal.SIGKILL, "kill")
                run.expect_end(-signal.SIGKILL)
            run.collect_journal()
            if over:
                return
            run.start("--resume", str(seeds))

    @property
    def _longest_peace(self) -> float:
        """Seconds without a fault of one kind, at most."""
        return 60.0 if self._hours else 10.0

    @staticmethod
    def _in_turn(kinds: tuple[str, ...] | list[str], dice: random.Random) -> Iterator[str]:
        """Each kind as often as the other, so that the warm-up has seen them all."""
        return cycle(dice.sample(kinds, len(kinds)))

    def _report(self, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
        runs = {
            run.name: {
                "lives": run.lives,
                "faults": dict(run.faults),
                **counts[run.name],
                "samples": run.samples,
            }
            for run in self.runs
        }
        for run in (self.steady, self.remote):
            runs[run.name]["measured"] = measure(run.samples, 60 * self.warm_up)
        runs["remote"] |= {"answers": self.endpoint.answered, "requests_failed": self.endpoint.failed}
        return {
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "warm_up_minutes": self.warm_up,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
            "disk": "a small file system" if self.disk.is_real else "a limit on the size of files",
            "sample_columns": [
                "seconds",
                "resident_kib",
                "anonymous_kib",
                "files",
                "sockets",
                "threads",
                "life",
            ],
            "runs": runs,
        }


def measure(samples: list[list[float]], warm_up: float) -> dict[str, Any]:
    """What a process held at the end of its warm-up (seconds), and at most after that."""
    early = [sample for sample in samples if sample[0] < warm_up]
    late = [sample for sample in samples if sample[0] >= warm_up]
    reference = [statistics.median(column) for column in zip(*early[-30:], strict=True)]
    most = [max(column) for column in zip(*late, strict=True)]
    least = [min(column) for column in zip(*late, strict=True)]
    before = [max(column) for column in zip(*early, strict=True)]
    return {
        "resident_mib": round(reference[1] / 1024, 1),
        "resident_mib_most": round(most[1] / 1024, 1),
        "resident_mib_least": round(least[1] / 1024, 1),
        "resident_growth": round(most[1] / reference[1] - 1, 4),
        "anonymous_growth": round(most[2] / reference[2] - 1, 4),
        "files": [int(before[3]), int(most[3])],
        "sockets": [int(before[4]), int(most[4])],
        "threads": [int(before[5]), int(most[5])],
    }


def complaints(report: dict[str, Any], most_growth: float = MOST_GROWTH) -> list[str]:
    """What a soak's figures must not be; ids and messages were checked as it ran."""
    found = []
    for name in ("steady", "remote"):
        measured = report["runs"][name]["measured"]
        if measured["resident_growth"] > most_growth:
            found.append(f"{name}: resident memory grew by {measured['resident_growth']:.1%}")
        for kind in ("files", "threads"):
            before, after = measured[kind]
            if after > before:
                found.append(f"{name}: {after} {kind} after the warm-up, {before} before")
        if measured["sockets"][1] > 2 * PARALLEL:
            found.append(f"{name}: {measured['sockets'][1]} sockets")
    return found


def soak(
    folder: Path,
    minutes: float,
    *,
    warm_up: float | None = None,
    seed: int = 0,
    most_growth: float = MOST_GROWTH,
) -> dict[str, Any]:
    """Soak for so many minutes; soak.json and soak.svg in `folder`, which must not be there, tell of it."""
    folder.mkdir(parents=True)
    work = Soak(folder, minutes, min(10.0, minutes / 4) if warm_up is None else warm_up, seed)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, work.stop)
    try:
        report = work.go()
    finally:
        work.close()
    report["complaints"] = complaints(report, most_growth)
    write_json(folder / "soak.json", report)
    draw(report, folder / "soak.svg")
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Resident memory over time, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, run in report["runs"].items():
        seconds, resident, *_ = zip(*run["samples"], strict=True)
        axes.plot([s / 60 for s in seconds], [kib / 1024 for kib in resident], label=name, linewidth=0.9)
    axes.axvline(report["warm_up_minutes"], color="grey", linestyle=":", linewidth=0.9)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=3)
    figure.savefig(path, metadata={"Date": None})


def table(report: dict[str, Any]) -> str:
    """A soak's figures as they stand in docs/reliability.md."""
    lines = [
        "| run | lives | faults | rows | messages | resident, MiB | growth | files | sockets | threads |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in report["runs"].items():
        faults = ", ".join(f"{number} × {fault}" for fault, number in run["faults"].items())
        cells = [name, run["lives"], faults, run["rows"], run["messages"]]
        if measured := run.get("measured"):
            pairs = [" → ".join(map(str, measured[kind])) for kind in ("files", "sockets", "threads")]
            growth = f"{100 * measured['resident_growth']:+.1f} %"
            cells += [f"{measured['resident_mib']} → {measured['resident_mib_most']}", growth, *pairs]
        else:
            cells += ["–"] * 5
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--warm-up", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=Path, metavar="SOAK.JSON")
    given = parser.parse_args()
    if given.show:
        print(table(json.loads(given.show.read_text())))
        return
    if given.folder is None:
        parser.error("OUT is missing")
    report = soak(given.folder, given.minutes, warm_up=given.warm_up, seed=given.seed)
    print(table(report))
    sys.exit("\n".join(report["complaints"]))


if __name__ == "__main__":
    main()
