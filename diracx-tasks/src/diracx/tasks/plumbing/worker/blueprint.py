"""All that is known about a task class before a task of it arrives, found out once at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..arguments import rebuild
from ..base_task import BaseTask
from ..config import TaskOverride, TasksConfig
from ..injection import Plan, compile_plan
from ..lock_registry import TASK
from ..locks import BaseLock, ConcurrencyLimiter, RateLimiter
from ..retry_policies import ExponentialBackoff, RetryPolicyBase

if TYPE_CHECKING:
    from ..broker.models import TaskMessage

_Limiter = TypeVar("_Limiter", RateLimiter, ConcurrencyLimiter)


class Blueprint:
    """One task class: its dependency plan, and its settings with the operator's overrides."""

    def __init__(self, name: str, task_class: type[BaseTask], config: TasksConfig) -> None:
        self.name = name
        self.task_class = task_class
        self.plan: Plan = compile_plan(task_class.execute, skip_first=True)
        self._config = config
        self._names = {name, name.rpartition(":")[2]}  # the operator may leave the category out
        self._overrides: dict[str | None, TaskOverride] = {}
        self._vos = {vo for vo, tasks in config.vo_overrides.items() if not self._names.isdisjoint(tasks)}
        self._overridden = bool(self._vos) or not self._names.isdisjoint(config.common)
        self._declares_locks = task_class.execution_locks is not BaseTask.execution_locks

    def build(self, message: TaskMessage) -> BaseTask:
        """The task of a message."""
        return rebuild(self.task_class, message.task_args, message.task_kwargs)

    def override(self, task: BaseTask) -> TaskOverride:
        """What the operator says about this task, for its VO if it has one."""
        vo = _vo_of(task)
        if vo not in self._overrides:
            self._overrides[vo] = self._config.get_override(self.name, vo)
        return self._overrides[vo]

    def locks(self, task: BaseTask) -> list[BaseLock]:
        """The locks the task needs now: its own, with the operator's limits; disabled ones left out."""
        if not self._overridden:
            return [lock for lock in task.execution_locks if lock.enabled] if self._declares_locks else []
        override = self.override(task)
        locks = list(task.execution_locks)
        scope = self._scope(task)
        if override.rate_limit is not None:
            rate = _default_limiter(locks, RateLimiter, self.task_class, scope)
            rate.limit, rate.window_seconds = override.rate_limit, override.rate_window_seconds
        if override.concurrency_limit is not None:
            concurrency = _default_limiter(locks, ConcurrencyLimiter, self.task_class, scope)
            concurrency.limit = override.concurrency_limit
        return [lock for lock in locks if lock.enabled]

    def _scope(self, task: BaseTask) -> tuple[str, ...]:
        """A limit that is set for one VO counts that VO's tasks only."""
        vo = _vo_of(task)
        return (vo,) if vo in self._vos else ()

    def retry_policy(self, task: BaseTask) -> RetryPolicyBase:
        """The class's policy, with the operator's numbers."""
        policy = self.task_class.retry_policy
        if not self._overridden:
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
        """Seconds one execution may take, or None."""
        if self._overridden and (limit := self.override(task).time_limit_seconds) is not None:
            return limit
        return self.task_class.time_limit_seconds


def _vo_of(task: BaseTask) -> str | None:
    vo = getattr(task, "vo", None)
    return vo if isinstance(vo, str) else None


def _default_limiter(
    locks: list[BaseLock], kind: type[_Limiter], task_class: type[BaseTask], scope: tuple[str, ...]
) -> _Limiter:
    """The limiter that counts all tasks of the class (or those of one VO), added when it is not there."""
    wanted = kind(TASK, task_class.__name__, *scope)
    for lock in locks:
        if isinstance(lock, kind) and lock.redis_key == wanted.redis_key:
            return lock
    locks.append(wanted)
    return wanted


def blueprints(registry: Mapping[str, type[BaseTask]], config: TasksConfig) -> dict[str, Blueprint]:
    """The blueprints of all tasks.

    Raises:
        TypeError: when a parameter of an `execute` can never be injected; names task and parameter.
    """
    return {name: Blueprint(name, task_class, config) for name, task_class in registry.items()}
