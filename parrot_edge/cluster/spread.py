"""Work on many items, done on the nodes of a cluster, whose results come back in order.

For what is costly and depends on nothing but the item; decisions stay with the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from parrot_edge.cluster.connection import count_cpus, survey_nodes
from parrot_edge.errors import ClusterError, ParrotError

PATIENCE = 60.0
"""Seconds for which a cluster may have no CPU left."""

_BATCHES_PER_CPU = 3  # one is worked on, and two wait

_T = TypeVar("_T")
_K = TypeVar("_K")
_R = TypeVar("_R")


def map_in_order(
    name: str,
    work: Callable[[list[_K]], list[_R]],
    items: Iterable[_T],
    *,
    key: Callable[[_T], _K],
    size: int = 50,
) -> Iterator[tuple[_T, _R]]:
    """Each item and what `work` made of its key, in order; `work` gets lists of up to `size` keys.

    Items are taken as the results are, so that few are held at any time; where taking one fails, those
    before it still come out. A batch whose worker died is done again. `name` is the cluster's. Raises what
    `work` and `items` do, and `ClusterError` where a node cannot be used or none is left.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    for where, why in survey_nodes(name)[1].items():
        raise ClusterError(f"the node {where} {why}")
    task: Any = ray.remote(num_cpus=1, max_retries=-1)(_call)
    shared = ray.put(work)
    source, failures = iter(items), list[Exception]()
    under_way: deque[tuple[list[_T], Any]] = deque()

    def fill() -> None:
        while not failures and len(under_way) < _BATCHES_PER_CPU * max(1, count_cpus()):
            batch: list[_T] = []
            try:
                batch.extend(islice(source, size))
            except Exception as error:
                failures.append(error)
            if not batch:
                return
            under_way.append((batch, task.remote(shared, [key(item) for item in batch])))

    fill()
    while under_way:
        batch, reference = under_way.popleft()
        try:
            results = _wait_for(reference, name)
        except RayTaskError as error:
            failure = error.cause
        except RayError as error:
            failure = ClusterError(f"{name} failed ({type(error).__name__}); see Ray's logs there")
        else:
            yield from zip(batch, results, strict=True)
            fill()
            continue
        if isinstance(failure, ParrotError):
            raise failure
        raise ClusterError(f"a worker failed: {type(failure).__name__}: {failure}")
    if failures:
        raise failures[0]


def _call(work: Callable[[list[_K]], list[_R]], keys: list[_K]) -> list[_R]:
    return work(keys)


def _wait_for(reference: Any, name: str) -> Any:
    """A task's result; raises `ClusterError` where nobody is left to do it."""
    import ray

    while True:
        try:
            return ray.get(reference, timeout=PATIENCE)
        except ray.exceptions.GetTimeoutError:
            if not count_cpus():
                reason = f"has had no node left for {PATIENCE:.0f} s; see that it is up"
                raise ClusterError(f"{name} {reason}") from None
