"""The tasks for `diracx-tasks`, ours and the published one: entry points of the group `diracx.tasks.bench`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from diracx.tasks.plumbing import BaseTask, MutexLock
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.locks import BaseLock

from ..meter import sample, tick
from .base import ALONE_SECONDS, NAP_SECONDS


@dataclass
class NoOp(BaseTask):
    number: int

    async def execute(self) -> None:
        tick()


@dataclass
class ReturnOne(BaseTask):
    number: int

    async def execute(self) -> int:
        tick()
        return 1


@dataclass
class Nap(BaseTask):
    number: int

    async def execute(self) -> None:
        tick()
        await asyncio.sleep(NAP_SECONDS)


@dataclass
class Clock(BaseTask):
    sent: float

    async def execute(self) -> None:
        sample(time.monotonic() - self.sent)


@dataclass
class Due(BaseTask):
    moment: float

    async def execute(self) -> None:
        sample(time.time() - self.moment)


@dataclass
class OwnMutex(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, str(self.number))]

    async def execute(self) -> None:
        tick()


@dataclass
class Alone(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, "alone")]

    async def execute(self) -> None:
        tick()
        await asyncio.sleep(ALONE_SECONDS)


BY_NAME: dict[str, type[Any]] = {
    "noop": NoOp,
    "return_one": ReturnOne,
    "nap": Nap,
    "clock": Clock,
    "due": Due,
    "mutex": OwnMutex,
    "alone": Alone,
}
