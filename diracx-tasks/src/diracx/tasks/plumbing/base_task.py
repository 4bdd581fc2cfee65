"""Base classes of tasks, and the context of an execution: message, locks and bound broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .enums import Priority, Size
from .lock_registry import TASK
from .locks import BaseLock, ConcurrencyLimiter, MutexLock, RateLimiter
from .messages.annotations import annotates
from .messages.arguments import serialize
from .retry_policies import NoRetry, RetryPolicyBase

if TYPE_CHECKING:
    from dataclasses import dataclass as _has_fields

    from .broker.models import Submission, TaskMessage
    from .broker.redis_streams import RedisStreamBroker
    from .schedules import TaskScheduleBase
else:

    def _has_fields(cls: type) -> type:
        return cls


current_message: ContextVar[TaskMessage | None] = ContextVar("diracx_tasks_message", default=None)
current_locks: ContextVar[Sequence[BaseLock]] = ContextVar("diracx_tasks_locks", default=())


def held_locks() -> Sequence[BaseLock]:
    """Return the locks that this execution holds, in the order of `execution_locks`, without disabled limiters.

    `lock.token` is the fencing token of its grant.
    """
    return current_locks.get()


class Submitter(Protocol):
    """Protocol: makes messages for a broker."""

    @property
    def broker(self) -> RedisStreamBroker:
        """Broker to which the messages are submitted."""

    def submission(
        self, task: BaseTask, *, at_time: datetime | None = None, labels: Mapping[str, Any] | None = None
    ) -> Submission:
        """Make the message of a task for its queue. Raises as `BaseTask.schedule`."""


class SubmitterSource(Protocol):
    """Protocol: provides a submitter with current settings."""

    @property
    def broker(self) -> RedisStreamBroker:
        """Broker to which the messages are submitted."""

    async def latest(self) -> Submitter:
        """Return the submitter with the current settings.

        Raises:
            TaskConfigError: the configuration is wrong, and there is no earlier one.
        """


BINDING: ContextVar[Callable[[], SubmitterSource] | None] = ContextVar("diracx_tasks_binding", default=None)


def is_bound() -> bool:
    """Return whether a broker is bound to this context."""
    return BINDING.get() is not None


def _source() -> SubmitterSource:
    bound = BINDING.get()
    if bound is None:
        raise RuntimeError(
            "tasks are not bound to a broker here: run this in a worker, a DiracX route, `diracx-task-run call`, "
            "or in `async with diracx.tasks.plumbing.task_broker():`"
        )
    return bound()


async def current_submitter() -> Submitter:
    """Return the submitter of this context, with the current settings.

    Raises:
        RuntimeError: no broker is bound.
        TaskConfigError: the configuration is wrong, and there is no earlier one.
    """
    return await _source().latest()


def current_broker() -> RedisStreamBroker:
    """Return the broker of this context.

    Raises:
        RuntimeError: no broker is bound.
    """
    return _source().broker


@contextmanager
def use_broker(find: Callable[[], SubmitterSource]) -> Iterator[None]:
    """Bind the broker that `find` returns, inside the block."""
    token = BINDING.set(find)
    try:
        yield
    finally:
        BINDING.reset(token)


class BaseTask:
    """Base class of tasks. The fields are the arguments of a task; `execute` runs it.

    A plain class, a dataclass or a pydantic model (`class T(BaseTask, BaseModel)`, whose overrides of the
    class variables below need their `ClassVar` annotation):

        @dataclass
        class Greet(BaseTask):
            name: str

            async def execute(self, config: Config) -> str:
                return f"Hello {self.name}"

        task_id = await Greet("world").schedule()
    """

    priority: ClassVar[Priority] = Priority.NORMAL
    size: ClassVar[Size] = Size.MEDIUM
    retry_policy: ClassVar[RetryPolicyBase] = NoRetry()
    dlq_eligible: ClassVar[bool] = False
    """Store the task as a dead letter when it has failed permanently."""
    time_limit_seconds: ClassVar[float | None] = None
    """An execution that takes longer is cancelled and counts as failed. None: no limit."""
    at_most_once: ClassVar[bool] = False
    """Never start it twice: no retries, and it fails if its lease, a lock or its worker is lost."""
    secret_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields whose values are shown as `•••` in command line, dashboard and failures."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        secret: Any = cls.secret_fields
        if not isinstance(secret, list | tuple | set | frozenset) or not all(isinstance(n, str) for n in secret):
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__}: secret_fields is {secret!r}, not a set of names; write "
                'frozenset({"password"})'
            )
        type.__setattr__(cls, "secret_fields", frozenset(secret))
        # A pydantic task must not inherit the __init__ of a dataclass base.
        for base in cls.__mro__:
            if "__pydantic_base_init__" in dir(vars(base).get("__init__")) and "__init__" not in vars(cls):
                type.__setattr__(cls, "__init__", vars(base)["__init__"])
                break

    @classmethod
    def bind_broker(cls, task_bindings: Mapping[type[BaseTask], Any]) -> None:
        """Bind the result of `create_task_bindings` to this context; `task_broker` binds inside a block.

        Raises:
            RuntimeError: a broker is bound already.
            TypeError: it is not a result of `create_task_bindings`.
        """
        if is_bound():
            raise RuntimeError("Tasks are already bound to a broker in this context")
        source: SubmitterSource | None = getattr(task_bindings, "source", None)
        if source is None:
            raise TypeError("bind_broker needs a result of create_task_bindings; in tests use TaskSystem")
        BINDING.set(lambda: source)

    @property
    def execution_locks(self) -> list[BaseLock]:
        """Return the locks of one execution, which are acquired together, and released after its transaction.

        By default a rate limiter and a concurrency limiter, disabled unless the configuration sets limits.
        """
        name = type(self).__name__
        return [RateLimiter(TASK, name), ConcurrencyLimiter(TASK, name)]

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task. Parameters are injected by their type."""
        raise NotImplementedError(f"{type(self).__name__} does not define execute()")

    def serialize(self) -> tuple[Any, ...]:
        """Return the arguments in the order of the fields; the class is rebuilt from them."""
        return serialize(self)

    async def schedule(self, at_time: datetime | None = None, labels: Mapping[str, Any] | None = None) -> str:
        """Submit the task to the queue of its class's priority and size.

        Args:
            at_time: earliest start; a naive datetime is in UTC.
            labels: labels of the message. With `result_ttl_seconds` the result is stored.

        Returns:
            The task id.

        Raises:
            RuntimeError: no broker is bound; the message explains how to bind one.
            SendTaskError: the broker cannot be reached.
            TypeError: names an argument that would not arrive equal and of the same type.
            TaskTooLargeError: the message is too large; a SendTaskError.
            ValueError: its locks could never be granted or are too many, or a label is invalid.
        """
        return (await schedule_many([self], at_time=at_time, labels=labels))[0]


