"""What an operator can do, by dashboard or HTTP alike: every deed is written to the audit log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import monitor
from ..monitor.audit import audited
from ..plumbing.binding import Binding
from ..plumbing.broker.cancel import TaskPlace
from ..plumbing.exceptions import TaskArgumentsError

if TYPE_CHECKING:
    from ..monitor import Released
    from ..plumbing.persistence.db import LetterFilter
    from .installation import Installation

#: Ids that an entry of the audit log names in full; of others it gives the number.
_NAMED = 20
_PAGE = 200


class NotPossibleError(Exception):
    """It cannot be done; the message says why, and what can."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What became of dead letters."""

    done: list[Mapping[str, Any]]
    """Those that were submitted again, or discarded."""
    already: list[Mapping[str, Any]] = field(default_factory=list)
    """Those for which somebody else had done so."""
    refused: list[tuple[Mapping[str, Any], str]] = field(default_factory=list)
    """The others, and why."""


class Operator:
    """Somebody who acts on an installation.

    Args:
        who: as the audit log has it.
        via: `dashboard` or `api`.
        vo: things that belong to another VO are not theirs to touch; None: all are.
    """

    def __init__(self, installation: Installation, who: str, via: str, vo: str | None = None) -> None:
        self.installation = installation
        self.who = who
        self.vo = vo
        self._via = via

    async def perform(self, action: str, target: str, do: Callable[[], Awaitable[str]]) -> str:
        """Do something, audited; extensions of the dashboard act through this, too. See `audited`."""
        return await audited(self.installation.redis, self.who, self._via, action, target, do)

    # --- tasks, queues, locks ---------------------------------------------------------------------------

    async def cancel(self, task_ids: Sequence[str]) -> dict[str, TaskPlace]:
        """Cancel tasks wherever they are. Returns where each was found."""
        found: dict[str, TaskPlace] = {}

        async def do() -> str:
            found.update(await self.installation.broker.cancel(list(task_ids)))
            places = [str(place) for place in found.values()]
            return ", ".join(f"{places.count(place)} {place}" for place in dict.fromkeys(places))

        await self.perform("cancel tasks", _named(task_ids), do)
        return found

    async def purge(self, queue: str) -> int:
        """Remove everything that waits in a queue. Returns how many tasks that were.

        Raises:
            ValueError: there is no such queue.
        """
        removed = 0

        async def do() -> str:
            nonlocal removed
            removed = await monitor.purge(self.installation.redis, queue)
            return f"{removed} tasks removed"

        await self.perform("purge queue", queue, do)
        return removed

    async def release_lock(self, key: str, owners: Sequence[str] | None = None) -> Released:
        """Take a lock away from its holders.

        Raises:
            ValueError: the key is not that of a lock.
        """
        released: list[Released] = []

        async def do() -> str:
            released.append(await monitor.release_lock(self.installation.redis, key, owners))
            hit = [holder.task_id or holder.owner for holder in released[0].hit]
            return f"{released[0].released} released" + (f", from {_named(hit)}" if hit else "")

        await self.perform("release lock", key, do)
        return released[0]

    # --- schedules --------------------------------------------------------------------------------------

    async def pause(self, ids: Sequence[str]) -> list[str]:
        """Submit no more occurrences of these. Returns those that were not paused before."""
        from ..plumbing.scheduler import by_hand

        return await self._switch("pause schedules", ids, by_hand.pause)

    async def resume(self, ids: Sequence[str]) -> list[str]:
        """Let these go on. Returns those that had been paused."""
        from ..plumbing.scheduler import by_hand

        return await self._switch("resume schedules", ids, by_hand.resume)

    async def _switch(
        self, action: str, ids: Sequence[str], switch: Callable[[Any, Sequence[str]], Awaitable[list[str]]]
    ) -> list[str]:
        await self._check_known(ids)
        changed: list[str] = []

        async def do() -> str:
            changed.extend(await switch(self.installation.redis, list(ids)))
            return f"{len(changed)} changed"

        await self.perform(action, _named(ids), do)
        return changed

    async def _check_known(self, ids: Sequence[str]) -> None:
        from ..plumbing.scheduler import schedules

        settings = await self.installation.settings()
        states = await schedules(self.installation.redis, self.installation.registry, settings.tasks, settings.vos)
        if unknown := set(ids).difference(state.id for state in states):
            raise NotPossibleError(f"there is no schedule {min(unknown)!r}")

    async def run_now(self, schedule: str) -> str:
        """Submit a schedule's task at once. Returns its task id.

        Raises:
            NotPossibleError: it is not known here, its arguments do not fit, or its last occurrence still waits.
        """
        from ..plumbing.scheduler import by_hand
        from ..plumbing.scheduler.occurrences import every_instance

        settings = await self.installation.settings()
        found = {
            known.id: known for known in every_instance(self.installation.registry, settings.tasks, settings.vos)
        }
        if schedule not in found:
            raise NotPossibleError(f"{schedule!r} cannot be run from here: code and configuration do not know it")
        binding = Binding(self.installation.broker, self.installation.registry, settings.tasks)
        task_ids: list[str] = []

        async def do() -> str:
            try:
                done = await by_hand.run_now(binding, found[schedule])
            except (TaskArgumentsError, TypeError, ValueError) as error:
                raise NotPossibleError(f"{schedule} cannot be submitted: {error}") from error
            if not done.submitted:
                raise NotPossibleError(f"the last occurrence, task {done.task_id}, still waits for a worker")
            task_ids.append(done.task_id)
            return f"task {done.task_id}"

        await self.perform("run schedule now", schedule, do)
        return task_ids[0]

    # --- dead letters -----------------------------------------------------------------------------------

    async def retry_letters(self, numbers: Sequence[int] | None, where: LetterFilter, limit: int) -> Decided:
        """Submit dead letters again, each once whoever does it.

        Args:
            numbers: which; None: those that the filter lets through.
            limit: at most so many by filter.

        Raises:
            NotPossibleError: no database of dead letters is configured.
        """
        from ..plumbing.persistence.resubmission import Fate, Resubmitter

        db = self._task_db()
        settings = await self.installation.settings()
        resubmitter = Resubmitter(db, self.installation.broker, self.installation.registry, settings.tasks)
        decided = Decided([])

        async def do() -> str:
            verdicts: list[Any] = []
            if numbers is not None:
                verdicts = await resubmitter.these(await self._letters(numbers))
            else:
                async for part in resubmitter.all(where, limit=limit):
                    verdicts += part
            for verdict in verdicts:
                if verdict.fate is Fate.RESUBMITTED:
                    decided.done.append(verdict.letter)
                elif verdict.fate is Fate.ALREADY:
                    decided.already.append(verdict.letter)
                else:
                    decided.refused.append((verdict.letter, verdict.why))
            return f"{len(decided.done)} submitted again, {len(decided.refused)} refused"

        await self.perform("retry dead letters", _which(numbers, where), do)
        return decided

    async def discard_letters(self, numbers: Sequence[int] | None, where: LetterFilter, limit: int) -> Decided:
        """Decide that dead letters will not run again. Arguments and errors as of `retry_letters`."""
        db = self._task_db()
        decided = Decided([])

        async def do() -> str:
            chosen = await (self._letters(numbers) if numbers is not None else self._search(where, limit))
            gone: set[int] = set()
            for first in range(0, len(chosen), _PAGE):
                part = chosen[first : first + _PAGE]
                async with db:
                    gone |= await db.discard([(letter["id"], letter["burial"]) for letter in part])
            for letter in chosen:
                if letter["id"] in gone:
                    decided.done.append(letter)
                else:
                    decided.refused.append((letter, "it has been decided about already"))
            return f"{len(decided.done)} discarded, {len(decided.refused)} refused"

        await self.perform("discard dead letters", _which(numbers, where), do)
        return decided

    def _task_db(self) -> Any:
        if self.installation.task_db is None:
            raise NotPossibleError("no database of dead letters is configured here; set DIRACX_DB_URL_TASKDB")
        return self.installation.task_db

    async def _letters(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        db = self._task_db()
        found: list[dict[str, Any]] = []
        async with db:
            for number in dict.fromkeys(numbers):
                letters = await db.search(status=None, limit=1, after_id=number - 1)
                if not letters or letters[0]["id"] != number:
                    raise NotPossibleError(f"there is no dead letter {number}")
                found += letters
        return found

    async def _search(self, where: LetterFilter, limit: int) -> list[dict[str, Any]]:
        db = self._task_db()
        found: list[dict[str, Any]] = []
        after_id = 0
        while len(found) < limit:
            async with db:
                page = await db.search(**where, limit=min(_PAGE, limit - len(found)), after_id=after_id)
            if not page:
                break
            after_id = page[-1]["id"]
            found += [letter | {"message": b"", "attempts": [], "history": []} for letter in page]
        return found


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:_NAMED])
    return shown if len(ids) <= _NAMED else f"{shown} and {len(ids) - _NAMED} more"


def _which(numbers: Sequence[int] | None, where: LetterFilter) -> str:
    if numbers is not None:
        return _named([str(number) for number in numbers])
    said = [f"{name} {value}" for name, value in where.items() if value is not None and name != "status"]
    return "all" + (f" with {', '.join(said)}" if said else "")
