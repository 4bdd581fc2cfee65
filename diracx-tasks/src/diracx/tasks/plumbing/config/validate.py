"""Checks a configuration against an installation: unknown names, settings without effect."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from ..base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask
from ..exceptions import TaskConfigError
from ..lock_registry import TASK, locked_object_types
from ..messages.arguments import may_have_vo
from ..messages.typed_arguments import argument_problems
from ..retry_policies import ExponentialBackoff
from .loading import parsed, read_raw_config
from .merge import KINDS, Layer, Path, mapping, merge, section_at, sections, task_layers, with_instances
from .schema import TasksConfig
from .source import Problem, Source, nearest

Registry = Mapping[str, type[BaseTask]]

_OF_PERIODIC_TASKS = ("enabled", "periodic", "instances")


def unknown_names(config: TasksConfig, registry_names: Collection[str], vos: Collection[str] | None) -> list[str]:
    """List unknown names, which may be known on hosts with other extensions."""
    return config.source.report(_unknown(config.configured, registry_names, vos))


def check_config(
    registry: Registry, vos: Collection[str] | None, *, path: FilePath | None = None, config: object | None = None
) -> tuple[TasksConfig | None, list[Problem], Source]:
    """Read a configuration and find all its problems, of its form and in this installation.

    Args:
        vos: the existing VOs; None if unknown.
        path: path of a YAML file; else as `load_tasks_config`.

    Returns:
        The configuration (None if malformed), its problems, and its source.

    Raises:
        TaskConfigError: it cannot be read.
    """
    raw, source = read_raw_config(path, config)
    found, wrong = parsed(raw, source)
    return found, [*wrong, *_unknown(raw, registry, vos), *_misused(raw, registry)], source


def checked_tasks_config(
    registry: Registry, vos: Collection[str] | None, *, path: FilePath | None = None, config: object | None = None
) -> tuple[TasksConfig, list[str]]:
    """Read and check a configuration. Arguments as `check_config`.

    Returns:
        The configuration, and a warning for each unknown name: another host with other extensions may define it,
        and a VO may have been added or removed.

    Raises:
        TaskConfigError: has one line for each other problem, followed by the warnings.
    """
    found, wrong, source = check_config(registry, vos, path=path, config=config)
    fatal = [problem for problem in wrong if not problem.maybe_elsewhere]
    if found is None or fatal:
        raise TaskConfigError("\n".join(source.report(wrong)))
    return found, source.report(wrong)


# Both checks work on a configuration that need not be well formed, and skip malformed parts.


def _unknown(raw: Any, names: Collection[str], vos: Collection[str] | None) -> Iterator[Problem]:
    """Find unknown tasks, VOs and object types."""
    class_names = {name.rpartition(":")[2] for name in names}
    known = locked_object_types()
    for place, _, section in sections(raw, "common", "vo_overrides"):
        for name in _texts(section):
            if name not in names and name not in class_names:
                message = f"unknown task{nearest(name, names if ':' in name else class_names)}"
                yield Problem((*place, name), message, maybe_elsewhere=True)
    for place, _, section in sections(raw, "limits", "vo_limits"):
        for obj in _texts(section):
            if obj not in known:
                message = f"unknown object type{nearest(obj, known)}"
                yield Problem((*place, obj), message, maybe_elsewhere=True)
    if vos is not None:
        for top in ("vo_overrides", "vo_limits"):
            for vo in _texts(section_at(raw, (top,))):
                if vo not in vos:
                    yield Problem((top, vo), f"unknown VO{nearest(vo, vos)}", maybe_elsewhere=True)


def _texts(section: Iterable[Any]) -> Iterator[str]:
    """Return the keys that are text; others are malformed."""
    return (key for key in section if isinstance(key, str))


def _misused(raw: Any, registry: Registry) -> Iterator[Problem]:
    """Find settings without effect, and invalid arguments."""
    for place, _, section in sections(raw, "common", "vo_overrides"):
        for name, entry in section.items():
            yield from _of_task(raw, (*place, str(name)), mapping(entry), registry)
    for place, _, section in sections(raw, "limits", "vo_limits"):
        for key in mapping(mapping(section.get(TASK)).get("keys")):
            if key in registry:
                message = f"has no effect: keys of tasks are class names; write {_class_name(key)!r}"
                yield Problem((*place, TASK, "keys", key), message)


def _class_name(name: str) -> str:
    return name.rpartition(":")[2]


def _of_task(raw: Any, place: Path, entry: Layer, registry: Registry) -> Iterator[Problem]:
    """Find problems of an entry, which is for several tasks if it is a class name."""
    name, vo = place[-1], place[1] if place[0] == "vo_overrides" else None
    found = {known: cls for known, cls in registry.items() if name in (known, _class_name(known))}
    if not found:
        return
    if vo is not None and not any(map(may_have_vo, found.values())):
        yield Problem(place, "has no effect: the task belongs to no VO; put it below `common`")
    if not any(issubclass(cls, PeriodicBaseTask) for cls in found.values()):
        for field in _OF_PERIODIC_TASKS:
            if field in entry and entry[field] is not True:
                # In the published documents, `enabled` is allowed in any task.
                message, tolerated = "has no effect: the task is not periodic", field == "enabled"
                yield Problem((*place, field), message, maybe_elsewhere=tolerated)
    for known, cls in found.items():
        layers = list(task_layers(raw, known, vo))
        merged = with_instances(merge(layer for _, layer in layers))
        yield from _of_retries(place, entry, merged, cls)
        if issubclass(cls, PeriodicBaseTask):
            yield from _of_timezone((*place, "periodic"), entry.get("periodic"), merged.get("periodic"))
            below = {str(key) for at, layer in layers if at != place for key in mapping(layer.get("instances"))}
            yield from _of_instances(place, entry, merged, cls, below)


def _of_retries(place: Path, entry: Layer, merged: Layer, cls: type[BaseTask]) -> Iterator[Problem]:
    if entry.get("retry_base_delay_seconds") is None:
        return
    at = (*place, "retry_base_delay_seconds")
    if merged.get("max_retries") == 0:
        yield Problem(at, "has no effect: max_retries is 0")
    elif merged.get("max_retries") is None and not isinstance(cls.retry_policy, ExponentialBackoff):
        policy = type(cls.retry_policy).__name__
        yield Problem(at, f"has no effect: the task's policy is {policy}; set max_retries, too, for a backoff")


def _of_timezone(place: Path, own: Any, merged: Any) -> Iterator[Problem]:
    if mapping(own).get("timezone") is not None and all(mapping(merged).get(kind) is None for kind in KINDS):
        yield Problem((*place, "timezone"), "has no effect without `schedule` or `rrule`")


def _of_instances(
    place: Path, entry: Layer, merged: Layer, cls: type[PeriodicBaseTask], below: Collection[str]
) -> Iterator[Problem]:
    for name, own in mapping(entry.get("instances")).items():
        at = (*place, "instances", str(name))
        instance = mapping(mapping(merged.get("instances")).get(name))
        periodic = mapping(instance.get("periodic"))
        yield from _of_timezone((*at, "periodic"), mapping(own).get("periodic"), periodic)
        if all(periodic.get(kind) is None for kind in KINDS) and getattr(cls, "default_schedule", None) is None:
            yield Problem(at, "has no schedule, neither here nor in the code; set one below `periodic`")
        args = instance.get("args") or {}
        if not isinstance(args, Mapping) or ("args" not in mapping(own) and str(name) in below):
            continue  # reported elsewhere
        given = {key: value for key, value in args.items() if key != "vo"}  # `vo` is reported elsewhere
        if issubclass(cls, PeriodicVoAwareBaseTask):
            given["vo"] = "vo"
        for argument, message in argument_problems(cls, {str(key): value for key, value in given.items()}):
            inside = ("args", argument) if argument is not None else ("args",) if "args" in mapping(own) else ()
            yield Problem((*at, *inside), f"{cls.__name__}: {message}")