async def schedule_many(
    tasks: Sequence[BaseTask],
    *,
    at_time: datetime | None = None,
    labels: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """Submit many tasks, 500 per round trip. Arguments, returns and errors as in `BaseTask.schedule`.

    `labels` are for all tasks, or a list with those of each.
    """
    submitter = await current_submitter()
    each = labels if isinstance(labels, Sequence) else [labels] * len(tasks)
    pairs = zip(tasks, each, strict=True)
    submissions = [submitter.submission(task, at_time=at_time, labels=own) for task, own in pairs]
    await submitter.broker.submit(submissions)
    return [submission.message.task_id for submission in submissions]


class PeriodicBaseTask(BaseTask):
    """A task without arguments that the scheduler submits by its schedule. Its default lock is a mutex."""

    default_schedule: ClassVar[TaskScheduleBase]
    _enabled: ClassVar[bool] = True
    """False: it is not scheduled."""
    missed: ClassVar[Literal["once", "skip"]] = "once"
    """Runs that were missed while no scheduler ran: one late run for all of them, or none."""

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, type(self).__name__)]


@_has_fields  # type checkers take it for a dataclass
class PeriodicVoAwareBaseTask(PeriodicBaseTask):
    """A periodic task with one schedule and one mutex per VO, which is its first argument."""

    vo: str

    def __init__(self, vo: str) -> None:
        self.vo = vo

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A frozen dataclass cannot be derived from another one: dataclasses and models get their field here.
        inherited = {*getattr(cls, "__dataclass_fields__", ()), *getattr(cls, "__pydantic_fields__", ())}
        if "vo" not in inherited and not annotates(cls, "vo"):
            cls.__annotations__ = {"vo": str, **cls.__annotations__}

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, type(self).__name__, self.vo)]
