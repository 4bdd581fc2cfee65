"""Tasks of the chaos tests, one class for each kind."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import (
    ConcurrencyLimiter,
    ExclusiveRWLock,
    ExponentialBackoff,
    IntervalSeconds,
    MutexLock,
    NoRetry,
    PeriodicBaseTask,
    Priority,
    RateLimiter,
    SharedRWLock,
    Size,
)
from diracx.tasks.plumbing.broker import models
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock

from .records import VARIABLE, Recorded, next_run, note

#: Set for workers of a newer version, which is simulated: they know the message format after today's, which others
#: leave to them; their code is the same.
NEWER_VARIABLE = "CHAOS_NEWER"
NEWER_FORMAT = models.FORMAT + 1
if os.environ.get(NEWER_VARIABLE):
    models.FORMAT = NEWER_FORMAT

#: At most so many `Limited` at a time.
CONCURRENCY = 4
#: At most so many `Rated` in any such window.
RATE, RATE_SECONDS = 20, 3.0
BEAT_SECONDS = 1.0
#: A `Failing` fails so often, then it is a dead letter.
FAILURES = 3


class Slots(ConcurrencyLimiter):
    limit = CONCURRENCY


class Quota(RateLimiter):
    limit = RATE
    window_seconds = RATE_SECONDS


@dataclass
class Quick(Recorded):
    n: int

    async def execute(self) -> None:
        with self.at_work():
            pass


@dataclass
class Urgent(Quick):
    priority = Priority.REALTIME
    size = Size.SMALL


@dataclass
class Later(Quick):
    """Submitted for a later time."""

    size = Size.SMALL


@dataclass
class Slow(Recorded):
    n: int
    seconds: float

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(self.seconds)


@dataclass
class Flaky(Recorded):
    """Fails once."""

    n: int
    priority = Priority.BACKGROUND

    async def execute(self) -> None:
        with self.at_work():
            path = Path(os.environ[VARIABLE]) / f"flaky-{self.n}"
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            raise RuntimeError("the first time it fails")


@dataclass
class Newer(Quick):
    """Only workers of a newer version can read its message."""


@dataclass
class Once(Recorded):
    """Must not start twice: becomes a dead letter when its worker dies."""

    n: int
    at_most_once = True

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(0.05)


@dataclass
class Failing(Recorded):
    """Never succeeds."""

    n: int
    retry_policy = ExponentialBackoff(base_delay_seconds=1, max_retries=FAILURES - 1)

    async def execute(self) -> None:
        with self.at_work():
            raise RuntimeError("it always fails")


@dataclass
class Locked(Recorded):
    n: int
    key: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.key)]

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(0.01)


@dataclass
class LockedSmall(Locked):
    """Contends with the other size for the same keys."""

    size = Size.SMALL


@dataclass
class LockedTwice(Recorded):
    """Wants two mutexes at once; `key` is "a+b"."""

    n: int
    key: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, key) for key in self.key.split("+")]

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(0.01)


@dataclass
class LockedLong(Locked):
    """Keeps its lock for longer than a lease."""

    seconds: float

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(self.seconds)


@dataclass
class Reads(Recorded):
    n: int
    key: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [SharedRWLock(JOB, self.key)]

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(0.02)


@dataclass
class ReadsLong(Reads):
    """Shares its lock for longer than a lease."""

    seconds: float

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(self.seconds)


@dataclass
class Writes(Recorded):
    n: int
    key: str
    size = Size.SMALL

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [ExclusiveRWLock(JOB, self.key)]

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(0.01)


@dataclass
class Limited(Recorded):
    n: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [Slots(JOB, "chaos")]

    async def execute(self) -> None:
        with self.at_work():
            await asyncio.sleep(0.02)


@dataclass
class Rated(Recorded):
    n: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [Quota(JOB, "chaos")]

    async def execute(self) -> None:
        with self.at_work():
            pass


@dataclass
class Child(Quick):
    """One of a group."""


@dataclass
class GroupDone(Quick):
    size = Size.SMALL


@dataclass
class GroupFailed(Quick):
    """Error callback that must never run: no child fails permanently."""


@dataclass
class Kills(Recorded):
    """Takes its worker with it, every time."""

    n: int
    retry_policy = NoRetry()

    async def execute(self) -> None:
        with self.at_work():
            note("K", 0, "Kills", self.n)
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class KillsLocked(Kills):
    """The same, while others wait for its lock."""

    size = Size.SMALL
    key: str = ""

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.key)]


class Beat(PeriodicBaseTask):
    """Periodic task of the schedulers."""

    default_schedule = IntervalSeconds(BEAT_SECONDS)
    size = Size.SMALL

    async def execute(self) -> None:
        run = next_run()
        note("S", run, "Beat", 0)
        note("E", run, "Beat", 0, "ok")
