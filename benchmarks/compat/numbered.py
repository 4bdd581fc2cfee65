"""Tasks that record their ends in a file, for the published package and for ours."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import (
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    ExponentialBackoff,
    LockedObjectType,
    MutexLock,
    SharedRWLock,
    Size,
)
from diracx.tasks.plumbing.locks import BaseLock


def note(what: str, number: int) -> None:
    """Append a line, as one write: `{what} {number} {pid} {time}`."""
    with Path(os.environ["COMPAT_LOG"]).open("ab", buffering=0) as log:
        log.write(f"{what} {number} {os.getpid()} {time.time()}\n".encode())


@dataclass
class Plain(BaseTask):
    """Ends at once."""

    number: int

    async def execute(self) -> None:
        note(type(self).__name__, self.number)


@dataclass
class Slow(Plain):
    """Takes a while."""

    async def execute(self) -> None:
        await asyncio.sleep(0.4)
        await super().execute()


@dataclass
class Flaky(Plain):
    """Fails when it is tried for the first time."""

    retry_policy = ExponentialBackoff(base_delay_seconds=2, max_retries=4)

    async def execute(self) -> None:
        tried = f"Tried {self.number} "
        first = tried.encode() not in Path(os.environ["COMPAT_LOG"]).read_bytes()  # noqa: ASYNC240  # a few kB
        note("Tried", self.number)
        if first:
            raise RuntimeError("the first attempt")
        await super().execute()


@dataclass
class Child(Slow):
    """One of a group."""


@dataclass
class Callback(Plain):
    """Called when a group has ended."""


@dataclass
class Doomed(Plain):
    """Fails, and becomes a dead letter."""

    dlq_eligible = True

    async def execute(self) -> None:
        note("Tried", self.number)
        raise RuntimeError(f"number {self.number} is doomed")


class Slots(ConcurrencyLimiter):
    """Limiter of two slots."""

    limit = 2


@dataclass
class Held(Plain):
    """Holds a lock for a while; its number selects the kind of lock."""

    @property
    def execution_locks(self) -> list[BaseLock]:
        kinds = (MutexLock, ExclusiveRWLock, SharedRWLock, Slots)
        return [kinds[self.number % len(kinds)](LockedObjectType("job"), "held")]

    async def execute(self) -> None:
        note("Begins", self.number)
        await asyncio.sleep(0.6)
        await super().execute()


@dataclass
class HeldSmall(Held):
    """Ours queues it for small workers, 0.7 for medium ones."""

    size = Size.SMALL


TASKS = (Plain, Slow, Flaky, Child, Callback, Doomed, Held, HeldSmall)
