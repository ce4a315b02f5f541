"""What this machine has, and what follows from it: threads, sequences, memory.

It reads `/proc`, `/sys` and cgroups (v1 and v2) of Linux; elsewhere it falls back to what Python knows.
It knows nothing of models: sizes come in as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MAX_THREADS = 16
"""More threads than this gain little on small models: each layer waits for the slowest of them."""

MEMORY_SHARE = 0.8
"""Share of the available memory that is planned with; the rest is for the system and for Python."""

DEFAULT_SEQUENCES = 16
"""Dialogues side by side where memory allows: most of what batching gains, at a small cache."""


@dataclass(frozen=True)
class Machine:
    """A machine as this process may use it.

    cpu               the processor's name, "" where it is unknown
    online            logical CPUs of the whole machine
    usable            logical CPUs that this process may run on (affinity and cgroup quota), >= 1
    cores             physical cores among them, >= 1
    memory            bytes of main memory, or of the cgroup's limit where that is less
    memory_available  bytes that can be taken without swapping, within the cgroup's limit
    load              processes that ran or waited to run, mean of the last minute
    """

    cpu: str
    online: int
    usable: int
    cores: int
    memory: int
    memory_available: int
    load: float


@dataclass(frozen=True)
class Advice:
    """A number to use, and why, as one sentence."""

    count: int
    reason: str


def inspect_machine(root: Path = Path("/")) -> Machine:
    """Look at the machine now; `root` is where `proc` and `sys` lie."""
    cpus = _allowed_cpus()
    quota = min(_cpu_quotas(root), default=float("inf"))
    usable = max(1, int(min(len(cpus), quota)))
    memory, available = _memory(root)
    for limit, used in _memory_limits(root):
        memory, available = min(memory, limit), min(available, max(0, limit - used))
    return Machine(
        cpu=_cpu_name(root),
        online=os.cpu_count() or 1,
        usable=usable,
        cores=max(1, min(usable, len({_siblings(root, cpu) for cpu in cpus}))),
        memory=memory,
        memory_available=available,
        load=_load(),
    )


def installed_version(package: str) -> str:
    """The version of an installed Python package, or "" where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def choose_threads(machine: Machine | None = None) -> Advice:
    """How many threads to decode with: one per physical core that nothing else is using, 1..`MAX_THREADS`.

    ggml's threads spin at a barrier after each operation, so a thread that has to share its core
    holds up all others: with two threads on two busy cores decoding fell to a ninth.
    The load of the last minute says how many cores are taken; that it may count this program's own
    previous run errs on the safe side.

    >>> quiet = Machine("", online=8, usable=8, cores=4, memory=0, memory_available=0, load=0.2)
    >>> choose_threads(quiet).count
    4
    """
    machine = machine or inspect_machine()
    free = int(machine.online - machine.load + 0.5)
    count = max(1, min(machine.cores, free, MAX_THREADS))
    if count == machine.cores:
        reason = f"one for each of the {plural(machine.cores, 'usable core')}"
    elif machine.cores > MAX_THREADS and free >= MAX_THREADS:
        reason = (
            f"more than {MAX_THREADS} of the {machine.cores} usable cores would mostly wait for each other"
        )
    else:
        reason = (
            f"other programs keep {machine.online - max(free, 0)} of {plural(machine.online, 'core')} busy "
            f"(load {machine.load:.1f}), and a thread that shares its core holds up all others"
        )
    return Advice(count, reason)


def choose_sequences(
    fixed: int, each: int, machine: Machine | None = None, *, wanted: int = DEFAULT_SEQUENCES
) -> Advice:
    """How many sequences to run side by side: `wanted`, or fewer where memory is short; 0 if none fits.

    `fixed` are the bytes needed once (weights), `each` the bytes per sequence (its caches); both >= 0.

    >>> small = Machine("", 4, 4, 4, memory=4_000, memory_available=1_000, load=0.0)
    >>> choose_sequences(200, 100, small).count
    6
    """
    machine = machine or inspect_machine()
    room = int(machine.memory_available * MEMORY_SHARE) - fixed
    most = max(0, room // each) if each else wanted
    if most >= wanted:
        return Advice(
            wanted, f"{format_bytes(fixed + wanted * each)} of memory is needed, and there is enough"
        )
    return Advice(
        most,
        f"each takes {format_bytes(each)} after {format_bytes(fixed)} for the model, and "
        f"{format_bytes(machine.memory_available)} of memory is available",
    )


def format_bytes(count: int) -> str:
    """Bytes as a reader wants them.

    >>> format_bytes(98_362_432), format_bytes(1_610_612_736), format_bytes(512)
    ('98 MB', '1.6 GB', '512 bytes')
    """
    for size, unit, digits in ((10**9, "GB", 1), (10**6, "MB", 0), (10**3, "kB", 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} bytes"


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "core"), plural(2, "core")
    ('1 core', '2 cores')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _allowed_cpus() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        return set(range(os.cpu_count() or 1))


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def _siblings(root: Path, cpu: int) -> str:
    """What the logical CPUs of one physical core have in common; a CPU of unknown topology stands alone."""
    return _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _cpu_name(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def _memory(root: Path) -> tuple[int, int]:
    """Bytes of memory: all, and available."""
    fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    kilobytes = {key: int(value.split()[0]) for key, value in fields.items()}
    if "MemTotal" in kilobytes:
        return kilobytes["MemTotal"] * 1024, kilobytes.get("MemAvailable", kilobytes["MemTotal"]) * 1024
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPUs that each enclosing cgroup grants, as fractions of a core."""
    for group in _cgroups(root, "cpu"):
        quota, _, period = _read(group / "cpu.max").partition(" ")  # v2: "150000 100000" or "max 100000"
        if not quota:
            quota = _read(group / "cpu.cfs_quota_us")  # v1: -1 is no limit
            period = _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Bytes that each enclosing cgroup may take, and those it cannot give back."""
    for group in _cgroups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            # Files that were read count as used, but are dropped when memory is wanted.
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            yield int(limit), max(0, int(used) - droppable)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and all that enclose it, for v2 and v1.

    Inside a container the path in `/proc/self/cgroup` may be the host's and not exist here; the
    mount's root, where the walk ends, is then the container's own group.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            mount = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = mount / path.strip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _read(path: Path) -> str:
    """A small file's text, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
