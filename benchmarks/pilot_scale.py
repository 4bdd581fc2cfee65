"""The pilot system at the size of a large grid, in simulated time: `make bench-pilots`.

200 compute elements are shared by 10 VOs and hold 100,000 pilots, beside 900,000 that have ended. Each simulated
minute is one cycle: each VO requests pilots, all requested ones are submitted, and the pilots of each VO are
checked. The database is a real one (SQLite in a file); the compute elements respond at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import event, func, select

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import Pilots
from gubbins.domain import clock
from gubbins.domain.exceptions import NoRoomError
from gubbins.domain.pilot_states import ACTIVE
from gubbins.logic import my_pilots as logic

from .peers import environments
from .pilot_world import World, fill
from .results import RESULTS, machine, write_section

CYCLE = timedelta(minutes=1)
#: Submissions at once, as in one worker process.
SLOTS = 8


@dataclass(frozen=True)
class Cycle:
    """One simulated minute."""

    minute: int
    ask_seconds: float
    """All VOs decide how many pilots to ask for."""
    submit_seconds: float
    """All of these are submitted, one by one."""
    check_seconds: float
    """All VOs' pilots are checked."""
    submitted: int
    refused: int
    """By the capacity gate."""
    moved: int
    statements: int
    """Statements of requests and checks, without those of submissions."""
    submit_statements: int
    active: int
    fullest: float
    """Active pilots over capacity, of the fullest compute element: never over 1."""
    smallest_share: float
    """The part of a VO that has least, where an even share is 1."""
    largest_share: float
    smallest_at_ce: float
    """The same at a single compute element: of its slots, and of the VO that has least there."""
    largest_at_ce: float
    memory_mb: float
    """The most that the process has had so far."""

    @property
    def seconds(self) -> float:
        return self.ask_seconds + self.submit_seconds + self.check_seconds


@dataclass(frozen=True)
class Check:
    """One check of a VO."""

    seconds: float
    cpu_seconds: float
    statements: int
    moved: int


@dataclass(frozen=True)
class Run:
    """All of it."""

    world: World
    cycles: list[Cycle]
    fill_seconds: float
    database_mb: float
    pruned_per_second: float
    illegal: int
    quiet_checks: list[Check]
    """Checks of all VOs just after the last cycle."""
    full_checks: list[Check]
    """Checks of all VOs when all their pilots change their state."""


class _Statements:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self, *_: object) -> None:
        self.number += 1

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        before, found = self.number, [0]
        yield found
        found[0] = self.number - before


@asynccontextmanager
async def _timed(into: dict[str, float], what: str) -> AsyncIterator[None]:
    begin = time.perf_counter()
    yield
    into[what] = time.perf_counter() - begin


async def simulate(world: World, minutes: int, at_most_seconds: float) -> Run:
    """Fill the world, and let minutes pass in it, fewer when that takes longer than so many (real) seconds."""
    begin = time.monotonic()
    present = datetime.now(UTC).replace(microsecond=0)
    with tempfile.TemporaryDirectory() as directory, clock.simulated(lambda: present):
        db = MyPilotDB(f"sqlite+aiosqlite:///{directory}/pilots.sqlite")
        async with db.engine_context():
            await db.create_tables()
            took: dict[str, float] = {}
            async with _timed(took, "fill"):
                await fill(db, world, present)
            statements = _Statements()
            event.listen(db.engine.sync_engine, "before_cursor_execute", statements)
            cycles = []
            for minute in range(minutes):
                present += CYCLE
                cycles.append(await _cycle(db, world, minute + 1, statements))
                _say(cycles[-1])
                if time.monotonic() - begin > at_most_seconds:
                    break
            quiet = [await _check(db, vo, statements) for vo in world.vo_names]
            present += world.run + world.queue  # no check ran meanwhile, and all have ended
            full = [await _check(db, vo, statements) for vo in world.vo_names]
            for check in full[:1]:
                print(f"a check of {check.moved:,} pilots that all move: {check}", flush=True)
            print(f"a check of pilots that hardly move: {quiet[0]}", flush=True)
            async with _timed(took, "prune"):
                pruned = await logic.prune_pilots(db, keep=timedelta(days=25), at_most=20_000)
            illegal = await logic.count_illegal_histories(db)
            async with db:
                pages = (await db.conn.exec_driver_sql("PRAGMA page_count")).scalar_one()
                size = (await db.conn.exec_driver_sql("PRAGMA page_size")).scalar_one()
            return Run(
                world, cycles, took["fill"], pages * size / 1e6, pruned / took["prune"], illegal, quiet, full
            )


