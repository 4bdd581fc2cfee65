"""`diracx-tasks` of this tree."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Self

from diracx.tasks.plumbing import schedule_many, task_broker

from .base import Client, redis_url
from .diracx_tasks import BY_NAME


class _Client(Client):
    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(task_broker(redis_url()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def submit(self, task: str, argument: Any) -> None:
        await BY_NAME[task](argument).schedule()

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        task_class = BY_NAME[task]
        await schedule_many([task_class(argument) for argument in arguments])

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        await BY_NAME[task](argument).schedule(at_time=datetime.fromtimestamp(moment, UTC))


client = _Client
