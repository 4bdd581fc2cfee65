"""Dependencies of a worker's tasks: found out and opened at the start, or, where that is expensive, when needed.

Databases take a second to import and twice the memory of all the rest. A worker for which none is configured most
likely never executes a task that wants one: what has to be imported to understand such a task waits for the first
of them. Where one is configured, nothing waits, and what is wrong shows at the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ..injection.placeholders import find_missing_overrides
from ..injection.plan import Plan
from ..injection.providers import setup_dependency_overrides
from ..injection.signatures import loads_at_first_use
from ..sql.databases import may_be_configured

if TYPE_CHECKING:
    from .task_spec import TaskSpec

logger = logging.getLogger(__name__)

Overrides = Mapping[Callable[..., Any], Callable[..., Any]]


class Dependencies:
    """The dependencies of all tasks of a worker.

    Args:
        specs: by name of the task.
        given: replacements of dependencies that win over what the environment provides.

    Raises:
        TypeError: when a parameter of an `execute` can never be injected; names task and parameter.
        NameError: when an annotation cannot be resolved.
    """

    def __init__(self, specs: Mapping[str, TaskSpec], given: Overrides) -> None:
        self.overrides: Overrides = given
        """Values behind the placeholders, as far as they are open."""
        self.deferred: frozenset[str] = frozenset()
        """Names of tasks that cannot be executed before `load`."""
        if not may_be_configured():
            self.deferred = frozenset(
                name for name, each in specs.items() if loads_at_first_use(each.task_class.execute)
            )
        self._at_start = [each for name, each in specs.items() if name not in self.deferred]
        self.plans: list[Plan] = [spec.plan for spec in self._at_start]
        """Of the tasks that are not deferred."""
        self._loading: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open what is not deferred; at the end, close everything. Says which tasks lack something.

        Raises:
            Exception: something needed is configured, but cannot be opened.
        """
        async with self._provided(self._at_start):
            if self.deferred:
                logger.warning(
                    "no database is configured: %d tasks may need one, which is looked at when the first of them "
                    "comes: %s",
                    len(self.deferred),
                    ", ".join(sorted(self.deferred)),
                )
            try:
                yield
            finally:
                self._closing.set()
                if self._loading is not None:
                    await asyncio.wait([self._loading])

    async def load(self, specs: Mapping[str, TaskSpec]) -> None:
        """Import and open what is deferred. The event loop goes on meanwhile.

        What goes wrong is logged, and is how those tasks are going to fail.
        """
        waiting, self.deferred = [specs[name] for name in sorted(self.deferred)], frozenset()
        loaded = asyncio.Event()
        # What one asyncio task opens it has to close as well.
        self._loading = asyncio.create_task(self._loaded(waiting, loaded))
        await loaded.wait()

    async def _loaded(self, waiting: Iterable[TaskSpec], loaded: asyncio.Event) -> None:
        try:
            async with self._provided(await asyncio.to_thread(_compiled, waiting)):
                loaded.set()
                await self._closing.wait()
        except Exception:
            logger.exception("the dependencies of tasks cannot be had")
        finally:
            loaded.set()

    @asynccontextmanager
    async def _provided(self, specs: Iterable[TaskSpec]) -> AsyncIterator[None]:
        plans = {spec.name: spec.plan for spec in specs if spec.plan.parameters}
        if not plans:
            yield
            return
        async with setup_dependency_overrides(plans.values(), provided=self.overrides) as provided:
            self.overrides = {**provided, **self.overrides}
            lacking = {
                name: missing
                for name, plan in plans.items()
                if (missing := find_missing_overrides(plan, self.overrides))
            }
            if lacking:
                logger.warning(
                    "%d tasks would fail here, for %s is not configured: %s",
                    len(lacking),
                    ", ".join(sorted(set().union(*lacking.values()))),
                    ", ".join(sorted(lacking)),
                )
            yield


def _compiled(specs: Iterable[TaskSpec]) -> list[TaskSpec]:
    """Task specs whose plan can be compiled; errors of others are logged, and met again when they run."""
    fine = []
    for spec in specs:
        try:
            spec.plan  # noqa: B018  # compiles it, and imports what it needs for that
        except Exception:
            logger.exception("%s cannot be executed", spec.name)
        else:
            fine.append(spec)
    return fine
