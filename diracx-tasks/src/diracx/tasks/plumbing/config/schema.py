"""Schema of the configuration. The reference of the settings is generated from it."""

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
from ..locks import LARGEST_LIMIT, LONGEST_MS
from ..schedules import CronSchedule, IntervalSeconds, RRuleSchedule, TaskScheduleBase
from .merge import (
    KINDS,
    RATE_WINDOW_SECONDS,
    Path,
    limit_layers,
    merge,
    merge_problems,
    provenance,
    task_layers,
    with_instances,
    with_window,
)
from .source import Source

# Strict, so that `true` or "10" in a YAML file is a mistake and not a number.
_Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST_LIMIT)]
_Window = Annotated[float, Field(strict=True, ge=1e-6, le=LONGEST_MS / 1000, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

_AS_IN_CODE = "as in the code"
#: Valid names of instances, which are part of the id of a schedule, `category:Class@instance/vo`.
_INSTANCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _empty_if_none(value: Any) -> Any:
    """Read an empty YAML section, which is null, as an empty mapping."""
    return {} if value is None else value


def _none_is_empty_below(value: Any) -> Any:
    """Apply `_empty_if_none` to a mapping and to each of its values."""
    if not isinstance(value, Mapping):
        return _empty_if_none(value)
    return {key: _empty_if_none(below) for key, below in value.items()}


#: Null is read as True: as in the code, where a task that is disabled stays disabled.
_Switch = Annotated[bool, BeforeValidator(lambda value: True if value is None else value)]


def _field(
    description: str,
    *,
    example: Any,
    default: Any = None,
    unit: str | None = None,
    keys: tuple[str, ...] = (),
    stands_for: str = _AS_IN_CODE,
) -> Any:
    """Make a field with the metadata of its reference.

    Args:
        unit: unit of its number.
        keys: names of the keys of a mapping, from the outside in.
        stands_for: meaning of a default that is None or empty.
    """
    extra: JsonDict = {"unit": unit, "keys": list(keys), "stands_for": stands_for}
    return Field(default=default, description=description, examples=[example], json_schema_extra=extra)


def _check_rrule(value: str) -> str:
    if RRuleSchedule(value).lacks_dtstart:
        raise ValueError(f"bad recurrence rule {value!r}: COUNT needs a DTSTART to count from")
    return value


# The constructors of schedules raise the errors.
_Cron = Annotated[str, AfterValidator(lambda value: CronSchedule(value).expression)]
_RRule = Annotated[str, AfterValidator(_check_rrule)]
_Timezone = Annotated[str, AfterValidator(lambda value: CronSchedule("0 0 * * *", timezone=value).timezone)]
_Interval = Annotated[_Seconds, AfterValidator(lambda value: IntervalSeconds(value).seconds)]


class PeriodicTaskConfig(BaseModel):
    """Schedule of a periodic task. `schedule` overrides `interval_seconds`; `rrule` excludes both."""

    model_config = ConfigDict(extra="forbid", validate_default=False)

    enabled: _Switch = _field("False: the task is not scheduled.", default=True, example=False)
    schedule: _Cron | None = _field(
        "Cron expression of five fields, in UTC or `timezone`.", example="*/15 * * * *"
    )
    interval_seconds: _Interval | None = _field("Time between runs.", unit="seconds", example=30)
    rrule: _RRule | None = _field(
        "Recurrence rule of RFC 5545, in UTC, `timezone`, or that of its DTSTART.",
        example="FREQ=HOURLY;INTERVAL=2",
    )
    timezone: _Timezone | None = _field(
        "IANA name of the time zone of `schedule` or `rrule`.", example="Europe/Zurich", stands_for="UTC"
    )
    missed: Literal["once", "skip"] | None = _field(
        "Runs that were missed while no scheduler ran: `once`: one late run for all of them; `skip`: none.",
        example="skip",
        stands_for="as in the code, by default `once`",
    )

    @model_validator(mode="before")
    @classmethod
    def _schedule_wins(cls, written: Any) -> Any:
        if isinstance(written, Mapping) and written.get("schedule") is not None:
            return {name: value for name, value in written.items() if name != "interval_seconds"}
        return written

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: keep one")
        return self

    def as_schedule(self) -> TaskScheduleBase | None:
        """Return the configured schedule; None: that of the code."""
        return _schedule_of(self.schedule, self.interval_seconds, self.rrule, self.timezone)


@lru_cache(maxsize=1024)
def _schedule_of(
    cron: str | None, seconds: float | None, rrule: str | None, timezone: str | None
) -> TaskScheduleBase | None:
    # Cached for all VOs: parsing a cron expression takes a third of a ms.
    if cron is not None:
        return CronSchedule(cron, timezone=timezone)
    if seconds is not None:
        return IntervalSeconds(seconds)
    return None if rrule is None else RRuleSchedule(rrule, timezone=timezone)


class TaskInstance(BaseModel):
    """One of several schedules of a periodic task, with its own arguments."""

    model_config = ConfigDict(extra="forbid")

    enabled: _Switch = _field("False: this instance is not scheduled.", default=True, example=False)
    args: Annotated[dict[str, Any], BeforeValidator(_empty_if_none)] = _field(
        "Arguments of the task class by name, except `vo`, which is set automatically. Those of a VO replace the "
        "common ones as a whole.",
        default={},
        keys=("argument",),
        example={"compute_elements": ["ce01.example.org"]},
        stands_for="none",
    )
    periodic: PeriodicTaskConfig | None = _field(
        "Schedule of this instance; overrides fields of the task's `periodic`.",
        example={"schedule": "0 */2 * * *"},
        stands_for="as the task",
    )

    @field_validator("args")
    @classmethod
    def _check_args(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "vo" in value:
            raise ValueError("vo cannot be set: there is one instance for each VO; use vo_overrides")
        return value


def _check_instance_name(name: str) -> str:
    if not _INSTANCE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid name of an instance: use up to 64 letters, digits and . _ -")
    return name


_InstanceName = Annotated[str, AfterValidator(_check_instance_name)]


class LimitConfig(BaseModel):
    """Values of a limiter. None means: as in the code."""

    model_config = ConfigDict(extra="forbid")

    rate_limit: _Count | None = _field(
        "Maximum number of executions in any window of `rate_window_seconds` (default 60 s).",
        unit="executions",
        example=100,
    )
    rate_window_seconds: _Window | None = _field("Length of that window.", unit="seconds", example=60)
    concurrency_limit: _Count | None = _field(
        "Maximum number of concurrent executions, over all workers.", unit="executions", example=10
    )


class TaskOverride(LimitConfig):
    """Settings of one task. None means: as in the code."""

    enabled: _Switch = _field("False: the task is not scheduled.", default=True, example=False)
    periodic: PeriodicTaskConfig | None = _field(
        "Schedule of a periodic task.", example={"schedule": "*/15 * * * *"}
    )
    instances: Annotated[dict[_InstanceName, TaskInstance], BeforeValidator(_none_is_empty_below)] = _field(
        "Schedules of a periodic task by name, in place of its single schedule. "
        "Empty: removes those of `common` for a VO.",
        default={},
        keys=("name of the instance",),
        example={"fast-sites": {"args": {"compute_elements": ["ce01.example.org"]}}},
        stands_for="none: a single schedule",
    )
    max_retries: Annotated[int, Field(strict=True, ge=0)] | None = _field(
        "Maximum number of retries; 0: none.", unit="retries", example=8
    )
    retry_base_delay_seconds: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = _field(
        "Time before the first retry; doubled for each further one.", unit="seconds", example=2.5
    )
    time_limit_seconds: _Seconds | None = _field(
        "An execution that takes longer is cancelled.", unit="seconds", example=600
    )
    priority: Priority | None = _field("Priority of the queue.", example="background")


def _with_text_keys(value: Any) -> Any:
    """Convert integer keys of objects to text."""
    if not isinstance(value, Mapping):
        return _empty_if_none(value)
    return {
        str(key) if isinstance(key, int) and not isinstance(key, bool) else key: _empty_if_none(limit)
        for key, limit in value.items()
    }


class ObjectLimits(BaseModel):
    """Limits of one object type: a default, and limits by key."""

    model_config = ConfigDict(extra="forbid")

    default: Annotated[LimitConfig, BeforeValidator(_empty_if_none)] = _field(
        "Limits of each object of the type.",
        default=LimitConfig(),
        example={"concurrency_limit": 5},
        stands_for="no limits",
    )
    keys: Annotated[dict[str, LimitConfig], BeforeValidator(_with_text_keys)] = _field(
        "Limits by key of the object; they override `default`. For an object with several keys, in increasing "
        "precedence: `*:second`, the first key alone, all keys joined by colons.",
        default={},
        keys=("key of the object",),
        example={"CERN": {"concurrency_limit": 50}},
        stands_for="none",
    )


_ByTask = Annotated[dict[str, TaskOverride], BeforeValidator(_empty_if_none)]
_ByType = Annotated[dict[str, ObjectLimits], BeforeValidator(_none_is_empty_below)]


class Setting(NamedTuple):
    """A resolved value, and its path in the configuration; None: set in the code."""

    value: Any
    path: Path | None


class TasksConfig(BaseModel):
    """Configuration of tasks: general settings and limits, and overrides for VOs."""

    # For the digest: arguments may be binary.
    model_config = ConfigDict(extra="forbid", ser_json_bytes="base64")

    common: _ByTask = _field(
        "Settings by task name, for every VO and for tasks without one.",
        default={},
        keys=("task",),
        example={"my_pilots:MyPilotTask": {"concurrency_limit": 10}},
        stands_for="empty",
    )
    vo_overrides: Annotated[dict[str, _ByTask], BeforeValidator(_empty_if_none)] = _field(
        "Settings by VO and task name; they override `common`.",
        default={},
        keys=("VO", "task"),
        example={"lhcb": {"my_pilots:MyPilotTask": {"concurrency_limit": 20}}},
        stands_for="empty",
    )
    limits: _ByType = _field(
        "Limits by object type, for all limiters of tasks on such objects.",
        default={},
        keys=("object type",),
        example={"site": {"default": {"concurrency_limit": 5}}},
        stands_for="empty",
    )
    vo_limits: Annotated[dict[str, _ByType], BeforeValidator(_empty_if_none)] = _field(
        "Limits by VO and object type; they override `limits`, and count tasks of the VO only.",
        default={},
        keys=("VO", "object type"),
        example={"lhcb": {"site": {"default": {"concurrency_limit": 2}}}},
        stands_for="empty",
    )

    _source: Source = PrivateAttr(default=Source())

    @model_validator(mode="after")
    def _check_merged(self) -> Self:
        problems = [f"{'.'.join(path)}: {message}" for path, message in merge_problems(self.configured)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def source(self) -> Source:
        """Source from which it was read."""
        return self._source

    @cached_property
    def configured(self) -> dict[str, Any]:
        """The configured settings without defaults. Must not be changed."""
        return self.model_dump(exclude_unset=True)

    @cached_property
    def _resolved(self) -> dict[tuple[str, str | None], tuple[TaskOverride, dict[str, Any]]]:
        """Cache of overrides, and of the paths of their values, by task and VO."""
        return {}

    def _resolve(self, task_name: str, vo: str | None) -> tuple[TaskOverride, dict[str, Any]]:
        key = task_name, vo if vo in self.vo_overrides else None
        if key not in self._resolved:
            layers = list(task_layers(self.configured, *key))
            merged = with_window(with_instances(merge(layer for _, layer in layers)))
            paths = with_instances(merge(provenance(layer, path) for path, layer in layers))
            self._resolved[key] = TaskOverride.model_validate(merged), paths
        return self._resolved[key]

    def get_override(self, task_name: str, vo: str | None = None) -> TaskOverride:
        """Return the merged settings of `task_name`, for `vo` if given; `TaskOverride()` if not configured.

        Field by field, the value of the VO overrides the common one, and that of the full name that of the class
        name. `periodic` of each instance is merged with that of the task.
        """
        return self._resolve(task_name, vo)[0]

    def get_limits(self, obj: str, *keys: str, vo: str | None = None) -> dict[str, Setting]:
        """Return the configured limits of the object of kind `obj` with these keys, by field.

        Field by field, the limit of the VO overrides the general one, and that of a key the default. Limits that
        are not configured, or null, are omitted.
        """
        found: dict[str, Setting] = {}
        for path, layer in limit_layers(self.configured, obj, keys, vo):
            found |= {name: Setting(value, (*path, name)) for name, value in layer.items()}
        rate, window = found.get("rate_limit"), found.get("rate_window_seconds")
        if rate is not None and rate.value is not None and (window is None or window.value is None):
            found["rate_window_seconds"] = Setting(RATE_WINDOW_SECONDS, rate.path)
        return {name: setting for name, setting in found.items() if setting.value is not None}

    def path_of(self, task_name: str, vo: str | None, field: str, instance: str | None = None) -> Path | None:
        """Return the path of the resolved value of a field; None: set in the code.

        Args:
            field: dotted if nested, as `periodic.missed`; `periodic` alone: that of the schedule.
            instance: an instance of the task.
        """
        paths: Any = self._resolve(task_name, vo)[1]
        if instance is not None:
            paths = (paths.get("instances") or {}).get(instance, {})
        for part in field.split("."):
            paths = paths.get(part) if isinstance(paths, Mapping) else None
        if isinstance(paths, Mapping):
            paths = next((paths[kind] for kind in KINDS if paths.get(kind) is not None), None)
        return paths if isinstance(paths, tuple) else None

    def source_of(self, task_name: str, vo: str | None, field: str) -> str:
        """Return the owner of a resolved value: `code`, `common` or `vo <name>`. Arguments as `path_of`."""
        return owner(self.path_of(task_name, vo, field))


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
