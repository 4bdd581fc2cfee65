"""Migrations between the published package 0.7.0 and ours, with tasks in flight, as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.published import living_worker
from diracx.tasks.testing import embedded_redis
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from benchmarks.peers.environments import ROOT, prepare

from .numbered import TASKS
from .submit import expected, submit

MODULE = "benchmarks.compat.numbered"
#: A lost worker of 0.7 is found by the next audit, four leases after the last, and 30 s after its end.
_LEASE_SECONDS = 5
_DEADLINE_SECONDS = 150.0
#: Imports take seconds, and many processes start at a time.
_START_SECONDS = 180
#: What ended so short a time before its worker was killed may not have been acknowledged.
_UNACKNOWLEDGED_SECONDS = 1.5
#: Environment variables that processes get, beside Python's own.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR")


@dataclass
class Tally:
    """Counts of tasks of a scenario; all zero is right."""

    lost: int = 0
    """Not ended, and not in Redis."""
    doubled: int = 0
    """Tasks that ended twice, without those that ended just before their worker was killed."""
    stuck: int = 0
    """Not ended, and in Redis still; or left in Redis after its end."""
    callbacks: int = 0
    """Not called back, or twice."""
    overlaps: int = 0
    """Begun while a lock of theirs was held by others."""
    problems: list[str] = field(default_factory=list)


@dataclass
class World:
    """A server, the processes of both versions on it, and the file in which tasks note their ends."""

    url: str
    directory: Path
    published: Path
    """The environment of the published package."""
    copies: dict[str, Path] = field(default_factory=dict)
    database: str = ""
    """URL of that of the dead letters."""
    variables: dict[str, str] = field(default_factory=dict)
    """More environment variables, for all processes."""
    killed: dict[int, float] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    """Starts the processes of ours."""
    published_popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    """Starts those of 0.7."""
    wanted: set[tuple[str, int]] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)

    @property
    def log(self) -> Path:
        return self.directory / "ended"

    def environment(self, *paths: Path) -> dict[str, str]:
        kept = {name: os.environ[name] for name in os.environ if name in _KEPT or name.startswith("PYTHON")}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
            "COMPAT_LOG": str(self.log),
            "DIRACX_TASKS_REDIS_URL": self.url,
            "DIRACX_LOG_LEVEL": "INFO",
            "OTEL_SDK_DISABLED": "true",
            **({"DIRACX_DB_URL_TASKDB": self.database} if self.database else {}),
            **self.variables,
        }

    def start(self, version: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of `0.7`, `ours`, or a copy of ours of which `copies` has the directory."""
        if version == "0.7":
            program, environment = [str(self.published / "bin/diracx-tasks")], self.environment(self.directory)
            popen = self.published_popen
        else:
            popen = subprocess.Popen if version in self.copies else self.popen
            program = [sys.executable, "-m", "diracx.tasks"]
            arguments = (*arguments, "--module", MODULE)
            environment = self.environment(*([self.copies[version]] if version in self.copies else []))
        with (self.directory / f"{version}.log").open("ab") as log:
            process = popen([*program, *arguments], env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def worker(self, version: str, many: int = 4, size: str = "medium") -> subprocess.Popen[bytes]:
        lease = () if version == "0.7" else ("--lease-seconds", str(_LEASE_SECONDS))
        return self.start(version, "worker", "--worker-size", size, "--max-concurrent-tasks", str(many), *lease)

    def both(self, version: str) -> list[subprocess.Popen[bytes]]:
        """A worker and a scheduler."""
        return [self.worker(version), self.start(version, "scheduler")]

    def submit(self, version: str, first: int, chosen: str = "all") -> None:
        if version == "0.7":
            self.run("-m", "benchmarks.compat.submit", str(first), chosen)
        else:
            asyncio.run(submit(self.url, first, chosen))
        self.wanted |= expected(first, chosen)

    def run(self, *arguments: str) -> None:
        """Run Python code, or a module (`-m`, its name, and its arguments), with 0.7."""
        command = [str(self.published / "bin/python"), *(("-c",) if len(arguments) == 1 else ()), *arguments]
        with (self.directory / "0.7.log").open("ab") as log:
            environment = self.environment(self.directory)
            process = self.published_popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        if process.wait(_START_SECONDS) != 0:
            raise RuntimeError(f"a program of 0.7 has failed:\n{Path(log.name).read_text()}")

    def end(self, processes: list[subprocess.Popen[bytes]], *, kill: bool) -> None:
        """End processes by SIGTERM, or by SIGKILL."""
        for process in processes:
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            if kill:
                self.killed[process.pid] = time.time()
        for process in processes:
            process.wait(60)
            self.processes.remove(process)

    def ends(self) -> list[tuple[str, int, int, float]]:
        """Task, number, process and time of each end so far."""
        found = []
        for line in self.log.read_text().splitlines():
            what, number, pid, moment = line.split()
            if what not in ("Tried", "Begins"):
                found.append((what, int(number), int(pid), float(moment)))
        return found

    def until(
        self, condition: Callable[[], bool], what: str, seconds: float = _DEADLINE_SECONDS, every: float = 0.05
    ) -> bool:
        """Poll a condition, at intervals of `every` seconds, until it is true; return False if it never is."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.tally.problems.append(f"not within {seconds:g} s: {what}")
                return False
            time.sleep(every)
        return True

    def until_ended(self, least: int) -> None:
        """Wait until so many tasks have ended."""
        self.until(lambda: len(self.ends()) >= least, f"{least} tasks have ended")

    def until_published_is_gone(self) -> None:
        """Wait until the start of a worker of ours is no more refused for one of 0.7."""

        async def living() -> str | None:
            async with AsyncRedis.from_url(self.url) as redis:
                return await living_worker(redis)

        self.until(lambda: asyncio.run(living()) is None, "0.7 is no more taken for living", _START_SECONDS)

    def done(self) -> bool:
        return self.wanted <= {(what, number) for what, number, *_ in self.ends()}

    def left(self) -> int:
        """Number of tasks and groups in Redis that have not ended."""
        with Redis.from_url(self.url) as redis:
            queued = 0
            for stream in keys.EVERY_STREAM:
                for group in redis.xinfo_groups(stream) if redis.exists(stream) else ():
                    queued += group["pending"] + len(
                        redis.xrange(stream, f"({group['last-delivered-id'].decode()}")
                    )
            return int(queued + redis.zcard(keys.DELAYED) + redis.zcard(keys.GROUPS))

    def judge(self) -> Tally:
        """Wait until all is done, end everything and count."""
        if not self.until(lambda: self.done() and self.left() == 0, "everything has run"):
            gone = [process for process in self.processes if process.poll() is not None]
            self.tally.problems += [f"has ended by itself: {process.args!r}" for process in gone]
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)
        tally, left = self.tally, self.left()
        ended: Counter[tuple[str, int]] = Counter()
        for what, number, pid, moment in self.ends():
            if pid not in self.killed or moment < self.killed[pid] - _UNACKNOWLEDGED_SECONDS:
                ended[what, number] += 1
            else:
                ended.setdefault((what, number), 0)
        missing = {each for each in self.wanted if each not in ended}
        missing_tasks = sum(what != "Callback" for what, _ in missing)
        tally.stuck = max(left, 0 if left == 0 else missing_tasks)
        tally.lost = 0 if left else missing_tasks
        tally.doubled = sum(times > 1 for (what, _), times in ended.items() if what != "Callback")
        tally.callbacks = sum(what == "Callback" for what, _ in missing)
        tally.callbacks += sum(times > 1 for (what, _), times in ended.items() if what == "Callback")
        tally.overlaps = self._overlaps()
        return tally

    def _overlaps(self) -> int:
        """Number of tasks that have begun while others held a lock that excludes them."""
        holders: dict[int, int] = {}
        found = 0
        lines = sorted((line.split() for line in self.log.read_text().splitlines()), key=lambda line: line[3])
        for what, number, *_ in lines:
            if what == "Begins":
                mutex, writers, readers, slots = (
                    sum(many for each, many in holders.items() if each % 4 == kind) for kind in range(4)
                )
                found += (mutex, writers + readers, writers, slots // 2)[int(number) % 4] > 0
            if what in ("Begins", "HeldSmall"):
                holders[int(number)] = holders.get(int(number), 0) + (1 if what == "Begins" else -1)
        return found


@contextmanager
def world(directory: Path, *, published: bool = True) -> Iterator[World]:
    """An empty server. Processes that are left are killed.

    Args:
        published: whether processes of the published package are to be started.

    Raises:
        EnvironmentFailedError: it cannot be installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ended").touch()
    information = directory / "numbered-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: numbered\nVersion: 1.0\n")
    tasks = "".join(f"{task.__name__} = {MODULE}:{task.__name__}\n" for task in TASKS)
    (information / "entry_points.txt").write_text(f"[diracx.tasks.numbered]\n{tasks}")
    with ExitStack() as stack:
        new = World(
            stack.enter_context(embedded_redis()), directory, prepare("reference") if published else directory
        )
        try:
            yield new
        finally:
            for process in new.processes:
                process.kill()
                process.wait(60)


