"""Models of requests and responses that are not read models of `diracx.tasks.operations`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from ...operations import DelayedTask, Failure, Lock, QueuedTask, RunningTask, WaitingDeadLetter
from ...operations.health import Alert, Severity
from ...plumbing.persistence import DeadLetterReason, DeadLetterStatus
from ...plumbing.persistence.db import DeadLetterFilter
from ..operator import NotPossibleError

# Values of requests go into databases, keys, logs and terminals: bounded, without control characters.
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
TaskId = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_PRINTABLE)]
TaskName = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]
VOName = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]
ScheduleId = Annotated[str, StringConstraints(max_length=1000, pattern=_PRINTABLE)]
LockKey = Annotated[str, StringConstraints(max_length=1000, pattern=_PRINTABLE)]
Owner = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]


def _usable(moment: datetime) -> datetime:
    # After conversion to UTC, Python and every database must be able to represent it.
    if not 1970 <= moment.year <= 9998:
        raise ValueError("the year must be between 1970 and 9998")
    return moment


Moment = Annotated[datetime, AfterValidator(_usable)]

_Item = TypeVar("_Item")
_AFTER = Field(default=None, description="Cursor of the next page; null: this is the last one.")


class _Page(BaseModel, Generic[_Item]):
    items: list[_Item]
    after: str | None = _AFTER


class QueuedTaskPage(_Page[QueuedTask]):
    """A page of queued tasks."""


class WaitingDeadLetterPage(_Page[WaitingDeadLetter]):
    """A page of dead letters in Redis."""


class RunningTaskPage(_Page[RunningTask]):
    """A page of running tasks."""


class DelayedTaskPage(_Page[DelayedTask]):
    """A page of delayed tasks."""


class FailurePage(_Page[Failure]):
    """A page of failed attempts."""


class LockPage(_Page[Lock]):
    """A page of locks."""


class ConfigurationInForce(BaseModel):
    """Active configuration of one process."""

    role: str
    source: str
    digest: str = Field(description="Equal for equal settings.")
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
    unchecked: list[str] = Field(description="Checks that are not configured, with the reason.")


class SettingInForce(BaseModel):
    """Resolved value of a setting."""

    value: Any
    origin: str = Field(alias="from", description="Source: `code`, `common` or `vo NAME`.")
    path: str | None = Field(description="Path in the configuration; null: set in the code.")
    line: int | None = Field(description="Line in the configuration, if known.")


class TaskSettings(BaseModel):
    """Settings of a task class."""

    task: str = Field(description="category:ClassName.")
    vo: str | None = Field(description="The VO; null: all VOs without their own settings.")
    settings: dict[str, SettingInForce]
    instances: dict[str, dict[str, SettingInForce]] = Field(description="Settings of a periodic task by instance.")


class ObjectLimits(BaseModel):
    """Limits of objects that tasks lock."""

    object: str
    key: str | None = Field(description="Key of the object; null: default for all keys.")
    vo: str | None
    settings: dict[str, SettingInForce]


class EffectiveSettings(BaseModel):
    """Resolved settings, as of `diracx-task-run config show`."""

    source: str
    vos: list[str]
    problems: list[str] = Field(description="Mistakes in the configuration; the last valid one is in force then.")
    tasks: list[TaskSettings]
    limits: list[ObjectLimits] = Field(description="Empty if one task was requested.")


class _DeadLetter(BaseModel):
    id: int
    task_id: str
    task_name: str
    vo: str | None
    reason: str
    detail: str
    status: DeadLetterStatus
    buried_at: datetime
    changed_at: datetime


class DeadLetterSummary(_DeadLetter):
    """A dead letter without message and tracebacks."""

    failed_attempts: int
    earlier_burials: int
    message_bytes: int = Field(description="Size of its message.")


class DeadLetterPage(BaseModel):
    """A page of dead letters."""

    items: list[DeadLetterSummary]
    total: int
    after: int | None = _AFTER


class DeadLetterWithAttempts(_DeadLetter):
    """A dead letter with its attempts, without its raw message, which may have secrets."""

    burial: str
    attempts: list[dict[str, Any]]
    history: list[dict[str, Any]]
    arguments: dict[str, Any] | None = Field(description="Secrets masked; null if the message cannot be decoded.")


class DeadLetterChoice(BaseModel):
    """Selection of dead letters by numbers or by a filter."""

    ids: list[Annotated[int, Field(ge=1, le=2**31 - 1)]] | None = Field(
        default=None, min_length=1, max_length=1000, description="Numbers of dead letters."
    )
    all: bool = Field(default=False, description="All that match the filter, instead of `ids`.")
    task_name: TaskName | None = None
    reason: DeadLetterReason | None = None
    since: Moment | None = None
    before: Moment | None = None
    limit: int = Field(default=1000, ge=1, le=10_000, description="Maximum number selected by the filter.")

    def where(self, status: Any) -> DeadLetterFilter:
        """Convert it to a filter of the database."""
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
    """A dead letter that was not changed, and the reason."""

    id: int
    why: str


class Decision(BaseModel):
    """Result of retrying or discarding dead letters, by their numbers."""

    done: list[int]
    already: list[int] = Field(description="Dead letters that were submitted again before.")
    refused: list[Refusal]


class Purged(BaseModel):
    """Result of a purge."""

    cancelled: int


class Changed(BaseModel):
    """The schedules whose state has changed."""

    changed: list[str]


class Submitted(BaseModel):
    """A task that was submitted."""

    task_id: str
