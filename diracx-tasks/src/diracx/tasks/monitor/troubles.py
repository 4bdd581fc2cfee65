"""What somebody should look at, in a line each."""

from __future__ import annotations

from .models import Snapshot

#: A worker reports every 5 s; one that lives and has not for so long has a blocked event loop.
SILENT_SECONDS = 20.0
#: A task of a queue that waits for longer is worth a line; of the background queues, anything goes.
LONG_WAIT_SECONDS = 600.0
_MEMORY_SHARE = 0.9


def troubles(seen: Snapshot) -> list[str]:
    """What is wrong in a snapshot, most urgent first; empty when all is well."""
    return [*_of_server(seen), *_of_scheduler(seen), *_of_queues(seen), *_of_workers(seen), *_of_letters(seen)]


def _of_server(seen: Snapshot) -> list[str]:
    used, limit = seen.memory_bytes, seen.memory_limit_bytes
    if used is None or limit is None or used < _MEMORY_SHARE * limit:
        return []
    return [f"Redis uses {used / limit:.0%} of its memory: at 100 % it refuses new tasks"]


def _of_scheduler(seen: Snapshot) -> list[str]:
    found = []
    if not seen.scheduler_leads and seen.schedules:
        found.append(f"no scheduler leads: {seen.schedules} schedules are not submitted")
    elif seen.schedules_late:
        found.append(f"{seen.schedules_late} schedules are late by more than 10 s")
    if seen.overdue:
        found.append(
            f"{seen.overdue} delayed tasks are overdue: no worker or scheduler moves them to their queues"
        )
    return found


def _of_queues(seen: Snapshot) -> list[str]:
    found = []
    served = {worker.size for worker in seen.workers if worker.alive}
    for queue in seen.queues:
        if not queue.backlog:
            continue
        waits = queue.oldest_waiting_seconds or 0.0
        if queue.size not in served and None not in served:
            found.append(f"{queue.name}: {queue.backlog} tasks wait, and no worker of size {queue.size} runs")
        elif waits > LONG_WAIT_SECONDS and queue.priority != "background":
            found.append(f"{queue.name}: {queue.backlog} tasks wait, the first for {waits / 60:.0f} min")
    return found


def _of_workers(seen: Snapshot) -> list[str]:
    found = []
    for worker in seen.workers:
        silent = None if worker.seen is None else (seen.at - worker.seen).total_seconds()
        if not worker.alive:
            found.append(f"worker {worker.name} is dead: its lease has ended, others take over what it ran")
        elif silent is not None and silent > SILENT_SECONDS:
            found.append(f"worker {worker.name} lives, but has been silent for {silent:.0f} s: a task blocks it")
    return found


def _of_letters(seen: Snapshot) -> list[str]:
    if not seen.dead_letters_waiting:
        return []
    return [f"{seen.dead_letters_waiting} dead letters wait in Redis for a worker with a database"]
