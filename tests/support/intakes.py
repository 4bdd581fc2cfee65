"""Intake of a worker without the worker, for tests that take its steps one by one."""

from __future__ import annotations

__all__ = ["NORMAL", "REALTIME", "SaysOnce", "in_hand", "intake_of", "name_of", "submission"]

import asyncio
from typing import Any

from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.models import Delivery, Submission, TaskMessage
from diracx.tasks.plumbing.worker.intake import Intake
from diracx.tasks.plumbing.worker.settings import WorkerSettings
from redis.asyncio import Redis

from support.leased_deliveries import LeasedDeliveries

NORMAL, REALTIME = "diracx:tasks:normal:medium", "diracx:tasks:realtime:medium"


def intake_of(
    broker: RedisStreamBroker,
    stop: asyncio.Event | None = None,
    *,
    idle: bool = True,
    held: LeasedDeliveries | None = None,
    lease_seconds: float = 30,
    quiet_until: float = 0.0,
) -> Intake:
    settings = WorkerSettings(lease_seconds=lease_seconds)
    held = LeasedDeliveries() if held is None else held
    held.quiet_until = quiet_until
    return Intake(broker, settings, stop or asyncio.Event(), held, () if idle else ("a task",))


def submission(task_id: str, stream: str = NORMAL) -> Submission:
    return Submission(TaskMessage(task_id=task_id, task_name="test:Task"), stream)


async def in_hand(redis: Redis) -> int:
    if not await redis.exists(NORMAL):
        return 0
    return sum(group["pending"] for group in await redis.xinfo_groups(NORMAL))


class SaysOnce(RedisStreamBroker):
    """Has no time for the next check for dead workers."""

    async def reclaim(self, free: int, **options: Any) -> tuple[list[Delivery], float, bool]:
        deliveries, _, make_room = await super().reclaim(free, **options)
        return deliveries, 3600.0, make_room


def name_of(delivery: Delivery) -> str:
    assert delivery.data is not None
    return TaskMessage.loadb(delivery.data).task_id
