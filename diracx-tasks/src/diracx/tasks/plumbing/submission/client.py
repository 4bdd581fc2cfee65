"""Binds a broker to the context, for `schedule()`.

Workers, schedulers and `call` bind theirs; DiracX routes get one from DIRACX_TASKS_REDIS_URL through
`auto_inject`; any other code says `async with task_broker():`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..current import is_bound, use_broker
from .prepare import submission_of

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker.models import Submission
    from ..broker.redis_streams import RedisStreamBroker
    from ..config import TasksConfig
    from ..registry import TaskRegistry


@dataclass(frozen=True)
class Binding:
    """A broker and the names of the tasks that may go through it."""

    broker: RedisStreamBroker
    registry: TaskRegistry
    config: TasksConfig | None = None
    """The operator's settings; a priority that is set there routes the task."""

    def submission(
        self,
        task: BaseTask,
        *,
        at_time: datetime | None = None,
        labels: Mapping[str, Any] | None = None,
        task_id: str | None = None,
    ) -> Submission:
        """The task as a message. See `prepare.submission_of`."""
        return submission_of(task, self.registry, self.config, at_time=at_time, labels=labels, task_id=task_id)

    async def latest(self) -> Binding:
        """Itself: its settings stay."""
        return self


class Client:
    """A broker for code that submits now and then: the settings are read again when it does."""

    def __init__(self, broker: RedisStreamBroker, registry: TaskRegistry) -> None:
        from ..config.sources import ConfigReader
        from ..config.watcher import CachedConfig

        self._binding = Binding(broker, registry)
        self._follower = CachedConfig(ConfigReader.of_environment())

    @property
    def broker(self) -> RedisStreamBroker:
        """Where the messages go."""
        return self._binding.broker

    async def latest(self) -> Binding:
        """The broker with the settings as they are written now.

        Raises:
            TaskConfigError: when they are wrong and no others were read before.
        """
        config = await self._follower.tasks()
        if config is not self._binding.config:
            self._binding = replace(self._binding, config=config)
        return self._binding


@contextmanager
def bound_to(
    broker: RedisStreamBroker, registry: TaskRegistry, config: TasksConfig | None = None
) -> Iterator[Binding]:
    """Bind a broker for everything that is called, or started as an asyncio task, inside the block."""
    binding = Binding(broker, registry, config)
    with use_broker(lambda: binding):
        yield binding


@asynccontextmanager
async def task_broker(
    redis_url: str | None = None, registry: Mapping[str, type[BaseTask]] | None = None
) -> AsyncIterator[RedisStreamBroker]:
    """Let plain code submit tasks:

        async with task_broker("redis://localhost"):
            await MyTask(1).schedule()

    Args:
        redis_url: by default DIRACX_TASKS_REDIS_URL, else what is in the file
            DIRACX_TASKS_REDIS_URL_FILE, else `redis://localhost`.
        registry: registry name -> task class; by default all installed tasks.

    Raises:
        AddressError: when the URL, or its file, cannot be used; a ValueError.
        TaskConfigError: when the configuration of tasks is wrong. A change of it is followed from then on.
        UnusableServerError: when the task system cannot work on that server, or with that user.
        redis.exceptions.RedisError: when the server does not answer.
    """
    from ..broker.address import DEFAULT_REDIS_URL, redis_url_from_environment
    from ..broker.redis_streams import RedisStreamBroker
    from ..broker.server_check import Role
    from ..registry import TaskRegistry, load_task_registry

    broker = RedisStreamBroker(redis_url or redis_url_from_environment() or DEFAULT_REDIS_URL)
    known = load_task_registry() if registry is None else TaskRegistry.of(registry)
    try:
        await broker.startup(Role.SUBMITTER)
        client = Client(broker, known)
        await client.latest()
        with use_broker(lambda: client):
            yield broker
    finally:
        await broker.shutdown()


#: One lazily made binding for each event loop of the process: an application has one loop.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Client] = WeakKeyDictionary()


def _client_from_environment() -> Client:
    loop = asyncio.get_running_loop()
    client = _of_loop.get(loop)
    if client is None:
        from ..broker.connection import redis_url_from_environment
        from ..broker.redis_streams import RedisStreamBroker
        from ..registry import load_task_registry

        url = redis_url_from_environment()
        if not url:
            raise RuntimeError("this route submits a task but no broker is known: set DIRACX_TASKS_REDIS_URL")
        client = _of_loop[loop] = Client(RedisStreamBroker(url), load_task_registry())
    return client


@contextmanager
def bound_from_environment() -> Iterator[None]:
    """Bind the broker of DIRACX_TASKS_REDIS_URL where nothing is bound yet.

    Nothing is read or connected before something is submitted.
    """
    if is_bound():
        yield
        return
    with use_broker(_client_from_environment):
        yield
