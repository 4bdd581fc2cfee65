"""Options that select dead letters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...operations.dead_letters import STATUSES
from ...plumbing.persistence.dead_letter import DeadLetterReason
from ..errors import UsageProblem, shortened
from ..options import YesOption

if TYPE_CHECKING:
    from ...plumbing.persistence.db import DeadLetterFilter

_AGE = re.compile(r"(\d{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


Status = Literal["open", "pending", "resubmitting", "resubmitted", "discarded", "any"]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Maximum number of dead letters.")]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Options that filter dead letters."""

    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Only of this task: category:ClassName, or ClassName alone."),
    ] = None
    reason: Annotated[
        DeadLetterReason | None, typer.Option("--reason", case_sensitive=False, help="Only with this reason.")
    ] = None
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME|AGE",
            help="Only stored since a time, as 2030-01-31T12:00+01:00, or an age, as 90m, 24h, 7d.",
        ),
    ] = None
    before: Annotated[
        str | None, typer.Option("--before", metavar="TIME|AGE", help="Only stored before a time or an age.")
    ] = None

    def dead_letters(self, status: Status) -> DeadLetterFilter:
        """Convert the options to a filter of the database."""
        now = datetime.now(UTC)
        first, last = _moment("--since", self.since, now), _moment("--before", self.before, now)
        if first is not None and last is not None and first >= last:
            raise UsageProblem(
                f"--since {self.since} is not earlier than --before {self.before}: no dead letter can match"
            )
        if self.task is not None and not self.task.strip():
            raise UsageProblem("--task is empty; give category:ClassName, or ClassName alone")
        return {
            "task_name": self.task,
            "reason": self.reason,
            "status": STATUSES[status],
            "since": first,
            "before": last,
        }

    @property
    def narrow(self) -> bool:
        """True if a filter was given."""
        return any(value is not None for value in (self.task, self.reason, self.since, self.before))


@dataclass(frozen=True, kw_only=True)
class Choice(Filters):
    """Options that select dead letters by ids or filters, and confirm the action."""

    dead_letter_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Task ids, or numbers in the list; or filters.")
    ] = None
    limit: LimitOption = None
    everything: Annotated[bool, typer.Option("--all", help="All open dead letters that match the filters.")] = (
        False
    )
    yes: YesOption = False

    def dead_letters(self, status: Status) -> DeadLetterFilter:
        """Convert the options to a filter, after checking that ids or filters are given."""
        where = super().dead_letters(status)
        by_filter = self.everything or self.narrow
        if self.dead_letter_ids and (by_filter or self.limit is not None):
            raise UsageProblem("ids and filters exclude each other; give one or the other")
        if not self.dead_letter_ids and not by_filter:
            raise UsageProblem(
                "no dead letters selected; give ids, a filter (--task, --reason, --since, --before), or --all"
            )
        return where

    @property
    def ids(self) -> list[str]:
        """The ids without duplicates; empty when filters select."""
        return list(dict.fromkeys(self.dead_letter_ids or ()))


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
