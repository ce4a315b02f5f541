"""Joining a Ray cluster, or starting a local one, and what its nodes have.

Ray's own words stay off the streams: stdout holds rows, and an error is one sentence.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parrot_edge import __version__
from parrot_edge.errors import ClusterError, UsageError
from parrot_edge.machine import inspect_machine

_CONNECT_SECONDS = 5.0
_SURVEY_SECONDS = 60.0
_HEARTBEAT_SECONDS = 2.0
_MOST_MISSED = 5  # heartbeats of the head
_OBJECT_STORE_BYTES = 256 * 2**20  # of a local cluster: requests and replies are small
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # with empty settings
_HTTP2_SETTINGS = 4  # the type of the frame that the other side has to begin with


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray counts it and as it finds itself.

    cpus, gpus  that Ray may give away
    memory      bytes that Ray may give away
    cores       physical ones, >= 1
    offloads    whether its llama.cpp uses GPUs
    """

    id: str
    name: str
    cpus: int
    gpus: int
    memory: int
    cores: int
    offloads: bool


@contextlib.contextmanager
def connect(address: str, *, cpus: int | None = None) -> Iterator[str]:
    """Be the driver of a cluster while the context lasts; yields its name for messages.

    address  "auto" for a local cluster that ends with this process, else `host:port` of one that runs,
             on one of whose nodes this is
    cpus     that a local cluster gives away; those of this machine if None

    Raises `ClusterError` where there is no cluster, or one of another version, and `UsageError` for
    what can be no address. Where the cluster's head dies meanwhile, the process ends with one sentence, as it
    would by a kill: Ray does the same later, with many lines, and cannot be kept from it.
    """
    name = "the local cluster" if address == "auto" else f"the cluster at {address}"
    if address != "auto":
        _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it would report to its makers
    try:
        import ray
    except ImportError:
        raise ClusterError("--ray needs Ray; run `pip install 'parrot-edge[ray]'`") from None
    # Ray prints what happens to workers on stdout, and has no public switch for it
    ray._private.worker._worker_logs_enabled = False
    options: dict[str, Any] = {"address": address}
    if address == "auto":
        os.environ.setdefault("RAY_worker_niceness", "0")  # they are the work, not what runs beside it
        options = {
            "address": "local",
            "num_cpus": cpus or inspect_machine().usable,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(_explain(str(error), name)) from None
    over = threading.Event()
    head = ray.get_runtime_context().gcs_address
    threading.Thread(target=_watch_head, args=(head, name, over), daemon=True).start()
    try:
        yield name
    finally:
        over.set()
        ray.shutdown()


def _watch_head(address: str, name: str, over: threading.Event) -> None:
    """Until it is over, see that the cluster's head is there; else end the process."""
    missed = 0
    while not over.wait(_HEARTBEAT_SECONDS):
        try:
            _reach(address).close()
            missed = 0
        except OSError:
            missed += 1
        if missed == _MOST_MISSED and not over.is_set():
            advice = "see that it is up and start again; simulate and curate go on with --resume"
            os.write(2, f"parrot: {name} has lost its head; {advice}\n".encode())
            os._exit(1)


def _reach(address: str) -> socket.socket:
    """A connection to `host:port`; raises `OSError`."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS)


def _check_address(address: str) -> None:
    """Raise where nothing that can be Ray listens: Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise UsageError(
            "--ray joins a cluster from one of its nodes; give host:port of its head, not ray://"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is no address of a cluster; give host:port, or auto")
    try:
        with _reach(address) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(4)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if answer[3:4] == bytes([_HTTP2_SETTINGS]):
            return
        reason = "what answers there is not Ray"
    raise ClusterError(
        f"no cluster is at {address} ({reason}); start one with `ray start --head`, or give --ray auto"
    )


def _explain(reason: str, name: str) -> str:
    """One sentence for what Ray says in many lines."""
    versions = re.findall(r"(Ray|Python): (\S+)", reason)
    if "ersion mismatch" in reason and len(versions) == 4:
        theirs, ours = ([" ".join(pair) for pair in versions[i : i + 2]] for i in (0, 2))
        return f"{name} runs {' on '.join(theirs)}, and this is {' on '.join(ours)}; install the same here"
    first = " ".join(reason.split("\n")[0].split())
    return f"{name} cannot be joined ({first[:200]}); run parrot on one of its nodes"


def count_cpus() -> int:
    """CPUs that the nodes which are up may give away."""
    import ray

    return sum(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])


def survey_nodes(name: str) -> tuple[list[Node], dict[str, str]]:
    """The nodes that parrot can work on, and for each other one, by name, why it cannot.

    Raises `ClusterError` where there is none.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=0)(look_around)
    asked = {}
    for identity in alive:
        there = NodeAffinitySchedulingStrategy(identity, soft=False)
        asked[task.options(scheduling_strategy=there).remote()] = identity
    ray.wait(list(asked), num_returns=len(asked), timeout=_SURVEY_SECONDS)
    nodes, left_out = [], {}
    for reference, identity in asked.items():
        resources = alive[identity]["Resources"]
        where = f"{alive[identity]['NodeManagerHostname']} ({identity[:8]})"
        try:
            found = ray.get(reference, timeout=0)
        except Exception as error:  # nearly anything, as it is what a node lacks
            left_out[where] = _what_is_wrong(error)
            continue
        if found["version"] != __version__:
            left_out[where] = f"has parrot_edge {found['version']}, not {__version__}; install the same"
            continue
        nodes.append(
            Node(
                identity,
                where,
                int(resources.get("CPU", 0)),
                int(resources.get("GPU", 0)),
                int(resources.get("memory", 0)),
                found["cores"],
                found["offloads"],
            )
        )
    if not nodes:
        where, why = next(iter(left_out.items()), ("", "has no nodes"))
        raise ClusterError(f"{name} cannot be used: {f'{where} {why}' if where else why}")
    return nodes, left_out


def look_around() -> dict[str, Any]:
    """What a node has; runs there."""
    from parrot_edge.engine.native import supports_gpus

    return {"version": __version__, "cores": inspect_machine().cores, "offloads": supports_gpus()}


def _what_is_wrong(error: Exception) -> str:
    text = str(error)
    if match := re.search(r"No module named '([\w.]+)'", text):
        package = "llama-cpp-python" if match[1].startswith("llama") else "parrot-edge"
        return f"lacks {match[1]}; run `pip install '{package}[ray]=={__version__}'` there".replace(
            "llama-cpp-python[ray]==" + __version__, "llama-cpp-python"
        )
    if type(error).__name__ == "GetTimeoutError":
        return f"did not answer within {_SURVEY_SECONDS:.0f} s; see that it is up"
    return f"failed ({type(error).__name__}); see Ray's logs there"
