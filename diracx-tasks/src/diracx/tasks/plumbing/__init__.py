"""Public names for authors of tasks, imported at their first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .annotated import ChildResults
    from .base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask, held_locks, schedule_many
    from .callbacks import fire_callback, spawn_with_callback
    from .cancellation import TaskPlace, cancel_task, cancel_tasks
    from .config import PeriodicTaskConfig, TaskOverride, TasksConfig
    from .depends import (
        AvailableSecurityProperties,
        CallbackSpawner,
        Config,
        NoTransaction,
        auto_inject,
        auto_inject_depends,
    )
    from .enums import Priority, Size
    from .exceptions import (
        LockLostError,
        ResultIsMissingError,
        ResultTooLargeError,
        SendTaskError,
        StopRetryingError,
        TaskArgumentsError,
        TaskCancelledError,
        TaskConfigError,
        TaskRetryRequestedError,
        TaskTooLargeError,
        TimeLimitExceededError,
        TooManyRetriesError,
        UnableToAcquireLockError,
        UnretryableError,
        WorkerStoppedError,
    )
    from .injection.plan import find_missing_overrides, setup_dependency_overrides
    from .lock_registry import LockedObjectType, register_locked_object_type, validate_registry
    from .locks import (
        BaseLimiter,
        BaseLock,
        ConcurrencyLimiter,
        ExclusiveRWLock,
        MutexLock,
        RateLimiter,
        SharedRWLock,
    )
    from .registry import load_task_registry
    from .retry_policies import ExponentialBackoff, NoRetry, RetryPolicyBase
    from .schedules import CronSchedule, IntervalSeconds, RRuleSchedule, TaskScheduleBase
    from .standalone import task_wrapper, wrap_task
    from .submission.client import task_broker

_MODULES = {
    "annotated": ("ChildResults",),
    "base_task": ("BaseTask", "PeriodicBaseTask", "PeriodicVoAwareBaseTask", "held_locks", "schedule_many"),
    "submission.client": ("task_broker",),
    "callbacks": ("fire_callback", "spawn_with_callback"),
    "cancellation": ("TaskPlace", "cancel_task", "cancel_tasks"),
    "config": ("PeriodicTaskConfig", "TaskOverride", "TasksConfig"),
    "depends": (
        "AvailableSecurityProperties",
        "CallbackSpawner",
        "Config",
        "NoTransaction",
        "auto_inject",
        "auto_inject_depends",
    ),
    "enums": ("Priority", "Size"),
    "exceptions": (
        "LockLostError",
        "ResultIsMissingError",
        "SendTaskError",
        "StopRetryingError",
        "TaskArgumentsError",
        "TaskCancelledError",
        "TaskConfigError",
        "TaskRetryRequestedError",
        "ResultTooLargeError",
        "TaskTooLargeError",
        "TimeLimitExceededError",
        "TooManyRetriesError",
        "UnableToAcquireLockError",
        "UnretryableError",
        "WorkerStoppedError",
    ),
    "registry": ("load_task_registry",),
    "standalone": ("task_wrapper", "wrap_task"),
    "injection.plan": ("find_missing_overrides", "setup_dependency_overrides"),
    "lock_registry": ("LockedObjectType", "register_locked_object_type", "validate_registry"),
    "locks": (
        "BaseLimiter",
        "BaseLock",
        "ConcurrencyLimiter",
        "ExclusiveRWLock",
        "MutexLock",
        "RateLimiter",
        "SharedRWLock",
    ),
    "retry_policies": ("ExponentialBackoff", "NoRetry", "RetryPolicyBase"),
    "schedules": ("CronSchedule", "IntervalSeconds", "RRuleSchedule", "TaskScheduleBase"),
}
__getattr__ = lazy_names(__name__, {f".{module}": names for module, names in _MODULES.items()})

__all__ = [
    "AvailableSecurityProperties",
    "BaseLimiter",
    "BaseLock",
    "BaseTask",
    "CallbackSpawner",
    "ChildResults",
    "ConcurrencyLimiter",
    "Config",
    "CronSchedule",
    "ExclusiveRWLock",
    "ExponentialBackoff",
    "IntervalSeconds",
    "LockLostError",
    "LockedObjectType",
    "MutexLock",
    "NoRetry",
    "NoTransaction",
    "PeriodicBaseTask",
    "PeriodicTaskConfig",
    "PeriodicVoAwareBaseTask",
    "Priority",
    "RRuleSchedule",
    "RateLimiter",
    "ResultIsMissingError",
    "ResultTooLargeError",
    "RetryPolicyBase",
    "SendTaskError",
    "SharedRWLock",
    "Size",
    "StopRetryingError",
    "TaskArgumentsError",
    "TaskCancelledError",
    "TaskConfigError",
    "TaskOverride",
    "TaskPlace",
    "TaskRetryRequestedError",
    "TaskScheduleBase",
    "TaskTooLargeError",
    "TasksConfig",
    "TimeLimitExceededError",
    "TooManyRetriesError",
    "UnableToAcquireLockError",
    "UnretryableError",
    "WorkerStoppedError",
    "auto_inject",
    "auto_inject_depends",
    "cancel_task",
    "cancel_tasks",
    "find_missing_overrides",
    "fire_callback",
    "held_locks",
    "load_task_registry",
    "register_locked_object_type",
    "schedule_many",
    "setup_dependency_overrides",
    "spawn_with_callback",
    "task_broker",
    "task_wrapper",
    "validate_registry",
    "wrap_task",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
