"""What is read from /proc, /sys and cgroups, over trees made up for the purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from parrot_edge.machine import MAX_THREADS, Machine, choose_sequences, choose_threads, inspect_machine

Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Write files below a root of their own; the machine has 8 logical CPUs and 1 GiB of memory."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (0.25, 0.0, 0.0))

    def write(files: dict[str, str]) -> Path:
        memory = "MemTotal: 1048576 kB\nMemFree: 1 kB\nMemAvailable: 524288 kB\nHugePages_Total: 0\n"
        for name, text in {"proc/meminfo": memory, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def make_machine(cores: int = 4, load: float = 0.0, online: int | None = None, available: int = 0) -> Machine:
    return Machine("", online or cores, cores, cores, available, available, load)


def test_machine_without_proc_topology_or_cgroups(tree: Tree) -> None:
    assert inspect_machine(tree({})) == Machine(
        cpu="", online=8, usable=8, cores=8, memory=2**30, memory_available=2**29, load=0.25
    )


def test_real_machine_has_a_core_and_memory() -> None:
    machine = inspect_machine()
    assert 1 <= machine.cores <= machine.usable
    assert 0 < machine.memory_available <= machine.memory
    assert machine.load >= 0


def test_cpu_is_named(tree: Tree) -> None:
    root = tree({"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n\nprocessor\t: 1\n"})
    assert inspect_machine(root).cpu == "Some CPU @ 2 GHz"


def test_siblings_of_a_core_count_once(tree: Tree) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    machine = inspect_machine(tree({topology.format(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}))
    assert (machine.usable, machine.cores) == (8, 4)


def test_affinity_limits_cores(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3, 5})
    machine = inspect_machine(tree({}))
    assert (machine.online, machine.usable, machine.cores) == (8, 3, 3)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/host/only", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
    ids=["none", "v2", "v2-parent", "v2-below-one", "v2-container", "v1", "v1-none"],
)
def test_cgroup_quota_limits_cores(tree: Tree, files: dict[str, str], cores: int) -> None:
    assert inspect_machine(tree(files)).cores == cores


def test_cgroup_limits_memory_and_read_files_do_not_count(tree: Tree) -> None:
    group = "sys/fs/cgroup/box/memory."
    root = tree(
        {
            "proc/self/cgroup": "0::/box",
            group + "max": "400000000",
            group + "current": "300000000",
            group + "stat": "anon 1\ninactive_file 50000000\n",
        }
    )
    machine = inspect_machine(root)
    assert (machine.memory, machine.memory_available) == (400_000_000, 150_000_000)


def test_cgroup_without_a_memory_limit_changes_nothing(tree: Tree) -> None:
    group = "sys/fs/cgroup/memory/memory."
    files = {
        group + "limit_in_bytes": "9223372036854771712",
        group + "usage_in_bytes": "5",
        group + "stat": "",
    }
    assert inspect_machine(tree({"proc/self/cgroup": "4:memory:/", **files})).memory_available == 2**29


@pytest.mark.parametrize(
    ("cores", "load", "count"),
    [(2, 0.0, 2), (2, 0.4, 2), (2, 0.9, 1), (2, 9.0, 1), (1, 3.0, 1), (4, 1.2, 3), (64, 0.0, MAX_THREADS)],
)
def test_threads_leave_out_taken_cores(cores: int, load: float, count: int) -> None:
    advice = choose_threads(make_machine(cores, load))
    assert advice.count == count
    assert advice.reason


def test_load_of_cores_that_are_not_ours_takes_no_thread() -> None:
    assert choose_threads(make_machine(cores=4, online=64, load=50.0)).count == 4
    assert choose_threads(make_machine(cores=4, online=64, load=62.0)).count == 2


def test_reason_tells_a_busy_machine_from_a_quiet_one() -> None:
    assert "one for each of the 2 usable cores" in choose_threads(make_machine(2)).reason
    assert "keep 2 of 2 cores busy (load 9.0)" in choose_threads(make_machine(2, 9.0)).reason
    assert "wait for each other" in choose_threads(make_machine(64)).reason


def test_sequences_are_as_wanted_where_memory_allows() -> None:
    machine = make_machine(available=1000)
    assert choose_sequences(100, 10, machine, wanted=70).count == 70
    assert choose_sequences(100, 10, machine, wanted=71).count == 70
    assert choose_sequences(900, 10, machine).count == 0
    assert choose_sequences(100, 0, machine, wanted=5).count == 5