async def _check(db: MyPilotDB, vo: str, statements: _Statements) -> Check:
    with statements.counted() as counted:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        moved = sum((await logic.transition_pilot_states(db, vo)).values())
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return Check(seconds, cpu_seconds, counted[0], moved)


async def _cycle(db: MyPilotDB, world: World, minute: int, statements: _Statements) -> Cycle:
    took: dict[str, float] = {}
    asked: list[tuple[str, str, str]] = []
    moved = 0
    with statements.counted() as asking:
        async with _timed(took, "ask"):
            # The first VO of one minute is the last of another.
            for number in range(world.vos):
                vo = world.vo_names[(number + minute) % world.vos]
                requested = await logic.request_pilots(db, vo, vos=world.vo_names)
                asked += [(ce, vo, stamp) for ce, stamps in requested.items() for stamp in stamps]
    with statements.counted() as submitting:
        async with _timed(took, "submit"):
            refused = await _submit(db, asked)
    with statements.counted() as checking:
        async with _timed(took, "check"):
            for vo in world.vo_names:
                moved += sum((await logic.transition_pilot_states(db, vo)).values())
    held = await _active(db)
    by_ce, by_vo = Counter[str](), Counter[str]()
    for (ce, vo), number in held.items():
        by_ce[ce] += number
        by_vo[vo] += number
    even = held.total() / world.vos
    return Cycle(
        minute,
        took["ask"],
        took["submit"],
        took["check"],
        len(asked) - refused,
        refused,
        moved,
        asking[0] + checking[0],
        submitting[0],
        held.total(),
        max(by_ce.values()) / world.capacity,
        min(by_vo.values()) / even,
        max(by_vo.values()) / even,
        min(held.values()) * world.vos / world.capacity,
        max(held.values()) * world.vos / world.capacity,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


async def _submit(db: MyPilotDB, asked: list[tuple[str, str, str]]) -> int:
    todo = iter(asked)
    refused = 0

    async def slot() -> None:
        nonlocal refused
        for ce, vo, stamp in todo:
            try:
                await logic.submit_requested_pilot(db, ce, vo, stamp=stamp)
            except NoRoomError:
                refused += 1

    await asyncio.gather(*(slot() for _ in range(SLOTS)))
    return refused


async def _active(db: MyPilotDB) -> Counter[tuple[str, str]]:
    """Count the slots in use, by compute element and VO."""
    columns = (Pilots.ce_name, Pilots.vo)
    counted = select(*columns, func.count()).where(Pilots.status.in_(ACTIVE)).group_by(*columns)
    async with db:
        return Counter({(ce, vo): number for ce, vo, number in await db.conn.execute(counted)})


# --- report ---------------------------------------------------------------------------------------------------


def _say(cycle: Cycle) -> None:
    print(
        f"minute {cycle.minute:3}: {cycle.active:,} active, {cycle.submitted:,} submitted in "
        f"{cycle.submit_seconds:.1f} s, asked in {cycle.ask_seconds:.2f} s, "
        f"checked in {cycle.check_seconds:.2f} s, {cycle.memory_mb:.0f} MB",
        flush=True,
    )


def broken_promises(run: Run) -> list[str]:
    """List the broken promises; empty when all hold."""
    # A slot cannot be divided: two pilots more or less at each compute element are no matter of shares.
    apart = 0.05 + 2 * run.world.vos / run.world.capacity
    found = [
        f"minute {cycle.minute}: {what}"
        for cycle in run.cycles
        for wrong, what in (
            (cycle.fullest > 1, f"a compute element holds {cycle.fullest:.3f} times its capacity"),
            (cycle.smallest_share < 1 - apart, f"a VO has {cycle.smallest_share:.2f} of its even share"),
            (cycle.largest_share > 1 + apart, f"a VO has {cycle.largest_share:.2f} of its even share"),
        )
        if wrong
    ]
    if run.illegal:
        found.append(f"{run.illegal} pilots with an illegal history")
    return found


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def section(run: Run, picture: str | None) -> str:
    world, cycles = run.world, run.cycles
    steady = cycles[1:] or cycles
    submitted = sum(cycle.submitted for cycle in cycles)
    rows = [
        ("pilots in the database", f"{world.active + world.ended:,}, {run.database_mb:,.0f} MB"),
        ("cycle of one minute after the first, median / slowest", f"{_middle([c.seconds for c in steady]):.1f} / "
         f"{max(c.seconds for c in steady):.1f} s"),
        (f"— requests of {world.vos} VOs", f"{_middle([c.ask_seconds for c in steady]):.2f} s"),
        (f"— {world.vos} VOs check their pilots", f"{_middle([c.check_seconds for c in steady]):.2f} s"),
        *(
            (f"a VO's check, {what}: slowest, CPU time, statements",
             f"{max(c.seconds for c in checks):.2f} s, {max(c.cpu_seconds for c in checks):.2f} s, "
             f"{max(c.statements for c in checks)} ({max(c.moved for c in checks):,} moved)")
            for what, checks in (("few pilots move", run.quiet_checks), ("all move", run.full_checks))
        ),
        ("— submissions, one process", f"{submitted / sum(c.submit_seconds for c in cycles):,.0f} pilots/s, "
         f"{sum(c.submit_statements for c in cycles) / submitted:.1f} statements each"),
        ("statements of a cycle beside submissions, median / most",
         f"{_middle([c.statements for c in steady])} / {max(c.statements for c in cycles)}"),
        ("first cycle: free slots filled", f"{cycles[0].submitted:,} in {cycles[0].submit_seconds:.1f} s"),
        ("fullest compute element, at any time", f"{max(c.fullest for c in cycles):.1%} of its slots"),
        ("slots in use at the end of a cycle", f"{min(c.active for c in cycles) / world.active:.1%} at least"),
        ("a VO's part of its even share, at any time", f"{min(c.smallest_share for c in cycles):.1%} to "
         f"{max(c.largest_share for c in cycles):.1%}"),
        ("— at a single compute element", f"{min(c.smallest_at_ce for c in cycles):.1%} to "
         f"{max(c.largest_at_ce for c in cycles):.1%}"),
        ("memory of the process, at most", f"{max(c.memory_mb for c in cycles):.0f} MB"),
        ("pruning", f"{run.pruned_per_second:,.0f} pilots/s"),
        ("pilots with an illegal history", f"{run.illegal}"),
    ]  # fmt: skip
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    seen = f"\n![Pilots, cycle times and memory over simulated time]({picture}.svg)\n" if picture else ""
    return f"""## A large grid

Measured by `make bench-pilots` on {datetime.now(UTC):%Y-%m-%d}: {machine()}.
{world.ces} compute elements of {world.capacity:,} slots are shared by {world.vos} VOs; {world.active:,} pilots are
active, {world.ended:,} have ended. Pilots run for {world.run / timedelta(hours=1):g} h. {len(cycles)} simulated
minutes, one cycle each: each VO requests pilots, all of them are submitted, each VO's pilots are checked. SQLite,
one process. Absolute figures of a shared machine vary.

| figure | value |
|---|---|
{table}
{seen}"""


def _draw(run: Run) -> str:
    """Beside RESULTS.md; returns the name of the picture without its ending."""
    home = environments.prepare("plot")
    command = environments.command_in(home, ("python", "-m", "benchmarks.pilot_plot", str(RESULTS.parent)))
    figures = {"capacity": run.world.active, "cycles": [asdict(cycle) for cycle in run.cycles]}
    done = subprocess.run(
        command, cwd=environments.ROOT, input=json.dumps(figures), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pilot_scale", description=__doc__)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="part of the number of pilots; RESULTS.md is written for 1 only"
    )
    parser.add_argument("--minutes", type=int, default=20, help="simulated time")
    parser.add_argument("--at-most", type=float, default=240, help="limit of real time in seconds")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    full = World()
    world = World(active=round(full.active * arguments.scale), ended=round(full.ended * arguments.scale))
    run = asyncio.run(simulate(world, arguments.minutes, arguments.at_most))
    problems = broken_promises(run)
    if arguments.dry_run or arguments.scale != 1.0:
        print(section(run, None))
    else:
        write_section("make bench-pilots", section(run, _draw(run)))
        print(f"written to {RESULTS}")
    for problem in problems:
        print(f"not kept: {problem}", file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
