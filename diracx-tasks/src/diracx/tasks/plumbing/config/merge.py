"""Merging of the layers of a configuration, field by field.

Everything here works on plain mappings that need not be valid, so that what is wrong with the layers together
is reported beside what is wrong with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..schedules import CronSchedule, RRuleSchedule

#: Where something is written: the keys from the top of the file on.
Path = tuple[str, ...]
Layer = Mapping[str, Any]

#: The window of a rate limit for which none is written.
RATE_WINDOW_SECONDS = 60.0
#: The three ways to say when; at most one of them.
KINDS = ("schedule", "interval_seconds", "rrule")


def mapping(value: Any) -> Mapping[Any, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def task_keys(task_name: str) -> tuple[str, ...]:
    """The names under which a task may be configured, the most particular last."""
    _, colon, class_name = task_name.rpartition(":")
    return (class_name, task_name) if colon else (task_name,)


def limit_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """The names under which a limiter may be configured, the most particular last; `*`: any first key."""
    names = tuple(keys)
    return names if len(names) < 2 else (":".join(["*", *names[1:]]), names[0], ":".join(names))


def merge(layers: Iterable[Layer]) -> dict[str, Any]:
    """Lay the fields that were set over each other, the last on top.

    `periodic` and each of the `instances` are laid over in the same manner. Empty `instances` take away those
    below; `args` are one value.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        below = merged
        merged = {**below, **layer}
        if isinstance(below.get("periodic"), Mapping) and isinstance(layer.get("periodic"), Mapping):
            merged["periodic"] = merge_schedule(below["periodic"], layer["periodic"])
        instances = layer.get("instances")
        if isinstance(below.get("instances"), Mapping) and isinstance(instances, Mapping) and instances:
            merged["instances"] = {
                **below["instances"],
                **{
                    name: merge([mapping(below["instances"].get(name)), mapping(instances[name])])
                    for name in instances
                },
            }
    return merged


def merge_schedule(below: Layer, above: Layer) -> dict[str, Any]:
    """Another way of saying when replaces the whole of the one below."""
    if any(above.get(kind) is not None for kind in KINDS):
        below = {name: value for name, value in below.items() if name not in (*KINDS, "timezone")}
    return {**below, **above}


def with_window(merged: dict[str, Any]) -> dict[str, Any]:
    """The fields, with the window that a rate limit has where none is written."""
    if merged.get("rate_limit") is not None and merged.get("rate_window_seconds") is None:
        return {**merged, "rate_window_seconds": RATE_WINDOW_SECONDS}
    return merged


def with_instances(merged: Layer) -> dict[str, Any]:
    """The fields of a task, `periodic` of each instance laid over that of the task."""
    instances = merged.get("instances")
    if not isinstance(instances, Mapping) or not instances:
        return dict(merged)
    common = merged.get("periodic")
    resolved = {}
    for name, instance in instances.items():
        own = mapping(instance).get("periodic")
        periodic = merge_schedule(mapping(common), mapping(own)) if common or own else own
        resolved[name] = {**mapping(instance), "periodic": periodic}
    return {**merged, "instances": resolved}


def task_layers(raw: Any, task_name: str, vo: str | None) -> Iterator[tuple[Path, Layer]]:
    """Layers of the settings of a task, each with its path: for everybody, then for the VO; class name first."""
    sections: list[Path] = [("common",)]
    if vo is not None:
        sections.append(("vo_overrides", vo))
    for place in sections:
        section = section_at(raw, place)
        for key in task_keys(task_name):
            if key in section:
                yield (*place, key), mapping(section[key])


def limit_layers(raw: Any, obj: str, keys: Iterable[str], vo: str | None) -> Iterator[tuple[Path, Layer]]:
    """Layers of the settings of the limiters of an object, each with its path; the default first."""
    sections: list[Path] = [("limits", obj)]
    if vo is not None:
        sections.append(("vo_limits", vo, obj))
    names = limit_keys(keys)
    for place in sections:
        section = section_at(raw, place)
        if "default" in section:
            yield (*place, "default"), mapping(section["default"])
        by_key = mapping(section.get("keys"))
        for key in names:
            # Of a number, YAML makes no text.
            found = int(key) if key not in by_key and key.isdecimal() else key
            if found in by_key:
                yield (*place, "keys", key), mapping(by_key[found])


