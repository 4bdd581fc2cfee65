"""Output of ended pilots: queue, storage and pruning."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import ColumnElement, and_, bindparam, delete, exists, insert, select, update

from gubbins.domain import clock

from .schema import ComputeElements, PilotOutputs, Pilots, columns_of
from .session import PilotSession

_PRUNED_AT_ONCE = 1_000
_CE_COLUMNS = columns_of(Pilots, "vo", "status", "stamp", "reference", "submitted_at", "started_at", "ended_at")


class Output(NamedTuple):
    """Output of a pilot, or the reason why there is none."""

    pilot_id: int
    expires_at: datetime
    stdout: str | None = None
    stderr: str | None = None
    error: str | None = None
    owed: bool = False  # to be written to the pilot registry


class OutputsMixin(PilotSession):
    """The table PilotOutputs."""

    @transaction
    async def queue_outputs(self, pilot_ids: Sequence[int]) -> None:
        """Queue these pilots for the collection of their output."""
        if not pilot_ids:
            return
        these = await self._staged([(id, None) for id in pilot_ids])
        await self.conn.execute(
            insert(PilotOutputs).from_select(
                ["pilot_id", "vo", "ce_name"],
                select(Pilots.id, Pilots.vo, Pilots.ce_name)
                .join(these, self._is_staged(these))
                .where(~exists().where(self._is_staged(these, PilotOutputs.pilot_id))),
            )
        )

    @transaction
    async def ces_with_queued_outputs(self, *, vo: str) -> set[str]:
        """Find the compute elements with queued pilots of the VO."""
        queued = exists().where(_queued(vo, ComputeElements.name))
        return set((await self.conn.execute(select(ComputeElements.name).where(queued))).scalars())

    @transaction
    async def queued_outputs(self, *, vo: str, ce_name: str, limit: int) -> Sequence[Any]:
        """List the VO's queued pilots of a compute element, oldest first.

        Rows of `pilot_id, vo, status, stamp, reference, submitted_at, started_at, ended_at`.
        """
        statement = (
            select(Pilots.id.label("pilot_id"), *_CE_COLUMNS)
            .join(PilotOutputs, PilotOutputs.pilot_id == Pilots.id)
            .where(_queued(vo, ce_name))
            .order_by(PilotOutputs.pilot_id)
            .limit(limit)
        )
        return (await self.conn.execute(statement)).all()

    async def store_outputs(self, outputs: Collection[Output]) -> None:
        """Store fetched outputs."""
        # In a thread and before the transaction: these may be a hundred megabytes.
        rows = await asyncio.to_thread(_rows, outputs)
        if rows:
            await self._store(rows)

    @transaction
    async def _store(self, rows: Sequence[dict[str, Any]]) -> None:
        statement = (
            update(PilotOutputs.__table__)  # type: ignore[arg-type]  # a Table, whatever mypy sees
            .where(PilotOutputs.pilot_id == bindparam("id"))
            .values(
                fetched_at=clock.now(),
                expires_at=bindparam("until"),
                out=bindparam("o"),
                err=bindparam("e"),
                error=bindparam("why"),
                owed=bindparam("too"),
            )
        )
        await self.conn.execute(statement, rows)

    @transaction
    async def get_output(self, pilot_id: int) -> dict[str, Any] | None:
        """Get `stdout`, `stderr`, `error`, `fetched_at` and `expires_at` of a pilot; None: not fetched yet."""
        columns = columns_of(PilotOutputs, "out", "err", "error", "fetched_at", "expires_at")
        statement = select(*columns).where(PilotOutputs.pilot_id == pilot_id, PilotOutputs.fetched_at.is_not(None))
        row = (await self.conn.execute(statement)).one_or_none()
        if row is None:
            return None
        found = dict(row._mapping)
        return {"stdout": _unpacked(found.pop("out")), "stderr": _unpacked(found.pop("err")), **found}

    @transaction
    async def unwritten_outputs(self, *, vo: str, limit: int) -> list[tuple[int, int | None, str, str]]:
        """List outputs to write to the pilot registry, oldest first: id, id in the registry, stdout, stderr."""
        owed = (
            select(PilotOutputs.pilot_id, Pilots.registry_id, PilotOutputs.out, PilotOutputs.err)
            .join(Pilots, Pilots.id == PilotOutputs.pilot_id)
            .where(PilotOutputs.vo == vo, PilotOutputs.owed.is_(True), Pilots.registry_id.is_not(None))
            .order_by(PilotOutputs.pilot_id)
            .limit(limit)
        )
        rows = (await self.conn.execute(owed)).all()
        return [(id, there, _unpacked(out) or "", _unpacked(err) or "") for id, there, out, err in rows]

    @transaction
    async def mark_outputs_written(self, pilot_ids: Sequence[int]) -> None:
        """Mark outputs as written to the pilot registry."""
        await self.conn.execute(update(PilotOutputs).where(PilotOutputs.pilot_id.in_(pilot_ids)).values(owed=None))

    async def prune_outputs(self) -> int:
        """Delete some of the expired outputs; return the number deleted."""
        expired = select(PilotOutputs.pilot_id, PilotOutputs.ce_name).where(PilotOutputs.expires_at < clock.now())
        rows = await self._rows(expired.limit(_PRUNED_AT_ONCE))
        return await self._delete_outputs([row[0] for row in rows], {row[1] for row in rows}) if rows else 0

    @transaction
    async def _delete_outputs(self, pilot_ids: Sequence[int], ce_names: Collection[str]) -> int:
        await self.lock_ces(ce_names)  # first, as all transactions
        pruned = await self.conn.execute(delete(PilotOutputs).where(PilotOutputs.pilot_id.in_(pilot_ids)))
        return int(pruned.rowcount)


def _queued(vo: str, ce_name: Any) -> ColumnElement[bool]:
    return and_(PilotOutputs.vo == vo, PilotOutputs.ce_name == ce_name, PilotOutputs.fetched_at.is_(None))


def _rows(outputs: Collection[Output]) -> list[dict[str, Any]]:
    return [
        {
            "id": each.pilot_id,
            "until": each.expires_at,
            "o": _packed(each.stdout),
            "e": _packed(each.stderr),
            "why": each.error,
            "too": True if each.owed else None,
        }
        for each in outputs
    ]


def _packed(text: str | None) -> bytes | None:
    return None if text is None else zlib.compress(text.encode("utf-8", "replace"))


def _unpacked(data: bytes | None) -> str | None:
    return None if data is None else zlib.decompress(data).decode("utf-8")
