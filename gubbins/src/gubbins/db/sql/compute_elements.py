"""Compute elements: what exists, how full it is, what was asked of it."""

from __future__ import annotations

__all__ = ["CE_COLUMNS", "ComputeElementStore", "serves"]

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from gubbins.exceptions import CEExistsError, UnknownCEError
from gubbins.pilot_states import ACTIVE

from .connection import PilotDBConnection
from .schema import MAX_REASON_CHARS, ComputeElements, PilotRequests, Pilots

# Labelled with their names in Python: a row's own names are the database's.
CE_COLUMNS = tuple(column.label(column.key) for column in ComputeElements.__table__.columns)


def serves(vos: Sequence[str] | None, vo: str) -> bool:
    """Whether a compute element that lists `vos` takes pilots of `vo`; None serves everybody."""
    return vos is None or vo in vos


class ComputeElementStore(PilotDBConnection):
    """The tables ComputeElements and PilotRequests."""

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

        Raises:
            CEExistsError: the name is taken.
            ValueError: a number is out of range.
        """
        _check_range(capacity, success_rate)
        now = datetime.now(tz=UTC)
        values = {
            "name": name,
            "capacity": capacity,
            "success_rate": success_rate,
            "enabled": enabled,
            "backend": backend,
            "settings": settings or {},
            "vos": None if vos is None else list(vos),
            "created_at": now,
            "updated_at": now,
        }
        async with self.unit():
            try:
                async with self.conn.begin_nested():
                    await self.conn.execute(insert(ComputeElements).values(values))
            except IntegrityError as error:
                raise CEExistsError(name) from error

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
    ) -> Literal["created", "updated", "unchanged"]:
        """Make a compute element be like this, whether it exists or not; arguments as for `add_ce`.

        `enabled=None` leaves an existing one as it is (an operator may have closed it) and opens a new one.
        """
        _check_range(capacity, success_rate)
        wanted: dict[str, Any] = {
            "capacity": capacity,
            "success_rate": success_rate,
            "backend": backend,
            "settings": settings or {},
            "vos": None if vos is None else list(vos),
        }
        if enabled is not None:
            wanted["enabled"] = enabled
        async with self.unit():
            if not await self._lock_ce(name):
                await self.add_ce(name, **({"enabled": True} | wanted))
                return "created"
            present = (await self.conn.execute(select(*CE_COLUMNS).where(ComputeElements.name == name))).one()
            if all(getattr(present, field) == value for field, value in wanted.items()):
                return "unchanged"
            await self.conn.execute(
                update(ComputeElements)
                .where(ComputeElements.name == name)
                .values(**wanted, updated_at=datetime.now(tz=UTC))
            )
            return "updated"

    async def set_ce_enabled(self, name: str, enabled: bool) -> bool:
        """Open or close a compute element for new pilots; True when that changed something.

        Raises:
            UnknownCEError: there is none of that name.
        """
        async with self.unit():
            if not await self._lock_ce(name):
                raise UnknownCEError(name)
            changed = await self.conn.execute(
                update(ComputeElements)
                .where(ComputeElements.name == name, ComputeElements.enabled.is_not(enabled))
                .values(enabled=enabled, updated_at=datetime.now(tz=UTC))
            )
            return bool(changed.rowcount)

    async def get_ce(self, name: str) -> dict[str, Any]:
        """One compute element, all its fields.

        Raises:
            UnknownCEError: there is none of that name.
        """
        async with self.unit():
            row = (await self.conn.execute(select(*CE_COLUMNS).where(ComputeElements.name == name))).one_or_none()
        if row is None:
            raise UnknownCEError(name)
        return dict(row._mapping)

    async def list_ces(self, *, vo: str | None) -> list[dict[str, Any]]:
        """Every compute element that serves the VO (None: every one), by name.

        Beside its fields each has `active` (pilots of all VOs that hold a slot) and `available_slots`.
        """
        active = (
            select(Pilots.ce_name.label("ce_name"), func.count().label("active"))
            .where(Pilots.status.in_(ACTIVE))
            .group_by(Pilots.ce_name)
            .subquery()
        )
        statement = (
            select(*CE_COLUMNS, func.coalesce(active.c.active, 0).label("active"))
            .outerjoin(active, active.c.ce_name == ComputeElements.name)
            .order_by(ComputeElements.name)
        )
        async with self.unit():
            rows = (await self.conn.execute(statement)).all()
        return [
            # Never below zero: a capacity may be lowered while more pilots are on their way.
            {**row._mapping, "available_slots": max(0, row.capacity - row.active)}
            for row in rows
            if vo is None or serves(row.vos, vo)
        ]

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

    async def record_ce_error(self, name: str, message: str | None) -> None:
        """Remember what the compute element last complained about; None: it is well again."""
        async with self.unit():
            statement = update(ComputeElements).where(ComputeElements.name == name)
            if message is None:
                # Touches the row only when there is something to clear.
                statement = statement.where(ComputeElements.last_error.is_not(None)).values(
                    last_error=None, last_error_at=None
                )
            else:
                statement = statement.values(
                    last_error=message[:MAX_REASON_CHARS], last_error_at=datetime.now(tz=UTC)
                )
            await self.conn.execute(statement)

    async def add_requests(self, ce_name: str, *, vo: str, count: int) -> None:
        """Note that `count` `MyPilotTask`s of the VO are on their way to the compute element."""
        now = datetime.now(tz=UTC)
        async with self.unit():
            if count > 0:
                row = {"ce_name": ce_name, "vo": vo, "requested_at": now}
                await self.conn.execute(insert(PilotRequests), [row] * count)

    async def take_requests(self, ce_name: str, *, vo: str, count: int = 1) -> None:
        """Strike out the oldest requests: their tasks have started. Nothing to strike out is no error."""
        oldest = (
            select(PilotRequests.id)
            .where(PilotRequests.ce_name == ce_name, PilotRequests.vo == vo)
            .order_by(PilotRequests.id)
            .limit(count)
            # Within a derived table MySQL allows both the LIMIT and reading from the table it deletes from.
            .subquery("oldest")
        )
        async with self.unit():
            await self.conn.execute(delete(PilotRequests).where(PilotRequests.id.in_(select(oldest.c.id))))

    async def pending_requests(self, *, since: datetime) -> dict[tuple[str, str], int]:
        """Requests newer than `since`, as {(compute element, VO): number}; older ones are struck out.

        Until the transaction ends, no other transaction gets past this line: whoever adds requests after
        counting them counts all of them.
        """
        async with self.unit():
            await self.conn.execute(update(ComputeElements).values(capacity=ComputeElements.capacity))
            await self.conn.execute(delete(PilotRequests).where(PilotRequests.requested_at < since))
            rows = await self.conn.execute(
                select(PilotRequests.ce_name, PilotRequests.vo, func.count()).group_by(
                    PilotRequests.ce_name, PilotRequests.vo
                )
            )
            return {(ce_name, vo): count for ce_name, vo, count in rows}

    async def _lock_ce(self, name: str) -> bool:
        """Hold the row of this compute element until the transaction ends; False when there is none.

        An UPDATE that changes nothing, because SQLite has no SELECT … FOR UPDATE.
        """
        locked = await self.conn.execute(
            update(ComputeElements).where(ComputeElements.name == name).values(capacity=ComputeElements.capacity)
        )
        return bool(locked.rowcount)


def _check_range(capacity: int, success_rate: float) -> None:
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more, not {capacity}")
    if not 0 <= success_rate <= 1:
        raise ValueError(f"success_rate must be between 0 and 1, not {success_rate}")
