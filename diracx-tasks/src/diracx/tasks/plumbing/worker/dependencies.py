"""Opens the dependencies of a worker's tasks: at the start, or, where the imports are expensive, at first use.

The database libraries take a second to import and twice the memory of all the rest. A worker without a configured
database most likely never executes a task that needs one, so it imports them with the first such task. With a
configured database nothing is deferred, and errors show at the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from .._util.tasks import in_own_thread
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
        overrides: replacements of dependencies; they take precedence over the environment.

    Raises:
        TypeError: when a parameter of an `execute` can never be injected; names task and parameter.
        NameError: when an annotation cannot be resolved.
    """

    def __init__(self, specs: Mapping[str, TaskSpec], overrides: Overrides) -> None:
        self.overrides: Overrides = overrides
        """Providers by placeholder, for all dependencies that are open."""
        self.deferred: frozenset[str] = frozenset()
        """Names of tasks that cannot be executed before `load`."""
        if not may_be_configured():
            self.deferred = frozenset(
                name for name, each in specs.items() if loads_at_first_use(each.task_class.execute)
            )
        self._at_start = [each for name, each in specs.items() if name not in self.deferred]
        self.plans: list[Plan] = [spec.plan for spec in self._at_start]
        """Plans of the tasks that are not deferred."""
        self._loading: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open all dependencies but the deferred ones; close all at the end. Logs tasks with a missing dependency.

        Raises:
            Exception: a dependency is configured, but cannot be opened.
        """
        async with self._provided(self._at_start):
            if self.deferred:
                logger.warning(
                    "no database is configured: %d tasks may need one, which is checked when the first of them "
                    "arrives: %s",
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
        """Import and open the deferred dependencies, without blocking the event loop.

        Errors are logged, and raised again by the tasks that need the dependency.
        """
        waiting, self.deferred = [specs[name] for name in sorted(self.deferred)], frozenset()
        loaded = asyncio.Event()
        # A context must be closed by the asyncio task that opened it.
        self._loading = asyncio.create_task(self._loaded(waiting, loaded))
        await loaded.wait()

    async def _loaded(self, waiting: Iterable[TaskSpec], loaded: asyncio.Event) -> None:
        try:
            async with self._provided(await in_own_thread(partial(_compiled, waiting))):
                loaded.set()
                await self._closing.wait()
        except Exception:
            logger.exception("the dependencies of tasks cannot be opened")
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
            missing_by_task = {
                name: missing
                for name, plan in plans.items()
                if (missing := find_missing_overrides(plan, self.overrides))
            }
            if missing_by_task:
                logger.warning(
                    "%d tasks would fail here, for %s is not configured: %s",
                    len(missing_by_task),
                    ", ".join(sorted(set().union(*missing_by_task.values()))),
                    ", ".join(sorted(missing_by_task)),
                )
            yield


def _compiled(specs: Iterable[TaskSpec]) -> list[TaskSpec]:
    """Task specs whose plan can be compiled; errors are logged here, and raised again when the task runs."""
    compiled = []
    for spec in specs:
        try:
            spec.plan  # noqa: B018  # compiles it, with the imports that this needs
        except Exception:
            logger.exception("%s cannot be executed", spec.name)
        else:
            compiled.append(spec)
    return compiled