def section_at(raw: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping at that place, an empty one if there is none."""
    section = mapping(raw)
    for part in path:
        section = mapping(section.get(part))
    return section


def provenance(layer: Layer, place: Path) -> dict[str, Any]:
    """The layer with, in place of each value, where it was written. What is null is as in the code: it stays."""
    return {name: _mark(value, (*place, name), name) for name, value in layer.items()}


def _mark(value: Any, place: Path, name: str) -> Any:
    if name == "instances" and isinstance(value, Mapping):
        return {key: provenance(mapping(instance), (*place, str(key))) for key, instance in value.items()}
    if name == "periodic" and isinstance(value, Mapping):
        return provenance(value, place)
    return None if value is None else place


def merge_problems(raw: Any) -> Iterator[tuple[Path, str]]:
    """Problems of the merged layers: a window without a rate limit, and schedules that clash."""
    for place, merged in _merged_tasks(raw):
        yield from _only_window(place, merged)
        yield from _clashes((*place, "periodic"), merged.get("periodic"))
        instances = mapping(with_instances(merged).get("instances"))
        own = mapping(section_at(raw, place).get("instances"))
        for name, instance in instances.items():
            its_own = mapping(mapping(own.get(name)).get("periodic"))
            if not _clashes_anywhere(merged) or not its_own.keys().isdisjoint((*KINDS, "timezone")):
                yield from _clashes(
                    (*place, "instances", str(name), "periodic"), mapping(instance).get("periodic")
                )
    for place, merged in _merged_limits(raw):
        yield from _only_window(place, merged)


def _only_window(place: Path, merged: Layer) -> Iterator[tuple[Path, str]]:
    # An explicit null switches an inherited limit off and may leave its window behind.
    if merged.get("rate_window_seconds") is not None and "rate_limit" not in merged:
        yield (*place, "rate_window_seconds"), "needs rate_limit beside it"


class TimezoneClashError(ValueError):
    """A time zone beside something that cannot have one."""


def timezone_clash(periodic: Layer) -> str | None:
    """Conflict of the time zone with what is beside it; None where there is none, or one is bad by itself."""
    timezone, rule = periodic.get("timezone"), periodic.get("rrule")
    if timezone is None:
        return None
    if periodic.get("interval_seconds") is not None:
        return "goes with schedule or rrule, not with interval_seconds"
    if not (isinstance(rule, str) and isinstance(timezone, str)):
        return None
    try:
        RRuleSchedule(rule)
        CronSchedule("0 0 * * *", timezone=timezone)
    except ValueError:
        return None
    try:
        RRuleSchedule(rule, timezone=timezone)
    except ValueError as error:
        return f"does not go with the rrule: {error}"
    return None


def _clashes(place: Path, periodic: Any) -> Iterator[tuple[Path, str]]:
    if clash := timezone_clash(mapping(periodic)):
        yield (*place, "timezone"), clash


def _clashes_anywhere(merged: Layer) -> bool:
    return any(True for _ in _clashes((), merged.get("periodic")))


def _merged_tasks(raw: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each task's place and fields: those in `common`, and each VO's laid over them."""
    for name in section_at(raw, ("common",)):
        yield ("common", str(name)), merge(layer for _, layer in task_layers(raw, str(name), None))
    for vo, section in section_at(raw, ("vo_overrides",)).items():
        for name in mapping(section):
            yield (
                ("vo_overrides", str(vo), str(name)),
                merge(layer for _, layer in task_layers(raw, str(name), vo)),
            )


def _merged_limits(raw: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The place and the numbers of each default and each key, a VO's laid over those of everybody."""
    sections: list[tuple[Path, str, str | None]] = [
        (("limits", str(obj)), obj, None) for obj in section_at(raw, ("limits",))
    ]
    for vo, by_type in section_at(raw, ("vo_limits",)).items():
        sections += [(("vo_limits", str(vo), str(obj)), obj, vo) for obj in mapping(by_type)]
    for place, obj, vo in sections:
        section = section_at(raw, place)
        if "default" in section:
            yield (*place, "default"), merge(layer for _, layer in limit_layers(raw, obj, [""], vo))
        for key in mapping(section.get("keys")):
            yield (*place, "keys", str(key)), merge(layer for _, layer in limit_layers(raw, obj, [str(key)], vo))
