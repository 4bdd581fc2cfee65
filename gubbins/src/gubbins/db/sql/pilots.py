"""Queries and updates of pilots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import Row, delete, func, select, update

from gubbins.domain import clock
from gubbins.domain.exceptions import PilotNotFoundError
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus

from .identities import is_stale
from .schema import PilotHistory, PilotIdentities, Pilots, columns_of, if_given
from .session import PilotSession, split_batches

_ID = Pilots.id.label("pilot_id")
_REPORT = ("host", "cores", "memory_mb", "heartbeat_at", "stale_at", "outcome", "exit_code", "jobs_done", "detail")
_SELECT = select(
    _ID,
    *(column for column in columns_of(Pilots) if column.name != "id"),
    *columns_of(PilotIdentities, *_REPORT, "exchanged_at", "exchanged_from"),
).outerjoin(PilotIdentities, PilotIdentities.pilot_id == Pilots.id)


class ActivePilot(NamedTuple):
    """An active pilot with the columns that a check needs."""

    pilot_id: int
    ce_name: str
    status: MyPilotStatus
    stamp: str
    reference: str | None
    submitted_at: datetime
    started_at: datetime | None
    missing_since: datetime | None
    cancel_requested_at: datetime | None
    last_error: str | None
    waiting_reason: str | None


_CHECK_COLUMNS = (_ID, *columns_of(Pilots, *ActivePilot._fields[1:]))


def _as_dict(row: Row[Any]) -> dict[str, Any]:
    pilot = dict(row._mapping)
    return {**pilot, "stale": is_stale(pilot["status"], pilot.pop("stale_at"))}


def _with_reports(steps: list[dict[str, Any]], pilot: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add reports of the pilot to the reasons of its steps: host and size to RUNNING, outcome to the last step."""
    size = [
        pilot["host"] and f"on {pilot['host']}",
        pilot["cores"] and f"{pilot['cores']} cores",
        pilot["memory_mb"] and f"{pilot['memory_mb']} MB",
    ]
    outcome = [
        pilot["outcome"] and f"reported by the pilot: {pilot['outcome']}",
        pilot["exit_code"] and f"exit code {pilot['exit_code']}",
        pilot["jobs_done"] is not None and f"{pilot['jobs_done']} jobs",
        pilot["detail"],
    ]
    for step in steps:
        details = size if step["status"] is MyPilotStatus.RUNNING else []
        if step is steps[-1] and step["status"] is not MyPilotStatus.SUBMITTED:
            details = [*details, *outcome]
        parts = [part for part in (", ".join(filter(None, details)), step["reason"]) if part]
        step["reason"] = "; ".join(reversed(parts)) or None
    return steps


