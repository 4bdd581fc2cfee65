"""Pilots: find, count, cancel, delete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import ColumnElement, Row, delete, func, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import PilotNotFoundError
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus

from .identities import is_stale
from .schema import MAX_REASON_CHARS, PilotHistory, PilotIdentities, Pilots, columns_of
from .session import PilotSession, portions

_ID = Pilots.id.label("pilot_id")
_REPORTED = (
    "host",
    "cores",
    "memory_mb",
    "heartbeat_at",
    "stale_at",
    "outcome",
    "exit_code",
    "jobs_done",
    "detail",
)
_SELECT = select(
    _ID,
    *(column for column in columns_of(Pilots) if column.name != "id"),
    *columns_of(PilotIdentities, *_REPORTED, "exchanged_at", "exchanged_from"),
).outerjoin(PilotIdentities, PilotIdentities.pilot_id == Pilots.id)
_CHECK_COLUMNS = (
    _ID,
    *columns_of(Pilots, "ce_name", "status", "stamp", "reference", "submitted_at", "started_at", "missing_since"),
    *columns_of(Pilots, "cancel_requested_at", "last_error", "waiting_reason"),
)


def _as_dict(row: Row[Any]) -> dict[str, Any]:
    pilot = dict(row._mapping)
    return {**pilot, "stale": is_stale(pilot["status"], pilot.pop("stale_at"))}


def _with_reports(steps: list[dict[str, Any]], pilot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps of a pilot with what it has reported itself: where it runs, and why it ends."""
    where = [
        pilot["host"] and f"on {pilot['host']}",
        pilot["cores"] and f"{pilot['cores']} cores",
        pilot["memory_mb"] and f"{pilot['memory_mb']} MB",
    ]
    why = [
        pilot["outcome"] and f"the pilot says: {pilot['outcome']}",
        pilot["exit_code"] and f"exit code {pilot['exit_code']}",
        pilot["jobs_done"] is not None and f"{pilot['jobs_done']} jobs",
        pilot["detail"],
    ]
    for step in steps:
        said = where if step["status"] is MyPilotStatus.RUNNING else []
        said = [*said, *why] if step is steps[-1] and step["status"] is not MyPilotStatus.SUBMITTED else said
        parts = [part for part in (", ".join(filter(None, said)), step["reason"]) if part]
        step["reason"] = "; ".join(reversed(parts)) or None
    return steps


