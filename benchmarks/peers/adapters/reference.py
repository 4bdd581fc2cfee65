"""The published `diracx-tasks` 0.7.0. It has no bulk call: many tasks are submitted by concurrent calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Self

from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.models import submit_task

from .base import Client, redis_url
from .diracx_tasks import BY_NAME


class _Client(Client):
    async def __aenter__(self) -> Self:
        self._broker = RedisStreamBroker(redis_url())
        await self._broker.startup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._broker.shutdown()

    async def submit(self, task: str, argument: Any) -> None:
        instance = BY_NAME[task](argument)
        await submit_task(self._broker, f"bench:{BY_NAME[task].__name__}", instance.serialize())

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        pending = list(arguments)
        for first in range(0, len(pending), 100):
            await asyncio.gather(*(self.submit(task, argument) for argument in pending[first : first + 100]))

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        run_at = datetime.fromtimestamp(moment, UTC)
        name = f"bench:{BY_NAME[task].__name__}"
        await submit_task(self._broker, name, BY_NAME[task](argument).serialize(), run_at=run_at)


client = _Client
