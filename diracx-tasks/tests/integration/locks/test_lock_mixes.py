"""Mutual exclusion of tasks with any locks in killed worker processes, without leftovers.

A witness outside Redis judges: each execution notes when it begins and when it ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from diracx.tasks.plumbing import schedule_many
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.mixed_lock_tasks import KINDS, REGISTRY, SLOTS, Mixed, SmallMixed, UrgentMixed
from support.paths import SUPPORT
from support.waiting import until
from support.warm_commands import Running, WarmCommands

pytestmark = pytest.mark.leaves_keys("diracx:tasks:*")

TASKS, KILLS = 150, 4
ANY_KINDS = [kind for kind in KINDS if kind != "all"]
#: So many tasks want a slot, and so many all of a quota; few that want little of it may begin before one of those
#: that was granted the lock earlier, in another process.
CROWD, IN_LINE, MAY_PASS = 60, 3, 5
#: Of which size the worker processes are.
SIZES = ("medium", "medium", "small")


class Processes:
    def __init__(self, redis_url: str, witness: Path, commands: WarmCommands) -> None:
        self._redis_url, self._witness, self._commands = redis_url, witness, commands
        self.running = [self.start(size) for size in SIZES]
        self.killed: dict[int, float] = {}

    def start(self, size: str) -> Running:
        script = SUPPORT / "mixed_lock_tasks.py"
        env = {**os.environ, "TEST_WITNESS": str(self._witness)}
        return self._commands.worker(script, self._redis_url, size, env=env)

    def kill(self, which: int) -> None:
        """`kill -9`, and another one in its place."""
        process = self.running[which]
        process.kill()
        process.wait()
        self.killed[process.pid] = time.monotonic()
        self.running[which] = self.start(SIZES[which])

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            assert process.wait(timeout=30) == 0

    def notes(self) -> list[tuple[float, int, str, str]]:
        """Moment, process, "begins" or "ends", and name of a task."""
        lines = self._witness.read_text().splitlines() if self._witness.exists() else []
        return [(float(at), int(pid), what, name) for at, pid, what, name in map(str.split, lines)]


@pytest.fixture
def processes(redis_url: str, tmp_path: Path, warm_commands: WarmCommands) -> Iterator[Processes]:
    started = Processes(redis_url, tmp_path / "witness", warm_commands)
    yield started
    for process in started.running:
        process.kill()
        process.wait()


def any_wishes(chance: random.Random) -> list[tuple[str, int]]:
    """Locks on few keys: some tasks have none, some the same one twice, one reads a thousand."""
    if chance.random() < 0.05:
        return [("read", number) for number in range(chance.choice([50, 100]))]
    return [(chance.choice(ANY_KINDS), chance.randrange(3)) for _ in range(chance.choice([0, 1, 1, 2, 3, 5]))]


def judge(notes: list[tuple[float, int, str, str]], killed: dict[int, float], tasks: dict[str, Mixed]) -> None:
    """No two executions overlap of which the locks of one exclude the other."""
    ended = {(pid, name): at for at, pid, what, name in notes if what == "ends"}
    spans = sorted(
        (at, ended.get((pid, name), killed.get(pid, float("inf"))), name)
        for at, pid, what, name in notes
        if what == "begins"
    )
    for position, (begin, _, name) in enumerate(spans):
        beside = [set(tasks[other].wishes) for _, end, other in spans[:position] if end > begin and other != name]
        for kind, key in set(tasks[name].wishes):
            held = Counter(what for others in beside for what, where in others if where == key)
            may = {
                "mutex": not held["mutex"],
                "write": not held["write"] and not held["read"],
                "read": not held["write"],
                "slot": held["slot"] < SLOTS,
            }
            assert may.get(kind, True), f"{name} with {kind} {key} began at {begin} beside {held}"


def overtaken(notes: list[tuple[float, int, str, str]], in_line: list[str], newcomers: list[str]) -> int:
    """Number of newcomers that began before the task of the line that most of them passed."""
    begins = {name: at for at, _, what, name in notes if what == "begins"}
    return max(sum(begins[other] < begins[name] for other in newcomers) for name in in_line)


@pytest.mark.parametrize(
    ("locks", "beside", "allowed"),
    [
        ("mutex", ["mutex"], False),
        ("write", ["write"], False),
        ("write", ["read"], False),
        ("read", ["write"], False),
        ("read", ["read", "read"], True),
        ("slot", ["slot"] * (SLOTS - 1), True),
        ("slot", ["slot"] * SLOTS, False),
        ("mutex", ["slot", "rate"], True),
    ],
)
def test_the_checker_detects_overlapping_executions(locks: str, beside: list[str], allowed: bool) -> None:
    wishes = [*beside, locks]
    tasks = {f"t{number}": Mixed(f"t{number}", [(kind, 1)]) for number, kind in enumerate(wishes)}
    begins = [(float(number), 1, "begins", name) for number, name in enumerate(tasks)]
    ends = [(100.0, 1, "ends", name) for name in tasks]
    with nullcontext() if allowed else pytest.raises(AssertionError, match=f"with {locks} 1 began"):
        judge(begins + ends, {}, tasks)


async def test_any_mixes_of_locks_on_processes_that_are_killed_exclude_each_other_and_all_end(
    processes: Processes, redis_url: str, redis: Redis
) -> None:
    chance = random.Random(14)
    made = [
        chance.choice([Mixed, Mixed, SmallMixed, UrgentMixed])(f"t{number}", any_wishes(chance))
        for number in range(TASKS)
    ]
    tasks = {task.name: task for task in made}

    async def ended(number: float) -> None:
        await until(lambda: len({name for _, _, what, name in processes.notes() if what == "ends"}) >= number)

    async def nothing_is_left() -> bool:
        lengths = [await redis.xlen(stream) for stream in keys.EVERY_STREAM]
        return not any(lengths) and not await redis.exists(keys.DELAYED)

    async with TaskSystem(
        list(REGISTRY.values()), redis_url=redis_url, workers=0, scheduler=False, task_db_url=None
    ):
        await schedule_many(made)
        async with asyncio.timeout(100):  # on a quiet machine: 10 s
            for kill in range(1, KILLS + 1):
                await ended(kill * TASKS / 8)
                processes.kill(chance.randrange(len(SIZES)))
            await ended(TASKS)
            # Nothing is killed any more. One key for all shows how many hold it at a time; those who want all of a
            # quota, whether newcomers that want little of it pass them.
            crowd = [Mixed(f"crowd{number}", [("slot", 9)]) for number in range(CROWD)]
            line = [Mixed(f"line{number}", [("all", 9)]) for number in range(IN_LINE)]
            tasks |= {task.name: task for task in (*crowd, *line)}
            await schedule_many([*crowd, *line])
            key = line[0].execution_locks[0].spec()["key"]
            await until(lambda: redis.exists(f"{keys.WAITING_PREFIX}medium:{key}"))
            newcomers = [Mixed(f"new{number}", [("rate", 9)]) for number in range(CROWD)]
            tasks |= {task.name: task for task in newcomers}
            for task in newcomers:
                await task.schedule()
                await asyncio.sleep(0.02)
            await ended(len(tasks))
            await until(nothing_is_left)
            processes.stop()
    judge(processes.notes(), processes.killed, tasks)
    passed = overtaken(processes.notes(), [task.name for task in line], [task.name for task in newcomers])
    assert passed <= MAY_PASS, "newcomers pass those who stand in line"
    left = {key.decode() for key in await redis.keys() if await redis.ttl(key) < 0}
    assert left <= {*keys.EVERY_STREAM, keys.ALIVE}, "left behind"
