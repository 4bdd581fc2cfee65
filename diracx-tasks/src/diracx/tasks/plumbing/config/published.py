"""Converts the YAML layout of the published documents and their design record to that of `TasksConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .merge import mapping

_SCHEDULES = {
    "CronSchedule": "schedule",
    "RRuleSchedule": "rrule",
    "IntervalSeconds": "interval_seconds",
    "IntervalSecondsSchedule": "interval_seconds",
}
_LIMITERS = ("ConcurrencyLimiter", "RateLimiter")


def from_published_layout(raw: Any) -> Any:
    """Convert `vo-overrides`, `periodic-tasks` and `limits` of sections; other entries are returned unchanged.

    In the design record, the `periodic-tasks` of a VO replace those of `common`.
    """
    if not isinstance(raw, Mapping):
        return raw
    found = {"vo_overrides" if key == "vo-overrides" else key: value for key, value in raw.items()}
    common, limits = found.get("common"), dict[str, Any]()
    if isinstance(common, Mapping):
        found["common"], limits = _section(common, {})
    if limits:
        found["limits"] = {**mapping(found.get("limits")), **limits}
    if isinstance(by_vo := found.get("vo_overrides"), Mapping):
        read = {
            vo: _section(each, mapping(found.get("common")))
            for vo, each in by_vo.items()
            if isinstance(each, Mapping)
        }
        found["vo_overrides"] = {**by_vo, **{vo: tasks for vo, (tasks, _) in read.items()}}
        if vo_limits := {vo: limits for vo, (_, limits) in read.items() if limits}:
            found["vo_limits"] = {**mapping(found.get("vo_limits")), **vo_limits}
    return found


def _section(section: Mapping[Any, Any], common: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return the tasks of a section, and the limits of its other objects."""
    if not any(isinstance(section.get(key), Mapping) for key in ("periodic-tasks", "limits")):
        return dict(section), {}
    tasks = {key: value for key, value in section.items() if key not in ("periodic-tasks", "limits")}
    for task, entries in mapping(section.get("periodic-tasks")).items():
        below = mapping(mapping(common.get(task)).get("instances"))
        tasks[task] = {**mapping(tasks.get(task)), **_periodic(entries, below)}
    limits: dict[str, Any] = {}
    for kind, names in mapping(section.get("limits")).items():
        if kind in _LIMITERS:  # the design record also nests kind and limiter the other way round
            for inner, numbers in mapping(names).items():
                for name, each in mapping(numbers).items():
                    _add_limit(tasks, limits, inner, name, {kind: each})
        else:
            for name, numbers in mapping(names).items():
                _add_limit(tasks, limits, kind, name, numbers)
    return tasks, limits


def _periodic(entries: Any, below: Mapping[Any, Any]) -> dict[str, Any]:
    """Convert a list of schedules to `instances` by name or position; a single one to that of the task."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        return {"instances": entries}
    known = ("name", "schedule", "args", "enabled")
    instances = {}
    for place, entry in enumerate(entries, start=1):
        schedule = entry.get("schedule")
        if isinstance(schedule, Mapping) and (way := _SCHEDULES.get(str(schedule.get("class")))):
            schedule = {way: schedule.get("arg")}
        elif schedule is not None:
            schedule = {"schedule": schedule}
        # In one example of the design record, the arguments are not below `args`.
        args = entry.get("args") or {key: value for key, value in entry.items() if key not in known}
        instance = {"enabled": entry.get("enabled", True), "periodic": schedule}
        if len(entries) == 1 and not args and "name" not in entry:
            return {**instance, "instances": {}}
        instances[str(entry.get("name", place))] = {**instance, "args": args}
    return {"instances": {**{name: {"enabled": False} for name in below}, **instances}}


def _add_limit(tasks: dict[Any, Any], limits: dict[str, Any], kind: Any, name: Any, numbers: Any) -> None:
    """Add limits to the task, or to the object type by key; `*:action` limits one action of each object."""
    if kind == "Task":
        tasks[name] = {**mapping(tasks.get(name)), **_numbers(numbers)}
        return
    of_kind = limits.setdefault(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(kind)).lower(), {})
    if not mapping(numbers).keys().isdisjoint(_LIMITERS):
        place, key = (of_kind, "default") if name == "default" else (of_kind.setdefault("keys", {}), str(name))
        place[key] = _numbers(numbers)
        return
    for action, each in mapping(numbers).items():
        key = f"{'*' if name == 'default' else name}:{action}"
        of_kind.setdefault("keys", {})[key] = _numbers(each)


def _numbers(limiters: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for limiter, numbers in mapping(limiters).items():
        rate = limiter == "RateLimiter" or "window_seconds" in mapping(numbers)
        names = {"limit": "rate_limit" if rate else "concurrency_limit", "window_seconds": "rate_window_seconds"}
        found |= {names.get(key, key): value for key, value in mapping(numbers).items()}
    return found
