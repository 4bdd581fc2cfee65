"""Which dead letters a command is about."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..plumbing.persistence.letter import OPEN, DeadLetterReason, DeadLetterStatus
from .errors import UsageProblem, shortened

if TYPE_CHECKING:
    from ..plumbing.persistence.db import LetterFilter

_AGE = re.compile(r"(\d{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class StatusFilter(StrEnum):
    """What was decided."""

    OPEN = "open"
    PENDING = "pending"
    RESUBMITTING = "resubmitting"
    RESUBMITTED = "resubmitted"
    DISCARDED = "discarded"
    ANY = "any"


TaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="Only of this task: category:ClassName, or ClassName alone."),
]
ReasonOption = Annotated[
    DeadLetterReason | None, typer.Option("--reason", case_sensitive=False, help="Only with this reason.")
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME|AGE",
        help="Buried then or later: 2030-01-31T12:00+01:00, or an age as 90m, 24h, 7d.",
    ),
]
BeforeOption = Annotated[
    str | None, typer.Option("--before", metavar="TIME|AGE", help="Buried earlier than that.")
]


def letter_filter(
    task: str | None, reason: DeadLetterReason | None, status: StatusFilter, since: str | None, before: str | None
) -> LetterFilter:
    """What was typed, as the database takes it.

    Raises:
        UsageProblem: when a time cannot be read, or the two exclude each other.
    """
    now = datetime.now(UTC)
    first, last = _moment("--since", since, now), _moment("--before", before, now)
    if first is not None and last is not None and first >= last:
        raise UsageProblem(f"--since {since} is not earlier than --before {before}: nothing lies between them")
    if task is not None and not task.strip():
        raise UsageProblem("--task is empty; give category:ClassName, or ClassName alone")
    return {
        "task_name": task,
        "reason": reason,
        "status": _STATUSES[status],
        "since": first,
        "before": last,
    }


_STATUSES: dict[StatusFilter, tuple[DeadLetterStatus, ...] | None] = {
    StatusFilter.OPEN: OPEN,
    StatusFilter.ANY: None,
    **{StatusFilter(status.value.lower()): (status,) for status in DeadLetterStatus},
}


def narrows(where: LetterFilter) -> bool:
    """Whether somebody has chosen, by more than the status."""
    return any(where.get(name) is not None for name in ("task_name", "reason", "since", "before"))


def _moment(option: str, text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        if age := _AGE.fullmatch(text.strip().lower()):
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        moment = datetime.fromisoformat(text.strip())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageProblem(
            f"{option} {shortened(text)} is neither a time nor an age; "
            "write 2030-01-31T12:00+01:00, or 90m, 24h, 7d"
        ) from error
