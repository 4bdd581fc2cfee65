"""Measure the project and write its section of RESULTS.md: `make bench`, or `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime

from . import lateness, pilots, tasks
from .results import RESULTS, machine, write_section

#: With 1,000,000 tasks queued.
_SNAPSHOT_TARGET_MS = 200
#: Of 100,000 pilots, a tenth of which move.
_CHECK_TARGET_SECONDS, _CHECK_TARGET_STATEMENTS = 2.0, 12
_MISSED = "**missed**"


def judged(value: str, met: bool) -> str:
    """A figure, and whether it meets its target."""
    return f"{value}, {'met' if met else _MISSED}"


async def measure(rounds: int) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []

    def note(what: str, value: str) -> None:
        print(f"{what:62} {value}", flush=True)
        rows.append((what, value))

    drain = await tasks.median_of(rounds, tasks.drain_rate)
    note("drain of 20,000 no-ops, one worker process, 100 slots", f"{drain:,.0f} tasks/s")
    one_by_one = await tasks.median_of(rounds, tasks.enqueue_one_by_one)
    note("enqueue one by one", f"{one_by_one:,.0f} tasks/s")
    bulk = await tasks.median_of(rounds, tasks.enqueue_in_bulk)
    note("enqueue in bulk", f"{bulk:,.0f} tasks/s")
    p50, p99 = await tasks.idle_latency()
    note("idle latency, schedule() to execute(), p50 / p99", f"{p50 * 1000:.2f} / {p99 * 1000:.2f} ms")
    behind, alone = await tasks.one_mutex()
    note(
        "200 tasks of 1 ms behind one mutex / one after another in a loop",
        f"{behind:.2f} s / {alone:.2f} s: {behind / alone:.1f} times",
    )
    for kind, how in (("spread", "each every 30 s"), ("burst", "all due at one instant")):
        late = await lateness.lateness(kind)
        with_what = f"1,000 schedules, {how}, 100,000 delayed tasks waiting"
        for name, what in (
            ("queued", "periodic, in the queue"),
            ("periodic", "periodic, begun by one worker"),
            ("delayed", "delayed, begun by one worker"),
        ):
            p50, p99 = lateness.percentiles(late[name])
            note(f"lateness p50 / p99: {what} ({with_what})", f"{p50:.1f} / {p99:.1f} ms")
    leader, standby = await lateness.idle()
    note("CPU of a scheduler with 1,000 schedules, none due: leader / standby", f"{leader:.2%} / {standby:.2%}")
    queued, left = await tasks.bytes_per_task()
    note(
        "Redis memory per queued no-op / left over when 20,000 are done", f"{queued:.0f} bytes / {left:,.0f} bytes"
    )
    snapshot_ms = await tasks.snapshot_time() * 1000
    note(
        f"snapshot of the system with 1,000,000 queued tasks (target: < {_SNAPSHOT_TARGET_MS} ms)",
        judged(f"{snapshot_ms:.1f} ms", snapshot_ms < _SNAPSHOT_TARGET_MS),
    )
    note("import diracx.tasks.plumbing", f"{tasks.import_time('import diracx.tasks.plumbing'):.2f} s")
    everything = tasks.import_time("from diracx.tasks.plumbing import *")
    note("import every name of diracx.tasks.plumbing", f"{everything:.2f} s")
    each: dict[tuple[int, float], float] = {}
    for number, moving in ((1_000, 0.1), (100_000, 0.1), (1_000_000, 0.1), (100_000, 1.0)):
        check = pilots.check_alone(number, moving)
        each[number, moving] = check.seconds / number * 1e6
        what = f"check of {number:,} pilots, {moving:.0%} of which move, SQLite"
        figure = f"{check.seconds:.2f} s ({each[number, moving]:.0f} µs each), {check.statements} statements"
        if (number, moving) == (100_000, 0.1):
            what += f" (target: ≤ {_CHECK_TARGET_SECONDS:g} s, ≤ {_CHECK_TARGET_STATEMENTS} statements)"
            quick = check.seconds <= _CHECK_TARGET_SECONDS
            figure = judged(figure, quick and check.statements <= _CHECK_TARGET_STATEMENTS)
        note(what, figure)
    few, many = each[1_000, 0.1], each[1_000_000, 0.1]
    note(
        "cost of each pilot among 1,000 / among 1,000,000 (target: no more)",
        judged(f"{few:.0f} / {many:.0f} µs", many <= few),
    )
    return rows


def report(rows: list[tuple[str, str]], rounds: int) -> str:
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""## The project alone

Measured by `make bench` on {datetime.now(UTC):%Y-%m-%d}: {machine()}. Rates are medians of {rounds} rounds, on
an embedded Valkey on the same machine. Absolute figures of a shared machine vary; compare figures of one run.

| figure | value |
|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each rate; the median counts")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments.rounds))
    if not arguments.dry_run:
        write_section("make bench", report(rows, arguments.rounds))
        print(f"written to {RESULTS}")
    if missed := [what for what, value in rows if value.endswith(_MISSED)]:
        parser.exit(1, f"missed: {'; '.join(missed)}\n")


if __name__ == "__main__":
    main()
