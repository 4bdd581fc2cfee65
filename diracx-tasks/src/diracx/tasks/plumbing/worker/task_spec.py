"""Specification of a task class, compiled once at start-up."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from ..base_task import BaseTask
from ..config import TaskOverride, TasksConfig
from ..injection.placeholders import innermost, is_async
from ..injection.plan import Plan, compile_plan
from ..lock_registry import TASK
from ..locks import BaseLimiter, BaseLock, ConcurrencyLimiter, RateLimiter, needed
from ..retry_policies import ExponentialBackoff, RetryPolicyBase
from ..task_vo import own_vo


class ResolvedOverride(NamedTuple):
    """Override by the operator for the tasks of one VO."""

    override: TaskOverride
    own_rate: bool
    """The rate limit is the VO's own: it counts that VO's tasks only."""
    own_concurrency: bool
    """The same for the concurrency limit."""


class TaskSpec:
    """One task class: its dependency plan, and its settings with the operator's overrides."""

    def __init__(
        self, name: str, task_class: type[BaseTask], config: TasksConfig, known: TaskSpec | None = None
    ) -> None:
        self.name = name
        self.task_class = task_class
        check_execute(task_class)
        if known is not None and "plan" in vars(known):
            self.plan = known.plan
        self._config = config
        names = {name, name.rpartition(":")[2]}  # the configuration may leave the category out
        self._overrides: dict[str | None, ResolvedOverride] = {}
        #: The configuration overrides settings of the class.
        self.overridden = any(
            not names.isdisjoint(tasks) for tasks in (config.common, *config.vo_overrides.values())
        )
        self._declares_locks = task_class.execution_locks is not BaseTask.execution_locks
        limited = set(config.limits).union(*config.vo_limits.values())
        self._limited = bool(limited) if self._declares_locks else TASK in limited
        self.may_have_locks = self._declares_locks or self.overridden or self._limited

    @cached_property
    def plan(self) -> Plan:
        """Injection plan of `execute`, compiled at first use.

        Raises:
            TypeError: when a parameter can never be injected; names task and parameter.
            NameError: when an annotation cannot be resolved.
        """
        return compile_plan(self.task_class.execute, skip_first=True)

    def override(self, task: BaseTask) -> TaskOverride:
        """The operator's override for this task, and for its VO if it has one."""
        return self._resolved(own_vo(task)).override

    def _resolved(self, vo: str | None) -> ResolvedOverride:
        if vo not in self._overrides:
            rate, window, concurrency = (
                vo is not None and self._config.source_of(self.name, vo, field) == f"vo {vo}"
                for field in ("rate_limit", "rate_window_seconds", "concurrency_limit")
            )
            override = self._config.get_override(self.name, vo)
            self._overrides[vo] = ResolvedOverride(override, rate or window, concurrency)
        return self._overrides[vo]

    def locks(self, task: BaseTask) -> list[BaseLock]:
        """Locks that the task needs, with the operator's limits and without disabled ones."""
        if not (self.overridden or self._limited):
            return needed(task.execution_locks)
        locks = list(task.execution_locks)
        vo = own_vo(task)
        override = self._resolved(vo).override
        if self._limited:
            locks = [self._limit(lock, vo, override) if isinstance(lock, BaseLimiter) else lock for lock in locks]
        if override.rate_limit is not None or override.concurrency_limit is not None:
            self._override_limits(locks, vo)
        return needed(locks)

    def _limit(self, limiter: BaseLimiter, vo: str | None, override: TaskOverride) -> BaseLimiter:
        """The limiter with the limits configured for its object, unless the task's override sets its own."""
        kind, fields = _fields_of(limiter)
        if kind is None or (fields[0] in override.model_fields_set and self._is_default(limiter, kind)):
            return limiter
        found = self._config.get_limits(limiter.obj, str(limiter.key), *map(str, limiter.extra_keys), vo=vo)
        settings = [found[field] for field in fields if field in found]
        if len(settings) < len(fields):
            return limiter
        own = any(setting.path is not None and setting.path[0] == "vo_limits" for setting in settings)
        return _limited(limiter, [setting.value for setting in settings], vo if own else None)

    def _override_limits(self, locks: list[BaseLock], vo: str | None) -> None:
        """Set the limits of the task's override on its default limiters; add missing ones."""
        override, own_rate, own_concurrency = self._resolved(vo)
        for kind, numbers, own in (
            (RateLimiter, [override.rate_limit, override.rate_window_seconds], own_rate),
            (ConcurrencyLimiter, [override.concurrency_limit], own_concurrency),
        ):
            if numbers[0] is None:
                continue
            indexes = [index for index, lock in enumerate(locks) if self._is_default(lock, kind)]
            if not indexes:
                indexes = [len(locks)]
                locks.append(kind(TASK, self.task_class.__name__))
            for index in indexes:
                default = locks[index]
                assert isinstance(default, BaseLimiter)
                locks[index] = _limited(default, numbers, vo if own else None)

    def _is_default(self, lock: BaseLock, kind: type[RateLimiter] | type[ConcurrencyLimiter]) -> bool:
        """True if it is the limiter that counts all tasks of the class."""
        return isinstance(lock, kind) and lock.redis_key == kind(TASK, self.task_class.__name__).redis_key

    def retry_policy(self, task: BaseTask) -> RetryPolicyBase:
        """Retry policy of the class, with the operator's overrides."""
        policy = self.task_class.retry_policy
        if not self.overridden:
            return policy
        override = self.override(task)
        numbers: dict[str, Any] = {}
        if override.max_retries is not None:
            numbers["max_retries"] = override.max_retries
        if override.retry_base_delay_seconds is not None:
            numbers["base_delay_seconds"] = override.retry_base_delay_seconds
        if not numbers:
            return policy
        if isinstance(policy, ExponentialBackoff):
            return policy.model_copy(update=numbers)
        return ExponentialBackoff(**numbers) if override.max_retries is not None else policy

    def time_limit(self, task: BaseTask) -> float | None:
        """Time limit of one execution (s), or None."""
        if self.overridden and (limit := self.override(task).time_limit_seconds) is not None:
            return limit
        return self.task_class.time_limit_seconds


