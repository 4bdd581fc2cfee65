"""Actions of an operator, for dashboard and HTTP alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..operations.audited_actions import AlreadyQueuedError, AuditedActions
from ..operations.dead_letters import Decided, dead_letter_summaries
from ..plumbing.broker.cancel import TaskPlace
from ..plumbing.exceptions import TaskArgumentsError
from ..plumbing.persistence.resubmission import Resubmitter
from ..plumbing.scheduler import schedules
from ..plumbing.scheduler.occurrences import iter_schedules
from ..plumbing.submission.client import Binding
from .context import AppContext

if TYPE_CHECKING:
    from ..plumbing.persistence.db import DeadLetterFilter


class NotPossibleError(Exception):
    """It cannot be done; the message says why, and what can."""


class Operator(AuditedActions):
    """A user who acts on the task system, as far as the role allows.

    Args:
        who: as the audit log has it.
        via: `dashboard` or `api`.
        vo: things that belong to another VO are not theirs to touch, and this VO's audit log has what is done;
            None: all are.
    """

    def __init__(self, context: AppContext, who: str, via: str, vo: str | None = None) -> None:
        super().__init__(context.redis, who, via, vo)
        self.context = context

    async def cancel_tasks(self, task_ids: Sequence[str]) -> dict[str, TaskPlace]:
        """Cancel tasks wherever they are. Returns where each was found."""
        return await self.cancel(self.context.broker, task_ids)

    # --- schedules --------------------------------------------------------------------------------------

    async def pause(self, ids: Sequence[str]) -> list[str]:
        """See `AuditedActions`.

        Raises:
            NotPossibleError: there is none of that id.
        """
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
            raise NotPossibleError(f"there is no schedule {min(unknown)!r}")

    async def run_schedule(self, schedule: str) -> str:
        """Submit a schedule's task at once. Returns its task id.

        Raises:
            NotPossibleError: it is not known here, its arguments do not fit, or its last occurrence still waits.
        """
        settings = await self.context.settings()
        found = {known.id: known for known in iter_schedules(self.context.registry, settings.tasks, settings.vos)}
        if schedule not in found:
            raise NotPossibleError(f"{schedule!r} cannot be run from here: code and configuration do not know it")
        binding = Binding(self.context.broker, self.context.registry, settings.tasks)
        try:
            return await self.run_now(binding, found[schedule])
        except AlreadyQueuedError as error:
            raise NotPossibleError(str(error)) from error
        except (TaskArgumentsError, TypeError, ValueError) as error:
            raise NotPossibleError(f"{schedule} cannot be submitted: {error}") from error

    # --- dead letters -----------------------------------------------------------------------------------

    async def retry(self, numbers: Sequence[int] | None, where: DeadLetterFilter, limit: int) -> Decided:
        """Submit dead letters again, each once however often it is asked for.

        Args:
            numbers: which; None: those that the filter lets through.
            limit: at most so many by filter.

        Raises:
            NotPossibleError: no database of dead letters is configured.
        """
        db = self._task_db()
        settings = await self.context.settings()
        resubmitter = Resubmitter(db, self.context.broker, self.context.registry, settings.tasks)
        dead_letters = None if numbers is None else await self._letters(numbers)
        return await self.retry_dead_letters(resubmitter, dead_letters, where, limit)

    async def discard(self, numbers: Sequence[int] | None, where: DeadLetterFilter, limit: int) -> Decided:
        """Decide that dead letters will not run again. Arguments and errors as of `retry`."""
        db = self._task_db()
        if numbers is not None:
            chosen = await self._letters(numbers)
        else:
            chosen = [dead_letter async for dead_letter in dead_letter_summaries(db, where, limit)]
        return await self.discard_dead_letters(db, chosen, None if numbers is not None else where)

    def _task_db(self) -> Any:
        if self.context.task_db is None:
            raise NotPossibleError("no database of dead letters is configured here; set DIRACX_DB_URL_TASKDB")
        return self.context.task_db

    async def _letters(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        db = self._task_db()
        found: list[dict[str, Any]] = []
        for number in dict.fromkeys(numbers):
            dead_letters = await db.summaries(limit=1, after_id=number - 1)
            if not dead_letters or dead_letters[0]["id"] != number:
                raise NotPossibleError(f"there is no dead letter {number}")
            found += dead_letters
        return found
