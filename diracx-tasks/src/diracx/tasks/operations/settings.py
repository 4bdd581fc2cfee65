"""The value of every setting of every task that holds in the end, and where it was written."""

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
from ..plumbing.messages.arguments import knows_vo


def settings_records(
    config: TasksConfig, registry: Mapping[str, type[BaseTask]], names: Sequence[str], vo: str | None, limits: bool
) -> dict[str, Any]:
    """`tasks` and `limits` as `config show --json` has them.

    Args:
        names: of the tasks.
        vo: as they hold for this one; None: for everybody, and for each VO that has something of its own.
        limits: whether the limits of objects are wanted.
    """
    return {
        "tasks": [record for name in names for record in task_records(config, name, registry[name], vo)],
        "limits": limit_records(config, vo) if limits else [],
    }


def task_records(
    config: TasksConfig, name: str, task_class: type[BaseTask], vo: str | None
) -> Iterator[dict[str, Any]]:
    """The settings of a task as `config show --json` has them: for everybody and some VOs, or for one VO."""
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
    """The VOs for which something about the task may be different."""
    if not knows_vo(task_class):
        return []
    names = {name, name.rpartition(":")[2]}
    found = {vo for vo, tasks in config.vo_overrides.items() if not names.isdisjoint(tasks)}
    if task_class.execution_locks is BaseTask.execution_locks:
        found |= {vo for vo, limits in config.vo_limits.items() if "task" in limits}
    return sorted(found)


def limit_records(config: TasksConfig, vo: str | None) -> list[dict[str, Any]]:
    """The limits of objects as `config show --json` has them."""
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
