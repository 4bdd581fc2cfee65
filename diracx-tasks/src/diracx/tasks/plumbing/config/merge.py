"""Merges the layers of a configuration, field by field.

Works on plain mappings that need not be valid, so that problems of the merged layers are reported together with
those of each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..schedules import CronSchedule, RRuleSchedule

#: Keys from the top level of the configuration.
Path = tuple[str, ...]
Layer = Mapping[str, Any]

#: Default window of rate limits.
RATE_WINDOW_SECONDS = 60.0
#: Alternative fields of a schedule, of which at most one is set.
KINDS = ("schedule", "interval_seconds", "rrule")


def mapping(value: Any) -> Mapping[Any, Any]:
    """Return the value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def merge(layers: Iterable[Layer]) -> dict[str, Any]:
    """Merge layers of fields; later ones override.

    `periodic` and each of the `instances` are merged recursively. Empty `instances` remove earlier ones; `args`
    are replaced as a whole.
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
    """Merge `periodic` of two layers; a schedule in `above` replaces that of `below`."""
    if any(above.get(kind) is not None for kind in KINDS):
        below = {name: value for name, value in below.items() if name not in (*KINDS, "timezone")}
    return {**below, **above}


def with_window(merged: dict[str, Any]) -> dict[str, Any]:
    """Add the default window to a rate limit without one."""
    if merged.get("rate_limit") is not None and merged.get("rate_window_seconds") is None:
        return {**merged, "rate_window_seconds": RATE_WINDOW_SECONDS}
    return merged


def with_instances(merged: Layer) -> dict[str, Any]:
    """Merge `periodic` of the task into that of each instance."""
    common, instances = merged.get("periodic"), {}
    for name, instance in mapping(merged.get("instances")).items():
        own = mapping(instance).get("periodic")
        periodic = merge_schedule(mapping(common), mapping(own)) if common or own else own
        instances[name] = {**mapping(instance), "periodic": periodic}
    return {**merged, "instances": instances} if instances else dict(merged)


def task_layers(raw: Any, task_name: str, vo: str | None) -> Iterator[tuple[Path, Layer]]:
    """Yield path and layer of the settings of a task: common ones, then those of the VO; class name first."""
    sections: list[Path] = [("common",)]
    if vo is not None:
        sections.append(("vo_overrides", vo))
    for path in sections:
        section = section_at(raw, path)
        for key in dict.fromkeys([task_name.rpartition(":")[2], task_name]):
            if key in section:
                yield (*path, key), mapping(section[key])


def limit_layers(raw: Any, obj: str, keys: Iterable[str], vo: str | None) -> Iterator[tuple[Path, Layer]]:
    """Yield path and layer of the limits of an object, the default first."""
    sections: list[Path] = [("limits", obj)]
    if vo is not None:
        sections.append(("vo_limits", vo, obj))
    names = list(keys)
    if len(names) > 1:  # the most specific last; `*`: any first key
        names = [":".join(["*", *names[1:]]), names[0], ":".join(names)]
    for path in sections:
        section = section_at(raw, path)
        if "default" in section:
            yield (*path, "default"), mapping(section["default"])
        by_key = mapping(section.get("keys"))
        for key in names:
            found = int(key) if key not in by_key and key.isdecimal() else key  # YAML reads numbers
            if found in by_key:
                yield (*path, "keys", key), mapping(by_key[found])


def section_at(raw: Any, path: Path) -> Mapping[Any, Any]:
    """Return the mapping at a path, an empty one if there is none."""
    section = mapping(raw)
    for part in path:
        section = mapping(section.get(part))
    return section


def provenance(layer: Layer, path: Path) -> dict[str, Any]:
    """Replace each value of a layer by its path, except null."""
    return {name: _mark(value, (*path, name), name) for name, value in layer.items()}


def _mark(value: Any, path: Path, name: str) -> Any:
    if name == "instances" and isinstance(value, Mapping):
        return {key: provenance(mapping(instance), (*path, str(key))) for key, instance in value.items()}
    if name == "periodic" and isinstance(value, Mapping):
        return provenance(value, path)
    return None if value is None else path


def merge_problems(raw: Any) -> Iterator[tuple[Path, str]]:
    """Yield problems of the merged layers: a window without a rate limit, or a time zone that cannot apply."""
    for path, merged in _merged_tasks(raw):
        yield from _only_window(path, merged)
        if clash := _timezone_clash(mapping(merged.get("periodic"))):
            yield (*path, "periodic", "timezone"), clash
        own = mapping(section_at(raw, path).get("instances"))
        for name, instance in mapping(with_instances(merged).get("instances")).items():
            inherited = mapping(mapping(own.get(name)).get("periodic")).keys().isdisjoint((*KINDS, "timezone"))
            found = _timezone_clash(mapping(mapping(instance).get("periodic")))
            if found and not (clash and inherited):
                yield (*path, "instances", str(name), "periodic", "timezone"), found
    for path, merged in _merged_limits(raw):
        yield from _only_window(path, merged)


def _only_window(path: Path, merged: Layer) -> Iterator[tuple[Path, str]]:
    # An explicit null disables an inherited limit, whose window may remain.
    if merged.get("rate_window_seconds") is not None and "rate_limit" not in merged:
        yield (*path, "rate_window_seconds"), "needs rate_limit"


def _timezone_clash(periodic: Layer) -> str | None:
    """Return why the time zone cannot apply to the schedule; None if it can, or one of them is invalid."""
    timezone, rule = periodic.get("timezone"), periodic.get("rrule")
    if timezone is None:
        return None
    if periodic.get("interval_seconds") is not None:
        return "applies to schedule or rrule, not to interval_seconds"
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
        return f"does not apply to the rrule: {error}"
    return None


def sections(raw: Any, common: str, by_vo: str) -> Iterator[tuple[Path, str | None, Mapping[Any, Any]]]:
    """Yield path, VO and content of the general section (VO: None) and of that of each VO."""
    yield (common,), None, section_at(raw, (common,))
    for vo, section in section_at(raw, (by_vo,)).items():
        yield (by_vo, str(vo)), vo, mapping(section)


def _merged_tasks(raw: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and merged fields of each task in `common` and of each VO."""
    for path, vo, section in sections(raw, "common", "vo_overrides"):
        for name in section:
            yield (*path, str(name)), merge(layer for _, layer in task_layers(raw, str(name), vo))


def _merged_limits(raw: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and merged limits of each default and key, in general and of each VO."""
    for path, vo, section in sections(raw, "limits", "vo_limits"):
        for obj, limits in section.items():
            if "default" in mapping(limits):
                yield (*path, str(obj), "default"), merge(each for _, each in limit_layers(raw, obj, [""], vo))
            for key in mapping(mapping(limits).get("keys")):
                merged = merge(each for _, each in limit_layers(raw, obj, [str(key)], vo))
                yield (*path, str(obj), "keys", str(key)), merged
