"""Submission of pilots: reserve a slot, then confirm or release it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import case, delete, func, insert, literal, null, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import (
    CEDisabledError,
    NoRoomError,
    PilotSubmissionError,
    UnknownCEError,
    VONotServedError,
)
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import rules_of, serves

from .demand import DemandMixin
from .downtimes import DowntimesMixin, is_in_downtime
from .limits import check_limits, check_max_waiting
from .schema import (
    MAX_VO_CHARS,
    SELECT_CE,
    CEDowntimes,
    ComputeElements,
    PilotHistory,
    PilotRequests,
    Pilots,
    UndoneRegistrations,
    count_active_at,
)
from .session import split_batches

#: Values of a confirmed pilot; a reason for its cancellation stays.
_CONFIRMED: dict[str, Any] = {
    "missing_since": None,
    "last_error": case((Pilots.cancel_requested_at.is_(None), null()), else_=Pilots.last_error),
}


class Submission(NamedTuple):
    """State of the submission of a requested pilot."""

    pilot_id: int | None  # None: it has no slot
    is_known: bool  # confirmed by the compute element
    error: str | None  # reason of the refusal; with a slot: error of a call without a known outcome


class SubmissionsMixin(DemandMixin, DowntimesMixin):
    """Statements about submissions, with the checks of capacity and rules."""

    @transaction
    async def find_submission(self, stamp: str) -> Submission | None:
        """Find the submission of a requested pilot; None: its request has expired."""
        pilot = select(Pilots.id, Pilots.reference, Pilots.status, Pilots.last_error).where(Pilots.stamp == stamp)
        if (row := (await self.conn.execute(pilot)).one_or_none()) is not None:
            is_known = row[1] is not None or row[2] is not MyPilotStatus.SUBMITTED
            return Submission(row[0], is_known, row[3])
        request = select(PilotRequests.refusal).where(PilotRequests.stamp == stamp)
        found = (await self.conn.execute(request)).one_or_none()
        return None if found is None else Submission(None, False, found[0])

    @transaction
    async def submit_pilot(self, ce_name: str, vo: str, *, stamp: str | None = None) -> int:
        """Reserve a slot: create a SUBMITTED pilot of the VO and return its id.

        Checks capacity and rules under the lock of the compute element, so that no concurrent submission exceeds
        them.

        Args:
            stamp: unique name of the pilot, 32 hexadecimal digits; None: a new one.

        Raises:
            UnknownCEError, CEDisabledError, CEPausedError, VONotServedError, NoRoomError, SubmissionLimitError:
                nothing was created.
        """
        stamp = stamp or uuid.uuid4().hex
        now = clock.now()
        ce = await self._lock_open_ce(ce_name)
        if not serves(ce["vos"], vo) or not 0 < len(vo) <= MAX_VO_CHARS:
            raise VONotServedError(ce_name, vo)
        await check_limits(self, ce, vo)
        active = count_active_at(ce_name).scalar_subquery()
        # One statement counts and inserts, so that the count is current under any isolation level of the caller.
        reserved = await self.conn.execute(
            insert(Pilots).from_select(
                ["vo", "ce_name", "status", "stamp", "submitted_at", "last_update"],
                select(
                    literal(vo, Pilots.vo.type),
                    ComputeElements.name,
                    literal(MyPilotStatus.SUBMITTED, Pilots.status.type),
                    literal(stamp, Pilots.stamp.type),
                    literal(now, Pilots.submitted_at.type),
                    literal(now, Pilots.last_update.type),
                ).where(ComputeElements.name == ce_name, active < ComputeElements.capacity),
                include_defaults=False,
            )
        )
        if not reserved.rowcount:
            raise NoRoomError(ce_name, ce["capacity"])
        pilot_id = (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one()
        await self.conn.execute(
            insert(PilotHistory).values(pilot_id=pilot_id, status=MyPilotStatus.SUBMITTED, at=now)
        )
        return int(pilot_id)

    async def _lock_open_ce(self, ce_name: str) -> dict[str, Any]:
        if not await self.lock_ces([ce_name]):
            raise UnknownCEError(ce_name)
        now = clock.now()
        downtime = select(func.max(CEDowntimes.id)).where(is_in_downtime(ce_name, now)).scalar_subquery()
        statement = SELECT_CE.add_columns(downtime.label("downtime")).where(ComputeElements.name == ce_name)
        ce = (await self.conn.execute(statement.with_for_update())).one()
        if not ce.enabled:
            raise CEDisabledError(ce_name)
        if ce.downtime is not None:
            raise (await self.get_downtime(ce.downtime)).blocker(now)
        return dict(ce._mapping)

    @transaction
    async def submit_requested(
        self, ce_name: str, requests: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, int], dict[str, PilotSubmissionError]]:
        """Reserve slots for requested pilots, and delete their requests, in 8 statements for any number.

        Capacity and `max_waiting` are checked in the order given; the requests already comply with `share` and
        `max_per_cycle`.

        Args:
            requests: stamp and VO of each.

        Returns:
            The ids of the pilots, and the errors of the other requests, by stamp.

        Raises:
            UnknownCEError, CEDisabledError, CEPausedError: nothing was changed.
        """
        ce = await self._lock_open_ce(ce_name)
        rules, slots = rules_of(ce), await self.count_slots(ce_name)
        taken = sum(sum(states.values()) for states in slots.values())
        waiting = Counter({vo: states.get(MyPilotStatus.SUBMITTED, 0) for (_, vo), states in slots.items()})
        accepted: list[dict[str, str]] = []
        refused: dict[str, PilotSubmissionError] = {}
        for stamp, vo in requests:
            try:
                if taken + len(accepted) >= ce["capacity"]:
                    raise NoRoomError(ce_name, ce["capacity"])
                check_max_waiting(ce_name, vo, rules.of(vo), waiting[vo])
            except PilotSubmissionError as error:
                refused[stamp] = error
            else:
                waiting[vo] += 1
                accepted.append({"vo": vo, "stamp": stamp})
        ids = await self._insert_pilots(ce_name, accepted) if accepted else {}
        await self.conn.execute(
            delete(PilotRequests).where(PilotRequests.stamp.in_([stamp for stamp, _ in requests]))
        )
        return ids, refused

    async def _insert_pilots(
        self, ce_name: str, pilots: Sequence[Mapping[str, Any]], reason: str | None = None
    ) -> dict[str, int]:
        """Insert SUBMITTED pilots with their history, and return their ids by stamp."""
        status, now = MyPilotStatus.SUBMITTED, clock.now()
        common = {"ce_name": ce_name, "status": status, "submitted_at": now, "last_update": now}
        await self.conn.execute(insert(Pilots), [{**common, **each} for each in pilots])
        found = select(Pilots.stamp, Pilots.id).where(Pilots.stamp.in_([each["stamp"] for each in pilots]))
        ids = {stamp: int(id) for stamp, id in await self.conn.execute(found)}
        step = {"status": status, "at": now, "reason": reason}
        await self.conn.execute(insert(PilotHistory), [{"pilot_id": id, **step} for id in ids.values()])
        return ids

    @transaction
    async def confirm_submissions(self, references: Mapping[str, str]) -> dict[str, tuple[int, str]]:
        """Record the references of pilots that have none, by stamp.

        Returns:
            The id and the present reference of each pilot. Those whose slots were released are missing.
        """
        if not references:
            return {}
        stamp = Pilots.stamp
        new = {each: literal(reference, Pilots.reference.type) for each, reference in references.items()}
        await self.conn.execute(
            update(Pilots)
            .where(stamp.in_(references), Pilots.reference.is_(None))
            .values(reference=case(new, value=stamp), **_CONFIRMED)
        )
        found = select(stamp, Pilots.id, Pilots.reference).where(stamp.in_(references))
        return {row[0]: (int(row[1]), str(row[2])) for row in await self.conn.execute(found)}

    @transaction
    async def set_submission_errors(self, errors: Mapping[int, str]) -> None:
        """Set the last errors of pilots which may or may not have been submitted, by id."""
        if errors:
            these = await self._staged(list(errors.items()))
            unknown = (Pilots.status == MyPilotStatus.SUBMITTED, Pilots.reference.is_(None))
            await self.conn.execute(
                update(Pilots).where(self._is_staged(these), *unknown).values(last_error=these.c.reason)
            )

    @transaction
    async def confirm_pilots(self, references: Sequence[tuple[int, str]]) -> int:
        """Record the references of pilots (id, reference), and return the number of updated pilots."""
        if not references:
            return 0
        if len(references) == 1:  # a join may read and lock other pilots of a small table
            [(id, reference)] = references
            statement = update(Pilots).where(Pilots.id == id).values(reference=reference, **_CONFIRMED)
            return int((await self.conn.execute(statement)).rowcount)
        count = 0
        for batch in split_batches(references):
            these = await self._staged(batch)
            confirmed = await self.conn.execute(
                update(Pilots).where(self._is_staged(these)).values(reference=these.c.reason, **_CONFIRMED)
            )
            count += int(confirmed.rowcount)
        return count

    @transaction
    async def release_pilots(self, pilot_ids: Sequence[int]) -> int:
        """Release the slots of pilots which are SUBMITTED and not confirmed; return the number released."""
        if not pilot_ids:
            return 0
        these = await self._staged([(id, None) for id in pilot_ids])
        undone = (Pilots.status == MyPilotStatus.SUBMITTED, Pilots.reference.is_(None))
        registered = select(Pilots.registry_id, Pilots.stamp).join(these, self._is_staged(these))
        await self.conn.execute(
            insert(UndoneRegistrations).from_select(
                ["registry_id", "stamp"], registered.where(*undone, Pilots.registry_id.is_not(None))
            )
        )
        # SQLite has no DELETE with a join; MariaDB would read all pilots for a subquery.
        joins = self.conn.dialect.name != "sqlite"
        released = await self.conn.execute(
            delete(Pilots).where(self._is_staged(these) if joins else Pilots.id.in_(select(these.c.id)), *undone)
        )
        return int(released.rowcount)

    @transaction
    async def restore_pilot(self, ce_name: str, vo: str, *, stamp: str, reference: str, reason: str) -> int:
        """Restore a released pilot that the compute element accepted after all, with its cancellation requested.

        It takes a slot even beyond the capacity.

        Returns:
            The number of active pilots at the compute element.
        """
        await self.lock_ces([ce_name])
        cancelled = {"cancel_requested_at": clock.now(), "last_error": reason}
        await self._insert_pilots(
            ce_name, [{"vo": vo, "stamp": stamp, "reference": reference, **cancelled}], reason
        )
        return int((await self.conn.execute(count_active_at(ce_name))).scalar_one())
