"""Steps from a state: those of each worker, and failures.

A worker here does what `diracx.tasks.plumbing.worker` does: it asks for a lost reply first, begins nothing under
a lock that it was not granted, and its lease timer ends what holds a lock before the lease does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diracx.tasks.plumbing.broker import RedisStreamBroker, keys, worker_state
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, TaskMessage
from diracx.tasks.plumbing.worker.settlement import requeue

from .rules import Rules
from .server import Server
from .state import HEALTHY, NAMES, TASKS, Held, State, WorkerState, owner_of

_SLOTS = 2
#: By the clock no lease may end during a search, nor the server have been away: more than any search takes.
_LEASE_SECONDS = 100_000.0
_MAX_DELIVERIES = 10

Step = tuple[str, list[State] | Callable[[], list[State]]]
"""Name of a step, and the states after it (two if a response may be lost): known at once if the server is not
involved, else found by a call to the server, which must be in the state before it."""


class Steps:
    """The possible steps, and how they change the server."""

    def __init__(self, url: str, server: Server, rules: Rules) -> None:
        self._runner = asyncio.Runner()
        self._server = server
        self._rules = rules
        self._brokers = [RedisStreamBroker(url, consumer_name=name) for name in NAMES]
        self._ids = list(TASKS)

    def close(self) -> None:
        async def shut() -> None:
            for broker in self._brokers:
                await broker.shutdown()

        self._runner.run(shut())
        self._runner.close()

    def _call(self, call: Any) -> Any:
        async def awaited() -> Any:
            return await call

        return self._runner.run(awaited())

    def begin(self) -> State:
        """The first state: all tasks are queued, both workers live."""
        from diracx.tasks.plumbing.broker.models import Submission

        self._server.redis.flushall()
        for task in self._rules.tasks:
            submission = Submission(TaskMessage(task_id=task, task_name="model:Task"), keys.ALL_STREAM_NAMES[4])
            self._call(self._brokers[0].submit([submission]))
        for name in NAMES:
            worker_state.renew(self._server.redis, name, int(_LEASE_SECONDS * 1000), [], [])
        settled = tuple(int(task not in self._rules.tasks) for task in TASKS)
        return State((WorkerState(), WorkerState()), settled, tuple(0 for _ in TASKS))

    def possible(self, state: State, content: Sequence[tuple[str, Any]]) -> Iterator[Step]:
        """All possible steps in this state; of independent ones, the first."""
        data = dict(content)
        if len(state.disturbed) == self._rules.disturbances:
            for which, worker in enumerate(state.workers):
                for held in worker.held if worker == replace(HEALTHY, held=worker.held) else ():
                    if _is_independent(NAMES[which], held, data):
                        yield from self._of_held(state, which, held)
                        return
        for which in range(len(NAMES)):
            yield from self._of_worker(state, which)
        yield from self._of_time(state, data)
        yield from self._disturbances(state)

    # --- a worker -------------------------------------------------------------------------------------------

    def _of_worker(self, state: State, which: int) -> Iterator[Step]:
        worker, name = state.workers[which], NAMES[which]
        if worker.process == "dead":
            return
        if worker.process == "paused":
            yield f"{name} goes on", [self._with(state, which, self._timed(replace(worker, process="runs")))]
            return
        if not worker.connected:
            yield f"{name} is connected again", [self._with(state, which, replace(worker, connected=True))]
        for held in worker.held:
            yield from self._of_held(state, which, held)
        if not worker.connected:
            return
        if worker.lease != "valid":
            yield f"{name} renews", lambda: self._renew(state, which)
        if worker.reply_lost:
            yield f"{name} fetches unacknowledged messages", lambda: self._take(state, which, "unacknowledged")
        elif len(worker.held) < _SLOTS:
            yield f"{name} fetches", lambda: self._take(state, which, "fetch")
            if state.workers[1 - which].lease == "ended":
                yield f"{name} reclaims", lambda: self._take(state, which, "reclaim")

    def _of_held(self, state: State, which: int, held: Held) -> Iterator[Step]:
        worker, name = state.workers[which], NAMES[which]
        if held.phase == "reserved":
            if (TASKS[held.task] or held.ask) and worker.connected:
                yield f"{name} asks for {held.task}", lambda: self._start(state, which, held)
            elif not TASKS[held.task] and not held.ask:
                yield f"{name} begins {held.task}", [self._begun(state, which, held)]
        elif worker.connected:
            yield f"{name} settles {held.task}", lambda: self._settle(state, which, held)
        elif held.phase == "running":
            ended = replace(held, phase="ended", locked=False)
            yield f"{name} ends {held.task}", [self._instead(state, which, held, ended)]

    def _take(self, state: State, which: int, verb: str) -> list[State]:
        worker, broker = state.workers[which], self._brokers[which]
        if verb == "fetch":
            deliveries, _ = self._call(broker.fetch(1, lease_seconds=_LEASE_SECONDS))
        elif verb == "reclaim":
            reclaim = broker.reclaim(1, lease_seconds=_LEASE_SECONDS, max_deliveries=_MAX_DELIVERIES)
            deliveries, *_ = self._call(reclaim)
        else:
            held = [(each.stream, each.entry) for each in worker.held]
            deliveries = self._call(broker.fetch_unacknowledged(held))
        taken = []
        for each in deliveries:
            assert each.data is not None
            task = TaskMessage.loadb(each.data).task_id
            taken.append(Held(task, each.stream, each.entry, each.deliveries, each.since, each.granted))
            self._check_redelivery_count(state, which, each)
        # A call for work is a sign of life: what it gives cannot be taken over at once.
        lives = replace(worker, lease="valid") if worker.lease == "ended" and verb != "unacknowledged" else worker
        found = [self._with(state, which, replace(lives, held=(*worker.held, *taken), reply_lost=False))]
        if taken and verb != "unacknowledged" and self._may(state, "a reply is lost"):
            lost = self._with(state, which, replace(lives, reply_lost=True))
            found.append(self._disturbed(lost, "a reply is lost"))
        return found

    def _check_redelivery_count(self, state: State, which: int, delivery: Delivery) -> None:
        absent = sum(w.lease == "ended" or w.process == "dead" for w in state.workers) - (
            state.workers[which].lease == "ended"
        )
        if delivery.earlier_redeliveries <= 0 and delivery.redelivery_count > absent:
            raise Violation(
                f"{delivery.redelivery_count} workers are said to have died with a task, and {absent} are away"
            )

    def _start(self, state: State, which: int, held: Held) -> list[State]:
        lock = self._lock(which, held)
        wanted = {
            "stream": held.stream,
            "entry": held.entry,
            "deliveries": held.deliveries,
            "task": held.task,
            "rank": 1,
            "resumed": held.stream.removesuffix(keys.RESUMED_SUFFIX) + keys.RESUMED_SUFFIX,
            "since": held.since,
            "locks": lock,
            "retry_ms": 10_000_000,
            "granted": held.granted,
        }
        [reply] = self._call(self._brokers[which].start([wanted], lease_seconds=_LEASE_SECONDS))
        if reply.granted:
            found = [self._begun(state, which, replace(held, ask=False), locked=bool(lock))]
        else:
            found = [self._instead(state, which, held)]
        if self._may(state, "a reply is lost"):
            found.append(self._disturbed(state, "a reply is lost"))
        return found

    def _begun(self, state: State, which: int, held: Held, locked: bool = False) -> State:
        position = self._ids.index(held.task)
        begun = tuple(min(n + (i == position), 2) for i, n in enumerate(state.begun))
        worker = state.workers[which]
        in_hand = tuple(
            replace(held, phase="running", locked=locked)
            if (h.stream, h.entry) == (held.stream, held.entry)
            else h
            for h in worker.held
        )
        after = replace(state, begun=begun)
        return self._with(after, which, self._timed(replace(worker, held=in_hand)))

    def _settle(self, state: State, which: int, held: Held) -> list[State]:
        delivery = Delivery(
            held.stream, held.entry, held.deliveries, b"", b"", since=held.since, granted=held.granted
        )
        if held.phase == "cut off":
            delivery.data = TaskMessage(task_id=held.task, task_name="model:Task").dumpb()
            settlement = replace(requeue(delivery), locks=self._lock(which, held))
        else:
            settlement = Settlement(delivery, locks=self._lock(which, held))
        [reply] = self._call(self._brokers[which].settle([settlement]))
        after = state
        if reply.accepted and held.phase != "cut off":
            position = self._ids.index(held.task)
            settled = tuple(n + (i == position) for i, n in enumerate(state.settled))
            after = replace(state, settled=settled)
        found = [self._instead(after, which, held)]
        if self._may(state, "a reply is lost"):
            again = held if held.phase == "cut off" else replace(held, phase="ended", locked=False)
            found.append(self._disturbed(self._instead(after, which, held, again), "a reply is lost"))
        return found

    def _renew(self, state: State, which: int) -> list[State]:
        worker = state.workers[which]
        entries = [{"stream": h.stream, "entry": h.entry, "deliveries": h.deliveries} for h in worker.held]
        locked = [h for h in worker.held if h.locked]
        locks = [lock for h in locked for lock in self._lock(which, h)]
        lost, lost_locks, *_ = worker_state.renew(
            self._server.redis, NAMES[which], int(_LEASE_SECONDS * 1000), entries, locks
        )
        without = [locked[position] for position in lost_locks]
        kept = []
        for position, held in enumerate(worker.held):
            if position in lost and held.phase != "ended":
                continue
            after = replace(held, phase="cut off", locked=False) if held in without else held
            kept.append(replace(after, ask=True) if held.phase == "reserved" else after)
        found = [self._with(state, which, replace(worker, lease="valid", held=tuple(kept)))]
        if self._may(state, "a reply is lost"):
            # It does not know that it has renewed, and its lease begins anew for the server.
            lost = self._with(state, which, replace(worker, lease="expired"))
            found.append(self._disturbed(lost, "a reply is lost"))
        return found

    @staticmethod
    def _lock(which: int, held: Held) -> list[dict[str, Any]]:
        key = TASKS[held.task]
        owner = owner_of(NAMES[which], held)
        return [{"kind": "mutex", "key": key, "owner": owner, "ttl_ms": 10_000_000}] if key else []

    # --- time -----------------------------------------------------------------------------------------------

    def _of_time(self, state: State, content: dict[str, Any]) -> Iterator[Step]:
        for which, name in enumerate(NAMES):
            worker = state.workers[which]
            if worker.may_call:
                if worker.lease == "expired":  # after a pause: it may go on for a while before it renews
                    yield f"the lease of {name} ends", lambda which=which: [self._lease_ends(state, which)]
                continue
            if worker.lease == "valid":
                expired = self._timed(replace(worker, lease="expired"))
                yield f"the timer of {name} fires", [self._with(state, which, expired)]
            elif worker.lease == "expired" or (name.encode(), True) in content[keys.ALIVE]:
                yield f"the lease of {name} ends", lambda which=which: [self._lease_ends(state, which)]
        for task, key in TASKS.items():
            if key and task.encode() in content.get(keys.DELAYED, ()):
                yield f"the timer of {task} ends", lambda task=task: self._timer_ends(state, keys.DELAYED, task)
        for key in set(TASKS.values()) - {""}:
            if key.encode() in content.get(keys.LINES, ()):
                yield "the line is looked at", lambda key=key: self._timer_ends(state, keys.LINES, key)
            for grant in keys.of_all_sizes(keys.RESERVATION_PREFIX, key):
                if grant in content and not content[grant].startswith(b"0 "):
                    yield "the grant ends", lambda grant=grant: self._grant_ends(state, grant)

    def _timed(self, worker: WorkerState) -> WorkerState:
        """The worker with its lease timer, which stops tasks with locks."""
        if worker.lease == "valid" or worker.process != "runs" or not self._rules.lease_timer:
            return worker
        held = tuple(replace(h, phase="cut off", locked=False) if h.locked else h for h in worker.held)
        return replace(worker, held=held)

    def _lease_ends(self, state: State, which: int) -> State:
        self._server.end_leases(NAMES[which])
        worker = state.workers[which]
        held = tuple(replace(h, ask=True) if h.phase == "reserved" else h for h in worker.held)
        return self._with(state, which, replace(worker, lease="ended", held=held))

    def _timer_ends(self, state: State, timers: str, name: str) -> list[State]:
        self._server.end_timer(timers, name)
        return [state]

    def _grant_ends(self, state: State, grant: str) -> list[State]:
        self._server.end_grant(grant)
        return [state]

    # --- disturbances ---------------------------------------------------------------------------------------

    def _disturbances(self, state: State) -> Iterator[Step]:
        for which, name in enumerate(NAMES):
            worker = state.workers[which]
            if worker.process == "runs":
                for what, after in (
                    ("crashes", replace(worker, process="dead", held=())),
                    ("is paused", replace(worker, process="paused")),
                    ("is disconnected", replace(worker, connected=False)),
                ):
                    if not self._may(state, what) or (what == "is disconnected" and not worker.connected):
                        continue
                    changed = self._disturbed(self._with(state, which, after), f"{name} {what}")
                    yield f"{name} {what}", [changed]
        healthy = all(worker.may_call and worker.lease == "valid" for worker in state.workers)
        if healthy and self._may(state, "the server is unavailable"):
            yield "the server is unavailable for longer than a lease", lambda: [self._away(state)]

    def _may(self, state: State, what: str) -> bool:
        return len(state.disturbed) < self._rules.disturbances and self._rules.only in ("", what)

    def _away(self, state: State) -> State:
        self._server.end_leases(*NAMES)
        workers = []
        for worker in state.workers:
            timed = self._timed(replace(worker, lease="expired"))
            held = tuple(replace(h, ask=True) if h.phase == "reserved" else h for h in timed.held)
            workers.append(replace(timed, lease="ended", held=held))
        return self._disturbed(replace(state, workers=(workers[0], workers[1])), "the server is unavailable")

    # --- small things ---------------------------------------------------------------------------------------

    @staticmethod
    def _with(state: State, which: int, worker: WorkerState) -> State:
        pair = [worker if position == which else each for position, each in enumerate(state.workers)]
        return replace(state, workers=(pair[0], pair[1]))

    def _instead(self, state: State, which: int, held: Held, other: Held | None = None) -> State:
        worker = state.workers[which]
        in_hand = tuple(new for h in worker.held if (new := other if h is held or h == held else h) is not None)
        return self._with(state, which, replace(worker, held=in_hand))

    @staticmethod
    def _disturbed(state: State, what: str) -> State:
        return replace(state, disturbed=tuple(sorted((*state.disturbed, what))))


def _is_independent(worker: str, held: Held, data: dict[str, Any]) -> bool:
    """True if it affects no other: it has no lock and its worker stays healthy, or it was lost."""
    if not TASKS[held.task] and not held.ask:
        return True
    entries, _ = data.get(held.stream, ((), ()))
    is_gone = held.entry.encode() not in [entry for entry, _ in entries]
    return is_gone and data.get(TASKS[held.task]) != owner_of(worker, held).encode()


class Violation(Exception):
    """Violation of a promise of the protocol."""
