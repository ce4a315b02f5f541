"""Engines whose work is done by Ray actors.

To the simulator they are engines like any other: the conversation, the journal and the endpoints stay
on the driver, so what a run promises it promises here too, and only a request and its reply travel. A
reply whose worker died is asked for again, of another one: that turn is all that is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from parrot_edge.cluster.connection import survey_nodes
from parrot_edge.cluster.files import PackedModel
from parrot_edge.cluster.plan import Place, plan_workers
from parrot_edge.cluster.worker import Clerk, Trait, Worker
from parrot_edge.engine.base import Engine, Reply, Request, Session
from parrot_edge.errors import ClusterError, ModelError, ParrotError, UsageError
from parrot_edge.machine import plural
from parrot_edge.models import LocalModel, RemoteModel

PATIENCE = 60.0
"""Seconds for which a cluster may have no worker at all."""

START_PATIENCE = 120.0
"""The same before the first one is there: its node may have to start Python, or be busy with another run."""

MOST_DEATHS = 20
"""Workers that one reply may take with it before it is held to be the cause."""

_MOST_STARTS = 5  # of a worker that dies while it opens its models
_SECONDS_BETWEEN_STARTS = 1.0


@asynccontextmanager
async def open_pair_on_ray(
    name: str,
    ask: LocalModel | RemoteModel,
    chat: LocalModel | RemoteModel,
    load: Any,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[tuple[tuple[Engine, Engine], int]]:
    """Engines for both sides over the cluster that is connected, and how many dialogues they can hold.

    name  of the cluster, as `connect` gives it
    load  a `pair.Load` for each worker; its limit on requests to endpoints holds for the whole run
    say   told of nodes that are left out

    Raises `ClusterError` where no worker can be had and `UsageError` where both models are endpoints.
    """
    from parrot_edge.engine.remote import RemoteEngine
    from parrot_edge.pair import memory_needed, open_pair  # loads llama.cpp

    local = [model for model in (ask, chat) if not isinstance(model, RemoteModel)]
    if not local:
        raise UsageError("both sides are endpoints, so there is nothing to spread; leave --ray out")
    sides = (local[0], local[-1])
    nodes, left_out = await asyncio.to_thread(survey_nodes, name)
    for where, why in left_out.items():
        say(f"the node {where} {why}")
    places = plan_workers(nodes, memory_needed(sides, load), load.threads)
    if not places:
        raise ClusterError(f"{name} has no CPUs to give away; start a node with some")
    packed = {model: await asyncio.to_thread(PackedModel.of, model) for model in dict.fromkeys(sides)}

    def make(place: Place) -> Any:
        return _start_worker(place, (open_pair, [packed[side] for side in sides], load))

    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool(name, places, load.parallel, make, start_clerk(), say))
        engines: list[Engine] = []
        for model in (ask, chat):
            if isinstance(model, RemoteModel):
                remote = RemoteEngine(model.url, model.model, parallel=load.endpoint_requests)
                stack.push_async_callback(remote.aclose)
                engines.append(remote)
            else:
                side = len(engines) if len(local) == 2 else 0
                engines.append(RayEngine(pool, side, model.name))
        yield (engines[0], engines[1]), load.parallel * len(places)


def _start_worker(place: Place, arguments: tuple[Any, list[PackedModel], Any]) -> Any:
    """An actor in its place, or wherever Ray finds room should that node be gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    open_pair, models, load = arguments
    actor = ray.remote(Worker).options(
        num_cpus=place.cpus,
        num_gpus=place.gpus,
        memory=place.memory,
        max_concurrency=4 * load.parallel + 16,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=True),
    )
    return actor.remote(open_pair, models, replace(load, threads=place.threads))


def start_clerk() -> Any:
    """The actor beside the driver that reads its files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Clerk).options(num_cpus=0, scheduling_strategy=here).remote()


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it.

    busy     conversations that it holds, by side
    state    "awaited" (Ray has no room for it yet), "opening", "ready" or "failed"
    failure  why it can never be ready
    """

    place: Place
    actor: Any = None
    state: str = "awaited"
    failure: ParrotError | None = None
    busy: Counter[int] = field(default_factory=Counter)


