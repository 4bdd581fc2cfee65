"""State transitions of pilots, each a compare-and-set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import and_, case, exists, func, insert, literal, not_, or_, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import IllegalTransitionError, PilotNotFoundError
from gubbins.domain.pilot_states import PREDECESSOR, MyPilotStatus

from .schema import PilotHistory, Pilots, if_given
from .session import PilotSession, split_batches

# Final states first: a pilot given for both still makes one step only.
_ORDER = (MyPilotStatus.DONE, MyPilotStatus.FAILED, MyPilotStatus.RUNNING)


def _entering(status: MyPilotStatus, now: datetime) -> dict[str, Any]:
    """Columns to update in a pilot that enters a state, without its last error."""
    if status is MyPilotStatus.RUNNING:
        # `missing_since` stays, for a lost pilot becomes RUNNING before it fails.
        return {"status": status, "started_at": now, "last_update": now, "waiting_reason": None}
    return {"status": status, "ended_at": now, "last_update": now, "missing_since": None, "waiting_reason": None}


class TransitionsMixin(PilotSession):
    """State transitions of one or many pilots."""

    async def update_pilot_status(
        self, pilot_id: int, status: MyPilotStatus, *, vo: str | None = None, reason: str | None = None
    ) -> MyPilotStatus:
        """Move a pilot (of the VO, if given) to a state, and return the previous one.

        The reason becomes its last error and is kept in its history.

        Raises:
            IllegalTransitionError: the state cannot be entered from the current one; nothing was changed.
            PilotNotFoundError: there is no such pilot (of this VO).
        """
        status = MyPilotStatus(status)
        where = (Pilots.id == pilot_id, *if_given(Pilots.vo, vo))
        before = PREDECESSOR.get(status)
        ce_names = [row[0] for row in await self._rows(select(Pilots.ce_name).where(*where))]

        async def move() -> MyPilotStatus:
            now = clock.now()
            await self.lock_ces(ce_names)
            if before is not None:
                changes = _entering(status, now)
                if reason is not None:
                    changes["last_error"] = reason
                moved = await self.conn.execute(
                    update(Pilots).where(*where, Pilots.status == before).values(**changes)
                )
                if moved.rowcount:
                    await self.conn.execute(
                        insert(PilotHistory).values(pilot_id=pilot_id, status=status, at=now, reason=reason)
                    )
                    return before
            current = (await self.conn.execute(select(Pilots.status).where(*where))).scalar_one_or_none()
            if current is None:
                raise PilotNotFoundError(pilot_id)
            raise IllegalTransitionError(pilot_id, current, status)

        return await self.run(move)

    @transaction
    async def advance_pilots(
        self, moves: Mapping[MyPilotStatus, Collection[tuple[int, str | None]]], *, vo: str
    ) -> dict[MyPilotStatus, int]:
        """Move any number of pilots of the VO one step each, in two statements per state.

        Pilots of other VOs, and those that are not in the previous state, do not change.

        Args:
            moves: {state to enter: [(pilot id, reason or None)]}.

        Returns:
            The number of pilots that entered each state.
        """
        now = clock.now()
        counts: dict[MyPilotStatus, int] = {}
        for status in _ORDER:
            for batch in split_batches(moves.get(status, ())):
                counts[status] = counts.get(status, 0) + await self._advance(batch, status, vo, now)
        return counts

    async def _advance(
        self, rows: list[tuple[int, str | None]], status: MyPilotStatus, vo: str, now: datetime
    ) -> int:
        these = await self._staged(rows)
        await self.conn.execute(
            update(Pilots)
            .where(self._is_staged(these), Pilots.status == PREDECESSOR[status], Pilots.vo == vo)
            .values(**_entering(status, now), last_error=func.coalesce(these.c.reason, Pilots.last_error))
        )
        # History is written in the same transaction: staged pilots in this state without history were moved above.
        recorded = await self.conn.execute(
            insert(PilotHistory).from_select(
                ["pilot_id", "status", "at", "reason"],
                select(
                    Pilots.id,
                    literal(status, PilotHistory.status.type),
                    literal(now, PilotHistory.at.type),
                    these.c.reason,
                )
                .join(these, self._is_staged(these))
                .where(
                    Pilots.status == status,
                    Pilots.vo == vo,
                    ~exists().where(self._is_staged(these, PilotHistory.pilot_id), PilotHistory.status == status),
                ),
            )
        )
        return int(recorded.rowcount)

    @transaction
    async def count_illegal_histories(self) -> int:
        """Count pilots whose history violates the state machine; 0 unless there is a bug."""
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
    """All states that a pilot in this state has entered."""
    path = {status}
    while (status := PREDECESSOR.get(status, status)) not in path:
        path.add(status)
    return path
