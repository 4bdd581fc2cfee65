"""Circuit breakers of compute elements, shared by all workers."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import ColumnElement, and_, delete, insert, or_, select, update

from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, Circuit, CircuitState

from .schema import CECircuits, CEQuotas, ComputeElements, columns_of, if_given
from .session import PilotSession

_COLUMNS = columns_of(CECircuits, "failures", "open_until", "probe_until", "last_error", "last_error_at")
MAX_DOUBLINGS = 32
_NEVER = datetime.min.replace(tzinfo=UTC)


def _is_circuit(ce_name: str, call: CECall, vo: str) -> ColumnElement[bool]:
    return and_(CECircuits.ce_name == ce_name, CECircuits.call == call, CECircuits.vo == vo)


def severity(circuit: Circuit) -> tuple[datetime, int]:
    """Rank circuits of several VOs: the last to close first, then that with most failures."""
    return circuit.open_until or _NEVER, circuit.failures


class CircuitsMixin(PilotSession):
    """Statements about circuit breakers."""

    @transaction
    async def enter_circuit(self, ce_name: str, call: CECall, *, probe_seconds: float, vo: str = "") -> bool:
        """Acquire permission for a call; True: granted.

        Of a half-open circuit one caller at a time may make the probe, which expires after `probe_seconds`.
        """
        now, where = clock.now(), _is_circuit(ce_name, call, vo)
        await self.lock_ces([ce_name])
        claimed = await self.conn.execute(
            update(CECircuits)
            .where(
                where,
                CECircuits.open_until <= now,
                or_(CECircuits.probe_until.is_(None), CECircuits.probe_until <= now),
            )
            .values(probe_until=now + timedelta(seconds=probe_seconds))
        )
        if claimed.rowcount:
            return True
        open_until = await self.conn.execute(select(CECircuits.open_until).where(where))
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
        vo: str = "",
    ) -> Circuit:
        """Record a failed call, and return its circuit.

        The circuit opens after `failures` consecutive ones; each failed probe doubles the pause. It opens at once
        if the site requests a pause of `requested_pause_seconds`. Failures of calls that were running when it
        opened do not prolong the pause.
        """
        now = clock.now()
        # Locks the compute element.
        if not await self._update_ce(ce_name, last_error=message, last_error_at=now):
            return Circuit()
        where = _is_circuit(ce_name, call, vo)
        row = (await self.conn.execute(select(*_COLUMNS).where(where))).one_or_none()
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
            await self.conn.execute(insert(CECircuits).values(ce_name=ce_name, call=call, vo=vo, **values))
        else:
            await self.conn.execute(update(CECircuits).where(where).values(**values))
        return after

    @transaction
    async def record_success(self, ce_name: str, call: CECall, *, vo: str = "") -> None:
        """Record a successful call: close its circuit, and clear its error."""
        await self.lock_ces([ce_name])
        await self.conn.execute(delete(CECircuits).where(_is_circuit(ce_name, call, vo)))
        await self._restore_last_error(ce_name)

    async def _circuits(self, ce_name: str | None) -> dict[tuple[str, CECall], dict[str, Circuit]]:
        """Read the circuits (of one compute element, or all) with failures since the last success, by VO."""
        statement = select(CECircuits.ce_name, CECircuits.call, CECircuits.vo, *_COLUMNS)
        statement = statement.where(*if_given(CECircuits.ce_name, ce_name))
        circuits: dict[tuple[str, CECall], dict[str, Circuit]] = {}
        for name, call, vo, *values in await self.conn.execute(statement):
            circuits.setdefault((name, call), {})[vo] = Circuit(*values)
        return circuits

    async def _delete_circuits(self, ce_name: str) -> None:
        """Close all circuits of a compute element, and reset its quota and count of missing pilots."""
        await self.conn.execute(delete(CECircuits).where(CECircuits.ce_name == ce_name))
        await self.conn.execute(delete(CEQuotas).where(CEQuotas.ce_name == ce_name))
        await self._update_ce(ce_name, never_seen=None)

    async def _restore_last_error(self, ce_name: str) -> None:
        """Set the last error of a compute element to the latest one of its circuits."""
        circuits = [each for of_vos in (await self._circuits(ce_name)).values() for each in of_vos.values()]
        latest = max(circuits, key=lambda each: each.last_error_at or _NEVER, default=Circuit())
        errors = {"last_error": latest.last_error, "last_error_at": latest.last_error_at}
        await self._update_ce(ce_name, ComputeElements.last_error.is_not(None), **errors)
