"""Compute elements and their occupancy."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import and_, case, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, Circuit
from gubbins.domain.downtimes import Downtime
from gubbins.domain.exceptions import CEExistsError, UnknownCEError
from gubbins.domain.rules import OF_VOS, serves

from .circuits import CircuitsMixin, severity
from .downtimes import DowntimesMixin, is_in_downtime
from .schema import (
    SELECT_CE,
    CEDowntimes,
    CEQuotas,
    ComputeElements,
    Pilots,
    columns_of,
    count_active_at,
    if_given,
)

_IS_MISSING = and_(Pilots.ce_name == ComputeElements.name, Pilots.missing_since.is_not(None))
# A subquery per compute element, since SQLite would read ended pilots, too, for one GROUP BY.
_SELECT_CE = SELECT_CE.add_columns(
    select(func.count()).where(_IS_MISSING).scalar_subquery().label("missing"),
    count_active_at(ComputeElements.name).scalar_subquery().label("active"),
    *columns_of(CEDowntimes),
    *columns_of(CEQuotas, "quota", "quota_at"),
)


class ComputeElementsMixin(DowntimesMixin, CircuitsMixin):
    """Statements about compute elements."""

    @transaction
    async def add_ce(
        self,
        name: str,
        capacity: int,
        success_rate: float,
        enabled: bool = True,
        *,
        backend: str = "simulated",
        settings: dict[str, Any] | None = None,
        vos: Sequence[str] | None = None,
        rules: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a compute element.

        Args:
            name: unique name.
            capacity: slots for pilots of all VOs together, >= 0.
            success_rate: reliability, 0.0-1.0.
            enabled: whether it takes new pilots.
            backend: entry point in the group `gubbins.ces`.
            settings: settings of the back end; the logic layer validates them.
            vos: VOs that it serves; None: all.
            rules: rules other than the defaults; the logic layer validates them.

        Raises:
            CEExistsError: the name is taken.
            ValueError: a number is out of range.
        """
        now = clock.now()
        own = _checked(capacity, success_rate, backend, settings, vos, rules)
        values = {"name": name, "enabled": enabled, **own, "created_at": now, "updated_at": now}
        # The UPDATE begins the transaction, which SQLite would end with the savepoint otherwise.
        if await self.lock_ces([name]):
            raise CEExistsError(name)
        try:
            async with self.conn.begin_nested():
                await self.conn.execute(insert(ComputeElements).values(values))
        except IntegrityError as error:
            raise CEExistsError(name) from error

    @transaction
    async def set_ce(
        self,
        name: str,
        *,
        capacity: int,
        success_rate: float,
        enabled: bool | None = None,
        backend: str = "simulated",
        settings: dict[str, Any] | None = None,
        vos: Sequence[str] | None = None,
        rules: Mapping[str, Any] | None = None,
    ) -> Literal["created", "updated", "unchanged"]:
        """Create or update a compute element; arguments as for `add_ce`.

        `enabled=None` enables a new one, and does not change an existing one. A change closes its circuits.
        """
        wanted = _checked(capacity, success_rate, backend, settings, vos, rules)
        if enabled is not None:
            wanted["enabled"] = enabled
        if enabled:
            wanted |= {"banned_at": None, "ban_reason": None}
        if not await self.lock_ces([name]):
            new = {key: value for key, value in wanted.items() if key not in ("banned_at", "ban_reason")}
            with contextlib.suppress(CEExistsError):  # a concurrent transaction has just created it
                await self.add_ce(name, **({"enabled": True} | new))
                return "created"
            await self.lock_ces([name])
        present = (await self.conn.execute(SELECT_CE.where(ComputeElements.name == name))).one()
        if all(getattr(present, field) == value for field, value in wanted.items()):
            return "unchanged"
        await self._update_ce(name, **wanted, updated_at=clock.now())
        await self._delete_circuits(name)
        return "updated"

    @transaction
    async def set_ce_enabled(self, name: str, enabled: bool) -> bool:
        """Enable or disable a compute element for new pilots; False: no change.

        Both lift a ban. Enabling also closes its circuits. Pilots of a disabled compute element are still polled.

        Raises:
            UnknownCEError: there is no such compute element.
        """
        if not await self.lock_ces([name]):
            raise UnknownCEError(name)
        changed = await self._update_ce(
            name,
            or_(ComputeElements.enabled.is_not(enabled), ComputeElements.banned_at.is_not(None)),
            enabled=enabled,
            banned_at=None,
            ban_reason=None,
            updated_at=clock.now(),
        )
        if enabled:
            await self._delete_circuits(name)
            await self._restore_last_error(name)
        return changed

    @transaction
    async def ban_ce(self, name: str, *, reason: str | None) -> bool:
        """Ban a compute element from submissions and polls; False: it was banned before.

        Raises:
            UnknownCEError: there is no such compute element.
        """
        now = clock.now()
        if not await self.lock_ces([name]):
            raise UnknownCEError(name)
        is_new = ComputeElements.banned_at.is_(None)
        banned = await self._update_ce(name, is_new, banned_at=now, enabled=False, updated_at=now)
        await self._update_ce(name, ban_reason=reason)
        return banned

    @transaction
    async def get_ce(self, name: str, vo: str | None = None) -> dict[str, Any]:
        """Get one compute element with its `circuits` and current `downtime`.

        Also with the numbers of its `active` and `missing` pilots, of all VOs, and of its `available_slots`. Where
        VOs have their own settings, each has its own circuits: then `circuits_of` is the VO, and `polled` the
        number of its active pilots, whose polls close them.

        Args:
            vo: VO of the circuits; None: of all VOs the circuit with the longest pause.

        Raises:
            UnknownCEError: there is no such compute element.
        """
        if not (found := await self._read_ces(name, vo)):
            raise UnknownCEError(name)
        return found[0]

    @transaction
    async def list_ces(self, *, vo: str | None = None, serving: bool = True) -> list[dict[str, Any]]:
        """List the compute elements by name, each as `get_ce`; `serving`: only those that serve the VO."""
        return [ce for ce in await self._read_ces(None, vo) if vo is None or not serving or serves(ce["vos"], vo)]

    async def _read_ces(self, name: str | None, vo: str | None) -> list[dict[str, Any]]:
        now = clock.now()
        polled = count_active_at(ComputeElements.name).where(*if_given(Pilots.vo, vo)).scalar_subquery()
        statement = _SELECT_CE.add_columns(polled.label("polled")).where(*if_given(ComputeElements.name, name))
        statement = statement.outerjoin(CEDowntimes, is_in_downtime(ComputeElements.name, now))
        of_vo = () if vo is None else (CEQuotas.vo.in_(["", vo]),)
        statement = statement.outerjoin(CEQuotas, and_(CEQuotas.ce_name == ComputeElements.name, *of_vo))
        # Of several downtimes the one that ends last, and of several quotas the last one, replaces the others.
        statement = statement.order_by(ComputeElements.name, CEDowntimes.ends_at, CEQuotas.quota_at)
        found = {row.name: dict(row._mapping) for row in await self.conn.execute(statement)}
        circuits = await self._circuits(name)
        for ce in found.values():
            downtime = Downtime(*(ce.pop(field.name) for field in fields(Downtime)))
            ce["downtime"] = None if downtime.id is None else downtime
            # Not negative, although the capacity may have been lowered.
            ce["available_slots"] = max(0, ce["capacity"] - ce["active"])
            own = OF_VOS in ce["settings"]
            ce["circuits_of"] = vo if own and vo is not None else ""
            ce["polled"] = ce["polled" if own else "active"]
            ce["circuits"] = {}
            for call in CECall:
                of_vos = circuits.get((ce["name"], call), {})
                worst = max(of_vos, key=lambda each: severity(of_vos[each]), default="")
                of = worst if vo is None else ce["circuits_of"]
                circuit = of_vos.get(of, Circuit())
                if of and vo is None:
                    circuit = replace(circuit, last_error=f"VO {of}: {circuit.last_error}")
                ce["circuits"][str(call)] = circuit.as_dict(now)
        return list(found.values())

    @transaction
    async def count_active(self, name: str, vo: str | None = None) -> int:
        """Count the active pilots (of one VO, or all) at the compute element."""
        statement = count_active_at(name).where(*if_given(Pilots.vo, vo))
        return int((await self.conn.execute(statement)).scalar_one())

    @transaction
    async def record_quota(self, name: str, vo: str = "") -> int:
        """Set the quota of the site (for one VO, or all) to its present number of active pilots, and return it."""
        quota = await self.count_active(name, vo or None)
        where, values = (CEQuotas.ce_name == name, CEQuotas.vo == vo), {"quota": quota, "quota_at": clock.now()}
        if not (await self.conn.execute(update(CEQuotas).where(*where).values(values))).rowcount:
            await self.conn.execute(insert(CEQuotas).values(ce_name=name, vo=vo, **values))
        return quota

    @transaction
    async def count_never_seen(self, name: str, number: int) -> None:
        """Add to the number of confirmed pilots that were never seen; it does not fall below 0."""
        total = func.coalesce(ComputeElements.never_seen, 0) + number
        await self._update_ce(name, never_seen=case((total > 0, total), else_=0))

    async def get_available_ces(self, vo: str) -> list[dict[str, Any]]:
        """List the enabled compute elements that serve the VO and have free slots.

        Each has `name`, `capacity`, `success_rate`, `available_slots` (> 0) and `vos`.
        """
        return [
            {key: ce[key] for key in ("name", "capacity", "success_rate", "available_slots", "vos")}
            for ce in await self.list_ces(vo=vo)
            if ce["enabled"] and ce["available_slots"] > 0
        ]

    async def get_ce_success_rate(self, ce_name: str) -> float:
        """Get the reliability of a compute element, 0.0-1.0.

        Raises:
            UnknownCEError: there is no such compute element.
        """
        return float((await self.get_ce(ce_name))["success_rate"])

    @transaction
    async def record_ce_error(self, name: str, message: str) -> None:
        """Record the last error of the compute element."""
        await self._update_ce(name, last_error=message, last_error_at=clock.now())


def _checked(
    capacity: int,
    success_rate: float,
    backend: str,
    settings: dict[str, Any] | None,
    vos: Sequence[str] | None,
    rules: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Columns of a compute element, after a check of the numbers."""
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more, not {capacity}")
    if not 0 <= success_rate <= 1:
        raise ValueError(f"success_rate must be between 0 and 1, not {success_rate}")
    return {
        "capacity": capacity,
        "success_rate": success_rate,
        "backend": backend,
        "settings": settings or {},
        "vos": None if vos is None else list(vos),
        "rules": dict(rules) if rules else None,
    }
