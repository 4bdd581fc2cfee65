"""State of the model: the data of the server, and the view of each worker."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing.broker import keys

NAMES = ("worker-a", "worker-b")
#: Task -> the lock it needs. The first two want the same.
TASKS: dict[str, str] = {"t0": "lock:mutex:job:x", "t1": "lock:mutex:job:x", "t2": ""}
#: What can be exchanged for each other: both workers, and both tasks that want the lock.
_ALIKE = (dict(zip(NAMES, reversed(NAMES), strict=True)), {"t0": "t1", "t1": "t0"})
_NAME = re.compile(r"worker-[ab]|t[01]")
#: Points in time (ms or µs since the epoch) and ids of stream entries, in whatever text they stand.
_MOMENT = re.compile(r"\d{13,17}(?:-\d+)?")
#: Where the delivery is of which an owner of a lock is made.
_OWNER = re.compile(r"(\d+)/(\d{13}-\d+)")
#: After these alone, what needs no lock must have begun once.
_HARMLESS = frozenset({"the server is unavailable", "a reply is lost"})


@dataclass(frozen=True, slots=True)
class Held:
    """One delivery in a worker's hands."""

    task: str
    stream: str
    entry: str
    deliveries: int
    since: str
    granted: bytes | None = None
    phase: str = "reserved"
    """reserved; running; ended (to be settled); cut off (to be requeued)."""
    locked: bool = False
    """True if the worker believes that the task's lock is its own."""
    ask: bool = False
    """True if the lease may have expired since the reservation: it is checked before the task starts."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker process and its network."""

    process: str = "runs"
    """runs, paused or dead."""
    connected: bool = True
    lease: str = "valid"
    """valid; expired (its timer has fired, or will when it goes on); ended (for the server, too)."""
    held: tuple[Held, ...] = ()
    reply_lost: bool = False
    """True if the last fetch had no response: its possible reservations are fetched first."""

    @property
    def may_call(self) -> bool:
        """True if it can reach the server."""
        return self.process == "runs" and self.connected


HEALTHY = WorkerState()


@dataclass(frozen=True, slots=True)
class State:
    """The state that determines all further steps."""

    workers: tuple[WorkerState, WorkerState]
    settled: tuple[int, ...]
    """Number of times that each task was settled as done."""
    begun: tuple[int, ...]
    """Number of times that each task has begun; 2 for more than once. It only counts for `excused`."""
    disturbed: tuple[str, ...] = ()
    """The disturbances so far."""

    @property
    def excused(self) -> bool:
        """True if a worker was disturbed, so that a task may have begun twice."""
        return not _HARMLESS.issuperset(self.disturbed)


def owner_of(worker: str, held: Held) -> str:
    """The owner of the task's lock: another one for each delivery."""
    return f"{worker} {held.task} {keys.EVERY_STREAM.index(held.stream)}/{held.entry} {held.deliveries}"


def task_of(fields: Sequence[bytes]) -> str:
    """The task of a stream entry."""
    data = fields[fields.index(b"data") + 1]
    return next(task for task in TASKS if task.encode() in data)


def canonical(state: State, content: Sequence[tuple[str, Any]]) -> str:
    """A name for the state: two states of one name have the same future.

    Moments are replaced by their order, those left out that nothing is compared with. Workers are alike, and so
    are tasks that want one lock: of all states that come of exchanging them, the name is that of the smallest.
    """
    text = "\n".join(_pieces(state, content))
    moments = sorted({_order(moment) for moment in _MOMENT.findall(text)})
    rank = {moment: f"m{position}" for position, moment in enumerate(moments)}
    text = _MOMENT.sub(lambda found: rank[_order(found[0])], text)
    workers, tasks = _ALIKE
    return min(_exchanged(text, other) for other in ({}, workers, tasks, workers | tasks))


def _exchanged(text: str, other: dict[str, str]) -> str:
    return "\n".join(sorted(_NAME.sub(lambda found: other.get(found[0], found[0]), text).split("\n")))


def _pieces(state: State, content: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Lines without a significant order."""
    names: dict[tuple[str, str], str] = {}
    for key, value in content:
        if key in keys.EVERY_STREAM:
            yield f"{key} {_stream(key, value, names)}"
    owners = ""
    for key, value in content:
        if key == keys.SURVIVED:
            members = [member.decode().split(" ") for member in value]
            yield from (f"{key} {names[s, entry]} {n}" for s, entry, n in members if (s, entry) in names)
        elif key not in keys.EVERY_STREAM:
            for part in _parts(key, value, names):
                line = _OWNER.sub(lambda found: names.get(_place(found), found[0]), repr(part))
                owners += line
                yield f"{key} {line}"
    for name, worker in zip(NAMES, state.workers, strict=True):
        yield f"{name} {worker.process} {worker.connected} {worker.lease} {worker.reply_lost}"
        for held in worker.held:
            at = names.get((held.stream, held.entry))
            if at is not None:
                at = f"{at} {held.deliveries} {held.since}"
            elif (owner := owner_of(name, held)) in owners:
                at = owner
            else:  # it can only be refused
                at = "gone"
            yield f"{name} {held.task} {held.phase} {held.locked} {held.ask} {at}"
    for task, settled, begun in zip(TASKS, state.settled, state.begun, strict=True):
        yield f"{task} {settled} {0 if TASKS[task] or state.excused else begun}"
    yield f"{len(state.disturbed)} {state.excused}"


def _parts(key: str, value: Any, names: dict[tuple[str, str], str]) -> list[Any]:
    """Without a significant order; grants are in the order of a stream, ids have no meaning."""
    if not key.startswith(keys.RESERVATION_PREFIX):
        return value if isinstance(value, list) else [value]
    ends, reserved, place, stream, entry, task = value.decode().split(" ")
    return [(ends, reserved, place, names.get((stream, entry)), task)]


def _stream(key: str, value: Any, names: dict[tuple[str, str], str]) -> str:
    """Its entries in their order, each called by its task. The id is a moment where it is the place in line."""
    entries, pending = value
    found = []
    for entry_id, fields in entries:
        entry, task = entry_id.decode(), task_of(fields)
        is_place = TASKS[task] and b"since" not in fields
        names[key, entry] = f"{key} {task} {entry if is_place else ''}"
        rest = [field for field in fields if b"task_id" not in field]
        owners = [(worker, deliveries) for each, worker, deliveries in pending if each == entry_id]
        found.append((names[key, entry], rest, owners))
    return repr(found)


def _place(owner: re.Match[str]) -> tuple[str, str]:
    return keys.EVERY_STREAM[int(owner[1])], owner[2]


def _order(text: str) -> int:
    """Time in µs. Ids of one ms are distinguished by their sequence, as in lua/start.lua."""
    moment, _, sequence = text.partition("-")
    if sequence:
        return int(moment) * 1000 + min(int(sequence), 999)
    return int(moment) * (1000 if len(moment) <= 13 else 1)
