"""What `call` and `submit` have in common: a task as it was typed, and the broker it goes through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..options import (
    ArgsOption,
    KwargsOption,
    ModuleOption,
    NameArgument,
    RedisUrlFileOption,
    RedisUrlOption,
    resolve_redis_url,
)

if TYPE_CHECKING:
    from ...plumbing.base_task import BaseTask
    from ...plumbing.broker import RedisStreamBroker
    from ...plumbing.registry import TaskRegistry


@dataclass(frozen=True)
class TypedTask:
    """The options that say which task, with what, and where."""

    name: NameArgument
    args: ArgsOption = "[]"
    kwargs: KwargsOption = "{}"
    module: ModuleOption = None
    redis_url: RedisUrlOption = None
    redis_url_file: RedisUrlFileOption = None

    def checked(self, *, alone: bool = False) -> CheckedTask:
        """The task itself.

        Args:
            alone: no other task is going to be submitted.

        Raises:
            CliError: for what was typed wrong, and for modules that cannot be loaded.
        """
        from .registry import load_registry, make_task

        url = resolve_redis_url(self.redis_url, self.redis_url_file)
        registry = load_registry(self.module, only=self.name if alone else None)
        name, task = make_task(registry, self.name, self.args, self.kwargs)
        return CheckedTask(name, task, registry, url)


@dataclass(frozen=True)
class CheckedTask:
    """A task whose arguments fit its class."""

    name: str
    """Its registry name."""
    task: BaseTask
    registry: TaskRegistry
    url: str
    """Of the server; may hold a password."""

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[RedisStreamBroker]:
        """A broker whose server has answered, bound: inside the block tasks can `schedule()`.

        Raises:
            CliError: when the server cannot be reached, or the configuration of tasks is wrong.
        """
        from ...plumbing.submission.client import bound_to
        from .broker import open_broker
        from .environment import tasks_config

        config = tasks_config()
        async with open_broker(self.url) as broker:
            with bound_to(broker, self.registry, config):
                yield broker
