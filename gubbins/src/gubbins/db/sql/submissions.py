"""Submission of pilots: a slot is reserved, then confirmed, or released again."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import Row, case, delete, func, insert, literal, null, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import (
    CEDisabledError,
    NoRoomError,
    PilotSubmissionError,
    UnknownCEError,
    VONotServedError,
)
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.domain.rules import rules_of, serves

from .limits import check_limits, check_waiting, pilots_at
from .schema import (
    MAX_REASON_CHARS,
    MAX_VO_CHARS,
    SELECT_CE,
    ComputeElements,
    PilotHistory,
    PilotRequests,
    Pilots,
    UndoneRegistrations,
)
from .session import PilotSession, portions

#: What is known now that was not; why it is cancelled stays.
_CONFIRMED: dict[str, Any] = {
    "missing_since": None,
    "last_error": case((Pilots.cancel_requested_at.is_(None), null()), else_=Pilots.last_error),
}


class Submission(NamedTuple):
    """State of the submission of a requested pilot."""

    pilot_id: int | None  # None: it has no slot
    is_known: bool  # the compute element has confirmed it
    error: str | None  # why it was refused; or, with a slot, why nobody knows


class SubmissionsMixin(PilotSession):
    """Statements about submissions, with the capacity gate."""

    @transaction
    async def find_pilot(self, stamp: str) -> int | None:
        """The id of the pilot with this stamp; None: there is none."""
        return (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one_or_none()

    @transaction
    async def find_submission(self, stamp: str) -> Submission | None:
        """Find the submission of a requested pilot; None: its request has expired."""
        pilot = select(Pilots.id, Pilots.reference, Pilots.status, Pilots.last_error).where(Pilots.stamp == stamp)
        if (row := (await self.conn.execute(pilot)).one_or_none()) is not None:
            is_known = row[1] is not None or row[2] is not MyPilotStatus.SUBMITTED
            return Submission(row[0], is_known, row[3])
        request = select(PilotRequests.refusal).where(PilotRequests.stamp == stamp)
        asked = (await self.conn.execute(request)).one_or_none()
        return None if asked is None else Submission(None, False, asked[0])

    @transaction
    async def submit_pilot(self, ce_name: str, vo: str, *, stamp: str | None = None) -> int:
        """Reserve a slot: create a SUBMITTED pilot of the VO and return its id.

        This is the gate of capacity and rules. The row of the compute element is locked first, so all
        submissions to one compute element pass here one after the other, and none counts too few (P60).

        Args:
            ce_name: where.
            vo: whose.
            stamp: our unique name for it, 32 hexadecimal digits; None: a new one.

        Raises:
            UnknownCEError, CEDisabledError, VONotServedError, NoRoomError, SubmissionLimitError: as they say;
                nothing was created.
        """
        stamp = stamp or uuid.uuid4().hex
        now = clock.now()
        ce = await self._lock_open_ce(ce_name)
        # SQLite stores names of any length.
        if not serves(ce["vos"], vo) or not 0 < len(vo) <= MAX_VO_CHARS:
            raise VONotServedError(ce_name, vo)
        await check_limits(self.conn, ce, vo)
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
            raise NoRoomError(ce_name, ce["capacity"])
        pilot_id = (await self.conn.execute(select(Pilots.id).where(Pilots.stamp == stamp))).scalar_one()
        await self.conn.execute(
            insert(PilotHistory).values(pilot_id=pilot_id, status=MyPilotStatus.SUBMITTED, at=now)
        )
        return int(pilot_id)

    async def _lock_open_ce(self, ce_name: str) -> dict[str, Any]:
        if not await self.lock_ces([ce_name]):
            raise UnknownCEError(ce_name)
        ce = (await self.conn.execute(SELECT_CE.where(ComputeElements.name == ce_name).with_for_update())).one()
        if not ce.enabled:
            raise CEDisabledError(ce_name)
        return dict(ce._mapping)

    @transaction
    async def submit_requested(
        self, ce_name: str, requests: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, int], dict[str, PilotSubmissionError]]:
        """Reserve slots for requested pilots, and delete their requests: 8 statements for any number of them.

        The round that has requested them has dealt out the slots by `share` and `max_per_cycle`: what is granted
        is not dealt out again. Capacity and `max_waiting` are checked for one after the other, as given.

        Args:
            ce_name: where.
            requests: stamp and VO of each.

        Returns:
            The ids of the pilots by stamp, and for the other stamps why there is none.

        Raises:
            UnknownCEError, CEDisabledError: as they say; nothing was changed.
        """
        ce, now = await self._lock_open_ce(ce_name), clock.now()
        rules, held = rules_of(ce), Counter(await pilots_at(self.conn, ce_name))
        accepted, refused = [], {}
        for stamp, vo in requests:
            try:
                if held.total() >= ce["capacity"]:
                    raise NoRoomError(ce_name, ce["capacity"])
                check_waiting(ce_name, vo, rules.of(vo), held[vo, MyPilotStatus.SUBMITTED])
            except PilotSubmissionError as error:
                refused[stamp] = error
            else:
                held[vo, MyPilotStatus.SUBMITTED] += 1
                accepted.append({"vo": vo, "stamp": stamp})
        ids: dict[str, int] = {}
        if accepted:
            all_have = {
                "ce_name": ce_name,
                "status": MyPilotStatus.SUBMITTED,
                "submitted_at": now,
                "last_update": now,
            }
            await self.conn.execute(insert(Pilots), [{**all_have, **each} for each in accepted])
            stamps = [each["stamp"] for each in accepted]
            ids = {row.stamp: row.id for row in await self._submitted(stamps)}
            step = {"status": MyPilotStatus.SUBMITTED, "at": now}
            await self.conn.execute(insert(PilotHistory), [{"pilot_id": id, **step} for id in ids.values()])
        await self.conn.execute(
            delete(PilotRequests).where(PilotRequests.stamp.in_([stamp for stamp, _ in requests]))
        )
        return ids, refused

    async def _submitted(self, stamps: Sequence[str]) -> Sequence[Row[Any]]:
        columns = (Pilots.id.label("id"), Pilots.stamp.label("stamp"), Pilots.reference.label("reference"))
        return list(await self.conn.execute(select(*columns).where(Pilots.stamp.in_(stamps))))

    @transaction
    async def confirm_submissions(self, references: Mapping[int, tuple[str, str]]) -> set[str]:
        """Record the references of pilots, given as id → (stamp, reference), that have none.

        Returns:
            The stamps of those that have the reference given. Of others a check has undone the reservation, or
            noted another reference.
        """
        if not references:
            return set()
        wanted = dict(references.values())
        these = await self._staged([(id, reference) for id, (_, reference) in references.items()])
        # Where the reservation was undone, the id may be another pilot's.
        own = (Pilots.stamp.in_(wanted), Pilots.reference.is_(None))
        await self.conn.execute(
            update(Pilots).where(self._are(these), *own).values(reference=these.c.reason, missing_since=None)
        )
        return {row.stamp for row in await self._submitted(list(wanted)) if row.reference == wanted[row.stamp]}

    @transaction
    async def note_unconfirmed(self, errors: Mapping[int, str]) -> None:
        """Note why it is not known whether these reserved pilots were submitted: the checks will find out."""
        if errors:
            these = await self._staged(list(errors.items()))
            unknown = (Pilots.status == MyPilotStatus.SUBMITTED, Pilots.reference.is_(None))
            await self.conn.execute(
                update(Pilots).where(self._are(these), *unknown).values(last_error=these.c.reason)
            )

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
            one = update(Pilots).where(Pilots.id == id).values(reference=name, **_CONFIRMED)
            return int((await self.conn.execute(one)).rowcount)
        count = 0
        for portion in portions(references):
            these = await self._staged(portion)
            confirmed = await self.conn.execute(
                update(Pilots).where(self._are(these)).values(reference=these.c.reason, **_CONFIRMED)
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
        undone = (Pilots.status == MyPilotStatus.SUBMITTED, Pilots.reference.is_(None))
        registered = select(Pilots.registry_id, Pilots.stamp).join(these, self._are(these))
        await self.conn.execute(
            insert(UndoneRegistrations).from_select(
                ["registry_id", "stamp"], registered.where(*undone, Pilots.registry_id.is_not(None))
            )
        )
        # SQLite cannot delete what is joined; MariaDB reads all pilots to delete those of a subquery.
        joins = self.conn.dialect.name != "sqlite"
        released = await self.conn.execute(
            delete(Pilots).where(self._are(these) if joins else Pilots.id.in_(select(these.c.id)), *undone)
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
