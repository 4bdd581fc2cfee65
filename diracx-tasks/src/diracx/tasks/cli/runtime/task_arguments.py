"""The task that `call` and `submit` are given, and the broker it goes through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ...plumbing.base_task import BaseTask
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.registry import TaskRegistry
from ...plumbing.submission.client import bound_to
from ..options import ArgsOption, KwargsOption, NameArgument
from .broker import open_broker
from .configuration import tasks_config
from .registry import load_registry, make_task
from .server import ServerAndTasks


@dataclass(frozen=True, kw_only=True)
class TaskOptions(ServerAndTasks):
    """The options that say which task, with which arguments, and which server."""

    name: NameArgument
    args: ArgsOption = "[]"
    kwargs: KwargsOption = "{}"

    def checked(self, *, alone: bool = False) -> CheckedTask:
        """The task itself.

        Args:
            alone: no other task is going to be submitted.

        Raises:
            CliError: for arguments that do not fit, and for modules that cannot be loaded.
        """
        url = self.url
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
        config = tasks_config()
        async with open_broker(self.url) as broker:
            with bound_to(broker, self.registry, config):
                yield broker
