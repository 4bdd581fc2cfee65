"""Resolved settings of tasks and objects, and where they are set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..base_task import BaseTask, PeriodicBaseTask
from ..lock_registry import TASK
from ..retry_policies import ExponentialBackoff, NoRetry
from ..schedules import TaskScheduleBase
from .schema import Setting, TaskOverride, TasksConfig

_LIMITS = ("rate_limit", "rate_window_seconds", "concurrency_limit")


def task_settings(
    config: TasksConfig, name: str, task_class: type[BaseTask], vo: str | None
) -> dict[str, Setting]:
    """Return the settings of a task by field; a path of None: set in the code.

    A value of None means no limit or schedule; for retries, that a custom policy decides. Only periodic tasks have
    `enabled`, `schedule` and `missed`, the latter two only without instances.
    """
    override = config.get_override(name, vo)
    found: dict[str, Setting] = {}
    if issubclass(task_class, PeriodicBaseTask):
        found = _shown(schedule_settings(config, name, task_class, vo))
        if override.instances:
            del found["schedule"], found["missed"]
    found |= _limits(config, name, task_class, vo, override)
    found |= _retries(config, name, task_class, vo, override)
    for field in ("time_limit_seconds", "priority"):
        path = config.path_of(name, vo, field)
        found[field] = Setting(getattr(task_class if path is None else override, field), path)
    return found


def instance_settings(
    config: TasksConfig, name: str, task_class: type[PeriodicBaseTask], vo: str | None
) -> dict[str, dict[str, Setting]]:
    """Return the settings of each instance that differ from `task_settings`."""
    override = config.get_override(name, vo)
    return {
        key: {
            **_shown(schedule_settings(config, name, task_class, vo, key)),
            "args": Setting(instance.args, config.path_of(name, vo, "args", key)),
        }
        for key, instance in override.instances.items()
    }


def object_settings(
    config: TasksConfig, vo: str | None = None
) -> Iterator[tuple[str, str | None, dict[str, Setting]]]:
    """Iterate over type, key (None: the default) and limits of each object; for a VO, those of its tasks."""
    sections = [config.limits, config.vo_limits.get(vo, {}) if vo is not None else {}]
    for obj in dict.fromkeys(obj for section in sections for obj in section):
        keys = dict.fromkeys(key for section in sections if obj in section for key in section[obj].keys)
        for key in (None, *keys):
            numbers = config.get_limits(obj, *(() if key is None else key.split(":")), vo=vo)
            if numbers:
                yield obj, key, {field: numbers[field] for field in _LIMITS if field in numbers}


def describe_schedule(schedule: TaskScheduleBase | None) -> str | None:
    """Describe a schedule in words."""
    return None if schedule is None else str(schedule)


class ScheduleSettings(NamedTuple):
    """Settings of the schedule of a periodic task or an instance."""

    enabled: Setting
    rule: Setting
    """A `TaskScheduleBase`; None: neither code nor configuration has one."""
    missed: Setting


def schedule_settings(
    config: TasksConfig,
    name: str,
    task_class: type[PeriodicBaseTask],
    vo: str | None,
    instance: str | None = None,
) -> ScheduleSettings:
    """Return the schedule of a periodic task, or of one of its instances, for a VO."""
    override = config.get_override(name, vo)
    own = override if instance is None else override.instances[instance]
    rule, missed = None, None
    switches = [(override.enabled, config.path_of(name, vo, "enabled"))]
    if instance is not None:
        switches.append((own.enabled, config.path_of(name, vo, "enabled", instance)))
    if own.periodic is not None:
        rule, missed = own.periodic.as_schedule(), own.periodic.missed
        switches.append((own.periodic.enabled, config.path_of(name, vo, "periodic.enabled", instance)))
    if not task_class._enabled:
        enabled = Setting(False, None)
    elif (off := next((path for on, path in switches if not on), None)) is not None:
        enabled = Setting(False, off)
    else:
        enabled = Setting(True, next((path for _, path in switches if path is not None), None))
    return ScheduleSettings(
        enabled,
        Setting(
            rule or getattr(task_class, "default_schedule", None), config.path_of(name, vo, "periodic", instance)
        ),
        Setting(missed or task_class.missed, config.path_of(name, vo, "periodic.missed", instance)),
    )


def _shown(found: ScheduleSettings) -> dict[str, Setting]:
    rule = Setting(describe_schedule(found.rule.value), found.rule.path)
    return {"enabled": found.enabled, "schedule": rule, "missed": found.missed}


def _limits(
    config: TasksConfig, name: str, task_class: type[BaseTask], vo: str | None, override: TaskOverride
) -> dict[str, Setting]:
    """Return the limits of all tasks of the class; limits of other objects depend on the task."""
    of_object: dict[str, Setting] = {}
    if task_class.execution_locks is BaseTask.execution_locks:
        of_object = config.get_limits(TASK, task_class.__name__, vo=vo)
    found = {}
    for field in _LIMITS:
        if field in override.model_fields_set:
            found[field] = Setting(getattr(override, field), config.path_of(name, vo, field))
        else:
            found[field] = of_object.get(field, Setting(None, None))
    if found["rate_limit"].value is None:
        found["rate_window_seconds"] = Setting(None, found["rate_limit"].path)
    return found


def _retries(
    config: TasksConfig, name: str, task_class: type[BaseTask], vo: str | None, override: TaskOverride
) -> dict[str, Setting]:
    policy = task_class.retry_policy
    in_code: tuple[int | None, float | None] = (None, None)
    if isinstance(policy, ExponentialBackoff):
        in_code = policy.max_retries, policy.base_delay_seconds
    elif override.max_retries is not None:
        in_code = None, ExponentialBackoff().base_delay_seconds
    elif isinstance(policy, NoRetry):
        in_code = 0, None
    found = {}
    for field, value in zip(("max_retries", "retry_base_delay_seconds"), in_code, strict=True):
        configured: Any = getattr(override, field)
        path = None if configured is None else config.path_of(name, vo, field)
        found[field] = Setting(value if configured is None else configured, path)
    return found
