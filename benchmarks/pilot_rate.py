"""Rate at which pilots are submitted, from the requests of rounds to the last task: `make bench-pilot-rate`.

One worker process (this one) on uvloop, SQLite, a server of its own. The simulated back end answers at once, or
with the latency of a far one: each call of its `submit` takes so long, however many pilots it has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import uvloop
from diracx.tasks.testing import TaskSystem
from sqlalchemy import event

from gubbins.ces import PilotAtCE, SubmitOutcome
from gubbins.ces.simulated.backend import SimulatedBackend
from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import LABEL_REQUESTED, MyPilotTask

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
    statements_per_pilot: float
    calls: int

    @property
    def per_second(self) -> float:
        return self.pilots / self.seconds


async def rate(ces: int, pilots: int, latency_seconds: float = 0.0, max_batch: int = 100) -> Rate:
    """Submit so many pilots at all compute elements together."""
    calls, statements = 0, 0
    submit = SimulatedBackend.submit

    async def far(self: SimulatedBackend, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(latency_seconds)
        return await submit(self, pilots)

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    with tempfile.TemporaryDirectory() as directory:
        db = MyPilotDB(f"sqlite+aiosqlite:///{directory}/pilots.sqlite")
        async with db.engine_context():
            await db.create_tables()
            for number in range(ces):
                await db.add_ce(f"ce{number}", pilots // ces, 1.0, rules={"max_batch": max_batch})
            asked = [(ce, vo, s) for vo in VOS for ce, s in (await logic.request_pilots(db, vo, vos=VOS)).items()]
            tasks = [(MyPilotTask(ce, vo), stamp) for ce, vo, stamps in asked for stamp in stamps]
            event.listen(db.engine.sync_engine, "before_cursor_execute", count)
            SimulatedBackend.submit = far  # type: ignore[method-assign]
            try:
                overrides = {MyPilotDB.no_transaction: lambda: db}
                async with TaskSystem(
                    [MyPilotTask], workers=1, concurrency=50, overrides=overrides, task_db_url=None
                ) as system:
                    begin = time.perf_counter()
                    for task, stamp in tasks:
                        await task.schedule(labels={LABEL_REQUESTED: stamp})
                    await system.drain(600)
                    seconds = time.perf_counter() - begin
            finally:
                SimulatedBackend.submit = submit  # type: ignore[method-assign]
            found, _ = await db.search_pilots(vo=None, per_page=1)
            assert found == len(tasks), (found, len(tasks))
            assert not await db.waiting_requests("ce0", at_most=1)
    return Rate(ces, len(tasks), latency_seconds, max_batch, seconds, statements / len(tasks), calls)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-pilot-rate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table; RESULTS.md stays as it is")
    arguments = parser.parse_args()
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
    if arguments.json:
        print(json.dumps([{**asdict(each), "per_second": each.per_second} for each in rates]))
        return
    lines = [
        "| CEs | latency of a call | pilots in a call | pilots | pilots/s | statements per pilot | calls |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.ces} | {r.latency_seconds * 1000:.0f} ms | {r.max_batch} | {r.pilots:,} | {r.per_second:,.0f} "
            f"| {r.statements_per_pilot:.2f} | {r.calls} |"
            for r in rates
        ),
    ]
    print("\n".join(lines))
    write_section("make bench-pilot-rate", "\n".join(lines))


if __name__ == "__main__":
    uvloop.run(main())
