"""Read models of the dashboard: queries about pilots, cached and shared by all readers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from diracx.tasks.operations.single_flight import SingleFlightCache
from diracx.tasks.web.dashboard.page import UnavailableError

from gubbins.db import URL_VARIABLE
from gubbins.db.registry import open_registry
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.statistics import QUARTER
from gubbins.domain import clock
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic

if TYPE_CHECKING:
    from diracx.db.sql import PilotAgentsDB

#: Counting a million pilots is too slow for every refresh of a page.
_CACHE_SECONDS = 10.0
HOURS = 24


@dataclass(frozen=True)
class PilotStatistics:
    """Pilot statistics of the past day."""

    since: datetime
    ended: dict[str, dict[str, int]]
    """As `count_ended_pilots`."""
    without_work: dict[str, int]
    """{compute element: number of pilots that found no work}"""
    charts: dict[str, Any]

    def failure_rate(self, ce_name: str) -> float | None:
        """Fraction of ended pilots that failed, without cancelled ones, 0.0-1.0; None: none has ended."""
        ended = self.ended.get(ce_name, {})
        failed = ended.get(MyPilotStatus.FAILED, 0)
        return failed / total if (total := failed + ended.get(MyPilotStatus.DONE, 0)) else None

    def idle_rate(self, ce_name: str) -> float | None:
        """Fraction of ended pilots that found no work, 0.0-1.0; None: none has ended."""
        ended = self.ended.get(ce_name)
        return self.without_work.get(ce_name, 0) / sum(ended.values()) if ended else None


class PilotReadModels:
    """Read models of the pages about pilots."""

    def __init__(self) -> None:
        self.use(None)

    def use(self, db: MyPilotDB | None, registry: PilotAgentsDB | None = None) -> None:
        """Set the databases for this event loop, and clear the cache."""
        self.db = db
        self.registry = registry
        self._cache = SingleFlightCache()

    def database(self) -> MyPilotDB:
        """Get the pilot database.

        Raises:
            UnavailableError: no database is configured.
        """
        if self.db is None:
            raise UnavailableError(f"No database of pilots is configured here; set {URL_VARIABLE}.")
        return self.db

    async def ces(self, vo: str | None = None) -> list[dict[str, Any]]:
        """Compute elements (of one VO, or all) with their slots; not cached."""
        return await logic.list_ces(self.database(), vo)

    async def summary(self, vo: str | None) -> dict[str, dict[str, dict[str, int]]]:
        """{VO: {compute element: {state: number}}}, cached."""
        db = self.database()
        return await self._cache.get(("summary", vo), lambda: logic.count_pilots(db, vo), _CACHE_SECONDS)

    async def waiting(self, ce_names: tuple[str, ...]) -> dict[str, dict[str, int]]:
        """{compute element: {waiting reason: number}}, cached."""
        db = self.database()
        return await self._cache.get(
            ("waiting", ce_names), lambda: db.count_waiting_reasons(ce_names), _CACHE_SECONDS
        )

    async def reports(self, vo: str | None) -> dict[str, dict[str, dict[str, int]]]:
        """{VO: {compute element: {`stale` or outcome: number}}}, cached."""
        db = self.database()
        return await self._cache.get(("reports", vo), lambda: logic.count_reports(db, vo), _CACHE_SECONDS)

    async def statistics(self, vo: str | None) -> PilotStatistics:
        """Statistics of the past day, cached."""
        db = self.database()

        async def count() -> PilotStatistics:
            now = clock.now()
            since = now - timedelta(hours=HOURS)
            ended = await logic.count_ended_pilots(db, since, vo)
            idle = await logic.count_without_work(db, since, vo)
            charts = charts_of(*await logic.count_steps(db, since, now, vo), now)
            return PilotStatistics(since, ended, idle, charts)

        return await self._cache.get(("statistics", vo), count, _CACHE_SECONDS)


def charts_of(
    active: Mapping[MyPilotStatus, int], entered: Mapping[MyPilotStatus, Mapping[int, int]], now: datetime
) -> dict[str, Any]:
    """Compute the series of the charts: active pilots and state changes per quarter of an hour, newest last.

    Args:
        active: {active state: number}.
        entered: {state: {quarters of an hour before `now`: number of pilots that entered it}}.
        now: current time.
    """
    ages = range(timedelta(hours=HOURS) // QUARTER)
    submitted, started, done, failed = (
        # Older ones belong to the first quarter.
        [entered[status].get(age, 0) for age in ages[:-1]]
        + [sum(count for age, count in entered[status].items() if age >= ages[-1])]
        for status in MyPilotStatus
    )
    waiting, running = [active.get(MyPilotStatus.SUBMITTED, 0)], [active.get(MyPilotStatus.RUNNING, 0)]
    for age in ages[:-1]:
        # Never negative, although states may change during the count.
        waiting.append(max(0, waiting[-1] - submitted[age] + started[age]))
        running.append(max(0, running[-1] - started[age] + done[age] + failed[age]))
    times = [int((now - QUARTER * age).timestamp()) for age in ages]

    def chart(**series: list[int]) -> dict[str, Any]:
        return {
            "t": times[::-1],
            "series": [{"label": label, "values": values[::-1]} for label, values in series.items()],
        }

    return {
        "slots": chart(running=running, submitted=waiting),
        "flow": chart(submitted=submitted, done=done, failed=failed),
    }


#: Read models of this process.
READ_MODELS = PilotReadModels()


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """Open the configured databases, if any, for the read models."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        yield
        return
    database = MyPilotDB(url)
    async with database.engine_context(), open_registry() as registry:
        READ_MODELS.use(database, registry)
        try:
            yield
        finally:
            READ_MODELS.use(None)