def check_execute(task_class: type[BaseTask]) -> None:
    """Check that the worker can await `execute` and cancel it.

    Raises:
        TypeError: when it is anything but a method defined by `async def`; names the class, and file and line.
    """
    found = inspect.getattr_static(task_class, "execute")
    if inspect.isfunction(found) and is_async(found):
        return
    inner = innermost(found) if inspect.isfunction(found) else found
    kind = next((text for is_a, text in _NOT_AWAITABLE if is_a(inner)), f"of type {type(found).__name__}")
    position = _position(task_class, found)
    raise TypeError(
        f"{task_class.__module__}.{task_class.__qualname__}: `execute` is {kind} ({position}); "
        "write it as `async def execute(self, …)` that returns its value"
    )


_NOT_AWAITABLE: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (inspect.isasyncgenfunction, "an async generator"),
    (inspect.isgeneratorfunction, "a generator"),
    (inspect.isfunction, "not async"),
)


def _position(task_class: type[BaseTask], found: Any) -> str:
    """File and line of an attribute of a class, or of the class where the attribute has none."""
    inner = getattr(found, "fget", None) or getattr(found, "__func__", None) or found
    code = getattr(inspect.unwrap(inner) if callable(inner) else None, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    try:
        return f"{inspect.getsourcefile(task_class)}:{inspect.getsourcelines(task_class)[1]}"
    except (OSError, TypeError):
        return "its source is not available"


def _fields_of(
    limiter: BaseLimiter,
) -> tuple[type[RateLimiter] | type[ConcurrencyLimiter] | None, tuple[str, ...]]:
    """Kind of a limiter, and the names of the settings that define its limit."""
    if isinstance(limiter, RateLimiter):
        return RateLimiter, ("rate_limit", "rate_window_seconds")
    if isinstance(limiter, ConcurrencyLimiter):
        return ConcurrencyLimiter, ("concurrency_limit",)
    return None, ()


def _limited(limiter: BaseLimiter, numbers: list[Any], vo: str | None) -> BaseLimiter:
    """Copy of the limiter with these numbers; with `vo`, it counts that VO's tasks only."""
    limiter = copy.copy(limiter)  # a class may share its limiters between tasks
    if isinstance(limiter, RateLimiter):
        limiter.limit, limiter.window_seconds = numbers
    elif isinstance(limiter, ConcurrencyLimiter):
        [limiter.limit] = numbers
    if vo is not None:
        limiter.extra_keys = (*limiter.extra_keys, vo)
    return limiter


def task_specs(
    registry: Mapping[str, type[BaseTask]],
    config: TasksConfig,
    known: Mapping[str, TaskSpec] | None = None,
) -> dict[str, TaskSpec]:
    """Specs of all tasks, by registry name.

    Args:
        known: specs for an earlier configuration; parts that do not depend on it are reused.
    """
    known = known or {}
    return {name: TaskSpec(name, task_class, config, known.get(name)) for name, task_class in registry.items()}
