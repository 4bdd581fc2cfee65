"""Base classes of tasks, and the context in which they run: the task, its locks, and the broker that is bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .enums import Priority, Size
from .lock_registry import TASK
from .locks import BaseLock, ConcurrencyLimiter, MutexLock, RateLimiter
from .messages.arguments import serialize
from .retry_policies import NoRetry, RetryPolicyBase

if TYPE_CHECKING:
    from .broker.models import Submission, TaskMessage
    from .broker.redis_streams import RedisStreamBroker
    from .schedules import TaskScheduleBase

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
        task: BaseTask,
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


class BaseTask:
    """A unit of background work. Its fields are its arguments; `execute` does it.

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
    """True if the task is kept in the dead-letter queue when it finally failed."""
    time_limit_seconds: ClassVar[float | None] = None
    """An execution that takes longer is cancelled and counts as failed. None: no limit."""
    at_most_once: ClassVar[bool] = False
    """True if it must not begin twice: it has no retries, and fails if its lease, a lock or its worker is lost."""
    secret_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields whose values are shown to nobody: command line, dashboard and failures have `•••` in their place."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        secret: Any = cls.secret_fields
        if not isinstance(secret, list | tuple | set | frozenset) or not all(isinstance(n, str) for n in secret):
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__}: secret_fields is {secret!r}, and no set of names; write "
                'frozenset({"password"})'
            )
        type.__setattr__(cls, "secret_fields", frozenset(secret))
        # A pydantic task takes its fields by keyword even where a base of ours brings an __init__.
        for base in cls.__mro__:
            if "__pydantic_base_init__" in dir(vars(base).get("__init__")) and "__init__" not in vars(cls):
                type.__setattr__(cls, "__init__", vars(base)["__init__"])
                break

    @classmethod
    def bind_broker(cls, task_bindings: Mapping[type[BaseTask], Any]) -> None:
        """Bind what `create_task_bindings` returns to this context; `task_broker` does it for a block.

        Raises:
            RuntimeError: when a broker is bound here.
            TypeError: when it was made in another way.
        """
        if is_bound():
            raise RuntimeError("Tasks are already bound to a broker in this context")
        source: SubmitterSource | None = getattr(task_bindings, "source", None)
        if source is None:
            raise TypeError("bind_broker takes what create_task_bindings returns; in tests use TaskSystem")
        _bound.set(lambda: source)

    @property
    def execution_locks(self) -> list[BaseLock]:
        """Return the locks of one execution: all or none are taken, and released after its transaction.

        By default a rate and a concurrency limiter without limits, which configuration can set.
        """
        name = type(self).__name__
        return [RateLimiter(TASK, name), ConcurrencyLimiter(TASK, name)]

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work. Parameters are injected by their type when the task runs."""
        raise NotImplementedError(f"{type(self).__name__} does not define execute()")

    def serialize(self) -> tuple[Any, ...]:
        """Return the arguments in the order of the fields; the class is rebuilt from them."""
        return serialize(self)

    async def schedule(self, at_time: datetime | None = None, labels: Mapping[str, Any] | None = None) -> str:
        """Submit the task to the queue of its class's priority and size.

        Args:
            at_time: not before this moment; a naive datetime is taken as UTC.
            labels: kept with the message. `result_ttl_seconds` asks for the result to be stored.

        Returns:
            The task's id.

        Raises:
            RuntimeError: when no broker is bound here; the message says how to bind one.
            SendTaskError: when the broker cannot be reached.
            TypeError: when an argument would not arrive equal and of the same type; names it.
            TaskTooLargeError: when its message is too large; a SendTaskError.
            ValueError: when its locks could never be granted or are too many, or a label means nothing.
        """
        return (await schedule_many([self], at_time=at_time, labels=labels))[0]


async def schedule_many(
    tasks: Sequence[BaseTask],
    *,
    at_time: datetime | None = None,
    labels: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """Submit many tasks, 500 in a round trip. Arguments, returns and errors as in `BaseTask.schedule`.

    `labels` are for all, or a list of those of each.
    """
    submitter = await current_submitter()
    each = labels if isinstance(labels, Sequence) else [labels] * len(tasks)
    pairs = zip(tasks, each, strict=True)
    submissions = [submitter.submission(task, at_time=at_time, labels=own) for task, own in pairs]
    await submitter.broker.submit(submissions)
    return [submission.message.task_id for submission in submissions]


class PeriodicBaseTask(BaseTask):
    """A task that the scheduler submits by its schedule. It takes no arguments of its own.

    Its default lock is a mutex: never two executions at a time.
    """

    default_schedule: ClassVar[TaskScheduleBase]
    _enabled: ClassVar[bool] = True
    """True if it is scheduled at all, unless configuration says otherwise."""
    missed: ClassVar[Literal["once", "skip"]] = "once"
    """Handling of runs that were missed while no scheduler ran: one late run for all of them, or none."""

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, type(self).__name__)]


@dataclass
class PeriodicVoAwareBaseTask(PeriodicBaseTask):
    """A periodic task of which there is one instance for each VO, with a mutex of its own."""

    vo: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, type(self).__name__, self.vo)]
