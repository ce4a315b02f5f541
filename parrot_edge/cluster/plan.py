"""How many workers each node gets, and what each of them may use. Knows nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass

from parrot_edge.cluster.connection import Node
from parrot_edge.machine import MAX_THREADS


@dataclass(frozen=True)
class Place:
    """Where a worker goes: its node, and what it takes there."""

    node: str
    cpus: int
    gpus: int
    memory: int
    threads: int


def plan_workers(nodes: list[Node], memory: int, threads: int | None = None) -> list[Place]:
    """Places for workers that need so many bytes of memory each, `threads` fixed or as suits the node.

    A worker has one engine, which gains little from more than `MAX_THREADS` threads: a node gets one
    for so many physical cores, or one for each GPU that it can use, as long as its memory lasts. A node
    that is short of memory gets one, which shortens its contexts or refuses.

    >>> node = Node("a", "a", cpus=64, gpus=0, memory=10**11, cores=32, offloads=False)
    >>> [(place.cpus, place.threads) for place in plan_workers([node], 10**9)]
    [(32, 16), (32, 16)]
    """
    places = []
    for node in nodes:
        cores = min(node.cores, node.cpus)
        if not cores:
            continue
        gpus = node.gpus if node.offloads else 0
        wanted = gpus or (max(1, cores // threads) if threads else -(-cores // MAX_THREADS))
        count = max(1, min(wanted, node.cpus, node.memory // memory if memory else wanted))
        place = Place(
            node.id,
            cpus=node.cpus // count,
            gpus=1 if gpus else 0,
            memory=min(memory, node.memory // count),
            threads=threads or max(1, min(cores // count, MAX_THREADS)),
        )
        places += [place] * count
    return places
