"""Visit every reachable state, breadth first, and check the invariants.

The states of one distance from the first are shared out among processes, each with a server of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any

from diracx.tasks.plumbing.broker import keys
from diracx.tasks.testing import embedded_redis

from .server import Server
from .state import NAMES, TASKS, State, canonical, task_of
from .steps import Rules, Steps, Violation

_BATCH = 50


@dataclass
class Found:
    """Result of a search."""

    states: int = 0
    steps: int = 0
    violation: str | None = None
    trace: Sequence[str] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Visited:
    """A state with the data of its server."""

    name: str
    state: State
    dumps: Sequence[tuple[bytes, bytes]]
    content: Sequence[tuple[str, Any]]


@dataclass
class Expanded:
    """Successors of one state."""

    name: str
    steps: int = 0
    after: list[tuple[str, Visited]] = field(default_factory=list)
    """Steps, and the states that they lead to."""
    violation: tuple[str, str] | None = None
    """The step, and the violated invariant."""


class _Expander:
    """Makes all steps from a state. One for each process."""

    _of_this_process: _Expander

    def __init__(self, url: str, rules: Rules) -> None:
        self._rules = rules
        self._server = Server(url)
        self._steps = Steps(url, self._server, rules)

    @classmethod
    def start(cls, rules: Rules) -> None:
        stack = ExitStack()
        url = stack.enter_context(embedded_redis())
        Finalize(None, stack.close, exitpriority=0)
        Thread(target=_end_with_parent, args=(stack,), daemon=True).start()
        cls._of_this_process = cls(url, rules)

    @classmethod
    def first(cls) -> Visited:
        self = cls._of_this_process
        return _visited(self._steps.begin(), *self._server.read())

    @classmethod
    def expand(cls, states: list[Visited]) -> list[Expanded]:
        return [cls._of_this_process._expand(each) for each in states]

    def _expand(self, origin: Visited) -> Expanded:
        found = Expanded(origin.name)
        for label, step in self._steps.possible(origin.state, origin.content):
            found.steps += 1
            try:
                for visited in self._after(origin, step):
                    _check(visited)
                    if visited.name != origin.name:
                        found.after.append((label, visited))
            except Violation as violation:
                found.violation = label, str(violation)
                return found
        runs = any(worker.process == "runs" for worker in origin.state.workers)
        if not found.after and runs and min(origin.state.settled) == 0:
            found.violation = "", "nothing moves, and not everything is settled"
        return found

    def _after(self, origin: Visited, step: list[State] | Callable[[], list[State]]) -> Iterator[Visited]:
        if isinstance(step, list):
            yield from (_visited(state, origin.dumps, origin.content) for state in step)
        else:
            self._server.restore(origin.dumps)
            states = step()
            absent = [name for name, w in zip(NAMES, states[0].workers, strict=True) if w.lease == "ended"]
            if absent and not self._rules.new_leases:
                self._server.end_leases(*absent)
            data = self._server.read()
            yield from (_visited(state, *data) for state in states)


def _end_with_parent(stack: ExitStack) -> None:
    """A parent that is killed does not end its processes, nor they their servers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    try:
        stack.close()
    finally:
        os._exit(1)


def _visited(state: State, dumps: Sequence[tuple[bytes, bytes]], content: Sequence[tuple[str, Any]]) -> Visited:
    return Visited(canonical(state, content), state, dumps, content)


def search(
    rules: Rules, *, processes: int, seconds: float = 600.0, progress: Callable[[Found], None] | None = None
) -> Found:
    """Visit all states with at most so many disturbances, or those that can be visited in the time."""
    found, ends = Found(), time.monotonic() + seconds
    with ExitStack() as stack:
        context = get_context("spawn")
        pool = stack.enter_context(
            ProcessPoolExecutor(processes, context, initializer=_Expander.start, initargs=(rules,))
        )
        first = pool.submit(_Expander.first).result()
        origins = {first.name: ("", "")}
        level = [first]
        while level and found.violation is None and found.complete:
            batches = [level[at : at + _BATCH] for at in range(0, len(level), _BATCH)]
            level = []
            for expanded in pool.map(_Expander.expand, batches):
                _add_states(expanded, found, origins, level)
                if found.violation is not None or time.monotonic() > ends:
                    found.complete = False
                    pool.shutdown(wait=True, cancel_futures=True)
                    break
            if progress is not None:
                progress(found)
    return found


def _add_states(
    expanded: list[Expanded], found: Found, origins: dict[str, tuple[str, str]], level: list[Visited]
) -> None:
    for each in expanded:
        found.states += 1
        found.steps += each.steps
        for label, visited in each.after:
            if visited.name not in origins:
                origins[visited.name] = each.name, label
                level.append(visited)
        if each.violation is not None and found.violation is None:
            label, found.violation = each.violation
            found.trace = [*_way_to(each.name, origins), *filter(None, [label])]


def _way_to(name: str, origins: dict[str, tuple[str, str]]) -> list[str]:
    labels = []
    while origins[name][0]:
        name, label = origins[name]
        labels.append(label)
    return labels[::-1]


def _check(visited: Visited) -> None:
    """Check the invariants of every state.

    Raises:
        Violation: what does not, in words.
    """
    state, places = visited.state, dict.fromkeys(TASKS, 0)
    for name, value in visited.content:
        if name == keys.DELAYED_DATA:
            for task, _ in value:
                places[task.decode()] += 1
        elif name in keys.EVERY_STREAM:
            for _, fields in value[0]:
                places[task_of(fields)] += 1
    for task, settled in zip(TASKS, state.settled, strict=True):
        if places[task] + settled != 1:
            raise Violation(f"{task} is in {places[task]} places and was settled {settled} times")
    for key in set(TASKS.values()) - {""}:
        holders = [
            f"{held.task} at {name}"
            for name, worker in zip(NAMES, state.workers, strict=True)
            for held in worker.held
            if worker.process == "runs" and held.locked and TASKS[held.task] == key
        ]
        if len(holders) > 1:
            raise Violation(f"{key} has two holders that act: {' and '.join(holders)}")
    if not state.excused:
        for task, begun in zip(TASKS, state.begun, strict=True):
            if not TASKS[task] and begun > 1:
                raise Violation(f"{task} has begun {begun} times, and no worker has died or was cut off")
