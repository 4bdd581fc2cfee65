"""Public names for authors of tasks, imported at their first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .annotated import ChildResults as ChildResults
    from .base_task import BaseTask as BaseTask
    from .base_task import PeriodicBaseTask as PeriodicBaseTask
    from .base_task import PeriodicVoAwareBaseTask as PeriodicVoAwareBaseTask
    from .base_task import held_locks as held_locks
    from .base_task import schedule_many as schedule_many
    from .callbacks import fire_callback as fire_callback
    from .callbacks import spawn_with_callback as spawn_with_callback
    from .cancellation import TaskPlace as TaskPlace
    from .cancellation import cancel_task as cancel_task
    from .cancellation import cancel_tasks as cancel_tasks
    from .config import PeriodicTaskConfig as PeriodicTaskConfig
    from .config import TaskOverride as TaskOverride
    from .config import TasksConfig as TasksConfig
    from .depends import AvailableSecurityProperties as AvailableSecurityProperties
    from .depends import CallbackSpawner as CallbackSpawner
    from .depends import Config as Config
    from .depends import NoTransaction as NoTransaction
    from .depends import auto_inject as auto_inject
    from .depends import auto_inject_depends as auto_inject_depends
    from .enums import Priority as Priority
    from .enums import Size as Size
    from .exceptions import LockLostError as LockLostError
    from .exceptions import ResultIsMissingError as ResultIsMissingError
    from .exceptions import ResultTooLargeError as ResultTooLargeError
    from .exceptions import SendTaskError as SendTaskError
    from .exceptions import StopRetryingError as StopRetryingError
    from .exceptions import TaskArgumentsError as TaskArgumentsError
    from .exceptions import TaskCancelledError as TaskCancelledError
    from .exceptions import TaskConfigError as TaskConfigError
    from .exceptions import TaskRetryRequestedError as TaskRetryRequestedError
    from .exceptions import TaskTooLargeError as TaskTooLargeError
    from .exceptions import TimeLimitExceededError as TimeLimitExceededError
    from .exceptions import TooManyRetriesError as TooManyRetriesError
    from .exceptions import UnableToAcquireLockError as UnableToAcquireLockError
    from .exceptions import UnretryableError as UnretryableError
    from .exceptions import WorkerStoppedError as WorkerStoppedError
    from .injection.placeholders import find_missing_overrides as find_missing_overrides
    from .injection.providers import setup_dependency_overrides as setup_dependency_overrides
    from .lock_registry import LockedObjectType as LockedObjectType
    from .lock_registry import register_locked_object_type as register_locked_object_type
    from .lock_registry import validate_registry as validate_registry
    from .locks import BaseLimiter as BaseLimiter
    from .locks import BaseLock as BaseLock
    from .locks import ConcurrencyLimiter as ConcurrencyLimiter
    from .locks import ExclusiveRWLock as ExclusiveRWLock
    from .locks import MutexLock as MutexLock
    from .locks import RateLimiter as RateLimiter
    from .locks import SharedRWLock as SharedRWLock
    from .registry import load_task_registry as load_task_registry
    from .retry_policies import ExponentialBackoff as ExponentialBackoff
    from .retry_policies import NoRetry as NoRetry
    from .retry_policies import RetryPolicyBase as RetryPolicyBase
    from .schedules import CronSchedule as CronSchedule
    from .schedules import IntervalSeconds as IntervalSeconds
    from .schedules import RRuleSchedule as RRuleSchedule
    from .schedules import TaskScheduleBase as TaskScheduleBase
    from .standalone import task_wrapper as task_wrapper
    from .standalone import wrap_task as wrap_task
    from .submission.client import task_broker as task_broker

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
    "injection.placeholders": ("find_missing_overrides",),
    "injection.providers": ("setup_dependency_overrides",),
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

__all__ = [name for names in _MODULES.values() for name in names]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
