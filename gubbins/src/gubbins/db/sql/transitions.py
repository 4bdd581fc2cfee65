"""State machine of pilots: every step is a compare-and-set in here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import and_, case, exists, func, insert, literal, not_, or_, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import IllegalTransitionError, PilotNotFoundError
from gubbins.domain.pilot_states import PREDECESSOR, MyPilotStatus

from .schema import MAX_REASON_CHARS, PilotHistory, Pilots
from .session import PilotSession, portions

# Ends before starts: a pilot named in both groups by mistake still makes one step only (P61).
_ORDER = (MyPilotStatus.DONE, MyPilotStatus.FAILED, MyPilotStatus.RUNNING)


def _entering(status: MyPilotStatus, now: datetime) -> dict[str, Any]:
    """Columns to update in a pilot that enters a state, beside its last error."""
    if status is MyPilotStatus.RUNNING:
        # `missing_since` stays: a lost pilot, too, becomes RUNNING before it fails.
        return {"status": status, "started_at": now, "last_update": now, "waiting_reason": None}
    return {"status": status, "ended_at": now, "last_update": now, "missing_since": None}


class TransitionsMixin(PilotSession):
    """Steps of pilots, one or very many at a time."""

    async def update_pilot_status(
        self, pilot_id: int, status: MyPilotStatus, *, vo: str | None = None, reason: str | None = None
    ) -> MyPilotStatus:
        """Move one pilot one step and return the state it left.

        Args:
            pilot_id: which.
            status: the state to enter.
            vo: when given, the pilot must be of this VO.
            reason: why, kept as the pilot's last error and in its history.

        Raises:
            IllegalTransitionError: there is no arrow from its present state; nothing was changed.
            PilotNotFoundError: there is no such pilot (of this VO).
        """
        status = MyPilotStatus(status)
        mine = [Pilots.id == pilot_id] if vo is None else [Pilots.id == pilot_id, Pilots.vo == vo]
        before = PREDECESSOR.get(status)
        reason = None if reason is None else reason[:MAX_REASON_CHARS]
        ce_names = [row[0] for row in await self._rows(select(Pilots.ce_name).where(*mine))]

        async def move() -> MyPilotStatus:
            now = clock.now()
            await self.lock_ces(ce_names)
            if before is not None:
                changes = _entering(status, now)
                if reason is not None:
                    changes["last_error"] = reason
                moved = await self.conn.execute(
                    update(Pilots).where(*mine, Pilots.status == before).values(**changes)
                )
                if moved.rowcount:
                    await self.conn.execute(
                        insert(PilotHistory).values(pilot_id=pilot_id, status=status, at=now, reason=reason)
                    )
                    return before
            current = (await self.conn.execute(select(Pilots.status).where(*mine))).scalar_one_or_none()
            if current is None:
                raise PilotNotFoundError(pilot_id)
            raise IllegalTransitionError(pilot_id, current, status)

        return await self.run(move)

    @transaction
    async def advance_pilots(
        self, moves: Mapping[MyPilotStatus, Collection[tuple[int, str | None]]], *, vo: str
    ) -> dict[MyPilotStatus, int]:
        """Move any number of pilots one step each, in two statements per state entered (P62).

        Args:
            moves: for each state to enter, the pilots (id, reason or None).
            vo: pilots of other VOs in `moves` are left alone (P61).

        Returns:
            The number that entered each state. A pilot that is not in the state before (another process was
            faster) is left as it is and not counted.
        """
        now = clock.now()
        counts: dict[MyPilotStatus, int] = {}
        for status in _ORDER:
            rows = [
                (id, None if reason is None else reason[:MAX_REASON_CHARS]) for id, reason in moves.get(status, ())
            ]
            if rows:
                counts[status] = 0
            for portion in portions(rows):
                counts[status] += await self._advance(portion, status, vo, now)
        return counts

    async def _advance(
        self, rows: list[tuple[int, str | None]], status: MyPilotStatus, vo: str, now: datetime
    ) -> int:
        these = await self._staged(rows)
        await self.conn.execute(
            update(Pilots)
            .where(self._are(these), Pilots.status == PREDECESSOR[status], Pilots.vo == vo)
            .values(**_entering(status, now), last_error=func.coalesce(these.c.reason, Pilots.last_error))
        )
        # Each move writes history in the same transaction. So of the staged pilots in this state, those
        # without history are the ones that the statement above has moved.
        recorded = await self.conn.execute(
            insert(PilotHistory).from_select(
                ["pilot_id", "status", "at", "reason"],
                select(
                    Pilots.id,
                    literal(status, PilotHistory.status.type),
                    literal(now, PilotHistory.at.type),
                    these.c.reason,
                )
                .join(these, self._are(these))
                .where(
                    Pilots.status == status,
                    Pilots.vo == vo,
                    ~exists().where(self._are(these, PilotHistory.pilot_id), PilotHistory.status == status),
                ),
            )
        )
        return int(recorded.rowcount)

    @transaction
    async def count_illegal_histories(self) -> int:
        """Count pilots with a history that the state machine does not allow.

        Always 0: every way into a state passes through here.
        """
        steps = {status: func.sum(case((PilotHistory.status == status, 1), else_=0)) for status in MyPilotStatus}
        legal = or_(
            *(
                and_(
                    Pilots.status == status,
                    *(count == int(step in _path_to(status)) for step, count in steps.items()),
                )
                for status in MyPilotStatus
            )
        )
        illegal = (
            select(Pilots.id)
            .outerjoin(PilotHistory, PilotHistory.pilot_id == Pilots.id)
            .group_by(Pilots.id, Pilots.status)
            .having(not_(legal))
        )
        return int((await self.conn.execute(select(func.count()).select_from(illegal.subquery()))).scalar_one())


def _path_to(status: MyPilotStatus) -> set[MyPilotStatus]:
    """The states that a pilot in this state has entered, one after the other."""
    path = {status}
    while (status := PREDECESSOR.get(status, status)) not in path:
        path.add(status)
    return path
