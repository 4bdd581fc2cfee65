"""Submission of pilots: a slot is reserved, then confirmed, or released again."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import delete, func, insert, literal, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import CEDisabledError, NoRoomError, UnknownCEError, VONotServedError
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.domain.rules import serves

from .limits import check_limits
from .schema import MAX_REASON_CHARS, MAX_VO_CHARS, SELECT_CE, ComputeElements, PilotHistory, Pilots
from .session import PilotSession, portions


class SubmissionsMixin(PilotSession):
    """Statements about submissions, with the capacity gate."""

    @transaction
    async def find_pilot(self, stamp: str) -> int | None:
        """The id of the pilot with this stamp; None: there is none."""
        return (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one_or_none()

    @transaction
    async def submit_pilot(self, ce_name: str, vo: str, *, stamp: str | None = None, granted: bool = False) -> int:
        """Reserve a slot: create a SUBMITTED pilot of the VO and return its id.

        This is the gate of capacity and rules. The row of the compute element is locked first, so all
        submissions to one compute element pass here one after the other, and none counts too few (P60).

        Args:
            ce_name: where.
            vo: whose.
            stamp: our unique name for it, 32 hexadecimal digits; None: a new one.
            granted: a round has requested it, and its request was deleted in this transaction.

        Raises:
            UnknownCEError, CEDisabledError, VONotServedError, NoRoomError, SubmissionLimitError: as they say;
                nothing was created.
        """
        stamp = stamp or uuid.uuid4().hex
        now = clock.now()
        if not await self.lock_ces([ce_name]):
            raise UnknownCEError(ce_name)
        ce = (await self.conn.execute(SELECT_CE.where(ComputeElements.name == ce_name).with_for_update())).one()
        if not ce.enabled:
            raise CEDisabledError(ce_name)
        # SQLite stores names of any length.
        if not serves(ce.vos, vo) or not 0 < len(vo) <= MAX_VO_CHARS:
            raise VONotServedError(ce_name, vo)
        await check_limits(self.conn, dict(ce._mapping), vo, granted=granted)
        taken = (
            select(func.count())
            .select_from(Pilots)
            .where(Pilots.ce_name == ce_name, Pilots.status.in_(ACTIVE))
            .scalar_subquery()
        )
        # Counting and inserting in one statement, although the lock is held: the count is then never
        # older than the insert, under any isolation level of a transaction the caller has opened.
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
                ).where(ComputeElements.name == ce_name, taken < ComputeElements.capacity),
                include_defaults=False,
            )
        )
        if not reserved.rowcount:
            raise NoRoomError(ce_name, ce.capacity)
        pilot_id = (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one()
        await self.conn.execute(
            insert(PilotHistory).values(pilot_id=pilot_id, status=MyPilotStatus.SUBMITTED, at=now)
        )
        return int(pilot_id)

    @transaction
    async def confirm_submission(self, pilot_id: int, stamp: str, reference: str) -> tuple[int, str] | None:
        """Record the compute element's reference of the pilot with this stamp, unless it has one.

        Args:
            pilot_id: its id when its slot was reserved; since that was undone, the id may be another pilot's.
            stamp: our name for it.
            reference: the compute element's.

        Returns:
            Its id, and the reference it has now; None: there is no such pilot.
        """
        noting = (
            update(Pilots)
            .where(Pilots.stamp == stamp, Pilots.reference.is_(None))
            .values(reference=reference, missing_since=None)
        )
        if (await self.conn.execute(noting.where(Pilots.id == pilot_id))).rowcount:
            return pilot_id, reference
        await self.conn.execute(noting)
        found = select(Pilots.id, Pilots.reference).where(Pilots.stamp == stamp)
        row = (await self.conn.execute(found)).one_or_none()
        return None if row is None else (row[0], str(row[1]))

    @transaction
    async def confirm_pilots(self, references: Sequence[tuple[int, str]]) -> int:
        """Record the references of pilots (id, reference), and return the number of pilots found."""
        if not references:
            return 0
        if len(references) == 1:  # a join may read, and lock, other pilots of a small table
            [(id, name)] = references
            one = update(Pilots).where(Pilots.id == id).values(reference=name, missing_since=None)
            return int((await self.conn.execute(one)).rowcount)
        count = 0
        for portion in portions(references):
            these = await self._staged(portion)
            confirmed = await self.conn.execute(
                update(Pilots).where(self._are(these)).values(reference=these.c.reason, missing_since=None)
            )
            count += int(confirmed.rowcount)
        return count

    @transaction
    async def release_pilots(self, pilot_ids: Sequence[int]) -> int:
        """Undo reservations that never became pilots; return the number undone.

        Only SUBMITTED pilots whose submission was not confirmed: a pilot that existed is never forgotten.
        """
        if not pilot_ids:
            return 0
        these = await self._staged([(id, None) for id in pilot_ids])
        # SQLite cannot delete what is joined; MariaDB reads all pilots to delete those of a subquery.
        joins = self.conn.dialect.name != "sqlite"
        released = await self.conn.execute(
            delete(Pilots).where(
                self._are(these) if joins else Pilots.id.in_(select(these.c.id)),
                Pilots.status == MyPilotStatus.SUBMITTED,
                Pilots.reference.is_(None),
            )
        )
        return int(released.rowcount)

    @transaction
    async def restore_pilot(self, ce_name: str, vo: str, *, stamp: str, reference: str, reason: str) -> int:
        """Restore a pilot whose reservation was undone but that the compute element accepted, to be cancelled.

        It is SUBMITTED, with its cancellation requested. It holds a slot, for it is there: this is the one way
        past the capacity gate.

        Args:
            ce_name: where it is.
            vo: whose it is.
            stamp: our name for it; no other pilot has it.
            reference: the compute element's name for it.
            reason: why, for people.

        Returns:
            How many slots are taken now.
        """
        now = clock.now()
        reason = reason[:MAX_REASON_CHARS]
        await self.lock_ces([ce_name])
        await self.conn.execute(
            insert(Pilots).values(
                vo=vo,
                ce_name=ce_name,
                status=MyPilotStatus.SUBMITTED,
                stamp=stamp,
                reference=reference,
                submitted_at=now,
                last_update=now,
                cancel_requested_at=now,
                last_error=reason,
            )
        )
        pilot_id = (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one()
        await self.conn.execute(
            insert(PilotHistory).values(pilot_id=pilot_id, status=MyPilotStatus.SUBMITTED, at=now, reason=reason)
        )
        taken = select(func.count()).where(Pilots.ce_name == ce_name, Pilots.status.in_(ACTIVE))
        return int((await self.conn.execute(taken)).scalar_one())
