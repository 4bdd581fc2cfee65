"""What an operator may change about tasks without touching code, and where it is read from.

Either a YAML file (`DIRACX_TASKS_CONFIG`) or the `Systems.Tasks` section of the DiracX configuration::

    common:                          # every VO, and tasks that know no VO
      "my_pilots:MyPilotTask":
        rate_limit: 100
        rate_window_seconds: 60
    vo_overrides:
      lhcb:
        "my_pilots:MySubmitPilotsTask":
          periodic: {schedule: "*/2 * * * *"}

A task is named in full (`category:Class`) or by its class alone; the full name wins. Only what is written
overrides; everything else stays as the code has it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .enums import Priority
from .exceptions import TaskConfigError
from .schedules import CronSchedule, IntervalSeconds, RRuleSchedule, TaskScheduleBase

#: Names the YAML file; unset or empty means `Systems.Tasks` of the DiracX configuration.
CONFIG_PATH_VARIABLE = "DIRACX_TASKS_CONFIG"

# Strict, so that `true` or "10" in a YAML file is a mistake and not a number.
_Count = Annotated[int, Field(strict=True, ge=1)]
_Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

#: The three ways to say when; at most one of them.
_KINDS = ("schedule", "interval_seconds", "rrule")


class PeriodicTaskConfig(BaseModel):
    """Whether and when a periodic task runs. At most one of `schedule`, `interval_seconds` and `rrule`."""

    model_config = ConfigDict(extra="forbid", validate_default=False)

    enabled: bool = Field(default=True, description="False: the scheduler leaves the task alone.")
    schedule: str | None = Field(default=None, description="Cron expression; None: as in the code.")
    interval_seconds: _Seconds | None = Field(
        default=None, description="Seconds between two runs; None: as in the code."
    )
    rrule: str | None = Field(default=None, description="Recurrence rule (RFC 5545); None: as in the code.")
    timezone: str | None = Field(default=None, description="IANA zone of the cron expression; None: UTC.")

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
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: keep one")
        if self.timezone is not None and given not in ([], ["schedule"]):
            raise ValueError(f"timezone goes with schedule only, not with {given[0]}")
        return self

    def as_schedule(self) -> TaskScheduleBase | None:
        """Return the schedule this asks for, or None to keep the one in the code."""
        if self.schedule is not None:
            return CronSchedule(self.schedule, timezone=self.timezone)
        if self.interval_seconds is not None:
            return IntervalSeconds(self.interval_seconds)
        if self.rrule is not None:
            return RRuleSchedule(self.rrule)
        return None


class TaskOverride(BaseModel):
    """What the operator sets for one task. None everywhere means: as in the code."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(default=True, description="False: the scheduler leaves the task alone.")
    rate_limit: _Count | None = Field(
        default=None, description="Executions allowed in any window; goes with rate_window_seconds."
    )
    rate_window_seconds: _Seconds | None = Field(default=None, description="Length of that window, in seconds.")
    concurrency_limit: _Count | None = Field(
        default=None, description="Executions allowed at the same time, over all workers."
    )
    periodic: PeriodicTaskConfig | None = Field(default=None, description="When a periodic task runs.")
    max_retries: Annotated[int, Field(strict=True, ge=0)] | None = Field(
        default=None, description="Retries before the task is given up; 0: none."
    )
    retry_base_delay_seconds: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Seconds before the first retry; doubled for each further one."
    )
    time_limit_seconds: _Seconds | None = Field(
        default=None, description="Seconds an execution may take before it is cancelled."
    )
    priority: Priority | None = Field(default=None, description="Queue the task is sent to.")


def _empty_if_none(value: Any) -> Any:
    """Read a YAML section with nothing below it as an empty one."""
    return {} if value is None else value


_ByTask = Annotated[dict[str, TaskOverride], BeforeValidator(_empty_if_none)]


class TasksConfig(BaseModel):
    """The whole of what an operator sets: for everybody, and on top of that for one VO."""

    model_config = ConfigDict(extra="forbid")

    common: _ByTask = Field(default={}, description="By task name, for every VO.")
    vo_overrides: Annotated[dict[str, _ByTask], BeforeValidator(_empty_if_none)] = Field(
        default={}, description="By VO and task name, on top of `common`."
    )

    @model_validator(mode="after")
    def _check_merged(self) -> Self:
        problems = _merge_problems(self.model_dump(exclude_unset=True))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def get_override(self, task_name: str, vo: str | None = None) -> TaskOverride:
        """Return what is set for `task_name`, for `vo` if one is given.

        Field by field, the VO's value goes before the common one, and the full name before the class name.
        A task nobody configured gets `TaskOverride()`.
        """
        sections = [self.common]
        if vo is not None and vo in self.vo_overrides:
            sections.append(self.vo_overrides[vo])
        found = [section[key] for section in sections for key in _keys(task_name) if key in section]
        if not found:
            return TaskOverride()
        if len(found) == 1:
            return found[0]
        return TaskOverride.model_validate(_merge(layer.model_dump(exclude_unset=True) for layer in found))


def _keys(task_name: str) -> tuple[str, ...]:
    """Return the names under which a task may be configured, the most particular last."""
    _, colon, class_name = task_name.rpartition(":")
    return (class_name, task_name) if colon else (task_name,)


