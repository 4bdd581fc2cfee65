"""Makes messages of tasks, and binds a broker to the context, for `schedule()`.

Workers, schedulers and `call` bind their broker; DiracX routes get one from DIRACX_TASKS_REDIS_URL through
`auto_inject`; other code uses `async with task_broker():`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .._util.tasks import at_end_of_loop
from ..base_task import BaseTask, is_bound, use_broker
from ..broker.labels import LABEL_PRIORITY, LABEL_SECRET, LABEL_SIZE, checked_labels, stream_of_labels
from ..broker.models import Submission, TaskMessage, new_task_id
from ..broker.streams import stream_name_for
from ..locks import lock_specs
from ..messages.arguments import secret_positions, signature_of
from ..messages.roundtrip import checked_arguments
from ..task_vo import own_vo

if TYPE_CHECKING:
    from ..broker.redis_streams import RedisStreamBroker
    from ..config import TasksConfig
    from ..registry import TaskRegistry


@dataclass(frozen=True)
class Binding:
    """A broker, with the registry and the settings of the tasks that are submitted through it."""

    broker: RedisStreamBroker
    registry: TaskRegistry
    config: TasksConfig | None = None
    """The operator's settings, of which a priority determines the queue."""

    def submission(
        self, task: BaseTask, *, at_time: datetime | None = None, labels: Mapping[str, Any] | None = None
    ) -> Submission:
        """Make the message of a task, for the queue of `stream_of`.

        Raises:
            SendTaskError: when the class is not registered.
            TypeError: when an argument would not be equal after decoding.
            ValueError: when its locks could never be granted, or are too many.
        """
        task_class = type(task)
        if task_class.execution_locks is not BaseTask.execution_locks:  # the default locks need no check
            try:
                lock_specs(task.execution_locks)
            except ValueError as error:
                raise ValueError(f"the locks of {task_class.__name__} could never be granted: {error}") from error
        name = self.registry.names[task_class]
        checked = checked_labels(labels) if labels else {}
        signature = signature_of(task_class)
        if signature.secret:
            checked[LABEL_SECRET] = secret_positions(task_class)
        args = signature.scalars(task)
        if args is None:
            args = checked_arguments(task)
        message = TaskMessage(
            task_id=new_task_id(),
            task_name=name,
            labels=checked,
            task_args=args,
            sig=signature.signature(len(args)),
        )
        return Submission(message, stream_of(name, task, self.config, checked), at_time)

    async def latest(self) -> Binding:
        """Return this binding, whose settings do not change."""
        return self


class Client:
    """A broker for code that submits tasks only sometimes: each submission reads changed settings again."""

    def __init__(self, broker: RedisStreamBroker, registry: TaskRegistry) -> None:
        from ..config.reader import ConfigReader
        from ..config.watcher import CachedConfig

        self._binding = Binding(broker, registry)
        self._config = CachedConfig(ConfigReader.from_environment())

    @property
    def broker(self) -> RedisStreamBroker:
        """Broker of the submissions."""
        return self._binding.broker

    async def latest(self) -> Binding:
        """Return the binding with the current settings.

        Raises:
            TaskConfigError: when the settings are wrong and no correct ones were read before.
        """
        config = await self._config.tasks()
        if config is not self._binding.config:
            self._binding = replace(self._binding, config=config)
        return self._binding


def stream_of(name: str, task: BaseTask, config: TasksConfig | None, labels: Mapping[str, Any]) -> str:
    """Choose the queue of a task: by the operator's priority, else by its class, else by its labels.

    Raises:
        ValueError: when a label that determines the queue has an invalid value.
    """
    task_class = type(task)
    priority = None if LABEL_PRIORITY in labels and not _declares(task_class, "priority") else task_class.priority
    size = None if LABEL_SIZE in labels and not _declares(task_class, "size") else task_class.size
    if config is not None and (config.common or config.vo_overrides):
        priority = config.get_override(name, own_vo(task)).priority or priority
    if priority is not None and size is not None:
        return stream_name_for(priority, size)
    return stream_of_labels(labels, priority, size)


def _declares(task_class: type[BaseTask], name: str) -> bool:
    """True if the class or a base other than `BaseTask` sets this attribute."""
    return any(name in vars(each) for each in task_class.__mro__ if each is not BaseTask)


@contextmanager
def bound_to(
    broker: RedisStreamBroker, registry: TaskRegistry, config: TasksConfig | None = None
) -> Iterator[Binding]:
    """Bind a broker for code that is called, or started as an asyncio task, inside the block."""
    binding = Binding(broker, registry, config)
    with use_broker(lambda: binding):
        yield binding


@asynccontextmanager
async def task_broker(
    redis_url: str | None = None, registry: Mapping[str, type[BaseTask]] | None = None
) -> AsyncIterator[RedisStreamBroker]:
    """Bind a broker, for code outside workers and routes that submits tasks:

        async with task_broker("redis://localhost"):
            await MyTask(1).schedule()

    Args:
        redis_url: by default DIRACX_TASKS_REDIS_URL, else the content of the file DIRACX_TASKS_REDIS_URL_FILE,
            else `redis://localhost`.
        registry: task classes by registry name; by default all installed tasks.

    Raises:
        AddressError: when the URL, or its file, cannot be used; a ValueError.
        TaskConfigError: when the configuration of tasks is wrong. Later changes of it are applied.
        UnusableServerError: when the task system cannot work with that server, or that user.
        redis.exceptions.RedisError: when the server does not reply.
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


#: One client for each event loop of the process, made at its first use and closed at the end of the loop.
_client_by_loop: dict[asyncio.AbstractEventLoop, Client] = {}


def _client_from_environment() -> Client:
    loop = asyncio.get_running_loop()
    client = _client_by_loop.get(loop)
    if client is None:
        from ..broker.connection import redis_url_from_environment
        from ..broker.redis_streams import RedisStreamBroker
        from ..registry import load_task_registry

        url = redis_url_from_environment()
        if not url:
            raise RuntimeError("this route submits a task but no broker is known: set DIRACX_TASKS_REDIS_URL")
        client = _client_by_loop[loop] = Client(RedisStreamBroker(url), load_task_registry())
        at_end_of_loop(_close_client)
    return client


async def _close_client() -> None:
    await _client_by_loop.pop(asyncio.get_running_loop()).broker.shutdown()


@contextmanager
def bound_from_environment() -> Iterator[None]:
    """Bind the broker of DIRACX_TASKS_REDIS_URL, unless one is bound.

    The variable is read, and the connection opened, at the first submission.
    """
    if is_bound():
        yield
        return
    with use_broker(_client_from_environment):
        yield
