"""Pilots submitted per second, from the requests of the rounds to the last task: `make bench-pilot-rate`.

One worker process (this one) on uvloop, SQLite, and a Redis server of its own. The simulated back end responds at
once, or with the latency of a distant site, which each call of `submit` has for any number of pilots.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import uvloop
from diracx.tasks.plumbing.base_task import BaseTask, schedule_many
from diracx.tasks.plumbing.enums import Size
from diracx.tasks.plumbing.locks import BaseLock, MutexLock
from diracx.tasks.testing import TaskSystem
from sqlalchemy import event

from gubbins.ces import PilotAtCE, SubmitOutcome
from gubbins.ces.simulated import SimulatedBackend
from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilot_lock_types import MY_PILOT
from gubbins.tasks.my_pilots import MyPilotTask, spawn_pilots

from .results import write_section

VOS = ("lhcb", "dteam")


@dataclass(frozen=True)
class Rate:
    """One measurement."""

    ces: int
    pilots: int
    latency_seconds: float
    max_batch: int
    seconds: float
    cpu_seconds: float
    """CPU time of this process, which is the worker and submits the tasks."""
    statements_per_pilot: float
    calls: int
    half_refused: bool = False

    @property
    def per_second(self) -> float:
        return self.pilots / self.seconds

    @property
    def per_cpu_second(self) -> float:
        return self.pilots / self.cpu_seconds


async def rate(
    ces: int,
    pilots: int,
    latency_seconds: float = 0.0,
    max_batch: int = 100,
    site: Mapping[str, Any] | None = None,
    half_refused: bool = False,
) -> Rate:
    """Submit so many pilots at all compute elements together.

    Args:
        ces, pilots: how many.
        latency_seconds: of a call of the simulated back end.
        max_batch: pilots in a call.
        site: `backend` and `settings` of the compute elements; None: simulated ones.
        half_refused: the compute elements refuse every other pilot.
    """
    calls, statements = 0, 0
    submit = SimulatedBackend.submit

    async def far(self: SimulatedBackend, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(latency_seconds)
        outcomes = dict(await submit(self, pilots))
        if half_refused:
            outcomes.update((pilot.stamp, SubmitOutcome(error="no such queue")) for pilot in pilots[::2])
        return outcomes

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    with tempfile.TemporaryDirectory() as directory:
        db = MyPilotDB(f"sqlite+aiosqlite:///{directory}/pilots.sqlite")
        async with db.engine_context():
            await db.create_tables()
            rules = {"max_batch": max_batch, "timeout_seconds": 300}
            for number in range(ces):
                await db.add_ce(f"ce{number}", pilots // ces, 1.0, rules=rules, **(site or {}))
            rounds = [(vo, await logic.request_pilots(db, vo, vos=VOS)) for vo in VOS]
            tasks = [stamp for _, asked in rounds for stamps in asked.values() for stamp in stamps]
            event.listen(db.engine.sync_engine, "before_cursor_execute", count)
            SimulatedBackend.submit = far  # type: ignore[method-assign]
            try:
                overrides = {MyPilotDB.no_transaction: lambda: db}
                async with TaskSystem(
                    [MyPilotTask], workers=1, concurrency=50, overrides=overrides, task_db_url=None
                ) as system:
                    with _counted(len(tasks)) as all_done:
                        begin, cpu_begin = time.perf_counter(), time.process_time()
                        for vo, asked in rounds:
                            await spawn_pilots(vo, asked)
                        await asyncio.wait_for(all_done.wait(), 600)
                        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
                    await system.drain(600)
            finally:
                SimulatedBackend.submit = submit  # type: ignore[method-assign]
            found, _ = await db.search_pilots(vo=None, per_page=1)
            accepted = len(tasks) // (2 if half_refused else 1)
            assert found == accepted, (found, accepted)
            active = [pilot for vo in VOS for pilot in await db.get_active_pilots(vo=vo)]
            assert len(active) == accepted, (len(active), accepted)
            assert all(pilot.reference for pilot in active), {pilot.last_error for pilot in active}
            assert not await db.waiting_requests("ce0", at_most=1)
    return Rate(
        ces, len(tasks), latency_seconds, max_batch, seconds, cpu, statements / len(tasks), calls, half_refused
    )


@contextmanager
def _counted(number: int) -> Iterator[asyncio.Event]:
    """Set when so many requests have been executed. (To look at the server until it is empty costs it time.)"""
    all_done, submit = asyncio.Event(), logic.submit_requested_pilot

    async def counting(*arguments: Any, **more: Any) -> int | None:
        nonlocal number
        try:
            return await submit(*arguments, **more)
        finally:
            number -= 1
            if number == 0:
                all_done.set()

    logic.submit_requested_pilot = counting
    try:
        yield all_done
    finally:
        logic.submit_requested_pilot = submit


@dataclass
class NoOpTask(BaseTask):
    """Holds the mutex of a compute element and does nothing: what `MyPilotTask` costs without any pilot."""

    ce_name: str

    size: ClassVar[Size] = Size.SMALL
    dlq_eligible: ClassVar[bool] = False

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(MY_PILOT, self.ce_name)]

    async def execute(self, **kwargs: Any) -> None:
        await logic.submit_requested_pilot(None, "", "", stamp="")  # type: ignore[arg-type]  # replaced, see below


async def no_ops(ces: int, number: int) -> Rate:
    """Execute so many tasks that do nothing under as many mutexes."""

    async def nothing(*_: Any, **__: Any) -> None:
        pass

    real, logic.submit_requested_pilot = logic.submit_requested_pilot, nothing
    try:
        async with TaskSystem([NoOpTask], workers=1, concurrency=50, task_db_url=None) as system:
            with _counted(number) as all_done:
                begin, cpu_begin = time.perf_counter(), time.process_time()
                await schedule_many([NoOpTask(f"ce{each % ces}") for each in range(number)])
                await asyncio.wait_for(all_done.wait(), 600)
                seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
            await system.drain(600)
    finally:
        logic.submit_requested_pilot = real
    return Rate(ces, number, 0.0, 0, seconds, cpu, 0.0, 0)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-pilot-rate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table; RESULTS.md stays as it is")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rates = [
        await rate(*case)
        for case in (
            (1, 2_000),
            (10, 4_000),
            (1, 100, 0.2, 1),
            (1, 2_000, 0.2),
            (10, 400, 0.2, 1),
            (10, 4_000, 0.2),
        )
    ]
    rates.append(await rate(1, 2_000, half_refused=True))
    beside = [await no_ops(1, 2_000), await no_ops(10, 4_000)]
    if arguments.json:
        print(
            json.dumps(
                [{**asdict(each), "per_second": each.per_second, "load": load} for each in [*rates, *beside]]
            )
        )
        return
    lines = [
        f"Load average at the start: {load:.1f} on {os.cpu_count()} CPUs. The load of other programs lowers the "
        "rates per second, but hardly those per second of this process's CPU time.\n",
        "| CEs | latency of a call | pilots in a call | pilots | pilots/s | per CPU second | statements per pilot "
        "| calls |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.ces}{', half refused' if r.half_refused else ''} | {r.latency_seconds * 1000:.0f} ms "
            f"| {r.max_batch} | {r.pilots:,} | {r.per_second:,.0f} | {r.per_cpu_second:,.0f} "
            f"| {r.statements_per_pilot:.2f} | {r.calls} |"
            for r in rates
        ),
        *(
            f"| {r.ces} | no-op tasks with these mutexes | — | {r.pilots:,} | {r.per_second:,.0f} "
            f"| {r.per_cpu_second:,.0f} | — | — |"
            for r in beside
        ),
    ]
    print("\n".join(lines))
    write_section("make bench-pilot-rate", "\n".join(lines))


if __name__ == "__main__":
    uvloop.run(main())
