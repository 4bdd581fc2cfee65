"""Time for which a mass cancellation blocks the event loop of a worker: `make bench-cancel`.

Another process cancels; a timer in the worker's event loop measures how late it is called.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from diracx.tasks.plumbing import BaseTask, schedule_many
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.testing import TaskSystem

from .results import RESULTS, machine, write_section

#: Interval of the timer.
_POLL_SECONDS = 0.001


class Held(BaseTask):
    """Runs until it is cancelled."""

    running = 0

    async def execute(self) -> None:
        Held.running += 1
        try:
            await asyncio.Event().wait()
        finally:
            Held.running -= 1


@dataclass(frozen=True)
class Case:
    """Tasks that are cancelled together, and how many of them run."""

    name: str
    runs: int
    waits: int
    delayed: int = 0
    unknown: int = 0


CASES = [
    Case("idle worker, ids of no task", 0, 0, unknown=20_000),
    Case("idle worker, delayed tasks", 0, 0, delayed=20_000),
    Case("10 tasks run, the others are queued", 10, 19_990),
    Case("1,000 tasks run, the others are queued", 1_000, 19_000),
]


class Stalls:
    """The longest that the event loop was late because of this process."""

    longest = 0.0

    async def watch(self) -> None:
        while True:
            started, worked = time.perf_counter(), time.process_time()
            await asyncio.sleep(_POLL_SECONDS)
            late, worked = time.perf_counter() - started - _POLL_SECONDS, time.process_time() - worked
            self.longest = max(self.longest, min(late, worked))


async def measure(case: Case) -> tuple[float, float]:
    """The longest stall of the worker's event loop (ms), and the duration of the cancellation (s)."""
    settings = {"result_ttl_seconds": None}
    async with TaskSystem(
        [Held], workers=1, concurrency=max(10, case.runs), task_db_url=None, settings=settings
    ) as system:
        ids = await schedule_many([Held() for _ in range(case.runs + case.waits)])
        later = datetime.now(UTC) + timedelta(hours=1)
        ids += await schedule_many([Held() for _ in range(case.delayed)], at_time=later)
        ids += [f"unknown {number}" for number in range(case.unknown)]
        while Held.running < case.runs:
            await asyncio.sleep(0.01)
        assert system.redis_url
        canceller = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.cancellations", "--cancel", system.redis_url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert canceller.stdin
        assert canceller.stdout
        await canceller.stdout.readline()  # it has connected
        stalls = Stalls()
        watching = asyncio.create_task(stalls.watch())
        canceller.stdin.write("\n".join(ids).encode())
        await canceller.stdin.drain()
        stalls.longest = 0.0  # writing them is ours
        canceller.stdin.close()
        seconds = float(await canceller.stdout.readline())
        while Held.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        watching.cancel()
        await canceller.wait()
    return 1000 * stalls.longest, seconds


async def cancel(url: str) -> None:
    """The other process."""
    broker = RedisStreamBroker(url)
    await broker.startup()
    print("ready", flush=True)
    ids = (await asyncio.to_thread(sys.stdin.read)).split("\n")
    began = time.perf_counter()
    await broker.cancel(ids)
    print(time.perf_counter() - began, flush=True)
    await broker.shutdown()


async def report(cases: Sequence[Case], rounds: int) -> str:
    """The section of RESULTS.md."""
    rows = []
    for case in cases:
        found = [await measure(case) for _ in range(rounds)]
        stall, seconds = min(stall for stall, _ in found), min(seconds for _, seconds in found)
        rows.append(f"| {case.name} | {stall:.1f} | {seconds:.2f} |")
    return "\n".join(
        [
            "## Cancelling 20,000 tasks at once",
            "",
            f"Measured by `make bench-cancel` on {datetime.now(UTC):%Y-%m-%d}: {machine()}.",
            "One worker and the server on one machine; another process cancels. A stall is the longest delay of",
            "the worker's event loop, but at most the processor time of its process meanwhile. The quickest of",
            f"{rounds} rounds.",
            "",
            "| cancelled | longest stall, ms | all of it, s |",
            "|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-cancel", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of each case, of which the fastest counts (default 3)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    parser.add_argument("--cancel", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cancel:
        asyncio.run(cancel(arguments.cancel))
        return
    text = asyncio.run(report(CASES, arguments.rounds))
    print(text)
    if not arguments.dry_run:
        write_section("make bench-cancel", text)
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
