"""Tasks that record when they run, for tests in this process."""

from __future__ import annotations

__all__ = ["SEEN", "Background", "Broken", "Echo", "InterruptedOnce", "Named", "submitted"]

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, MutexLock, Priority, SendTaskError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock

from support.waiting import until

SEEN: list[Any] = []


@dataclass
class Echo(BaseTask):
    value: Any = None

    async def execute(self) -> Any:
        SEEN.append(self.value)
        return self.value


@dataclass
class Background(Echo):
    priority = Priority.BACKGROUND


class Broken(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=3)
    dlq_eligible = True

    async def execute(self) -> None:
        SEEN.append(datetime.now(UTC))
        raise ValueError("there is no such site")


@dataclass
class Named(BaseTask):
    """Holds the mutex of its name."""

    name: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.name)]

    async def execute(self) -> str:
        SEEN.append(self.name)
        return self.name


@dataclass
class InterruptedOnce(BaseTask):
    """Holds `lock:mutex:job:lost`; its first execution ends only when it is cancelled."""

    data: bytes = b""
    swallows: bool = False
    """Its first execution swallows the cancellation, and returns."""

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "lost", ttl_ms=300)]

    async def execute(self) -> str:
        SEEN.append("begun")
        if len(SEEN) == 2:
            return "the second time"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self.swallows:
                raise
        return "the first time"


async def submitted(task: BaseTask) -> str:
    """Submit a task, again while the server refuses it; returns its id."""

    async def attempt() -> str | None:
        with suppress(SendTaskError):
            return await task.schedule()
        return None

    return str(await until(attempt, "the submission is accepted", seconds=60, pause=0.05))
