"""Which broker `schedule()` talks to: bound to the context by whoever runs the code.

Workers, schedulers and `call` bind theirs; DiracX routes get one from DIRACX_TASKS_REDIS_URL through
`auto_inject`; any other code says `async with task_broker():`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker.models import Submission
    from ..broker.redis_streams import RedisStreamBroker
    from ..config import TasksConfig
    from ..registry import TaskRegistry

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
        """The task as a message. See `submissions.submission_of`."""
        from .prepare import submission_of

        return submission_of(task, self.registry, self.config, at_time=at_time, labels=labels, task_id=task_id)


class _Submitter:
    """A binding for code that submits now and then: its settings are looked at again when it does."""

    def __init__(self, broker: RedisStreamBroker, registry: TaskRegistry) -> None:
        from ..config.cached import ConfigReader
        from ..config.watcher import LazyFollower

        self._binding = Binding(broker, registry)
        self._follower = LazyFollower(ConfigReader.of_environment())

    def current(self) -> Binding:
        """The binding as it is known now."""
        return self._binding

    async def followed(self) -> Binding:
        """The binding with the settings as they are written.

        Raises:
            TaskConfigError: when they are wrong and no others were read before.
        """
        config = await self._follower.tasks()
        if config is not self._binding.config:
            self._binding = replace(self._binding, config=config)
        return self._binding


_bound: ContextVar[Callable[[], Binding | _Submitter] | None] = ContextVar("diracx_tasks_binding", default=None)


def _what_is_bound() -> Binding | _Submitter:
    bound = _bound.get()
    if bound is None:
        raise RuntimeError(
            "no task broker is bound here: run this in a worker, a DiracX route or `diracx-task-run call`, "
            "or wrap it in `async with diracx.tasks.plumbing.task_broker():`"
        )
    return bound()


async def current_binding() -> Binding:
    """The binding of this context, with the operator's settings as they are now.

    Raises:
        RuntimeError: when there is none.
        TaskConfigError: when the settings are wrong and no others were read before.
    """
    bound = _what_is_bound()
    return bound if isinstance(bound, Binding) else await bound.followed()


def current_broker() -> RedisStreamBroker:
    """The broker of this context.

    Raises:
        RuntimeError: when none is bound.
    """
    bound = _what_is_bound()
    return (bound if isinstance(bound, Binding) else bound.current()).broker


@contextmanager
def bound_by(find: Callable[[], Binding | _Submitter]) -> Iterator[None]:
    """Bind what this returns whenever it is asked, for everything that is called inside the block."""
    token = _bound.set(find)
    try:
        yield
    finally:
        _bound.reset(token)


@contextmanager
def bound_to(
    broker: RedisStreamBroker, registry: TaskRegistry, config: TasksConfig | None = None
) -> Iterator[Binding]:
    """Bind a broker for everything that is called, or started as an asyncio task, inside the block."""
    binding = Binding(broker, registry, config)
    with bound_by(lambda: binding):
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
    from ..broker.connection import redis_url_from_environment
    from ..broker.redis_streams import RedisStreamBroker
    from ..broker.server_check import Role
    from ..registry import TaskRegistry, load_task_registry

    broker = RedisStreamBroker(redis_url or redis_url_from_environment() or DEFAULT_REDIS_URL)
    known = load_task_registry() if registry is None else TaskRegistry.of(registry)
    try:
        await broker.startup(Role.SUBMITTER)
        submitter = _Submitter(broker, known)
        await submitter.followed()
        with bound_by(lambda: submitter):
            yield broker
    finally:
        await broker.shutdown()


#: One lazily made binding for each event loop of the process: an application has one loop.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Submitter] = WeakKeyDictionary()


def _submitter_from_environment() -> _Submitter:
    loop = asyncio.get_running_loop()
    submitter = _of_loop.get(loop)
    if submitter is None:
        from ..broker.connection import redis_url_from_environment
        from ..broker.redis_streams import RedisStreamBroker
        from ..registry import load_task_registry

        url = redis_url_from_environment()
        if not url:
            raise RuntimeError(f"this route submits a task but no broker is known: set {REDIS_URL_VARIABLE}")
        submitter = _of_loop[loop] = _Submitter(RedisStreamBroker(url), load_task_registry())
    return submitter


@contextmanager
def bound_from_environment() -> Iterator[None]:
    """Bind the broker of DIRACX_TASKS_REDIS_URL where nothing is bound yet.

    Nothing is read or connected before something is submitted.
    """
    if _bound.get() is not None:
        yield
        return
    with bound_by(_submitter_from_environment):
        yield
