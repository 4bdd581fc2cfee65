"""Figures that cost a query in a database: the dead letters, and what other distributions add."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from .families import Family

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB
    from .families import Source

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "diracx.tasks_metrics"
#: How old what was asked for may be.
FRESH_SECONDS = 30.0
#: How long an answer is waited for. Whoever collects metrics does not wait long either.
_ANSWER_SECONDS = 3.0

Ask = Callable[[], Awaitable[Sequence[Family]]]


class Sources:
    """Asks all of them, now and then and each for itself: what fails is left out, and said once."""

    def __init__(self, asks: Mapping[str, Ask]) -> None:
        self._asks = asks
        self._failing: set[str] = set()
        self._asked_at: float | None = None
        self._families: list[Family] = []
        self._asking = asyncio.Lock()

    async def families(self) -> list[Family]:
        """What they tell, as of 30 s ago at most."""
        if not self._asks:
            return []
        async with self._asking:
            if self._asked_at is None or time.monotonic() - self._asked_at > FRESH_SECONDS:
                told = await asyncio.gather(*(self._ask(name) for name in self._asks))
                up = [({"source": name}, 0 if name in self._failing else 1) for name in self._asks]
                about = "1 if the database behind these figures answers."
                self._families = [family for part in told for family in part]
                self._families.append(Family("metrics_source_up", "gauge", about, up))
                self._asked_at = time.monotonic()
            return self._families

    async def _ask(self, name: str) -> Sequence[Family]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                families = await self._asks[name]()
        except Exception as error:
            if name not in self._failing:
                logger.warning("no metrics of %s: %s", name, str(error) or type(error).__name__)
            self._failing.add(name)
            return []
        if name in self._failing:
            logger.warning("metrics of %s again", name)
        self._failing.discard(name)
        return families


@asynccontextmanager
async def sources(task_db: TaskDB | None) -> AsyncIterator[Sources]:
    """All there are, opened. One that cannot be opened is left out, and said.

    Args:
        task_db: the database of dead letters, open.
    """
    asks: dict[str, Ask] = {}
    if task_db is not None:
        asks["dead_letters"] = _letters_of(task_db)
    async with AsyncExitStack() as stack:
        for name, entry in sorted({entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}.items()):
            try:
                source: Source = entry.load()
                ask = await stack.enter_async_context(source())
            except Exception as error:
                logger.warning("no metrics of %s: %s", name, f"{type(error).__name__}: {error}")
                continue
            if ask is not None:
                asks[name] = ask
        yield Sources(asks)


def _letters_of(db: TaskDB) -> Ask:
    async def ask() -> list[Family]:
        counts = await db.count_by_task()
        samples = [
            ({"task_name": name, "status": str(status)}, number) for (name, status), number in counts.items()
        ]
        return [Family("dead_letter_queue_tasks", "gauge", "Dead letters in the database.", samples)]

    return ask
