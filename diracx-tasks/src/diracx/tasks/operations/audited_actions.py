"""Audited actions on tasks, used by dashboard, HTTP API and command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis

from ..plumbing.broker import RedisStreamBroker, scheduling
from ..plumbing.broker.cancel import TaskPlace
from ..plumbing.persistence.dead_letter import DeadLetterStatus
from ..plumbing.persistence.resubmission import ResubmitStatus, Resubmitter
from ..plumbing.scheduler import admin
from ..plumbing.scheduler.occurrences import ScheduledTask
from ..plumbing.submission.client import Binding
from .audit import AuditLog, listed, user_at_host
from .dead_letters import Decided
from .locks import release_lock
from .models import Released
from .queued import purge

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB
    from ..plumbing.persistence.db import DeadLetterFilter

#: Dead letters that are discarded in one transaction.
_DISCARD_BATCH = 200


class AuditedActions(AuditLog):
    """Actions of one user on tasks. All raise the errors of `AuditLog.perform`, too."""

    @classmethod
    def for_command_line(cls, redis: Redis) -> AuditedActions:
        """Return the actions of the user of this process."""
        return cls(redis, user_at_host(), "cli")

    async def cancel(self, broker: RedisStreamBroker, task_ids: Sequence[str]) -> dict[str, TaskPlace]:
        """Cancel tasks in any state. Returns the state in which each was found."""

        def summary(found: dict[str, TaskPlace]) -> str:
            places = [str(place) for place in found.values()]
            return ", ".join(f"{places.count(place)} {place}" for place in dict.fromkeys(places))

        return await self.perform("cancel tasks", listed(task_ids), lambda: broker.cancel(list(task_ids)), summary)

    async def purge(self, queue: str) -> int:
        """Cancel all tasks that wait in a queue. Returns their number."""
        return await self.perform(
            "purge queue", queue, lambda: purge(self.redis, queue), "{} tasks removed".format
        )

    async def release_lock(self, key: str, owners: Sequence[str] | None = None) -> Released:
        """Take a lock from its holders; see `diracx.tasks.operations.release_lock`."""

        def summary(done: Released) -> str:
            hit = [holder.task_id or holder.owner for holder in done.hit]
            return f"{done.released} released" + (f", from {listed(hit)}" if hit else "")

        return await self.perform("release lock", key, lambda: release_lock(self.redis, key, owners), summary)

    async def pause(self, ids: Sequence[str]) -> list[str]:
        """Pause schedules. Returns those that were not paused before."""
        return await self.perform(
            "pause schedules", listed(ids), lambda: scheduling.pause(self.redis, ids, True), _changed
        )

    async def resume(self, ids: Sequence[str]) -> list[str]:
        """Resume schedules. Returns those that were paused."""
        return await self.perform(
            "resume schedules", listed(ids), lambda: scheduling.pause(self.redis, ids, False), _changed
        )

    async def run_now(self, binding: Binding, scheduled: ScheduledTask) -> str:
        """Submit the task of a schedule now. Returns its task id.

        Raises:
            AlreadyQueuedError: the last occurrence is still queued.
            TaskArgumentsError, TypeError, ValueError: the class does not accept the arguments of the instance.
        """
        return await self.perform(
            "run schedule now", scheduled.id, lambda: admin.run_now(binding, scheduled), "task {}".format
        )

    async def retry_dead_letters(
        self,
        resubmitter: Resubmitter,
        dead_letters: Sequence[Mapping[str, Any]],
        where: DeadLetterFilter | None = None,
    ) -> Decided:
        """Submit dead letters again, each once even if called repeatedly. Returns the result for each.

        Args:
            where: the filter that selected them, for the audit log; None: they were selected by number.

        Raises:
            SendTaskError: the broker does not respond; see `Resubmitter.resubmit`.
            diracx.tasks.plumbing.sql.errors.DatabaseError: the database does not respond.
        """

        async def do() -> Decided:
            results = await resubmitter.resubmit(dead_letters)
            found = {
                status: [result for result in results if result.status is status] for status in ResubmitStatus
            }
            return Decided(
                done=[result.dead_letter for result in found[ResubmitStatus.RESUBMITTED]],
                already=[result.dead_letter for result in found[ResubmitStatus.ALREADY]],
                refused=[(result.dead_letter, result.why) for result in found[ResubmitStatus.REFUSED]],
            )

        def summary(decided: Decided) -> str:
            already = f", {len(decided.already)} had been already" if decided.already else ""
            return f"{len(decided.done)} submitted again, {len(decided.refused)} refused{already}"

        return await self.perform("retry dead letters", _which(dead_letters, where), do, summary)

    async def discard_dead_letters(
        self, db: TaskDB, dead_letters: Sequence[Mapping[str, Any]], where: DeadLetterFilter | None = None
    ) -> Decided:
        """Discard dead letters. Returns the result for each. Arguments as of `retry_dead_letters`."""

        async def do() -> Decided:
            discarded: set[int] = set()
            for first in range(0, len(dead_letters), _DISCARD_BATCH):
                batch = dead_letters[first : first + _DISCARD_BATCH]
                discarded |= await db.discard([(each["id"], each["delivery_id"]) for each in batch])
            done = [each for each in dead_letters if each["id"] in discarded]
            refused = [(each, _refusal_reason(each)) for each in dead_letters if each["id"] not in discarded]
            return Decided(done=done, already=[], refused=refused)

        def summary(decided: Decided) -> str:
            return f"{len(decided.done)} discarded, {len(decided.refused)} refused"

        return await self.perform("discard dead letters", _which(dead_letters, where), do, summary)


def _refusal_reason(dead_letter: Mapping[str, Any]) -> str:
    match dead_letter["status"]:
        case DeadLetterStatus.RESUBMITTED:
            return "it was submitted again"
        case DeadLetterStatus.RESUBMITTING:
            return "its re-submission has begun; finish that with `diracx-task-run dlq retry`"
    return "its status has changed meanwhile; list it again"


def _changed(ids: Sequence[str]) -> str:
    return f"{len(ids)} changed"


def _which(dead_letters: Sequence[Mapping[str, Any]], where: DeadLetterFilter | None) -> str:
    if where is None:
        return listed([str(dead_letter["id"]) for dead_letter in dead_letters])
    filters = [f"{name} {value}" for name, value in where.items() if value is not None and name != "status"]
    return "all" + (f" with {', '.join(filters)}" if filters else "")
