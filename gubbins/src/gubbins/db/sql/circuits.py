"""Circuit breakers of compute elements, shared by all workers."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, Circuit, CircuitState

from .schema import MAX_REASON_CHARS, CECircuits, ComputeElements, columns_of
from .session import PilotSession

_COLUMNS = columns_of(CECircuits, "failures", "open_until", "probe_until", "last_error", "last_error_at")
MAX_DOUBLINGS = 32


class CircuitsMixin(PilotSession):
    """Statements about circuit breakers."""

    @transaction
    async def enter_circuit(self, ce_name: str, call: CECall, *, probe_seconds: float) -> bool:
        """Acquire permission for a call; True: granted.

        Of a half-open circuit one caller at a time may make the probe, which expires after `probe_seconds`.
        """
        now = clock.now()
        await self.lock_ces([ce_name])
        claimed = await self.conn.execute(
            update(CECircuits)
            .where(
                CECircuits.ce_name == ce_name,
                CECircuits.call == call,
                CECircuits.open_until <= now,
                or_(CECircuits.probe_until.is_(None), CECircuits.probe_until <= now),
            )
            .values(probe_until=now + timedelta(seconds=probe_seconds))
        )
        if claimed.rowcount:
            return True
        open_until = await self.conn.execute(
            select(CECircuits.open_until).where(CECircuits.ce_name == ce_name, CECircuits.call == call)
        )
        return open_until.scalar_one_or_none() is None

    @transaction
    async def record_failure(
        self,
        ce_name: str,
        call: CECall,
        message: str,
        *,
        failures: int,
        pause_seconds: float,
        max_pause_seconds: float,
        requested_pause_seconds: float = 0,
    ) -> Circuit:
        """Record a failed call, and return its circuit.

        The circuit opens after `failures` consecutive ones; each failed probe doubles the pause. It opens at once
        if the site requests a pause of `requested_pause_seconds`. Failures of calls that were running when it
        opened do not prolong the pause.
        """
        now = clock.now()
        message = message[:MAX_REASON_CHARS]
        # Locks the compute element.
        known = await self.conn.execute(
            update(ComputeElements)
            .where(ComputeElements.name == ce_name)
            .values(last_error=message, last_error_at=now)
        )
        if not known.rowcount:
            return Circuit()
        where = (CECircuits.ce_name == ce_name, CECircuits.call == call)
        row = (await self.conn.execute(select(*_COLUMNS).where(*where))).one_or_none()
        before = Circuit() if row is None else Circuit(*row)
        if before.state(now) is CircuitState.OPEN:
            after = replace(before, last_error=message, last_error_at=now)
        else:
            count, pause = before.failures + 1, requested_pause_seconds
            if count >= failures:
                pause = max(pause, pause_seconds * 2 ** min(count - failures, MAX_DOUBLINGS))
            open_until = now + timedelta(seconds=min(max_pause_seconds, pause)) if pause else None
            after = Circuit(count, open_until, None, message, now)
        values = asdict(after)
        if row is None:
            await self.conn.execute(insert(CECircuits).values(ce_name=ce_name, call=call, **values))
        else:
            await self.conn.execute(update(CECircuits).where(*where).values(**values))
        return after

    @transaction
    async def record_success(self, ce_name: str, call: CECall) -> None:
        """Record a successful call: close its circuit, and clear its error."""
        await self.lock_ces([ce_name])
        await self.conn.execute(delete(CECircuits).where(CECircuits.ce_name == ce_name, CECircuits.call == call))
        await restore_last_error(self.conn, ce_name)


async def read_circuits(conn: AsyncConnection, ce_name: str | None = None) -> dict[tuple[str, CECall], Circuit]:
    """Read the circuits (of one compute element, or all) with failures since the last success."""
    statement = select(CECircuits.ce_name, CECircuits.call, *_COLUMNS)
    if ce_name is not None:
        statement = statement.where(CECircuits.ce_name == ce_name)
    return {(row[0], row[1]): Circuit(*row[2:]) for row in await conn.execute(statement)}


async def delete_circuits(conn: AsyncConnection, ce_name: str) -> None:
    """Close all circuits of a compute element, and reset its quota and count of missing pilots."""
    await conn.execute(delete(CECircuits).where(CECircuits.ce_name == ce_name))
    statement = update(ComputeElements).where(ComputeElements.name == ce_name)
    await conn.execute(statement.values(never_seen=None, quota=None, quota_at=None))


async def restore_last_error(conn: AsyncConnection, ce_name: str) -> None:
    """Set the last error of a compute element to the latest one of its circuits."""
    latest: Any = (
        await conn.execute(
            select(CECircuits.last_error, CECircuits.last_error_at)
            .where(CECircuits.ce_name == ce_name)
            .order_by(CECircuits.last_error_at.desc())
            .limit(1)
        )
    ).one_or_none() or (None, None)
    await conn.execute(
        update(ComputeElements)
        .where(ComputeElements.name == ce_name, ComputeElements.last_error.is_not(None))
        .values(last_error=latest[0], last_error_at=latest[1])
    )
