"""Time of the slowest single call of the server with very large amounts of data: `make bench-size`.

The server executes one call at a time, and all clients wait for it. Each state is built twice on a server of its
own, at half and at full size; then the operations that use it are executed, and the time of each call is read from
the server's slow log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from diracx.tasks.plumbing.broker import scripts
from diracx.tasks.testing import embedded_redis
from redis.asyncio import Redis

from .results import RESULTS, machine, write_section
from .size_held import HELD_STATES
from .size_states import PORTION, SCRIPTS, STATES_OF_MANY, State, built

STATES = [*STATES_OF_MANY, *HELD_STATES]
TARGET_MS = 5.0

_NAMES = {scripts.script(name).sha: f"{name}.lua" for name in SCRIPTS}


async def calls_of(state: State, items: int) -> tuple[dict[tuple[str, int], float], float]:
    """Measure the time of each call on the server (ms), by its name and position; and bytes per item."""
    with embedded_redis("--slowlog-max-len", "1000000", "--slowlog-log-slower-than", "-1") as url:
        async with built(state, url, items) as (world, bytes_each):
            _let_nobody_interrupt((await world.redis.info("server"))["process_id"])
            await world.redis.config_set("slowlog-log-slower-than", 0)
            await world.redis.config_resetstat()
            await state.use(world)
            log: Any = await world.redis.execute_command("SLOWLOG", "GET", -1)
            stats: Any = await world.redis.info("commandstats")
    calls: dict[tuple[str, int], float] = {}
    places: Counter[str] = Counter()
    for entry in reversed(log):
        name = _named([part.decode(errors="replace") for part in entry[3]])
        calls[name, places[name]] = entry[2] / 1000
        places[name] += 1
    if transactions := stats.get("cmdstat_exec"):  # which the slow log knows by their parts only
        calls["EXEC, on average", 0] = transactions["usec_per_call"] / 1000
    return calls, bytes_each


def _let_nobody_interrupt(process: int) -> None:
    """Give the server what it asks for before any other process, where we may: a pause is no part of a call."""
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(1))


async def slowest_call(state: State, items: int, rounds: int) -> tuple[float, str, float]:
    """The longest that the server was at one call (ms), which that was, and bytes per item.

    A shared machine stops the server at times, in the middle of any call: so each call counts as in the quickest
    of some rounds, which all make the same calls.
    """
    quickest: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        calls, bytes_each = await calls_of(state, items)
        for call, ms in calls.items():
            quickest[call] = min(ms, quickest.get(call, ms))
    slowest_ms, name = max((ms, name) for (name, _), ms in quickest.items())
    return max(slowest_ms, 0.1), name if slowest_ms > 0.1 else "all", bytes_each


def _named(command: Sequence[str]) -> str:
    name = command[0].upper()
    return _NAMES[command[1]] if name == "EVALSHA" else name


async def most_work(state: State, items: int, url: str) -> tuple[int, str]:
    """The most that the server did in one call, and in which: commands, and members of what they deal with."""
    lines: list[dict[str, Any]] = []
    async with (
        built(state, url, items) as (world, _),
        Redis.from_url(url) as watching,
        watching.monitor() as commands,
    ):

        async def listen() -> None:
            async for line in commands.listen():
                lines.append(line)
                if line["command"] == "ECHO the end":
                    return

        members = await _members(world.redis)
        listening = asyncio.create_task(listen())
        await state.use(world)
        await world.redis.execute_command("ECHO", "the end")
        await listening
    most, call, work, in_transaction = 0, "", 0, 0
    name = ""
    for line in lines:
        command = line["command"].split(" ")
        work_here = 1 + (members.get(command[1], 0) if _deals_with_all(command) else 0)
        if line["client_type"] == "lua":
            work += work_here
        else:
            name, work = _named(command), work_here
            in_transaction = 0 if name == "MULTI" else in_transaction + work_here
            if name == "EXEC":
                work = in_transaction
        if work > most:
            most, call = work, name
    return most, call


def _deals_with_all(command: Sequence[str]) -> bool:
    """True if its time depends on how much its key has."""
    name = command[0].upper()
    if name in ("ZRANGE", "LRANGE", "ZREVRANGE"):
        return command[2:4] == ["0", "-1"]
    if name in ("ZRANGEBYSCORE", "ZREMRANGEBYSCORE"):
        return "LIMIT" not in command
    return name in ("DEL", "HGETALL", "HKEYS", "HVALS", "SMEMBERS")


async def _members(redis: Redis) -> dict[str, int]:
    """Count the members of each key."""
    sizes = {"hash": "HLEN", "set": "SCARD", "zset": "ZCARD", "list": "LLEN", "stream": "XLEN"}
    found = {}
    async for key in redis.scan_iter(count=PORTION):
        kind = (await redis.execute_command("TYPE", key)).decode()
        found[key.decode()] = await redis.execute_command(sizes[kind], key) if kind in sizes else 1
    return found


@dataclass(frozen=True)
class Found:
    """Measurements of one state."""

    state: str
    items: int
    slowest_ms: float
    call: str
    growth: float
    """The slowest call, over that at half the size."""
    bytes_each: float


async def measure(scale: float, only: str, rounds: int) -> list[Found]:
    found = []
    for state in STATES:
        if not re.search(only, state.name):
            continue
        items = max(20, int(state.items * scale))
        half, *_ = await slowest_call(state, items // 2, rounds)
        slowest_ms, call, bytes_each = await slowest_call(state, items, rounds)
        found.append(Found(state.name, items, slowest_ms, call, slowest_ms / half, bytes_each))
    return found


def report(found: Sequence[Found], scale: float, rounds: int) -> str:
    rows = "\n".join(
        f"| {each.state} | {each.items:,} | {each.slowest_ms:.1f} | {each.call} | {each.growth:.1f} | "
        f"{each.bytes_each:,.0f} |"
        for each in found
    )
    return f"""## The slowest single call

Measured by `make bench-size` on {datetime.now(UTC):%Y-%m-%d}, at {scale:g} times the full sizes: {machine()}.
The server executes one call at a time, so none should take more than {TARGET_MS:g} ms. Growth:
compared with half as many items; calls of 0.1 ms and less count as equal. Times are those of the server's slow
log. It had real-time priority, where that is allowed, and each call counts as in the quickest of {rounds} rounds:
other processes on the machine do not count.

| state | items | slowest call, ms | which | growth when doubled | bytes per item |
|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-size", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the full sizes (default 1)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of each call, of which the fastest counts (default 3)"
    )
    parser.add_argument("--only", default="", help="states whose name matches this regular expression")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table; RESULTS.md stays as it is")
    parser.add_argument("--dry-run", action="store_true", help="print only, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.scale, arguments.only, arguments.rounds))
    if arguments.json:
        print(json.dumps([asdict(each) for each in found]))
        return
    text = report(found, arguments.scale, arguments.rounds)
    print(text)
    if not arguments.dry_run and not arguments.only and arguments.scale == 1:
        write_section("make bench-size", text)
        print(f"written to {RESULTS}")
    if missed := [f"{each.state}: {each.slowest_ms:.1f} ms" for each in found if each.slowest_ms > TARGET_MS]:
        parser.exit(1, f"longer than {TARGET_MS:g} ms: {'; '.join(missed)}\n")


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
