"""Options of `call` and `submit` that select a task, its arguments and the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from ...plumbing.base_task import BaseTask
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.registry import TaskRegistry
from ...plumbing.submission.client import bound_to
from .broker import open_broker
from .configuration import tasks_config
from .registry import load_registry, make_task
from .server import ServerAndTasks


@dataclass(frozen=True, kw_only=True)
class TaskOptions(ServerAndTasks):
    """Options that select a task, its arguments and the server."""

    name: Annotated[str, typer.Argument(metavar="NAME", help="Registry name of the task: category:ClassName.")]
    args: Annotated[
        str, typer.Option("--args", metavar="JSON", help="Positional arguments, a JSON list: '\\[1, \"x\"]'.")
    ] = "[]"
    kwargs: Annotated[
        str, typer.Option("--kwargs", metavar="JSON", help='Named arguments, a JSON object: \'{"vo": "lhcb"}\'.')
    ] = "{}"

    def checked(self, *, alone: bool = False) -> CheckedTask:
        """Make the task and check its arguments; `alone`: load no other tasks if not needed."""
        url = self.url
        registry = load_registry(self.module, only=self.name if alone else None)
        name, task = make_task(registry, self.name, self.args, self.kwargs)
        return CheckedTask(name, task, registry, url)


@dataclass(frozen=True)
class CheckedTask:
    """A task with checked arguments."""

    name: str
    """Its registry name."""
    task: BaseTask
    registry: TaskRegistry
    url: str
    """URL of the server; may have a password."""

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[RedisStreamBroker]:
        """Open a broker and bind it, so that `schedule()` of tasks uses it inside the block."""
        config = tasks_config()
        async with open_broker(self.url) as broker:
            with bound_to(broker, self.registry, config):
                yield broker
