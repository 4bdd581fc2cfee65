"""Stateful test of the broker against a model: steps in any order, lost workers and late responses.

The model knows where each task must be. After every step the server is asked where it is: in one place, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import (
    Delivery,
    Settlement,
    Submission,
    TaskMessage,
    in_ms,
    is_poison_candidate,
    new_task_id,
)
from diracx.tasks.plumbing.broker.redis_streams import stream_name_for
from diracx.tasks.plumbing.broker.replies import ACCEPTED, TAKEN_OVER
from diracx.tasks.plumbing.enums import Priority
from diracx.tasks.plumbing.worker.settlement import requeue
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    rule,
    run_state_machine_as_test,
)
from support.broker_model import (
    LONG_MS,
    MAX_DELIVERIES,
    STREAMS,
    WISHES,
    WORKERS,
    ModelOfTasks,
    Task,
    is_candidate,
)
from support.silent_worker import stays_silent
from support.start_requests import start_request


class BrokerMachine(ModelOfTasks):
    """One rule for each verb of the broker."""

    # --- any order ------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        """One of the steps that are possible now. (As rules of their own, most examples lack some.)"""
        pick = st.integers(0, 7)
        flag = st.booleans()
        how = st.sampled_from(["done", "done", "failed", "retry now", "retry later", "dead"])
        wish = st.sampled_from(sorted(WISHES))
        possible: dict[str, Any] = {
            "look_for_nothing": (st.sampled_from(WORKERS),),
            "submit": (wish, st.sampled_from(list(Priority)), flag),
            "submit_group": (st.lists(wish, max_size=3),),
        }
        living = self._living()
        busy = self._with_tasks(living, "reserved", "running")
        if self._in("queued") and living:
            possible["fetch"] = (pick, st.integers(1, 4), flag, flag)
        if self._with_tasks(living, "reserved"):
            possible["start"] = (pick, flag)
        if self._in("reserved"):
            possible["requeue"] = (pick,)
        if self._in("running"):
            possible["settle"] = (pick, how)
        if self._in("delayed", "parked"):
            possible["promote"] = (pick,)
        if busy:
            possible["crash"] = (pick,)
        if len(living) < len(WORKERS):
            possible["come_back"] = (pick,)
            if self._in("queued"):
                possible["come_back_hungry"] = (pick, st.integers(1, 4))
        if living and self._with_tasks(set(WORKERS) - set(living), "reserved", "running"):
            possible["reclaim"] = (st.integers(1, 4), flag)
        if self.late:
            possible["settle_too_late"] = (st.integers(0, 1000),)
        if set(living) - set(busy):
            possible["leave"] = ()
        if not self._in("queued", "reserved", "running", "delayed", "parked"):
            possible["flush"] = ()
        often = [verb for verb in ("fetch", "reclaim", "settle") if verb in possible] * 2
        verb = data.draw(st.sampled_from(sorted([*possible, *often])), label="verb")
        arguments = [data.draw(strategy) for strategy in possible[verb]]
        getattr(self, verb)(*arguments)

    # --- into the system ------------------------------------------------------------------------------------

    def _new(self, wish: str, priority: str, labels: dict[str, Any] | None = None) -> Task:
        message = TaskMessage(task_id=new_task_id(), task_name="model:Task", labels=labels or {}, task_args=[wish])
        return Task(message.task_id, wish, message, stream_name_for(priority, "medium"))

    def submit(self, wish: str, priority: str, delayed: bool) -> None:
        task = self._new(wish, priority)
        at_time = datetime.now(UTC) + timedelta(milliseconds=LONG_MS) if delayed else None
        self.run(self.brokers["a"].submit([Submission(task.message, task.stream, at_time)]))
        task.place = "delayed" if delayed else "queued"
        self.tasks[task.id] = task

    def submit_group(self, wishes: list[str]) -> None:
        self._promote()  # which the submission of a group does as well: its children are staged, and then moved
        group = f"group {len(self.groups)}"
        children = [self._new(wish, "normal") for wish in wishes]
        for child in children:
            child.group = group
        callback = self._new("nothing", "normal")
        fields = {"total": len(children), "callback_stream": callback.stream, "callback": callback.message.dumpb()}
        failure = {"failure_stream": callback.stream, "failure": callback.message.dumpb()}
        submissions = [Submission(child.message, child.stream) for child in children]
        self.run(self.brokers["a"].submit_group(group, submissions, fields | failure, LONG_MS))
        self.tasks |= {task.id: task for task in (*children, callback)}
        self.groups[group] = {child.id for child in children}
        self.callbacks[group] = callback.id
        callback.place = "gone" if children else "queued"

    # --- to a worker ----------------------------------------------------------------------------------------

    def _received(self, worker: str, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert delivery.data is not None
            message = TaskMessage.loadb(delivery.data)
            task = self.tasks[message.task_id]
            assert message == task.message
            assert delivery.redelivery_count == task.redelivery_count, (
                "P9: parking or giving back keeps the redelivery count"
            )
            assert delivery.redelivered or not task.may_have_started, "giving back keeps that, too"
            task.place, task.worker, task.delivery = "reserved", worker, delivery

    def fetch(self, pick: int, free: int, replied: bool, begin: bool) -> None:
        living = self._living()
        worker = living[pick % len(living)]
        self._fetch(worker, free, replied)
        if begin:
            self._start_all(worker)

    def _fetch(self, worker: str, free: int, replied: bool = True) -> None:
        waiting = {task.id for task in self._in("queued")}
        deliveries, last_ids = self.run(self.brokers[worker].fetch(free, lease_seconds=LONG_MS / 1000))
        assert len(deliveries) == min(free, len(waiting))
        assert bool(last_ids) == (not deliveries)
        order = [STREAMS.index(delivery.stream) for delivery in deliveries]
        assert order == sorted(order), "urgent first"
        if not replied:  # the connection broke before the reply came
            known = [
                (t.delivery.stream, t.delivery.entry)
                for t in self._in("reserved", "running", worker=worker)
                if t.delivery
            ]
            unacknowledged = self.run(self.brokers[worker].fetch_unacknowledged(known))
            assert {(d.stream, d.entry, d.deliveries) for d in unacknowledged} == {
                (d.stream, d.entry, d.deliveries) for d in deliveries
            }
        assert all(delivery.deliveries == 1 for delivery in deliveries)
        self._received(worker, deliveries)

    def start(self, pick: int, twice: bool) -> None:
        living = self._living("reserved")
        self._start_all(living[pick % len(living)], twice)

    def _start_all(self, worker: str, twice: bool = False) -> None:
        for task in self._in("reserved", worker=worker):
            self._start(task, twice)

    def _start(self, task: Task, twice: bool = False) -> None:
        assert task.delivery is not None
        locks = [lock.spec() for lock in WISHES[task.wish]()]
        if not locks:
            task.place = "running"
            return
        delivery = task.delivery
        wanted = start_request(delivery, locks, LONG_MS)
        others = [owner for lock in locks if (owner := self._granted_task(lock)) not in (None, task.id)]
        others += [
            lock["key"] for lock in locks if self.sync.exists(*keys.of_all_sizes(keys.WAITING_PREFIX, lock["key"]))
        ]
        [reply] = self.run(self.brokers[task.worker].start([wanted]))
        if reply.granted:
            assert self._may_be_granted(locks), f"{task.wish} was granted beside others"
            task.place, task.locks = "running", locks
            # Readers and users of slots begin together: the next one in their line is granted the lock.
            self.may_wake |= any(lock["kind"] in ("shared", "concurrency") for lock in locks)
        else:
            assert reply.refusing is not None
            # A grant may have expired between our look and the script's.
            assert others or not self._may_be_granted(locks), f"{task.wish} was refused without a reason"
            task.place, task.delivery, task.stream = "parked", None, wanted["resumed"]
            task.survived.clear()
            task.may_have_started = False  # such a task is not started again if that matters
            self.may_wake = True  # a grant that it had is given up
        if twice:  # the reply was lost: asking again says the same, or that there is nothing to ask for
            [again] = self.run(self.brokers[task.worker].start([wanted]))
            assert (again.granted, again.refusing) == (reply.granted, None)

    def _granted_task(self, lock: dict[str, Any]) -> str | None:
        """Return the task for which the lock is reserved, or was before the reservation ended."""
        stored = self.sync.get(f"{keys.RESERVATION_PREFIX}medium:{lock['key']}")
        return None if stored is None else stored.decode().split(" ")[-1]

    # --- out again ------------------------------------------------------------------------------------------

    def settle(self, pick: int, how: str) -> None:
        running = self._in("running")
        self._settle(running[pick % len(running)], how)

    def _settle(self, task: Task, how: str) -> None:
        assert task.delivery is not None
        settlement = Settlement(task.delivery, locks=task.locks)
        if how.startswith("retry"):
            settlement.retry = {
                "task": task.id,
                "delay_ms": LONG_MS if how == "retry later" else 0,
                "stream": task.delivery.stream.removesuffix(keys.RESUMED_SUFFIX),
                "data": task.message.dumpb(),
            }
        elif task.group is not None:
            settlement.group = {"id": task.group, "child": task.id, "failed": how != "done"}
        if how == "dead":
            settlement.dead = {"reason": "exhausted", "data": b"a dead letter"}
        # A worker whose lease has ended but that was not reclaimed yet may still settle.
        assert self.run(self.brokers[task.worker].settle([settlement])) == [ACCEPTED]
        self.late.append((task.worker, settlement))  # sent again, because the reply was lost
        task.delivery, task.locks, task.worker = None, [], ""
        task.place = "delayed" if how.startswith("retry") else "gone"
        self.may_wake = True
        task.redelivery_count, task.may_have_started = 0, False
        task.survived.clear()
        if task.place == "gone":
            task.ended += 1
            self._remove_from_group(task)

    def _remove_from_group(self, task: Task) -> None:
        if task.group is None:
            return
        self.groups[task.group].discard(task.id)
        if not self.groups[task.group]:
            callback = self.tasks[self.callbacks[task.group]]
            assert callback.place == "gone"
            assert not callback.ended
            callback.place = "queued"

    def requeue(self, pick: int) -> None:
        reserved = self._in("reserved")
        task = reserved[pick % len(reserved)]
        assert task.delivery is not None
        settlement = requeue(task.delivery)
        assert self.run(self.brokers[task.worker].settle([settlement])) == [ACCEPTED]
        self.late.append((task.worker, settlement))
        task.place, task.delivery, task.worker = "queued", None, ""
        task.survived.clear()

    def settle_too_late(self, pick: int) -> None:
        """P5: deliveries taken over or settled before cannot be settled. P9: that is not a death of the worker."""
        worker, settlement = self.late[pick % len(self.late)]
        assert self.run(self.brokers[worker].settle([settlement])) == [TAKEN_OVER]
        late = settlement.delivery
        for task in self._in("reserved", "running"):
            now = task.delivery
            if now and (now.stream, now.entry) == (late.stream, late.entry) and late.deliveries < now.deliveries:
                task.redelivery_count -= late.deliveries not in task.survived
                task.survived.add(late.deliveries)

    # --- lost workers ---------------------------------------------------------------------------------------

    def crash(self, pick: int) -> None:
        """Its lease ends. What it held stays with it until it is reclaimed."""
        living = self._living("reserved", "running")
        self._crash(living[pick % len(living)])

    def _crash(self, worker: str) -> None:
        self.sync.zadd(keys.ALIVE, {worker: 0})

    def come_back(self, pick: int) -> None:
        """A paused worker continues, possibly after its tasks were taken over."""
        dead = [worker for worker in WORKERS if self._is_dead(worker)]
        self._renew(dead[pick % len(dead)])

    def come_back_hungry(self, pick: int, free: int) -> None:
        """P5: a paused worker that fetches before its next renewal keeps its new deliveries."""
        dead = [worker for worker in WORKERS if self._is_dead(worker)]
        worker = dead[pick % len(dead)]
        self._fetch(worker, free)
        assert not self._is_dead(worker)

    def reclaim(self, free: int, audit: bool) -> None:
        self._reclaim(self._living()[0], free, audit)

    def look_for_nothing(self, worker: str) -> None:
        assert self.run(self.brokers[worker].settle([])) == []
        living = self._living()
        if worker in living and not self._with_tasks(set(WORKERS) - set(living), "reserved", "running"):
            self._reclaim(worker, 4, audit=True)
        if not self._in("queued"):
            assert self.run(self.brokers[worker].fetch(4))[0] == []

    def _reclaim(self, worker: str, free: int, audit: bool = False) -> None:
        [other] = set(WORKERS) - {worker}
        dead = self._is_dead(other)
        orphans = {task.id: task for task in self._in("reserved", "running", worker=other)} if dead else {}
        # P9: no worker has a message that several workers have died with, and another one beside it.
        mine = self._in("reserved", "running", worker=worker)
        candidates = [task for task in orphans.values() if is_candidate(task, 1)]
        poisoned = [task for task in orphans.values() if task.redelivery_count + 1 >= MAX_DELIVERIES]
        made_room = self.sync.get(keys.DRAINING_PREFIX + STREAMS[0]) == worker.encode()
        deliveries, *_ = self.run(self.brokers[worker].reclaim(free, audit=audit, max_deliveries=MAX_DELIVERIES))
        if poisoned and len(deliveries) < free:  # they are in doubt until the dead worker has stayed away
            stays_silent(self.url, other)
            rest = self.brokers[worker].reclaim(free - len(deliveries), max_deliveries=MAX_DELIVERIES)
            deliveries += self.run(rest)[0]
        fresh = [each for each in deliveries if each.deliveries == 1]
        taken = [each for each in deliveries if each.deliveries > 1]
        will_run = [each for each in taken if each.redelivery_count < MAX_DELIVERIES]
        if any(is_poison_candidate(each, MAX_DELIVERIES) for each in will_run):
            assert len(will_run) == 1
            assert all(task.redelivery_count >= MAX_DELIVERIES for task in mine)
        assert not (will_run and any(is_candidate(task, 0) for task in mine))
        assert len(deliveries) >= min(free, len(poisoned))
        if not candidates and not any(is_candidate(task, 0) for task in mine) and not made_room:
            assert len(taken) == min(free - len(fresh), len(orphans))
        order = [STREAMS.index(each.stream) for each in deliveries]
        assert poisoned or order == sorted(order), "urgent first"
        left = [STREAMS.index(task.delivery.stream) for task in orphans.values() if task.delivery]
        assert all(STREAMS.index(each.stream) < max(left) for each in fresh), "they are for a fetch"
        for task in orphans.values():
            if task.locks:
                self.may_wake = True
            task.locks = []
        for delivery in taken:
            assert delivery.data is not None
            task = orphans[TaskMessage.loadb(delivery.data).task_id]
            assert task.delivery is not None
            assert delivery.deliveries == task.delivery.deliveries + 1
            task.redelivery_count += 1
            task.may_have_started = True
            assert delivery.since == task.delivery.since
            group = {"id": task.group, "child": task.id, "failed": False} if task.group else None
            self.late.append((other, Settlement(task.delivery, group=group)))
            retry = {"task": task.id, "delay_ms": 0, "stream": task.stream, "data": b"late"}
            self.late.append((other, Settlement(task.delivery, retry=retry)))
        self._received(worker, deliveries)
        # An audit gives a consumer that is on no list one lease to show that it lives.
        if dead and not audit and len(taken) == len(orphans):
            assert self.sync.zscore(keys.ALIVE, other) is None, "reclaimed, and still on the list"
            assert not self.sync.exists(keys.HELD_PREFIX + other)

    def flush(self) -> None:
        """P7: the server forgets everything: groups, consumers, the list of the living, scripts."""
        self.sync.flushall()
        self.sync.script_flush()
        self.late.clear()
        self.both_live()

    def leave(self) -> None:
        living = self._living()
        worker = min(set(living) - set(self._with_tasks(living, "reserved", "running")))
        assert self.run(self.brokers[worker].leave()) is True
        assert self.sync.zscore(keys.ALIVE, worker) is None
        self._renew(worker)

    # --- time -----------------------------------------------------------------------------------------------

    def promote(self, pick: int) -> None:
        """The timer of one task runs out; whatever else is due goes as well."""
        delayed = self._in("delayed", "parked")
        self.sync.zadd(keys.DELAYED, {delayed[pick % len(delayed)].id: 0}, xx=True)
        self._promote()

    def _promote(self) -> None:
        now = datetime.now(UTC)
        due = {name.decode() for name in self.sync.zrangebyscore(keys.DELAYED, "-inf", in_ms(now) + 60_000)}
        self.run(self.brokers["a"].promote())
        for task_id in due:
            assert self.tasks[task_id].place in ("delayed", "parked")
            self.tasks[task_id].place = "queued"
        self.may_wake = True  # the timer has looked at lines

    # --- the end --------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self._drain()
            left = set(self.sync.keys()) - {keys.DEAD_LETTERS.encode(), keys.WAKE_SCHEDULER.encode()}
            for key in sorted(left):
                assert key.decode() in STREAMS or self.sync.ttl(key) >= 0, f"{key.decode()} was left behind"
            for stream in STREAMS:
                assert self.sync.xlen(stream) == 0
            assert all(task.ended == 1 for task in self.tasks.values()), "a task has not ended once"
        finally:
            self.sync.flushall()
            for broker in self.brokers.values():
                self.run(broker.shutdown())
            self.sync.close()
            self.runner.close()

    def _drain(self) -> None:
        """The worker `b` ends permanently; `a` does the rest."""
        self.every_task_is_in_one_place()
        if self._is_dead("a"):
            if not self._is_dead("b"):
                while self._in("reserved", "running", worker="a"):
                    self._reclaim("b", 1000)
                    self._start_all("b")
                    self.holds()
                    for task in self._in("running", worker="b"):
                        self._settle(task, "done")
                        self.holds()
            else:
                for task in self._in("reserved", "running"):
                    task.locks = []  # no worker reclaimed them: release them as `b` would
                self._reclaim_manually()
                self._renew("b")
            self._renew("a")
        self._crash("b")
        self._reclaim("a", 1000)
        for _ in range(50):
            self.holds()
            for task in self._in("running"):
                self._settle(task, "done")
                self.holds()
            self._reclaim("a", 1000)
            if not self._in("queued", "reserved", "running", "delayed", "parked"):
                break
            for task in self._in("delayed"):
                self.sync.zadd(keys.DELAYED, {task.id: 0})
            self._promote()
            self._fetch("a", 1000)
            self._start_all("a")
        assert self.run(self.brokers["a"].leave()) is True

    def _reclaim_manually(self) -> None:
        """Both are dead: a third worker stores the dead letters, and returns the rest to the queue."""
        third = RedisStreamBroker(self.url, consumer_name="c")
        try:
            for delivery in self.run(third.reclaim(1000, max_deliveries=1))[0]:
                assert self.run(third.settle([requeue(delivery)])) == [ACCEPTED]
                assert delivery.data is not None
                task = self.tasks[TaskMessage.loadb(delivery.data).task_id]
                task.place, task.delivery, task.worker = "queued", None, ""
                task.redelivery_count += 1
                task.may_have_started = True
                task.survived.clear()
            self.may_wake = True
            assert self.run(third.leave()) is True
        finally:
            self.run(third.shutdown())


@pytest.mark.timeout(600)  # thousands of steps: a busy machine takes its time
@pytest.mark.leaves_keys("diracx:tasks:dead-letters")
def test_P5_P10_P11_P33_the_broker_behaves_as_its_model_in_any_order(redis_url: str) -> None:
    BrokerMachine.url = redis_url
    run_state_machine_as_test(
        BrokerMachine,
        settings=settings(
            max_examples=50,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