class PilotsMixin(PilotSession):
    """Statements about pilots."""

    @transaction
    async def set_pilots_missing(self, pilot_ids: Sequence[int], since: datetime | None) -> None:
        """Set since when the compute element does not know these pilots; None: it knows them."""
        if pilot_ids:
            these = await self._staged([(id, None) for id in pilot_ids])
            await self.conn.execute(update(Pilots).where(self._is_staged(these)).values(missing_since=since))

    @transaction
    async def set_waiting_reasons(self, reasons: Sequence[tuple[int, str | None]]) -> None:
        """Set the waiting reasons of pilots (id, reason or None), to be written to the pilot registry."""
        for batch in split_batches(reasons):
            these = await self._staged(batch)
            await self.conn.execute(
                update(Pilots).where(self._is_staged(these)).values(waiting_reason=these.c.reason, registered=None)
            )

    @transaction
    async def count_waiting_reasons(self, ce_names: Collection[str], limit: int = 10) -> dict[str, dict[str, int]]:
        """Count waiting or held pilots by CE and reason, most frequent first: about `limit` reasons."""
        count = func.count()
        rows = await self.conn.execute(
            select(Pilots.ce_name, Pilots.waiting_reason, count)
            .where(Pilots.ce_name.in_(ce_names), Pilots.status.in_(ACTIVE))
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
        """Request the cancellation of active pilots (id, reason), unless it was requested before.

        Their states change when the compute elements report the end.
        """
        for batch in split_batches(pilots):
            these = await self._staged(batch)
            await self.conn.execute(
                update(Pilots)
                .where(self._is_staged(these), Pilots.status.in_(ACTIVE), Pilots.cancel_requested_at.is_(None))
                .values(cancel_requested_at=clock.now(), last_error=these.c.reason)
            )

    @transaction
    async def get_active_pilots(self, *, vo: str) -> list[ActivePilot]:
        """List the active pilots of the VO, in one statement."""
        rows = await self.conn.execute(select(*_CHECK_COLUMNS).where(Pilots.vo == vo, Pilots.status.in_(ACTIVE)))
        # Ten times as fast as attributes of rows.
        return [ActivePilot._make(row) for row in rows]

    @transaction
    async def get_pilots_by_status(self, status: MyPilotStatus, vo: str | None) -> list[dict[str, Any]]:
        """List pilots (of one VO, or all) in a state, oldest first."""
        found = _SELECT.where(Pilots.status == MyPilotStatus(status), *if_given(Pilots.vo, vo))
        rows = (await self.conn.execute(found.order_by(Pilots.id))).all()
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
        """Search pilots that match all filters; return their number, and one page, newest first.

        Args:
            vo: only this VO; None: all VOs.
            stale: only running pilots whose heartbeats have stopped.
            page: number of the page, from 1.
        """
        filters = ((Pilots.vo, vo), (Pilots.ce_name, ce_name), (Pilots.status, status))
        where = [condition for column, value in filters for condition in if_given(column, value)]
        if stamps is not None:
            where.append(Pilots.stamp.in_(stamps))
        counted, ids = select(func.count()).select_from(Pilots), select(Pilots.id)
        if stale:
            same = PilotIdentities.pilot_id == Pilots.id
            counted, ids = counted.join(PilotIdentities, same), ids.join(PilotIdentities, same)
            where += [Pilots.status == MyPilotStatus.RUNNING, PilotIdentities.stale_at < clock.now()]
        total = (await self.conn.execute(counted.where(*where))).scalar_one()
        if (page - 1) * per_page >= total:
            return int(total), []  # OFFSET would read all
        # Joined to the page only: PostgreSQL would join the pilots of all VOs in the order of ids.
        newest = (
            ids.where(*where).order_by(Pilots.id.desc()).limit(per_page).offset((page - 1) * per_page).subquery()
        )
        rows = await self.conn.execute(_SELECT.join(newest, newest.c.id == Pilots.id).order_by(Pilots.id.desc()))
        return int(total), [_as_dict(row) for row in rows]

    @transaction
    async def get_pilot(self, pilot_id: int) -> dict[str, Any]:
        """Get one pilot with its `history`, oldest step first, which includes its own reports.

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
        # Sorted by state, since several steps may have the same time.
        order = list(MyPilotStatus)
        steps = sorted(steps, key=lambda step: order.index(step[0]))
        history = [{"status": status, "at": at, "reason": reason} for status, at, reason in steps]
        pilot = _as_dict(row)
        return {**pilot, "history": _with_reports(history, pilot)}

    @transaction
    async def count_pilots(self, vo: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
        """Count pilots (of one VO, or all), as {VO: {compute element: {state: number}}}, without zeros."""
        statement = (
            select(Pilots.vo, Pilots.ce_name, Pilots.status, func.count())
            .where(*if_given(Pilots.vo, vo))
            .group_by(Pilots.vo, Pilots.ce_name, Pilots.status)
            .order_by(Pilots.vo, Pilots.ce_name)
        )
        summary: dict[str, dict[str, dict[str, int]]] = {}
        for vo_name, ce_name, status, count in await self.conn.execute(statement):
            summary.setdefault(vo_name, {}).setdefault(ce_name, {})[str(status)] = count
        return summary

    async def get_pilot_summary(self, vo: str | None = None) -> dict[str, int]:
        """Count pilots (of one VO, or all), as {state: number}, without zeros."""
        totals: Counter[str] = Counter()
        for by_ce in (await self.count_pilots(vo)).values():
            for states in by_ce.values():
                totals.update(states)
        return dict(totals)

    async def delete_ended_pilots(self, *, ended_before: datetime, limit: int) -> int:
        """Delete up to `limit` pilots that ended before then, oldest first, with history; return the number."""
        oldest = select(Pilots.id, Pilots.ce_name).where(Pilots.ended_at < ended_before)
        rows = await self._rows(oldest.order_by(Pilots.ended_at).limit(limit))
        return await self._delete([row[0] for row in rows], {row[1] for row in rows}, ended_before) if rows else 0

    @transaction
    async def _delete(self, ids: Sequence[int], ce_names: Collection[str], ended_before: datetime) -> int:
        await self.lock_ces(ce_names)  # prevents deadlocks with checks on MariaDB
        # By ids, since MariaDB would read all pilots for a subquery.
        deleted = await self.conn.execute(delete(Pilots).where(Pilots.id.in_(ids), Pilots.ended_at < ended_before))
        return int(deleted.rowcount)
