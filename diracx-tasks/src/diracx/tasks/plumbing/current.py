"""Context variables: the current task, its locks, and the broker that tasks are submitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .broker.models import Submission, TaskMessage
    from .broker.redis_streams import RedisStreamBroker
    from .locks import BaseLock

current_message: ContextVar[TaskMessage | None] = ContextVar("diracx_tasks_message", default=None)
current_locks: ContextVar[Sequence[BaseLock]] = ContextVar("diracx_tasks_locks", default=())


def held_locks() -> Sequence[BaseLock]:
    """Return the locks that this execution holds, in the order of `execution_locks`; no limiters without a limit.

    Each has the fencing token of its grant: `lock.token`.
    """
    return current_locks.get()


class Submitter(Protocol):
    """Protocol: a broker, and the making of messages for it."""

    @property
    def broker(self) -> RedisStreamBroker:
        """Broker to which the messages are submitted."""

    def submission(
        self,
        task: Any,
        *,
        at_time: datetime | None = None,
        labels: Mapping[str, Any] | None = None,
        task_id: str | None = None,
    ) -> Submission:
        """Make the message of a task for its queue. Raises as `BaseTask.schedule`."""


class SubmitterSource(Protocol):
    """Protocol: a submitter whose settings may change."""

    @property
    def broker(self) -> RedisStreamBroker:
        """Broker to which the messages are submitted."""

    async def latest(self) -> Submitter:
        """Return the submitter with the present settings.

        Raises:
            TaskConfigError: when they are wrong and no others were read before.
        """


_bound: ContextVar[Callable[[], SubmitterSource] | None] = ContextVar("diracx_tasks_binding", default=None)


def is_bound() -> bool:
    """Return whether a broker is bound to this context."""
    return _bound.get() is not None


def _source() -> SubmitterSource:
    bound = _bound.get()
    if bound is None:
        raise RuntimeError(
            "tasks are not bound to a broker here: run this in a worker, a DiracX route or `diracx-task-run call` "
            "or in `async with diracx.tasks.plumbing.task_broker():`"
        )
    return bound()


async def current_submitter() -> Submitter:
    """Return the submitter of this context, with the present settings.

    Raises:
        RuntimeError: when no broker is bound.
        TaskConfigError: when the settings are wrong and no others were read before.
    """
    return await _source().latest()


def current_broker() -> RedisStreamBroker:
    """Return the broker of this context.

    Raises:
        RuntimeError: when none is bound.
    """
    return _source().broker


@contextmanager
def use_broker(find: Callable[[], SubmitterSource]) -> Iterator[None]:
    """Bind the broker that `find` returns, for everything that is called inside the block."""
    token = _bound.set(find)
    try:
        yield
    finally:
        _bound.reset(token)
