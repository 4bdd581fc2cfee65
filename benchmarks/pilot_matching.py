"""Pilots without work under each demand policy, over a simulated day: `make bench-pilot-matching`.

One VO's jobs arrive over the day; some need eight processors, a GPU, one site or days of CPU time. Five compute
elements differ in what they can run. The database, the requests, the submissions and the checks are the real ones;
the site is simulated: a pilot that begins takes the oldest job that it can run, or ends after five minutes without
work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, ClassVar
from unittest.mock import patch

from gubbins.ces import CEBackend, Observation, PilotAtCE, SubmitOutcome, registry
from gubbins.ces.protocol import CESettings, Observed
from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.matching import TaskQueue, group_jobs
from gubbins.domain.rules import CERules
from gubbins.logic import my_pilots as logic

from .results import machine, write_section

VO = "lhcb"
STEP = timedelta(minutes=1)
QUEUE = timedelta(minutes=10)
WITHOUT_WORK = timedelta(minutes=5)
HOURS = 24
_2_DAYS = 2 * 86_400

CES: dict[str, tuple[int, dict[str, Any]]] = {
    "cern": (60, {"site": "LCG.CERN.ch", "max_cpu_seconds": _2_DAYS}),
    "pic": (60, {"site": "LCG.PIC.es", "max_cpu_seconds": _2_DAYS}),
    "pic-long": (40, {"site": "LCG.PIC.es"}),
    "ral-8": (20, {"site": "LCG.RAL.uk", "processors": 8, "max_cpu_seconds": _2_DAYS}),
    "cern-gpu": (8, {"site": "LCG.CERN.ch", "required_tags": ["GPU"]}),
}

#: Requirements, share of the jobs, hours that they run.
KINDS: tuple[tuple[TaskQueue, float, float], ...] = (
    (TaskQueue(0), 0.6, 2),
    (TaskQueue(0, sites=frozenset({"LCG.CERN.ch"})), 0.15, 3),
    (TaskQueue(0, tags=frozenset({"8Processors"})), 0.1, 4),
    (TaskQueue(0, cpu_seconds=5 * 86_400), 0.1, 8),
    (TaskQueue(0, tags=frozenset({"GPU"})), 0.05, 3),
)


@dataclass(frozen=True)
class Day:
    """A day under one policy."""

    policy: str
    pilots: int
    without_work: int
    slot_hours_without_work: float
    jobs: int
    jobs_begun: int
    wait_minutes_mean: float
    wait_minutes_p95: float


class Grid:
    """Jobs that wait, and what the pilots at the sites do."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.waiting: list[list[datetime]] = [[] for _ in KINDS]
        self.ends: dict[str, datetime] = {}
        self.jobs = self.without_work = 0
        self.waits: list[float] = []
        rules = {name: CERules(**own) for name, (_, own) in CES.items()}
        self._served = {
            name: [kind for kind, (queue, *_) in enumerate(KINDS) if _serves(queue, name, rules[name])]
            for name in CES
        }

    def arrive(self) -> None:
        """Let the jobs of one step arrive: 10 to 40 an hour, most of them at noon."""
        hour = self.now.hour + self.now.minute / 60
        expected = (25 - 15 * math.cos(2 * math.pi * hour / HOURS)) * STEP / timedelta(hours=1)
        while self._chance.random() < expected:
            expected -= 1
            [kind] = self._chance.choices(range(len(KINDS)), [share for _, share, _ in KINDS])
            self.waiting[kind].append(self.now)
            self.jobs += 1

    def begin(self, stamp: str, ce_name: str) -> None:
        """A pilot begins: it takes the oldest job that it can run, if there is any."""
        able = [kind for kind in self._served[ce_name] if self.waiting[kind]]
        if not able:
            self.without_work += 1
            self.ends[stamp] = self.now + WITHOUT_WORK
            return
        kind = min(able, key=lambda kind: self.waiting[kind][0])
        self.waits.append((self.now - self.waiting[kind].pop(0)) / timedelta(minutes=1))
        self.ends[stamp] = self.now + timedelta(hours=KINDS[kind][2])

    def queues(self) -> list[TaskQueue]:
        """The task queues of the VO."""
        return [
            TaskQueue(len(jobs), queue.cpu_seconds, sites=queue.sites, tags=queue.tags)
            for jobs, (queue, *_) in zip(self.waiting, KINDS, strict=True)
        ]


def _serves(queue: TaskQueue, name: str, rules: CERules) -> bool:
    one = TaskQueue(1, queue.cpu_seconds, sites=queue.sites, tags=queue.tags)
    return bool(group_jobs([one], {name: rules}))


class GridBackend(CEBackend[CESettings]):
    """A site where pilots wait ten minutes, and then take jobs of the grid."""

    Settings = CESettings
    grid: ClassVar[Grid]

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        return {pilot.stamp: SubmitOutcome(reference=pilot.stamp) for pilot in pilots}

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        return {pilot.stamp: Observation(self._state(pilot)) for pilot in pilots}

    def _state(self, pilot: PilotAtCE) -> Observed:
        grid = self.grid
        if pilot.stamp not in grid.ends:
            if pilot.submitted_at is None or grid.now - pilot.submitted_at < QUEUE:
                return Observed.WAITING
            grid.begin(pilot.stamp, self.ce.name)
        return Observed.RUNNING if grid.now < grid.ends[pilot.stamp] else Observed.DONE

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        pass


