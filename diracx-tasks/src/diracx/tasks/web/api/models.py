"""Models of requests and responses that are not values of `diracx.tasks.operations` themselves."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from ...operations import DelayedTask, Failure, Lock, QueuedTask, RunningTask, WaitingDeadLetter
from ...operations.health import Alert, Severity
from ...plumbing.persistence import DeadLetterReason, DeadLetterStatus
from ...plumbing.persistence.db import DeadLetterFilter
from ..operator import NotPossibleError

# What comes in is short, and has no control characters: it goes into databases, keys, logs and terminals.
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
TaskId = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_PRINTABLE)]
TaskName = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]
VOName = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]
ScheduleId = Annotated[str, StringConstraints(max_length=1000, pattern=_PRINTABLE)]
LockKey = Annotated[str, StringConstraints(max_length=1000, pattern=_PRINTABLE)]
Owner = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]


def _usable(moment: datetime) -> datetime:
    # In UTC it must still be one that Python and every database know.
    if not 1970 <= moment.year <= 9998:
        raise ValueError("it must be between the years 1970 and 9998")
    return moment


Moment = Annotated[datetime, AfterValidator(_usable)]

_Item = TypeVar("_Item")
_AFTER = Field(default=None, description="To be given for the next page; null: this was the last one.")


class _Page(BaseModel, Generic[_Item]):
    items: list[_Item]
    after: str | None = _AFTER


class QueuedTaskPage(_Page[QueuedTask]):
    """A part of a backlog."""


class WaitingDeadLetterPage(_Page[WaitingDeadLetter]):
    """A part of the dead letters that wait in Redis."""


class RunningTaskPage(_Page[RunningTask]):
    """A part of what runs."""


class DelayedTaskPage(_Page[DelayedTask]):
    """A part of the delayed tasks."""


class FailurePage(_Page[Failure]):
    """Some failed attempts."""


class LockPage(_Page[Lock]):
    """Some locks."""


class ConfigurationInForce(BaseModel):
    """The configuration that one process runs with."""

    role: str
    source: str
    digest: str = Field(description="The same for the same settings.")
    since: datetime
    vos: list[str] | None
    problems: list[str]
    problems_since: datetime | None
    warnings: list[str]
    process: str
    seen: datetime


class HealthReport(BaseModel):
    """Results of the health checks."""

    severity: Severity
    alerts: list[Alert]
    unchecked: list[str] = Field(description="What is not looked at from here, and why.")


class SettingInForce(BaseModel):
    """The value of a setting that holds in the end."""

    value: Any
    origin: str = Field(alias="from", description="Who says so: `code`, `common` or `vo NAME`.")
    path: str | None = Field(description="Where it is written; null: in the code.")
    line: int | None = Field(description="And in which line, where that is known.")


class TaskSettings(BaseModel):
    """The settings of a class of tasks."""

    task: str = Field(description="category:ClassName.")
    vo: str | None = Field(description="For which VO; null: for all that have nothing of their own.")
    settings: dict[str, SettingInForce]
    instances: dict[str, dict[str, SettingInForce]] = Field(description="Of periodic tasks: by instance.")


class ObjectLimits(BaseModel):
    """The limits of objects that tasks lock."""

    object: str
    key: str | None = Field(description="Of this one; null: of each.")
    vo: str | None
    settings: dict[str, SettingInForce]


class EffectiveSettings(BaseModel):
    """Effective settings, as `diracx-task-run config show` has them."""

    source: str
    vos: list[str]
    problems: list[str] = Field(description="What is wrong with what is written: the last good ones hold then.")
    tasks: list[TaskSettings]
    limits: list[ObjectLimits] = Field(description="Left out where one task is asked for.")


class DeadLetterSummary(BaseModel):
    """A dead letter without its contents."""

    id: int
    task_id: str
    task_name: str
    vo: str | None
    reason: str
    detail: str
    status: DeadLetterStatus
    buried_at: datetime
    changed_at: datetime
    failed_attempts: int
    earlier_burials: int
    message_bytes: int = Field(description="Size of its message.")


class DeadLetterPage(BaseModel):
    """Some dead letters."""

    items: list[DeadLetterSummary]
    total: int
    after: int | None = _AFTER


class DeadLetterWithAttempts(BaseModel):
    """A dead letter with everything but its raw message, which may hold secrets."""

    id: int
    task_id: str
    task_name: str
    vo: str | None
    reason: str
    detail: str
    status: DeadLetterStatus
    buried_at: datetime
    changed_at: datetime
    burial: str
    attempts: list[dict[str, Any]]
    history: list[dict[str, Any]]
    arguments: dict[str, Any] | None = Field(description="Secrets masked; null when it cannot be read.")


class DeadLetterChoice(BaseModel):
    """Choice of dead letters: some by their numbers, or those that a filter lets through."""

    ids: list[Annotated[int, Field(ge=1, le=2**31 - 1)]] | None = Field(
        default=None, min_length=1, max_length=1000, description="Numbers."
    )
    all: bool = Field(default=False, description="All that the filter lets through, instead of `ids`.")
    task_name: TaskName | None = None
    reason: DeadLetterReason | None = None
    since: Moment | None = None
    before: Moment | None = None
    limit: int = Field(default=1000, ge=1, le=10_000, description="At most so many by filter.")

    def where(self, status: Any) -> DeadLetterFilter:
        """As the database takes it.

        Raises:
            NotPossibleError: neither numbers nor `all` are given, or both.
        """
        if (self.ids is None) != self.all:
            raise NotPossibleError("give either `ids`, or `all` with filters")
        return {
            "task_name": self.task_name,
            "reason": self.reason,
            "status": status,
            "since": self.since,
            "before": self.before,
        }


class Refusal(BaseModel):
    """A dead letter that was left as it is."""

    id: int
    why: str


class Decision(BaseModel):
    """Result of a decision about dead letters, by their numbers."""

    done: list[int]
    already: list[int] = Field(description="Another user had done so.")
    refused: list[Refusal]


class Purged(BaseModel):
    """Result of a purge."""

    cancelled: int


class Changed(BaseModel):
    """The schedules that were not so before."""

    changed: list[str]


class Submitted(BaseModel):
    """A task that was submitted."""

    task_id: str
