"""Compute elements: what exists, and how full it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, Circuit
from gubbins.domain.downtimes import Downtime
from gubbins.domain.exceptions import CEExistsError, UnknownCEError
from gubbins.domain.pilot_states import ACTIVE
from gubbins.domain.rules import serves

from .circuits import delete_circuits, read_circuits, restore_last_error
from .downtimes import DowntimesMixin
from .schema import MAX_REASON_CHARS, SELECT_CE, ComputeElements, Pilots

_SELECT_CE = SELECT_CE.add_columns(
    select(func.count())
    .where(Pilots.ce_name == ComputeElements.name, Pilots.missing_since.is_not(None))
    .scalar_subquery()
    .label("missing")
)


class ComputeElementsMixin(DowntimesMixin):
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
            settings: for that back end; validated by the logic layer, not here.
            vos: the VOs it serves; None: all.
            rules: what is not as by default; validated by the logic layer, not here.

        Raises:
            CEExistsError: the name is taken.
            ValueError: a number is out of range.
        """
        _check_range(capacity, success_rate)
        now = clock.now()
        values = {
            "name": name,
            "capacity": capacity,
            "success_rate": success_rate,
            "enabled": enabled,
            "backend": backend,
            "settings": settings or {},
            "vos": None if vos is None else list(vos),
            "rules": dict(rules) if rules else None,
            "created_at": now,
            "updated_at": now,
        }
        # An UPDATE first: SQLite would end its transaction with a savepoint that it begins with.
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
        """Make a compute element be like this, whether it exists or not; arguments as for `add_ce`.

        `enabled=None` leaves an existing one as it is (an operator may have closed it) and opens a new one.
        One that is changed gets its circuits closed: what was wrong may have been mended.
        """
        _check_range(capacity, success_rate)
        wanted: dict[str, Any] = {
            "capacity": capacity,
            "success_rate": success_rate,
            "backend": backend,
            "settings": settings or {},
            "vos": None if vos is None else list(vos),
            "rules": dict(rules) if rules else None,
        }
        if enabled is not None:
            wanted["enabled"] = enabled
        if enabled:
            wanted |= {"banned_at": None, "ban_reason": None}
        if not await self.lock_ces([name]):
            wanted = {key: value for key, value in wanted.items() if key not in ("banned_at", "ban_reason")}
            await self.add_ce(name, **({"enabled": True} | wanted))
            return "created"
        present = (await self.conn.execute(SELECT_CE.where(ComputeElements.name == name))).one()
        if all(getattr(present, field) == value for field, value in wanted.items()):
            return "unchanged"
        await self.conn.execute(
            update(ComputeElements).where(ComputeElements.name == name).values(**wanted, updated_at=clock.now())
        )
        await delete_circuits(self.conn, name)
        return "updated"

    @transaction
    async def set_ce_enabled(self, name: str, enabled: bool) -> bool:
        """Open or close a compute element for new pilots; True when that changed something.

        Either lifts a ban. Opening it closes its circuits as well: its next calls are made at once.

        Raises:
            UnknownCEError: there is none of that name.
        """
        if not await self.lock_ces([name]):
            raise UnknownCEError(name)
        changed = await self.conn.execute(
            update(ComputeElements)
            .where(
                ComputeElements.name == name,
                or_(ComputeElements.enabled.is_not(enabled), ComputeElements.banned_at.is_not(None)),
            )
            .values(enabled=enabled, banned_at=None, ban_reason=None, updated_at=clock.now())
        )
        if enabled:
            await delete_circuits(self.conn, name)
            await restore_last_error(self.conn, name)
        return bool(changed.rowcount)

    @transaction
    async def ban_ce(self, name: str, *, reason: str | None) -> bool:
        """Leave a compute element alone altogether; True when it was not banned before.

        Raises:
            UnknownCEError: there is none of that name.
        """
        now = clock.now()
        if not await self.lock_ces([name]):
            raise UnknownCEError(name)
        banned = await self.conn.execute(
            update(ComputeElements)
            .where(ComputeElements.name == name, ComputeElements.banned_at.is_(None))
            .values(banned_at=now, enabled=False, updated_at=now)
        )
        await self.conn.execute(
            update(ComputeElements)
            .where(ComputeElements.name == name)
            .values(ban_reason=None if reason is None else reason[:MAX_REASON_CHARS])
        )
        return bool(banned.rowcount)

    @transaction
    async def get_ce(self, name: str) -> dict[str, Any]:
        """One compute element, all its fields, with its `circuits`, how many pilots are `missing`, and its
        `downtime`: the one that it is in, or drained for; None: there is none.

        Raises:
            UnknownCEError: there is none of that name.
        """
        row = (await self.conn.execute(_SELECT_CE.where(ComputeElements.name == name))).one_or_none()
        if row is None:
            raise UnknownCEError(name)
        name = row.name  # which may be the beginning of the one that was asked for
        circuits, downtimes = await read_circuits(self.conn, name), await self._downtimes(name)
        return {**row._mapping, "circuits": _circuits_of(name, circuits), "downtime": downtimes.get(name)}

    @transaction
    async def get_ces(self) -> list[dict[str, Any]]:
        """Every compute element, by name: as `get_ce` has it."""
        rows = (await self.conn.execute(_SELECT_CE.order_by(ComputeElements.name))).all()
        circuits, downtimes = await read_circuits(self.conn), await self._downtimes()
        return [
            {**row._mapping, "circuits": _circuits_of(row.name, circuits), "downtime": downtimes.get(row.name)}
            for row in rows
        ]

    async def _downtimes(self, name: str | None = None) -> dict[str, Downtime]:
        now = clock.now()
        found = await self.get_downtimes(ends_after=now, ce_name=name)
        # Of several the one that ends last.
        last = sorted((each for each in found if each.drain_from <= now), key=lambda each: each.ends_at)
        return {each.ce_name: each for each in last}

    @transaction
    async def list_ces(self, *, vo: str | None) -> list[dict[str, Any]]:
        """Every compute element that serves the VO (None: every one), by name.

        Beside its fields each has `circuits`, `active` (pilots of all VOs that hold a slot) and
        `available_slots`.
        """
        # One by one, for to count all active pilots at once SQLite reads those that have ended as well.
        taken = (
            select(func.count())
            .select_from(Pilots)
            .where(Pilots.ce_name == ComputeElements.name, Pilots.status.in_(ACTIVE))
            .scalar_subquery()
        )
        statement = select(ComputeElements.name, taken)
        ces = await self.get_ces()
        active = {row[0]: int(row[1]) for row in await self.conn.execute(statement)}
        return [
            # Never below zero: a capacity may be lowered while more pilots are on their way.
            {
                **ce,
                "active": active.get(ce["name"], 0),
                "available_slots": max(0, ce["capacity"] - active.get(ce["name"], 0)),
            }
            for ce in ces
            if vo is None or serves(ce["vos"], vo)
        ]

    @transaction
    async def holds_pilots(self, name: str, *, lock: bool = False) -> bool:
        """True if any slot of the compute element is taken, by any VO.

        With `lock`, no other transaction reserves one there until this one ends.
        """
        taken = select(Pilots.id).where(Pilots.ce_name == name, Pilots.status.in_(ACTIVE)).limit(1)
        if lock:
            await self.lock_ces([name])
        return (await self.conn.execute(taken)).scalar_one_or_none() is not None

    @transaction
    async def count_active(self, name: str) -> int:
        """Count the pilots of all VOs that hold a slot of the compute element."""
        taken = select(func.count()).where(Pilots.ce_name == name, Pilots.status.in_(ACTIVE))
        return int((await self.conn.execute(taken)).scalar_one())

    @transaction
    async def record_quota(self, name: str) -> int:
        """Note that the site takes no more pilots than it has now, and return their number."""
        quota = await self.count_active(name)
        statement = update(ComputeElements).where(ComputeElements.name == name)
        await self.conn.execute(statement.values(quota=quota, quota_at=clock.now()))
        return quota

    @transaction
    async def count_missing(self, name: str, gone: int, *, any_seen: bool) -> None:
        """Note how many more confirmed pilots went missing and were never seen, and whether others were seen."""
        before = 0 if any_seen else func.coalesce(ComputeElements.missing_in_row, 0)
        statement = update(ComputeElements).where(ComputeElements.name == name)
        await self.conn.execute(statement.values(missing_in_row=before + gone))

    async def get_available_ces(self, vo: str) -> list[dict[str, Any]]:
        """The enabled compute elements that serve the VO and have a free slot.

        Each has `name`, `capacity`, `success_rate`, `available_slots` (> 0) and `vos`.
        """
        return [
            {key: ce[key] for key in ("name", "capacity", "success_rate", "available_slots", "vos")}
            for ce in await self.list_ces(vo=vo)
            if ce["enabled"] and ce["available_slots"] > 0
        ]

    async def get_ce_success_rate(self, ce_name: str) -> float:
        """The reliability of a compute element, 0.0-1.0.

        Raises:
            UnknownCEError: there is none of that name.
        """
        return float((await self.get_ce(ce_name))["success_rate"])

    @transaction
    async def record_ce_error(self, name: str, message: str | None) -> None:
        """Record the last error of the compute element; None: clear it."""
        statement = update(ComputeElements).where(ComputeElements.name == name)
        if message is None:
            # Touches the row only when there is something to clear.
            statement = statement.where(ComputeElements.last_error.is_not(None)).values(
                last_error=None, last_error_at=None
            )
        else:
            statement = statement.values(last_error=message[:MAX_REASON_CHARS], last_error_at=clock.now())
        await self.conn.execute(statement)


def _circuits_of(name: str, circuits: Mapping[tuple[str, CECall], Circuit]) -> dict[str, dict[str, Any]]:
    """{call: `state`, `failures`, `open_until`, `last_error`, `last_error_at`} of one compute element."""
    now = clock.now()
    return {str(call): circuits.get((name, call), Circuit()).as_dict(now) for call in CECall}


def _check_range(capacity: int, success_rate: float) -> None:
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more, not {capacity}")
    if not 0 <= success_rate <= 1:
        raise ValueError(f"success_rate must be between 0 and 1, not {success_rate}")