# --- the scenarios ------------------------------------------------------------------------------------------


def upgrade(world: World, *, kill: bool) -> None:
    """0.7 queues and has run some; ours runs the rest."""
    world.submit("0.7", 0)
    before = world.both("0.7")
    world.until_ended(20)
    if not kill:
        world.end(before, kill=False)
    world.submit("0.7", 1000)
    if kill:
        world.end(before, kill=True)
    world.until_published_is_gone()
    world.both("ours")


def rollback(world: World, *, kill: bool) -> None:
    """Ours has queued tasks and run some; after a downgrade, 0.7 runs the rest."""
    world.submit("ours", 0)
    before = world.both("ours")
    world.until_ended(20)
    world.submit("ours", 1000)
    world.end(before, kill=kill)
    world.until(lambda: _downgraded(world), "what is left is given back", _START_SECONDS, every=1)
    world.both("0.7")


def together(world: World, *, kill: bool) -> None:
    """Ours starts beside 0.7: its worker refuses, its scheduler stands by, and both go on when 0.7 has ended."""
    world.submit("0.7", 0)
    before = world.both("0.7")
    world.until_ended(10)
    refused = world.worker("ours")
    world.until(lambda: refused.poll() is not None, "a worker of ours has ended", _START_SECONDS)
    if refused.poll() != 1 or b"diracx-tasks 0.7" not in (world.directory / "ours.log").read_bytes():
        world.tally.problems.append("a worker of ours starts beside 0.7")
    world.processes.remove(refused)
    world.start("ours", "scheduler")
    world.submit("0.7", 1000)
    world.end(before, kill=kill)
    world.until_published_is_gone()
    world.worker("ours")
    world.until_ended(150)
    # One of 0.7 that comes beside ours takes tasks, which are not taken over while it lives.
    late = world.both("0.7")
    world.submit("ours", 2000, "without groups")
    world.until_ended(190)
    world.end(late, kill=kill)