class PilotsMixin(PilotSession):
    """Statements about pilots."""

    @transaction
    async def set_pilots_missing(self, pilot_ids: Sequence[int], since: datetime | None) -> None:
        """Note since when the compute element does not know these pilots; None: it knows them again."""
        if pilot_ids:
            these = await self._staged([(id, None) for id in pilot_ids])
            await self.conn.execute(update(Pilots).where(self._are(these)).values(missing_since=since))

    @transaction
    async def set_waiting_reasons(self, reasons: Sequence[tuple[int, str | None]]) -> None:
        """Note what these pilots (id, reason) wait for; None: for their turn. It is owed to the pilot registry."""
        for portion in portions(reasons):
            these = await self._staged(portion)
            await self.conn.execute(
                update(Pilots).where(self._are(these)).values(waiting_reason=these.c.reason, registered=None)
            )

    @transaction
    async def count_waiting_reasons(self, ce_names: Collection[str], limit: int = 10) -> dict[str, dict[str, int]]:
        """Count the waiting pilots of each compute element by what they wait for: the most frequent ones first,
        and on average `limit` of them."""
        count = func.count()
        rows = await self.conn.execute(
            select(Pilots.ce_name, Pilots.waiting_reason, count)
            .where(Pilots.ce_name.in_(ce_names), Pilots.status == MyPilotStatus.SUBMITTED)
            .where(Pilots.waiting_reason.is_not(None))
            .group_by(Pilots.ce_name, Pilots.waiting_reason)
            .order_by(count.desc(), Pilots.waiting_reason)
            .limit(limit * len(ce_names))
        )
        waiting: dict[str, dict[str, int]] = {name: {} for name in ce_names}
        for name, reason, number in rows:
            waiting[name][str(reason)] = int(number)
        return waiting

    @transaction
    async def request_cancels(self, pilots: Sequence[tuple[int, str | None]]) -> None:
        """Note that these pilots (id, reason) are to be ended, if that is not requested already."""
        for portion in portions(pilots):
            these = await self._staged(portion)
            await self.conn.execute(
                update(Pilots)
                .where(self._are(these), Pilots.status.in_(ACTIVE), Pilots.cancel_requested_at.is_(None))
                .values(cancel_requested_at=clock.now(), last_error=these.c.reason)
            )

    @transaction
    async def request_cancel(self, pilot_id: int, *, reason: str) -> None:
        """Note that an active pilot is to be ended; its state changes when the compute element says so.

        Raises:
            PilotNotFoundError: there is no such pilot, or it has ended.
        """
        now = clock.now()
        noted = await self.conn.execute(
            update(Pilots)
            .where(Pilots.id == pilot_id, Pilots.status.in_(ACTIVE))
            .values(
                cancel_requested_at=func.coalesce(Pilots.cancel_requested_at, now),
                last_error=reason[:MAX_REASON_CHARS],
            )
        )
        if not noted.rowcount:
            raise PilotNotFoundError(pilot_id)

    @transaction
    async def get_active_pilots(self, *, vo: str) -> Sequence[Row[Any]]:
        """All pilots of the VO that hold a slot, in one statement.

        Rows of `pilot_id, ce_name, status, stamp, reference, submitted_at, started_at, missing_since,
        cancel_requested_at, last_error, waiting_reason`: no more than a check needs, for there may be very many.
        """
        return (
            await self.conn.execute(select(*_CHECK_COLUMNS).where(Pilots.vo == vo, Pilots.status.in_(ACTIVE)))
        ).all()

    @transaction
    async def get_pilots_by_status(self, status: MyPilotStatus, vo: str | None) -> list[dict[str, Any]]:
        """All pilots in a state, oldest first; `vo=None`: of every VO."""
        where: list[ColumnElement[bool]] = [Pilots.status == MyPilotStatus(status)]
        if vo is not None:
            where.append(Pilots.vo == vo)
        rows = (await self.conn.execute(_SELECT.where(*where).order_by(Pilots.id))).all()
        return [_as_dict(row) for row in rows]

    @transaction
    async def search_pilots(
        self,
        *,
        vo: str | None,
        ce_name: str | None = None,
        status: MyPilotStatus | None = None,
        stamps: Collection[str] | None = None,
        stale: bool = False,
        page: int = 1,
        per_page: int = 100,
    ) -> tuple[int, list[dict[str, Any]]]:
        """One page of pilots, newest first, with the number of all that match.

        Args:
            vo: only this VO's; None: every VO's.
            ce_name: only at this compute element.
            status: only in this state.
            stamps: only those with one of these stamps.
            stale: only running ones whose heartbeats have stopped.
            page: from 1.
            per_page: pilots on a page.
        """
        where: list[ColumnElement[bool]] = []
        if vo is not None:
            where.append(Pilots.vo == vo)
        if ce_name is not None:
            where.append(Pilots.ce_name == ce_name)
        if status is not None:
            where.append(Pilots.status == status)
        if stamps is not None:
            where.append(Pilots.stamp.in_(stamps))
        counted, ids = select(func.count()).select_from(Pilots), select(Pilots.id)
        if stale:
            its = PilotIdentities.pilot_id == Pilots.id
            counted, ids = counted.join(PilotIdentities, its), ids.join(PilotIdentities, its)
            where += [Pilots.status == MyPilotStatus.RUNNING, PilotIdentities.stale_at < clock.now()]
        total = (await self.conn.execute(counted.where(*where))).scalar_one()
        if (page - 1) * per_page >= total:
            return int(total), []  # else all would be read, to be skipped
        # Joined to the page alone: PostgreSQL would rather join, in the order of ids, the pilots of all VOs.
        newest = (
            ids.where(*where).order_by(Pilots.id.desc()).limit(per_page).offset((page - 1) * per_page).subquery()
        )
        rows = await self.conn.execute(_SELECT.join(newest, newest.c.id == Pilots.id).order_by(Pilots.id.desc()))
        return int(total), [_as_dict(row) for row in rows]

    @transaction
    async def get_pilot(self, pilot_id: int) -> dict[str, Any]:
        """One pilot with its `history`, oldest step first, and in it what the pilot has reported itself.

        Raises:
            PilotNotFoundError: there is no such pilot.
        """
        row = (await self.conn.execute(_SELECT.where(Pilots.id == pilot_id))).one_or_none()
        if row is None:
            raise PilotNotFoundError(pilot_id)
        steps = (
            await self.conn.execute(
                select(PilotHistory.status, PilotHistory.at, PilotHistory.reason).where(
                    PilotHistory.pilot_id == pilot_id
                )
            )
        ).all()
        # States are declared in the order of a life, which also tells apart steps of one instant.
        order = list(MyPilotStatus)
        steps = sorted(steps, key=lambda step: order.index(step[0]))
        history = [{"status": status, "at": at, "reason": reason} for status, at, reason in steps]
        pilot = _as_dict(row)
        return {**pilot, "history": _with_reports(history, pilot)}

    @transaction
    async def count_pilots(self, vo: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
        """Count pilots, as {VO: {compute element: {state: number}}}; absent means none."""
        statement = (
            select(Pilots.vo, Pilots.ce_name, Pilots.status, func.count())
            .group_by(Pilots.vo, Pilots.ce_name, Pilots.status)
            .order_by(Pilots.vo, Pilots.ce_name)
        )
        if vo is not None:
            statement = statement.where(Pilots.vo == vo)
        summary: dict[str, dict[str, dict[str, int]]] = {}
        for vo_name, ce_name, status, count in await self.conn.execute(statement):
            summary.setdefault(vo_name, {}).setdefault(ce_name, {})[str(status)] = count
        return summary

    async def get_pilot_summary(self, vo: str | None = None) -> dict[str, int]:
        """Count pilots (of one VO, or of all), as {state: number}; absent means none."""
        totals: Counter[str] = Counter()
        for by_ce in (await self.count_pilots(vo)).values():
            for states in by_ce.values():
                totals.update(states)
        return dict(totals)

    async def delete_ended_pilots(self, *, ended_before: datetime, limit: int) -> int:
        """Delete pilots that ended before then, with their history, and return how many were.

        The oldest ends come first, `limit` of them at most: one short transaction. Active pilots have not ended.
        """
        # Nothing is decided by what is read, for what has ended stays so.
        oldest = select(Pilots.id, Pilots.ce_name).where(Pilots.ended_at < ended_before)
        rows = await self._rows(oldest.order_by(Pilots.ended_at).limit(limit))
        return await self._delete([row[0] for row in rows], {row[1] for row in rows}, ended_before) if rows else 0

    @transaction
    async def _delete(self, ids: Sequence[int], ce_names: Collection[str], ended_before: datetime) -> int:
        await self.lock_ces(ce_names)  # as all who write; else, on MariaDB, it deadlocks with checks
        # By their ids, for MariaDB reads all pilots to delete those of a subquery.
        gone = await self.conn.execute(delete(Pilots).where(Pilots.id.in_(ids), Pilots.ended_at < ended_before))
        return int(gone.rowcount)
