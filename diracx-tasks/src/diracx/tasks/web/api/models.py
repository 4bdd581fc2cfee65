"""Models of requests and responses that are not read models of `diracx.tasks.operations`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from ...operations.health import Alert, Severity
from ...plumbing.persistence import DeadLetterReason, DeadLetterStatus, db
from ..operator import NotPossibleError

#: Maximum number of items of a page.
MOST = 1_000
# Values of requests go into databases, keys, logs and terminals: bounded, without control characters.
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
TaskId = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_PRINTABLE)]
Name = Annotated[str, StringConstraints(max_length=255, pattern=_PRINTABLE)]
Key = Annotated[str, StringConstraints(max_length=1000, pattern=_PRINTABLE)]


def _usable(moment: datetime) -> datetime:
    # After conversion to UTC, Python and every database must be able to represent it.
    if not 1970 <= moment.year <= 9998:
        raise ValueError("the year must be between 1970 and 9998")
    return moment


Moment = Annotated[datetime, AfterValidator(_usable)]


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
    after: int | None = Field(default=None, description="Cursor of the next page; null: this is the last one.")


class DeadLetterWithAttempts(_DeadLetter):
    """A dead letter with its attempts, without its raw message, which may have secrets."""

    burial: str
    attempts: list[dict[str, Any]]
    history: list[dict[str, Any]]
    arguments: dict[str, Any] | None = Field(description="Secrets masked; null if the message cannot be decoded.")


class DeadLetterFilter(BaseModel):
    """Filter of dead letters."""

    task_name: Name | None = Field(default=None, description="category:ClassName, or ClassName alone.")
    reason: DeadLetterReason | None = Field(default=None, description="Only with this reason.")
    since: Moment | None = Field(default=None, description="Only stored since this time.")
    before: Moment | None = Field(default=None, description="Only stored before this time.")

    def where(self, status: Any) -> db.DeadLetterFilter:
        """Convert it to a filter of the database."""
        return {
            "task_name": self.task_name,
            "reason": self.reason,
            "status": status,
            "since": self.since,
            "before": self.before,
        }


class DeadLetterQuery(DeadLetterFilter):
    """Query of a page of dead letters."""

    status: DeadLetterStatus | None = Field(default=None, description="Default: open dead letters.")
    limit: int = Field(default=100, ge=1, le=MOST, description="Maximum number of items.")
    after: int = Field(default=0, ge=0, le=2**31 - 1, description="`after` of the previous page.")


class DeadLetterChoice(DeadLetterFilter):
    """Selection of dead letters by numbers or by a filter."""

    ids: list[Annotated[int, Field(ge=1, le=2**31 - 1)]] | None = Field(
        default=None, min_length=1, max_length=1000, description="Numbers of dead letters."
    )
    all: bool = Field(default=False, description="All that match the filter, instead of `ids`.")
    limit: int = Field(default=1000, ge=1, le=10_000, description="Maximum number selected by the filter.")

    def where(self, status: Any) -> db.DeadLetterFilter:
        """Convert it to a filter of the database."""
        if (self.ids is None) != self.all:
            raise NotPossibleError("give either `ids`, or `all` with filters")
        return super().where(status)


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