def locks(world: World) -> None:
    """Workers of both versions take tasks that exclude each other, each from the queues of one size."""
    world.worker("ours", 20, "small")
    world.start("ours", "scheduler")
    world.submit("ours", 0, "held")
    world.until_ended(1)
    world.submit("0.7", 1000, "held")
    world.worker("0.7", 20)
    world.until(lambda: any(number >= 1000 for _, number, *_ in world.ends()), "0.7 has run some")
    world.submit("ours", 2000, "held")
    world.submit("ours", 3000, "held")


SCENARIOS: dict[str, Callable[[World], None]] = {
    f"{name}, {how}": partial(run, kill=kill)
    for name, run in (("upgrade", upgrade), ("rollback", rollback), ("together", together))
    for how, kill in (("stopped", False), ("killed", True))
} | {"locks": locks}


def _downgraded(world: World) -> bool:
    command = [sys.executable, "-m", "diracx.tasks", "queue", "downgrade"]
    with (world.directory / "ours.log").open("ab") as log:
        process = world.popen(command, env=world.environment(), stdout=log, stderr=log)
    return process.wait(_START_SECONDS) == 0


def run(name: str, directory: Path) -> Tally:
    """Run one scenario."""
    with world(directory) as new:
        SCENARIOS[name](new)
        return new.judge()


if __name__ == "__main__":  # one, in a process of its own
    print(json.dumps(vars(run(sys.argv[1], Path(sys.argv[2])))))
