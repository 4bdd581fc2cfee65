"""A server that goes back to an earlier state (a snapshot, a replica) holds up nobody with what it believes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import BaseTask, ExclusiveRWLock, SharedRWLock
from diracx.tasks.plumbing.exceptions import SendTaskError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import ValkeyProcess

BEGUN: list[str] = []
MAY_END: list[bool] = []


@dataclass
class Reads(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [SharedRWLock(JOB, "object")]

    async def execute(self) -> None:
        BEGUN.append("reads")
        while not MAY_END:
            await asyncio.sleep(0.01)


@dataclass
class Writes(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [ExclusiveRWLock(JOB, "object")]

    async def execute(self) -> None:
        BEGUN.append("writes")


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        await asyncio.sleep(0.02)


async def test_a_shared_lock_that_comes_back_with_a_snapshot_is_given_back_by_its_worker(tmp_path: Path) -> None:
    BEGUN.clear()
    MAY_END.clear()
    server = ValkeyProcess(tmp_path)
    server.start()
    try:
        async with TaskSystem(
            [Reads, Writes], redis_url=server.url, settings={"lease_seconds": 3.0, "lock_retry_seconds": 0.5}
        ) as system:
            await Reads().schedule()
            await until(lambda: BEGUN == ["reads"])
            await system.broker.redis.save()
            MAY_END.append(True)
            await system.drain(10)
            server.kill()
            server.start()  # from the snapshot: the task runs, and its lock is held
            while True:
                try:
                    await Writes().schedule()
                    break
                except SendTaskError:
                    await asyncio.sleep(0.05)
            await until(lambda: "writes" in BEGUN)
            await system.drain(10)
    finally:
        server.kill()
