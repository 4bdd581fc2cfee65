"""Tasks with any locks, and hypothesis strategies that choose them."""

from __future__ import annotations

__all__ = [
    "KEYS",
    "LIMITS",
    "LONGEST_MS",
    "LONG_MS",
    "REGISTRY",
    "SHORTEST_MS",
    "WISHES",
    "Task",
    "Wants",
    "Wish",
    "a_key",
    "made",
]

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
)
from diracx.tasks.plumbing.broker.models import Delivery, LockSpec, TaskMessage
from diracx.tasks.plumbing.enums import Size
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import MAX_LOCKS
from diracx.tasks.plumbing.registry import TaskRegistry
from hypothesis import strategies as st

#: Nothing expires and no timer fires while an example runs: the rules decide when time passes.
LONG_MS = 600_000


SHORTEST_MS, LONGEST_MS = 1, 315_576_000_000


KEYS = ("x", "y")


#: What the operator allows now, of slots and of units in any ten minutes; None: as much as one likes.
LIMITS: dict[str, int | None] = {}


Wish = tuple[str, str, int]


def made(wish: Wish) -> Iterator[BaseLock]:
    """The locks of one task: kind, key and number."""
    what, key, number = wish
    if what == "mutex":
        yield MutexLock(JOB, key, ttl_ms=number)
    elif what == "write":
        yield ExclusiveRWLock(JOB, key, ttl_ms=number)
    elif what == "read":
        yield SharedRWLock(JOB, key)
    elif what == "slot":
        slot = ConcurrencyLimiter(JOB, key, ttl_ms=number)
        slot.limit = LIMITS[f"slot {key}"]
        yield slot
    elif what == "rate":
        rate = RateLimiter(JOB, key, n_items=number)
        rate.limit, rate.window_seconds = LIMITS[f"rate {key}"], LONG_MS / 1000
        yield rate
    elif what == "many mutexes":
        yield from (MutexLock(JOB, key, n, ttl_ms=LONG_MS) for n in range(number))
    elif what == "many readers":
        yield from (SharedRWLock(JOB, key, n) for n in range(number))
    elif what == "one mutex many times":
        yield from (MutexLock(JOB, key, ttl_ms=LONG_MS) for _ in range(number))


@dataclass
class Wants(BaseTask):
    wishes: list[Any]

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [lock for wish in self.wishes for lock in made(tuple(wish))]

    async def execute(self) -> None:
        """Never called: the rules are the workers."""


REGISTRY = TaskRegistry.of({"model:Wants": Wants})


a_key, _ttl_ms = st.sampled_from(KEYS), st.sampled_from([LONG_MS, LONG_MS, SHORTEST_MS, LONGEST_MS])


_single = st.one_of(
    st.tuples(st.sampled_from(["mutex", "mutex", "write", "slot"]), a_key, _ttl_ms),
    st.tuples(st.just("read"), a_key, st.just(0)),
    st.tuples(st.just("rate"), a_key, st.integers(1, 2)),
)


_many = st.tuples(
    st.sampled_from(["many mutexes", "many readers", "one mutex many times"]),
    a_key,
    st.sampled_from([100, MAX_LOCKS - 4, MAX_LOCKS + 1, 5 * MAX_LOCKS]),
)


WISHES = st.one_of(
    st.lists(_single, max_size=1),
    st.lists(_single, max_size=4),
    st.lists(_single, max_size=4),
    st.tuples(_many, _single).map(list),
)


@dataclass(eq=False)
class Task:
    """Model of one task."""

    message: TaskMessage
    order: tuple[int, int]
    """Its place among all: rank of its priority, number of its submission."""
    size: Size
    place: str = "waiting"
    """waiting (queued, parked, deferred), reserved, running or deleted."""
    plain: bool = True
    """It keeps its place in line: no worker died with it, and it was not run before."""
    worker: str = ""
    delivery: Delivery | None = None
    specs: list[LockSpec] = field(default_factory=list)
    marked: bool = False
    """It is to be cancelled by the worker that has it."""
