"""Makes messages of tasks, and binds a broker to the context, for `schedule()`.

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

from ..base_task import BaseTask, is_bound, use_broker
from ..broker.labels import LABEL_PRIORITY, LABEL_SECRET, LABEL_SIZE, checked_labels, stream_of_labels
from ..broker.models import Submission, TaskMessage, new_task_id
from ..broker.streams import stream_name_for
from ..locks import lock_specs
from ..messages.arguments import secret_positions, signature_of
from ..messages.roundtrip import outgoing_arguments

if TYPE_CHECKING:
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
        """The task as a message for its queue: see `stream_of`.

        Raises:
            SendTaskError: when the class is not registered.
            TypeError: when an argument would not arrive as it is.
            ValueError: when its locks could never be granted, or are too many.
        """
        task_class = type(task)
        if task_class.execution_locks is not BaseTask.execution_locks:  # those every task has need no look
            try:
                lock_specs(task.execution_locks)
            except ValueError as error:
                raise ValueError(f"the locks of {task_class.__name__} could never be granted: {error}") from error
        name = self.registry.name_of(task_class)
        checked = checked_labels(labels) if labels else {}
        signature = signature_of(task_class)
        if signature.secret:
            checked[LABEL_SECRET] = secret_positions(task_class)
        args = outgoing_arguments(task, signature)
        message = TaskMessage(
            task_id=task_id or new_task_id(),
            task_name=name,
            labels=checked,
            task_args=args,
            sig=signature.signature(len(args)),
        )
        return Submission(message, stream_of(name, task, self.config, checked), at_time)

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
        """Broker to which the messages go."""
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


def stream_of(name: str, task: BaseTask, config: TasksConfig | None, labels: Mapping[str, Any]) -> str:
    """The queue of a task: by the operator's priority, else by its class, else by its labels.

    Raises:
        ValueError: when a label that counts names no queue.
    """
    task_class = type(task)
    priority = None if LABEL_PRIORITY in labels and not _declares(task_class, "priority") else task_class.priority
    size = None if LABEL_SIZE in labels and not _declares(task_class, "size") else task_class.size
    if config is not None and (config.common or config.vo_overrides):
        vo = getattr(task, "vo", None)
        priority = config.get_override(name, vo if isinstance(vo, str) else None).priority or priority
    if priority is not None and size is not None:
        return stream_name_for(priority, size)
    return stream_of_labels(labels, priority, size)


def _declares(task_class: type[BaseTask], name: str) -> bool:
    """True if the class or a base of it sets this, and not `BaseTask` alone."""
    return any(name in vars(each) for each in task_class.__mro__ if each is not BaseTask)


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