class Pool:
    """The workers of a run: who is ready, who is least busy, and a new one in place of each that dies.

    parallel  conversations that a worker holds at once, of each side
    make      starts an actor in a place
    clerk     the actor that workers get files from, or None where they need none
    """

    def __init__(
        self,
        name: str,
        places: Sequence[Place],
        parallel: int,
        make: Callable[[Place], Any],
        clerk: Any = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.traits: Sequence[Trait] = ()
        self._name, self._parallel, self._make = name, parallel, make
        self._clerk, self._say = clerk, say
        self._hands = [_Hand(place) for place in places]
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Pool:
        """Start all workers and wait for the first; raises `ClusterError` where none comes."""
        for hand in self._hands:
            self._spawn(self._bring_up(hand))
        try:
            async with self._changed:
                await self._wait_for_a_worker()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for hand in self._hands:
            _end(hand.actor)
        _end(self._clerk)

    async def take(self, side: int) -> _Hand:
        """The least busy worker that has room for a conversation; waits for one.

        Raises `ClusterError` where there has been no worker at all for `PATIENCE`, or `START_PATIENCE`.
        """
        async with self._changed:
            while True:
                await self._wait_for_a_worker()
                ready = [hand for hand in self._hands if hand.state == "ready"]
                hand = min(ready, key=lambda hand: hand.busy[side])
                if hand.busy[side] < self._parallel:
                    hand.busy[side] += 1
                    return hand
                await self._changed.wait()

    async def leave(self, hand: _Hand, side: int) -> None:
        """Give a conversation's room back."""
        hand.busy[side] -= 1
        await self._announce()

    async def replace(self, hand: _Hand, actor: Any) -> None:
        """Start a new worker in place of one that died; the others that it died to come too late."""
        if hand.actor is actor and hand.state == "ready":
            hand.state = "awaited"
            self._spawn(self._bring_up(hand))

    async def _bring_up(self, hand: _Hand) -> None:
        """Start an actor until one is ready, or says why it cannot be."""
        from ray.exceptions import RayError, RayTaskError

        deaths = 0
        while hand.state == "awaited":
            _end(hand.actor)
            hand.actor = self._make(hand.place)
            try:
                await hand.actor.exist.remote()
                hand.state = "opening"
                self.traits = await hand.actor.open.remote(self._clerk)
                hand.state = "ready"
            except RayTaskError as error:
                self._give_up(hand, _as_own(error))
            except RayError:
                deaths += hand.state == "opening"
                hand.state = "awaited"
                if deaths == _MOST_STARTS:
                    why = f"it died {deaths} times while it opened its models, which may want more memory"
                    self._give_up(hand, ModelError(why))
                await asyncio.sleep(_SECONDS_BETWEEN_STARTS)
        await self._announce()

    def _give_up(self, hand: _Hand, failure: ParrotError) -> None:
        hand.state, hand.failure = "failed", failure
        if any(other.failure is None for other in self._hands):
            self._say(f"a worker is left out: {failure}")

    async def _wait_for_a_worker(self) -> None:
        """Return as soon as one is ready; the condition is held."""
        patience = PATIENCE if self.traits else START_PATIENCE
        while not any(hand.state == "ready" for hand in self._hands):
            if all(hand.failure for hand in self._hands):
                raise ClusterError(f"no worker of {self._name} can start: {self._hands[0].failure}")
            try:
                async with asyncio.timeout(patience):
                    await self._changed.wait()
            except TimeoutError:
                if any(hand.state == "opening" for hand in self._hands):
                    continue  # a large file takes its time
                raise ClusterError(
                    f"{self._name} has had no worker for {patience:.0f} s; see that its nodes are up, with "
                    f"{plural(self._hands[0].place.cpus, 'CPU')} free, and carry on with --resume"
                ) from None

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass(frozen=True)
class RayEngine:
    """An `Engine` over a pool; `side` is the place of its model in the workers."""

    pool: Pool
    side: int
    name: str

    @property
    def writes_any_role(self) -> bool:
        return self.pool.traits[self.side].writes_any_role

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the adapter's file, or else the model's, says of itself."""
        return self.pool.traits[self.side].metadata

    @asynccontextmanager
    async def session(self, *, beside: Session | None = None) -> AsyncIterator[RaySession]:
        """A conversation; it waits for a worker when its first reply is asked for."""
        if isinstance(beside, RaySession) and beside.seat.pool is self.pool:
            yield RaySession(beside.seat, self.side, beside.side)
            return
        seat = _Seat(self.pool, self.side)
        try:
            yield RaySession(seat, self.side, None)
        finally:
            await seat.leave()

    async def aclose(self) -> None:
        """The pool ends with its context."""


_numbers = itertools.count()


class _Seat:
    """A conversation's room in a worker, and after that one's death in another."""

    def __init__(self, pool: Pool, side: int) -> None:
        self.pool, self.number = pool, next(_numbers)
        self._side = side
        self._hand: _Hand | None = None
        self._actor: Any = None

    async def find(self) -> Any:
        """The actor that holds the conversation."""
        if self._hand is None:
            self._hand = await self.pool.take(self._side)
            self._actor = self._hand.actor
        return self._actor

    async def flee(self) -> None:
        """The worker has died."""
        if self._hand is not None:
            hand, self._hand = self._hand, None
            await self.pool.replace(hand, self._actor)
            await self.pool.leave(hand, self._side)

    async def leave(self) -> None:
        """The conversation is over."""
        if self._hand is not None:
            hand, self._hand = self._hand, None
            self._actor.end.options(num_returns=0).remote(self.number)
            await self.pool.leave(hand, self._side)


@dataclass(frozen=True)
class RaySession:
    """One side of a conversation with a worker."""

    seat: _Seat
    side: int
    beside: int | None

    async def reply(self, request: Request) -> Reply:
        """The next message, asked for again where a worker dies over it.

        Raises what the engine raises, `ModelError` where it kills every worker, and `ClusterError` where
        none is left.
        """
        from ray.exceptions import RayError, RayTaskError

        for _ in range(MOST_DEATHS):
            actor = await self.seat.find()
            try:
                return await actor.reply.remote(self.seat.number, self.side, self.beside, request)
            except RayTaskError as error:
                failure = _as_own(error)
            except RayError:
                await self.seat.flee()
                continue
            raise failure
        raise ModelError(f"{MOST_DEATHS} workers died over one reply; look into Ray's logs for the reason")


def _as_own(error: Any) -> ParrotError:
    """The error that a worker raised, as it would have been raised here."""
    cause = error.cause
    if isinstance(cause, ParrotError):
        return cause
    return ModelError(f"a worker failed: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")


def _end(actor: Any) -> None:
    import ray

    if actor is not None and ray.is_initialized():  # which `kill` would see to otherwise
        with contextlib.suppress(Exception):  # it may be dead, or the cluster
            ray.kill(actor)