def _merge(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay the fields that were set over each other, the last on top."""
    merged: dict[str, Any] = {}
    for layer in layers:
        below = merged.get("periodic")
        merged.update(layer)
        above = layer.get("periodic")
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            if any(above.get(kind) is not None for kind in _KINDS):
                # Another way of saying when replaces the whole of the one below.
                below = {k: v for k, v in below.items() if k not in (*_KINDS, "timezone")}
            merged["periodic"] = {**below, **above}
    return merged


def _merge_problems(raw: Any) -> list[str]:
    """Return what is wrong with the layers put together: half a rate limit, and schedules that clash.

    Works on unvalidated data, so that these are reported together with everything else.
    """
    problems: list[str] = []
    for path, merged in _merged_layers(raw):
        limit, window = merged.get("rate_limit"), merged.get("rate_window_seconds")
        if limit is not None and window is None:
            problems.append(f"{path}.rate_limit: needs rate_window_seconds beside it")
        # An explicit null switches an inherited limit off and may leave its window behind.
        if window is not None and "rate_limit" not in merged:
            problems.append(f"{path}.rate_window_seconds: needs rate_limit beside it")
        periodic = merged.get("periodic")
        if isinstance(periodic, Mapping) and periodic.get("timezone") is not None:
            others = [kind for kind in _KINDS[1:] if periodic.get(kind) is not None]
            if others:
                problems.append(f"{path}.periodic.timezone: goes with schedule only, not with {others[0]}")
    return problems


def _merged_layers(raw: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each task's path and fields: those in `common`, and each VO's laid over them."""
    common = _mapping(_mapping(raw).get("common"))
    for name in common:
        yield f"common.{name}", _merge(_mapping(common.get(key)) for key in _keys(str(name)))
    for vo, section in _mapping(_mapping(raw).get("vo_overrides")).items():
        tasks = _mapping(section)
        for name in tasks:
            layers = [part.get(key) for part in (common, tasks) for key in _keys(str(name))]
            yield f"vo_overrides.{vo}.{name}", _merge(map(_mapping, layers))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def load_tasks_config(path: Path | None = None, config: object | None = None) -> TasksConfig:
    """Read the configuration of tasks.

    From the YAML file `path`, else the one that `DIRACX_TASKS_CONFIG` names, else `config.systems["Tasks"]`
    of a DiracX configuration, else empty. Raises `TaskConfigError` with one line per problem.
    """
    if path is None and os.environ.get(CONFIG_PATH_VARIABLE):
        path = Path(os.environ[CONFIG_PATH_VARIABLE])
    if path is not None:
        return _validated(_read_yaml(path), str(path))
    section = _mapping(getattr(config, "systems", None)).get("Tasks")
    return section if isinstance(section, TasksConfig) else _validated(section, "Systems.Tasks")


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise TaskConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise TaskConfigError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from exc


def _validated(raw: Any, source: str) -> TasksConfig:
    try:
        return TasksConfig.model_validate(_empty_if_none(raw))
    except ValidationError as exc:
        # Errors without a place come from the check of the merged layers, which is repeated here in lines.
        lines = [_line(error) for error in exc.errors() if error["loc"] or error["type"] != "value_error"]
        lines += _merge_problems(raw)
        message = "\n".join(f"{source}: {line}" for line in dict.fromkeys(lines))
        raise TaskConfigError(message) from exc


def _line(error: Any) -> str:
    """Return one validation error as `dotted.path: what is wrong`."""
    where = [str(part) for part in error["loc"]]
    path = ".".join(where) or "the top level"
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        model = _model_at(where)
        return f"{path}: unknown field{_nearest(where[-1], model.model_fields)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{path}: must be a mapping of names to values, not {given!r}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[:1].lower()}{message[1:]}, not {given!r}"


def _model_at(where: list[str]) -> type[BaseModel]:
    if len(where) == 1:
        return TasksConfig
    return PeriodicTaskConfig if where[-2] == "periodic" else TaskOverride


def _nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint at the valid name that `name` was probably meant to be, or at all of them if few."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if names and len(names) <= 10 else ""


def unknown_names(config: TasksConfig, registry_names: Collection[str], vos: Collection[str]) -> list[str]:
    """Return one line for each configured task that is not registered and each VO that does not exist."""
    class_names = {name.rpartition(":")[2] for name in registry_names}

    def check(path: str, tasks: Iterable[str]) -> Iterator[str]:
        for name in tasks:
            if name not in registry_names and name not in class_names:
                choices = registry_names if ":" in name else class_names
                yield f"{path}.{name}: unknown task{_nearest(name, choices)}"

    problems = list(check("common", config.common))
    for vo, tasks in config.vo_overrides.items():
        if vo not in vos:
            problems.append(f"vo_overrides.{vo}: unknown VO{_nearest(vo, vos)}")
        problems.extend(check(f"vo_overrides.{vo}", tasks))
    return problems


def tasks_config_of_environment() -> TasksConfig:
    """The configuration that this process finds: `DIRACX_TASKS_CONFIG`, else `DIRACX_CONFIG_BACKEND_URL`.

    Raises:
        TaskConfigError: every problem of the file or section, one line each.
    """
    backend_url = os.environ.get("DIRACX_CONFIG_BACKEND_URL")
    if os.environ.get(CONFIG_PATH_VARIABLE) or not backend_url:
        return load_tasks_config()
    from diracx.core.config import ConfigSource

    return load_tasks_config(config=ConfigSource.create_from_url(backend_url=backend_url).read())
