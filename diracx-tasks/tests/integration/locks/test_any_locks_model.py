"""Stateful test of tasks with any combination of locks against a model, on a real server.

What is checked: two never hold what excludes them; a task that waits and could run is served in line, whatever the
kind of lock, and passed over by tasks of another size only while no worker takes one that was granted its turn;
all that was submitted ends within a bounded number of rounds; and a server on which all has ended is empty.
`test_broker_model.py` knows where each task is; this one knows only that it is somewhere, and has any locks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseLock,
    ConcurrencyLimiter,
    SharedRWLock,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.cancel import TaskPlace
from diracx.tasks.plumbing.broker.models import Delivery, LockSpec, Settlement, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.enums import Priority, Size
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import MAX_LOCKS, lock_specs
from diracx.tasks.plumbing.submission.client import Binding
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from diracx.tasks.plumbing.worker.settlement import cancelled, defer, requeue
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis import Redis as SyncRedis
from support.any_locks import KEYS, LIMITS, LONG_MS, REGISTRY, WISHES, Task, Wants, Wish, a_key, made
from support.start_requests import start_request

#: Worker -> its size: there are two of each.
WORKERS = {"a": Size.MEDIUM, "b": Size.MEDIUM, "c": Size.SMALL, "d": Size.SMALL}
#: Picks one of those that there are. What is drawn must not depend on the server, whose clock runs on.
WHICH = st.integers(0, 10**6)


class LocksMachine(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.sync = SyncRedis.from_url(self.url)
        self.sync.flushall()
        self.brokers = {
            name: RedisStreamBroker(self.url, consumer_name=name, worker_size=size)
            for name, size in WORKERS.items()
        }
        self.tasks: dict[str, Task] = {}
        self.foreign: list[BaseLock] = []
        """Held by an owner that is no task."""
        self.units: Counter[str] = Counter()
        """Key of a rate limiter -> units that were granted."""
        LIMITS.update({f"{what} {key}": 2 for what in ("slot", "rate") for key in KEYS})
        for worker in WORKERS:
            self._lives(worker)

    def run(self, call: Any) -> Any:
        async def awaited() -> Any:
            return await call

        return self.runner.run(awaited())

    def _in(self, place: str, worker: str | None = None) -> list[Task]:
        return [t for t in self.tasks.values() if t.place == place and worker in (None, t.worker)]

    def _lives(self, worker: str) -> None:
        self.sync.zadd(keys.ALIVE, {worker: 2**45})

    # --- into the system ------------------------------------------------------------------------------------

    @rule(wishes=WISHES, priority=st.sampled_from(list(Priority)), size=st.sampled_from([Size.MEDIUM, Size.SMALL]))
    def submit(self, wishes: list[Wish], priority: Priority, size: Size) -> None:
        self._submit(wishes, priority, size)

    def _submit(self, wishes: list[Wish], priority: Priority, size: Size) -> None:
        task = Wants(wishes)
        if self._is_refused(wishes):
            with pytest.raises(ValueError, match="Wants"):
                Binding(None, REGISTRY).submission(task)
            return
        submission = replace(Binding(None, REGISTRY).submission(task), stream=keys.stream_name_for(priority, size))
        self.run(self.brokers["a"].submit([submission]))
        self._next_ms()  # the clock defines the place in line of tasks in different streams
        order = (list(Priority).index(priority), len(self.tasks))
        self.tasks[submission.message.task_id] = Task(submission.message, order, size)

    @rule(
        what=st.sampled_from(["mutex", "write", "read", "slot", "rate"]),
        sizes=st.lists(st.sampled_from([Size.MEDIUM, Size.MEDIUM, Size.SMALL]), min_size=1, max_size=4),
        held=st.booleans(),
        workers=st.sampled_from(["", "a", "c", "ac"]),
    )
    def line_up(self, what: str, sizes: list[Size], held: bool, workers: str) -> None:
        """Tasks whose order of submission determines the order of locks."""
        if held and what != "rate":
            self.hold_outside_tasks(("write" if what == "read" else what, "x", LONG_MS))
        for size in sizes:
            self._submit([(what, "x", {"rate": 1, "read": 0}.get(what, LONG_MS))], Priority.NORMAL, size)
        for worker in workers:
            self.work(worker, 10)

    def _is_refused(self, wishes: list[Wish]) -> bool:
        units: Counter[str] = Counter()
        wanted = set()
        for what, key, number in wishes:
            kind = {"write": "rw", "read": "rw", "many readers": "rw", "slot": "slot", "rate": "rate"}.get(
                what, "mutex"
            )
            if LIMITS.get(f"{what} {key}", 0) is None:
                continue
            if what == "rate":
                units[key] += number
            wanted |= (
                {(kind, key, n) for n in range(number)}
                if what in ("many mutexes", "many readers")
                else {(kind, key, -1)}
            )
        return len(wanted) > MAX_LOCKS or any(n > (LIMITS[f"rate {key}"] or n) for key, n in units.items())

    # --- to a worker ----------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(list(WORKERS)), free=st.integers(1, 5))
    def work(self, worker: str, free: int) -> None:
        deliveries, _ = self.run(self.brokers[worker].fetch(free, lease_seconds=LONG_MS))
        self._start(self._received(worker, deliveries))

    def _received(self, worker: str, deliveries: list[Delivery]) -> list[Task]:
        received = []
        for delivery in deliveries:
            assert delivery.data is not None
            task = self.tasks[TaskMessage.loadb(delivery.data).task_id]
            assert task.place == "waiting"
            task.place, task.worker, task.delivery = "reserved", worker, delivery
            if delivery.cancelled:
                self._settle(task, cancelled(delivery, task.message, WorkerSettings()))
            else:
                received.append(task)
        return received

    def _start(self, tasks: list[Task]) -> None:
        """Ask for the locks of all of them in one call, as a worker does."""
        requested: list[tuple[Task, dict[str, Any]]] = []
        for task in tasks:
            delivery = task.delivery
            assert delivery is not None
            try:
                specs = lock_specs(Wants(*task.message.task_args).execution_locks)
            except ValueError:  # its limit was lowered: a dead letter
                self._settle(task, Settlement(delivery))
                continue
            requested.append((task, start_request(delivery, specs, LONG_MS)))
        if not requested:
            return
        replies = self.run(self.brokers[requested[0][0].worker].start([wanted for _, wanted in requested]))
        for (task, wanted), reply in zip(requested, replies, strict=True):
            if reply.granted:
                self._granted(task, wanted["locks"])
            else:
                assert reply.refusing is not None
                task.place, task.delivery = "waiting", None

    def _granted(self, task: Task, specs: list[LockSpec]) -> None:
        self._check_order(task)
        for spec in specs:
            self._check_exclusion(spec)
            if spec["kind"] == "rate":
                self.units[spec["key"]] += spec["n_items"]
        task.place, task.specs = "running", specs

    def _check_order(self, task: Task) -> None:
        """Check that no earlier task with the same locks is waiting."""
        wanted = self._waits_in_line(task)
        if wanted is None or (wanted[0] == "read" and self._is_read(wanted[1])):
            return  # a reader joins readers, whatever waits
        waiting = self._in("waiting")
        parked = {t.message.task_id for t in waiting if self.sync.hexists(keys.DELAYED_DATA, t.message.task_id)}
        before = [t for t in waiting if t.message.task_id in parked and t.order < task.order]
        for each in before:
            if self._waits_in_line(each) == wanted:
                assert each.size != task.size, "granted before one that came first, and waits"
                on_the_way = [t for t in waiting if t.size == each.size and t.message.task_id not in parked]
                assert any(self._lock_of(wanted) in map(self._lock_of, self._wanted(t)) for t in on_the_way), (
                    f"passed over for {wanted}, and none of its size is on the way"
                )

    def _next_ms(self) -> None:
        """Wait until the clock of the server has advanced."""
        began = self._server_ms()
        while self._server_ms() == began:
            pass

    def _server_ms(self) -> int:
        seconds, us = self.sync.time()
        return int(seconds) * 1000 + int(us) // 1000

    @staticmethod
    def _wanted(task: Task) -> list[tuple[str, str]]:
        [wishes] = task.message.task_args
        return [(what, key) for what, key, _ in wishes]

    @staticmethod
    def _lock_of(wanted: tuple[str, str]) -> tuple[str, str]:
        return ("rw" if wanted[0] in ("read", "write") else wanted[0], wanted[1])

    def _waits_in_line(self, task: Task) -> tuple[str, str] | None:
        """Its only lock, if the order of submission determines who gets it."""
        [wishes] = task.message.task_args
        if not task.plain or len(wishes) != 1 or wishes[0][0].startswith(("many", "one")):
            return None
        [(what, key, _)] = wishes
        return None if LIMITS.get(f"{what} {key}", 0) is None else (what, key)

    def _is_read(self, key: str) -> bool:
        lock = SharedRWLock(JOB, key).redis_key
        return any(
            spec["key"] == lock and spec["kind"] == "shared"
            for spec in [
                *(each for task in self._in("running") for each in task.specs),
                *(each.spec() for each in self.foreign if each.enabled),
            ]
        )

    def _check_exclusion(self, spec: LockSpec) -> None:
        key, kind = spec["key"], spec["kind"]
        lasting = [
            each["kind"]
            for task in self._in("running")
            for each in task.specs
            if each["key"] == key and each.get("ttl_ms", LONG_MS) >= LONG_MS
        ]
        lasting += [lock.spec()["kind"] for lock in self.foreign if lock.redis_key == key]
        may = {
            "mutex": not lasting,
            "exclusive": not lasting,
            "shared": "exclusive" not in lasting,
            "concurrency": len(lasting) < spec.get("limit", 0),
            "rate": self.units[key] + spec.get("n_items", 0) <= spec.get("limit", 0),
        }
        assert may[kind], f"{key} was granted beside {lasting}"

    # --- out again ------------------------------------------------------------------------------------------

    def _settle(self, task: Task, settlement: Settlement, place: str = "gone") -> None:
        settlement.locks = task.specs
        assert self.run(self.brokers[task.worker].settle([settlement])) == [ACCEPTED]
        task.place, task.specs, task.delivery, task.worker = place, [], None, ""

    @rule(which=WHICH, how=st.sampled_from(["done", "done", "done", "retry", "retry later", "hand back"]))
    def end(self, which: int, how: str) -> None:
        if running := self._in("running"):
            self._end(running[which % len(running)], how)

    def _end(self, task: Task, how: str = "done") -> None:
        assert task.delivery is not None
        if how == "done" or task.marked:
            return self._settle(task, Settlement(task.delivery))
        task.plain = False
        if how == "hand back":
            return self._settle(task, requeue(task.delivery), "waiting")
        delay_ms = LONG_MS if how == "retry later" else 0
        again = defer(task.delivery, task.message.task_id, delay_ms, task.message.dumpb())
        self._settle(task, Settlement(task.delivery, retry=again), "waiting")

    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        there = [task for task in self.tasks.values() if task.place != "gone"]
        if not there:
            return
        task = there[which % len(there)]
        [place] = self.run(self.brokers["a"].cancel([task.message.task_id])).values()
        if place == TaskPlace.RUNNING:
            assert task.place in ("reserved", "running")
            task.marked = True
        else:
            assert place != TaskPlace.UNKNOWN
            assert task.place == "waiting", f"{place}, and it is {task.place}"
            task.place = "gone"

    # --- lost workers ---------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(list(WORKERS)))
    def kill(self, worker: str) -> None:
        self.sync.zadd(keys.ALIVE, {worker: 1})
        other = self._partner(worker)
        self._lives(other)
        self._reclaim(other)
        self._lives(worker)

    @staticmethod
    def _partner(worker: str) -> str:
        [other] = [name for name, size in WORKERS.items() if size == WORKERS[worker] and name != worker]
        return other

    def _reclaim(self, worker: str) -> None:
        """The other one is dead. Its locks are given back in parts, and then its messages are taken over."""
        other = self._partner(worker)
        orphans = self._in("running", other) + self._in("reserved", other)
        for task in orphans:
            task.specs, task.plain, task.place, task.worker = [], False, "waiting", ""
        for _ in range(20):
            # Who has died with it once is rejected, and not kept from others: here it runs again.
            deliveries, *_ = self.run(self.brokers[worker].reclaim(1000, max_deliveries=1))
            self._start(self._received(worker, deliveries))
            self._let_leases_pass(other)
            if self.sync.zscore(keys.ALIVE, other) is None:
                break
        assert self.sync.zscore(keys.ALIVE, other) is None, "a lost worker is never reclaimed"

    def _let_leases_pass(self, dead: str) -> None:
        """Let the leases pass for which the last worker of a poison task is waited for."""
        for stream in keys.streams_of(WORKERS[dead]):
            if self.sync.exists(stream) and self.sync.xinfo_groups(stream):
                for pending in self.sync.xpending_range(stream, keys.GROUP, "-", "+", 1000, dead):
                    entry = pending["message_id"]
                    self.sync.xclaim(stream, keys.GROUP, dead, 0, [entry], idle=10 * LONG_MS, justid=True)

    # --- others, and time -----------------------------------------------------------------------------------

    @rule(what=st.sampled_from(["slot", "rate"]), key=a_key, limit=st.sampled_from([None, 1, 2, 3, 4]))
    def set_limit(self, what: str, key: str, limit: int | None) -> None:
        LIMITS[f"{what} {key}"] = limit

    @rule(wish=st.tuples(st.sampled_from(["mutex", "write", "read", "slot"]), a_key, st.just(LONG_MS)))
    def hold_outside_tasks(self, wish: Wish) -> None:
        [lock] = made(wish)
        spec = lock.spec() if lock.enabled else None
        if spec is not None and self.run(lock.acquire(self.brokers["a"].redis)):
            self._check_exclusion(spec)
            self.foreign.append(lock)

    @rule()
    def release_outside_tasks(self) -> None:
        if self.foreign:
            self.run(self.foreign.pop(0).release(self.brokers["a"].redis))

    @rule()
    def expires_outside_tasks(self) -> None:
        """Let a lock expire without a release or a notification; readers have no time to live."""
        if not self.foreign:
            return
        lock = self.foreign.pop(0)
        if isinstance(lock, SharedRWLock):
            self.run(lock.release(self.brokers["a"].redis))
        elif lock.enabled and isinstance(lock, ConcurrencyLimiter):
            self.sync.zrem(lock.redis_key, lock.spec()["owner"])
        elif lock.enabled:
            self.sync.delete(lock.redis_key)

    @rule()
    def time_passes(self) -> None:
        """All timers expire: of deferred tasks, lines of locks and grants."""
        for timers in (keys.DELAYED, keys.LINES):
            for name in self.sync.zrange(timers, 0, -1):
                self.sync.zadd(timers, {name: 1})
        for grant in self.sync.keys(keys.RESERVATION_PREFIX + "*"):
            stored: Any = self.sync.get(grant)
            self.sync.set(grant, b"0 " + stored.partition(b" ")[2], keepttl=True)
        self.run(self.brokers["a"].promote())

    # --- what must always hold ------------------------------------------------------------------------------

    @invariant()
    def nothing_is_held_by_nobody(self) -> None:
        owners = {spec["owner"] for task in self._in("running") for spec in task.specs}
        owners |= {lock.spec()["owner"] for lock in self.foreign if lock.enabled}
        mutexes, others = self.sync.keys("lock:mutex:*"), self.sync.keys("lock:rw:*")
        held = {owner.decode() for owner in (self.sync.mget(mutexes) if mutexes else ()) if owner}
        pipe = self.sync.pipeline()
        for key in others:
            pipe.hgetall(key)
        for fields in pipe.execute():
            held |= {name.decode().removeprefix("reader:") for name in fields if name.startswith(b"reader:")}
            held |= {owner.decode() for name, owner in fields.items() if name == b"writer_owner"}
        assert held <= owners, "a lock is held without an owner"

    # --- the end --------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self._drain()
            assert all(task.place == "gone" for task in self.tasks.values()), "a task never ends"
            self.nothing_is_held_by_nobody()
            for worker in WORKERS:
                assert self.run(self.brokers[worker].leave()) is True
            left = {key.decode() for key in self.sync.scan_iter() if self.sync.ttl(key) < 0}
            assert left <= set(keys.EVERY_STREAM), "left behind"
            assert not any(self.sync.xlen(stream) for stream in keys.EVERY_STREAM)
        finally:
            self.sync.flushall()
            for broker in self.brokers.values():
                self.run(broker.shutdown())
            self.sync.close()
            self.runner.close()

    def _drain(self) -> None:
        """Limits are removed, others release, a worker dies: the rest ends within a number of rounds."""
        LIMITS.update(dict.fromkeys(LIMITS, None))
        while self.foreign:
            self.release_outside_tasks()
        for worker in ("b", "d"):
            self.kill(worker)
        for _ in range(2 * len(self.tasks) + 4):
            for task in self._in("running"):
                self._end(task)
            if not self._in("waiting"):
                break
            before = len(self._in("running"))
            for worker in ("a", "c"):
                self.work(worker, 1000)
            if len(self._in("running")) == before:
                self.time_passes()


@pytest.mark.timeout(600)  # thousands of steps: a busy machine takes its time
def test_tasks_with_any_locks_exclude_each_other_and_all_end(redis_url: str) -> None:
    LocksMachine.url = redis_url
    run_state_machine_as_test(
        LocksMachine,
        settings=settings(
            max_examples=30,
            phases=[Phase.generate],  # to make a failing example smaller takes minutes
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
