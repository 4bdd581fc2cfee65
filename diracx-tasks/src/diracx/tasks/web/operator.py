"""Audited actions of a user of dashboard or HTTP API, who names schedules and dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..operations.audited_actions import AuditedActions
from ..operations.dead_letters import Decided, dead_letter_summaries
from ..plumbing.broker.cancel import TaskPlace
from ..plumbing.exceptions import TaskArgumentsError
from ..plumbing.persistence.resubmission import Resubmitter
from ..plumbing.scheduler import schedules
from ..plumbing.scheduler.admin import AlreadyQueuedError
from ..plumbing.scheduler.occurrences import iter_schedules
from ..plumbing.submission.client import Binding
from .context import AppContext

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB
    from ..plumbing.persistence.db import DeadLetterFilter


class NotPossibleError(Exception):
    """The action is not possible; the message has the reason."""


def task_db_of(context: AppContext) -> TaskDB:
    """Return the database of dead letters; raise NotPossibleError if not configured."""
    if context.task_db is None:
        raise NotPossibleError("no database of dead letters is configured here; set DIRACX_DB_URL_TASKDB")
    return context.task_db


class Operator(AuditedActions):
    """Audited actions of a user of dashboard or HTTP API.

    Args:
        who: name of the user in the audit log.
        via: `dashboard` or `api`.
        vo: the VO of the user, whose audit log is used; None: that of administrators.
    """

    def __init__(self, context: AppContext, who: str, via: str, vo: str | None = None) -> None:
        super().__init__(context.redis, who, via, vo)
        self.context = context

    async def cancel_tasks(self, task_ids: Sequence[str]) -> dict[str, TaskPlace]:
        """Cancel tasks in any state. Returns the state in which each was found."""
        return await self.cancel(self.context.broker, task_ids)

    # --- schedules --------------------------------------------------------------------------------------

    async def pause(self, ids: Sequence[str]) -> list[str]:
        """See `AuditedActions`."""
        await self._check_known(ids)
        return await super().pause(ids)

    async def resume(self, ids: Sequence[str]) -> list[str]:
        """See `AuditedActions`; errors as of `pause`."""
        await self._check_known(ids)
        return await super().resume(ids)

    async def _check_known(self, ids: Sequence[str]) -> None:
        settings = await self.context.settings()
        states = await schedules(self.context.redis, self.context.registry, settings.tasks, settings.vos)
        if unknown := set(ids).difference(state.id for state in states):
            raise NotPossibleError(f"no schedule {min(unknown)!r}")

    async def run_schedule(self, schedule: str) -> str:
        """Submit the task of a schedule now. Returns its task id."""
        settings = await self.context.settings()
        found = {known.id: known for known in iter_schedules(self.context.registry, settings.tasks, settings.vos)}
        if schedule not in found:
            raise NotPossibleError(f"{schedule!r} cannot be run: it is in neither code nor configuration here")
        binding = Binding(self.context.broker, self.context.registry, settings.tasks)
        try:
            return await self.run_now(binding, found[schedule])
        except AlreadyQueuedError as error:
            raise NotPossibleError(str(error)) from error
        except (TaskArgumentsError, TypeError, ValueError) as error:
            raise NotPossibleError(f"{schedule} cannot be submitted: {error}") from error

    # --- dead letters -----------------------------------------------------------------------------------

    async def retry(self, numbers: Sequence[int] | None, where: DeadLetterFilter, limit: int) -> Decided:
        """Submit dead letters again, each once even if called repeatedly.

        Args:
            numbers: numbers of dead letters; None: those that match the filter.
            limit: maximum number of those that match.
        """
        db, settings = task_db_of(self.context), await self.context.settings()
        resubmitter = Resubmitter(db, self.context.broker, self.context.registry, settings.tasks)
        return await self.retry_dead_letters(resubmitter, *await _selected(db, numbers, where, limit))

    async def discard(self, numbers: Sequence[int] | None, where: DeadLetterFilter, limit: int) -> Decided:
        """Mark dead letters as discarded. Arguments and errors as of `retry`."""
        db = task_db_of(self.context)
        return await self.discard_dead_letters(db, *await _selected(db, numbers, where, limit))


async def _selected(
    db: TaskDB, numbers: Sequence[int] | None, where: DeadLetterFilter, limit: int
) -> tuple[list[dict[str, Any]], DeadLetterFilter | None]:
    """Return the dead letters, and the filter unless they are selected by number."""
    if numbers is None:
        return [dead_letter async for dead_letter in dead_letter_summaries(db, where, limit)], where
    found: list[dict[str, Any]] = []
    for number in dict.fromkeys(numbers):
        dead_letters = await db.summaries(limit=1, after_id=number - 1)
        if not dead_letters or dead_letters[0]["id"] != number:
            raise NotPossibleError(f"no dead letter {number}")
        found += dead_letters
    return found, None
