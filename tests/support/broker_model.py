"""Model of the broker: where each task must be, compared with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, worker_state
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, TaskMessage, is_poison_candidate
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock, ConcurrencyLimiter, ExclusiveRWLock, MutexLock, SharedRWLock
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
)
from redis import Redis as SyncRedis
from redis.exceptions import ResponseError

WORKERS = ("a", "b")
STREAMS = keys.streams_of("medium")
#: No timer fires by itself and no lock expires while an example runs: the rules decide when time passes.
LONG_MS = 600_000
MAX_DELIVERIES = 3


class Two(ConcurrencyLimiter):
    limit = 2


def _mutex(key: str) -> BaseLock:
    return MutexLock(JOB, key, ttl_ms=LONG_MS)


#: What tasks may need. A new instance for each attempt, as workers make them.
WISHES: dict[str, Any] = {
    "nothing": lambda: [],
    "x": lambda: [_mutex("x")],
    "y": lambda: [_mutex("y")],
    "x and y": lambda: [_mutex("x"), _mutex("y")],
    "y and read": lambda: [_mutex("y"), SharedRWLock(JOB, "rw")],
    "read": lambda: [SharedRWLock(JOB, "rw")],
    "write": lambda: [ExclusiveRWLock(JOB, "rw", ttl_ms=LONG_MS)],
    "a slot": lambda: [Two(JOB, "slots", ttl_ms=LONG_MS)],
}


@dataclass(eq=False)
class Task:
    """Model of one task."""

    id: str
    wish: str
    message: TaskMessage
    stream: str
    group: str | None = None
    place: str = "queued"
    """queued, reserved, running, delayed, parked, dead or deleted."""
    worker: str = ""
    delivery: Delivery | None = None
    locks: list[dict[str, Any]] = field(default_factory=list)
    """Locks that it holds in the model."""
    redelivery_count: int = 0
    """Number of workers lost with it since its last retry."""
    may_have_started: bool = False
    """Another worker had it since its last retry, and it was not parked since."""
    survived: set[int] = field(default_factory=set)
    """Deliveries of its entry whose worker has come back after others had taken the task over."""
    ended: int = 0


def is_candidate(task: Task, more: int) -> bool:
    """True for a poison candidate. One that is poison is none any more: it will not run again."""
    assert task.delivery is not None
    delivery = replace(task.delivery, deliveries=1, earlier_redeliveries=task.redelivery_count + more, survived=0)
    return is_poison_candidate(delivery, MAX_DELIVERIES)


class ModelOfTasks(RuleBasedStateMachine):
    """Two workers and any number of tasks; invariants of the server are in the base class."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.sync = SyncRedis.from_url(self.url)
        self.sync.flushall()
        self.brokers = {name: RedisStreamBroker(self.url, consumer_name=name) for name in WORKERS}
        self.tasks: dict[str, Task] = {}
        self.late: list[tuple[str, Settlement]] = []
        """Settlements of deliveries that were taken over: the broker must refuse them."""
        self.groups: dict[str, set[str]] = {}
        self.callbacks: dict[str, str] = {}
        """Group -> id of its callback, not submitted yet."""
        self.may_wake = False

    def run(self, call: Any) -> Any:
        async def awaited() -> Any:
            return await call

        return self.runner.run(awaited())

    @initialize()
    def both_live(self) -> None:
        for worker in WORKERS:
            self._renew(worker)

    # --- what the model knows -------------------------------------------------------------------------------

    def _in(self, *places: str, worker: str | None = None) -> list[Task]:
        return [
            task
            for task in self.tasks.values()
            if task.place in places and (worker is None or task.worker == worker)
        ]

    def _is_dead(self, worker: str) -> bool:
        return worker not in self._living()

    def _living(self, *places: str) -> list[str]:
        """Workers that live and, if places are given, hold a task there."""
        ends_ms = zip(WORKERS, self.sync.zmscore(keys.ALIVE, list(WORKERS)), strict=True)
        # Off the list, or below zero: reclaimed.
        return self._with_tasks((worker for worker, ends in ends_ms if ends is not None and ends > 0), *places)

    def _with_tasks(self, workers: Iterable[str], *places: str) -> list[str]:
        """Select the workers with a task in one of the places, or all if no place is given."""
        return [worker for worker in workers if not places or self._in(*places, worker=worker)]

    def _renew(self, worker: str) -> None:
        held = self._in("reserved", "running", worker=worker)
        entries = [
            {"stream": t.delivery.stream, "entry": t.delivery.entry, "deliveries": t.delivery.deliveries}
            for t in held
            if t.delivery
        ]
        locks = [lock for task in held for lock in task.locks]
        *lost, _dataset_id, _shortest, _quiet = worker_state.renew(self.sync, worker, LONG_MS, entries, locks)
        assert lost == [[], [], []], "what the model knows to be held was not renewed"

    def _may_be_granted(self, locks: Sequence[dict[str, Any]]) -> bool:
        holders: dict[str, list[str]] = {}
        for task in self.tasks.values():
            for lock in task.locks:
                holders.setdefault(lock["key"], []).append(lock["kind"])
        for lock in locks:
            others = holders.get(lock["key"], [])
            room = {
                "mutex": not others,
                "exclusive": not others,
                "shared": "exclusive" not in others,
                "concurrency": len(others) < 2,
            }
            if not room[lock["kind"]]:
                return False
        return True

    # --- what must always hold ------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.every_task_is_in_one_place()  # the first: it sees which tasks were granted
        self.locks_have_the_owners_that_the_model_knows()
        self.only_those_wait_for_a_lock_who_do()
        self.a_free_lock_is_granted_or_about_to_be()

    def every_task_is_in_one_place(self) -> None:
        found: dict[str, list[Any]] = {}
        pipe = self.sync.pipeline(transaction=True)
        pipe.hkeys(keys.DELAYED_DATA)
        pipe.zrange(keys.DELAYED, 0, -1)
        for stream in STREAMS:
            pipe.xrange(stream)
            pipe.xpending_range(stream, keys.GROUP, "-", "+", 1000)
        delayed, timers, *streams = pipe.execute(raise_on_error=False)
        assert sorted(delayed) == sorted(timers)
        for entries, rows in zip(streams[::2], streams[1::2], strict=True):
            pending = self._owners(rows)
            assert set(pending) <= {entry for entry, _ in entries}, "pending, and not in the stream"
            for entry, fields in entries:
                task_id = TaskMessage.loadb(fields[b"data"]).task_id
                owner = pending.get(entry)
                found.setdefault(task_id, []).append(("queued",) if owner is None else ("reserved", *owner))
        for name in delayed:
            found.setdefault(name.decode(), []).append(("delayed",))
        for task in self.tasks.values():
            places = found.pop(task.id, [])
            if task.place == "parked" and places == [("queued",)] and self.may_wake:
                task.place = "queued"
            assert places == self._expected(task), f"{task.wish}, {task.place}"
            assert task.ended <= 1
        assert not found, "the origin of these is unknown"
        self.may_wake = False

    @staticmethod
    def _owners(rows: list[dict[str, Any]] | ResponseError) -> dict[bytes, tuple[str, int]]:
        """Entry -> its consumer and delivery count; an error means that there is no group yet."""
        if isinstance(rows, ResponseError):
            assert "NOGROUP" in str(rows)
            return {}
        return {row["message_id"]: (row["consumer"].decode(), row["times_delivered"]) for row in rows}

    @staticmethod
    def _expected(task: Task) -> list[Any]:
        if task.place in ("reserved", "running"):
            assert task.delivery is not None
            return [("reserved", task.worker, task.delivery.deliveries)]
        return {"queued": [("queued",)], "delayed": [("delayed",)], "parked": [("delayed",)], "gone": []}[
            task.place
        ]

    def locks_have_the_owners_that_the_model_knows(self) -> None:
        held = [lock for task in self.tasks.values() for lock in task.locks]
        mutexes = [_mutex(name).redis_key for name in ("x", "y")]
        rw = SharedRWLock(JOB, "rw").redis_key
        pipe = self.sync.pipeline(transaction=True)
        pipe.mget(mutexes)
        pipe.hmget(rw, "readers", "writer_owner")
        pipe.zcard(Two(JOB, "slots").redis_key)
        found, [readers_there, writer], slots_taken = pipe.execute()
        for key, holder in zip(mutexes, found, strict=True):
            owners = [lock["owner"].encode() for lock in held if lock["key"] == key]
            assert len(owners) <= 1
            assert holder == (owners[0] if owners else None)
        readers = [lock for lock in held if lock["kind"] == "shared"]
        writers = [lock["owner"].encode() for lock in held if lock["kind"] == "exclusive"]
        assert int(readers_there or 0) == len(readers)
        assert writer == (writers[0] if writers else None)
        assert not (readers and writers)
        slots = sum(lock["kind"] == "concurrency" for lock in held)
        assert slots_taken == slots <= 2

    def only_those_wait_for_a_lock_who_do(self) -> None:
        """Check that tasks in lines are parked or resumed, never running or deleted."""
        for key in self.sync.keys(keys.WAITING_PREFIX + "*"):
            for member in self.sync.zrange(key, 0, -1):
                task = self.tasks[member.decode().partition(":")[2]]
                assert task.place in ("parked", "queued", "reserved"), f"{task.place} in {key.decode()}"

    def a_free_lock_is_granted_or_about_to_be(self) -> None:
        for name in ("x", "y"):
            key = _mutex(name).redis_key
            wants = [t for t in self.tasks.values() if any(lock.redis_key == key for lock in WISHES[t.wish]())]
            parked = [task for task in wants if task.place == "parked"]
            if not parked or [task for task in wants if task.place in ("queued", "reserved")]:
                continue
            line = self.sync.zrange(f"{keys.WAITING_PREFIX}medium:{key}", 0, -1)
            waiting = {member.decode().partition(":")[2] for member in line}
            if any(task.id in waiting for task in parked):
                assert self.sync.exists(key), f"{name} lies idle"
