"""What somebody should look at, in a line each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..plumbing.broker.memory import eviction_problem
from .models import Snapshot

#: A worker reports every 5 s; one that lives and has not for so long has a blocked event loop.
SILENT_SECONDS = 20.0
#: A task of a queue that waits for longer is worth a line; of the background queues, anything goes.
LONG_WAIT_SECONDS = 600.0
_MEMORY_SHARE = 0.9

About = Literal["server", "schedules", "delayed", "queue", "workers", "dead letters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Something that is wrong."""

    text: str
    about: About
    grave: bool = True
    """Whether something does not happen that should; else it is slow, or over already."""
    queue: str | None = None
    """The queue it is about."""


def troubles(seen: Snapshot) -> list[str]:
    """What is wrong in a snapshot, most urgent first; empty when all is well."""
    return [trouble.text for trouble in find_troubles(seen)]


def find_troubles(seen: Snapshot) -> list[Trouble]:
    """The same, with what each is about."""
    return [*_of_server(seen), *_of_scheduler(seen), *_of_queues(seen), *_of_workers(seen), *_of_letters(seen)]


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _of_server(seen: Snapshot) -> Iterator[Trouble]:
    used, limit = seen.memory_bytes, seen.memory_limit_bytes
    if used is not None and limit is not None and used >= _MEMORY_SHARE * limit:
        text = f"Redis uses {used / limit:.0%} of its memory: at 100 % it refuses new tasks"
        yield Trouble(text=text, about="server")
    if problem := eviction_problem(seen.memory_policy, limit):
        yield Trouble(text=problem, about="server", grave=limit is not None)


def _of_scheduler(seen: Snapshot) -> Iterator[Trouble]:
    if not seen.scheduler_leads and seen.schedules:
        text = f"no scheduler leads: {_counted(seen.schedules, 'schedule is', 'schedules are')} not submitted"
        yield Trouble(text=text, about="schedules")
    elif seen.schedules_late:
        text = f"{_counted(seen.schedules_late, 'schedule is', 'schedules are')} late by more than 10 s"
        yield Trouble(text=text, about="schedules")
    if seen.overdue:
        tasks = _counted(seen.overdue, "delayed task is", "delayed tasks are")
        text = f"{tasks} overdue: no worker or scheduler moves them to their queues"
        yield Trouble(text=text, about="delayed")


def _of_queues(seen: Snapshot) -> Iterator[Trouble]:
    served = {worker.size for worker in seen.workers if worker.alive}
    for queue in seen.queues:
        if not queue.backlog:
            continue
        tasks = _counted(queue.backlog, "task waits", "tasks wait")
        waits = queue.oldest_waiting_seconds or 0.0
        if queue.size not in served and None not in served:
            text = f"{queue.name}: {tasks}, and no worker of size {queue.size} runs"
            yield Trouble(text=text, about="queue", queue=queue.name)
        elif waits > LONG_WAIT_SECONDS and queue.priority != "background":
            text = f"{queue.name}: {tasks}, the first for {waits / 60:.0f} min"
            yield Trouble(text=text, about="queue", queue=queue.name, grave=False)


def _of_workers(seen: Snapshot) -> Iterator[Trouble]:
    for worker in seen.workers:
        silent = None if worker.seen is None else (seen.at - worker.seen).total_seconds()
        if not worker.alive:
            text = f"worker {worker.name} is dead: its lease has ended, others take over what it ran"
            yield Trouble(text=text, about="workers", grave=False)
        elif silent is not None and silent > SILENT_SECONDS:
            text = f"worker {worker.name} lives, but has been silent for {silent:.0f} s: a task blocks it"
            yield Trouble(text=text, about="workers")


def _of_letters(seen: Snapshot) -> Iterator[Trouble]:
    if seen.dead_letters_waiting:
        letters = _counted(seen.dead_letters_waiting, "dead letter waits", "dead letters wait")
        text = f"{letters} in Redis for a worker with a database"
        yield Trouble(text=text, about="dead letters")
