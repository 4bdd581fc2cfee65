"""Read models of the resolved settings of tasks, as `config show --json` prints them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..plumbing.base_task import BaseTask, PeriodicBaseTask
from ..plumbing.config import (
    Setting,
    Source,
    TasksConfig,
    instance_settings,
    object_settings,
    owner,
    task_settings,
)
from ..plumbing.messages.arguments import may_have_vo


def settings_records(
    config: TasksConfig, registry: Mapping[str, type[BaseTask]], names: Sequence[str], vo: str | None, limits: bool
) -> dict[str, Any]:
    """Return `tasks` and `limits` of `config show --json`.

    Args:
        names: names of the tasks.
        vo: values for this VO; None: the general values, and those of each VO with its own settings.
        limits: include the limits of objects.
    """
    return {
        "tasks": [record for name in names for record in task_records(config, name, registry[name], vo)],
        "limits": limit_records(config, vo) if limits else [],
    }


def task_records(
    config: TasksConfig, name: str, task_class: type[BaseTask], vo: str | None
) -> Iterator[dict[str, Any]]:
    """Iterate over the settings of a task as in `config show --json`: general and by VO, or of one VO."""
    for for_vo in [vo] if vo is not None else [None, *_vos_of(config, name, task_class)]:
        instances: dict[str, Any] = {}
        if issubclass(task_class, PeriodicBaseTask):
            found = instance_settings(config, name, task_class, for_vo)
            instances = {key: _records(settings, config.source) for key, settings in found.items()}
        yield {
            "task": name,
            "vo": for_vo,
            "settings": _records(task_settings(config, name, task_class, for_vo), config.source),
            "instances": instances,
        }


def _vos_of(config: TasksConfig, name: str, task_class: type[BaseTask]) -> list[str]:
    """Return the VOs that may have their own settings of the task."""
    if not may_have_vo(task_class):
        return []
    names = {name, name.rpartition(":")[2]}
    found = {vo for vo, tasks in config.vo_overrides.items() if not names.isdisjoint(tasks)}
    if task_class.execution_locks is BaseTask.execution_locks:
        found |= {vo for vo, limits in config.vo_limits.items() if "task" in limits}
    return sorted(found)


def limit_records(config: TasksConfig, vo: str | None) -> list[dict[str, Any]]:
    """Return the limits of objects as in `config show --json`."""
    return [
        {"object": obj, "key": key, "vo": for_vo, "settings": _records(settings, config.source)}
        for for_vo in ([vo] if vo is not None else [None, *sorted(config.vo_limits)])
        for obj, key, settings in object_settings(config, for_vo)
    ]


def _records(settings: Mapping[str, Setting], source: Source) -> dict[str, Any]:
    return {
        name: {
            "value": setting.value,
            "from": owner(setting.path),
            "path": None if setting.path is None else ".".join(setting.path),
            "line": None if setting.path is None else source.line(setting.path),
        }
        for name, setting in settings.items()
    }