class _EntryPoint(EntryPoint):
    def load(self) -> type[GridBackend]:
        return GridBackend


def _installed(group: str) -> EntryPoints:
    return EntryPoints([_EntryPoint("grid", "benchmarks.pilot_matching:GridBackend", group)])


async def day(policy: str, seed: int, hours: int = HOURS) -> Day:
    """Simulate a day.

    Args:
        policy: `fill`, `count` (of the VO's waiting jobs) or `matching`.
    """
    grid = GridBackend.grid = Grid(seed)
    waiting: dict[str, Callable[[], Awaitable[Any]]] = {
        "count": lambda: _known(sum(map(len, grid.waiting))),
        "matching": lambda: _known(grid.queues()),
    }
    with tempfile.TemporaryDirectory() as directory, patch.object(registry, "entry_points", _installed):
        db = MyPilotDB(f"sqlite+aiosqlite:///{directory}/pilots.sqlite")
        async with db.engine_context():
            await db.create_tables()
            with clock.simulated(lambda: grid.now):
                for name, (capacity, rules) in CES.items():
                    own = {"policy": "fill" if policy == "fill" else "waiting_jobs", "max_batch": 1000}
                    await db.add_ce(name, capacity, 1.0, backend="grid", rules=own | rules)
                for _ in range(timedelta(hours=hours) // STEP):
                    grid.now += STEP
                    grid.arrive()
                    asked = await logic.request_pilots(db, VO, vos=[VO], waiting_jobs=waiting.get(policy))
                    for name, stamps in asked.items():  # the first submits those of all
                        await logic.submit_requested_pilot(db, name, VO, stamp=stamps[0])
                    await logic.transition_pilot_states(db, VO)
                summary = await logic.get_pilot_summary(db, VO)
                assert await logic.count_illegal_histories(db) == 0
    waits = sorted(grid.waits)
    return Day(
        policy,
        sum(summary.values()),
        grid.without_work,
        round(grid.without_work * WITHOUT_WORK / timedelta(hours=1), 1),
        grid.jobs,
        len(waits),
        round(statistics.mean(waits), 1),
        round(waits[int(0.95 * len(waits))], 1),
    )


async def _known(jobs: Any) -> Any:
    return jobs


_WHAT = {
    "fill": "`fill`",
    "count": "`waiting_jobs`, number of the VO's jobs",
    "matching": "`waiting_jobs`, matched with task queues",
}


def report(days: Sequence[Day], seeds: int) -> str:
    """The section of RESULTS.md."""
    slots = sum(capacity for capacity, _ in CES.values())
    lines = [
        "## Pilots without work",
        "",
        f"`make bench-pilot-matching` on {machine()}.",
        "",
        f"{HOURS} hours in simulated time, {slots} slots of five compute elements, the mean of {seeds} days. Of "
        "the jobs, 60 % run anywhere, 15 % at one site only, 10 % need eight processors, 10 % five days of CPU "
        "time, 5 % a GPU. Pilots wait ten minutes at their site, and end after five minutes when there is no job "
        "for them. Jobs are one VO's.",
        "",
        "| policy | pilots | without work | share | slot hours without work | jobs begun | jobs waited, mean "
        "| 95 % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for policy, what in _WHAT.items():
        of = [each for each in days if each.policy == policy]

        def mean(field: str, of: Sequence[Day] = of) -> float:
            return float(statistics.mean(getattr(each, field) for each in of))

        pilots, empty = mean("pilots"), mean("without_work")
        lines.append(
            f"| {what} | {pilots:,.0f} | {empty:,.0f} | {empty / pilots:.1%} "
            f"| {mean('slot_hours_without_work'):,.0f} | {mean('jobs_begun'):,.0f} of {mean('jobs'):,.0f} "
            f"| {mean('wait_minutes_mean'):.0f} min | {mean('wait_minutes_p95'):.0f} min |"
        )
    return "\n".join(lines)


def main() -> None:
    """Simulate some days under each policy, and write the section."""
    parser = argparse.ArgumentParser(prog="benchmarks.pilot_matching", description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=int, default=HOURS, help=f"hours of each day (default {HOURS})")
    parser.add_argument("--seeds", type=int, default=3, help="days of each policy (default 3)")
    parser.add_argument("--json", action="store_true", help="print the figures, and write nothing")
    given = parser.parse_args()
    days = [asyncio.run(day(policy, seed, given.hours)) for policy in _WHAT for seed in range(1, given.seeds + 1)]
    if given.json:
        print(json.dumps([asdict(each) for each in days], indent=2))
        return
    text = report(days, given.seeds)
    print(text)
    if given.hours == HOURS:
        write_section("pilot-matching", text)


if __name__ == "__main__":
    main()
