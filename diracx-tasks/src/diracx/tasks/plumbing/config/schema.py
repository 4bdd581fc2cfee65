"""Schema of the configuration, field by field. The reference of the settings is made from this."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from ..enums import Priority
from ..schedules import CronSchedule, IntervalSeconds, RRuleSchedule, TaskScheduleBase
from .merge import (
    KINDS,
    RATE_WINDOW_SECONDS,
    Path,
    TimezoneClashError,
    limit_layers,
    merge,
    merge_problems,
    provenance,
    task_layers,
    timezone_clash,
    with_instances,
    with_window,
)
from .source import Source

# Strict, so that `true` or "10" in a YAML file is a mistake and not a number.
_Count = Annotated[int, Field(strict=True, ge=1)]
_Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

_AS_IN_CODE = "as in the code"
#: What goes into the id of a schedule, `category:Class@instance/vo`, and can be read back from it.
_INSTANCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _empty_if_none(value: Any) -> Any:
    """Read a YAML section with nothing below it as an empty one."""
    return {} if value is None else value


def _none_is_empty_below(value: Any) -> Any:
    """As `_empty_if_none`, of a mapping and of each of its values."""
    if not isinstance(value, Mapping):
        return _empty_if_none(value)
    return {key: _empty_if_none(below) for key, below in value.items()}


def _true_if_none(value: Any) -> Any:
    """Null is as in the code, where a task is on; what the code has switched off stays so."""
    return True if value is None else value


_Switch = Annotated[bool, BeforeValidator(_true_if_none)]


def _field(
    description: str,
    *,
    example: Any,
    default: Any = None,
    unit: str | None = None,
    keys: tuple[str, ...] = (),
    stands_for: str = _AS_IN_CODE,
) -> Any:
    """A field, with what its reference says besides its type.

    Args:
        unit: of its number.
        keys: by what a mapping goes, from the outside in.
        stands_for: what the default means to a reader, where it is None or empty.
    """
    extra: JsonDict = {"unit": unit, "keys": list(keys), "stands_for": stands_for}
    return Field(default=default, description=description, examples=[example], json_schema_extra=extra)


class PeriodicTaskConfig(BaseModel):
    """Schedule of a periodic task. `schedule` goes before `interval_seconds`; `rrule` excludes both."""

    model_config = ConfigDict(extra="forbid", validate_default=False)

    enabled: _Switch = _field("False: the scheduler leaves the task alone.", default=True, example=False)
    schedule: str | None = _field("Cron expression of five fields, in UTC or `timezone`.", example="*/15 * * * *")
    interval_seconds: _Seconds | None = _field("Time from one run to the next.", unit="seconds", example=30)
    rrule: str | None = _field(
        "Recurrence rule of RFC 5545, in UTC, `timezone`, or that of its DTSTART.",
        example="FREQ=HOURLY;INTERVAL=2",
    )
    timezone: str | None = _field(
        "IANA name of the time zone of `schedule` or `rrule`.", example="Europe/Zurich", stands_for="UTC"
    )
    missed: Literal["once", "skip"] | None = _field(
        "What becomes of runs that nobody was there to start: `once`: one late run for all of them; "
        "`skip`: none, the next one is the next.",
        example="skip",
        stands_for="as in the code; `once` where that says nothing",
    )

    @model_validator(mode="before")
    @classmethod
    def _schedule_wins(cls, written: Any) -> Any:
        if isinstance(written, Mapping) and written.get("schedule") is not None:
            return {name: value for name, value in written.items() if name != "interval_seconds"}
        return written

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: str | None) -> str | None:
        if value is not None:
            CronSchedule(value)
        return value

    @field_validator("interval_seconds")
    @classmethod
    def _check_interval(cls, value: float | None) -> float | None:
        if value is not None:
            IntervalSeconds(value)
        return value

    @field_validator("rrule")
    @classmethod
    def _check_rrule(cls, value: str | None) -> str | None:
        if value is not None and RRuleSchedule(value).counts_from_nowhere:
            raise ValueError(f"bad recurrence rule {value!r}: COUNT needs a DTSTART to count from")
        return value

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, value: str | None) -> str | None:
        if value is not None:
            CronSchedule("0 0 * * *", timezone=value)
        return value

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: keep one")
        if clash := timezone_clash(dict(self)):
            raise TimezoneClashError(f"timezone: {clash}")
        return self

    def as_schedule(self) -> TaskScheduleBase | None:
        """Return the schedule this asks for, or None to keep the one in the code."""
        return _schedule_of(self.schedule, self.interval_seconds, self.rrule, self.timezone)


@lru_cache(maxsize=1024)
def _schedule_of(
    cron: str | None, seconds: float | None, rrule: str | None, timezone: str | None
) -> TaskScheduleBase | None:
    # Made once for all VOs that have it in common: to read a cron expression takes a third of a ms.
    if cron is not None:
        return CronSchedule(cron, timezone=timezone)
    if seconds is not None:
        return IntervalSeconds(seconds)
    return None if rrule is None else RRuleSchedule(rrule, timezone=timezone)


class TaskInstance(BaseModel):
    """One of several schedules of a periodic task, with arguments of its own."""

    model_config = ConfigDict(extra="forbid")

    enabled: _Switch = _field("False: the scheduler leaves this instance alone.", default=True, example=False)
    args: Annotated[dict[str, Any], BeforeValidator(_empty_if_none)] = _field(
        "Arguments of the task's class, by name; `vo` comes by itself. One value: a VO's replace the common ones.",
        default={},
        keys=("argument",),
        example={"compute_elements": ["ce01.example.org"]},
        stands_for="none",
    )
    periodic: PeriodicTaskConfig | None = _field(
        "When this instance runs, on top of the task's `periodic`.",
        example={"schedule": "0 */2 * * *"},
        stands_for="as the task",
    )

    @field_validator("args")
    @classmethod
    def _check_args(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "vo" in value:
            raise ValueError("vo is not given here: there is one instance for each VO; use vo_overrides")
        return value


def _check_instance_name(name: str) -> str:
    if not _INSTANCE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an instance: use up to 64 letters, digits and . _ -")
    return name


_InstanceName = Annotated[str, AfterValidator(_check_instance_name)]


class LimitConfig(BaseModel):
    """Values of a limiter. None means: as in the code."""

    model_config = ConfigDict(extra="forbid")

    rate_limit: _Count | None = _field(
        "Executions allowed in any window of `rate_window_seconds`, or of 60 s.",
        unit="executions",
        example=100,
    )
    rate_window_seconds: _Seconds | None = _field("Length of that window.", unit="seconds", example=60)
    concurrency_limit: _Count | None = _field(
        "Executions allowed at the same time, over all workers.", unit="executions", example=10
    )


class TaskOverride(BaseModel):
    """Settings of one task. None everywhere means: as in the code."""

    model_config = ConfigDict(extra="forbid")

    enabled: _Switch = _field("False: the scheduler leaves the task alone.", default=True, example=False)
    rate_limit: _Count | None = _field(
        "Executions allowed in any window of `rate_window_seconds`, or of 60 s.",
        unit="executions",
        example=100,
    )
    rate_window_seconds: _Seconds | None = _field("Length of that window.", unit="seconds", example=60)
    concurrency_limit: _Count | None = _field(
        "Executions allowed at the same time, over all workers.", unit="executions", example=10
    )
    periodic: PeriodicTaskConfig | None = _field(
        "When a periodic task runs.", example={"schedule": "*/15 * * * *"}
    )
    instances: Annotated[dict[_InstanceName, TaskInstance], BeforeValidator(_none_is_empty_below)] = _field(
        "Schedules of a periodic task by name: it runs once for each, and no longer by its plain name. "
        "Written and left empty: none again, also for a VO for which `common` has some.",
        default={},
        keys=("name of the instance",),
        example={"fast-sites": {"args": {"compute_elements": ["ce01.example.org"]}}},
        stands_for="none: it runs by its plain name",
    )
    max_retries: Annotated[int, Field(strict=True, ge=0)] | None = _field(
        "Retries before the task is given up; 0: none.", unit="retries", example=8
    )
    retry_base_delay_seconds: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = _field(
        "Time before the first retry; doubled for each further one.", unit="seconds", example=2.5
    )
    time_limit_seconds: _Seconds | None = _field(
        "An execution that takes longer is cancelled.", unit="seconds", example=600
    )
    priority: Priority | None = _field("Queue the task is sent to.", example="background")


def _with_text_keys(value: Any) -> Any:
    """The key of a lock may be a number; it is the same object as its text."""
    if not isinstance(value, Mapping):
        return _empty_if_none(value)
    return {
        str(key) if isinstance(key, int) and not isinstance(key, bool) else key: _empty_if_none(limit)
        for key, limit in value.items()
    }


class ObjectLimits(BaseModel):
    """Limits of one kind of object: for each of them, and for some in particular."""

    model_config = ConfigDict(extra="forbid")

    default: Annotated[LimitConfig, BeforeValidator(_empty_if_none)] = _field(
        "For every object of the kind.",
        default=LimitConfig(),
        example={"concurrency_limit": 5},
        stands_for="no limits",
    )
    keys: Annotated[dict[str, LimitConfig], BeforeValidator(_with_text_keys)] = _field(
        "By the key of the object, on top of `default`. For an object of several keys: by all but the first, as "
        "`*:second`, on top of that by the first, and then by all of them with colons between.",
        default={},
        keys=("key of the object",),
        example={"CERN": {"concurrency_limit": 50}},
        stands_for="none",
    )


_ByTask = Annotated[dict[str, TaskOverride], BeforeValidator(_empty_if_none)]
_ByType = Annotated[dict[str, ObjectLimits], BeforeValidator(_none_is_empty_below)]


class Setting(NamedTuple):
    """A value in force, and where in the configuration it was written; None: it is as in the code."""

    value: Any
    path: Path | None


class TasksConfig(BaseModel):
    """The whole of what an operator sets: for everybody, and on top of that for one VO."""

    model_config = ConfigDict(extra="forbid")

    common: _ByTask = _field(
        "By task name, for every VO and for tasks that have none.",
        default={},
        keys=("task",),
        example={"my_pilots:MyPilotTask": {"concurrency_limit": 10}},
        stands_for="empty",
    )
    vo_overrides: Annotated[dict[str, _ByTask], BeforeValidator(_empty_if_none)] = _field(
        "By VO and task name, on top of `common`.",
        default={},
        keys=("VO", "task"),
        example={"lhcb": {"my_pilots:MyPilotTask": {"concurrency_limit": 20}}},
        stands_for="empty",
    )
    limits: _ByType = _field(
        "By kind of locked object: the numbers of every limiter that a task takes on such an object.",
        default={},
        keys=("kind of object",),
        example={"site": {"default": {"concurrency_limit": 5}}},
        stands_for="empty",
    )
    vo_limits: Annotated[dict[str, _ByType], BeforeValidator(_empty_if_none)] = _field(
        "By VO and kind of locked object, on top of `limits`; such a limit counts that VO's tasks only.",
        default={},
        keys=("VO", "kind of object"),
        example={"lhcb": {"site": {"default": {"concurrency_limit": 2}}}},
        stands_for="empty",
    )

    _source: Source = PrivateAttr(default=Source())

    @model_validator(mode="after")
    def _check_merged(self) -> Self:
        problems = [f"{'.'.join(place)}: {what}" for place, what in merge_problems(self._written)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def source(self) -> Source:
        """Source from which it was read."""
        return self._source

    def written(self) -> dict[str, Any]:
        """Only what the operator wrote; not to be changed."""
        return self._written

    @cached_property
    def _written(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)

    @cached_property
    def _overrides(self) -> dict[tuple[str, str | None], TaskOverride]:
        """Overrides that were asked for, by task and VO."""
        return {}

    @cached_property
    def _paths(self) -> dict[tuple[str, str | None], dict[str, Any]]:
        """The same, with the place where it is written in place of each value."""
        return {}

    def get_override(self, task_name: str, vo: str | None = None) -> TaskOverride:
        """Return what is set for `task_name`, for `vo` if one is given.

        Field by field, the VO's value goes before the common one, and the full name before the class name.
        `periodic` of each of the instances is already laid over that of the task. A task nobody configured gets
        `TaskOverride()`.
        """
        place = task_name, vo if vo in self.vo_overrides else None
        if place not in self._overrides:
            merged = merge(layer for _, layer in task_layers(self._written, *place))
            self._overrides[place] = TaskOverride.model_validate(with_window(with_instances(merged)))
        return self._overrides[place]

    def get_limits(self, obj: str, *keys: str, vo: str | None = None) -> dict[str, Setting]:
        """Return the numbers for a limiter on the object of kind `obj` with these keys, by field.

        Field by field: a VO's number goes before one for everybody, that of a key before the default. A number
        that nobody wrote, or that is null, is not there: it stays as in the code.
        """
        found: dict[str, Setting] = {}
        for place, layer in limit_layers(self._written, obj, keys, vo):
            found |= {name: Setting(value, (*place, name)) for name, value in layer.items()}
        rate, window = found.get("rate_limit"), found.get("rate_window_seconds")
        if rate is not None and rate.value is not None and (window is None or window.value is None):
            found["rate_window_seconds"] = Setting(RATE_WINDOW_SECONDS, rate.path)
        return {name: setting for name, setting in found.items() if setting.value is not None}

    def path_of(self, task_name: str, vo: str | None, field: str, instance: str | None = None) -> Path | None:
        """Return where the value in force of a field is written; None when it is as in the code.

        Args:
            field: dotted for what is nested: `periodic.missed`. `periodic` alone asks for the way of saying when.
            instance: of which of the task's instances.
        """
        place = task_name, vo if vo in self.vo_overrides else None
        if place not in self._paths:
            layers = (provenance(layer, at) for at, layer in task_layers(self._written, *place))
            self._paths[place] = with_instances(merge(layers))
        paths: Any = self._paths[place]
        if instance is not None:
            paths = (paths.get("instances") or {}).get(instance, {})
        for part in field.split("."):
            paths = paths.get(part) if isinstance(paths, Mapping) else None
        if isinstance(paths, Mapping):
            paths = next((paths[kind] for kind in KINDS if paths.get(kind) is not None), None)
        return paths if isinstance(paths, tuple) else None

    def source_of(self, task_name: str, vo: str | None, field: str, instance: str | None = None) -> str:
        """Return who says so: `code`, `common` or `vo <name>`. Arguments as `path_of`."""
        return owner(self.path_of(task_name, vo, field, instance))


def owner(path: Path | None) -> str:
    """Owner of the settings at a path: `code`, `common`, `vo <name>`, `limits` or `limits of vo <name>`."""
    match path:
        case None:
            return "code"
        case ("vo_overrides", vo, *_):
            return f"vo {vo}"
        case ("vo_limits", vo, *_):
            return f"limits of vo {vo}"
    return path[0]
