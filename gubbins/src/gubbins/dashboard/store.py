"""The pilots as the dashboard sees them: looked at now and then, and shared by all who look."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from diracx.tasks.dashboard.page import UnavailableError
from diracx.tasks.dashboard.sharing import Shared

from gubbins.db import URL_VARIABLE
from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic
from gubbins.pilot_states import MyPilotStatus

#: Counting a million pilots is no work for every second.
_COUNTED_SECONDS = 10.0
#: Pilots that charts and failure rates are made from.
NEWEST = 20_000
HOURS = 24
_BUCKET = timedelta(minutes=15)


@dataclass(frozen=True)
class Course:
    """How it went lately."""

    since: datetime
    """From then on all pilots are taken into account."""
    ended: dict[str, int]
    """Compute element -> pilots that ended."""
    failed: dict[str, int]
    """Compute element -> pilots that failed."""
    charts: dict[str, Any]


class PilotStore:
    """What the pages ask for."""

    def __init__(self) -> None:
        self.use(None)

    def use(self, db: MyPilotDB | None) -> None:
        """Look at this database from now on, in this event loop."""
        self.db = db
        self._answers = Shared()

    def database(self) -> MyPilotDB:
        """The database.

        Raises:
            UnavailableError: none is configured.
        """
        if self.db is None:
            raise UnavailableError(f"No database of pilots is configured here; set {URL_VARIABLE}.")
        return self.db

    async def ces(self) -> list[dict[str, Any]]:
        """All compute elements with their slots, as of now."""
        return await logic.list_ces(self.database())

    async def summary(self, vo: str | None) -> dict[str, dict[str, dict[str, int]]]:
        """{VO: {compute element: {state: number}}}, as of some seconds ago."""
        db = self.database()
        return await self._answers.get(("summary", vo), lambda: logic.get_pilot_summary(db, vo), _COUNTED_SECONDS)

    async def course(self, vo: str | None) -> Course:
        """The past day, as of some seconds ago."""
        db = self.database()

        async def look() -> Course:
            newest = await logic.get_newest_pilots(db, NEWEST, vo)
            return await asyncio.to_thread(course_of, newest, datetime.now(UTC))

        return await self._answers.get(("course", vo), look, _COUNTED_SECONDS)


def course_of(newest: Sequence[dict[str, Any]], now: datetime) -> Course:
    """Charts and failure rates of the past day, from the newest pilots (newest first)."""
    since = now - timedelta(hours=HOURS)
    if len(newest) >= NEWEST:
        since = max(since, newest[-1]["submitted_at"])
    ended: dict[str, int] = defaultdict(int)
    failed: dict[str, int] = defaultdict(int)
    buckets = max(1, -(-(now - since) // _BUCKET))
    entered = {name: [0] * buckets for name in ("submitted", "done", "failed")}
    # How many more, or fewer, are running and waiting from a bucket on.
    running, waiting = [0] * (buckets + 1), [0] * (buckets + 1)

    def bucket(moment: datetime) -> int:
        return max(0, min(buckets, buckets - 1 - (now - moment) // _BUCKET))

    for pilot in newest:
        submitted, started, gone = pilot["submitted_at"], pilot["started_at"], pilot["ended_at"]
        if gone is not None and gone < since:
            continue
        if submitted >= since:
            entered["submitted"][min(bucket(submitted), buckets - 1)] += 1
        waiting[bucket(submitted)] += 1
        if started is not None:
            waiting[bucket(started)] -= 1
            running[bucket(started)] += 1
        if gone is not None:
            running[bucket(gone)] -= 1
            ended[pilot["ce_name"]] += 1
            outcome = "failed" if pilot["status"] == MyPilotStatus.FAILED else "done"
            entered[outcome][min(bucket(gone), buckets - 1)] += 1
            if outcome == "failed":
                failed[pilot["ce_name"]] += 1
    times = [int((now - _BUCKET * (buckets - 1 - number)).timestamp()) for number in range(buckets)]
    return Course(
        since,
        dict(ended),
        dict(failed),
        {
            "slots": {
                "t": times,
                "series": [
                    {"label": "running", "values": _summed(running[:buckets])},
                    {"label": "submitted", "values": _summed(waiting[:buckets])},
                ],
            },
            "flow": {"t": times, "series": [{"label": name, "values": each} for name, each in entered.items()]},
        },
    )


def _summed(changes: Sequence[int]) -> list[int]:
    sums, level = [], 0
    for change in changes:
        level += change
        sums.append(level)
    return sums


#: Of this process.
STORE = PilotStore()


@asynccontextmanager
async def opened() -> AsyncIterator[None]:
    """The database of the environment, open, where there is one."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        yield
        return
    database = MyPilotDB(url)
    async with database.engine_context():
        STORE.use(database)
        try:
            yield
        finally:
            STORE.use(None)
