"""Visits every state that can be reached, breadth first, and looks whether what must hold does."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing.broker import keys

from .server import Server
from .state import NAMES, State, canonical
from .steps import TASKS, Rules, Steps, Violation


@dataclass
class Found:
    """What a search found."""

    states: int = 0
    steps: int = 0
    violation: str | None = None
    trace: Sequence[str] = ()
    complete: bool = True


def search(
    url: str, rules: Rules, *, seconds: float = 600.0, progress: Callable[[Found], None] | None = None
) -> Found:
    """Visit all states with at most so many disturbances, or those that can be visited in the time."""
    server = Server(url)
    steps = Steps(url, server, rules)
    found = Found()
    ends = time.monotonic() + seconds
    try:
        first = steps.begin()
        dumps, content = server.read()
        name = canonical(first, content)
        origin: dict[str, tuple[str, str]] = {name: ("", "")}
        queue = deque([(first, dumps, content, name)])
        while queue and found.violation is None:
            if time.monotonic() > ends:
                found.complete = False
                break
            state, dumps, content, name = queue.popleft()
            found.states += 1
            if progress is not None and found.states % 1000 == 0:
                progress(found)
            moves = False
            for label, step in steps.possible(state, content):
                found.steps += 1
                try:
                    if isinstance(step, list):
                        after, dumps_after, content_after = step, dumps, content
                    else:
                        server.restore(dumps)
                        after = step()
                        dumps_after, content_after = server.read()
                    for each in after:
                        _check(each, content_after)
                        name_after = canonical(each, content_after)
                        moves = moves or name_after != name
                        if name_after not in origin:
                            origin[name_after] = name, label
                            queue.append((each, dumps_after, content_after, name_after))
                except Violation as violation:
                    found.violation = str(violation)
                    found.trace = [*_way_to(name, origin), label]
                    break
            if not moves and any(w.process == "runs" for w in state.workers) and min(state.settled) == 0:
                found.violation = "nothing moves, and not everything is settled"
                found.trace = _way_to(name, origin)
    finally:
        steps.close()
        server.redis.flushall()
        server.redis.close()
    return found


def _way_to(name: str, origin: dict[str, tuple[str, str]]) -> list[str]:
    labels = []
    while origin[name][0]:
        name, label = origin[name]
        labels.append(label)
    return labels[::-1]


def _check(state: State, content: Sequence[tuple[str, Any]]) -> None:
    """What must hold in every state.

    Raises:
        Violation: what does not, in words.
    """
    places = dict.fromkeys(TASKS, 0)
    for name, value in content:
        if name == keys.DELAYED:
            for task in value:
                places[task.decode()] += 1
        elif name in keys.EVERY_STREAM:
            for _, fields in value[0]:
                task = next(task for task in TASKS if task.encode() in fields[fields.index(b"data") + 1])
                places[task] += 1
    for task, settled in zip(TASKS, state.settled, strict=True):
        if places[task] + settled != 1:
            raise Violation(f"{task} is in {places[task]} places and was settled {settled} times")
    for key in set(TASKS.values()) - {""}:
        holders = [
            f"{task} at {NAMES[which]}"
            for which, worker in enumerate(state.workers)
            if worker.process == "runs"
            for task in [held.task for held in worker.held if held.locked and TASKS[held.task] == key]
        ]
        if len(holders) > 1:
            raise Violation(f"{key} has two holders that act: {' and '.join(holders)}")
    if set(state.disturbed) <= {"the server is away", "an answer is lost"}:
        for task, begun in zip(TASKS, state.begun, strict=True):
            if not TASKS[task] and begun > 1:
                raise Violation(f"{task} has begun {begun} times, and no worker has died or was cut off")
