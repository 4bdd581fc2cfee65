"""Which broker `schedule()` talks to: bound to the context by whoever runs the code.

Workers, schedulers and `call` bind theirs; DiracX routes get one from DIRACX_TASKS_REDIS_URL through
`auto_inject`; any other code says `async with task_broker():`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from .base_task import BaseTask
    from .broker.models import Submission
    from .broker.redis_streams import RedisStreamBroker
    from .config import TasksConfig
    from .factory import TaskRegistry

REDIS_URL_VARIABLE = "DIRACX_TASKS_REDIS_URL"
#: Names a file that holds the URL, should the former not be set.
REDIS_URL_FILE_VARIABLE = "DIRACX_TASKS_REDIS_URL_FILE"
DEFAULT_REDIS_URL = "redis://localhost"


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
        """The task as a message for the queue of its class.

        Raises:
            SendTaskError: when the class is not registered.
            ValueError: when one of its rate limiters could never grant it.
        """
        from .broker.models import Submission, TaskMessage, checked_labels
        from .broker.redis_streams import new_task_id
        from .telemetry import current_trace_context

        task_class = type(task)
        for lock in _declared_locks(task):
            if lock.enabled:
                lock.spec()
        name = self.registry.name_of(task_class)
        message = TaskMessage(
            task_id=task_id or new_task_id(),
            task_name=name,
            labels=checked_labels(labels) if labels else {},
            task_args=list(task.serialize()),
            trace_context=current_trace_context(),
        )
        return Submission(message, self.stream_of(name, task), at_time)

    def stream_of(self, name: str, task: BaseTask) -> str:
        """The queue of a task: its class's, unless the operator has set another priority."""
        from .broker.keys import stream_name_for

        priority = type(task).priority
        if self.config is not None:
            vo = getattr(task, "vo", None)
            override = self.config.get_override(name, vo if isinstance(vo, str) else None)
            priority = override.priority or priority
        return stream_name_for(priority, type(task).size)


def _declared_locks(task: BaseTask) -> list[Any]:
    """The task's own locks; those every task has need no look."""
    from .base_task import BaseTask

    return [] if type(task).execution_locks is BaseTask.execution_locks else task.execution_locks


_bound: ContextVar[Callable[[], Binding] | None] = ContextVar("diracx_tasks_binding", default=None)


def current_binding() -> Binding:
    """The binding of this context.

    Raises:
        RuntimeError: when there is none.
    """
    binding = _bound.get()
    if binding is None:
        raise RuntimeError(
            "no task broker is bound here: run this in a worker, a DiracX route or `diracx-task-run call`, "
            "or wrap it in `async with diracx.tasks.plumbing.task_broker():`"
        )
    return binding()


def current_broker() -> RedisStreamBroker:
    """The broker of this context.

    Raises:
        RuntimeError: when none is bound.
    """
    return current_binding().broker


@contextmanager
def bound_to(
    broker: RedisStreamBroker, registry: TaskRegistry, config: TasksConfig | None = None
) -> Iterator[Binding]:
    """Bind a broker for everything that is called, or started as an asyncio task, inside the block."""
    binding = Binding(broker, registry, config)
    token = _bound.set(lambda: binding)
    try:
        yield binding
    finally:
        _bound.reset(token)


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
        redis.exceptions.RedisError: when the server does not answer.
    """
    from .broker.connection import redis_url_from_environment
    from .broker.redis_streams import RedisStreamBroker
    from .config import tasks_config_of_environment
    from .factory import TaskRegistry, load_task_registry

    broker = RedisStreamBroker(redis_url or redis_url_from_environment() or DEFAULT_REDIS_URL)
    known = load_task_registry() if registry is None else TaskRegistry.of(registry)
    try:
        await broker.startup()
        with bound_to(broker, known, tasks_config_of_environment()):
            yield broker
    finally:
        await broker.shutdown()


#: One lazily made binding for each event loop of the process: an application has one loop.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Binding] = WeakKeyDictionary()


def _binding_from_environment() -> Binding:
    loop = asyncio.get_running_loop()
    binding = _of_loop.get(loop)
    if binding is None:
        from .broker.connection import redis_url_from_environment
        from .broker.redis_streams import RedisStreamBroker
        from .config import tasks_config_of_environment
        from .factory import load_task_registry

        url = redis_url_from_environment()
        if not url:
            raise RuntimeError(f"this route submits a task but no broker is known: set {REDIS_URL_VARIABLE}")
        binding = _of_loop[loop] = Binding(
            RedisStreamBroker(url), load_task_registry(), tasks_config_of_environment()
        )
    return binding


@contextmanager
def bound_from_environment() -> Iterator[None]:
    """Bind the broker of DIRACX_TASKS_REDIS_URL where nothing is bound yet.

    Nothing is read or connected before something is submitted.
    """
    if _bound.get() is not None:
        yield
        return
    token = _bound.set(_binding_from_environment)
    try:
        yield
    finally:
        _bound.reset(token)
